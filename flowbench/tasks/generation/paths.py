"""The paths from source to data: how straight they are, and how long for the distance that they bridge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.contract import returned
from flowbench.core.seeds import derive_seed
from flowbench.data import FlowDataModule
from flowbench.data.reference_transport import STANDARD_NORMAL, reference_transport
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.artifacts import save_trajectories
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.measurement import Measurement, MetricInfo, unmeasured
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import DatasetSource, FlowModule, Trajectory
from flowbench.families.conditioning.by_index import condition_at
from flowbench.families.latents.space import LatentSpace
from flowbench.metrics import PathGeometry, block_geometry, path_geometry, wasserstein2_squared

__all__ = [
    "PathStraightness",
    "Paths",
    "SampledPaths",
    "TransportCost",
    "WassersteinCost",
    "space_name",
    "transport_cost",
]

# Points on either side where there is no fixed reference.
TRANSPORT_POINTS = 2048


@dataclass(frozen=True)
class SampledPaths:
    """Paths from source to data.

    Attributes:
        geometry: of every path.
        shown: states of the first paths in the flow's space, shape (T, B, *D).
        times: shape (T,).
        space: where the paths run: `data`, `model` where that has other units, or `latent` with its shape.
    """

    geometry: PathGeometry
    shown: Tensor
    times: Tensor
    space: str


@dataclass(frozen=True)
class Paths(Probe[SampledPaths]):
    """Paths of as many samples as the evaluator draws paths."""

    stage = "paths"

    def ask(self, setup: Setup) -> SampledPaths | None:
        """Paths by index over all processes; a collective."""
        flow, num_shown = setup.module, min(setup.num_pictures, setup.num_paths)
        if not isinstance(flow, FlowModule):
            return None
        geometries, states, times = [], [], torch.empty(0)
        with agreed():
            index = setup.shard(setup.num_paths)
            for chunk in setup.batches(index):
                row = chunk % setup.num_samples  # paths beyond the samples take their conditions again
                noise, condition = flow.draw_noise(chunk, setup.seed), condition_at(flow, setup, row)
                path = returned(flow.trajectory(noise, condition, setup.path_points), Trajectory, flow, "trajectory")
                geometries.append(_geometry(path))
                states.append(path.states.transpose(0, 1)[chunk.to(path.states.device) < num_shown].cpu())
                times = path.times
            local = PathGeometry.concatenate(geometries)
        gathered = {name: gather_by_index(index, value) for name, value in local.tensors.items()}
        shown = gather_by_index(index[index < num_shown], torch.cat(states))
        return SampledPaths(PathGeometry(**gathered), shown.transpose(0, 1), times, space_name(flow))

    def show(self, answer: SampledPaths, setup: Setup, trainer: L.Trainer, step: int) -> None:
        """Leave trajectories.npz."""
        flow = setup.module
        assert isinstance(flow, FlowModule), "who has paths is a flow"
        states = torch.stack([flow.space.decode(state) for state in answer.shown.to(flow.device)])
        save_trajectories(Path(trainer.default_root_dir), states, answer.times)


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
    """Where the points of a flow lie: `data`, `model` where that has other units, or `latent` with its shape."""
    if not isinstance(flow.space, LatentSpace):
        return flow.spec.unit_name
    return "latent " + "x".join(str(size) for size in flow.flow_shape)


# ---- the distance that they bridge --------------------------------------------------------------------


@dataclass(frozen=True)
class WassersteinCost:
    """The squared W2 distance between a flow's source and its data, summed over dimensions.

    Attributes:
        value: the number.
        origin: `reference` (see :mod:`flowbench.data.reference_transport`), or `2048-points`, an estimate from as many.
    """

    value: float
    origin: str


@dataclass(frozen=True)
class TransportCost(Probe[WassersteinCost]):
    """The distance between source and data that the energy of the paths is compared with."""

    def ask(self, setup: Setup) -> WassersteinCost | None:
        """The cost, on process 0."""
        with agreed():
            if setup.rank or not isinstance(setup.module, FlowModule):
                return None
            return transport_cost(setup.module, setup.data, setup.seed)


def transport_cost(flow: FlowModule, data: FlowDataModule, seed: int) -> WassersteinCost | None:
    """The transport cost between source and data.

    Args:
        flow: whose source.
        data: the data.
        seed: the evaluation seed, which keys the source's points where there is no fixed reference.

    Returns:
        None for images: in many dimensions an estimate is mostly bias.
    """
    if flow.spec.modality != "vector":
        return None
    known = reference_transport(_source_name(flow), flow.spec)
    if known is not None:
        return WassersteinCost(known.w2_squared, "reference")
    real = data.model_values("train", slice(TRANSPORT_POINTS))
    noise = flow.draw_noise(torch.arange(len(real)), derive_seed(seed, "transport"))
    return WassersteinCost(wasserstein2_squared(noise.cpu(), real), f"{len(real)}-points")


def _source_name(flow: FlowModule) -> str:
    """The name under which the transport from the flow's source is known; empty where it has none."""
    source = flow.sampling_source or flow.source
    if isinstance(source, DatasetSource):
        return source.dataset
    return STANDARD_NORMAL if source.is_standard_normal else ""


# ---- metric -------------------------------------------------------------------------------------------

# Path energy over the transport cost, and its two parts.
_NORMALISED = ("npe", "npe_curvature", "npe_coupling")


class PathStraightness(Metric):
    """Straightness, curvature, path energy and its split, normalised path energy and path length ratio.

    Example:
        >>> PathStraightness().names
        ('straightness', 'path_energy', 'displacement', 'path_length_ratio')
    """

    declares = (
        MetricInfo("straightness", "down", "transport"),
        MetricInfo("path_energy", "down", "transport"),
        MetricInfo("displacement", "none", "transport"),
        MetricInfo("path_length_ratio", "down", "transport"),
        MetricInfo("curvature", "down", "transport", always=False),
        MetricInfo("one_step_error", "down", "transport", always=False),
        MetricInfo("npe", "zero", "transport", always=False),
        MetricInfo("npe_curvature", "down", "transport", always=False),
        MetricInfo("npe_coupling", "zero", "transport", always=False),
    )

    def probes(self) -> tuple[Probe[Any], ...]:
        """The paths, and the distance between source and data."""
        return Paths(), TransportCost()

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; :meth:`measure` describes what does not apply."""
        if not isinstance(who.module, FlowModule):
            return ()
        fields = ("curvature", "one_step_error") if who.module.describe().has_velocities else ()
        return (*self.names, *fields, *(_NORMALISED if who.spec.modality == "vector" else ()))

    def measure(self, answers: Answers) -> list[Measurement]:
        """Means over paths; squared data units summed over dimensions, except the pure ratios.

        What does not apply has no row: `curvature` and `one_step_error` of block flows, `npe` and its two parts
        without a reference W2 between source and data.
        """
        found = answers[Paths()]
        if found is None:
            return []
        summary, n = found.geometry.mean(), len(found.geometry.straightness)
        protocol, unit = f"{found.space}/{n}-paths", f"squared {found.space.split(' ')[0]} units"
        rows = [
            Measurement(name, summary[name], n, protocol, unit)
            for name in ("straightness", "path_energy", "displacement", "curvature", "one_step_error")
            if name in summary
        ]
        rows.append(Measurement("path_length_ratio", summary["path_length_ratio"], n, protocol))
        if reason := answers.failure(TransportCost()):
            return [*rows, *unmeasured(_NORMALISED, reason)]
        if (cost := answers[TransportCost()]) is not None:
            protocol += f"/{cost.origin}-w2-squared={cost.value:.4f}"
            parts = pure.PathEnergySplit.of(summary["straightness"], summary["displacement"], cost.value)
            values = zip(_NORMALISED, (parts.total, parts.curvature, parts.coupling), strict=True)
            rows += [Measurement(name, value, n, protocol) for name, value in values]
        return rows
