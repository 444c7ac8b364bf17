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
    return f"model.init_args.training.optimizer={{_replace_: true, class_path: {cls}, init_args: {arguments}}}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.init_args.training.optimizer={lr: 3.0e-3, schedule: constant}", ADAMW),
        ("model.init_args.training.optimizer=null", AdamW()),
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


def test_averaging_and_compilation_stand_beside_the_optimiser():
    overrides = ["model.init_args.training.ema.decay=0.5", "model.init_args.training.compile=true"]
    module = Experiment.from_files([FILE], overrides).build().model
    assert (module.ema_decay, module.compile_networks, module.optimizer_config.lr) == (0.5, True, 2e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_args.training.ema.decay=1.0", "ema.decay must be a number in [0, 1), got 1.0"),
        ("model.init_args.training.ema=0.9", "model.init_args.training.ema: TrainingConfig expects EMAConfig, got 0.9"),
        ("model.init_args.training=fast",
         "model.init_args.training: TARFlow expects TrainingConfig or null, got 'fast'"),
        ("model.init_args.training.optimiser.lr=1",
         "model.init_args.training: TrainingConfig does not accept 'optimiser'; did you mean 'optimizer'?"),
        (f"model.init_args.training.optimizer={{_replace_: true, class_path: {SGD.__module__}.SGD, lr: 1.0}}",
         "model.init_args.training.optimizer: unknown key 'lr' beside class_path; write "
         "model.init_args.training.optimizer.init_args.lr"),
        ("model.init_args.training.optimizer.lrr=1",
         "model.init_args.training.optimizer: AdamW does not accept 'lrr'; did you mean 'lr'?"),
        ("model.init_args.training.optimizer.lr=fast",
         "model.init_args.training.optimizer.lr: AdamW expects float, got 'fast' (str)"),
        (named("flowbench.training.SinkGD", "{lrr: 1}"),
         "model.init_args.training.optimizer.init_args: SinkGD does not accept 'lrr'; did you mean 'lr'?"),
        (named("flowbench.training.SWAN", "{iterations: 0}"),
         "optimizer.iterations must be a whole number in [1, 100], got 0: try 15"),
        (named("flowbench.training.MatrixSettings"),
         "model.init_args.training.optimizer.class_path: MatrixSettings is abstract, it lacks direction"),
        (named("flowbench.flows.Euler", "{num_steps: 3}"),
         "model.init_args.training.optimizer.class_path: flowbench.flows.Euler is not a OptimizerSettings"),
    ],
)  # fmt: skip
def test_a_slip_costs_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        built(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
