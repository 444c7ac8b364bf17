"""Which arguments of Lightning's Trainer an experiment file may set, their ranges, and where the others belong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.core.checks import check_count, check_counts, check_number

__all__ = ["check_trainer", "check_trainer_numbers"]

_ELSEWHERE = {"callbacks": "callbacks", "callback": "callbacks", "logger": "loggers", "loggers": "loggers"}
# Arguments that change nothing here or end a training that still has a budget, the values that change nothing, and
# what to do instead.
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": ((None, -1), "the training loader is endless; say budget.epochs={value} or trainer.max_steps=N"),
    "min_epochs": ((None,), "the training loader is endless; leave it out"),
    "min_steps": ((None,), "a budget is spent to its end; leave it out"),
    "max_time": ((None,), "a training ends with its budget; say budget.train_seconds=N"),
    "overfit_batches": ((None, 0), "the training loader is endless; train on a small npz instead"),
    "default_root_dir": ((None,), "a run has its own folder; say run.dir=PATH"),
    "enable_checkpointing": ((None, True), "a run goes on from its checkpoints; leave it out"),
    "inference_mode": ((False,), "likelihoods of continuous flows need gradients; leave it out"),
    "barebones": ((False,), "it leaves out checkpoints and loggers; leave it out"),
}
_DURATION = re.compile(r"\d+:\d{2}:\d{2}:\d{2}")
_DEVICES = re.compile(r"auto|-1|\d+(,\d+)*,?")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse the Trainer arguments that have another place in an experiment file, or would have no effect.

    Raises:
        ConfigError: one line with the argument, the value and what to write instead.
    """
    for name, value in trainer.items():
        if name in _ELSEWHERE:
            section = _ELSEWHERE[name]
            raise ConfigError(
                f"trainer.{name} is not read; name each one at the top level: "
                f"{section}: {{my_name: {{class_path: ..., init_args: {{...}}}}}}"
            )
        nothing, remedy = _WITHOUT_EFFECT.get(name, ((value,), ""))
        if value not in nothing or (isinstance(value, bool) and not any(value is other for other in nothing)):
            raise ConfigError(f"trainer.{name}={value} has no meaning here, {remedy.format(value=value)}")


def check_trainer_numbers(trainer: Mapping[str, Any]) -> None:
    """Refuse numbers that Lightning's Trainer would refuse after minutes, or take for something else in silence.

    Args:
        trainer: arguments of the right types; those that are None keep their default.

    Raises:
        ConfigError: one line with the argument, its range, the value and what to do.
    """
    given = {name: value for name, value in trainer.items() if value is not None}
    try:
        for name, check in _CHECKS.items():
            if name in given:
                check(f"trainer.{name}", given[name])
        _check_epochs(given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_max_steps(name: str, value: object) -> None:
    if value != -1:
        check_count(name, value, at_most=10**18, hint="-1 leaves the limit to budget")


def _check_fast_dev_run(name: str, value: object) -> None:
    if not isinstance(value, bool):
        check_count(name, value, at_least=0, hint="batches of a trial run")


def _check_devices(name: str, value: object) -> None:
    hint = "how many, -1 for all, a list of indices, or auto"
    if isinstance(value, str):
        if not _DEVICES.fullmatch(value.replace(" ", "")) or value.strip() == "0":
            raise ConfigError(f"{name} must be {hint}, got {value!r}")
    elif isinstance(value, list | tuple):
        check_counts(name, value, at_least=0, at_most=10**6, hint=hint)
        if len(set(value)) < len(value):
            raise ConfigError(f"{name} must be distinct indices, got {value!r}")
    elif value != -1 or isinstance(value, bool):
        check_count(name, value, at_most=10**6, hint=hint)


def _check_share(name: str, value: object) -> None:
    """Batches of an evaluation: a number of them, or with a decimal point a share."""
    if isinstance(value, float):
        check_number(name, value, at_least=0, at_most=1, hint="with a decimal point it is a share of the batches")
    else:
        check_count(name, value, at_least=0, hint="without a decimal point it is a number of batches")


def _check_test_batches(name: str, value: object) -> None:
    _check_share(name, value)
    if value == 0:
        raise ConfigError(f"{name} must be above 0, got {value!r}: without a test nothing is measured")


def _check_train_batches(name: str, value: object) -> None:
    if not (isinstance(value, float) and value == 1):
        check_count(name, value, hint="a number of batches; the training loader is endless and has no share")


def _check_interval(name: str, value: object) -> None:
    if isinstance(value, Mapping):
        for unit, amount in value.items():
            check_number(f"{name}.{unit}", amount, above=0)
    elif isinstance(value, float):
        check_number(name, value, above=0, at_most=1, hint="with a decimal point it is a share of limit_train_batches")
    elif not isinstance(value, str):
        check_count(name, value, hint="a number of batches")
    elif not _DURATION.fullmatch(value):
        raise ConfigError(f"{name} must be a number of batches or a time as DD:HH:MM:SS, got {value!r}")


def _check_clip(name: str, value: object) -> None:
    check_number(name, value, at_least=0, hint="null is no clipping")


_CHECKS = {
    "max_steps": _check_max_steps,
    "fast_dev_run": _check_fast_dev_run,
    "devices": _check_devices,
    "num_nodes": lambda name, value: check_count(name, value, at_most=10**6),
    "accumulate_grad_batches": lambda name, value: check_count(name, value, hint="1 is none"),
    "gradient_clip_val": _check_clip,
    "limit_train_batches": _check_train_batches,
    "limit_val_batches": _check_share,
    "limit_test_batches": _check_test_batches,
    "limit_predict_batches": _check_share,
    "val_check_interval": _check_interval,
    "check_val_every_n_epoch": lambda name, value: check_count(name, value),
    "num_sanity_val_steps": lambda name, value: check_count(name, value, at_least=-1, hint="-1 is all"),
    "log_every_n_steps": lambda name, value: check_count(name, value, at_least=0, hint="0 is never"),
    "reload_dataloaders_every_n_epochs": lambda name, value: check_count(name, value, at_least=0, hint="0 is never"),
}


def _check_epochs(given: Mapping[str, Any]) -> None:
    """Refuse arguments that count epochs unless ``limit_train_batches=N`` ends them."""
    length = given.get("limit_train_batches")
    has_end = isinstance(length, int)
    interval, every = given.get("val_check_interval"), given.get("check_val_every_n_epoch")
    if isinstance(interval, float) and not (has_end and every):
        raise ConfigError(
            f"trainer.val_check_interval must be a whole number of batches, got {interval!r}: the training loader is "
            "endless and has no share, unless limit_train_batches=N and check_val_every_n_epoch=1 make it one"
        )
    if every is not None and every > 1 and not has_end:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch must be 1, got {every!r}: the first epoch never ends; "
            "say val_check_interval=N, or limit_train_batches=N"
        )
    accumulated = given.get("accumulate_grad_batches", 1)
    if isinstance(length, int) and length % accumulated:
        raise ConfigError(
            f"trainer.limit_train_batches must be a multiple of accumulate_grad_batches={accumulated}, got {length}: "
            "the last step of an epoch would be taken on fewer"
        )
