"""What a sweep imposes on a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowbench.core.sweep import read_sweep
from flowbench.evaluation.measurement import SweptName

__all__ = ["SamplerOverride", "sweep_points"]


@dataclass(frozen=True)
class SamplerOverride:
    """What a sweep imposes on a module's sampler; None leaves the module's own.

    Attributes:
        network_evaluations: evaluations per sample.
        guidance: scale of the guidance, 1 = none.
    """

    network_evaluations: int | None = None
    guidance: float | None = None

    def __str__(self) -> str:
        """For the progress of a measurement, e.g. `4 evaluations`."""
        return f"guidance {self.guidance:g}" if self.guidance is not None else f"{self.network_evaluations} evaluations"

    @property
    def axis(self) -> SweptName:
        """Which of the two is imposed; empty where neither is."""
        if self.guidance is not None:
            return "guidance"
        return "" if self.network_evaluations is None else "network_evaluations"

    @property
    def at(self) -> float | None:
        """The value that is imposed."""
        return self.network_evaluations if self.guidance is None else self.guidance


def sweep_points(sweep: Mapping[str, list[float]] | None) -> list[SamplerOverride]:
    """The points of a sweep, evaluations before guidance.

    Raises:
        ValueError: for an unknown axis or a number that cannot be imposed.
    """
    points = read_sweep("evaluator.sweep", sweep)
    evaluations = [SamplerOverride(network_evaluations=int(number)) for number in points.get("network_evaluations", [])]
    return evaluations + [SamplerOverride(guidance=float(scale)) for scale in points.get("guidance", [])]
