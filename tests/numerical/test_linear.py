"""When the linear layer leaves its product to PyTorch: derivatives, tracing, mistakes, kernels switched off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core import onednn
from flowbench.core.kernels import ONEDNN
from flowbench.networks import linear as linear_module
from flowbench.networks.linear import Linear


@pytest.fixture(autouse=True)
def products(monkeypatch) -> list[int]:
    """Small products go through oneDNN too; their rows are noted."""
    rows, product = [], onednn.linear
    monkeypatch.setattr(linear_module, "_MIN_WORK", 1)
    monkeypatch.setattr(linear_module, "fastest", lambda *_: ONEDNN)
    monkeypatch.setattr(onednn, "linear", lambda *args: rows.append(len(args[0])) or product(*args))
    return rows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(layer: Linear):
    return lambda x: F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_derivatives(grad):
    """oneDNN's operator would drop them without a word."""
    layer, x, tangent = Linear(5, 3), normal(8, 5), normal(8, 5, seed=1)
    expected = (tangent @ layer.weight.T).detach()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_derivatives_of_backward_ones(grad):
    layer, x, tangent = Linear(5, 3), normal(8, 5), normal(8, 3, seed=1)
    with torch.set_grad_enabled(grad):
        _, pull = torch.func.vjp(layer, x)
        (found,) = torch.func.jvp(pull, (tangent,), (2 * tangent,))[1]
    torch.testing.assert_close(found, 2 * tangent @ layer.weight)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_nested_derivatives():
    layer, x = Linear(4, 3), normal(2, 4)

    def cubed(forward):
        return lambda x: forward(x).pow(3).sum()

    expected = torch.func.hessian(cubed(plain(layer)))(x)
    assert expected.abs().max() > 0.1
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(cubed(layer)))(x), expected)

    def twice(forward):
        def directional(x):
            return torch.func.jvp(cubed(forward), (x,), (torch.ones_like(x),))[1]

        return torch.func.jvp(directional, (x,), (torch.ones_like(x),))[1]

    with torch.no_grad():
        torch.testing.assert_close(twice(layer), expected.sum())


def test_forward_derivatives_survive_a_renamed_private_name(monkeypatch):
    layer, x = Linear(5, 3), normal(8, 5)
    expected = torch.func.jvp(plain(layer), (x,), (x,))[1]
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert onednn.in_forward_mode()
    monkeypatch.undo()
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], expected)


def test_a_wrong_width_gets_pytorchs_message():
    layer = Linear(5, 3)
    for x in (normal(8, 4), normal(2, 8, 6)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            layer(x)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean", "ignore:.*torch.jit:DeprecationWarning")
def test_it_can_be_traced():
    layer, x = Linear(5, 3), normal(8, 5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(layer, x)
            torch.testing.assert_close(traced(2 * x), layer(2 * x))


class Tagged(Tensor):
    """A tensor that comes with behaviour of its own, as sharded and quantised ones do."""


@pytest.mark.skipif(not onednn.is_usable(), reason="PyTorch without oneDNN")
def test_onednn_takes_plain_tensors_while_it_is_enabled(products):
    layer, x = Linear(5, 3), normal(8, 5)
    layer(x)
    assert products == [8]
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    layer(x.as_subclass(Tagged))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))
    assert type(layer.weight) is Tagged
    layer(x)
    assert products == [8]
