"""Commands on one experiment file: fit, validate, test, predict, reference, prepare."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from flowbench.cli.parser import Command, Parser, config_options, count, print_result

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
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="checkpoint (default: the run's last one)")


def _predict_options(parser: Parser) -> None:
    _checkpoint_options(parser)
    parser.add_argument("--num-samples", type=count, metavar="N", default=64, help="how many samples (default: 64)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder (default: samples in the run's folder)")
    parser.add_argument("--guidance", type=float, metavar="S", help="guidance scale; 1 is none")
    parser.add_argument("--network-evaluations", type=count, metavar="N", help="network evaluations per sample")


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
            print_result(action(importlib.import_module("flowbench.runs"), experiment, arguments))
        return 0

    return handler


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


COMMANDS = {
    "fit": Command(
        "train one experiment",
        "  flowbench fit -c experiments/digits/wcfm.yaml\n"
        "  flowbench fit -c experiments/digits/wcfm.yaml trainer.max_steps=500 seed=1 --test\n"
        "  flowbench fit -c experiments/digits/wcfm.yaml -c mine.yaml --dry-run\n"
        "  flowbench fit -c runs/wcfm/config.yaml run.name=again",
        _fit_options,
        _fit,
    ),
    "validate": Command(
        "measure a checkpoint on the validation split",
        "  flowbench validate -c experiments/digits/wcfm.yaml --ckpt runs/wcfm/checkpoints/last.ckpt",
        _checkpoint_options,
        _validate,
    ),
    "test": Command(
        "measure a checkpoint on the test split",
        "  flowbench test -c runs/wcfm/config.yaml\n"
        "  flowbench test -c experiments/digits/wcfm.yaml --ckpt last.ckpt evaluator.num_samples=1000",
        _checkpoint_options,
        _test,
    ),
    "predict": Command(
        "draw samples from a checkpoint",
        "  flowbench predict -c runs/wcfm/config.yaml --ckpt runs/wcfm/checkpoints/last.ckpt \\\n"
        "      --num-samples 64 --output samples --guidance 2 --network-evaluations 16",
        _predict_options,
        _predict,
    ),
    "reference": Command(
        "write the rows that no contender owns: floor, noise, gaussian, gmm",
        "  flowbench reference -c experiments/digits/wcfm.yaml",
        config_options,
        _reference,
    ),
    "prepare": Command(
        "train what an experiment requires (autoencoder, feature network) into the cache",
        "  flowbench prepare -c experiments/digits/starflow.yaml",
        config_options,
        _prepare,
    ),
}
