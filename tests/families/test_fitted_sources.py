"""Fitted sources inside a flow: they are trained with, travel in checkpoints, and replace a Gaussian after training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from flowbench.data import Batch, FlowDataModule
from flowbench.families import Condition, FlowMatching
from flowbench.flows import GaussianSource
from flowbench.flows.source.pruned import PrunedSource
from flowbench.flows.source.radial import NormAlignedSource, RadialSource
from flowbench.flows.source.von_mises_fisher import VonMisesFisherSource
from flowbench.networks import MLP
from flowbench.training import load_checkpoint
from flowbench.training.checkpoint import read_checkpoint

ARCS = FlowDataModule("chi_arcs")


def matching(**options) -> FlowMatching:
    torch.manual_seed(0)
    return FlowMatching(ARCS.spec, partial(MLP, width=16, depth=1, zero_output=False), **options)


def saved(module: FlowMatching, path: Path) -> Path:
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_a_source_that_is_not_fitted_adds_no_key():
    assert not [key for key in matching().state_dict() if "source" in key]
    assert not [key for key in matching(source=GaussianSource(2.0)).state_dict() if "source" in key]


@pytest.mark.parametrize("source", [NormAlignedSource, lambda: VonMisesFisherSource(20.0, centres=3)])
def test_training_uses_the_fitted_source_and_its_checkpoint_brings_it_back(source, tmp_path: Path):
    module = matching(source=source())
    with pytest.raises(ValueError, match="is not fitted"):
        module.draw_noise(torch.arange(3), 0)
    module.fit_to(ARCS, training=True)
    x = ARCS.model_values("train")[:64]
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    optimizer = torch.optim.SGD(module.network.parameters(), lr=0.1)
    module.loss(x, Condition(), Batch(x), torch.Generator().manual_seed(0)).total.backward()
    optimizer.step()
    assert any(not torch.equal(before[name], p) for name, p in module.network.named_parameters())
    assert read_checkpoint(saved(module, tmp_path / "a.ckpt"))
    again = matching(source=source())
    load_checkpoint(again, tmp_path / "a.ckpt")
    noise = again.draw_noise(torch.arange(9), 0)
    assert torch.equal(noise, module.draw_noise(torch.arange(9), 0))
    assert torch.equal(again.sample(noise).x, module.sample(noise).x)


def test_a_trained_model_is_sampled_from_a_pruned_source(tmp_path: Path):
    chi = {"dof": 3072, "scale": 1 / 30}
    trained = matching(source=RadialSource(**chi))
    path = saved(trained, tmp_path / "trained.ckpt")
    pruned = PrunedSource(0.9, quantile=0.25, source=RadialSource(**chi))
    module = matching(source=RadialSource(**chi), sampling_source=pruned)
    load_checkpoint(module, path)
    assert pruned.needs_fit
    module.fit_to(ARCS, training=False)
    noise, plain = module.draw_noise(torch.arange(200), 0), trained.draw_noise(torch.arange(200), 0)
    cosine = torch.nn.functional.normalize(noise.double()) @ pruned.pruned_axes.T
    assert float(cosine.max()) <= 0.9 + 1e-6
    same = (noise == plain).all(1)
    assert float(same.double().mean()) == pytest.approx(pruned.acceptance_rate.value, abs=0.1)
    assert torch.equal(module.sample(noise[same]).x, trained.sample(plain[same]).x)
    assert "\n" not in module.describe().sampler
