"""Latents on disk: the same training as encoding on the fly, and a file that knows what it is."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch

from flowbench.data import Batch, FlowDataModule
from flowbench.families import Autoencoder, LatentCFM, LatentSpace, STARFlow, StreamPairing
from flowbench.families.latents.latent_cache import latent_cache
from flowbench.networks import DiT, KLAutoencoder
from flowbench.training import EMAConfig, TrainingConfig

from ..contract.builders import perturb

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    return tmp_path / "latents"


def digits(**options) -> FlowDataModule:
    return FlowDataModule("digits", batch_size=16, **options)


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    module = Autoencoder(digits().spec, partial(KLAutoencoder, latent_channels=2, width=8))
    perturb(module)
    module.latent_second_moment.fill_(4.0)
    return module.eval()


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def spaces(data: FlowDataModule, **options) -> tuple[LatentSpace, LatentSpace]:
    plain, cached = (LatentSpace(autoencoder(), cache_latents=on, **options) for on in (False, True))
    for space in (plain, cached):
        space.prepare_training(data, CPU)
    return plain, cached


def test_without_dequantisation_a_draw_is_the_same(cache):
    data = digits(dequantize="none")
    plain, cached = spaces(data, noise_std=0.3)
    batch = data.train_batch_at(32)
    torch.testing.assert_close(cached.encode_batch(batch, rng()), plain.encode(batch.x, rng()), atol=1e-6, rtol=1e-5)
    # It is looked up, not encoded: the images play no part.
    blank = Batch(torch.zeros_like(batch.x), index=batch.index, position=batch.position)
    assert torch.equal(cached.encode_batch(blank, rng()), cached.encode_batch(batch, rng()))
    assert len(list(cache.glob("*.pt"))) == 1


def test_with_dequantisation_a_draw_differs_by_less_than_the_noise_within_a_bin_could():
    """The file holds the posteriors of the bins' centres; the data are spread over their bins."""
    data = digits()
    plain, cached = spaces(data)
    batch = data.train_batch_at(0)
    fresh, looked_up = plain.encode(batch.x, rng()), cached.encode_batch(batch, rng())
    centres = data.spec.to_model(data.spec.quantize(batch.x))
    torch.testing.assert_close(looked_up, plain.encode(centres, rng()), atol=1e-6, rtol=1e-5)
    assert 0 < (fresh - looked_up).abs().max() < 0.5


def test_evaluation_batches_are_encoded():
    data = digits()
    plain, cached = spaces(data)
    batch = next(iter(data.val_dataloader()))
    assert batch.position is None
    assert torch.equal(cached.encode_batch(batch, rng()), plain.encode_batch(batch, rng()))


def test_the_file_holds_scale_and_statistics_of_the_channels(cache):
    model = autoencoder()
    found = latent_cache(model, digits(), CPU)
    x = digits().spec.to_model(digits().split("train").values)
    with torch.no_grad():
        mean, log_variance = model.network.encode(x)
    torch.testing.assert_close(found.mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_variance, log_variance, atol=1e-5, rtol=1e-5)
    assert found.scale == model.latent_std == 2.0
    draws = torch.cat([model.network.sample(mean, log_variance, torch.randn_like(mean)) for _ in range(20)])
    torch.testing.assert_close(found.channel_mean, draws.mean(dim=(0, 2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(found.channel_std, draws.std(dim=(0, 2, 3)), atol=0, rtol=0.02)
    (file,) = cache.glob("*.pt")
    content = torch.load(file, weights_only=True)
    assert content["identity"]["autoencoder"] == model.checksum()


def test_it_is_made_once_and_again_for_another_autoencoder_or_split(cache, monkeypatch):
    model = autoencoder()
    latent_cache(model, digits(), CPU)
    # The encoder is not run a second time, whatever the seed.
    with monkeypatch.context() as patch:
        patch.setattr(model.network, "encode", None)
        latent_cache(model, digits(seed=5), CPU)
    latent_cache(model, digits(train_on_val=True), CPU)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    latent_cache(model, digits(), CPU)
    assert len(list(cache.glob("*.pt"))) == 3


def test_a_damaged_or_foreign_file_is_refused(cache):
    model = autoencoder()
    latent_cache(model, digits(), CPU)
    (file,) = cache.glob("*.pt")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "identity": {**content["identity"], "dataset": "other"}}, file)
    with pytest.raises(ValueError, match=r"are those of .*'other'.*: delete the file"):
        latent_cache(model, digits(), CPU)
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"cannot read the cached latents .*: delete the file"):
        latent_cache(model, digits(), CPU)


def test_what_cannot_be_cached_is_refused():
    data = digits()
    data.random_flip = True
    with pytest.raises(ValueError, match=r"data\.random_flip is true"):
        latent_cache(autoencoder(), data, CPU)
    with pytest.raises(ValueError, match="needs a FlowDataModule, got NoneType"):
        LatentSpace(autoencoder(), cache_latents=True).prepare_training(None, CPU)


def test_a_deterministic_encoder_is_cached(monkeypatch):
    model = autoencoder()
    encode = model.network.encode
    monkeypatch.setattr(model.network, "encode", lambda x: (encode(x)[0], torch.full_like(encode(x)[0], -math.inf)))
    found = latent_cache(model, digits(), CPU)
    assert found.log_variance.isneginf().all()
    torch.testing.assert_close(found.channel_std, found.mean.transpose(0, 1).flatten(1).std(1), atol=0, rtol=1e-3)


def test_the_options_reach_the_space_of_a_family():
    network = partial(DiT, width=8, depth=1, num_heads=1, patch_size=1)
    family = LatentCFM(digits().spec, network, autoencoder=autoencoder(), noise_std=0.2, cache_latents=True)
    assert family.space.noise_std == 0.2
    assert family.space.cache_latents


@pytest.mark.parametrize("family", ["latent_cfm", "starflow"])
def test_training_from_the_file_is_training_on_the_fly(tmp_path, cache, family):
    def trained(cached: bool) -> torch.Tensor:
        data = digits(dequantize="none")
        torch.manual_seed(1)
        options = {
            "autoencoder": autoencoder(),
            "cache_latents": cached,
            "training": TrainingConfig(ema=EMAConfig(0.0)),
        }
        flow = (
            LatentCFM(data.spec, partial(DiT, width=16, depth=1, num_heads=2, patch_size=1), **options)
            if family == "latent_cfm"
            else STARFlow(data.spec, width=16, head_dim=8, deep_layers=1, shallow_blocks=1, shallow_layers=1, **options)
        )
        perturb(flow)
        before = torch.cat([p.detach().flatten() for p in flow.parameters()])
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(
            max_steps=5, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path,
            enable_model_summary=False, use_distributed_sampler=False, **quiet,
        ).fit(flow, data)  # fmt: skip
        after = torch.cat([p.detach().flatten() for p in flow.parameters()])
        assert not torch.equal(before, after)
        return after

    plain, looked_up = trained(False), trained(True)
    torch.testing.assert_close(plain, looked_up, atol=1e-5, rtol=1e-4)
    assert len(list(cache.glob("*.pt"))) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_a_pairing_over_the_stream_looks_its_latents_up_too(monkeypatch, world):
    """The encoder does not run, and the pairs are those of the latents' means."""

    def paired(cached: bool) -> torch.Tensor:
        data = digits(dequantize="none")
        pairing = StreamPairing(oversample=2, gather=world == 1, ahead=0)
        network = partial(DiT, width=8, depth=1, num_heads=1, patch_size=1)
        flow = LatentCFM(data.spec, network, autoencoder=autoencoder(), cache_latents=cached, pairing=pairing)
        flow.space.prepare_training(data, CPU)
        if cached:
            monkeypatch.setattr(flow.space.autoencoder.network, "encode", None)
        context = replace(flow.pairing_context, rank=world - 1, world_size=world)
        pairing.setup(context, data)
        found = []
        for position in (0, 16, 32, 48):
            batch = data.train_batch_at(position)
            x1 = torch.zeros(16 // world, *flow.flow_shape)  # the pairing looks at the stream, not at these
            found.append(pairing.pairs(context, x1, None, batch, rng()).x0)
        return torch.cat(found)

    assert torch.equal(paired(True), paired(False))
