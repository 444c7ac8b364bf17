"""``python -m tests.golden compare``: whether the numbers are those that are stored, bit for bit.

``record`` stores new ones, with the tolerances that other instruction sets need; do so only where numbers are meant to
change, and state it in the changelog.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.golden.stored import Numbers, compute, deviations, names_of, save
from tests.portable import CONFIGURATIONS, missing

OTHERS = ("torch-default", "mkl-avx2", "all-avx2", "all-oldest", "kernels-onednn")


def compute_here(output: Path) -> None:
    """Compute all numbers in this process."""
    import torch

    from tests.golden.runs import MEASURED, losses, measured_rows

    torch.set_num_threads(1)
    numbers: Numbers = {f"loss {name}": list(values) for name, values in losses()}
    with tempfile.TemporaryDirectory() as folder:
        for name in MEASURED:
            rows = list(measured_rows(name, Path(folder)))
            assert len(set(names_of(rows))) == len(rows), "two rows have one name"
            numbers |= {key: [row["value"]] for key, row in zip(names_of(rows), rows, strict=True)}
    output.write_text(json.dumps(numbers), encoding="utf-8")


def compute_afresh(settings: dict[str, str]) -> Numbers:
    """Compute all numbers with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **settings, "FLOWBENCH_CACHE": str(Path(folder) / "cache")}
        return compute(Path(folder), environment)


def record() -> int:
    """Store the numbers and what other instruction sets make of them."""
    others = []
    for name in OTHERS:
        if (reason := missing(name)) is None:
            print(name, flush=True)
            others.append(compute_afresh(CONFIGURATIONS[name]))
        else:
            print(f"{name}: left out, {reason}")
    save(compute_afresh({}), others)
    return 0


def compare() -> int:
    """Print what differs from the stored numbers by a bit; the status is 1 where anything does."""
    lines = deviations(compute_afresh({}), exactly=True)
    print("\n".join(lines) or "bit-equal")
    return int(bool(lines))


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record")
    commands.add_parser("compare")
    commands.add_parser("compute").add_argument("output", type=Path)
    given = parser.parse_args()
    if given.command == "compute":
        compute_here(given.output)
        return 0
    return record() if given.command == "record" else compare()


if __name__ == "__main__":
    sys.exit(main())
