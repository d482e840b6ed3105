"""Explanations drawn: one beside its image, or many on one sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitreous.errors import ConfigError
from vitreous.explanation.faithfulness import Faithfulness
from vitreous.explanation.methods import METHODS, Explanation
from vitreous.explanation.perturbation import find_edges
from vitreous.figures.explanation import Panel, colour_map, draw_areas, draw_grid_lines, draw_panels, lay_over, tile

_MOST_TILES = 14  # positions along a side of the picture


def draw_explanation(
    explanations: Explanation | Sequence[Explanation],
    out: str | Path,
    *,
    name: str = "",
    is_smooth: bool = False,
) -> Path:
    """Draws explanations of one image.

    One explanation stands beside its image, with all that the method gives; several share one sheet.

    Args:
        explanations: One, or several of the same image.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        name: Of the image, for the heading.
        is_smooth: Whether maps are interpolated (bicubic). Default: a colour for each patch, since a map knows no more.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no explanations, or the suffix of `out` is unknown.
    """
    several = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    if not several:
        raise ConfigError(
            "Cannot draw explanations. Expected at least one. Received: none. Pass what explain returned."
        )
    first = several[0]
    is_of_model = all(METHODS[each.method].is_of_model for each in several)
    heading = "the model alone, the same for every image" if is_of_model else _answer(first)
    if name and not is_of_model:
        heading = f"{name}: {heading}" if heading else name
    is_single = len(several) == 1
    panels = [panel for each in several for panel in _panels(each, is_single=is_single, is_smooth=is_smooth)]
    if "patches" not in {each.method for each in several} and not METHODS[first.method].is_of_model:
        panels.insert(0, Panel("image", draw_grid_lines(first.image, _edges(first))))
    return draw_panels(
        panels,
        heading=heading or METHODS[first.method].title,
        out=out,
        cell=420 if is_single else 230,
        columns=len(panels) if is_single else None,
    )


def draw_faithfulness(found: Faithfulness, out: str | Path, *, name: str = "") -> Path:
    """Draws the curves of deletion and insertion.

    Args:
        found: What `measure_faithfulness` returned.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        name: Of the model, for the heading.

    Returns:
        The path written.
    """
    fill = "mean colour" if found.fill == "mean" else "blur"
    images = f"{found.num_images} image{'s' * (found.num_images > 1)}"
    heading = f"{name + ', ' if name else ''}{images}, patches replaced by the {fill}"
    curves = {name: (each.deletion, each.insertion) for name, each in found.curves.items()}
    return draw_areas(curves, heading=heading, out=out)


def _answer(explanation: Explanation) -> str:
    """Returns the class and its probability in words."""
    if explanation.class_name is None or explanation.probability is None:
        return ""
    which = "" if explanation.is_answer else " (not the model's answer)"
    return f"{explanation.class_name} {explanation.probability:.1%}{which}"


def _edges(explanation: Explanation) -> tuple[np.ndarray, np.ndarray]:
    return find_edges(explanation.grid, (explanation.image.shape[0], explanation.image.shape[1]))


def _panels(explanation: Explanation, *, is_single: bool, is_smooth: bool) -> list[Panel]:
    method, arrays, note = METHODS[explanation.method], explanation.arrays, explanation.note
    title = method.title
    if explanation.map is not None:
        pixels, scale = lay_over(
            explanation.image,
            explanation.map,
            _edges(explanation),
            is_signed=explanation.is_signed,
            is_smooth=is_smooth,
        )
        what = ": ".join(filter(None, [explanation.unit, note]))
        panels = [Panel(title, pixels, what, scale, explanation.is_signed)]
        if is_single and explanation.method == "attention":
            blocks, heads = arrays["heads"].shape[:2]
            about = f"{blocks} blocks from left to right, {heads} heads from top to bottom, each on its own scale"
            panels.append(Panel("each block and head", _tile_maps(arrays["heads"].swapaxes(0, 1)), about))
        return panels
    if explanation.method == "patches":
        return [Panel(title, draw_grid_lines(explanation.image, _edges(explanation)), note)]
    if explanation.method == "positions":
        return [_position_panel(arrays["similarity"], title, note)]
    if explanation.method == "filters":
        panels = [Panel(title, tile(_as_pictures(arrays["components"]), 7), note)]
        if is_single:
            filters = arrays["filters"]
            order = np.argsort(-np.linalg.norm(filters.reshape(len(filters), -1), axis=1))[:64]
            panels.append(
                Panel("strongest filters", tile(_as_pictures(filters[order]), 8), f"{len(order)} of {len(filters)}")
            )
        return panels
    return [Panel(title, _enlarge(arrays["colours"], _edges(explanation)), note)]


def _position_panel(similarity: np.ndarray, title: str, note: str) -> Panel:
    """A tile for each patch: how similar its position is to that of every other."""
    rows, columns = similarity.shape[:2]
    chosen_rows, chosen_columns = (
        np.unique(np.rint(np.linspace(0, count - 1, min(count, _MOST_TILES))).astype(int)) for count in (rows, columns)
    )
    shown = similarity[np.ix_(chosen_rows, chosen_columns)].reshape(-1, rows, columns)
    colours, scale = colour_map(shown)
    return Panel(title, tile(colours, len(chosen_columns)), f"{note}: a tile for each patch", scale)


def _tile_maps(heads: np.ndarray) -> np.ndarray:
    """Returns maps (A, L, rows, columns) in A rows of tiles, each from its smallest value to its largest."""
    flat = heads.reshape(-1, *heads.shape[2:])
    low, high = (f(flat, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    colours, _ = colour_map((flat - low) / np.where(high > low, high - low, 1))
    return tile(colours, heads.shape[1])


def _as_pictures(filters: np.ndarray) -> np.ndarray:
    """Returns filters (n, h, w, C) as pictures in [0, 1], grey for 0, each on its own scale."""
    most = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pictures = 0.5 + filters / (2 * np.where(most > 0, most, 1))
    return np.broadcast_to(
        pictures if pictures.shape[3] == 3 else pictures.mean(axis=3, keepdims=True), (*pictures.shape[:3], 3)
    )


def _enlarge(colours: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns colours (rows, columns, 3) of patches as those of pixels."""
    rows, columns = (np.diff(axis) for axis in edges)
    return np.repeat(np.repeat(colours, rows, axis=0), columns, axis=1)
