"""Likelihoods of a divergence head beside the converged ODE: distances, masses, units, and what no claim rests on."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation import Setup
from flowbench.evaluation.failures import Failure
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.prospect import Prospect
from flowbench.families import Condition, DivergenceHead, FlowMap, FlowMatching, LatentSpace
from flowbench.families.family_contract import perturb
from flowbench.flows import Euler, ExactDivergence, Progressive, RungeKutta4, Solver
from flowbench.networks import DiT
from flowbench.tasks.generation import FewStepLikelihood
from flowbench.tasks.generation.head_likelihood import Converged, ConvergedLogDensities, HeadDensities
from flowbench.tasks.generation.head_mass import HeadMass, Mass
from flowbench.tasks.generation.likelihood import Densities, LogDensities

from ...contract.builders import IMAGES, autoencoder, batch_of, build
from ...evaluation.evaluator_runs import evaluator, points, rows_of, trainer
from ...evaluation.known import DIGITS, POINTS, known
from ...evaluation.setups import setup_of
from ...families.test_divergence_head import FirstFeature, OracleFeatures

PLANE = DataSpec("points", "1", (2,))


def oracle(scale: float = 1.0, **options) -> FlowMap:
    """The map of Gaussians, whose head says `scale` times its divergence: per dimension -ln 2 on the whole way."""
    settings = {"likelihood_solver": RungeKutta4(40), **options}
    module = FlowMap(PLANE, OracleFeatures, map_objective=Progressive(), divergence_head=DivergenceHead(), **settings)
    module.head = FirstFeature()
    nn.init.constant_(module.head.scale, scale)
    return module.eval()


def near() -> FlowDataModule:
    """Points whose log-densities under N(2, 0.5^2) are no outliers of thousands."""
    return FlowDataModule("gaussian_mixture", batch_size=16, eval_batch_size=100)


def measured(tmp_path, flow, metric=None, **options) -> dict:
    measure = evaluator(
        {"few": metric or FewStepLikelihood(32, mass_points=32)}, references={}, num_likelihood=60, **options
    )
    trainer(tmp_path, measure).test(flow, near(), verbose=False)
    return rows_of(tmp_path)


def asked(flow, **options) -> Setup:
    data = near()
    data.setup("test")
    return setup_of(flow, data, num_likelihood=40, **options)


# ---- what is measured --------------------------------------------------------------------------------------


def test_the_true_divergence_is_at_no_distance_and_its_mass_is_one(tmp_path):
    rows = measured(tmp_path, oracle(), sweep={"network_evaluations": [1, 4]})
    x = near().model_values("test", slice(60)).double()
    exact = -float(torch.distributions.Normal(2.0, 0.5).log_prob(x).sum(1).mean())
    for at, number in ((None, 1), (1.0, 1), (4.0, 4)):
        names = ("nll_head", "nll_head_rmse", "nll_head_bias", "head_mass")
        head, rmse, bias, mass = (rows[name, at] for name in names)
        assert head.value == pytest.approx(exact, rel=1e-4)
        assert (head.status, rmse.status, head.goal, rmse.goal, bias.goal) == ("ok", "ok", "none", "down", "zero")
        assert rmse.value < 1e-2
        assert abs(bias.value) <= rmse.value
        assert mass.value == pytest.approx(1, abs=0.01)
        assert head.protocol == f"head/test/60/Composition(num_jumps={number})"
        assert rmse.protocol.startswith("distance/head/test/first-32/from twice the steps of RungeKutta4(num_steps=40)")
        assert (rmse.n, rmse.unit, head.unit) == (32, "nats", "nats")


def test_a_wrong_head_is_at_its_distance_and_has_its_mass(tmp_path):
    """One and a half times -2 ln 2 raises every log-density by ln 2, whatever the number of jumps."""
    rows = measured(tmp_path, oracle(1.5), sweep={"network_evaluations": [2]})
    for at in (None, 2.0):
        assert rows["nll_head_rmse", at].value == pytest.approx(math.log(2), abs=0.01)
        assert rows["nll_head_bias", at].value == pytest.approx(-math.log(2), abs=0.01)
        assert rows["head_mass", at].value == pytest.approx(2, abs=0.02)


def test_a_solver_of_few_steps_is_at_its_distance_in_a_sweep_alone(tmp_path):
    flow = oracle(likelihood_solver=RungeKutta4(40))
    rows = measured(tmp_path, flow, sweep={"network_evaluations": [1, 8]})
    assert ("nll_rmse", None) not in rows
    # The single evaluation that Runge-Kutta 4 spends is a step of Euler's.
    x = near().model_values("test", slice(32))
    flow.likelihood_solver = Euler(1)
    exact = torch.distributions.Normal(2.0, 0.5).log_prob(x.double()).sum(1)
    distance = exact - flow.log_prob(x)
    assert rows["nll_rmse", 1.0].value == pytest.approx(float(distance.square().mean().sqrt()), rel=1e-3)
    assert rows["nll_bias", 1.0].value == pytest.approx(float(distance.mean()), rel=1e-3)
    assert rows["nll_rmse", 8.0].value < rows["nll_rmse", 1.0].value
    assert rows["nll_rmse", 1.0].protocol.split("/")[:2] == ["distance", "ode"]


def test_the_ode_is_solved_once_for_all_points_of_a_sweep(tmp_path):
    steps = []

    class Counted(RungeKutta4):
        def solve(self, *given):
            steps.append(self.num_steps)
            return super().solve(*given)

    measured(tmp_path, oracle(likelihood_solver=Counted(40)), sweep={"network_evaluations": [4, 8]})
    assert steps.count(80) == 1  # 32 points are one batch
    assert steps.count(40) == 2  # of these points, and of all 60 outside of the sweep
    assert steps.count(1) == steps.count(2) == 1


def test_flows_without_a_head_have_the_distances_of_their_solver(tmp_path):
    flow = FlowMatching(PLANE, OracleFeatures, likelihood_solver=RungeKutta4(40))
    rows = measured(tmp_path, flow, sweep={"network_evaluations": [4]})
    assert {name for name, _ in rows} == {"nll_rmse", "nll_bias"}
    assert {at for _, at in rows} == {4.0}


def test_who_has_which_numbers():
    metric, swept = FewStepLikelihood(), {"swept": "network_evaluations"}
    head, ode = ("nll_head", "nll_head_rmse", "nll_head_bias"), ("nll_rmse", "nll_bias")
    assert metric.expected(Prospect(PLANE, oracle())) == (*head, "head_mass")
    assert metric.expected(Prospect(PLANE, oracle(), **swept)) == (*head, "head_mass", *ode)
    assert metric.expected(Prospect(PLANE, oracle(), swept="guidance")) == ()
    cfm = build("cfm", POINTS_LABELLED)
    assert metric.expected(Prospect(POINTS_LABELLED, cfm)) == ()
    assert metric.expected(Prospect(POINTS_LABELLED, cfm, **swept)) == ode
    labelled = build("map_head", POINTS_LABELLED, conditional=True)
    assert metric.expected(Prospect(POINTS_LABELLED, labelled)) == head  # one density for each label
    for name in ("tarflow", "biflow"):
        assert metric.expected(Prospect(POINTS_LABELLED, build(name, POINTS_LABELLED), **swept)) == ()
    assert metric.expected(Prospect(PLANE)) == ()


POINTS_LABELLED = points().spec


def test_a_solver_without_a_stricter_one_leaves_the_head_without_its_distance():
    class Alone(RungeKutta4):
        def refined(self):
            return None

    flow = oracle(likelihood_solver=Alone(40))
    assert FewStepLikelihood().expected(Prospect(PLANE, flow)) == ("nll_head", "head_mass")
    setup = asked(flow)
    assert ConvergedLogDensities(8).ask(setup) is None
    given = {HeadDensities(): HeadDensities().ask(setup), ConvergedLogDensities(8): None}
    (row, *_) = FewStepLikelihood(8).measure(known(PLANE, given={**given, LogDensities(): None, HeadMass(128): None}))
    assert row.unconverged == "its distance from the converged ODE is not known: there is no stricter solve"


# ---- single measurements ------------------------------------------------------------------------------


def rows_for(spec, head, converged, solved=None, override=None, mass=None):
    given = {
        HeadDensities(): head,
        ConvergedLogDensities(3): converged,
        LogDensities(): solved,
        HeadMass(128): mass,
    }
    answers = known(spec, given=given)
    answers.override = override or SamplerOverride()
    return {row.metric: row for row in FewStepLikelihood(3).measure(answers)}


LOG_PROB = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
HEAD = Densities(LOG_PROB, "head", "Composition(num_jumps=2)")


def test_distances_are_in_the_unit_of_the_likelihood():
    converged = Converged(LOG_PROB[:3] - torch.tensor([1.0, 2.0, 2.0]).double(), 0.0, "long")
    nats = rows_for(POINTS, HEAD, converged)
    assert nats["nll_head"].value == 2.5
    assert nats["nll_head_rmse"].value == pytest.approx(math.sqrt(3))
    assert nats["nll_head_bias"].value == pytest.approx(-5 / 3)
    bits = rows_for(DIGITS, HEAD, converged)
    assert bits["nll_head_rmse"].unit == "bits/dim"
    assert bits["nll_head_rmse"].value == pytest.approx(math.sqrt(3) / (64 * math.log(2)))
    assert bits["nll_head"].protocol.startswith("head/test/4/uniform-dequantisation-17-levels/")
    noisy = rows_for(DIGITS, replace(HEAD, reports_bits_per_dim=False), converged)
    assert noisy["nll_head_bias"].value == pytest.approx(-5 / 3 / 64)


@pytest.mark.parametrize(
    ("error", "certain"), [(0.009, True), (0.011, True), (0.09, True), (0.11, False), (math.nan, True)]
)
def test_the_error_of_the_ode_may_be_a_tenth_of_the_distance(error, certain):
    converged = Converged(LOG_PROB[:3] - 1.0, error, "long")
    found = rows_for(POINTS, HEAD, converged)
    for name in ("nll_head", "nll_head_rmse", "nll_head_bias"):
        assert (found[name].unconverged == "") == certain, name
    exact = rows_for(POINTS, HEAD, Converged(LOG_PROB[:3], error, "long"))
    assert (exact["nll_head_rmse"].unconverged == "") == (not error > 0.01)


def test_a_distance_that_could_not_be_computed_costs_the_heads_value_its_claims():
    found = rows_for(POINTS, HEAD, Failure("out of memory"))
    assert found["nll_head"].unconverged.endswith("is not known: out of memory")
    assert found["nll_head_rmse"].reason == found["nll_head_bias"].reason == "out of memory"
    solved = Densities(LOG_PROB, "ode", "Euler(num_steps=2)")
    swept = rows_for(POINTS, None, Failure("out of memory"), solved, SamplerOverride(network_evaluations=2))
    assert swept["nll_rmse"].reason == "out of memory"


def test_the_mass_is_no_likelihood():
    found = rows_for(POINTS, None, None, mass=Mass(0.98, 100, "grid"))
    assert list(found) == ["head_mass"]
    assert (found["head_mass"].value, found["head_mass"].unit) == (0.98, "")


def test_nobody_without_any_of_it_has_rows():
    assert rows_for(POINTS, None, None) == {}
    setup = asked(build("tarflow", POINTS_LABELLED))
    for probe in (HeadDensities(), ConvergedLogDensities(3), HeadMass(16)):
        assert probe.ask(setup) is None
    guided = asked(oracle(), override=SamplerOverride(guidance=2.0))
    assert HeadDensities().ask(guided) is None
    assert HeadMass(16).ask(guided) is None


def test_the_error_of_the_stricter_solve_is_estimated_from_both():
    """Euler's method is of first order: half of the difference of 64 and 128 steps remains at 128."""
    flow = oracle(likelihood_solver=Euler(64), divergence=ExactDivergence())
    found = ConvergedLogDensities(20).ask(asked(flow))
    x = near().model_values("test", slice(20))
    exact = torch.distributions.Normal(2.0, 0.5).log_prob(x.double()).sum(1)
    assert found.error == pytest.approx(float((found.log_prob - exact).abs().mean()), rel=0.3)
    assert found.method == "twice the steps of Euler(num_steps=64)/ExactDivergence()"


def test_grey_levels_go_the_way_of_every_likelihood():
    data = FlowDataModule("digits", batch_size=16)
    data.setup("test")
    flow = build("map_head", data.spec).eval()
    found = HeadDensities().ask(setup_of(flow, data, num_likelihood=6))
    x = data.model_values("test", slice(6))
    direct = flow.head_density().solve(x, Condition(), torch.arange(6), 0).log_prob
    torch.testing.assert_close(found.log_prob, direct)
    assert (found.kind, found.reports_bits_per_dim, found.dequantize) == ("head", True, "uniform")


def test_latents_have_the_encoders_terms_which_cancel_in_the_distances():
    torch.manual_seed(0)
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=1, second_time=True)
    options = {"map_objective": Progressive(), "divergence_head": DivergenceHead(), "space": LatentSpace(autoencoder())}
    flow = FlowMap(IMAGES, network, likelihood_solver=RungeKutta4(2), **options).eval()
    perturb(flow)
    batch = replace(batch_of(IMAGES, 4), label=None)
    z = flow.space.encode_indexed(batch.x, batch.index, 0)
    own, head = flow.solved_density(), flow.head_density(2)
    assert flow.describe().likelihood == "bound"
    of_latents, of_data = (
        ask(head) - ask(own)
        for ask in (
            lambda density: density.solve(z, Condition(), batch.index, 0).log_prob,
            lambda density: flow.solved_likelihood(density, batch).log_prob,
        )
    )
    torch.testing.assert_close(of_data, of_latents, atol=1e-4, rtol=1e-4)
    assert FewStepLikelihood().expected(Prospect(IMAGES, flow))[:2] == ("nll_head", "nll_head_rmse")


def test_evaluations_that_the_solver_cannot_spend_are_refused_before_training(tmp_path):
    class Fussy(RungeKutta4):
        def with_evaluations(self, num: int) -> Solver:
            raise ValueError("Fussy has none")

    measure = evaluator({"few": FewStepLikelihood()}, references={}, sweep={"network_evaluations": [3]})
    with pytest.raises(ValueError, match=r"evaluator\.metrics\.few: Fussy has none"):
        trainer(tmp_path, measure).fit(oracle(likelihood_solver=Fussy(4)), near())
