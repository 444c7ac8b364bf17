"""Differences between two configurations, as text, and those that trained weights depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flowbench.config.compose import significant

__all__ = ["Difference", "describe", "differences", "of_budget", "of_weights"]

_SHOWN = 4
_LONGEST = 60
_BUDGET = ("budget", "trainer.max_steps")
# What a run can be measured with in another way than it was trained: neither weights nor counted costs depend on it.
_MEASURING = (
    "evaluator",
    "data.eval_batch_size",
    "trainer.accelerator",
    "trainer.benchmark",
    "trainer.check_val_every_n_epoch",
    "trainer.detect_anomaly",
    "trainer.deterministic",
    "trainer.devices",
    "trainer.enable_checkpointing",
    "trainer.fast_dev_run",
    "trainer.inference_mode",
    "trainer.limit_predict_batches",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.num_nodes",
    "trainer.num_sanity_val_steps",
    "trainer.plugins",
    "trainer.precision",
    "trainer.strategy",
    "trainer.val_check_interval",
)


class _Absent:
    def __str__(self) -> str:
        return "(not set)"


_ABSENT = _Absent()


@dataclass(frozen=True)
class _File:
    """A file of the user's: equal to others of its content, whatever their names."""

    name: str
    content: str

    def __str__(self) -> str:
        return self.content


@dataclass(frozen=True)
class Difference:
    """One key with its two values.

    Attributes:
        key: dotted.
        before: in the first configuration.
        now: in the second.
    """

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {_text(self.before)} -> {_text(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Keys in which two resolved configurations differ, without those that change no number.

    Of an object of another class only the class is named: its arguments have other meanings.
    """
    return list(_differing("", _comparable(before), _comparable(now)))


def _comparable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a configuration and of what it requires that change a result; files enter by their content."""
    files = resolved.get("files") or {}
    kept = {k: v if k == "requires" else _named(v, files) for k, v in significant(resolved).items() if k != "files"}
    if isinstance(kept.get("requires"), Mapping):
        kept["requires"] = {name: _comparable(inner) for name, inner in kept["requires"].items()}
    return kept


def _named(value: Any, files: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _File(value, files[value]) if value in files else value
    if isinstance(value, Mapping):
        return {key: _named(item, files) for key, item in value.items()}
    return [_named(item, files) for item in value] if isinstance(value, list) else value


def _differing(key: str, before: Any, now: Any) -> Iterator[Difference]:
    if _exact(before) == _exact(now):
        return
    one, other = _entries(before), _entries(now)
    if one is None or other is None:
        yield Difference(key, before, now)
    elif one.get("class_path") != other.get("class_path"):
        yield Difference(key, one.get("class_path", before), other.get("class_path", now))
    else:
        for name in dict.fromkeys((*one, *other)):
            path = f"{key}.{name}" if key else str(name)
            yield from _differing(path, one.get(name, _ABSENT), other.get(name, _ABSENT))


def _exact(value: Any) -> str:
    """As fingerprints see it: 1, 1.0 and true are three values."""
    return json.dumps(value, sort_keys=True, default=str)


def _entries(value: Any) -> Mapping[str, Any] | None:
    """The entries of a mapping, none where there is nothing, None for a single value."""
    return {} if value is _ABSENT else value if isinstance(value, Mapping) else None


def describe(found: Iterable[Difference]) -> str:
    """Differences in one line, the first of them by name."""
    texts = [str(difference) for difference in found]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"{', '.join(texts[:_SHOWN])}{more}"


def of_budget(difference: Difference) -> bool:
    """Whether it is one of how long is trained, and nothing else."""
    return _is_below(difference.key, _BUDGET)


def of_weights(difference: Difference, sampling: Iterable[str]) -> bool:
    """Whether weights, or what they cost, depend on it.

    Args:
        difference: one.
        sampling: arguments of the model that only change how it is sampled.
    """
    own = tuple(f"model.init_args.{name}" for name in sampling)
    return not _is_below(difference.key, (*_MEASURING, *own))


def _is_below(key: str, roots: Iterable[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _text(value: Any) -> str:
    if isinstance(value, _File):
        return f"{value.name} (content {value.content})"
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
