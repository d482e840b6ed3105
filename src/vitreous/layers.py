"""The layers of a Vision Transformer, smallest first.

    Patches            image -> patches                       (B, H, W, C) -> (B, N, P_h * P_w * C)
    PatchEncoder       patches -> tokens                      (B, N, ...)  -> (B, N, D)
    SelfAttention      tokens -> x + attention(norm(x))       (B, N, D)    -> (B, N, D)
    MLP                tokens -> x + dense(gelu(dense(norm(x))))
    TransformerBlock   attention, then MLP

`SelfAttention` and `MLP` own their residual skip: a caller never adds one. All layers run on the jax, torch and
tensorflow backends of Keras and compute the same numbers there.
"""

import functools
import importlib
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.patches import PatchGrid, as_pair

PACKAGE = "vitreous"  # under this name Keras finds the layers when it loads a model


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
        images: (B, H, W, C), any dtype; H and W must be known.

    Returns:
        (B, N, patch_dim), or (B, rows, columns, patch_dim) with `as_grid=True`; the images' dtype. patch_dim is
        size[0] * size[1] * C; within a patch, values run over rows, then columns, then channels.

    Raises:
        ConfigError: If not one patch fits the image.

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
        batch, height, width, channels = input_shape
        rows, columns = self.grid.grid_size((height, width))  # type: ignore[arg-type]
        dim = None if channels is None else self.grid.size[0] * self.grid.size[1] * channels
        return (batch, rows, columns, dim) if self.as_grid else (batch, rows * columns, dim)

    def call(self, images: Any) -> Any:
        """Cuts `images` (B, H, W, C) into patches."""
        _, height, width, channels = images.shape
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
            patches: What `call` returned, in either form, floating point where patches overlap.
            image_size: (H, W) of the images.

        Returns:
            (B, H, W, C). A pixel in one patch is exact; a pixel in several is their mean; a pixel in none (a
            remainder, a gap between patches) is 0.

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
        if not self.grid.is_tiling:
            row_indices, column_indices = self.grid.indices(image_size)
            pads = self.grid.pad_widths(image_size)
            pixels = _average(pixels, row_indices.reshape(-1), image_size[0] + sum(pads[0]), axis=1)
            pixels = _average(pixels, column_indices.reshape(-1), image_size[1] + sum(pads[1]), axis=2)
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


def _average(values: Any, indices: np.ndarray, length: int, *, axis: int) -> Any:
    """Returns, along `axis`, the mean of all values that share an index; 0 where an index is missing."""
    order = [axis, *(i for i in range(4) if i != axis)]
    counts = np.maximum(np.bincount(indices, minlength=length), 1).reshape(-1, 1, 1, 1)
    sums = ops.segment_sum(ops.transpose(values, order), ops.convert_to_tensor(indices), num_segments=length)
    return ops.transpose(sums / ops.cast(counts, values.dtype), np.argsort(order).tolist())


@keras.saving.register_keras_serializable(PACKAGE)
class PatchEncoder(keras.layers.Layer):
    """Projects each patch linearly to `projection_dim` values and adds a trainable position embedding.

    Args:
        projection_dim: D, the width of a token.
        use_class_token: Whether a trainable token is put before the patches; it has a position of its own.

    Call arguments:
        patches: (B, N, patch_dim), from `Patches`.

    Returns:
        (B, N, D) tokens, or (B, 1 + N, D) with the class token first.

    Weights: `projection/kernel` (patch_dim, D), `projection/bias` (D,), `position_embedding` (1, N or 1 + N, D),
    `class_token` (1, 1, D).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 1.
    """

    def __init__(self, projection_dim: int, *, use_class_token: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.projection_dim = projection_dim
        self.use_class_token = use_class_token
        self.projection = keras.layers.Dense(
            projection_dim, kernel_initializer="lecun_normal", dtype=self.dtype_policy, name="projection"
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for patches of `input_shape`."""
        num_tokens = input_shape[1] + int(self.use_class_token)  # type: ignore[operator]
        self.projection.build(input_shape)
        if self.use_class_token:
            self.class_token = self.add_weight(
                shape=(1, 1, self.projection_dim), initializer="zeros", name="class_token"
            )
        self.position_embedding = self.add_weight(
            shape=(1, num_tokens, self.projection_dim),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            name="position_embedding",
        )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the tokens' shape for the patches' shape."""
        return input_shape[0], input_shape[1] + int(self.use_class_token), self.projection_dim  # type: ignore[operator]

    def call(self, patches: Any) -> Any:
        """Turns `patches` (B, N, patch_dim) into tokens."""
        tokens = self.projection(patches)  # (B, N, D)
        if self.use_class_token:
            # The slot comes from a pad, not from a broadcast over the batch: exports keep a dynamic batch this way.
            tokens = ops.pad(tokens, ((0, 0), (1, 0), (0, 0)))
            first = ops.pad(self.class_token, ((0, 0), (0, tokens.shape[1] - 1), (0, 0)))
            tokens = tokens + first  # (B, 1 + N, D)
        return tokens + self.position_embedding

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "use_class_token": self.use_class_token,
        }


class _Residual(keras.layers.Layer):
    """What `SelfAttention` and `MLP` share: the norm before, dropout and stochastic depth after."""

    def __init__(self, *, dropout_rate: float, stochastic_depth_rate: float, epsilon: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.dropout_rate = dropout_rate
        self.stochastic_depth_rate = stochastic_depth_rate
        self.epsilon = epsilon
        self.norm = keras.layers.LayerNormalization(epsilon=epsilon, dtype=self.dtype_policy, name="norm")
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")
        self.stochastic_depth = keras.layers.Dropout(  # one draw for a whole example: the branch stays or goes
            stochastic_depth_rate, noise_shape=(None, 1, 1), dtype=self.dtype_policy, name="stochastic_depth"
        )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a residual layer keeps the shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "dropout_rate": self.dropout_rate,
            "stochastic_depth_rate": self.stochastic_depth_rate,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class SelfAttention(_Residual):
    """Multi-head self-attention with its norm before and its residual skip: `x + projection(attention(norm(x)))`.

    Args:
        num_heads: A, must divide the tokens' width D.
        dropout_rate: Share of the projection's outputs dropped in training, in [0, 1).
        attention_dropout_rate: Share of attention weights dropped in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the layer normalisation.
        use_fused_attention: Whether to call the backend's fused kernel (flash attention where it has one). Default
            None: on a GPU or TPU yes; on a CPU no, where the composed form trains 2 to 7 times faster (docs/log.md).
            Weights asked for or dropped in training are always composed. Both forms agree to 1e-5 in float32.

    Call arguments:
        x: (B, N, D) tokens.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too.

    Returns:
        (B, N, D), or that and the weights (B, A, N, N), in [0, 1] with rows that sum to 1.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2; pre-norm as in Dosovitskiy et al.
    2021, equation 2. Queries, keys and values come from one product, in this order.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        use_fused_attention: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            dropout_rate=dropout_rate, stochastic_depth_rate=stochastic_depth_rate, epsilon=epsilon, **kwargs
        )
        self.num_heads = num_heads
        self.attention_dropout_rate = attention_dropout_rate
        self.use_fused_attention = use_fused_attention
        self.attention_dropout = keras.layers.Dropout(
            attention_dropout_rate, dtype=self.dtype_policy, name="attention_dropout"
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        if dim % self.num_heads:
            raise ConfigError(
                f"Cannot build SelfAttention. Expected a width divisible by num_heads. Received: width={dim}, "
                f"num_heads={self.num_heads}. Change one of the two."
            )
        self.head_dim = dim // self.num_heads
        self.qkv = keras.layers.Dense(3 * dim, dtype=self.dtype_policy, name="qkv")
        self.projection = keras.layers.Dense(dim, dtype=self.dtype_policy, name="projection")
        for layer in (self.norm, self.qkv, self.projection):
            layer.build(input_shape)

    def call(self, x: Any, training: bool | None = None, return_attention: bool = False) -> Any:
        """Returns `x` plus the attention branch, and the attention weights if asked for."""
        _, num_tokens, dim = x.shape
        # Dense layers see (B * N, D): on a CPU, jax takes half the time for a matrix that it takes for a batch of them.
        qkv = self.qkv(ops.reshape(self.norm(x), (-1, dim)))  # (B * N, 3 * D)
        qkv = ops.reshape(qkv, (-1, num_tokens, 3, self.num_heads, self.head_dim))
        attention = None
        if self._is_fused(training) and not return_attention:
            query, key, value = (qkv[:, :, i] for i in range(3))  # (B, N, A, D / A)
            heads = ops.dot_product_attention(query, key, value)
        else:
            qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))
            query, key, value = qkv[0], qkv[1], qkv[2]  # (B, A, N, D / A)
            scores = ops.matmul(query * self.head_dim**-0.5, ops.transpose(key, (0, 1, 3, 2)))
            attention = ops.softmax(scores, axis=-1)  # (B, A, N, N)
            heads = ops.matmul(self.attention_dropout(attention, training=training), value)
            heads = ops.transpose(heads, (0, 2, 1, 3))
        branch = ops.reshape(self.projection(ops.reshape(heads, (-1, dim))), (-1, num_tokens, dim))
        branch = self.dropout(branch, training=training)
        x = x + self.stochastic_depth(branch, training=training)
        return (x, attention) if return_attention else x

    def _is_fused(self, training: bool | None) -> bool:
        if training and self.attention_dropout_rate:
            return False
        return _has_accelerator() if self.use_fused_attention is None else self.use_fused_attention

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "attention_dropout_rate": self.attention_dropout_rate,
            "use_fused_attention": self.use_fused_attention,
        }


@functools.cache
def _has_accelerator() -> bool:
    """Whether the backend computes on a GPU or TPU by default."""
    backend = importlib.import_module(keras.backend.backend())
    if keras.backend.backend() == "jax":
        return backend.default_backend() != "cpu"
    if keras.backend.backend() == "torch":
        return backend.cuda.is_available()
    return bool(backend.config.list_physical_devices("GPU"))


@keras.saving.register_keras_serializable(PACKAGE)
class MLP(_Residual):
    """Two dense layers with their norm before and their residual skip: `x + dense(activation(dense(norm(x))))`.

    The skip comes right after the last dense layer, inside this layer.

    Args:
        hidden_dim: Units of the first dense layer.
        activation: `"gelu"` (exact) or `"gelu_tanh"` (tanh approximation).
        dropout_rate: Share dropped after each dense layer in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the layer normalisation.

    Call arguments:
        x: (B, N, D) tokens.
        training: Whether dropout is active.

    Returns:
        (B, N, D).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3; GELU of Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        activation: Literal["gelu", "gelu_tanh"] = "gelu",
        dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ):
        super().__init__(
            dropout_rate=dropout_rate, stochastic_depth_rate=stochastic_depth_rate, epsilon=epsilon, **kwargs
        )
        self.hidden_dim = hidden_dim
        self.activation = activation

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        self.hidden = keras.layers.Dense(self.hidden_dim, dtype=self.dtype_policy, name="hidden")
        self.output_dense = keras.layers.Dense(dim, dtype=self.dtype_policy, name="output")
        self.norm.build(input_shape)
        self.hidden.build(input_shape)
        self.output_dense.build((*input_shape[:-1], self.hidden_dim))

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Returns `x` plus the MLP branch."""
        _, num_tokens, dim = x.shape
        hidden = self.hidden(ops.reshape(self.norm(x), (-1, dim)))  # (B * N, hidden_dim)
        hidden = ops.gelu(hidden, approximate=self.activation == "gelu_tanh")
        hidden = self.dropout(hidden, training=training)
        branch = ops.reshape(self.output_dense(hidden), (-1, num_tokens, dim))
        branch = self.dropout(branch, training=training)
        return x + self.stochastic_depth(branch, training=training)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {**super().get_config(), "hidden_dim": self.hidden_dim, "activation": self.activation}


@keras.saving.register_keras_serializable(PACKAGE)
class TransformerBlock(keras.layers.Layer):
    """One block of the encoder: `x = attention(x); x = mlp(x)`, each with its own norm and skip.

    Args:
        num_heads: A, attention heads.
        mlp_dim: Hidden units of the MLP.
        activation: Of the MLP, `"gelu"` or `"gelu_tanh"`.
        dropout_rate: Of projection and MLP, in [0, 1).
        attention_dropout_rate: Of the attention weights, in [0, 1).
        stochastic_depth_rate: Probability that a branch is dropped for an example in training.
        epsilon: Of the layer normalisations.

    Call arguments:
        x: (B, N, D) tokens.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too.

    Returns:
        (B, N, D), or that and the attention weights (B, A, N, N).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equations 2 and 3.
    """

    def __init__(
        self,
        num_heads: int,
        mlp_dim: int,
        *,
        activation: Literal["gelu", "gelu_tanh"] = "gelu",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.activation = activation
        self.attention_dropout_rate = attention_dropout_rate
        self.shared: dict[str, Any] = {
            "dropout_rate": dropout_rate,
            "stochastic_depth_rate": stochastic_depth_rate,
            "epsilon": epsilon,
        }
        self.attention = SelfAttention(
            num_heads,
            attention_dropout_rate=attention_dropout_rate,
            dtype=self.dtype_policy,
            name="attention",
            **self.shared,
        )
        self.mlp = MLP(mlp_dim, activation=activation, dtype=self.dtype_policy, name="mlp", **self.shared)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        self.attention.build(input_shape)
        self.mlp.build(input_shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a block keeps the shape."""
        return input_shape

    def call(self, x: Any, training: bool | None = None, return_attention: bool = False) -> Any:
        """Returns the tokens after attention and MLP, and the attention weights if asked for."""
        if return_attention:
            x, attention = self.attention(x, training=training, return_attention=True)
            return self.mlp(x, training=training), attention
        return self.mlp(self.attention(x, training=training), training=training)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "attention_dropout_rate": self.attention_dropout_rate,
            **self.shared,
        }
