"""The ``flowbench`` command: reads the command line, calls one function, reports errors in one line.

Nothing heavy is imported here; each handler imports what it calls, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from flowbench.config import Experiment

__all__ = ["main"]

_OVERRIDES = """
overrides:
  key=value sets one key of the composed files, e.g. trainer.max_steps=500, optimizer.lr=1e-3,
  evaluator.sweep.network_evaluations=[1,2,4]; --key=value means the same. Later ones win.
"""


class _UsageError(ValueError):
    """A command line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: --") and "." in message:
            hint = "; options of the experiment are written key=value"
        raise _UsageError(f"{message}{hint}; see {self.prog} --help")


@dataclass(frozen=True)
class _Command:
    """One subcommand: what it is for, how to use it, its options, what it calls."""

    summary: str
    examples: str
    options: Callable[[_Parser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``flowbench``; None reads ``sys.argv``.

    Returns:
        Exit status: 0 done, 2 a user's mistake, 1 a failure, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _report("interrupted; the same command continues", 130)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns an interrupt into exit(1)
            return _report("interrupted; the same command continues", 130)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of a pipe, `flowbench list | head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        return _report(f"error: {error}", 2 if _is_user_mistake(error) else 1)


def _report(message: str, status: int) -> int:
    print(f"flowbench: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_user_mistake(error: Exception) -> bool:
    return isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException"  # Lightning's


def _is_expected(error: Exception) -> bool:
    return _is_user_mistake(error) or isinstance(error, (OSError, FloatingPointError))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"flowbench {importlib.metadata.version('flowbench')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see flowbench --help"
        raise _UsageError(f"unknown command '{name}'; {hint}")
    command = COMMANDS[name]
    parser = _parser(name, command)
    # Overrides stand anywhere between the options, which argparse allows only here.
    return command.run(parser.parse_intermixed_args(_plain_overrides(parser, rest)))


def _parser(name: str, command: _Command) -> _Parser:
    parser = _Parser(
        prog=f"flowbench {name}",
        description=command.summary,
        epilog=f"examples:\n{command.examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if any(action.dest == "overrides" for action in parser._actions):
        parser.epilog = f"{_OVERRIDES.lstrip()}\n{parser.epilog}"
    return parser


def _plain_overrides(parser: _Parser, words: list[str]) -> list[str]:
    """Turn ``--key=value`` into ``key=value`` unless the parser has the option."""
    known = parser._option_string_actions
    return [w[2:] if w.startswith("--") and "=" in w and w.partition("=")[0] not in known else w for w in words]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flowbench COMMAND [options] [key=value ...]",
            "",
            "Train flow families under the same data, budget and seeds, and measure what each buys you.",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            "  flowbench fit -c experiments/digits/wcfm.yaml trainer.max_steps=500 --test",
            "  flowbench bench -c experiments/starflow_vs_wcfm.yaml",
            "  flowbench COMMAND --help",
        ]
    )


# ---- options ---------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got '{text}'")
    return int(text)


def _config_options(parser: _Parser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        dest="files",
        action="append",
        metavar="FILE",
        required=True,
        help="experiment file; may be repeated, later files win",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, see below")
    parser.add_argument("--print-config", action="store_true", help="print the composed YAML and stop")
    parser.add_argument("--dry-run", action="store_true", help="validate, say what would run, and stop")


def _fit_options(parser: _Parser) -> None:
    _config_options(parser)
    parser.add_argument("--test", action="store_true", help="measure the averaged weights after training")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto continues from the run's last checkpoint, never starts anew (default: auto)",
    )


def _checkpoint_options(parser: _Parser) -> None:
    _config_options(parser)
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="checkpoint (default: the run's last one)")


def _predict_options(parser: _Parser) -> None:
    _checkpoint_options(parser)
    parser.add_argument("--num-samples", type=_count, metavar="N", default=64, help="how many samples (default: 64)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder (default: samples in the run's folder)")
    parser.add_argument("--guidance", type=float, metavar="S", help="guidance scale; 1 is none")
    parser.add_argument("--network-evaluations", type=_count, metavar="N", help="network evaluations per sample")


def _bench_options(parser: _Parser) -> None:
    parser.add_argument("-c", "--config", dest="file", metavar="FILE", required=True, help="bench file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the bench file")
    parser.add_argument("--jobs", type=_count, metavar="N", help="cells at the same time (default: by the machine)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _compare_options(parser: _Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, two or more")


def _report_options(parser: _Parser) -> None:
    parser.add_argument("directory", type=Path, metavar="BENCH_DIR", help="directory of a bench, e.g. runs/toy_2d")


def _data_options(parser: _Parser) -> None:
    parser.add_argument("action", choices=("list",), help="list: the catalogue of datasets")


def _list_options(parser: _Parser) -> None:
    kinds = ("families", "datasets", "metrics", "networks", "experiments")
    parser.add_argument("kind", nargs="?", choices=kinds, help="what to list (default: everything)")


# ---- handlers --------------------------------------------------------------------------------------------


def _experiment(arguments: argparse.Namespace, trains: bool = False) -> Experiment | None:
    """The validated experiment; None when the command only had to print."""
    from flowbench.config import Experiment, compose, to_yaml

    composed = compose(arguments.files, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(composed.resolved), end="")
        return None
    experiment = Experiment.from_composed(composed)
    if trains:
        experiment.require_budget()
    if arguments.dry_run:
        print(experiment.summary())
        return None
    return experiment


def _run(
    action: Callable[[ModuleType, Experiment, argparse.Namespace], object], trains: bool = False
) -> Callable[[argparse.Namespace], int]:
    """A handler that gives the validated experiment to one function of ``flowbench.runs``."""

    def handler(arguments: argparse.Namespace) -> int:
        experiment = _experiment(arguments, trains)
        if experiment is not None:
            _print_result(action(importlib.import_module("flowbench.runs"), experiment, arguments))
        return 0

    return handler


def _print_result(result: object) -> None:
    """What a command leaves: a folder, with its measurements where it holds some, or named numbers."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if isinstance(result, Path):
        if (result / "rows.jsonl").is_file():
            from flowbench.bench import compare

            print(compare([result]))
        print(result)
    elif isinstance(result, dict):
        for name, value in result.items():
            print(f"{name}  {value}")


_fit = _run(lambda runs, experiment, given: runs.fit(experiment, test=given.test, resume=given.resume), trains=True)
_validate = _run(lambda runs, experiment, given: runs.validate(experiment, given.ckpt))
_test = _run(lambda runs, experiment, given: runs.test(experiment, given.ckpt))
_reference = _run(lambda runs, experiment, given: runs.reference(experiment))
_prepare = _run(lambda runs, experiment, given: runs.prepare(experiment))
_predict = _run(
    lambda runs, experiment, given: runs.predict(
        experiment,
        given.ckpt,
        num_samples=given.num_samples,
        output=given.output,
        guidance=given.guidance,
        network_evaluations=given.network_evaluations,
    )
)


def _bench(arguments: argparse.Namespace) -> int:
    from flowbench.bench import run_bench

    return run_bench(Path(arguments.file), arguments.overrides, arguments.jobs, arguments.dry_run)


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) < 2:
        raise _UsageError("compare needs two run directories or more, got 1")
    from flowbench.bench import compare

    print(compare(arguments.runs))
    return 0


def _report_bench(arguments: argparse.Namespace) -> int:
    from flowbench.bench import build_report

    print(build_report(arguments.directory))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from flowbench.listing import listing

    print(listing(arguments.kind))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from flowbench.listing import listing

    print(listing("datasets"))
    return 0


COMMANDS = {
    "fit": _Command(
        "train one experiment",
        "  flowbench fit -c experiments/digits/wcfm.yaml\n"
        "  flowbench fit -c experiments/digits/wcfm.yaml trainer.max_steps=500 seed=1 --test\n"
        "  flowbench fit -c experiments/digits/wcfm.yaml -c mine.yaml --dry-run\n"
        "  flowbench fit -c runs/wcfm/config.yaml run.name=again",
        _fit_options,
        _fit,
    ),
    "validate": _Command(
        "measure a checkpoint on the validation split",
        "  flowbench validate -c experiments/digits/wcfm.yaml --ckpt runs/wcfm/checkpoints/last.ckpt",
        _checkpoint_options,
        _validate,
    ),
    "test": _Command(
        "measure a checkpoint on the test split",
        "  flowbench test -c runs/wcfm/config.yaml\n"
        "  flowbench test -c experiments/digits/wcfm.yaml --ckpt last.ckpt evaluator.num_samples=1000",
        _checkpoint_options,
        _test,
    ),
    "predict": _Command(
        "draw samples from a checkpoint",
        "  flowbench predict -c runs/wcfm/config.yaml --ckpt runs/wcfm/checkpoints/last.ckpt \\\n"
        "      --num-samples 64 --output samples --guidance 2 --network-evaluations 16",
        _predict_options,
        _predict,
    ),
    "reference": _Command(
        "write the rows that no contender owns: floor, noise, gaussian, gmm",
        "  flowbench reference -c experiments/digits/wcfm.yaml",
        _config_options,
        _reference,
    ),
    "prepare": _Command(
        "train what an experiment requires (autoencoder, feature network) into the cache",
        "  flowbench prepare -c experiments/digits/starflow.yaml",
        _config_options,
        _prepare,
    ),
    "bench": _Command(
        "run a comparison: every contender, every seed, one report",
        "  flowbench bench -c experiments/starflow_vs_wcfm.yaml\n"
        "  flowbench bench -c experiments/toy_2d.yaml seeds=[0,1] budget.train_flops=1e12 --jobs 2\n"
        "  the same command again continues where it stopped",
        _bench_options,
        _bench,
    ),
    "compare": _Command(
        "put the results of several runs side by side",
        "  flowbench compare runs/cfm runs/wcfm",
        _compare_options,
        _compare,
    ),
    "report": _Command(
        "rebuild the report of a bench from its rows",
        "  flowbench report runs/starflow_vs_wcfm",
        _report_options,
        _report_bench,
    ),
    "data": _Command("list the catalogue of datasets", "  flowbench data list", _data_options, _data),
    "list": _Command(
        "list what is available: families, datasets, metrics, networks, experiments",
        "  flowbench list\n  flowbench list families",
        _list_options,
        _list,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
