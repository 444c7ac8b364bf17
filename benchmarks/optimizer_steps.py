"""Steps that each optimiser of a bench took to AdamW's final validation loss, from the cells' checkpoints.

Arms of one flow have names that begin alike, `tarflow_adamw` and `tarflow_swan`: each is compared with the `_adamw` of
its flow, seed by seed. An arm has reached the loss at the first validation at or below AdamW's last one, so steps are
multiples of the interval between validations; what follows the first time does not count.

    flowbench bench -c experiments/optimizers_digits.yaml
    python benchmarks/optimizer_steps.py runs/optimizers_digits
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowbench.training import read_checkpoint

BASELINE = "adamw"
Losses = Mapping[int, float]  # by the number of steps before the validation


def read_losses(bench: Path) -> dict[str, dict[str, Losses]]:
    """Validation losses of every finished cell.

    Args:
        bench: folder of the bench.

    Returns:
        By contender, with its problem where the bench has several, and by seed.

    Raises:
        ValueError: when no cell has a checkpoint.
    """
    found: defaultdict[str, dict[str, Losses]] = defaultdict(dict)
    for path in sorted(bench.glob("cells/**/seed-*/checkpoints/last.ckpt")):
        cell = path.parents[1]
        contender = str(cell.parent.relative_to(bench / "cells"))
        found[contender][cell.name.removeprefix("seed-")] = read_checkpoint(path).get("validation_losses", {})
    if not found:
        raise ValueError(f"{bench} has no cells/CONTENDER/seed-N/checkpoints/last.ckpt: give the folder of a bench")
    return dict(found)


def steps_to(losses: Losses, target: float) -> int | None:
    """The first validated step with a loss of at most `target`; None where there is none."""
    return next((step for step, loss in sorted(losses.items()) if loss <= target), None)


def lines(found: Mapping[str, Mapping[str, Losses]]) -> Iterator[str]:
    """A Markdown table with a row for each arm that has a baseline and each of their common seeds."""
    yield "| arm | seed | steps | last loss | AdamW's | steps to AdamW's | share of AdamW's steps |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for contender, seeds in found.items():
        name = contender.rpartition("/")[2]
        flow = contender.removesuffix(name) + name.partition("_")[0]
        baseline = found.get(f"{flow}_{BASELINE}", {})
        for seed, losses in seeds.items():
            others = baseline.get(seed)
            if not losses or not others:
                continue
            last, end = max(losses), max(others)
            reached = steps_to(losses, others[end])
            to = "not reached | " if reached is None else f"{reached} | {reached / end:.2f}"
            yield f"| {contender} | {seed} | {last} | {losses[last]:.4f} | {others[end]:.4f} | {to} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="folder of the bench, e.g. runs/optimizers_digits")
    try:
        found = read_losses(parser.parse_args().bench)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
