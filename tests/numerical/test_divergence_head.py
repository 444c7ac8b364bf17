"""Average divergences along jumps against closed forms: of Gaussians, and of mixtures, where they differ from point to
point."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.families.family_contract import perturb
from flowbench.flows import (
    BothWays,
    ExactDivergence,
    GaussianSource,
    HutchinsonDivergence,
    JumpBatch,
    Progressive,
    SolutionConsistency,
)
from flowbench.flows.flow_map.divergence import (
    differentiable,
    divergence_target,
    jumped_log_likelihood,
    two_jump_divergence,
)
from flowbench.networks import MLP, DiT, HybridDiT, UNet, VelocityNetwork
from flowbench.networks.divergence import DivergenceNetwork

from .flow_map_oracles import (
    GOLDEN,
    GOLDEN_MIXTURE,
    LOG_DETERMINANTS,
    LOG_DETERMINANTS_MIXTURE,
    GaussianMap,
    MixtureMap,
)

GAUSSIAN, MIXTURE = GaussianMap(), MixtureMap()


def rows(golden):
    values = torch.tensor(list(golden), dtype=torch.float64)
    return values[:, 2:], values[:, 0], values[:, 1]


def square(num, seed=0, shortest=0.01):
    """States of the mixture's flow in one dimension, and pairs of times from all of the square.

    From within two deviations of the source: further out nothing is left of the quantiles by which it carries.
    """
    rng = torch.Generator().manual_seed(seed)
    noise = 4 * torch.rand(num, 1, generator=rng, dtype=torch.float64) - 2
    start, end = torch.rand(2, num, generator=rng, dtype=torch.float64)
    apart = (start - end).abs() > shortest
    x = MIXTURE.carried(noise, torch.zeros_like(start), start)
    return x[apart], start[apart], end[apart]


# ---- the oracles themselves, and what two jumps say ----------------------------------------------


@pytest.mark.parametrize(
    ("oracle", "golden", "determinants"),
    [(GAUSSIAN, GOLDEN, LOG_DETERMINANTS), (MIXTURE, GOLDEN_MIXTURE, LOG_DETERMINANTS_MIXTURE)],
)
def test_the_average_divergence_is_the_log_determinant_over_the_length(oracle, golden, determinants):
    x, start, end = rows(golden)
    found = (end - start) * oracle.divergence(x, start, end)
    assert (found - torch.tensor(determinants, dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize(("oracle", "tolerance"), [(GAUSSIAN, 1e-12), (MIXTURE, 1e-7)])
def test_two_jumps_have_the_average_divergence_of_one(oracle, tolerance):
    x, start, end = square(1000)
    found = two_jump_divergence(oracle.joint, x, start, end)
    assert (found - oracle.divergence(x, start, end)).abs().max() < tolerance
    assert not found.requires_grad


def test_a_wrong_map_or_a_wrong_divergence_is_seen():
    """Where divergences differ from point to point, jumps to other points have others."""
    x, start, end = square(200)
    true = MIXTURE.divergence(x, start, end)
    moved = two_jump_divergence(lambda *given: (MIXTURE(*given) + 0.5, MIXTURE.divergence(*given)), x, start, end)
    shifted = two_jump_divergence(
        lambda x, s, t: (MIXTURE(x, s, t), MIXTURE.divergence(x, s, t) + (t - s)), x, start, end
    )
    assert (moved - true).abs().mean() > 1e-2
    # The two halves are off by (t - s) / 2 each.
    torch.testing.assert_close(shifted - true, (end - start) / 2)


@pytest.mark.parametrize("objective", [Progressive(), Progressive(split="uniform")], ids=repr)
def test_the_true_map_has_no_residual_on_jumps_back(objective):
    x, start, end = square(1000)
    batch = JumpBatch(x, start, end, torch.zeros_like(x), generator=torch.Generator().manual_seed(0))
    assert (start > end).any()
    found = objective.residual(GAUSSIAN, batch, (GAUSSIAN(x, start, end),))
    assert found.abs().max() < 1e-12


def test_solution_consistency_converges_on_jumps_back_too():
    """Its residual with the true velocity is of first order in the share of the jump."""
    x, start, end = square(1000, shortest=0.1)
    errors = []
    for share in (1e-2, 1e-3):
        batch = JumpBatch(x, start, end, GAUSSIAN.velocity(x, start))
        found = SolutionConsistency(share, share).residual(GAUSSIAN, batch, (GAUSSIAN(x, start, end),))
        errors.append(float(found.abs().mean()))
    assert 9 < errors[0] / errors[1] < 11


# ---- the density ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_the_exact_divergence_gives_the_exact_density_by_any_number_of_jumps(number, std):
    """Contracting and expanding: with the wrong sign of the change both would be wrong."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    found = jumped_log_likelihood(GaussianMap(std=std).joint, x, GaussianSource().log_prob, number)
    exact = torch.distributions.Normal(2.0, std).log_prob(x).sum(1)
    assert (found.log_prob - exact).abs().max() < 1e-6
    assert (found.source - (x - 2) / std).abs().max() < 1e-6
    assert (found.network_evaluations, found.log_prob.dtype) == (number, torch.float64)


@pytest.mark.parametrize("number", [1, 3])
def test_the_density_of_a_mixture(number):
    x = torch.linspace(-3.5, 3.5, 40, dtype=torch.float64)[:, None]
    found = jumped_log_likelihood(MIXTURE.joint, x, GaussianSource().log_prob, number)
    exact = MIXTURE.log_prob(x, torch.ones(40, dtype=torch.float64)).squeeze(1)
    assert (found.log_prob - exact).abs().max() < 1e-6


def test_no_jumps_are_refused():
    with pytest.raises(ValueError, match="num_jumps"):
        jumped_log_likelihood(GAUSSIAN.joint, torch.zeros(1, 1), GaussianSource().log_prob, 0)


# ---- networks ------------------------------------------------------------------------------


def network_of(name):
    torch.manual_seed(0)
    made = {
        "mlp": lambda: MLP((2,), 3, width=16, depth=2, second_time=True),
        "dit": lambda: DiT((1, 4, 4), 3, width=16, depth=1, num_heads=2, second_time=True),
        "unet": lambda: UNet((1, 4, 4), 3, channels=8, num_res_blocks=1, num_heads=2, second_time=True),
    }[name]()
    perturb(made)
    return made


def inputs_of(network, num=5, dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(num, *network.shape, generator=rng, dtype=dtype)
    start, end = torch.rand(2, num, generator=rng, dtype=dtype)
    return x, start, torch.arange(num) % 4, end


every_network = pytest.mark.parametrize("name", ["mlp", "dit", "unet"])


@every_network
def test_velocities_are_read_out_of_the_features_to_the_bit(name):
    network = network_of(name)
    x, start, label, end = inputs_of(network)
    velocity, features = network.with_features(x, start, label, end=end)
    assert torch.equal(velocity, network(x, start, label, end=end))
    assert torch.equal(velocity, network.read_out(features))
    assert tuple(features.shape[1:]) == network.feature_shape
    assert velocity.abs().min() > 0  # the output weights are not zero
    head = DivergenceNetwork(network.feature_shape, [8])
    perturb(head)
    alone = torch.cat([head(row[None]) for row in features])
    torch.testing.assert_close(head(features), alone)


def test_an_image_of_a_sequence_has_the_features_of_an_image_alone():
    torch.manual_seed(0)
    network = HybridDiT((1, 4, 4), None, width=16, depth=1, num_heads=2)
    perturb(network)
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(network.with_features(x, torch.tensor(0.3))[0], network(x, torch.tensor(0.3)))


def test_a_network_without_features_says_so():
    class Shrink(VelocityNetwork):
        def velocity(self, x, embedding):
            return -x

    network = Shrink((2,), None, embedding_width=8)
    assert network.feature_shape is None
    for ask in (lambda: network.with_features(torch.zeros(1, 2), torch.tensor(0.5)), lambda: network.read_out(None)):
        with pytest.raises(ValueError, match="Shrink gives no features of its last layer: take MLP, DiT or UNet"):
            ask()


# ---- the target at one time ------------------------------------------------------------------------------


@every_network
def test_the_target_is_the_trace_of_the_jacobian(name):
    network = network_of(name).double()
    x, start, label, _ = inputs_of(network, 3, torch.float64)

    def field(x):
        return network(x, start, label, end=start)

    jacobian = torch.autograd.functional.jacobian(lambda x: field(x).flatten(1).sum(0), x).flatten(2)
    trace = torch.einsum("ibi->b", jacobian)
    with torch.no_grad(), differentiable(x.device):
        inner = x.clone().requires_grad_()
        exact = divergence_target(field(inner), inner, ExactDivergence(), None)
        estimate = divergence_target(
            field(inner), inner, HutchinsonDivergence(num_probes=200), torch.Generator().manual_seed(0)
        )
    num_dims = x[0].numel()
    torch.testing.assert_close(exact, trace / num_dims)
    symmetric = (jacobian.permute(1, 0, 2) + jacobian.permute(1, 2, 0)) / 2
    off_diagonal = symmetric.square().sum((1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(1)
    deviation = (2 * off_diagonal / 200).sqrt() / num_dims
    assert ((estimate - exact).abs() < 4 * deviation + 1e-12).all()
    assert not exact.requires_grad


def test_divergences_can_be_computed_in_inference_mode():
    network = network_of("mlp")
    with torch.inference_mode():
        x, start, *_ = inputs_of(network)
        with differentiable(x.device):
            inner, times = x.clone().requires_grad_(), start.clone()
            found = divergence_target(network(inner, times, end=times), inner, ExactDivergence(), None)
    assert found.isfinite().all()


# ---- times ------------------------------------------------------------------------------


def test_pairs_both_ways_fill_the_square():
    start, end = BothWays().sample(100_000, torch.Generator().manual_seed(0))
    assert (start < end).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(100_000))
    # Two independent uniform numbers, but for the shortest jumps.
    for times in (start, end):
        assert times.mean().item() == pytest.approx(0.5, abs=0.005)
        assert times.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.corrcoef(torch.stack([start, end]))[0, 1].abs() < 0.02
