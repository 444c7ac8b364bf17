"""Commands on one experiment file: fit, validate, test, predict, reference, prepare, count."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flowbench.cli.output import answer
from flowbench.cli.parser import Command, Parser, config_options, count, path
from flowbench.cli.summaries import fit_facts, measured_facts, prediction_facts, preparation_facts, show
from flowbench.cli.unmeasured import report_unmeasured
from flowbench.commands.prediction.request import OPTIONS, PRIORS, TASKS

if TYPE_CHECKING:
    from flowbench.config import Experiment

__all__ = ["COMMANDS"]


def _fit_options(parser: Parser) -> None:
    config_options(parser)
    parser.add_argument("--test", action="store_true", help="measure the averaged weights after training")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto continues from the run's last checkpoint, never starts anew (default: auto)",
    )


def _checkpoint_options(parser: Parser) -> None:
    config_options(parser)
    parser.add_argument("--ckpt", type=path, metavar="FILE", help="checkpoint (default: the run's last one)")


def _predict_options(parser: Parser) -> None:
    _checkpoint_options(parser)

    # Only options that were given reach the task, which refuses those that it does not take.
    def option(name: str, **details: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **details)

    option("--task", choices=TASKS, metavar="TASK", help=f"{', '.join(TASKS)} (default: sample)")
    option("--output", type=path, metavar="DIR", help="folder (default: samples, or the task, in the run's folder)")
    option("--num-samples", type=count, metavar="N", help="samples, images, points or pairs (default: by task)")
    option("--guidance", type=float, metavar="S", help="sample, edit: guidance scale; 1 is none")
    option("--network-evaluations", type=count, metavar="N", help="sample: network evaluations per sample")
    option("--split", choices=("train", "val", "test"), help="all but sample: where the data are from (default: test)")
    option("--images", type=path, metavar="FILE", help="in place of the split: npz with x and label, e.g. samples.npz")
    option("--classes", type=class_list, metavar="K,...", help="edit: classes to decode (default: all)")
    option("--steps", type=count, metavar="T", help="interpolate: states, the ends included (default: 8)")
    option("--mask", metavar="MASK", help="inpaint: left, right, top, bottom, center, random-0.5 or a PNG file")
    option("--rounds", type=count, metavar="R", help="inpaint: rounds of encoding and decoding (default: 8)")
    option("--draws", type=count, metavar="D", help="inpaint: inpaintings of each image (default: 3)")
    option("--prior", choices=PRIORS, help="classify: over the classes (default: uniform)")


def class_list(text: str) -> tuple[int, ...]:
    """Class numbers with commas between them, as an option's type."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected class numbers such as 0,3,8, got '{text}'")
    return tuple(int(part) for part in parts)


def _experiment(arguments: argparse.Namespace, trains: bool = False, reads_data: bool = True) -> Experiment | None:
    """The validated experiment; None when the command only had to print.

    Args:
        arguments: of the command line.
        trains: whether it is to be trained, so that it needs a budget.
        reads_data: whether a dry run rehearses it and the user's own files are identified.
    """
    from flowbench.config import Experiment, compose, to_yaml

    composed = compose(arguments.files, arguments.overrides, identify=reads_data)
    if arguments.print_config:
        answer(to_yaml(composed.resolved).rstrip("\n"))
        return None
    experiment = Experiment.from_composed(composed)
    if trains:
        experiment.require_budget()
    if arguments.dry_run:
        if reads_data:
            from flowbench.commands.rehearsal import Rehearsal

            Rehearsal(here=False).run(experiment)
        answer(experiment.summary())
        return None
    return experiment


def _run(
    action: Callable[[ModuleType, Experiment, argparse.Namespace], Path | None], trains: bool = False
) -> Callable[[argparse.Namespace], int]:
    """A handler that gives the validated experiment and ``flowbench.commands.runs`` to an action.

    The action prints what it did, and returns the folder of the rows that it measured.
    """

    def handler(arguments: argparse.Namespace) -> int:
        experiment = _experiment(arguments, trains)
        if experiment is None:
            return 0
        measured = action(importlib.import_module("flowbench.commands.runs"), experiment, arguments)
        return 0 if measured is None else report_unmeasured(measured)

    return handler


def _fit(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    folder = runs.fit(experiment, test=given.test, resume=given.resume)
    show(fit_facts(folder, given.test), folder, table=folder if given.test else None)
    return folder if given.test else None


def _validate(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    metrics = runs.validate(experiment, given.ckpt)
    show([(name, f"{value:.6g}") for name, value in metrics.items()])
    return None


def _test(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    folder = runs.test(experiment, given.ckpt)
    show(measured_facts(folder), folder, table=folder)
    return folder


def _reference(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    folder = runs.reference(experiment)
    show(measured_facts(folder), folder, table=folder)
    return folder


def _prepare(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    show(preparation_facts(runs.prepare(experiment), experiment.resolved.get("evaluator")))
    return None


def _predict(runs: ModuleType, experiment: Experiment, given: argparse.Namespace) -> Path | None:
    folder = runs.predict(experiment, given.ckpt, **_given(given))
    show(prediction_facts(folder), folder)
    return None


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of predict that stand on the command line."""
    names = {"task", "output", *(name for options in OPTIONS.values() for name in options)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _count(arguments: argparse.Namespace) -> int:
    experiment = _experiment(arguments, reads_data=False)  # the shape is declared; the data may be large
    if experiment is not None:
        from flowbench.commands.counting import count as count_model
        from flowbench.commands.counting import count_text

        answer(count_text(count_model(experiment)))
    return 0


COMMANDS = {
    "fit": Command(
        "train one experiment",
        (
            "flowbench fit -c flowbench:digits/wcfm.yaml",
            "flowbench fit -c flowbench:digits/wcfm.yaml trainer.max_steps=500 seed=1 --test",
            "flowbench fit -c flowbench:digits/wcfm.yaml -c mine.yaml --dry-run",
            "flowbench fit -c runs/wcfm/config.yaml run.name=again",
        ),
        _fit_options,
        _run(_fit, trains=True),
    ),
    "validate": Command(
        "measure a checkpoint on the validation split",
        ("flowbench validate -c flowbench:digits/wcfm.yaml --ckpt runs/wcfm/checkpoints/last.ckpt",),
        _checkpoint_options,
        _run(_validate),
    ),
    "test": Command(
        "measure a checkpoint on the test split",
        (
            "flowbench test -c runs/wcfm/config.yaml",
            "flowbench test -c flowbench:digits/wcfm.yaml --ckpt last.ckpt evaluator.num_samples=1000",
        ),
        _checkpoint_options,
        _run(_test),
    ),
    "predict": Command(
        "draw samples from a checkpoint, or reconstruct, edit, interpolate, inpaint, classify",
        (
            "flowbench predict -c runs/wcfm/config.yaml --num-samples 64 --output samples --network-evaluations 16",
            "flowbench predict -c runs/wcfm/config.yaml --ckpt runs/wcfm/checkpoints/last.ckpt --guidance 2",
            "flowbench predict -c runs/tarflow/config.yaml --task inpaint --mask left --rounds 8",
            "flowbench predict -c runs/tarflow/config.yaml --task edit --classes 0,3,8",
            "flowbench predict -c runs/tarflow/config.yaml --task classify --split val --prior train",
        ),
        _predict_options,
        _run(_predict),
    ),
    "reference": Command(
        "write the rows that no contender owns: floor, noise, gaussian, gmm",
        ("flowbench reference -c flowbench:digits/wcfm.yaml",),
        config_options,
        _run(_reference),
    ),
    "prepare": Command(
        "train what an experiment requires (autoencoder, feature network) into the cache",
        ("flowbench prepare -c flowbench:digits/starflow.yaml",),
        config_options,
        _run(_prepare),
    ),
    "count": Command(
        "count parameters, operations, cache and memory of a model; reads no data, allocates no weights",
        (
            "flowbench count -c flowbench:large/starflow_imagenet256.yaml",
            "flowbench count -c flowbench:cifar10/gpu/tarflow.yaml model.init_args.width=512",
        ),
        config_options,
        _count,
    ),
}
