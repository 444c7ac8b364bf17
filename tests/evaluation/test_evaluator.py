"""The evaluator through Lightning's trainer."""

from __future__ import annotations

import json
import math
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowbench.data import FlowDataModule
from flowbench.evaluation import (
    CostReport,
    Evaluator,
    FrechetDistance,
    Identity,
    NegativeLogLikelihood,
    PathStraightness,
    Reconstruction,
    Wasserstein2,
)
from flowbench.evaluation import evaluator as module
from flowbench.families import Autoencoder, Budget, BudgetLimit, GaussianNoise, STARFlow, Tweedie
from flowbench.flows import ClassifierFreeGuidance, DormandPrince, GaussianSource, Midpoint, RungeKutta4
from flowbench.metrics import IdentityFeatures
from flowbench.networks import KLAutoencoder
from flowbench.rows import read_rows

from ..contract.builders import build, perturb

PROVENANCE = {
    "git_sha", "config_hash", "versions", "hardware", "world_size", "global_batch", "samples_seen", "train_seconds",
    "train_flops", "peak_memory_mb", "parameters", "threads", "evaluation_seed", "dataset_version", "extractors",
}  # fmt: skip


def digits() -> FlowDataModule:
    return FlowDataModule("digits", batch_size=16)


def points() -> FlowDataModule:
    return FlowDataModule("eight_gaussians", batch_size=16, eval_batch_size=100)


def flow(name: str, data: FlowDataModule, **options):
    return build(name, data.spec, **options)


def image_metrics(features: str = "identity") -> dict:
    return {
        "fd": FrechetDistance(features),
        "nll": NegativeLogLikelihood(),
        "paths": PathStraightness(),
        "cost": CostReport(),
    }


def point_metrics() -> dict:
    return {"w2": Wasserstein2(), "nll": NegativeLogLikelihood(), "paths": PathStraightness(), "cost": CostReport()}


def evaluator(metrics: dict | None = None, **options) -> Evaluator:
    settings = {"num_samples": 20, "num_trajectories": 6, "trajectory_points": 5, "num_pictures": 4}
    made = Evaluator(image_metrics() if metrics is None else metrics, **{**settings, **options})
    made.identity = Identity(bench="b", task="t", contender="c", seed=3, config_hash="abc")
    return made


def trainer(tmp_path, measure: Evaluator | None, **options) -> L.Trainer:
    settings = {
        "max_steps": 6,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "inference_mode": False,
        "default_root_dir": tmp_path,
        "callbacks": [measure] if measure else [],
    }
    return L.Trainer(**{**settings, **options})


def quick(family):
    """Small solvers for the continuous families."""
    if hasattr(family, "solver"):
        family.solver, family.likelihood_solver = Midpoint(num_steps=2), RungeKutta4(num_steps=1)
    return family


def rows_of(tmp_path) -> dict:
    return {
        (r.metric, r.network_evaluations if "sweep" in r.protocol else None): r
        for r in read_rows(tmp_path / "rows.jsonl")
    }


def measured(tmp_path, name: str, data: FlowDataModule, measure: Evaluator, **options) -> dict:
    trainer(tmp_path, measure, limit_test_batches=1).test(quick(flow(name, data, **options)), data, verbose=False)
    return rows_of(tmp_path)


def values(rows: dict) -> dict:
    costs = {"parameters", "train_flops", "train_seconds", "samples_seen", "peak_memory", "samples_per_second"}
    costs.add("step_milliseconds")
    return {key: row.value for key, row in rows.items() if key[0] not in costs}


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
        x, index=torch.arange(20), seed=0, denoise=partial(family.flow_denoise, label=None)
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


def test_a_sweep_over_guidance(tmp_path):
    measure = evaluator(sweep={"guidance": [1, 3]})
    measured(tmp_path, "cfm", digits(), measure, conditional=True)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric == "fd[identity]"]
    main, plain, guided = rows
    assert (main.guidance, main.sampler, main.protocol) == (1.0, main.sampler, "identity/train-1077/20")
    assert main.sampler.startswith("Midpoint")
    assert [row.protocol for row in (plain, guided)] == ["identity/train-1077/20/sweep-guidance"] * 2
    assert [(row.guidance, row.network_evaluations) for row in (plain, guided)] == [(1.0, 4.0), (3.0, 8.0)]
    assert plain.value == main.value != guided.value


def test_what_cannot_be_guided_is_not_swept(tmp_path):
    measured(tmp_path, "cfm", digits(), evaluator(sweep={"guidance": [1, 3]}))
    rows = read_rows(tmp_path / "rows.jsonl")
    assert not [row for row in rows if "sweep" in row.protocol]
    assert {row.guidance for row in rows} == {None}
    for wrong in ([0.5], [True]):
        with pytest.raises(ValueError, match=r"sweep\.guidance must be numbers >= 1"):
            evaluator(sweep={"guidance": wrong})


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
    assert set(main) == {
        "fd[identity]", "nll", "straightness", "path_energy", "displacement", "path_length_ratio",
        "parameters", "train_flops", "train_seconds", "samples_seen", "peak_memory", "samples_per_second",
        "network_evaluations", *(("curvature", "one_step_error") if continuous else ()),
    }  # fmt: skip
    assert (main["fd[identity]"].n, main["fd[identity]"].protocol) == (20, "identity/train-1077/20")
    assert (main["nll"].n, main["nll"].unit) == (360, "bits/dim")
    assert main["nll"].protocol.startswith("ode/test/360" if continuous else "exact/test/360")
    assert (main["straightness"].n, main["straightness"].unit) == (6, "squared data units")
    assert main["network_evaluations"].value == (4 if continuous else 1)
    assert main["parameters"].value == sum(p.numel() for p in flow(name, digits()).parameters())
    assert main["path_energy"].value == pytest.approx(main["straightness"].value + main["displacement"].value)
    row = main["fd[identity]"]
    assert (row.bench, row.task, row.contender, row.seed, row.weights) == ("b", "t", "c", 3, "ema")
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
    monkeypatch.setattr("flowbench.evaluation.transport_cost.TRANSPORT_POINTS", 100)
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


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_the_batch_size_of_the_evaluator_changes_no_number(tmp_path, name):
    small, large = (
        values(measured(tmp_path / str(b), name, digits(), evaluator(batch_size=b, sweep={"network_evaluations": [2]})))
        for b in (3, 64)
    )
    assert small.keys() == large.keys()
    for key, value in small.items():
        assert value == pytest.approx(large[key], rel=2e-5), key


def test_conditional_flows_share_labels_drawn_by_the_evaluation_seed(tmp_path, monkeypatch):
    seen = []
    family = quick(flow("cfm", digits(), conditional=True))
    inner = family.flow_sample

    def watched(noise, label, *given):
        seen.append(label)
        return inner(noise, label, *given)

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


def live(family) -> dict:
    return {name: value.clone() for name, value in family.state_dict().items()}


def moved(family):
    """Averaged weights that differ from the live ones."""
    average = family.ema
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.01)
    assert any(not torch.equal(average.state_dict()["shadow"][n], p) for n, p in family.named_parameters())
    return family


@pytest.mark.parametrize("stage", ["never", "test_step", "sample"])
def test_live_weights_come_back_whatever_happens(tmp_path, monkeypatch, stage):
    family = moved(quick(flow("cfm", digits())))
    before = live(family)

    def broken(*given, **options):
        raise RuntimeError("broken on purpose")

    if stage != "never":
        monkeypatch.setattr(family, stage, broken)
    run = trainer(tmp_path, evaluator())
    if stage == "never":
        run.test(family, digits(), verbose=False)
    else:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            run.test(family, digits(), verbose=False)
        assert not (tmp_path / "rows.jsonl").exists()
    assert all(torch.equal(value, before[name]) for name, value in live(family).items())


def test_the_named_weights_are_measured(tmp_path):
    found = {}
    for weights in ("ema", "raw"):
        family = moved(flow("tarflow", digits()))
        run = trainer(tmp_path / weights, evaluator(weights=weights))
        run.test(family, digits(), verbose=False)
        rows = rows_of(tmp_path / weights)
        found[weights] = rows["nll", None].value
        assert {row.weights for row in rows.values()} == {weights}
    plain = flow("tarflow", digits())
    log_prob = plain.log_prob(digits().model_values("test")).double()
    expected = float(-log_prob.mean() / 64 / math.log(2) - math.log2(2 / 17))
    assert found["ema"] == pytest.approx(expected, rel=1e-6)
    assert abs(found["raw"] - expected) > 1e-3


def curve(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]


def fit(tmp_path, steps: int, ckpt=None, **options) -> L.Trainer:
    measure = evaluator({"fd": FrechetDistance("identity"), "nll": NegativeLogLikelihood()}, curve=["fd"])
    limit = BudgetLimit("steps", 6)
    budget = Budget(limit, flops_per_step=100, samples_per_step=16, max_steps=6)
    measure.budget = budget
    run = trainer(tmp_path, measure, max_steps=steps, callbacks=[budget, measure], limit_val_batches=1, **options)
    run.fit(flow("tarflow", digits()), digits(), ckpt_path=ckpt, weights_only=True)
    return run


def test_the_curve_grows_with_training_and_is_not_doubled_by_resuming(tmp_path):
    fit(tmp_path, 4).save_checkpoint(tmp_path / "four.ckpt")
    first = curve(tmp_path)
    assert [(p["step"], p["samples_seen"], p["train_flops"], p["metric"]) for p in first] == [
        (2, 32, 200.0, "fd[identity]"),
        (4, 64, 400.0, "fd[identity]"),
    ]
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [p["step"] for p in curve(tmp_path)] == [2, 4, 6]
    # Again from an older checkpoint, as after a kill: later points are measured anew, earlier ones kept.
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [p["step"] for p in curve(tmp_path)] == [2, 4, 6]
    assert curve(tmp_path)[:2] == first
    # A point that was lost between checkpoint and validation is made up for.
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    (tmp_path / "curve.jsonl").write_text(lines[0] + "\n")
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [(p["step"], p["value"]) for p in curve(tmp_path)][:2] == [(p["step"], p["value"]) for p in first]


def test_validation_by_hand_leaves_the_curve_alone(tmp_path):
    fit(tmp_path, 4)
    before = (tmp_path / "curve.jsonl").read_bytes()
    measure = evaluator({"fd": FrechetDistance("identity")}, curve=["fd"])
    trainer(tmp_path, measure).validate(flow("tarflow", digits()), digits(), verbose=False)
    assert (tmp_path / "curve.jsonl").read_bytes() == before


def test_tensorboard_shows_samples_curve_and_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard", default_hp_metric=False)
    run = fit(tmp_path, 4, logger=logger)
    run.test(run.lightning_module, digits(), verbose=False)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"val/samples", "test/samples"}
    assert [e.step for e in events.Scalars("val/fd[identity]")] == [2, 4]
    assert events.Scalars("val/fd[identity]")[0].value == pytest.approx(curve(tmp_path)[0]["value"], rel=1e-5)
    picture = events.Images("test/samples")[0]
    # Four pictures of 8 pixels, four times as large, framed, in rows of eight.
    assert (picture.height, picture.width) == (34, 8 * 34)
    assert events.Scalars("test/nll")[0].value == pytest.approx(rows_of(tmp_path)["nll", None].value, rel=1e-5)
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_samples": 0}, "evaluator.num_samples must be >= 1, got 0"),
        ({"batch_size": 0}, "evaluator.batch_size must be >= 1, got 0"),
        ({"num_pictures": -1}, "evaluator.num_pictures must be >= 1, got -1"),
        ({"num_trajectories": 0}, "evaluator.num_trajectories must be >= 1, got 0"),
        ({"trajectory_points": 1}, "evaluator.trajectory_points must be >= 2, got 1"),
        ({"reference": "test"}, "evaluator.reference and held_out are both test"),
        ({"sweep": {"steps": [1]}}, "evaluator.sweep goes over network_evaluations and guidance, got steps"),
        (
            {"sweep": {"network_evaluations": [1, 0]}},
            "evaluator.sweep.network_evaluations must be whole numbers >= 1, got 0",
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
    from flowbench.families import Autoencoder
    from flowbench.networks import KLAutoencoder

    data = digits()
    other = Autoencoder(data.spec, lambda shape: KLAutoencoder(shape, latent_channels=2, width=8))
    with pytest.raises(ValueError, match="the evaluator measures flows, got Autoencoder"):
        trainer(tmp_path, evaluator()).fit(other, data)
    assert other.trainer.global_step == 0


def test_a_sweep_that_the_solver_cannot_do_is_refused_before_training(tmp_path):
    family = flow("cfm", digits(), solver=RungeKutta4(num_steps=2))
    with pytest.raises(ValueError, match="3"):
        trainer(tmp_path, evaluator(sweep={"network_evaluations": [4, 3]})).fit(family, digits())
    assert family.trainer.global_step == 0
    guided = flow("cfm", digits(), conditional=True, guidance=ClassifierFreeGuidance(2.0))
    with pytest.raises(ValueError, match="cannot spend exactly 1 network evaluations"):
        trainer(tmp_path, evaluator(sweep={"network_evaluations": [1]})).fit(guided, digits())
    trainer(tmp_path, evaluator(sweep={"network_evaluations": [1]}), max_steps=1).fit(
        flow("tarflow", digits()), digits()
    )


def test_rows_name_the_weights_that_were_there(tmp_path):
    """Without an average the live weights are measured, whatever was asked for."""
    for decay, weights in ((0.9, "ema"), (0.0, "raw")):
        found = measured(tmp_path, "tarflow", digits(), evaluator(), ema_decay=decay)
        assert {row.weights for row in found.values()} == {weights}


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
        drawn.network_evaluations += 10.0 * len(costs)
        costs.append((len(noise), drawn.network_evaluations))
        return drawn

    family.sample = counted
    family.likelihood_solver = RungeKutta4(num_steps=1)
    measure = evaluator({"cost": CostReport()}, num_samples=5, batch_size=3)
    trainer(tmp_path, measure, limit_test_batches=1).test(family, points(), verbose=False)
    (_, first), (_, second) = costs[1:]  # the first call warms up
    assert first != second
    assert rows_of(tmp_path)["network_evaluations", None].value == pytest.approx((3 * first + 2 * second) / 5)


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
        module, "get_extractor", lambda name, data, device: loaded.append(data) or IdentityFeatures(64, name)
    )
    evaluator = module.Evaluator({"fd": FrechetDistance("identity")})
    first, second = FlowDataModule("digits", seed=0), FlowDataModule("digits", seed=1)
    for data in (first, first, second):
        evaluator.extractors(data)
    assert loaded == [first, second]
