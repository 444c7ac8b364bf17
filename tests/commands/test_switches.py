"""Every switch of the base class through fit, test and predict, for an autoregressive and for a matching flow."""

from __future__ import annotations

import inspect

import pytest
import torch

from flowbench.commands import runs
from flowbench.core.rows import read_rows
from flowbench.families import FlowModule
from tests.marks import slow

from .conftest import DIGITS, POINTS

FEW = ["evaluator.num_samples=12", "evaluator.num_trajectories=4", "evaluator.trajectory_points=3", "budget.steps=2"]
FEW += ["data.eval_batch_size=6", "trainer.limit_test_batches=1", "trainer.limit_val_batches=1", "data.batch_size=8"]
STRAIGHT = ["evaluator.metrics.straightness.class_path=flowbench.tasks.generation.PathStraightness"]

NOISE = "model.init_args.augmentation={class_path: flowbench.families.GaussianNoise, init_args: {std: 0.2}}"
LEARNED = "model.init_args.denoiser={class_path: flowbench.families.FlowScoreDenoiser, init_args: {%s}}"
KINDS: dict[str, tuple[str, list[str]]] = {
    "autoregressive": (DIGITS, []),
    "tweedie": (DIGITS, [NOISE, "model.init_args.denoiser.class_path=flowbench.families.Tweedie"]),
    "score matching": (
        DIGITS,
        [NOISE, LEARNED % "width: 16, depth: 1, head_dim: 8", "model.init_args.latent_norm=0.01"],
    ),
    "checkpointing": (DIGITS, ["model.init_args.checkpoint_every=1"]),
    "matching, exact divergence": (POINTS, []),
    "matching, probes": (POINTS, ["model.init_args.divergence.class_path=flowbench.flows.HutchinsonDivergence"]),
    "matching, adaptive": (
        POINTS,
        ["model.init_args.likelihood_solver={class_path: flowbench.flows.DormandPrince, init_args: {rtol: 0.1}}"],
    ),
}
SWITCHES = {
    "conditional": "true",
    "label_dropout": "0.0",
    "sampling_source": "{class_path: flowbench.flows.GaussianSource, init_args: {std: 0.5}}",
    "training": "{optimizer: {lr: 1.0e-3, schedule: constant}, ema: {decay: 0.0}, compile: true}",
}


def test_every_switch_of_the_base_class_is_here():
    given = set(inspect.signature(FlowModule.__init__).parameters) - {"self", "spec", "space"}  # latents: test_starflow
    assert set(SWITCHES) == given


@pytest.fixture
def quick_compiler(monkeypatch):
    """The compiler without its code generation: what it cannot differentiate it cannot here either."""
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run_everything(experiment, text: str, *overrides: str) -> tuple[dict, dict]:
    """Fit and test in one process, then each command by itself.

    Returns:
        What the test after the training measured, and what the test by itself did.
    """

    def again():
        return experiment(text, *FEW, *STRAIGHT, *overrides)

    first = measured(runs.fit(again(), test=True))
    second = measured(runs.test(again()))
    assert {"nll", "straightness"} <= {metric for metric, _ in first}
    for task in ("sample", "reconstruct"):
        assert (runs.predict(again(), task=task, num_samples=2) / "manifest.json").is_file()
    return first, second


def measured(folder) -> dict[tuple[str, str], float | None]:
    rows = read_rows(folder / "rows.jsonl")
    assert all(row.status == "ok" for row in rows)
    return {(row.metric, row.protocol): row.value for row in rows if row.protocol != "cost"}


@pytest.mark.parametrize("kind", ["autoregressive", slow("matching, exact divergence")])
def test_all_switches_together_go_through_fit_test_and_predict(kind, experiment, quick_compiler):
    text, overrides = KINDS[kind]
    first, second = run_everything(
        experiment, text, *overrides, *(f"model.init_args.{name}={v}" for name, v in SWITCHES.items())
    )
    assert first == second


@pytest.mark.slow
def test_a_compiled_flow_that_is_differentiated_twice_goes_through_fit_test_and_predict(experiment, quick_compiler):
    text, overrides = KINDS["score matching"]
    first, second = run_everything(experiment, text, *overrides, "model.init_args.training.compile=true")
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_networks_compiled_in_earnest_go_through_fit_test_and_predict(kind, experiment):
    """Code is generated, and buffers are given up that only one backward pass may read."""
    torch.compiler.reset()
    text, overrides = KINDS[kind]
    first, second = run_everything(experiment, text, *overrides, "model.init_args.training.compile=true")
    assert first == second
