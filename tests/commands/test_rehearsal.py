"""What would be refused in the middle of a run, or after its training, is refused before anything expensive begins."""

from __future__ import annotations

import importlib
import re
import resource

import numpy as np
import pytest
import torch

from flowbench.cli import main
from flowbench.commands import runs
from flowbench.commands.rehearsal import Rehearsal, rehearse
from flowbench.config import Experiment
from flowbench.core.contract import ContractError
from flowbench.data import FlowDataModule
from flowbench.evaluation.sample_metric import SampleMetric

from ..contract import outside as dummies
from ..contract.outside import outside
from .conftest import AUTOENCODER

BASE = """
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network: {class_path: flowbench.networks.DiT, init_args: {width: 16, depth: 1, num_heads: 2, patch_size: 4}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 2}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 2}
evaluator:
  num_samples: 20
  metrics:
    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: digits-cnn}}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    straightness: {class_path: flowbench.tasks.generation.PathStraightness}
"""
LATENT = """
base: [base.yaml]
model:
  class_path: flowbench.families.LatentCFM
  init_args: {network: {init_args: {patch_size: 1}}}
requires: {autoencoder: autoencoder.yaml}
"""
STARFLOW = """
base: [base.yaml]
model:
  _replace_: true
  class_path: flowbench.families.STARFlow
  init_args: {width: 16, head_dim: 8, deep_layers: 1, shallow_blocks: 1, shallow_layers: 1}
requires: {autoencoder: autoencoder.yaml}
"""
TINY = """
base: [autoencoder.yaml]
data: {dataset: cifar10}
model: {init_args: {network: {_replace_: true, class_path: flowbench.networks.TinyAutoencoder}}}
"""
NFM = """
base: [base.yaml]
model: {class_path: flowbench.families.NormalizedFlowMatching}
requires: {teacher: teacher.yaml}
"""
TEACHER = """
base: [base.yaml]
model:
  _replace_: true
  class_path: flowbench.families.TARFlow
  init_args: {layers: [1, 1], width: 16, head_dim: 8, patch_size: 4}
evaluator: null
"""
FILES = {
    "base": BASE, "latent": LATENT, "starflow": STARFLOW, "autoencoder": AUTOENCODER, "nfm": NFM, "teacher": TEACHER,
    "tiny": TINY,
}  # fmt: skip
POINTS = ["data.dataset=ring", "model.init_args.network={class_path: flowbench.networks.MLP, init_args: {width: 8}}"]
IDENTITY = "evaluator.metrics.fd.init_args.features=identity"
W2 = "evaluator.metrics.w2.class_path=flowbench.evaluation.Wasserstein2"
CONDITIONER = "model.init_args.conditioner"
CALLBACK = "callbacks.stop={class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: a, mode: up}}"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Experiment files in a folder with a cache of its own: whatever is trained or fetched leaves a trace there."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FLOWBENCH_CACHE", str(cache))
    monkeypatch.setenv("FLOWBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def nothing_happened(folder) -> None:
    for name in ("cache", "data"):
        left = [path for path in folder.glob(f"{name}/**/*") if path.is_file() and path.suffix != ".lock"]
        # What the user's own files hold is noted where it was read.
        assert not [path for path in left if path.parent.name != "contents"]
    assert not (folder / "run").exists()


# What is wrong, in which file, and what is said of it.
MISTAKES = {
    "batch size": ("base", ["data.batch_size=-64"], "batch_size"),
    "data set": ("base", ["data.dataset=digitz"], "unknown name 'digitz'; did you mean 'digits'?"),
    "missing file": ("base", ["data.dataset=npz", "data.path=nowhere.npz"], "'nowhere.npz' does not exist"),
    "samples": ("base", ["evaluator.num_samples=-360"], "num_samples"),
    "curve": ("base", ["evaluator.curve=[fdd]"], "curve names fdd"),
    "patch size": ("base", ["model.init_args.network.init_args.patch_size=3"], "patch_size"),
    "patch of latents": ("starflow", ["model.init_args.patch_size=3"], "patch_size must divide the image size"),
    "network of latents": ("latent", ["model.init_args.network.init_args.patch_size=3"], "patch_size"),
    "requirement": ("latent", ["requires.autoencoder.data.batch_size=-1"], "requires.autoencoder: "),
    "requirement's trainer": (
        "latent",
        ["requires.autoencoder.trainer.precision=64-true"],
        "requires.autoencoder: trainer.precision=64-true",
    ),
    "extractor": (
        "base",
        ["evaluator.metrics.fd.init_args.features=digits-cnnn"],
        "evaluator.metrics.fd: no feature extractor 'digits-cnnn' for the dataset digits: use ",
    ),
    "extractor of points": ("base", POINTS, "evaluator.metrics.fd: no feature extractor 'digits-cnn'"),
    "inception of points": (
        "base",
        [*POINTS, "evaluator.metrics.fd.init_args.features=inception"],
        "no feature extractor 'inception'",
    ),
    "points of images": ("base", [IDENTITY, W2], "evaluator.metrics.w2: w2 compares points, and digits holds images"),
    "modes of images": (
        "base",
        [IDENTITY, "evaluator.metrics.modes.class_path=flowbench.evaluation.ModeRecovery"],
        "evaluator.metrics.modes: ModeRecovery compares points",
    ),
    "accuracy without a classifier": (
        "base",
        [
            "evaluator.metrics.a.class_path=flowbench.evaluation.ClassAccuracy",
            "evaluator.metrics.a.init_args.features=identity",
        ],
        "evaluator.metrics.a: class_accuracy needs a classifier of labelled images",
    ),
    "moments": (
        "base",
        ["evaluator.metrics.fd.init_args.statistics=nowhere.npz"],
        "evaluator.metrics.fd: no feature statistics at nowhere.npz",
    ),
    "validation split": (
        "base",
        ["data.train_on_val=true", "evaluator.held_out=val"],
        "held_out is val, but data.train_on_val trains on it",
    ),
    "odd evaluations": ("base", ["evaluator.sweep.network_evaluations=[3]"], "evaluator.sweep: Midpoint"),
    "evaluations of an adaptive solver": (
        "base",
        [
            "model.init_args.solver={class_path: flowbench.flows.DormandPrince}",
            "evaluator.sweep.network_evaluations=[4]",
        ],
        "evaluator.sweep: DormandPrince",
    ),
    "guided evaluations": (
        "base",
        [
            "model.init_args.conditional=true",
            "model.init_args.guidance={class_path: flowbench.flows.ClassifierFreeGuidance, init_args: {scale: 2.0}}",
            "evaluator.sweep.network_evaluations=[6]",
        ],
        "evaluator.sweep: guided samples of Midpoint",
    ),
    "guidance without a null label": (
        "base",
        ["model.init_args.conditional=true", "model.init_args.label_dropout=0.0", "evaluator.sweep.guidance=[2]"],
        "evaluator.sweep: guidance of scale 2 needs a trained null label",
    ),
    "labels": (
        "base",
        [*POINTS, IDENTITY, "model.init_args.conditional=true"],
        "conditional=true, but ring has no labels",
    ),
    "noise of labels": ("base", [*POINTS, IDENTITY, "data.label_noise=0.1"], "label_noise: ring has no labels"),
    "autoencoder measured": (
        "autoencoder",
        ["evaluator={metrics: {cost: {class_path: flowbench.evaluation.CostReport}}}"],
        "the evaluator measures flows, got Autoencoder",
    ),
    "callback": ("base", [CALLBACK], "mode"),
    "strategy": ("base", ["trainer.strategy=fsdp"], "trainer.strategy=fsdp is not supported"),
    "clipping": ("base", ["trainer.gradient_clip_algorithm=cubic"], "gradient_clip_algorithm"),
    "uneven batch": ("base", ["trainer.devices=3", "data.batch_size=16"], "must be a positive multiple of the 3 proc"),
    "few samples": (
        "base",
        ["trainer.devices=2", "evaluator.num_samples=1"],
        "evaluator.num_samples=1 is too few for 2 processes",
    ),
    "budget": ("latent", ["budget=null", "budget.train_flops=1000"], "does not pay for one step"),
    "budget in samples": ("base", ["budget=null", "budget.samples_seen=3"], "does not pay for one step"),
    "budget in epochs": ("base", ["budget=null", "budget.epochs=1.0e-6"], "does not pay for one step"),
    "source of other points": (
        "base",
        ["model.init_args.source={class_path: flowbench.families.DatasetSource, init_args: {dataset: moons}}"],
        "the source moons has points of shape (2,), the flow wants (1, 8, 8)",
    ),
    "cached latents of mirrored images": (
        "latent",
        ["model.init_args.cache_latents=true", "data.random_flip=true", "data.dataset=cifar10"],
        "cached latents know the images as they are",
    ),
    "cached encodings": (
        "nfm",
        ["model.init_args.cache_encodings=true"],
        "cache_encodings keeps one encoding per training sample, but uniform dequantisation",
    ),
    "teacher of other data": ("nfm", ["requires.teacher.data.dataset=fashion_mnist_mini"], "the teacher"),
    "mask": (
        "base",
        [
            f"{CONDITIONER}.class_path=flowbench.families.InpaintingConditioner",
            f"{CONDITIONER}.init_args.mask=a.png",
            "model.init_args.network.init_args.condition_channels=2",
        ],
        "there is no mask at a.png",
    ),
    "maps that nobody gives": (
        "base",
        [
            f"{CONDITIONER}.class_path=flowbench.families.SemanticConditioner",
            f"{CONDITIONER}.init_args.maps=given",
            "model.init_args.network.init_args.condition_channels=4",
        ],
        "semantic[4 given] takes conditions that the data give: set data.condition to the column that holds them",
    ),
    "no bound": (
        "latent",
        [
            "requires.autoencoder=tiny.yaml",
            "data.dataset=cifar10",
            "evaluator.metrics.fd.init_args.features=cifar10-cnn",
        ],
        "evaluator.metrics.nll: the likelihood bound needs a posterior with a variance",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_met_in_one_line_here_and_for_another_machine(mistake, files, monkeypatch):
    name, overrides, message = MISTAKES[mistake]
    monkeypatch.chdir(files)
    experiment = Experiment.from_files([files / f"{name}.yaml"], [f"run.dir={files / 'run'}", *overrides])
    for here in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Rehearsal(here=here).run(experiment)
        assert "\n" not in str(caught.value)
    nothing_happened(files)


COMMANDS = [["fit", "--dry-run"], ["fit", "--test"], "prepare", "reference", "test", "validate", "predict"]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_meets_it_before_an_autoencoder_is_trained(command, files, capsys):
    verb, *options = [command] if isinstance(command, str) else command
    words = ["-c", str(files / "latent.yaml"), f"run.dir={files / 'run'}", *options]
    assert main([verb, *words, "evaluator.metrics.fd.init_args.features=digits-cnnn"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("flowbench: error: evaluator.metrics.fd: no feature extractor 'digits-cnnn'")
    assert err.count("\n") == 1
    nothing_happened(files)


@pytest.mark.parametrize("name", FILES)
def test_what_is_right_passes_and_leaves_nothing(name, files, capsys):
    assert main(["fit", "-c", str(files / f"{name}.yaml"), "--dry-run"]) == 0
    assert "fingerprint" in capsys.readouterr().out
    nothing_happened(files)


# ---- data -----------------------------------------------------------------------------------------------


def test_data_that_would_have_to_be_fetched_are_known_by_their_entry(files):
    overrides = ["data.dataset=cifar10", "evaluator.metrics.fd.init_args.features=cifar10-cnn"]
    experiment = Experiment.from_files([files / "base.yaml"], overrides)
    assert rehearse(experiment).spec.shape == (3, 32, 32)
    nothing_happened(files)
    with pytest.raises(ValueError, match="patch_size"):
        wrong = [*overrides, "model.init_args.network.init_args.patch_size=5"]
        rehearse(Experiment.from_files([files / "base.yaml"], wrong))


@pytest.fixture
def own(files):
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    np.savez(files / "own.npz", x=x)
    return files, [f"data.path={files / 'own.npz'}", "data.dataset=npz", IDENTITY]


def test_data_of_the_users_own_are_read_once_and_not_at_all_where_they_are_declared(own, monkeypatch):
    files, overrides = own
    opened = []
    inner = FlowDataModule.entry.func
    watched = property(lambda self: opened.append(1) or self.__dict__.setdefault("read", inner(self)))
    monkeypatch.setattr(FlowDataModule, "entry", watched)
    experiment = Experiment.from_files([files / "base.yaml"], overrides)
    data = Rehearsal(here=False).run(experiment)
    assert opened
    assert data.spec.shape == (1, 8, 8)
    opened.clear()
    declared = Experiment.from_files([files / "base.yaml"], [*overrides, "data.shape=[1, 8, 8]"])
    Rehearsal(here=False).run(declared)
    assert not opened
    rehearse(declared)
    assert opened


def test_a_false_declaration_is_met_before_an_autoencoder_is_trained(own, capsys):
    files, overrides = own
    words = ["-c", str(files / "latent.yaml"), f"run.dir={files / 'run'}", *overrides, "data.shape=[1, 16, 16]"]
    assert main(["fit", *words]) == 2
    assert "declare (1, 16, 16)" in capsys.readouterr().err
    nothing_happened(files)


def test_a_run_reads_the_users_data_once(own, monkeypatch):
    files, overrides = own
    calls = []
    monkeypatch.setattr("flowbench.data.user_data.open_user_data", counting(calls, "flowbench.data.user_data"))
    runs.fit(Experiment.from_files([files / "base.yaml"], [*overrides, f"run.dir={files / 'run'}"]))
    assert len(calls) == 1


def counting(calls: list, module: str):
    inner = importlib.import_module(module).open_user_data

    def counted(*given, **options):
        calls.append(given)
        return inner(*given, **options)

    return counted


# ---- classes of the user's own --------------------------------------------------------------------------


def mine(files, monkeypatch, family) -> Experiment:
    monkeypatch.setattr(dummies, "Mine", family, raising=False)
    model = "model: {_replace_: true, class_path: tests.contract.outside.Mine}"
    (files / "mine.yaml").write_text(f"base: [base.yaml]\n{model}")
    return Experiment.from_files([files / "mine.yaml"], [*POINTS[:1], IDENTITY])


def test_a_family_that_looks_at_its_numbers_is_rehearsed_on_the_cpu(files, monkeypatch):
    def loss(self, *given):
        assert self.shift.sum().item() > 0
        return dummies.PARTS["loss"](self, *given)

    def build(self, spec, **options):
        dummies.Shift.__init__(self, spec, **options)
        self.total = float(self.shift.sum())

    rehearse(mine(files, monkeypatch, outside(loss=loss, __init__=build)))


def test_a_family_that_cannot_compute_is_named_before_it_trains(files, monkeypatch):
    def loss(self, x, *given):
        return dummies.PARTS["loss"](self, x @ torch.zeros(3, 3), *given)

    with pytest.raises(
        ValueError, match=r"^Mine cannot be trained on data of shape \(2,\): RuntimeError: mat1 and mat2"
    ):
        rehearse(mine(files, monkeypatch, outside(loss=loss)))
    with pytest.raises(ContractError, match=r"^Mine\.loss must return a Loss, got Tensor"):
        rehearse(mine(files, monkeypatch, outside(loss=lambda self, x, *_: x.sum())))


def test_a_metric_of_the_users_own_may_refuse_data(files, monkeypatch):
    class Refusing(SampleMetric):
        def check(self, dataset, spec):
            raise ValueError(f"no {dataset} of {spec.num_dims} numbers")

        def measure(self, answers):
            return []

    monkeypatch.setattr(dummies, "Refusing", Refusing, raising=False)
    overrides = ["evaluator.metrics.mine.class_path=tests.contract.outside.Refusing"]
    with pytest.raises(ValueError, match=r"^evaluator\.metrics\.mine: no digits of 64 numbers$"):
        rehearse(Experiment.from_files([files / "base.yaml"], overrides))


# ---- what it costs --------------------------------------------------------------------------------------


def test_equal_parts_are_rehearsed_once(files, monkeypatch):
    built = []
    inner = Experiment.build_model

    def build(self, spec, **required):
        built.append(self.resolved["model"]["class_path"].rpartition(".")[2])
        return inner(self, spec, **required)

    monkeypatch.setattr(Experiment, "build_model", build)
    rehearsal = Rehearsal(here=False)
    for name in ("latent", "starflow"):
        rehearsal.run(Experiment.from_files([files / f"{name}.yaml"]))
    # The autoencoder once for itself, and once under each flow.
    assert sorted(built) == ["Autoencoder"] * 3 + ["LatentCFM", "STARFlow"]


def test_no_numbers_are_allocated_for_a_model(files):
    """A model of two terabytes in float32 is rehearsed in the memory at hand."""
    overrides = ["model.init_args.network.init_args.width=65536", "model.init_args.network.init_args.depth=8"]
    experiment = Experiment.from_files([files / "base.yaml"], overrides)
    with torch.device("meta"):
        model = experiment.build_model(experiment.build_data().known_spec)
    assert sum(parameter.numel() for parameter in model.parameters()) > 2.5e11
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rehearse(experiment)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_rehearsal_draws_nothing_from_the_global_generators(files):
    """Initial weights are drawn from them after it."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearse(Experiment.from_files([files / "starflow.yaml"]))
    assert torch.equal(torch.get_rng_state(), before)
