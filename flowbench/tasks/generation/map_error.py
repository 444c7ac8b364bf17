"""How far samples are from where the flow's ODE ends, and one jump of a flow map from two."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule
from flowbench.families.conditioning.by_index import condition_at
from flowbench.tasks.generation.paths import space_name

__all__ = ["JumpErrors", "MapError", "SquaredErrors"]

# States of the path whose end samples are compared with: two midpoint steps between neighbours, 128 evaluations.
PATH_POINTS = 33


@dataclass(frozen=True)
class SquaredErrors:
    """Squared distances of points, averaged over dimensions.

    Attributes:
        of_samples: of unguided samples from the end of the flow's ODE, shape (N,).
        of_jumps: of one jump of a flow map from two, shape (N,); None where there are none, and in a sweep.
        space: where the points lie: `data`, `model` where that has other units, or `latent` with its shape.
    """

    of_samples: Tensor
    of_jumps: Tensor | None
    space: str


@dataclass(frozen=True)
class JumpErrors(Probe[SquaredErrors]):
    """Errors of the samples 0, 1, ... of a flow with velocities.

    Attributes:
        num_samples: how many.
    """

    num_samples: int
    stage = "map error"
    follows_sampler = True

    def key(self) -> Hashable:
        """Other numbers of samples have other answers."""
        return self

    def ask(self, setup: Setup) -> SquaredErrors | None:
        """Sample by sample; a collective."""
        flow = setup.module
        if not isinstance(flow, FlowModule) or not _follows_its_ode(flow) or setup.override.axis == "guidance":
            return None
        index, samples, jumps = setup.shard(self.num_samples), [], []
        with agreed(), torch.no_grad():
            for chunk in setup.batches(index):
                condition = condition_at(flow, setup, chunk % setup.num_samples)
                noise = flow.draw_noise(chunk, setup.seed)
                drawn = flow.drawn(noise, condition, SamplerOverride(setup.override.network_evaluations, guidance=1.0))
                end = flow.trajectory(noise, condition, PATH_POINTS).states[-1]
                samples.append(_mean_square(drawn.x - end))
                if flow.composes_jumps and not setup.override.axis:
                    half = flow.flow_jump(noise, condition, 0.0, 0.5)
                    twice = flow.flow_jump(half, condition, 0.5, 1.0)
                    jumps.append(_mean_square(twice - flow.flow_jump(noise, condition, 0.0, 1.0)))
        return SquaredErrors(
            gather_by_index(index, torch.cat(samples)),
            gather_by_index(index, torch.cat(jumps)) if jumps else None,
            space_name(flow),
        )


def _mean_square(difference: Tensor) -> Tensor:
    return difference.double().square().flatten(1).mean(1).cpu()


def _follows_its_ode(flow: FlowModule) -> bool:
    facts = flow.describe()
    # A sampler with velocities and no density solves no differential equation, so it has no end to be compared with.
    return facts.has_velocities and facts.likelihood != "none" and facts.is_deterministic


class MapError(Metric):
    """Root mean square distance of samples from where the flow's own ODE carries their noise.

    `map_error` is what few evaluations cost, apart from how good the flow is: of a flow map the error of its jumps
    against its velocity, of other matching flows that of their solver's steps. Unguided; the ODE is solved by 128
    evaluations. `composition_error` is the distance of one jump from two over the whole interval, which the velocity
    has no part in; of flow maps that jump to time 1/2 only. Samplers that add noise, and those
    that solve no differential equation, have neither.

    Args:
        num_samples: samples, >= 1, counted from the first.

    Raises:
        ValueError: for a number below 1.

    Example:
        >>> MapError(num_samples=64).names, [probe.num_samples for probe in MapError(num_samples=64).probes()]
        ((), [64])
    """

    declares = (
        MetricInfo("map_error", "down", "transport", always=False),
        MetricInfo("composition_error", "down", "transport", always=False),
    )
    in_sweep = True

    def __init__(self, num_samples: int = 128) -> None:
        check_count("num_samples", num_samples)
        self.num_samples = num_samples

    def probes(self) -> tuple[Probe[Any], ...]:
        """The errors."""
        return (JumpErrors(self.num_samples),)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`."""
        flow = who.module
        if not isinstance(flow, FlowModule) or not _follows_its_ode(flow) or who.swept == "guidance":
            return ()
        twice = flow.composes_jumps and not who.swept
        return ("map_error", "composition_error") if twice else ("map_error",)

    def measure(self, answers: Answers) -> list[Measurement]:
        """Roots of the means over samples and dimensions."""
        found = answers[JumpErrors(self.num_samples)]
        if found is None:
            return []
        errors = {"map_error": found.of_samples, "composition_error": found.of_jumps}
        return [
            Measurement(
                name,
                math.sqrt(float(values.mean())),
                len(values),
                _protocol(name, found),
                f"{found.space.split()[0]} units",
            )
            for name, values in errors.items()
            if values is not None
        ]


def _protocol(name: str, found: SquaredErrors) -> str:
    beside = "midpoint-128" if name == "map_error" else "two-jumps"
    return f"{found.space}/{beside}/{len(found.of_samples)}"
