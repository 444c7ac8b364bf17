"""Sampling speed of autoregressive flows: sequential, Jacobi, guided, by number of tokens, and the reference code.

    python benchmarks/autoregressive_sampling.py jacobi --weights flow.pt
    python benchmarks/autoregressive_sampling.py jacobi --run runs/tarflow --batches 1 4
    python benchmarks/autoregressive_sampling.py sequential --reference PATH --batches 64 --tokens 256
    python benchmarks/autoregressive_sampling.py tokens guidance

`jacobi` measures on a trained flow: that of a run's folder, or one that it trains on `--data` for `--steps` steps and
keeps in `--weights`. The other tables need no training; their flows have random output weights (std 0.02).
`--reference` is a checkout of github.com/apple/ml-tarflow, which lives outside this repository; it gets a flow of the
same shape. Variants take turns; tables show the fastest of `--repeats`, `sequential` medians, with the median of the
ratios within a round. Run with OMP_NUM_THREADS=1 to compare
single threads: then the time is the process's own, whatever else runs on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.flows import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    InverseMethod,
    Inversion,
    JacobiInverse,
    SequentialInverse,
    alternating,
    patchify,
)
from flowbench.networks import CausalTransformer

REFERENCE_HEAD_DIM = 64


def make_flow(
    num_tokens: int,
    token_dim: int,
    width: int,
    layers: list[int],
    num_classes: int | None,
    std: float,
    head_dim: int = 32,
) -> AutoregressiveFlow:
    """A TARFlow with output weights from N(0, std^2)."""

    def block(depth: int, order: Any) -> AffineBlock:
        network = CausalTransformer(
            num_tokens,
            token_dim,
            num_classes,
            width=width,
            depth=depth,
            head_dim=head_dim,
            position="learned",
            start="zero",
        )
        nn.init.normal_(network.out.weight, std=std)
        return AffineBlock(network, order)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        orders = alternating(len(layers), last="flip")
        return AutoregressiveFlow(block(depth, order) for depth, order in zip(layers, orders, strict=True))


def noise(batch: int, num_tokens: int, token_dim: int) -> Tensor:
    return torch.randn(batch, num_tokens, token_dim, generator=generator(0, "noise"))


def trained_flow(given: argparse.Namespace) -> AutoregressiveFlow:
    """A class-conditional TARFlow of noisy images, from a file or trained now."""
    data = FlowDataModule(given.data, batch_size=given.train_batch)
    data.setup("fit")
    spec = data.spec
    num_tokens = spec.shape[1] * spec.shape[2] // given.patch**2
    classes = spec.num_classes
    flow = make_flow(num_tokens, spec.shape[0] * given.patch**2, given.width, given.layers, classes, 0.0)
    if given.weights and given.weights.is_file():
        flow.load_state_dict(torch.load(given.weights, weights_only=True))
        return flow.eval()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=given.steps, pct_start=0.1)
    rng, start = generator(0, "augmentation"), time.perf_counter()
    for step in range(given.steps):
        batch = data.train_batch_at(step * given.train_batch)
        dropped = torch.rand(len(batch.x), generator=rng) < 0.1
        label = batch.label.masked_fill(dropped, classes)
        x = patchify(batch.x + given.noise_std * torch.randn(batch.x.shape, generator=rng), given.patch)
        z, logdet = flow(x, label)
        loss = 0.5 * z.square().mean() - logdet.mean() / z[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step:5d}  loss {loss.item():8.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
    if given.weights:
        torch.save(flow.state_dict(), given.weights)
    return flow.eval()


def flow_of_run(folder: Path) -> AutoregressiveFlow:
    """The averaged flow of an autoregressive family's run."""

    from flowbench.config import Experiment
    from flowbench.training.checkpoint import load_checkpoint

    module = Experiment.from_files([folder / "config.yaml"]).build().module
    load_checkpoint(module, folder / "checkpoints" / "last.ckpt")
    module.eval()
    return module.flow


def fastest(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
    """Seconds and the last result of each variant; they take turns, so that a load on the machine treats them alike."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(repeats):
        for name, run in variants.items():
            start = clock()
            result = run()
            found[name] = (min(clock() - start, found.get(name, (float("inf"),))[0]), result)
    return found


def in_turns(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant by round, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if index:
                seconds[name].append(clock() - start)
    return seconds


def clock() -> float:
    # One thread's own time does not count the time that other processes take.
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def jacobi_table(given: argparse.Namespace) -> None:
    flow = flow_of_run(given.run) if given.run else trained_flow(given)
    network = flow.blocks[0].network
    others = [None] * (len(flow.blocks) - 1)
    methods: list[InverseMethod] = [
        SequentialInverse(),
        JacobiInverse(given.tolerance),
        *(JacobiInverse(given.tolerance, [*others, window]) for window in given.windows),
        JacobiInverse(given.tolerance, [*others, given.windows[0]], certify=False),
        JacobiInverse(0.0),
    ]
    columns = f"{'ms':>8}{'speed':>7}{'passes':>8}{'calls':>7}{'residual':>10}{'|x - seq|':>11}"
    print(f"\n{'batch  method':57}{columns}  calls in each block")
    for batch in given.batches:
        z = noise(batch, network.num_tokens, network.token_dim)
        label = None if flow.num_classes is None else torch.arange(batch) % flow.num_classes
        names = [one.name + " certified" * getattr(one, "certify", False) for one in methods]
        variants = {
            name: lambda one=one, z=z, label=label: flow.invert(z, label, method=one)
            for name, one in zip(names, methods, strict=True)
        }
        found = fastest(variants, given.repeats)
        base, exact = found["sequential"]
        for name, (seconds, inversion) in found.items():
            residual = flow(inversion.x, label)[0].sub(z).abs().max().item()
            calls = " ".join(f"{calls:.1f}" for calls in inversion.iterations.double().mean(1).tolist())
            difference = (inversion.x - exact.x).abs().max().item()
            print(
                f"{batch:5d}  {name:50}{1e3 * seconds:8.1f}{base / seconds:7.2f}{inversion.network_evaluations:8.2f}"
                f"{inversion.sequential_steps:7d}{residual:10.1e}{difference:11.1e}  {calls}",
                flush=True,
            )


def random_inverse(given: argparse.Namespace, tokens: int, batch: int, scale: float) -> Callable[[], Inversion]:
    flow = make_flow(tokens, given.token_dim, given.width, given.layers, 10, 0.02)
    z, label, method = noise(batch, tokens, given.token_dim), torch.arange(batch) % 10, SequentialInverse(given.chunk)
    return lambda: flow.invert(z, label, AutoregressiveGuidance(scale), method)


def tokens_table(given: argparse.Namespace) -> None:
    """Attention grows as N^2, the rest and the cache as N."""
    print(f"\n{'tokens':>6}{'ms/sample':>11}{'us/token':>10}{'cache bytes/sample':>20}{'2 layers N W 4':>16}")
    for tokens in given.tokens:
        run = random_inverse(given, tokens, given.batches[0], 1.0)
        seconds = fastest({"": run}, given.repeats)[""][0] / given.batches[0]
        flow = make_flow(tokens, given.token_dim, given.width, given.layers, 10, 0.02)
        cache = max(block.network.allocate_cache(1).num_bytes for block in flow.blocks)
        bound = 2 * max(given.layers) * tokens * given.width * 4
        print(f"{tokens:6d}{1e3 * seconds:11.2f}{1e6 * seconds / tokens:10.1f}{cache:20d}{bound:16d}", flush=True)


def guidance_table(given: argparse.Namespace) -> None:
    print(f"\n{'batch':>6}{'tokens':>7}{'plain s':>10}{'guided s':>10}{'ratio':>7}")
    for batch in given.batches:
        tokens = given.tokens[0]
        variants = {name: random_inverse(given, tokens, batch, s) for name, s in (("plain", 1.0), ("guided", 3.0))}
        found = fastest(variants, given.repeats)
        plain, guided = found["plain"][0], found["guided"][0]
        print(f"{batch:6d}{tokens:7d}{plain:10.3f}{guided:10.3f}{guided / plain:7.2f}", flush=True)


def sequential_table(given: argparse.Namespace) -> None:
    print(f"\n{'batch':>6}{'tokens':>7}{'ours s':>10}{'one pass s':>12}{'reference s':>13}{'ratio':>7}")
    for batch in given.batches:
        for tokens in given.tokens:
            heads = {"head_dim": REFERENCE_HEAD_DIM} if given.reference else {}
            flow = make_flow(tokens, given.token_dim, given.width, given.layers, None, 0.02, **heads)
            z = noise(batch, tokens, given.token_dim)
            variants: dict[str, Callable[[], Any]] = {
                "ours": lambda flow=flow, z=z: flow.invert(z, method=SequentialInverse(given.chunk)),
                "pass": torch.no_grad()(lambda flow=flow, z=z: flow(z)),
            }
            if given.reference:
                variants["reference"] = reference_sampler(given, tokens, batch)
            rounds = in_turns(variants, given.repeats)
            found = {name: statistics.median(seconds) for name, seconds in rounds.items()}
            peer = rounds.get("reference", [float("nan")] * given.repeats)
            ratio = statistics.median(theirs / own for theirs, own in zip(peer, rounds["ours"], strict=True))
            theirs = found.get("reference", float("nan"))
            print(
                f"{batch:6d}{tokens:7d}{found['ours']:10.3f}{found['pass']:12.3f}{theirs:13.3f}{ratio:7.2f}",
                flush=True,
            )


def reference_sampler(given: argparse.Namespace, tokens: int, batch: int) -> Callable[[], Tensor]:
    """The reference's sampler, of the same shape, with random output weights."""
    side = round(tokens**0.5)
    depth = given.layers[0]
    if side**2 != tokens or set(given.layers) != {depth}:
        raise SystemExit("the reference wants a square number of tokens and equal layers")
    model = reference_module(given.reference).Model(
        given.token_dim, side, 1, given.width, len(given.layers), depth, num_classes=0
    )
    for block in model.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.02)
    return torch.no_grad()(lambda: model.reverse(noise(batch, tokens, given.token_dim)))


def reference_module(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_flow", folder / "transformer_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = {"jacobi": jacobi_table, "sequential": sequential_table, "tokens": tokens_table, "guidance": guidance_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="of flows with random weights")
    parser.add_argument("--token-dim", type=int, default=12, help="of flows with random weights")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 2, 2, 2])
    parser.add_argument("--chunk", type=int, help="of the sequential inverse")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 32, 48], help="of the block nearest the noise")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", type=Path, help="a checkout of ml-tarflow")
    parser.add_argument("--run", type=Path, help="folder of a trained autoregressive family")
    parser.add_argument("--weights", type=Path, help="file of the flow trained here")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--train-batch", type=int, default=64)
    parser.add_argument("--noise-std", type=float, default=0.1)
    given = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    kind = "processor time" if torch.get_num_threads() == 1 else "wall time"
    machine = platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads, {kind}, fastest of {given.repeats}"
    )
    print(f"width {given.width}, layers {given.layers}")
    for name in given.tables:
        TABLES[name](given)


if __name__ == "__main__":
    main()
