"""Training steps of the matching families against hand-written loops and torchcfm's, as ratios.

Every peer trains the same network on the same data; a step is drawing, pairing, forward, backward, gradient
clipping, AdamW and the average of the weights. Wall time per step, medians over rounds in which the peers take turns.

    OMP_NUM_THREADS=1 python benchmarks/matching_training.py               # the table of docs/speed.md
    OMP_NUM_THREADS=1 python benchmarks/matching_training.py --nets mlp --steps 2000 --rounds 9 --only cfm wcfm

torchcfm's rows need that package (``pip install --no-deps torchcfm``); without it they are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.config import Experiment
from flowbench.training import Budget, BudgetLimit

import lightning as L  # isort: skip (after flowbench, whose guard it needs beside some builds of torchvision)

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
NETS = {"mlp": ("toy", 256), "unet": ("digits28", 128)}
Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class StepClock(L.Callback):
    """Notes when each step starts; the difference of two starts is all that a step costs."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.starts.append(time.perf_counter())


def experiment(net: str, overrides: list[str], file: str = "cfm") -> Experiment:
    """CFM, or another experiment, in the plane or on 28x28 images, with changes."""
    common = ["evaluator=null", "loggers=null", "budget.steps=1000000"]
    if net == "mlp":
        return Experiment.from_files([EXPERIMENTS / "toy" / f"{file}.yaml"], [*common, *overrides])
    images = ["data.dataset=fashion_mnist_mini", "data.batch_size=128"]
    return Experiment.from_files([EXPERIMENTS / "images" / "tiny" / f"{file}.yaml"], [*images, *common, *overrides])


def ours(net: str, overrides: list[str], file: str = "cfm") -> Callable[[int], list[float]]:
    """Seconds of each of some training steps through Lightning, as `flowbench fit` trains.

    Args:
        net: which network.
        overrides: changes of the experiment.
        file: the experiment's name.
    """

    def steps(num: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            built = experiment(net, overrides, file).build()
            data = built.datamodule
            clock = StepClock()
            limit = BudgetLimit("steps", num)
            budget = Budget(limit, flops_per_step=1, samples_per_step=data.batch_size, num_train=data.num_train)
            built.model.budget = budget  # type: ignore[assignment]
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=-1,
                max_steps=num,
                callbacks=[budget, clock],
                logger=L.pytorch.loggers.TensorBoardLogger(folder),
                log_every_n_steps=50,  # as in any run of 5,000 steps or more
                gradient_clip_val=1.0,
                limit_val_batches=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=folder,
            )
            trainer.fit(built.model, datamodule=data)
            return [stop - start for start, stop in pairwise(clock.starts)]

    return steps


def loop(net: str, pair: Pair, fused: bool) -> Callable[[int], list[float]]:
    """The same steps in a hand-written loop without a framework."""
    built = experiment(net, []).build()
    network: nn.Module = copy.deepcopy(built.model.network)  # type: ignore[arg-type]
    values = built.datamodule.model_values("train", slice(8192))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4, fused=fused)
    average = [p.detach().clone() for p in network.parameters()]
    batches = endless(values, built.datamodule.batch_size)

    def steps(num: int) -> list[float]:
        seconds = []
        for _ in range(num):
            start = time.perf_counter()
            x1 = next(batches)
            t, xt, velocity = pair(torch.randn_like(x1), x1)
            loss = (network(xt, t) - velocity).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.001)
            loss.item()
            seconds.append(time.perf_counter() - start)
        return seconds

    return steps


def endless(values: Tensor, size: int) -> Iterator[Tensor]:
    """Shuffled batches without end."""
    while True:
        yield from (values[part] for part in torch.randperm(len(values)).split(size) if len(part) == size)


def independent(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs as drawn on straight lines."""
    t = torch.rand(len(x1))
    at = t.view(-1, *[1] * (x1.ndim - 1))
    return t, at * x1 + (1 - at) * x0, x1 - x0


def torchcfm_pair(name: str) -> Pair | None:
    """A matcher of torchcfm, where it is installed."""
    if importlib.util.find_spec("torchcfm") is None:
        return None
    from torchcfm import conditional_flow_matching as peer

    matcher = getattr(peer, name)(sigma=0.0)
    return lambda x0, x1: matcher.sample_location_and_conditional_flow(x0, x1)  # type: ignore[no-any-return]


def contestants(net: str) -> dict[str, Callable[[int], list[float]]]:
    """Every peer by name."""
    family = "model.class_path=flowbench.families"
    coupling = "model.init_args.coupling.class_path=flowbench"
    ot = "model.init_args.coupling.init_args.coupling.class_path=flowbench.flows.OptimalTransportCoupling"
    found = {
        "hand-written": loop(net, independent, fused=False),
        "hand-written, fused AdamW": loop(net, independent, fused=True),
        "cfm": ours(net, []),
        "wcfm": ours(net, [f"{family}.WeightedCFM"]),
        "ot_cfm": ours(net, [f"{coupling}.flows.OptimalTransportCoupling"]),
        "ot_cfm, ahead": ours(net, [f"{coupling}.families.StreamPairing", ot]),
    }
    if net == "mlp":  # the other contenders of wcfm_2d
        weight = "model.init_args.weight.init_args"
        found |= {name: ours(net, [], name) for name in ("sb_cfm", "entropic_cfm")}
        found["wcfm, raw"] = ours(net, [f"{weight}.normalization=raw"], "wcfm")
        found["wcfm, corrected"] = ours(net, [f"{weight}.correction=target"], "wcfm")
        found["wcfm, tilt-only"] = ours(net, [f"{weight}.correction=tilt-only"], "wcfm")
    for name, matcher in (("", ""), ("OT", "ExactOptimalTransport")):
        pair = torchcfm_pair(f"{matcher}ConditionalFlowMatcher")
        if pair is not None:
            found[f"torchcfm {name or 'I'}-CFM"] = loop(net, pair, fused=False)
    return found


RATIOS = [
    ("cfm", "hand-written"),
    ("cfm", "hand-written, fused AdamW"),
    ("wcfm", "cfm"),
    ("ot_cfm", "cfm"),
    ("ot_cfm, ahead", "cfm"),
    ("torchcfm OT-CFM", "torchcfm I-CFM"),
]


def measure(net: str, num_steps: int, rounds: int, only: list[str] | None) -> None:
    """Print the table of one network."""
    peers = {name: steps for name, steps in contestants(net).items() if not only or name in only}
    means: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 1):
        for name, steps in peers.items():
            seconds = statistics.fmean(steps(num_steps))  # pairs solved ahead come in bursts: a median would flatter
            if turn:  # the first round warms up
                means[name].append(seconds)
    print(f"\n{net}, batch {NETS[net][1]}, {num_steps} steps x {rounds} rounds, {torch.get_num_threads()} thread(s)")
    for name, values in means.items():
        print(f"  {name:<28} {1e3 * statistics.median(values):8.2f} ms a step")
    for top, bottom in RATIOS:
        if top in means and bottom in means:
            ratios = [a / b for a, b in zip(means[top], means[bottom], strict=True)]
            print(f"  {top} / {bottom}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of rows, in place of all")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for net in arguments.nets:
        measure(
            net, arguments.steps if net == "mlp" else max(10, arguments.steps // 10), arguments.rounds, arguments.only
        )


if __name__ == "__main__":
    main()
