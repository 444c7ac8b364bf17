"""What a probability path is: coefficients, samples with their target velocities, and conversions of predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.core.checks import check_scale

__all__ = ["Path", "PathCoefficients", "PathSample"]


@dataclass(frozen=True)
class PathCoefficients:
    """Coefficients of an affine path and their time derivatives, all of the shape of their time.

    Example:
        >>> LinearPath().coefficients(torch.tensor(0.25))
        PathCoefficients(alpha=tensor(0.2500), sigma=tensor(0.7500), d_alpha=tensor(1.), d_sigma=tensor(-1.))
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class PathSample:
    """Points on the path between paired source and data points.

    Attributes:
        x0: source points, shape (B, *D).
        x1: data points, shape (B, *D).
        t: times in [0, 1], shape (B,).
        xt: points of the path at time t, shape (B, *D).
        velocity: time derivative of the path at t, the regression target, shape (B, *D).
        noise: the standard normal draw that the path itself added, shape (B, *D); None for a path without noise.

    Example:
        >>> sample = LinearPath().sample(x0=torch.zeros(2, 3), x1=torch.ones(2, 3), t=torch.tensor([0.25, 0.5]))
        >>> sample.xt
        tensor([[0.2500, 0.2500, 0.2500],
                [0.5000, 0.5000, 0.5000]])
        >>> sample.velocity.shape, sample.noise
        (torch.Size([2, 3]), None)
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    xt: Tensor
    velocity: Tensor
    noise: Tensor | None = None


class Path(ABC):
    """A path ``x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) noise`` with the velocity of its time derivative.

    Most paths have gamma = 0. For those a prediction of the velocity, of the data point, of the source point or of the
    score (the gradient of the log-density of x_t) at a known (x_t, t) turns into each of the others. The conversions
    take t of shape (B,) or a scalar, and the score one assumption more than the others: a Gaussian source
    N(0, source_std^2 I), *independent* of the data.

    Attributes:
        interval: times between which the velocity is finite; train and integrate inside it.
        needs_generator: whether the path adds noise of its own (gamma > 0); there are no conversions then.
        needs_standard_normal: whether the path is right only for a standard normal source, drawn independently of the
            data.

    Example:
        >>> class QuadraticPath(Path):  # starts slowly
        ...     def coefficients(self, t):
        ...         return PathCoefficients(alpha=t**2, sigma=1 - t**2, d_alpha=2 * t, d_sigma=-2 * t)
        >>> sample = QuadraticPath().sample(x0=torch.zeros(1, 1), x1=torch.ones(1, 1), t=torch.tensor([0.5]))
        >>> sample.xt, sample.velocity
        (tensor([[0.2500]]), tensor([[1.]]))
    """

    interval: tuple[float, float] = (0.0, 1.0)
    needs_generator: bool = False
    needs_standard_normal: bool = False

    @abstractmethod
    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients of data and source at times t in [0, 1], of any shape."""

    def noise_scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviation gamma of the noise that the path adds at times t, and its time derivative."""
        return torch.zeros_like(t), torch.zeros_like(t)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Points of the path and their target velocities.

        Args:
            x0: source points, shape (B, *D).
            x1: data points, shape (B, *D).
            t: times in [0, 1], shape (B,).
            generator: of the path's own noise, drawn on the generator's device; unused by a path without noise.

        Raises:
            ValueError: if the shapes disagree, or for a path with noise and no generator.
        """
        if x0.shape != x1.shape:
            raise ValueError(
                f"x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}: pair them first"
            )
        if t.shape != x1.shape[:1]:
            raise ValueError(f"t must have shape ({len(x1)},), one time per sample, got {tuple(t.shape)}")
        c = self.coefficients(_like(t, x1))
        xt, velocity = c.alpha * x1 + c.sigma * x0, c.d_alpha * x1 + c.d_sigma * x0
        if not self.needs_generator:
            return PathSample(x0, x1, t, xt, velocity)
        noise = self._draw(x1, generator)
        scale, d_scale = self.noise_scale(_like(t, x1))
        return PathSample(x0, x1, t, xt + scale * noise, velocity + d_scale * noise, noise)

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            raise ValueError(f"{self!r} adds noise of its own, got no generator: pass one to sample()")
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)

    # ---- conversions of predictions -------------------------------------------------------------------

    def velocity_to_data(self, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Data point that a velocity at (x_t, t) points to; singular where the velocity is not finite."""
        c = self._converting(xt, t)
        determinant = self._divisor(c.alpha * c.d_sigma - c.sigma * c.d_alpha, t, "velocity to data")
        return (c.d_sigma * xt - c.sigma * velocity) / determinant

    def velocity_to_source(self, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Source point that a velocity at (x_t, t) comes from; singular where the velocity is not finite."""
        c = self._converting(xt, t)
        determinant = self._divisor(c.alpha * c.d_sigma - c.sigma * c.d_alpha, t, "velocity to source or score")
        return (c.alpha * velocity - c.d_alpha * xt) / determinant

    def velocity_to_score(self, velocity: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Score at (x_t, t) of a marginal velocity, see :meth:`source_to_score`; singular where sigma = 0."""
        return self.source_to_score(self.velocity_to_source(velocity, xt, t), xt, t, source_std)

    def data_to_velocity(self, data: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Velocity at (x_t, t) of the path that ends in ``data``; singular where sigma = 0 (t = 1)."""
        c = self._converting(xt, t)
        return c.d_alpha * data + c.d_sigma * self.data_to_source(data, xt, t)

    def data_to_source(self, data: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Source point of the path through (x_t, t) that ends in ``data``; singular where sigma = 0 (t = 1)."""
        c = self._converting(xt, t)
        return (xt - c.alpha * data) / self._divisor(c.sigma, t, "data to source, velocity or score")

    def data_to_score(self, data: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Score at (x_t, t) of the expected data point, see :meth:`source_to_score`; singular where sigma = 0."""
        return self.source_to_score(self.data_to_source(data, xt, t), xt, t, source_std)

    def source_to_velocity(self, source: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Velocity at (x_t, t) of the path that starts in ``source``; singular where alpha = 0."""
        c = self._converting(xt, t)
        self._refuse_where(~c.d_sigma.isfinite(), t, "source or score to velocity")
        return c.d_alpha * self.source_to_data(source, xt, t) + c.d_sigma * source

    def source_to_data(self, source: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Data point of the path through (x_t, t) that starts in ``source``; singular where alpha = 0."""
        c = self._converting(xt, t)
        return (xt - c.sigma * source) / self._divisor(c.alpha, t, "source or score to data or velocity")

    def source_to_score(self, source: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Score at (x_t, t) of the expected source point: ``-E[x0 | x_t] / (sigma(t) source_std^2)``.

        x_t given the data point is N(alpha x1, (sigma source_std)^2 I) for a Gaussian source that is independent of
        the data; the score of the marginal is the posterior mean of its score (Vincent 2011, denoising score matching).
        A coupling other than the independent one breaks this. Singular where sigma = 0.

        Args:
            source: expected source point, shape (B, *D).
            xt: points of the path, shape (B, *D).
            t: times, a scalar or of shape (B,).
            source_std: standard deviation of each coordinate of the source, in [1e-12, 1e12].
        """
        c = self._converting(xt, t)
        return -source / (self._divisor(c.sigma, t, "source to score") * _variance(source_std))

    def score_to_velocity(self, score: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Marginal velocity at (x_t, t) of a score, see :meth:`source_to_score`; singular where alpha = 0."""
        return self.source_to_velocity(self.score_to_source(score, xt, t, source_std), xt, t)

    def score_to_data(self, score: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Expected data point at (x_t, t), see :meth:`source_to_score` (Tweedie); singular where alpha = 0."""
        return self.source_to_data(self.score_to_source(score, xt, t, source_std), xt, t)

    def score_to_source(self, score: Tensor, xt: Tensor, t: Tensor, source_std: float = 1.0) -> Tensor:
        """Expected source point at (x_t, t) of a score, see :meth:`source_to_score`; regular everywhere."""
        c = self._converting(xt, t)
        return -_variance(source_std) * c.sigma * score

    # ---- signal-to-noise ratio ------------------------------------------------------------------------

    def log_snr(self, t: Tensor) -> Tensor:
        """``lambda(t) = log(alpha / sigma)``, half the logarithm of the signal-to-noise ratio alpha^2 / sigma^2.

        Args:
            t: times in [0, 1], of any shape.

        Returns:
            float64, increasing in t; -inf where alpha = 0, +inf where sigma = 0.

        Raises:
            ValueError: for a path with noise of its own.
        """
        self._refuse_noise("signal-to-noise ratio")
        return self._log_snr(t.double())

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`, in closed form.

        Args:
            log_snr: values of lambda, of any shape; infinite ones where the path reaches them.

        Returns:
            Times in [0, 1], float64.

        Raises:
            ValueError: for values that the path does not reach, or a path without a closed form.
        """
        self._refuse_noise("signal-to-noise ratio")
        t = self._time_of_log_snr(log_snr.double())
        missed = ~((t > -_ROUNDING) & (t < 1 + _ROUNDING))
        if missed.any():
            value = log_snr.expand(missed.shape)[missed].flatten()[0].item()
            low, high = self.log_snr(torch.tensor([0.0, 1.0])).tolist()
            raise ValueError(f"{self!r} has log(alpha / sigma) between {low:g} and {high:g}, got {value:g}")
        return t.clamp(0, 1)

    def _log_snr(self, t: Tensor) -> Tensor:
        c = self.coefficients(t)
        return c.alpha.log() - c.sigma.log()

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Unchecked: a value that the path does not reach gives a time outside [0, 1]."""
        raise ValueError(f"{self!r} has no closed form for the time of a signal-to-noise ratio: use another path")

    # ---- checks ---------------------------------------------------------------------------------------

    def _converting(self, xt: Tensor, t: Tensor) -> PathCoefficients:
        self._refuse_noise("conversion between predictions")
        return self.coefficients(_like(t, xt))

    def _refuse_noise(self, what: str) -> None:
        if self.needs_generator:
            raise ValueError(f"{self!r} adds noise of its own and has no {what}: use a path without noise")

    def _divisor(self, divisor: Tensor, t: Tensor, conversion: str) -> Tensor:
        self._refuse_where((divisor == 0) | ~divisor.isfinite(), t, conversion)
        return divisor

    def _refuse_where(self, singular: Tensor, t: Tensor, conversion: str) -> None:
        if singular.any():
            time = t.expand(singular.shape[: t.ndim])[singular.reshape(t.shape)].flatten()[0].item()
            raise ValueError(
                f"{self!r} cannot turn {conversion} at t = {time:g}: the path is singular there;"
                f" stay strictly inside {self.interval}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


# A round trip from time to signal-to-noise ratio and back may leave [0, 1] by rounding.
_ROUNDING = 1e-9


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _variance(source_std: float) -> float:
    check_scale("source_std", source_std)
    return source_std**2
