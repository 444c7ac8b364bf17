"""Commands on benches and their results: bench, compare, report, list, check."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowbench.cli.output import answer
from flowbench.cli.parser import Command, Parser, UsageError, count, path
from flowbench.cli.summaries import show

__all__ = ["COMMANDS"]

_BENCH_OVERRIDES = (
    "key=value sets one key of the bench file: seeds=[0], budget.steps=500, run_dir=runs/again. What belongs to the "
    "experiments is set by problem, problems.NAME.overrides.evaluator.num_samples=200, or by contender. Later ones win."
)


def _bench_options(parser: Parser) -> None:
    parser.add_argument("-c", "--config", dest="file", metavar="FILE", required=True, help="bench file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the bench file")
    parser.add_argument("--jobs", type=count, metavar="N", help="cells at the same time (default: by the machine)")
    parser.add_argument("--dry-run", action="store_true", help="check every experiment, print the plan and stop")


def _compare_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="directories of runs or benches, two or more")
    parser.add_argument(
        "--baseline",
        type=path,
        metavar="RUN",
        help="say what moved beyond noise since this run or bench; exit status 1 where anything is worse",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="with --baseline: write every change to a file")


def _report_options(parser: Parser) -> None:
    parser.add_argument("directory", type=path, metavar="BENCH_DIR", help="directory of a bench, e.g. runs/toy_2d")


def _list_options(parser: Parser) -> None:
    kinds = ("families", "datasets", "metrics", "networks", "experiments")
    parser.add_argument("kind", nargs="?", choices=kinds, help="what to list (default: everything)")


def _check_options(parser: Parser) -> None:
    parser.add_argument("class_path", metavar="CLASS", help="a family, e.g. my_package.MyFamily")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of its constructor")
    parser.add_argument("--dataset", default="eight_gaussians", help="what it is built for (default: eight_gaussians)")


def _bench(arguments: argparse.Namespace) -> int:
    from flowbench.bench.forked import SERVER
    from flowbench.commands.bench import run_bench

    return run_bench(Path(arguments.file), arguments.overrides, arguments.jobs, arguments.dry_run, server=SERVER)


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.baseline is not None:
        return _compare_with_baseline(arguments)
    if arguments.json is not None:
        raise UsageError("--json goes with --baseline: without one there are no changes to write")
    if len(arguments.runs) < 2:
        raise UsageError("compare needs two run directories or more, got 1")
    from flowbench.bench import compare

    answer(compare(arguments.runs))
    return 0


def _compare_with_baseline(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) != 1:
        raise UsageError(f"compare --baseline takes one run to compare with it, got {len(arguments.runs)}")
    from flowbench.bench.regressions import compare_with_baseline
    from flowbench.core.storage import write_text

    gate = compare_with_baseline(arguments.baseline, arguments.runs[0])
    if arguments.json is not None:
        write_text(arguments.json, gate.to_json())
    answer(gate.text())
    return int(bool(gate.regressions))


def _report_bench(arguments: argparse.Namespace) -> int:
    from flowbench.bench import build_report

    report = build_report(arguments.directory)
    show([("report", "tables, claims and pictures of the bench, from its rows")], report)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from flowbench.commands.listing import listing

    answer(listing(arguments.kind))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from flowbench.commands.check import check, report

    outcomes = check(arguments.class_path, arguments.overrides, arguments.dataset)
    answer(report(outcomes))
    return int(any(outcome.status == "failed" for outcome in outcomes))


COMMANDS = {
    "bench": Command(
        "run a comparison: every contender, every seed, one report; the same command again continues",
        (
            "flowbench bench -c flowbench:starflow_vs_wcfm.yaml",
            "flowbench bench -c flowbench:toy_2d.yaml seeds=[0,1] budget.train_flops=1e12 --jobs 2",
        ),
        _bench_options,
        _bench,
        _BENCH_OVERRIDES,
    ),
    "compare": Command(
        "put the results of several runs side by side, or say what became worse since one of them",
        (
            "flowbench compare runs/cfm runs/wcfm",
            "flowbench compare --baseline runs/families_digits runs/after_my_change --json changes.json",
        ),
        _compare_options,
        _compare,
    ),
    "report": Command(
        "rebuild the report of a bench from its rows",
        ("flowbench report runs/starflow_vs_wcfm",),
        _report_options,
        _report_bench,
    ),
    "check": Command(
        "run the contract of every family on one of yours: gradients, densities, inverses, checkpoints",
        (
            "flowbench check my_package.MyFamily width=64",
            "flowbench check flowbench.families.TARFlow layers=[1,1] width=16 head_dim=8 start=learned",
        ),
        _check_options,
        _check,
        "key=value sets an argument of the constructor: width=64, network={class_path: flowbench.networks.MLP}.",
    ),
    "list": Command(
        "list what is available: families, datasets, metrics, networks, experiments",
        (
            "flowbench list",
            "flowbench list families",
        ),
        _list_options,
        _list,
    ),
}
