"""A flow under conditions that the data give, from an npz with masks to samples of held-out masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.rows import read_rows

TEXT = """
seed: 0
data: {dataset: npz, path: masks.npz, condition: mask, batch_size: 64, eval_batch_size: 7}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network:
      class_path: flowbench.networks.DiT
      init_args: {width: 32, depth: 2, num_heads: 2, patch_size: 1, condition_channels: 2}
    conditioner: {class_path: flowbench.families.SemanticConditioner, init_args: {categories: 2, maps: given}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 8}}
    likelihood_solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 4}}
    training: {optimizer: {lr: 1.0e-2}, ema: {decay: 0.9}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 150}
"""
TEST = 24


def pictures_of(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark where the mask is 0, bright where it is 1."""
    return (mask * 160 + rng.integers(20, 70, mask.shape)).astype(np.uint8)[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (320, 4, 4), dtype=np.uint8)
    # A flow that were given training masks, or none, would not paint these.
    stripes = np.broadcast_to(
        (np.arange(4) % 2)[:, None] == np.arange(2)[rng.integers(0, 2, TEST), None, None], (TEST, 4, 4)
    )
    masks = {"train": mask[:256], "val": mask[256:], "test": stripes.astype(np.uint8)}
    arrays = {name: pictures_of(part, rng) for name, part in masks.items()}
    np.savez(folder / "masks.npz", **arrays, **{f"{name}_mask": part for name, part in masks.items()})
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Experiment:
    experiment = made(folder)
    runs.fit(experiment)
    return experiment


def made(folder: Path, *overrides: str) -> Experiment:
    (folder / "given.yaml").write_text(TEXT.replace("masks.npz", str(folder / "masks.npz")))
    return Experiment.from_files([folder / "given.yaml"], [f"run.dir={folder / 'run'}", *overrides])


def test_samples_show_the_masks_of_the_held_out_images(trained: Experiment, folder: Path, tmp_path: Path) -> None:
    runs.predict(trained, output=tmp_path, num_samples=TEST)
    found = np.load(tmp_path / "samples.npz")["x"][:, 0]
    data = trained.build_data()
    mask = data.columns("test")["mask"].numpy()
    stored = np.load(folder / "masks.npz")["test_mask"]
    assert sorted(map(bytes, mask)) == sorted(map(bytes, np.ascontiguousarray(stored))), "masks of the split test"
    assert ((found > 120) == (mask == 1)).mean() > 0.95


def test_densities_and_losses_of_held_out_images_are_those_under_their_masks(trained: Experiment) -> None:
    """Under the right mask every image is likelier than under the opposite one; its loss is smaller."""
    run, _ = runs._trained(trained, None)
    module, data = run.module, run.built.datamodule
    (batch,) = [batch for batch in data.test_dataloader() if 0 in batch.index]
    right = module.batch_log_prob(batch)
    batch.condition = 1 - batch.condition
    wrong = module.batch_log_prob(batch)
    assert (right > wrong).all()
    loss = runs.validate(trained)["val/loss"]
    rng = torch.Generator().manual_seed(0)
    opposite = []
    for batch in data.val_dataloader():
        batch.condition = 1 - batch.condition
        opposite.append(float(module.training_loss(batch, rng).total.detach()))
    assert loss < 0.5 * np.mean(opposite)


@pytest.mark.slow
def test_the_evaluator_draws_and_scores_under_the_masks_of_the_held_out_split(folder: Path, tmp_path: Path) -> None:
    metrics = {
        "fd": {"class_path": "flowbench.evaluation.FrechetDistance", "init_args": {"features": "identity"}},
        # A field that splits two grey levels is steep: no solver of few steps converges there.
        "nll": {"class_path": "flowbench.tasks.generation.NegativeLogLikelihood", "init_args": {"num_checked": 0}},
    }
    options = [f"evaluator={json.dumps({'reference': 'val', 'num_samples': TEST, 'metrics': metrics})}"]
    experiment = made(folder, f"run.dir={tmp_path / 'run'}", *options)
    runs.fit(experiment, test=True)
    rows = {row.metric: row for row in read_rows(tmp_path / "run" / "rows.jsonl")}
    assert rows["nll"].status == "ok"
    assert rows["nll"].n == TEST
    found = np.load(tmp_path / "run" / "samples.npz")["x"][:, 0]
    mask = experiment.build_data().columns("test")["mask"].numpy()[: len(found)]
    assert ((found > 120) == (mask == 1)).mean() > 0.95


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.condition=null"], "semantic[2 given] takes conditions that the data give: set data.condition to the"),
        (["data.condition=musk"], "has no column 'musk'; did you mean 'mask'? columns: mask"),
        (
            ["model.init_args.conditioner.init_args.maps=derived"],
            "data.condition is 'mask', but semantic[2 derived] makes its own conditions: remove it",
        ),
        (
            ["model.init_args.conditioner=null", "model.init_args.network.init_args.condition_channels=0"],
            "data.condition is 'mask', but the flow takes no conditions: remove it",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        runs.fit(made(folder, f"run.dir={tmp_path / 'run'}", *overrides))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
