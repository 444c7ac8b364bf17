"""What `make gpu` measures runs on the CPU at tiny size, line by line: only the figures need a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import sections
from benchmarks.gpu.sections import ALONE, BENCH, BESIDE, LIMITS, Section
from benchmarks.gpu.setting import Line, Setting
from flowbench.metrics.weights import inception_weights
from tests.marks import slow

# Compiling takes minutes on a CPU; networks are compiled in tests of their own.
SLOW = ("inception", "training", "bench", "tests")
SECTIONS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LIMITS if name != "compiled"
]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_measures_at_tiny_size(name: str, tmp_path: Path):
    if name == "inception":
        try:
            inception_weights()
        except ValueError as error:
            pytest.skip(f"no Inception weights to be had: {error}")
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    lines = list(module.measure(Setting(torch.device("cpu"), True, None, tmp_path)))
    assert lines
    assert not [line for line in lines if line.value in ("FAILED", "nan", "-")]


@pytest.mark.slow
def test_the_gpu_tests_run_on_the_cpu_as_far_as_they_can():
    """Their code is tried before it meets a card."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "FLOWBENCH_TEST_DEVICE": "cpu"}
    done = subprocess.run(words, cwd=sections.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_everything_ends_within_eight_minutes():
    def longest(names: Sequence[str]) -> float:
        return sum(LIMITS[name] for name in names)

    assert sorted([*BENCH, *BESIDE, *ALONE]) == sorted(LIMITS)
    assert max(longest(BENCH), longest(BESIDE)) + longest(ALONE) < 8 * 60


@pytest.mark.parametrize("ending", ["raise RuntimeError('no more')", slow("time.sleep(60)")])
def test_what_a_section_has_measured_is_kept_when_it_breaks_off(ending, tmp_path, monkeypatch):
    """A child that writes a line and half of another one, then fails or hangs."""
    child = f"""
import sys, time
sys.stdin.readline()
with open(sys.argv[sys.argv.index("--result") + 1], "w") as handle:
    handle.write('{{"what": "a step", "value": "3 ms"}}\\n{{"what": "ano')
{ending}
"""
    program = tmp_path / "child.py"
    program.write_text(child)
    monkeypatch.setattr(sections, "PROGRAM", (sys.executable, str(program)))
    section = Section("memory", tmp_path, [], limit=5.0)
    first, second = section.measure()
    assert first == Line("a step", "3 ms")
    assert second.value == "FAILED"
    assert ("no end after 5 s" if "sleep" in ending else "exit status 1: RuntimeError: no more") in second.note


def test_a_section_that_waits_for_the_word_ends_with_the_run(tmp_path):
    section = Section("memory", tmp_path, ["--device", "cpu", "--size", "tiny"], limit=60.0)
    section.start()
    section.end()
    assert section._process is not None
    assert section._process.returncode != 0
    assert not section.result.exists()


def test_a_section_that_fails_costs_its_own_lines(tmp_path, monkeypatch):
    def lines(section: Section) -> list[Line]:
        failed = Line(f"section {section.name}", "FAILED", note="1: RuntimeError")
        return [failed] if section.name == "jacobi" else [Line(section.name, "3 ms")]

    monkeypatch.setattr(Section, "start", lambda section: None)
    monkeypatch.setattr(Section, "measure", lines)
    output = tmp_path / "gpu.md"
    words = ["gpu", "--device", "cpu", "--size", "tiny", "--only", "jacobi", "memory", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--runs", str(tmp_path / "runs")])
    assert command.main() == 1
    text = output.read_text()
    assert "| section jacobi | FAILED |" in text
    assert "| memory | 3 ms |" in text
