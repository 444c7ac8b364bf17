"""Flow matching in latent space: scale, likelihood in latent units, class-conditional samples with guidance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowbench.families import Condition, FlowMatching, LatentSpace, PixelSpace
from flowbench.flows import ClassifierFreeGuidance, RungeKutta4
from flowbench.training import EMAConfig, TrainingConfig

from ..contract.builders import IMAGES, autoencoder, batch_of, build


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_encoding_scaling_unscaling_and_decoding_is_the_autoencoder_alone(scale):
    """Invariant 43, first half: whatever the scale, nothing is lost but what the autoencoder loses."""
    module = autoencoder()
    module.latent_second_moment.fill_(scale**2)
    torch.testing.assert_close(module.latent_std, torch.tensor(scale))
    space, x = LatentSpace(module), batch_of(IMAGES).x
    with torch.no_grad():
        alone = module.network.decode(module.network.encode(x)[0])
    torch.testing.assert_close(space.decode(space.encode_mean(x)), alone)
    torch.testing.assert_close(space.encode_mean(x) * scale, module.network.encode(x)[0].detach())


class GaussianField(nn.Module):
    """The marginal velocity between N(0, 1) and N(0, std^2) of independent pairs on the straight line."""

    condition_channels = 0

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x, t, label=None):
        t = t.view(-1, *[1] * (x.ndim - 1))
        return (self.std**2 * t - (1 - t)) / ((1 - t) ** 2 + (self.std * t) ** 2) * x


@pytest.mark.parametrize("scale", [0.18215, 2.5])
def test_another_scale_shifts_the_latent_likelihood_by_dimensions_times_its_logarithm(scale):
    """Invariant 43, second half: latents divided by `scale` have a density larger by scale^d."""
    shape, std = (2, 2, 2), 1.7

    def flow(of_std: float) -> FlowMatching:
        options = {"likelihood_solver": RungeKutta4(num_steps=64), "training": TrainingConfig(ema=EMAConfig(0.0))}
        return FlowMatching(IMAGES, lambda *_: GaussianField(of_std), space=PixelSpace(shape), **options)

    z = std * torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.arange(5)
    raw = flow(std).flow_log_prob(z, Condition(), index, 0)
    scaled = flow(std / scale).flow_log_prob(z / scale, Condition(), index, 0)
    normal = torch.distributions.Normal(0.0, std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(raw, normal, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scaled - raw, torch.full_like(raw, math.prod(shape) * math.log(scale)), atol=2e-5, rtol=0
    )


def guided(scale: float):
    module = build("latent_cfm", IMAGES, conditional=True, guidance=ClassifierFreeGuidance(scale))
    # Labels start near zero; a table that tells them apart is what guidance is about.
    with torch.no_grad():
        module.network.embedding.label.weight.normal_(generator=torch.Generator().manual_seed(1))
    return module


def test_guided_class_conditional_samples_between_the_unconditional_and_the_conditional_ones():
    """Invariant 44 through the sampler and the decoder: scale 1 is the labels' flow, 0 the null label's."""
    label, index = torch.tensor([0, 1, 2]), torch.arange(3)
    module = guided(2.0)
    noise = module.draw_noise(index, 0)
    null = torch.full((3,), module.num_classes)
    conditional, unconditional = (module.sample(noise, given, guidance=1.0) for given in (label, null))
    assert not torch.allclose(conditional.x, unconditional.x)
    torch.testing.assert_close(module.sample(noise, label, guidance=0.0).x, unconditional.x)
    torch.testing.assert_close(guided(1.0).sample(noise, label).x, conditional.x)
    torch.testing.assert_close(guided(0.0).sample(noise, label).x, module.sample(noise, None).x)
    own = module.sample(noise, label)
    assert own.network_evaluations == 2 * conditional.network_evaluations
    assert not torch.allclose(own.x, conditional.x)
    assert own.x.shape == (3, *IMAGES.shape)


def test_one_euler_step_extrapolates_by_the_scale_or_by_meta_w_plus_one():
    """v_null + s (v_label - v_null) = (1 + w) v_label - w v_null at w = s - 1."""
    module, label = guided(1.0), torch.tensor([0, 1, 2])
    x, t = module.draw_noise(torch.arange(3), 0), torch.full((3,), 0.4)
    with torch.no_grad():
        with_label, without = module.network(x, t, label), module.network(x, t, None)
        found = module.field(Condition(label), ClassifierFreeGuidance(3.5))(torch.tensor(0.4), x)
    torch.testing.assert_close(found, 3.5 * with_label - 2.5 * without)


def test_the_autoencoder_is_no_part_of_the_flow():
    """Trap 32: neither parameters nor checkpoint nor averaged weights hold it."""
    module = build("latent_cfm", IMAGES)
    own = {id(parameter) for parameter in module.parameters()}
    assert not own & {id(parameter) for parameter in module.space.autoencoder.parameters()}
    assert all(key.startswith("network.") for key in module.state_dict())
    module.train()
    assert not module.space.autoencoder.training
