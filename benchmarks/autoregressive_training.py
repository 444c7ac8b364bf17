"""Training step of an autoregressive flow: flowbench against Apple's TARFlow, in one run on one machine.

    python benchmarks/autoregressive_training.py --reference PATH_TO_A_CHECKOUT_OF_ML_TARFLOW

A step is forward, loss and backward; the optimiser is left out. Variants take turns, so that a machine whose load
changes treats them alike; the table shows medians, the fastest step, and the median of the ratios within a round. One
thread is timed by the process's own time. Without --reference only ours is measured. The reference stays outside this
repository: its licence is not ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.flows.autoregressive.flow import AffineBlock, AutoregressiveFlow
from flowbench.networks import CausalTransformer

Step = Callable[[], Tensor]
CHANNELS, PATCH = 3, 2


def ours(arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """TARFlow's architecture: learned positions, token 0 free, exponential scale."""

    def block(index: int) -> AffineBlock:
        network = CausalTransformer(
            arguments.tokens,
            CHANNELS * PATCH**2,
            width=arguments.width,
            depth=arguments.depth,
            head_dim=64,
            position="learned",
            start="zero",
        )
        nn.init.normal_(network.out.weight, std=0.02)
        return AffineBlock(network, "flip" if index % 2 else "identity")

    flow = AutoregressiveFlow(block(index) for index in range(arguments.blocks))

    def loss(tokens: Tensor) -> Tensor:
        z, logdet = flow(tokens)
        return 0.5 * z.square().mean() - logdet.mean() / z[0].numel()

    return flow, loss


def reference(arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Apple's model at the same size; its patches are cut from an image of the right number of tokens."""
    module = load_reference(arguments.reference)
    side = round(arguments.tokens**0.5) * PATCH
    model = module.Model(CHANNELS, side, PATCH, arguments.width, arguments.blocks, arguments.depth)
    for block in model.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.02)

    def loss(tokens: Tensor) -> Tensor:
        z, _, logdet = model(model.unpatchify(tokens))
        return model.get_loss(z, logdet)

    return model, loss


def load_reference(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("tarflow_reference", path / "transformer_flow.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no transformer_flow.py in {path}; give a checkout of ml-tarflow")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step_of(model: nn.Module, loss: Callable[[Tensor], Tensor], tokens: Tensor, autocast: bool) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        precision = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
        with precision:
            value = loss(tokens)
        value.backward()
        return value.detach()

    return step


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, after one warm-up step each."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of ml-tarflow, outside this repository")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="a square number")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4, help="layers of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    models = {"flowbench": ours(arguments)}
    if arguments.reference is not None:
        models["reference"] = reference(arguments)
    tokens = torch.randn(arguments.batch, arguments.tokens, CHANNELS * PATCH**2)
    steps = {
        f"{name}, {precision}": step_of(*model, tokens, precision == "bfloat16")
        for precision in arguments.precision
        for name, model in models.items()
    }
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), batch {arguments.batch}, {arguments.tokens} tokens,"
        f" width {arguments.width}, {arguments.blocks} x {arguments.depth} layers\n"
    )
    print("| training step | median s | fastest s | reference / it |\n|---|---|---|---|")
    seconds = measure(steps, arguments.repeats)
    for name, values in seconds.items():
        peer = seconds.get("reference, " + name.split(", ")[1], values)
        ratio = statistics.median(theirs / own for theirs, own in zip(peer, values, strict=True))
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
