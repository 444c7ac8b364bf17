"""``python -m tests.golden compare``: whether the numbers are those that are stored, bit for bit.

``store`` stores new ones, with the tolerances that other instruction sets need; do so only where numbers are meant to
change, and state it in the changelog. Every kind of device has a file of its own: both commands take the GPU where
there is one, ``--device cpu`` takes the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.golden.stored import DEVICES, Numbers, compute, deviations, file_of, names_of, save
from tests.portable import CONFIGURATIONS, missing

OTHERS = ("torch-default", "mkl-avx2", "all-avx2", "all-oldest", "kernels-onednn")


# Runs on a GPU, whose kernels add in an order of their own: what they differ by is what the tolerances must hold.
REPEATS = 3


def compute_here(output: Path, device: str) -> None:
    """Compute all numbers in this process; on a GPU the losses alone: the measured experiments train on the CPU."""
    import torch

    from tests.golden.runs import MEASURED, exact_products, losses, measured_rows

    torch.set_num_threads(1)
    exact_products()
    numbers: Numbers = {f"loss {name}": list(values) for name, values in losses(torch.device(device))}
    with tempfile.TemporaryDirectory() as folder:
        for name in MEASURED if device == "cpu" else ():
            rows = list(measured_rows(name, Path(folder)))
            assert len(set(names_of(rows))) == len(rows), "two rows have one name"
            numbers |= {key: [row["value"]] for key, row in zip(names_of(rows), rows, strict=True)}
    output.write_text(json.dumps(numbers), encoding="utf-8")


def compute_afresh(settings: dict[str, str], device: str) -> Numbers:
    """Compute all numbers with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **settings, "FLOWBENCH_CACHE": str(Path(folder) / "cache")}
        return compute(Path(folder), environment, device)


def store(device: str) -> int:
    """Store the numbers and what other instruction sets, or other runs on the GPU, make of them."""
    others = []
    for name in OTHERS if device == "cpu" else ():
        if (reason := missing(name)) is None:
            print(name, flush=True)
            others.append(compute_afresh(CONFIGURATIONS[name], device))
        else:
            print(f"{name}: left out, {reason}")
    if device != "cpu":
        others = [compute_afresh({}, device) for _ in range(REPEATS)]
    save(compute_afresh({}, device), others, device)
    print(f"stored: {file_of(device)}")
    return 0


def compare(device: str) -> int:
    """Print what differs from the stored numbers by a bit; the status is 1 where anything does.

    On a GPU, whose sums have no fixed order, by more than the stored tolerance.
    """
    if not file_of(device).is_file():
        print(f"no numbers of {device} are stored: python -m tests.golden store --device {device}")
        return 1
    lines = deviations(compute_afresh({}, device), exactly=device == "cpu", device=device)
    print("\n".join(lines) or ("bit-equal" if device == "cpu" else "equal within the stored tolerances"))
    return int(bool(lines))


def device_here() -> str:
    """The kind of device that the numbers are computed on where none is named."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("store", "compare", "compute"):
        command = commands.add_parser(name)
        command.add_argument("--device", choices=DEVICES, help="default: the GPU where there is one")
        if name == "compute":
            command.add_argument("output", type=Path)
    given = parser.parse_args()
    device = given.device or device_here()
    if given.command == "compute":
        compute_here(given.output, device)
        return 0
    return store(device) if given.command == "store" else compare(device)


if __name__ == "__main__":
    sys.exit(main())
