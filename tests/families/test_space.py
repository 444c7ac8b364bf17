"""The latent space against probabilistic PCA, whose marginal likelihood is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowbench.data import DataSpec
from flowbench.families import LatentSpace, PixelSpace

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
