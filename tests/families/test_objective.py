"""Flows whose network predicts velocity, data, noise or score: one field, one density, one set of refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flowbench.data import Batch, DataSpec
from flowbench.families import FlowMatching, Reflow
from flowbench.flows import (
    ClassifierFreeGuidance,
    CosinePath,
    DataObjective,
    EulerMaruyama,
    GibbsWeight,
    LinearPath,
    NoiseObjective,
    OptimalTransportCoupling,
    RatioAwareGuidance,
    RungeKutta4,
    SchrodingerBridgePath,
    ScoreObjective,
    VelocityObjective,
    VonMisesFisherSource,
)
from flowbench.tasks.generation.latent_bound import held_out_loss
from flowbench.training import load_checkpoint
from tests.marks import slow

from ..contract.builders import IMAGES, POINTS, batch_of, build
from ..numerical.gaussian_flow import GaussianFlow

PLANE = DataSpec("plane", "1", (2,), num_classes=2)
STD = 0.5
EVERY = [VelocityObjective, DataObjective, NoiseObjective, ScoreObjective]
every_objective = pytest.mark.parametrize("kind", EVERY)


# Of each label; 2 is the null label.
MEANS = torch.tensor([[2.0, -1.0], [-1.0, 0.5], [0.4, 0.2]], dtype=torch.float64)


class Known(nn.Module):
    """Predicts for data N(mean, STD^2 I) of two classes, in closed form."""

    def __init__(self, prediction: str, path) -> None:
        super().__init__()
        self.prediction, self.path = prediction, path
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.full((len(x),), 2) if label is None else label
        time, mean = t.double()[:, None], MEANS[label]
        c, variance = self.path.coefficients(time), GaussianFlow(self.path, 1.0, STD, mean).variance_and_rate(time)[0]
        centred = (x.double() - c.alpha * mean) / variance
        data, noise = mean + c.alpha * STD**2 * centred, c.sigma * centred
        found = {"data": data, "noise": noise, "score": -centred, "velocity": c.d_alpha * data + c.d_sigma * noise}
        return found[self.prediction].to(x) + 0 * self.unused


def known(kind, path=None, **options) -> FlowMatching:
    """A flow of class labels whose every number is known, in double precision."""
    path = path or LinearPath()
    options = {"solver": RungeKutta4(num_steps=50), "likelihood_solver": RungeKutta4(num_steps=50), **options}
    network = Known(kind.prediction, path)
    flow = FlowMatching(PLANE, lambda *_: network, path=path, objective=kind(), conditional=True, **options)
    return flow.double().eval()


def noise_and_labels(flow: FlowMatching, num: int = 6) -> tuple[Tensor, Tensor]:
    return flow.draw_noise(torch.arange(num), 0).double(), torch.arange(num) % 2


# ---- one field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LinearPath(), slow(CosinePath())], ids=repr)
@every_objective
def test_every_prediction_has_the_samples_and_the_density_of_the_closed_form(kind, path):
    flow = known(kind, path)
    z, label = noise_and_labels(flow)
    mean = MEANS[label]
    torch.testing.assert_close(flow.sample(z, label).x, mean + STD * z, atol=2e-3, rtol=0)
    x = mean + STD * z
    expected = -(z.square().sum(1) / 2) - math.log(2 * math.pi * STD**2)
    torch.testing.assert_close(flow.log_prob(x, label), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(flow.encode(x, label), z, atol=4e-3, rtol=0)
    again = flow.sample(flow.encode(x, label), label).x
    torch.testing.assert_close(again, x, atol=1e-3, rtol=0)
    path_of = flow.trajectory(z, label, 9)
    torch.testing.assert_close(path_of.states[-1], x, atol=2e-3, rtol=0)
    drawn, likelihood = flow.sample_with_log_prob(z, label)
    torch.testing.assert_close(drawn, x, atol=2e-3, rtol=0)
    torch.testing.assert_close(likelihood.log_prob, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(3.0), RatioAwareGuidance(max_scale=3.0, decay=1.0)])
def test_guidance_means_the_same_whatever_is_predicted(guidance):
    plain, *others = (known(kind, guidance=guidance) for kind in EVERY)
    z, label = noise_and_labels(plain)
    expected = plain.sample(z, label).x
    assert not torch.allclose(expected, plain.sample(z, label, guidance=1.0).x, atol=0.1)
    for flow in others:
        torch.testing.assert_close(flow.sample(z, label).x, expected, atol=5e-3, rtol=0)


@every_objective
def test_another_path_and_stochastic_samples_follow_the_same_field(kind):
    plain = known(kind)
    z, label = noise_and_labels(plain)
    moved = known(kind, sampling_path=CosinePath())
    torch.testing.assert_close(moved.sample(z, label).x, plain.sample(z, label).x, atol=5e-3, rtol=0)
    noisy = [known(k, solver=EulerMaruyama(40)).sample(z, label).x for k in (VelocityObjective, kind)]
    torch.testing.assert_close(noisy[1], noisy[0], atol=2e-2, rtol=0)


@every_objective
def test_the_held_out_loss_is_that_of_the_velocity(kind):
    flows = [known(k) for k in (VelocityObjective, kind)]
    batch = Batch(torch.randn(8, 2, dtype=torch.float64), label=torch.arange(8) % 2, index=torch.arange(8))
    plain, found = (held_out_loss(flow, batch, seed=0) for flow in flows)
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0)


# ---- training -----------------------------------------------------------------------------------------


def test_the_default_is_the_mean_squared_error_of_the_velocity_bit_for_bit():
    batch = batch_of(POINTS, 32)
    flow, named = build("cfm", POINTS), build("cfm", POINTS, objective=VelocityObjective())
    pairs, point = flow.draw_path_sample(batch.x, flow.null_condition(32), batch, torch.Generator().manual_seed(3))
    by_hand = (flow.network(point.xt, point.t) - point.velocity).square().flatten(1).mean(1).mean()
    for module in (flow, named):
        loss = module.training_loss(batch, torch.Generator().manual_seed(3))
        assert torch.equal(loss.total, by_hand)
        assert set(loss.metrics) == {"unweighted_loss", *pairs.metrics}


@every_objective
def test_training_is_at_the_times_at_which_the_network_is_asked(kind):
    flow = build("cfm", POINTS, objective=kind())
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    _, point = flow.draw_path_sample(x, flow.null_condition(4000), Batch(x), torch.Generator().manual_seed(1))
    assert torch.equal(flow.objective.clock(point.t), point.t)
    outside = {"velocity": [], "data": [point.t > 0.98]}.get(kind.prediction, [point.t < 0.02])
    assert not any(there.any() for there in outside)


@pytest.mark.parametrize(
    "objective", [VelocityObjective("elbo"), DataObjective(), NoiseObjective("velocity")], ids=repr
)
def test_the_velocitys_error_is_logged_beside_other_losses(objective):
    flow = build("cfm", POINTS, objective=objective)
    batch = batch_of(POINTS, 32)
    loss = flow.training_loss(batch, torch.Generator().manual_seed(3))
    _, point = flow.draw_path_sample(batch.x, flow.null_condition(32), batch, torch.Generator().manual_seed(3))
    found = flow.objective.field(flow.network)(point.xt, point.t)
    torch.testing.assert_close(loss.metrics["velocity_loss"], (found - point.velocity).square().mean())
    assert loss.metrics["unweighted_loss"] == loss.total.detach()


@pytest.mark.parametrize(
    ("name", "spec"), [("ot_cfm", POINTS), ("wcfm", POINTS), ("latent_cfm", IMAGES), ("nfm", IMAGES)]
)
@pytest.mark.parametrize("objective", [DataObjective("velocity"), NoiseObjective()], ids=repr)
def test_the_families_of_flow_matching_take_the_axis(name, spec, objective):
    """Pairs that are coupled or weighted have posterior means as well: only a score needs independent ones."""
    flow = build(name, spec, objective=objective)
    flow.training_loss(batch_of(spec, 16), torch.Generator().manual_seed(0)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    z = flow.draw_noise(torch.arange(2), 0)
    assert flow.eval().sample(z, network_evaluations=4).x.isfinite().all()
    for refused in (ScoreObjective(), DataObjective("elbo")):
        if name != "latent_cfm":
            with pytest.raises(ValueError, match="needs a Gaussian source and independent pairs"):
                build(name, spec, objective=refused)


@every_objective
def test_a_flow_whose_network_starts_at_zero_is_finite(kind):
    flow = build("cfm", POINTS, objective=kind())
    with torch.no_grad():
        for parameter in flow.network.parameters():
            parameter.zero_()
    z = flow.eval().draw_noise(torch.arange(3), 0)
    assert flow.sample(z).x.isfinite().all()
    assert flow.encode(z).isfinite().all()
    assert flow.log_prob(z).isfinite().all()
    assert flow.training_loss(batch_of(POINTS), torch.Generator().manual_seed(0)).total.isfinite()


# ---- what is refused, and what is written down --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": DataObjective(), "path": SchrodingerBridgePath(0.5)}, "has none: take VelocityObjective"),
        ({"objective": NoiseObjective(), "path": LinearPath(sigma=0.1)}, "has none: take VelocityObjective"),
        ({"objective": ScoreObjective(), "coupling": OptimalTransportCoupling()}, "independent pairs of one weight"),
        ({"objective": ScoreObjective(), "weight": GibbsWeight(kappa=1.0)}, "and GibbsWeight: predict velocity"),
        ({"objective": ScoreObjective(), "source": VonMisesFisherSource(5.0)}, "needs a Gaussian source"),
        ({"objective": VelocityObjective("elbo"), "coupling": OptimalTransportCoupling()}, "independent pairs"),
    ],
)
def test_a_prediction_that_would_not_be_what_it_is_called_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build("cfm", POINTS, **options)
    assert "\n" not in str(caught.value)


def saved(flow: FlowMatching, file) -> dict:
    checkpoint = {"state_dict": flow.state_dict()}
    flow.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, file)
    return checkpoint


def test_a_checkpoint_of_another_prediction_is_refused_in_one_line(tmp_path):
    saved(build("cfm", POINTS, objective=DataObjective()), tmp_path / "data.ckpt")
    load_checkpoint(build("cfm", POINTS, objective=DataObjective("velocity")), tmp_path / "data.ckpt")
    for objective, name in ((None, "velocity"), (NoiseObjective(), "noise")):
        wanted = f"checkpoint's prediction is data, but the configuration builds {name}"
        with pytest.raises(ValueError, match=wanted) as caught:
            load_checkpoint(build("cfm", POINTS, objective=objective), tmp_path / "data.ckpt")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_earlier_versions_holds_velocities(tmp_path):
    checkpoint = saved(build("cfm", POINTS), tmp_path / "new.ckpt")
    del checkpoint["flowbench"]["prediction"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    load_checkpoint(build("cfm", POINTS), tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="checkpoint's prediction is velocity, but the configuration builds data"):
        load_checkpoint(build("cfm", POINTS, objective=DataObjective()), tmp_path / "old.ckpt")


def test_a_student_starts_from_the_weights_of_a_teacher_of_the_same_prediction_only():
    teacher = known(DataObjective).float()

    def student(**options):
        network = Known("data", LinearPath())
        return Reflow(PLANE, lambda *_: network, teacher=teacher, num_pairs=10, conditional=True, **options)

    with pytest.raises(ValueError, match="teacher's network predicts data and the student's velocity: give both one"):
        student()
    student(objective=DataObjective("velocity"))
    student(initialise_from_teacher=False)
    with pytest.raises(ValueError, match="independent pairs of one weight"):
        student(objective=ScoreObjective())


def test_rows_name_the_clip_of_a_prediction_that_has_one():
    plain, data = build("cfm", POINTS).describe(), build("cfm", POINTS, objective=DataObjective(clip=0.1)).describe()
    assert plain.sampler == "Midpoint(num_steps=20)"
    assert data.sampler == "Midpoint(num_steps=20)+data-prediction[clip=0.1]"
    assert "prediction" not in plain.likelihood_method
    assert data.likelihood_method.endswith("/data-prediction[clip=0.1]")
    # The weight of the errors is of the training, and names no sampler.
    assert build("cfm", POINTS, objective=VelocityObjective("elbo")).describe() == plain
