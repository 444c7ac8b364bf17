"""Numbers of Lightning's Trainer in experiment files: what it would refuse or misread is told before anything runs."""

from __future__ import annotations

import inspect
import math
import re
import typing
from typing import Any

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from flowbench.cli import main
from flowbench.config.classes import Arguments
from flowbench.config.errors import ConfigError
from flowbench.config.trainer import check_trainer, check_trainer_numbers

from .conftest import POINTS

BAD: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -3, -0.5, 0.5, 0, 1, 1.0, 7, 1e300, 2**70, True, [0, 0], "many")
# What is right for each argument of the Trainer that takes numbers; everything else of the above is refused.
RIGHT: dict[str, tuple[Any, ...]] = {
    "accumulate_grad_batches": (1, 7),
    "check_val_every_n_epoch": (1,),
    "devices": (1, 7),
    "fast_dev_run": (0, 1, 7, True),
    "gradient_clip_val": (0, 0.5, 1, 1.0, 7),
    "limit_predict_batches": (0, 0.5, 1, 1.0, 7),
    "limit_test_batches": (0.5, 1, 1.0, 7),
    "limit_train_batches": (1, 1.0, 7),
    "limit_val_batches": (0, 0.5, 1, 1.0, 7),
    "log_every_n_steps": (0, 1, 7),
    "max_epochs": (),
    "max_steps": (1, 7),
    "max_time": (),
    "min_epochs": (),
    "min_steps": (),
    "num_nodes": (1, 7),
    "num_sanity_val_steps": (0, 1, 7),
    "overfit_batches": (0,),
    "reload_dataloaders_every_n_epochs": (0, 1, 7),
    "val_check_interval": (1, 7),
}


def takes_numbers(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(takes_numbers(option) for option in typing.get_args(hint))


def check(**trainer: Any) -> None:
    """As an experiment is validated."""
    check_trainer(trainer)
    check_trainer_numbers(Arguments("trainer", L.Trainer, trainer).parsed)


def is_right(name: str, value: Any) -> bool:
    return any(value == right and isinstance(value, bool) == isinstance(right, bool) and type(value) is type(right)
               for right in RIGHT[name])  # fmt: skip


def test_every_argument_that_takes_numbers_is_looked_at() -> None:
    hints = typing.get_type_hints(inspect.unwrap(L.Trainer.__init__))
    numeric = {name for name, hint in hints.items() if takes_numbers(hint)}
    assert numeric - {"precision"} == set(RIGHT), "a new argument of the Trainer needs a range"


@pytest.mark.parametrize("name", RIGHT)
def test_numbers_out_of_range_are_refused_with_name_and_value(name: str) -> None:
    for value in BAD:
        if is_right(name, value):
            check(**{name: value})
            continue
        with pytest.raises(ConfigError) as caught:
            check(**{name: value})
        message = str(caught.value)
        assert "\n" not in message
        assert f"trainer.{name}" in message
        shown = value[0] if isinstance(value, list) else value
        assert repr(shown) in message or str(shown) in message, message


@pytest.mark.parametrize("name", RIGHT)
def test_what_passes_lightning_takes(name: str) -> None:
    """The oracle is the Trainer itself; devices that this machine lacks are no fault of the file."""
    for value in RIGHT[name]:
        beside = (
            {"strategy": "ddp", "accelerator": "cpu"} if name in ("devices", "num_nodes") else {"accelerator": "cpu"}
        )
        if name == "val_check_interval":
            beside["check_val_every_n_epoch"] = None
        try:
            L.Trainer(**{"logger": False, "devices": 1, **beside, name: value})
        except (MisconfigurationException, TypeError, ValueError) as error:
            pytest.fail(f"trainer.{name}={value!r}: {error}")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": "0,x"}, "trainer.devices must be how many"),
        ({"devices": "-2"}, "trainer.devices must be how many"),
        ({"devices": []}, "trainer.devices must be a list"),
        ({"devices": [1, 1]}, "trainer.devices must be distinct"),
        ({"val_check_interval": 0.5}, "trainer.val_check_interval must be a whole number of batches, got 0.5"),
        ({"val_check_interval": {"minutes": -5}}, "trainer.val_check_interval.minutes must be a number"),
        ({"check_val_every_n_epoch": 2}, "trainer.check_val_every_n_epoch must be 1, got 2"),
        (
            {"limit_train_batches": 7, "accumulate_grad_batches": 2},
            "trainer.limit_train_batches must be a multiple of accumulate_grad_batches=2, got 7",
        ),
        ({"max_time": "00:00:10:00"}, r"trainer.max_time=00:00:10:00 has no meaning here.*budget.train_seconds"),
        ({"default_root_dir": "here"}, r"trainer.default_root_dir=here has no meaning here.*run.dir"),
        ({"enable_checkpointing": False}, r"trainer.enable_checkpointing=False has no meaning here"),
        ({"inference_mode": True}, r"trainer.inference_mode=True has no meaning here"),
    ],
)
def test_what_has_no_meaning_says_what_to_write_instead(trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**trainer)


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"devices": "auto", "num_nodes": 2, "accumulate_grad_batches": 4, "gradient_clip_val": None},
        {"devices": "0,1"},
        {"devices": -1, "max_steps": -1, "num_sanity_val_steps": -1},
        {"devices": [0, 2], "max_epochs": -1, "precision": "bf16-mixed"},
        {
            "limit_train_batches": 8,
            "accumulate_grad_batches": 4,
            "val_check_interval": 0.5,
            "check_val_every_n_epoch": 2,
        },
        {"val_check_interval": {"minutes": 5}},
        {"val_check_interval": "00:00:05:00"},
        {"enable_checkpointing": True, "inference_mode": False, "overfit_batches": 0.0},
    ],
)
def test_sensible_settings_pass(trainer: dict[str, Any]) -> None:
    check(**trainer)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.gradient_clip_val=-3", ["trainer.gradient_clip_val", "-3", "null is no clipping"]),
        ("trainer.gradient_clip_val=.nan", ["trainer.gradient_clip_val", "nan"]),
        ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches", "0"]),
        ("trainer.limit_train_batches=0.5", ["trainer.limit_train_batches", "0.5", "endless"]),
        ("trainer.devices=0", ["trainer.devices", "0"]),
        ("seed=-1", ["seed must be a whole number", "-1"]),
        ("seed=36893488147419103232", ["seed must be a whole number", str(2**65)]),
        ("budget.steps=.inf", ["budget.steps must be a number", "inf"]),
    ],
)
def test_the_dry_run_of_a_file_says_so_in_one_line(override: str, words: list[str], tmp_path, capsys) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(POINTS)
    assert main(["fit", "-c", str(file), override, "--dry-run"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert all(word in said[0] for word in words), said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.init_args.training.optimizer.weight_decay=-1"],
            ["optimizer.weight_decay must be a number in [0, 1000]", "-1"],
        ),
        (["model.init_args.training.optimizer.betas=[0.9,1.0]"], [r"optimizer.betas[1]", "1.0"]),
        (["model.init_args.training.optimizer.lr=.nan"], ["optimizer.lr", "nan"]),
        (["data.batch_size=-64"], ["batch_size", "-64"]),
        (["evaluator.num_samples=-360"], ["evaluator.num_samples", "-360"]),
        (
            ["model.init_args.path={class_path: flowbench.flows.SchrodingerBridgePath, init_args: {sigma: 1e300}}"],
            ["sigma must be a number in", "1e+300"],
        ),
        (
            ["model.init_args.coupling={class_path: flowbench.flows.SinkhornCoupling, init_args: {epsilon: 1e-20}}"],
            ["epsilon must be a number in", "1e-20"],
        ),
        (
            [
                "model.init_args.source="
                "{class_path: flowbench.flows.VonMisesFisherSource, init_args: {concentration: .nan}}"
            ],
            ["concentration must be a number in", "nan"],
        ),
    ],
)
def test_a_fit_with_a_number_out_of_range_ends_in_one_line(overrides, words, tmp_path, capsys) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(POINTS)
    assert main(["fit", "-c", str(file), f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowbench: ")]
    assert len(said) == 1, said
    assert all(re.search(re.escape(word), said[0]) for word in words), said
    assert not (tmp_path / "run" / "checkpoints").exists()
