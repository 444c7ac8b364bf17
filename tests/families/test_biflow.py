"""BiFlow: which states are compared with which, what reaches the teacher, what is learned of a known inverse."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowbench.data import Batch, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.families import BiFlow, Condition, DecoderDenoiser, GaussianNoise, TARFlow
from flowbench.training import load_checkpoint
from flowbench.training.count import forward_flops
from flowbench.training.preparation import Preparation
from tests.closeness import assert_near, magnitude
from tests.ranks import run_ranks

from ..contract.builders import IMAGES, POINTS, batch_of, build, perturb
from .teachers import gaussian_teacher

LABELLED = replace(POINTS, num_classes=3)
UNIT = {"width": 16, "head_dim": 8}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class KnownStates(nn.Module):
    """A student whose states are affine functions of the noise, one layer for each, shape (B, N, D) flattened."""

    def __init__(self, num_states: int, dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dims, dims).double() for _ in range(num_states))

    def forward(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        z = x_BND.flatten(1).double()
        return torch.stack([layer(z).view(x_BND.shape) for layer in self.layers])


class IdentityStates(nn.Module):
    """Every state is the noise: the inverse of a flow that moves nothing."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.num_states = num_states
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        return x_BND.expand(self.num_states, *x_BND.shape) + 0 * self.unused


def affine_teacher(scales: list[float], **options) -> TARFlow:
    """Blocks that multiply each number by a constant: state i is the product of the first i scales times the points.

    The outputs of a zero-initialised transformer are its output layer's bias, -ln of the factor as the raw scale.
    """
    flow = TARFlow(POINTS, layers=[1] * len(scales), start="learned", **UNIT, **options).eval()
    with torch.no_grad():
        for block, scale in zip(flow.flow.blocks, scales, strict=True):
            block.network.out.bias[1] = -torch.tensor(scale).log()
    return flow


def student(teacher: TARFlow, **options) -> BiFlow:
    torch.manual_seed(0)
    flow = BiFlow(teacher.spec, teacher=teacher, depth=1, **UNIT, **options)
    perturb(flow)
    return flow


# ---- which state is compared with which ---------------------------------------------------------------


def test_states_are_those_of_the_teacher_from_the_noise_to_the_data():
    """An off-by-one in the numbering of blocks gives another power of the factors."""
    flow, x = student(affine_teacher([2.0, 3.0, 5.0])), torch.randn(4, 2, generator=rng())
    noise, states = flow._states(x, Condition(), rng())
    assert_near(noise, 30 * x)
    assert len(states) == 3
    for state, factor in zip(states, (6, 2, 1), strict=True):
        assert_near(state, factor * x)
    assert flow._names == ["state2", "state1", "end"]


def test_a_student_that_denoises_ends_at_the_clean_points_one_block_later():
    teacher = affine_teacher([2.0, 3.0], augmentation=GaussianNoise(0.5))
    flow, x = student(teacher), torch.randn(4, 2, generator=rng())
    noise, states = flow._states(x, Condition(), rng(7))
    noisy = x + 0.5 * torch.randn(4, 2, generator=rng(7))
    assert_near(noise, 6 * noisy)
    for state, expected in zip(states, (2 * noisy, noisy, x), strict=True):
        assert_near(state, expected)
    assert flow._names == ["state1", "state0", "end"]
    assert len(flow.network.heads) == 2
    kept = student(teacher, denoise=False)
    assert kept._names == ["state1", "end"]
    assert_near(kept._states(x, Condition(), rng(7))[1][-1], noisy)


@pytest.mark.parametrize("alignment", ["heads", "none"])
def test_every_loss_of_the_identity_is_zero(alignment):
    teacher = TARFlow(IMAGES, layers=[1, 1, 1], patch_size=2, **UNIT).eval()  # not yet trained: it moves nothing
    flow = student(teacher, alignment=alignment)
    flow.network = IdentityStates(len(flow._names))
    loss = flow.training_loss(batch_of(IMAGES), rng())
    assert loss.total.item() == 0
    assert set(loss.metrics) == ({"state2", "state1", "end"} if alignment == "heads" else {"end"})
    assert all(value == 0 for value in loss.metrics.values())


def test_the_loss_is_the_sum_of_errors_over_the_mean_squares_of_the_data():
    flow = student(affine_teacher([2.0, 3.0]))
    flow.seed = 4
    data = FlowDataModule("eight_gaussians", batch_size=16)
    flow.fit_to(data, training=True)
    points = flow.fit_points(data)
    mean_square = points.double().square().mean()
    assert_near(flow.mean_squares, torch.stack([4 * mean_square, mean_square]).float())
    x = torch.randn(5, 2, generator=rng())
    found = flow.network(flow.layout.tokens(6 * x)).squeeze(-1)
    by_hand = [((found[i] - factor * x).square().mean() / (factor**2 * mean_square)) for i, factor in ((0, 2), (1, 1))]
    loss = flow.loss(x, Condition(), Batch(x), rng())
    assert_near(loss.total, sum(by_hand).float())
    flow.mean_squares.zero_()
    flow.fit_to(data, training=True)
    assert bool((flow.mean_squares == 0).all()), "what is fitted already stays"


def test_the_mean_squares_are_those_under_the_labels_of_the_data():
    data = FlowDataModule("eight_gaussians", batch_size=16, train_size=96)
    teacher = build("tarflow", data.spec, conditional=True, seed=3).eval()
    perturb(teacher, std=0.3)  # labels move the states
    flow = student(teacher, conditional=True)
    flow.fit_to(data, training=True)
    label = data.split("train").label[data.train_indices]
    with torch.no_grad():
        states = teacher.encoding_states(flow.fit_points(data), Condition(label))[:-1].flip(0)
        null = teacher.encoding_states(flow.fit_points(data), Condition(torch.full_like(label, 8)))[:-1].flip(0)
    assert_near(flow.mean_squares, states.square().mean((1, 2)))
    assert not torch.allclose(null.square().mean((1, 2)), flow.mean_squares, rtol=1e-3)


def test_the_pass_for_the_mean_squares_is_made_once_and_every_training_is_charged(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    data = FlowDataModule("eight_gaussians", batch_size=16, train_size=96)
    teacher = build("tarflow", data.spec, conditional=True, seed=3).eval()
    perturb(teacher, std=0.3)
    first, second = (student(teacher, conditional=True) for _ in range(2))
    first.fit_to(data, training=False)
    assert first.preparation == Preparation()
    first.fit_to(data, training=True)
    one = forward_flops(lambda: teacher.encoding_states(torch.zeros(1, 2), Condition(torch.tensor([0]))))
    assert first.preparation.flops == 96 * one > 0
    assert first.preparation.seconds > 0
    with monkeypatch.context() as patch:
        patch.setattr(TARFlow, "encoding_states", lambda *_: pytest.fail("the teacher ran again"))
        second.fit_to(data, training=True)
    assert second.preparation == first.preparation
    assert torch.equal(second.mean_squares, first.mean_squares)
    assert len(list(tmp_path.glob("states/*.pt"))) == 1


@pytest.mark.parametrize("change", ["seed", "teacher", "size", "labels", "end"])
def test_other_mean_squares_are_another_file(change, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    size = {"batch_size": 16, "train_size": 96}
    data = FlowDataModule("eight_gaussians", **size)
    teacher = build("tarflow", data.spec, conditional=True, seed=3).eval()
    student(teacher, conditional=True).fit_to(data, training=True)
    if change == "size":
        data = FlowDataModule("eight_gaussians", **{**size, "train_size": 97})
    if change == "labels":
        data = FlowDataModule("eight_gaussians", label_noise=0.5, **size)
    if change == "teacher":
        teacher = copy.deepcopy(teacher)
        perturb(teacher, std=0.3)
    other = student(teacher, conditional=True, alignment="none" if change == "end" else "heads")
    other.seed = 1 if change == "seed" else 0
    other.fit_to(data, training=True)
    assert len(list(tmp_path.glob("states/*.pt"))) == 2


# ---- what is learned where the answer is known --------------------------------------------------------


def fitted_student(teacher: TARFlow, x: Tensor, steps: int = 60) -> tuple[BiFlow, float]:
    """A student of affine layers, fitted to one large batch, and the mean squared error of its end."""
    flow = student(teacher)
    flow.network = KnownStates(len(flow._names), 2)
    optimizer = torch.optim.LBFGS(flow.network.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = flow.loss(x, Condition(), Batch(x), rng()).total
        loss.backward()
        return loss

    optimizer.step(closure)
    return flow, float(flow.loss(x, Condition(), Batch(x), rng()).metrics["end"])


def test_the_inverse_of_an_affine_block_is_learned_by_a_linear_student():
    x = torch.randn(512, 2, generator=rng())
    flow, error = fitted_student(affine_teacher([2.5]), x)
    assert error < 1e-6
    again = flow.flow_sample(flow.flow_encode(x, Condition()), Condition(), SamplerOverride()).x
    torch.testing.assert_close(again.float(), x, atol=5e-3, rtol=0)


def test_the_last_block_learns_the_mean_of_the_clean_point_given_the_noisy_one():
    """Of data N(0, s^2) under noise sigma that is s^2 / (s^2 + sigma^2) y, what Tweedie's formula gives."""
    s, sigma, factor = 1.5, 0.8, 2.0
    x = s * torch.randn(20_000, 2, generator=rng(3))
    flow, _ = fitted_student(affine_teacher([factor], augmentation=GaussianNoise(sigma)), x)
    at_the_data, denoised = (layer.weight.detach() * factor for layer in flow.network.layers)
    torch.testing.assert_close(at_the_data, torch.eye(2).double(), atol=1e-3, rtol=0)
    shrinkage = s**2 / (s**2 + sigma**2)  # standard error of a regression on 20,000 points: 0.004
    torch.testing.assert_close(denoised, shrinkage * torch.eye(2).double(), atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_student_comes_closer_to_its_teachers_inverse():
    teacher = build("tarflow", POINTS).eval()
    flow = BiFlow(POINTS, teacher=teacher, depth=1, width=32, head_dim=8)
    x, index = torch.randn(256, 2, generator=rng()), torch.arange(256)
    noise = flow.draw_noise(index, 0)
    exact = teacher.sample(teacher.draw_noise(index, 0)).x

    def error() -> float:
        return float((flow.sample(noise).x - exact).square().mean())

    before, optimizer = error(), torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        flow.loss(x, Condition(), Batch(x), rng()).total.backward()
        optimizer.step()
    assert error() < 0.1 * before


# ---- the teacher --------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_outside_of_parameters_and_checkpoints():
    flow = build("biflow_noisy", IMAGES)
    before = copy.deepcopy(flow.teacher.state_dict())
    flow.train()
    optimizer = torch.optim.SGD(flow.parameters(), 0.1)
    flow.training_loss(batch_of(IMAGES, 8), rng()).total.backward()
    optimizer.step()
    assert not flow.teacher.training
    assert all(not p.requires_grad and p.grad is None for p in flow.teacher.parameters())
    for name, value in flow.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    inside = {id(p) for p in flow.parameters()}
    assert not inside & {id(p) for p in flow.teacher.parameters()}
    assert {name.split(".")[0] for name in flow.state_dict()} == {"network", "mean_squares"}


def test_every_block_and_head_moves():
    flow = build("biflow_noisy", IMAGES)
    before = {name: value.clone() for name, value in flow.network.named_parameters()}
    optimizer = torch.optim.SGD(flow.parameters(), 0.1)
    flow.training_loss(batch_of(IMAGES, 16), rng()).total.backward()
    optimizer.step()
    assert {"heads.0.weight", "heads.1.weight", "out.weight", "blocks.0.qkv.weight", "blocks.2.qkv.weight"} < set(
        before
    )
    for name, value in flow.network.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_teacher_and_student_get_the_same_labels_dropped_ones_too():
    flow, seen = student(build("tarflow", LABELLED, conditional=True, seed=3), conditional=True, label_dropout=0.5), {}
    flow.teacher.flow.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(teacher=given[1]))
    flow.network.register_forward_pre_hook(lambda _, given: seen.update(student=given[1]))
    flow.training_loss(batch_of(LABELLED, 64), rng())
    assert torch.equal(seen["teacher"], seen["student"])
    dropped = (seen["student"] == 3).float().mean()
    assert 0.3 < dropped < 0.7
    assert flow.check_condition(Condition(seen["student"]), 64).label.equal(seen["student"])


def test_the_student_starts_from_its_own_noise_and_from_the_teachers_source():
    flow = build("biflow", POINTS)
    index = torch.arange(4)
    assert repr(flow.source) == repr(flow.teacher.source)
    assert torch.equal(flow.draw_noise(index, 5), flow.teacher.draw_noise(index, 5))


def test_encoding_is_the_teachers_and_its_gradient_is_left_to_the_caller():
    flow, x = build("biflow", POINTS), batch_of(POINTS).x
    assert torch.equal(flow.encode(x), flow.teacher.encode(x))


def test_latents_are_the_teachers_without_its_noise():
    flow = build("biflow_latent", IMAGES)
    assert flow.space.autoencoder is flow.teacher.space.autoencoder
    assert flow.space.noise_std == 0
    noisy = build("starflow_score_matching", IMAGES).eval()
    denoising = BiFlow(IMAGES, teacher=noisy, depth=1, **UNIT)
    assert denoising.denoises
    decoded = build("starflow_decoder", IMAGES).eval()
    assert isinstance(decoded.denoiser, DecoderDenoiser)
    assert not BiFlow(IMAGES, teacher=decoded, depth=1, **UNIT).denoises


BAD = {
    "none": (lambda: {"teacher": None}, r"^BiFlow learns from a trained flow and got none: add `requires: \{teacher"),
    "a field": (
        lambda: {"teacher": gaussian_teacher(POINTS)},
        "^BiFlow learns the states between the blocks of an autoregressive flow, and a FlowMatching has none: name a",
    ),
    "other data": (
        lambda: {"teacher": build("tarflow", replace(POINTS, name="plane"))},
        "the teacher was trained on plane .* the student's data are points",
    ),
    "labels": (
        lambda: {"teacher": build("tarflow", POINTS, conditional=True)},
        "the teacher has labels of as many classes as 3, the student None: they must agree",
    ),
    "no null label": (
        lambda: {"teacher": build("tarflow", POINTS, conditional=True, label_dropout=0.0), "conditional": True},
        r"nothing to teach under the null label, but the student drops 0\.1 of them: set label_dropout=0",
    ),
    "no noise": (lambda: {"denoise": True}, "denoise=true, but the teacher was trained on points without Gaussian"),
    "alignment": (lambda: {"alignment": "tokens"}, "alignment must be 'heads' or 'none', got 'tokens'"),
    "guidance": (lambda: {"guidance": 2.0}, "guidance of scale 2 needs labels: set conditional=true"),
}


@pytest.mark.parametrize("fault", list(BAD))
def test_what_cannot_be_learned_is_refused_in_one_line(fault):
    make, message = BAD[fault]
    with pytest.raises(ValueError, match=message) as caught:
        BiFlow(POINTS, **{"teacher": build("tarflow", POINTS), "depth": 1, **UNIT, **make()})
    assert "\n" not in str(caught.value)


def test_a_decoder_that_expects_noise_refuses_a_student_that_removes_it():
    with pytest.raises(ValueError, match="the teacher's decoder expects noisy latents: leave it out"):
        BiFlow(IMAGES, teacher=build("starflow_decoder", IMAGES), denoise=True, depth=1, **UNIT)


def test_a_checkpoint_belongs_to_its_teacher(tmp_path):
    flow, other = build("biflow", POINTS), build("biflow", POINTS)
    checkpoint = {"state_dict": flow.state_dict()}
    flow.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    load_checkpoint(other, tmp_path / "a.ckpt")
    stranger = BiFlow(POINTS, teacher=build("tarflow", POINTS, seed=8), depth=1, **UNIT)
    with pytest.raises(ValueError, match="checkpoint's teacher is"):
        load_checkpoint(stranger, tmp_path / "a.ckpt")


# ---- samples, paths, processes ------------------------------------------------------------------------


def test_a_sample_is_one_pass_and_a_guided_one_two():
    flow = build("biflow", POINTS, conditional=True).eval()
    noise, label = flow.draw_noise(torch.arange(3), 0), torch.tensor([0, 1, 2])
    labelled, null = flow.sample(noise, label), flow.sample(noise)
    guided = flow.sample(noise, label, guidance=2.5)
    assert (labelled.network_evaluations, null.network_evaluations, guided.network_evaluations) == (1, 1, 2)
    assert_near(guided.x, null.x + 2.5 * (labelled.x - null.x))
    assert_near(flow.sample(noise, label, guidance=0.0).x, null.x)


def test_a_path_shows_what_the_heads_read():
    flow = build("biflow_noisy", IMAGES).eval()
    noise = flow.draw_noise(torch.arange(3), 0)
    path = flow.trajectory(noise)
    assert path.states.shape == (4, 3, *IMAGES.shape)  # noise, y_1, y_0, the clean image
    read = flow.network(flow.layout.tokens(noise))
    assert torch.equal(path.states[2], flow.layout.points(read[1]))
    assert len(build("biflow_end", IMAGES).trajectory(noise).states) == 2


def _gradients_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    flow = build("biflow", IMAGES)
    wrapped = nn.parallel.DistributedDataParallel(_Loss(flow))
    wrapped(batch_of(IMAGES, 16).x[8 * rank : 8 * rank + 8]).backward()
    torch.save({name: p.grad for name, p in flow.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class _Loss(nn.Module):
    def __init__(self, flow: BiFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.loss(x, Condition(), Batch(x), rng()).total


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    run_ranks(_gradients_of_two, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    flow, x = build("biflow", IMAGES), batch_of(IMAGES, 16).x
    flow.loss(x, Condition(), Batch(x), rng()).total.backward()
    largest = magnitude(parameter.grad for parameter in flow.parameters())
    for name, parameter in flow.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert_near(first[name], parameter.grad, scale=1e-3 * largest, label=name)
