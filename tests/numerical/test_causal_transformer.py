"""The causal transformer: causality, cache against parallel pass, labels, rotary positions, precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowbench.networks.attention import CausalAttention, LayerNorm
from flowbench.networks.causal_transformer import CausalTransformer
from flowbench.networks.rotary import grid_positions, rotary_table, rotate

POSITIONS = [("rope", None), ("rope", (2, 3)), ("learned", None)]
STARTS = ["learned", "zero"]


def network(seed: int = 0, num_tokens: int = 6, token_dim: int = 2, num_classes=3, **options) -> CausalTransformer:
    """A small network whose output layer is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CausalTransformer(num_tokens, token_dim, num_classes, width=16, depth=2, head_dim=8, **options)
        nn.init.normal_(net.out.weight, std=0.05)
        nn.init.normal_(net.out.bias, std=0.05)
    return net.double()


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stepwise(net: CausalTransformer, x: Tensor, label: Tensor | None) -> Tensor:
    cache = net.allocate_cache(len(x))
    rows = [net.step(x[:, i - 1] if i else None, i, cache, label) for i in range(net.num_tokens)]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("position", "start"), list(itertools.product(POSITIONS, STARTS)))
def test_row_depends_on_exactly_the_tokens_before_it(position, start):
    net = network(position=position[0], grid=position[1], start=start)
    x = normal(1, 6, 2)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, torch.tensor([1]))[0], x)[:, :, 0]
    reach = jacobian.abs().amax(dim=(1, 3))  # (output row, input token)
    before = torch.ones(6, 6).tril(-1).bool()
    assert (reach[~before] == 0).all()
    assert (reach[before] > 0).all()
    first = net(x, torch.tensor([1]))[0, 0]
    assert first.eq(0).all() == (start == "zero")


@settings(max_examples=20, deadline=None)
@given(
    position=st.sampled_from(POSITIONS),
    start=st.sampled_from(STARTS),
    num_classes=st.sampled_from([None, 3]),
    final_norm=st.booleans(),
    seed=st.integers(0, 100),
)
def test_cached_steps_equal_the_parallel_pass(position, start, num_classes, final_norm, seed):
    net = network(
        seed,
        num_classes=num_classes,
        position=position[0],
        grid=position[1],
        start=start,
        final_norm=final_norm,
    )
    x = normal(4, 6, 2, seed=seed)
    label = None if num_classes is None else torch.tensor([0, 3, 2, 0])
    with torch.no_grad():
        torch.testing.assert_close(stepwise(net, x, label), net(x, label), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_short_sequences(num_tokens, start):
    net = network(num_tokens=num_tokens, start=start)
    x = normal(3, num_tokens, 2)
    params = net(x)
    assert params.shape == (3, num_tokens, 4)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(net, x, None), params, rtol=1e-11, atol=1e-13)
    assert net.num_slots == num_tokens - (start == "zero")


def test_a_used_cache_may_be_used_again():
    net, x = network(), normal(2, 6, 2)
    cache = net.allocate_cache(2)
    with torch.no_grad():
        for scale in (5.0, 1.0):
            rows = [net.step(scale * x[:, i - 1] if i else None, i, cache) for i in range(6)]
        torch.testing.assert_close(torch.stack(rows, 1), net(x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("start", STARTS)
def test_output_is_zero_at_initialisation(start):
    net = CausalTransformer(6, 2, 3, width=16, head_dim=8, start=start)
    assert net(normal(2, 6, 2, dtype=torch.float32), torch.tensor([0, 3])).eq(0).all()


@pytest.mark.parametrize(("position", "start"), list(itertools.product(POSITIONS, STARTS)))
@pytest.mark.parametrize("final_norm", [False, True])
def test_gradients_reach_every_parameter(position, start, final_norm):
    net = network(position=position[0], grid=position[1], start=start, final_norm=final_norm)
    net(normal(4, 6, 2), torch.arange(4)).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert dead == []


def test_null_label_and_mixed_batches():
    net, x = network(), normal(3, 6, 2)
    torch.testing.assert_close(net(x), net(x, torch.full((3,), 3)), rtol=0, atol=0)
    mixed = net(x, torch.tensor([1, 3, 0]))
    for row, label in enumerate([1, 3, 0]):
        torch.testing.assert_close(mixed[row : row + 1], net(x[row : row + 1], torch.tensor([label])))
    assert (net(x, torch.tensor([1, 1, 1])) - net(x)).abs().max() > 1e-4


def explicit_attention(layer: CausalAttention, x: Tensor, table: Tensor | None) -> Tensor:
    """Softmax attention written out head by head, query by query."""
    batch, length, width = x.shape
    size = width // layer.num_heads
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=-1)
    out = torch.zeros_like(x)
    for b, h in itertools.product(range(batch), range(layer.num_heads)):
        part = slice(h * size, (h + 1) * size)
        q_h, k_h = q[b, :, part], k[b, :, part]
        if table is not None:
            q_h, k_h = rotate(q_h, table), rotate(k_h, table)
        for s in range(length):
            weights = torch.softmax(k_h[: s + 1] @ q_h[s] / math.sqrt(size), dim=0)
            out[b, s, part] = weights @ v[b, : s + 1, part]
    return out @ layer.out.weight.T + layer.out.bias


@pytest.mark.parametrize("rope", [False, True])
def test_attention_equals_the_written_out_softmax(rope):
    torch.manual_seed(0)
    layer = CausalAttention(12, 4).double()
    table = rotary_table(grid_positions(2, 3), 4) if rope else None
    x = normal(2, 6, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, table), explicit_attention(layer, x, table), rtol=1e-11, atol=1e-13)


def scores(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    table = rotary_table(positions, q.shape[-1])
    rows = len(positions)
    return rotate(q.expand(rows, -1), table) @ rotate(k.expand(rows, -1), table).T


@pytest.mark.parametrize("num_axes", [1, 2])
def test_rotation_keeps_norms_and_sees_relative_offsets_only(num_axes):
    positions = torch.arange(20)[:, None] if num_axes == 1 else grid_positions(4, 5)
    x = normal(20, 8)
    turned = rotate(x, rotary_table(positions, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    assert not torch.allclose(turned, x)
    q, k = normal(1, 8, seed=1), normal(1, 8, seed=2)
    torch.testing.assert_close(scores(q, k, positions), scores(q, k, positions + 1000), rtol=1e-9, atol=1e-9)


def test_rotation_is_a_complex_product():
    positions = torch.tensor([[0.0], [1.0], [7.0]])
    x = normal(3, 8)
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * positions * 10_000.0 ** -(torch.arange(4) / 4).double())
    torch.testing.assert_close(rotate(x, rotary_table(positions, 8)), torch.cat([z.real, z.imag], -1))


def test_each_axis_turns_its_own_channels():
    """Moving along a row leaves the row channels unturned, and the axes are told apart."""
    q, k = normal(1, 8, seed=1), normal(1, 8, seed=2)
    score = scores(q, k, grid_positions(3, 3))
    assert not torch.isclose(score[0, 1], score[0, 3])
    x = normal(9, 8)
    turned = rotate(x, rotary_table(grid_positions(3, 3), 8))
    row_pairs = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(turned[:3, row_pairs], x[:3, row_pairs])


@pytest.mark.parametrize("shape", [(1, 6), (2, 3)])
def test_a_flipped_grid_is_absorbed_by_swapping_channels(shape):
    """Why the network needs no notion of the block's order."""
    positions = grid_positions(*shape)
    q, k = normal(6, 8, seed=1), normal(6, 8, seed=2)
    flipped = rotary_table(positions.flip(0), 8)
    straight = rotary_table(positions, 8)
    reference = rotate(q, flipped) @ rotate(k, flipped).T
    swapped = rotate(q.roll(4, -1), straight) @ rotate(k.roll(4, -1), straight).T
    torch.testing.assert_close(swapped, reference)


@pytest.mark.parametrize("start", STARTS)
def test_a_slot_carries_the_position_of_the_token_it_predicts(start):
    """The row that predicts token 3, first of the second grid row, is turned by (1, 0)."""
    net = network(grid=(2, 3), start=start)
    slot = 3 - (6 - net.num_slots)
    expected = rotary_table(torch.tensor([[1.0, 0.0]]), 8)[:, 0]
    torch.testing.assert_close(net.table[:, slot], expected, rtol=0, atol=1e-7)


def test_bfloat16_rotation_uses_exact_positions():
    positions = torch.tensor([[1001.0]])  # bfloat16 knows 1000 and 1004
    x = normal(1, 8, dtype=torch.bfloat16)
    exact = rotate(x.double(), rotary_table(positions, 8))
    torch.testing.assert_close(rotate(x, rotary_table(positions, 8)).double(), exact, rtol=8e-3, atol=1e-3)


def test_layer_norm_is_exact_in_float64_and_safe_in_bfloat16():
    norm = LayerNorm(8)
    x = 1e4 + normal(4, 8)
    oracle = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm.double()(x), oracle, rtol=1e-9, atol=1e-9)
    low = norm.bfloat16()(normal(4, 8).bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), F.layer_norm(normal(4, 8).bfloat16().double(), (8,)), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_without_parameters(dtype):
    x = normal(4, 8).to(dtype)
    found = LayerNorm(8, elementwise_affine=False)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), F.layer_norm(x.double(), (8,)), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("position", "start"), list(itertools.product(POSITIONS, STARTS)))
def test_autocast_stays_close_to_float32(position, start):
    net = network(position=position[0], grid=position[1], start=start).float()
    x, label = normal(2, 6, 2, dtype=torch.float32), torch.tensor([0, 3])
    with torch.no_grad():
        reference = net(x, label)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parallel, sequential = net(x, label), stepwise(net, x, label)
    torch.testing.assert_close(parallel.float(), reference, rtol=0, atol=2e-2)
    torch.testing.assert_close(sequential.float(), reference, rtol=0, atol=2e-2)


def test_autocast_leaves_float64_alone():
    net, x = network(), normal(2, 6, 2)
    with torch.no_grad():
        reference = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(net(x), reference, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(stepwise(net, x, None), reference, rtol=1e-11, atol=1e-13)


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    net, x = network(), normal(2, 6, 2)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.tensor([0, 3])), net(x, torch.tensor([0, 3])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be a whole number in .*, got 0"),
        ({"num_classes": 0}, "num_classes must be a whole number in"),
        ({"width": 30}, "width must be a multiple of head_dim 8, got 30"),
        ({"depth": 0}, "depth must be a whole number in"),
        ({"head_dim": 1}, "head_dim must be a multiple of 2"),
        ({"grid": (2, 3), "head_dim": 2}, "head_dim must be a multiple of 4"),
        ({"grid": (2, 2)}, "grid must have num_tokens 6 cells, got 2 x 2"),
        ({"grid": (2, 3), "position": "learned"}, "needs position='rope'"),
        ({"position": "sinusoidal"}, "position must be 'rope' or 'learned', got 'sinusoidal'"),
        ({"start": "one"}, "start must be 'learned' or 'zero', got 'one'"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be a number in .*, got 0.0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be a number in .*, got nan"),
        ({"mlp_ratio": math.inf}, "mlp_ratio must be a number in .*, got inf"),
        ({"grid": (-2, -3)}, r"grid\[0\] must be .*, got -2"),
    ],
)
def test_impossible_options_are_named(options, message):
    arguments = {"num_tokens": 6, "token_dim": 2, "width": 16, "head_dim": 8} | options
    with pytest.raises(ValueError, match=message):
        CausalTransformer(**arguments)


def test_wrong_calls_are_named():
    net, x = network(), normal(2, 6, 2)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, 6, 2\), got \(2, 5, 2\)"):
        net(x[:, 1:])
    with pytest.raises(ValueError, match=r"label must have shape \(2,\), got \(3,\)"):
        net(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="unconditional"):
        network(num_classes=None)(x, torch.tensor([0, 1]))
    cache = net.allocate_cache(2)
    with pytest.raises(ValueError, match="missing at position 1"):
        net.step(None, 1, cache)
