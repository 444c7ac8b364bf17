"""TARFlow trained on noisy points and denoised by the score."""

from __future__ import annotations

import pytest
import torch

from flowbench.data import Batch
from flowbench.families import tarflow as module

from ..contract.builders import IMAGES, POINTS, build


def points(num: int = 6, spec=POINTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=torch.Generator().manual_seed(seed))


def still(**options):
    """A flow that is the identity, hence the density of N(0, 1)."""
    flow = build("tarflow", IMAGES, **options)
    with torch.no_grad():
        for parameter in flow.flow.parameters():
            parameter.zero_()
    return flow


def test_denoising_a_standard_normal_is_wieners_shrinkage():
    """Noisy data of variance 1 with noise of variance s^2 leave E[clean | noisy] = (1 - s^2) noisy."""
    noise = points(spec=IMAGES)
    drawn = still(noise_std=0.3).sample(noise)
    torch.testing.assert_close(drawn.x, noise * (1 - 0.3**2))
    assert drawn.network_evaluations == 2
    assert torch.equal(still().sample(noise).x, noise)


@pytest.mark.parametrize("spec", [POINTS, IMAGES], ids=lambda spec: spec.name)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_step_is_along_the_gradient_of_the_log_density(spec, conditional):
    flow = build("tarflow", spec, conditional=conditional, noise_std=0.2).double()
    plain = build("tarflow", spec, conditional=conditional).double()
    noise = points(4, spec).double()
    label = torch.tensor([0, 2, 1, 0]) if conditional else None
    noisy, clean = plain.sample(noise, label).x, flow.sample(noise, label).x
    h = 1e-5
    for axis in range(noisy[0].numel()):
        shift = torch.zeros_like(noisy).flatten(1)
        shift[:, axis] = h
        shift = shift.view_as(noisy)
        slope = (plain.log_prob(noisy + shift, label) - plain.log_prob(noisy - shift, label)) / (2 * h)
        torch.testing.assert_close((clean - noisy).flatten(1)[:, axis], 0.04 * slope, rtol=1e-5, atol=1e-8)


def test_training_points_are_noisy_and_likelihoods_are_not():
    x = points(64, IMAGES)
    noisy, plain = still(noise_std=0.5), still()
    losses = [f.training_loss(Batch(x), torch.Generator().manual_seed(3)).total.detach() for f in (noisy, plain)]
    # Of the identity, the loss grows by half the noise's variance.
    assert float(losses[0] - losses[1]) == pytest.approx(0.5 * 0.25, abs=0.05)
    again = noisy.training_loss(Batch(x), torch.Generator().manual_seed(3)).total.detach()
    assert again == losses[0]
    assert torch.equal(noisy.log_prob(x), plain.log_prob(x))
    assert (noisy.likelihood_method, plain.likelihood_method) == ("density-of-noisy-data(0.5)", "")


def test_gradients_stay_with_the_loss():
    """The score of the sampler leaves nothing behind on the parameters."""
    flow = build("tarflow", IMAGES, noise_std=0.2)
    drawn = flow.sample(points(3, IMAGES)).x
    assert not drawn.requires_grad
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_denoising_goes_a_few_points_at_a_time_and_changes_nothing(monkeypatch):
    flow, noise, label = (
        build("tarflow", IMAGES, conditional=True, noise_std=0.2),
        points(7, IMAGES),
        torch.arange(7) % 3,
    )
    whole = flow.sample(noise, label).x
    monkeypatch.setattr(module, "DENOISING_BATCH", 3)
    torch.testing.assert_close(flow.sample(noise, label).x, whole)


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match=r"noise_std must be >= 0, got -0.1: 0 adds none"):
        build("tarflow", POINTS, noise_std=-0.1)
