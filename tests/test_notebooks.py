"""The notebooks run from top to bottom, and are shipped with the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TIMEOUT = 300  # seconds for one cell on a busy machine
# How long a walk trains and how much it draws; a short one shows the same kinds of outputs.
NUMBERS = re.compile(r"^SEED, STEPS, BATCH, SAMPLES = .*$", re.MULTILINE)
SHORT = "SEED, STEPS, BATCH, SAMPLES = 0, 20, 128, 200"


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook: nbformat.NotebookNode) -> list[str]:
    """What the outputs are, pictures and tables, without their content."""
    return [kind for output in outputs(notebook) for kind in sorted(output.get("data", {output.output_type: None}))]


def shorten(notebook: nbformat.NotebookNode) -> None:
    found = 0
    for cell in notebook.cells:
        cell.source, count = NUMBERS.subn(SHORT, cell.source)
        found += count
    assert found == 1, "a notebook names its numbers once"


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_ships_with(path, short, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own backend puts pictures into the notebook
    shipped = nbformat.read(path, as_version=4)
    nbformat.validate(shipped)
    notebook = nbformat.read(path, as_version=4)
    if short:
        shorten(notebook)
    folder = {"metadata": {"path": tmp_path}}
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=folder)
    client.execute()  # raises at the first error
    assert not any(output.output_type in ("error", "stream") for output in outputs(notebook))
    assert kinds(notebook) == kinds(shipped)
    assert not list(tmp_path.iterdir())  # a walk leaves nothing behind


def test_there_are_notebooks():
    assert NOTEBOOKS
