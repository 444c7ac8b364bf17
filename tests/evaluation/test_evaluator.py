"""The evaluator through Lightning's trainer: its options, its draws and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import Evaluator, FrechetDistance, Wasserstein2, networks
from flowbench.families import Autoencoder
from flowbench.flows import GaussianSource
from flowbench.metrics import IdentityFeatures
from flowbench.networks import KLAutoencoder

from .evaluator_runs import digits, evaluator, flow, measured, points, quick, trainer


def test_conditional_flows_share_labels_drawn_by_the_evaluation_seed(tmp_path, monkeypatch):
    seen = []
    family = quick(flow("cfm", digits(), conditional=True))
    inner = family.flow_sample

    def watched(noise, condition, override):
        seen.append(condition.label)
        return inner(noise, condition, override)

    monkeypatch.setattr(family, "flow_sample", watched)
    trainer(tmp_path, evaluator(num_samples=300), limit_test_batches=1).test(family, digits(), verbose=False)
    labels = torch.cat(seen[1:])  # the first draw warms up
    counts = torch.bincount(labels, minlength=10).double()
    # As in the split: 108 of each class, within five standard deviations.
    assert ((counts - 30).abs() < 5 * math.sqrt(30)).all()


def test_contenders_draw_from_the_same_noise(tmp_path, monkeypatch):
    drawn = []
    inner = GaussianSource.sample_indexed
    monkeypatch.setattr(GaussianSource, "sample_indexed", lambda *a, **k: drawn.append(inner(*a, **k)) or drawn[-1])
    sets = []
    for name in ("cfm", "tarflow", "ot_cfm"):
        drawn.clear()
        measured(tmp_path / name, name, digits(), evaluator({"fd": FrechetDistance("identity")}, seed=4))
        sets.append(drawn[1].clone())
    assert sets[0].shape == (20, 1, 8, 8)
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_samples": 0}, "evaluator.num_samples must be a whole number in .*, got 0"),
        ({"batch_size": 0}, "evaluator.batch_size must be a whole number in .*, got 0"),
        ({"num_pictures": -1}, "evaluator.num_pictures must be a whole number in .*, got -1"),
        ({"num_trajectories": 0}, "evaluator.num_trajectories must be a whole number in .*, got 0"),
        ({"trajectory_points": 1}, "evaluator.trajectory_points must be a whole number in .*, got 1"),
        ({"reference": "test"}, "evaluator.reference and held_out are both test"),
        ({"sweep": {"steps": [1]}}, "evaluator.sweep goes over network_evaluations and guidance, got steps"),
        (
            {"sweep": {"network_evaluations": [1, 0]}},
            r"evaluator.sweep.network_evaluations\[1\] must be a number in \[1, .*, got 0",
        ),
        ({"curve": ["kid"]}, "evaluator.curve names kid, which is not in evaluator.metrics"),
    ],
)
def test_options_out_of_range(options, expected):
    with pytest.raises(ValueError, match=expected):
        evaluator(**options)


def test_likelihoods_that_cannot_be_measured_are_refused_before_the_work(tmp_path):
    run = trainer(tmp_path, evaluator(), inference_mode=True)
    with pytest.raises(ValueError, match=r"set trainer\.inference_mode=false"):
        run.test(flow("cfm", digits()), digits(), verbose=False)


def test_only_flows_are_measured(tmp_path):

    data = digits()
    other = Autoencoder(data.spec, lambda shape: KLAutoencoder(shape, latent_channels=2, width=8))
    with pytest.raises(ValueError, match="the evaluator measures flows, got Autoencoder"):
        trainer(tmp_path, evaluator()).fit(other, data)
    assert other.trainer.global_step == 0


def test_samples_are_drawn_in_full_precision_whatever_the_training(tmp_path):
    family, seen = quick(flow("cfm", points())), []
    family.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer(tmp_path, evaluator({"w2": Wasserstein2()}), limit_test_batches=1, precision="bf16-mixed").test(
        family, points(), verbose=False
    )
    assert seen
    assert not any(seen)


def test_reference_and_feature_networks_are_loaded_once_per_datamodule(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        networks, "get_extractor", lambda name, data, device: loaded.append(data) or IdentityFeatures(64, name)
    )
    evaluator = Evaluator({"fd": FrechetDistance("identity")})
    first, second = FlowDataModule("digits", seed=0), FlowDataModule("digits", seed=1)
    for data in (first, first, second):
        evaluator.extractors(data)
    assert loaded == [first, second]
