"""What metrics declare of somebody before the training is what they measure of it afterwards, name by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from flowbench import evaluation
from flowbench.config.references import default_references
from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.data.densities import EightGaussians
from flowbench.evaluation import (
    MIND,
    ClassAccuracy,
    ClassifierTwoSample,
    CostReport,
    DensityCoverage,
    Evaluator,
    FrechetDistance,
    FrechetInfinity,
    FrechetRatio,
    KernelDistance,
    MaximumMeanDiscrepancy,
    MeanNorm,
    Memorization,
    Metric,
    ModeRecovery,
    NearestData,
    PrecisionRecall,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.declared import declare
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import SampleMetric
from flowbench.families import (
    Autoencoder,
    InpaintingConditioner,
    LatentCFM,
    SemanticConditioner,
    SemidiscretePairing,
    STARFlow,
)
from flowbench.families.pairing.description import OF_WEIGHT
from flowbench.flows import Midpoint, RungeKutta4
from flowbench.networks import DiT, KLAutoencoder
from flowbench.tasks import generation
from flowbench.tasks.generation import (
    ConditionAgreement,
    FewStepLikelihood,
    Floor,
    LatentBound,
    MapError,
    NegativeLogLikelihood,
    Noise,
    PathStraightness,
    Reconstruction,
    TrainingPairs,
)
from tests.marks import slow

from ..contract.builders import build, perturb
from ..tasks.generation.test_conditions import flow as conditioned
from .evaluator_runs import digits, evaluator, flow, quick, trainer

FEATURES = "identity"


def everything(modality: str) -> dict[str, Metric]:
    """One of every metric class that data of a kind can have, whatever the class; classifiers have a test below."""
    both = [NegativeLogLikelihood(), PathStraightness(), TrainingPairs(64), CostReport(), MeanNorm()]
    both += [KernelDistance(FEATURES), PrecisionRecall(FEATURES), DensityCoverage(FEATURES), Memorization(FEATURES)]
    both += [
        FrechetInfinity(FEATURES),
        FrechetDistance(FEATURES, interval=True),
        FrechetRatio([FEATURES]),
        MIND(FEATURES),
        ConditionAgreement(8),
        LatentBound(8, 1),
        MapError(16),
        FewStepLikelihood(8, mass_points=16),
    ]
    if modality == "vector":
        both += [Wasserstein2(), SlicedWasserstein2(), MaximumMeanDiscrepancy(), NearestData(0.1), ModeRecovery()]
        both += [ClassifierTwoSample()]
    else:
        both += [Reconstruction(FEATURES)]
    return {type(metric).__name__: metric for metric in both}


def unlabelled(name, data):
    """The builders fit to batches with labels; an unconditional flow is the same without."""
    return build(name, replace(data.spec, num_classes=3))


def latent(data, kind):
    torch.manual_seed(0)
    encoder = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8)).eval()
    if kind == "starflow":
        module = STARFlow(data.spec, autoencoder=encoder, width=16, head_dim=8, deep_layers=1)
    else:
        network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2)
        fast = {"solver": Midpoint(num_steps=1), "likelihood_solver": RungeKutta4(num_steps=1)}
        module = LatentCFM(data.spec, network, autoencoder=encoder, **fast)
    perturb(module)
    return module


def own_points(path, labels: bool) -> FlowDataModule:
    """Few points of a few modes: every metric compares with all of them."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 400)
    values = (rng.normal(size=(400, 2)) + 4 * label[:, None]).astype(np.float32)
    np.savez(path / "own.npz", x=values, **({"y": label} if labels else {}))
    return FlowDataModule("npz", path=str(path / "own.npz"), batch_size=16)


def data_of(kind: str, path) -> FlowDataModule:
    return digits() if kind == "digits" else own_points(path, kind == "labelled")


FLOWS = {
    "cfm on points": lambda data: unlabelled("cfm", data),
    "ot_cfm on points": lambda data: unlabelled("ot_cfm", data),
    "wcfm on points": lambda data: unlabelled("wcfm", data),
    "flow map on points": lambda data: unlabelled("map", data),
    "divergence head on points": lambda data: unlabelled("map_head", data),
    "consistency on points": lambda data: unlabelled("map_consistency", data),
    "tarflow on points": lambda data: unlabelled("tarflow", data),
    "conditional cfm on labelled": lambda data: flow("cfm", data, conditional=True),
    "cfm on digits": lambda data: flow("cfm", data),
    "conditional tarflow on digits": lambda data: flow("tarflow", data, conditional=True),
    "starflow on digits": lambda data: latent(data, "starflow"),
    "latent cfm on digits": lambda data: latent(data, "latent_cfm"),
    "inpainting on digits": lambda data: conditioned(data, InpaintingConditioner(), conditional=False),
    "semantic on digits": lambda data: conditioned(data, SemanticConditioner(4), conditional=False),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("flowbench.tasks.generation.references.Mixture.sizes", (1,))
    monkeypatch.setattr("flowbench.tasks.generation.paths.TRANSPORT_POINTS", 50)


# What others have in the same words, of another coupling, objective or data set.
ALIKE = ("ot_cfm on points", "consistency on points", "conditional cfm on labelled", "inpainting on digits")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FLOWS])
def test_a_flow_has_the_metrics_that_were_declared_and_no_others(tmp_path, name):
    data = data_of(name.split(" on ")[1], tmp_path)
    sweep = {"network_evaluations": [2], "guidance": [2.0]}
    measure = evaluator(everything(data.spec.modality), num_samples=40, sweep=sweep)
    module = quick(FLOWS[name](data))
    declared = declare(measure, data, module)[""]
    trainer(tmp_path, measure, limit_test_batches=1).test(module, data, verbose=False)
    rows = read_rows(tmp_path / "rows.jsonl")
    # Of a training that there was none of.
    untrained = {
        "step_milliseconds",
        "flop_utilisation",
        "validation_loss",
        "train_flops",
        "required_flops",
        "train_seconds",
        "samples_seen",
        "preparation_flops",
        "preparation_seconds",
    }
    assert {r.metric for r in rows if not r.axis} == declared.main - untrained
    for axis in ("network_evaluations", "guidance"):
        assert {r.metric for r in rows if r.axis == axis} == declared.swept.get(axis, set())
    known = {info.name for metric in measure.metrics.values() for info in metric.declares}
    assert {r.metric for r in rows} <= known, "every number is declared"


@pytest.mark.parametrize("kind", [slow("points"), "digits", slow("labelled")])
def test_reference_rows_have_the_metrics_that_were_declared(tmp_path, kind):
    data = data_of(kind, tmp_path)
    measure = evaluator(everything(data.spec.modality), num_samples=40)
    declared = declare(measure, data, None)
    found: dict[str, set[str]] = {}
    for row in measure.reference_rows(data):
        found.setdefault(row.contender, set()).add(row.metric)
    assert found == {name: set(names.main) for name, names in declared.items()}


@pytest.mark.parametrize("conditional", [False, True])
def test_accuracy_is_declared_where_samples_have_labels(conditional):
    data, metric = digits(), ClassAccuracy("digits-cnn")
    module = flow("cfm", data, conditional=conditional)
    expected = ("class_accuracy[digits-cnn]",) if conditional else ()
    assert metric.expected(Prospect(data.spec, module)) == expected
    assert metric.expected(Prospect(data.spec, reference=Floor())) == ("class_accuracy[digits-cnn]",)
    assert metric.expected(Prospect(data.spec, reference=Noise())) == ()


def test_every_exported_metric_declares_its_names():
    values = [*vars(evaluation).values(), *vars(generation).values()]
    exported = [v for v in values if isinstance(v, type) and issubclass(v, Metric) and v is not Metric]
    tested = {type(m) for kind in ("image", "vector") for m in everything(kind).values()}
    assert set(exported) == tested | {ClassAccuracy, evaluation.InceptionScore}
    for metric in [*everything("image").values(), *everything("vector").values(), evaluation.InceptionScore()]:
        names = [info.name for info in metric.declares]
        assert names
        assert len(set(names)) == len(names)
        assert set(metric.names) <= set(names)


def few_of_eight_gaussians(path) -> FlowDataModule:
    """2,000 in all: of the 20,000 for training, kernels and matchings would take minutes."""
    x, y = EightGaussians().sample_labelled(2000, torch.Generator().manual_seed(0))
    np.savez(path / "few.npz", x=x.numpy(), y=y.numpy())
    return FlowDataModule("npz", path=str(path / "few.npz"))


@pytest.mark.parametrize("kind", [slow("points"), "digits"])
def test_the_goal_of_a_metric_ranks_held_out_data_before_noise(tmp_path, kind):
    data = digits() if kind == "digits" else few_of_eight_gaussians(tmp_path)
    measure = Evaluator(everything(data.spec.modality), references=default_references(), num_samples=100)
    values: dict[tuple[str, str], float] = {}
    goals = {}
    for row in measure.reference_rows(data):
        values[row.contender, row.metric], goals[row.metric] = row.value, row.goal
    ranked = [
        name for name, goal in goals.items() if goal in ("up", "down") and values.get(("noise", name)) is not None
    ]
    assert len(ranked) > 3
    for name in ranked:
        floor, noise = values["floor", name], values["noise", name]
        assert (floor > noise) if goals[name] == "up" else (floor < noise), name


class Silent(SampleMetric):
    """A user's metric that does not declare its names."""

    in_sweep = True

    def measure(self, answers):
        return []


class Spoken(Silent):
    """One that does."""

    @property
    def names(self):
        return ("mine",)


def test_a_metric_that_declares_nothing_leaves_every_name_open():
    data = digits()
    measure = Evaluator(
        {"mine": Silent(), "fd": FrechetDistance("identity")},
        references=default_references(),
        sweep={"network_evaluations": [2]},
    )
    found = declare(measure, data, flow("cfm", data))
    assert (found[""].main, found[""].swept["network_evaluations"], found["noise"].main) == (None, None, None)
    measure.metrics["mine"] = Spoken()
    assert declare(measure, data, flow("cfm", data))[""].main == {"mine", "fd[identity]"}


def test_names_are_known_of_a_model_that_holds_no_numbers():
    data = digits()
    with torch.device("meta"):
        module = flow("wcfm", data)
    measure = Evaluator(everything("image"), references=default_references())
    assert declare(measure, data, module) == declare(measure, data, flow("wcfm", data))


def test_an_extractor_that_is_chosen_by_the_data_is_declared_by_its_name(tmp_path):
    measure = Evaluator({"fd": FrechetDistance("auto")}, references=default_references())
    assert declare(measure, digits(), None)["floor"].main == {"fd[digits-cnn]"}
    assert declare(measure, own_points(tmp_path, labels=False), None)["floor"].main == {"fd[identity]"}
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "photos.npz", x=rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8))
    photos = FlowDataModule("npz", path=str(tmp_path / "photos.npz"))
    # Weights decide, and a look at a claim must not fetch any.
    assert declare(measure, photos, None)["floor"].main is None


def test_what_training_pairs_declare_is_what_flows_report():
    assert SemidiscretePairing.described == ("chi2",)
    assert {info.name for info in TrainingPairs.declares} == {"cost_ratio", "chi2", *OF_WEIGHT}
