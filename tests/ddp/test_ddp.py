"""Two processes on the CPU measure and train what one does."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from processes import TARFLOW, Outcome, Workplace, matching, read_lines

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule

# What the machine's speed or memory decides, and so differs between runs.
COSTS = {"samples_per_second", "peak_memory", "train_seconds", "step_milliseconds", "flop_utilisation"}
QUALITY = {
    "fd[identity]", "kid[identity]", "precision[identity]", "recall[identity]", "authenticity[identity]",
    "data_copying[identity]", "nll", "straightness", "path_energy", "displacement", "path_length_ratio",
}  # fmt: skip


def assert_finished(workplace: Workplace, run: str, outcome: Outcome) -> None:
    """Exit status, files and records of a fit with a test, and nothing said twice."""
    assert outcome.status == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line]
    assert len(lines) == len(set(lines)), outcome.stderr
    folder = workplace.folder / run
    assert outcome.stdout.splitlines().count(str(folder)) == 1
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["phase"], progress["step"]) == ("done", 6)
    assert [point["step"] for point in read_lines(folder / "curve.jsonl")] == [3, 6]
    assert len(np.load(folder / "trajectories.npz")["states"][0]) == 33
    rows = workplace.rows(run)
    names = [(row["metric"], row["protocol"], row["axis"], row["network_evaluations"]) for row in rows]
    assert len(names) == len(set(names))
    assert {name for name, *_ in names} >= QUALITY
    assert all(row["provenance"]["world_size"] == 2 and row["provenance"]["global_batch"] == 32 for row in rows)
    seen = next(row["value"] for row in rows if row["metric"] == "samples_seen")
    assert seen == 6 * 32


def assert_same_measurements(workplace: Workplace, run: str) -> None:
    """The checkpoint of a run under two processes, measured again by one."""
    again = f"{run}-again"
    config = workplace.folder / run / "config.yaml"
    dirs = [f"run.dir={workplace.folder / again}", "trainer.devices=1", "trainer.strategy=auto"]
    workplace.one("test", "-c", config, "--ckpt", workplace.last(run), *dirs)
    pairs = list(zip(workplace.rows(run), workplace.rows(again), strict=True))
    for two, one in pairs:
        assert (two["metric"], two["n"], two["protocol"]) == (one["metric"], one["n"], one["protocol"])
        if two["metric"] not in COSTS:
            assert two["value"] == pytest.approx(one["value"], rel=1e-5), two["metric"]
    assert {two["metric"] for two, _ in pairs} >= QUALITY
    samples = [np.load(workplace.folder / name / "samples.npz")["x"] for name in (run, again)]
    np.testing.assert_array_equal(*samples)


@pytest.fixture(scope="module")
def tarflow(workplace: Workplace) -> Outcome:
    """Digits: 360 test images and 101 samples."""
    path = workplace.write("tarflow", TARFLOW)
    return workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'tarflow-2'}")


@pytest.fixture(scope="module")
def wcfm(workplace: Workplace) -> Outcome:
    """Images of the user's own with odd splits."""
    weight = {"class_path": "flowbench.flows.GibbsWeight", "init_args": {"kappa": 0.7, "decay": 0.8}}
    data = workplace.npz("odd", {"train": 75, "val": 13, "test": 45})
    path = workplace.write(
        "wcfm", matching("WeightedCFM", weight=weight), data={"dataset": "npz", "path": str(data), "eval_batch_size": 9}
    )
    return workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'wcfm-2'}")


def test_a_block_flow_fits_and_tests(workplace, tarflow):
    assert_finished(workplace, "tarflow-2", tarflow)


def test_a_block_flow_measures_the_same_with_one_process(workplace, tarflow):
    assert_same_measurements(workplace, "tarflow-2")


def test_training_with_the_same_global_batch_gives_the_same_weights(workplace, tarflow):
    path = workplace.folder / "tarflow.yaml"
    workplace.one("fit", "-c", path, f"run.dir={workplace.folder / 'tarflow-1'}")
    one, two = workplace.checkpoint("tarflow-1"), workplace.checkpoint("tarflow-2")
    for weights in (lambda state: state["state_dict"], lambda state: state["ema"]["shadow"]):
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(two)[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert one["ema"]["num_updates"] == two["ema"]["num_updates"] == 6


@pytest.mark.slow
def test_a_weighted_flow_fits_and_tests(workplace, wcfm):
    assert_finished(workplace, "wcfm-2", wcfm)


@pytest.mark.slow
def test_a_weighted_flow_measures_the_same_with_one_process(workplace, wcfm):
    assert_same_measurements(workplace, "wcfm-2")


@pytest.mark.slow
def test_the_running_normaliser_averages_over_all_processes(workplace, wcfm):
    seed, kappa, decay = 5, 0.7, 0.8
    data = FlowDataModule("npz", path=str(workplace.folder / "odd.npz"), batch_size=32, seed=seed)
    data.setup("fit")
    log_means = []
    for step in range(6):
        x = data.train_batch_at(32 * step).x.double()
        halves = [torch.randn(16, 1, 4, 4, generator=generator(seed, "noise", step, 0, rank)) for rank in (0, 1)]
        distance = (torch.cat(halves).double() - x).flatten(1).norm(dim=1)
        weights = np.exp(-distance.numpy() / (kappa * math.sqrt(16)))
        log_means.append(math.log(weights.mean()))
    shares = decay ** np.arange(5, -1, -1)
    expected = float((shares * log_means).sum() / shares.sum())
    state = workplace.checkpoint("wcfm-2")["state_dict"]
    assert float(state["weight.running_log_mean"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(workplace):
    path, run = workplace.folder / "uneven.yaml", workplace.folder / "uneven"
    workplace.write("uneven", TARFLOW, data={"batch_size": 33})
    outcome = workplace.two("fit", "-c", path, f"run.dir={run}")
    assert outcome.status == 2
    (line,) = outcome.stderr.strip().splitlines()
    assert line == (
        "flowbench: error: batch_size: 33 (over all processes) must be a positive multiple of the 2 processes; "
        "change batch_size or trainer.devices"
    )
    assert not (run / "config.yaml").exists()  # the corrected command may use the same folder


@pytest.mark.slow
def test_a_conditional_flow_with_a_sweep_fits_and_measures_the_same(workplace):
    evaluator = {"sweep": {"network_evaluations": [1, 2, 4]}}
    path = workplace.write("cfm", matching("FlowMatching", conditional=True), evaluator=evaluator)
    outcome = workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'cfm-2'}")
    assert_finished(workplace, "cfm-2", outcome)
    assert_same_measurements(workplace, "cfm-2")


@pytest.mark.slow
def test_a_loss_that_diverges_on_one_process_stops_them_all_and_can_be_resumed(workplace, tarflow):
    path = workplace.write("poisoned", {**TARFLOW, "class_path": "ddp_dummies.PoisonedTARFlow"})
    command = ("fit", "-c", path, f"run.dir={workplace.folder / 'poisoned'}")
    outcome = workplace.two(*command, FLOWBENCH_TEST_POISON="1")
    assert outcome.status == 1
    assert "Traceback" not in outcome.stderr
    assert "the loss became nan at step 2" in outcome.stderr
    assert workplace.checkpoint("poisoned")["global_step"] == 2
    assert workplace.two(*command).status == 0
    resumed, uninterrupted = workplace.checkpoint("poisoned"), workplace.checkpoint("tarflow-2")
    for name, value in uninterrupted["ema"]["shadow"].items():
        torch.testing.assert_close(resumed["ema"]["shadow"][name], value, rtol=0, atol=0)
    assert [point["step"] for point in read_lines(workplace.folder / "poisoned" / "curve.jsonl")] == [3, 6]


@pytest.mark.slow
def test_fewer_samples_than_processes_are_refused(workplace, tarflow):
    path = workplace.write("few", TARFLOW, evaluator={"num_samples": 1})
    outcome = workplace.two("test", "-c", path, "--ckpt", workplace.last("tarflow-2"))
    assert outcome.status == 2
    assert "evaluator.num_samples=1 is too few for 2 processes" in outcome.stderr


@pytest.mark.slow
def test_what_one_process_cannot_compute_costs_its_rows_and_nobody_hangs(workplace):
    """Likelihood and samples of process 1; the paths are measured on both, and the exit status tells."""
    model = {**TARFLOW, "class_path": "ddp_dummies.GivingUp"}
    path = workplace.write("giving-up", model, evaluator={"curve": []})
    outcome = workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'giving-up'}")
    assert outcome.status == 3, outcome.stderr
    assert "process 1: no answer here" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    rows = workplace.rows("giving-up")
    failed = {row["metric"] for row in rows if row["status"] == "failed"}
    assert failed >= {"nll", "fd[identity]", "kid[identity]", "authenticity[identity]"}
    measured = {row["metric"] for row in rows if row["status"] == "ok"}
    assert measured >= {"straightness", "path_length_ratio", "parameters"}
    assert not failed & measured
