"""A flow map's divergence head: what it learns, what it leaves alone, and the density that it gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from flowbench.data import Batch, FlowDataModule, get_density
from flowbench.families import Condition, DivergenceHead, FlowMap
from flowbench.families.average_velocity import AverageVelocityNetwork
from flowbench.families.divergence_head import JointNetwork, RestingBatch
from flowbench.families.family_contract import perturb
from flowbench.flows import (
    BothWays,
    ConsistencyTraining,
    DyadicPairs,
    ExactDivergence,
    JumpBatch,
    JumpsToData,
    Lagrangian,
    LogitNormalPairs,
    MeanFlow,
    Progressive,
    RungeKutta4,
    Shortcut,
    SolutionConsistency,
    UniformPairs,
)
from flowbench.networks import MLP, DiT, UNet, VelocityNetwork
from flowbench.training import OptimizerConfig, TrainingConfig, load_checkpoint
from flowbench.training.count import count_flops

from ..contract.builders import IMAGES, POINTS, batch_of
from ..numerical.flow_map_oracles import GaussianMap
from .teachers import PLANE, gaussian_teacher
from .test_flow_map import TWO, OracleNetwork
from .test_trained import train

NETWORKS = {
    "mlp": (POINTS, TWO),
    "dit": (IMAGES, partial(DiT, width=16, depth=1, num_heads=2, second_time=True)),
    "unet": (IMAGES, partial(UNet, channels=8, num_res_blocks=1, num_heads=2, dropout=0.3, second_time=True)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


class OracleFeatures(OracleNetwork):
    """The map of Gaussians, whose features are its average divergences."""

    feature_shape = (1,)

    def with_features(self, x, t, label=None, condition=None, end=None):
        velocity = self(x, t, label, condition, end)
        times = (time.expand(len(x)).to(x) for time in (t, end))
        return velocity, self.map.divergence(x, *times)[:, None]


class FirstFeature(nn.Module):
    """What a head would be that reads the divergence from the features of the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.scale * features[:, 0]


def headed(spec=POINTS, network=TWO, seed=0, perturbed=True, head=True, **options) -> FlowMap:
    torch.manual_seed(seed)
    made = {"map_objective": Progressive(), "jump_times": BothWays(), **options}
    module = FlowMap(spec, network, divergence_head=DivergenceHead(widths=[8, 4]) if head else None, **made)
    if perturbed:
        perturb(module.network, seed)
        if head:
            perturb(module.head, seed)
    return module


def oracle(**options) -> FlowMap:
    module = FlowMap(PLANE, OracleFeatures, map_objective=Progressive(), divergence_head=DivergenceHead(), **options)
    module.head = FirstFeature()
    return module.double().eval()


def loss(module, size=32, seed=0):
    return module.training_loss(batch_of(module.spec, size), torch.Generator().manual_seed(seed))


def of_head(found) -> torch.Tensor:
    return found.metrics["divergence_jump_loss"], found.metrics["divergence_diagonal_loss"]


# ---- the loss ------------------------------------------------------------------------------


def test_the_true_divergence_has_no_loss():
    """Sign probes of a multiple of the identity are exact, and its velocity is the network's own."""
    x = 2 + 0.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = oracle().training_loss(Batch(x), torch.Generator().manual_seed(0))
    assert max(of_head(found)) < 1e-10
    wrong = oracle()
    wrong.head.scale.data.fill_(1.1)
    found = wrong.training_loss(Batch(x), torch.Generator().manual_seed(0))
    assert of_head(found)[1] > 1e-3


@every_network
def test_the_map_learns_as_it_does_without_a_head(name):
    """To the bit: no gradient goes from the head into the network, and its draws come last."""
    spec, network = NETWORKS[name]
    gradients = []
    for head in (True, False):
        module = headed(spec, network, head=head)
        torch.manual_seed(1)  # of the dropout masks
        loss(module).total.backward()
        gradients.append({key: p.grad for key, p in module.network.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@every_network
def test_the_weights_of_the_head_move_and_validation_runs_in_inference_mode(name):
    module = headed(*NETWORKS[name], conditional=True)
    before = {key: value.clone() for key, value in module.head.named_parameters()}
    optimizer = module.optimizer_config.build(module)
    loss(module).total.backward()
    optimizer.step()
    for key, value in module.head.named_parameters():
        assert not torch.equal(before[key], value), key
    plain = loss(module.eval())
    with torch.inference_mode():
        inferred = loss(module)
    torch.testing.assert_close(inferred.total, plain.total.detach())


def test_a_new_head_says_that_nothing_contracts():
    module = headed(perturbed=False)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    joint = JointNetwork(AverageVelocityNetwork(module.network, Condition(), False), module.head)
    assert torch.equal(joint(x, torch.zeros(5), torch.ones(5))[1], torch.zeros(5))


@every_network
def test_errors_at_one_time_are_those_to_the_trace_of_the_jacobian(name):
    module = headed(*NETWORKS[name]).double().eval()
    head = DivergenceHead(widths=[8, 4])
    head.probes = ExactDivergence()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, *module.flow_shape, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    joint = JointNetwork(AverageVelocityNetwork(module.network, Condition(), False), module.head)
    nothing = JumpBatch(x[:0], t[:0], t[:0], x[:0])
    errors, metrics = head.errors(joint, nothing, RestingBatch(x, t), rng)
    total = torch.autograd.functional.jacobian(lambda x: module.network(x, t, end=t).flatten(1).sum(0), x)
    trace = torch.einsum("ibi->b", total.flatten(2)) / x[0].numel()
    found = module.head(module.network.with_features(x, t, end=t)[1])
    torch.testing.assert_close(errors, (found - trace).square())
    assert set(metrics) == {"divergence_diagonal_loss"}


def test_a_teachers_divergence_is_learned():
    """The velocity of a Gaussian teacher is known: at the true map and divergence no loss is left though pairs vary."""

    class Taught(OracleFeatures):
        def __init__(self, *_) -> None:
            super().__init__()
            self.map = GaussianMap(mean=3.0)

        def with_features(self, *given, **options):
            velocity, features = super().with_features(*given, **options)
            return 3 * velocity, features  # the own velocity has another divergence, which nobody asks for

    teacher = gaussian_teacher(optimal=False).double()
    module = FlowMap(
        PLANE,
        Taught,
        map_objective=Progressive(),
        divergence_head=DivergenceHead(),
        teacher=teacher,
        initialise_from_teacher=False,
    )
    module.head = FirstFeature()
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            found = module.double().training_loss(Batch(x.clone()), torch.Generator().manual_seed(0))
        assert found.total < 1e-9
        assert max(of_head(found)) < 1e-9
    module.teacher = None
    own = module.training_loss(Batch(x), torch.Generator().manual_seed(0))
    assert of_head(own)[1] > 0.1


def test_a_batch_without_jumps_teaches_the_divergence_at_one_time():
    module = headed(diagonal=1.0)
    found = loss(module)
    assert "divergence_jump_loss" not in found.metrics
    assert found.metrics["divergence_diagonal_loss"] > 0
    found.total.backward()
    assert all(p.grad is not None for p in module.head.parameters())


def test_the_loss_under_autocast_is_near_that_in_full_precision():
    module = headed()
    exact = loss(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(module)
    for found, expected in zip(of_head(rounded), of_head(exact), strict=True):
        torch.testing.assert_close(found, expected)  # computed in full precision


def test_operations_per_sample_are_those_of_a_whole_batch():
    module = headed()
    whole = count_flops(lambda: loss(module, 64).total)
    assert module.flops_of_one() * 64 == pytest.approx(whole, rel=1e-6)
    assert module.flops_of_one() > 1.5 * headed(head=False).flops_of_one()
    with torch.device("meta"):
        on_meta = FlowMap(
            POINTS, TWO, map_objective=Progressive(), divergence_head=DivergenceHead(widths=[8, 4])
        ).flops_of_one()
    assert on_meta == module.flops_of_one()


# ---- the density ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_true_divergence_gives_the_density_of_the_data(number):
    module = oracle()
    x = 2 + torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = module.head_density(number)
    found = density.solve(x, Condition(), torch.arange(20), 0)
    expected = torch.distributions.Normal(2.0, 0.5).log_prob(x).sum(1)
    assert (found.log_prob - expected).abs().max() < 1e-6
    assert (found.network_evaluations, density.method) == (number, f"Composition(num_jumps={number})")
    through_space = module.solved_likelihood(density, Batch(x, index=torch.arange(20)))
    assert torch.equal(through_space.log_prob, found.log_prob)


def test_every_evaluation_is_counted_and_labels_count():
    module = headed(conditional=True).eval()
    calls = []
    kept = module.network.features
    module.network.features = lambda *given: calls.append(len(given[0])) or kept(*given)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    of = [
        module.head_density(4).solve(x, Condition(label), torch.arange(6), 0).log_prob
        for label in (torch.zeros(6).long(), torch.ones(6).long())
    ]
    assert calls == [6] * 8
    assert not torch.allclose(*of)


def test_without_a_number_it_jumps_as_often_as_the_sampler():
    assert headed().head_density().method == "Composition(num_jumps=1)"
    assert headed(head=False).head_density() is None
    assert headed().describe().likelihood == "ode"  # a head changes nothing of it


def test_a_checkpoint_has_the_head(tmp_path):
    module, other, bare = headed().eval(), headed(seed=3).eval(), headed(head=False)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    load_checkpoint(other, tmp_path / "a.ckpt")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    first, second = (m.head_density(2).solve(x, Condition(), torch.arange(4), 0).log_prob for m in (module, other))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="head") as caught:
        load_checkpoint(bare, tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


# ---- refusals ------------------------------------------------------------------------------


class Plain(VelocityNetwork):
    """A network that gives no features."""

    def __init__(self, shape, num_classes):
        super().__init__(shape, num_classes, embedding_width=8, second_time=True)

    def velocity(self, x, embedding):
        return x * embedding.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": Plain}, "Plain gives none: take MLP, DiT or UNet"),
        (
            {"jump_times": UniformPairs()},
            r"jumps from 1 to 0, but UniformPairs\(\) trains all jumps to later times: take BothWays",
        ),
        ({"map_objective": Shortcut(), "jump_times": None}, "trains jumps to later times alone"),
        ({"map_objective": MeanFlow(), "jump_times": None}, "trains jumps to later times alone"),
        ({"map_objective": Lagrangian()}, "trains jumps to later times alone, got BothWays"),
        ({"map_objective": ConsistencyTraining(), "jump_times": BothWays(JumpsToData())}, "to later times alone"),
        (
            {"map_objective": SolutionConsistency(), "jump_times": BothWays(JumpsToData())},
            "compares jumps from anywhere to earlier times",
        ),
        ({"jump_times": BothWays(DyadicPairs())}, "compares jumps from anywhere"),
    ],
)
def test_what_excludes_each_other_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        headed(perturbed=False, **options)
    assert "\n" not in str(error.value)


def test_a_head_chooses_pairs_both_ways():
    assert repr(headed(jump_times=None).jump_times) == "BothWays(times=UniformPairs())"
    both = headed(map_objective=SolutionConsistency(), jump_times=BothWays(LogitNormalPairs()))
    assert loss(both).total.isfinite()
    assert repr(headed(head=False, jump_times=None).jump_times) == "UniformPairs()"


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr("flowbench.families.flow_map.shards_weights", lambda strategy: True)
    monkeypatch.setattr("flowbench.training.module.shards_weights", lambda strategy: False)

    class Trainer:
        strategy = None

    data = FlowDataModule("eight_gaussians", batch_size=16)
    with pytest.raises(ValueError, match=r"trainer\.strategy=ddp, or leave divergence_head out"):
        headed(data.known_spec).check_training(data, Trainer())


# ---- what is learned ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_head_comes_near_the_entropy_of_a_mixture_and_near_the_ode():
    """At 8 jumps within 0.15 nats of the true NLL, nearer to the ODE than a step of Euler's, and of mass near 1."""
    density = get_density("gaussian_mixture")
    torch.manual_seed(0)
    module = FlowMap(
        PLANE,
        partial(MLP, width=64, depth=3, second_time=True),
        map_objective=Progressive(),
        divergence_head=DivergenceHead(widths=[64, 64], num_probes=2),
        likelihood_solver=RungeKutta4(num_steps=32),
        training=TrainingConfig(OptimizerConfig(lr=2e-3, weight_decay=0.0)),
    )
    train(module, density.sample, 1500)
    x, index = density.sample(1000, torch.Generator().manual_seed(1)), torch.arange(1000)
    with module.evaluating("ema"):
        ode = module.log_prob(x)
        found = {n: module.head_density(n).solve(x, Condition(), index, 0).log_prob for n in (1, 8)}
        euler = module.solved_density(1).solve(x, Condition(), index, 0).log_prob
        axis = torch.linspace(-10, 10, 120)
        grid = torch.cartesian_prod(axis, axis)
        on_grid = module.head_density(8).solve(grid, Condition(), torch.arange(len(grid)), 0).log_prob
    distance = {n: float((log_prob - ode).square().mean().sqrt()) for n, log_prob in found.items()}
    true = -float(density.log_prob(x).mean())
    assert abs(-float(found[8].mean()) - true) < 0.15
    assert distance[1] < float((euler - ode).square().mean().sqrt())
    assert distance[8] < distance[1]
    assert float(on_grid.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=0.1)
