"""Probabilities against what happened, and accuracy against the share of images that are answered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    BLUE,
    FAINT,
    INK,
    PALE,
    VERMILION,
    checked_path,
    create_figure,
    save,
    text_style,
    write,
    write_title,
)

_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def draw_reliability(
    calibration: Mapping[str, Any],
    out: str | Path,
    *,
    after: Mapping[str, Any] | None = None,
    title: str = "as trained",
) -> Path:
    """Draws how often answers are right against how sure they are; below, how many answers are how sure.

    Bars that end below the diagonal: surer than right. The rest of the way to the diagonal is hatched.

    Args:
        calibration: What `compute_calibration` returns.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        after: The same with the temperature, drawn beside it.
        title: What `calibration` is of, where nothing is drawn beside it.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no bins, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    parts = [calibration] if after is None else [calibration, after]
    if not all(part["reliability"] for part in parts):
        raise ConfigError(
            "Cannot draw reliability. Expected one or more bins with images. Received: none. "
            "Pass what compute_calibration returns."
        )
    figure = create_figure(400 * len(parts) + 40, 480)
    axes = figure.subplots(2, len(parts), height_ratios=(4, 1), sharex="col", sharey="row", squeeze=False)
    titles = [title] if after is None else ["before the temperature", "after"]
    for column, (part, title) in enumerate(zip(parts, titles, strict=True)):
        _draw_bins(axes[0, column], axes[1, column], part["reliability"])
        write_title(axes[0, column], f"{title}: calibration error {100 * part['ece']:.1f}%")
    axes[0, 0].set_ylabel("share that is right", color=INK, fontsize=9)
    axes[1, 0].set_ylabel("answers", color=INK, fontsize=9)
    figure.tight_layout(pad=1.2, h_pad=0.6, w_pad=1.6)
    return save(figure, path)


def _draw_bins(axis: Axes, below: Axes, bins: list[dict[str, Any]]) -> None:
    low, high, count, sure, right = (
        np.array([each[key] for each in bins]) for key in ("low", "high", "count", "confidence", "accuracy")
    )
    middle, width = (low + high) / 2, 0.92 * (high - low)
    axis.bar(middle, right, width, color=BLUE)
    for center, share, expected, size in zip(middle, right, sure, width, strict=True):
        bottom, height = min(share, expected), abs(share - expected)
        axis.bar(center, height, size, bottom, facecolor="none", edgecolor=VERMILION, hatch="////", linewidth=0.8)
    axis.plot((0, 1), (0, 1), color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    below.bar(middle, count / count.sum(), width, color=FAINT)
    below.set_xlabel("probability of the answer", color=INK, fontsize=9)
    for each in (axis, below):
        each.xaxis.set_major_formatter(_PERCENT)
        each.yaxis.set_major_formatter(_PERCENT)
        _plain(each)


def draw_selection(selection: Mapping[str, Any], out: str | Path) -> Path:
    """Draws the accuracy of the surest answers against the share of images that they are.

    Args:
        selection: What `compute_selection` returns; points of `thresholds`, if there, are marked.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If the suffix of `out` is unknown.
    """
    path = checked_path(out)
    coverage, accuracy = (np.array([point[key] for point in selection["curve"]]) for key in ("coverage", "accuracy"))
    figure = create_figure(560, 380)
    axis = figure.subplots()
    axis.plot(coverage, accuracy, color=BLUE, linewidth=2)
    low = min(float(accuracy.min()), *(p["accuracy"] or 1 for p in selection.get("thresholds", {}).values()), 0.995)
    for point in selection.get("thresholds", {}).values():
        if point["accuracy"] is None:
            continue
        axis.plot(point["coverage"], point["accuracy"], "o", color=VERMILION, markersize=6)
        is_right = point["coverage"] > 0.75
        label = f"threshold {point['threshold']:.2f}"
        axis.annotate(
            label,
            (point["coverage"], point["accuracy"]),
            xytext=(-9 if is_right else 9, 4),
            textcoords="offset points",
            ha="right" if is_right else "left",
            **text_style(8),
        )
    axis.axhline(accuracy[-1], color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
    write(axis, 0.02, accuracy[-1], "all answered", color=FAINT, size=8, ha="left", va="bottom")
    axis.set_xlim(0, 1.01)
    axis.set_ylim(max(0.0, low - 0.06 * (1 - low) - 0.005), 1.004)
    axis.xaxis.set_major_formatter(_PERCENT)
    axis.yaxis.set_major_formatter(_PERCENT)
    axis.set_xlabel("share of images that is answered, the surest first", color=INK, fontsize=9)
    axis.set_ylabel("accuracy of these answers", color=INK, fontsize=9)
    _plain(axis)
    write_title(axis, f"area of error under coverage {selection['aurc']:.4f}; at best {selection['aurc_best']:.4f}")
    figure.tight_layout(pad=1.2)
    return save(figure, path)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)
