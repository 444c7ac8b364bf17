"""KLAutoencoder: terms of the bound against torch.distributions, calibration, and a short training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.distributions import Normal, kl_divergence

from flowbench.core.seeds import generator
from flowbench.networks import KLAutoencoder


def randn(shape, name):
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64)


def build(shape=(1, 8, 8), **options):
    """A small float64 autoencoder without a zero weight."""
    options = {"latent_channels": 3, "width": 8, **options}
    model = KLAutoencoder(shape, **options).double()
    rng = generator(0, "init")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return model


@settings(max_examples=20, deadline=None)
@given(
    channels=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    downsamplings=st.integers(0, 3),
    latent_channels=st.integers(1, 5),
    num_res_blocks=st.integers(1, 2),
)
def test_shapes(channels, rows, columns, downsamplings, latent_channels, num_res_blocks):
    shape = (channels, rows * 2**downsamplings, columns * 2**downsamplings)
    model = KLAutoencoder(
        shape,
        latent_channels=latent_channels,
        width=4,
        downsamplings=downsamplings,
        num_res_blocks=num_res_blocks,
    )
    mean, log_variance = model.encode(torch.zeros(2, *shape))
    assert model.latent_shape == (latent_channels, rows, columns)
    assert mean.shape == log_variance.shape == (2, *model.latent_shape)
    assert model.decode(mean).shape == (2, *shape)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.0, 5.0), shift=st.floats(-8.0, 3.0))
def test_kl_against_torch_distributions(scale, shift):
    mean, log_variance = scale * randn((4, 3, 2, 2), "mean"), shift + randn((4, 3, 2, 2), "log_variance")
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(KLAutoencoder.kl(mean, log_variance), expected, rtol=1e-9, atol=1e-9)


def test_kl_is_zero_at_the_prior():
    zeros = torch.zeros(2, 3, 4, 4)
    assert torch.equal(KLAutoencoder.kl(zeros, zeros), torch.zeros(2))


def test_terms_of_the_bound_against_torch_distributions():
    model = build()
    x, noise = randn((4, 1, 8, 8), "x"), randn((4, *model.latent_shape), "noise")
    terms = model.elbo_terms(x, noise)
    mean, log_variance = model.encode(x)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    z = mean + posterior.scale * noise
    torch.testing.assert_close(model.sample(mean, log_variance, noise), z)
    reconstruction = -Normal(model.decode(z), model.decoder_std).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(terms["reconstruction_nll"], reconstruction)
    torch.testing.assert_close(terms["kl"], kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=(1, 2, 3)))
    assert terms["kl"].shape == terms["reconstruction_nll"].shape == (4,)
    for key, value in model(x, noise).items():
        assert torch.equal(value, terms[key])


def test_bound_is_below_the_importance_sampled_likelihood():
    """log p(x) estimated with many posterior draws lies above the mean of the one-draw bound."""
    model = build()
    x = randn((1, 1, 8, 8), "x").expand(1024, -1, -1, -1)
    noise = randn((1024, *model.latent_shape), "noise")
    with torch.no_grad():
        mean, log_variance = model.encode(x)
        z = model.sample(mean, log_variance, noise)
        posterior = Normal(mean, (0.5 * log_variance).exp())
        log_ratio = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).flatten(1).sum(1)
        log_joint = log_ratio - model.reconstruction_nll(x, z)
        likelihood = log_joint.logsumexp(0) - math.log(len(x))
        terms = model.elbo_terms(x, noise)
        bound = -(terms["reconstruction_nll"] + terms["kl"])
    assert bound.mean() < likelihood
    torch.testing.assert_close(bound.mean(), log_joint.mean(), rtol=0, atol=5 * log_ratio.std().item() / 32)


def test_gradients_reach_every_parameter():
    model = build()
    terms = model(randn((4, 1, 8, 8), "x"), randn((4, *model.latent_shape), "noise"))
    sum(term.mean() for term in terms.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    model = build()
    x = randn((3, 1, 8, 8), "x")
    torch.testing.assert_close(model.encode(x)[0][1:2], model.encode(x[1:2])[0], rtol=1e-10, atol=1e-10)
    z = model.encode(x)[0]
    torch.testing.assert_close(model.decode(z)[1:2], model.decode(z[1:2]), rtol=1e-10, atol=1e-10)


def test_log_variance_stays_finite_for_extreme_inputs():
    model = build().float()
    with torch.no_grad():
        model.encoder[-1].bias.fill_(1e4)
    _, log_variance = model.encode(torch.ones(2, 1, 8, 8))
    assert log_variance.max() == 20
    assert torch.isfinite(log_variance.exp()).all()


@pytest.mark.slow
def test_training_on_digits_beats_the_mean_image():
    """50 steps must beat the best constant reconstruction, whose error is the pixels' variance."""
    levels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    x = 2 * (levels + 0.5) / 17 - 1
    torch.manual_seed(0)
    model = KLAutoencoder((1, 8, 8), latent_channels=4, width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = generator(0, "train")
    test, train = x[:256], x[256:]

    def error():
        with torch.no_grad():
            return (model.decode(model.encode(test)[0]) - test).square().mean().item()

    before, bounds = error(), []
    for _ in range(50):
        batch = train[torch.randint(len(train), (128,), generator=rng)]
        noise = torch.randn((128, *model.latent_shape), generator=rng)
        loss = sum(term.mean() for term in model.elbo_terms(batch, noise).values()) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(loss.item())
    constant = (test - train.mean(dim=0)).square().mean().item()
    assert error() < 0.5 * constant < before
    assert bounds[-1] < 0.1 * bounds[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLAutoencoder((2,)), r"shape must be a list of 3 whole numbers, got \(2,\)"),
        (lambda: KLAutoencoder((1, 28, 28), downsamplings=3), "divisible by 8"),
        (lambda: KLAutoencoder((1, 8, 8), latent_channels=0), r"latent_channels must be .*, got 0"),
        (lambda: KLAutoencoder((1, 8, 8), downsamplings=-1), r"downsamplings must be .*, got -1"),
        (lambda: build().encode(torch.zeros(2, 3, 8, 8)), r"x has shape \(2, 3, 8, 8\).*\(1, 8, 8\)"),
        (lambda: build().decode(torch.zeros(2, 3, 8, 8)), r"z has shape \(2, 3, 8, 8\).*\(3, 4, 4\)"),
    ],
)
def test_user_errors_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_network_and_not_the_latents(dtype: torch.dtype):
    model = KLAutoencoder((1, 8, 8), latent_channels=2, width=8)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, _ = model.encode(x)
    with torch.autocast("cpu", dtype=dtype):
        mean, log_variance = model.encode(x)
        decoded = model.decode(mean)
    assert {mean.dtype, log_variance.dtype, decoded.dtype} == {torch.float32}
    assert not torch.equal(mean, exact)
    torch.testing.assert_close(mean, exact, atol=0.05, rtol=0.05)
