"""Images under the common corruptions, and what a model still gets right of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from vitreous.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruptions, corrupt_image
from vitreous.figures.canvas import DPI, INK, checked_path, create_figure, load_image, save, show, write


def draw_corruptions(
    image: np.ndarray | str | Path,
    out: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> Path:
    """Draws an image under corruptions: a row for each, a column for each severity, the image itself at the left.

    Args:
        image: As in `draw_patches`.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        image_size: (H, W) in pixels that the image is resized to before. Default: as it is. Severities depend on it.
        corruptions: Some of `CORRUPTIONS`.
        severities: Some of 1 to 5.
        seed: Decides the random numbers.

    Returns:
        The path written.

    Raises:
        UnknownNameError: If there is no such corruption.
        ConfigError: If a severity is out of range, the image cannot be drawn, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    check_corruptions(list(corruptions), list(severities))
    pixels, num_channels = load_image(image, image_size)
    pixels = np.ascontiguousarray(pixels[..., :num_channels])
    aspect = pixels.shape[0] / pixels.shape[1]
    cell, label, top, space = 116, 140, 26, 4
    tall = round(cell * aspect)
    width = label + (len(severities) + 1) * (cell + space)
    height = top + len(corruptions) * (tall + space) + 4
    figure = create_figure(width, height)
    heads = ["as it is", *(f"severity {severity}" for severity in severities)]
    for column, head in enumerate(heads):
        write(figure, (label + column * (cell + space) + cell / 2) / width, 1 - 13 / height, head, color=INK, size=9)
    for row, name in enumerate(corruptions):
        y = top + row * (tall + space)
        title = name.replace("_", " ")
        write(figure, (label - 8) / width, 1 - (y + tall / 2) / height, title, color=INK, size=9, ha="right")
        for column, severity in enumerate((None, *severities)):
            shown = pixels if severity is None else corrupt_image(pixels, name, severity, seed=seed)
            x = label + column * (cell + space)
            axis = figure.add_axes((x / width, 1 - (y + tall) / height, cell / width, tall / height))
            show(axis, load_image(shown, None)[0])
    return save(figure, path)


def draw_robustness(robustness: Mapping[str, Any], out: str | Path) -> Path:
    """Draws a table of corruptions and severities, a cell the darker the more is right.

    Args:
        robustness: What `measure_robustness` returns.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If the suffix of `out` is unknown.
    """
    path = checked_path(out)
    table, severities = robustness["corruptions"], robustness["severities"]
    columns = [*map(str, severities), "mean"]
    cell, tall, label, top = 64, 26, 150, 74
    width, height = label + cell * len(columns) + 24, top + tall * len(table) + 16
    figure = create_figure(width, height)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    kind = robustness["metric"].replace("_", " ")
    title = f"{kind} {robustness['mean']:.1%} under corruptions, {robustness['clean']:.1%} without"
    write(axis, 12, 18, title, color=INK, size=10, ha="left", weight="bold")
    note = f"{robustness['num_examples']:,} images"
    write(axis, 12, 38, note, color=INK, size=8, ha="left")
    for column, name in enumerate(columns):
        head = name if name == "mean" else f"{'severity ' if column == 0 else ''}{name}"
        write(axis, label + cell * (column + 0.5), top - 12, head, color=INK, size=8.5)
    for row, (name, values) in enumerate(table.items()):
        y = top + tall * row
        write(axis, label - 8, y + tall / 2, name.replace("_", " "), color=INK, size=9, ha="right")
        for column, key in enumerate(columns):
            share = values[key] / max(robustness["clean"], 1e-9)
            shade = _shade(min(share, 1.0))
            x = label + cell * column + (4 if key == "mean" else 0)
            axis.add_patch(Rectangle((x, y), cell - 2, tall - 2, facecolor=shade, edgecolor="none"))
            color = "white" if share > 0.62 else INK
            weight = "bold" if key == "mean" else "normal"
            text = f"{100 * values[key]:.1f}%"
            write(axis, x + cell / 2 - 1, y + tall / 2 - 1, text, color=color, size=8.5, weight=weight)
    figure.set_size_inches(width / DPI, height / DPI)
    return save(figure, path)


def _shade(share: float) -> tuple[float, float, float, float]:
    """Returns the colour of a share of what is right without corruption: blue for all, white for nothing."""
    from matplotlib import colormaps

    return colormaps["Blues"](0.05 + 0.8 * share)
