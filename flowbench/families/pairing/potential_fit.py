"""The fit of semidiscrete potentials, kept in the cache."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbench.core.cache import ensure, identity_key, read_tensors, write_tensors
from flowbench.core.places import cached
from flowbench.flows import SemidiscreteDual
from flowbench.training.preparation import Preparation

__all__ = ["FittedPotentials", "fitted_potentials"]

# How often chi2 is estimated against its target, in steps, and how often an unfinished fit is saved, in seconds.
CHECK_STEPS, SAVE_SECONDS = 50, 60.0


@dataclass(frozen=True)
class FittedPotentials:
    """What a fit found.

    Attributes:
        potentials: a potential for each set of points, float64 (N_i,).
        cost: operations and seconds.
        chi2: divergence from equal shares within each set, averaged over all points.
    """

    potentials: tuple[Tensor, ...]
    cost: Preparation
    chi2: float


def fitted_potentials(
    duals: Callable[[], Sequence[SemidiscreteDual]],
    sizes: Sequence[int],
    steps: int,
    chi2: float | None,
    identity: Mapping[str, Any],
) -> FittedPotentials:
    """Read potentials from the cache, or fit them there: one process fits, the others wait.

    Args:
        duals: makes the problems, not begun; called only where there is something to fit.
        sizes: points of each.
        steps: of each at most.
        chi2: below which each ends; None takes all steps.
        identity: all that the potentials depend on, in plain types.

    Raises:
        ValueError: for a damaged file, or a cache that cannot be written.
    """
    path = cached("potentials", f"semidiscrete-{identity_key(identity, 16)}.pt")
    ensure(path, lambda: _Fit(duals(), steps, chi2, path, identity).run())
    found = read_tensors(path, identity, "the semidiscrete potentials")
    cost = Preparation(float(found["flops"]), float(found["seconds"]))
    return FittedPotentials(found["potential"].clone().split(list(sizes)), cost, float(found["chi2"]))


class _Fit:
    """A fit at work; what is done is saved beside its result, and a later one goes on from there."""

    def __init__(
        self,
        duals: Sequence[SemidiscreteDual],
        steps: int,
        chi2: float | None,
        path: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.duals, self.steps, self.target = duals, steps, chi2
        self.path, self.identity = path, dict(identity)
        self.unfinished = path.with_suffix(".part.pt")
        self.found = [float("inf")] * len(duals)
        self.seconds, self._began = 0.0, time.perf_counter()

    def run(self) -> None:
        """Fit, and write the result."""
        self._resume()
        for number in range(len(self.duals)):
            self._ascend(number)
        sizes = torch.tensor([float(len(dual.points)) for dual in self.duals], dtype=torch.float64)
        chi2 = (sizes * torch.tensor(self.found, dtype=torch.float64)).sum() / sizes.sum()
        if self.target is not None and float(chi2) > self.target:
            warnings.warn(
                f"the semidiscrete potential has chi2 {float(chi2):.3g} after {self.steps} steps, above "
                f"{self.target:g}: some points are drawn more often than others; raise steps or batch",
                stacklevel=2,
            )
        content = {
            "potential": torch.cat([dual.solved().potential.cpu() for dual in self.duals]),
            "chi2": chi2,
            "flops": torch.tensor(sum(dual.flops for dual in self.duals), dtype=torch.float64),
            "seconds": torch.tensor(self._spent(), dtype=torch.float64),
        }
        write_tensors(self.path, self.identity, content)
        self.unfinished.unlink(missing_ok=True)

    def _ascend(self, number: int) -> None:
        dual, saved = self.duals[number], time.perf_counter()
        while self.found[number] == float("inf"):
            if dual.steps < self.steps:
                dual.step()
            is_last = dual.steps >= self.steps
            if is_last or (self.target is not None and dual.steps % CHECK_STEPS == 0):
                chi2 = dual.chi2()
                if is_last or chi2 <= (self.target or 0.0):
                    self.found[number] = chi2
            if time.perf_counter() - saved > SAVE_SECONDS:
                self._save()
                saved = time.perf_counter()

    def _spent(self) -> float:
        return self.seconds + time.perf_counter() - self._began

    def _save(self) -> None:
        states = {str(number): dual.state_dict() for number, dual in enumerate(self.duals)}
        done = {"found": torch.tensor(self.found, dtype=torch.float64), "seconds": self._spent()}
        write_tensors(self.unfinished, self.identity, {"states": states, **done})

    def _resume(self) -> None:
        if not self.unfinished.is_file():
            return
        state = read_tensors(self.unfinished, self.identity, "the unfinished semidiscrete potentials")
        for number, dual in enumerate(self.duals):
            dual.load_state_dict(state["states"][str(number)])
        self.found, self.seconds = state["found"].tolist(), float(state["seconds"])
