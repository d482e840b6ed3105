"""Positions of patches as plain NumPy tables: fixed embeddings, rotary angles, and the resize of learned ones."""

import math
from functools import cache

import numpy as np

from vitreous.resize import resize_matrix


@cache
def resize_grid_matrix(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Returns the map (new rows * columns, old rows * columns), float32, that resamples values on a grid of patches."""
    return np.kron(resize_matrix(old[0], new[0]), resize_matrix(old[1], new[1])).astype("float32")


@cache
def sincos_positions(grid_size: tuple[int, int], dim: int) -> np.ndarray:
    """Returns fixed 2-D position embeddings.

    Args:
        grid_size: (rows, columns) of patches.
        dim: D, divisible by 4.

    Returns:
        (N, D) float32: a quarter each of sin(column), cos(column), sin(row), cos(row), at frequencies from 1 to
        1 / 10000.

    Source: Chen et al. 2021 (MoCo v3), https://arxiv.org/abs/2104.02057, section 4.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.meshgrid(*(np.arange(size) for size in grid_size), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype("float32")


@cache
def rope_tables(
    kind: str,
    grid_size: tuple[int, int],
    head_dim: int,
    *,
    temperature: float,
    reference_grid: tuple[int, int] = (0, 0),
    num_prefix_tokens: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sine and cosine that rotate queries and keys.

    Args:
        kind: `"eva"`: positions 0, 1, 2 ... along each axis, scaled to `reference_grid` where it is given; `"dinov3"`:
            the patches' centres between -1 and 1 along each axis.
        grid_size: (rows, columns) of patches.
        head_dim: d, divisible by 4: half of it turns with the row, half with the column.
        temperature: Base of the frequencies.
        reference_grid: For `"eva"`; (0, 0) for none.
        num_prefix_tokens: Tokens before the patches; they are not rotated.

    Returns:
        Two float32 arrays (prefix + N, d). Pairs lie side by side for `"eva"`, half a head apart for `"dinov3"`.

    Source: EVA-02, Fang et al. 2023, https://arxiv.org/abs/2303.11331; DINOv3, Simeoni et al. 2025,
    https://arxiv.org/abs/2508.10104.
    """
    exponents = np.arange(head_dim // 4) / (head_dim // 4)
    frequencies = temperature**-exponents
    if kind == "dinov3":
        axes = [(np.arange(size) + 0.5) / size * 2 - 1 for size in grid_size]
        frequencies = 2 * math.pi * frequencies
    else:
        axes = [
            np.arange(size, dtype="float64") * (reference / size if reference else 1.0)
            for size, reference in zip(grid_size, reference_grid, strict=True)
        ]
    rows, columns = np.meshgrid(*axes, indexing="ij")
    angles = np.concatenate([axis.reshape(-1, 1) * frequencies for axis in (rows, columns)], axis=1)  # (N, d / 2)
    angles = np.tile(angles, 2) if kind == "dinov3" else np.repeat(angles, 2, axis=1)  # (N, d)
    angles = np.concatenate([np.zeros((num_prefix_tokens, head_dim)), angles])  # no angle, no rotation
    return np.sin(angles).astype("float32"), np.cos(angles).astype("float32")
