"""Rows that the evaluator writes, end to end and against values found by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.evaluation import CostReport, FrechetDistance
from flowbench.families import Autoencoder, Condition, GaussianNoise, STARFlow, Tweedie
from flowbench.flows import DormandPrince, RungeKutta4
from flowbench.networks import KLAutoencoder
from flowbench.tasks.generation import Reconstruction

from ..contract.builders import perturb
from .evaluator_runs import (
    digits,
    evaluator,
    flow,
    image_metrics,
    measured,
    point_metrics,
    points,
    quick,
    rows_of,
    trainer,
)

PROVENANCE = {
    "git_sha", "config_hash", "versions", "hardware", "world_size", "global_batch", "samples_seen", "train_seconds",
    "train_flops", "peak_memory_mb", "parameters", "threads", "evaluation_seed", "dataset_version", "extractors",
}  # fmt: skip


def values(rows: dict) -> dict:
    costs = {"parameters", "train_flops", "train_seconds", "samples_seen", "peak_memory", "samples_per_second"}
    costs |= {"step_milliseconds", "flop_utilisation"}
    return {key: row.value for key, row in rows.items() if key[0] not in costs}


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_digits_end_to_end(tmp_path, name):
    measure = evaluator(sweep={"network_evaluations": [1, 2, 4]})
    found = measured(tmp_path, name, digits(), measure)
    continuous = name == "cfm"
    swept = {("fd[identity]", n) for n in (1, 2, 4)} if continuous else set()
    assert {key for key in found if key[1] is not None} == swept
    for n in (1, 2, 4) if continuous else ():
        assert found["fd[identity]", n].network_evaluations == n
    main = {key[0]: row for key, row in found.items() if key[1] is None}
    # Nothing of the training, of which there was none.
    assert set(main) == {
        "fd[identity]", "nll", "straightness", "path_energy", "displacement", "path_length_ratio",
        "parameters", "peak_memory", "samples_per_second", "network_evaluations", "optimizer_state_bytes",
        *(("curvature", "one_step_error", "nll_error") if continuous else ()),
    }  # fmt: skip
    assert (main["fd[identity]"].n, main["fd[identity]"].protocol) == (20, "identity/train-1077/20")
    assert (main["nll"].n, main["nll"].unit) == (360, "bits/dim")
    assert main["nll"].protocol.startswith("ode/test/360" if continuous else "exact/test/360")
    assert (main["straightness"].n, main["straightness"].unit) == (6, "squared data units")
    assert main["network_evaluations"].value == (4 if continuous else 1)
    assert main["parameters"].value == sum(p.numel() for p in flow(name, digits()).parameters())
    assert main["path_energy"].value == pytest.approx(main["straightness"].value + main["displacement"].value)
    row = main["fd[identity]"]
    assert (row.bench, row.problem, row.contender, row.seed, row.weights) == ("b", "t", "c", 3, "ema")
    assert (row.dataset, row.family) == ("digits", "FlowMatching" if continuous else "TARFlow")
    assert PROVENANCE <= set(row.provenance)
    assert (row.provenance["config_hash"], row.provenance["global_batch"]) == ("abc", 16)
    saved = np.load(tmp_path / "samples.npz")["x"]
    assert (saved.shape, saved.dtype) == ((4, 1, 8, 8), np.uint8)
    paths = np.load(tmp_path / "trajectories.npz")
    assert paths["states"].shape[1:] == (4, 1, 8, 8)
    assert len(paths["states"]) == len(paths["times"]) == (5 if continuous else 3)


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_points_end_to_end(tmp_path, name, monkeypatch):
    monkeypatch.setattr("flowbench.tasks.generation.paths.TRANSPORT_POINTS", 100)
    measure = evaluator(point_metrics(), reference="val", sweep={"network_evaluations": [2]})
    found = measured(tmp_path, name, points(), measure)
    assert (found["w2", None].n, found["w2", None].protocol) == (20, "points/val-20/20")
    assert (found["nll", None].n, found["nll", None].unit) == (100, "nats")
    assert (("w2", 2.0) in found) == (name == "cfm")
    npe, energy = found["npe", None], found["path_energy", None].value
    reference = float(npe.protocol.split("=")[1])
    assert npe.value == pytest.approx((energy - reference) / reference, abs=1e-3)
    assert np.load(tmp_path / "samples.npz")["x"].shape == (20, 2)


def test_fd_through_the_evaluator_is_the_hand_computed_one(tmp_path):
    """Samples drawn by hand from the same indices; the trace of the root by the eigenvalues of the product."""
    data, measure = digits(), evaluator({"fd": FrechetDistance("identity")}, num_samples=150, seed=11)
    found = measured(tmp_path, "tarflow", data, measure)
    family = flow("tarflow", data)
    drawn = family.sample(family.draw_noise(torch.arange(150), 11)).x
    sides = [data.spec.to_uint8(x).double().flatten(1).numpy() for x in (drawn, data.model_values("train"))]
    (m1, c1), (m2, c2) = ((s.mean(0), np.cov(s, rowvar=False)) for s in sides)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2)
    expected -= 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()
    assert found["fd[identity]", None].value == pytest.approx(expected, rel=1e-6)


def test_nll_of_a_flow_that_is_the_identity_is_the_normal_density(tmp_path):
    data = digits()
    family = flow("cfm", data)
    with torch.no_grad():
        for parameter in family.network.parameters():
            parameter.zero_()
    trainer(tmp_path, evaluator()).test(quick(family), data, verbose=False)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(data.model_values("test").double()).flatten(1).sum(1)
    expected = -normal.mean() / 64 / math.log(2) - math.log2(2 / 17)
    found = rows_of(tmp_path)
    assert found["nll", None].value == pytest.approx(float(expected), rel=1e-6)
    assert found["straightness", None].value == 0.0
    assert found["path_length_ratio", None].value == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_floor_of_a_latent_family(tmp_path, noise):
    data, measure = digits(), evaluator(image_metrics() | {"floor": Reconstruction("identity")})
    torch.manual_seed(0)
    autoencoder = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8)).eval()
    noisy = {"augmentation": GaussianNoise(noise), "denoiser": Tweedie()} if noise else {}
    family = STARFlow(data.spec, autoencoder=autoencoder, width=16, head_dim=8, deep_layers=1, **noisy)
    perturb(family)
    trainer(tmp_path, measure, limit_test_batches=1).test(family, data, verbose=False)
    found = {row.metric: row for row in read_rows(tmp_path / "rows.jsonl")}

    x = data.model_values("test", slice(20))
    z = family.space.reconstruct(
        x, index=torch.arange(20), seed=0, denoise=partial(family.flow_denoise, condition=Condition())
    ).clamp(-1, 1)
    error = (x - z).square().flatten(1).mean(1)
    row = found["reconstruction_psnr"]
    assert row.value == pytest.approx(float((10 * torch.log10(4 / error)).mean()), rel=1e-5)
    assert (row.n, row.unit, row.protocol) == (20, "dB", "test/20")
    assert found["reconstruction_fd[identity]"].protocol == found["fd[identity]"].protocol
    assert found["reconstruction_fd[identity]"].value != found["fd[identity]"].value
    clean = {name: found[name].value for name in ("reconstruction_psnr", "reconstruction_fd[identity]")}
    assert all(math.isfinite(value) for value in clean.values())


def test_flows_in_data_space_have_no_reconstructions(tmp_path):
    found = measured(tmp_path, "cfm", digits(), evaluator(image_metrics() | {"floor": Reconstruction("identity")}))
    assert not [metric for metric, _ in found if "reconstruction" in metric]


@pytest.mark.parametrize("name", ["cfm", pytest.param("tarflow", marks=pytest.mark.slow)])
def test_the_batch_size_of_the_evaluator_changes_no_number(tmp_path, name):
    small, large = (
        values(measured(tmp_path / str(b), name, digits(), evaluator(batch_size=b, sweep={"network_evaluations": [2]})))
        for b in (3, 64)
    )
    assert small.keys() == large.keys()
    for key, value in small.items():
        assert value == pytest.approx(large[key], rel=2e-5), key


def test_the_likelihoods_protocol_is_that_of_flow_and_data(tmp_path):
    data = FlowDataModule("digits", batch_size=16, dequantize="none")
    found = measured(tmp_path, "cfm", data, evaluator(), conditional=True)
    assert found["nll", None].protocol == (
        "ode/test/360/given-label/bin-centres-17-levels/RungeKutta4(num_steps=1)"
        "/HutchinsonDivergence(num_probes=2, distribution='rademacher')"
    )


def test_the_cost_of_an_adaptive_sampler_is_the_mean_over_its_batches(tmp_path):
    family = flow("cfm", points(), solver=DormandPrince())
    costs = []
    solve = family.sample

    def counted(noise, *args, **options):
        drawn = solve(noise, *args, **options)
        drawn = replace(drawn, network_evaluations=drawn.network_evaluations + 10.0 * len(costs))
        costs.append((len(noise), drawn.network_evaluations))
        return drawn

    family.sample = counted
    family.likelihood_solver = RungeKutta4(num_steps=1)
    measure = evaluator({"cost": CostReport()}, num_samples=5, batch_size=3)
    trainer(tmp_path, measure, limit_test_batches=1).test(family, points(), verbose=False)
    (_, first), (_, second) = costs[1:]  # the first call warms up
    assert first != second
    assert rows_of(tmp_path)["network_evaluations", None].value == pytest.approx((3 * first + 2 * second) / 5)
