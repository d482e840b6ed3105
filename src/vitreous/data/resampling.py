"""Cutting a part out of an image and resizing it, antialiased: as Pillow does it, several times faster.

The kernels are those of the Rust crate fast_image_resize (package cykooz.resizer). Where there is no build of it,
Pillow does the work.
"""

import functools
import threading
from typing import Any

import numpy as np

from vitreous.data.images import resampling, to_array, to_pillow
from vitreous.spec import InputSpec

_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
_OF_THREAD = threading.local()


def resize_box(image: np.ndarray, box: tuple[int, int, int, int], input_spec: InputSpec) -> np.ndarray:
    """Cuts a rectangle out of an image and brings it to the size that a model takes.

    Args:
        image: uint8, (H, W, 1 or 3).
        box: (left, top, right, bottom) in pixels. What lies outside has no influence.
        input_spec: Size and filter of the result.

    Returns:
        uint8, (*input_spec.image_size, C); it may be read-only. Against Pillow 13's resize of the same rectangle: of
        75 million values, from random crops of photographs to 224 pixels, 99.7% equal, 0.3% 1 level off, 118 2 levels.
        Earlier versions of Pillow differ in the order of their two passes, and so by more where a filter overshoots.
    """
    left, top, right, bottom = box
    part = image[top:bottom, left:right]
    height, width = input_spec.image_size
    if part.shape[:2] == (height, width):
        return part
    kernels = _kernels()
    if kernels is None or input_spec.interpolation not in _FILTERS:
        return to_array(to_pillow(part).resize((width, height), resampling(input_spec)))
    if not hasattr(_OF_THREAD, "resizer"):
        _OF_THREAD.resizer = kernels.Resizer()
    channels = image.shape[2]
    pixel_type = kernels.PixelType.U8x3 if channels == 3 else kernels.PixelType.U8
    options = _options(input_spec.interpolation)
    rows, columns = part.shape[:2]
    source = kernels.ImageData(columns, rows, pixel_type, part.tobytes())
    # The package resizes columns of pixels first. Pillow (13) does so only where they shrink most; what is clipped
    # between the passes depends on their order.
    if rows <= height or rows - height <= 2 * (columns - width):
        between = kernels.ImageData(width, rows, pixel_type)
        _OF_THREAD.resizer.resize(source, between, options)
        source = between
    result = kernels.ImageData(width, height, pixel_type)
    _OF_THREAD.resizer.resize(source, result, options)
    return np.frombuffer(result.get_buffer(), "uint8").reshape(height, width, channels)


@functools.cache
def _kernels() -> Any:
    """Returns the module of the kernels, or None on a machine that it is not built for."""
    try:
        import cykooz_resizer
    except ImportError:
        return None
    return cykooz_resizer


@functools.cache
def _options(interpolation: str) -> Any:
    kernels = _kernels()
    return kernels.ResizeOptions(kernels.ResizeAlg.convolution(kernels.FilterType[_FILTERS[interpolation]]))


def flip_columns(image: np.ndarray) -> np.ndarray:
    """Returns a mirrored copy, uint8 (H, W, C): channel by channel, which NumPy copies six times faster."""
    flipped = np.empty_like(image)
    for channel in range(image.shape[2]):
        flipped[:, :, channel] = image[:, ::-1, channel]
    return flipped
