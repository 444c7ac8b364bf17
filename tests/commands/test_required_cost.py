"""What the training of required models cost stands beside the training of what requires them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowbench.commands import runs
from flowbench.commands.prerequisites import required_checkpoints, required_flops
from flowbench.config import Experiment
from flowbench.core.rows import read_rows
from flowbench.training import count_flops

from .conftest import latent_files

EVALUATOR = "evaluator: {num_samples: 8, metrics: {cost: {class_path: flowbench.evaluation.CostReport}}}\n"


def test_what_the_autoencoder_cost_is_a_row_beside_the_flows_own_training(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    file = latent_files(tmp_path, autoencoder_steps=3, evaluator=EVALUATOR)

    def child(command, log, environment):
        runs.fit(Experiment.from_files([command[command.index("-c") + 1]], [command[-1]]))
        return 0

    monkeypatch.setattr("flowbench.commands.prerequisites.run_child", child)
    experiment = Experiment.from_files([file], [f"run.dir={tmp_path / 'run'}"])
    runs.fit(experiment, test=True)
    rows = {row.metric: row for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    built = Experiment.from_files([tmp_path / "autoencoder.yaml"]).build()
    batch = built.datamodule.train_batch_at(0)
    per_step = count_flops(lambda: built.model.training_loss(batch, None).total)
    assert rows["required_flops"].value == 3 * per_step
    assert (rows["required_flops"].group, rows["required_flops"].unit) == ("cost", "FLOP")
    assert rows["train_flops"].value != rows["required_flops"].value
    assert required_flops(required_checkpoints(experiment)) == 3 * per_step


def noted(folder: Path, flops: float | None) -> Path:
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps({"trained": True} | ({"train_flops": flops} if flops else {})))
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("cost", "total"), [({"teacher": 2e9, "teacher.autoencoder": 1e9}, 3e9), ({"teacher": 2e9, "old": None}, None)]
)
def test_the_sum_is_that_of_all_depths_or_unknown(tmp_path, cost, total):
    found = {name: noted(tmp_path / name, flops) for name, flops in cost.items()}
    assert required_flops(found) == total
    first = next(iter(found.values()))
    assert required_flops({"a": first, "b.a": first}) == 2e9, "trained once"
    assert required_flops({}) is None
