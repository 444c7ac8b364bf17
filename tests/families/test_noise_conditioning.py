"""A flow that is told the noise level of its points, and samples that go down through the levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowbench.data import Batch, DataSpec
from flowbench.families import (
    Condition,
    ConditionedNoise,
    FlowScoreDenoiser,
    GaussianNoise,
    NoiseAnnealing,
    PixelSpace,
    STARFlow,
    TARFlow,
    Tweedie,
)
from flowbench.families.noise.denoising import FlowLayout
from flowbench.flows import JacobiInverse
from flowbench.networks import CausalTransformer
from flowbench.networks.embedding import NoiseLevelEmbedding
from flowbench.training import count_flops
from tests.closeness import assert_near

from ..contract.builders import IMAGES, POINTS, autoencoder, batch_of, build, perturb

LOW, HIGH = 0.1, 0.6


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(num: int, spec=POINTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=rng(seed))


def told(spec=IMAGES, low: float = LOW, high: float = HIGH, num_steps: int = 3, **options) -> TARFlow:
    noise = {"augmentation": ConditionedNoise(low, high), "denoiser": NoiseAnnealing(num_steps)}
    return build("tarflow", spec, **{**noise, **options})


# ---- the steps --------------------------------------------------------------------------------------------


def gaussian(mean: float, std: float):
    """Log-density of data N(mean, std^2) with noise, without its constant."""

    def log_density(x, label, level):
        return -(x - mean).flatten(1).square().sum(1) / (2 * (std**2 + level**2))

    return log_density


def attached(num_steps: int, low: float, high: float, **options) -> NoiseAnnealing:
    annealing = NoiseAnnealing(num_steps, **options)
    annealing.attach(FlowLayout(PixelSpace((2,)), low, 2, 1, grid=None, num_classes=None, levels=(low, high)))
    return annealing


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.4)])
def test_the_error_of_the_steps_falls_as_one_over_their_number(mean, std):
    """The ODE of Gaussian data is solved by y(0) = mean + std / sqrt(std^2 + n^2) (y(n) - mean)."""
    y = points(20).double()[..., None]
    exact = mean + std / math.hypot(std, 1.0) * (y - mean)
    numbers = [8, 16, 32, 64]
    errors = [
        float((attached(n, 1e-4, 1.0).denoise_drawn(y, None, gaussian(mean, std)) - exact).abs().max()) for n in numbers
    ]
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.15), errors


def test_levels_fall_in_equal_steps_from_the_highest_to_the_lowest_and_to_none():
    asked = []

    def log_density(x, label, level):
        asked.append(level)
        return gaussian(0.0, 1.0)(x, label, level)

    attached(5, 0.2, 1.0).denoise_drawn(points(3)[..., None], None, log_density)
    assert asked == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_one_step_is_tweedies_at_the_highest_level():
    y, std = points(9)[..., None], 0.7
    found = attached(1, 0.2, 1.0).denoise_drawn(y, None, gaussian(0.3, std))
    torch.testing.assert_close(found, 0.3 + std**2 / (std**2 + 1) * (y - 0.3))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_steps_do_not_depend_on_the_parts_of_a_batch(batch_size):
    whole = told(conditional=True)
    parts = told(conditional=True, denoiser=NoiseAnnealing(3, batch_size=batch_size))
    noise, label = points(7, IMAGES), torch.arange(7) % 3
    torch.testing.assert_close(parts.sample(noise, label).x, whole.sample(noise, label).x)
    assert parts.flow_sample(noise[:0], Condition(label[:0]), no_override()).x.shape == (0, *IMAGES.shape)


def no_override():
    from flowbench.evaluation.override import SamplerOverride

    return SamplerOverride()


# ---- the noise --------------------------------------------------------------------------------------------


def test_training_noise_has_the_level_that_the_flow_is_told():
    """On top of the space's noise the total has variance n^2, with n uniform between the two."""
    noise, space = ConditionedNoise(LOW, HIGH), PixelSpace((4000,), LOW)
    x, level = noise.raised(space.encode(torch.zeros(400, 4000), rng(1)), rng(2))
    torch.testing.assert_close(x.std(dim=1), level, rtol=0.06, atol=0)
    assert float(level.mean()) == pytest.approx((LOW + HIGH) / 2, rel=0.05)
    assert float(level.var()) == pytest.approx((HIGH - LOW) ** 2 / 12, rel=0.15)
    assert not torch.equal(level, noise.raised(x, rng(3))[1])


def test_the_loss_weighs_each_point_by_its_level():
    """Recomputed from the pieces: the drawn levels, the density at them, a mean over dimensions and points."""
    flow = told()
    x = points(16, IMAGES)
    loss = flow.loss(x, Condition(), Batch(x), rng(4))
    noisy, level = flow.augmentation.raised(x, rng(4))
    log_prob = torch.stack(
        [flow._log_density(flow._tokens(noisy[i : i + 1]), None, float(level[i]))[0] for i in range(16)]
    )
    # The network computes in float32, whatever the sums are kept in.
    assert_near(loss.total.float(), (-(level * log_prob).mean() / 16).float(), 32)
    assert_near(loss.metrics["nll"].float(), (-log_prob.detach().mean() / 16).float(), 32)
    assert "bits_per_dim" not in loss.metrics


def without_embedding(flow: TARFlow) -> TARFlow:
    """The embeddings of the level are zero, whatever the level."""
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "level_embedding.mlp.2" in name:
                parameter.zero_()
    return flow


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("spec", [IMAGES, POINTS], ids=lambda spec: spec.name)
def test_one_level_is_tarflow_with_gaussian_noise_and_one_tweedie_step(spec, num_steps):
    flow = without_embedding(told(spec, 0.3, 0.3, num_steps))
    plain = build("tarflow", spec, augmentation=GaussianNoise(0.3), denoiser=Tweedie())
    weights = {k: v for k, v in flow.flow.state_dict().items() if "level_embedding" not in k}
    plain.flow.load_state_dict(weights)
    batch, noise = batch_of(spec, 16), points(5, spec)
    torch.testing.assert_close(
        flow.training_loss(batch, rng()).total, 0.3 * plain.training_loss(batch, rng()).total, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(flow.sample(noise).x, plain.sample(noise).x)
    torch.testing.assert_close(flow.log_prob(batch.x), plain.log_prob(batch.x))
    assert flow.describe().likelihood_method == plain.describe().likelihood_method == "density-of-noisy-data(0.3)"


# ---- the flow ---------------------------------------------------------------------------------------------


def test_every_block_is_told_the_level():
    flow = told()
    tokens = flow._tokens(points(3, IMAGES))
    for block in flow.flow.blocks:
        first, second = (block(tokens, None, torch.full((3,), level))[0] for level in (LOW, HIGH))
        assert not torch.allclose(first, second, atol=1e-4)


def test_a_level_in_a_batch_is_that_of_its_own_sample():
    flow = told().double()
    tokens, level = flow._tokens(points(3, IMAGES).double()), torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    whole = flow.flow(tokens, None, level)
    for i in range(3):
        z, logdet = flow.flow(tokens[i : i + 1], None, level[i : i + 1])
        torch.testing.assert_close(z, whole[0][i : i + 1])
        torch.testing.assert_close(logdet, whole[1][i : i + 1])


@pytest.mark.parametrize("inverse", [None, JacobiInverse(tolerance=0.0)], ids=["sequential", "jacobi"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_inverse_undoes_the_flow_at_the_samplers_level(inverse, guidance):
    """Samples without their denoising encode to their noise at the highest level, and at no other."""
    flow = told(conditional=True, inverse=inverse).double()
    noise, label = points(4, IMAGES).double(), Condition(torch.tensor([0, 1, 2, 0]))
    level = torch.full((4,), HIGH, dtype=torch.float64)
    drawn = flow._tokens(flow._decoded(noise, label, 1.0, HIGH).x)
    torch.testing.assert_close(flow._points(flow.flow(drawn, label.label, level)[0]), noise)
    assert not torch.allclose(flow._points(flow.flow(drawn, label.label, level / 2)[0]), noise, atol=1e-4)
    guided = [
        flow._decoded(noise[rows], Condition(label.label[rows]), guidance, HIGH).x
        for rows in (slice(None), slice(2, 3))
    ]
    torch.testing.assert_close(guided[0][2:3], guided[1])


def test_samples_are_drawn_at_the_highest_level_and_likelihoods_at_the_lowest():
    flow = told()
    noise, x = points(4, IMAGES), batch_of(IMAGES, 4).x
    drawn = flow._decoded(noise, Condition(), 1.0, HIGH).x
    tokens = flow._tokens(drawn)
    for level, following in ((0.6, 0.35), (0.35, 0.1), (0.1, 0.0)):
        leaf = tokens.clone().requires_grad_()
        (slope,) = torch.autograd.grad(flow._log_density(leaf, None, level).sum(), leaf)
        clean = tokens + level**2 * slope
        tokens = tokens - (level - following) * (tokens - clean) / level
    torch.testing.assert_close(flow.sample(noise).x, flow._points(tokens), rtol=1e-4, atol=1e-5)
    lowest = torch.full((4,), LOW)
    z, logdet = flow.flow(flow._tokens(x), None, lowest)
    torch.testing.assert_close(flow.log_prob(x), flow.source.log_prob(z) + logdet)
    torch.testing.assert_close(flow.encode(x), flow._points(z))
    torch.testing.assert_close(flow.flow_decode(flow.encode(x), Condition()).x, x, rtol=1e-3, atol=1e-4)


def test_other_denoisers_start_at_the_lowest_level():
    noise = points(4, IMAGES)
    for denoiser in (None, Tweedie()):
        flow = told(denoiser=denoiser)
        lowest = flow.flow_decode(noise, Condition())
        torch.testing.assert_close(flow.sample(noise).x, flow.flow_denoise(lowest.x, Condition()))
    assert told(denoiser=None).describe().sampler == ""


def test_a_step_costs_two_evaluations():
    """Of operations too: as counted, a step is a pass forward and one backward to the input."""
    flow = told(num_steps=4)
    assert flow.sample(points(2, IMAGES)).network_evaluations == pytest.approx(1 + 2 * 4)
    assert flow.describe().sampler == "sequential+annealing(4)"
    spec = DataSpec("wide", "1", (1, 4, 4))
    noise = {"augmentation": ConditionedNoise(0.1, 0.5), "denoiser": NoiseAnnealing(3)}
    flow = TARFlow(spec, layers=[1, 1], width=64, patch_size=2, **noise)
    x = points(4, spec)
    with FlopCounterMode(display=False) as forward:
        flow.flow_encode(x, Condition())
    with FlopCounterMode(display=False) as annealing:
        flow.denoiser.denoise_drawn(flow._tokens(x), None, flow._log_density)
    assert annealing.get_total_flops() / forward.get_total_flops() > 2 * 3 - 0.3
    counted = flow.count()
    assert counted.training_flops == count_flops(flow.loss_of_one)
    assert counted.evaluation_flops > TARFlow(spec, layers=[1, 1], width=64, patch_size=2).count().evaluation_flops


def test_latents_of_starflow_are_denoised_the_same_way():
    sizes = {"width": 16, "head_dim": 8, "deep_layers": 2, "shallow_blocks": 1, "shallow_layers": 1}
    noise = {"augmentation": ConditionedNoise(LOW, HIGH), "denoiser": NoiseAnnealing(2)}
    flow = STARFlow(IMAGES, autoencoder=autoencoder(), **sizes, **noise)
    perturb(flow)
    facts = flow.describe()
    # The bound's encoder has the lowest level's noise, and its decoder takes that out by one step.
    assert (facts.likelihood_method, facts.likelihood_evaluations) == ("noise(0.1)+tweedie", 3.0)
    assert flow.sample(flow.draw_noise(torch.arange(2), 0)).network_evaluations == pytest.approx(5.0)
    assert flow.log_prob(batch_of(IMAGES, 2).x).isfinite().all()


def test_gradients_reach_the_embedding_and_a_step_moves_it():
    flow = told()
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    optimizer = flow.optimizer_config.build(flow)
    flow.training_loss(batch_of(IMAGES, 32), rng()).total.backward()
    embeddings = [name for name, _ in flow.named_parameters() if "level_embedding" in name]
    assert len(embeddings) == 2 * 4, "two blocks, two layers of weights and biases"
    assert all(flow.get_parameter(name).grad.abs().max() > 0 for name in embeddings)
    optimizer.step()
    assert all(not torch.equal(before[name], flow.get_parameter(name)) for name in embeddings)


def test_a_new_flow_is_the_identity_and_its_embedding_is_not_zero():
    network = CausalTransformer(4, 1, width=8, depth=1, head_dim=4, noise_conditioned=True)
    assert network.level_embedding(torch.tensor([0.1])).any()
    assert torch.equal(network(torch.ones(1, 4, 1), level=torch.tensor([0.1])), torch.zeros(1, 4, 2))


def test_the_static_step_is_told_the_level_too():
    network = CausalTransformer(4, 1, width=8, depth=1, head_dim=4, noise_conditioned=True).double()
    perturb(network)
    x, level = torch.randn(3, 4, 1, generator=rng(), dtype=torch.float64), torch.tensor([0.1, 0.3, 0.6]).double()
    whole, cache = network(x, level=level), network.allocate_cache(3, static=True)
    for i in range(4):
        row = network.step(x[:, max(i - 1, 0)], torch.tensor(i), cache, level=level)
        torch.testing.assert_close(row, whole[:, i])


def test_the_embedding_tells_levels_apart_in_sixteen_bits():
    """Features are computed in float32: in bfloat16 neighbouring levels would share them."""
    torch.manual_seed(0)
    embedding = NoiseLevelEmbedding(16).bfloat16()
    levels = torch.linspace(0.01, 0.7, 70)
    assert len(embedding(levels).unique(dim=0)) == 70


# ---- misuse -----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"ConditionedNoise high must be at least low=0.5, got 0.1: exchange them"):
        ConditionedNoise(0.5, 0.1)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="ConditionedNoise low must be a number in"):
            ConditionedNoise(bad, 0.5)
    with pytest.raises(ValueError, match=r"NoiseAnnealing num_steps must be a whole number in .*, got 0"):
        NoiseAnnealing(0)
    with pytest.raises(ValueError, match="NoiseAnnealing needs a flow that is told the noise level: set augmentation"):
        told(augmentation=GaussianNoise(0.1))
    with pytest.raises(ValueError, match="FlowScoreDenoiser learns the score of one noise level"):
        told(denoiser=FlowScoreDenoiser())
    with pytest.raises(ValueError, match="belongs to another flow already"):
        denoiser = NoiseAnnealing()
        told(denoiser=denoiser)
        told(denoiser=denoiser)
    network = CausalTransformer(4, 1, width=8, depth=1, head_dim=4)
    with pytest.raises(ValueError, match="a noise level given to a network that takes none"):
        network(torch.zeros(2, 4, 1), level=torch.ones(2))
    network = CausalTransformer(4, 1, width=8, depth=1, head_dim=4, noise_conditioned=True)
    with pytest.raises(ValueError, match="level must hold a noise level for each of 2 sequences, got none"):
        network(torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match=r"for each of 2 sequences, got shape \(3,\)"):
        network(torch.zeros(2, 4, 1), level=torch.ones(3))


def test_a_checkpoint_of_other_levels_is_refused():
    flow, other = told(), told(high=0.9)
    checkpoint = {"state_dict": flow.state_dict()}
    flow.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"the checkpoint's noise_levels is \[0.1, 0.6\], but"):
        other.on_load_checkpoint(checkpoint)
    told(denoiser=Tweedie()).on_load_checkpoint(checkpoint)
