"""`ConvolutionalStem`: a few convolutions in the place of patches."""

from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

from vitreous.layers.blocks import activate
from vitreous.layers.patches import known_size
from vitreous.layers.residual import PACKAGE
from vitreous.spec import check, check_minimum, check_stem_depths, check_types


@keras.saving.register_keras_serializable(PACKAGE)
class ConvolutionalStem(keras.layers.Layer):
    """Brings an image down to the patch grid by 3x3 convolutions of stride 2, each with LayerNorm and GELU.

    After them may stand residual ones of stride 1: `x + activation(norm(convolution(x)))`.

    Args:
        patch_size: Pixels of a patch's side: a power of two, 2 or more. There are log2(patch_size) convolutions of
            stride 2.
        dim: Channels after the last convolution; each one of stride 2 before has half of those of the next.
        depths: Residual convolutions after each of the last ones of stride 2; empty: none.
        activation: `"gelu"` (exact), `"gelu_tanh"`, `"quick_gelu"` or `"silu"`.
        epsilon: Of the layer normalisations.

    Call arguments:
        images: (B, H, W, C), H and W divisible by `patch_size`.

    Returns:
        (B, N, dim), N = H * W / patch_size ** 2, row by row.

    Raises:
        ConfigError: If `patch_size` is no power of two, `depths` are more than there are convolutions of stride 2, or
            the images' size is not known.

    Source: Xiao et al. 2021, https://arxiv.org/abs/2106.14881, with LayerNorm in place of BatchNorm, so that a
    model has no running statistics; residuals: He et al. 2016, https://arxiv.org/abs/1512.03385, one convolution each.
    """

    def __init__(
        self,
        patch_size: int,
        dim: int,
        *,
        depths: Sequence[int] = (),
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu_tanh",
        epsilon: float = 1e-6,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        options = {"patch_size": patch_size, "dim": dim, "activation": activation, "epsilon": epsilon}
        check_types(ConvolutionalStem.__init__, options)
        check_minimum(1, dim=dim)
        check(
            patch_size > 1 and patch_size.bit_count() == 1,
            "Cannot use patch_size.",
            "a power of two, 2 or more",
            f"patch_size={patch_size}",
            "Pass 2, 4, 8, 16 ...",
        )
        count = patch_size.bit_length() - 1
        check_stem_depths(tuple(depths), count)
        self.patch_size = patch_size
        self.dim = dim
        self.depths = tuple(depths)
        self.activation = activation
        self.epsilon = epsilon
        self.convolutions: list[Any] = []
        self.norms: list[Any] = []
        for i, depth in enumerate((0,) * (count - len(self.depths)) + self.depths):
            width = max(dim >> (count - 1 - i), 1)
            for j in range(1 + depth):
                name = f"{i}_{j}" if j else f"{i}"
                self.convolutions.append(
                    keras.layers.Conv2D(
                        width,
                        3,
                        strides=1 if j else 2,
                        padding="same",
                        use_bias=False,
                        kernel_initializer="he_normal",
                        data_format="channels_last",
                        dtype=self.dtype_policy,
                        name=f"convolution_{name}",
                    )
                )
                self.norms.append(
                    keras.layers.LayerNormalization(epsilon=epsilon, dtype=self.dtype_policy, name=f"norm_{name}")
                )

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
        return input_shape[0], (height // self.patch_size) * (width // self.patch_size), self.dim

    def call(self, images: Any) -> Any:
        """Returns the stem's output as (B, N, dim)."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = activate(norm(convolution(x)), self.activation)
            x = x + y if convolution.strides == (1, 1) else y
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], self.dim))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "dim": self.dim,
            "depths": self.depths,
            "activation": self.activation,
            "epsilon": self.epsilon,
        }
