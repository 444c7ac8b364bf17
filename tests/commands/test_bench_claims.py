"""A claim on a number that nobody will have is refused before anything runs, with the nearest that there is."""

from __future__ import annotations

import re

import pytest

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.commands import bench_claims as claimed
from flowbench.commands.bench_claims import check_claims
from flowbench.evaluation import Measurement
from flowbench.evaluation.sample_metric import SampleMetric
from flowbench.flows import RungeKutta4

MODEL, EVALUATION = "model.init_args", "flowbench.evaluation"
TARFLOW = {
    "model": {
        "_replace_": True,
        "class_path": "flowbench.families.TARFlow",
        "init_args": {"layers": [1, 1], "width": 8, "head_dim": 8, "start": "learned"},
    }
}
SOLVER = {"class_path": "flowbench.flows.Midpoint", "init_args": {"num_steps": 4}}
METRICS = {
    f"evaluator.metrics.{name}.class_path": f"{EVALUATION}.{cls}"
    for name, cls in {
        "nll": "NegativeLogLikelihood",
        "paths": "PathStraightness",
        "pairs": "TrainingPairs",
        "cost": "CostReport",
        "modes": "ModeRecovery",
    }.items()
}


class Mine(SampleMetric):
    """A user's metric, whose names nobody knows."""

    def measure(self, answers):
        return [Measurement("anything", 1.0, 1, "mine")]


class Named(Mine):
    """One that declares them."""

    @property
    def names(self):
        return ("anything",)


def bench(workshop, claims, **content):
    workshop.real_experiment("cfm")
    contenders = {
        "cfm": {"experiment": "cfm.yaml", "overrides": METRICS},
        "tarflow": {"experiment": "cfm.yaml", "overrides": {**METRICS, **TARFLOW}},
        "weighted": {
            "experiment": "cfm.yaml",
            "overrides": {**METRICS, f"{MODEL}.weight.class_path": "flowbench.flows.GibbsWeight"},
        },
        "again": {"trained": "cfm", "overrides": {f"{MODEL}.solver": SOLVER}},
    }
    sweep = {"network_evaluations": [2, 4]}
    if "ring/" in "".join(claims):
        content |= {"problems": {"moons": {}, "ring": {"overrides": {"data.dataset": "ring"}}}}
    return workshop.bench(**{"contenders": contenders, "claims": claims, "sweep": sweep, **content})


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("cfm.w22 < 1", "cfm has no metric 'w22'; did you mean 'w2'?"),
        ("cfm.w2[identity] < 1", "cfm has no metric 'w2[identity]'"),
        ("1 > cfm.straigtness", "cfm has no metric 'straigtness'; did you mean 'straightness'?"),
        ("tarflow.curvature < cfm.curvature", "tarflow has no metric 'curvature'"),
        ("cfm.ess > 0.5", "cfm has no metric 'ess'"),
        ("tarflow.cost_ratio < 1", "tarflow has no metric 'cost_ratio'"),
        ("cfm.reconstruction_psnr > 1", "cfm has no metric 'reconstruction_psnr'"),
        (
            "ring/cfm.mode_discrepancy < 1",
            "in problem 'ring', cfm has no metric 'mode_discrepancy'",
        ),  # it has no labels
        ("again.w22 < cfm.w2", "again has no metric 'w22'"),
        ("noise.nll < cfm.nll", "noise has no metric 'nll'"),
        ("floor.straightness < cfm.straightness", "floor has no metric 'straightness'"),
        (
            "tarflow.w2@4 < cfm.w2@4",
            "tarflow has no choice of its number of network evaluations; claim tarflow.w2 without",
        ),
        ("noise.w2@4 > cfm.w2@4", "noise has no choice of its number of network evaluations"),
        ("cfm.nll@4 < 1", "cfm has no metric 'nll' at the points of a sweep"),
        ("cfm.w2 < again.w2 at nll", "cfm has no metric 'nll' at the points of a sweep"),
        ("cfm.w2 < again.w2 at w22", "cfm has no metric 'w22'; did you mean 'w2'?"),
        ("tarflow.w2 < cfm.w2 at mode_discrepancy", "tarflow has no choice of its number of network evaluations"),
    ],
)
def test_a_claim_on_what_nobody_will_have_is_refused(workshop, claim, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_claims(make_plan(bench(workshop, ["cfm.w2 < noise.w2", claim])))
    assert f"claim '{claim}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [pytest.param([], marks=pytest.mark.slow), ["--dry-run"]])
def test_it_is_one_line_before_anything_runs(workshop, capsys, words):
    contenders = {"cfm": workshop.real_experiment("cfm")}
    path = workshop.bench(contenders=contenders, claims=["cfm.w22 < 1"])
    assert main(["bench", "-c", str(path), *words]) == 2
    captured = capsys.readouterr()
    assert "cfm has no metric 'w22'; did you mean 'w2'?" in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert not workshop.runs.exists()


def test_claims_on_what_will_be_there_pass(workshop):
    claims = [
        "cfm.w2 < noise.w2",
        "gmm.nll < cfm.nll",
        "tarflow.npe_coupling < cfm.npe_coupling",
        "cfm.curvature < weighted.curvature",
        "weighted.ess > 0.1",
        "weighted.tilt_share < 1",
        "cfm.w2@2 < again.w2@4",
        "cfm.w2 ~ again.w2 within 5%",
        "tarflow.step_milliseconds < cfm.train_seconds",
    ]
    check_claims(make_plan(bench(workshop, claims)))


FEW = {"evaluator.metrics.few.class_path": "flowbench.tasks.generation.FewStepLikelihood"}
HEAD = {
    **FEW,
    f"{MODEL}.network.init_args.second_time": True,
    f"{MODEL}.map_objective.class_path": "flowbench.flows.Progressive",
    f"{MODEL}.divergence_head.class_path": "flowbench.families.DivergenceHead",
    "model.class_path": "flowbench.families.FlowMap",
}


def with_heads(workshop, claim):
    """Two flow maps with heads; that of `alone` is beside an ODE of which there is no stricter solve."""
    alone = {f"{MODEL}.likelihood_solver.class_path": "tests.commands.test_bench_claims.Alone"}
    contenders = {
        "cfm": {"experiment": "cfm.yaml", "overrides": {**METRICS, **FEW}},
        "head": {"experiment": "cfm.yaml", "overrides": {**METRICS, **HEAD}},
        "alone": {"experiment": "cfm.yaml", "overrides": {**METRICS, **HEAD, **alone}},
    }
    check_claims(make_plan(bench(workshop, [claim], contenders=contenders)))


class Alone(RungeKutta4):
    """A solver that cannot be stricter."""

    def __init__(self) -> None:
        super().__init__(num_steps=4)

    def refined(self):
        return None


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            "head.nll_head < cfm.nll",
            "head has nll_head, which is a number of its own kind and no nll: claim nll_head_rmse",
        ),
        ("cfm.nll > head.nll_head", "head has nll_head, which is a number of its own kind and no nll"),
        ("head.nll_head@4 < head.nll", "claim nll_head_rmse, or compare nll_head with another contender's"),
        ("head.w2 < cfm.w2 at nll_head", "head has nll_head, which is a number of its own kind and no w2"),
        ("alone.nll_head < 3", "alone has nll_head without nll_head_rmse, which says what it is worth"),
        ("alone.nll_head@4 < head.nll_head@4", "alone has nll_head without nll_head_rmse"),
        ("cfm.nll_head < 3", "cfm has no metric 'nll_head'"),
        ("head.nll_rmse < 1", "head has no metric 'nll_rmse'"),
    ],
)
def test_a_heads_likelihood_is_compared_with_its_like_and_beside_its_distance(workshop, claim, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        with_heads(workshop, claim)
    assert f"claim '{claim}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "claim",
    ["head.nll_head_rmse@2 < cfm.nll_rmse@2", "head.nll_head@2 < head.nll_head", "head.head_mass ~ 1 within 5%"],
)
def test_claims_on_the_distance_of_a_head_pass(workshop, claim):
    with_heads(workshop, claim)


def test_a_claim_is_checked_in_every_problem_in_which_it_is_judged(workshop):
    ring = {"overrides": {"data.dataset": "ring"}}  # which has no labels, hence no modes
    alone = {"problems": {"moons": {}, "ring": {**ring, "only": ["cfm"], "reason": "no"}}}
    with pytest.raises(ValueError, match=r"in problem 'ring', cfm has no metric 'mode_discrepancy'"):
        check_claims(make_plan(bench(workshop, ["cfm.mode_discrepancy < 1"], **alone)))
    both = ["cfm.mode_discrepancy < again.mode_discrepancy", "moons/cfm.mode_discrepancy < 1"]
    check_claims(make_plan(bench(workshop, both, **alone)))


def test_a_metric_of_ones_own_may_declare_its_names(workshop):
    def with_metric(name):
        override = {"evaluator.metrics.mine.class_path": f"tests.commands.test_bench_claims.{name}"}
        contenders = {"cfm": {"experiment": "cfm.yaml", "overrides": override}}
        return make_plan(bench(workshop, ["cfm.anythin < 1"], contenders=contenders))

    check_claims(with_metric("Mine"))
    with pytest.raises(ValueError, match=r"no metric 'anythin'; did you mean 'anything'?"):
        check_claims(with_metric("Named"))


def test_only_contenders_of_claims_are_built_and_each_once(workshop, monkeypatch):
    built = []
    original = claimed._declared
    monkeypatch.setattr(claimed, "_declared", lambda plan, *who: (built.append(who), original(plan, *who))[1])
    check_claims(make_plan(bench(workshop, ["weighted.w2 < 1", "weighted.w2 < noise.w2", "weighted.nll < 9"])))
    assert built == [("", "weighted"), ("", "cfm")]  # the references are measured with the first one's evaluator
    built.clear()
    check_claims(make_plan(bench(workshop, [])))
    assert built == []


def test_what_cannot_be_built_is_left_to_those_who_check_it(workshop):
    path = bench(
        workshop, ["cfm.w22 < 1"], contenders={"cfm": {"experiment": "cfm.yaml", "overrides": {f"{MODEL}.x": 1}}}
    )
    check_claims(make_plan(path))


def test_a_finished_bench_is_not_built_again(workshop, monkeypatch):
    workshop.experiment("a")
    path = workshop.bench(contenders={"a": "a.yaml"}, claims=["a.fd[fake] < 1"])
    assert workshop.run(path) == 0
    monkeypatch.setattr("flowbench.commands.bench.check_claims", lambda _: pytest.fail("built"))
    assert workshop.run(path) == 0
