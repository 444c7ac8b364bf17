"""What an objective is: a prediction that turns into a velocity, and its weighted error."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.path.base import Path, PathCoefficients, PathSample

__all__ = ["ErrorWeight", "Objective"]

ErrorWeight = Literal["natural", "velocity", "elbo"]

_UNBOUND = "an objective needs the coefficients of a path: bind it with for_path(path) first"


class _Binding(NamedTuple):
    """The path, the standard deviation of its source, and the times between which a network is asked."""

    path: Path
    source_std: float
    first: float
    last: float


class Objective(ABC):
    """What the network of a matching flow predicts at (x_t, t), and how much its error counts at time t.

    On a path ``x_t = alpha x1 + sigma x0`` every prediction p gives a velocity ``a p + b x_t`` with coefficients of
    time alone, so that the squared errors of two predictions differ by a factor of time: predictions differ in what
    the network has to output, and their losses in a weight. ``weight`` chooses it apart from the prediction:

    - ``natural``: the squared error of the prediction itself counts alike at all times;
    - ``velocity``: a^2, so that the loss is the squared error of the velocity;
    - ``elbo``: half the rate of the signal-to-noise ratio SNR = alpha^2 / (sigma source_std)^2 on the error of the
      data point, SNR'(t) / 2. The loss under uniform times is then the diffusion term of the variational bound, in
      nats and divided by the number of dimensions, but for the last ``clip`` before an end.

    **The ends.** A data point gives no velocity where sigma = 0 (t = 1), a source point or a score none where
    alpha = 0 (t = 0). Such a network is trained and asked at times at least ``clip`` away from that end, and the
    velocity between there and the end is the one at the clipped time, at an error of order clip^2 where the field is
    smooth. The same clip bounds the weights that grow without bound at an end. Few steps see nothing of it: it acts on
    evaluations nearer to the end than ``clip``.

    **Guidance** combines velocities. Conversions are affine and the weights of classifier-free guidance sum to one, so
    that a constant scale does the same to every prediction. A scale that depends on norms (RAAG) would not: a ratio of
    data points is another than one of velocities. Taken from velocities it means the same whatever is predicted.

    A zero-initialised network predicts the data point, the source point or the score 0, not a flow at rest: until it is
    trained, a data prediction contracts to the origin and the others expand, on the linear path by e / clip.

    Args:
        weight: ``natural``, ``velocity`` or ``elbo``.
        clip: distance in time from an end where the conversion or the weight is singular, in (0, 0.5).

    Attributes:
        weights: the weights that this prediction takes.

    References:
        Lai et al. 2025, arXiv 2510.21890 (the equivalence of the predictions); Kingma et al. 2021, arXiv 2107.00630
        (the variational weight); Salimans and Ho 2022, arXiv 2202.00512 (losses as weights).

    Example:
        >>> point = LinearPath().sample(x0=torch.zeros(1, 2), x1=torch.ones(1, 2), t=torch.tensor([0.5]))
        >>> objective: Objective = DataObjective(weight="velocity").for_path(LinearPath())
        >>> objective.velocity(output=torch.ones(1, 2), xt=point.xt, t=point.t)  # x1 - x0
        tensor([[1., 1.]])
        >>> objective.error(torch.zeros(1, 2), point)  # off by 1 in the data point: by 1 / (1 - t) in the velocity
        tensor([4.])
    """

    weights: ClassVar[tuple[str, ...]] = get_args(ErrorWeight)
    # Whether the conversion is singular at the source's end, and at the data's.
    _clipped_ends: ClassVar[tuple[bool, bool]] = (False, False)

    def __init__(self, weight: ErrorWeight = "natural", clip: float = 0.02) -> None:
        check_number("clip", clip, above=0, below=0.5, hint="it is a distance in time from an end")
        if weight not in self.weights:
            raise ValueError(
                f"weight of {type(self).__name__} must be one of {', '.join(self.weights)}, got {weight!r}"
            )
        self.weight = weight
        self.clip = clip
        self._binding: _Binding | None = None

    @property
    @abstractmethod
    def prediction(self) -> str:
        """What the network predicts; a checkpoint keeps it, because weights of one prediction are none of another."""

    @property
    def needs_conversion(self) -> bool:
        """Whether it needs a path without noise of its own, on which predictions turn into each other."""
        return True

    @property
    def needs_gaussian_source(self) -> bool:
        """Whether it is right for a Gaussian source, independent of the data and with pairs of one weight, alone."""
        return self.weight == "elbo"

    @property
    def sampler_name(self) -> str | None:
        """What samples depend on beside weights and solver, for their rows; None where they do not."""
        return f"{self.prediction}-prediction[clip={self.clip:g}]"

    def for_path(self, path: Path, source_std: float = 1.0) -> Objective:
        """A copy for points of `path`, whose source has this standard deviation in each coordinate.

        Raises:
            ValueError: for a path with noise of its own, which has no conversions.
        """
        check_scale("source_std", source_std)
        if self.needs_conversion and path.needs_generator:
            raise ValueError(
                f"{self!r} needs conversions between predictions, and {path!r} adds noise of its own and has none: "
                "take VelocityObjective(), or a path without noise"
            )
        bound = copy.copy(self)
        low, high = path.interval
        first, last = self._clipped_ends
        bound._binding = _Binding(
            path, source_std, max(low, self.clip) if first else low, min(high, 1 - self.clip) if last else high
        )
        return bound

    @abstractmethod
    def target(self, point: PathSample) -> Tensor:
        """What :meth:`estimate` is compared with, shape (B, *D)."""

    def estimate(self, output: Tensor, t: Tensor) -> Tensor:
        """The network's output in the units of the target; here itself."""
        return output

    @abstractmethod
    def _affine(self, c: PathCoefficients) -> tuple[Tensor, Tensor]:
        """Coefficients a and b of the velocity ``a estimate + b x_t``."""

    # ---- what a flow calls ----------------------------------------------------------------------------

    def clock(self, t: Tensor) -> Tensor:
        """The times at which a network is trained and asked in place of t, same shape: t away from a singular end."""
        bound = self._bound
        return t.clamp(bound.first, bound.last)

    def velocity(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The velocity of a prediction.

        Args:
            output: of the network at the clipped time, shape (B, *D).
            xt: points of the path, shape (B, *D).
            t: times in [0, 1], a scalar or of shape (B,); clipped here.

        Returns:
            Velocities, shape (B, *D), in the wider precision of both.
        """
        t = _like(self.clock(t), xt)
        of_estimate, of_state = self._affine(self._bound.path.coefficients(t))
        return of_estimate * self.estimate(output, t) + of_state * xt

    def field(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The velocities of a network ``network(x, t, *conditions)``, with its arguments."""

        def velocity(x: Tensor, t: Tensor, *conditions: Tensor | None) -> Tensor:
            return self.velocity(network(x, self.clock(t), *conditions), x, t)

        return velocity

    def error(self, output: Tensor, point: PathSample) -> Tensor:
        """The weighted squared error of each sample, a mean over its dimensions.

        Args:
            output: of the network at the points, shape (B, *D).
            point: of the path, at times of :meth:`clock`.

        Returns:
            float32, shape (B,).
        """
        estimate = self.estimate(output, _like(point.t, output))
        error = (estimate - self.target(point)).float().square().flatten(1).mean(1)
        return error if self.weight == "natural" else self.weight_at(point.t).float() * error

    def weight_at(self, t: Tensor) -> Tensor:
        """What the squared error of the estimate is multiplied by at times t, of any shape."""
        if self.weight == "natural":
            return torch.ones_like(t)
        t = self.clock(t)
        if self.weight == "elbo":  # in the velocity's error it is alpha / (sigma |D|): infinite at the data's end
            t = t.clamp(self.clip, 1 - self.clip)
        c = self._bound.path.coefficients(t)
        factor = self._affine(c)[0].square()
        if self.weight == "velocity":
            return factor
        speed = c.sigma * c.d_alpha - c.alpha * c.d_sigma
        return factor * c.alpha / (c.sigma * speed * self._bound.source_std**2)

    def metrics(self, output: Tensor, point: PathSample) -> dict[str, Tensor]:
        """Scalars to log beside the loss: the velocity's mean squared error, which compares across objectives."""
        velocity = self.velocity(output.detach(), point.xt, point.t)
        return {"velocity_loss": (velocity - point.velocity).float().square().mean()}

    @property
    def _bound(self) -> _Binding:
        assert self._binding is not None, _UNBOUND
        return self._binding

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight!r}, clip={self.clip:g})"


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
