"""Likelihoods through a solver: their errors against long solves and closed forms, and what is marked unconverged."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flowbench.core.rows import Row
from flowbench.data import DataSpec, FlowDataModule, get_density
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Setup, merged
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowMatching
from flowbench.flows import (
    DormandPrince,
    Euler,
    HutchinsonDivergence,
    LinearPath,
    Midpoint,
    Refinement,
    RungeKutta4,
    Solver,
)
from flowbench.networks import MLP
from flowbench.tasks.generation import NegativeLogLikelihood
from flowbench.tasks.generation.likelihood_check import RefinedDensities, RefinedLogDensities
from tests.marks import slow

from ...contract.builders import build
from ...evaluation.evaluator_runs import evaluator, points, rows_of, trainer
from ...families.test_trained import train
from ...numerical.gaussian_flow import GaussianFlow

SPEC = DataSpec("points", "1", (2,))
MEAN, STD = torch.tensor([1.5, -0.5]), 0.4


class GaussianField(nn.Module):
    """The closed-form velocity from the standard normal to N(mean, std^2 I)."""

    def __init__(self, shape: tuple[int, ...] = (2,), num_classes: int | None = None) -> None:
        super().__init__()
        self.field = GaussianFlow(LinearPath(), 1.0, STD, MEAN)
        self.dummy = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.field(t[:, None], x)


def measured(tmp_path, flow, metric: NegativeLogLikelihood | None = None, data=None, **options) -> dict:
    """Rows by metric and point of the sweep."""
    measure = evaluator({"nll": metric or NegativeLogLikelihood()}, references={}, num_likelihood=60, **options)
    trainer(tmp_path, measure).test(flow, data or points(), verbose=False)
    return rows_of(tmp_path)


def gaussian(**options) -> FlowMatching:
    return FlowMatching(SPEC, lambda *_: GaussianField(), **options)


def truth(data: FlowDataModule, num: int) -> Tensor:
    """Log-densities of the first test points under N(mean, std^2 I)."""
    x = data.model_values("test", slice(num)).double()
    return torch.distributions.Normal(MEAN.double(), STD).log_prob(x).sum(1)


def test_the_closed_form_field_of_a_gaussian_passes(tmp_path):
    rows = measured(tmp_path, gaussian())
    nll, error = rows["nll", None], rows["nll_error", None]
    assert (nll.status, error.status, error.unit, error.n) == ("ok", "ok", nll.unit, 16)
    assert error.value < 1e-3
    assert nll.value == pytest.approx(-float(truth(points(), 60).mean()), abs=5e-3)
    assert "probe_standard_error" not in nll.provenance, "the trace is exact"
    method = "RungeKutta4(num_steps=32)/ExactDivergence()"
    assert nll.protocol.endswith(method)
    assert error.protocol == f"ode/test/first-16/against twice the steps/{method}"


@pytest.mark.parametrize(("steps", "wide"), [(128, 0.1), (32, 0.4)])
def test_the_error_is_that_to_the_closed_form(tmp_path, steps, wide):
    """Test points far from this Gaussian have log-densities of minus hundreds, which 32 steps of Euler's miss."""
    flow = gaussian(likelihood_solver=Euler(steps))
    rows, data = measured(tmp_path, flow), points()
    x = data.model_values("test", slice(16))
    found = flow.log_prob(x, index=torch.arange(16))
    expected = float((found - truth(data, 16)).abs().mean())
    assert rows["nll_error", None].value == pytest.approx(expected, rel=wide)
    assert rows["nll", None].status == "unconverged"


@pytest.fixture(scope="module")
def cfm() -> FlowMatching:
    """Trained on two moons."""
    torch.manual_seed(0)
    return train(FlowMatching(SPEC, partial(MLP, width=48, depth=2)), get_density("moons").sample, 300)


def moons() -> FlowDataModule:
    return FlowDataModule("moons", batch_size=16, eval_batch_size=100)


def per_point(flow: FlowMatching, solver: Solver) -> Tensor:
    own, flow.likelihood_solver = flow.likelihood_solver, solver
    try:
        with flow.evaluating("ema"):
            return flow.log_prob(moons().model_values("test", slice(16)), index=torch.arange(16))
    finally:
        flow.likelihood_solver = own


@pytest.fixture(scope="module")
def solved(cfm) -> Tensor:
    """Log-densities by 256 steps."""
    return per_point(cfm, RungeKutta4(256))


@pytest.mark.slow
def test_the_long_solve_is_that_of_more_steps(cfm, solved):
    assert float((per_point(cfm, RungeKutta4(1024)) - solved).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (Euler(8), "unconverged"),
        slow(Midpoint(4), "unconverged"),
        (RungeKutta4(32), "ok"),
        slow(DormandPrince(1e-5, 1e-5), "ok"),
    ],
)
def test_a_trained_cfm_has_converged_with_enough_steps_only(cfm, solved, tmp_path, solver, status):
    """The estimates are compared with a long solve."""
    cfm.likelihood_solver = solver
    rows = measured(tmp_path, cfm, data=moons())
    nll, error = rows["nll", None], rows["nll_error", None]
    assert (nll.status, error.status) == (status, "ok")
    actual = float((per_point(cfm, solver) - solved).abs().mean())
    assert (actual > 0.01) == (status == "unconverged")
    if status == "unconverged":
        assert error.value == pytest.approx(actual, rel=0.7)
        assert nll.provenance["message"] == f"not converged (error {error.value:.2g} nats, tolerance 0.01)"
        assert math.isfinite(nll.value)
    else:
        assert "message" not in nll.provenance


def test_the_tolerance_decides(cfm, tmp_path):
    cfm.likelihood_solver = Euler(8)
    rows = measured(tmp_path, cfm, NegativeLogLikelihood(tolerance=100.0), moons())
    assert rows["nll", None].status == "ok"
    assert rows["nll_error", None].value > 0.01


def test_no_points_no_check(cfm, tmp_path):
    cfm.likelihood_solver = Euler(8)
    rows = measured(tmp_path, cfm, NegativeLogLikelihood(num_checked=0), moons())
    assert rows["nll", None].status == "ok"
    assert ("nll_error", None) not in rows


def test_at_most_the_points_that_are_measured_are_checked(cfm, tmp_path):
    rows = measured(tmp_path, cfm, NegativeLogLikelihood(num_checked=1000), moons())
    assert rows["nll_error", None].n == 60
    both = merged([RefinedLogDensities(3), RefinedLogDensities(5)])
    assert both == [RefinedLogDensities(5)]
    found = RefinedDensities(torch.arange(5.0), torch.ones(5), 0.5, "x").first(3)
    assert found.error_of(torch.arange(7.0) + 1) == 2.0


def test_a_check_that_fails_leaves_the_number_but_not_as_converged(cfm, tmp_path):
    """The stricter solve needs more steps than it may take."""

    class Hopeless(RungeKutta4):
        def refined(self) -> Refinement:
            return Refinement(DormandPrince(1e-9, 1e-9, max_steps=1), 0.1, "one step")

    cfm.likelihood_solver = Hopeless(32)
    rows = measured(tmp_path, cfm, data=moons())
    assert (rows["nll", None].status, rows["nll_error", None].status) == ("unconverged", "failed")
    assert "max_num_steps exceeded" in rows["nll", None].provenance["message"]
    assert math.isfinite(rows["nll", None].value)


@pytest.mark.parametrize("name", ["tarflow", "latent_cfm", "starflow"])
def test_closed_forms_and_bounds_have_no_error(name):
    data = points() if name == "tarflow" else FlowDataModule("digits", batch_size=16)
    flow = build(name, data.spec)
    metric = NegativeLogLikelihood()
    setup = Setup(module=flow, data=data, reference=None, held_out=None, extractors={}, num_likelihood=4)
    assert RefinedLogDensities(4).ask(setup) is None
    assert metric.expected(Prospect(data.spec, flow)) == ("nll",)
    assert metric.expected(Prospect(data.spec, flow, swept="network_evaluations")) == ()


@pytest.mark.slow
def test_the_probes_standard_error_is_in_the_row(tmp_path):
    """Of a linear field with Jacobian A of symmetric part S the variance of a sign probe is 2 (|S|^2 - sum S_ii^2)."""
    jacobian = torch.tensor([[0.3, 1.0], [0.6, -0.2]])

    class Linear(GaussianField):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return x @ jacobian.T

    symmetric = (jacobian + jacobian.T) / 2
    variance = 2 * float(symmetric.square().sum() - symmetric.diagonal().square().sum())
    flow = FlowMatching(SPEC, lambda *_: Linear(), divergence=HutchinsonDivergence(num_probes=64))
    rows = measured(tmp_path, flow)
    expected = math.sqrt(variance / 64 / 60)
    assert rows["nll", None].provenance["probe_standard_error"] == pytest.approx(expected, rel=0.1)
    single = FlowMatching(SPEC, lambda *_: Linear(), divergence=HutchinsonDivergence(num_probes=1))
    assert "probe_standard_error" not in measured(tmp_path / "single", single)["nll", None].provenance


def test_a_sweep_of_network_evaluations_is_one_of_the_likelihood_too(cfm, tmp_path):
    cfm.likelihood_solver = Euler(128)
    metric = NegativeLogLikelihood(in_sweep=True)
    rows = measured(tmp_path, cfm, metric, moons(), sweep={"network_evaluations": [2, 8, 128]})
    found = [rows["nll", at] for at in (2.0, 8.0, 128.0)]
    assert [row.status for row in found[:2]] == ["unconverged", "unconverged"]
    assert [row.protocol.split("/")[3] for row in found] == [f"Euler(num_steps={n})" for n in (2, 8, 128)]
    # The same solves; only the float64 sums over them may differ in their order.
    assert found[2].value == pytest.approx(rows["nll", None].value, rel=1e-14)
    assert rows["nll_error", 2.0].value > rows["nll_error", 8.0].value > rows["nll_error", 128.0].value
    who = Prospect(SPEC, cfm, swept="network_evaluations")
    assert metric.expected(who) == ("nll", "nll_error")
    assert metric.expected(Prospect(SPEC, cfm, swept="guidance")) == ()


def test_evaluations_that_the_solver_cannot_spend_are_refused_before_training(tmp_path):
    flow = build("cfm", points().spec, likelihood_solver=Midpoint(4))
    measure = evaluator(
        {"nll": NegativeLogLikelihood(in_sweep=True)}, references={}, sweep={"network_evaluations": [3]}
    )
    flow.solver = Euler(4)
    with pytest.raises(ValueError, match=r"evaluator.metrics.nll: Midpoint takes 2 evaluations per step"):
        trainer(tmp_path, measure).fit(flow, points())


def test_a_row_that_has_not_converged_is_read_back():
    fields: dict = {name: "" for name in ("bench", "problem", "contender", "family", "dataset", "protocol", "unit")}
    row = Row(
        **fields, seed=0, metric="nll", value=-9.9, n=1, network_evaluations=8, weights="ema", status="unconverged"
    )
    assert Row.from_json(row.to_json()) == row


def test_a_point_of_a_sweep_is_solved_by_as_many_evaluations(cfm):
    cfm.likelihood_solver = Midpoint(32)
    assert cfm.solved_density(8).method == "Midpoint(num_steps=4)/ExactDivergence()"
    assert SamplerOverride(network_evaluations=8).axis == "network_evaluations"
