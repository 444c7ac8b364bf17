"""Data sets of other packages by their entry points: listed, trained on, and one line where one is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from flowbench.data import DENSITIES, list_datasets
from flowbench.data.discovery import own_offers
from tests.marks import slow

ROOT = Path(__file__).parents[2]

MODULE = """
from pathlib import Path
import numpy as np
from flowbench.data import Column, DatasetEntry, DataSpec, Split


def load(root):
    import torch

    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(0, 17, (40, 1, 8, 8), dtype=np.uint8))
    parts = {"train": values[:20], "val": values[20:30], "test": values[30:]}
    return {name: Split(part, columns={"mask": (part[:, 0] > 8).byte()}) for name, part in parts.items()}


CELLS = DatasetEntry(
    DataSpec("cells", "1", (1, 8, 8), levels=17), "cells under a microscope", "CC0", "nobody", load,
    {"train": 20, "val": 10, "test": 10}, flips=True, columns={"mask": Column((8, 8), spatial=True)},
)
"""

RUN = """
seed: 0
data: {dataset: cells, condition: mask, random_flip: true, batch_size: 4}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network:
      class_path: flowbench.networks.DiT
      init_args: {width: 16, depth: 1, num_heads: 2, patch_size: 4, condition_channels: 2}
    conditioner: {class_path: flowbench.families.SemanticConditioner, init_args: {categories: 2, maps: given}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 2}
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Unpack a package as pip does: a module, and a folder of metadata beside it; its site-packages."""
    site = tmp_path / "site-packages"
    site.mkdir()

    def add(name: str, entry_points: str, module: str | None = None) -> Path:
        folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(entry_points)
        if module is not None:
            (site / f"{name.replace('-', '_')}.py").write_text(module)
        return site

    return add


def flowbench(site: Path, *words: str, cwd: Path | None = None, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    paths = [str(root), str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "300", "FLOWBENCH_OFFLINE": "1"}
    command = [sys.executable, "-m", "flowbench.cli", *words]
    return subprocess.run(command, env=environment, cwd=cwd or site, capture_output=True, text=True, timeout=300)


CELLS = "[flowbench.datasets]\ncells = flowbench_cells:CELLS\n"


@pytest.mark.slow
def test_a_package_beside_ours_is_listed_and_trained_on(install: Callable[..., Path], tmp_path: Path) -> None:
    site = install("flowbench-cells", CELLS, MODULE)
    listed = flowbench(site, "list", "datasets")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert any(
        line.split()[:3] == ["cells", "cells", "under"] and line.endswith("[CC0]")
        for line in listed.stdout.splitlines()
    )
    (row,) = [line for line in flowbench(site, "data", "list").stdout.splitlines() if line.startswith("cells ")]
    assert row.split() == ["cells", "1x8x8", "-", "20", "+", "10", "+", "10", "none", "yes"]
    (tmp_path / "run.yaml").write_text(RUN)
    fitted = flowbench(site, "fit", "-c", str(tmp_path / "run.yaml"), f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["phase"] == "done"
    wrong = flowbench(site, "fit", "-c", str(tmp_path / "run.yaml"), "data.condition=musk", "--dry-run", cwd=tmp_path)
    assert "'cells' has no column 'musk'; did you mean 'mask'? columns: mask" in wrong.stderr


BROKEN = [
    ("[flowbench.datasets]\na = broken_cells:NOTHING\n", "x = 1", "AttributeError: module 'broken_cells' has no"),
    ("[flowbench.datasets]\na = broken_cells:A\n", None, "ModuleNotFoundError: No module named 'broken_cells'"),
    ("[flowbench.datasets]\na = broken_cells:A\n", "1 / 0", "ZeroDivisionError: division by zero"),
    ("[flowbench.datasets]\na = broken_cells:A\n", "raise SystemExit('bye\\nbye')", "SystemExit: bye bye"),
    ("[flowbench.datasets]\na = broken_cells:A\n", "A = 3", "it is of type int, not a DatasetEntry"),
    ("[flowbench.datasets]\na = broken_cells\n", "A = 3", "AttributeError"),
    ("[flowbench.datasets]\nno value\n", None, "has entry points that cannot be read"),
    (
        "[flowbench.datasets]\na = broken_cells:A\n",
        "from flowbench.data import DatasetEntry, DataSpec\n"
        "A = [DatasetEntry(DataSpec('digits', '9', (2,)), 'mine', 'mine', 'me', dict)]",
        "the name 'digits' is taken",
    ),
]


@pytest.mark.parametrize(
    ("entry_points", "module", "expected"),
    [*BROKEN[:3], *(slow(*case) for case in BROKEN[3:])],
    ids=[case[2][:20] for case in BROKEN],
)
def test_a_broken_package_is_one_line_and_hides_no_other(
    install: Callable[..., Path], entry_points: str, module: str | None, expected: str
) -> None:
    install("Broken.cells", entry_points)
    site = install("flowbench-cells", CELLS, MODULE)
    if module is not None:
        (site / "broken_cells.py").write_text(module)
    listed = flowbench(site, "list", "datasets")
    assert listed.returncode == 0
    (line,) = listed.stderr.splitlines()
    assert "the package 'Broken.cells'" in line
    assert expected in line
    assert {"cells", "digits"} <= {row.split()[0] for row in listed.stdout.splitlines() if row.startswith("  ")}
    assert "handwritten digits" in listed.stdout, "ours stays"


def test_a_name_that_a_broken_package_may_have_is_refused_with_that_package(install: Callable[..., Path]) -> None:
    site = install("Broken.cells", BROKEN[1][0])
    unknown = flowbench(site, "data", "get", "a")
    assert unknown.returncode != 0
    (line,) = unknown.stderr.splitlines()
    assert "unknown name 'a'" in line
    assert "the package 'Broken.cells'" in line


def test_our_data_sets_need_no_other_package(install: Callable[..., Path], tmp_path: Path) -> None:
    """A name of ours is served without a look at what else is installed."""
    site = install("flowbench-cells", CELLS, "raise RuntimeError")
    found = flowbench(site, "data", "get", "digits")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_list_imports_no_torch(install: Callable[..., Path]) -> None:
    site = install("flowbench-cells", CELLS, MODULE)
    code = (
        "import sys; from flowbench.commands.listing import listing; listing('datasets'); "
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=site, check=True, timeout=60)
    assert time.perf_counter() - start < 10  # 0.5 s on a quiet machine


# --- ours


def test_ours_are_entry_points_too() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["flowbench.datasets"]
    offered = {entry.name for offer in own_offers() for entry in offer.entries()}
    assert {offer.name: offer.value for offer in own_offers()} == stated
    images = {"digits", "mnist", "fashion_mnist", "fashion_mnist_mini", "cifar10"}
    of_tasks = {f"one_class_digits_{normal}" for normal in range(10)}
    assert offered == {*images, "chi_arcs", *DENSITIES, *of_tasks}
    assert offered <= {entry.name for entry in list_datasets()}


def without_the_checkout(site: Path) -> None:
    """The package alone, as a wheel lays it, and not by a link that leads back to the checkout."""
    shutil.copytree(ROOT / "flowbench", site / "flowbench", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_wheel_has_ours_by_its_metadata(install: Callable[..., Path]) -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["flowbench.datasets"]
    lines = "\n".join(f"{name} = {value}" for name, value in stated.items())
    site = install("flowbench", f"[flowbench.datasets]\n{lines}\n")
    without_the_checkout(site)
    listed = flowbench(site, "list", "datasets", root=site)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "handwritten digits" in listed.stdout
    assert "moons" in listed.stdout


def test_a_checkout_that_was_installed_before_needs_no_new_installation(install: Callable[..., Path]) -> None:
    """Its metadata lack the group, or what was added to it since: its pyproject.toml does not."""
    for stale in ("", "[flowbench.datasets]\ndigits = flowbench.data.digits:DIGITS\n"):
        site = install("flowbench", f"[console_scripts]\nflowbench = flowbench.cli:main\n{stale}")
        listed = flowbench(site, "list", "datasets")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert "cifar10" in listed.stdout
        shutil.rmtree(site / "flowbench-1.0.dist-info")


def test_neither_is_one_line(install: Callable[..., Path]) -> None:
    site = install("flowbench", "[console_scripts]\nflowbench = flowbench.cli:main\n")
    without_the_checkout(site)
    listed = flowbench(site, "list", "datasets", root=site)
    assert listed.returncode != 0
    assert len(listed.stderr.splitlines()) == 1
    assert "is neither a checkout nor installed with its data sets" in listed.stderr
