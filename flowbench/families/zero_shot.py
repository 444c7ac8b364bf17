"""What a flow does without being trained for it: reconstruct, edit, interpolate, inpaint, classify.

Nothing is guided by default, and nothing is denoised but the last step of :func:`inpaint`: with the
noise in hand, :meth:`FlowModule.flow_decode` undoes :meth:`FlowModule.flow_encode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.core.seeds import indexed_normal
from flowbench.families.base import FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.families.latents.space import LatentSpace
from flowbench.flows import GaussianSource
from flowbench.metrics import psnr

__all__ = [
    "ClassPosterior",
    "Edit",
    "Inpainting",
    "Interpolation",
    "Reconstruction",
    "classify",
    "clopper_pearson",
    "edit",
    "inpaint",
    "interpolate",
    "reconstruct",
    "require_classes",
    "slerp",
]

# Below this sine the two directions are taken as one: the great circle between them is not worth its rounding.
PARALLEL = 1e-6


@dataclass(frozen=True)
class Reconstruction:
    """Data carried to noise and back.

    Attributes:
        x: the way back, in model space, shape (B, *D).
        noise: the noise in between, shape (B, *flow_shape).
        flow_error: largest |difference| in the flow's space, its units (pixels or scaled latents), shape (B,): the
            inverse's error alone.
        data_error: largest |difference| to the data in model units, the autoencoder's loss included, shape (B,).
        autoencoder_psnr: of the autoencoder alone, in dB for the range [-1, 1], shape (B,); None without one.
        network_evaluations: per sample, both ways; None where an adaptive solver decides.
    """

    x: Tensor
    noise: Tensor
    flow_error: Tensor
    data_error: Tensor
    autoencoder_psnr: Tensor | None
    network_evaluations: float | None


@dataclass(frozen=True)
class Edit:
    """Data decoded under other classes.

    Attributes:
        x: shape (B, K, *D), one version per target class.
        noise: what all versions share, shape (B, *flow_shape).
        network_evaluations: per sample and version, the shared encoding included once; None as above.
    """

    x: Tensor
    noise: Tensor
    network_evaluations: float | None


@dataclass(frozen=True)
class Interpolation:
    """Ways between pairs of data, through the noise.

    Attributes:
        x: shape (B, T, *D); the ends are the reconstructed pair.
        noise: shape (B, T, *flow_shape).
        network_evaluations: per state, the two encodings shared out over its T states; None as above.
    """

    x: Tensor
    noise: Tensor
    network_evaluations: float | None


@dataclass(frozen=True)
class Inpainting:
    """Data with its masked part drawn anew.

    Attributes:
        x: known values untouched, shape (B, *D).
        drift: root mean square by which the kept round moved the known values before they were put back, in the units
            of the flow's space, shape (B,): 0 where the rounds are exact, larger the cruder they are, infinite where no
            round gave a finite point.
        network_evaluations: per sample over all rounds, without the denoiser; None as above.
    """

    x: Tensor
    drift: Tensor
    network_evaluations: float | None


@dataclass(frozen=True)
class ClassPosterior:
    """Classes by Bayes' rule.

    Attributes:
        log_prob: log p(x | class) or its lower bound in nats, float64, shape (B, K).
        log_posterior: log p(class | x) in nats, float64, shape (B, K).
        network_evaluations: per sample, all classes; None as above.
    """

    log_prob: Tensor
    log_posterior: Tensor
    network_evaluations: float | None

    @property
    def predicted(self) -> Tensor:
        """The most probable class, shape (B,)."""
        return self.log_posterior.argmax(1)


def require_classes(module: FlowModule, task: str) -> int:
    """The number of classes of a conditional flow.

    Raises:
        ValueError: for an unconditional one.
    """
    if module.num_classes is None:
        raise ValueError(f"{task} needs a flow that knows classes, this one is unconditional: train conditional=true")
    return module.num_classes


# ---- there and back -----------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(module: FlowModule, x: Tensor, label: Tensor | None = None) -> Reconstruction:
    """Encode and decode.

    Args:
        module: any flow.
        x: data in model space, shape (B, *D).
        label: classes, shape (B,), or None.
    """
    noise = module.encode(x, label)
    with module.full_precision():
        points = module.space.encode_mean(x)
        back = module.flow_decode(noise, Condition(label))
        decoded = module.space.decode(back.x)
        ratio = psnr(x, module.space.decode(points)) if isinstance(module.space, LatentSpace) else None
    total = _plus(module.describe().encoding_evaluations, back.network_evaluations)
    return Reconstruction(decoded, noise, _largest(back.x - points), _largest(decoded - x), ratio, total)


@torch.no_grad()
def edit(module: FlowModule, x: Tensor, label: Tensor | None, targets: Tensor, guidance: float = 1.0) -> Edit:
    """Encode under one class, decode under others; what the noise holds beside the class, style say, stays.

    Pixels may have been edited before: the flow carries any point to noise.

    Args:
        module: a conditional flow.
        x: data in model space, shape (B, *D).
        label: classes of the data, shape (B,); None encodes without a class.
        targets: classes to decode, shape (K,).
        guidance: scale of classifier-free guidance of the decoding; at 1 the own class gives the data back.

    Raises:
        ValueError: for an unconditional flow, no target, or guidance that it was not trained for.
    """
    require_classes(module, "edit")
    check_number("guidance", guidance, at_least=0, hint="1 is none")
    module.check_guidance(guidance)
    if not len(targets):
        raise ValueError("edit decodes under one class at least, got none: name targets")
    noise = module.encode(x, label)
    versions, cost = [], 0.0
    for target in targets.to(x.device):
        condition = module.check_condition(target.expand(len(x)), len(x))
        with module.full_precision():
            drawn = module.flow_decode(noise, condition, guidance)
            versions.append(module.space.decode(drawn.x))
        cost = drawn.network_evaluations
    encoding = module.describe().encoding_evaluations
    shared = None if encoding is None else encoding / len(targets)
    return Edit(torch.stack(versions, 1), noise, _plus(shared, cost))


# ---- interpolation ------------------------------------------------------------------------------------


def slerp(first: Tensor, second: Tensor, fractions: Tensor) -> Tensor:
    """Great circles: directions turn at constant speed, norms change linearly (slerp; Shoemake, 1985).

    The straight line between two independent normal points is too short in the middle by a factor of sqrt(2): points
    there are no typical noise. On the circle the norms stay between those of the ends.

    Args:
        first: points at fraction 0, shape (B, *D).
        second: points at fraction 1, shape (B, *D).
        fractions: shape (T,), in [0, 1].

    Returns:
        Shape (B, T, *D).

    Raises:
        ValueError: for opposite points, which many great circles join.
    """
    a, b = first.flatten(1).double(), second.flatten(1).double()
    norm_a, norm_b = a.norm(dim=1), b.norm(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    unit_a, unit_b = a / norm_a.clamp(min=tiny)[:, None], b / norm_b.clamp(min=tiny)[:, None]
    # The angle from chords keeps its digits near 0 and pi, where the arc cosine loses them.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))
    sine = angle.sin()
    same = sine < PARALLEL
    if bool((same & (angle > 1)).any()):
        raise ValueError("the noise of one pair lies in opposite directions, no single great circle joins it: drop it")
    t = fractions.to(a)[None, :]
    theta, divisor = angle[:, None], torch.where(same, 1.0, sine)[:, None]
    weight_a = torch.where(same[:, None], 1 - t, ((1 - t) * theta).sin() / divisor)
    weight_b = torch.where(same[:, None], t.expand_as(weight_a), (t * theta).sin() / divisor)
    direction = weight_a[..., None] * unit_a[:, None] + weight_b[..., None] * unit_b[:, None]
    norm = (1 - t) * norm_a[:, None] + t * norm_b[:, None]
    return (norm[..., None] * direction).to(first).unflatten(2, first.shape[1:])


@torch.no_grad()
def interpolate(module: FlowModule, first: Tensor, second: Tensor, steps: int) -> Interpolation:
    """Encode pairs, walk the great circle between their noise, decode every state.

    A conditional flow uses its null label throughout, since the ends may be of two classes.

    Args:
        module: a flow from Gaussian noise.
        first: data in model space, shape (B, *D).
        second: data in model space, shape (B, *D).
        steps: T >= 2 states, the ends included.

    Raises:
        ValueError: for fewer steps, a source that is not Gaussian, or a conditional flow without a trained null label.
    """
    check_count("steps", steps, at_least=2, hint="interpolation has its two ends at least")
    if not isinstance(module.source, GaussianSource):
        raise ValueError(f"great circles suit Gaussian noise, but this flow starts from {module.source!r}")
    if module.num_classes is not None and module.label_dropout == 0.0:
        raise ValueError("interpolation between classes needs a trained null label: set label_dropout above 0")
    fractions = torch.linspace(0.0, 1.0, steps, dtype=torch.float64, device=first.device)
    noise = slerp(module.encode(first), module.encode(second), fractions)
    with module.full_precision():
        drawn = module.flow_decode(noise.flatten(0, 1), Condition())
        x = module.space.decode(drawn.x).unflatten(0, (len(first), steps))
    encoding = module.describe().encoding_evaluations
    shared = None if encoding is None else 2 * encoding / steps
    return Interpolation(x, noise, _plus(shared, drawn.network_evaluations))


# ---- inpainting ---------------------------------------------------------------------------------------


def _flow_mask(module: FlowModule, mask: Tensor) -> Tensor:
    """The mask over the flow's space: a latent is unknown as soon as one pixel of its cell is."""
    shape = module.flow_shape
    if mask.ndim == 1:
        return mask
    if mask.shape != torch.Size(shape[1:]):
        mask = F.adaptive_max_pool2d(mask.float()[None], shape[1:])[0] > 0
    return mask.expand(shape)


@torch.no_grad()
def inpaint(
    module: FlowModule,
    x: Tensor,
    mask: Tensor,
    label: Tensor | None = None,
    *,
    rounds: int = 8,
    seed: int = 0,
    index: Tensor | None = None,
) -> Inpainting:
    """Fill the unknown values in, without training (Gu et al., 2025, arXiv 2506.06276, inpainting).

    A round encodes the image, replaces the noise at the unknown positions by fresh noise, decodes and puts the known
    values back. The first image is completed by a sample of the flow, and of all rounds the one is kept, sample by
    sample, that moved the known values least: rounds can run away from the data, and then move them far.

    This is an approximation, not a draw from p(unknown | known): the noise at known positions is that of an image whose
    unknown part was another. It is exact, in every round, where all blocks of an autoregressive flow visit the tokens
    in one order and the unknown values are a suffix of it. In latent spaces the autoencoder's receptive field also
    carries the first completion into latents that count as known. A flow of noisy points is given known values with
    that noise, and its result is denoised once, at the end.

    Args:
        module: any flow.
        x: data in model space, shape (B, *D); its unknown values are never looked at.
        mask: True where unknown, shape (H, W), or (d,) for points.
        label: classes, shape (B,), or None.
        rounds: how many, >= 1.
        seed: keys the fresh noise.
        index: sample indices that key it too; 0..B-1 when None.

    Raises:
        ValueError: for rounds below 1.
    """
    check_count("rounds", rounds)
    index = torch.arange(len(x)) if index is None else index
    mask = mask.to(x.device)
    condition = module.check_condition(label, len(x))
    unknown = _flow_mask(module, mask)

    def fresh(*names: str | int) -> Tensor:
        return module.source.sample_indexed(index, module.flow_shape, seed, "inpaint", *names, device=x.device).to(x)

    with module.full_precision():
        start = module.flow_decode(fresh("start"), condition)
        points = start.x.where(start.x.isfinite(), 0.0)
        known = _noisy(module, module.space.encode_mean(torch.where(mask, module.space.decode(points), x)), index, seed)
        best, least = points, torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        points, total = torch.where(unknown, points, known), _plus(0.0, start.network_evaluations)
        for count in range(rounds):
            points, drift, cost = _refill(module, points, known, unknown, fresh(count), condition)
            better = _moves_less(drift, least)
            best, least = torch.where(_rows(better, points), points, best), torch.where(better, drift, least)
            points = torch.where(_rows(drift.isinf(), points), torch.where(unknown, best, known), points)
            total = _plus(total, cost)
        filled = torch.where(mask, module.space.decode(module.flow_denoise(best, condition)), x)
    return Inpainting(filled, least, total)


def _refill(
    module: FlowModule, points: Tensor, known: Tensor, unknown: Tensor, fresh: Tensor, condition: Condition
) -> tuple[Tensor, Tensor, float | None]:
    """One round in the flow's space: the points with other unknown values, the drift of the known ones, the cost."""
    noise = torch.where(unknown, fresh, module.flow_encode(points, condition))
    drawn = module.flow_decode(noise, condition)
    total = _plus(module.describe().encoding_evaluations, drawn.network_evaluations)
    return torch.where(unknown, drawn.x, known), _drift(drawn.x, known, unknown), total


def _noisy(module: FlowModule, points: Tensor, index: Tensor, seed: int) -> Tensor:
    """With the spread of training: a flow of noisy points never saw clean ones, and drawn and known would differ."""
    if not module.space.spread:
        return points
    normal = indexed_normal(index, module.flow_shape, seed, "inpaint-noise", device=points.device)
    return points + module.space.spread * normal.to(points)


def _drift(drawn: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
    """Root mean square of what moved at known positions, shape (B,); infinite where the point is not finite."""
    finite = drawn.flatten(1).isfinite().all(1)
    square = (drawn - known).square().masked_fill(unknown, 0.0).flatten(1).sum(1) / (~unknown).sum().clamp(min=1)
    return torch.where(finite, square.sqrt(), torch.inf)


def _moves_less(drift: Tensor, least: Tensor) -> Tensor:
    """Where a round is better than the best so far, shape (B,).

    Among drifts of rounding size the newest is as good: exact rounds are independent draws.
    """
    return drift.isfinite() & (drift <= least.clamp(min=100 * torch.finfo(least.dtype).eps))


def _rows(chosen: Tensor, points: Tensor) -> Tensor:
    """A flag per sample (B,), broadcast over its values."""
    return chosen.view(-1, *[1] * (points.ndim - 1))


# ---- classes ------------------------------------------------------------------------------------------


@torch.no_grad()
def classify(
    module: FlowModule, x: Tensor, log_prior: Tensor, *, index: Tensor | None = None, seed: int = 0
) -> ClassPosterior:
    """p(class | x) in proportion to p(x | class) p(class).

    All classes see the same posterior draw and the same probes, keyed by `index`, so that their noise cancels in the
    comparison. Through an autoencoder p(x | class) is a lower bound, and the posterior that of the bounds.

    Args:
        module: a conditional flow of K classes.
        x: data in model space, shape (B, *D).
        log_prior: log p(class), shape (K,).
        index: sample indices that key draws and probes; 0..B-1 when None.
        seed: the evaluation seed.

    Raises:
        ValueError: for an unconditional flow, or a prior over another number of classes.
    """
    classes = require_classes(module, "classify")
    if log_prior.shape != (classes,):
        raise ValueError(f"the prior must name {classes} classes, got shape {tuple(log_prior.shape)}")
    columns = [
        module.log_prob(x, torch.full((len(x),), k, device=x.device), index=index, seed=seed).double()
        for k in range(classes)
    ]
    log_prob = torch.stack(columns, 1)
    log_posterior = (log_prob + log_prior.to(log_prob)).log_softmax(1)
    per_class = module.describe().likelihood_evaluations
    return ClassPosterior(log_prob, log_posterior, None if per_class is None else classes * per_class)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a proportion (Clopper and Pearson, 1934, doi 10.1093/biomet/26.4.404).

    Args:
        successes: 0..trials.
        trials: independent trials, >= 1.
        level: coverage, at least this much, in (0, 1).

    Raises:
        ValueError: for a number out of range.
    """
    check_count("trials", trials)
    check_count("successes", successes, at_least=0, at_most=trials)
    check_number("level", level, above=0, below=1)
    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


# ---- small parts --------------------------------------------------------------------------------------


def _largest(difference: Tensor) -> Tensor:
    return difference.flatten(1).abs().amax(1)


def _plus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
