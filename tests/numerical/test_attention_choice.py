"""The attention of one token is the same through the fused kernel and through two products, whichever is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowbench.core.kernels import ONEDNN, PLAIN
from flowbench.networks import CausalTransformer
from flowbench.networks import attention as attention_module

PRODUCTS = "products"


@pytest.fixture
def asks_always(monkeypatch):
    """Small caches are asked for too."""
    monkeypatch.setattr(attention_module, "_MIN_READ", 0)


def parameters(network: CausalTransformer, x_BND: Tensor) -> Tensor:
    """Of all tokens, one after the other."""
    cache = network.allocate_cache(len(x_BND))
    rows = [network.step(x_BND[:, max(i - 1, 0)], i, cache) for i in range(network.num_tokens)]
    return torch.stack(rows, dim=1)


def example() -> tuple[CausalTransformer, Tensor]:
    torch.manual_seed(0)
    network = CausalTransformer(9, 3, width=32, depth=2, head_dim=16, position="learned", start="zero")
    torch.nn.init.normal_(network.out.weight, std=0.5)
    return network, torch.randn(4, 9, 3)


@pytest.mark.parametrize("way", [PLAIN, PRODUCTS, ONEDNN])
def test_either_way_agrees_with_one_pass(way, monkeypatch, asks_always):
    """A way that attention does not have, as the user may ask for one, is PyTorch's own."""
    taken = []
    for name in ("_fused", "_two_products"):
        function = getattr(attention_module, name)
        monkeypatch.setattr(
            attention_module, name, lambda *args, name=name, function=function: taken.append(name) or function(*args)
        )
    monkeypatch.setattr(attention_module, "fastest", lambda *_: way)
    network, x = example()
    with torch.no_grad():
        torch.testing.assert_close(parameters(network, x), network(x), rtol=1e-4, atol=1e-5)
    assert set(taken) == {"_two_products" if way == PRODUCTS else "_fused"}


def test_the_question_is_the_shape_with_few_lengths(monkeypatch, asks_always):
    """Lengths are rounded up, so that a sampler of N tokens measures log N of them; the cache's stride counts."""
    asked = []
    monkeypatch.setattr(attention_module, "fastest", lambda operation, shape, ways: asked.append(shape) or PLAIN)
    network, x = example()
    with torch.no_grad():
        parameters(network, x)
    slots = network.num_slots
    assert set(asked) == {(4, 2, slots, 16, end) for end in (1, 2, 4, slots)}


def test_what_reads_little_asks_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_module, "fastest", lambda operation, shape, ways: asked.append(shape[-1]) or PRODUCTS)
    network, x = example()
    # Four sequences of two heads of 16 channels: at the fifth slot the bound is reached.
    monkeypatch.setattr(attention_module, "_MIN_READ", 4 * 2 * 16 * 5)
    with torch.no_grad():
        torch.testing.assert_close(parameters(network, x), network(x), rtol=1e-4, atol=1e-5)
    assert set(asked) == {network.num_slots}
    assert len(asked) == 2 * (network.num_slots - 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_ask_nothing(dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "fastest", None)
    network, x = example()
    network, x = network.to(dtype), x.to(dtype)
    with torch.no_grad():
        assert parameters(network, x).dtype == dtype


def test_what_is_measured_is_equal():
    ways = attention_module._step_ways((2, 3, 8, 4, 5))
    assert list(ways) == [PLAIN, PRODUCTS]
    torch.testing.assert_close(ways[PLAIN](), ways[PRODUCTS]())
