"""Directionally pruned sampling: an isotropic source without the directions in which there are no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.core.seeds import derive_seed
from flowbench.core.seeds import generator as keyed_generator
from flowbench.flows.source.base import FittedSource, GaussianSource, Source

__all__ = ["AcceptanceRate", "PrunedSource"]

# Directions behind the estimate of the acceptance, and at a time.
_ESTIMATE, _CHUNK = 8192, 1024
# A sample that finds no direction in all its rounds is an error; it must be rarer than this.
_FAILURE = 1e-6


class AcceptanceRate(NamedTuple):
    """Probability that a draw of the unpruned source is kept, with the standard error of its estimate."""

    value: float
    standard_error: float


class PrunedSource(FittedSource):
    """An isotropic source restricted to directions that are far from the sparse axes of the data.

    With V the principal axes of the normalised data, each taken in both directions v_k, k = 1..2d, and gamma_k = max_i
    <v_k, x_i / |x_i|>, an axis is sparse where gamma_k <= threshold: no data point looks that way. Points x0 with
    <v_k, x0 / |x0|> > max_cosine for a sparse v_k are left out. A model trained on the whole source is sampled from
    this one; its samples are then distributed otherwise, coverage is traded for precision: measure both.

    Draws are exact, and keyed per sample index as those of every source. "rejection" keeps or replaces whole draws
    of the unpruned source, so kept ones are the same noise bit for bit. "truncated" is for many axes, where the
    acceptance is far below a thousandth: Gaussian coordinates along the axes are cut at c = max_cosine sqrt(d), which
    proposes a direction of largest sparse cosine m in proportion to F(c / m), F the distribution function of chi(d);
    where m <= max_cosine it is kept with probability F(c / max_cosine) / F(c / m), at least about one half.

    The state in a checkpoint is the k pruned axes, k x d numbers in single precision: the other axes play no
    part in a draw.

    Args:
        max_cosine: tau_r in (0, 1]; 1 leaves the source as it is.
        quantile: share of the 2d axes that are pruned, in (0, 1), those of the lowest gamma; or give `threshold`.
        threshold: tau: axes with gamma <= threshold are pruned; in [-1, max_cosine).
        axes: "low" for the sparse axes; "random" and "high" are controls that prune as many axes, drawn at random or of
            the highest gamma.
        source: what is pruned, isotropic; None is the standard normal.
        method: "rejection" or "truncated", see above.
        max_rounds: rounds of draws, >= 1, before a sample is given up.

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184: pruned sampling. The exact sampler by truncation is our own.

    Example:
        >>> source = PrunedSource(max_cosine=0.5, quantile=0.25)  # one of the 4 directions of 2 axes
        >>> data = torch.tensor([[1.0, 0.5], [1.0, -0.5], [2.0, 0.0]])  # nothing to the left
        >>> source.fit(data, torch.Generator().manual_seed(0))
        >>> source.pruned_axes.round().long()
        tensor([[-1,  0]])
        >>> round(source.acceptance_rate.value, 1)  # 120 of 360 degrees are left out
        0.7
    """

    def __init__(
        self,
        max_cosine: float,
        quantile: float | None = None,
        threshold: float | None = None,
        axes: Literal["low", "random", "high"] = "low",
        source: Source | None = None,
        method: Literal["rejection", "truncated"] = "rejection",
        max_rounds: int = 1000,
    ) -> None:
        super().__init__()
        check_number("max_cosine", max_cosine, above=0, at_most=1, hint="1 prunes nothing")
        if (quantile is None) == (threshold is None):
            raise ValueError(f"give quantile or threshold, not both or none: got {quantile} and {threshold}")
        share = "the paper prunes about a third of the axes"
        check_number("quantile", quantile, above=0, below=1, or_none=True, hint=share)
        limit = f"below max_cosine={max_cosine}"
        check_number("threshold", threshold, at_least=-1, below=max_cosine, or_none=True, hint=limit)
        if axes not in ("low", "random", "high"):
            raise ValueError(f'axes must be "low", "random" or "high", got {axes!r}')
        if method not in ("rejection", "truncated"):
            raise ValueError(f'method must be "rejection" or "truncated", got {method!r}')
        check_count("max_rounds", max_rounds)
        self.source = source or GaussianSource()
        if not self.source.is_isotropic:
            raise ValueError(f"only an isotropic source can be pruned, got {self.source!r}: try GaussianSource")
        self.max_cosine, self.quantile, self.threshold = max_cosine, quantile, threshold
        self.axes, self.method, self.max_rounds = axes, method, max_rounds

    # ---- fit ------------------------------------------------------------------------------------------

    @property
    def needs_fit(self) -> bool:
        """Until the axes and the pruned source itself are fitted."""
        return super().needs_fit or self.source.needs_fit

    def fit(self, data_points: Tensor, generator: torch.Generator) -> None:
        """Fit the axes, and the source that is pruned.

        Args:
            data_points: training points where the flow lives, shape (N, *D), N at least 2, none of them zero.
            generator: draws random control axes.

        Raises:
            ValueError: as for every fitted source; for a threshold that prunes nothing; and where draws would take
                more than `max_rounds` rounds.
        """
        self.source.fit(data_points, generator)
        super().fit(data_points, generator)

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        norm = points.norm(dim=1, keepdim=True)
        if not bool(norm.all()):
            zeros = int((norm == 0).sum())
            raise ValueError(f"PrunedSource: {zeros} of {len(points)} data points are zero and have no direction")
        directions = points / norm
        basis = principal_axes(directions)
        gamma = largest_cosines(basis, directions)
        pruned = self._choose(gamma, generator)
        sides = pruned.reshape(2, -1)
        used = sides.any(0)
        # Rounded before anything is computed from them, so that what is loaded is what was fitted.
        values = {"axes": basis[used].float(), "sides": sides[:, used]}
        if self.max_cosine < 1:
            values["acceptance"] = self._estimate(_Box(values["sides"], points.shape[1], self.max_cosine))
        return values

    def _choose(self, gamma: Tensor, generator: torch.Generator) -> Tensor:
        """Which of the 2d axes are pruned, bool (2d,)."""
        order = gamma.argsort(stable=True)
        if self.quantile is not None:
            count = max(1, round(self.quantile * len(gamma)))
            tau = float(gamma[order[count - 1]])
        else:
            assert self.threshold is not None, "the constructor asks for one of the two"
            tau = self.threshold
            count = int((gamma <= tau).sum())
            if count == 0:
                raise ValueError(
                    f"no axis has gamma <= threshold={tau:g}; the smallest is {float(gamma.min()):g}: raise it"
                )
        if self.axes == "low" and self.max_cosine < 1 and tau >= self.max_cosine:
            raise ValueError(
                f"the pruned axes have gamma up to {tau:g}, not below max_cosine={self.max_cosine:g}: "
                "directions of data would be left out; raise max_cosine or lower quantile"
            )
        if self.axes == "random":
            order = torch.randperm(len(gamma), generator=generator)
        elif self.axes == "high":
            order = order.flip(0)
        return torch.zeros(len(gamma), dtype=torch.bool).index_fill_(0, order[:count], True)

    def _estimate(self, box: _Box) -> Tensor:
        """Acceptance and its standard error, with fixed noise: P(box) times the mean of 1[kept] / F(c / m)."""
        rng = keyed_generator(0, "pruned-source", "acceptance")
        parts = []
        for start in range(0, _ESTIMATE, _CHUNK):
            # In an orthonormal basis that begins with the axes.
            normal = torch.randn(min(_CHUNK, _ESTIMATE - start), box.num_dims, generator=rng, dtype=torch.float64)
            along, rest = normal.tensor_split([box.num_axes], dim=1)
            _, cosine = box.propose(along, rest.square().sum(1))
            parts.append((cosine <= self.max_cosine) / box.chi(cosine))
        weight = torch.cat(parts)
        inside = float(weight.mean()) * box.chi_limit
        value, error = weight.mean() * box.probability, weight.std() / math.sqrt(len(weight)) * box.probability
        rate = float(value) if self.method == "rejection" else inside
        if rate * self.max_rounds < -math.log(_FAILURE):
            remedy = (
                "raise max_cosine or max_rounds, or lower quantile"
                if self.method == "truncated"
                else ("set method=truncated, or raise max_cosine or max_rounds")
            )
            raise ValueError(
                f"PrunedSource would keep one draw in {1 / rate if rate else math.inf:.3g}, "
                f"too few for max_rounds={self.max_rounds}: {remedy}"
            )
        return torch.stack([value.clamp(max=1.0), error])

    @property
    def acceptance_rate(self) -> AcceptanceRate:
        """Probability that a draw of the unpruned source is kept; by fixed noise, so the same in every process."""
        if self.max_cosine == 1:
            return AcceptanceRate(1.0, 0.0)
        return AcceptanceRate(*self._fitted("acceptance").tolist())

    @property
    def pruned_axes(self) -> Tensor:
        """Unit vectors that no sample comes close to, float64, shape (K, d)."""
        axes, (forward, backward) = self._used_axes(), self._fitted("sides")
        return torch.cat([axes[forward], -axes[backward]])

    def _used_axes(self, device: torch.device | str = "cpu") -> Tensor:
        """Axes that are pruned in one direction or in both, float64, shape (k, d)."""
        return self._fitted("axes", device).double()

    # ---- draw -----------------------------------------------------------------------------------------

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw on the generator's device and move.

        Raises:
            ValueError: when a sample found no direction in `max_rounds` rounds.
        """

        def points(rows: Tensor, round_: int) -> Tensor:
            return self.source.sample(len(rows), shape, generator, generator.device)

        def uniforms(rows: Tensor, round_: int) -> Tensor:
            size = (len(rows), math.prod(shape) + 1)
            return torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)

        return self._collect(num, shape, points, uniforms).to(device)

    def sample_indexed(
        self,
        indices: Iterable[int] | Tensor,
        shape: tuple[int, ...],
        seed: int,
        *names: str | int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """One point per sample index, whatever the batch: the draws of the unpruned source where they are kept."""
        index = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64).cpu()

        def points(rows: Tensor, round_: int) -> Tensor:
            again = ("pruned", round_) if round_ else ()
            return self.source.sample_indexed(index[rows], shape, seed, *names, *again)

        def uniforms(rows: Tensor, round_: int) -> Tensor:
            rng, size = torch.Generator(), math.prod(shape) + 1
            keys = [derive_seed(seed, *names, "pruned", round_, "uniform", int(i)) for i in index[rows]]
            return torch.stack([torch.rand(size, generator=rng.manual_seed(k), dtype=torch.float64) for k in keys])

        return self._collect(len(index), shape, points, uniforms).to(device)

    def _collect(
        self,
        num: int,
        shape: tuple[int, ...],
        points: Callable[[Tensor, int], Tensor],
        uniforms: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Draw for all samples, then again for those that were not kept, until none is left."""
        self._fitted("axes")
        self._check_shape(shape)
        pending = torch.arange(num)
        out = points(pending, 0)
        if self.max_cosine == 1 or num == 0:
            return out
        for round_ in range(self.max_rounds):
            drawn = points(pending, round_) if round_ else out
            if self.method == "rejection":
                kept = self._largest_cosine(drawn) <= self.max_cosine
            else:
                drawn, kept = self._turned(drawn, uniforms(pending, round_))
            out = out.index_copy(0, pending.to(out.device), drawn)
            pending = pending[~kept.cpu()]
            if len(pending) == 0:
                return out
        rate = self.acceptance_rate.value
        raise ValueError(
            f"PrunedSource found no direction for {len(pending)} of {num} samples in {self.max_rounds} rounds "
            f"(it keeps {rate:.3g} of all draws): raise max_cosine or max_rounds"
        )

    def _largest_cosine(self, x: Tensor) -> Tensor:
        """Largest cosine of points (B, *D) with a pruned axis, float64, shape (B,)."""
        flat = x.detach().flatten(1).double()
        along = flat @ self._used_axes(x.device).T / flat.norm(dim=1, keepdim=True)
        return _largest(along, self._fitted("sides", x.device))

    def _turned(self, drawn: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the radii of ``drawn`` in proposed directions, and which of them are kept."""
        axes = self._used_axes(drawn.device)
        box = _Box(self._fitted("sides", drawn.device), axes.shape[1], self.max_cosine)
        normal = _normal(uniform[:, :-1])
        along = normal @ axes.T
        rest = normal - along @ axes
        cut, cosine = box.propose(along, rest.square().sum(1))
        kept = (cosine <= self.max_cosine) & (uniform[:, -1] * box.chi(cosine) <= box.chi_limit)
        direction = torch.nn.functional.normalize(rest + cut @ axes)
        radius = drawn.flatten(1).double().norm(dim=1, keepdim=True)
        return (radius * direction).to(drawn.dtype).reshape(drawn.shape), kept

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, float64, shape (B,): that of the source minus log P(kept), -inf outside.

        A model's likelihood is undefined at data whose noise lies outside. P(kept) is :attr:`acceptance_rate`.
        """
        self._check_shape(tuple(x.shape[1:]))
        if self.max_cosine == 1:
            return self.source.log_prob(x)
        inside = self._largest_cosine(x) <= self.max_cosine
        return (self.source.log_prob(x) - math.log(self.acceptance_rate.value)).masked_fill(~inside, -math.inf)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        chosen = f"quantile={self.quantile}" if self.quantile is not None else f"threshold={self.threshold}"
        drawn = f"axes={self.axes!r}, method={self.method!r}, source={self.source!r}"
        return f"max_cosine={self.max_cosine:g}, {chosen}, {drawn}"


class _Box:
    """Gaussian coordinates along the k used axes, cut at c = max_cosine sqrt(d) on pruned sides; the others are not.

    Args:
        sides: whether an axis is pruned forward and backward, bool (2, k).
        num_dims: d.
        max_cosine: where it is cut.
    """

    def __init__(self, sides: Tensor, num_dims: int, max_cosine: float) -> None:
        self.num_dims, self.num_axes = num_dims, sides.shape[1]
        self.sides, self.max_cosine = sides, max_cosine
        self.cut = max_cosine * math.sqrt(num_dims)
        forward, backward = sides
        cut = torch.tensor(self.cut, dtype=torch.float64, device=sides.device)
        self.upper = torch.where(forward, torch.special.ndtr(cut), 1.0)
        self.lower = torch.where(backward, torch.special.ndtr(-cut), 0.0)

    @property
    def probability(self) -> Tensor:
        """Probability that an uncut Gaussian lies inside."""
        return (self.upper - self.lower).log().sum().exp()

    @property
    def chi_limit(self) -> float:
        """F(c / max_cosine)."""
        return float(self.chi(self.lower.new_tensor([self.max_cosine])))

    def chi(self, cosine: Tensor) -> Tensor:
        """F(c / m) of largest cosines m, shape (B,): the share of radii that the cut leaves to a direction."""
        half = (self.cut / cosine.clamp(min=torch.finfo(cosine.dtype).tiny)).square() / 2
        return torch.special.gammainc(torch.full_like(half, self.num_dims / 2), half)

    def propose(self, along: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Cut coordinates, (B, k), and the largest cosines of the directions that they make with the rest, (B,).

        Args:
            along: standard normal coordinates along the axes, shape (B, k).
            rest: sum of the squares of the other coordinates, shape (B,).
        """
        cut = _normal(torch.lerp(self.lower, self.upper, torch.special.ndtr(along)))
        norm = (rest + cut.square().sum(1)).sqrt()
        return cut, _largest(cut, self.sides) / norm


def _normal(probability: Tensor) -> Tensor:
    """Quantiles of the standard normal, finite at 0 and 1."""
    double = torch.finfo(torch.float64)
    return torch.special.ndtri(probability.clamp(double.tiny, 1 - double.eps / 2))


def _largest(along: Tensor, sides: Tensor) -> Tensor:
    """Largest coordinate towards a pruned side, shape (B,), of coordinates (B, k)."""
    return torch.cat([along, -along], dim=1)[:, sides.flatten()].amax(1)


def principal_axes(directions: Tensor) -> Tensor:
    """Orthonormal principal axes of points (N, d), float64, shape (d, d), the one of least variance first."""
    centred = directions - directions.mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.T.contiguous()


def largest_cosines(basis: Tensor, directions: Tensor) -> Tensor:
    """For each axis, forward then backward, the largest cosine with any of the unit vectors; shape (2 d,)."""
    along = directions @ basis.T
    return torch.cat([along.amax(0), -along.amin(0)])
