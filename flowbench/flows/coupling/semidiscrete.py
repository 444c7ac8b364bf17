"""Semidiscrete optimal transport: from a density to a finite set of points, by the dual potential of the points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_count, check_number, check_seed
from flowbench.core.seeds import generator

__all__ = ["DrawSource", "SemidiscreteDual", "SemidiscretePotential", "assign_points", "check_ascent", "chi_squared"]

DrawSource = Callable[[int, torch.Generator], Tensor]
"""Draws so many source points, shape (num, *D), with a generator of the CPU."""

# Scores that are held at a time: 64 MiB in float32. More points are looked at in parts.
MAX_SCORES = 2**24
# After so many steps the step size has fallen by the root of two.
DECAY_STEPS = 50
# Standard error of the estimate of chi2 near 0, which decides how many source points it takes.
CHI2_ERROR = 0.005
# Source points per part of that estimate.
CHI2_BATCH = 1024


class SemidiscretePotential:
    """Pairs source points with N data points: x0 goes to the one of largest <x0, y_j> + g_j.

    With the potential g that maximises the dual, this is the optimal transport map from the source to the uniform law
    on the points, for the squared distance: |x - y|^2 / 2 and -<x, y> differ by terms of one end alone. Every g gives
    an optimal map, but to points that are drawn with other shares than 1 / N; those of the maximiser are equal. A
    constant added to g changes nothing.

    Memory: the points and N numbers; an assignment of B points holds at most 2^24 scores (64 MiB) besides, or B.

    Args:
        points: data points, shape (N, *D), N at least 1.
        potential: g, shape (N,).

    References:
        Mousavi-Hosseini, Zhang, Klein, Cuturi (2025), Flow Matching with Semidiscrete Couplings, arXiv 2509.25519.

    Raises:
        ValueError: for no points, a potential of another number, or a value that is not finite.

    Example:
        >>> points = torch.tensor([[-1.0], [1.0]])
        >>> SemidiscretePotential(points, torch.zeros(2)).assign(torch.tensor([[-0.3], [0.4]]))
        tensor([0, 1])
        >>> SemidiscretePotential(points, torch.tensor([1.0, 0.0])).assign(torch.tensor([[-0.3], [0.4]]))
        tensor([0, 0])
    """

    def __init__(self, points: Tensor, potential: Tensor) -> None:
        if points.ndim < 2 or not len(points) or potential.shape != points.shape[:1]:
            raise ValueError(
                f"a potential has one number per data point, got points {tuple(points.shape)} and a potential of shape "
                f"{tuple(potential.shape)}"
            )
        flat = points.detach().flatten(1)
        if not bool(flat.isfinite().all() & potential.isfinite().all()):
            raise ValueError("semidiscrete transport met NaN or infinity in points or potential: mend the data")
        self.points, self.potential = flat, potential.detach()

    def __len__(self) -> int:
        """Number of data points N."""
        return len(self.points)

    def assign(self, noise: Tensor) -> Tensor:
        """The data point of every source point.

        Args:
            noise: source points, shape (B, *D), on the device of the points.

        Returns:
            Indices into the points, int64 (B,).
        """
        return assign_points(noise, self.points, self.potential)[1]

    def dual_value(self, noise: Tensor) -> float:
        """The dual -E max_j(<x, y_j> + g_j) + mean(g), estimated from source points (B, *D); at most the optimum."""
        best, _ = assign_points(noise, self.points, self.potential)
        return float(self.potential.double().mean() - best.double().mean())

    def chi2(self, draw: DrawSource, seed: int, *names: str | int) -> tuple[float, int]:
        """Chi squared divergence of the points' shares from 1 / N, from fresh source points.

        Args:
            draw: the source.
            seed: keys the source points, with `names`.
            names: axis names.

        Returns:
            The unbiased estimate, see :func:`chi_squared`, and the number of source points behind it, enough for a
            standard error of 0.005 near 0.
        """
        num = max(2 * CHI2_BATCH, math.ceil(math.sqrt(2 * len(self)) / CHI2_ERROR))
        counts = torch.zeros(len(self), dtype=torch.int64, device=self.points.device)
        for part, start in enumerate(range(0, num, CHI2_BATCH)):
            noise = draw(min(CHI2_BATCH, num - start), generator(seed, *names, part))
            counts += self.assign(noise.to(self.points)).bincount(minlength=len(self))
        return chi_squared(counts), num


def assign_points(noise: Tensor, points: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score <x, y_j> + g_j of each source point, and the first j that has it.

    Args:
        noise: source points x, shape (B, *D).
        points: data points y, shape (N, d).
        potential: g, shape (N,).

    Returns:
        Scores in the points' type and indices, int64; both (B,).
    """
    x, g = noise.detach().flatten(1).to(points.dtype), potential.to(points.dtype)
    size = max(1, MAX_SCORES // max(1, len(x)))
    best, index = x.new_full((len(x),), -math.inf), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with autocast_off(x.device):
        for start in range(0, len(points), size):
            rows = slice(start, start + size)
            scores, found = torch.addmm(g[rows], x, points[rows].T).max(1)
            better = scores > best
            best, index = torch.where(better, scores, best), torch.where(better, found + start, index)
    return best, index


def chi_squared(counts: Tensor) -> float:
    """Chi squared divergence from the uniform law of what was drawn so often.

    sum_j (c_j^2 - c_j) / (b_j B (B - 1)) - 1 with b_j = 1 / N: the share of pairs of draws that coincide, times N, less
    one. Its mean is sum_j (p_j - b_j)^2 / b_j, the squared coefficient of variation of p_j N, for any number of draws.

    Args:
        counts: draws of each of N points, whole numbers, shape (N,), B at least 2 in all.

    Raises:
        ValueError: for fewer than two draws.

    Example:
        >>> chi_squared(torch.tensor([300, 0, 0]))  # always the same one of three
        2.0
    """
    c = counts.double()
    num = float(c.sum())
    if num < 2:
        raise ValueError(f"chi squared needs at least 2 draws, got {num:g}")
    return float((c * (c - 1)).sum() * len(c) / (num * (num - 1))) - 1.0


def check_ascent(batch: int, step_size: float, ema: float, seed: int) -> None:
    """Refuse settings of :class:`SemidiscreteDual` that are out of range.

    Raises:
        ValueError: one line with name, range and value.
    """
    check_count("batch", batch, at_most=2**20)
    check_number("step_size", step_size, above=0, at_most=1e3, hint="0.03 of the scores' spread")
    check_number("ema", ema, at_least=0, below=1, hint="0 takes the last iterate")
    check_seed("seed", seed)


class SemidiscreteDual:
    """Stochastic ascent of the semidiscrete dual: each step draws source points and lowers what is drawn too often.

    The gradient in g_j is 1 / N minus the share of the source points that go to y_j. Steps have the size `step_size`
    N s / sqrt(1 + k / 50), with s the root mean squared distance of the points from their mean: scores of a standard
    normal source have that spread, so that scaled data need no other setting. What is used is an exponential average
    of the iterates, whose chi2 is a fifth of the last iterate's and less (1,077 digits, batches of 256 and 1,024).

    Source points are keyed by (seed, step): a fit that goes on from a state gives what an uninterrupted one gives.

    Attributes:
        steps: done so far.
        flops: operations so far, two for each number of a scalar product; those of :meth:`chi2` included.

    Args:
        points: data points, shape (N, *D), N at least 1; the fit runs on their device.
        draw: the source; points of its own type are converted.
        batch: source points per step, 1 to 2^20.
        step_size: of the ascent, in (0, 1e3].
        ema: decay of the average, in [0, 1); 0 takes the last iterate.
        seed: keys the source points, >= 0.
        names: more names of the key, e.g. a class.

    References:
        Mousavi-Hosseini, Zhang, Klein, Cuturi (2025), arXiv 2509.25519: dual, averaged ascent and the estimate of chi2.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> points = torch.tensor([[-1.0], [1.0]])
        >>> dual = SemidiscreteDual(points, lambda num, rng: torch.randn(num, 1, generator=rng) + 1.0, batch=256)
        >>> for _ in range(300):
        ...     dual.step()
        >>> g = dual.solved().potential  # x = 1 halves N(1, 1), where -x + g_0 = x + g_1
        >>> abs(float(g[0] - g[1]) / 2 - 1.0) < 0.2
        True
    """

    def __init__(
        self,
        points: Tensor,
        draw: DrawSource,
        *,
        batch: int = 1024,
        step_size: float = 0.03,
        ema: float = 0.99,
        seed: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        check_ascent(batch, step_size, ema, seed)
        flat = points.detach().flatten(1)
        self.points = flat - flat.mean(0)  # scores change by what all points share
        self.draw, self.batch, self.ema, self.seed, self.names = draw, batch, ema, seed, names
        spread = float(self.points.double().square().sum(1).mean().sqrt())
        self._step_size = step_size * (spread or 1.0) * len(flat)
        self.steps, self.flops = 0, 0.0
        self._last = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        self._mean = torch.zeros_like(self._last)

    def step(self) -> None:
        """One step of the ascent."""
        noise = self.draw(self.batch, generator(self.seed, "semidiscrete", *self.names, self.steps))
        _, index = assign_points(noise.to(self.points), self.points, self._last)
        excess = index.bincount(minlength=len(self.points)).double() / self.batch - 1 / len(self.points)
        self._last -= self._step_size / math.sqrt(1 + self.steps / DECAY_STEPS) * excess
        self._mean = self.ema * self._mean + (1 - self.ema) * self._last
        self.steps += 1
        self._count(self.batch)

    def _count(self, num: int) -> None:
        self.flops += 2.0 * num * self.points.numel()

    def solved(self) -> SemidiscretePotential:
        """The pairs by the average of the iterates so far, which begins at zero; its mean is 0."""
        weight = 1 - self.ema**self.steps if self.steps else 1.0
        potential = self._mean / weight
        return SemidiscretePotential(self.points, potential - potential.mean())

    def chi2(self) -> float:
        """:meth:`SemidiscretePotential.chi2` of the average; its source points are no step's."""
        found, num = self.solved().chi2(self.draw, self.seed, "semidiscrete-chi2", *self.names, self.steps)
        self._count(num)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the ascent stands, in tensors and numbers."""
        return {"last": self._last.cpu(), "mean": self._mean.cpu(), "steps": self.steps, "flops": self.flops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same points and settings.

        Raises:
            ValueError: for a state of another number of points.
        """
        if state["last"].shape != self._last.shape:
            raise ValueError(f"the state has {len(state['last'])} points, expected {len(self._last)}: start anew")
        self._last, self._mean = (state[name].to(self._last) for name in ("last", "mean"))
        self.steps, self.flops = int(state["steps"]), float(state["flops"])
