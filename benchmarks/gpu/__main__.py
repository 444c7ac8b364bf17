"""Everything that only a GPU shows, on one card, in under eight minutes, as one Markdown table.

    python -m benchmarks.gpu --output docs/results/gpu.md [--reference CHECKOUT_OF_ML_TARFLOW]
    python -m benchmarks.gpu --device cpu --size tiny          # a dry run of every line of this code

Each section runs in a process of its own with a time limit, see :mod:`benchmarks.gpu.sections`. One that fails or is
ended leaves its reason in the table behind what it had measured. The table is written anew after every section; logs,
lines and the bench lie in a folder of the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu.page import document
from benchmarks.gpu.sections import ALONE, BENCH, BESIDE, LIMITS, Section
from benchmarks.gpu.setting import Line, Setting
from flowbench.core.storage import write_text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--reference", type=Path, help="checkout of apple/ml-tarflow, outside this repository")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.md"), help="the table (default: runs/gpu.md)")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="a folder a run (default: runs/gpu)")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--section", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_section(given: argparse.Namespace) -> None:
    """The child's part: everything is imported, then the word is awaited, then each line is written at once."""
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    module = importlib.import_module(f"benchmarks.gpu.{given.section}")
    folder = given.result.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(torch.device(given.device), given.size == "tiny", given.reference, folder, given.seconds)
    torch.zeros(1, device=setting.device)
    if not sys.stdin.readline():  # the run has ended
        return
    with given.result.open("a", encoding="utf-8") as handle:
        for line in module.measure(setting):
            handle.write(json.dumps(line.to_dict()) + "\n")
            handle.flush()


class Run:
    """The sections of one run, their lines and the page made from them.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        folder = given.runs / time.strftime("%Y-%m-%d-%H%M%S")
        folder.mkdir(parents=True)
        options = ["--device", given.device, "--size", given.size]
        options += ["--reference", str(given.reference.resolve())] if given.reference else []
        is_dry = given.device == "cpu"
        self.sections = {name: Section.named(name, folder.resolve(), options, is_dry) for name in given.only}
        self.found: dict[str, list[Line]] = {}
        self._began, self._lock = time.perf_counter(), threading.Lock()

    def measure(self) -> bool:
        """Measure everything; whether nothing failed."""
        for name in [name for name in ALONE if name in self.sections][:1]:
            self.sections[name].start()
        try:
            self._side_by_side(BENCH, BESIDE)
            self._lane(ALONE)
        finally:
            self._end()
        return not any(line.value == "FAILED" for lines in self.found.values() for line in lines)

    def _side_by_side(self, *lanes: Sequence[str]) -> None:
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                for lane in [pool.submit(self._lane, names) for names in lanes]:
                    lane.result()
            except BaseException:
                self._end()  # or leaving the pool would wait for them
                raise

    def _end(self) -> None:
        for section in self.sections.values():
            section.end()

    def _lane(self, names: Sequence[str]) -> None:
        """Sections one after the other; each imports what it needs while the one before it measures."""
        sections = [self.sections[name] for name in names if name in self.sections]
        for number, section in enumerate(sections):
            for following in sections[number + 1 : number + 2]:
                following.start()
            lines = section.measure()
            with self._lock:
                self.found[section.name] = lines
                print(f"{section.name}: {section.seconds:.0f} s", flush=True)
                write_text(self.given.output, self.page())

    def page(self) -> str:
        """The page of what has been measured so far, in the order of the limits."""
        found = {name: self.found[name] for name in LIMITS if name in self.found}
        seconds = {name: self.sections[name].seconds for name in found}
        return document(self.given.device, self.given.size, found, seconds, time.perf_counter() - self._began)


def main() -> int:
    given = arguments()
    if given.section is not None:
        measure_section(given)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; a dry run is --device cpu --size tiny", file=sys.stderr)
        return 2
    run = Run(given)
    is_complete = run.measure()
    print(run.page())
    return 0 if is_complete else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it started ends, too
    sys.exit(main())
