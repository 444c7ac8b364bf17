"""Guided inverses of autoregressive flows against quadrature and brute force, and what an inverse costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowbench.flows.autoregressive import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    InverseStats,
)
from flowbench.networks.causal_transformer import CausalTransformer

from .autoregressive_builders import make_flow, make_network, normal

STARTS = ["learned", "zero"]


def test_scale_one_and_equal_branches_change_nothing():
    flow, z, label = make_flow(2), normal(3, 6, 2), torch.tensor([0, 1, 2])
    expected = flow.inverse(z, label)
    assert flow.inverse(z, label, AutoregressiveGuidance(1.0)).equal(expected)
    null = torch.full((3,), 3)
    for scale in (1.5, 4.0, 1e3):
        torch.testing.assert_close(
            flow.inverse(z, null, AutoregressiveGuidance(scale)), flow.inverse(z), rtol=0, atol=1e-10
        )
    assert (flow.inverse(z, label, AutoregressiveGuidance(2.0)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("blocks", ["all", "deep"])
def test_huge_guidance_is_finite(blocks):
    flow = make_flow(2, scale="softplus", soft_clip=4.0, std=0.3, final_norm=True).float()
    x = flow.inverse(normal(3, 6, 2).float(), torch.tensor([0, 1, 2]), AutoregressiveGuidance(1e4, blocks))
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


def test_guidance_uses_each_branch_on_the_guided_tokens():
    """Against the naive inverse with two full passes per token."""
    torch.manual_seed(1)
    block, z, weight = AffineBlock(make_network(std=0.2), "flip"), normal(2, 6, 2), 1.7
    label, flipped, x = torch.tensor([0, 2]), z.flip(1), torch.zeros_like(z)
    with torch.no_grad():
        for i in range(6):
            mean_c, a_c = block.network(x, label)[:, i].chunk(2, -1)
            mean_u, a_u = block.network(x, None)[:, i].chunk(2, -1)
            ratio = (2 * (a_c - a_u)).exp().clamp(max=1)
            precision = (1 + weight * (1 - ratio)) / (2 * a_c).exp()
            mean = mean_c + weight * ratio / (1 + weight * (1 - ratio)) * (mean_c - mean_u)
            x[:, i] = mean + flipped[:, i] / precision.sqrt()
    torch.testing.assert_close(block.inverse(z, label, weight), x.flip(1), rtol=0, atol=1e-11)


def test_deep_guidance_touches_the_last_block_only():
    flow, z, label = make_flow(3), normal(2, 6, 2), torch.tensor([0, 1])
    x = flow.blocks[2].inverse(z, label, 1.5)
    for block in (flow.blocks[1], flow.blocks[0]):
        x = block.inverse(x, label)
    assert flow.inverse(z, label, AutoregressiveGuidance(2.5, "deep")).equal(x)


def starflow() -> AutoregressiveFlow:
    """A conditional deep block above two unconditional shallow ones."""
    torch.manual_seed(0)
    return AutoregressiveFlow(
        AffineBlock(make_network(num_classes=classes, depth=depth), order, "softplus", 4.0)
        for classes, depth, order in [(None, 1, "identity"), (None, 1, "flip"), (3, 4, "identity")]
    )


def test_labels_reach_conditional_blocks_only():
    flow, x, label = starflow(), normal(2, 6, 2), torch.tensor([0, 1])
    with_label, without = flow.states(x, label), flow.states(x)
    assert with_label[:3].equal(without[:3])
    assert (with_label[3] - without[3]).abs().max() > 1e-4
    torch.testing.assert_close(flow.inverse(with_label[-1], label), x, rtol=0, atol=1e-11)
    both = (AutoregressiveGuidance(3.0, "deep"), AutoregressiveGuidance(3.0, "all"))
    assert flow.inverse(x, label, both[0]).equal(flow.inverse(x, label, both[1]))


def test_stats_weigh_blocks_by_their_parameters():
    flow = starflow()
    sizes = [sum(p.numel() for p in block.parameters()) for block in flow.blocks]
    assert flow.inverse_stats() == InverseStats(1.0, 18)
    guided = flow.inverse_stats(AutoregressiveGuidance(2.0, "deep"))
    assert guided.sequential_steps == 18
    assert guided.network_evaluations == pytest.approx(1 + sizes[2] / sum(sizes))
    assert make_flow(3).inverse_stats(AutoregressiveGuidance(2.0)) == InverseStats(2.0, 18)
    assert make_flow(3).inverse_stats(AutoregressiveGuidance(1.0)) == InverseStats(1.0, 18)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("guidance", [None, AutoregressiveGuidance(2.0)])
def test_stats_count_what_runs(start, guidance):
    flow, rows = make_flow(2, start=start), []
    for block in flow.blocks:
        block.network.blocks[0].mlp.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    flow.inverse(normal(3, 6, 2), torch.tensor([0, 1, 2]), guidance)
    stats = flow.inverse_stats(guidance)
    assert len(rows) == stats.sequential_steps
    assert set(rows) == {3 * stats.network_evaluations}
