"""How straight and how long the paths of a flow are.

Units: data units summed over dimensions (not averaged), so straightness, path energy, displacement, curvature
and one-step error are squared data units and the length is in data units; divide by D to compare with papers
that average (S / D of rectified flows). The paths are those of the flow itself, Z_0 to Z_1: the interpolants that
it was trained on are straight by construction and are no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flowbench.core.checks import LARGEST, check_number

__all__ = ["PathEnergySplit", "PathGeometry", "block_geometry", "normalized_path_energy", "path_geometry"]

# Three Gauss-Legendre nodes on [0, 1] integrate degree 5 exactly: the squared Hermite velocity has degree 4.
_NODES = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)


@dataclass(frozen=True)
class PathGeometry:
    """Geometry of B paths; every field has shape (B,), float64, or is None where it does not apply.

    ``path_energy == straightness + displacement`` to rounding, and
    ``sqrt(path_energy) >= length >= sqrt(displacement)``, for every sample.

    Attributes:
        straightness: S, the integral of ``|Z_1 - Z_0 - v|^2``; 0 iff straight with constant speed. Squared
            data units.
        path_energy: PE, the integral of ``|v|^2``. Squared data units.
        displacement: ``|Z_1 - Z_0|^2``. Squared data units.
        length: the integral of ``|v|``. Data units.
        defect: ``|mean velocity - (Z_1 - Z_0)|`` of the velocities as given (trapezoidal rule). Data units.
            It falls as the square of the time step; if it does not, these velocities did not make these
            states. 0 for blocks.
        curvature: A, the integral of ``|a|^2`` with the acceleration ``a = d_t v + J v`` along the path; time has
            no unit, so squared data units. At least ``pi^2 S`` (Wirtinger's inequality). None for blocks, whose
            paths have corners.
        one_step_error: ``|Z_0 + v(0, Z_0) - Z_1|^2``, what one Euler step misses. 0 where S is, and not only
            there; at most A / 3. Squared data units. None for blocks, which have no velocity.

    Example:
        >>> times = torch.linspace(0, 1, 21, dtype=torch.float64)
        >>> angle = (torch.pi / 2 * times)[:, None, None]  # a quarter circle of radius 1 at constant speed
        >>> states = torch.cat([angle.cos(), angle.sin()], dim=2)
        >>> velocities = torch.pi / 2 * torch.cat([-angle.sin(), angle.cos()], dim=2)
        >>> geometry = path_geometry(states, velocities, times)
        >>> {name: round(value, 4) for name, value in geometry.mean().items() if name in ("length", "displacement")}
        {'displacement': 2.0, 'length': 1.5708}
        >>> geometry.path_energy, geometry.straightness  # pi^2 / 4, and 2 less
        (tensor([2.4674], dtype=torch.float64), tensor([0.4674], dtype=torch.float64))
    """

    straightness: Tensor
    path_energy: Tensor
    displacement: Tensor
    length: Tensor
    defect: Tensor
    curvature: Tensor | None = None
    one_step_error: Tensor | None = None

    @property
    def path_length_ratio(self) -> Tensor:
        """Length over distance of each path, shape (B,), at least 1; 1 for a path that does not move."""
        distance = self.displacement.sqrt()
        return torch.where(self.length > 0, self.length / distance, torch.ones_like(self.length))

    @classmethod
    def concatenate(cls, parts: Sequence[PathGeometry]) -> PathGeometry:
        """The paths of several batches or processes as one, so that :meth:`mean` suits ragged parts."""
        if not parts:
            raise ValueError("no path geometry to concatenate; measure at least one batch")
        if len({tuple(part.tensors) for part in parts}) > 1:
            raise ValueError("cannot concatenate paths of continuous flows and of blocks; measure them apart")
        return cls(**{name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that apply, by name, each (B,)."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def mean(self) -> dict[str, float]:
        """Averages over the paths.

        Returns:
            The mean of each field that applies, and ``path_length_ratio`` = mean length / mean distance (unlike
            the mean of the ratios, not ruled by the few paths that end where they began).
        """
        summary = {name: float(value.mean()) for name, value in self.tensors.items()}
        distance = float(self.displacement.sqrt().mean())
        length = summary["length"]
        summary["path_length_ratio"] = (length / distance if distance else math.inf) if length else 1.0
        return summary


def path_geometry(states: Tensor, velocities: Tensor, times: Tensor) -> PathGeometry:
    """Geometry of ODE trajectories.

    Between two times the path is the cubic Hermite polynomial through both states with both velocities, and
    energy and straightness of that polynomial are integrated exactly (the length with the same nodes). The
    polynomial's mean velocity is exactly ``Z_1 - Z_0``, so PE = S + ``|Z_1 - Z_0|^2`` holds to rounding on
    any grid, and the error against the true path is of fourth order in the time step, that of the curvature
    too. The states must therefore be those that the velocities lead through: a solver of high order on the same
    grid (RK4 with 100 steps), not dense output of an adaptive solver. A sampler of few Euler steps moves along
    straight segments: use :func:`block_geometry` with its times. (Rounding of float32 states adds about 1e-14 T^4
    per dimension to the curvature: nothing at 100 times, 0.01 at 1,000.)

    Args:
        states: Z at each time, shape (T, B, *D), T at least 2.
        velocities: the field at those states and times, shape (T, B, *D).
        times: shape (T,), strictly monotone; the interval is rescaled to [0, 1].

    References:
        Flow Straight and Fast (Liu et al., 2022), https://arxiv.org/abs/2209.03003 (straightness);
        Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al.,
        2023), https://arxiv.org/abs/2302.00482 (path energy).

    Raises:
        ValueError: shapes that differ, fewer than two times, times not strictly monotone, or values not
            finite.
    """
    steps = _unit_steps(times, len(states))
    if velocities.shape != states.shape:
        raise ValueError(f"velocities have shape {tuple(velocities.shape)}, states {tuple(states.shape)}; must agree")
    span = float(times[-1]) - float(times[0])
    z = _flat(states, "states")
    velocity = _flat(velocities, "velocities") * span  # with respect to the rescaled time
    steps = steps.to(z.device)
    geometry = _Accumulator(z[-1] - z[0])
    curvature = z.new_zeros(z.shape[1])
    for k, step in enumerate(steps):
        chord = (z[k + 1] - z[k]) / step
        curvature += _curvature(chord, velocity[k], velocity[k + 1]) / step
        for s, weight in zip(_NODES, _WEIGHTS, strict=True):
            left, right = (1 - s) * (1 - 3 * s), s * (3 * s - 2)
            geometry.add(6 * s * (1 - s) * chord + left * velocity[k] + right * velocity[k + 1], weight * step)
    mean_velocity = torch.einsum("t,tbd->bd", steps, (velocity[:-1] + velocity[1:]) / 2)
    one_step_error = (velocity[0] - geometry.chord).square().sum(dim=1)
    return replace(geometry.result(mean_velocity), curvature=curvature, one_step_error=one_step_error)


def _curvature(chord: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Integral over s in [0, 1] of the squared second derivative of a Hermite cubic, shape (B,).

    Args:
        chord: Z(1) - Z(0) over the step, shape (B, D).
        left: velocity at s = 0, in the same unit.
        right: velocity at s = 1.
    """
    # It is linear in s: its mean is the change of velocity, its slope twelve times what the mean velocity lacks of the
    # chord. Summed apart, because the second is small and holds the rounding of the states.
    slope = (left + right) / 2 - chord
    return ((right - left).square() + 12 * slope.square()).sum(dim=1)


def block_geometry(states: Tensor, times: Tensor | None = None) -> PathGeometry:
    """Geometry of the piecewise linear path through given states, exactly.

    For a flow of K blocks the path runs through the state after each block, and each segment takes 1 / K of
    the time: its velocity is ``K (Z_{k+1} - Z_k)``. With ``times`` it is also the path of an Euler sampler.

    Args:
        states: shape (K + 1, B, *D), from noise to data, K at least 1.
        times: shape (K + 1,), strictly monotone, rescaled to [0, 1]; None for equal segments.

    Raises:
        ValueError: fewer than two states, times that do not fit or are not strictly monotone, or values not
            finite.
    """
    z = _flat(states, "states")
    grid = torch.arange(len(z), dtype=torch.float64) if times is None else times
    steps = _unit_steps(grid, len(z)).to(z.device)
    geometry = _Accumulator(z[-1] - z[0])
    for k, step in enumerate(steps):
        geometry.add((z[k + 1] - z[k]) / step, step)
    return geometry.result(z[-1] - z[0])


@dataclass(frozen=True)
class PathEnergySplit:
    """Normalised path energy and its two parts; ``total == curvature + coupling``, without unit.

    Attributes:
        curvature: ``S / W2^2``, at least 0: paths that bend or change speed.
        coupling: ``(E|Z_1 - Z_0|^2 - W2^2) / W2^2``: endpoints joined in a way that is not optimal. Below 0
            only where the flow does not reach the target (samples that shrink), or by sampling error.

    Example:
        >>> split = PathEnergySplit.of(straightness=1.0, displacement=6.0, w2_squared=4.0)
        >>> split.curvature, split.coupling, split.total  # 1 / 4, (6 - 4) / 4 and their sum
        (0.25, 0.5, 0.75)
    """

    curvature: float
    coupling: float

    @property
    def total(self) -> float:
        """``(PE - W2^2) / W2^2``."""
        return self.curvature + self.coupling

    @classmethod
    def of(cls, straightness: float, displacement: float, w2_squared: float) -> PathEnergySplit:
        """Split from mean straightness, mean displacement and the reference W2^2."""
        return cls(
            curvature=normalized_path_energy(straightness + w2_squared, w2_squared),
            coupling=normalized_path_energy(displacement, w2_squared),
        )


def normalized_path_energy(path_energy: float, w2_squared: float) -> float:
    """``(PE - W2^2) / W2^2``, signed: 0 for optimal transport, below 0 for a flow that misses its target.

    Signed on purpose: the absolute value of the paper hides samples that collapse, which lowers PE.

    Args:
        path_energy: mean PE, squared data units summed over dimensions; NaN for paths that diverged.
        w2_squared: in (0, 1e24], W2^2 between source and data in the same units: one fixed reference per data set, from
            closed form or large samples, never from a model's samples.

    References:
        Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al.,
        2023), https://arxiv.org/abs/2302.00482.

    Raises:
        ValueError: ``w2_squared`` is out of range (at 0 source and data coincide: the ratio is not defined).
    """
    check_number("w2_squared", w2_squared, above=0, at_most=LARGEST**2, hint="without transport there is no ratio")
    return (path_energy - w2_squared) / w2_squared


class _Accumulator:
    """Sums of the integrands over quadrature nodes, each (B,)."""

    def __init__(self, chord: Tensor) -> None:
        self.chord = chord
        self.energy, self.straightness, self.length = chord.new_zeros(3, len(chord)).unbind()

    def add(self, velocity: Tensor, weight: Tensor) -> None:
        energy = velocity.square().sum(dim=1)
        self.energy = self.energy + weight * energy
        self.straightness = self.straightness + weight * (self.chord - velocity).square().sum(dim=1)
        self.length = self.length + weight * energy.sqrt()

    def result(self, mean_velocity: Tensor) -> PathGeometry:
        return PathGeometry(
            straightness=self.straightness,
            path_energy=self.energy,
            displacement=self.chord.square().sum(dim=1),
            length=self.length,
            defect=(mean_velocity - self.chord).norm(dim=1),
        )


def _flat(x: Tensor, name: str) -> Tensor:
    """(T, B, *D) as float64 (T, B, prod(D)); finite."""
    if x.ndim < 2 or len(x) < 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape (T, B, *D) with T >= 2 and B >= 1, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} hold NaN or infinity; the trajectory diverged")
    return x.detach().reshape(x.shape[0], x.shape[1], -1).to(torch.float64)


def _unit_steps(times: Tensor, num_states: int) -> Tensor:
    """Time steps as shares of the whole interval: positive, sum 1."""
    if times.shape != (num_states,):
        raise ValueError(f"times must have shape ({num_states},), one for each state, got {tuple(times.shape)}")
    grid = times.detach().to(torch.float64)
    steps = grid.diff() / (grid[-1] - grid[0])
    if not bool((steps > 0).all()):
        raise ValueError("times must be finite and strictly monotone; remove repeated or unordered times")
    return steps
