"""The network of learned denoisers: zero at first, without a mask, aware of places."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.networks import TokenTransformer


def network(**options) -> TokenTransformer:
    torch.manual_seed(0)
    return TokenTransformer(6, 3, 4, **{"width": 16, "depth": 2, "head_dim": 8, "grid": (2, 3), **options})


def moved(net: TokenTransformer) -> TokenTransformer:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


def test_it_starts_at_zero():
    assert torch.equal(network()(torch.randn(2, 6, 3)), torch.zeros(2, 6, 3))


@pytest.mark.parametrize("options", [{}, {"grid": None}])
def test_every_token_sees_every_other(options):
    net, x = moved(network(**options)).double(), torch.randn(1, 6, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: net(t).sum(-1)[0], x)[:, 0].abs().sum(-1)
    assert (jacobian > 1e-8).all()


def test_equal_tokens_in_different_places_differ():
    """Rotary positions alone would give all of them the same."""
    out = moved(network())(torch.ones(1, 6, 3))[0]
    assert torch.pdist(out).min() > 1e-3


def test_the_null_label_is_no_label_and_labels_matter():
    net, x = moved(network()), torch.randn(3, 6, 3)
    torch.testing.assert_close(net(x), net(x, torch.full((3,), 4)))
    assert not torch.allclose(net(x), net(x, torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match="label given to an unconditional network"):
        TokenTransformer(6, 3, width=16, head_dim=8)(x, torch.tensor([0, 1, 2]))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="width must be a multiple of head_dim 8, got 12"):
        network(width=12)
    with pytest.raises(ValueError, match="grid must have num_tokens 6 cells, got 2 x 2"):
        network(grid=(2, 2))
    with pytest.raises(ValueError, match=r"depth must be a whole number in .*, got 0"):
        network(depth=0)
    for ratio in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"mlp_ratio must be a number in .*, got {ratio}"):
            network(mlp_ratio=ratio)
    with pytest.raises(ValueError, match=r"grid\[0\] must be a whole number in .*, got -2"):
        network(grid=(-2, -3))
    with pytest.raises(ValueError, match=r"num_classes must be a whole number in .*, got 0"):
        TokenTransformer(6, 3, 0, width=16, head_dim=8)


def test_calls_that_do_not_fit():
    net, x = network(), torch.randn(2, 6, 3)
    for wrong in (x[:, :1], x[..., :1], x[0]):  # one token or channel would broadcast
        with pytest.raises(ValueError, match=r"tokens must have shape \(B, 6, 3\), got "):
            net(wrong)
    for label in (torch.tensor([0]), torch.tensor([0, 1, 2]), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"label must have shape \(2,\), got "):
            net(x, label)
