"""Training of autoencoders: the terms of the loss, who gets which gradient, and what a checkpoint holds."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from flowbench.data import Batch, DataSpec
from flowbench.families import (
    AdversarialConfig,
    Autoencoder,
    DecoderFineTuning,
    LatentSpace,
    PerceptualConfig,
    load_autoencoder,
)
from flowbench.metrics import DigitsCNN, PerceptualDistance, psnr, save_classifier
from flowbench.networks import KLAutoencoder
from flowbench.networks.discriminator import hinge_discriminator_loss
from flowbench.training import EMAConfig, OptimizerConfig, TrainingConfig
from tests.closeness import assert_near, magnitude

from ..contract.builders import perturb
from ..training.test_training import digits, trainer

SPEC = DataSpec("images", "1", (1, 8, 8), levels=17)
NETWORK = partial(KLAutoencoder, latent_channels=2, width=8)
GAME = AdversarialConfig(weight=0.3, start=0.0, width=4, num_layers=1)


def build(cls=Autoencoder, **options):
    torch.manual_seed(0)
    module = cls(SPEC, NETWORK, **options)
    perturb(module)
    return module


def batch(num: int = 6) -> Batch:
    x = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(x, index=torch.arange(num))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.fixture
def perceptual(tmp_path):
    torch.manual_seed(0)
    save_classifier(tmp_path / "classifier.pt", DigitsCNN((1, 8, 8), 10, width=4))
    return PerceptualConfig("classifier", weight=0.7, weights=str(tmp_path / "classifier.pt"))


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def test_the_plain_loss_is_the_bound_per_dimension():
    module = build()
    loss = module.training_loss(batch(), rng())
    noise = torch.randn(6, *module.network.latent_shape, generator=rng())
    terms = module.network.elbo_terms(batch().x, noise)
    torch.testing.assert_close(loss.total, (terms["reconstruction_nll"] + terms["kl"]).mean() / 64)
    assert set(loss.metrics) == {"reconstruction_nll", "kl", "psnr"}


def test_the_loss_is_the_sum_of_its_terms(perceptual):
    module = build(perceptual=perceptual, adversarial=GAME, kl_weight=0.5)
    loss = module.training_loss(batch(), rng())
    parts = loss.metrics
    elbo = (parts["reconstruction_nll"] + 0.5 * parts["kl"]) / 64
    game = 0.3 * parts["adversarial"] + parts["discriminator"]
    torch.testing.assert_close(loss.total.detach(), elbo + 0.7 * parts["perceptual"] + game)
    x = batch().x
    mean, log_variance = module.network.encode(x)
    x_hat = module.network.decode(mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=rng()))
    torch.testing.assert_close(parts["psnr"], psnr(x, x_hat.clamp(-1, 1)).float().mean())
    distance = PerceptualDistance("classifier", perceptual.weights)
    torch.testing.assert_close(parts["perceptual"], distance(x, x_hat).mean().detach())


def test_each_side_of_the_game_gets_its_own_gradient():
    """The discriminator learns from its hinge loss alone, the autoencoder from everything else alone."""
    module, plain = build(adversarial=GAME), build()
    plain.network.load_state_dict(module.network.state_dict())
    total = module.training_loss(batch(), rng()).total
    x = batch().x
    mean, log_variance = module.network.encode(x)
    x_hat = module.network.decode(mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=rng()))

    judge = module.discriminator
    wanted = gradients(hinge_discriminator_loss(judge(x), judge(x_hat.detach())), judge.parameters())
    for found, value in zip(gradients(total, judge.parameters()), wanted, strict=True):
        assert_near(found, value, ulps=1024, scale=0.01 * magnitude(wanted))
    elbo = gradients(plain.training_loss(batch(), rng()).total, plain.network.parameters())
    fooling = gradients(-0.3 * judge(x_hat).mean(), module.network.parameters())
    parts = zip(gradients(total, module.network.parameters()), elbo, fooling, strict=True)
    for found, likelihood, game in parts:
        assert_near(found, likelihood + (0 if game is None else game), ulps=1024, scale=0.01 * magnitude(elbo))
    assert any(g is not None and g.abs().max() > 0 for g in fooling)


def test_held_out_data_are_not_judged(perceptual):
    module = build(perceptual=perceptual, adversarial=GAME).eval()
    assert set(module.training_loss(batch(), rng()).metrics) == {"reconstruction_nll", "kl", "psnr", "perceptual"}


def test_the_game_starts_at_its_share_of_the_budget(tmp_path):
    """Until then the discriminator's weights only decay, and the autoencoder trains as if alone."""
    late, alone = build(adversarial=AdversarialConfig(start=0.9, width=4, num_layers=1)), build()
    alone.network.load_state_dict(late.network.state_dict())
    before = copy.deepcopy(late.discriminator.state_dict())
    for module in (late, alone):
        module.optimizer_config = OptimizerConfig(weight_decay=0.0)
        trainer(tmp_path, max_steps=4, gradient_clip_val=1.0).fit(module, digits())
    assert all(torch.equal(late.discriminator.state_dict()[name], value) for name, value in before.items())
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(late.network.state_dict()[name], value)


def test_both_sides_move_and_the_checkpoint_comes_back(tmp_path, perceptual):
    options = {"perceptual": perceptual, "adversarial": GAME, "training": TrainingConfig(ema=EMAConfig(0.5))}
    module = build(**options)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, max_steps=3, val_check_interval=3, limit_val_batches=1, log_every_n_steps=1)
    run.fit(module, digits())
    still = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    # Where all logits lie between the hinges, the two sides' gradients of the last bias cancel.
    assert still <= {"discriminator.layers.5.bias"}
    assert {"val/psnr", "val/perceptual", "train/discriminator"} <= set(run.callback_metrics)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_autoencoder(build(**options), tmp_path / "a.ckpt")
    assert loaded.discriminator is None
    with module.evaluating():
        torch.testing.assert_close(loaded.network.encode(batch().x)[0], module.network.encode(batch().x)[0])
        assert loaded.checksum() == module.checksum()
    assert LatentSpace(loaded).reconstruct(batch().x).shape == (6, 1, 8, 8)
    # A run goes on with its discriminator.
    again = build(**options)
    trainer(tmp_path, max_steps=4).fit(again, digits(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_the_discriminator_is_neither_averaged_nor_in_the_checksum(perceptual):
    module, plain = build(perceptual=perceptual, adversarial=GAME), build()
    plain.network.load_state_dict(module.network.state_dict())
    assert module.checksum() == plain.checksum()
    assert not any("discriminator" in name for name in module.ema.state_dict()["shadow"])
    assert not any("classifier" in name or "distance" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerceptualConfig(weight=0.0), "perceptual.weight must be a number in .*, got 0"),
        (lambda: AdversarialConfig(weight=-1.0), "adversarial.weight must be a number in .*, got -1"),
        (lambda: AdversarialConfig(start=1.0), r"adversarial.start must be a number in \[0, 1\), got 1"),
        (lambda: build(adversarial=AdversarialConfig()), "sides of at least 24"),
        (lambda: build(kl_weight=0.0), "kl_weight must be a number in .*, got 0"),
        (lambda: build(DecoderFineTuning, noise_std=0.0), "noise_std must be a number in .*, got 0"),
    ],
)
def test_user_errors_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- fine-tuning of the decoder -----------------------------------------------------------------------


def trained(scale: float = 3.0) -> Autoencoder:
    module = build()
    module.latent_second_moment.fill_(scale**2)
    return module.eval()


def fine_tuning(**options) -> DecoderFineTuning:
    return DecoderFineTuning(SPEC, NETWORK, **{"noise_std": 0.5, "autoencoder": trained(), **options})


def test_the_encoder_and_the_scale_stay_and_the_decoder_moves(tmp_path):
    module, original = fine_tuning(training=TrainingConfig(ema=EMAConfig(0.5))), trained()
    run = trainer(tmp_path, max_steps=3)
    run.fit(module, digits())
    moved = {
        name
        for name, p in module.network.named_parameters()
        if not torch.equal(p, original.network.get_parameter(name))
    }
    assert moved == {name for name, _ in original.network.named_parameters() if not name.startswith("encoder.")}
    assert module.latent_std == original.latent_std
    # The checkpoint serves as an autoencoder, and is loaded without the one it came from.
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_autoencoder(
        fine_tuning(autoencoder=None, training=TrainingConfig(ema=EMAConfig(0.5))), tmp_path / "a.ckpt"
    )
    x = batch().x
    assert torch.equal(LatentSpace(loaded).encode_mean(x), LatentSpace(original).encode_mean(x))
    assert loaded.decoder_noise_std == 0.5
    assert loaded.checksum() != original.checksum()


def test_the_noise_is_in_units_of_the_scaled_latents():
    module = fine_tuning()
    x = batch(1).x.expand(20000, -1, -1, -1)
    latent = module._noisy_latent(x, rng())
    mean, log_variance = module.network.encode(x[:1])
    wanted = (log_variance.exp() + (0.5 * 3.0) ** 2)[0].detach()
    torch.testing.assert_close(latent.var(0), wanted, rtol=0.06, atol=0)
    torch.testing.assert_close(latent.mean(0), mean[0].detach(), rtol=0, atol=0.06)


@pytest.mark.slow
def test_fine_tuning_brings_the_noisy_reconstruction_closer(tmp_path):
    """A short training, then 150 steps of the decoder: better with noise, and calibrated to it."""
    data = digits()
    original = Autoencoder(data.spec, NETWORK, training=TrainingConfig(OptimizerConfig(lr=3e-3), EMAConfig(0.0)))
    trainer(tmp_path, max_steps=150).fit(original, data)
    tuned = DecoderFineTuning(
        data.spec,
        NETWORK,
        noise_std=0.5,
        autoencoder=original.eval(),
        training=TrainingConfig(OptimizerConfig(lr=3e-3), EMAConfig(0.0)),
    )
    trainer(tmp_path, max_steps=150).fit(tuned, data)
    x, index = data.model_values("test", slice(200)), torch.arange(200)

    def error(module):
        return (LatentSpace(module, noise_std=0.5).reconstruct(x, index=index) - x).square().mean().item()

    assert error(tuned.eval()) < 0.9 * error(original)
    torch.testing.assert_close(tuned.network.decoder_std.item(), error(tuned) ** 0.5, rtol=0.15, atol=0)


def test_another_noise_is_another_decoder(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(fine_tuning(), digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint's decoder_noise_std is 0\.5, but the configuration builds 0\.3"):
        load_autoencoder(fine_tuning(noise_std=0.3), tmp_path / "a.ckpt")


def test_fine_tuning_needs_a_trained_autoencoder_of_its_kind(tmp_path):
    with pytest.raises(ValueError, match=r"got none: add `requires: \{autoencoder"):
        trainer(tmp_path).fit(fine_tuning(autoencoder=None), digits())
    with pytest.raises(ValueError, match="another architecture"):
        DecoderFineTuning(SPEC, partial(KLAutoencoder, latent_channels=3), noise_std=0.5, autoencoder=trained())
