"""Images to patches and back: `Patches`, and what prepares images for it."""

from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers.residual import PACKAGE
from vitreous.patches import PatchGrid, as_pair


@keras.saving.register_keras_serializable(PACKAGE)
class Patches(keras.layers.Layer):
    """Cuts images into patches, as `tf.image.extract_patches` does, and puts them together again.

    Args:
        size: Pixels of a patch, (vertical, horizontal) or one number.
        strides: Pixels between neighbouring patches. Default: `size`. Smaller than `size`, patches overlap.
        dilation_rate: Distance between the pixels that one patch samples. Default: 1.
        padding: `"valid"` (only whole patches) or `"same"` (zeros around the image).
        as_grid: Whether patches keep their rows and columns.

    Call arguments:
        images: (B, H, W, C), any dtype; H, W and C must be known.

    Returns:
        (B, N, patch_dim), or (B, rows, columns, patch_dim) with `as_grid=True`; the images' dtype. patch_dim is
        size[0] * size[1] * C; within a patch, values run over rows, then columns, then channels.

    Raises:
        ConfigError: If not one patch fits the image, or its size is not known.

    Example:

    ```python
    patches = Patches(size=16)(images)  # (8, 224, 224, 3) -> (8, 196, 768)
    ```

    Source: `tf.image.extract_patches`. Pixels are gathered, not convolved with an identity kernel as other backends
    do it: values are exact for every dtype, and one NaN stays one NaN.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        strides: int | tuple[int, int] | None = None,
        dilation_rate: int | tuple[int, int] = 1,
        padding: Literal["valid", "same"] = "valid",
        as_grid: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if padding not in ("valid", "same"):
            raise ConfigError(
                f"Cannot create Patches. Expected padding 'valid' or 'same'. Received: padding={padding!r}. "
                "Pass one of the two."
            )
        size = as_pair(size, "size")
        self.grid = PatchGrid(
            size=size,
            strides=size if strides is None else as_pair(strides, "strides"),
            dilation_rate=as_pair(dilation_rate, "dilation_rate"),
            padding=padding,
        )
        self.as_grid = as_grid
        self.built = True  # no weights

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the patches' shape for the images' shape."""
        height, width, channels = known_size(self, input_shape)
        rows, columns = self.grid.grid_size((height, width))
        batch, dim = input_shape[0], self.grid.size[0] * self.grid.size[1] * channels
        return (batch, rows, columns, dim) if self.as_grid else (batch, rows * columns, dim)

    def call(self, images: Any) -> Any:
        """Cuts `images` (B, H, W, C) into patches."""
        height, width, channels = known_size(self, images.shape)
        image_size = (height, width)
        rows, columns = self.grid.grid_size(image_size)
        patch_height, patch_width = self.grid.size
        pads = self.grid.pad_widths(image_size)
        if any(sum(pad) for pad in pads):
            images = ops.pad(images, ((0, 0), *pads, (0, 0)))
        if self.grid.is_tiling:  # every pixel is used once: no gather needed
            pixels = images[:, : rows * patch_height, : columns * patch_width]
        else:
            row_indices, column_indices = self.grid.indices(image_size)
            pixels = ops.take(images, row_indices.reshape(-1), axis=1)
            pixels = ops.take(pixels, column_indices.reshape(-1), axis=2)
        pixels = ops.reshape(pixels, (-1, rows, patch_height, columns, patch_width, channels))
        pixels = ops.transpose(pixels, (0, 1, 3, 2, 4, 5))  # (B, rows, columns, P_h, P_w, C)
        dim = patch_height * patch_width * channels
        return ops.reshape(pixels, (-1, rows, columns, dim) if self.as_grid else (-1, rows * columns, dim))

    def reconstruct(self, patches: Any, image_size: tuple[int, int]) -> Any:
        """Puts patches together to the images they were cut from.

        Args:
            patches: What `call` returned, in either form.
            image_size: (H, W) of the images.

        Returns:
            (B, H, W, C), the patches' dtype. A pixel in one patch is exact; a pixel in several is their mean, taken
            in float32 (or float64) and rounded for an integer dtype; a pixel in none (a remainder, a gap between
            patches) is 0.

        Raises:
            ConfigError: If the patches do not belong to an image of that size.
        """
        rows, columns = self.grid.grid_size(image_size)
        patch_height, patch_width = self.grid.size
        count, dim = int(np.prod(patches.shape[1:-1])), patches.shape[-1]
        if count != rows * columns or dim % (patch_height * patch_width):
            raise ConfigError(
                f"Cannot put patches together. Expected {rows} x {columns} patches of {patch_height} x {patch_width} "
                f"pixels for image_size={tuple(image_size)}. Received: patches.shape={tuple(patches.shape)}. "
                "Pass the size of the image that the patches were cut from."
            )
        channels = dim // (patch_height * patch_width)
        pixels = ops.reshape(patches, (-1, rows, columns, patch_height, patch_width, channels))
        pixels = ops.transpose(pixels, (0, 1, 3, 2, 4, 5))  # (B, rows, P_h, columns, P_w, C)
        pixels = ops.reshape(pixels, (-1, rows * patch_height, columns * patch_width, channels))
        dtype = keras.backend.standardize_dtype(pixels.dtype)
        if not self.grid.is_tiling:
            pixels = pixels if dtype == "float64" else ops.cast(pixels, "float32")  # a sum of uint8 would overflow
            row_indices, column_indices = self.grid.indices(image_size)
            pads = self.grid.pad_widths(image_size)
            pixels = _average(pixels, row_indices.reshape(-1), image_size[0] + sum(pads[0]), axis=1)
            pixels = _average(pixels, column_indices.reshape(-1), image_size[1] + sum(pads[1]), axis=2)
            pixels = ops.cast(pixels if keras.backend.is_float_dtype(dtype) else ops.round(pixels), dtype)
        (top, _), (left, _) = self.grid.pad_widths(image_size)
        missing = [max(size - extent, 0) for size, extent in zip(image_size, pixels.shape[1:3], strict=True)]
        if any(missing):
            pixels = ops.pad(pixels, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
        return pixels[:, top : top + image_size[0], left : left + image_size[1]]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "size": self.grid.size,
            "strides": self.grid.strides,
            "dilation_rate": self.grid.dilation_rate,
            "padding": self.grid.padding,
            "as_grid": self.as_grid,
        }


def known_size(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> tuple[int, int, int]:
    """Returns (H, W, C) of images of that shape, or raises `ConfigError` where one is not known."""
    size = tuple(shape[1:])
    if len(size) != 3 or None in size:
        raise ConfigError(
            f"Cannot apply {layer.name}. Expected images of shape (B, H, W, C), with H, W and C known. "
            f"Received: shape={tuple(shape)}. Name the size, such as keras.Input((224, 224, 3))."
        )
    return size  # type: ignore[return-value]


def _average(values: Any, indices: np.ndarray, length: int, *, axis: int) -> Any:
    """Returns, along `axis`, the mean of all values that share an index; 0 where an index is missing."""
    order = [axis, *(i for i in range(4) if i != axis)]
    counts = np.maximum(np.bincount(indices, minlength=length), 1).reshape(-1, 1, 1, 1)
    sums = ops.segment_sum(ops.transpose(values, order), ops.convert_to_tensor(indices), num_segments=length)
    return ops.transpose(sums / ops.cast(counts, values.dtype), np.argsort(order).tolist())


def shift_images(images: Any, shift: tuple[int, int]) -> Any:
    """Puts four diagonally shifted copies beside each image: (B, H, W, C) to (B, H, W, 5 C), zeros moving in.

    Source: shifted patch tokenization, Lee et al. 2021, https://arxiv.org/abs/2112.13492, section 3.1.
    """
    down, right = shift
    height, width = images.shape[1:3]
    padded = ops.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    corners = [(0, 0), (0, 2 * right), (2 * down, 0), (2 * down, 2 * right)]
    copies = [padded[:, top : top + height, left : left + width] for top, left in corners]
    return ops.concatenate([images, *copies], axis=-1)
