"""Token orders against orders written out by hand."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowbench.flows import AffineBlock, Permutation, alternating, network_grid, permute
from flowbench.networks.causal_transformer import CausalTransformer

from .autoregressive_builders import make_network, normal

ORDERS = get_args(Permutation)

# Tokens of a grid of 2 rows and 3 columns: 0 1 2 / 3 4 5.
BY_HAND = {
    "identity": [0, 1, 2, 3, 4, 5],
    "flip": [5, 4, 3, 2, 1, 0],
    "reverse-columns": [2, 1, 0, 5, 4, 3],
    "reverse-rows": [3, 4, 5, 0, 1, 2],
    "transpose": [0, 3, 1, 4, 2, 5],
    "transpose-flip": [5, 2, 4, 1, 3, 0],
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_a_small_grid(order):
    assert permute(torch.arange(6)[None, :, None], order, (2, 3)).flatten().tolist() == BY_HAND[order]


@given(order=st.sampled_from(ORDERS), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_orders_are_permutations_with_an_inverse(order, rows, columns):
    tokens = torch.arange(rows * columns)[None, :, None]
    there = permute(tokens, order, (rows, columns))
    assert sorted(there.flatten().tolist()) == tokens.flatten().tolist()
    assert permute(there, order, (rows, columns), inverse=True).equal(tokens)
    assert permute(permute(tokens, order, (rows, columns), inverse=True), order, (rows, columns)).equal(tokens)


@pytest.mark.parametrize("order", ORDERS)
def test_the_neighbour_of_a_block_walks_backwards(order):
    tokens = torch.arange(6)[None, :, None]
    first, second = alternating(2, last=order)
    assert second == order
    assert permute(tokens, first, (2, 3)).flip(1).equal(permute(tokens, second, (2, 3)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_a_plain_block_on_permuted_tokens(order):
    torch.manual_seed(0)
    net, x = make_network(), normal(2, 6, 2)
    straight, permuted = AffineBlock(net), AffineBlock(net, order, grid=(2, 3))
    ahead = permute(x, order, (2, 3))
    assert permuted(x)[0].equal(permute(straight(ahead)[0], order, (2, 3), inverse=True))
    assert permuted.inverse(x).equal(permute(straight.inverse(ahead), order, (2, 3), inverse=True))


@pytest.mark.parametrize("order", ORDERS)
def test_the_networks_grid_keeps_the_offsets_of_positions_up_to_signs(order):
    place = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    visited = permute(place[None], order, (2, 3))[0]
    rows, columns = network_grid(order, (2, 3))
    theirs = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    if order.startswith("transpose"):
        theirs = theirs.flip(1)
    offsets = [(p[:, None] - p[None]).abs() for p in (visited, theirs)]
    assert offsets[0].equal(offsets[1])
    CausalTransformer(6, 2, width=16, head_dim=8, grid=network_grid(order, (2, 3)))


def test_alternating_orders_end_where_they_are_told():
    assert alternating(3, last="identity") == ["identity", "flip", "identity"]
    assert alternating(4, last="flip") == ["identity", "flip", "identity", "flip"]
    assert alternating(1, last="flip") == ["flip"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alternating(0, last="flip"), "num_blocks must be a whole number in"),
        (lambda: alternating(2, last="up"), "permutation must be 'identity', .* or 'transpose-flip', got 'up'"),
        (lambda: permute(torch.zeros(1, 6, 1), "up", (2, 3)), "permutation must be"),
        (lambda: permute(torch.zeros(1, 6, 1), "transpose"), r"needs the grid \(rows, columns\)"),
        (lambda: AffineBlock(make_network(), "transpose"), r"needs the grid \(rows, columns\)"),
        (lambda: AffineBlock(make_network(), "flip", grid=(2, 4)), "grid must hold 6 tokens, got 2 x 4"),
        (
            lambda: AffineBlock(make_network(), "transpose", grid=(-2, -3)),
            r"grid\[0\] must be a whole number in .*, got -2",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
