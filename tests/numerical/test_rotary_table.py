"""The rotary table is in no checkpoint, and right wherever a network came from."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from flowbench.networks import CausalTransformer, TokenTransformer
from flowbench.networks.rotary import RotaryTable, grid_positions, rotary_table

SIZES = {"width": 16, "depth": 2, "head_dim": 8}


def causal() -> CausalTransformer:
    net = CausalTransformer(6, 2, 3, **SIZES, grid=(2, 3), extent=3.0, start="zero")
    nn.init.normal_(net.out.weight)
    return net


def token() -> TokenTransformer:
    net = TokenTransformer(6, 2, 3, **SIZES, grid=(2, 3))
    nn.init.normal_(net.out.weight)
    return net


@pytest.mark.parametrize(("build", "dtype"), list(itertools.product([causal, token], [torch.float32, torch.float64])))
def test_a_network_off_the_meta_device_is_the_one_that_was_saved(build, dtype):
    saved = build().to(dtype)
    state, x = saved.state_dict(), torch.randn(2, 6, 2, dtype=dtype)
    assert not [name for name in state if "table" in name]
    with torch.device("meta"):
        net = build().to(dtype)
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}
    given = copy.deepcopy(net)
    given.load_state_dict(state, assign=True)
    net.to_empty(device="cpu")
    net.load_state_dict(state)
    for found in (net, given, nn.Sequential(copy.deepcopy(net)).to_empty(device="cpu")[0]):
        assert found.rotary.table.equal(saved.rotary.table)
    assert net(x).equal(saved(x))
    assert given(x).equal(saved(x))


def test_a_table_has_the_precision_of_its_dtype():
    exact = rotary_table(grid_positions(2, 3, 3.0), 8)[:, 1:]
    table = RotaryTable(6, 8, (2, 3), 3.0, first=1)
    assert table.table.equal(exact.float())
    assert table.bfloat16().table.equal(exact.bfloat16())
    assert table.double().table.equal(exact)
    assert list(table.state_dict()) == []


def test_a_move_that_moves_nothing_leaves_the_table_alone():
    """A graph that saved it would notice a write."""
    table = RotaryTable(6, 8)
    version = table.table._version
    assert table.to("cpu").float().table._version == version
