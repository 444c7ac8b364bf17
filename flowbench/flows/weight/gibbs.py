"""The Gibbs weight of weighted flow matching, its corrections and its diagnostics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_number, check_scale
from flowbench.core.distributed import rank
from flowbench.flows.weight.base import Weight, WeightResult
from flowbench.flows.weight.cost import COSTS, Cost, cost_matrix, flat_points, pair_cost
from flowbench.flows.weight.epsilon import ElbowEpsilon, EpsilonRule, FittedEpsilon
from flowbench.flows.weight.marginal import KernelMean
from flowbench.flows.weight.normalization import global_log_mean_exp
from flowbench.flows.weight.quadrature import EmpiricalRadii, GaussianRadii
from flowbench.flows.weight.tilt import effective_share, tilts

__all__ = ["Correction", "GibbsWeight", "Normalization"]

Normalization = Literal["running", "batch", "raw"]
Correction = Literal["none", "target", "source", "mixed", "tilt-only"]

# Exponents of w = exp(-c / epsilon), of f(x) and of g(y) in the weight.
EXPONENTS: dict[Correction, tuple[int, int, int]] = {
    "none": (1, 0, 0),
    "target": (1, 0, -1),
    "source": (1, -1, 0),
    "mixed": (1, -1, -1),
    "tilt-only": (0, 1, 1),
}
# Below this share of the batch the weights throw most of it away.
LEAST_ESS = 0.3
# Points of a batch from which its tilt is estimated.
TILT_POINTS = 512


class GibbsWeight(Weight):
    """The Gibbs weight ``w = exp(-c(x0, x1) / epsilon)`` of weighted flow matching.

    It imitates an entropic coupling on independent pairs at linear cost, but tilts both marginals on the way: a
    source point x counts f(x) = E_y w(x, y) and a data point y counts g(y) = E_x w(x, y). Watch ``ess`` and the
    tilts. Raw weights are around 4e-6 on CIFAR-10 at epsilon = 5 (an estimate), which changes the effect of gradient
    clipping and of Adam's epsilon; a constant factor leaves the optimal velocity as it is, so the default divides by a
    running mean.

    Diagnostics, of the weight in use: ``ess``, the effective sample size over B, in (0, 1] (below 0.3 it warns, once);
    ``max_share``, the largest weight over their sum; ``weighted_cost`` and ``unweighted_cost``, the mean cost c with
    and without the weights; ``tilt_source`` and ``tilt_target``, the squared coefficients of variation of the mean
    weight per source and per data point, over all pairs of the batch's first 512 points.

    Args:
        kappa: temperature per square root of the dimension, epsilon = kappa sqrt(d), > 0, for coordinates of order
            one; 0.5 where neither it nor ``epsilon`` is given. The paper's CIFAR-10 setting is 5 / sqrt(3072).
        cost: "norm" for the Euclidean distance (the paper), "squared" for its square.
        normalization: "running" divides by a moving average of the batches' log-mean-exp, taken over earlier
            batches so that the gradient stays unbiased up to a constant factor (the first batch divides by
            its own); "batch" divides by this batch's mean, of order 1/B bias; "raw" divides by nothing, and refuses a
            batch whose weights all underflow (to see that, it waits for the device in every step). Means are taken
            over all processes when torch.distributed is initialised. A micro-batch of accumulated gradients counts as
            a batch.
        decay: decay of the moving average per training batch, in (0, 1), with bias-corrected warm-up. The
            average is part of the state dict and is frozen in eval mode.
        epsilon: the temperature itself, in [1e-12, 1e12], in place of ``kappa``; or the rule that chooses it on data,
            "elbow" for :class:`ElbowEpsilon` with its defaults.
        correction: what is done about the marginals. "none" is W-CFM; "target" weighs by w / g(y), which keeps the
            data's law and tilts the source; "source" by w / f(x), the reverse; "mixed" by w / (f(x) g(y)), one
            simultaneous step of Sinkhorn's scaling, exact for neither; "tilt-only" by f(x) g(y): the control, the
            same marginals as W-CFM without a coupling. g is a table over |y| for an isotropic source and free; any
            other mean runs over stored points, O(B M d) in every step.
        num_reference: M, how many points, >= 1, are stored for such a mean (f always, g unless the source is
            isotropic); they travel in the checkpoint.

    References:
        Calvo-Ordonez et al. 2025, arXiv 2507.22270 (W-CFM). The corrections are ours.

    Example:
        >>> weight = GibbsWeight(epsilon=1.0, normalization="raw")
        >>> result = weight(x0=torch.zeros(2, 1), x1=torch.tensor([[0.0], [1.0]]))
        >>> result.weight  # 1 and exp(-1)
        tensor([1.0000, 0.3679])
        >>> GibbsWeight(kappa=0.5).epsilon(num_dims=16)  # kappa sqrt(16)
        2.0
    """

    running_log_mean: Tensor
    num_updates: Tensor

    def __init__(
        self,
        kappa: float | None = None,
        cost: Cost = "norm",
        normalization: Normalization = "running",
        decay: float = 0.99,
        *,
        epsilon: float | Literal["elbow"] | EpsilonRule | None = None,
        correction: Correction = "none",
        num_reference: int = 1024,
    ) -> None:
        super().__init__()
        if kappa is not None and epsilon is not None:
            raise ValueError(
                f"give one of kappa and epsilon and leave the other null, got kappa={kappa} and epsilon={epsilon}"
            )
        kappa = 0.5 if kappa is None and epsilon is None else kappa
        epsilon = ElbowEpsilon() if epsilon == "elbow" else epsilon
        _check_temperature("kappa", kappa)
        _check_temperature("epsilon", epsilon)
        if cost not in COSTS:
            raise ValueError(f'cost must be "norm" or "squared", got {cost!r}')
        if normalization not in ("running", "batch", "raw"):
            raise ValueError(f'normalization must be "running", "batch" or "raw", got {normalization!r}')
        check_number("decay", decay, above=0, below=1)
        if correction not in EXPONENTS:
            raise ValueError(f"correction must be one of {', '.join(EXPONENTS)}, got {correction!r}")
        check_count("num_reference", num_reference)
        self.kappa = kappa
        self.temperature = epsilon
        self.cost: Cost = cost
        self.normalization: Normalization = normalization
        self.decay = decay
        self.correction: Correction = correction
        self.num_reference = num_reference
        _, source, target = EXPONENTS[correction]
        # Modules that hold state exist only where there is some: plain weights keep their two buffers.
        self.source_mean = KernelMean() if source else None
        self.target_mean = KernelMean() if target else None
        self.fitted = FittedEpsilon() if isinstance(epsilon, EpsilonRule) or source or target else None
        self.register_buffer("running_log_mean", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        # The buffer as a number: to read a tensor is to wait for the device.
        self._num_updates = 0
        self._has_warned = False

    @property
    def needs_fit(self) -> bool:
        """For a chosen epsilon and for every correction, until :meth:`fit` or a checkpoint has come."""
        return self.fitted is not None and self.fitted.value is None

    def epsilon(self, num_dims: int) -> float:
        """Temperature for points of ``num_dims`` dimensions.

        Raises:
            ValueError: before the fit, if the weight needs one, or when it was fitted at another temperature.
        """
        given = self._given_epsilon(num_dims)
        if self.fitted is None:
            assert given is not None
            return given
        value = self.fitted.value
        if value is None:
            raise ValueError("this weight is chosen on data: call fit(...), or load the checkpoint of a fitted one")
        if given is not None and not math.isclose(given, value, rel_tol=1e-6):
            raise ValueError(f"the weight was fitted at epsilon = {value:g} but now has {given:g}: fit it again")
        return value

    def _given_epsilon(self, num_dims: int) -> float | None:
        if isinstance(self.temperature, EpsilonRule):
            return None
        return self.temperature if self.kappa is None else self.kappa * math.sqrt(num_dims)

    @torch.no_grad()
    def fit(
        self,
        source_points: Tensor,
        data_points: Tensor,
        generator: torch.Generator,
        isotropic: bool,
        *,
        source_std: float | None = None,
    ) -> None:
        """Choose epsilon, tabulate or store the marginals that the correction needs; see :meth:`Weight.fit`.

        Raises:
            ValueError: for empty samples, points of two shapes or not finite, or where the rule finds no epsilon.
        """
        if self.fitted is None:
            return
        _check_samples(source_points, data_points)
        num_dims = data_points[0].numel()
        epsilon = self._given_epsilon(num_dims)
        if epsilon is None:
            assert isinstance(self.temperature, EpsilonRule)
            epsilon = self.temperature.choose(source_points, data_points, self.cost, generator)
        self.fitted.value = epsilon
        if self.source_mean is not None:
            self.source_mean.store(data_points, self.num_reference, generator)
        if self.target_mean is not None and isotropic:
            source, data = (torch.linalg.vector_norm(flat_points(x), dim=1) for x in (source_points, data_points))
            radii = EmpiricalRadii(source.cpu()) if source_std is None else GaussianRadii(source_std)
            self.target_mean.tabulate(data, num_dims, epsilon, self.cost, radii)
        elif self.target_mean is not None:
            self.target_mean.store(source_points, self.num_reference, generator)

    def forward(self, x0: Tensor, x1: Tensor) -> WeightResult:
        """Weights of the pairs (x0[i], x1[i]), computed in log space in at least float32.

        Raises:
            ValueError: if the two batches differ in shape or are empty, before a fit that is needed, for raw weights
                that underflow, or for points that are not finite (on the CPU; elsewhere looking would stall the
                device, and the training loop stops at the loss).
        """
        if x0.shape != x1.shape or not len(x1):
            raise ValueError(f"pairs must be non-empty and of one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
        a, b = flat_points(x0), flat_points(x1)  # without gradient, and so is all that follows
        epsilon = self.epsilon(a.shape[1])
        cost = pair_cost(a, b, self.cost)
        log_weight = self._log_weight(cost, *self._log_marginals(a, b, epsilon), epsilon)
        weight = self._normalized(log_weight, epsilon)
        return WeightResult(weight, partial(self._diagnostics, a, b, cost, log_weight, epsilon))

    @torch.no_grad()
    def log_weight(self, x0: Tensor, x1: Tensor) -> Tensor:
        """See :meth:`Weight.log_weight`."""
        a, b = flat_points(x0), flat_points(x1)
        epsilon = self.epsilon(a.shape[1])
        return self._log_weight(pair_cost(a, b, self.cost), *self._log_marginals(a, b, epsilon), epsilon)

    @torch.no_grad()
    def log_weight_matrix(self, x0: Tensor, x1: Tensor) -> Tensor:
        """See :meth:`Weight.log_weight_matrix`."""
        a, b = flat_points(x0), flat_points(x1)
        epsilon = self.epsilon(a.shape[1])
        source, target = self._log_marginals(a, b, epsilon)
        column = None if source is None else source[:, None]
        return self._log_weight(cost_matrix(a, b, self.cost), column, target, epsilon)

    def _log_marginals(self, a: Tensor, b: Tensor, epsilon: float) -> tuple[Tensor | None, Tensor | None]:
        """Logarithms of f and g at the points, where the correction asks for them."""
        source = None if self.source_mean is None else self.source_mean(a, epsilon, self.cost)
        target = None if self.target_mean is None else self.target_mean(b, epsilon, self.cost)
        return source, target

    def _log_weight(self, cost: Tensor, source: Tensor | None, target: Tensor | None, epsilon: float) -> Tensor:
        """Log-weights of costs (..., B) whose marginals' logarithms broadcast against them."""
        kernel, source_power, target_power = EXPONENTS[self.correction]
        log_weight = cost * (-kernel / epsilon)
        if source is not None:
            log_weight.add_(source, alpha=source_power)
        if target is not None:
            log_weight.add_(target, alpha=target_power)
        return log_weight

    def _normalized(self, log_weight: Tensor, epsilon: float) -> Tensor:
        log_mean = global_log_mean_exp(log_weight)
        if isinstance(log_mean, float) or self.normalization == "raw":
            self._check(float(log_mean), len(log_weight), epsilon)
        if self.normalization == "raw":
            return log_weight.exp()
        if self.normalization == "batch":
            return (log_weight - log_mean).exp_()
        weight = (log_weight - (self.running_log_mean if self._num_updates else log_mean)).exp_()
        if self.training:
            self._update(log_mean)
        return weight

    def _check(self, log_mean: float, num: int, epsilon: float) -> None:
        # Points at infinity have weight zero: only where all are does the mean show it.
        if not math.isfinite(log_mean):
            raise ValueError("the weight met points that are not finite: check the data, the source and their scale")
        if self.normalization == "raw" and log_mean + math.log(num) < math.log(torch.finfo(torch.float32).tiny):
            raise ValueError(
                f"all raw weights of the batch underflow (mean exp({log_mean:.4g}) at epsilon = {epsilon:.4g}):"
                " use normalization: running, or a larger epsilon"
            )

    def _update(self, log_mean: Tensor | float) -> None:
        self._num_updates += 1
        # (1 - decay) / (1 - decay^n): the step that keeps the average bias-corrected at every n.
        rate = (self.decay - 1) / math.expm1(self._num_updates * math.log(self.decay))
        self.num_updates.fill_(self._num_updates)
        if isinstance(log_mean, float):
            running = self.running_log_mean.item()
            self.running_log_mean.fill_(running + rate * (log_mean - running))
        else:
            self.running_log_mean.lerp_(log_mean.to(self.running_log_mean.dtype), rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GibbsWeight:
        """Move with the module; the running mean stays in float32 at least, where steps of one per cent count."""
        super()._apply(fn, recurse)
        self.running_log_mean = self.running_log_mean.to(torch.promote_types(self.running_log_mean.dtype, torch.float))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._num_updates = int(self.num_updates)

    @torch.no_grad()
    def _diagnostics(self, a: Tensor, b: Tensor, cost: Tensor, log_weight: Tensor, epsilon: float) -> dict[str, Tensor]:
        share = log_weight.softmax(0)
        ess = effective_share(log_weight)
        self._warn(ess.item(), epsilon)
        tilt_source, tilt_target = tilts(self.log_weight_matrix(a[:TILT_POINTS], b[:TILT_POINTS]))
        return {
            "ess": ess,
            "max_share": share.max(),
            "weighted_cost": (share * cost).sum(),
            "unweighted_cost": cost.mean(),
            "tilt_source": tilt_source,
            "tilt_target": tilt_target,
        }

    def _warn(self, ess: float, epsilon: float) -> None:
        if self._has_warned or ess >= LEAST_ESS or rank() > 0:
            return
        self._has_warned = True
        warnings.warn(
            f"the Gibbs weight keeps an effective sample of ESS/B = {ess:.3f} < {LEAST_ESS} at epsilon = {epsilon:.4g}"
            f" (correction: {self.correction}): raise epsilon or kappa, or train on larger batches",
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        temperature = f"kappa={self.kappa:g}" if self.kappa is not None else f"epsilon={self.temperature!r}"
        options = f"{temperature}, cost={self.cost!r}, normalization={self.normalization!r}, decay={self.decay:g}"
        return options if self.correction == "none" else f"{options}, correction={self.correction!r}"


def _check_temperature(name: str, value: object) -> None:
    if value is None or isinstance(value, EpsilonRule):
        return
    if isinstance(value, str):
        raise ValueError(f'{name} must be a number, "elbow" or an EpsilonRule, got {value!r}')
    check_scale(name, value, hint="use UniformWeight for no weight")


def _check_samples(source_points: Tensor, data_points: Tensor) -> None:
    if source_points.shape[1:] != data_points.shape[1:] or not len(source_points) or not len(data_points):
        raise ValueError(
            f"a weight is fitted on non-empty samples of points of one shape, got {tuple(source_points.shape)}"
            f" and {tuple(data_points.shape)}"
        )
    if not (source_points.isfinite().all() and data_points.isfinite().all()):
        raise ValueError("a weight is fitted on points that are not finite: check the source and the data")
