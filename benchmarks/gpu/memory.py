"""Memory of a long run: allocated bytes must not grow with the steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.setting import Line, Setting
from benchmarks.gpu.subjects import built
from benchmarks.gpu.training import trainer_of
from flowbench.training import Budget, BudgetLimit

import lightning as L  # isort: skip (after flowbench, whose guard it needs beside some builds of torchvision)

__all__ = ["measure"]


class _Watch(L.Callback):
    """Allocated bytes after some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.found = steps, {}  # type: tuple[list[int], dict[int, int]]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.found[trainer.global_step] = _allocated(module.device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(setting: Setting) -> Iterator[Line]:
    """Bytes after 50, 250 and 500 steps of both kinds of flow."""
    steps = setting.choose([50, 250, 500], [1, 2, 3])
    for name in ("tarflow", "cfm"):
        found = built(setting, name, ["trainer.precision=bf16-mixed", f"data.batch_size={setting.choose(16, 4)}"])
        size = found.datamodule.batch_size
        budget = Budget(BudgetLimit("steps", steps[-1]), flops_per_step=1, samples_per_step=size, num_train=100)
        found.model.budget = budget  # type: ignore[assignment]
        watch = _Watch(steps)
        trainer = trainer_of(setting, "bf16-mixed", steps[-1], [budget, watch])
        trainer.fit(found.model, datamodule=found.datamodule)
        values = ", ".join(f"{watch.found[step] / 2**20:.1f}" for step in steps)
        grown = watch.found[steps[-1]] - watch.found[steps[0]]
        note = "flat" if grown <= 2**20 else f"GROWS by {grown / 2**20:.1f} MiB"
        peak = torch.cuda.max_memory_allocated(setting.device) / 2**20 if setting.device.type == "cuda" else 0.0
        what = f"MiB allocated after {', '.join(map(str, steps))} steps, {name}, bf16, batch {size}"
        yield Line(what, values, note=f"{note}; peak {peak:.0f} MiB")
