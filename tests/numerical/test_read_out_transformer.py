"""The transformer that is read between its blocks: which block a state follows, and who sees whom."""

from __future__ import annotations

import pytest
import torch

from flowbench.families.family_contract import perturb
from flowbench.networks import ReadOutTransformer

SIZES = {"num_blocks": 3, "depth": 2, "width": 16, "head_dim": 8, "grid": (2, 3)}


def network(**options) -> ReadOutTransformer:
    torch.manual_seed(0)
    net = ReadOutTransformer(6, 2, 4, **{**SIZES, **options})
    perturb(net)
    return net


X = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layer", "changed"), [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, [1, 2]), (3, [1, 2]), (5, [2])])
def test_a_state_is_read_after_the_layers_of_its_block(layer, changed):
    net = network()
    before = net(X)
    assert before.shape == (3, 3, 6, 2)
    perturb(net.blocks[layer], seed=9, std=0.3)
    differs = [not torch.equal(a, b) for a, b in zip(before, net(X), strict=True)]
    assert [number for number, moved in enumerate(differs) if moved] == changed


def test_heads_are_linear_and_none_are_there_where_nothing_is_read():
    net = network()
    seen = []
    net.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    read = net(X)[0]
    torch.testing.assert_close(read, seen[0] @ net.heads[0].weight.T + net.heads[0].bias)
    alone = network(reads=False)
    assert alone(X).shape == (1, 3, 6, 2)
    assert len(alone.heads) == 0


def test_every_token_sees_every_other():
    x = X.clone().requires_grad_()
    for token in (0, 5):
        (gradient,) = torch.autograd.grad(network()(x)[:, :, token].sum(), x)
        assert bool((gradient.abs().amax((0, 2)) > 0).all())


def test_labels_move_every_state_and_the_null_label_is_none():
    net = network()
    labelled, null = net(X, torch.tensor([0, 1, 2])), net(X, torch.full((3,), 4))
    assert torch.equal(null, net(X))
    assert all(not torch.allclose(a, b) for a, b in zip(labelled, null, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(grid=(2, 2)), r"grid must have num_tokens 6 cells, got 2 x 2"),
        (lambda: network(num_blocks=0), r"num_blocks must be a whole number in .*, got 0"),
        (lambda: network()(X[:, :5]), r"tokens must have shape \(B, 6, 2\), got \(3, 5, 2\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
