"""Every family under every optimiser with a rule for matrices: what moves, and who moves it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from flowbench.training import SGD, SWAN, SinkGD, TrainingConfig

from .builders import CASES, IDS, PARAMETERS, batch_of, build, late

every_family = pytest.mark.parametrize(("name", "spec"), PARAMETERS)
# All route parameters alike, and the direction of a matrix, in which they differ, does not depend on the family: under
# SWAN and SGD most families are slow tests.
RULES = {"sinkgd": SinkGD(lr=1e-2), "swan": SWAN(lr=1e-2), "sgd": SGD(lr=1e-2)}
ONE_OF_A_KIND = {"tarflow-images", "starflow-images", "cfm-points"}
STEPS = [
    pytest.param(*case, rule, id=f"{rule_name}-{own}", marks=marks)
    for case, own in zip(CASES, IDS, strict=True)
    for rule_name, rule in RULES.items()
    for marks in [[pytest.mark.slow] if rule_name != "sinkgd" and own not in ONE_OF_A_KIND else late(own)]
]


@pytest.mark.parametrize(("name", "spec", "rule"), STEPS)
def test_one_step_of_the_trainer_moves_every_parameter(name, spec, rule):
    module = build(name, spec, training=TrainingConfig(rule))
    before = {k: v.clone() for k, v in module.named_parameters()}
    loader = torch.utils.data.DataLoader([batch_of(spec, 32, seed=s) for s in range(2)], batch_size=None)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    for key, parameter in module.named_parameters():
        assert not torch.equal(before[key], parameter), key
        assert torch.isfinite(parameter).all(), key


@every_family
def test_every_parameter_is_in_one_group_and_ends_are_no_matrices(name, spec):
    module = build(name, spec, conditional=True)
    groups = SinkGD().build(module).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in module.parameters())
    matrices = {id(parameter) for parameter in groups[0]["params"]}
    inner = {key: m for key, m in module.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in matrices}
    assert len(inner) == len(matrices)
    # Layers of transformers and of residual networks; never the first or last layer, nor the embedding of times.
    assert all(".blocks." in key or ".layers." in key for key in inner), sorted(inner)
    widths = {8, 16, 24, 32, 48, 64, 96}  # of hidden layers, none of data, times or labels
    assert all(set(layer.weight.shape) <= widths for layer in inner.values())
