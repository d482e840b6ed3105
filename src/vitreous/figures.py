"""Pictures of arrays: patches, learning curves, confusion matrices, predictions. NumPy in, a file out.

The suffix of `out` chooses the format: .png, .svg or .pdf. A file is written whole or not at all. Nothing here touches
Matplotlib's global state (pyplot), so these functions work in any thread. Colours are those of Okabe and Ito, which
colour-blind readers tell apart; where a colour says something, a sign or a word says it too.
"""

import functools
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitreous.errors import ConfigError
from vitreous.patches import PatchGrid, as_pair

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
INK, FAINT, PALE = "#222222", "#767676", "#E4E4E4"
GAP = (201, 219, 236)  # between patches: pale blue, which neither white nor grey pixels merge with
DPI = 100
FORMATS = (".png", ".svg", ".pdf")

_COLUMNS = ("loss", "train_loss", "val_loss", "accuracy", "train_accuracy", "val_accuracy", "learning_rate")
_SMALL_PIXELS = 640  # what a small image is enlarged to, about
_LARGE_PIXELS = 1000  # what a large one is reduced to
_SCRIPTS = (  # fonts for what DejaVu Sans cannot write; those that are installed are used
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)


def draw_patches(
    image: np.ndarray | str | Path,
    *,
    patch_size: int | tuple[int, int],
    strides: int | tuple[int, int] | None = None,
    dilation_rate: int | tuple[int, int] = 1,
    padding: Literal["valid", "same"] = "valid",
    image_size: int | tuple[int, int] | None = None,
    out: str | Path,
) -> Path:
    """Draws an image with its patch grid, beside its patches set apart.

    One patch is framed in both. Lines show where patches start. Pixels that no patch samples are faded, and the zeros
    that `padding="same"` adds are black.

    Args:
        image: uint8 (H, W), (H, W, 1) or (H, W, 3), floating point of the same shapes in [0, 1], or a file's path.
        patch_size: Pixels of a patch, (vertical, horizontal) or one number.
        strides: Pixels between neighbouring patches. Default: `patch_size`.
        dilation_rate: Distance between the pixels that one patch samples. Default: 1.
        padding: `"valid"` (only whole patches) or `"same"` (zeros around the image).
        image_size: (H, W) in pixels, or one number, to resize the image to first. Default: as it is.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If the image's shape or type is not one of those above, not one patch fits, or the suffix of `out`
            is unknown.
        ImageError: If the file is not an image.
        MissingPathError: If the file does not exist.

    Example:

    ```python
    draw_patches(np.zeros((32, 48, 3), "uint8"), patch_size=8, strides=4, out="patches.png")
    ```
    """
    path = _checked_path(out)
    if padding not in ("valid", "same"):
        raise ConfigError(
            f"Cannot use padding. Expected 'valid' or 'same'. Received: padding={padding!r}. Pass one of them."
        )
    size = as_pair(patch_size, "patch_size")
    grid = PatchGrid(
        size=size,
        strides=as_pair(size if strides is None else strides, "strides"),
        dilation_rate=as_pair(dilation_rate, "dilation_rate"),
        padding=padding,
    )
    pixels, num_channels = _load(image, image_size)
    height, width = image_shape = (pixels.shape[0], pixels.shape[1])
    rows, columns = grid.grid_size(image_shape)
    mosaic, cell, step = compose_mosaic(pixels, grid)
    whole, has_faded = _with_padding(pixels, grid)

    # The image is as high as its patches beside it; a wide one stands above them and is as wide.
    is_stacked = whole.shape[1] > 1.9 * whole.shape[0]
    scale = min(
        mosaic.shape[1] / whole.shape[1] if is_stacked else mosaic.shape[0] / whole.shape[0],
        _LARGE_PIXELS / max(whole.shape[:2]),
    )
    panel = (max(1, round(whole.shape[0] * scale)), max(1, round(whole.shape[1] * scale)))
    figure, (left, right) = _panels([panel, mosaic.shape[:2]], is_stacked=is_stacked)

    _show(left, whole)
    _draw_grid(left, grid, image_shape, scale=panel[1] / whole.shape[1], framed=(rows // 2, columns // 2))
    _title(left, "image" if padding == "valid" else "image, with its zeros")
    _show(right, mosaic)
    _frame(right, columns // 2 * step[1] - 0.5, rows // 2 * step[0] - 0.5, cell[1], cell[0], margin=1)
    _title(right, f"{rows} × {columns} patches")

    values = math.prod(size) * num_channels
    details = [f"image {height} × {width} × {num_channels}", f"patch {_pair(size)}", f"stride {_pair(grid.strides)}"]
    if grid.dilation_rate != (1, 1):
        details.append(f"dilation {_pair(grid.dilation_rate)}")
    details.append(f"padding {padding}")
    if has_faded:
        details.append("faded: in no patch")
    _caption(figure, f"{rows * columns:,} patches of {values:,} values", "   ·   ".join(details))
    return _save(figure, path)


def compose_mosaic(
    image: np.ndarray, grid: PatchGrid, *, small_pixels: int = _SMALL_PIXELS, large_pixels: int = _LARGE_PIXELS
) -> tuple[np.ndarray, tuple[float, float], tuple[float, float]]:
    """Sets the patches of an image apart, with gaps of the colour `GAP` between them, in one array.

    However many patches there are, this takes two products of small matrices at most.

    Args:
        image: uint8, (H, W, 3).
        grid: How the image is cut.
        small_pixels: Each pixel becomes a square of as many whole pixels as keep the patches below this, together.
            Patches of less than 8 pixels take more room where there is some.
        large_pixels: A mosaic with a longer side is reduced to at most this, each pixel the mean of those it replaces.

    Returns:
        The mosaic, uint8 (height, width, 3);
        the size of one patch in it, (vertical, horizontal) pixels;
        and the distance from one patch to the next, (vertical, horizontal) pixels.
    """
    image_size = (image.shape[0], image.shape[1])
    padded = np.pad(image, (*grid.pad_widths(image_size), (0, 0)))
    counts = grid.grid_size(image_size)
    room = max(count * size for count, size in zip(counts, grid.size, strict=True))
    enlarged = max(1, small_pixels // room, min(8 // min(grid.size), int(0.85 * large_pixels) // room))
    gap = max(1, round(0.07 * enlarged * min(grid.size)))
    # A mosaic is separable: its pixel (y, x) is the image's pixel (rows[y], columns[x]), or a gap where one is -1.
    rows, columns = (
        np.pad(np.repeat(indices, enlarged, axis=1), ((0, 0), (0, gap)), constant_values=-1).ravel()[:-gap]
        for indices in grid.indices(image_size)
    )
    reduced = math.ceil(max(rows.size, columns.size) / large_pixels)
    if reduced == 1:
        mosaic = padded[rows[:, None], columns[None, :]]
        mosaic[rows < 0] = GAP
        mosaic[:, columns < 0] = GAP
    else:
        row_shares, column_shares = (
            _shares(axis, length, reduced) for axis, length in zip((rows, columns), padded.shape[:2], strict=True)
        )
        inside = np.einsum("yh,hwc->ywc", row_shares, padded.astype("float32"), optimize=True)
        inside = np.einsum("xw,ywc->yxc", column_shares, inside, optimize=True)
        gaps = 1 - row_shares.sum(1)[:, None] * column_shares.sum(1)[None, :]
        mosaic = np.rint(np.clip(inside + np.array(GAP) * gaps[:, :, None], 0, 255)).astype("uint8")
    ratio = enlarged / reduced
    cell = (grid.size[0] * ratio, grid.size[1] * ratio)
    return mosaic, cell, (cell[0] + gap / reduced, cell[1] + gap / reduced)


def draw_curves(history: Mapping[str, Sequence[float | None]], out: str | Path) -> Path:
    """Draws loss, accuracy and learning rate against the epoch; a panel without numbers is left out.

    Args:
        history: A list for each of `train_loss` (or `loss`, as Keras has it), `val_loss`, `train_accuracy` (or
            `accuracy`), `val_accuracy` and `learning_rate`, as far as they are there; None or NaN where there is no
            number. `epoch`, if there, says where each value belongs, else they count from 1. Other columns are not
            drawn.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there is nothing to draw, a column is longer or shorter than `epoch`, or the suffix of `out` is
            unknown.
    """
    path = _checked_path(out)
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
        for names in (("loss", "val_loss"), ("accuracy", "val_accuracy"), ("learning_rate",))
    ]
    kinds = [names for names in kinds if names]
    widths = [2.4 if names == ["learning_rate"] else 4.2 for names in kinds]
    figure = _figure(100 * sum(widths) + 60, 360)
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
        _title(axis, title)
        axis.set_xlabel("epoch", color=INK, fontsize=9)
        around = 0.03 * (epochs[-1] - epochs[0]) or 0.5
        axis.set_xlim(epochs[0] - around, epochs[-1] + around)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if "accuracy" in names[0]:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        elif names == ["learning_rate"]:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.tight_layout(pad=1.2, w_pad=2.0)
    return _save(figure, path)


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
    path = _checked_path(out)
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
    figure = _figure(100, 100)
    room = max(_measure(figure, name, font)[0] for name in names) + 14
    is_turned = max(_measure(figure, name, font)[0] for name in names) > 0.92 * cell
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
            _write(axis, column, row, f"{matrix[row, column]}", color=color, size=size)
    ticks = range(0, count, every)
    labels = [names[tick] for tick in ticks]
    axis.set_xticks(ticks, labels, rotation=90 if is_turned else 0, **_style(font))
    axis.set_yticks(ticks, labels, **_style(font))
    axis.tick_params(length=0, pad=5)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("answer", color=INK, fontsize=10)
    axis.set_ylabel("truth", color=INK, fontsize=10)
    total = int(totals.sum())
    accuracy = f"{100 * np.trace(matrix) / total:.1f}% of {total:,} examples right" if total else "no examples"
    _title(axis, accuracy)
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
    return _save(figure, path)


def draw_predictions(
    images: Sequence[np.ndarray],
    truths: Sequence[int],
    answers: Sequence[int],
    probabilities: Sequence[float],
    class_names: Sequence[str],
    out: str | Path,
) -> Path:
    """Draws examples in a grid, each with the model's answer; mistakes are framed and name the truth too.

    Args:
        images: Images as in `draw_patches`, of any sizes.
        truths: Index of each example's true class.
        answers: Index of each example's answered class.
        probabilities: Probability of each answer, in [0, 1].
        class_names: K names, drawn as they are; long ones are shortened in the middle.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no images, the lengths differ, an image's shape is not one of those that
            `draw_patches` takes, or the suffix of `out` is unknown.
    """
    path = _checked_path(out)
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
    figure = _figure(width, height)
    for index, (image, truth, answer, probability) in enumerate(
        zip(images, truths, answers, probabilities, strict=True)
    ):
        row, column = divmod(index, columns)
        x, y = space + column * (cell + space), 40 + row * (cell + below + space)
        axis = figure.add_axes((x / width, 1 - (y + cell) / height, cell / width, cell / height))
        _show(axis, _load(image, None)[0])
        axis.set_anchor("S")
        is_right = int(truth) == int(answer)
        if not is_right:
            axis.spines[:].set_visible(True)
            axis.spines[:].set(color=VERMILION, linewidth=2.5)
        sign, color = ("✓", BLUE) if is_right else ("✗", VERMILION)
        tail = f" · {100 * float(probability):.0f}%"
        name = _fitting(figure, str(class_names[answer]), 9, cell - _measure(figure, f"{sign} {tail}", 9)[0])
        _write(
            figure, (x + cell / 2) / width, 1 - (y + cell + 13) / height, f"{sign} {name}{tail}", color=color, size=9
        )
        if not is_right:
            name = _fitting(figure, str(class_names[truth]), 8, cell - _measure(figure, "truth: ", 8)[0])
            _write(figure, (x + cell / 2) / width, 1 - (y + cell + 28) / height, f"truth: {name}", color=INK, size=8)
    wrong = sum(int(truth) != int(answer) for truth, answer in zip(truths, answers, strict=True))
    heading = f"a choice of {count} examples: {count - wrong} right, {wrong} wrong"
    _write(figure, space / width, 1 - 18 / height, heading, color=INK, size=10, ha="left", weight="bold")
    return _save(figure, path)


def shorten(name: str, length: int) -> str:
    """Returns a name in one line of at most `length` characters, with an ellipsis in place of its middle."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    tail = (length - 1) // 3
    return f"{name[: length - 1 - tail]}…{name[len(name) - tail :]}"


# ----- images


def _load(image: np.ndarray | str | Path, image_size: int | tuple[int, int] | None) -> tuple[np.ndarray, int]:
    """Returns an image as uint8 (H, W, 3), resized if asked, and how many channels it had."""
    if isinstance(image, str | Path):
        from vitreous.data.images import decode_image

        array = decode_image(image)
    else:
        array = np.asarray(image)
    is_float = np.issubdtype(array.dtype, np.floating)
    has_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if not (has_shape and array.size and (array.dtype == np.uint8 or is_float)):
        raise ConfigError(
            "Cannot draw the image. Expected uint8 or floating point of shape (H, W), (H, W, 1) or (H, W, 3). "
            f"Received: shape={array.shape}, dtype={array.dtype}. Pass one image, without a batch axis."
        )
    if is_float:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ConfigError(
                "Cannot draw the image. Expected floating point values in [0, 1]. "
                f"Received: values from {array.min():.4g} to {array.max():.4g}. "
                "Undo the normalisation, or pass uint8."
            )
        array = np.rint(array * 255).astype("uint8")
    num_channels = 1 if array.ndim == 2 else array.shape[2]
    pixels = np.broadcast_to(array.reshape(*array.shape[:2], num_channels), (*array.shape[:2], 3))
    if image_size is not None:
        from PIL import Image

        height, width = as_pair(image_size, "image_size")
        pixels = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)
        )
    return pixels, num_channels


def _with_padding(pixels: np.ndarray, grid: PatchGrid) -> tuple[np.ndarray, bool]:
    """Returns the image with the zeros around it, what no patch samples faded, and whether anything is."""
    image_size = (pixels.shape[0], pixels.shape[1])
    padded = np.pad(pixels, (*grid.pad_widths(image_size), (0, 0)))
    rows, columns = (
        np.isin(np.arange(length), indices)
        for length, indices in zip(padded.shape[:2], grid.indices(image_size), strict=True)
    )
    is_unused = ~(rows[:, None] & columns[None, :])
    padded[is_unused] = 255 - (255 - padded[is_unused]) // 4
    return padded, bool(is_unused.any())


def _shares(axis: np.ndarray, length: int, factor: int) -> np.ndarray:
    """Returns what share each source pixel has in each reduced one: (ceil(len(axis) / factor), length), float32.

    Args:
        axis: The source pixel of each mosaic pixel along one axis, -1 in gaps.
        length: Source pixels along this axis.
        factor: Mosaic pixels that become one.
    """
    bins = np.arange(axis.size) // factor
    shares = np.zeros((bins[-1] + 1, length), dtype="float32")
    is_pixel = axis >= 0
    np.add.at(shares, (bins[is_pixel], axis[is_pixel]), 1)
    return shares / np.bincount(bins)[:, None].astype("float32")


# ----- parts of a figure


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many pixels, with a canvas that draws without a screen."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _panels(sizes: Sequence[tuple[int, ...]], *, is_stacked: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure with two axes of exactly so many pixels (height, width), and room for titles and a caption."""
    margin, title, caption, between = 24, 34, 62, 44
    (first_height, first_width), (second_height, second_width) = sizes
    if is_stacked:
        inner = (first_height + between + second_height, max(first_width, second_width))
    else:
        inner = (max(first_height, second_height), first_width + between + second_width)
    width = max(inner[1], 600) + 2 * margin
    height = title + inner[0] + caption
    figure = _figure(width, height)
    axes = []
    x, y = (width - inner[1]) / 2, title
    for panel_height, panel_width in sizes:
        left = (width - panel_width) / 2 if is_stacked else x
        top = y if is_stacked else title + (inner[0] - panel_height) / 2
        box = (left / width, 1 - (top + panel_height) / height, panel_width / width, panel_height / height)
        axes.append(figure.add_axes(box))
        x, y = x + panel_width + between, y + panel_height + between
    return figure, axes


def _show(axis: Axes, pixels: np.ndarray) -> None:
    """Shows an image without ticks: crisp where it is enlarged, smooth where it is reduced."""
    axis.imshow(pixels, interpolation="auto", aspect="equal")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _draw_grid(
    axis: Axes, grid: PatchGrid, image_size: tuple[int, int], *, scale: float, framed: tuple[int, int]
) -> None:
    """Draws where patches lie, and frames one of them.

    Args:
        axis: Shows the padded image.
        grid: How it is cut.
        image_size: (H, W) of the image without padding.
        scale: Screen pixels of an image pixel.
        framed: Row and column of the patch to frame.
    """
    (first, second), counts = grid.extent, grid.grid_size(image_size)
    rows, columns = (np.arange(count) * stride - 0.5 for count, stride in zip(counts, grid.strides, strict=True))
    apart = min(grid.strides) * scale
    if apart >= 5:  # closer lines would hide the image
        lines: list[Any] = []
        if grid.strides[0] <= first and grid.strides[1] <= second:
            bottom, right = rows[-1] + first, columns[-1] + second
            lines += [[(-0.5, y), (right, y)] for y in [*rows, bottom]]
            lines += [[(x, -0.5), (x, bottom)] for x in [*columns, right]]
        else:
            lines += [
                [(x, y), (x + second, y), (x + second, y + first), (x, y + first), (x, y)]
                for y in rows
                for x in columns
            ]
        thickness = min(1.0, 0.08 * apart)
        for color, width, alpha in (("black", 2.2 * thickness, 0.35), ("white", thickness, 0.9)):
            axis.add_collection(LineCollection(lines, colors=color, linewidths=width, alpha=alpha), autolim=False)
    y, x = rows[framed[0]], columns[framed[1]]
    if grid.dilation_rate != (1, 1):
        row_indices, column_indices = grid.indices(image_size)
        squares = [
            [(u - 0.5, v - 0.5), (u + 0.5, v - 0.5), (u + 0.5, v + 0.5), (u - 0.5, v + 0.5)]
            for v in row_indices[framed[0]]
            for u in column_indices[framed[1]]
        ]
        dots = PolyCollection(squares, facecolors="none" if scale >= 6 else VERMILION, edgecolors=VERMILION)
        dots.set_linewidth(1 if scale >= 6 else 0)
        axis.add_collection(dots, autolim=False)
    _frame(axis, x, y, second, first, margin=1 / scale)


def _frame(axis: Axes, x: float, y: float, width: float, height: float, *, margin: float) -> None:
    """Frames a rectangle of an axis's image, so far outside it that a small one stays visible."""
    box = Rectangle((x - margin, y - margin), width + 2 * margin, height + 2 * margin)
    box.set(fill=False, edgecolor=VERMILION, linewidth=1.6, clip_on=False, zorder=5)
    axis.add_patch(box)


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
    return f"{100 * value:.1f}%" if kind == "accuracy" else f"{value:.3g}"


def _pair(pair: tuple[int, int]) -> str:
    return f"{pair[0]} × {pair[1]}"


# ----- text, always literal: a class named $x$ is written so


@functools.cache
def _families() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _SCRIPTS if name in installed)]


def _style(size: float) -> dict[str, Any]:
    return {"fontfamily": _families(), "fontsize": size, "color": INK, "parse_math": False}


def _write(
    where: Axes | Figure, x: float, y: float, text: str, *, color: str, size: float, ha: str = "center", **style: Any
) -> None:
    where.text(x, y, text, **{**_style(size), "color": color, "ha": ha, "va": "center", **style})


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, **{**_style(10), "pad": 7})


def _caption(figure: Figure, heading: str, details: str) -> None:
    height = figure.get_figheight() * DPI
    _write(figure, 0.5, 38 / height, heading, color=INK, size=11, weight="bold")
    _write(figure, 0.5, 17 / height, details, color=FAINT, size=9)


def _measure(figure: Figure, text: str, size: float) -> tuple[float, float]:
    """Returns (width, height) in pixels of a text of so many points."""
    probe = Text(0, 0, text, **_style(size))
    probe.set_figure(figure)
    box = probe.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    return box.width, box.height


def _fitting(figure: Figure, name: str, size: float, pixels: float) -> str:
    """Returns the name, shortened until it fits into so many pixels."""
    name = shorten(name, 60)
    while len(name) > 3 and _measure(figure, name, size)[0] > pixels:
        name = shorten(name, min(len(name) - 1, max(3, int(len(name) * pixels / _measure(figure, name, size)[0]))))
    return name


# ----- files


def _checked_path(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"Cannot write the figure. Expected a file name that ends in {', '.join(FORMATS)}. "
            f"Received: out={str(out)!r}. Change the suffix."
        )
    return path


def _save(figure: Figure, path: Path) -> Path:
    """Writes a figure through a temporary file beside it, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    suffix = path.suffix.lower().removeprefix(".")
    dates = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        figure.savefig(temporary, format=suffix, dpi=DPI, metadata=dates[suffix])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
