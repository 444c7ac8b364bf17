"""predict --task: what each task writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.cli import main
from flowbench.commands import runs
from flowbench.commands.prediction.request import OPTIONS, Request
from flowbench.commands.prediction.tasks import _cost
from flowbench.config import Experiment
from flowbench.families import FlowSamples
from tests.marks import slow

from .conftest import DIGITS, POINTS

TWO_BLOCKS = """
seed: 1
data: {dataset: moons, batch_size: 32}
model:
  class_path: flowbench.families.TARFlow
  init_args:
    {layers: [1, 1], width: 16, head_dim: 8, start: learned, conditional: true, training: {optimizer: {lr: 1.0e-2}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 40}
"""
LATENT = """
seed: 2
data: {dataset: digits, batch_size: 16}
requires: {autoencoder: autoencoder.yaml}
model:
  class_path: flowbench.families.STARFlow
  init_args:
    deep_layers: 1
    shallow_blocks: 1
    shallow_layers: 1
    width: 16
    head_dim: 8
    conditional: true
    training: {ema: {decay: 0.5}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 10}
"""
AUTOENCODER = """
data: {dataset: digits, batch_size: 32}
model:
  class_path: flowbench.families.Autoencoder
  init_args:
    network: {class_path: flowbench.networks.KLAutoencoder, init_args: {width: 8, latent_channels: 2}}
    training: {ema: {decay: 0.5}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 40}
"""


IMAGES = np.zeros((2, 1, 8, 8), np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Conditional flows of digits, of points and of latents, an unconditional one of points; briefly trained."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "autoencoder.yaml").write_text(AUTOENCODER)
    texts = {"digits": DIGITS, "points": TWO_BLOCKS, "plain": POINTS, "latent": LATENT}
    found = {}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
        more = ["budget.steps=40", "model.init_args.training.ema.decay=0.5"] if name == "digits" else []
        overrides = [f"run.dir={folder / name}", "evaluator=null", *more]
        found[name] = Experiment.from_files([folder / f"{name}.yaml"], overrides)
        with pytest.MonkeyPatch.context() as patch:  # a process of its own takes ten seconds to start
            patch.setattr(
                "flowbench.commands.prerequisites.run_child", lambda command, log, environment: main(command[3:])
            )
            runs.fit(found[name])
    return found


def predicted(experiment, folder, **options) -> tuple[dict[str, np.ndarray], dict]:
    task = options["task"]
    assert runs.predict(experiment, output=folder, **options) == folder
    written = sorted(path.name for path in folder.iterdir())
    assert written == sorted([f"{task}.npz", f"{task}.png", "manifest.json"])
    picture = np.asarray(Image.open(folder / f"{task}.png").convert("L"))
    assert picture.std() > 10
    assert min(picture.shape) > 100
    return dict(np.load(folder / f"{task}.npz")), json.loads((folder / "manifest.json").read_text())


def check_manifest(manifest, experiment, task, number):
    assert manifest["task"] == task
    assert manifest["checkpoint"] == str(experiment.run_dir / "checkpoints" / "last.ckpt")
    assert manifest["config_hash"] == experiment.fingerprint
    assert manifest["num_samples"] == number
    assert manifest["seed"] == experiment.seed
    assert manifest["seconds"] > 0
    assert manifest["network_evaluations"] > 0
    assert set(OPTIONS[task]) <= set(manifest)
    assert all(set(entry) == {"value", "unit"} for entry in manifest.get("results", {}).values())


def test_reconstruct(trained, tmp_path):
    arrays, manifest = predicted(trained["digits"], tmp_path, task="reconstruct", num_samples=5)
    check_manifest(manifest, trained["digits"], "reconstruct", 5)
    data = trained["digits"].build_data()
    assert (arrays["original"] == data.uint8_images("test", slice(5)).numpy()).all()
    assert (arrays["x"] == arrays["original"]).all()
    assert arrays["label"].tolist() == data.split("test").label[:5].tolist()
    results = manifest["results"]
    assert 0 < results["largest_flow_error"]["value"] < 1e-4
    assert results["largest_flow_error"]["value"] == pytest.approx(float(arrays["flow_error"].max()))
    assert results["equal_pixels"]["value"] == 1
    assert "autoencoder_psnr" not in results
    assert manifest["network_evaluations"] == 2


def test_reconstruct_latents(trained, tmp_path):
    """The flow is exact in its own space; what is lost is the autoencoder's."""
    arrays, manifest = predicted(trained["latent"], tmp_path, task="reconstruct", num_samples=6, split="val")
    results = manifest["results"]
    assert results["largest_flow_error"] == {"value": pytest.approx(0, abs=1e-3), "unit": "scaled latent units"}
    assert results["largest_data_error"]["value"] > 0.05
    assert 5 < results["autoencoder_psnr"]["value"] < 40
    assert manifest["split"] == "val"
    assert (arrays["original"] == trained["latent"].build_data().uint8_images("val", slice(6)).numpy()).all()


def test_edit(trained, tmp_path):
    arrays, manifest = predicted(trained["digits"], tmp_path, task="edit", num_samples=4)
    check_manifest(manifest, trained["digits"], "edit", 4)
    assert arrays["x"].shape == (4, 10, 1, 8, 8)
    assert manifest["classes"] == list(range(10))
    assert manifest["guidance"] == 1.0
    # Under its own class an image comes back; under others something else does.
    own = arrays["x"][np.arange(4), arrays["label"]]
    assert (own == arrays["original"]).all()
    other = arrays["x"][np.arange(4), (arrays["label"] + 1) % 10]
    assert (other != arrays["original"]).any()
    assert manifest["network_evaluations"] == pytest.approx(1.1)


def test_edit_to_named_classes_with_guidance(trained, tmp_path):
    plain, _ = predicted(trained["digits"], tmp_path / "a", task="edit", num_samples=3, classes=(7, 2))
    guided, manifest = predicted(
        trained["digits"], tmp_path / "b", task="edit", num_samples=3, classes=(7, 2), guidance=4.0
    )
    assert plain["classes"].tolist() == [7, 2]
    assert plain["x"].shape == (3, 2, 1, 8, 8)
    assert (plain["x"] != guided["x"]).any()
    assert manifest["guidance"] == 4.0


def test_edited_pixels_come_from_a_file(trained, tmp_path):
    """The samples of one prediction are the images of the next."""
    first = runs.predict(trained["digits"], output=tmp_path / "samples", num_samples=12)
    arrays = dict(np.load(first / "samples.npz"))
    arrays["x"][0, 0, 2:4, 2:4] = 255
    np.savez(tmp_path / "mine.npz", **arrays)
    found, manifest = predicted(
        trained["digits"], tmp_path / "out", task="edit", images=tmp_path / "mine.npz", num_samples=12
    )
    assert (found["original"] == arrays["x"]).all()
    assert (found["x"][np.arange(12), arrays["label"]] == arrays["x"]).all()
    assert manifest["images"] == str(tmp_path / "mine.npz")
    assert "split" not in manifest


def test_interpolate(trained, tmp_path):
    arrays, manifest = predicted(trained["digits"], tmp_path, task="interpolate", num_samples=3, steps=5)
    check_manifest(manifest, trained["digits"], "interpolate", 3)
    images = trained["digits"].build_data().uint8_images("test", slice(6)).numpy()
    assert arrays["x"].shape == (3, 5, 1, 8, 8)
    assert (arrays["x"][:, 0] == images[0::2]).all()
    assert (arrays["x"][:, -1] == images[1::2]).all()
    assert (arrays["first"] == images[0::2]).all()
    assert arrays["label"].shape == (3, 2)
    norms = arrays["noise_norm"]
    assert norms.shape == (3, 5)
    assert (norms >= norms[:, [0, -1]].min(1, keepdims=True) - 1e-3).all()
    assert manifest["results"]["typical_noise_norm"]["value"] == 8


@pytest.mark.parametrize("name", ["digits", "latent"])
def test_inpaint(trained, tmp_path, name):
    arrays, manifest = predicted(trained[name], tmp_path, task="inpaint", num_samples=4, mask="left", rounds=2, draws=2)
    check_manifest(manifest, trained[name], "inpaint", 4)
    assert arrays["x"].shape == (4, 2, 1, 8, 8)
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :4] = True
    assert (arrays["mask"] == mask).all()
    assert (arrays["x"][..., ~mask] == arrays["original"][:, None][..., ~mask]).all()
    assert (arrays["x"][:, 0] != arrays["x"][:, 1]).any()
    assert manifest["network_evaluations"] == 5
    assert manifest["results"]["unknown_share"]["value"] == 0.5
    assert manifest["results"]["known_value_drift"]["value"] > 0
    assert "not a draw from the exact conditional" in manifest["method"]


def test_inpaint_with_a_mask_from_a_file(trained, tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[2:5, 3:6] = 255
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    arrays, _ = predicted(
        trained["digits"], tmp_path / "out", task="inpaint", num_samples=2, mask=str(tmp_path / "hole.png"), draws=1
    )
    assert (arrays["mask"] == (pixels > 0)).all()


def test_classify(trained, tmp_path):
    arrays, manifest = predicted(trained["digits"], tmp_path, task="classify", num_samples=60)
    check_manifest(manifest, trained["digits"], "classify", 60)
    label = trained["digits"].build_data().split("test").label[:60].numpy()
    assert (arrays["label"] == label).all()
    np.testing.assert_allclose(np.exp(arrays["log_posterior"]).sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(np.diff(arrays["log_posterior"], axis=1), np.diff(arrays["log_prob"], axis=1), atol=1e-6)
    assert (arrays["predicted"] == arrays["log_posterior"].argmax(1)).all()
    results = {name: entry["value"] for name, entry in manifest["results"].items()}
    assert results["accuracy"] == pytest.approx((arrays["predicted"] == label).mean())
    assert results["accuracy_low"] < results["accuracy"] < results["accuracy_high"]
    assert results["mean_log_posterior"] == pytest.approx(arrays["log_posterior"][np.arange(60), label].mean())
    assert results["number"] == 60
    assert manifest["likelihood"] == "exact"


def test_classify_takes_the_whole_split_and_the_prior_of_the_training_split(trained, tmp_path):
    uniform, manifest = predicted(trained["points"], tmp_path / "a", task="classify", num_samples=30)
    trained_prior, _ = predicted(trained["points"], tmp_path / "b", task="classify", num_samples=30, prior="train")
    label = trained["points"].build_data().split("train").label
    prior = np.log(np.bincount(label.numpy()) / len(label))
    difference = trained_prior["log_posterior"] - uniform["log_posterior"]
    np.testing.assert_allclose(np.diff(difference, axis=1), np.diff(prior)[None].repeat(30, 0), atol=1e-9)
    assert manifest["num_samples"] == 30
    whole, _ = predicted(trained["digits"], tmp_path / "c", task="classify", split="val")
    assert len(whole["predicted"]) == len(trained["digits"].build_data().split("val"))


@pytest.mark.parametrize("task", ["reconstruct", "interpolate", "inpaint"])
@pytest.mark.parametrize("name", ["points", slow("plain")])
def test_points_have_pictures_too(trained, tmp_path, name, task):
    options = {"mask": "right"} if task == "inpaint" else {}
    arrays, manifest = predicted(trained[name], tmp_path, task=task, num_samples=20, **options)
    check_manifest(manifest, trained[name], task, 20)
    assert arrays["x"].dtype == np.float32
    if task == "inpaint":
        assert (arrays["x"][:, :, 0] == arrays["original"][:, None, 0]).all()


def test_points_are_edited(trained, tmp_path):
    arrays, _ = predicted(trained["points"], tmp_path, task="edit", num_samples=20)
    assert arrays["x"].shape == (20, 2, 2)


def test_the_default_folder_is_named_by_the_task(trained):
    run = trained["digits"]
    assert runs.predict(run, task="reconstruct", num_samples=2) == run.run_dir / "reconstruct"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("digits", {"task": "dream"}, "unknown task 'dream': choose one of sample, reconstruct"),
        (
            "digits",
            {"task": "sample", "rounds": 3},
            "--rounds does not apply to --task sample, which takes --num",
        ),
        ("digits", {"task": "inpaint", "guidance": 2.0}, "--guidance does not apply to --task inpaint"),
        ("digits", {"task": "inpaint", "rounds": 0}, "--rounds must be a whole number in .*, got 0"),
        ("digits", {"task": "interpolate", "steps": 1}, "--steps must be a whole number in .*, got 1"),
        ("digits", {"task": "inpaint", "mask": "middle"}, "unknown mask 'middle'"),
        ("digits", {"task": "classify", "prior": "flat"}, "--prior must be one of uniform, train, got 'flat'"),
        ("digits", {"task": "edit", "classes": (3, 10)}, r"--classes must lie in 0\.\.9, got 10"),
        ("digits", {"task": "reconstruct", "split": "all"}, "split: must be one of"),
        ("digits", {"task": "interpolate", "num_samples": 300}, "the split test has 360 samples, .* wants 600"),
        ("digits", {"task": "reconstruct", "images": "none.npz"}, "there is no file at none.npz"),
        ("digits", {"task": "reconstruct", "images": "a", "split": "val"}, "leave out --split or --images"),
        ("plain", {"task": "edit"}, "edit needs a flow that knows classes"),
        ("plain", {"task": "classify"}, "classify needs a flow that knows classes"),
        ("plain", {"task": "inpaint", "mask": "top"}, "for points"),
    ],
)
def test_bad_requests_are_refused_in_one_line_and_leave_nothing(trained, tmp_path, name, options, expected):
    if "images" in options:
        options = {**options, "images": type(tmp_path)(options["images"])}
    with pytest.raises(ValueError, match=expected) as caught:
        runs.predict(trained[name], output=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"y": np.zeros(3)}, r"needs an array x of shape \(N, 1, 8, 8\), got none"),
        ({"x": np.zeros((2, 1, 4, 4), np.uint8)}, r"got \(2, 1, 4, 4\)"),
        ({"x": np.zeros((2, 1, 8, 8), np.float32)}, "must be uint8, got float32"),
        ({"x": IMAGES, "label": np.zeros(3, int)}, r"2 integers, got int64 of shape \(3,\)"),
        ({"x": IMAGES, "label": np.full(2, 1.7)}, r"must be 2 integers, got float64"),
        ({"x": np.zeros((0, 1, 8, 8), np.uint8)}, "is empty"),
        ({"x": np.zeros((12, 1, 8, 8), np.uint8)}, "has no array label"),
        ({"x": np.zeros((2, 1, 8, 8), np.uint8), "label": np.array([0, 11])}, r"must lie in 0\.\.9, got 0\.\.11"),
        ({"x": IMAGES, "label": np.array([0, -1])}, r"must lie in 0\.\.9, got -1\.\.0"),
        ({"x": IMAGES, "label": np.array([0, 2**63], np.uint64)}, r"must lie in 0\.\.9, got 0\.\.9223372036854775808"),
        ({"x": IMAGES, "label": np.array([True, False])}, r"must be 2 integers, got bool"),
        ({"x": IMAGES, "label": np.array(["a", "b"])}, r"must be 2 integers, got <U1"),
        ({"x": IMAGES, "label": np.array(3)}, r"must be 2 integers, got int64 of shape \(\)"),
        ({"x": np.full((2, 1, 8, 8), "a")}, "must be uint8, got <U1"),
        ({"x": np.zeros((2, 1, 8, 8), np.int64)}, "must be uint8, got int64"),
        ({"x": np.zeros((2, 1, 8, 8), bool)}, "must be uint8, got bool"),
        ({"x": np.uint8(3)}, r"got \(\)"),
        (
            {"x": np.full((2, 1, 8, 8), 16, np.uint8)},
            r"holds 16, but the 17 grey levels of digits are written as 0, 15",
        ),
        ({"x": np.array([None, None])}, "cannot be read as npz"),
        (None, "cannot be read as npz"),
    ],
)
def test_files_that_do_not_fit(trained, tmp_path, arrays, expected):
    file = tmp_path / "mine.npz"
    if arrays is None:
        file.write_text("no archive")
    else:
        np.savez(file, **arrays)
    number = 8 if arrays is None or np.shape(arrays.get("x", ()))[:1] > (2,) else 2
    with pytest.raises(ValueError, match=expected) as caught:
        runs.predict(trained["digits"], output=tmp_path / "out", task="edit", images=file, num_samples=number)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.nan, "must be finite, but 1 of 4 samples hold NaN or infinity, first sample 2"),
        (np.inf, "must be finite, but 1 of 4 samples hold NaN or infinity, first sample 2"),
        (-np.inf, "must be finite"),
    ],
)
@pytest.mark.parametrize("task", ["reconstruct", "interpolate", "inpaint"])
def test_points_of_a_file_must_be_numbers(trained, tmp_path, value, expected, task):
    points = np.zeros((4, 2), np.float32)
    points[2, 1] = value
    np.savez(tmp_path / "mine.npz", x=points)
    mask = {"mask": "left"} if task == "inpaint" else {}
    options = {"task": task, "images": tmp_path / "mine.npz", "num_samples": 2, **mask}
    with pytest.raises(ValueError, match=expected):
        runs.predict(trained["points"], output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["float64", ">f4", "float16", "int64", "bool"])
def test_points_of_a_file_are_of_one_type(trained, tmp_path, kind):
    np.savez(tmp_path / "mine.npz", x=np.zeros((4, 2), kind))
    options = {"task": "reconstruct", "images": tmp_path / "mine.npz", "num_samples": 2}
    with pytest.raises(ValueError, match="must be float32, got"):
        runs.predict(trained["points"], output=tmp_path / "out", **options)


def poisoned(run, folder, name: str) -> Path:
    """A run's checkpoint with one weight that is no number."""
    state = torch.load(run.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    for weights in (state["state_dict"], state["ema"]["shadow"]):
        key = next(key for key in weights if name in key)
        weights[key].view(-1)[0] = float("nan")
    torch.save(state, folder / "poisoned.ckpt")
    return folder / "poisoned.ckpt"


@pytest.mark.parametrize(("name", "task"), [("digits", "sample"), ("points", "sample"), ("points", "reconstruct")])
def test_a_diverged_training_is_said_to_be_so(trained, tmp_path, name, task):
    run = trained[name]
    path = poisoned(run, tmp_path, "weight")
    with pytest.raises(ValueError, match=rf"the training behind {path} diverged: \S+weight\S* holds NaN or infinity"):
        runs.predict(run, path, task=task, num_samples=2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("digits", "nan"), ("points", "nan"), ("points", "inf")])
def test_samples_that_are_no_numbers_are_counted(trained, tmp_path, capsys, monkeypatch, name, value):
    """One of three, and then all of them."""
    inner = type(runs._trained(trained[name], None)[0].module).sample

    def diverged(count):
        def sample(module, *given, **options):
            drawn = inner(module, *given, **options)
            drawn.x[:count] = float(value)
            return drawn

        return sample

    with monkeypatch.context() as patch:
        patch.setattr("flowbench.families.FlowModule.sample", diverged(1))
        runs.predict(trained[name], num_samples=3, output=tmp_path / "one")
        assert capsys.readouterr().err == "1 of 3 results are NaN or infinity\n"
        assert json.loads((tmp_path / "one" / "manifest.json").read_text())["diverged"] == 1
        if name == "digits":
            x = np.load(tmp_path / "one" / "samples.npz")["x"]
            assert (x[0] == 0).all()
            assert x[1:].any()
        patch.setattr("flowbench.families.FlowModule.sample", diverged(3))
        with pytest.raises(ValueError, match="all 3 results are NaN or infinity: the flow diverges under this sampler"):
            runs.predict(trained[name], num_samples=3, output=tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_the_command_line_refuses_in_one_line(trained, capsys):
    config = str(trained["digits"].run_dir / "config.yaml")
    assert main(["predict", "-c", config, "--task", "classify", "--mask", "left"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--mask does not apply to --task classify, which takes --num-samples, --split, --images, --prior" in said


def test_the_command_line_does_a_task(trained, tmp_path, capsys):
    config = str(trained["digits"].run_dir / "config.yaml")
    words = ["--task", "inpaint", "--mask", "random-0.5", "--rounds", "1", "--num-samples", "2"]
    assert main(["predict", "-c", config, *words, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip().endswith("out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["mask"] == "random-0.5"


def test_every_option_belongs_to_a_task():
    names = {name for options in OPTIONS.values() for name in options} | {"task"}
    assert names == set(Request.__dataclass_fields__)


def test_grey_levels_of_any_number_survive_the_way_through_a_file():
    from flowbench.commands.prediction.input import _from_uint8
    from flowbench.data import DataSpec

    for levels in (2, 3, 17, 100, 200, 255, 256):
        spec = DataSpec("grid", "1", (1, 1, levels), levels=levels)
        pixels = spec.grid_to_uint8(torch.arange(levels, dtype=torch.uint8).view(1, 1, 1, levels))
        assert torch.equal(spec.to_uint8(_from_uint8(pixels, spec, 0)), pixels)
    smooth = DataSpec("smooth", "1", (1, 1, 256))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    assert torch.equal(smooth.to_uint8(_from_uint8(pixels, smooth, 0)), pixels)


def test_the_cost_is_the_mean_over_batches_of_unequal_size():
    """An inverse that chooses by batch size, or a solver that adapts, has a cost of its own for each."""
    batches = [FlowSamples(torch.zeros(n, 2), cost) for n, cost in ((3, 1.0), (1, 11.0))]
    assert _cost(batches) == 3.5
    assert _cost([*batches, FlowSamples(torch.zeros(1, 2), None)]) is None


def test_a_flow_without_a_null_label_does_not_fill_in_unlabelled_images(trained, tmp_path):
    np.savez(tmp_path / "images.npz", x=IMAGES)
    run = trained["digits"]
    experiment = Experiment.from_files(
        [run.run_dir / "config.yaml"], ["model.init_args.conditional=true", "model.init_args.label_dropout=0.0"]
    )
    options = {"task": "inpaint", "images": tmp_path / "images.npz", "num_samples": 2, "mask": "left"}
    with pytest.raises(ValueError, match="knows no null label"):
        # Away from its configuration, which would be found to be another one.
        alone = shutil.copy(run.run_dir / "checkpoints" / "last.ckpt", tmp_path / "alone.ckpt")
        runs.predict(experiment, Path(alone), output=tmp_path / "out", **options)


def test_a_certificate_stands_in_the_manifest(trained, tmp_path):
    run = trained["digits"]
    inverse = "model.init_args.inverse.class_path=flowbench.flows.JacobiInverse"
    experiment = Experiment.from_files([run.run_dir / "config.yaml"], [inverse])
    checkpoint = run.run_dir / "checkpoints" / "last.ckpt"
    runs.predict(experiment, checkpoint, task="sample", num_samples=3, output=tmp_path)
    results = json.loads((tmp_path / "manifest.json").read_text())["results"]
    assert 0 < results["largest_residual"]["value"] <= 1e-3
    assert results["iterations_block_0"]["value"] >= 1
