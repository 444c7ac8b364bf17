from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import cli_dummies
import pytest

import flowbench.evaluation  # noqa: F401 - it must bind the true classes before a test replaces them

EXPERIMENT = """
    seed: 3
    data: {dataset: digits, batch_size: 16}
    model:
      class_path: cli_dummies.Family
      init_args:
        network: {class_path: cli_dummies.Network, init_args: {width: 8}}
        weight: {class_path: cli_dummies.Gibbs, init_args: {kappa: 0.5}}
    trainer: {accelerator: cpu, devices: 1}
    budget: {steps: 10}
    evaluator:
      num_samples: 20
      metrics:
        fd: {class_path: cli_dummies.Distance, init_args: {features: digits-cnn}}
"""


@pytest.fixture(autouse=True)
def rooms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rooms' classes are replaced by small ones, and every test has its own working directory."""
    monkeypatch.setattr("flowbench.data.FlowDataModule", cli_dummies.Data)
    monkeypatch.setattr("flowbench.evaluation.Evaluator", cli_dummies.Evaluator)
    monkeypatch.chdir(tmp_path)
    cli_dummies.LOG.clear()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


@pytest.fixture
def experiment_file(write: Callable[[str, str], Path]) -> Path:
    return write("wcfm.yaml", EXPERIMENT)
