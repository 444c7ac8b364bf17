"""What a command did, in a few lines that fit the terminal: read from the files that it left.

The last line is the folder or file alone, for scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowbench.core.launch import is_first_process
from flowbench.core.storage import read_record
from flowbench.core.terminal import duration, wrapped

__all__ = [
    "facts_text",
    "fit_facts",
    "measured_facts",
    "prediction_facts",
    "preparation_facts",
    "show",
    "statistics_facts",
]

Facts = list[tuple[str, str]]


def facts_text(facts: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, one below the other; long ones go on in the next line, paths stay whole."""
    facts = [(name, text) for name, text in facts if text]
    first = max((len(name) for name, _ in facts), default=0) + 2
    return "\n".join(wrapped(text, f"{name:<{first}}", " " * first) for name, text in facts)


def show(facts: Facts, place: Path | None = None, table: Path | None = None) -> None:
    """Print what a command did; of several processes, the first one does.

    Args:
        facts: names and what they are.
        place: the folder or file that holds the result, alone in the last line.
        table: a run whose measurements are printed first.
    """
    if not is_first_process():
        return
    if table is not None:
        from flowbench.bench import compare

        print(compare([table]))
    print(facts_text(facts))
    if place is not None:
        print(place)


def fit_facts(folder: Path, tested: bool) -> Facts:
    """What a training did.

    Args:
        folder: of the run.
        tested: whether it was measured afterwards.
    """
    record = read_record(folder / "progress.json")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    config = folder / "config.yaml"
    facts = [
        ("trained", _spent(record)),
        ("loss", "" if record.get("loss") is None else f"{record['loss']:.4g} on the last batch"),
        ("weights", str(checkpoint) if checkpoint.is_file() else ""),
    ]
    if tested:
        return [*facts, *measured_facts(folder), ("next", f"flowbench predict -c {config}")]
    return [*facts, ("next", f"flowbench test -c {config}" if config.is_file() else "")]


def measured_facts(folder: Path) -> Facts:
    """What a measurement left."""
    rows = folder / "rows.jsonl"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    arrays = sorted(path.name for path in folder.glob("*.npz"))
    return [
        ("rows", str(rows) if rows.is_file() else ""),
        ("pictures", _files(pictures, folder)),
        ("arrays", _files(arrays, folder)),
    ]


def prediction_facts(folder: Path) -> Facts:
    """What a prediction drew, at what cost, and where it lies."""
    manifest = read_record(folder / "manifest.json")
    evaluations = manifest.get("network_evaluations")
    cost = "" if evaluations is None else f"{_amount(evaluations)} network evaluations a sample, "
    seconds = manifest.get("seconds")
    unit = "results" if manifest.get("task") != "sample" else "samples"
    facts = [
        (str(manifest.get("task", "")), f"{_amount(manifest.get('num_samples'))} {unit} of {manifest.get('family')}"),
        ("cost", f"{cost}{duration(seconds)}" if seconds is not None else ""),
        ("sampler", str(manifest.get("sampler") or manifest.get("method") or "")),
        ("weights", str(manifest.get("checkpoint", ""))),
    ]
    for name, result in (manifest.get("results") or {}).items():
        facts.append((name, f"{_amount(result['value'])} {result['unit']}".strip()))
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".npz", ".png", ".json"))
    return [*facts, ("files", _files(names, folder))]


def preparation_facts(checkpoints: Mapping[str, Path], evaluator: Mapping[str, Any] | None) -> Facts:
    """What an experiment required, and the feature networks of its metrics.

    Args:
        checkpoints: of what is required, by name.
        evaluator: the section of the configuration.
    """
    metrics = ((evaluator or {}).get("metrics") or {}).values()
    given = [(metric.get("init_args") or {}).get("features") or [] for metric in metrics]
    named = ", ".join(dict.fromkeys(str(name) for one in given for name in ([one] if isinstance(one, str) else one)))
    facts = [(name, str(path)) for name, path in checkpoints.items()]
    facts += [("features", named)] if named else []
    return facts or [("prepared", "nothing: this experiment requires no other and no feature network")]


def statistics_facts(metadata: Mapping[str, Any], dimension: int) -> Facts:
    """What a file of feature statistics holds."""
    split = f", split {metadata['split']}" if metadata.get("split") else ""
    return [
        ("statistics", f"mean and covariance in {dimension:,} dimensions"),
        ("images", f"{_amount(metadata.get('count'))} of {metadata.get('dataset')}{split}"),
        ("features", f"{metadata.get('extractor')} ({metadata.get('protocol')})"),
    ]


def _spent(record: Mapping[str, Any]) -> str:
    parts = [f"{_amount(record['step'])} steps"] if record.get("step") is not None else []
    if record.get("samples_seen"):
        parts.append(f"{_amount(record['samples_seen'])} samples")
    if record.get("train_seconds"):
        parts.append(duration(record["train_seconds"]))
    if record.get("fraction") is not None:
        parts.append(f"{record['fraction']:.0%} of the budget")
    return ", ".join(parts)


def _files(names: list[str], folder: Path) -> str:
    return f"{', '.join(names)} in {folder}" if names else ""


def _amount(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else "-"
