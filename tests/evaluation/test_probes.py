"""Probes: merged by key, asked once, refused before the training; what a metric of somebody's own may do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flowbench.core.contract import ContractError
from flowbench.evaluation import Answers, FrechetDistance, Measurement, Metric, Probe, Samples, Wasserstein2
from flowbench.evaluation.answers import UnansweredError
from flowbench.evaluation.failures import Failure
from flowbench.evaluation.measurable import check_measurable
from flowbench.evaluation.probe import merged
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.sampling import samples_of
from flowbench.tasks.generation import TrainingPairs
from flowbench.training import TrainingModule

from .evaluator_runs import digits, evaluator, flow, points, quick, rows_of, trainer
from .known import known


def test_probes_of_one_key_are_one_question():
    probes = [Samples(), Samples.with_features("a", 5), Samples.with_features("b", None), Samples.with_features("a", 9)]
    (found,) = merged(probes)
    assert found.counts(20) == {"a": 9, "b": 20}
    assert found.counts(7) == {"a": 7, "b": 7}


@dataclass(frozen=True)
class Number(Probe[float]):
    """A user's probe with an option and no key of its own."""

    value: float = 1.0

    def ask(self, setup):
        return self.value


class Mine(Metric):
    """A user's metric that looks at a probe and at features, without any other method."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def probes(self):
        return Number(self.value), Samples.with_features("identity", None)

    def measure(self, answers):
        features = samples_of(answers).features(answers.extractors["identity"])
        return [Measurement("mine", answers[Number()] + features.shape[1], len(features), "mine")]


def test_probes_that_cannot_be_merged_are_refused_before_the_training(tmp_path):
    measure = evaluator({"one": Mine(1.0), "two": Mine(2.0)})
    message = (
        r"^evaluator\.metrics\.two: Number\(value=1.0\) and Number\(value=2.0\) have one key: define Number\.merge"
    )
    data = digits()
    with pytest.raises(ValueError, match=message):
        check_measurable(measure, flow("cfm", data), data)


def test_a_metric_in_a_sweep_whose_probes_do_not_follow_it_is_refused_before_the_training():
    """It would have the main number, or none, at every point."""

    class Swept(Mine):
        in_sweep = True

        def probes(self):
            return (Number(),)

    data, measure = digits(), evaluator({"mine": Swept()}, sweep={"network_evaluations": [2]})
    with pytest.raises(
        ValueError, match=r"^evaluator\.metrics\.mine: is measured at every point of a sweep, but Number"
    ):
        check_measurable(measure, flow("cfm", data), data)
    check_measurable(measure, flow("tarflow", data), data)  # which has no sweep


def test_a_metric_may_ask_for_features_of_its_own(tmp_path):
    measure = evaluator({"mine": Mine(), "w2": Wasserstein2()}, references={})
    trainer(tmp_path, measure, limit_test_batches=1).test(quick(flow("cfm", points())), points(), verbose=False)
    rows = rows_of(tmp_path)
    assert (rows["mine", None].value, rows["mine", None].n) == (3.0, 20)
    assert rows["w2", None].status == "ok"


def test_an_answer_that_nobody_asked_for_is_a_mistake_of_the_metric():
    with pytest.raises(ContractError, match=r"Number\(value=1.0\) was not asked: return it from the metric's method"):
        known()[Number()]


def test_an_answer_that_could_not_be_computed_has_its_reason():
    given = known(given={Number(): Failure("gave up")})
    with pytest.raises(UnansweredError, match="gave up"):
        given[Number()]
    assert (given.failure(Number()), given.get(Number())) == ("gave up", None)


def test_what_several_methods_need_is_computed_once():
    calls = []
    given = known()
    assert [given.once("key", lambda: calls.append(1) or 5) for _ in range(3)] == [5, 5, 5]
    assert calls == [1]


def test_adding_a_metric_changes_no_other_row(tmp_path):
    def numbers(folder, metrics):
        torch.manual_seed(0)
        family = quick(flow("ot_cfm", points()))
        measure = evaluator(metrics, sweep={"network_evaluations": [2]})
        trainer(tmp_path / folder, measure, limit_test_batches=1).test(family, points(), verbose=False)
        return {key: (row.value, row.n, row.protocol) for key, row in rows_of(tmp_path / folder).items()}

    few = numbers("few", {"w2": Wasserstein2(), "pairs": TrainingPairs(64)})
    more = {"pairs16": TrainingPairs(16), "fd": FrechetDistance("identity", 10), "mine": Mine()}
    many = numbers("many", {**more, "w2": Wasserstein2(), "pairs": TrainingPairs(64)})
    assert few.keys() <= many.keys()
    assert all(many[key] == value for key, value in few.items())


class Wrong(Reference):
    """Answers with samples in place of an answer that holds them."""

    def answer(self, probe, setup):
        return setup.reference if isinstance(probe, Samples) else None


def test_a_reference_that_answers_something_else_costs_its_own_rows():
    measure = evaluator({"w2": Wasserstein2()}, references={"wrong": Wrong()})
    (row,) = measure.reference_rows(points())
    assert row.status == "failed"
    assert "must return a Generated, got RealSet" in row.provenance["message"]


# ---- the trainer's own pass ---------------------------------------------------------------------------------


def test_the_limit_of_a_test_is_kept_and_given_back_whatever_happens(tmp_path, monkeypatch):
    data = points()  # 100 test samples a batch
    measure = evaluator({"pairs": TrainingPairs(16)}, references={})
    run, family = trainer(tmp_path, measure, limit_test_batches=2), quick(flow("cfm", data))
    monkeypatch.setattr(measure, "_measure", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run.test(family, data, verbose=False)
    assert run.limit_test_batches == 2
    monkeypatch.undo()
    run.test(family, data, verbose=False)
    assert run.limit_test_batches == 2


def test_a_share_of_no_batch_is_refused(tmp_path):
    run = trainer(tmp_path, evaluator({"w2": Wasserstein2()}, num_likelihood=100), limit_test_batches=0.1)
    with pytest.raises(ValueError, match=r"trainer\.limit_test_batches=0.1 leaves none of 1 test batches: raise it"):
        run.test(quick(flow("cfm", points())), points(), verbose=False)


def test_a_test_step_of_ones_own_sees_all_batches(tmp_path):
    seen = []

    def count(module: TrainingModule, batch, batch_idx):
        seen.append(len(batch))

    data = points()
    family = quick(flow("cfm", data))
    family.__class__ = type("MyCFM", (type(family),), {"test_step": count})
    trainer(tmp_path, evaluator({"w2": Wasserstein2()})).test(family, data, verbose=False)
    assert sum(seen) == len(data.split("test"))


# ---- references ---------------------------------------------------------------------------------------------


def test_answers_are_of_a_setup_and_may_be_replaced():
    given = known(given={Number(): 1.0})
    other = given.replaced(Number(), 2.0)
    assert (given[Number()], other[Number()]) == (1.0, 2.0)
    assert isinstance(other, Answers)
