"""What training and evaluation gave: learning curves, a confusion matrix, examples with their answers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    BLUE,
    DPI,
    FAINT,
    INK,
    PALE,
    VERMILION,
    checked_path,
    create_figure,
    fit,
    load_image,
    measure,
    save,
    shorten,
    show,
    text_style,
    write,
    write_title,
)

_COLUMNS = (
    "loss",
    "train_loss",
    "val_loss",
    "accuracy",
    "train_accuracy",
    "val_accuracy",
    "val_mean_average_precision",
    "learning_rate",
)
_MEASURED = "training: augmented images, current weights · validation: clean images, averaged weights"


def draw_curves(history: Mapping[str, Sequence[float | None]], out: str | Path) -> Path:
    """Draws loss, accuracy and learning rate against the epoch; a panel without numbers is left out.

    Args:
        history: A list for each of `train_loss` (or `loss`, as Keras has it), `val_loss`, `train_accuracy` (or
            `accuracy`), `val_accuracy`, `val_mean_average_precision` and `learning_rate`, where they are there; None
            or NaN where there is no number. `epoch`, if there, says where each value belongs, else they count from 1.
            Other columns are not drawn. Under columns with `train_` a line says what they measure: training, augmented
            images and the weights of the moment; validation, clean images and averaged weights.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw, a column is longer or shorter than `epoch`, or the suffix of `out` is
            unknown.
    """
    path = checked_path(out)
    columns = {
        name.removeprefix("train_"): np.array([math.nan if value is None else value for value in history[name]], float)
        for name in _COLUMNS
        if name in history
    }
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    if not columns:
        raise ConfigError(
            f"Cannot draw learning curves. Expected numbers under one of {', '.join(_COLUMNS)}. "
            f"Received: history with {sorted(history)}. Pass the history that training returns."
        )
    length = max(map(len, columns.values()))
    epochs = np.asarray(history.get("epoch", range(1, length + 1)), dtype="float64")
    for name, values in columns.items():
        if len(values) != len(epochs):
            raise ConfigError(
                f"Cannot draw learning curves. Expected {len(epochs)} values in each column, one an epoch. "
                f"Received: {name} with {len(values)}. Pad it with None."
            )
    kinds = [
        [name for name in names if name in columns]
        for names in (
            ("loss", "val_loss"),
            ("accuracy", "val_accuracy"),
            ("val_mean_average_precision",),
            ("learning_rate",),
        )
    ]
    kinds = [names for names in kinds if names]
    widths = [2.4 if names == ["learning_rate"] else 4.2 for names in kinds]
    figure = create_figure(100 * sum(widths) + 60, 360)
    axes = figure.subplots(1, len(kinds), width_ratios=widths, squeeze=False)[0]
    for axis, names in zip(axes, kinds, strict=True):
        for name in names:
            is_held_out = name.startswith("val_")
            _draw_curve(
                axis,
                epochs,
                columns[name],
                color=VERMILION if is_held_out else BLUE,
                style="-" if is_held_out or len(names) == 1 else (0, (4, 1.5)),
                label="validation" if is_held_out else "training",
            )
        _plain(axis)
        title = names[0].removeprefix("val_").replace("_", " ")
        if held_out := next((name for name in names if name.startswith("val_")), None):
            best = int(np.nanargmin(columns[held_out]) if title == "loss" else np.nanargmax(columns[held_out]))
            value = columns[held_out][best]
            axis.plot(epochs[best], value, "o", color=VERMILION, markersize=6, zorder=4)
            kind = "lowest" if title == "loss" else "highest"
            title = f"{title}: {kind} {_number(value, title)}, epoch {epochs[best]:g}"
        write_title(axis, title)
        axis.set_xlabel("epoch", color=INK, fontsize=9)
        around = 0.03 * (epochs[-1] - epochs[0]) or 0.5
        axis.set_xlim(epochs[0] - around, epochs[-1] + around)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if "accuracy" in names[0] or "precision" in names[0]:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        elif names == ["learning_rate"]:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    has_note = any(f"train_{name}" in history for kind in kinds if len(kind) > 1 for name in kind)
    figure.tight_layout(pad=1.2, w_pad=2.0, rect=(0, 0.05 if has_note else 0, 1, 1))
    if has_note:
        write(figure, 0.5, 0.035, _MEASURED, color=FAINT, size=7.5)
    return save(figure, path)


def _draw_curve(axis: Axes, epochs: np.ndarray, values: np.ndarray, *, color: str, style: Any, label: str) -> None:
    """Draws one column; a single epoch is a dot."""
    is_known = np.isfinite(values)
    marker = "o" if is_known.sum() == 1 else ""
    axis.plot(
        epochs[is_known], values[is_known], color=color, linestyle=style, linewidth=1.8, marker=marker, label=label
    )


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)


def _number(value: float, kind: str) -> str:
    return f"{100 * value:.1f}%" if kind in ("accuracy", "mean average precision") else f"{value:.3g}"


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], out: str | Path) -> Path:
    """Draws a confusion matrix: which class was answered, for each true class.

    Colour is the share of a row's examples, on a scale that lifts small shares; up to 20 classes, cells hold the
    counts. Rows of classes without examples are hatched.

    Args:
        matrix: Integer (K, K): examples of true class i (row) that were answered as class j (column).
        class_names: K names, drawn as they are; long ones are shortened in the middle.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If the matrix is not square, has negative counts or another number of classes than names, or the
            suffix of `out` is unknown.
    """
    path = checked_path(out)
    matrix = np.asarray(matrix)
    count = len(class_names)
    if matrix.shape != (count, count) or count == 0 or matrix.min() < 0:
        raise ConfigError(
            f"Cannot draw the confusion matrix. Expected counts of shape (K, K), with one name for each of K classes. "
            f"Received: matrix.shape={matrix.shape}, {count} names. Pass the matrix and the names of the same data set."
        )
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]

    cell = int(np.clip(1300 // count, 9, 96 if count <= 4 else 56)) if count <= 200 else max(1, 1800 // count)
    side = max(cell * count, 192)
    every = max(1, math.ceil(8.5 / cell))  # names are 8.5 pixels apart at least
    font = float(np.clip(0.78 * cell * every, 6.4, 13)) * 72 / DPI
    names = [shorten(str(name), 28 if count <= 20 else 20) for name in class_names]
    figure = create_figure(100, 100)
    room = max(measure(figure, name, font)[0] for name in names) + 14
    is_turned = max(measure(figure, name, font)[0] for name in names) > 0.92 * cell
    bottom = (room if is_turned else 24) + 28
    width, height = room + 34 + side + 96, 48 + side + bottom
    figure.set_size_inches(width / DPI, height / DPI)
    axis = figure.add_axes(
        (  # left, bottom, width, height
            (room + 34) / width,
            bottom / height,
            side / width,
            side / height,
        )
    )
    norm = PowerNorm(0.5, 0, 1)
    shown = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto")
    for row in np.flatnonzero(totals == 0):
        axis.add_patch(
            Rectangle((-0.5, row - 0.5), count, 1, facecolor="white", edgecolor=FAINT, hatch="////", linewidth=0)
        )
    if cell >= 9:
        for position in np.arange(0.5, count - 1):
            for line in (axis.axhline, axis.axvline):
                line(position, color="white" if count <= 40 else PALE, linewidth=1 if count <= 40 else 0.3)
    if count <= 20:
        size = min(10.0, 0.36 * cell * 72 / DPI * min(1.0, 3 / len(str(matrix.max()))) + 1.5)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if norm(shares[row, column]) > 0.6 else INK
            write(axis, column, row, f"{matrix[row, column]}", color=color, size=size)
    ticks = range(0, count, every)
    labels = [names[tick] for tick in ticks]
    axis.set_xticks(ticks, labels, rotation=90 if is_turned else 0, **text_style(font))
    axis.set_yticks(ticks, labels, **text_style(font))
    axis.tick_params(length=0, pad=5)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("answer", color=INK, fontsize=10)
    axis.set_ylabel("truth", color=INK, fontsize=10)
    total = int(totals.sum())
    accuracy = f"{100 * np.trace(matrix) / total:.1f}% of {total:,} examples right" if total else "no examples"
    write_title(axis, accuracy)
    bar_height = min(side, 260)
    bar = figure.add_axes(
        (
            (room + 34 + side + 18) / width,
            (bottom + side - bar_height) / height,
            12 / width,
            bar_height / height,
        )
    )
    scale = figure.colorbar(shown, cax=bar, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    scale.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"], fontsize=8, color=INK)
    scale.outline.set_visible(False)  # type: ignore[operator]
    scale.ax.tick_params(length=0)
    scale.ax.minorticks_off()
    return save(figure, path)


def draw_predictions(
    images: Sequence[np.ndarray],
    truths: Sequence[int | Sequence[int]],
    answers: Sequence[int | Sequence[int]],
    probabilities: Sequence[float | Sequence[float]],
    class_names: Sequence[str],
    out: str | Path,
) -> Path:
    """Draws examples in a grid, each with the model's answer; mistakes are framed and name the truth too.

    Args:
        images: Images as in `draw_patches`, of any sizes.
        truths: Index of each example's true class; a list of them where it may have several, or none.
        answers: Index, or indices, of each example's answered class.
        probabilities: Probability of each answer, in [0, 1]; a list where `answers` has one.
        class_names: K names, drawn as they are; long ones are shortened in the middle.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no images, the lengths differ, an image's shape is not one of those that
            `draw_patches` takes, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    count = len(images)
    if count == 0 or {len(truths), len(answers), len(probabilities)} != {count}:
        raise ConfigError(
            "Cannot draw predictions. Expected one truth, answer and probability for each of one or more images. "
            f"Received: {count} images, {len(truths)} truths, {len(answers)} answers, {len(probabilities)} "
            "probabilities. Pass lists of the same examples."
        )
    cell, below, space = 150, 40, 18
    columns = min(count, max(5, math.ceil(math.sqrt(1.4 * count))))
    rows = math.ceil(count / columns)
    width = columns * (cell + space) + space
    height = 40 + rows * (cell + below + space)
    figure = create_figure(width, height)
    wrong = 0
    for index, (image, truth, answer, probability) in enumerate(
        zip(images, truths, answers, probabilities, strict=True)
    ):
        row, column = divmod(index, columns)
        x, y = space + column * (cell + space), 40 + row * (cell + below + space)
        axis = figure.add_axes((x / width, 1 - (y + cell) / height, cell / width, cell / height))
        show(axis, load_image(image, None)[0])
        axis.set_anchor("S")
        is_right = _as_set(truth) == _as_set(answer)
        wrong += not is_right
        if not is_right:
            axis.spines[:].set_visible(True)
            axis.spines[:].set(color=VERMILION, linewidth=2.5)
        sign, color = ("✓", BLUE) if is_right else ("✗", VERMILION)
        tail = f" · {100 * probability:.0f}%" if isinstance(probability, float | int) else ""
        name = fit(figure, _names(answer, class_names), 9, cell - measure(figure, f"{sign} {tail}", 9)[0])
        write(figure, (x + cell / 2) / width, 1 - (y + cell + 13) / height, f"{sign} {name}{tail}", color=color, size=9)
        if not is_right:
            name = fit(figure, _names(truth, class_names), 8, cell - measure(figure, "truth: ", 8)[0])
            write(figure, (x + cell / 2) / width, 1 - (y + cell + 28) / height, f"truth: {name}", color=INK, size=8)
    heading = f"a choice of {count} examples: {count - wrong} right, {wrong} wrong"
    write(figure, space / width, 1 - 18 / height, heading, color=INK, size=10, ha="left", weight="bold")
    return save(figure, path)


def _as_set(indices: int | Sequence[int]) -> set[int]:
    return {int(index) for index in np.atleast_1d(indices)}


def _names(indices: int | Sequence[int], class_names: Sequence[str]) -> str:
    return ", ".join(str(class_names[int(index)]) for index in np.atleast_1d(indices)) or "(none)"


_MOST_LABELS = 40


def draw_labels(metrics: Mapping[str, Any], out: str | Path) -> Path:
    """Draws how well each label is found: a bar for its average precision, the best first, and how many images have it.

    Of more than 40 labels the 40 with the lowest average precision are drawn.

    Args:
        metrics: What `compute_metrics` returns for several labels an image: `average_precision` and `support` by name,
            and `mean_average_precision`.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If no label applies to any image, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    ranked = sorted(metrics["average_precision"].items(), key=lambda item: -item[1])
    if not ranked:
        raise ConfigError(
            "Cannot draw the labels. Expected a label that applies to some image. Received: none. "
            "Pass metrics of images with labels."
        )
    shown = ranked[-_MOST_LABELS:]
    names = [f"{shorten(name, 28)} ({metrics['support'][name]:,})" for name, _ in shown]
    figure = create_figure(100, 100)
    room = max(measure(figure, name, 9)[0] for name in names) + 20
    width, height = room + 460, 48 + 22 * len(shown) + 34
    figure.set_size_inches(width / DPI, height / DPI)
    axis = figure.add_axes((room / width, 34 / height, 420 / width, 22 * len(shown) / height))
    values = [value for _, value in shown]
    axis.barh(range(len(shown)), values, height=0.66, color=BLUE)
    for place, value in enumerate(values):
        is_inside = value > 0.85
        write(
            axis,
            value + (-0.01 if is_inside else 0.01),
            place,
            f"{100 * value:.1f}%",
            color="white" if is_inside else INK,
            size=8,
            ha="right" if is_inside else "left",
        )
    axis.set_xlim(0, 1)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_yticks(range(len(shown)), names, **text_style(9))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    _plain(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=PALE, linewidth=0.8)
    which = "" if len(shown) == len(ranked) else f", the lowest {len(shown)} of {len(ranked)} labels"
    write_title(axis, f"average precision: mean {100 * metrics['mean_average_precision']:.1f}%{which}")
    return save(figure, path)
