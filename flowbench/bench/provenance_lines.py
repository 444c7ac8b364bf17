"""Provenance of a bench for its reader: what all cells share, and what differs by contender."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flowbench.bench.results import Results
from flowbench.bench.tables import Entry, TextTable

__all__ = ["provenance_lines"]


def provenance_lines(plan: Mapping[str, Any], results: Results) -> list[str]:
    """Markdown lines: entries equal in all rows once, the others in a table by contender."""
    entries: dict[str, dict[str, dict[str, None]]] = {}
    for row in results.rows:
        if row.status == "failed" or row.contender not in plan["contenders"]:
            continue
        for key, value in row.provenance.items():
            entries.setdefault(key, {}).setdefault(row.contender, {})[_text(value)] = None
    shared, differing = {}, []
    for key, by_contender in entries.items():
        texts = {text for found in by_contender.values() for text in found}
        if len(texts) == 1:
            shared[key] = texts.pop()
        else:
            differing.append(key)
    lines = [f"- {key}: {text}" for key, text in shared.items()]
    if len({text for found in entries.get("git_sha", {}).values() for text in found}) > 1:
        lines.append("- **the cells were run by several versions of the code** (git_sha below)")
    return [*lines, "", _table(plan, entries, differing).to_markdown()] if differing else lines


def _table(
    plan: Mapping[str, Any], entries: Mapping[str, Mapping[str, Mapping[str, None]]], keys: list[str]
) -> TextTable:
    names = [name for name in plan["contenders"] if any(name in entries[key] for key in keys)]
    table = TextTable("", ["provenance", *names])
    for key in keys:
        table.rows.append([Entry(key), *(Entry(_several(entries[key].get(name, {}))) for name in names)])
    return table


def _several(found: Mapping[str, None]) -> str:
    """All values of one contender; many numbers are shown as their range."""
    texts = list(found)
    if len(texts) <= 2:
        return ", ".join(texts)
    try:
        numbers = sorted(float(text) for text in texts)
    except ValueError:
        return f"{', '.join(texts[:2])}, ... ({len(texts)} values)"
    return f"{numbers[0]:g} to {numbers[-1]:g}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
