"""Autoencoders that others trained: TAEF2 on a photograph, diffusers' AutoencoderKL, and the measured means."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

from flowbench.data import DataSpec
from flowbench.families import (
    TAEF2,
    DecoderFineTuning,
    DiffusersAutoencoder,
    LatentCFM,
    LatentSpace,
    PretrainedAutoencoder,
    load_autoencoder,
)
from flowbench.metrics import psnr
from flowbench.networks import DiT, KLAutoencoder, TinyAutoencoder
from flowbench.training import EMAConfig, TrainingConfig

from ..contract.builders import perturb
from ..training.test_training import digits, trainer


@pytest.fixture
def weights() -> str:
    folder = os.environ.get("FLOWBENCH_TAEF2")
    if not folder:
        pytest.skip("FLOWBENCH_TAEF2 does not name a folder with taef2_encoder.pth and taef2_decoder.pth")
    return folder


def photograph(rows: slice, columns: slice) -> torch.Tensor:
    picture = torch.tensor(load_sample_images().images[1][rows, columns].copy())
    return picture.permute(2, 0, 1)[None].float() / 127.5 - 1


def test_taef2_reconstructs_a_photograph(weights):
    """34.7 dB; another scaling of the pictures, bound of the latents or number of groups costs 3 dB and more."""
    x = photograph(slice(0, 256), slice(0, 256))
    network = TAEF2((3, 256, 256), weights=weights)
    space = LatentSpace(PretrainedAutoencoder(DataSpec("photo", "1", (3, 256, 256)), lambda shape: network))
    assert space.shape == (32, 32, 32)
    assert float(psnr(x, space.reconstruct(x).clamp(-1, 1))) > 33.0
    assert 0.5 < float(space.encode_mean(x).std()) < 1.2


def test_taef2_serves_a_latent_family_with_noise_alone(weights):
    x = photograph(slice(0, 32), slice(100, 132)).expand(2, -1, -1, -1)
    spec = DataSpec("photo", "1", (3, 32, 32), levels=256)

    def family(noise_std):
        autoencoder = PretrainedAutoencoder(spec, partial(TAEF2, weights=weights))
        network = partial(DiT, width=8, depth=1, num_heads=1, patch_size=1)
        return LatentCFM(spec, network, autoencoder=autoencoder, noise_std=noise_std)

    with pytest.raises(ValueError, match="this encoder is deterministic"):
        family(0.0).log_prob(x)
    assert family(0.3).log_prob(x).isfinite().all()


def test_weights_that_are_not_those_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no weights at .*taef2_encoder\.pth"):
        TAEF2((3, 8, 8), weights=str(tmp_path))
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taef2_encoder.pth")
    with pytest.raises(ValueError, match="does not hold the weights of TAEF2"):
        TAEF2((3, 8, 8), weights=str(tmp_path))


def test_the_tiny_autoencoder_keeps_the_contract_of_autoencoders():
    torch.manual_seed(0)
    network = TinyAutoencoder((3, 16, 24), latent_channels=5).double()
    perturb(network)
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    mean, log_variance = network.encode(x)
    assert mean.shape == (2, *network.latent_shape) == (2, 5, 2, 3)
    assert log_variance.isneginf().all()
    assert network.decode(mean).shape == x.shape
    # Latents far outside are bounded before they are decoded.
    torch.testing.assert_close(network.decode(1e6 * mean.sign()), network.decode(1e7 * mean.sign()))
    network.reconstruction_nll(x, mean).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 8), {}, r"shape is \(1, 8, 8\)"),
        ((3, 8, 12), {}, "divisible by 8"),
        ((3, 8, 8), {"latent_channels": 0}, "latent_channels must be a whole number in .*, got 0"),
    ],
)
def test_the_tiny_autoencoder_names_what_it_takes(shape, options, message):
    with pytest.raises(ValueError, match=message):
        TinyAutoencoder(shape, **options)


# ---- the measurement ----------------------------------------------------------------------------------


def network_of_digits() -> KLAutoencoder:
    torch.manual_seed(0)
    network = KLAutoencoder((1, 8, 8), latent_channels=2, width=8)
    perturb(network)
    return network


def pretrained(noise_std: float = 0.0) -> PretrainedAutoencoder:
    return PretrainedAutoencoder(digits().spec, lambda shape: network_of_digits(), noise_std=noise_std)


def test_a_fit_measures_the_means_over_the_batches_drawn(tmp_path):
    """Three steps are the plain average of three batches' values, whatever the gradients' size and clipping."""
    module, data = pretrained(), digits()
    frozen = {name: value.clone() for name, value in module.network.state_dict().items() if name != "log_sigma"}
    run = trainer(tmp_path, max_steps=3, gradient_clip_val=1e-6)
    run.fit(module, data)
    assert all(torch.equal(module.network.state_dict()[name], value) for name, value in frozen.items())
    x = torch.cat([digits().train_batch_at(16 * step).x for step in range(3)])
    network = network_of_digits()
    with torch.no_grad():
        mean, log_variance = network.encode(x)
        moment = (mean.square() + log_variance.exp()).mean()
        draws = [network.decode(network.sample(mean, log_variance, torch.randn_like(mean))) for _ in range(200)]
        errors = torch.stack([(x - draw).square().mean() for draw in draws])
    torch.testing.assert_close(module.latent_std, moment.sqrt())
    # The error is that of one draw from the posterior per image, so it scatters about its expectation.
    assert abs(float(module.network.decoder_std.square().detach() - errors.mean())) < 4 * float(errors.std())
    torch.testing.assert_close(module.network.decoder_std.detach().square(), module.squared_error.detach())

    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_autoencoder(pretrained(), tmp_path / "a.ckpt")
    assert loaded.checksum() == module.checksum()
    assert torch.equal(loaded.latent_std, module.latent_std)


def test_the_measured_variance_is_the_best_one():
    """No other decoder variance gives a higher likelihood of the images it was measured on."""
    module = pretrained()
    x = digits().model_values("train", slice(64))
    with torch.no_grad():
        z = module.network.encode(x)[0]
        error = (x - module.network.decode(z)).square().mean()
        losses = []
        for factor in (0.9, 1.0, 1.1):
            module.network.log_sigma.copy_(0.5 * error.log() + torch.tensor(factor).log())
            losses.append(float(module.network.reconstruction_nll(x, z).sum()))
    assert losses[1] < min(losses[0], losses[2])


def test_noise_on_the_latents_widens_the_decoder(tmp_path):
    stds = []
    for noise_std in (0.0, 1.0):
        module = pretrained(noise_std)
        trainer(tmp_path, max_steps=2).fit(module, digits())
        stds.append(float(module.network.decoder_std))
    assert stds[1] > stds[0]
    with pytest.raises(ValueError, match=r"noise_std must be a number in .*, got -1"):
        pretrained(-1.0)


def test_a_pretrained_decoder_can_be_fine_tuned(tmp_path):
    module = DecoderFineTuning(
        digits().spec,
        lambda shape: network_of_digits(),
        noise_std=0.3,
        autoencoder=pretrained(),
        training=TrainingConfig(ema=EMAConfig(0.0)),
    )
    trainer(tmp_path, max_steps=2).fit(module, digits())
    original = dict(network_of_digits().named_parameters())
    still = {name for name, p in module.network.named_parameters() if torch.equal(p, original[name])}
    assert still == {name for name in original if name.startswith("encoder.")}


# ---- diffusers ----------------------------------------------------------------------------------------


def test_without_diffusers_the_user_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"needs the package diffusers: pip install diffusers"):
        DiffusersAutoencoder((3, 16, 16), path=str(tmp_path))


@pytest.fixture
def saved_vae(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vae.save_pretrained(tmp_path)
    return vae, tmp_path


def test_diffusers_autoencoder_computes_what_diffusers_computes(saved_vae):
    vae, folder = saved_vae
    network = DiffusersAutoencoder((3, 16, 16), path=str(folder)).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = network.encode(x)
    posterior = vae.encode(x).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)
    torch.testing.assert_close(network.decode(mean), vae.decode(mean).sample)
    assert network.latent_shape == tuple(mean.shape[1:]) == (4, 8, 8)
    sides = {
        id(p) for side in (network.encoder_modules(), network.decoder_modules()) for m in side for p in m.parameters()
    }
    assert sides == {id(p) for p in network.vae.parameters()}
    space = LatentSpace(PretrainedAutoencoder(DataSpec("photo", "1", (3, 16, 16)), lambda shape: network))
    bound = space.log_prob(x, lambda z: -0.5 * z.flatten(1).square().sum(1), torch.arange(2), 0)
    assert bound.isfinite().all()


def test_diffusers_folders_and_shapes_are_checked(saved_vae, tmp_path):
    _, folder = saved_vae
    with pytest.raises(ValueError, match=r"takes \(C, H, W\) with H and W divisible by 2"):
        DiffusersAutoencoder((1, 16, 16), path=str(folder))
    with pytest.raises(ValueError, match=r"no config\.json in"):
        DiffusersAutoencoder((3, 16, 16), path=str(Path(tmp_path) / "nothing"))
