"""Sizes in the papers' notation."""

from __future__ import annotations

import pytest
import torch

from flowbench.data import DataSpec
from flowbench.families import TARFlow
from flowbench.families.architecture import deep_shallow_layers, flow_sizes, parse_architecture
from flowbench.flows import AffineBlock

from ..contract.builders import IMAGES, POINTS, build

IMAGENET64 = DataSpec("imagenet64", "1", (3, 64, 64), num_classes=1000, levels=256)


def test_tarflows_notation_is_patch_width_blocks_layers():
    found = parse_architecture("2-768-8-6")
    assert (found.patch_size, found.width, found.layers) == (2, 768, (6,) * 8)
    assert parse_architecture("[4-1024-8-8]") == parse_architecture("4 - 1024 - 8 - 8")


def test_starflows_notation_is_deep_and_all_blocks():
    found = parse_architecture("18(6)")
    assert found.layers == (2, 2, 2, 2, 2, 18)
    assert found.width is None
    assert found.patch_size is None
    assert parse_architecture("24(6)").layers == (2,) * 5 + (24,)
    assert deep_shallow_layers("18(6)", None, None, None) == [2, 2, 2, 2, 2, 18]
    assert deep_shallow_layers(None, 4, 3, 1) == [1, 1, 1, 4]


@pytest.mark.parametrize("text", ["", "big", "2-768-8", "2-768-8-8-8", "0-768-8-8", "18(0)", "18(6", "1.5(6)", "-1(2)"])
def test_another_notation_gets_one_line(text):
    with pytest.raises(ValueError, match="is not understood: give patch-width-blocks-layers as in 2-768-8-8") as caught:
        parse_architecture(text)
    assert "\n" not in str(caught.value)


def test_explicit_sizes_may_repeat_the_architecture_and_not_contradict_it():
    assert flow_sizes("2-64-3-1", [1, 1, 1], 64, 2) == ([1, 1, 1], [64, 64, 64], 2)
    assert flow_sizes("18(3)", None, [8, 8, 16], 4) == ([2, 2, 18], [8, 8, 16], 4)
    assert flow_sizes(None, None, None, None) == ([2, 2, 2, 2], [128] * 4, 1)
    with pytest.raises(ValueError, match=r"architecture 2-64-3-1 says layers \[1, 1, 1\], but layers is \[1, 2\]"):
        flow_sizes("2-64-3-1", [1, 2], None, None)
    with pytest.raises(ValueError, match="architecture 2-64-3-1 says width 64, but width is 32: leave one of them out"):
        flow_sizes("2-64-3-1", None, 32, None)
    with pytest.raises(ValueError, match="says patch_size 2, but patch_size is 1"):
        flow_sizes("2-64-3-1", None, None, 1)
    with pytest.raises(ValueError, match="says deep_layers 18, but deep_layers is 4"):
        deep_shallow_layers("18(6)", 4, None, None)
    with pytest.raises(ValueError, match=r"2-64-3-1 is TARFlow's notation: STARFlow's names layers, as in 18\(6\)"):
        deep_shallow_layers("2-64-3-1", None, None, None)


def test_an_order_is_named_once_and_zero_is_no_default():
    with pytest.raises(ValueError, match="last_order=identity too"):
        TARFlow(POINTS, layers=[1, 1], width=32, last_order="identity", permutations=["identity", "flip"])
    with pytest.raises(ValueError, match=r"width must be a whole number in .*, got 0"):
        TARFlow(POINTS, layers=[1], width=0)
    with pytest.raises(ValueError, match=r"latent_norm must be a number in .*, got nan"):
        TARFlow(POINTS, layers=[1], latent_norm=float("nan"))


def test_sizes_that_make_no_flow_are_refused():
    with pytest.raises(ValueError, match=r"layers must be a list of whole numbers, got \[\]: one for each block"):
        flow_sizes(None, [], None, None)
    with pytest.raises(ValueError, match="width must be one number or one for each of 4 blocks, got 2"):
        flow_sizes(None, None, [8, 8], None)
    with pytest.raises(ValueError, match=r"shallow_blocks must be >= 1, got 0"):
        deep_shallow_layers("18(1)", None, None, None)
    with pytest.raises(ValueError, match="permutations must name an order for each of 2 blocks, got 1"):
        build("tarflow", IMAGES, permutations=["identity"])
    with pytest.raises(ValueError, match="points have no patches: set patch_size=1, got 2"):
        TARFlow(POINTS, architecture="2-16-2-1", head_dim=8)


def test_the_papers_size_on_the_meta_device():
    """12 w^2 + 13 w a layer, the embedding of patches and positions, and the output layer, for each block."""
    with torch.device("meta"):
        flow = TARFlow(IMAGENET64, architecture="2-768-8-8", head_dim=64).flow
    w, tokens, dim = 768, 1024, 12
    layer = 12 * w**2 + 13 * w
    block = 8 * layer + dim * w + w + (tokens - 1) * w + w * 2 * dim + 2 * dim
    assert sum(p.numel() for p in flow.parameters()) == 8 * block
    assert all(p.is_meta for p in flow.parameters())


def test_each_block_has_the_size_that_is_named_for_it():
    flow = TARFlow(IMAGES, layers=[1, 2, 3], width=[8, 16, 24], head_dim=8, patch_size=2).flow
    networks = [block.network for block in flow.blocks if isinstance(block, AffineBlock)]
    assert [network.embed.out_features for network in networks] == [8, 16, 24]
    assert [len(network.blocks) for network in networks] == [1, 2, 3]
