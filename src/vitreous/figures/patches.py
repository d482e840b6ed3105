"""An image, its patch grid, and its patches set apart."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitreous.errors import ConfigError
from vitreous.figures.canvas import (
    DPI,
    FAINT,
    INK,
    VERMILION,
    checked_path,
    create_figure,
    load_image,
    save,
    show,
    write,
    write_title,
)
from vitreous.patches import PatchGrid, as_pair

GAP = (201, 219, 236)  # between patches: pale blue, which neither white nor grey pixels merge with

_SMALL_PIXELS = 640  # what a small image is enlarged to, about
_LARGE_PIXELS = 1000  # what a large one is reduced to


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
        ConfigError: If the image's shape or type is not one of those above, not one patch fits, the suffix of `out`
            is unknown, or `out` is the image's own file.
        ImageError: If the file is not an image.
        MissingPathError: If the file does not exist.

    Example:

    ```python
    draw_patches(np.zeros((32, 48, 3), "uint8"), patch_size=8, strides=4, out="patches.png")
    ```
    """
    path = checked_path(out)
    if isinstance(image, str | Path) and path.exists() and Path(image).exists() and path.samefile(image):
        raise ConfigError(
            f"Cannot write the figure. Expected another file than the image. Received: out={str(out)!r}, which is the "
            "image itself. Pass another name."
        )
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
    pixels, num_channels = load_image(image, image_size)
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

    show(left, whole)
    _draw_grid(left, grid, image_shape, scale=panel[1] / whole.shape[1], framed=(rows // 2, columns // 2))
    write_title(left, "image" if padding == "valid" else "image, with its zeros")
    show(right, mosaic)
    _frame(right, columns // 2 * step[1] - 0.5, rows // 2 * step[0] - 0.5, cell[1], cell[0], margin=1)
    write_title(right, f"{rows} × {columns} patches")

    values = math.prod(size) * num_channels
    details = [f"image {height} × {width} × {num_channels}", f"patch {_pair(size)}", f"stride {_pair(grid.strides)}"]
    if grid.dilation_rate != (1, 1):
        details.append(f"dilation {_pair(grid.dilation_rate)}")
    details.append(f"padding {padding}")
    if has_faded:
        details.append("faded: in no patch")
    _caption(figure, f"{rows * columns:,} patches of {values:,} values", "   ·   ".join(details))
    return save(figure, path)


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
    figure = create_figure(width, height)
    axes = []
    x, y = (width - inner[1]) / 2, title
    for panel_height, panel_width in sizes:
        left = (width - panel_width) / 2 if is_stacked else x
        top = y if is_stacked else title + (inner[0] - panel_height) / 2
        box = (left / width, 1 - (top + panel_height) / height, panel_width / width, panel_height / height)
        axes.append(figure.add_axes(box))
        x, y = x + panel_width + between, y + panel_height + between
    return figure, axes


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


def _caption(figure: Figure, heading: str, details: str) -> None:
    height = figure.get_figheight() * DPI
    write(figure, 0.5, 38 / height, heading, color=INK, size=11, weight="bold")
    write(figure, 0.5, 17 / height, details, color=FAINT, size=9)


def _pair(pair: tuple[int, int]) -> str:
    return f"{pair[0]} × {pair[1]}"
