"""Classes that somebody derived from flowbench's: what is missing in them is named when they are built, what their
methods return is checked where it is first used."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABCMeta

import pytest
import torch

import flowbench
from flowbench.cli import main
from flowbench.commands import runs
from flowbench.commands.declared_metrics import declared_metrics
from flowbench.config import Experiment
from flowbench.core.contract import ContractError, missing_parts
from flowbench.core.rows import read_rows
from flowbench.data import Batch, FlowDataModule
from flowbench.families import Autoencoder, Condition, FlowMatching, FlowModule, FlowSamples, PixelSpace
from flowbench.families.family_contract import Case, check_family
from flowbench.families.zero_shot import reconstruct
from flowbench.flows import Coupling, FixedStepSolver, UniformWeight
from flowbench.networks import KLAutoencoder
from flowbench.tasks.anomaly.probes import Scores
from flowbench.training import Loss, TrainingModule

from ..training.test_training import trainer
from . import outside as dummies
from .builders import IMAGES, POINTS
from .outside import PARTS, Shift, outside

EXPERIMENT = """
data: {dataset: eight_gaussians, batch_size: 32}
model: {class_path: tests.contract.outside.Mine}
trainer: {accelerator: cpu, devices: 1, limit_test_batches: 1, limit_val_batches: 1}
budget: {steps: 2}
evaluator:
  reference: val
  num_samples: 20
  num_trajectories: 4
  metrics:
    w2: {class_path: flowbench.evaluation.Wasserstein2}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    straightness: {class_path: flowbench.tasks.generation.PathStraightness}
"""


def classes() -> list[type]:
    """All classes of flowbench."""
    names = [module.name for module in pkgutil.walk_packages(flowbench.__path__, "flowbench.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return sorted((cls for cls in found if cls.__module__.startswith("flowbench.")), key=lambda cls: cls.__qualname__)


def abstract_parts(cls: type) -> set[str]:
    return {name for name in dir(cls) if getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False)}


BASES = [cls for cls in classes() if abstract_parts(cls)]


def test_the_bases_that_users_derive_from_are_found():
    assert {FlowModule, TrainingModule, Coupling, FixedStepSolver} <= set(BASES)
    assert len(BASES) > 25


@pytest.mark.parametrize("base", BASES, ids=lambda cls: cls.__name__)
def test_no_class_is_built_without_a_part_and_what_it_lacks_is_named(base):
    """What is only marked as abstract, in a class that is not built as one, would be found when it is called."""
    assert isinstance(base, ABCMeta)
    wanted = abstract_parts(base)
    mine = type("Mine", (base,), {})
    assert missing_parts(mine) == sorted(wanted)
    with pytest.raises(TypeError, match="abstract class Mine") as caught:
        mine()
    assert all(name in str(caught.value) for name in wanted)


@pytest.mark.parametrize("part", PARTS)
def test_a_family_without_a_part_is_refused_in_one_line_before_anything_is_trained(part, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dummies, "Mine", outside(**{part: None}), raising=False)
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    assert main(["fit", "-c", str(tmp_path / "mine.yaml"), f"run.dir={tmp_path / 'run'}", "--test"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("flowbench: error: model.class_path: Mine is abstract, it lacks")
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match=part):
        outside(**{part: None})(POINTS)


def test_all_parts_that_are_missing_are_named_at_once():
    assert missing_parts(Shift) == sorted(PARTS)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_family_with_all_parts_is_trained_measured_and_sampled(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(dummies, "Mine", outside(), raising=False)
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    overrides = [f"run.dir={tmp_path / 'run'}", f"model.init_args.training.compile={str(compiled).lower()}"]
    experiment = Experiment.from_files([tmp_path / "mine.yaml"], overrides)
    runs.fit(experiment, test=True)
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert {"w2", "nll", "straightness"} <= {row.metric for row in rows}
    assert all(row.status == "ok" for row in rows)
    assert runs.predict(experiment, num_samples=3).is_dir()


def without_density():
    """A family that is trained by something else than a likelihood."""
    refused = lambda self, *_: pytest.fail("a density was asked for")  # noqa: E731
    error = lambda self, points, *_: Loss((points - self.shift).square().mean())  # noqa: E731
    return outside(density="none", flow_log_prob=refused, loss=error)


def test_a_family_without_a_density_has_all_rows_but_those_of_its_likelihood(tmp_path, monkeypatch):
    monkeypatch.setattr(dummies, "Mine", without_density(), raising=False)
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    experiment = Experiment.from_files([tmp_path / "mine.yaml"], [f"run.dir={tmp_path / 'run'}"])
    declared = declared_metrics(experiment)
    assert "nll" not in declared[""].main
    assert "nll" in declared["gaussian"].main, "who has a density keeps its row"
    runs.fit(experiment, test=True)
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    own = {row.metric for row in rows if row.family == "Mine"}
    assert "nll" not in own
    assert {"w2", "straightness"} <= own
    assert all(row.status == "ok" for row in rows)


def test_a_density_that_does_not_exist_is_refused_in_one_line():
    flow = without_density()(POINTS)
    assert flow.describe().likelihood == "none"
    for ask in (flow.check_density, lambda: flow.log_prob(torch.zeros(3, 2))):
        with pytest.raises(ValueError, match=r"^samples of Mine have no density: take out what needs"):
            ask()
    with pytest.raises(ValueError, match="samples of Mine have no density"):
        Scores().check(flow, FlowDataModule("one_class_digits_0"))


def test_checks_of_a_density_do_not_apply_where_there_is_none():
    outcomes = {o.name: o.status for o in check_family(Case(lambda: without_density()(POINTS), POINTS))}
    apart = {"density", "jacobian", "mass", "inverse", "precision"}
    assert {name for name, status in outcomes.items() if status == "inapplicable"} == apart
    assert {status for name, status in outcomes.items() if name not in apart} == {"ok"}


@pytest.mark.parametrize("density", ["Exact", "bound", "", None, 3, True])
def test_a_density_of_no_kind_is_refused_when_the_flow_is_built(density):
    mine = outside()
    mine.density = density
    with pytest.raises(ContractError, match=r"Mine\.density must be 'exact', 'ode' or 'none', got ") as caught:
        mine(POINTS)
    assert repr(density) in str(caught.value)


X = torch.zeros(4, 2)
SAMPLE = {
    "a tensor": lambda self, noise, *_: noise,
    "a pair": lambda self, noise, *_: (noise, 1.0),
    "nothing": lambda self, noise, *_: None,
    "too many points": lambda self, noise, *_: FlowSamples(torch.cat([noise, noise]), 1.0),
}
DENSITIES = {
    "per dimension": lambda self, x, *_: x,
    "a mean": lambda self, x, *_: x.mean(),
    "a number": lambda self, x, *_: 3.0,
    "nothing": lambda self, x, *_: None,
}
CALLS = {
    "loss": (
        {"a tensor": lambda self, x, *_: x.mean(), "nothing": lambda self, *_: None},
        lambda flow: flow.training_loss(Batch(X), torch.Generator()),
    ),
    "flow_sample": (SAMPLE, lambda flow: flow.sample(X)),
    "flow_encode": (
        {"a pair": lambda self, z, _: (z, 1.0), "one row": lambda self, z, _: z[:1]},
        lambda flow: flow.encode(X),
    ),
    "flow_log_prob": (DENSITIES, lambda flow: flow.log_prob(X)),
}


@pytest.mark.parametrize("old", ["flow_loss", "batch_loss"])
def test_a_part_of_an_earlier_contract_is_refused_and_not_ignored(old):
    with pytest.raises(ContractError, match=rf"Mine defines {old}, which is never called: define loss\(points"):
        outside(**{old: lambda self, *_: None})


def test_pairs_of_points_and_cost_are_refused_wherever_samples_are_drawn():
    flow = outside(flow_sample=lambda self, noise, *_: (noise, 1.0))(POINTS).eval()
    for call in (lambda: flow.sample(X), lambda: flow.flow_decode(X, Condition()), lambda: reconstruct(flow, X)):
        with pytest.raises(ContractError, match=r"Mine\.flow_sample must return a FlowSamples, got tuple"):
            call()


@pytest.mark.parametrize(
    ("part", "kind"), [(part, kind) for part, (wrong, _) in CALLS.items() for kind in wrong], ids=str
)
def test_what_a_method_should_not_return_is_refused_in_one_line_that_names_it(part, kind):
    wrong, call = CALLS[part]
    with pytest.raises(ContractError, match=rf"^Mine\.{part} must return ") as caught:
        call(outside(**{part: wrong[kind]})(POINTS))
    assert "\n" not in str(caught.value)


class WrongSpace(PixelSpace):
    def encode(self, x, generator):
        return x[:, :1]


class WrongWeight(UniformWeight):
    def forward(self, x0, x1):
        return super().forward(x0, x1).weight


class WrongNetwork(torch.nn.Module):
    """One velocity for all dimensions: it would be broadcast over them without a word."""

    def __init__(self, shape, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, t, label=None):
        return self.linear(x)


class Short(Coupling):
    def _pair(self, x0, x1, generator, condition):
        return torch.zeros(len(x1) - 1, dtype=torch.int64)


class Real(Coupling):
    def _pair(self, x0, x1, generator, condition):
        return torch.zeros(len(x1))


class WrongAutoencoder(KLAutoencoder):
    def decode(self, z):
        return super().decode(z)[:, :, :2]


def right_network(shape, num_classes):
    network = WrongNetwork(shape, num_classes)
    network.linear = torch.nn.Linear(2, 2)
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching(POINTS, right_network, space=WrongSpace((2,))), r"WrongSpace\.encode must return shape"),
        (lambda: FlowMatching(POINTS, right_network, weight=WrongWeight()), r"WrongWeight\.forward must return a Wei"),
        (lambda: FlowMatching(POINTS, WrongNetwork), r"WrongNetwork\.forward must return shape \(4, 2\), got \(4, 1\)"),
        (lambda: FlowMatching(POINTS, right_network, coupling=Short()), r"Short\._pair must return shape \(4,\)"),
        (lambda: FlowMatching(POINTS, right_network, coupling=Real()), r"Real\._pair must return int64 indices"),
        (
            lambda: Autoencoder(IMAGES, lambda shape: WrongAutoencoder(shape, latent_channels=2, width=8)),
            r"WrongAutoencoder\.decode must return shape \(4, 1, 4, 4\), got \(4, 1, 2, 4\)",
        ),
    ],
    ids=["space", "weight", "network", "coupling", "real coupling", "autoencoder"],
)
def test_parts_that_return_something_else_are_named(make, message):
    module = make()
    batch = Batch(torch.zeros(4, *module.spec.shape))
    with pytest.raises(ContractError, match=message) as caught:
        module.training_loss(batch, torch.Generator())
    assert "\n" not in str(caught.value)


def test_a_module_that_is_no_flow_is_checked_by_its_trainer(tmp_path):
    mine = type("Mine", (TrainingModule,), {"training_loss": lambda self, batch, rng: self.weight.sum()})(POINTS)
    mine.weight = torch.nn.Parameter(torch.ones(2))
    loader = torch.utils.data.DataLoader([Batch(X)], batch_size=None)
    with pytest.raises(ContractError, match=r"^Mine\.training_loss must return a Loss, got Tensor$"):
        trainer(tmp_path).fit(mine, loader)
