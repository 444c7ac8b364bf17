"""Pictures of what ``flowbench predict`` found: tables of images with named rows and columns, clouds, confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flowbench.bench.plots import new_figure
from flowbench.bench.sample_pictures import tile
from flowbench.core.storage import write_atomic
from flowbench.evaluation.pictures import image_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_grid",
    "draw_inpaintings",
    "draw_reconstructions",
    "draw_table",
    "plot_clouds",
    "plot_confusion",
    "plot_paths",
]

Array = NDArray[Any]
# Cells of a table: more do not fit a page.
MOST_COLUMNS = 12
MOST_ROWS = 12
DOTS_PER_INCH = 150
# The hole is blue, which no grey image is and few photographs are in whole.
HOLE = (88, 120, 190)
LAST = MOST_COLUMNS


def draw_grid(images: Array, path: Path) -> None:
    """The first 64 images, uint8 (N, C, H, W), eight to a row."""
    shown = torch.from_numpy(images[:64])
    pixels = image_grid(shown, scale=max(1, 64 // images.shape[-1])).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    write_atomic(path, partial(image.save, format="PNG"))


def draw_table(cells: Array, rows: Sequence[str], columns: Sequence[str] | None, path: Path) -> None:
    """Images in rows and columns with names at the left and on top.

    Args:
        cells: uint8, shape (R, K, C, H, W); rows beyond the twelfth are left out.
        rows: R names.
        columns: K names, or None.
        path: the PNG.
    """
    cells, rows = cells[:MOST_ROWS], rows[:MOST_ROWS]
    number, across = cells.shape[:2]
    gap, scale = 4, max(1, 64 // cells.shape[-1])
    picture = tile(_coloured(cells.reshape(-1, *cells.shape[2:])), across, gap=gap, scale=scale)
    height, width = (side * scale + gap for side in cells.shape[-2:])
    inches = 0.55 * max(1.0, cells.shape[-1] / 64)
    figure, ((axis,),) = new_figure(1, 1, (inches * across + 1.2, inches * number + 0.5))
    axis.imshow(picture, interpolation="nearest")
    axis.set_yticks([height * i + (height - gap) / 2 for i in range(number)], rows)
    axis.set_xticks([width * i + (width - gap) / 2 for i in range(across)], columns or [""] * across)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    _save(figure, path)


def draw_reconstructions(
    original: Array, found: Array, difference: Array, titles: Sequence[str] | None, path: Path
) -> None:
    """Originals, reconstructions and their absolute difference; the row's name has the scale of the difference."""
    original, found, difference = (values[:MOST_COLUMNS] for values in (original, found, difference))
    largest = float(difference.max())
    shade = (255 * difference / (largest or 1.0)).astype(np.uint8)
    rows = ["data", "reconstructed", f"|difference|\nwhite = {largest:.1e}"]
    draw_table(np.stack([original, found, shade]), rows, titles and titles[:MOST_COLUMNS], path)


def draw_inpaintings(original: Array, mask: Array, found: Array, titles: Sequence[str] | None, path: Path) -> None:
    """Originals, what was known of them, and the draws (N, draws, C, H, W), row by row."""
    shown = _coloured(original[:MOST_COLUMNS])
    masked = np.where(mask, np.array(HOLE, dtype=np.uint8)[:, None, None], shown)
    draws = [_coloured(found[:MOST_COLUMNS, i]) for i in range(found.shape[1])]
    names = [f"draw {i + 1}" for i in range(len(draws))]
    draw_table(np.stack([shown, masked, *draws]), ["data", "known", *names], titles and titles[:MOST_COLUMNS], path)


def plot_clouds(clouds: Mapping[str, Array], path: Path) -> None:
    """Points of the plane, a panel each, on one scale; a point keeps its colour from panel to panel."""
    figure, (panels,) = new_figure(1, len(clouds), (2.6, 2.9))
    first = next(iter(clouds.values()))
    # By angle around the middle: neighbours have like colours, and one sees where they went.
    centred = first - np.median(first, axis=0)
    hue = np.arctan2(centred[:, 1], centred[:, 0])
    reach = 1.05 * max(np.abs(np.nan_to_num(points)).max() for points in clouds.values()) + 1e-6
    for axis, (name, points) in zip(panels, clouds.items(), strict=True):
        axis.scatter(points[:, 0], points[:, 1], c=hue, cmap="twilight_shifted", s=5, linewidths=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=name)
    _save(figure, path)


def plot_paths(panels: Mapping[str, Array], file: Path) -> None:
    """Paths in the plane, shape (B, T, 2), a panel for each name; a path has one colour in all of them."""
    from matplotlib import colormaps

    figure, (axes,) = new_figure(1, len(panels), (3.2, 3.5))
    for axis, (name, paths) in zip(axes, panels.items(), strict=True):
        for path, colour in zip(paths, colormaps["turbo"](np.linspace(0.05, 0.95, len(paths))), strict=True):
            axis.plot(path[:, 0], path[:, 1], color=colour, linewidth=1.0)
            axis.scatter(path[[0, -1], 0], path[[0, -1], 1], color=colour, s=14, linewidths=0, zorder=3)
        axis.set(aspect="equal", title=name)
    _save(figure, file)


def plot_confusion(counts: Array, results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Counts (K, K), true class by predicted class; a cell's shade is its share of the row."""
    number = len(counts)
    side = max(3.6, 0.42 * min(number, 30) + 1.0)
    figure, ((axis,),) = new_figure(1, 1, (side, side))
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axis.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    axis.grid(visible=False)
    if number <= 30:
        axis.set_xticks(range(number))
        axis.set_yticks(range(number))
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.5 else "#333333"
                axis.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    value = {name: entry["value"] for name, entry in results.items()}
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(
        f"accuracy {value['accuracy']:.3f} [{value['accuracy_low']:.3f}, {value['accuracy_high']:.3f}], "
        f"N = {value['number']}",
        fontsize=10,
    )
    _save(figure, path)


def _coloured(images: Array) -> Array:
    """Three channels for (N, C, H, W) of any number of channels."""
    return np.repeat(images[:, :1], 3, axis=1) if images.shape[1] < 3 else images[:, :3]


def _save(figure: Figure, path: Path) -> None:
    write_atomic(
        path, lambda file: figure.savefig(file, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", facecolor="white")
    )
