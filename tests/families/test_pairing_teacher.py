"""Pairs from a teacher's bijection: closed forms, what is encoded, and what of a teacher enters the student."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.families import Autoencoder, Condition, FlowMap, FlowMatching, GaussianNoise, TARFlow
from flowbench.families.normalized_flow_matching import NormalizedFlowMatching
from flowbench.families.pairing.teacher import TeacherPairing
from flowbench.flows import Euler, GaussianSource
from flowbench.networks import MLP, DiT
from flowbench.training.count import count_flops
from flowbench.training.preparation import Preparation
from tests.closeness import assert_near

from ..contract.builders import IMAGES, autoencoder, batch_of, build, perturb
from ..training.test_training import trainer
from .teachers import LABELLED, MEAN, PLANE, STD, gaussian_teacher

NETWORK = partial(MLP, width=16, depth=2)


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student(teacher, spec: DataSpec = PLANE, network=NETWORK, **options) -> NormalizedFlowMatching:
    torch.manual_seed(0)
    flow = NormalizedFlowMatching(spec, network, teacher=teacher, **options)
    perturb(flow)
    return flow


def pairs_of(flow, batch: Batch, label=None):
    return flow.pairing.pairs(flow.pairing_context, flow.space.encode_batch(batch, rng()), label, batch, rng(5))


def normal(num: int = 64, seed: int = 0) -> torch.Tensor:
    """Points of N(3, 0.5^2 I)."""
    return MEAN + STD * torch.randn(num, 2, generator=rng(seed))


def test_every_point_starts_where_an_affine_flow_maps_it():
    x = normal()
    pairs = pairs_of(student(gaussian_teacher()), Batch(x))
    assert_near(pairs.x0, (x - MEAN) / STD)
    assert torch.equal(pairs.x1, x)
    found = pairs.diagnostics()
    independent = (pairs.x0.roll(1, 0) - x).square().sum()
    torch.testing.assert_close(found["cost_ratio"], (pairs.x0 - x).square().sum() / independent)
    assert found["coupling_ms"] > 0


def test_the_regression_target_of_an_affine_flow_is_a_function_of_the_point():
    """x1 - x0 = mean + (std - 1) x0: what makes one Euler step exact, and what independent pairs do not have."""
    x = normal()
    pairs = pairs_of(student(gaussian_teacher()), Batch(x))
    assert_near(pairs.x1 - pairs.x0, MEAN + (STD - 1) * pairs.x0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_labels_are_those_of_the_data_or_null_where_the_teacher_knows_it_too(dropout):
    flow = student(gaussian_teacher(LABELLED, conditional=True, label_dropout=dropout), LABELLED, conditional=True)
    x, label = normal(6), torch.tensor([0, 1, 0, 1, 0, 1])
    dropped = label.masked_fill(torch.arange(6) < 2, 2)
    pairs = pairs_of(flow, Batch(x, label), dropped)
    told = (dropped if dropout else label) % 2
    assert_near(pairs.x0, (x - MEAN - told[:, None]) / STD)
    assert torch.equal(pairs.label, dropped), "the network still does without"


def tarflow(noise_std: float, **options) -> TARFlow:
    torch.manual_seed(1)
    flow = TARFlow(
        IMAGES, layers=[1, 1], width=16, head_dim=8, patch_size=2, augmentation=GaussianNoise(noise_std), **options
    )
    perturb(flow)
    return flow


def test_a_teacher_of_noisy_data_encodes_noisy_data_and_the_student_goes_to_clean_ones():
    teacher, batch = tarflow(0.3), batch_of(IMAGES)
    flow = student(teacher, IMAGES, partial(DiT, width=16, depth=1, num_heads=2, patch_size=2))
    pairs = pairs_of(flow, batch)
    noisy = batch.x + 0.3 * torch.randn(batch.x.shape, generator=rng(5))
    torch.testing.assert_close(pairs.x0, teacher.flow_encode(noisy, Condition()))
    assert torch.equal(pairs.x1, batch.x)


def test_a_latent_teacher_encodes_the_students_own_latents():
    """The student lives in the teacher's space with the teacher's noise: nothing is missing."""
    teacher = build("starflow_score_matching", IMAGES)
    flow = student(teacher, IMAGES, partial(DiT, width=16, depth=1, num_heads=2, patch_size=1))
    assert flow.space.autoencoder is teacher.space.autoencoder
    assert flow.space.noise_std == teacher.space.noise_std == pytest.approx(0.3)
    batch = batch_of(IMAGES)
    pairs = pairs_of(flow, batch)
    torch.testing.assert_close(pairs.x0, teacher.flow_encode(pairs.x1, Condition()))


def test_nothing_of_the_teacher_belongs_to_the_student(tmp_path):
    data = FlowDataModule("eight_gaussians", batch_size=16)
    torch.manual_seed(2)
    teacher = TARFlow(data.spec, layers=[1, 1], width=16, head_dim=8, start="learned")
    perturb(teacher)
    flow = student(teacher, data.spec)
    plain = FlowMatching(data.spec, NETWORK)
    assert set(flow.state_dict()) == set(plain.state_dict())
    assert {name for name, _ in flow.named_parameters()} == {name for name, _ in plain.named_parameters()}
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer(tmp_path, max_steps=3, val_check_interval=3, limit_val_batches=1).fit(flow, data)
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert all(not torch.equal(before[name], value) for name, value in flow.state_dict().items() if "weight" in name)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_cache_gives_what_encoding_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    points = normal(120).numpy()
    np.savez(tmp_path / "x.npz", train=points, val=points[:9] + 1, test=points[:9] + 2)
    data = FlowDataModule("npz", path=str(tmp_path / "x.npz"), batch_size=16)
    assert data.spec.levels is None
    teacher = gaussian_teacher(data.spec)
    found = []
    for cached in (True, False):
        flow = student(teacher, data.spec, cache_encodings=cached)
        flow.pairing.setup(flow.pairing_context, data)
        found.append(pairs_of(flow, data.train_batch_at(64)).x0)
    torch.testing.assert_close(*found)
    assert len(list(tmp_path.glob("pairs/encodings-*/*.pt"))) == 1
    with torch.no_grad():
        teacher.network.unused.fill_(1.0)
    flow = student(teacher, data.spec, cache_encodings=True)
    flow.pairing.setup(flow.pairing_context, data)
    assert len(list(tmp_path.glob("pairs/encodings-*"))) == 2, "another teacher is another folder"


def test_a_cache_is_made_before_the_budget_that_pays_its_seconds(tmp_path, monkeypatch):
    """Its operations are paid step by step: a step costs what it costs without."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    np.savez(tmp_path / "x.npz", train=normal(120).numpy(), val=normal(9).numpy(), test=normal(9).numpy())
    data = FlowDataModule("npz", path=str(tmp_path / "x.npz"), batch_size=16)
    torch.manual_seed(0)
    teacher = TARFlow(data.spec, layers=[1, 1], width=16, head_dim=8).eval()
    found, operations = [], []
    for cached in (True, True, False):
        flow = student(teacher, data.spec, cache_encodings=cached)
        flow.fit_to(data, training=True)
        found.append(flow.preparation)
        batch = data.train_batch_at(0)
        operations.append(count_flops(lambda flow=flow, batch=batch: flow.training_loss(batch, rng()).total))
    assert len(list(tmp_path.glob("pairs/encodings-*/*.pt"))) == 1
    assert found[0] == found[1]
    assert found[0].seconds > 0
    assert found[2] == Preparation()
    assert len(set(operations)) == 1
    flow = student(teacher, data.spec, cache_encodings=True)
    flow.fit_to(data, training=True)
    monkeypatch.setattr(TARFlow, "flow_encode", lambda *_: pytest.fail("encoded again"))
    flow.pairing.setup(flow.pairing_context, data)
    assert pairs_of(flow, data.train_batch_at(16)).x0.isfinite().all()


@pytest.mark.parametrize("family", [FlowMatching, FlowMap])
def test_another_solver_is_another_cache(family, tmp_path, monkeypatch):
    """A flow map encodes along its ODE, though its samples jump."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    np.savez(tmp_path / "x.npz", train=normal(40).numpy(), val=normal(9).numpy(), test=normal(9).numpy())
    data = FlowDataModule("npz", path=str(tmp_path / "x.npz"), batch_size=16)
    found = []
    for solver in (Euler(1), Euler(9)):
        torch.manual_seed(1)
        teacher = family(data.spec, partial(NETWORK, second_time=family is FlowMap), solver=solver)
        perturb(teacher)
        flow = student(teacher, data.spec, cache_encodings=True)
        flow.pairing.setup(flow.pairing_context, data)
        found.append(pairs_of(flow, data.train_batch_at(0)).x0)
    assert len(list(tmp_path.glob("pairs/encodings-*"))) == 2
    assert not torch.allclose(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dequantize": "uniform"}, "uniform dequantisation changes the samples"),
        ({"dequantize": "none", "random_flip": True}, "random_flip mirrors them"),
        ({"dequantize": "none"}, "noise or a posterior draw changes"),
    ],
)
def test_a_cache_that_would_give_something_else_is_refused(options, message, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train=images[:30], val=images[30:35], test=images[35:])
    data = FlowDataModule("npz", path=str(tmp_path / "x.npz"), batch_size=16, **options)
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2)
    flow = student(tarflow(0.3), IMAGES, network, cache_encodings=True)
    with pytest.raises(ValueError, match=message):
        flow.pairing.setup(flow.pairing_context, data)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (None, {}, "NormalizedFlowMatching learns from a trained flow and got none: add `requires"),
        (gaussian_teacher(LABELLED, conditional=True), {}, "labels of as many classes as 2, the student None"),
        (gaussian_teacher(source=GaussianSource(2.0)), {"source": GaussianSource()}, "source GaussianSource"),
        (tarflow(0.1), {}, r"the teacher has data of shape \(1, 4, 4\), the student of \(2,\)"),
    ],
)
def test_a_teacher_that_does_not_suit_is_refused(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        student(teacher, PLANE, **options)


def test_an_autoencoder_is_no_teacher():
    with pytest.raises(ValueError, match=r"learns from a flow, but requires.teacher names a Autoencoder"):
        student(autoencoder(), IMAGES)
    assert issubclass(Autoencoder, torch.nn.Module)


def test_a_teacher_in_another_latent_space_or_of_less_noise_is_refused():
    teacher = build("starflow_score_matching", IMAGES)
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=1)
    flow = student(teacher, IMAGES, network)
    flow.space.noise_std = 0.5
    with pytest.raises(ValueError, match=r"noise of 0.5, but the teacher learned only 0.3"):
        TeacherPairing(teacher).setup(flow.pairing_context, None)
    other = autoencoder()
    perturb(other, 3)
    from flowbench.families import LatentSpace

    flow = student(teacher, IMAGES, network, space=LatentSpace(other))
    with pytest.raises(ValueError, match="lives in the latent space of autoencoder"):
        flow.pairing.setup(flow.pairing_context, None)
