"""Cutting a part out of an image and resizing it, antialiased: as Pillow does it, several times faster.

The kernels are those of the Rust crate fast_image_resize (package cykooz.resizer). Where there is no build of it,
Pillow does the work.
"""

import functools
import threading
from concurrent.futures import Executor
from typing import Any

import numpy as np

from vitreous.data.images import pad_image, place_image, resampling, resize_image, to_array, to_pillow
from vitreous.spec import InputSpec

_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
_OF_THREAD = threading.local()
_SMALL_PIXELS = 64 * 64  # up to here, handing an image to a thread costs as much as the work


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
    if not _has_kernel(input_spec):
        return to_array(to_pillow(part).resize((width, height), resampling(input_spec)))
    return _convolve(part, (height, width), (0, 0), (height, width), input_spec.interpolation)


def resize_image_fast(image: np.ndarray, input_spec: InputSpec) -> np.ndarray:
    """Does what `resize_image` does several times faster, though not to the pixel: only what stays is computed.

    Args:
        image: uint8, (H, W, 1 or 3).
        input_spec: Size, filter and `resize_mode`.

    Returns:
        uint8, (*input_spec.image_size, C); it may be read-only, or a view of `image`. Against `resize_image` with
        Pillow 13, of the values of 125 photographs at 224 pixels, bicubic: 99.7% equal, 0.3% 1 level off, 6 in ten
        million 2 levels. Earlier versions of Pillow differ by more.

    Raises:
        ConfigError: If `image` is not such an array.
    """
    if not _has_kernel(input_spec):
        return resize_image(image, input_spec)
    image, cover, (top, left), size = place_image(image, input_spec)
    if image.shape[:2] == cover:
        part = image[top : top + size[0], left : left + size[1]]
    else:
        part = _convolve(image, cover, (top, left), size, input_spec.interpolation)
    return pad_image(part, input_spec)


def resize_batch(images: np.ndarray, input_spec: InputSpec, pool: Executor | None = None) -> np.ndarray:
    """Returns images (B, H, W, 1 or 3) uint8 in the size of `input_spec`, whole: nothing is cut off.

    With a pool, large images are shared among its threads.
    """
    height, width = images.shape[1:3]
    is_large = height * width > _SMALL_PIXELS
    run = pool.map if pool is not None and is_large else map
    return np.stack(list(run(lambda image: resize_box(image, (0, 0, width, height), input_spec), images)))


def _has_kernel(input_spec: InputSpec) -> bool:
    return _kernels() is not None and input_spec.interpolation in _FILTERS


def _convolve(
    image: np.ndarray, cover: tuple[int, int], place: tuple[int, int], size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """Returns what lies at `place` (top, left), `size` (rows, columns) large, of an image resized to `cover`."""
    kernels = _kernels()
    if not hasattr(_OF_THREAD, "resizer"):
        _OF_THREAD.resizer = kernels.Resizer()
    height, width, channels = image.shape
    pixel_type = kernels.PixelType.U8x3 if channels == 3 else kernels.PixelType.U8
    source = kernels.ImageData(width, height, pixel_type, image.tobytes())
    (top, rows), (left, columns) = (
        (first * side / whole, min(count * side / whole, side - first * side / whole))
        for first, count, side, whole in zip(place, size, (height, width), cover, strict=True)
    )
    # One axis at a time: the package (4.0) reads beyond its memory where a box cuts both. What is clipped between the
    # passes depends on their order: Pillow (13) begins with the columns of pixels only where they shrink most.
    if height <= cover[0] or height - cover[0] <= 2 * (width - cover[1]):
        between = kernels.ImageData(size[1], height, pixel_type)
        boxes = (left, 0, columns, height), (0, top, size[1], rows)
    else:
        between = kernels.ImageData(width, size[0], pixel_type)
        boxes = (0, top, width, rows), (left, 0, columns, size[0])
    result = kernels.ImageData(size[1], size[0], pixel_type)
    _OF_THREAD.resizer.resize(source, between, _options(interpolation, *boxes[0]))
    _OF_THREAD.resizer.resize(between, result, _options(interpolation, *boxes[1]))
    return np.frombuffer(result.get_buffer(), "uint8").reshape(*size, channels)


@functools.cache
def _kernels() -> Any:
    """Returns the module of the kernels, or None on a machine that it is not built for."""
    try:
        import cykooz_resizer
    except ImportError:
        return None
    return cykooz_resizer


def _options(interpolation: str, left: float, top: float, width: float, height: float) -> Any:
    """Returns a filter, and the part of an image that it goes over."""
    kernels = _kernels()
    algorithm = kernels.ResizeAlg.convolution(kernels.FilterType[_FILTERS[interpolation]])
    return kernels.ResizeOptions(algorithm, crop_box=kernels.CropBox(left, top, width, height))


def flip_columns(image: np.ndarray) -> np.ndarray:
    """Returns a mirrored copy, uint8 (H, W, C): channel by channel, which NumPy copies six times faster."""
    flipped = np.empty_like(image)
    for channel in range(image.shape[2]):
        flipped[:, :, channel] = image[:, ::-1, channel]
    return flipped
