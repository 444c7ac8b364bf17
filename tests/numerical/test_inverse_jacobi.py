"""Jacobi iteration against the sequential and the naive inverse: exactness, certificates, independence."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.flows import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    JacobiInverse,
    SequentialInverse,
)
from flowbench.networks.causal_transformer import CausalTransformer
from tests.closeness import assert_near

from .autoregressive_builders import make_flow, make_network, naive_inverse, normal

STARTS = ["learned", "zero"]
LABEL = torch.tensor([0, 1, 2, 3])


@dataclass
class Sums:
    """Running sums of the tokens before each token, in place of a key/value cache."""

    sums: torch.Tensor


class Expanding(torch.nn.Module):
    """mean_i = gain * sum of the tokens before i: iterates grow before they settle."""

    num_classes, token_dim = None, 1

    def __init__(self, num_tokens: int, gain: float) -> None:
        super().__init__()
        self.num_tokens = self.num_slots = num_tokens
        self.gain = gain
        self.calls: list[tuple[int, int]] = []

    def forward(self, x_BND, label=None):
        mean = self.gain * (x_BND.cumsum(1) - x_BND)
        return torch.cat([mean, torch.zeros_like(mean)], dim=2)

    def allocate_cache(self, batch_size):
        return Sums(torch.zeros(batch_size, self.num_tokens, dtype=torch.float64))

    def extend(self, previous_BLD, start, cache, label=None):
        previous = previous_BLD[:, :, 0].clone()
        if start == 0:
            previous[:, 0] = 0
        length = previous.shape[1]
        self.calls.append((start, len(previous)))
        before = cache.sums[:, start - 1 : start] if start else 0
        cache.sums[:, start : start + length] = before + previous.cumsum(1)
        mean = self.gain * cache.sums[:, start : start + length, None]
        return torch.cat([mean, torch.zeros_like(mean)], dim=2)

    def step(self, previous_BD, position, cache, label=None):
        return self.extend(previous_BD[:, None], position, cache)[:, 0]


def expanding(num_tokens: int, gain: float) -> AutoregressiveFlow:
    return AutoregressiveFlow([AffineBlock(Expanding(num_tokens, gain))])


def tame_flow(num_blocks: int, num_tokens: int) -> AutoregressiveFlow:
    """Scales within (0.03, 4.6), so that no sample overflows."""
    return make_flow(num_blocks, 0, "softplus", 4.0, num_tokens=num_tokens, std=0.1)


# Exactness


@settings(max_examples=25, deadline=None)
@given(
    num_blocks=st.integers(1, 3),
    num_tokens=st.sampled_from([1, 2, 7, 12]),
    block_size=st.sampled_from([None, 1, 2, 3, 5, 12, 40]),
    max_iterations=st.sampled_from([None, 1, 2]),
    start=st.sampled_from(STARTS),
    scale=st.sampled_from(["exp", "softplus"]),
    last=st.sampled_from(["identity", "flip"]),
    seed=st.integers(0, 100),
)
def test_to_the_fixed_point_it_is_the_sequential_inverse(
    num_blocks, num_tokens, block_size, max_iterations, start, scale, last, seed
):
    flow = make_flow(num_blocks, seed, scale, 4.0, last, num_tokens=num_tokens, start=start, std=0.1)
    z = normal(4, num_tokens, 2, seed=seed)
    expected = flow.inverse(z, LABEL)
    found = flow.invert(z, LABEL, method=JacobiInverse(0.0, block_size, max_iterations))
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-10)
    assert (found.iterations <= num_tokens).all()
    assert found.residual.max() < 1e-10
    torch.testing.assert_close(flow.inverse(flow(z, LABEL)[0], LABEL, method=JacobiInverse(0.0)), z, rtol=0, atol=1e-10)


def test_all_methods_and_the_naive_inverse_agree():
    flow, z = tame_flow(3, 11), normal(4, 11, 2)
    naive = z
    with torch.no_grad():
        for block in reversed(flow.blocks):
            naive = naive_inverse(block, naive, LABEL)
    methods = [SequentialInverse(), JacobiInverse(0.0), JacobiInverse(0.0, 4), JacobiInverse(0.0, [None, 1, 3])]
    for method in methods:
        torch.testing.assert_close(flow.inverse(z, LABEL, method=method), naive, rtol=0, atol=1e-11)
    for method in (JacobiInverse(1e-6), JacobiInverse(1e-6, 4), JacobiInverse(1e-6, 4, 2)):
        torch.testing.assert_close(flow.inverse(z, LABEL, method=method), naive, rtol=0, atol=1e-5)
    assert_near(flow.float().inverse(z.float(), LABEL, method=JacobiInverse(0.0)), naive.float())


@pytest.mark.parametrize("size", [2, 5, None])
def test_after_as_many_evaluations_as_many_tokens_stand(size, monkeypatch):
    """After k evaluations the first k tokens are exact, however wild the rest is."""
    flow, z, seen = make_flow(1, num_tokens=10, std=0.5, final_norm=True), normal(3, 10, 2), []
    expected = flow.inverse(z)
    extend = CausalTransformer.extend

    def spied(self, previous, start, cache, label=None, **options):
        seen.append((start, previous.clone()))
        return extend(self, previous, start, cache, label, **options)

    monkeypatch.setattr(CausalTransformer, "extend", spied)
    flow.invert(z, method=JacobiInverse(0.0, size, certify=False))
    assert len(seen) <= 10
    for count, (start, previous) in enumerate(seen):
        assert start >= count
        for column in range(previous.shape[1]):
            token = start - 1 + column
            if 0 <= token < count:
                torch.testing.assert_close(previous[:, column], expected[:, token], rtol=0, atol=1e-10)


@given(size=st.sampled_from([2, 3, 5, 9]), tolerance=st.sampled_from([0.0, 1e-3]))
@settings(max_examples=10, deadline=None)
def test_windows_evaluate_fewer_tokens_in_more_calls(size, tolerance):
    flow, z = tame_flow(2, 12), normal(4, 12, 2)
    whole, windows = (flow.invert(z, LABEL, method=JacobiInverse(tolerance, b, certify=False)) for b in (None, size))
    assert windows.network_evaluations < whole.network_evaluations
    assert (windows.iterations >= whole.iterations).all()


def test_a_block_size_of_one_is_the_sequential_inverse_bitwise():
    flow, z = make_flow(2, num_tokens=7), normal(4, 7, 2)
    sequential, jacobi = flow.invert(z, LABEL), flow.invert(z, LABEL, method=JacobiInverse(1e-3, 1, certify=False))
    assert jacobi.x.equal(sequential.x)
    assert jacobi.network_evaluations == sequential.network_evaluations
    assert jacobi.sequential_steps == sequential.sequential_steps
    assert jacobi.iterations.equal(sequential.iterations)


# Tolerance


@settings(max_examples=20, deadline=None)
@given(
    tolerance=st.sampled_from([1e-1, 1e-3, 1e-6]),
    block_size=st.sampled_from([None, 3, 4]),
    guidance=st.sampled_from(
        [
            None,
            AutoregressiveGuidance(3.0),
            AutoregressiveGuidance(2.0, "linear", blocks="deep"),
            AutoregressiveGuidance(2.0, "log-scale", annealed=True, temperature=0.5),
        ]
    ),
    std=st.sampled_from([0.05, 0.3]),
    start=st.sampled_from(STARTS),
    seed=st.integers(0, 100),
)
def test_the_certificate_holds_and_is_computed_independently(tolerance, block_size, guidance, std, start, seed):
    flow = make_flow(3, seed, "softplus", 4.0, num_tokens=10, std=std, start=start, final_norm=True)
    z = normal(4, 10, 2, seed=seed)
    found = flow.invert(z, LABEL, guidance, JacobiInverse(tolerance, block_size))
    assert found.residual.max() <= tolerance
    if guidance is None:
        residual = (flow(found.x, LABEL)[0] - z).abs().amax((1, 2))
        torch.testing.assert_close(found.residual, residual.detach(), rtol=1e-6, atol=1e-12)
    exact = flow.inverse(z, LABEL, guidance)
    if tolerance == 1e-6 and std == 0.05:
        torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-4)


def test_each_blocks_residual_is_within_the_tolerance_without_a_certificate():
    flow, z = make_flow(3, num_tokens=10, std=0.3, final_norm=True), normal(4, 10, 2)
    states = flow.inverse_states(z, LABEL, method=JacobiInverse(1e-2, 4, certify=False))
    for index, block in enumerate(reversed(flow.blocks)):
        residual = (block(states[index + 1], LABEL)[0] - states[index]).abs().max()
        assert 0 < residual <= 1e-2


def test_samples_above_the_tolerance_are_iterated_on_alone():
    """A block near the noise that magnifies the errors of those near the data."""
    flow = make_flow(4, 0, "softplus", 4.0, num_tokens=10, std=0.7, final_norm=True)
    z, tolerance = normal(4, 10, 2), 0.1
    rough = flow.invert(z, LABEL, method=JacobiInverse(tolerance, certify=False))
    residual = (flow(rough.x, LABEL)[0] - z).abs().amax((1, 2))
    certified = flow.invert(z, LABEL, method=JacobiInverse(tolerance))
    assert residual.max() > tolerance
    assert certified.residual.max() <= tolerance
    good = residual <= tolerance
    assert good.any()
    assert certified.x[good].equal(rough.x[good])
    assert certified.iterations[:, good].equal(rough.iterations[:, good])
    assert (certified.iterations[:, ~good] > rough.iterations[:, ~good]).all()
    assert certified.network_evaluations > rough.network_evaluations


def test_float32_ends_at_its_rounding():
    flow, z = tame_flow(3, 10).float(), normal(4, 10, 2).float()
    method = JacobiInverse(1e-12)
    with pytest.warns(UserWarning, match=r"of 4 samples are inverted to .*, not to tolerance=1e-12: rounding"):
        found = flow.invert(z, LABEL, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        flow.invert(z, LABEL, method=method)
    assert found.residual.max() < 1e-4
    torch.testing.assert_close(found.x, flow.inverse(z, LABEL), rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_state_and_ends():
    flow, z = make_flow(2, num_tokens=10, scale="softplus", soft_clip=4.0).float(), normal(4, 10, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flow.invert(z, LABEL, method=JacobiInverse(3e-2))
    assert found.x.dtype == torch.float32
    assert found.iterations.max() < 10
    torch.testing.assert_close(found.x, flow.inverse(z, LABEL), rtol=0, atol=1e-1)


# Independence


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("max_iterations", [None, 2])
def test_samples_do_not_depend_on_their_batch(block_size, max_iterations):
    flow, z = tame_flow(2, 10), normal(4, 10, 2)
    bad = z.clone()
    bad[2] *= 100
    method = JacobiInverse(1e-4, block_size, max_iterations)
    together, spoilt = flow.invert(z, LABEL, method=method), flow.invert(bad, LABEL, method=method)
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(spoilt.x[others], together.x[others], rtol=0, atol=1e-10)
    assert spoilt.iterations[:, others].equal(together.iterations[:, others])
    for row in range(4):
        alone = flow.invert(z[row : row + 1], LABEL[row : row + 1], method=method)
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=0, atol=1e-10)
        assert alone.iterations[:, 0].equal(together.iterations[:, row])
        torch.testing.assert_close(alone.residual[0], together.residual[row], rtol=1e-4, atol=1e-9)


def test_finished_samples_and_accepted_tokens_leave_the_batch():
    """Sample 0 is a fixed point from the start, sample 1 takes its time."""
    flow, z = expanding(8, 0.9), torch.ones(2, 8, 1, dtype=torch.float64)
    z[0] = 0
    found = flow.invert(z, method=JacobiInverse(0.0, certify=False))
    # Token 0 of sample 1 is its noise, so that the first evaluation accepts two tokens.
    assert flow.blocks[0].network.calls == [(0, 2), *((start, 1) for start in range(2, 8))]
    assert found.iterations.tolist() == [[1, 7]]
    assert found.x[0].eq(0).all()
    torch.testing.assert_close(found.x[1, :, 0], 1.9 ** torch.arange(8, dtype=torch.float64))
    assert found.network_evaluations == pytest.approx((2 * 8 + sum(range(1, 7))) / (2 * 8))


@pytest.mark.parametrize("gain", [3.0, -50.0, 1e8])
@pytest.mark.parametrize("block_size", [None, 7])
def test_overflowing_iterates_do_not_stop_convergence(gain, block_size):
    """Iterates of x_i = gain * sum_{j<i} x_j + z_i grow like gain^i before they settle."""
    z = torch.zeros(2, 30, 1, dtype=torch.float64)
    z[1, :3] = torch.tensor([[1.0], [-gain], [-1.0]])  # x = 1, 0, gain - 1, ... then cancel the rest
    flow = expanding(30, gain)
    expected = flow.inverse(z)
    found = flow.invert(z, method=JacobiInverse(0.0, block_size, certify=False))
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)


class Product(Expanding):
    """The same means by one product with a triangular matrix, whose zeros meet what comes later, as in attention."""

    def extend(self, previous_BLD, start, cache, label=None):
        previous = previous_BLD[:, :, 0].clone()
        if start == 0:
            previous[:, 0] = 0
        length = previous.shape[1]
        before = cache.sums[:, start - 1 : start] if start else 0
        lower = torch.ones(length, length, dtype=torch.float64).tril()
        cache.sums[:, start : start + length] = before + previous @ lower.T
        mean = self.gain * cache.sums[:, start : start + length, None]
        return torch.cat([mean, torch.zeros_like(mean)], dim=2)


@pytest.mark.parametrize("block_size", [None, 50])
def test_infinite_iterates_do_not_reach_the_tokens_before_them(block_size):
    """Zero times infinity is not zero. All numbers are integers, so that the solution is exact."""
    gain = 2.0**27
    flow = AutoregressiveFlow([AffineBlock(Product(60, gain))])
    x = normal(2, 60, 1).sign()
    z = x - gain * (x.cumsum(1) - x)
    assert gain ** (1023 / 27) < math.inf  # 59 growing iterates do overflow
    found = flow.invert(z, method=JacobiInverse(0.0, block_size, certify=False))
    assert found.x.equal(x)


def test_untrained_networks_with_large_weights_converge():
    """Iterates overflow on the way to a solution of a size of a few thousand."""
    torch.manual_seed(2)
    block = AffineBlock(make_network(num_tokens=12, std=1.0).float(), "flip")
    z = normal(8, 12, 2).float()
    found = AutoregressiveFlow([block]).invert(z, method=JacobiInverse(1e-3, certify=False))
    naive = naive_inverse(block, z).detach()
    assert naive.isfinite().all()
    torch.testing.assert_close(found.x, naive, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("block_size", [None, 4])
def test_the_cache_holds_what_was_accepted(start, block_size, monkeypatch):
    """Not the iterates on the way: it equals the cache of one pass over the accepted tokens."""
    flow = make_flow(1, scale="softplus", soft_clip=4.0, num_tokens=10, std=0.2, start=start)
    z, caches = normal(1, 10, 2), []
    network, allocate = flow.blocks[0].network, CausalTransformer.allocate_cache
    monkeypatch.setattr(CausalTransformer, "allocate_cache", lambda *args: caches.append(allocate(*args)) or caches[-1])
    found = flow.invert(z, method=JacobiInverse(0.1, block_size, certify=False))
    assert (found.x - flow.inverse(z)).abs().max() > 1e-3  # accepted before they were exact
    fresh = network.allocate_cache(1)
    network.extend(torch.cat([z[:, :1], found.x[:, :-1]], dim=1), 0, fresh)
    for used, expected in zip(caches[0].layers, fresh.layers, strict=True):
        torch.testing.assert_close(used.seen_keys(10), expected.seen_keys(10), rtol=0, atol=1e-12)
        torch.testing.assert_close(used.values, expected.values, rtol=0, atol=1e-12)


def test_an_exception_leaves_no_state(monkeypatch):
    flow, z, method, calls = tame_flow(2, 8), normal(2, 8, 2), JacobiInverse(1e-6, 4), []
    expected = flow.inverse(z, method=method)
    modules = {name: set(vars(module)) for name, module in flow.named_modules()}
    extend = CausalTransformer.extend

    def broken(self, *args, **options):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("interrupted")
        return extend(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CausalTransformer, "extend", broken)
        with pytest.raises(RuntimeError, match="interrupted"):
            flow.inverse(5 * z, method=method)
    assert {name: set(vars(module)) for name, module in flow.named_modules()} == modules
    assert flow.inverse(z, method=method).equal(expected)


def test_it_builds_no_graph_and_leaves_its_input():
    flow, z = make_flow(2), normal(2, 6, 2).requires_grad_()
    before = z.detach().clone()
    found = flow.invert(z, LABEL[:2], AutoregressiveGuidance(2.0), JacobiInverse())
    assert not found.x.requires_grad
    assert not found.residual.requires_grad
    assert z.equal(before)
