"""Drawing from a flow: a stream of samples that is scored and thrown away, and a few paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.core.contract import returned
from flowbench.core.seeds import derive_seed
from flowbench.core.sweep import read_sweep
from flowbench.data import FlowDataModule
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index, shard
from flowbench.evaluation.measurement import SweptName
from flowbench.evaluation.samples import Collector, DrawnSet
from flowbench.evaluation.stages import Steps, uncounted
from flowbench.families import FlowModule, Samples, Trajectory
from flowbench.families.conditioning.base import SpatialCondition
from flowbench.metrics import FeatureExtractor, PathGeometry, block_geometry, path_geometry

__all__ = [
    "Drawing",
    "Imposed",
    "Paths",
    "condition_at",
    "condition_rows",
    "draw_paths",
    "draw_samples",
    "labels_of",
    "space_name",
    "sweep_points",
]


@dataclass(frozen=True)
class Imposed:
    """What a sweep imposes on a flow's sampler; None leaves the flow's own.

    Attributes:
        network_evaluations: evaluations per sample.
        guidance: scale of the guidance, 1 = none.
    """

    network_evaluations: int | None = None
    guidance: float | None = None

    def __str__(self) -> str:
        """What it is, for people."""
        return f"guidance {self.guidance:g}" if self.guidance is not None else f"{self.network_evaluations} evaluations"

    @property
    def swept(self) -> SweptName:
        """Which of the two is imposed."""
        if self.guidance is not None:
            return "guidance"
        return "" if self.network_evaluations is None else "network_evaluations"

    @property
    def at(self) -> float | None:
        """The value that is imposed."""
        return self.network_evaluations if self.guidance is None else self.guidance


def sweep_points(sweep: Mapping[str, list[float]] | None) -> list[Imposed]:
    """The points of a sweep, evaluations before guidance.

    Raises:
        ValueError: for an unknown axis or a number that cannot be imposed.
    """
    points = read_sweep("evaluator.sweep", sweep)
    evaluations = [Imposed(network_evaluations=int(number)) for number in points.get("network_evaluations", [])]
    return evaluations + [Imposed(guidance=float(scale)) for scale in points.get("guidance", [])]


@dataclass(frozen=True)
class Drawing:
    """Who is drawn from, and how.

    Attributes:
        flow: the flow, with the weights that are measured in place.
        data: its data.
        seed: the evaluation seed.
        num_samples: samples over all processes.
        batch_size: samples at a time.
        label_split: split whose labels a conditional flow is given.
        rank: this process.
        world_size: number of processes.
        condition_split: split whose images make the conditions of a flow that takes more than labels.
        report: is told how many samples of how many are done.
    """

    flow: FlowModule
    data: FlowDataModule
    seed: int
    num_samples: int
    batch_size: int
    label_split: str
    rank: int = 0
    world_size: int = 1
    condition_split: str = "test"
    report: Steps = uncounted

    def batches(self, index: Tensor) -> Iterator[Tensor]:
        """Indices of `batch_size` samples at a time, and a report after each of these batches."""
        done = 0
        for chunk in index.split(self.batch_size):
            yield chunk
            done += len(chunk)
            self.report(done, len(index))

    def sample(self, index: Tensor, labels: Tensor | None, imposed: Imposed | None = None) -> Samples:
        """The samples at some indices; the same for any batch and any number of processes."""
        flow, imposed = self.flow, imposed or Imposed()
        condition = labels[index].to(flow.device) if labels is not None else None
        return flow.sample(
            flow.draw_noise(index, self.seed),
            condition,
            network_evaluations=imposed.network_evaluations,
            guidance=imposed.guidance,
            **given_condition(self, index),
        )


def condition_rows(drawing: Drawing, index: Tensor) -> Tensor:
    """The held-out image of each sample: they take turns."""
    return index % len(drawing.data.split(drawing.condition_split))


def condition_at(drawing: Drawing, index: Tensor) -> SpatialCondition | None:
    """Conditions of the samples at some indices: sample i is given what image i (modulo their number) shows.

    Masks are keyed by the sample's index, so an image that comes again has another one.

    Args:
        drawing: whose samples, from which held-out split.
        index: sample indices, shape (B,).

    Returns:
        None for a flow without such conditions.
    """
    flow = drawing.flow
    if flow.conditioner is None:
        return None
    split, rows = drawing.condition_split, condition_rows(drawing, index)
    x, given = drawing.data.model_values(split, rows).to(flow.device), drawing.data.conditions(split, rows)
    return flow.conditioner.held_out_condition(x, given, index, drawing.seed, flow.space)


def condition_labels(drawing: Drawing) -> Tensor:
    """Labels of the images that conditions are made from: a class at odds with its own image would be no sample."""
    label = drawing.data.split(drawing.condition_split).label
    assert label is not None, "a conditional flow has labelled data"
    return label[condition_rows(drawing, torch.arange(drawing.num_samples))]


def given_condition(drawing: Drawing, index: Tensor) -> dict[str, SpatialCondition]:
    """:func:`condition_at` as the argument `spatial` of a flow's methods; empty for flows that do not take it."""
    condition = condition_at(drawing, index)
    return {} if condition is None else {"spatial": condition}


def labels_of(drawing: Drawing) -> Tensor | None:
    """Labels of a conditional flow's samples: drawn from the reference split by the evaluation seed."""
    if drawing.flow.num_classes is None:
        return None
    if drawing.flow.conditioner is not None:
        return condition_labels(drawing)
    label = drawing.data.split(drawing.label_split).label
    assert label is not None, "a conditional flow has labelled data"
    rng = torch.Generator().manual_seed(derive_seed(drawing.seed, "labels"))
    return label[torch.randint(len(label), (drawing.num_samples,), generator=rng)]


def draw_samples(
    drawing: Drawing,
    extractors: Mapping[str, FeatureExtractor],
    counts: Mapping[str, int],
    num_shown: int,
    imposed: Imposed | None = None,
) -> tuple[DrawnSet, float, float]:
    """Draw, extract and throw away, batch by batch.

    Args:
        drawing: whose samples.
        extractors: feature extractors by name.
        counts: samples that each extractor is asked for.
        num_shown: samples to keep for pictures.
        imposed: what a sweep imposes; None is the flow's own sampler.

    Returns:
        The set, mean evaluations per sample, samples per second of this process.
    """
    collector = Collector(drawing.data.spec, extractors, counts, num_shown)
    costs, seconds = [], 0.0
    with agreed():
        index = shard(drawing.num_samples, drawing.rank, drawing.world_size)
        labels = labels_of(drawing)
        drawing.sample(index[:2], labels, imposed)  # the first call allocates and compiles: no part of the rate
        for chunk in drawing.batches(index):
            drawn = drawing.sample(chunk, labels, imposed)
            collector.add(chunk, drawn.x)
            # An adaptive solver's cost differs from batch to batch.
            costs.append(torch.full((len(chunk),), drawn.network_evaluations, dtype=torch.float64))
            seconds += drawn.seconds
    cost = gather_by_index(index, torch.cat(costs))

    def pictures(wanted: Tensor) -> Tensor:
        """Draw some samples again: their noise is keyed by their index."""
        parts = [drawing.sample(part, labels, imposed).x for part in wanted.split(drawing.batch_size)]
        return drawing.data.spec.to_uint8(torch.cat(parts).cpu().nan_to_num(-1.0))

    return collector.gathered("generated", pictures, labels), float(cost.mean()), len(index) / seconds


@dataclass(frozen=True)
class Paths:
    """Paths from source to data.

    Attributes:
        geometry: of every path.
        shown: states of the first paths in the flow's space, shape (T, B, *D).
        times: shape (T,).
    """

    geometry: PathGeometry
    shown: Tensor
    times: Tensor


def draw_paths(drawing: Drawing, num_paths: int, num_points: int, num_shown: int) -> Paths:
    """Paths by index over all processes; a collective.

    Args:
        drawing: whose paths.
        num_paths: how many.
        num_points: states along each path of a continuous flow.
        num_shown: paths whose states are kept.
    """
    flow = drawing.flow
    geometries, states = [], []
    times = torch.empty(0)
    with agreed():
        index, labels = shard(num_paths, drawing.rank, drawing.world_size), labels_of(drawing)
        for chunk in drawing.batches(index):
            row = chunk % drawing.num_samples  # paths beyond the samples take their labels and conditions again
            condition = labels[row].to(flow.device) if labels is not None else None
            noise, given = flow.draw_noise(chunk, drawing.seed), given_condition(drawing, row)
            path = returned(flow.trajectory(noise, condition, num_points, **given), Trajectory, flow, "trajectory")
            geometries.append(_geometry(path))
            states.append(path.states.transpose(0, 1)[chunk.to(path.states.device) < num_shown].cpu())
            times = path.times
        local = PathGeometry.concatenate(geometries)
    gathered = {name: gather_by_index(index, value) for name, value in local.tensors.items()}
    shown = gather_by_index(index[index < num_shown], torch.cat(states))
    return Paths(PathGeometry(**gathered), shown.transpose(0, 1), times)


def _geometry(path: Trajectory) -> PathGeometry:
    """Geometry of the paths; of paths that diverged it is NaN, which costs these rows and no others."""
    finite = bool(path.states.isfinite().all()) and (path.velocities is None or bool(path.velocities.isfinite().all()))
    states = path.states if finite else torch.zeros_like(path.states)
    if path.velocities is None:
        measured = block_geometry(states, path.times)
    else:
        measured = path_geometry(states, path.velocities if finite else torch.zeros_like(states), path.times)
    if finite:
        return measured
    return PathGeometry(**{name: torch.full_like(value, torch.nan) for name, value in measured.tensors.items()})


def space_name(flow: FlowModule) -> str:
    """Where paths run, for their protocol: `data`, `model` where that has other units, or `latent` with its shape."""
    if flow.likelihood != "bound":
        return flow.spec.unit_name
    return "latent " + "x".join(str(size) for size in flow.flow_shape)
