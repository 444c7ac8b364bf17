"""Commands on data and on other people's samples: data, stats, evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.cli.output import answer
from flowbench.cli.parser import Command, Parser, UsageError, count, path
from flowbench.cli.summaries import measured_facts, show, statistics_facts
from flowbench.cli.unmeasured import report_unmeasured

if TYPE_CHECKING:
    from flowbench.data import FlowDataModule

__all__ = ["COMMANDS"]


def _data_options(parser: Parser) -> None:
    parser.add_argument("action", choices=("list", "get"), help="list the catalogue, or get a dataset of it")
    parser.add_argument("names", nargs="*", metavar="NAME", help="datasets to get")


def _dataset_options(parser: Parser, required: bool) -> None:
    parser.add_argument("--data", metavar="NAME", required=required, help="dataset of the catalogue, e.g. cifar10")
    parser.add_argument("--path", metavar="PATH", help="your data, with --data npz, npy, pt or image_folder")
    parser.add_argument("--image-size", type=count, metavar="PIXELS", help="with --data image_folder")
    parser.add_argument("--levels", type=count, metavar="K", help="your data are integers 0..K-1")
    parser.add_argument("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of your float images")
    parser.add_argument("--standardize", choices=("true", "false"), help="shift and scale your vectors, or not")
    parser.add_argument(
        "--train-on-val", action="store_true", help="take the whole canonical training set as the split train"
    )


def _stats_options(parser: Parser) -> None:
    _dataset_options(parser, required=True)
    parser.add_argument("--samples", type=path, metavar="DIR_OR_NPZ", help="of these images instead of a split's")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: train")
    parser.add_argument("--features", metavar="NAME", default="inception", help="extractor (default: inception)")
    parser.add_argument("--num-samples", type=count, metavar="N", help="the first N images (default: all)")
    parser.add_argument("--output", "-o", type=path, metavar="FILE", required=True, help=".npz file to write")


def _evaluate_options(parser: Parser) -> None:
    parser.add_argument("--samples", type=path, metavar="DIR_OR_NPZ", help="images to score")
    parser.add_argument("--ckpt", type=path, metavar="FILE", help="released weights to score instead; with -c")
    parser.add_argument("--format", choices=("tarflow",), help="layout of --ckpt: tarflow is that of apple/ml-tarflow")
    _dataset_options(parser, required=False)
    parser.add_argument(
        "-c",
        "--config",
        dest="files",
        action="append",
        metavar="FILE",
        help="experiment file whose data and evaluator (with --ckpt its model, too) are used, instead of --data",
    )
    parser.add_argument(
        "--bench", type=path, metavar="DIR", help="bench that says how to measure, and whose tables the rows join"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the experiment file")
    parser.add_argument(
        "--features",
        action="append",
        metavar="NAME",
        help="extractor, may be repeated; with --data (default: inception)",
    )
    parser.add_argument("--num-samples", type=count, metavar="N", help="the first N images (default: all)")
    parser.add_argument(
        "--num-reference", type=count, metavar="N", help="the first N of the reference split; with --data"
    )
    parser.add_argument("--reference", choices=("train", "val", "test"), help="reference split (default: train)")
    parser.add_argument("--name", metavar="NAME", help="contender's name in the rows (default: that of the file)")
    parser.add_argument("--output", "-o", type=path, metavar="DIR", help="folder (default: runs/NAME)")


def _data(arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        if arguments.names:
            raise UsageError(f"data list takes no names, got {' '.join(arguments.names)}")
        from flowbench.commands.listing import data_table

        answer(data_table())
        return 0
    if not arguments.names:
        raise UsageError("data get needs the name of a dataset; see flowbench data list")
    from flowbench.core.places import data_root
    from flowbench.data.inventory import get

    for name in arguments.names:
        get(name, data_root(name))
    return 0


def _open(arguments: argparse.Namespace) -> FlowDataModule:
    """The data that the options name."""
    from flowbench.commands.scoring import open_data

    return open_data(
        arguments.data,
        arguments.path,
        arguments.image_size,
        arguments.train_on_val,
        levels=arguments.levels,
        value_range=None if arguments.value_range is None else tuple(arguments.value_range),
        standardize=None if arguments.standardize is None else arguments.standardize == "true",
    )


def _stats(arguments: argparse.Namespace) -> int:
    from flowbench.commands import scoring

    file = scoring.stats(
        _open(arguments),
        arguments.output,
        features=arguments.features,
        split=arguments.split,
        samples=arguments.samples,
        num_samples=arguments.num_samples,
    )
    from flowbench.metrics import load_statistics

    statistics, metadata = load_statistics(file)
    show(statistics_facts(metadata, len(statistics.mean)), file)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    if (arguments.samples is None) == (arguments.ckpt is None):
        raise UsageError(f"evaluate needs {'one' if arguments.ckpt else 'either'} of --samples and --ckpt")
    if arguments.ckpt is not None:
        return _evaluate_released(arguments)
    if arguments.format is not None:
        raise UsageError("--format goes with --ckpt: images have no layout")
    places = {"--data": arguments.data, "-c": arguments.files, "--bench": arguments.bench}
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"evaluate needs one of --data, -c and --bench, got {' and '.join(given) or 'none'}")
    _refuse_unused(arguments, given[0])
    from flowbench.commands import scoring

    if arguments.data is not None:
        data = _open(arguments)
        features = arguments.features or ["inception"]
        evaluator = scoring.image_evaluator(features, arguments.reference or "train", arguments.num_reference)
    elif arguments.files is not None:
        data, evaluator = scoring.open_experiment(arguments.files, arguments.overrides)
    else:
        report = scoring.join_bench(arguments.samples, arguments.bench, arguments.name, arguments.num_samples)
        show([("joined", f"the tables of {arguments.bench}")], report)
        return 0
    wanted = {"name": arguments.name, "output": arguments.output, "num_samples": arguments.num_samples}
    folder = scoring.evaluate(arguments.samples, data, evaluator, **wanted)
    show(measured_facts(folder), folder, table=folder)
    return report_unmeasured(folder)


def _evaluate_released(arguments: argparse.Namespace) -> int:
    if arguments.files is None or arguments.format is None:
        raise UsageError("--ckpt needs -c FILE, which says what model the weights are of, and --format")
    _refuse_unused(arguments, "-c")
    for option in ("data", "bench", "num_samples"):
        if getattr(arguments, option) is not None:
            remedy = "give evaluator.num_samples=N" if option == "num_samples" else "the experiment says it"
            raise UsageError(f"--{option.replace('_', '-')} does not go with --ckpt: {remedy}")
    from flowbench.commands import scoring
    from flowbench.commands.runs import evaluate_released
    from flowbench.config import Experiment

    name = scoring.contender_name(arguments.name, arguments.ckpt)
    experiment = Experiment.from_files(arguments.files, [*arguments.overrides, f"run.name={name}"])
    experiment = experiment.at(arguments.output or Path("runs") / name)
    folder = evaluate_released(experiment, arguments.ckpt, arguments.format)
    show(measured_facts(folder), folder, table=folder)
    return report_unmeasured(folder)


def _refuse_unused(arguments: argparse.Namespace, place: str) -> None:
    """Options that say how to measure go with --data alone: a file or a bench says it already."""
    own = ("path", "image_size", "levels", "value_range", "standardize")
    for option in (*own, "train_on_val", "features", "num_reference", "reference"):
        if place != "--data" and getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')} goes with --data; with {place} the experiment says it")
    if place != "-c" and arguments.overrides:
        raise UsageError(f"the override {arguments.overrides[0]} goes with -c FILE, not with {place}")
    if place == "--bench" and arguments.output is not None:
        raise UsageError("--output does not go with --bench: the rows lie in the bench's folder")


COMMANDS = {
    "evaluate": Command(
        "score images that any code made, or weights that it released, with the rows of everybody else",
        (
            "flowbench evaluate --samples samples.npz --data cifar10 --num-reference 10000",
            "flowbench evaluate --samples folder -c flowbench:cifar10/gpu/cfm.yaml --name stranger",
            "flowbench evaluate --samples folder --bench runs/families_cifar10 --name stranger",
            "flowbench evaluate --ckpt model.pth --format tarflow -c flowbench:large/tarflow_imagenet64.yaml",
        ),
        _evaluate_options,
        _evaluate,
    ),
    "stats": Command(
        "write the feature statistics of a split, or of images, to a file",
        ("flowbench stats --data cifar10 --split train --features inception --output cifar10-train.npz",),
        _stats_options,
        _stats,
    ),
    "data": Command(
        "list the catalogue of datasets, or get one",
        (
            "flowbench data list",
            "flowbench data get cifar10",
        ),
        _data_options,
        _data,
    ),
}
