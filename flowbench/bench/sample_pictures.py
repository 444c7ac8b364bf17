"""Pictures of samples: grids on the same noise, trajectories in the plane, film strips of images."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowbench.bench.plots import colours, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_samples", "draw_strips", "load_array", "plot_trajectories", "tile"]

Array = NDArray[Any]
_DATA = "held-out data"
# Coordinates whose ranges differ by less share a unit; else each gets its own.
_COMPARABLE = 10.0


def load_array(path: Path, key: str) -> Array | None:
    """One array of an npz file; None when the file or the key is absent.

    Raises:
        ValueError: when the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive[key]) if key in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the cell's rows.jsonl and run the bench again") from None


def tile(images: Array, columns: int, gap: int = 1, scale: int = 1) -> Array:
    """Put images side by side.

    Args:
        images: uint8, shape (N, C, H, W), C = 1 or 3.
        columns: images per row.
        gap: white pixels between images, before scaling of the images.
        scale: whole-number enlargement without interpolation.

    Returns:
        uint8 picture of shape (rows, width, 3).
    """
    images = np.repeat(np.repeat(images, scale, axis=2), scale, axis=3)
    if images.shape[1] == 1:
        images = np.repeat(images, 3, axis=1)
    number, _, height, width = images.shape
    rows = -(-number // columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index in range(number):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        picture[top : top + height, left : left + width] = images[index].transpose(1, 2, 0)
    return picture


def draw_samples(plan: Mapping[str, Any], directory: Path, path: Path, per_side: int = 6) -> Path | None:
    """Samples of all contenders from the same noise: a row per problem, a panel per contender (first seed).

    Returns:
        The picture's path, or None when no cell wrote samples.
    """
    rows = {problem: _sources(plan, directory, problem, "samples.npz", "x") for problem in plan["problems"]}
    rows = {problem: found for problem, found in rows.items() if found}
    if not rows:
        return None
    figure, axes = _layout(rows, (2.4, 2.65))
    palette = colours(plan["contenders"])
    for panels, (problem, found) in zip(axes, rows.items(), strict=True):
        limits = _limits([x for x in found.values() if x.ndim == 2])
        for axis, name in _panels(panels, found):
            x = found[name]
            if x.ndim == 2:
                _scatter(axis, x[:2000], palette.get(name, "#444444"), limits)
            else:
                axis.imshow(tile(x[: per_side * per_side], per_side, gap=2, scale=4), interpolation="nearest")
                axis.set_axis_off()
            axis.set_title(
                _panel_title(name, problem, panels[0] is axis), fontsize=10, color=palette.get(name, "#333333")
            )
    return save_figure(figure, path)


def plot_trajectories(plan: Mapping[str, Any], directory: Path, path: Path, lines: int = 150) -> Path | None:
    """Ways of points in the plane from the source (grey) to the samples (coloured), 2-D only."""
    rows = {}
    for problem in plan["problems"]:
        found = _sources(plan, directory, problem, "trajectories.npz", "states")
        flat = {name: states for name, states in found.items() if states.ndim == 3 and states.shape[-1] == 2}
        if flat:
            rows[problem] = flat
    if not rows:
        return None
    figure, axes = _layout(rows, (2.8, 3.05))
    palette = colours(plan["contenders"])
    for panels, (problem, found) in zip(axes, rows.items(), strict=True):
        # The ends set the frame: a discrete flow may swing far out in between and would shrink all panels.
        limits = _limits([states[[0, -1]].reshape(-1, 2) for states in found.values()])
        for axis, name in _panels(panels, found):
            _draw_ways(axis, found[name][:, :lines], palette.get(name, "#444444"), limits)
            axis.set_title(
                _panel_title(name, problem, panels[0] is axis), fontsize=10, color=palette.get(name, "#333333")
            )
    return save_figure(figure, path)


def draw_strips(plan: Mapping[str, Any], directory: Path, path: Path, frames: int = 9) -> Path | None:
    """Images on their way from noise (left) to sample (right), two per contender."""
    rows: list[tuple[str, Array]] = []
    for problem in plan["problems"]:
        found = _sources(plan, directory, problem, "trajectories.npz", "states")
        for name, states in found.items():
            if states.ndim == 5 and states.shape[2] in (1, 3):
                rows.append((f"{problem}\n{name}" if problem else name, states))
    if not rows:
        return None
    figure, axes = new_figure(len(rows), 1, (6.2, 1.65))
    palette = colours(plan["contenders"])
    for (axis,), (title, states) in zip(axes, rows, strict=True):
        steps = np.linspace(0, len(states) - 1, min(frames, len(states))).round().astype(int)
        chosen = states[steps][:, :2].swapaxes(0, 1)
        levels = np.clip((np.nan_to_num(chosen) + 1) * 127.5, 0, 255).astype(np.uint8)
        axis.imshow(tile(levels.reshape(-1, *levels.shape[2:]), len(steps), gap=2, scale=4), interpolation="nearest")
        axis.set_title(title, fontsize=10, color=palette.get(title.split("\n")[-1], "#333333"), loc="left")
        axis.set_axis_off()
    return save_figure(figure, path)


def _sources(plan: Mapping[str, Any], directory: Path, problem: str, file: str, key: str) -> dict[str, Array]:
    """Array per panel: held-out data first, then every contender's first seed that has one."""
    found: dict[str, Array] = {}
    for cell in (cell for cell in plan["cells"] if not cell.get("axis")):
        name = _DATA if cell["kind"] == "reference" else cell["contender"]
        if cell["problem"] != problem or name in found:
            continue
        array = load_array(directory / cell["directory"] / file, key)
        if array is not None and array.size:
            found[name] = array
    return found


def _layout(
    rows: Mapping[str, Mapping[str, Array]], size: tuple[float, float], widest: int = 5
) -> tuple[Figure, list[list[Axes]]]:
    """Panels per problem: a row per problem, or several rows for one problem with more than ``widest`` panels."""
    most = max(len(found) for found in rows.values())
    if len(rows) > 1 or most <= widest:
        return new_figure(len(rows), most, size)
    columns = -(-most // 2)
    figure, axes = new_figure(2, columns, size)
    return figure, [axes[0] + axes[1]]


def _panels(panels: Sequence[Axes], names: Mapping[str, Array]) -> list[tuple[Axes, str]]:
    for axis in panels[len(names) :]:
        axis.set_axis_off()
    return list(zip(panels, names, strict=False))


def _panel_title(name: str, problem: str, first: bool) -> str:
    """The problem above the first panel of its row, and an empty line above the others, so that all are as high."""
    return f"{problem if first else ''}\n{name}" if problem else name


def _limits(clouds: Sequence[Array]) -> tuple[float, float, float, float]:
    """Common limits that hold 99.8 % of every cloud, so that a stray point does not shrink the rest."""
    if not clouds:
        return (-1.0, 1.0, -1.0, 1.0)
    ends = np.array([np.nanquantile(c[np.isfinite(c).all(axis=1)], [0.001, 0.999], axis=0) for c in clouds])
    (left, bottom), (right, top) = ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)
    halves = 0.54 * np.maximum([right - left, top - bottom], 1e-6)
    if halves.max() < _COMPARABLE * halves.min():
        halves[:] = halves.max()
    x, y = (left + right) / 2, (bottom + top) / 2
    return float(x - halves[0]), float(x + halves[0]), float(y - halves[1]), float(y + halves[1])


def _scatter(axis: Axes, points: Array, colour: str, limits: tuple[float, float, float, float]) -> None:
    axis.scatter(points[:, 0], points[:, 1], s=2.5, color=colour, alpha=0.5, linewidths=0, rasterized=True)
    _plane(axis, limits)


def _draw_ways(axis: Axes, states: Array, colour: str, limits: tuple[float, float, float, float]) -> None:
    axis.plot(states[:, :, 0], states[:, :, 1], color=colour, alpha=0.28, linewidth=0.7)
    axis.scatter(states[0, :, 0], states[0, :, 1], s=5, color="#9a9a9a", linewidths=0, zorder=3)
    axis.scatter(states[-1, :, 0], states[-1, :, 1], s=7, color=colour, linewidths=0, zorder=4)
    _plane(axis, limits)


def _plane(axis: Axes, limits: tuple[float, float, float, float]) -> None:
    aspect = (limits[1] - limits[0]) / (limits[3] - limits[2])
    axis.set(xlim=limits[:2], ylim=limits[2:], aspect=aspect, xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set(visible=True, color="#cccccc")
