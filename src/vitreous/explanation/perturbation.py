"""Images with parts taken out: what occlusion, integrated gradients and the measure of faithfulness have in common."""

import math
from typing import Literal

import numpy as np

from vitreous.patches import PatchGrid

Fill = Literal["mean", "blur"]


def fill_image(image: np.ndarray, fill: Fill) -> np.ndarray:
    """Returns what stands for nothing in an image, uint8 of the same shape.

    Args:
        image: uint8 (H, W, C).
        fill: `"mean"`, the image's mean colour; or `"blur"`, the image under a Gaussian of a sixteenth of its longer
            side.
    """
    if fill == "mean":
        return np.broadcast_to(np.rint(image.mean(axis=(0, 1))).astype("uint8"), image.shape).copy()
    from PIL import ImageFilter

    from vitreous.data.images import to_array, to_pillow

    return to_array(to_pillow(image).filter(ImageFilter.GaussianBlur(max(image.shape[:2]) / 16)))


def find_edges(grid: PatchGrid, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixel rows and columns between which the cells of patches lie: (rows + 1,) and (columns + 1,).

    Cells part the whole image. Where patches touch, a cell is its patch; where they overlap or leave pixels out, cells
    meet halfway between the patches' centres.
    """
    edges = []
    for count, extent, stride, (before, _), pixels in zip(
        grid.grid_size(image_size), grid.extent, grid.strides, grid.pad_widths(image_size), image_size, strict=True
    ):
        centres = np.arange(count) * stride + extent / 2 - before
        between = np.floor((centres[1:] + centres[:-1]) / 2)
        edges.append(np.concatenate([[0], between, [pixels]]).astype("int64"))
    return edges[0], edges[1]


def spread(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns values of cells (..., rows, columns) as values of pixels (..., H, W)."""
    rows, columns = (np.diff(axis) for axis in edges)
    return np.repeat(np.repeat(values, rows, axis=-2), columns, axis=-1)


def sum_cells(pixels: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns the sums (rows, columns) of pixels (H, W) over cells."""
    return np.add.reduceat(np.add.reduceat(pixels, edges[0][:-1], axis=0), edges[1][:-1], axis=1)


def take_out(
    image: np.ndarray, nothing: np.ndarray, is_out: np.ndarray, edges: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Returns copies of an image without some of its patches.

    Args:
        image: uint8 (H, W, C).
        nothing: What stands in their place, of the same shape.
        is_out: bool (B, rows, columns).
        edges: Of the cells (`find_edges`).

    Returns:
        uint8 (B, H, W, C).
    """
    return np.where(spread(is_out, edges)[..., None], nothing, image)


def create_windows(grid_size: tuple[int, int], most: int) -> np.ndarray:
    """Returns the windows of an occlusion: bool (windows, rows, columns), each patch in one window.

    Windows are squares of as few patches as keep their number within `most`.
    """
    rows, columns = grid_size
    side = next(
        side for side in range(1, max(rows, columns) + 1) if _windows(rows, side) * _windows(columns, side) <= most
    )
    across = _windows(columns, side)
    index = (np.arange(rows) // side)[:, None] * across + (np.arange(columns) // side)[None]
    return np.arange(_windows(rows, side) * across)[:, None, None] == index


def _windows(count: int, side: int) -> int:
    return math.ceil(count / side)
