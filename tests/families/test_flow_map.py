"""The family of flow maps: its loss beside flow matching's, its samplers, its teachers, and what it learns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from flowbench.data import Batch, FlowDataModule
from flowbench.families import Condition, FlowMap, FlowMatching
from flowbench.families.average_velocity import AverageVelocityNetwork
from flowbench.families.family_contract import perturb
from flowbench.flows import (
    ClassifierFreeGuidance,
    Composition,
    ConsistencyTraining,
    CosinePath,
    DataObjective,
    DyadicPairs,
    GaussianSource,
    GibbsWeight,
    JumpsToData,
    Lagrangian,
    LinearPath,
    LogitNormalTimes,
    MeanFlow,
    OptimalTransportCoupling,
    Progressive,
    Renoise,
    RungeKutta4,
    Shortcut,
    SolutionConsistency,
    UniformPairs,
)
from flowbench.networks import MLP, DiT
from flowbench.training.count import count_flops
from tests.marks import slow

from ..contract.builders import IMAGES, POINTS, batch_of
from ..numerical.flow_map_oracles import GOLDEN, GaussianMap
from .teachers import PLANE, gaussian_teacher

OBJECTIVES = {
    "soflow": SolutionConsistency,
    "progressive": Progressive,
    "uniform": partial(Progressive, split="uniform"),
    "shortcut": Shortcut,
    "lagrangian": Lagrangian,
    "lagrangian_jvp": partial(Lagrangian, derivative="jvp"),
    "meanflow": MeanFlow,
    "improved": partial(MeanFlow, tangent="self"),
    "meanflow_difference": partial(MeanFlow, derivative="difference"),
    "consistency": ConsistencyTraining,
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
NETWORK = partial(MLP, width=16, depth=2)
TWO = partial(NETWORK, second_time=True)


class OracleNetwork(nn.Module):
    """The average velocities of :class:`GaussianMap` as a network."""

    second_time = True

    def __init__(self, *_) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.map = GaussianMap()

    def forward(self, x, t, label=None, condition=None, end=None):
        t = t.expand(len(x))
        return self.map(x, t, t if end is None else end.expand(len(x))) + 0 * self.unused


def flow_map(spec=POINTS, network=TWO, name="soflow", seed=0, perturbed=True, **options) -> FlowMap:
    torch.manual_seed(seed)
    module = FlowMap(spec, network, map_objective=OBJECTIVES[name](), **options)
    if perturbed:
        perturb(module, seed)
    return module


def loss(module, size=64, seed=0, **options):
    return module.training_loss(batch_of(module.spec, size, **options), torch.Generator().manual_seed(seed))


def oracle(**options) -> FlowMap:
    return FlowMap(PLANE, OracleNetwork, **options).double().eval()


# ---- the loss ------------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("conditional", [False, True])
def test_a_batch_without_jumps_has_the_loss_of_flow_matching_to_the_bit(name, conditional):
    options = {"conditional": conditional, "times": LogitNormalTimes()}
    mapped = flow_map(name=name, diagonal=1.0, **options)
    plain = FlowMatching(POINTS, NETWORK, **options)
    state = {k: v for k, v in mapped.network.state_dict().items() if "length" not in k}
    plain.network.load_state_dict(state)
    mapped.network.load_state_dict(state)
    found, expected = loss(mapped), loss(plain)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.metrics["unweighted_loss"], expected.metrics["unweighted_loss"])


@every_objective
def test_the_share_of_the_diagonal_is_that_of_the_batch(name):
    module = flow_map(name=name, diagonal=0.25)
    found = loss(module, 64)
    whole = 0.25 * found.metrics["diagonal_loss"] + 0.75 * found.metrics["jump_loss"]
    torch.testing.assert_close(found.total.detach(), whole)
    torch.testing.assert_close(found.metrics["unweighted_loss"], whole)


def test_the_true_map_has_no_residual():
    """Pairs of optimal transport to N(2, 1) are shifts: no velocity varies, so the true map has no loss at all."""

    class Shift(OracleNetwork):
        def forward(self, x, t, label=None, condition=None, end=None):
            return torch.full_like(x, 2.0) + 0 * self.unused

    class ShiftedSource(GaussianSource):
        is_paired = True

        def sample_for(self, x1, generator):
            return x1 - 2

    for name, make in OBJECTIVES.items():
        module = FlowMap(PLANE, Shift, map_objective=make(), source=ShiftedSource()).double()
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = module.training_loss(Batch(x), torch.Generator().manual_seed(0))
        assert found.total < 1e-10, name


def test_couplings_and_weights_are_those_of_flow_matching():
    coupled = flow_map(coupling=OptimalTransportCoupling())
    assert loss(coupled).diagnostics()["cost_ratio"] < 1
    weighted = flow_map(weight=GibbsWeight(kappa=0.5))
    weighted.weight.fit(*torch.randn(2, 64, 2), torch.Generator(), True, source_std=1.0)
    found = loss(weighted)
    assert not torch.equal(found.total.detach(), found.metrics["unweighted_loss"])
    plain = flow_map()
    assert not torch.equal(loss(plain).total, loss(coupled).total)


@every_objective
def test_every_parameter_moves_and_validation_runs_in_inference_mode(name):
    module = flow_map(IMAGES, partial(DiT, width=16, depth=1, num_heads=2, second_time=True), name=name)
    before = {key: value.clone() for key, value in module.named_parameters()}
    optimizer = module.optimizer_config.build(module)
    loss(module).total.backward()
    optimizer.step()
    for key, value in module.named_parameters():
        assert not torch.equal(before[key], value), key
    with torch.inference_mode():
        assert loss(module.eval()).total.isfinite()


@every_objective
def test_the_loss_under_autocast_is_near_that_in_full_precision(name):
    """Nearby velocities are never subtracted in bfloat16: their difference over a length of 0.002 would be noise."""
    module = flow_map(name=name)
    exact = loss(module).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(module).total
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


# ---- what a step costs ------------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("diagonal", [slow(0.25), 0.5, slow(1.0)])
def test_operations_per_sample_are_those_of_a_whole_batch(name, diagonal):
    module = flow_map(name=name, diagonal=diagonal)
    whole = count_flops(lambda: loss(module, 64).total)
    assert module.flops_of_one() * 64 == pytest.approx(whole, rel=1e-6)
    assert module.count().training_flops == module.flops_of_one()
    assert module.diagonal == diagonal
    plain = FlowMatching(POINTS, NETWORK).flops_of_one()
    if diagonal < 1:
        assert module.flops_of_one() > 1.1 * plain


def test_a_teachers_evaluations_are_counted():
    teacher = FlowMatching(POINTS, NETWORK).eval()
    evaluation = teacher.count().evaluation_flops
    taught, plain = (flow_map(teacher=t) for t in (teacher, None))
    assert taught.flops_of_one() == pytest.approx(plain.flops_of_one() + evaluation, rel=1e-6)


def test_operations_are_counted_without_weights():
    with torch.device("meta"):
        on_meta = FlowMap(POINTS, TWO, map_objective=MeanFlow())
        assert on_meta.flops_of_one() == flow_map(name="meanflow").flops_of_one()


# ---- samples ------------------------------------------------------------------------------


def test_the_golden_map_through_the_family():
    module = oracle()
    for (s, t, x), (expected, *_) in GOLDEN.items():
        found = module.flow_jump(torch.full((1, 2), x, dtype=torch.float64), Condition(), s, t)
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("number", [1, 2, 8])
def test_any_number_of_jumps_ends_at_the_same_samples(number):
    module = oracle()
    noise = module.draw_noise(torch.arange(20), 0).double()
    found = module.sample(noise, network_evaluations=number)
    assert found.network_evaluations == number
    assert (found.x - (2 + 0.5 * noise)).abs().max() < 1e-10


def test_paths_encodings_and_likelihoods_are_those_of_the_velocity():
    module = oracle(likelihood_solver=RungeKutta4(40), solver=RungeKutta4(40))
    noise = module.draw_noise(torch.arange(20), 0).double()
    x = module.sample(noise).x
    assert (module.encode(x) - noise).abs().max() < 1e-5
    assert (module.trajectory(noise, num_points=65).states[-1] - x).abs().max() < 1e-3
    expected = torch.distributions.Normal(2.0, 0.5).log_prob(x).sum(1)
    assert (module.log_prob(x) - expected).abs().max() < 1e-5
    velocity = module.trajectory(noise, num_points=3).velocities[1]
    state = module.trajectory(noise, num_points=3).states[1]
    assert (velocity - GaussianMap().velocity(state, torch.full((20,), 0.5, dtype=torch.float64))).abs().max() < 1e-9


def test_guided_jumps_cost_two_evaluations_and_spend_the_budget_exactly():
    module = flow_map(conditional=True)
    noise, label = module.draw_noise(torch.arange(4), 0), torch.tensor([0, 1, 2, 0])
    assert module.sample(noise, label, network_evaluations=4, guidance=2.0).network_evaluations == 4
    with pytest.raises(ValueError, match="cannot spend exactly 3 network evaluations"):
        module.sample(noise, label, network_evaluations=3, guidance=2.0)
    found = module.sample(noise, label, guidance=2.0)
    assert found.network_evaluations == 2
    whole, none = (module.sample(noise, given).x - noise for given in (label, None))
    torch.testing.assert_close(found.x - noise, none + 2 * (whole - none))
    late = flow_map(conditional=True, guidance=ClassifierFreeGuidance(2.0, interval=(0.5, 1.0)))
    assert late.sample(noise, label, network_evaluations=3).network_evaluations == 3  # one jump of two is guided


def test_samplers_are_named_and_counted():
    for jumps, name in ((Composition(2), "Composition(num_jumps=2)"), (Renoise(2), "Renoise(num_jumps=2)")):
        module = flow_map(jumps=jumps)
        assert module.describe().sampler == name
        noise = module.draw_noise(torch.arange(5), 0)
        assert module.sample(noise).network_evaluations == 2
        assert module.sample(noise, network_evaluations=4).network_evaluations == 4
        counted = module.count()
        assert (counted.evaluations, counted.sampling_flops) == (2, 2 * counted.evaluation_flops)
    assert not torch.allclose(
        flow_map(jumps=Renoise(2)).sample(noise).x, flow_map(jumps=Composition(2)).sample(noise).x
    )
    guided = flow_map(conditional=True, target_guidance=2.0, guidance=ClassifierFreeGuidance(1.0, (0.2, 0.8)))
    sampler = "Composition(num_jumps=1)+ClassifierFreeGuidance(scale=1, interval=(0.2, 0.8))+target_guidance=2"
    assert guided.describe().sampler == sampler


def test_a_renoised_sample_does_not_depend_on_its_batch():
    module = flow_map(jumps=Renoise(4))
    noise = module.draw_noise(torch.arange(6), 0)
    torch.testing.assert_close(module.sample(noise).x[2:3], module.sample(noise[2:3]).x)


def test_untrained_jumps_are_refused_before_training():
    shortcut = flow_map(name="shortcut")
    for number in (1, 4, 32, 64):
        shortcut.check_sampling(network_evaluations=number)
    for number in (3, 128):
        with pytest.raises(ValueError, match=rf"num_jumps={number}\) jumps from .* trains those of a grid of 1, 2, 4"):
            shortcut.check_sampling(network_evaluations=number)
    consistency = flow_map(name="consistency")
    with pytest.raises(ValueError, match="trains those to the data"):
        consistency.check_sampling(network_evaluations=2)
    with pytest.raises(ValueError, match="trains those to the data"):
        flow_map(name="consistency", jumps=Composition(2))


@pytest.mark.parametrize("name", ["meanflow", "soflow"])
def test_maps_that_are_trained_to_the_data_alone_renoise(name):
    """Their targets have the end of the jump: jumps to time 1 teach each other, and nothing teaches 0 to 1/2."""
    module = flow_map(name=name, jump_times=JumpsToData())
    module.check_sampling(network_evaluations=1)
    with pytest.raises(ValueError, match=r"from 0 to 0\.5, but JumpsToData.* trains those to the data"):
        module.check_sampling(network_evaluations=2)
    renoised = flow_map(name=name, jump_times=JumpsToData(), jumps=Renoise(2))
    assert renoised.sample(renoised.draw_noise(torch.arange(3), 0)).network_evaluations == 2
    assert loss(renoised).total.isfinite()


# ---- guidance that is trained in ------------------------------------------------------------------------------


def test_guided_targets_replace_the_velocity_of_labelled_pairs_alone():
    """By hand: w v + (1 - w) u(x, s, s) without the label; a dropped label learns the velocity itself."""
    module = flow_map(conditional=True, target_guidance=3.0)
    x0, x1 = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    point = LinearPath().sample(x0, x1, torch.tensor([0.1, 0.4, 0.6, 0.9]))
    given = Condition(torch.tensor([0, 3, 1, 3]))
    found = module._target(AverageVelocityNetwork(module.network, given, False), point, given)
    free = module.network(point.xt, point.t, torch.full((4,), 3))
    expected = 3 * point.velocity - 2 * free
    expected[[1, 3]] = point.velocity[[1, 3]]
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    with pytest.raises(ValueError, match="needs labels: set conditional=true"):
        flow_map(target_guidance=2.0)
    with pytest.raises(ValueError, match="needs a trained null label"):
        flow_map(target_guidance=2.0, conditional=True, label_dropout=0.0)


# ---- teachers ------------------------------------------------------------------------------


def test_a_student_starts_as_its_teacher_at_every_length():
    torch.manual_seed(0)
    teacher = FlowMatching(POINTS, NETWORK).eval()
    perturb(teacher)
    student = FlowMap(POINTS, TWO, teacher=teacher)
    x, t = torch.randn(5, 2), torch.rand(5)
    for end in (t, torch.ones(5)):
        assert torch.equal(student.network(x, t, None, None, end), teacher.network(x, t))
    noise = student.draw_noise(torch.arange(3), 0)
    assert torch.equal(student.log_prob(noise), teacher.log_prob(noise))
    inside = {id(p) for p in student.parameters()}
    assert not inside & {id(p) for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in key for key in student.state_dict())


def test_targets_are_the_teachers_velocities():
    """The velocity of a Gaussian teacher is known: at the true map no loss is left though pairs vary."""
    teacher = gaussian_teacher(optimal=False).double()
    for name in ("progressive", "lagrangian_jvp", "meanflow", "improved"):

        class Taught(OracleNetwork):
            def __init__(self, *_) -> None:
                super().__init__()
                self.map = GaussianMap(mean=3.0)

        student = FlowMap(
            PLANE, Taught, map_objective=OBJECTIVES[name](), teacher=teacher, initialise_from_teacher=False
        ).double()
        x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = student.training_loss(Batch(x), torch.Generator().manual_seed(0))
        assert found.total < 1e-9, name


def test_a_teacher_of_another_prediction_teaches_its_velocity():
    teacher = FlowMatching(POINTS, NETWORK, objective=DataObjective()).eval()
    perturb(teacher)
    student = FlowMap(POINTS, TWO, teacher=teacher, initialise_from_teacher=False)
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.8])
    found = student.teacher.field(Condition(), x.device)(t, x)
    torch.testing.assert_close(found, ((teacher.network(x, t) - x) / (1 - t)[:, None]).detach())


@every_objective
def test_a_teacher_is_asked_for_the_velocities_that_are_read(name):
    """Of the points that jump only where the objective reads those; the Lagrangian asks where the jumps end."""
    calls = []
    teacher = gaussian_teacher(optimal=False)
    teacher.network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    student = FlowMap(
        PLANE, OracleNetwork, map_objective=OBJECTIVES[name](), teacher=teacher, initialise_from_teacher=False
    )
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    student.training_loss(Batch(x), torch.Generator().manual_seed(0))
    resting = {"progressive": [32], "uniform": [32], "shortcut": [32]}
    ends = {"lagrangian": [32, 32], "lagrangian_jvp": [32, 32]}
    assert calls == {**resting, **ends}.get(name, [64])


@pytest.mark.parametrize("name", ["progressive", "shortcut", "lagrangian"])
def test_velocities_that_no_residual_reads_change_no_loss(name):
    module = flow_map(name=name, conditional=True, target_guidance=2.0)
    sparing = loss(module).total
    assert module.map_objective.needs_velocity is False
    module.map_objective.needs_velocity = True
    torch.testing.assert_close(loss(module).total, sparing)


def test_a_guided_teacher_teaches_its_guided_velocity():
    torch.manual_seed(0)
    teacher = FlowMatching(POINTS, NETWORK, conditional=True).eval()
    perturb(teacher)
    student = FlowMap(POINTS, TWO, conditional=True, teacher=teacher, target_guidance=2.0)
    x, t, label = torch.randn(3, 2), torch.rand(3), torch.tensor([0, 2, 3])
    found = student.teacher.field(Condition(label), x.device)(t, x)
    whole, none = teacher.network(x, t, label), teacher.network(x, t, None)
    torch.testing.assert_close(found, (none + 2 * (whole - none)).detach())


def test_teachers_that_do_not_fit_are_refused_in_one_line():
    teacher = FlowMatching(POINTS, NETWORK)
    for options, message in (
        ({"teacher": FlowMatching(POINTS, NETWORK, path=CosinePath())}, "on the straight line"),
        ({"teacher": teacher, "conditional": True}, "labels of as many classes"),
        ({"teacher": teacher, "source": GaussianSource(2.0)}, "the source"),
        ({"teacher": FlowMatching(POINTS, partial(MLP, width=8))}, "another network"),
        ({"teacher": FlowMatching(IMAGES, partial(DiT, width=16, depth=1, num_heads=2))}, "data of shape"),
        ({"teacher": teacher, "target_guidance": 2.0}, "needs labels"),
        (
            {"teacher": FlowMatching(POINTS, NETWORK, objective=DataObjective())},
            "predicts data and the student's velocity",
        ),
        (
            {"teacher": FlowMatching(POINTS, NETWORK, conditional=True, label_dropout=0.0), "conditional": True},
            "nothing to teach under the null label, but the student drops 0.1",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            flow_map(perturbed=False, **options)
        assert "\n" not in str(error.value)


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": NETWORK}, "set second_time: true"),
        ({"path": CosinePath()}, "straight lines without noise"),
        ({"path": LinearPath(sigma=0.1)}, "straight lines without noise"),
        ({"sampling_path": CosinePath()}, "straight lines without noise"),
        ({"jumps": Renoise(2), "coupling": OptimalTransportCoupling()}, "take Composition"),
        ({"jumps": Renoise(2), "weight": GibbsWeight(kappa=0.5)}, "take Composition"),
        ({"name": "shortcut", "jump_times": UniformPairs()}, "leave it out"),
        ({"name": "shortcut", "jump_times": DyadicPairs(levels=3)}, "leave it out"),
        ({"name": "progressive", "jump_times": JumpsToData()}, "compares jumps from anywhere to anywhere"),
        ({"name": "meanflow", "jump_times": DyadicPairs()}, "compares jumps from anywhere to the data"),
        ({"name": "meanflow", "jump_times": JumpsToData(), "jumps": Composition(2)}, "those to the data"),
        ({"diagonal": 0.0}, "diagonal must be"),
    ],
)
def test_what_excludes_each_other_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        flow_map(**options)
    assert "\n" not in str(error.value)


def test_adaptive_weights_in_few_dimensions_are_warned_of():
    with pytest.warns(UserWarning, match="weight_power=1 in 2 dimensions"):
        FlowMap(POINTS, TWO, map_objective=MeanFlow(weight_power=1.0))


def test_forward_derivatives_of_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr("flowbench.families.flow_map.shards_weights", lambda strategy: True)

    class Trainer:
        strategy = None

    data = FlowDataModule("eight_gaussians", batch_size=16)
    module = FlowMap(data.known_spec, TWO, map_objective=MeanFlow())
    monkeypatch.setattr("flowbench.training.module.shards_weights", lambda strategy: False)
    with pytest.raises(ValueError, match="set derivative: difference"):
        module.check_training(data, Trainer())
    FlowMap(data.known_spec, TWO, map_objective=MeanFlow(derivative="difference")).check_training(data, Trainer())


# ---- what is learned ------------------------------------------------------------------------------


STEPS = 1000


def trained(module, until=STEPS, since=0) -> None:
    """On N(2, 0.5^2 I), whose map is known."""
    optimizer, rng = torch.optim.Adam(module.parameters()), torch.Generator().manual_seed(since)
    for step in range(since, until):
        module._progress = lambda now=step / STEPS: now
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / STEPS)
        x = 2 + 0.5 * torch.randn(512, 2, generator=rng)
        optimizer.zero_grad()
        module.training_loss(Batch(x), rng).total.backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soflow", "progressive", "shortcut", "lagrangian", "improved", "consistency"])
def test_one_jump_comes_near_the_map_and_two_agree_with_it(name):
    """The map is z -> 2 + 0.5 z. One Euler step of the true velocity ends at 2, two at 2 + 0.2 z, for every noise z.

    So steps of the velocity, which the network starts as, are off by 0.5 and 0.3. Few of the pairs of times come near
    the whole interval, so that its jump is learned last.
    """
    module = flow_map(PLANE, partial(MLP, width=32, depth=2, second_time=True), name, perturbed=False)
    noise = module.draw_noise(torch.arange(1000), 0)

    @torch.no_grad()
    def errors():
        ends = [module.flow_jump(noise, Condition(), 0.0, 1.0)]
        if module.jump_times.covers(0.0, 0.5):
            ends.append(module.flow_jump(module.flow_jump(noise, Condition(), 0.0, 0.5), Condition(), 0.5, 1.0))
        off = [(end - 2 - 0.5 * noise).square().mean().sqrt().item() for end in ends]
        return off, (ends[-1] - ends[0]).square().mean().sqrt().item()

    trained(module, until=STEPS // 4)
    first, early = errors()
    trained(module, since=STEPS // 4)
    found, composition = errors()
    if name == "consistency":  # near the map early, and by finer steps, which are noisier, not nearer
        assert found[0] < 0.25
    assert found[0] < 0.35
    if len(found) > 1:
        assert found[1] < 0.2
        assert found[0] < first[0]
        assert composition < early
