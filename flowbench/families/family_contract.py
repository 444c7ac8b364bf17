"""What every family promises, as checks that can be run on any of them, one of somebody's own included.

Each check takes a :class:`Case` and raises :class:`Violation` with one line: what is wrong, the number that was found,
and what to do. They are run with weights none of which is zero, because output layers that start at zero hide mistakes.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.data import Batch, DataSpec
from flowbench.families.base import FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.training.module import Loss

__all__ = ["CHECKS", "Case", "Inapplicable", "Outcome", "Violation", "check_family", "perturb"]

# In single precision, and for solvers of a few steps.
_CLOSE, _SOLVED, _BY_SOLVER = 1e-4, 5e-3, 0.05
_SEEDS = 8
_MOST_DIMS = 64
# The finer grid holds the coarser one, and is looked at only where that is not enough.
_POINTS_A_SIDE = (81, 161)


class Violation(AssertionError):
    """A promise that a family does not keep, in one line."""


class Inapplicable(Exception):
    """Why a check does not apply to a family."""


@dataclass(frozen=True)
class Case:
    """A family to check.

    Attributes:
        build: makes a new module, with the same weights each time.
        spec: of the data that it models.
        conditional: the module takes labels.
    """

    build: Callable[[], FlowModule]
    spec: DataSpec
    conditional: bool = False

    def batch(self, size: int = 6, seed: int = 0) -> Batch:
        """Points within the range of images, with labels in turns, pair by pair, where the data have labels."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.rand(size, *self.spec.shape, generator=rng) * 1.8 - 0.9
        # In pairs of one class: what is trained on sequences sees two images each, everything else sees a batch.
        pairs = 1 if size % 2 else 2
        label = torch.arange(size) // pairs % self.spec.num_classes if self.spec.num_classes else None
        return Batch(x, label=label, index=torch.arange(size), group_size=pairs if self.spec.num_classes else 1)

    def label(self, size: int) -> Tensor | None:
        """Labels in turns; None for an unconditional flow."""
        return torch.arange(size) % (self.spec.num_classes or 1) if self.conditional else None


@dataclass(frozen=True)
class Outcome:
    """The end of one check.

    Attributes:
        name: of the check.
        status: `ok`, `failed` or `inapplicable`.
        reason: one line; empty where it passed.
    """

    name: str
    status: str
    reason: str = ""


def perturb(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Move every parameter by noise of this standard deviation."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=rng).to(parameter))


def check_family(case: Case) -> Iterator[Outcome]:
    """Run every check; one that fails, in whatever way, costs no other."""
    for name, check in CHECKS.items():
        try:
            check(case)
        except Inapplicable as reason:
            yield Outcome(name, "inapplicable", str(reason))
        except Violation as fault:
            yield Outcome(name, "failed", str(fault))
        except Exception as error:
            yield Outcome(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            yield Outcome(name, "ok")


def _loss(module: FlowModule, batch: Batch, seed: int = 0) -> Loss:
    return module.training_loss(batch, torch.Generator().manual_seed(seed))


def _demand(holds: bool, line: str) -> None:
    if not holds:
        raise Violation(line)


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the size of what is expected, at least 1."""
    found, expected = found.detach(), expected.detach()
    if not bool(found.isfinite().all()):
        return math.inf
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


def _with_density(case: Case) -> FlowModule:
    """The module in evaluation mode.

    Raises:
        Inapplicable: for a flow that refuses to have a density, whose map need not be invertible either.
    """
    module = case.build().eval()
    if reason := _refusal(module):
        raise Inapplicable(reason)
    return module


def _refusal(module: FlowModule) -> str:
    """Why a flow refuses to have a density, and with it an inverse; empty where it has one."""
    try:
        module.check_density()
    except ValueError as reason:
        return str(reason)
    return ""


def gradients(case: Case) -> None:
    """The loss is finite, and its gradient reaches every parameter."""
    module = case.build()
    # Enough samples that some labels are dropped and some of every class are kept.
    loss = _loss(module, case.batch(64)).total
    _demand(bool(loss.isfinite()), f"the training loss is {loss.item()}: it must be finite for points in [-1, 1]")
    loss.backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            _demand(reached, f"no gradient reaches {name}: use it in the loss, or set requires_grad=False")


def deterministic_loss(case: Case) -> None:
    """The loss is a function of batch and generator alone."""
    module, batch = case.build().eval(), case.batch()
    first = _loss(module, batch, 1).total
    torch.manual_seed(99)
    again = _loss(module, batch, 1).total
    line = f"two calls with equal generators give {first.item()} and {again.item()}: draw from the generator given"
    _demand(torch.equal(first, again), line)


def training_step(case: Case) -> None:
    """One step of the optimiser moves every parameter."""
    module = case.build()
    before = {name: value.clone() for name, value in module.named_parameters() if value.requires_grad}
    optimizer = module.optimizer_config.build(module)
    _loss(module, case.batch(32)).total.backward()
    optimizer.step()
    for name, parameter in module.named_parameters():
        if name in before:
            _demand(not torch.equal(before[name], parameter), f"a step of the optimiser leaves {name} as it was")


def samples(case: Case) -> None:
    """Samples have the data's shape, are finite and state their network evaluations."""
    module = case.build().eval()
    found = module.sample(module.draw_noise(torch.arange(3), 0), case.label(3))
    expected = (3, *case.spec.shape)
    _demand(tuple(found.x.shape) == expected, f"samples have shape {tuple(found.x.shape)}, the data {expected}")
    _demand(bool(found.x.isfinite().all()), "samples of three noise vectors hold NaN or infinity")
    evaluations = found.network_evaluations
    _demand(evaluations >= 1, f"flow_sample states {evaluations} network evaluations per sample, not 1 or more")


def sample_of_a_batch(case: Case) -> None:
    """A sample does not depend on the batch that it is drawn in."""
    module, label = case.build().eval(), case.label(5)
    noise = module.draw_noise(torch.arange(5), 0)
    alone = module.sample(noise[2:3], None if label is None else label[2:3]).x
    off = _distance(module.sample(noise, label).x[2:3], alone)
    _demand(off < _CLOSE, f"a sample among five differs from itself alone by {off:.1e}: use no batch statistics")


def noise_by_index(case: Case) -> None:
    """Noise is keyed by the sample's index and the seed."""
    module = case.build()
    whole = module.draw_noise(torch.arange(6), 3)
    part, other = module.draw_noise(torch.tensor([4, 5]), 3), module.draw_noise(torch.arange(6), 4)
    _demand(torch.equal(whole[4:], part), "the noise of samples 4 and 5 depends on which others are drawn with them")
    _demand(not torch.equal(whole, other), "two evaluation seeds give the same noise")


def density(case: Case) -> None:
    """The log-density is one finite number per point, the same at every call and in every batch."""
    module, batch, label = _with_density(case), case.batch(), case.label(6)
    value = module.log_prob(batch.x, label, index=batch.index)
    _demand(bool(value.isfinite().all()), "log_prob of points in [-1, 1] holds NaN or infinity")
    again = module.log_prob(batch.x, label, index=batch.index)
    _demand(torch.equal(value, again), "two calls of log_prob with one seed differ: key draws by index and seed")
    assert batch.index is not None
    part = module.log_prob(batch.x[3:], None if label is None else label[3:], index=batch.index[3:])
    off = _distance(value[3:], part)
    _demand(off < _CLOSE, f"log_prob of three points differs by {off:.1e} among six: use no batch statistics")


def inverse(case: Case) -> None:
    """Encoding undoes decoding."""
    module, label = _with_density(case), case.label(3)
    noise = module.draw_noise(torch.arange(3), 0)
    z = module.flow_decode(noise, Condition(label)).x
    off = _distance(module.flow_encode(z, Condition(label)), noise)
    _demand(off < _SOLVED, f"flow_encode(flow_sample(noise)) differs from the noise by {off:.1e}")


def path(case: Case) -> None:
    """A trajectory runs from the noise to the flow's data end."""
    module, label = case.build().eval(), case.label(3)
    noise = module.draw_noise(torch.arange(3), 0)
    found = module.trajectory(noise, Condition(label), 65)
    shape, first, last = tuple(found.states.shape), float(found.times[0]), float(found.times[-1])
    _demand(shape[1:] == (3, *module.flow_shape), f"states have shape {shape}, not (T, 3, {module.flow_shape})")
    _demand(max(abs(first), abs(last - 1)) < _SOLVED, f"times run from {first} to {last}, not from 0 to 1")
    off = _distance(module.trajectory(noise, label, 65).states, found.states)
    _demand(off == 0, f"a Condition and its labels alone give paths that differ by {off:.1e}: use check_condition")
    off = _distance(found.states[0], noise)
    _demand(off == 0, f"the first state differs from the noise by {off:.1e}")
    off = _distance(found.states[-1], module.flow_decode(noise, Condition(label)).x)
    _demand(off < _SOLVED, f"the last state differs from the decoded noise by {off:.1e}")


def jacobian(case: Case) -> None:
    """The log-density is that of the source at the encoded point plus the log-determinant of the encoder's Jacobian."""
    module = _with_density(case)
    dims = math.prod(module.flow_shape)
    if module.describe().likelihood == "bound":
        raise Inapplicable("it lives in latents, where log_prob is a bound")
    if dims > _MOST_DIMS:
        raise Inapplicable(f"a Jacobian of {dims} dimensions takes too long")
    x, label, index = case.batch(3).x, case.label(3), torch.arange(3)
    given = Condition(label)
    with module.full_precision():
        expected = _by_autograd(module, x, label)
        # Probes of a trace are keyed by the seed: their mean is compared, within four standard errors.
        draws = [module.flow_log_prob(x, given, index, seed).detach() for seed in range(2)]
        if not torch.equal(*draws):
            draws += [module.flow_log_prob(x, given, index, seed).detach() for seed in range(2, _SEEDS)]
    drawn = torch.stack(draws)
    found, spread = drawn.mean(0), 4 * float(drawn.std(0).max()) / math.sqrt(len(drawn))
    off = float((found - expected).abs().max())
    allowed = (_SOLVED if module.density == "exact" else _BY_SOLVER) * math.sqrt(dims) + spread
    _demand(
        off < allowed, f"flow_log_prob is off by {off:.1e} nats from the Jacobian of flow_encode, at most {allowed:.0e}"
    )


def _by_autograd(module: FlowModule, x: Tensor, label: Tensor | None) -> Tensor:
    """Log-densities of points (B, ...) by the Jacobian of the encoder, shape (B,)."""
    dims = x[0].numel()
    # One copy of a point for each of its dimensions: one backward pass gives every row of every Jacobian.
    copies = x.repeat_interleave(dims, 0).requires_grad_()
    z = module.flow_encode(copies, Condition(None if label is None else label.repeat_interleave(dims)))
    rows = None
    if z.requires_grad:
        own = z.reshape(len(x), dims, dims).diagonal(dim1=1, dim2=2)
        (rows,) = torch.autograd.grad(own.sum(), copies, allow_unused=True)
    if rows is None or not bool(rows.any()):
        raise Violation("flow_encode has no gradient: leave torch.no_grad to those who call it")
    log_determinant = torch.linalg.slogdet(rows.reshape(len(x), dims, dims).double()).logabsdet
    return (module.source.log_prob(z[::dims]) + log_determinant).detach()


def mass(case: Case) -> None:
    """The density of points in the plane integrates to one."""
    module = _with_density(case)
    if tuple(module.flow_shape) != (2,) or module.describe().likelihood == "bound":
        raise Inapplicable("only densities in the plane are integrated")

    def first_class(size: int) -> Condition:
        return Condition(torch.zeros(size, dtype=torch.int64) if case.conditional else None)

    with torch.no_grad(), module.full_precision():
        drawn = module.flow_decode(module.draw_noise(torch.arange(256), 0), first_class(256)).x
        reach = float((drawn - drawn.mean(0)).abs().max()) * 2 + 1
        allowed = 0.02 if module.density == "exact" else 0.1
        for points_a_side in _POINTS_A_SIDE:
            side = torch.linspace(-reach, reach, points_a_side, dtype=drawn.dtype)
            points = torch.cartesian_prod(side, side) + drawn.mean(0)
            parts = [(part, first_class(len(part)), torch.arange(len(part))) for part in points.split(4096)]
            log_prob = torch.cat([module.flow_log_prob(*part, 0) for part in parts])
            total = float(log_prob.double().exp().sum() * (side[1] - side[0]) ** 2)
            if abs(total - 1) < allowed:
                return
    raise Violation(f"the density integrates to {total:.3f}: log_prob lacks a factor or a determinant")


def checkpoint(case: Case) -> None:
    """A module that is saved and loaded gives the same densities and samples."""
    module, other = case.build(), case.build().eval()
    perturb(other, seed=5)
    _loss(module.train(), case.batch(32))  # whatever keeps statistics has others now
    module.eval()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    noise = module.draw_noise(torch.arange(2), 0)
    same = torch.equal(module.sample(noise, case.label(2)).x, other.sample(noise, case.label(2)).x)
    _demand(same, "samples change by saving and loading: register what they depend on as parameters or buffers")
    if _refusal(module):
        return
    batch, label = case.batch(), case.label(6)
    same = torch.equal(module.log_prob(batch.x, label), other.log_prob(batch.x, label))
    _demand(same, "the density changes by saving and loading: register what it depends on as parameters or buffers")


def precision(case: Case) -> None:
    """Log-densities do not change under autocast."""
    module, x, label = _with_density(case), case.batch().x, case.label(6)
    exact = module.log_prob(x, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = torch.equal(module.log_prob(x, label), exact)
    _demand(same, "log_prob changes under autocast: compute it in full precision")


def copies(case: Case) -> None:
    """A deep copy is a module of its own."""
    module = case.build()
    other = copy.deepcopy(module)
    perturb(other)
    first = next(iter(module.parameters()), None)
    _demand(first is None or not torch.equal(first, next(other.parameters())), "a deep copy shares its parameters")


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        gradients,
        deterministic_loss,
        training_step,
        samples,
        sample_of_a_batch,
        noise_by_index,
        density,
        jacobian,
        mass,
        inverse,
        path,
        checkpoint,
        precision,
        copies,
    )
}
"""By the name under which ``flowbench check`` reports them."""
