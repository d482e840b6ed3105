"""`ConvolutionalStem`: a few convolutions in the place of patches."""

from typing import Any

import keras
from keras import ops

from vitreous.layers.patches import known_size
from vitreous.layers.residual import PACKAGE
from vitreous.spec import check, check_minimum, check_types


@keras.saving.register_keras_serializable(PACKAGE)
class ConvolutionalStem(keras.layers.Layer):
    """Brings an image down to the patch grid by 3x3 convolutions of stride 2, each with LayerNorm and GELU.

    Args:
        patch_size: Pixels of a patch's side: a power of two, 2 or more. There are log2(patch_size) convolutions.
        projection_dim: D, channels after the last convolution; each one before has half of those after it.
        epsilon: Of the layer normalisations.

    Call arguments:
        images: (B, H, W, C), H and W divisible by `patch_size`.

    Returns:
        (B, N, D), N = H * W / patch_size ** 2, row by row.

    Raises:
        ConfigError: If `patch_size` is no power of two, or the images' size is not known.

    Source: Xiao et al. 2021, https://arxiv.org/abs/2106.14881, with LayerNorm in place of BatchNorm, so that a
    model has no running statistics.
    """

    def __init__(self, patch_size: int, projection_dim: int, *, epsilon: float = 1e-6, **kwargs: Any):
        super().__init__(**kwargs)
        options = {"patch_size": patch_size, "projection_dim": projection_dim, "epsilon": epsilon}
        check_types(ConvolutionalStem.__init__, options)
        check_minimum(1, projection_dim=projection_dim)
        check(
            patch_size > 1 and patch_size.bit_count() == 1,
            "Cannot use patch_size.",
            "a power of two, 2 or more",
            f"patch_size={patch_size}",
            "Pass 2, 4, 8, 16 ...",
        )
        self.patch_size = patch_size
        self.projection_dim = projection_dim
        self.epsilon = epsilon
        count = patch_size.bit_length() - 1
        widths = [max(projection_dim >> (count - 1 - i), 1) for i in range(count)]
        self.convolutions = [
            keras.layers.Conv2D(
                width,
                3,
                strides=2,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
                data_format="channels_last",
                dtype=self.dtype_policy,
                name=f"convolution_{i}",
            )
            for i, width in enumerate(widths)
        ]
        self.norms = [
            keras.layers.LayerNormalization(epsilon=epsilon, dtype=self.dtype_policy, name=f"norm_{i}")
            for i in range(count)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for images of `input_shape`."""
        shape = input_shape
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            shape = convolution.compute_output_shape(shape)
            norm.build(shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the tokens' shape for the images' shape."""
        height, width, _ = known_size(self, input_shape)
        return input_shape[0], (height // self.patch_size) * (width // self.patch_size), self.projection_dim

    def call(self, images: Any) -> Any:
        """Returns the stem's output as (B, N, D)."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.gelu(norm(convolution(x)), approximate=True)
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], self.projection_dim))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "projection_dim": self.projection_dim,
            "epsilon": self.epsilon,
        }
