"""The commands data, stats and evaluate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from flowbench.bench.report import build_report
from flowbench.bench.results import EXTERNAL, collect, load_plan
from flowbench.commands.run_folder import claim, working_in
from flowbench.config import Experiment, compose
from flowbench.config.references import default_references
from flowbench.core.remarks import say_once
from flowbench.core.rows import FLOOR_FILE, write_rows
from flowbench.data import FlowDataModule
from flowbench.evaluation import (
    DensityCoverage,
    Evaluator,
    FrechetDistance,
    Identity,
    KernelDistance,
    Memorization,
    Metric,
    PrecisionRecall,
    get_extractor,
)
from flowbench.evaluation.artifacts import save_pictures
from flowbench.evaluation.earlier import set_aside
from flowbench.evaluation.external import ExternalImages
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import FeatureStatistics, load_statistics, save_statistics

__all__ = ["contender_name", "evaluate", "image_evaluator", "join_bench", "open_data", "open_experiment", "stats"]


def open_data(
    name: str, path: str | None = None, image_size: int | None = None, train_on_val: bool = False, **declared: Any
) -> FlowDataModule:
    """The datamodule of a dataset; ``declared`` is what its options declare of the values of own data."""
    return FlowDataModule(name, path=path, image_size=image_size, train_on_val=train_on_val, **declared)


def image_evaluator(features: Sequence[str], reference: str = "train", num_reference: int | None = None) -> Evaluator:
    """An evaluator of images by their features alone.

    Args:
        features: extractors; every metric is measured with each.
        reference: split that the images are compared with.
        num_reference: the first so many of it; None takes all.
    """
    metrics: dict[str, Metric] = {}
    for name in features:
        limit: dict[str, Any] = {"features": name, "num_reference": num_reference}
        metrics |= {
            f"fd-{name}": FrechetDistance(**limit),
            f"kid-{name}": KernelDistance(**limit),
            f"precision-recall-{name}": PrecisionRecall(**limit),
            f"density-coverage-{name}": DensityCoverage(**limit),
        }
        if reference == "train":  # copies of other splits mean nothing
            metrics[f"memorization-{name}"] = Memorization(**limit)
    split: Literal["train", "val", "test"] = reference  # type: ignore[assignment]
    held_out: Literal["val", "test"] = "val" if reference == "test" else "test"
    return Evaluator(metrics, references=default_references(), reference=split, held_out=held_out)


def open_experiment(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[FlowDataModule, Evaluator]:
    """Data and evaluator of an experiment file.

    Raises:
        ValueError: when it has no evaluator.
    """
    experiment = Experiment.from_composed(compose(list(files), list(overrides)))
    evaluator = experiment.build_evaluator()
    if evaluator is None:
        raise ValueError("the configuration has no section evaluator, so there is nothing to measure")
    return experiment.build_data(), evaluator


def join_bench(samples: Path, bench: Path, name: str | None = None, num_samples: int | None = None) -> Path:
    """Score images as a bench scores its contenders, and put their rows into its tables.

    Args:
        samples: see :func:`evaluate`.
        bench: directory of a bench of one problem that has measured its reference rows.
        name: line in the tables; None takes the name of the samples.
        num_samples: the first so many; None takes as many as the contenders drew.

    Returns:
        The bench's report.

    Raises:
        ValueError: when the directory holds no such bench, or the name is taken.
    """
    plan = load_plan(bench)
    if len(plan["problems"]) != 1:
        raise ValueError(
            f"{bench} has the problems {', '.join(plan['problems'])}; use -c with one cell.yaml of it instead"
        )
    (problem,) = plan["problems"]
    contender = contender_name(name, samples)
    if contender in (*plan["contenders"], *plan["references"][problem]):
        raise ValueError(f"--name: {contender!r} is a contender of the bench already; choose another name")
    config = bench / "reference" / problem / "cell.yaml"
    if not config.is_file():
        raise ValueError(f"{bench} has not run yet (no {config.name} of its reference rows); run the bench first")
    data, evaluator = open_experiment([config])
    identity = Identity(bench=plan["name"], problem=problem, contender=contender)
    folder = bench / EXTERNAL / contender
    found, drawn = len(ExternalImages(samples, data.spec, num_samples)), evaluator.num_samples
    if num_samples is None and found < drawn:
        raise ValueError(
            f"{samples}: holds {found} images, but the contenders drew {drawn} and distances depend on N; give as "
            f"many, or say --num-samples {found} to stand in the table at that N"
        )
    evaluate(
        samples, data, evaluator, output=folder, num_samples=num_samples or evaluator.num_samples, identity=identity
    )
    collect(bench)
    return build_report(bench)


def evaluate(
    samples: Path,
    data: FlowDataModule,
    evaluator: Evaluator,
    *,
    name: str | None = None,
    output: Path | None = None,
    num_samples: int | None = None,
    identity: Identity | None = None,
) -> Path:
    """Score images that any code made.

    Args:
        samples: folder, .npz or .npy; see :class:`flowbench.evaluation.external.ExternalImages`.
        data: what they are compared with.
        evaluator: its feature metrics are measured; likelihood, paths and cost need a model and give no rows.
        name: contender in the rows; None takes the name of the file or folder.
        output: folder for rows.jsonl, the floor's rows outside a bench, and the pictures; None takes `runs/<name>`.
            Earlier rows of other images, or measured in another way, are kept in the folder `before` in it.
        num_samples: the first so many; None takes all.
        identity: bench, problem and contender of the rows; None leaves all but the contender empty. Their
            configuration is what the samples hold.

    Returns:
        The folder.

    Raises:
        ValueError: when the folder holds what another command made, or the images themselves.
    """
    identity = identity or Identity(contender=contender_name(name, samples))
    folder = output or Path("runs") / identity.contender
    _check_output(folder, samples)
    images = ExternalImages(samples, data.spec, num_samples)
    _tell(images)
    evaluator.identity = replace(identity, config_hash=images.content)
    evaluator.num_samples = len(images)
    evaluator.extractors(data, _device())
    rows, pictures = evaluator.external_rows(data, images.batches(), images.at)
    if not rows:
        raise ValueError("the evaluator has no metric on features, so images alone cannot be scored")
    with working_in(folder):
        _check_output(folder, samples)
        set_aside(folder, rows)
        if not evaluator.identity.bench:  # which has its own
            write_rows(folder / FLOOR_FILE, evaluator.floor_rows(data))
        write_rows(folder / "rows.jsonl", rows)
        save_pictures(folder, pictures)
        evaluator.raise_bug()
    return folder


def _check_output(folder: Path, samples: Path) -> None:
    """Rows and pictures go neither among another command's results nor among the images."""
    claim(folder, "external", "give another --output or --name")
    if samples.is_dir() and folder.resolve().is_relative_to(samples.resolve()):
        raise ValueError(f"{folder} lies in the samples, which would hold its pictures too: give another --output")


def contender_name(name: str | None, samples: Path) -> str:
    """The name of a contender that others made: one part of a path, because it names a folder.

    Args:
        name: what the user asked for; None takes that of the file or folder.
        samples: what is scored.

    Raises:
        ValueError: for a name that is no such part.
    """
    path = samples.resolve()
    found = name or (path.name if path.is_dir() else path.stem)
    if not re.fullmatch(r"[\w.+ -]*\w[\w.+ -]*", found):
        raise ValueError(f"--name: {found!r} cannot name a folder; use letters, digits, '.', '-', '_' and '+'")
    return found


def _tell(images: ExternalImages) -> None:
    """Print what was left out of a folder."""
    if images.remark:
        say_once(f"samples: {images.remark}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def stats(
    data: FlowDataModule,
    output: Path,
    *,
    features: str = "inception",
    split: str = "train",
    samples: Path | None = None,
    num_samples: int | None = None,
) -> Path:
    """Write the feature statistics of a split, or of images, with what they are of.

    Args:
        data: the data.
        output: the file.
        features: name of the extractor.
        split: of the data.
        samples: images to take instead of the split.
        num_samples: the first so many; None takes all.

    Returns:
        `output`.

    Raises:
        ValueError: when the file exists and holds anything but the same statistics.
    """
    extractor = get_extractor(features, data, _device())
    if samples is None:
        real = RealSet(data, split, num_samples)
        metadata = real.metadata(extractor, len(real))
        _check_statistics(output, metadata)
        save_statistics(output, real.statistics(extractor), metadata)
        return output
    images = ExternalImages(samples, data.spec, num_samples)
    _tell(images)
    metadata = {
        "dataset": samples.name,
        "version": images.content,
        "extractor": extractor.name,
        "checksum": extractor.checksum,
        "protocol": extractor.protocol,
        "transform": "uint8",
        "count": len(images),
    }
    _check_statistics(output, metadata)
    statistics = FeatureStatistics(extractor.dimension)
    for _, pictures in images.batches():
        statistics.update(extractor(pictures).cpu())
    save_statistics(output, statistics, metadata)
    return output


def _check_statistics(output: Path, metadata: Mapping[str, Any]) -> None:
    """Statistics may take the place of the same ones, and of nothing else."""
    if not output.exists():
        return
    try:
        _, found = load_statistics(output)
    except ValueError:
        raise ValueError(f"{output} exists and holds no statistics of features: give another --output") from None
    other = [f"{key} {found.get(key)!r}, now {value!r}" for key, value in metadata.items() if found.get(key) != value]
    if other:
        raise ValueError(
            f"{output} holds other statistics ({', '.join(other[:4])}): give another --output, or delete it"
        )
