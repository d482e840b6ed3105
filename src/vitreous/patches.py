"""Where patches lie in an image: pure geometry, and the same cut in NumPy.

The words are those of `tf.image.extract_patches`: a patch has a size, consecutive patches are `strides` apart, and
`dilation_rate` spreads the pixels that one patch samples. `vitreous.layers.Patches` uses this geometry on every
backend; pictures and explanations use the NumPy functions, which need no Keras.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from vitreous.errors import ConfigError

if TYPE_CHECKING:  # the geometry itself needs no NumPy, and the command line's help should not load it
    import numpy as np


def as_pair(value: object, name: str) -> tuple[int, int]:
    """Returns (vertical, horizontal) from one positive integer or two.

    Raises:
        ConfigError: If `value` is neither.
    """
    pair = (value, value) if isinstance(value, Integral) else value
    if (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 1 for x in pair)
    ):
        return int(pair[0]), int(pair[1])
    raise ConfigError(
        f"Cannot use {name}. Expected a positive integer, or two (vertical, horizontal). "
        f"Received: {name}={value!r}. Pass pixels, such as 16 or (16, 8)."
    )


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """How an image is cut into patches.

    Args:
        size: Pixels sampled by one patch, (vertical, horizontal).
        strides: Pixels between the starts of neighbouring patches, (vertical, horizontal).
        dilation_rate: Distance between the pixels that one patch samples; (1, 1) samples neighbours.
        padding: `"valid"` keeps only patches that lie wholly inside; `"same"` surrounds the image with zeros, half of
            them (rounded down) above and left, so that there are ceil(pixels / stride) patches along each axis.

    Source: `tf.image.extract_patches` and TensorFlow's definition of SAME and VALID padding.
    """

    size: tuple[int, int]
    strides: tuple[int, int]
    dilation_rate: tuple[int, int] = (1, 1)
    padding: Literal["valid", "same"] = "valid"

    @property
    def extent(self) -> tuple[int, int]:
        """Pixels from the first to the last sampled one of a patch, both included."""
        height, width = ((size - 1) * rate + 1 for size, rate in zip(self.size, self.dilation_rate, strict=True))
        return height, width

    @property
    def is_tiling(self) -> bool:
        """Whether patches touch without overlap, gap or dilation."""
        return self.size == self.strides and self.dilation_rate == (1, 1)

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns (rows, columns) of patches in an image of (H, W) pixels.

        Raises:
            ConfigError: If not one patch fits.
        """
        if self.padding == "same":
            rows, columns = (-(-pixels // stride) for pixels, stride in zip(image_size, self.strides, strict=True))
        else:
            rows, columns = (
                (pixels - extent) // stride + 1
                for pixels, extent, stride in zip(image_size, self.extent, self.strides, strict=True)
            )
        if rows < 1 or columns < 1:
            raise ConfigError(
                f"Cannot cut the image into patches. Expected an image of at least {self.extent} pixels. "
                f"Received: image_size={tuple(image_size)}, size={self.size}, dilation_rate={self.dilation_rate}. "
                "Use a larger image, smaller patches, or padding='same'."
            )
        return rows, columns

    def pad_widths(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the zeros to add: ((above, below), (left, right))."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        pads = []
        for pixels, count, extent, stride in zip(
            image_size, self.grid_size(image_size), self.extent, self.strides, strict=True
        ):
            total = max((count - 1) * stride + extent - pixels, 0)
            pads.append((total // 2, total - total // 2))
        return pads[0], pads[1]

    def indices(self, image_size: tuple[int, int]) -> "tuple[np.ndarray, np.ndarray]":
        """Returns which rows and columns of the padded image each patch samples.

        Returns:
            Two int32 arrays, of shapes (rows, size[0]) and (columns, size[1]).
        """
        import numpy as np

        row_indices, column_indices = (
            (np.arange(count)[:, None] * stride + np.arange(size)[None, :] * rate).astype("int32")
            for count, size, stride, rate in zip(
                self.grid_size(image_size), self.size, self.strides, self.dilation_rate, strict=True
            )
        )
        return row_indices, column_indices


def extract_patches(images: "np.ndarray", grid: PatchGrid) -> "np.ndarray":
    """Cuts images into patches, in NumPy.

    Args:
        images: (B, H, W, C), any dtype.
        grid: How to cut.

    Returns:
        (B, rows, columns, size[0], size[1], C), same dtype: patch pixels in their own rows and columns.
    """
    import numpy as np

    image_size = images.shape[1:3]
    padded = np.pad(images, ((0, 0), *grid.pad_widths(image_size), (0, 0)))
    rows, columns = grid.indices(image_size)
    return padded[:, rows[:, None, :, None], columns[None, :, None, :], :]
