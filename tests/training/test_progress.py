"""A measurement tells what it does and how far it is, in one fraction that never goes back."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from flowbench.core.preparation_progress import PROGRESS_FILE
from flowbench.evaluation.stages import Stages
from flowbench.training import Budget, BudgetLimit
from flowbench.training import progress as module
from flowbench.training.progress import ProgressFile

from ..evaluation.evaluator_runs import digits, evaluator, flow, point_metrics, points, quick, trainer


@pytest.fixture
def records(monkeypatch):
    """Everything that is written to progress.json."""
    written: list[dict] = []
    monkeypatch.setattr(module, "write_text", lambda path, text: written.append(json.loads(text)))
    return written


def slow_clock():
    """Every look at it is two seconds later than the one before."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0
        return now

    return clock


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_a_test_tells_its_parts_in_order_and_never_goes_back(tmp_path, records, name):
    measure = evaluator(num_samples=20, batch_size=8, sweep={"network_evaluations": [2, 4]})
    file = ProgressFile(tmp_path / "progress.json", None, slow_clock())
    measure.report = file.stage
    data = digits()
    run = trainer(tmp_path, measure, callbacks=[measure, file], limit_test_batches=2)
    run.test(quick(flow(name, data)), data, verbose=False)
    assert {record["phase"] for record in records} == {"test"}
    fractions = [record["fraction"] for record in records]
    assert (fractions[0], fractions == sorted(fractions)) == (0.0, True)
    assert 0.8 < fractions[-1] < 1.0
    said = [record["what"] for record in records if record.get("what")]
    parts = list(dict.fromkeys(re.match(r"[a-z-]+", what)[0] for what in said))
    assert parts == ["samples", "likelihood", "paths", *(["sweep"] if name == "cfm" else []), "scores"]
    assert [what for what in said if what.startswith("samples")] == ["samples 8/20", "samples 16/20", "samples 20/20"]
    if name == "cfm":
        assert "sweep 2/2, 4 evaluations, 16/20" in said
    assert {"scores nll 1/4", "scores cost 3/4"} <= {what.replace("/12", "/4") for what in said}


def test_the_reference_rows_tell_whose_turn_it_is(monkeypatch):
    monkeypatch.setattr("flowbench.tasks.generation.references.Mixture.sizes", (1, 2))
    said: list[tuple[str, float]] = []
    measure = evaluator(point_metrics(), reference="val", num_samples=20)
    measure.report = lambda what, fraction: said.append((what, fraction))
    list(measure.reference_rows(points()))
    assert list(dict.fromkeys(what.split(" ")[0] for what, _ in said)) == ["floor", "noise", "gaussian", "gmm"]
    fractions = [fraction for _, fraction in said]
    assert fractions == sorted(fractions)
    assert ("gaussian", 0.5) in said
    assert any(what.startswith("gmm nll") for what, _ in said)


def test_what_begins_is_written_at_once_and_counts_once_a_second(tmp_path, records):
    now = 100.0
    file = ProgressFile(tmp_path / "progress.json", None, lambda: now)
    for what in ("samples 1/99", "samples 2/99", "scores fd 0/3", "scores w2 1/3", "scores w2 2/3"):
        file.stage(what, 0.1)
    now += 1.5
    file.stage("scores w2 3/3", 0.2)
    assert [r["what"] for r in records] == ["samples 1/99", "scores fd 0/3", "scores w2 1/3", "scores w2 3/3"]


def test_a_finished_training_is_no_finished_measurement(tmp_path, records):
    budget = Budget(BudgetLimit("steps", 5), flops_per_step=1, samples_per_step=1, num_train=100)
    budget.steps = 5
    file = ProgressFile(tmp_path / "progress.json", budget)
    run = trainer(tmp_path, None)
    for phase in ("fit", "test", "done"):
        file.write(run, phase)
    assert [(r["phase"], r["fraction"]) for r in records] == [("fit", 1.0), ("test", 0.0), ("done", 1.0)]


def test_whoever_waits_for_a_required_training_is_told_of_it(tmp_path, monkeypatch):
    note = tmp_path / "note.json"
    monkeypatch.setenv(PROGRESS_FILE, str(note))
    monkeypatch.setattr("flowbench.core.preparation_progress._last", -10.0)
    budget = Budget(BudgetLimit("steps", 8), flops_per_step=1, samples_per_step=1, num_train=100)
    budget.steps = 2
    ProgressFile(tmp_path / "autoencoder-0123456789ab" / "progress.json", budget).write(trainer(tmp_path, None), "fit")
    assert json.loads(note.read_text()) == {"what": "training autoencoder, step 2", "fraction": 0.25}


def test_a_classifier_and_features_of_images_tell_how_far_they_are(tmp_path, monkeypatch):
    from flowbench.evaluation import extractors, samples

    said: list = []
    monkeypatch.setattr(extractors, "note_progress", lambda *note: said.append(note))
    monkeypatch.setattr(samples, "note_progress", lambda *note: said.append(note))
    monkeypatch.setattr(samples, "CHUNK", 500)
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    data = digits()
    short = SimpleNamespace(version=1, options={"num_steps": 3})
    monkeypatch.setattr(extractors, "classifier_settings", lambda *_: short)
    extractor = extractors.get_extractor("digits-cnn", data)
    assert said == [("training the classifier digits-cnn", step, 3) for step in (1, 2, 3)]
    said.clear()
    samples.RealSet(data, "train")._extract(extractor, 1077)
    assert [done for _, done, _ in said] == [500, 1000, 1077]
    assert said[-1] == ("digits-cnn features of 1077/1077 images", 1077, 1077)


def test_stages_count_alike_and_know_only_their_own():
    said: list = []
    stages = Stages(["a", "b"], lambda *step: said.append(step))
    stages("a", 1, 4)
    stages.of("b")(3, 4)
    stages.of("elsewhere")(1, 2)
    stages.counter("elsewhere", 2)("nothing")
    assert said == [("a 1/4", 0.125), ("b 3/4", 0.875)]
