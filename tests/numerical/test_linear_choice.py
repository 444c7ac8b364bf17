"""How a linear layer computes is measured, and what was measured once decides: the same seed gives the same numbers."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core import kernels, onednn
from flowbench.core.kernels import ONEDNN, PLAIN, Kernels
from flowbench.networks import linear as linear_module
from flowbench.networks.linear import Linear

pytestmark = pytest.mark.skipif(not onednn.is_usable(), reason="PyTorch without oneDNN")

KINDS = ("forward", "input", "weight")
MIXES = [ONEDNN, *("-".join((ONEDNN, *kinds)) for n in (1, 2) for kinds in combinations(KINDS, n))]


@pytest.fixture(autouse=True)
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Small products are asked for too; shapes of those through oneDNN."""
    found, product = [], onednn.linear
    monkeypatch.setattr(linear_module, "_MIN_WORK", 1)
    monkeypatch.setattr(kernels, "_kernels", Kernels(None))
    monkeypatch.setattr(kernels, "override", lambda: None)
    monkeypatch.setattr(onednn, "linear", lambda x, w, *rest: found.append((*x.shape, len(w))) or product(x, w, *rest))
    return found


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", MIXES)
def test_each_product_goes_the_way_that_is_named(way, products, monkeypatch):
    monkeypatch.setattr(linear_module, "fastest", lambda *_: way)
    layer, x = Linear(5, 3), normal(2, 4, 5).requires_grad_()
    inputs = [x, *layer.parameters()]
    y = layer(x)
    found = torch.autograd.grad(y, inputs, normal(2, 4, 3))
    of_kind = {"forward": (8, 5, 3), "input": (8, 3, 5), "weight": (3, 8, 5)}
    assert products == [shape for kind, shape in of_kind.items() if way == ONEDNN or kind in way]
    expected = F.linear(x, *inputs[1:])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, normal(2, 4, 3)))


@pytest.mark.parametrize("faster", [PLAIN, ONEDNN])
def test_the_faster_product_is_taken_with_and_without_gradients(faster, products, monkeypatch):
    def seconds(ways: dict, threads: int) -> dict[str, list[float]]:
        return {name: [1.0 if name.startswith(faster) else 2.0] for name in ways}

    for module in (kernels, linear_module):
        monkeypatch.setattr(module, "seconds_of", seconds)
    layer = Linear(5, 3)
    layer(normal(8, 5)).sum().backward()
    with torch.no_grad():
        layer(normal(8, 5))
    assert products == ([] if faster == PLAIN else [(8, 5, 3), (3, 8, 5), (8, 5, 3)])


def test_products_that_lose_what_autograd_costs_are_pytorchs(products, monkeypatch):
    """Each product alone is faster through oneDNN, all of them together are not."""
    monkeypatch.setattr(linear_module, "seconds_of", lambda *_: {PLAIN: [2.0], ONEDNN: [1.0]})
    monkeypatch.setattr(kernels, "seconds_of", lambda *_: {PLAIN: [1.0], ONEDNN: [1.0]})
    Linear(5, 3)(normal(8, 5)).sum().backward()
    assert products == []


def trained(folder: Path, faster: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights after a few steps in a process of its own, on a machine where a way is the faster one."""

    def seconds(ways: dict, threads: int) -> dict[str, list[float]]:
        return {name: [1.0 if name.startswith(faster) else 2.0] for name in ways}

    monkeypatch.setattr(kernels, "_kernels", Kernels(folder))
    for module in (kernels, linear_module):
        monkeypatch.setattr(module, "seconds_of", seconds)
    torch.manual_seed(0)
    net = nn.Sequential(Linear(64, 256), nn.GELU(), Linear(256, 3))
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(300, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("first", [PLAIN, ONEDNN])
def test_a_cold_and_a_warm_cache_give_the_same_numbers(first, tmp_path, monkeypatch, products):
    """Bit for bit, although the later process would have measured the opposite."""
    other = PLAIN if first == ONEDNN else ONEDNN
    cold = trained(tmp_path, first, monkeypatch)
    assert bool(products) == (first == ONEDNN)
    warm = trained(tmp_path, other, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    """On the meta device, in other precisions, under autocast and in the compiler, PyTorch multiplies."""

    def fail(*_: object) -> str:
        raise AssertionError("asked for a kernel")

    monkeypatch.setattr(linear_module, "fastest", fail)
    layer, x = Linear(64, 256), normal(300, 64)
    assert Linear(64, 256, device="meta")(x.to("meta")).shape == (300, 256)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(
        torch.compile(layer, backend="eager", fullgraph=True)(x), F.linear(x, *layer.parameters())
    )
