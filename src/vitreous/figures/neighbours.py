"""Images beside the images that are nearest to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    BLUE,
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

_CELL, _BELOW, _GAP, _MIDDLE, _TOP = 116, 34, 10, 26, 30  # pixels

Labels = str | tuple[str, ...] | None


def draw_neighbours(
    queries: Sequence[np.ndarray],
    names: Sequence[str],
    labels: Sequence[Labels],
    neighbours: Sequence[Sequence[np.ndarray]],
    neighbour_labels: Sequence[Sequence[Labels]],
    similarities: Sequence[Sequence[float]],
    out: str | Path,
) -> Path:
    """Draws images, a row each: the image, then its neighbours with their similarity and class.

    Where the class of the image is known, a sign and a colour say of each neighbour whether its class is the same.

    Args:
        queries: Q images as in `draw_patches`, of any sizes.
        names: What to call each of them.
        labels: Class of each of them; None where it is not known.
        neighbours: The neighbours of each, the nearest first.
        neighbour_labels: Class of each neighbour; None where it is not known.
        similarities: Similarity of each neighbour, in [-1, 1].
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no images, the lengths differ, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    lengths = {len(part) for part in (queries, names, labels, neighbours, neighbour_labels, similarities)}
    rows = list(zip(neighbours, neighbour_labels, similarities, strict=False))
    if len(lengths) != 1 or not len(queries) or any(len({*map(len, row)}) != 1 for row in rows):
        raise ConfigError(
            "Cannot draw neighbours. Expected one name, label and list of neighbours for each of one or more images, "
            f"and a label and a similarity for each neighbour. Received: {len(queries)} images, {len(names)} names, "
            f"{[len(row[0]) for row in rows]} neighbours. Pass lists of the same images."
        )
    columns = max(len(row[0]) for row in rows)
    width = _GAP + _CELL + _MIDDLE + columns * (_CELL + _GAP)
    height = _TOP + len(queries) * (_CELL + _BELOW + _GAP)
    figure = create_figure(width, height)
    write(figure, _GAP / width, 1 - 15 / height, "image", color=INK, size=9, ha="left", weight="bold")
    left = _GAP + _CELL + _MIDDLE
    write(
        figure,
        left / width,
        1 - 15 / height,
        "nearest, with cosine similarity",
        color=INK,
        size=9,
        ha="left",
        weight="bold",
    )

    def place(image: np.ndarray, x: float, y: float, lines: Sequence[tuple[str, str]]) -> None:
        axis = figure.add_axes((x / width, 1 - (y + _CELL) / height, _CELL / width, _CELL / height))
        show(axis, load_image(image, None)[0])
        for number, (text, color) in enumerate(lines):
            shown = fit(figure, text, 8, _CELL)
            write(
                figure, (x + _CELL / 2) / width, 1 - (y + _CELL + 10 + 14 * number) / height, shown, color=color, size=8
            )

    for row, (image, name, label) in enumerate(zip(queries, names, labels, strict=True)):
        y = _TOP + row * (_CELL + _BELOW + _GAP)
        place(image, _GAP, y, [(name, FAINT), *([(_text(label), INK)] if label is not None else [])])
        for column, (near, near_label, similarity) in enumerate(zip(*rows[row], strict=True)):
            lines = [(f"{similarity:.3f}", INK)]
            if near_label is not None:
                is_same = label == near_label
                sign, color = ("", INK) if label is None else ("✓ ", BLUE) if is_same else ("✗ ", VERMILION)
                lines.append((f"{sign}{_text(near_label)}", color))
            place(near, left + column * (_CELL + _GAP), y, lines)
    return save(figure, path)


def _text(label: str | tuple[str, ...]) -> str:
    return label if isinstance(label, str) else ", ".join(label) or "(none)"
