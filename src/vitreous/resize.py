"""Resizing learned positions and patch projections to another grid: linear maps, in NumPy.

Both are products with small matrices, one for the rows and one for the columns; nothing is sampled pixel by pixel.
"""

import functools

import numpy as np

from vitreous.errors import ConfigError
from vitreous.patches import as_pair

CUBIC = -0.5  # the free coefficient of the cubic filter, as antialiased resizes in Pillow and PyTorch have it


def _cubic(x: np.ndarray) -> np.ndarray:
    """Returns Keys's cubic filter at distances `x`."""
    x, a = np.abs(x), CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def _resize_matrix(old: int, new: int) -> np.ndarray:
    scale = old / new
    stretch = max(scale, 1.0)  # shrinking widens the filter: that is the antialiasing
    support = 2.0 * stretch
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = scale * (i + 0.5)
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), old)
        weights = _cubic((np.arange(first, last) - centre + 0.5) / stretch)
        matrix[i, first:last] = weights / weights.sum()
    matrix.flags.writeable = False
    return matrix


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix that resizes a line of `old` samples to `new`: antialiased bicubic.

    Args:
        old: Samples there are, at least 1.
        new: Samples wanted, at least 1.

    Returns:
        (new, old) float64, read-only; each row sums to 1. The identity where `old` equals `new`.

    Source: `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` and Pillow's `BICUBIC`; Keys 1981,
    https://doi.org/10.1109/TASSP.1981.1163711, with a = -0.5.
    """
    return _resize_matrix(as_pair(old, "old")[0], as_pair(new, "new")[0])


def resize_position_embedding(
    embedding: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix: int = 0,
) -> np.ndarray:
    """Resizes learned positions to another grid of patches.

    Args:
        embedding: (1, num_prefix + rows * columns, D) positions.
        old_grid: (rows, columns) that they were learned for.
        new_grid: (rows, columns) wanted.
        num_prefix: Positions before those of patches (class token, registers); they are kept.

    Returns:
        (1, num_prefix + new rows * new columns, D), the dtype of `embedding`.

    Raises:
        ConfigError: If `embedding` does not have the shape that the grid asks for.

    Source: timm's `resample_abs_pos_embed` (bicubic, antialiased). Different: products are summed in float64.
    """
    (rows, columns), (new_rows, new_columns) = as_pair(old_grid, "old_grid"), as_pair(new_grid, "new_grid")
    if embedding.ndim != 3 or embedding.shape[0] != 1 or embedding.shape[1] != num_prefix + rows * columns:
        raise ConfigError(
            f"Cannot resize positions. Expected shape (1, {num_prefix + rows * columns}, D) for {num_prefix} tokens "
            f"before a grid of {rows} x {columns}. Received: shape={tuple(embedding.shape)}. Pass the grid that they "
            "were learned for."
        )
    if (rows, columns) == (new_rows, new_columns):
        return embedding
    prefix, grid = embedding[:, :num_prefix], embedding[0, num_prefix:].reshape(rows, columns, -1)
    vertical, horizontal = resize_matrix(rows, new_rows), resize_matrix(columns, new_columns)
    grid = np.einsum("ij,kl,jld->ikd", vertical, horizontal, grid.astype("float64"), optimize=True)
    return np.concatenate([prefix, grid.reshape(1, new_rows * new_columns, -1).astype(embedding.dtype)], axis=1)


def resize_patch_kernel(kernel: np.ndarray, new_size: int | tuple[int, int]) -> np.ndarray:
    """Resizes a patch projection so that resized patches keep their tokens, as nearly as can be.

    Args:
        kernel: (P_h, P_w, C, D), the projection's weights in rows and columns.
        new_size: (P_h, P_w) wanted, or one number.

    Returns:
        (new P_h, new P_w, C, D), the dtype of `kernel`.

    Raises:
        ConfigError: If `kernel` has not four axes, or a size is not positive.

    Source: Beyer et al. 2023 (FlexiViT), https://arxiv.org/abs/2212.08013, section 3.4; timm's `resample_patch_embed`.
    Different: the pseudo-inverse of a Kronecker product is the product of two small pseudo-inverses, so the large
    matrix is never built.
    """
    if kernel.ndim != 4:
        raise ConfigError(
            f"Cannot resize the patch projection. Expected shape (P_h, P_w, C, D). Received: "
            f"shape={tuple(kernel.shape)}. Reshape the kernel."
        )
    height, width = as_pair(new_size, "new_size")
    if kernel.shape[:2] == (height, width):
        return kernel
    # Patches x become R x with R = vertical (x) horizontal. The least-squares answer to w . x = w' . R x is
    # w' = pinv(R^T) w.
    vertical = np.linalg.pinv(resize_matrix(kernel.shape[0], height).T)
    horizontal = np.linalg.pinv(resize_matrix(kernel.shape[1], width).T)
    resized = np.einsum("ij,kl,jlcd->ikcd", vertical, horizontal, kernel.astype("float64"), optimize=True)
    return resized.astype(kernel.dtype)
