"""The causal transformer in training: products, precision, activation checkpointing, rescaled positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowbench.core import onednn
from flowbench.core.kernels import ONEDNN
from flowbench.flows import AffineBlock
from flowbench.networks import attention as attention_module
from flowbench.networks import linear as linear_module
from flowbench.networks.attention import CausalAttention
from flowbench.networks.causal_transformer import CausalTransformer
from flowbench.networks.linear import Linear
from flowbench.networks.rotary import grid_positions, rotary_table, rotate
from tests.closeness import assert_near


def network(seed: int = 0, depth: int = 3, **options) -> CausalTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CausalTransformer(6, 2, 3, width=16, depth=depth, head_dim=8, **options)
        nn.init.normal_(net.out.weight, std=0.05)
        nn.init.normal_(net.out.bias, std=0.05)
    return net


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(module: nn.Module, x: Tensor, *args: object) -> list[Tensor]:
    x = x.detach().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(module(x, *args).square().sum(), [x, *parameters]))


@pytest.fixture(autouse=True)
def through_onednn(monkeypatch) -> None:
    """Small products too; an empty one has nothing to multiply."""
    monkeypatch.setattr(linear_module, "_MIN_WORK", 1)
    monkeypatch.setattr(linear_module, "fastest", lambda *_: ONEDNN)


@pytest.mark.parametrize("shape", [(3, 5), (2, 6, 5), (4, 1, 5), (64, 63, 5), (1, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_pytorch(shape, bias):
    ours = Linear(5, 7, bias=bias)
    theirs = nn.Linear(5, 7, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = normal(*shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))
    for own, other in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert_near(own, other)


@pytest.mark.skipif(not onednn.is_usable(), reason="PyTorch without oneDNN")
def test_linear_leaves_small_products_to_pytorch(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(linear_module, "fastest", lambda *_: ONEDNN)
    layer, products = Linear(64, 256), []
    product = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args: products.append(len(args[0])) or product(*args))
    for rows in (1, 127, 128, 300):
        layer(normal(rows, 64))
    assert products == [128, 300]


def test_linear_takes_views_and_frozen_weights(monkeypatch):
    layer = Linear(6, 4)
    x = normal(6, 2, 8).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    monkeypatch.setattr(onednn, "_AVAILABLE", False)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_linear_has_second_derivatives(monkeypatch):
    layer, x = Linear(5, 3), normal(8, 5).requires_grad_()

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    own = penalty()
    monkeypatch.setattr(onednn, "_AVAILABLE", False)
    torch.testing.assert_close(own, penalty())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_linear_under_function_transforms():
    layer, x = Linear(5, 3), normal(8, 5)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    parameters = {"weight": weight, "bias": bias}

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, x).tanh()

    expected = torch.func.jacrev(lambda p: F.linear(x, p["weight"], p["bias"]).tanh())(parameters)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(call)(parameters, x)
        torch.testing.assert_close(found, expected)
    batch = normal(4, 8, 5, seed=1)
    torch.testing.assert_close(torch.func.vmap(layer)(batch), layer(batch))
    tangents = (normal(8, 5, seed=2),)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), tangents)[1], tangents[0] @ weight.T)


def test_linear_is_counted():
    layer, x = Linear(30, 20), normal(7, 30).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 30 * 20


def test_linear_works_in_other_precisions():
    x = normal(8, 5)
    assert Linear(5, 3).double()(x.double()).dtype == torch.float64
    assert Linear(5, 3).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(5, 3)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("slots", [5, 64])
def test_bfloat16_attention_is_as_exact_written_out_as_fused(slots, monkeypatch):
    layer = CausalAttention(16, 8)
    x = normal(3, slots, 16)
    reference = [layer.double()(x.double(), None), *gradients(layer, x.double(), None)]
    layer.bfloat16()

    def errors() -> list[float]:
        found = [layer(x.bfloat16(), None), *gradients(layer, x.bfloat16(), None)]
        pairs = [(own.detach(), exact.detach()) for own, exact in zip(found, reference, strict=True)]
        return [float((own.double() - exact).norm() / exact.norm()) for own, exact in pairs]

    explicit = errors()
    monkeypatch.setattr(attention_module, "_MAX_EXPLICIT", 0)
    for own, fused in zip(explicit, errors(), strict=True):
        assert own < max(2 * fused, 1e-2)


def test_what_autocast_may_round():
    """The network works in bfloat16; the residual stream, parameters' gradients and the flow stay in float32."""
    net, x, label = network(), normal(4, 6, 2), torch.arange(4)
    block = AffineBlock(net, "flip")
    streams = []
    for layer in net.blocks:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x, label).dtype == torch.bfloat16
        z, logdet = block(x, label)
    assert set(streams) == {torch.float32}
    assert (z.dtype, logdet.dtype) == (torch.float32, torch.float32)
    (z.square().sum() - logdet.sum()).backward()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


def test_float64_end_to_end():
    block, x = AffineBlock(network().double(), "flip"), normal(4, 6, 2, dtype=torch.float64)
    z, logdet = block(x, torch.arange(4))
    assert (z.dtype, logdet.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(block.inverse(z, torch.arange(4)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("precision", ["float64", "float32", "autocast"])
def test_activation_checkpointing_changes_no_gradient(every, precision, monkeypatch):
    kept = network(checkpoint_every=0)
    spared = network(checkpoint_every=every)
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "flowbench.networks.causal_transformer.checkpoint",
        lambda *args, **options: calls.append(args[0]) or checkpoint(*args, **options),
    )
    x, label = normal(4, 6, 2), torch.arange(4)
    if precision == "float64":
        kept, spared, x = kept.double(), spared.double(), x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        pairs = list(zip(gradients(kept, x, label), gradients(spared, x, label), strict=True))
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert calls == list(spared.blocks)[::every]
    calls.clear()
    with torch.no_grad():
        spared(x, label)
    spared.eval()(x, label)
    assert calls == []


def test_extent_rescales_the_grid():
    positions = grid_positions(4, 9, extent=12.0)
    torch.testing.assert_close(positions, grid_positions(4, 9) * 2.0)
    # Twice the resolution, the same extent: the same angles at the same places.
    torch.testing.assert_close(
        grid_positions(4, 4, 8.0), grid_positions(8, 8, 8.0).view(8, 8, 2)[::2, ::2].flatten(0, 1)
    )
    net = network(grid=(2, 3), extent=3.0)
    expected = rotary_table(grid_positions(2, 3) * (3 / math.sqrt(6)), 8).float()
    torch.testing.assert_close(net.table, expected, rtol=0, atol=1e-7)
    x = normal(36, 8)
    torch.testing.assert_close(rotate(x, rotary_table(positions, 8).float()).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extent": 4.0}, "extent 4.0 rescales a grid"),
        ({"extent": 0.0, "grid": (2, 3)}, "extent must be a number in .*, got 0.0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be a whole number in"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
