"""ARFlow: training on sequences, a sampler that sees its earlier steps, and what it then cannot have."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowbench.data import Batch, FlowDataModule
from flowbench.families import ARFlow, BatchPairing, Condition, FlowMatching, InpaintingConditioner
from flowbench.families.arflow import AscendingTimes
from flowbench.families.family_contract import Case, check_family, perturb
from flowbench.flows import (
    ClassifierFreeGuidance,
    CosinePath,
    DormandPrince,
    EDMGrid,
    Euler,
    Heun,
    Midpoint,
    RungeKutta4,
    UniformTimes,
)
from flowbench.networks import DiT, HybridDiT
from tests.closeness import assert_near, magnitude

from ..contract.builders import IMAGES
from ..ranks import run_ranks

LABEL = torch.tensor([2, 0, 1])


def build(across="linear", cls=ARFlow, **options) -> FlowMatching:
    torch.manual_seed(0)
    network = partial(HybridDiT, width=16, depth=2, num_heads=2, across=across)
    module = cls(IMAGES, network, conditional=True, **options)
    perturb(module, std=0.2)
    return module.double().eval()


def noise(flow: FlowMatching, num: int = 3) -> torch.Tensor:
    return flow.draw_noise(torch.arange(num), 0).double()


def sequences(num: int = 4, size: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(num * size, 1, 4, 4, generator=rng, dtype=torch.float64) * 1.8 - 0.9
    label = torch.arange(num).repeat_interleave(size) % 3
    return Batch(x, label=label, index=torch.arange(num * size), group_size=size)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watched(HybridDiT):
    """Keeps what it is called with."""

    def forward(self, x, t, label=None, condition=None, *, group_size=1):
        self.seen = (x, t, label, group_size)
        return super().forward(x, t, label, condition, group_size=group_size)


# ---- the contract -------------------------------------------------------------------------------------


def small() -> ARFlow:
    torch.manual_seed(0)
    flow = ARFlow(IMAGES, partial(HybridDiT, width=16, depth=1, num_heads=2), conditional=True, solver=Euler(4))
    perturb(flow)
    return flow


def test_with_its_state_it_keeps_the_contract_but_for_what_it_refuses():
    outcomes = {outcome.name: outcome for outcome in check_family(Case(small, IMAGES, conditional=True))}
    refused = {name for name, outcome in outcomes.items() if outcome.status == "inapplicable"}
    assert refused == {"density", "jacobian", "mass", "inverse", "precision"}
    assert "set state: drop" in outcomes["inverse"].reason
    assert [outcome for outcome in outcomes.values() if outcome.status == "failed"] == []


# ---- training -----------------------------------------------------------------------------------------


def test_sequences_have_rising_times_and_one_label_that_is_dropped_as_a_whole():
    flow = ARFlow(IMAGES, partial(Watched, width=16, depth=1), conditional=True, label_dropout=0.5).double()
    batch, dropped = sequences(40), 0
    flow.training_loss(batch, rng())
    _, t, label, size = flow.network.seen
    assert size == 3
    assert bool((t.view(-1, 3).diff(dim=1) >= 0).all())
    assert bool((t[::3] < t[2::3]).all())
    groups = label.view(-1, 3)
    assert bool((groups == groups[:, :1]).all())
    dropped = int((groups[:, 0] == IMAGES.num_classes).sum())
    assert 8 <= dropped <= 32  # 20 of 40, standard deviation 3.2
    kept = groups[:, 0] != IMAGES.num_classes
    assert torch.equal(groups[kept, 0], batch.label.view(-1, 3)[kept, 0])


def test_times_of_all_images_are_those_of_the_distribution():
    drawn = AscendingTimes(UniformTimes(), 5).sample(1000, rng())
    assert torch.equal(drawn.sort().values, UniformTimes().sample(1000, rng()).sort().values)


def test_images_alone_are_trained_as_by_flow_matching():
    flow, plain = build(), build(cls=FlowMatching)
    alone = Batch(sequences().x, label=sequences().label)
    assert torch.equal(flow.training_loss(alone, rng()).total, plain.training_loss(alone, rng()).total)
    together = flow.training_loss(sequences(), rng()).total
    assert not torch.equal(together, flow.training_loss(alone, rng()).total)


def test_without_attention_across_images_sequences_are_images():
    flow = build("none", state="drop", label_dropout=0.0)
    batch, t = sequences(), AscendingTimes(UniformTimes(), 3).sample(12, rng(5)).double()
    found = flow.network(batch.x, t, batch.label, group_size=3)
    torch.testing.assert_close(found, flow.network(batch.x, t, batch.label))


# ---- sampling -----------------------------------------------------------------------------------------


def by_full_forward(flow: ARFlow, x: torch.Tensor, steps: int, scale: float = 1.0, start: int = 0) -> torch.Tensor:
    """Euler steps whose velocity comes from one forward of the whole path so far: no memory, only sequences.

    With `start` the first of the steps that are remembered at every step is the last but so many.
    """
    states, times = [], []
    for step in range(steps):
        states.append(x)
        times.append(torch.full((len(x),), step / steps, dtype=torch.float64))
        first = max(0, step - start) if start else 0
        size = step + 1 - first
        sequence = torch.stack(states[first:], 1).flatten(0, 1)
        t = torch.stack(times[first:], 1).flatten()

        def velocity(label, sequence=sequence, t=t, size=size):
            return flow.network(sequence, t, label.repeat_interleave(size), group_size=size)[size - 1 :: size]

        null = velocity(torch.full_like(LABEL, IMAGES.num_classes))
        x = x + (null + scale * (velocity(LABEL) - null)) / steps
    return x


@pytest.mark.parametrize("across", ["linear", "full"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_a_step_sees_the_whole_path_before_it_and_each_branch_its_own(across, scale):
    flow = build(across, solver=Euler(5), guidance=ClassifierFreeGuidance(scale))
    x = noise(flow)
    found = flow.sample(x, LABEL)
    torch.testing.assert_close(found.x, by_full_forward(flow, x, 5, scale), rtol=1e-9, atol=1e-9)
    assert found.network_evaluations == (5 if scale == 1 else 10)


@torch.no_grad()
def test_a_window_is_the_last_steps_of_the_path():
    """With one layer what is remembered of an image does not depend on the images before it."""
    torch.manual_seed(0)
    network = partial(HybridDiT, width=16, depth=1, num_heads=2)
    flow = ARFlow(IMAGES, network, conditional=True, solver=Euler(6), window=2)
    perturb(flow, std=0.2)
    flow = flow.double().eval()
    x = noise(flow)
    torch.testing.assert_close(flow.sample(x, LABEL).x, by_full_forward(flow, x, 6, start=2), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(flow.sample(x, LABEL).x, by_full_forward(flow, x, 6))
    assert flow.describe().sampler.endswith("+state[window=2]")


@pytest.mark.parametrize("solver", [Midpoint(4), Heun(4), RungeKutta4(4), Midpoint(4, grid=EDMGrid())], ids=repr)
@torch.no_grad()
def test_stages_inside_of_a_step_are_not_remembered(solver):
    flow = build("full", solver=solver)
    field = flow.recurrent_field(Condition(LABEL), ClassifierFreeGuidance(), keeps_path=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    last = solver.solve(field, noise(flow), times).states[-1]
    (branch,) = field.network._branches.values()
    assert [len(past) for past in branch.memory] == [4, 4]
    assert [t for t, _, _ in field.path] == [step.start for step in solver.steps(times)]
    torch.testing.assert_close(flow.sample(noise(flow), LABEL).x, last)


@torch.no_grad()
def test_nothing_leaks_from_one_generation_into_the_next():
    flow = build(solver=Euler(4))
    x = noise(flow)
    first = flow.sample(x, LABEL).x
    flow.sample(2 * x + 1, LABEL.flip(0))
    with pytest.raises(ValueError, match="expected 3 labels"):
        flow.sample(x, LABEL[:2])
    assert torch.equal(flow.sample(x, LABEL).x, first)


@torch.no_grad()
def test_a_dropped_state_is_flow_matching_and_a_kept_one_is_not():
    kept, dropped, plain = build(), build(state="drop"), build(cls=FlowMatching)
    x = noise(kept)
    assert torch.equal(dropped.sample(x, LABEL).x, plain.sample(x, LABEL).x)
    assert torch.equal(dropped.log_prob(x, LABEL), plain.log_prob(x, LABEL))
    assert not torch.allclose(kept.sample(x, LABEL).x, plain.sample(x, LABEL).x)
    assert kept.sample(x, LABEL).network_evaluations == plain.sample(x, LABEL).network_evaluations
    assert kept.describe().sampler == plain.describe().sampler + "+state"


@torch.no_grad()
def test_guidance_in_the_middle_of_the_path_leaves_its_branch_without_the_steps_before():
    flow = build("full", solver=Euler(8), guidance=ClassifierFreeGuidance(2.0, interval=(0.25, 0.5)))
    field = flow.recurrent_field(Condition(LABEL), flow.guidance)
    flow.solver.solve(field, noise(flow), torch.tensor([0.0, 1.0]))
    lengths = {null: len(branch.memory[0]) for null, branch in field.network._branches.items()}
    assert lengths == {False: 8, True: 3}  # steps at 0.25, 0.375 and 0.5


@torch.no_grad()
def test_the_path_is_that_of_the_sampler():
    flow = build(solver=Euler(6))
    found = flow.trajectory(noise(flow), LABEL)
    assert torch.equal(found.states[-1], flow.sample(noise(flow), LABEL).x)
    torch.testing.assert_close(found.times, torch.linspace(0, 1, 7, dtype=torch.float64))
    torch.testing.assert_close(found.states.diff(dim=0) * 6, found.velocities[:-1])
    assert found.velocities.shape == found.states.shape


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_kept_state_has_neither_density_nor_inverse():
    flow = build()
    for call in (flow.log_prob, flow.encode, flow.sample_with_log_prob):
        with pytest.raises(ValueError, match=r"see their earlier steps have no .*: set state: drop"):
            call(noise(flow), LABEL)
    with pytest.raises(ValueError, match="have no density"):
        flow.check_density()
    assert flow.solved_density() is None
    assert (flow.density, flow.describe().likelihood, flow.describe().has_velocities) == ("none", "none", True)
    dropped = build(state="drop")
    assert (dropped.density, dropped.describe().likelihood, dropped.describe().has_velocities) == ("ode", "ode", True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(build, state="reset"), "state must be keep or drop, got 'reset'"),
        (partial(build, "none"), "state: keep needs a network that attends across images"),
        (partial(build, window=3, state="drop"), "window=3 belongs to state: keep"),
        (partial(build, window=0), "window must be a whole number in .*, got 0"),
        (partial(build, solver=DormandPrince()), "needs steps of a fixed number, got DormandPrince"),
        (partial(build, sampling_path=CosinePath()), "along the path of the training, got CosinePath"),
        (partial(build, pairing=BatchPairing(None)), "pairing does not keep images in sequences"),
        (partial(build, conditioner=InpaintingConditioner("left")), "conditioner does not keep images in sequences"),
        (lambda: ARFlow(IMAGES, DiT), "ARFlow needs a network of sequences, got DiT: take HybridDiT"),
        (
            lambda: build().check_training(FlowDataModule("digits")),
            r"attention across images \(linear\) needs sequences, and data.group_size is 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_images_alone_are_trained_without_attention_across():
    build("none", state="drop").check_training(FlowDataModule("digits"))


# ---- two processes ------------------------------------------------------------------------------------


class Training(nn.Module):
    """The loss as the output of ``forward``, which is where data-parallel training listens."""

    def __init__(self, module: ARFlow) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, seed: int) -> torch.Tensor:
        return self.module.training_loss(batch, rng(seed)).total


def half(rank: int) -> Batch:
    whole = sequences()
    rows = slice(6 * rank, 6 * rank + 6)
    return Batch(whole.x[rows], label=whole.label[rows], index=whole.index[rows], group_size=3)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    training = Training(build().train())
    parallel = DistributedDataParallel(training)  # kept: without it nothing gathers the gradients
    parallel(half(rank), rank).backward()
    torch.save({key: p.grad for key, p in training.module.named_parameters()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_mean_of_their_gradients(tmp_path):
    run_ranks(work, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    module = build().train()
    (sum(module.training_loss(half(rank), rng(rank)).total for rank in (0, 1)) / 2).backward()
    largest = magnitude(parameter.grad for parameter in module.parameters())
    for key, parameter in module.named_parameters():
        assert_near(found[0][key], parameter.grad, scale=1e-3 * largest, label=key)
        assert torch.equal(found[0][key], found[1][key]), key
        assert bool(parameter.grad.abs().max() > 0), key
