"""Autoregressive flows: densities against autograd and quadrature, inverses against brute force, guidance.

All networks have non-zero output weights unless the test is about initialisation: zero weights hide bugs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowbench.flows import AffineBlock, AutoregressiveFlow, AutoregressiveGuidance, Bijector, Permutation, alternating
from flowbench.flows.autoregressive.patch import patchify, unpatchify
from flowbench.networks.causal_transformer import CausalTransformer

from .autoregressive_builders import make_flow, make_network, naive_inverse, normal

SCALES = ["exp", "softplus"]
STARTS = ["learned", "zero"]
CLIPS = [None, 4.0]


class Syncs(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# Density


@settings(max_examples=20, deadline=None)
@given(
    num_blocks=st.integers(1, 3),
    last=st.sampled_from(get_args(Permutation)),
    scale=st.sampled_from(SCALES),
    soft_clip=st.sampled_from(CLIPS),
    start=st.sampled_from(STARTS),
    position=st.sampled_from([("rope", None), ("rope", (2, 3)), ("learned", None)]),
    seed=st.integers(0, 100),
)
def test_round_trip_and_log_determinant(num_blocks, last, scale, soft_clip, start, position, seed):
    flow = make_flow(
        num_blocks, seed, scale, soft_clip, last, (2, 3), start=start, position=position[0], grid=position[1]
    )
    x, label = normal(2, 6, 2, seed=seed), torch.tensor([1, 3])
    z, logdet = flow(x, label)
    assert (z - x).abs().max() > 1e-2
    torch.testing.assert_close(flow.inverse(z, label), x, rtol=0, atol=1e-10)
    # Nothing bounds an unclipped scale: what the flow never encodes may decode to 1e73.
    noise = x if soft_clip is not None else z
    torch.testing.assert_close(flow(flow.inverse(noise, label), label)[0], noise, rtol=0, atol=1e-10)
    for row in range(2):
        one = x[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, row=row: flow(v, label[row : row + 1])[0], one)
        sign, expected = torch.linalg.slogdet(jacobian.reshape(12, 12))
        assert sign == 1
        torch.testing.assert_close(logdet[row], expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "start"), list(itertools.product([1, 2], STARTS)))
def test_short_sequences(num_tokens, start):
    flow = make_flow(2, num_tokens=num_tokens, token_dim=3, start=start)
    x = normal(4, num_tokens, 3)
    z, logdet = flow(x)
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-12)
    if num_tokens == 1 and start == "zero":  # no token is transformed
        assert z.equal(x)
        assert logdet.eq(0).all()
    else:
        assert (logdet != 0).all()


@pytest.mark.parametrize(("order", "scale"), list(itertools.product(["identity", "flip"], SCALES)))
def test_block_jacobian_is_triangular_in_its_order_and_diagonal_in_a_token(order, scale):
    torch.manual_seed(0)
    block = AffineBlock(make_network(), order, scale)
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v)[0][0], normal(1, 6, 2))[:, :, 0]
    if order == "flip":
        jacobian = jacobian.flip(0, 2)
    for i, j in itertools.product(range(6), range(6)):
        part = jacobian[i, :, j]
        if i < j:
            assert part.eq(0).all()
        elif i == j:
            assert part.diagonal().gt(0).all()
            assert part.fliplr().diagonal().eq(0).all()
        else:
            assert part.ne(0).all()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("label", [None, 0, 1])
def test_density_integrates_to_one(start, scale, label):
    shape = {"num_tokens": 2, "token_dim": 1, "num_classes": 2, "depth": 1}
    flow = make_flow(2, seed=3, scale=scale, **shape, start=start, std=0.1, final_norm=True)
    axis = torch.linspace(-15, 15, 151, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)[:, :, None]
    with torch.no_grad():
        z, logdet = flow(x, None if label is None else torch.full((len(x),), label))
    density = (torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) + logdet).exp()
    assert logdet.std() > 0.05
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


def test_bookkeeping_of_means_and_sums():
    """Nats per dimension and the summed log-density are the same number."""
    flow, x = make_flow(2), normal(3, 6, 2)
    z, logdet = flow(x)
    log_prob = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) + logdet
    loss = 0.5 * z.square().mean() - (logdet / 12).mean()
    torch.testing.assert_close(-log_prob.mean(), 12 * (loss + 0.5 * math.log(2 * math.pi)))


def test_quantised_uniform_data_costs_eight_bits_under_a_unit_density():
    """L / ln 2 + 8.32575 is the bits/dim of 256 levels in [-1, 1)."""
    flow = AutoregressiveFlow([AffineBlock(CausalTransformer(6, 2, width=16, head_dim=8))])
    z, logdet = flow(torch.zeros(1, 6, 2))
    loss = (0.5 * z.square().mean() - logdet.mean() / 12).item()
    by_hand = -math.log2(1 / math.sqrt(2 * math.pi) * 2 / 256)
    assert loss / math.log(2) + 8.32575 == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(("scale", "start"), list(itertools.product(SCALES, STARTS)))
@pytest.mark.parametrize("soft_clip", CLIPS)
def test_identity_at_initialisation(scale, start, soft_clip):
    flow = AutoregressiveFlow(
        AffineBlock(CausalTransformer(6, 2, 3, width=16, head_dim=8, start=start), order, scale, soft_clip)
        for order in alternating(3, last="flip")
    )
    x = normal(2, 6, 2, dtype=torch.float32)
    for label in (None, torch.tensor([0, 3])):
        z, logdet = flow(x, label)
        torch.testing.assert_close(z, x, rtol=0 if scale == "exp" else 1e-6, atol=0)
        torch.testing.assert_close(logdet, torch.zeros(2), rtol=0, atol=0 if scale == "exp" else 1e-5)
        torch.testing.assert_close(0.5 * z.square().mean(), 0.5 * x.square().mean())


@pytest.mark.parametrize("scale", SCALES)
def test_extreme_inputs_stay_finite(scale):
    flow = make_flow(3, scale=scale, soft_clip=4.0).float()
    for x in (torch.zeros(2, 6, 2), torch.ones(2, 6, 2), -torch.ones(2, 6, 2), 10 * normal(2, 6, 2).float()):
        z, logdet = flow(x)
        assert z.isfinite().all()
        assert logdet.isfinite().all()
        torch.testing.assert_close(flow.inverse(z), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_soft_clip_bounds_mean_and_scale(scale):
    torch.manual_seed(0)
    block = AffineBlock(make_network(std=100.0), scale=scale, soft_clip=4.0)
    mean = block.inverse(torch.zeros(8, 6, 2, dtype=torch.float64))
    std = block.inverse(torch.ones(8, 6, 2, dtype=torch.float64))[:, 0] - mean[:, 0]
    assert mean.abs().max() <= 4
    low, high = (0.0183, 54.6) if scale == "exp" else (0.0309, 4.552)
    assert std.min() >= low
    assert std.max() <= high


# Inverse


@settings(max_examples=20, deadline=None)
@given(
    order=st.sampled_from(get_args(Permutation)),
    scale=st.sampled_from(SCALES),
    soft_clip=st.sampled_from(CLIPS),
    start=st.sampled_from(STARTS),
    position=st.sampled_from([("rope", None), ("rope", (3, 2)), ("learned", None)]),
    seed=st.integers(0, 100),
)
def test_cached_inverse_equals_the_naive_one(order, scale, soft_clip, start, position, seed):
    torch.manual_seed(seed)
    net = make_network(start=start, position=position[0], grid=position[1])
    block = AffineBlock(net, order, scale, soft_clip, (3, 2))
    z, label = normal(3, 6, 2, seed=seed), torch.tensor([2, 3, 0])
    before = z.clone()
    with torch.no_grad():
        expected = naive_inverse(block, z, label)
        actual = block.inverse(z, label)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
        low = block.float().inverse(z.float(), label)
    torch.testing.assert_close(low.double(), expected, rtol=1e-5, atol=1e-5)
    assert z.equal(before)


def test_inverse_is_independent_of_its_batch():
    flow, z, label = make_flow(2), normal(5, 6, 2), torch.tensor([0, 1, 2, 3, 0])
    together = flow.inverse(z, label)
    for row in range(5):
        alone = flow.inverse(z[row : row + 1], label[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


def test_an_exception_leaves_no_state(monkeypatch):
    flow, z = make_flow(2), normal(2, 6, 2)
    expected = flow.inverse(z)
    modules = {name: set(vars(module)) for name, module in flow.named_modules()}
    step = CausalTransformer.step

    def broken(self, previous, position, cache, label=None, **options):
        if position == 3:
            raise RuntimeError("interrupted")
        return step(self, previous, position, cache, label, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CausalTransformer, "step", broken)
        with pytest.raises(RuntimeError, match="interrupted"):
            flow.inverse(5 * z)
    assert {name: set(vars(module)) for name, module in flow.named_modules()} == modules
    assert flow.inverse(z).equal(expected)


def test_inverse_reads_no_value_on_the_host_and_builds_no_graph():
    flow, z = make_flow(2), normal(2, 6, 2).requires_grad_()
    with Syncs() as syncs:
        x = flow.inverse(z, torch.tensor([0, 1]), AutoregressiveGuidance(3.0))
    assert syncs.count == 0
    assert not x.requires_grad


@pytest.mark.parametrize("scale", SCALES)
def test_autocast_keeps_the_state_in_float32(scale):
    flow = make_flow(2, scale=scale, soft_clip=4.0).float()
    x = normal(2, 6, 2, dtype=torch.float32)
    reference, reference_logdet = flow(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = flow(x)
        back = flow.inverse(z)
    assert {z.dtype, logdet.dtype, back.dtype} == {torch.float32}
    torch.testing.assert_close(z, reference, rtol=0, atol=5e-2)
    torch.testing.assert_close(logdet, reference_logdet, rtol=0, atol=1e-1)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-2)
    assert flow(x.bfloat16())[0].dtype == torch.float32


def test_float32_round_trip():
    flow, x = make_flow(4).float(), normal(8, 6, 2, dtype=torch.float32)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [None, AutoregressiveGuidance(2.0), AutoregressiveGuidance(2.0, blocks="deep")])
def test_states_are_the_compositions_of_the_blocks(guidance):
    flow, x, label = make_flow(3), normal(2, 6, 2), torch.tensor([0, 2])
    states = flow.states(x, label)
    assert states.shape == (4, 2, 6, 2)
    assert states[0].equal(x)
    assert states[-1].equal(flow(x, label)[0])
    for index, block in enumerate(flow.blocks):
        assert states[index + 1].equal(block(states[index], label)[0])
    back = flow.inverse_states(states[-1], label, guidance)
    assert back.shape == (4, 2, 6, 2)
    assert back[0].equal(states[-1])
    assert back[-1].equal(flow.inverse(states[-1], label, guidance))
    if guidance is None:
        torch.testing.assert_close(back, states.flip(0), rtol=0, atol=1e-11)


# Training


@pytest.mark.parametrize(("scale", "start"), list(itertools.product(SCALES, STARTS)))
def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(scale, start):
    torch.manual_seed(0)
    flow = AutoregressiveFlow(
        AffineBlock(CausalTransformer(4, 1, 2, width=16, depth=1, head_dim=8, start=start), order, scale, 4.0)
        for order in alternating(2, last="identity")
    )
    label = torch.arange(128) % 2
    factor = normal(128, 1, 1, dtype=torch.float32)
    x = (2 * label - 1)[:, None, None] + factor + 0.3 * normal(128, 4, 1, seed=1, dtype=torch.float32)
    mixed = torch.where(torch.arange(128) < 16, 2, label)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    losses = []
    for _ in range(30):
        z, logdet = flow(x, mixed)
        loss = 0.5 * z.square().mean() - logdet.mean() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.5 * x.square().mean().item(), rel=1e-4)
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in flow.named_parameters() if p.equal(before[name])] == []


@pytest.mark.slow
def test_training_recovers_the_entropy_of_a_gaussian():
    torch.manual_seed(0)
    flow = AutoregressiveFlow(
        AffineBlock(CausalTransformer(2, 1, width=16, depth=1, head_dim=8), order, "softplus", 4.0)
        for order in alternating(2, last="identity")
    )
    truth = torch.distributions.MultivariateNormal(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    factor = truth.scale_tril.T
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    # With a decay it ends at 0.007 to 0.017 nats over five seeds; at a constant rate up to 0.04.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=300)

    def nll(num: int, seed: int) -> tuple[Tensor, Tensor]:
        x = truth.mean + normal(num, 2, seed=seed, dtype=torch.float32) @ factor
        z, logdet = flow(x[:, :, None])
        return -(torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) + logdet), -truth.log_prob(x)

    for step in range(300):
        optimizer.zero_grad()
        nll(256, step)[0].mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ours, theirs = nll(20_000, 1000)
    divergence = (ours - theirs).mean().item()  # Kullback-Leibler divergence, nats
    assert -0.005 < divergence < 0.03
    assert ours.mean().item() == pytest.approx(truth.entropy().item(), abs=0.05)


def test_state_dict_round_trip():
    flow, other, x = make_flow(2, seed=0), make_flow(2, seed=1), normal(2, 6, 2)
    assert not other(x)[0].equal(flow(x)[0])
    other.load_state_dict(flow.state_dict())
    assert other(x)[0].equal(flow(x)[0])


# Mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AffineBlock(make_network(), "random"),
            "permutation must be 'identity', 'flip', .*, got 'random'",
        ),
        (
            lambda: AffineBlock(make_network(), scale="linear"),
            "scale must be 'exp' or 'softplus', got 'linear'",
        ),
        (lambda: AffineBlock(make_network(), soft_clip=0.0), "soft_clip must be a number in"),
        (lambda: AutoregressiveFlow([]), "at least one block"),
        (
            lambda: AutoregressiveFlow([AffineBlock(make_network()), AffineBlock(make_network(num_tokens=4))]),
            "blocks must agree",
        ),
        (
            lambda: AutoregressiveFlow([AffineBlock(make_network()), AffineBlock(make_network(num_classes=4))]),
            "blocks must agree",
        ),
        (lambda: AutoregressiveGuidance(0.5), "guidance scale must be a number in"),
        (lambda: AutoregressiveGuidance(math.nan), "guidance scale must be a number in"),
        (lambda: AutoregressiveGuidance(2.0, blocks="top"), "must be 'all' or 'deep', got 'top'"),
        (lambda: AutoregressiveGuidance(2.0, "sum"), "rule must be one of product, log-scale, linear, got 'sum'"),
        (lambda: AutoregressiveGuidance(2.0, temperature=0.0), "temperature must be a number in"),
        (lambda: patchify(torch.zeros(1, 1, 4, 6), 4), "patch_size must divide the image size 4 x 6, got 4"),
        (lambda: unpatchify(torch.zeros(1, 3, 4), 2, (1, 4, 4)), "must be"),
    ],
)
def test_impossible_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_calls_are_named():
    flow, x, label = make_flow(2), normal(2, 6, 2), torch.tensor([0, 1])
    strong = AutoregressiveGuidance(2.0)
    for call in (flow, flow.inverse):
        with pytest.raises(ValueError, match=r"tokens must have shape \(B, 6, 2\), got \(2, 5, 2\)"):
            call(x[:, 1:])
    # One label too many would be cut off token by token.
    for call in (flow, flow.states, flow.inverse, flow.invert, flow.inverse_states):
        for wrong in (torch.tensor([0, 1, 2]), torch.tensor([0]), torch.tensor(0), label[:, None]):
            with pytest.raises(ValueError, match=r"label must have shape \(2,\), got "):
                call(x, wrong)
    with pytest.raises(ValueError, match="guidance needs labels"):
        flow.inverse(x, None, strong)
    plain = make_flow(2, num_classes=None)
    for call in (plain, plain.inverse, plain.states):
        with pytest.raises(ValueError, match="unconditional flow"):
            call(x, label)
    with pytest.raises(ValueError, match="unconditional network"):
        plain.blocks[0](x, label)
    with pytest.raises(ValueError, match="needs a conditional block"):
        plain.inverse(x, None, strong)


def test_public_types():
    assert issubclass(AffineBlock, Bijector)
    assert issubclass(AutoregressiveFlow, Bijector)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AutoregressiveGuidance(2.0).scale = 3.0
