"""A run whose training noise has a seed of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.rows import read_rows
from flowbench.training import read_checkpoint

QUICK = ["evaluator.metrics.nll=null", "evaluator.curve=[]", "evaluator.num_samples=64", "trainer.accelerator=cpu"]


def trained(folder: Path, *words: str) -> torch.Tensor:
    overrides = ["budget=null", "budget.steps=2", f"run.dir={folder}", *QUICK, *words]
    runs.fit(Experiment.from_files(["flowbench:toy/cfm.yaml"], overrides))
    return torch.cat([v.flatten() for v in read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"].values()])


def test_the_noise_of_training_has_its_own_seed(tmp_path):
    words = {"plain": [], "noise": ["seeds.noise=1"], "named": ["seeds.noise=0", "seeds.init=0"]}
    found = {name: trained(tmp_path / name, *given) for name, given in words.items()}
    assert not torch.equal(found["plain"], found["noise"])
    assert torch.equal(found["plain"], found["named"])


@pytest.mark.parametrize(("words", "seeds"), [([], None), (["seeds.noise=4"], {"init": 0, "noise": 4, "order": 0})])
def test_rows_carry_the_seeds(tmp_path, words, seeds):
    trained(tmp_path, *words)
    metrics = ["evaluator.metrics={cost: {class_path: flowbench.evaluation.CostReport}}"]
    overrides = ["budget=null", "budget.steps=2", f"run.dir={tmp_path}", *QUICK, *words, *metrics]
    runs.test(Experiment.from_files(["flowbench:toy/cfm.yaml"], overrides))
    assert {str(row.provenance.get("seeds")) for row in read_rows(tmp_path / "rows.jsonl")} == {str(seeds)}
