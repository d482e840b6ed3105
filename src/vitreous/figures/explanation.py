"""Explanations: an image beside what a model sees in it, many panels on one sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    FAINT,
    INK,
    VERMILION,
    checked_path,
    create_figure,
    fit,
    load_image,
    save,
    show,
    write,
)

# Both are read by colour-blind people, and in grey: the first rises in brightness, the second parts orange and purple.
RISING, SIGNED = "cividis", "PuOr_r"
_OPACITY = 0.7  # of a map over its image
_CELL, _SPACE, _TITLE, _NOTE, _BAR = 230, 26, 26, 46, 10  # pixels


@dataclass(frozen=True)
class Panel:
    """A picture on a sheet.

    Args:
        title: Above it.
        pixels: uint8 or floating point in [0, 1], (H, W, 3).
        note: Below it, up to two lines.
        scale: Lowest and highest value of the colour bar; None for no bar.
        is_signed: Whether the bar's colours part values below 0 from those above.
    """

    title: str
    pixels: np.ndarray
    note: str = ""
    scale: tuple[float, float] | None = None
    is_signed: bool = False


def colour_map(values: np.ndarray, *, is_signed: bool = False) -> tuple[np.ndarray, tuple[float, float]]:
    """Returns values as colours (..., 3) in [0, 1], and the values of the first and the last colour.

    Values run from 0 (or the smallest below it) to the largest; signed ones from -m to m, m the largest magnitude.
    """
    if is_signed:
        most = float(np.abs(values).max()) or 1.0
        scale = (-most, most)
    else:
        low, high = float(values.min()), float(values.max())
        scale = (low, high) if high > low else (min(low, 0.0), max(high, 0.0) or 1.0)
    name = SIGNED if is_signed else RISING
    return colormaps[name](Normalize(*scale)(values))[..., :3], scale


def lay_over(
    image: np.ndarray,
    values: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray],
    *,
    is_signed: bool = False,
    is_smooth: bool = False,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Lays a map over its image, in grey so that colours are the map's alone.

    Args:
        image: uint8 (H, W, 1) or (H, W, 3).
        values: (rows, columns), a value for each patch.
        edges: Pixel rows and columns between which the patches' cells lie.
        is_signed: Whether values below 0 say the contrary of those above.
        is_smooth: Whether values run into each other (bicubic). Default: each patch has one colour, since a model gives
            one value for each patch, and knows no more.

    Returns:
        The picture, floating point (h, w, 3) in [0, 1], enlarged by a whole number where the image is small; and the
        values of the first and the last colour.
    """
    from PIL import Image

    times = max(1, math.ceil(_CELL / max(image.shape[:2])))
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    rows, columns = (np.diff(axis) * times for axis in edges)
    if is_smooth:
        wide = Image.fromarray(values.astype("float32")).resize(
            (image.shape[1], image.shape[0]), Image.Resampling.BICUBIC
        )
        spread = np.clip(np.asarray(wide), values.min(), values.max())
    else:
        spread = np.repeat(np.repeat(values, rows, axis=0), columns, axis=1)
    colours, scale = colour_map(spread, is_signed=is_signed)
    grey = load_image(image, None)[0] @ np.array([0.299, 0.587, 0.114]) / 255
    return _OPACITY * colours + (1 - _OPACITY) * grey[:, :, None], scale


def draw_grid_lines(image: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns an image with a line between the cells of its patches, uint8 (h, w, 3), enlarged where it is small."""
    times = max(1, math.ceil(_CELL / max(image.shape[:2])))
    pixels = load_image(image, None)[0].repeat(times, axis=0).repeat(times, axis=1)
    if min(np.diff(axis).min() for axis in edges) * times >= 5:
        pixels[edges[0][1:-1] * times] = 255
        pixels[:, edges[1][1:-1] * times] = 255
    return pixels


def tile(pictures: np.ndarray, columns: int, *, gap: int = 1) -> np.ndarray:
    """Returns pictures (n, h, w, 3) in [0, 1] in rows of so many, with white between them."""
    count, height, width = pictures.shape[:3]
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for index, picture in enumerate(pictures):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def draw_panels(
    panels: Sequence[Panel],
    *,
    heading: str,
    out: str | Path,
    columns: int | None = None,
    cell: int = _CELL,
) -> Path:
    """Draws panels in a grid, each with its title above and its colour bar and note below.

    Args:
        panels: One or more.
        heading: Above them all.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        columns: Panels in a row. Default: as many as make the sheet a little wider than high.
        cell: Pixels of a panel's longer side.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no panels, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    if not panels:
        raise ConfigError("Cannot draw panels. Expected at least one. Received: none. Pass what is to be drawn.")
    columns = columns or max(2, math.ceil(math.sqrt(1.2 * len(panels))))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    shapes = [panel.pixels.shape[:2] for panel in panels]
    tallest = max(round(cell * min(1, height / width)) for height, width in shapes)
    below = 8 + _BAR + 18 + _NOTE if any(panel.scale for panel in panels) else 8 + _NOTE
    step = _TITLE + tallest + below
    width, height = _SPACE + columns * (cell + _SPACE), 44 + rows * step + 6
    figure = create_figure(width, height)
    text = fit(figure, heading, 11, width - 2 * _SPACE)
    write(figure, _SPACE / width, 1 - 22 / height, text, color=INK, size=11, ha="left", weight="bold")
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, top = _SPACE + column * (cell + _SPACE), 44 + row * step
        middle = (left + cell / 2) / width
        title = fit(figure, panel.title, 10, cell)
        write(figure, middle, 1 - (top + _TITLE / 2) / height, title, color=INK, size=10)
        top += _TITLE
        axis = figure.add_axes((left / width, 1 - (top + tallest) / height, cell / width, tallest / height))
        show(axis, np.clip(panel.pixels, 0, 1) if panel.pixels.dtype != np.uint8 else panel.pixels)
        axis.set_anchor("N")
        top += tallest + 8
        if panel.scale is not None:
            bar = figure.add_axes((left / width, 1 - (top + _BAR) / height, cell / width, _BAR / height))
            colours = ScalarMappable(Normalize(*panel.scale), SIGNED if panel.is_signed else RISING)
            figure.colorbar(colours, cax=bar, orientation="horizontal").outline.set_visible(False)  # type: ignore[operator]
            bar.set(xticks=[])
            for value, x, ha in zip(panel.scale, (left, left + cell), ("left", "right"), strict=True):
                place = 1 - (top + _BAR + 9) / height
                write(figure, x / width, place, f"{value:.3g}", color=FAINT, size=8, ha=ha)
            top += _BAR + 18
        for line, words in enumerate(_wrap(panel.note, cell)):
            words = fit(figure, words, 8, cell)
            write(figure, middle, 1 - (top + 8 + 14 * line) / height, words, color=FAINT, size=8)
    return save(figure, path)


def _wrap(note: str, pixels: int) -> list[str]:
    """Returns a note in lines, three at most, of characters that fit."""
    import textwrap

    lines = textwrap.wrap(note, max(12, round(pixels / 7)))
    return [*lines[:2], " ".join(lines[2:])] if len(lines) > 3 else lines


def draw_areas(curves: dict[str, tuple[np.ndarray, np.ndarray]], *, heading: str, out: str | Path) -> Path:
    """Draws deletion and insertion curves of methods, the random one dashed.

    Args:
        curves: By method, the probability of the class along deletion and along insertion, from share 0 to 1.
        heading: Above both.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.
    """
    path = checked_path(out)
    figure = create_figure(980, 420)
    axes = figure.subplots(1, 2, sharey=True)
    lines = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
    colours = ("#0072B2", VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
    for side, (axis, what) in enumerate(zip(axes, ("taken out", "put in"), strict=True)):
        for index, (name, pair) in enumerate(curves.items()):
            is_random = name == "random"
            axis.plot(
                np.linspace(0, 100, len(pair[side])),
                pair[side],
                color=FAINT if is_random else colours[index % len(colours)],
                linestyle=(0, (2, 2)) if is_random else lines[index % len(lines)],
                linewidth=2.4 if is_random else 1.7,
                label=name,
            )
        axis.set_xlabel(f"% of the patches {what}", color=INK, fontsize=9)
        axis.set_title(
            "deletion: lower is better" if side == 0 else "insertion: higher is better", fontsize=10, color=INK
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9, length=0)
        axis.set_xlim(0, 100)
        axis.set_ylim(bottom=0)
        axis.grid(color="#E4E4E4", linewidth=0.8)
    axes[0].set_ylabel("probability of the class", color=INK, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(0.805, 0.5), frameon=False, fontsize=9, labelcolor=INK
    )
    write(figure, 24 / 980, 1 - 20 / 420, fit(figure, heading, 11, 932), color=INK, size=11, ha="left", weight="bold")
    figure.subplots_adjust(left=0.07, right=0.79, bottom=0.13, top=0.83, wspace=0.08)
    return save(figure, path)
