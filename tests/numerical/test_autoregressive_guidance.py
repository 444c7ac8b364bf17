"""Guided inverses of autoregressive flows against quadrature and brute force."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import nn

from flowbench.flows import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    GuidanceRule,
    JacobiInverse,
    SequentialInverse,
)
from flowbench.networks.causal_transformer import CausalTransformer

from .autoregressive_builders import make_flow, make_network, normal, starflow

RULES = get_args(GuidanceRule)
METHODS = [SequentialInverse(), JacobiInverse(0.0), JacobiInverse(0.0, 4)]


def by_hand(rule, w, mean_c, a_c, mean_u, a_u):
    """Mean and std from means and log stds, as the papers write the rules."""
    std_c, std_u = a_c.exp(), a_u.exp()
    if rule == "log-scale":
        return mean_c + w * (mean_c - mean_u), (a_c + w * (a_c - a_u)).exp()
    if rule == "linear":
        std = (1 + w) * std_c - w * std_u
        return mean_c + w * (mean_c - mean_u), torch.where(std > std_c / (1 + w), std, std_c / (1 + w))
    ratio = (std_c / std_u).square().clamp(max=1)
    precision = (1 + w - w * ratio) / std_c.square()
    return ((1 + w) * mean_c - w * ratio * mean_u) / (1 + w - w * ratio), precision.rsqrt()


@pytest.mark.parametrize("rule", RULES)
def test_scale_one_and_equal_branches_change_nothing(rule):
    flow, z, label = make_flow(2), normal(3, 6, 2), torch.tensor([0, 1, 2])
    expected = flow.inverse(z, label)
    assert flow.inverse(z, label, AutoregressiveGuidance(1.0, rule)).equal(expected)
    null = torch.full((3,), 3)
    for scale in (1.5, 4.0, 1e3):
        torch.testing.assert_close(
            flow.inverse(z, null, AutoregressiveGuidance(scale, rule)), flow.inverse(z), rtol=0, atol=1e-10
        )
    assert (flow.inverse(z, label, AutoregressiveGuidance(2.0, rule)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("blocks", ["all", "deep"])
def test_huge_guidance_is_finite(blocks):
    flow = make_flow(2, scale="softplus", soft_clip=4.0, std=0.3, final_norm=True).float()
    x = flow.inverse(normal(3, 6, 2).float(), torch.tensor([0, 1, 2]), AutoregressiveGuidance(1e4, blocks=blocks))
    assert x.isfinite().all()


def table_network(mean_c, std_c, mean_u, std_u) -> CausalTransformer:
    """One scalar token whose Gaussian is chosen: class 0 and the null label."""
    net = CausalTransformer(1, 1, 1, width=2, depth=1, head_dim=2).double()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        net.label_embedding.weight.copy_(torch.tensor([[mean_c, math.log(std_c)], [mean_u, math.log(std_u)]]))
        net.out.weight.copy_(torch.eye(2))
    return net


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.0])
@pytest.mark.parametrize(("std_c", "std_u"), [(0.5, 1.5), (0.9, 1.0), (1.2, 1.2)])
def test_guided_sampling_law_is_the_product_on_a_grid(weight, std_c, std_u):
    mean_c, mean_u = 0.7, -0.4
    block = AffineBlock(table_network(mean_c, std_c, mean_u, std_u))
    grid = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    conditional, marginal = (
        torch.distributions.Normal(mean_c, std_c),
        torch.distributions.Normal(mean_u, std_u),
    )
    product = torch.softmax((1 + weight) * conditional.log_prob(grid) - weight * marginal.log_prob(grid), dim=0)
    mean = (product * grid).sum()
    std = (product * (grid - mean).square()).sum().sqrt()
    z = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    x = AutoregressiveFlow([block]).inverse(
        z[:, None, None], torch.zeros(3, dtype=torch.long), AutoregressiveGuidance(1 + weight)
    )
    torch.testing.assert_close(x.flatten(), mean + std * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_guidance_uses_each_branch_on_the_guided_tokens(rule, annealed):
    """Against the naive inverse with two full passes per token."""
    torch.manual_seed(1)
    block, z, weight = AffineBlock(make_network(std=0.05), "flip"), normal(2, 6, 2), 1.7
    label, flipped, x = torch.tensor([0, 2]), z.flip(1), torch.zeros_like(z)
    with torch.no_grad():
        for i in range(6):
            mean_c, a_c = block.network(x, label)[:, i].chunk(2, -1)
            mean_u, a_u = block.network(x, None)[:, i].chunk(2, -1)
            w = weight * i / 5 if annealed else weight
            mean, std = by_hand(rule, w, mean_c, a_c, mean_u, a_u)
            x[:, i] = mean + flipped[:, i] * std
    flow, guidance = AutoregressiveFlow([block]), AutoregressiveGuidance(1 + weight, rule, annealed=annealed)
    for method in METHODS:
        torch.testing.assert_close(flow.inverse(z, label, guidance, method), x.flip(1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("conditional", [False, True])
def test_temperature_guides_without_labels_too(conditional):
    """The second branch is the network at that temperature, with the null label where there is one."""
    torch.manual_seed(1)
    block = AffineBlock(make_network(std=0.2, num_classes=3 if conditional else None))
    z, x, label = (
        normal(2, 6, 2),
        torch.zeros(2, 6, 2, dtype=torch.float64),
        torch.tensor([0, 2]) if conditional else None,
    )
    with torch.no_grad():
        for i in range(6):
            first = block.network(x, label)[:, i].chunk(2, -1)
            second = block.network(x, None, temperature=0.3)[:, i].chunk(2, -1)
            mean, std = by_hand("product", 1.5, *first, *second)
            x[:, i] = mean + z[:, i] * std
    flow, guidance = AutoregressiveFlow([block]), AutoregressiveGuidance(2.5, temperature=0.3)
    for method in METHODS:
        torch.testing.assert_close(flow.inverse(z, label, guidance, method), x, rtol=0, atol=1e-11)
    assert (flow.inverse(z, label) - x).abs().max() > 1e-3


def test_a_temperature_near_one_is_no_guidance_without_labels():
    flow, z = make_flow(2, num_classes=None, std=0.2), normal(3, 6, 2)
    guided = flow.inverse(z, None, AutoregressiveGuidance(3.0, temperature=1 + 1e-12))
    torch.testing.assert_close(guided, flow.inverse(z), rtol=0, atol=1e-9)


def test_a_temperature_of_one_is_plain_guidance():
    flow, z, label = make_flow(2, scale="softplus", soft_clip=4.0, std=0.1), normal(3, 6, 2), torch.tensor([0, 1, 2])
    for method in METHODS:
        plain = flow.inverse(z, label, AutoregressiveGuidance(3.0), method)
        tempered = flow.inverse(z, label, AutoregressiveGuidance(3.0, temperature=1.0), method)
        torch.testing.assert_close(tempered, plain, rtol=0, atol=1e-12)


def test_annealing_grows_from_none_to_the_whole_weight():
    guidance = AutoregressiveGuidance(3.0, annealed=True)
    like = torch.zeros(1, dtype=torch.float64)
    assert guidance.weights(0, 5, 5, like).flatten().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [guidance.weights(i, i + 1, 5, like) for i in range(5)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert guidance.weights(0, 1, 1, like) == 2.0
    assert AutoregressiveGuidance(3.0).weights(0, 5, 5, like) == 2.0


def test_names_tell_all_that_samples_depend_on():
    assert AutoregressiveGuidance().name == ""
    assert AutoregressiveGuidance(3.0).name == "guidance[product,3]"
    options = {"rule": "linear", "blocks": "deep", "annealed": True, "temperature": 0.3}
    assert AutoregressiveGuidance(1.5, **options).name == "guidance[linear,1.5,deep,annealed,temperature=0.3]"
    near = AutoregressiveGuidance(2.0000001, temperature=0.30000001)
    assert near.name == "guidance[product,2.0000001,temperature=0.30000001]"
    # Without a weight nothing else matters, and stays for a scale to come.
    none = AutoregressiveGuidance(1.0, **options)
    assert none.name == ""
    assert dataclasses.replace(none, scale=1.5) == AutoregressiveGuidance(1.5, **options)


def test_null_is_the_same_vector_in_training_and_sampling():
    flow, x, label = make_flow(2), normal(4, 6, 2), torch.tensor([0, 3, 2, 3])
    z, logdet = flow(x, label)
    null = torch.full((4,), 3)
    for row, alone in ((1, flow(x)), (3, flow(x, null))):
        torch.testing.assert_close((z[row], logdet[row]), (alone[0][row], alone[1][row]), rtol=0, atol=1e-12)
    back = flow.inverse(z, label)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(flow.inverse(z[1::2]), x[1::2], rtol=0, atol=1e-11)


def test_deep_guidance_touches_the_last_block_only():
    flow, z, label = make_flow(3), normal(2, 6, 2), torch.tensor([0, 1])
    x = AutoregressiveFlow([flow.blocks[2]]).inverse(z, label, AutoregressiveGuidance(2.5))
    for block in (flow.blocks[1], flow.blocks[0]):
        x = block.inverse(x, label)
    assert flow.inverse(z, label, AutoregressiveGuidance(2.5, blocks="deep")).equal(x)


def test_labels_reach_conditional_blocks_only():
    flow, x, label = starflow(), normal(2, 6, 2), torch.tensor([0, 1])
    with_label, without = flow.states(x, label), flow.states(x)
    assert with_label[:3].equal(without[:3])
    assert (with_label[3] - without[3]).abs().max() > 1e-4
    torch.testing.assert_close(flow.inverse(with_label[-1], label), x, rtol=0, atol=1e-11)
    both = (AutoregressiveGuidance(3.0, blocks="deep"), AutoregressiveGuidance(3.0, blocks="all"))
    assert flow.inverse(x, label, both[0]).equal(flow.inverse(x, label, both[1]))
