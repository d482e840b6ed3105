"""Resized positions and patch projections equal timm's, and keep what they must."""

from pathlib import Path

import numpy as np
import pytest

from vitreous.errors import ConfigError
from vitreous.resize import resize_matrix, resize_patch_kernel, resize_position_embedding

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 6), (14, 24), (14, 3), (1, 5), (5, 1), (7, 16)])
def test_matrix_is_a_weighted_mean(old, new):
    matrix = resize_matrix(old, new)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)  # no direction is preferred
    if old == new:
        np.testing.assert_array_equal(matrix, np.eye(old))


@pytest.mark.parametrize(("old", "new"), [(9, 17), (17, 9), (16, 5)])
def test_matrix_is_pillows_bicubic(old, new):
    from PIL import Image

    line = np.random.default_rng(0).normal(size=(1, old)).astype("float32")
    expected = np.asarray(Image.fromarray(line, mode="F").resize((new, 1), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(line @ resize_matrix(old, new).T, expected, atol=1e-5)


@pytest.mark.parametrize(("key", "grid"), [("to_6x5", (6, 5)), ("to_3x3", (3, 3))])
def test_positions_equal_timms(key, grid):
    with np.load(DATA / "timm_pos_embed_resize.npz") as arrays:
        source, expected = arrays["source"], arrays[key]
    resized = resize_position_embedding(source, (4, 4), grid, num_prefix=1)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=2e-6)
    np.testing.assert_array_equal(resized[:, :1], source[:, :1])


def test_positions_of_the_same_grid_are_left_alone():
    positions = np.random.default_rng(0).normal(size=(1, 14, 8)).astype("float32")
    assert resize_position_embedding(positions, (3, 4), (3, 4), num_prefix=2) is positions


def test_positions_of_a_wrong_grid_are_refused():
    expected = (
        r"^Cannot resize positions\. Expected shape \(1, 13, D\) for 1 tokens before a grid of 3 x 4\. "
        r"Received: shape=\(1, 17, 8\)\. Pass the grid that they were learned for\.$"
    )
    with pytest.raises(ConfigError, match=expected):
        resize_position_embedding(np.zeros((1, 17, 8)), (3, 4), (6, 6), num_prefix=1)


@pytest.mark.parametrize(("key", "size"), [("to_12", 12), ("to_5", 5)])
def test_patch_kernels_equal_timms(key, size):
    with np.load(DATA / "timm_patch_embed_resize.npz") as arrays:
        source, expected = arrays["source"].transpose(2, 3, 1, 0), arrays[key].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(resize_patch_kernel(source, size), expected, atol=1e-5)


def test_a_larger_patch_keeps_its_token():
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(4, 6, 3, 8)), rng.normal(size=(4, 6, 3))
    larger = np.einsum("ij,kl,jlc->ikc", resize_matrix(4, 8), resize_matrix(6, 9), patch)
    token = np.einsum("ijcd,ijc->d", kernel, patch)
    np.testing.assert_allclose(np.einsum("ijcd,ijc->d", resize_patch_kernel(kernel, (8, 9)), larger), token, atol=1e-9)


def test_patch_kernel_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"Expected shape \(P_h, P_w, C, D\)\. Received: shape=\(192, 48\)\."):
        resize_patch_kernel(np.zeros((192, 48)), 4)
