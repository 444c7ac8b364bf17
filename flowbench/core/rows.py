"""Rows: one tidy record per measured number, the only thing that passes from a cell to the bench.

A row names what was measured (bench, problem, contender, family, dataset, seed, metric), the number with everything
that makes it comparable (n, protocol, unit, which value is better, place in a sweep, network evaluations, which
weights), how the measurement ended (status), and the cell's provenance. The file format is JSON Lines. The schema
carries a version: rows of schemas 1 and 2 are read too, later ones are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flowbench.core.earlier_rows import from_earlier
from flowbench.core.storage import write_text

__all__ = [
    "FLOOR_FILE",
    "GOALS",
    "SCHEMA",
    "STATUSES",
    "WEIGHTS",
    "Goal",
    "Row",
    "read_rows",
    "unconverged_text",
    "unmeasured_text",
    "write_rows",
]

SCHEMA = 3
FLOOR_FILE = "floor.jsonl"
"""Rows of held-out data beside a single run's ``rows.jsonl``; a bench has them in the reference's folder."""
Goal = Literal["up", "down", "zero", "none"]
"""Which value of a metric is better: a higher one, a lower one, one nearer to 0, or neither."""
GOALS: tuple[Goal, ...] = get_args(Goal)
STATUSES = ("ok", "failed", "nonfinite", "skipped", "unconverged")
"""How a measurement ended. A value that is `unconverged` was computed, to an error above its metric's tolerance."""
WEIGHTS = ("ema", "raw", "none")

_TYPES: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "bench": (str,),
    "problem": (str,),
    "contender": (str,),
    "family": (str,),
    "dataset": (str,),
    "seed": (int,),
    "metric": (str,),
    "value": (float, int, type(None)),
    "n": (int, type(None)),
    "protocol": (str,),
    "unit": (str,),
    "goal": (str,),
    "group": (str,),
    "axis": (str,),
    "at": (float, int, type(None)),
    "network_evaluations": (float, int, type(None)),
    "guidance": (float, int, type(None)),
    "sampler": (str,),
    "weights": (str,),
    "status": (str,),
    "provenance": (dict,),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number and what makes it comparable.

    A value that is not finite becomes ``None`` with status ``"nonfinite"``: JSON has no NaN, and a diverged
    metric must not cost the other numbers of its cell.

    Attributes:
        schema: version of this record.
        bench: name of the bench, empty outside a bench.
        problem: name of the problem, empty where the bench has only one.
        contender: name in the bench file, or that of a reference.
        family: class name of the flow family, or ``reference``.
        dataset: name of the dataset.
        seed: training seed.
        metric: e.g. ``fd[digits-cnn]``, ``nll``, ``straightness``.
        value: the number, or None where there is none.
        n: number of samples behind the value.
        protocol: extractor, resize, split, N.
        unit: e.g. ``bits/dim``; empty for pure numbers.
        goal: ``down`` where lower is better, ``up``, ``zero`` (nearer to 0), ``none`` where neither is.
        group: the table that the metric belongs to, e.g. ``quality``.
        axis: what a sweep changes, e.g. ``network_evaluations``; empty outside a sweep.
        at: the value that it has there; None outside a sweep.
        network_evaluations: per sample.
        guidance: scale of the samples' guidance, 1 = none; None where nothing can be guided.
        sampler: what the samples depend on beside the weights, e.g. ``jacobi(1e-03)+tweedie``; empty where there is
            nothing to add.
        weights: ``ema``, ``raw`` or ``none``.
        status: ``ok``, ``failed``, ``nonfinite``, ``skipped`` or ``unconverged``. The last has a value, which stands in
            no claim and no comparison; the provenance's ``message`` says why.
        provenance: git sha, config hash, versions, hardware, counts and costs of the cell; JSON values only.

    Raises:
        ValueError: for a field of the wrong type, or an unknown status or weights.
    """

    schema: int = SCHEMA
    bench: str
    problem: str
    contender: str
    family: str
    dataset: str
    seed: int
    metric: str
    value: float | None
    n: int | None
    protocol: str
    unit: str
    goal: Goal = "none"
    group: str = "quality"
    axis: str = ""
    at: float | None = None
    network_evaluations: float | None
    guidance: float | None = None
    sampler: str = ""
    weights: str
    status: Literal["ok", "failed", "nonfinite", "skipped", "unconverged"] = "ok"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool)):
                expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
                raise ValueError(f"row field {name!r} is {value!r}; it must be {expected}")
        if self.schema != SCHEMA:
            raise ValueError(f"row schema {self.schema}; this flowbench reads and writes schema {SCHEMA}")
        if self.status not in STATUSES:
            raise ValueError(f"row status {self.status!r}; use one of {', '.join(STATUSES)}")
        if self.goal not in GOALS:
            raise ValueError(f"row goal {self.goal!r}; use one of {', '.join(GOALS)}")
        if bool(self.axis) != (self.at is not None):
            raise ValueError(f"row axis {self.axis!r} at {self.at!r}; give both, or '' and null outside a sweep")
        if self.weights not in WEIGHTS:
            raise ValueError(f"row weights {self.weights!r}; use one of {', '.join(WEIGHTS)}")
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "status", "nonfinite")
        for name in ("network_evaluations", "guidance", "at"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"row field {name!r} is {number}; it must be finite")

    def to_json(self) -> str:
        """The row as one line of JSON, fields in declared order."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(_plain(record), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Row:
        """Read one line written by :meth:`to_json`, or by that of schema 1 or 2.

        Raises:
            ValueError: when the text is not a JSON object, or a field is missing, unknown or of the wrong
                type.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise ValueError(f"a row is a JSON object, not {type(record).__name__}")
        record = from_earlier(record, SCHEMA)
        if record.get("schema") != SCHEMA:
            raise ValueError(f"row schema {record.get('schema')!r}; this flowbench reads schemas 1 to {SCHEMA}")
        names = {f.name for f in fields(cls)}
        if missing := sorted(names - record.keys()):
            raise ValueError(f"row without {', '.join(missing)}")
        if unknown := sorted(record.keys() - names):
            raise ValueError(f"row with unknown field {', '.join(unknown)}")
        return cls(**record)


def unmeasured_text(rows: Iterable[Row]) -> str:
    """Metrics without a number, with the reasons in their rows; empty where there are none."""
    return _reasons(rows, "failed")


def unconverged_text(rows: Iterable[Row]) -> str:
    """Metrics whose number has not converged, with its error; empty where there are none."""
    return _reasons(rows, "unconverged")


def _reasons(rows: Iterable[Row], status: str) -> str:
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.status == status:
            reason = " ".join(str(row.provenance.get("message", "no reason is known")).split())
            swept = " in the sweep" if row.axis else ""
            who = f"{row.contender}." if row.family in ("reference", "external") else ""
            found.setdefault(reason, {})[f"{who}{row.metric}{swept}"] = None
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in found.items())


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines, atomically, replacing the file."""
    write_text(path, "".join(row.to_json() + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSON Lines file of rows.

    Raises:
        ValueError: when the file is missing or a line is not a row; the line's number is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run the bench or `flowbench test` first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def _plain(value: Any) -> Any:
    """JSON values only: numpy scalars and paths are unpacked, non-finite floats become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
