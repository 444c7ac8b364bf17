"""The latent space against probabilistic PCA, whose marginal likelihood is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowbench.data import DataSpec
from flowbench.families import LatentSpace, PixelSpace
from flowbench.networks import KLAutoencoder
from tests.marks import slow

SPEC = DataSpec("pca", "1", (4, 1, 1), levels=17)


class PrincipalComponents(nn.Module):
    """x = W z + sigma e with orthogonal columns of W, so that the exact posterior is a diagonal Gaussian."""

    latent_shape = (2, 1, 1)

    def __init__(self, sigma: float, spoil: float = 0.0) -> None:
        super().__init__()
        basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.weight = nn.Parameter(basis[:, :2] * torch.tensor([1.5, 0.7], dtype=torch.float64))
        self.sigma, self.spoil = sigma, spoil

    @property
    def decoder_std(self) -> torch.Tensor:
        return torch.tensor(self.sigma, dtype=torch.float64)

    def encode(self, x):
        precision = self.weight.square().sum(0) / self.sigma**2 + 1
        mean = (x.flatten(1) @ self.weight) / self.sigma**2 / precision + self.spoil
        log_variance = -precision.log().expand_as(mean)
        return mean.unflatten(1, (2, 1, 1)), log_variance.unflatten(1, (2, 1, 1))

    def decode(self, z):
        return (z.flatten(1) @ self.weight.T).unflatten(1, (4, 1, 1))

    @staticmethod
    def sample(mean, log_variance, noise):
        return mean + (0.5 * log_variance).exp() * noise

    def log_marginal(self, x):
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(4, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance).log_prob(
            x.flatten(1)
        )


class Holder(nn.Module):
    """What LatentSpace asks of an autoencoder module."""

    def __init__(self, network: nn.Module, std: float) -> None:
        super().__init__()
        self.network = network
        self.latent_std = torch.tensor(std, dtype=torch.float64)


def standard_normal(std: float):
    """The flow's density of scaled latents whose unscaled law is N(0, I)."""

    def density(z):
        flat = z.flatten(1) * std
        return -0.5 * flat.square().sum(1) - math.log(2 * math.pi) + 2 * math.log(std)

    return density


@pytest.mark.parametrize("std", [1.0, 2.5, 0.3])
def test_bound_is_tight_at_the_exact_posterior_for_any_scale(std):
    network = PrincipalComponents(0.4)
    space = LatentSpace(Holder(network, std))
    x = torch.randn(50, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bound = space.log_prob(x, standard_normal(std), torch.arange(50), seed=0)
    torch.testing.assert_close(bound, network.log_marginal(x).detach(), atol=1e-9, rtol=0)


def test_bound_lies_below_when_the_posterior_is_wrong():
    network = PrincipalComponents(0.4, spoil=0.5)
    x = torch.randn(400, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    space = LatentSpace(Holder(network, 1.0))
    bound = space.log_prob(x, standard_normal(1.0), torch.arange(400), seed=0)
    assert bound.mean() < network.log_marginal(x).mean() - 0.1


def test_posterior_draws_are_keyed_by_index():
    space = LatentSpace(Holder(PrincipalComponents(0.4, spoil=0.5), 1.0))
    x = torch.randn(6, 4, 1, 1, dtype=torch.float64)
    whole = space.log_prob(x, standard_normal(1.0), torch.arange(6), seed=3)
    part = space.log_prob(x[4:], standard_normal(1.0), torch.tensor([4, 5]), seed=3)
    torch.testing.assert_close(whole[4:], part)
    assert not torch.equal(whole, space.log_prob(x, standard_normal(1.0), torch.arange(6), seed=4))


def test_encoding_divides_and_decoding_multiplies_by_the_scale():
    network = PrincipalComponents(0.4)
    x = torch.randn(5, 4, 1, 1, dtype=torch.float64)

    def draw(std):
        return LatentSpace(Holder(network, std)).encode(x, torch.Generator().manual_seed(2))

    torch.testing.assert_close(draw(1.0), 2.0 * draw(2.0))
    z = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(LatentSpace(Holder(network, 2.0)).decode(z), network.decode(2.0 * z))


def test_pixel_space_changes_nothing():
    space, x = PixelSpace((2,)), torch.randn(3, 2)
    assert space.encode(x, torch.Generator()) is x
    assert space.decode(x) is x
    assert torch.equal(space.log_prob(x, lambda z: z.sum(1), torch.arange(3), 0), x.sum(1))


# ---- noise on the latents -----------------------------------------------------------------------------


class NarrowedPosterior(PrincipalComponents):
    """An encoder whose own variance is what the noise leaves of the true posterior's."""

    def __init__(self, sigma: float, noise: float, shrink: float = 1.0) -> None:
        super().__init__(sigma)
        self.noise, self.shrink = noise, shrink

    def encode(self, x):
        mean, log_variance = super().encode(x)
        return mean, (log_variance.exp() - self.noise**2).log()

    def decode(self, z):
        return super().decode(z / self.shrink)


@pytest.mark.parametrize("shrink", [1.0, 0.8])
@pytest.mark.parametrize("std", [1.0, 2.5])
def test_the_bound_is_tight_where_encoder_and_noise_make_the_true_posterior(std, shrink):
    """The denoiser is a part of the decoder: here it undoes a decoder that expects shrunken latents."""
    noise = 0.1
    network = NarrowedPosterior(0.4, noise * std, shrink)
    space = LatentSpace(Holder(network, std), noise_std=noise)
    x = torch.randn(50, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise = None if shrink == 1.0 else lambda z: shrink * z
    bound = space.log_prob(x, standard_normal(std), torch.arange(50), seed=0, denoise=denoise)
    torch.testing.assert_close(bound, network.log_marginal(x).detach(), atol=1e-9, rtol=0)


def test_noise_beyond_the_posterior_lowers_the_bound_by_its_divergence():
    """E[bound] = log p(x) - KL(q || posterior), a closed form between Gaussians of one mean."""
    network, noise = PrincipalComponents(0.4), 0.3
    space = LatentSpace(Holder(network, 1.0), noise_std=noise)
    x = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(20000, 4, 1, 1)
    bound = space.log_prob(x, standard_normal(1.0), torch.arange(20000), seed=0)
    variance = network.encode(x[:1])[1].exp().flatten()
    ratio = (variance + noise**2) / variance
    divergence = 0.5 * (ratio - 1 - ratio.log()).sum()
    wanted = network.log_marginal(x[:1]).detach() - divergence.detach()
    torch.testing.assert_close(bound.mean()[None], wanted, atol=4 * bound.std().item() / 20000**0.5, rtol=0)


@pytest.mark.parametrize("noise", [slow(0.0), 0.4])
def test_the_bound_of_a_network_against_quadrature(noise):
    """A random nonlinear autoencoder with two latent numbers: both the bound and log p(x) as sums over a grid."""
    torch.manual_seed(0)
    network = KLAutoencoder((1, 2, 2), latent_channels=2, width=8, downsamplings=1).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        network.log_sigma.fill_(-0.5)
    scale = 1.7
    space = LatentSpace(Holder(network, scale), noise_std=noise)
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)

    def shrunken(z):
        return 0.7 * z

    draws = 4000
    flow = standard_normal(1.0)
    bounds = space.log_prob(x.expand(draws, 1, 2, 2), flow, torch.arange(draws), seed=0, denoise=shrunken)
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    cell = float(axis[1] - axis[0]) ** 2
    with torch.no_grad():
        decoded = network.decode(scale * 0.7 * grid[:, :, None, None])
        log_likelihood = torch.distributions.Normal(decoded, math.exp(-0.5)).log_prob(x).flatten(1).sum(1)
        log_joint = log_likelihood - 0.5 * grid.square().sum(1) - math.log(2 * math.pi)
        mean, log_variance = network.encode(x)
        std = (log_variance.exp() / scale**2 + noise**2).sqrt().flatten()
        log_q = torch.distributions.Normal(mean.flatten() / scale, std).log_prob(grid).sum(1)
    exact = float(log_joint.logsumexp(0)) + math.log(cell)
    wanted = float((log_q.exp() * (log_joint - log_q)).sum() * cell)
    assert abs(float(log_q.exp().sum()) * cell - 1) < 1e-6
    assert abs(float(bounds.mean()) - wanted) < 4 * float(bounds.std()) / draws**0.5
    assert wanted < exact - 1e-3


@pytest.mark.parametrize(("std", "noise"), [(1.0, 0.0), (2.0, 0.3)])
def test_encoding_adds_the_noise_to_the_scaled_posterior(std, noise):
    network = PrincipalComponents(0.4, spoil=0.5)
    space = LatentSpace(Holder(network, std), noise_std=noise)
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    z = space.encode(x.expand(40000, 4, 1, 1), torch.Generator().manual_seed(0))
    mean, log_variance = network.encode(x)
    torch.testing.assert_close(space.encode_mean(x), mean.detach() / std)
    torch.testing.assert_close(z.mean(0, keepdim=True), mean.detach() / std, atol=0.01, rtol=0)
    torch.testing.assert_close(z.var(0), log_variance.detach().exp()[0] / std**2 + noise**2, atol=0, rtol=0.05)


class Deterministic(PrincipalComponents):
    def encode(self, x):
        mean, _ = super().encode(x)
        return mean, torch.full_like(mean, -torch.inf)


def test_a_deterministic_encoder_has_a_bound_with_noise_alone():
    network = Deterministic(0.4)
    x = torch.randn(6, 4, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"encoder is deterministic and noise_std is 0: set noise_std above 0"):
        LatentSpace(Holder(network, 1.0)).log_prob(x, standard_normal(1.0), torch.arange(6), 0)
    space = LatentSpace(Holder(network, 1.0), noise_std=0.35)
    bound = space.log_prob(x, standard_normal(1.0), torch.arange(6), 0)
    assert bound.isfinite().all()
    assert torch.equal(space.encode_mean(x), network.encode(x)[0])


def test_reconstructions_of_means_and_of_keyed_draws():
    network = PrincipalComponents(0.4, spoil=0.5)
    space = LatentSpace(Holder(network, 2.0), noise_std=0.3)
    x = torch.randn(6, 4, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(space.reconstruct(x), network.decode(network.encode(x)[0]).detach())
    whole = space.reconstruct(x, index=torch.arange(6), seed=3)
    torch.testing.assert_close(whole[4:], space.reconstruct(x[4:], index=torch.tensor([4, 5]), seed=3))
    assert not torch.equal(whole, space.reconstruct(x))
    zero = space.reconstruct(x, index=torch.arange(6), denoise=torch.zeros_like)
    torch.testing.assert_close(zero, torch.zeros_like(x))


def test_pixel_space_adds_noise_in_training_alone():
    space = PixelSpace((2,), noise_std=0.5)
    x = torch.zeros(20000, 2)
    noisy = space.encode(x, torch.Generator().manual_seed(0))
    assert abs(noisy.std().item() - 0.5) < 0.01
    assert space.encode_mean(x) is x
    assert torch.equal(space.log_prob(x, lambda z: z.sum(1), torch.arange(len(x)), 0), x.sum(1))


@pytest.mark.parametrize("make", [lambda: PixelSpace((2,), -0.1), lambda: LatentSpace(Holder(Deterministic(1), 1), -1)])
def test_negative_noise_is_refused(make):
    with pytest.raises(ValueError, match=r"noise_std must be a number in .*, got -"):
        make()
