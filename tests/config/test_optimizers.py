"""An optimiser in an experiment file: AdamW by its fields, any by its class."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbench.config import ConfigError, Experiment
from flowbench.training import SGD, SWAN, AdamW, OptimizerSettings, SinkGD

FILE = Path(__file__).parents[2] / "experiments" / "digits" / "tarflow.yaml"
ADAMW = AdamW(lr=3e-3, schedule="constant")


def built(*overrides: str) -> OptimizerSettings:
    return Experiment.from_files([FILE], list(overrides)).build().model.optimizer_config


def named(cls: str, arguments: str = "{}") -> str:
    return f"model.init_args.optimizer={{_replace_: true, class_path: {cls}, init_args: {arguments}}}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.init_args.optimizer={lr: 3.0e-3, schedule: constant}", ADAMW),
        ("model.init_args.optimizer=null", AdamW()),
        (named("flowbench.training.AdamW", "{lr: 3.0e-3, schedule: constant}"), ADAMW),
        (named("flowbench.training.OptimizerConfig", "{lr: 3.0e-3, schedule: constant}"), ADAMW),
        (named("flowbench.families.OptimizerConfig", "{lr: 3.0e-3, schedule: constant}"), ADAMW),
        (named("flowbench.training.SinkGD"), SinkGD()),
        (named("flowbench.training.SinkGD", "{lr: 0.01, iterations: 1}"), SinkGD(lr=0.01, iterations=1)),
        (named("flowbench.training.SWAN", "{alpha: 0.2, weight_decay: 0.1}"), SWAN(alpha=0.2, weight_decay=0.1)),
        (named("flowbench.training.SGD", "{betas: [0.5, 0.9]}"), SGD(betas=(0.5, 0.9))),
    ],
)
def test_an_optimiser_is_built_from_its_fields_or_its_class(override, expected):
    assert built(override) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_args.optimizer.lrr=1",
         "model.init_args.optimizer: AdamW does not accept 'lrr'; did you mean 'lr'?"),
        ("model.init_args.optimizer.lr=fast",
         "model.init_args.optimizer.lr: AdamW expects float, got 'fast' (str)"),
        (named("flowbench.training.SinkGD", "{lrr: 1}"),
         "model.init_args.optimizer.init_args: SinkGD does not accept 'lrr'; did you mean 'lr'?"),
        (named("flowbench.training.SWAN", "{iterations: 0}"),
         "optimizer.iterations must be a whole number in [1, 100], got 0: try 15"),
        (named("flowbench.training.MatrixSettings"),
         "model.init_args.optimizer.class_path: MatrixSettings is abstract, it lacks direction"),
        (named("flowbench.flows.Euler", "{num_steps: 3}"),
         "model.init_args.optimizer.class_path: flowbench.flows.Euler is not a OptimizerSettings"),
    ],
)  # fmt: skip
def test_a_slip_costs_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        built(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
