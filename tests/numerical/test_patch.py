"""Images to tokens and back."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.flows.autoregressive.patch import patchify, unpatchify


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3), patch=st.integers(1, 3))
def test_patches_are_a_permutation_of_the_pixels(channels, rows, columns, patch):
    shape = (channels, rows * patch, columns * patch)
    size = math.prod(shape)
    x = torch.arange(2 * size, dtype=torch.float64).reshape(2, *shape)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, rows * columns, channels * patch**2)
    assert unpatchify(tokens, patch, shape).equal(x)
    one_hot = patchify(torch.eye(size, dtype=torch.float64).reshape(size, *shape), patch).flatten(1)
    assert torch.linalg.slogdet(one_hot)[1] == 0
    for row, column in itertools.product(range(rows), range(columns)):
        cut = x[0, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert tokens[0, row * columns + column].equal(cut.flatten())
