"""Two processes with half a batch each have the loss and the gradients of one with the whole."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowbench.data import Batch
from flowbench.families import Condition, DivergenceHead
from flowbench.flows import (
    ConsistencyTraining,
    Lagrangian,
    MeanFlow,
    Progressive,
    Shortcut,
    SolutionConsistency,
)
from flowbench.training import SGD, SWAN, AdamW, SinkGD, TrainingConfig
from tests.closeness import assert_near, magnitude

from ..contract.builders import IMAGES, build
from ..ranks import run_ranks

NAMES = ["tarflow", "tarflow_score_matching"]
# A large epsilon: where the exact gradient is zero, a key's bias, AdamW would make steps of what rounding leaves.
OPTIMIZERS = [AdamW(eps=1e-4), SinkGD(eps=1e-4), SWAN(eps=1e-4), SGD(eps=1e-4)]


class Training(nn.Module):
    """The loss as the output of ``forward``, which is where data-parallel training listens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.module.loss(x, Condition(label), Batch(x), torch.Generator()).total


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight noisy points with labels, the null label among them."""
    x = torch.randn(8, *IMAGES.shape, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(8) % (IMAGES.num_classes + 1)


def work(rank: int, folder: str) -> None:
    """One of two processes: gradients of each model over two accumulated half batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, label = (t.chunk(2)[rank] for t in points())
    for name in NAMES:
        training = Training(build(name, IMAGES, conditional=True))
        parallel = DistributedDataParallel(training)
        losses = []
        with parallel.no_sync():
            losses.append(parallel(x[:2], label[:2]) / 2)
            losses[-1].backward()
        losses.append(parallel(x[2:], label[2:]) / 2)
        losses[-1].backward()
        found = {key: parameter.grad for key, parameter in training.module.named_parameters()}
        torch.save({"loss": sum(losses).detach(), "gradients": found}, Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def step(rank: int, folder: str) -> None:
    """One of two processes: weights after two steps of each optimiser on half batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, label = (t.chunk(2)[rank] for t in points())
    for optimizer in OPTIMIZERS:
        training = Training(build("tarflow", IMAGES, conditional=True, training=TrainingConfig(optimizer)))
        stepped(training.module, DistributedDataParallel(training), x, label)
        torch.save(training.module.state_dict(), Path(folder) / f"{type(optimizer).__name__}-{rank}.pt")
    dist.destroy_process_group()


def stepped(module: nn.Module, training: nn.Module, x: torch.Tensor, label: torch.Tensor) -> None:
    optimizer = module.optimizer_config.build(module)
    for _ in range(2):
        optimizer.zero_grad()
        training(x, label).backward()
        optimizer.step()


def test_two_processes_step_as_one(tmp_path):
    """Rules for matrices see the gradient of the whole batch, not that of a process."""
    run_ranks(step, str(tmp_path))
    x, label = points()
    for optimizer in OPTIMIZERS:
        module = build("tarflow", IMAGES, conditional=True, training=TrainingConfig(optimizer))
        stepped(module, Training(module), x, label)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{type(optimizer).__name__}-{rank}.pt", weights_only=True)
            for key, value in module.state_dict().items():
                torch.testing.assert_close(
                    found[key], value, atol=1e-4, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
                )


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run_ranks(work, str(tmp_path))
    for name in NAMES:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        module = build(name, IMAGES, conditional=True)
        x, label = points()
        loss = module.loss(x, Condition(label), Batch(x), torch.Generator()).total
        loss.backward()
        torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach())
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(ranks[0]["gradients"][key], parameter.grad, msg=f"{name}: {key}")
            assert torch.equal(ranks[0]["gradients"][key], ranks[1]["gradients"][key])


# ---- flow maps: some of their evaluations are differentiated forward, some have no gradient ----------------

MAPS = {
    "soflow": SolutionConsistency(),
    "progressive": Progressive(split="uniform"),
    "shortcut": Shortcut(),
    "lagrangian": Lagrangian(),
    "lagrangian_jvp": Lagrangian(derivative="jvp"),
    "meanflow": MeanFlow(),
    "improved": MeanFlow(tangent="self"),
    "meanflow_difference": MeanFlow(derivative="difference"),
    "consistency": ConsistencyTraining(),
    "head": Progressive(),  # its divergence is learned from a derivative by the states inside the step
}
HEADS = {"head": {"divergence_head": DivergenceHead(widths=[8])}}


def flow_map(name: str) -> nn.Module:
    return build("map", IMAGES, conditional=True, map_objective=MAPS[name], **HEADS.get(name, {}))


class MapTraining(nn.Module):
    """The loss of a share of the batch, whose noise is keyed by the process."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor, label: torch.Tensor, rank: int) -> torch.Tensor:
        return self.module.loss(x, Condition(label), Batch(x), torch.Generator().manual_seed(rank)).total


def map_work(rank: int, folder: str) -> None:
    """One of two processes: gradients of every objective on a half batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, label = (t.chunk(2)[rank] for t in points())
    for name in MAPS:
        training = MapTraining(flow_map(name))
        parallel = DistributedDataParallel(training)  # its hooks live as long as it does
        parallel(x, label, rank).backward()
        found = {key: parameter.grad for key, parameter in training.module.named_parameters()}
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_for_every_objective_of_flow_maps(tmp_path):
    run_ranks(map_work, str(tmp_path))
    x, label = points()
    for name in MAPS:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        training = MapTraining(flow_map(name))
        losses = [training(x.chunk(2)[rank], label.chunk(2)[rank], rank) for rank in (0, 1)]
        (sum(losses) / 2).backward()
        largest = magnitude(parameter.grad for parameter in training.module.parameters())
        for key, parameter in training.module.named_parameters():
            assert torch.equal(ranks[0][key], ranks[1][key]), f"{name}: {key}"
            assert_near(ranks[0][key], parameter.grad, scale=1e-3 * largest, label=f"{name} {key}")
