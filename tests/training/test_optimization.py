from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowbench.networks import CausalTransformer, TokenTransformer
from flowbench.training.optimization import OptimizerConfig, learning_rate_factor, parameter_groups


def test_only_matrices_are_decayed():
    module = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "table": nn.Embedding(3, 2)})
    decayed, kept = parameter_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module["linear"].weight)]
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert len(kept["params"]) == 4


def test_position_tables_and_start_tokens_are_not_decayed():
    flow = CausalTransformer(
        4, 2, 3, width=8, depth=1, head_dim=8, position="learned", start="learned", final_norm=True
    )
    score = TokenTransformer(4, 2, 3, width=8, depth=1, head_dim=8)
    module = nn.ModuleDict({"flow": flow, "score": score})
    decayed, kept = parameter_groups(module, 0.1)
    inside = {id(p) for p in decayed["params"]}
    assert inside == {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    assert len(inside) + len(kept["params"]) == len(list(module.parameters()))


def test_shared_and_frozen_parameters():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups(nn.ModuleList([a, b, frozen]), 0.1)
    assert sum(len(group["params"]) for group in groups) == 1


@given(progress=st.floats(0, 1), warmup=st.floats(0, 0.9), final=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_factor_lies_between_zero_and_one(progress, warmup, final):
    config = OptimizerConfig(warmup_fraction=warmup, final_fraction=final)
    assert 0.0 <= learning_rate_factor(config, progress) <= 1.0


def test_schedule_agrees_with_torch():
    """Warm-up by LinearLR and cosine by CosineAnnealingLR, an independent implementation."""
    steps, warmup = 100, 20
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=0.1)
    config = OptimizerConfig(warmup_fraction=warmup / steps, final_fraction=0.1)
    for step in range(warmup, steps):
        assert learning_rate_factor(config, step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert learning_rate_factor(config, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(OptimizerConfig(schedule="constant"), 0.9) == 1.0


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"warmup_fraction": 1.0}, {"final_fraction": 2.0}, {"schedule": "linear"}]
)
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match="optimizer\\."):
        OptimizerConfig(**options)
