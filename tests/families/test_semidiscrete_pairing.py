"""Data that follow the noise: what is looked up, within which labels, from which file, and what it costs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from flowbench.data import FlowDataModule
from flowbench.families import FlowMatching, LatentSpace, SemidiscretePairing
from flowbench.families.conditioning.inpainting import InpaintingConditioner
from flowbench.families.pairing import potential_fit
from flowbench.flows import EulerMaruyama, SemidiscreteDual, VonMisesFisherSource
from flowbench.networks import MLP, DiT

from ..contract.builders import IMAGES, autoencoder, perturb
from ..training.test_training import trainer

SMALL = {"steps": 300, "batch": 256, "chi2": None}


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def labelled(tmp_path) -> FlowDataModule:
    """Two classes of images of 17 grey levels, dark and bright, three dark ones for each bright one."""
    draw = np.random.default_rng(0)
    label = np.arange(112) % 4 == 0
    images = draw.integers(0, 8, (112, 1, 4, 4)) + 8 * label[:, None, None, None]
    rows = {"train": slice(80), "val": slice(80, 96), "test": slice(96, 112)}
    split = {name: images[part] for name, part in rows.items()}
    labels = {f"{name}_label": label[part].astype(np.int64) for name, part in rows.items()}
    np.savez(tmp_path / "x.npz", **{name: part.astype(np.uint8) for name, part in split.items()}, **labels)
    return FlowDataModule("npz", path=str(tmp_path / "x.npz"), levels=17, batch_size=32)


def flow(data: FlowDataModule, pairing: SemidiscretePairing | None = None, **options) -> FlowMatching:
    torch.manual_seed(0)
    image = len(data.spec.shape) == 3
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2) if image else partial(MLP, width=16, depth=1)
    module = FlowMatching(data.spec, network, pairing=pairing or SemidiscretePairing(**SMALL), **options)
    perturb(module)
    return module


def pairs_at(module: FlowMatching, data: FlowDataModule, position: int, seed: int = 5):
    batch = data.train_batch_at(position)
    points = module.space.encode_batch(batch, rng())
    label = batch.label if module.num_classes is not None else None
    return module.pairing.pairs(module.pairing_context, points, label, batch, rng(seed)), batch


def nearest(points: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distance = torch.cdist(x.flatten(1).double(), points.flatten(1).double())
    return distance.argmin(1), distance.amin(1)


@pytest.mark.parametrize("dequantize", ["none", "uniform"])
def test_noise_is_the_sources_and_its_data_are_looked_up(labelled, dequantize):
    labelled.dequantize = dequantize
    module = flow(labelled)
    module.fit_to(labelled, training=True)
    pairs, batch = pairs_at(module, labelled, 64)
    noise = torch.randn(32, 1, 4, 4, generator=rng(5))
    assert torch.equal(pairs.x0, noise)
    centres = FlowDataModule("npz", path=labelled.path, levels=17, dequantize="none").model_values("train")
    potential = module.pairing._solved.potentials[0].potential
    score = noise.flatten(1).double() @ (centres - centres.mean(0)).flatten(1).double().T + potential
    index = score.argmax(1)
    expected = labelled.train_batch_of(index, 64)
    assert torch.equal(pairs.x1, expected.x)
    assert float((pairs.x1 - centres[index]).abs().max()) <= (1 / 17 + 1e-6 if dequantize == "uniform" else 0)
    assert pairs.label is None
    assert not torch.equal(pairs.x1, batch.x)


def test_what_is_looked_up_is_dequantised_as_the_streams_own_batch(labelled):
    own = labelled.train_batch_at(32)
    again = labelled.train_batch_of(own.index, 32)
    assert torch.equal(own.x, again.x)
    assert torch.equal(own.label, again.label)
    labelled.label_noise = 0.5
    noisy = labelled.train_batch_at(32)
    assert torch.equal(noisy.label, labelled.train_label[noisy.index])
    assert not torch.equal(noisy.label, own.label)


def test_points_are_drawn_alike_and_pairs_are_short(labelled):
    module = flow(labelled)
    module.fit_to(labelled, training=True)
    found = module.training_pairs(labelled, 80, seed=0)
    assert set(found) == set(module.training_pair_names) == {"cost_ratio", "chi2"}
    assert found["chi2"] < 0.05
    assert found["cost_ratio"] < 0.95
    counts = torch.zeros(80)
    for position in range(0, 32 * 100, 32):
        pairs, _ = pairs_at(module, labelled, position, seed=position)
        index, distance = nearest(labelled.model_values("train"), pairs.x1)
        counts += torch.bincount(index, minlength=80)
        assert float(distance.max()) < 0.5, "every point is one of the split"
    assert float((counts - 40).abs().max()) < 40  # 40 draws each, a deviation of 6 and what is left of chi2
    logged = pairs.diagnostics()
    assert logged["chi2"] == found["chi2"]
    assert logged["coupling_ms"] > 0


def test_given_its_label_noise_is_the_sources(labelled):
    """A bright image is what bright noise is carried to: one potential for all would give it no other."""
    module = flow(labelled, SemidiscretePairing(**SMALL, per_label=True), conditional=True, label_dropout=0.0)
    module.fit_to(labelled, training=True)
    whole = flow(labelled)
    whole.fit_to(labelled, training=True)
    noise, label, of_bright = [], [], []
    for position in range(0, 32 * 60, 32):
        pairs, batch = pairs_at(module, labelled, position, seed=position)
        index, _ = nearest(labelled.model_values("train"), pairs.x1)
        assert torch.equal(labelled.train_label[index], batch.label), "data have the label of the stream"
        assert torch.equal(pairs.label, batch.label)
        noise.append(pairs.x0.flatten(1).mean(1) * 4)
        label.append(batch.label)
        other, _ = pairs_at(whole, labelled, position, seed=position)
        index, _ = nearest(labelled.model_values("train"), other.x1)
        of_bright.append(other.x0.flatten(1).mean(1)[labelled.train_label[index] == 1] * 4)
    noise, label = torch.cat(noise), torch.cat(label)
    for number in (0, 1):
        assert scipy.stats.kstest(noise[label == number].numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(torch.cat(of_bright).numpy(), "norm").pvalue < 1e-9


def test_a_dropped_label_is_dropped_and_its_data_keep_the_class(labelled):
    module = flow(labelled, SemidiscretePairing(**SMALL, per_label=True), conditional=True)
    module.fit_to(labelled, training=True)
    batch = labelled.train_batch_at(0)
    dropped = batch.label.masked_fill(torch.arange(32) < 16, 2)
    pairs = module.pairing.pairs(module.pairing_context, batch.x, dropped, batch, rng())
    assert torch.equal(pairs.label, dropped)
    index, _ = nearest(labelled.model_values("train"), pairs.x1)
    assert torch.equal(labelled.train_label[index], batch.label)


def test_latents_are_looked_up_with_the_noise_of_their_space(labelled):
    space = LatentSpace(autoencoder(), noise_std=0.2)
    data = FlowDataModule("npz", path=labelled.path, levels=17, batch_size=32)
    torch.manual_seed(0)
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=1)
    module = FlowMatching(IMAGES, network, space=space, pairing=SemidiscretePairing(**SMALL))
    module.fit_to(data, training=True)
    pairs, _ = pairs_at(module, data, 0)
    steps = rng(5)
    noise = torch.randn(pairs.x0.shape, generator=steps)
    solved = module.pairing._solved
    expected = data.train_batch_of(solved.assign(noise, None), 0)
    assert torch.equal(pairs.x1, space.encode_batch(expected, steps))
    points = space.encode_mean(
        FlowDataModule("npz", path=data.path, levels=17, dequantize="none").model_values("train")
    )
    torch.testing.assert_close(solved.potentials[0].points, points.flatten(1))


def test_a_part_of_the_split_is_looked_up_where_only_that_is_trained_on(labelled):
    data = FlowDataModule("npz", path=labelled.path, levels=17, batch_size=32, train_size=20)
    module = flow(data)
    module.fit_to(data, training=True)
    pairs, _ = pairs_at(module, data, 0)
    index, _ = nearest(data.model_values("train"), pairs.x1)
    assert set(index.tolist()) <= set(data.train_indices.tolist())


# ---- the file -------------------------------------------------------------------------------------------


def files(cache) -> list[str]:
    return sorted(path.name for path in cache.glob("potentials/*.pt"))


def test_a_fit_is_made_once_and_shared(labelled, cache, monkeypatch):
    first = flow(labelled)
    first.fit_to(labelled, training=True)
    assert first.preparation.flops == first.pairing._solved.cost.flops > 300 * 256 * 80 * 16 * 2
    assert first.preparation.seconds > 0
    monkeypatch.setattr(SemidiscretePairing, "_dual", lambda *_: pytest.fail("a fit was prepared"))
    second = flow(labelled)
    second.seed = 7  # of the run, not of the fit
    second.fit_to(labelled, training=True)
    assert second.preparation == first.preparation
    assert torch.equal(*(m.pairing._solved.potentials[0].potential for m in (first, second)))
    assert len(files(cache)) == 1


@pytest.mark.parametrize(
    "change", [{"steps": 301}, {"seed": 1}, {"batch": 128}, {"chi2": 0.5}, {"ema": 0.9}, {"step_size": 0.05}]
)
def test_other_settings_are_another_file(labelled, cache, change):
    for options in (SMALL, {**SMALL, **change}):
        flow(labelled, SemidiscretePairing(**options)).fit_to(labelled, training=True)
    assert len(files(cache)) == 2


def test_other_data_are_another_file_and_a_damaged_one_is_refused(labelled, cache):
    flow(labelled).fit_to(labelled, training=True)
    half = FlowDataModule("npz", path=labelled.path, levels=17, batch_size=32, train_size=40)
    flow(half).fit_to(half, training=True)
    assert len(files(cache)) == 2
    for name in files(cache):
        (cache / "potentials" / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the semidiscrete potentials .* delete the file"):
        flow(labelled).fit_to(labelled, training=True)


def test_a_killed_fit_goes_on(labelled, cache, monkeypatch):
    whole = flow(labelled)
    whole.fit_to(labelled, training=True)
    for name in files(cache):
        (cache / "potentials" / name).unlink()
    monkeypatch.setattr(potential_fit, "SAVE_SECONDS", 0.0)
    step = SemidiscreteDual.step

    def dying(self):
        if self.steps == 120:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(SemidiscreteDual, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            flow(labelled).fit_to(labelled, training=True)
    assert [name for name in files(cache) if ".part" in name]
    taken: list[int] = []
    monkeypatch.setattr(SemidiscreteDual, "step", lambda self: (taken.append(self.steps), step(self)))
    again = flow(labelled)
    again.fit_to(labelled, training=True)
    assert taken[0] == 120
    assert torch.equal(*(m.pairing._solved.potentials[0].potential for m in (whole, again)))
    assert again.preparation.flops == whole.preparation.flops
    assert not [name for name in files(cache) if ".part" in name]


def test_a_fit_ends_at_its_target_or_warns(labelled):
    module = flow(labelled, SemidiscretePairing(steps=1000, batch=512, chi2=0.3))
    module.fit_to(labelled, training=True)
    assert module.pairing._solved.chi2 <= 0.3
    steps = module.preparation.flops / (2 * 512 * 80 * 16)
    assert steps < 999
    with pytest.warns(UserWarning, match=r"has chi2 .* after 1 steps, above 0.001: some points are drawn more"):
        flow(labelled, SemidiscretePairing(steps=1, chi2=0.001)).fit_to(labelled, training=True)


# ---- inside a flow --------------------------------------------------------------------------------------


def test_a_flow_trains_with_it(labelled, tmp_path):
    module = flow(labelled)
    before = {name: value.clone() for name, value in module.named_parameters()}
    run = trainer(tmp_path, max_steps=3, val_check_interval=3, limit_val_batches=1)
    run.fit(module, labelled)
    assert all(not torch.equal(before[name], value) for name, value in module.named_parameters())
    assert set(module.state_dict()) == set(flow(labelled).state_dict()), "nothing of it enters a checkpoint"
    assert np.isfinite(float(run.callback_metrics["val/loss"]))


def test_a_resumed_run_equals_the_uninterrupted_one(labelled, tmp_path):
    whole = flow(labelled)
    trainer(tmp_path, max_steps=4).fit(whole, labelled)
    first = flow(labelled)
    run = trainer(tmp_path, max_steps=4, limit_train_batches=2, max_epochs=1)
    run.fit(first, labelled)
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = flow(labelled)
    trainer(tmp_path, max_steps=4).fit(second, labelled, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_held_out_batches_are_paired_inside_themselves(labelled):
    module = flow(labelled)
    module.fit_to(labelled, training=True)
    batch = next(iter(labelled.val_dataloader()))
    pairs = module.pairing.pairs(module.pairing_context, batch.x, None, batch, rng())
    assert torch.equal(pairs.x1, batch.x)
    noise = torch.randn(batch.x.shape, generator=rng())
    assert sorted(pairs.x0.flatten(1).tolist()) == sorted(noise.flatten(1).tolist())


@pytest.mark.parametrize(
    ("pairing", "options", "message"),
    [
        ({}, {"conditional": True}, "set per_label: true in SemidiscretePairing, or conditional=false"),
        ({"per_label": True}, {}, "per_label makes a potential for each class of a conditional flow"),
    ],
)
def test_labels_and_potentials_belong_together(labelled, pairing, options, message):
    module = flow(labelled, SemidiscretePairing(**SMALL, **pairing), **options)
    with pytest.raises(ValueError, match=message):
        module.check_training(labelled)
    with pytest.raises(ValueError, match=message):
        module.fit_to(labelled, training=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": VonMisesFisherSource(3.0)}, "looks up other data points than those that VonMisesFisherSource"),
        ({"conditioner": InpaintingConditioner()}, "than the loader's data, which a condition was made from"),
        ({"solver": EulerMaruyama(num_steps=4, source_std=1.0)}, "needs a Gaussian source of its source_std and indep"),
    ],
)
def test_what_it_cannot_stand_beside_is_refused(labelled, options, message):
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2)
    if "conditioner" in options:
        network = partial(network, condition_channels=2)  # the masked image and its mask
    with pytest.raises(ValueError, match=message):
        FlowMatching(labelled.spec, network, pairing=SemidiscretePairing(), **options)


def test_mirrored_images_and_other_loaders_are_refused(labelled):
    module = flow(labelled)
    labelled.random_flip = True
    with pytest.raises(ValueError, match=r"data\.random_flip mirrors them afterwards"):
        module.check_training(labelled)
    with pytest.raises(ValueError, match="looks points of a FlowDataModule up, got NoneType"):
        module.pairing.setup(module.pairing_context, None)
