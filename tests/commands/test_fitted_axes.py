"""What is fitted to the data before training is there again for every command that comes after it."""

from __future__ import annotations

import numpy as np
import pytest

from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.rows import read_rows

from .conftest import POINTS

MODEL = "model.init_args"
WEIGHT = "{class_path: flowbench.flows.GibbsWeight, init_args: {%s}}"
AXES = {
    "elbow": [f"{MODEL}.weight={WEIGHT % 'epsilon: elbow'}"],
    "effective_sample": [f"{MODEL}.weight={WEIGHT % 'epsilon: {class_path: flowbench.flows.EffectiveSampleEpsilon}'}"],
    "target": [f"{MODEL}.weight={WEIGHT % 'kappa: 1.5, correction: target'}"],
    "mixed": [f"{MODEL}.weight={WEIGHT % 'kappa: 1.5, correction: mixed'}"],
    "norm_aligned": [f"{MODEL}.source={{class_path: flowbench.flows.NormAlignedSource}}"],
    "mixture": [
        f"{MODEL}.source={{class_path: flowbench.flows.GaussianMixtureSource, init_args: {{num_components: 3}}}}"
    ],
    "pruned": [
        f"{MODEL}.sampling_source={{class_path: flowbench.flows.PrunedSource, init_args: {{max_cosine: 0.9,"
        " quantile: 0.25, axes: high}}",
    ],
    "semidiscrete": [
        "data.train_size=200",
        f"{MODEL}.pairing={{class_path: flowbench.families.SemidiscretePairing, init_args: {{steps: 20, chi2: null}}}}",
    ],
    "low_frequency": [
        f"{MODEL}.source={{class_path: flowbench.flows.LowFrequencySource, init_args: {{cutoff: 1}}}}",
    ],
    "stream": [f"{MODEL}.pairing={{class_path: flowbench.families.StreamPairing, init_args: {{ahead: 0}}}}"],
}


@pytest.mark.parametrize(
    ("coupling", "message"),
    [
        ("SchrodingerBridgeCoupling, init_args: {sigma: 0}", r"^sigma must be a number in .*, got 0"),
        ("SinkhornCoupling, init_args: {epsilon: -1.0}", r"^epsilon must be a number in .*, got -1"),
    ],
)
def test_a_coupling_says_itself_what_it_refuses(coupling, message, tmp_path):
    """Its argument may also be a pairing, and that it is none is no answer."""
    file = tmp_path / "points.yaml"
    file.write_text(POINTS)
    overrides = [f"run.dir={tmp_path / 'run'}", f"{MODEL}.coupling={{class_path: flowbench.flows.{coupling}}}"]
    with pytest.raises(ValueError, match=message) as caught:
        runs.fit(Experiment.from_files([file], overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis", [pytest.param(axis, marks=[pytest.mark.slow] * (number > 0)) for number, axis in enumerate(AXES)]
)
def test_a_trained_flow_is_measured_validated_and_sampled_by_later_commands(axis, tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text(POINTS)
    experiment = Experiment.from_files([file], [f"run.dir={tmp_path / 'run'}", "budget.steps=4", *AXES[axis]])
    runs.fit(experiment, test=True)
    first = {row.metric: row.value for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    runs.test(experiment)
    again = {row.metric: row.value for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    assert again["w2"] == pytest.approx(first["w2"], rel=1e-5)
    assert again["nll"] == pytest.approx(first["nll"], rel=1e-5)
    assert np.isfinite(runs.validate(experiment)["val/loss"])
    folder = runs.predict(experiment, num_samples=5)
    assert np.load(folder / "samples.npz")["x"].shape == (5, 2)


def test_a_fit_before_the_first_step_is_paid_from_the_budget(tmp_path, monkeypatch):
    """Fewer steps than without it for the same operations; test, on another cache, finds the same cost."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "points.yaml"
    file.write_text(POINTS)
    rows = {}
    for axis in ("semidiscrete", "plain"):
        folder = tmp_path / axis
        limit = ["budget.steps=null", "budget.train_flops=4.0e+7", f"run.dir={folder}"]
        experiment = Experiment.from_files([file], [*limit, *AXES.get(axis, [])])
        runs.fit(experiment, test=True)
        rows[axis] = {row.metric: row.value for row in read_rows(folder / "rows.jsonl")}
    fitted, plain = rows["semidiscrete"], rows["plain"]
    # 20 steps of 1,024 source points and an estimate of chi2 by 4,000, each against 200 points of the plane.
    assert fitted["preparation_flops"] == 2 * 2 * 200 * (20 * 1024 + 4000)
    assert fitted["preparation_seconds"] > 0
    assert "preparation_flops" not in plain
    assert fitted["samples_seen"] < plain["samples_seen"]
    for found in (fitted, plain):
        assert 0.9 * 4e7 < found["train_flops"] <= 4e7
    assert fitted["train_seconds"] > fitted["preparation_seconds"]
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "other"))
    limit[-1] = f"run.dir={tmp_path / 'semidiscrete'}"
    runs.test(Experiment.from_files([file], [*limit, *AXES["semidiscrete"]]))
    again = {row.metric: row.value for row in read_rows(tmp_path / "semidiscrete" / "rows.jsonl")}
    assert again["train_flops"] == fitted["train_flops"]
    assert again["preparation_seconds"] == fitted["preparation_seconds"]
