"""Pictures of numbers: quality against network evaluations and training time, and bars."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.bench.results import Results
from flowbench.bench.statistics import summarise
from flowbench.core.sweep import SweepAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "colours",
    "load_curve",
    "new_figure",
    "plot_bars",
    "plot_evaluations",
    "plot_guidance",
    "plot_train_sizes",
    "plot_training",
    "save_figure",
    "swept_metric",
]

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C564B", "#4D4D4D")
_MARKERS = "osD^vPX*hp"  # one more than colours, so that each pair of the two is met once in ninety
MAX_COLUMNS = 3
WIDE = 8.0
"""Scales of guidance whose largest is more than this many times the smallest stand on a logarithmic axis."""
FAR = 3.0
"""A reference line above this many times the contenders' highest value is left to the tables."""
_LINES = {"floor": "--", "noise": ":", "gaussian": "-.", "gmm": (0, (5, 1, 1, 1, 1, 1))}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 11,
    "legend.frameon": False,
}

Curve = dict[int, tuple[float, float]]
"""Step -> (training seconds, value)."""


def colours(contenders: Sequence[str]) -> dict[str, str]:
    """One colour per contender, the same in every picture of a report."""
    return {name: _PALETTE[position % len(_PALETTE)] for position, name in enumerate(contenders)}


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows x columns panels of ``size`` inches each, drawn without pyplot's global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def _panels(number: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` panels, at most three in a row."""
    columns = min(number, MAX_COLUMNS)
    figure, axes = new_figure(math.ceil(number / columns), columns, size)
    flat = [axis for row in axes for axis in row]
    for unused in flat[number:]:
        unused.remove()
    return figure, flat[:number]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG with 150 dpi, cropped to its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return path


def load_curve(path: Path, metric: str) -> Curve:
    """Quality against training of one cell; a repeated step (a resumed run) keeps its last value.

    Raises:
        ValueError: for a damaged line; a last line cut short by a crash is passed over.
    """
    if not path.is_file():
        return {}
    curve: Curve = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            point = json.loads(line)
            if point["metric"] == metric and point["value"] is not None:
                curve[int(point["step"])] = (float(point["train_seconds"]), float(point["value"]))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a point of a curve ({error})") from None
    return curve


def plot_evaluations(plan: Mapping[str, Any], results: Results, path: Path) -> Path | None:
    """Quality against network evaluations per sample, one panel per problem; None when nothing was swept."""
    return _plot_sweep(plan, results, path, "network_evaluations", "network evaluations per sample")


def plot_guidance(plan: Mapping[str, Any], results: Results, path: Path) -> Path | None:
    """Quality against the scale of guidance, one panel per problem; None when it was not swept."""
    return _plot_sweep(plan, results, path, "guidance", "guidance scale (1 = none)")


def plot_train_sizes(plan: Mapping[str, Any], results: Results, path: Path) -> Path | None:
    """Quality against the number of training samples, one panel per problem; None when it was not swept."""
    return _plot_sweep(plan, results, path, "train_size", "training samples")


def _plot_sweep(plan: Mapping[str, Any], results: Results, path: Path, axis: SweepAxis, x_label: str) -> Path | None:
    panels = {problem: metric for problem in plan["problems"] if (metric := swept_metric(plan, results, problem, axis))}
    if not panels:
        return None
    figure, axes = _panels(len(panels), (5.0 if len(panels) > 1 else 6.6, 4.0))
    for panel, (problem, metric) in zip(axes, panels.items(), strict=True):
        for name in plan["problems"][problem]:
            _draw_sweep(panel, plan, results, problem, name, metric, axis)
        _draw_references(panel, results, problem, metric)
        low, high = panel.dataLim.intervalx
        if axis != "guidance" or (low > 0 and high / low > WIDE):
            panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _finish(panel, problem, x_label, metric, results.unit(problem, metric))
    _legend(figure, axes)
    return save_figure(figure, path)


def swept_metric(plan: Mapping[str, Any], results: Results, problem: str, axis: SweepAxis) -> str | None:
    """The metric of a problem that a picture of a sweep shows; None when nothing was swept along the axis."""
    names = plan["problems"][problem]
    return results.headline(
        m for m in results.metrics(problem) if any(results.swept_points(problem, n, m, axis) for n in names)
    )


def _draw_sweep(
    panel: Axes, plan: Mapping[str, Any], results: Results, problem: str, name: str, metric: str, axis: SweepAxis
) -> None:
    """A line where the contender was swept; else one point where it always is, or the level of what nothing changes."""
    style, label = _style(plan, name), _label(results, problem, name, metric)
    sweep = results.sweep(problem, name, metric, axis)
    grey = _draw_unconverged(panel, results, problem, name, metric, axis, style)
    if len(sweep) > 1:
        x = list(sweep)
        _line_and_band(panel, x, [list(sweep[point].values()) for point in x], label, style)
        return
    if grey and not sweep:
        return
    exact = results.values(problem, name, metric)
    if not sweep and exact and results.protocol(problem, name, metric).startswith("exact"):
        panel.axhline(
            summarise(list(exact.values())).mean, color=style["color"], linewidth=1.8, label=f"{label} (exact)"
        )
        return
    (point, values), *_ = [*sweep.items()] or [_fixed_point(results, problem, name, metric, axis)]
    if values and point:
        summary = summarise(list(values.values()))
        panel.errorbar(
            [point],
            [summary.mean],
            yerr=[_spread(list(values.values()))[0], _spread(list(values.values()))[1]],
            label=f"{label} (fixed)",
            linestyle="none",
            markersize=8,
            capsize=3,
            **style,
        )


def _draw_unconverged(
    panel: Axes, results: Results, problem: str, name: str, metric: str, axis: SweepAxis, style: Mapping[str, Any]
) -> bool:
    """Hollow, pale points where no seed's number has converged; whether there are any."""
    means: dict[float, float] = {}
    for at in results.swept_points(problem, name, metric, axis):
        found = results.doubtful(problem, name, metric, at, axis)
        if found and not results.values(problem, name, metric, at, axis):
            means[at] = sum(value for value, _ in found.values()) / len(found)
    if means:
        label = f"{name} ‡ not converged"
        panel.plot(list(means), list(means.values()), ":", markerfacecolor="none", alpha=0.5, label=label, **style)
    return bool(means)


def _label(results: Results, problem: str, name: str, metric: str) -> str:
    """The contender's name, marked as in the tables where it lacks a planned seed."""
    return f"{name} †" if results.lost_seeds(problem, name) or results.gaps(problem, name, metric) else name


def _fixed_point(
    results: Results, problem: str, name: str, metric: str, axis: SweepAxis
) -> tuple[float, dict[int, float]]:
    rows = results.main_rows(problem, name, metric)
    points = [float(point) for row in rows if axis != "train_size" and (point := getattr(row, axis))]
    return (sum(points) / len(points) if points else 0.0), results.values(problem, name, metric)


def _spread(values: list[float]) -> tuple[list[float], list[float]]:
    mean = sum(values) / len(values)
    return [mean - min(values)], [max(values) - mean]


def plot_training(plan: Mapping[str, Any], results: Results, directory: Path, path: Path) -> Path | None:
    """Quality against training seconds, one panel per problem; None when no cell wrote a curve."""
    curves = {problem: _problem_curves(plan, results, directory, problem) for problem in plan["problems"]}
    panels = {problem: found for problem, found in curves.items() if found[1]}
    if not panels:
        return None
    figure, axes = _panels(len(panels), (5.0 if len(panels) > 1 else 6.6, 4.0))
    for axis, (problem, (metric, by_name)) in zip(axes, panels.items(), strict=True):
        for name, seeds in by_name.items():
            label = f"{name} †" if results.lost_seeds(problem, name) else name
            _draw_curves(axis, seeds, label, _style(plan, name))
        _draw_references(axis, results, problem, metric)
        _finish(axis, problem, "training time (s)", metric, results.unit(problem, metric))
    _legend(figure, axes)
    return save_figure(figure, path)


def _problem_curves(
    plan: Mapping[str, Any], results: Results, directory: Path, problem: str
) -> tuple[str, dict[str, list[Curve]]]:
    cells = [c for c in plan["cells"] if c["problem"] == problem and c["kind"] == "fit" and not c.get("axis")]
    metric = results.headline(_curve_metrics(directory, cells)) or ""
    by_name: dict[str, list[Curve]] = defaultdict(list)
    for cell in cells:
        curve = load_curve(directory / cell["directory"] / "curve.jsonl", metric)
        if len(curve) > 1:
            by_name[cell["contender"]].append(curve)
    return metric, dict(by_name)


def _curve_metrics(directory: Path, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for cell in cells:
        path = directory / cell["directory"] / "curve.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                names[str(json.loads(line)["metric"])] = None
            except (ValueError, KeyError, TypeError):
                continue  # load_curve reports damaged lines
    return list(names)


def _draw_curves(axis: Axes, seeds: Sequence[Curve], name: str, style: Mapping[str, Any]) -> None:
    steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
    x = [sum(curve[step][0] for curve in seeds) / len(seeds) for step in steps]
    _line_and_band(axis, x, [[curve[step][1] for curve in seeds] for step in steps], name, style)


def plot_bars(plan: Mapping[str, Any], results: Results, metric: str, path: Path) -> Path | None:
    """Bars of one metric with 95 % intervals, one panel per problem; None when it was not measured."""
    found = {
        problem: {name: v for name in names if (v := results.values(problem, name, metric))}
        for problem, names in plan["problems"].items()
    }
    panels = {problem: values for problem, values in found.items() if values}
    if not panels:
        return None
    tallest = max(len(values) for values in panels.values())
    figure, axes = _panels(len(panels), (4.6 if len(panels) > 1 else 6.6, 1.0 + 0.45 * tallest))
    for axis, (problem, by_name) in zip(axes, panels.items(), strict=True):
        _draw_bars(axis, plan, by_name, [_label(results, problem, name, metric) for name in by_name])
        axis.set_ylim(tallest - 0.5, -0.5)  # the same thickness in every panel
        axis.set_title(problem, loc="left")
        unit = results.unit(problem, metric)
        axis.set_xlabel(f"{metric}{f' ({unit})' if unit else ''}")
    return save_figure(figure, path)


def _draw_bars(
    axis: Axes, plan: Mapping[str, Any], by_name: Mapping[str, Mapping[int, float]], labels: Sequence[str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    palette = colours(plan["contenders"])
    names = list(by_name)
    summaries = [summarise(list(by_name[name].values())) for name in names]
    means, halves = [s.mean for s in summaries], [s.half or 0.0 for s in summaries]
    axis.barh(
        labels,
        means,
        xerr=halves if any(halves) else None,
        color=[palette[n] for n in names],
        height=0.62,
        ecolor="#333333",
        capsize=3,
    )
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="y", visible=False)
    axis.axvline(0, color="#666666", linewidth=0.8)
    for position, (mean, half) in enumerate(zip(means, halves, strict=True)):
        end = mean + half if mean >= 0 else mean - half
        axis.annotate(
            f"{mean:.3g}",
            (end, position),
            xytext=(5 if mean >= 0 else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if mean >= 0 else "right",
            fontsize=9,
        )
    ends = [
        0.0,
        *(m + h for m, h in zip(means, halves, strict=True)),
        *(m - h for m, h in zip(means, halves, strict=True)),
    ]
    room = 0.22 * (max(ends) - min(ends))  # for the numbers beside the bars
    axis.set_xlim(min(ends) - room * (min(ends) < 0 and min(means) < 0), max(ends) + room * (max(means) > 0))


def _style(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    position = plan["contenders"].index(name)
    return {"color": colours(plan["contenders"])[name], "marker": _MARKERS[position % len(_MARKERS)]}


def _line_and_band(
    axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], name: str, style: Mapping[str, Any]
) -> None:
    """Mean over seeds, with the range of the seeds as a band."""
    means = [sum(group) / len(group) for group in values]
    axis.plot(x, means, label=name, linewidth=1.8, markersize=5, **style)
    axis.fill_between(
        x, [min(g) for g in values], [max(g) for g in values], color=style["color"], alpha=0.18, linewidth=0
    )


def _draw_references(axis: Axes, results: Results, problem: str, metric: str) -> None:
    """Lines of the reference rows; those far above all contenders would only squeeze what there is to see."""
    highest = axis.dataLim.y1
    for name in results.references(problem):
        values = list(results.values(problem, name, metric).values())
        if values and sum(values) / len(values) <= FAR * highest:
            axis.axhline(
                sum(values) / len(values),
                color="#777777",
                linewidth=1.2,
                linestyle=_LINES.get(name, "--"),
                label=name,
                zorder=1,
            )


def _finish(axis: Axes, problem: str, x_label: str, metric: str, unit: str) -> None:
    axis.set_title(problem, loc="left")
    axis.set_xlabel(x_label)
    axis.set_ylabel(f"{metric}{f' ({unit})' if unit else ''}")
    low, high = axis.dataLim.intervaly
    if low > 0 and high / low > 15:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend to the right of all panels, each name once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside right upper", frameon=False, fontsize=9)
