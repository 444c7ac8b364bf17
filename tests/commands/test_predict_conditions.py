"""predict with flows that were trained under conditions beyond labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowbench.commands import runs
from flowbench.config import Experiment

INPAINT = """
seed: 0
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network:
      class_path: flowbench.networks.DiT
      init_args: {width: 16, depth: 1, num_heads: 2, patch_size: 4, condition_channels: 2}
    conditioner: {class_path: flowbench.families.InpaintingConditioner, init_args: {mask: half}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 2}}
    conditional: true
    training: {ema: {decay: 0.5}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 10}
"""
SEMANTIC = (
    INPAINT.replace("InpaintingConditioner", "SemanticConditioner")
    .replace("{mask: half}", "{categories: 3, dropout: 0.5}")
    .replace("condition_channels: 2", "condition_channels: 3")
    .replace("conditional: true", "conditional: false")
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditioned")
    found = {}
    for name, text in {"inpainting": INPAINT, "semantic": SEMANTIC}.items():
        (folder / f"{name}.yaml").write_text(text)
        found[name] = Experiment.from_files([folder / f"{name}.yaml"], [f"run.dir={folder / name}"])
        runs.fit(found[name])
    return found


def predicted(experiment, folder, **options):
    runs.predict(experiment, output=folder, **options)
    (name,) = [path for path in folder.iterdir() if path.suffix == ".npz"]
    return dict(np.load(name)), json.loads((folder / "manifest.json").read_text())


def test_inpainting_is_drawn_once_under_the_models_own_condition(trained, tmp_path):
    arrays, manifest = predicted(trained["inpainting"], tmp_path, task="inpaint", num_samples=4, mask="left", draws=2)
    known = ~arrays["mask"]
    assert arrays["x"].shape == (4, 2, 1, 8, 8)
    assert (arrays["x"][..., known] == arrays["original"][:, None][..., known]).all()
    assert (arrays["x"][:, 0] != arrays["x"][:, 1]).any()
    assert manifest["network_evaluations"] == 4  # two midpoint steps, no rounds
    assert "inpainting[half,pasted]" in manifest["method"]
    assert manifest["results"]["known_value_drift"]["unit"] == "model units, RMS"
    assert manifest["results"]["known_value_drift"]["value"] > 0


def test_samples_complete_held_out_images_under_their_labels(trained, tmp_path):
    arrays, manifest = predicted(trained["inpainting"], tmp_path / "a", task="sample", num_samples=5)
    data = trained["inpainting"].build_data()
    assert arrays["label"].tolist() == data.split("test").label[:5].tolist()
    truth = data.uint8_images("test", slice(5)).numpy()
    share = (arrays["x"] == truth).reshape(5, -1).mean(1)
    assert (share >= 0.5).all()  # half of each image was known
    assert "inpainting[half,pasted]" in manifest["sampler"]


def test_a_flow_without_labels_is_guided_by_its_condition(trained, tmp_path):
    arrays, manifest = predicted(trained["semantic"], tmp_path, task="sample", num_samples=3, guidance=2.0)
    assert arrays["x"].shape == (3, 1, 8, 8)
    assert "label" not in arrays
    assert manifest["network_evaluations"] == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inpainting", {"task": "inpaint", "rounds": 3}, "draws once, but --rounds is 3"),
        ("inpainting", {"task": "reconstruct"}, "--task reconstruct does not apply: take sample or inpaint"),
        ("inpainting", {"task": "classify"}, "--task classify does not apply"),
        ("semantic", {"task": "inpaint"}, "--task inpaint does not apply: take sample"),
    ],
)
def test_tasks_that_do_not_apply_are_refused(trained, name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        runs.predict(trained[name], output=tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
