"""What searches found: the loss against the learning rate, and the trials of a tuning."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    PALE,
    VERMILION,
    checked_path,
    create_figure,
    fit,
    save,
    text_style,
    write,
    write_title,
)


def draw_rate_search(search: Mapping[str, Any], out: str | Path) -> Path:
    """Draws the loss against a learning rate that grew from step to step.

    Args:
        search: `rates`, `losses` and `smoothed`, lists of equal length; `tenth` and `steepest`, rates with a band
            between them; `suggestion` and `recipe_rate`, rates with a line; `has_diverged`.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    rates, losses, smoothed = (np.asarray(search[name], float) for name in ("rates", "losses", "smoothed"))
    if not len(rates):
        raise ConfigError(
            "Cannot draw the search for a learning rate. Expected at least one step. Received: none. "
            "Pass what find_learning_rate returns."
        )
    figure = create_figure(760, 420)
    axis = figure.add_axes((0.09, 0.14, 0.87, 0.74))
    _plain(axis)
    axis.plot(rates, losses, ".", color=FAINT, markersize=4, alpha=0.6, label="each batch")
    axis.plot(rates, smoothed, color=BLUE, linewidth=2, label="smoothed")
    axis.set_xscale("log")
    low, high = min(losses.min(), smoothed.min()), smoothed[0]
    room = max(high - low, 1e-6)
    axis.set_ylim(low - 0.08 * room, high + 0.6 * room)  # what diverges leaves the picture
    ends = search["tenth"], search["steepest"]
    label = f"a tenth of the lowest {ends[0]:g}, steepest {ends[1]:g}"
    axis.axvspan(min(ends), max(ends), color=ORANGE, alpha=0.18, linewidth=0, label=label)
    for name, label, color, style in (
        ("suggestion", "suggestion", VERMILION, "-"),
        ("recipe_rate", "the recipe's", INK, ":"),
    ):
        axis.axvline(search[name], color=color, linestyle=style, linewidth=1.6, label=f"{label} {search[name]:g}")
    axis.set_xlabel("learning rate", color=INK, fontsize=9)
    axis.set_ylabel("training loss", color=INK, fontsize=9)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    ending = "; it diverged, and the search ended" if search["has_diverged"] else ""
    write_title(axis, f"Loss while the learning rate grows, {len(rates)} steps{ending}")
    return save(figure, path)


_STATES = {"complete": (BLUE, "o"), "pruned": (FAINT, "x"), "failed": (VERMILION, "v")}


def draw_trials(trials: Sequence[Mapping[str, Any]], out: str | Path, *, score_name: str = "score") -> Path:
    """Draws the trials of a tuning: the score of each, and the score against each parameter.

    Args:
        trials: For each trial `number`, `state` (`complete`, `pruned` or `failed`), `score` (a share, or None) and
            `params`, values by name.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        score_name: What the score is.

    Returns:
        The path written.

    Raises:
        ConfigError: If no trial has a score, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    scored = [trial for trial in trials if trial["score"] is not None and math.isfinite(trial["score"])]
    if not scored:
        raise ConfigError(
            f"Cannot draw the trials. Expected one with a score. Received: {len(trials)} without. Tune for longer."
        )
    names = sorted({name for trial in scored for name in trial["params"]})
    num_rows = 1 + -(-len(names) // 3)
    figure = create_figure(960, 60 + 300 + 230 * (num_rows - 1))
    grid = figure.add_gridspec(num_rows, 3, height_ratios=[1.25] + [1.0] * (num_rows - 1))
    axis = figure.add_subplot(grid[0, :])
    _plain(axis)
    _draw_points(axis, [trial["number"] for trial in scored], scored)
    complete = [trial for trial in scored if trial["state"] == "complete"]
    if complete:
        best = np.maximum.accumulate([trial["score"] for trial in complete])
        axis.step(
            [*(trial["number"] for trial in complete), max(trial["number"] for trial in scored)],
            [*best, best[-1]],
            where="post",
            color=VERMILION,
            linewidth=1.4,
            zorder=1,
        )
        write_title(axis, f"{score_name}: best {best[-1]:.2%} of {len(trials)} trials")
    axis.set_xlabel("trial (0: the recipe as it is)", color=INK, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    for i, name in enumerate(names):
        axis = figure.add_subplot(grid[1 + i // 3, i % 3])
        _plain(axis)
        _draw_parameter(axis, name, [trial for trial in scored if name in trial["params"]])
        title = fit(figure, name, 10, 290)
        write_title(axis, title)
    figure.tight_layout(pad=1.2, h_pad=2.0, rect=(0, 0.03, 1, 1))
    legend = "● whole trial   × given up early, at its last score   ▼ failed   line: best so far"
    write(figure, 0.5, 0.015, legend, color=FAINT, size=7.5)
    return save(figure, path)


def _draw_parameter(axis: Axes, name: str, trials: Sequence[Mapping[str, Any]]) -> None:
    values = [trial["params"][name] for trial in trials]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        _draw_points(axis, values, trials)
        if min(values) > 0 and max(values) / min(values) > 5:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
            axis.xaxis.set_minor_locator(NullLocator())
    else:
        choices = sorted({str(value) for value in values})
        _draw_points(axis, [choices.index(str(value)) for value in values], trials)
        axis.set_xticks(range(len(choices)), choices, **text_style(9))
        axis.set_xlim(-0.5, len(choices) - 0.5)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def _draw_points(axis: Axes, xs: Sequence[float], trials: Sequence[Mapping[str, Any]]) -> None:
    for state, (color, marker) in _STATES.items():
        chosen = [(x, trial["score"]) for x, trial in zip(xs, trials, strict=True) if trial["state"] == state]
        if chosen:
            axis.plot(*zip(*chosen, strict=True), marker, color=color, markersize=5, alpha=0.85, zorder=2)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)
