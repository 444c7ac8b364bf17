"""Posteriors of the classes, against Bayes' rule, and the interval of a proportion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from flowbench.families.zero_shot import classify, clopper_pearson
from tests.contract.builders import IMAGES, LIKELIHOOD_STEPS, build

from .gaussian_flow import GaussianFlow, data


@pytest.mark.parametrize("prior", [[1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
def test_the_posterior_of_a_mixture_of_gaussians(prior):
    """Against SciPy's densities and Bayes' rule written out."""
    module = GaussianFlow(conditional=True)
    # Between the means, so that no class is certain.
    x = module.mean.mean(0).view(1, 1, 4, 4) + 0.5 * data(num=20)
    found = classify(module, x, torch.tensor(prior, dtype=torch.float64).log())
    density = np.stack(
        [
            stats.multivariate_normal(mean, lower @ lower.T).logpdf(x.flatten(1).numpy())
            for mean, lower in zip(module.mean.numpy(), module.lower.numpy(), strict=True)
        ],
        axis=1,
    )
    np.testing.assert_allclose(found.log_prob, density, atol=1e-9)
    joint = np.exp(density - density.max(1, keepdims=True)) * prior
    np.testing.assert_allclose(found.log_posterior.exp(), joint / joint.sum(1, keepdims=True), atol=1e-9)
    assert (found.predicted.numpy() == joint.argmax(1)).all()
    assert found.network_evaluations == 3


@pytest.mark.parametrize("name", ["cfm", "latent_cfm", "starflow"])
def test_all_classes_see_the_same_draws(name):
    """Without an effect of the label the posterior is the prior: probes and posterior draws must cancel."""
    module = build(name, IMAGES, conditional=True).eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.copy_(part.weight[:1].expand_as(part.weight))
    log_prior = torch.tensor([0.5, 0.3, 0.2]).log()
    found = classify(module, data(IMAGES, 3).float() * 0.5, log_prior, index=torch.tensor([5, 1, 8]), seed=3)
    torch.testing.assert_close(found.log_posterior, log_prior.double().expand(3, 3), rtol=0, atol=2e-4)
    assert found.network_evaluations == (3 if name == "starflow" else 3 * 4 * LIKELIHOOD_STEPS)


def test_the_bound_of_a_latent_flow_decodes_what_its_sampler_decodes(monkeypatch):
    """log p(x | z) = N(x; D(denoise(z)), s^2): the decoder term alone moves, by the difference of two squares."""
    module = build("starflow", IMAGES).eval()
    x = data(IMAGES).float() * 0.5
    plain = module.log_prob(x, seed=1)
    monkeypatch.setattr(module, "flow_denoise", lambda z, condition: 0.8 * z)
    index, width = torch.arange(5), float(module.space.autoencoder.network.decoder_std)
    with_it, without = (module.space.reconstruct(x, index=index, seed=1, denoise=f) for f in (lambda z: 0.8 * z, None))
    squares = [(y - x).flatten(1).square().sum(1) for y in (with_it, without)]
    expected = (squares[1] - squares[0]) / (2 * width**2)
    assert float(expected.abs().min()) > 1e-3
    torch.testing.assert_close(module.log_prob(x, seed=1) - plain, expected.to(plain), rtol=1e-3, atol=1e-3)


def test_classes_need_a_conditional_flow_and_a_prior_of_their_number():
    with pytest.raises(ValueError, match="classify needs a flow that knows classes"):
        classify(GaussianFlow(), data(), torch.zeros(3))
    with pytest.raises(ValueError, match="the prior must name 3 classes"):
        classify(GaussianFlow(conditional=True), data(), torch.zeros(2))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (7, 10), (450, 500)])
def test_the_interval_of_a_proportion(successes, trials):
    """Against the definition: the tails of the binomial beyond the interval's ends."""
    low, high = clopper_pearson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)
    with pytest.raises(ValueError, match=r"successes must be a whole number in \[0, 2\], got 3"):
        clopper_pearson(3, 2)
