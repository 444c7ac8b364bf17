"""Networks with dropout through the evaluator: measured without it, trained with it."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from flowbench.families import FlowMatching
from flowbench.flows import Midpoint, RungeKutta4
from flowbench.networks import UNet
from flowbench.tasks.generation import TrainingPairs

from ..contract.builders import perturb
from .evaluator_runs import digits, evaluator, image_metrics, rows_of, trainer

DROPOUT = 0.5
QUALITY = {"fd[identity]", "nll", "straightness", "path_energy", "displacement", "path_length_ratio", "cost_ratio"}


def flow(dropout: float, data) -> FlowMatching:
    torch.manual_seed(0)
    network = partial(UNet, channels=8, num_heads=2, num_res_blocks=1, dropout=dropout)
    made = FlowMatching(data.spec, network, solver=Midpoint(num_steps=2), likelihood_solver=RungeKutta4(num_steps=1))
    perturb(made)
    made.ema.update()
    return made


def switches(module: nn.Module) -> list[nn.Dropout]:
    found = [part for part in module.modules() if isinstance(part, nn.Dropout)]
    assert found
    return found


@pytest.mark.parametrize("weights", ["ema", pytest.param("raw", marks=pytest.mark.slow)])
def test_measurements_are_those_of_the_network_without_dropout(tmp_path, weights):
    found = {}
    for name, dropout in (("with", DROPOUT), ("again", DROPOUT), ("without", 0.0)):
        data = digits()
        family = flow(dropout, data).train()
        measure = evaluator(
            image_metrics() | {"pairs": TrainingPairs(64)}, weights=weights, sweep={"network_evaluations": [2]}
        )
        trainer(tmp_path / name, measure, limit_test_batches=1).test(family, data, verbose=False)
        assert all(part.training for part in family.network.modules())
        found[name] = {key: row.value for key, row in rows_of(tmp_path / name).items() if key[0] in QUALITY}
    assert {name for name, _ in found["with"]} == QUALITY
    assert ("fd[identity]", 2.0) in found["with"]
    assert found["with"] == found["again"] == found["without"]


@pytest.mark.parametrize("training", [True, False])
def test_samples_densities_and_paths_repeat_themselves_and_the_mode_comes_back(training):
    data = digits()
    family = flow(DROPOUT, data).train(training)
    noise, x = family.draw_noise(torch.arange(4), 0), data.model_values("test", slice(4))
    found = []
    for _ in range(2):
        with family.evaluating("ema"), torch.no_grad():
            path = family.trajectory(noise, None, 3)
            found.append((family.sample(noise).x, family.log_prob(x), path.states, family.encode(x)))
        assert all(part.training is training for part in family.modules())
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    # Without the evaluation mode the same calls do depend on what is dropped.
    family.train()
    with torch.no_grad():
        assert not torch.equal(family.sample(noise).x, family.sample(noise).x)


class Watch(L.Callback):
    """Remembers in which mode the dropout layers work, in the steps of training and elsewhere."""

    def __init__(self, family: nn.Module) -> None:
        self.stepping = False
        self.seen: set[tuple[bool, bool]] = set()
        for part in switches(family):
            part.register_forward_pre_hook(lambda part, _: self.seen.add((self.stepping, part.training)))

    def on_train_batch_start(self, *_) -> None:
        self.stepping = True

    def on_train_batch_end(self, *_) -> None:
        self.stepping = False


def test_training_drops_and_what_is_measured_in_between_does_not(tmp_path):
    data = digits()
    family = flow(DROPOUT, data)
    watch = Watch(family)
    measure = evaluator(image_metrics(), curve=["fd"])
    before = [p.detach().clone() for p in family.parameters()]
    trainer(tmp_path, None, callbacks=[watch, measure], max_steps=4).fit(family, data)
    assert any(not torch.equal(p, q) for p, q in zip(before, family.parameters(), strict=True))
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    assert watch.seen == {(True, True), (False, False)}
