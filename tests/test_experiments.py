"""Every file in experiments/ is parsed, built and run for one step; a new file joins by itself.

Those in experiments/large/ are too large to run: they are built on the meta device and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.commands import runs
from flowbench.commands.counting import count
from flowbench.config import Experiment
from flowbench.core.rows import read_rows
from flowbench.data.catalogue import list_datasets
from flowbench.evaluation import CostReport, cache_dir
from flowbench.training import read_checkpoint

ROOT = Path(__file__).parent.parent / "experiments"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml"))


@cache
def parsed(file: Path) -> dict:
    return yaml.safe_load((ROOT / file).read_text())


def content(file: Path) -> dict:
    """What a file says, for the caller to change."""
    return copy.deepcopy(parsed(file))


def bases(file: Path) -> set[Path]:
    found = {
        (ROOT / file.parent / base).resolve().relative_to(ROOT.resolve()) for base in content(file).get("base", [])
    }
    return found | {deeper for base in found for deeper in bases(base)}


def is_whole(file: Path) -> bool:
    """A whole experiment names a class and a data set, itself or in the files that it is based on."""
    parts = [content(part) for part in (file, *bases(file))]
    return any("class_path" in part.get("model", {}) for part in parts) and any(
        "dataset" in part.get("data", {}) for part in parts
    )


BENCHES = [file for file in FILES if "contenders" in content(file)]
EXPERIMENTS = [file for file in FILES if file not in BENCHES and is_whole(file)]
PUBLISHED = [file for file in EXPERIMENTS if file.parts[0] == "large"]
TRAINED = [file for file in EXPERIMENTS if file not in PUBLISHED]
DOWNLOADED = {entry.name: entry.spec.shape for entry in list_datasets() if entry.download_mb}
# One step is enough, of the required autoencoder too. Precision, clipping and optimiser are those that are shipped.
SHORT = ["trainer.limit_val_batches=1", "trainer.accelerator=cpu", "data.batch_size=4"]
# The smallest that each class builds from the shipped options: every other option keeps its value.
SMALLEST = {
    "flowbench.networks.UNet": {"channels": 8, "num_res_blocks": 1, "num_heads": 1},
    "flowbench.networks.DiT": {"depth": 1},
    "flowbench.networks.HybridDiT": {"depth": 1},
    "flowbench.networks.KLAutoencoder": {"width": 8, "num_res_blocks": 1},
    "flowbench.families.BiFlow": {"depth": 1},
    "flowbench.families.Reflow": {"num_pairs": 64},
    "flowbench.families.TARFlow": {"layers": [1, 1]},
    "flowbench.families.STARFlow": {"deep_layers": 1, "shallow_blocks": 1, "shallow_layers": 1},
}


@cache
def shipped(file: Path) -> Experiment:
    """The experiment as it is shipped, composed and validated once for all tests that look at it."""
    return Experiment.from_files([ROOT / file])


@pytest.fixture(scope="session")
def images(shared_folder) -> dict[str, Path]:
    """A few images of noise in the shape of each data set that would have to be fetched."""
    folder = shared_folder / "images"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            for shape in set(DOWNLOADED.values()):
                values = np.random.default_rng(0).integers(0, 256, (200, *shape), dtype=np.uint8)
                np.savez(folder / f"{shape}.npz", x=values, y=np.arange(200) % 10)
    # Equal shapes share a file, and with it an autoencoder.
    return {name: folder / f"{shape}.npz" for name, shape in DOWNLOADED.items()}


def smallest(model: dict[str, Any], key: str = "model") -> list[str]:
    """Overrides that shrink a model and the networks in its arguments."""
    found = [f"{key}.init_args.{name}={value}" for name, value in SMALLEST.get(model["class_path"], {}).items()]
    for name, value in (model.get("init_args") or {}).items():
        if isinstance(value, dict) and "class_path" in value:
            found += smallest(value, f"{key}.init_args.{name}")
    return found


def required(experiment: Experiment, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The experiment and all that it requires, with what stands before their keys."""
    yield prefix, experiment.resolved
    for name, needed in experiment.requirements.items():
        yield from required(needed, f"{prefix}requires.{name}.")


def quick(file: Path, images: dict[str, Path]) -> list[str]:
    """Overrides that make an experiment a matter of a second: one step, small networks, noise for missing data."""
    found = ["budget=null", "trainer.max_steps=1"]
    whole = dict(required(shipped(file)))
    found += [f"{prefix}budget.steps=1" for prefix in whole if prefix]
    for prefix, resolved in whole.items():
        found += [prefix + text for text in (*SHORT, *smallest(resolved["model"]))]
        found += [f"{prefix}data.group_size=2"] * (resolved["data"].get("group_size", 1) > 1)
        if (name := resolved["data"]["dataset"]) in images:
            found += [f"{prefix}data.dataset=npz", f"{prefix}data.path={images[name]}"]
            found += [f"{prefix}data.{key}=false" for key in ("random_flip", "train_on_val") if key in resolved["data"]]
    return found


def prepare(experiment: Experiment, folder: Path) -> None:
    """Train what is required where `flowbench prepare` looks for it, without the seconds that a new process takes."""
    for name, needed in experiment.requirements.items():
        prepare(needed, folder)
        trained = (cache_dir() / f"{name}-{needed.fingerprint}").resolve()
        with FileLock(f"{trained}.test.lock"):
            if not trained.exists():
                needed.write(folder / "required.yaml")
                runs.fit(Experiment.from_files([folder / "required.yaml"], [f"run.dir={trained}"]))


def sweep_of(file: Path) -> list[int]:
    """The budgets of network evaluations that a bench asks of this experiment."""
    asked = {n for b in BENCHES if str(file) in content(b)["contenders"].values() for n in _swept(b)}
    return sorted(asked)


def _swept(bench: Path) -> list[int]:
    return content(bench).get("sweep", {}).get("network_evaluations", [])


def test_the_benches_ask_for_few_evaluations_too():
    assert sweep_of(Path("toy/cfm.yaml")) == sweep_of(Path("digits/wcfm.yaml")) == [1, 2, 4, 8, 16, 32]
    assert min(sweep_of(Path("cifar10/gpu/cfm.yaml")), default=99) <= 2


def test_every_file_is_an_experiment_a_bench_or_part_of_one():
    assert len(EXPERIMENTS) >= 14
    assert len(BENCHES) >= 3
    parts = {part for file in EXPERIMENTS for part in bases(file)}
    assert set(FILES) == set(EXPERIMENTS) | set(BENCHES) | parts


def test_every_family_has_a_file_for_images_at_both_sizes():
    families = {
        f"{name}.yaml" for name in ("tarflow", "starflow", "cfm", "ot_cfm", "wcfm", "latent_cfm", "autoencoder")
    }
    for folder in (Path("images", "tiny"), Path("images", "gpu"), Path("cifar10", "gpu")):
        assert {file.name for file in EXPERIMENTS if file.parent == folder} >= families


@pytest.mark.parametrize("size", ["", "_gpu"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_bench_trains_its_contenders_and_what_they_require_on_its_own_images(name, size):
    plan = make_plan(ROOT / f"families_{name}{size}.yaml")
    data = [inner["data"] for whole in plan.experiments.values() for inner in every(whole)]
    assert {section["dataset"] for section in data} == {name}
    assert {section.get("random_flip", False) for section in data} == {name == "cifar10"}


def every(resolved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A resolved experiment and all that it requires."""
    yield resolved
    for needed in (resolved.get("requires") or {}).values():
        yield from every(needed)


# Fingerprints of cells when each data set still had files of its own: finished ones are not run again. Those of
# families_fashion_mnist and of the benches for a GPU are measured in more ways since then, and are.
EARLIER_CELLS = {
    ("families_mnist", "mnist", "cfm"): "ed8d53f86aae",
    ("families_mnist", "mnist", "starflow"): "f3d7acbfaa35",
    ("families_cifar10", "cifar10", "latent_cfm"): "ec6cb36340ba",
    ("denoisers_mnist", "mnist", "latent_decoder"): "68b5a07487cb",
}


def test_cells_that_were_finished_before_data_sets_shared_their_files_are_recognised():
    found = {}
    for bench in {bench for bench, _, _ in EARLIER_CELLS}:
        for cell in reversed(make_plan(ROOT / f"{bench}.yaml").cells):
            found[bench, cell.problem, cell.contender] = cell.config_hash
    assert EARLIER_CELLS.items() <= found.items()


def named(files: list[Path], *slow: str) -> list:
    """Parameters of a test; files in the folders `slow` are left to the slow run."""
    late = {file for folder in slow for file in files if file.is_relative_to(folder)}
    return [pytest.param(file, marks=[pytest.mark.slow] * (file in late), id=str(file)) for file in files]


# Of the files for a GPU, an autoregressive and a matching flow step in their own precision in every run.
SLOW_STEPS = [
    f"images/gpu/{name}.yaml"
    for name in (
        "cfm", "ot_cfm", "starflow", "latent_cfm", "autoencoder", "autoencoder_finetuned",
    )
]  # fmt: skip
# What the digits have in the same words, and the bench of Fashion-MNIST rehearses.
SLOW_STEPS += [
    f"images/tiny/{name}.yaml"
    for name in (
        "latent_cfm", "latent_cfm_conditional", "latent_cfm_inpaint", "latent_cfm_semantic", "ot_cfm", "starflow_noisy",
        "tarflow_likelihood", "wcfm",
    )
]  # fmt: skip
SLOW_STEPS += [
    f"images/tiny/{name}.yaml" for name in ("autoencoder", "autoencoder_finetuned", "cfm", "starflow", "tarflow")
]
# What toy/ has of another data set, what its unconditional file says of all classes, and what differs in a number.
SLOW_STEPS += [
    f"digits/{name}.yaml"
    for name in (
        "reflow1", "reflow2", "reflow_distilled", "ot_cfm_ahead", "cfm_conditional", "tarflow_conditional",
        "latent_cfm_conditional",
    )
]  # fmt: skip
SLOW_STEPS += [f"source_simulation/{name}.yaml" for name in ("cfm", "ot_cfm", "density_coarse", "directional", "tight")]
SLOW_STEPS += [f"toy/{name}.yaml" for name in ("reflow2", "moons_to_eight_gaussians")]
# What differs from a file that steps in every run in its budget, its teacher or a number, and flow maps of the plane.
SLOW_STEPS += ["digits/few_step", "toy/few_step"]
SLOW_STEPS += [
    f"digits/{name}.yaml"
    for name in (
        "arflow_single", "autoencoder_constant_std_01", "autoencoder_constant_std_03", "autoencoder_constant_std_07",
        "biflow_conditional", "biflow_denoising", "biflow_end_loss", "soflow_conditional", "starflow_constant_std",
        "tarflow_noisy", "tarflow_to_invert", "autoencoder_finetuned", "latent_cfm_semantic",
    )
]  # fmt: skip
SLOW_STEPS += ["anomaly/tarflow.yaml", "toy/reflow_distilled.yaml"]
SLOW_STEPS += [
    f"toy/{name}.yaml"
    for name in ("semidiscrete", "progressive", "shortcut", "lagrangian", "meanflow", "consistency", "soflow_distilled")
]
# Many tasks of a kind that another bench has, or other data alone.
SLOW_BENCHES = [
    f"{name}.yaml"
    for name in (
        "wcfm_2d", "sources_2d", "wcfm_images", "wcfm_epsilon", "pruned_sampling", "ot_batch", "families_mnist",
        "families_mnist_gpu", "families_fashion_mnist_gpu", "families_cifar10", "families_cifar10_minutes",
        "denoisers_mnist", "likelihood_images", "likelihood_steps", "anomaly_digits", "families_cifar10_gpu",
        "optimizers_digits", "simflow", "noise_conditioned", "learned_inverse", "arflow_time", "objectives_digits",
        "few_step_2d", "few_step_digits", "starflow_ablation", "arflow", "toy_2d", "families_fashion_mnist",
        "seed_axes_digits", "hours_digits", "raag_few_step",
    )
]  # fmt: skip


# A fine-tuned decoder starts from weights, and there are none to copy on the meta device.
LARGE = [file for file in EXPERIMENTS if file.parent.name == "gpu" and "finetuned" not in file.name]


# The files for CIFAR-10 differ from those for smaller images in sizes alone. Every file of a bench, those for a GPU
# included, is rehearsed by the bench's dry run below.
@pytest.mark.parametrize("file", named(TRAINED, "cifar10", *SLOW_STEPS))
def test_an_experiment_is_parsed_built_and_trained_for_a_step(file, tmp_path, images):
    overrides = [f"run.dir={tmp_path / 'run'}", *quick(file, images)]
    evaluator = shipped(file).build_evaluator()
    if evaluator is not None:
        # A point of the curve costs thousands of samples; tests/evaluation measures in earnest.
        # What the benches ask of its sampler is checked when training begins.
        overrides += ["evaluator.curve=[]", f"evaluator.sweep.network_evaluations={sweep_of(file)}"]
        overrides += [
            f"evaluator.metrics.{name}=null" for name, metric in evaluator.metrics.items() if metric.extractors
        ]
    experiment = Experiment.from_files([ROOT / file], overrides)
    prepare(experiment, tmp_path)
    runs.fit(experiment)
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 1
    tensors = [value for value in state["state_dict"].values() if torch.is_tensor(value)]  # what is fitted is none
    assert all(value.isfinite().all() for value in tensors)


def untrained(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Checkpoints of what an experiment requires, as they are before training."""
    found = {}
    for name, needed in experiment.requirements.items():
        module = needed.build(untrained(needed, folder / name)).model
        state = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(state)
        folder.mkdir(exist_ok=True)
        found[name] = folder / f"{name}.ckpt"
        torch.save(state, found[name])
    return found


@pytest.mark.filterwarnings("ignore:.*is a no-op")
@pytest.mark.parametrize("file", LARGE, ids=str)
def test_a_large_network_is_built_as_shipped(file, tmp_path):
    """On the meta device, which holds shapes and no numbers."""
    experiment = shipped(file)
    required = untrained(experiment, tmp_path)
    with torch.device("meta"):
        model = experiment.build(required).model
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 1e8
    assert all(parameter.is_meta for parameter in model.parameters())


# Layers of all blocks, width, size as its paper gives it: TARFlow's prints none for these.
SIZES = {
    "tarflow_imagenet64_bpd": (64, 768, None),
    "tarflow_imagenet64": (64, 768, None),
    "tarflow_imagenet128": (64, 1024, None),
    "starflow_imagenet256": (28, 2048, 1.4e9),
    "starflow_imagenet256_24": (34, 3072, 3.8e9),
}


def test_every_published_flow_has_a_size():
    assert {file.stem for file in PUBLISHED} == {*SIZES, "sd_vae"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_published_configuration_has_its_published_size(name):
    """Built on the meta device: no data, no weights, no autoencoder's files."""
    experiment = Experiment.from_files([ROOT / "large" / f"{name}.yaml"])
    found = count(experiment)
    layers, width, published = SIZES[name]
    assert sum(block.layers for block in found.blocks) == layers
    # Twelve width x width matrices a layer; embeddings, positions, classes, norms and biases come on top.
    assert 1.0 < found.parameters / (12 * layers * width**2) < 1.04
    if published:
        assert found.parameters == pytest.approx(published, rel=0.02)
    tokens = 1024
    deepest = max(block.layers for block in found.blocks)
    slots = tokens if name.startswith("starflow") else tokens - 1
    assert found.cache_bytes == 2 * deepest * slots * width * 4
    # Two operations for each weight of a layer and token, and the two products of attention over the full square.
    products = 2 * slots * 12 * layers * width**2 + layers * 2 * 2 * slots**2 * width
    assert found.evaluation_flops == pytest.approx(products, rel=0.01)
    assert found.sampling_flops < found.evaluation_flops < found.training_flops / 3 * 1.001


@pytest.mark.parametrize("file", named(EXPERIMENTS, *SLOW_STEPS))
def test_an_experiment_as_shipped_has_an_end(file):
    experiment = shipped(file)
    experiment.require_budget()
    assert experiment.budget is not None, "a budget travels to any batch size, trainer.max_steps does not"


@pytest.mark.parametrize("file", named(BENCHES, *SLOW_BENCHES))
def test_a_bench_is_planned(file, tmp_path, monkeypatch, capsys):
    """Every cell of it is an experiment, and every claim about a metric that will be there: the dry run sees to it."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "-c", str(ROOT / file), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for name in content(file)["contenders"]:
        assert name in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", named(BENCHES, *SLOW_BENCHES))
def test_every_cost_table_has_the_share_of_the_product_rate(file):
    """It is a column of the table of cost wherever the cost is reported, which every contender of a bench does."""
    assert "flop_utilisation" in {info.name for info in CostReport.declares}
    for (problem, contender), resolved in make_plan(ROOT / file).experiments.items():
        classes = {(metric or {}).get("class_path") for metric in resolved["evaluator"]["metrics"].values()}
        assert "flowbench.evaluation.CostReport" in classes, (problem, contender)


@pytest.mark.slow
@pytest.mark.parametrize("file", BENCHES, ids=str)
def test_every_cell_of_a_bench_is_an_experiment(file, tmp_path):
    """One by one and whole, where a dry run passes over sections that it has seen."""
    plan = make_plan(ROOT / file, [f"run_dir={tmp_path}"])
    first = {(cell.problem, cell.contender): cell for cell in reversed(plan.cells)}
    for cell in first.values():
        cell.directory.mkdir(parents=True, exist_ok=True)
        cell.config_path.write_text(cell.config_text(), encoding="utf-8")
        experiment = Experiment.from_files([cell.config_path])
        assert experiment.resolved == plan.experiments[cell.problem, cell.contender]


# Autoencoders are no flows: nothing of them is measured by the evaluator.
SMALL = [file for file in EXPERIMENTS if not file.stem.startswith("autoencoder") and file.parts[0] in ("toy", "digits")]


@pytest.mark.slow
@pytest.mark.parametrize("file", SMALL, ids=str)
def test_an_experiment_is_measured_with_all_its_metrics(file, tmp_path, images):
    """The shipped metrics on a flow of one step, with few samples; every number is finite."""
    few = ["evaluator.num_samples=60", "evaluator.num_trajectories=20", "evaluator.sweep.network_evaluations=[2,4]"]
    few += ["trainer.limit_test_batches=1", "data.eval_batch_size=50"]
    experiment = Experiment.from_files([ROOT / file], [f"run.dir={tmp_path / 'run'}", *quick(file, images), *few])
    runs.fit(experiment, test=True)
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert all(row.status == "ok" for row in rows)
    expected = {"parameters", "nll", "straightness"}
    if "distilled" in file.stem:  # a field trained at one time only has neither a density nor paths
        expected -= {"nll", "straightness"}
    if "inpaint" in file.stem:  # completions of an image have no density
        expected -= {"nll"}
    assert expected <= {row.metric for row in rows}
    assert any(row.axis for row in rows) == ("tarflow" not in file.stem and "starflow" not in file.stem)
    assert (tmp_path / "run" / "curve.jsonl").is_file()
