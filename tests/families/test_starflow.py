"""STARFlow: depth in one block, noise on latents, a bound of what its sampler does."""

from __future__ import annotations

import pytest
import torch

from flowbench.families import Condition, GaussianNoise, STARFlow, Tweedie
from flowbench.flows import AutoregressiveGuidance

from ..contract.builders import IMAGES, autoencoder, batch_of, perturb

SIZES = {"width": 16, "head_dim": 8}


def starflow(**options) -> STARFlow:
    torch.manual_seed(0)
    flow = STARFlow(IMAGES, autoencoder=autoencoder(), **{**SIZES, "architecture": "3(2)", **options})
    perturb(flow)
    return flow


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_papers_notation_names_the_deep_block_and_all_blocks():
    flow = starflow()
    assert [len(block.network.blocks) for block in flow.flow.blocks] == [2, 3]
    assert [block.permutation for block in flow.flow.blocks] == ["flip", "identity"]
    six = STARFlow(IMAGES, autoencoder=autoencoder(), architecture="18(6)", **SIZES)
    assert [len(block.network.blocks) for block in six.flow.blocks] == [2] * 5 + [18]
    assert [block.permutation for block in six.flow.blocks] == ["flip", "identity"] * 3
    with pytest.raises(ValueError, match="says shallow_blocks 1, but shallow_blocks is 2: leave one of them out"):
        starflow(shallow_blocks=2)


def test_only_the_deep_block_is_conditioned_and_guided():
    flow = starflow(conditional=True)
    assert [block.network.num_classes for block in flow.flow.blocks] == [None, 3]
    noise, label = flow.draw_noise(torch.arange(2), 0), torch.tensor([0, 2])
    guided = flow.sample(noise, label, guidance=3.0).network_evaluations
    sizes = [sum(p.numel() for p in block.parameters()) for block in flow.flow.blocks]
    assert guided == pytest.approx((sizes[0] + 2 * sizes[1]) / sum(sizes))
    rule = AutoregressiveGuidance(3.0, rule="log-scale", blocks="deep")
    assert starflow(conditional=True, guidance=rule).describe().sampler == "sequential+guidance[log-scale,deep]"


def test_noise_widens_the_latents_and_names_the_bound():
    plain, noisy = starflow(), starflow(augmentation=GaussianNoise(0.5), denoiser=Tweedie())
    x = batch_of(IMAGES, 512).x
    variances = [flow.space.encode(x, rng()).var() - flow.space.encode_mean(x).var() for flow in (plain, noisy)]
    assert float(variances[1] - variances[0]) == pytest.approx(0.25, rel=0.1)
    assert (plain.describe().likelihood_method, noisy.describe().likelihood_method) == ("", "noise(0.5)+tweedie")
    assert (plain.describe().likelihood, noisy.describe().likelihood) == ("bound", "bound")


def test_the_bound_costs_what_its_denoiser_costs():
    assert starflow().describe().likelihood_evaluations == 1.0
    assert starflow(augmentation=GaussianNoise(0.3), denoiser=Tweedie()).describe().likelihood_evaluations == 3.0


def test_the_bound_is_that_of_the_sampler():
    """By hand: prior of the noisy latent, decoder of the denoised one, entropy of the noisy posterior."""
    flow = starflow(augmentation=GaussianNoise(0.4), denoiser=Tweedie(0.8))
    x, index = batch_of(IMAGES, 3).x, torch.arange(3)
    seen = []
    inner = flow.space.decode
    flow.space.decode = lambda z: seen.append(z) or inner(z)
    bound = flow.log_prob(x, index=index, seed=4)
    (decoded,) = seen
    model = flow.space.autoencoder
    mean, log_variance = (t.detach() / model.latent_std ** (1 - i) for i, t in enumerate(model.network.encode(x)))
    std = (log_variance.exp() / model.latent_std**2 + 0.4**2).sqrt()
    z = mean + std * flow.source.sample_indexed(index, flow.flow_shape, 4, "posterior")
    torch.testing.assert_close(decoded, flow.flow_denoise(z, Condition()))
    assert not torch.allclose(decoded, z, atol=1e-3)
    likelihood = torch.distributions.Normal(inner(decoded), model.network.decoder_std.detach())
    expected = likelihood.log_prob(x).flatten(1).sum(1) + flow.flow_log_prob(z, Condition(), index, 4)
    expected = expected - torch.distributions.Normal(mean, std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(bound, expected, rtol=1e-6, atol=0)
