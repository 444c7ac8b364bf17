"""Training steps: ours through Lightning, a hand-written loop on the same network, Apple's TARFlow."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.setting import Line, Setting, interleaved, median_ratio, milliseconds
from benchmarks.gpu.subjects import built, peer_tarflow
from flowbench.core.seeds import generator
from flowbench.training import Budget, BudgetLimit

import lightning as L  # isort: skip (after flowbench, whose guard it needs beside some builds of torchvision)

__all__ = ["PRECISIONS", "lightning_steps", "measure", "trainer_of"]

# Of a run: bfloat16 products, and the same compiled; float32 is what a CPU user knows.
PRECISIONS = {"bf16": ["trainer.precision=bf16-mixed"], "float32": ["trainer.precision=32-true"]}
Loss = Callable[[Tensor], Tensor]


def measure(setting: Setting) -> Iterator[Line]:
    """Milliseconds of a step of TARFlow and CFM."""
    for precision in PRECISIONS:
        for name in ("tarflow", "cfm"):
            yield from _compared(setting, name, precision)


def _compared(setting: Setting, name: str, precision: str) -> list[Line]:
    steps, rounds = setting.choose((10, 3) if precision == "bf16" else (4, 3), (2, 1))
    runs = {"ours": lightning_steps(setting, name, PRECISIONS[precision], steps)}
    runs["hand-written"] = _loop(setting, *_own_loss(setting, name), precision, steps)
    peer = peer_tarflow(setting) if name == "tarflow" else None
    if peer is not None:
        runs["Apple's"] = _loop(setting, peer, _peer_loss(peer), precision, steps)
    seconds = interleaved(setting, runs, rounds)
    title = f"training step, {name}, {precision}"
    return [
        Line(title, milliseconds(seconds["ours"], steps), f"{other} {milliseconds(seconds[other], steps)}", ratio)
        for other in seconds
        if other != "ours"
        for ratio in [median_ratio(seconds["ours"], seconds[other])]
    ]


class _Span(L.Callback):
    """Seconds from the first batch to the end of the last, without the trainer's start."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.began, self.seconds = setting, 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if not self.began:
            self.setting.synchronize()
            self.began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.setting.synchronize()
        self.seconds = time.perf_counter() - self.began


def _budget(steps: int, size: int) -> Budget:
    return Budget(BudgetLimit("steps", steps), flops_per_step=1, samples_per_step=size, num_train=100)


def trainer_of(setting: Setting, precision: str, steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer as `flowbench fit` makes it, without files."""
    return L.Trainer(
        accelerator="gpu" if setting.device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        max_epochs=-1,
        max_steps=steps,
        callbacks=callbacks,
        log_every_n_steps=50,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=setting.folder,
    )


def lightning_steps(setting: Setting, name: str, overrides: list[str], steps: int) -> Callable[[], float]:
    """Some steps through Lightning; each call goes on with the same module, so a warm-up stays warm."""
    found = built(setting, name, overrides)
    precision = found.trainer_arguments["precision"]
    size = found.datamodule.batch_size

    def run() -> float:
        budget, span = _budget(steps, size), _Span(setting)
        found.model.budget = budget  # type: ignore[assignment]
        trainer_of(setting, precision, steps, [budget, span]).fit(found.model, datamodule=found.datamodule)
        return span.seconds

    return run


def _own_loss(setting: Setting, name: str) -> tuple[nn.Module, Loss]:
    """Our network and a loss written out around it."""
    model = built(setting, name).model
    if name == "tarflow":
        flow = copy.deepcopy(model.flow)

        def likelihood(x: Tensor) -> Tensor:
            tokens = nn.functional.unfold(x + 0.05 * torch.randn_like(x), 2, stride=2).transpose(1, 2)
            z, logdet = flow(tokens)
            return 0.5 * z.square().mean() - logdet.mean() / z[0].numel()

        return flow, likelihood
    network = copy.deepcopy(model.network)

    def matching(x1: Tensor) -> Tensor:
        t, x0 = torch.rand(len(x1), device=x1.device), torch.randn_like(x1)
        at = t[:, None, None, None]
        return (network(at * x1 + (1 - at) * x0, t) - (x1 - x0)).float().square().mean()

    return network, matching


def _peer_loss(model: nn.Module) -> Loss:
    def loss(x: Tensor) -> Tensor:
        z, _, logdets = model(x + 0.05 * torch.randn_like(x))
        return model.get_loss(z, logdets)

    return loss


def _loop(setting: Setting, model: nn.Module, loss: Loss, precision: str, steps: int) -> Callable[[], None]:
    """Draw, forward, backward, clip, AdamW, average: what a step is, without a framework."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    batches = _batches(setting, setting.choose({True: 256, False: 128}[hasattr(model, "blocks")], 4))

    def run() -> None:
        for _ in range(steps):
            with _autocast(setting, precision):
                value = loss(next(batches))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)

    return run


def _autocast(setting: Setting, precision: str) -> contextlib.AbstractContextManager[object]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(setting.device.type, dtype=torch.bfloat16)


def _batches(setting: Setting, size: int) -> Iterator[Tensor]:
    """Batches of the device's own memory: no loader at all."""
    values = torch.rand(max(2 * size, setting.choose(4096, 8)), 3, 32, 32, generator=generator(0, "gpu")) * 2 - 1
    values = values.to(setting.device)
    while True:
        yield from values.split(size)
