"""The layers of a Vision Transformer, smallest first.

    Patches            image -> patches                       (B, H, W, C) -> (B, N, P_h * P_w * C)
    ConvolutionalStem  image -> what stands for patches       (B, H, W, C) -> (B, N, D)
    PatchEncoder       patches -> tokens                      (B, N, ...)  -> (B, N, D)
    PatchDropout       tokens -> some of them, in training
    SelfAttention      tokens -> x + attention(norm(x))       (B, N, D)    -> (B, N, D)
    MLP                tokens -> x + dense(gelu(dense(norm(x))))
    TransformerBlock   attention, then MLP
    AttentionPool      tokens -> one vector                   (B, N, D)    -> (B, D)

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
from vitreous.positions import resize_grid_matrix, sincos_positions

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

    Source: Xiao et al. 2021, https://arxiv.org/abs/2106.14881, with LayerNorm in place of BatchNorm, so that a
    model has no running statistics.
    """

    def __init__(self, patch_size: int, projection_dim: int, *, epsilon: float = 1e-6, **kwargs: Any):
        super().__init__(**kwargs)
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
        batch, height, width, _ = input_shape
        return batch, (height // self.patch_size) * (width // self.patch_size), self.projection_dim  # type: ignore[operator]

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


@keras.saving.register_keras_serializable(PACKAGE)
class PatchEncoder(keras.layers.Layer):
    """Projects each patch linearly to `projection_dim` values and adds a trainable position embedding.

    Args:
        projection_dim: D, the width of a token.
        use_bias: Whether the projection has a bias.
        use_patch_norm: Whether patches are normalised before the projection.
        use_class_token: Whether a trainable class token is put first.
        use_distillation_token: Whether a trainable distillation token follows it.
        num_registers: Trainable register tokens before the patches.
        position: `"learned"`, `"sincos"` (fixed; needs `grid_size`) or `"none"`.
        position_tokens: Which tokens have a learned position: `"all"`, `"class"` (all but registers) or `"patches"`.
        grid_size: (rows, columns) of the patches that the positions are for. Default: not known; then only that many
            patches can be encoded.
        epsilon: Of the patch norm.

    Call arguments:
        patches: (B, N, patch_dim), from `Patches`.
        grid_size: (rows, columns) of these patches, where it is not the layer's own: positions are resized to it.

    Returns:
        (B, prefix + N, D) tokens: class, distillation, registers, patches.

    Weights: `projection/kernel` (patch_dim, D), `projection/bias` (D,), `position_embedding` (1, positions, D),
    `class_token` (1, 1, D), `distillation_token` (1, 1, D), `registers` (1, R, D).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 1.
    """

    def __init__(
        self,
        projection_dim: int,
        *,
        use_bias: bool = True,
        use_patch_norm: bool = False,
        use_class_token: bool = False,
        use_distillation_token: bool = False,
        num_registers: int = 0,
        position: Literal["learned", "sincos", "none"] = "learned",
        position_tokens: Literal["all", "class", "patches"] = "all",
        grid_size: tuple[int, int] | None = None,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if position == "sincos" and grid_size is None:
            raise ConfigError(
                "Cannot create PatchEncoder. Expected grid_size with position='sincos'. Received: grid_size=None. "
                "Pass (rows, columns) of the patches."
            )
        self.projection_dim = projection_dim
        self.use_bias = use_bias
        self.use_patch_norm = use_patch_norm
        self.use_class_token = use_class_token
        self.use_distillation_token = use_distillation_token
        self.num_registers = num_registers
        self.position = position
        self.position_tokens = position_tokens
        self.grid_size = (grid_size[0], grid_size[1]) if grid_size else None
        self.epsilon = epsilon
        self.num_prefix_tokens = int(use_class_token) + int(use_distillation_token) + num_registers
        self.projection = keras.layers.Dense(
            projection_dim,
            use_bias=use_bias,
            kernel_initializer="lecun_normal",
            dtype=self.dtype_policy,
            name="projection",
        )
        if use_patch_norm:
            self.patch_norm = keras.layers.LayerNormalization(
                epsilon=epsilon, dtype=self.dtype_policy, name="patch_norm"
            )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for patches of `input_shape`."""
        dim = self.projection_dim
        if self.use_patch_norm:
            self.patch_norm.build(input_shape)
        self.projection.build(input_shape)
        self.prefix = []  # what stands before the patches, in order
        for name, count in (
            ("class_token", int(self.use_class_token)),
            ("distillation_token", int(self.use_distillation_token)),
            ("registers", self.num_registers),
        ):
            if count:
                initializer = "zeros" if name == "class_token" else keras.initializers.TruncatedNormal(stddev=0.02)
                weight = self.add_weight(shape=(1, count, dim), initializer=initializer, name=name)
                setattr(self, name, weight)
                self.prefix.append(weight)
        if self.position == "learned":
            without = {"all": 0, "class": self.num_registers, "patches": self.num_prefix_tokens}[self.position_tokens]
            self.position_embedding = self.add_weight(
                shape=(1, self.num_prefix_tokens - without + input_shape[1], dim),  # type: ignore[operator]
                initializer=keras.initializers.TruncatedNormal(stddev=0.02),
                name="position_embedding",
            )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the tokens' shape for the patches' shape."""
        return input_shape[0], input_shape[1] + self.num_prefix_tokens, self.projection_dim  # type: ignore[operator]

    def call(self, patches: Any, grid_size: tuple[int, int] | None = None) -> Any:
        """Turns `patches` (B, N, patch_dim) into tokens."""
        if self.use_patch_norm:
            patches = self.patch_norm(patches)
        tokens = self.projection(patches)  # (B, N, D)
        count, prefix = tokens.shape[1], self.num_prefix_tokens
        # The slots of the prefix come from a pad, not from a broadcast over the batch: exports keep a dynamic batch.
        tokens = ops.pad(tokens, ((0, 0), (prefix, 0), (0, 0))) if prefix else tokens
        added = []  # (1, prefix + N, D) each
        if self.prefix:
            first = ops.concatenate([ops.convert_to_tensor(weight) for weight in self.prefix], axis=1)
            added.append(ops.pad(first, ((0, 0), (0, count), (0, 0))))
        if self.position != "none":
            added.append(self._positions(grid_size or self.grid_size, count))
        for term in added:
            tokens = tokens + ops.cast(term, tokens.dtype)
        return tokens

    def _positions(self, grid_size: tuple[int, int] | None, count: int) -> Any:
        """Returns the positions of all tokens (1, prefix + count, D); 0 for tokens that have none."""
        if self.position == "sincos":
            table = sincos_positions(grid_size, self.projection_dim)  # type: ignore[arg-type]
            return ops.pad(ops.convert_to_tensor(table[None]), ((0, 0), (self.num_prefix_tokens, 0), (0, 0)))
        positions = ops.convert_to_tensor(self.position_embedding)
        covered = positions.shape[1] - (self.grid_size[0] * self.grid_size[1] if self.grid_size else count)
        if grid_size and self.grid_size and grid_size != self.grid_size:
            matrix = resize_grid_matrix(self.grid_size, grid_size)  # (new N, old N)
            patch_positions = ops.einsum("nm,bmd->bnd", ops.convert_to_tensor(matrix), positions[:, covered:])
            positions = ops.concatenate([positions[:, :covered], patch_positions], axis=1)
        if positions.shape[1] != covered + count:
            raise ConfigError(
                f"Cannot add positions. Expected {positions.shape[1] - covered} patches. Received: {count}. "
                "Pass images of the size that the layer was built for, or their grid_size."
            )
        gap = self.num_prefix_tokens - covered
        if gap:  # tokens without a position lie between those that have one
            middle = ops.pad(positions[:, :covered], ((0, 0), (0, gap), (0, 0)))
            positions = ops.concatenate([middle, positions[:, covered:]], axis=1)
        return positions

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        names = (
            "projection_dim",
            "use_bias",
            "use_patch_norm",
            "use_class_token",
            "use_distillation_token",
            "num_registers",
            "position",
            "position_tokens",
            "grid_size",
            "epsilon",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(PACKAGE)
class PatchDropout(keras.layers.Layer):
    """Drops patch tokens at random in training; each example loses others, and all keep equally many.

    Args:
        rate: Share of patch tokens to drop, in [0, 1).
        num_prefix_tokens: Tokens at the start that always stay.
        seed: Of the random draw.

    Call arguments:
        x: (B, N, D) tokens.
        rope: Rotary tables, or None, that must lose the same rows.
        training: Whether to drop.

    Returns:
        (B, kept, D) tokens; with `rope`, also their tables, (B, kept, D / A) each.

    Source: Li et al. 2023, https://arxiv.org/abs/2212.00794, section 3.
    """

    def __init__(self, rate: float, *, num_prefix_tokens: int = 0, seed: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate = rate
        self.num_prefix_tokens = num_prefix_tokens
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: what a call without training returns."""
        return input_shape

    def call(self, x: Any, rope: Any = None, training: bool | None = None) -> Any:
        """Returns the tokens that stay, and their rotary tables if there are some."""
        prefix = self.num_prefix_tokens
        count = x.shape[1] - prefix
        kept = max(round(count * (1 - self.rate)), 1)
        if not training or kept == count:
            return x if rope is None else (x, rope)
        noise = keras.random.uniform((ops.shape(x)[0], count), seed=self.seed_generator)
        chosen = ops.sort(ops.argsort(noise, axis=1)[:, :kept], axis=1)[:, :, None]  # (B, kept, 1)
        x = ops.concatenate([x[:, :prefix], ops.take_along_axis(x[:, prefix:], chosen, axis=1)], axis=1)
        if rope is None:
            return x
        prefix_rows = [ops.zeros_like(chosen[:, :1, 0]) + i for i in range(prefix)]  # (B, 1) each
        rows = ops.concatenate([*prefix_rows, chosen[:, :, 0] + prefix], axis=1)  # (B, prefix + kept)
        return x, tuple(ops.take(table, rows, axis=0) for table in rope)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "rate": self.rate,
            "num_prefix_tokens": self.num_prefix_tokens,
            "seed": self.seed,
        }


def create_norm(kind: Literal["layer", "rms"], epsilon: float, dtype: Any, name: str) -> keras.layers.Layer:
    """Creates a LayerNorm (Ba et al. 2016) or an RMSNorm (Zhang & Sennrich 2019) over the last axis."""
    cls = keras.layers.LayerNormalization if kind == "layer" else keras.layers.RMSNormalization
    return cls(epsilon=epsilon, dtype=dtype, name=name)


class _Residual(keras.layers.Layer):
    """What `SelfAttention` and `MLP` share: the norm, and what happens between their branch and their skip."""

    def __init__(
        self,
        *,
        dropout_rate: float,
        stochastic_depth_rate: float,
        epsilon: float,
        norm: Literal["layer", "rms"],
        norm_position: Literal["pre", "post"],
        layer_scale: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "dropout_rate": dropout_rate,
            "stochastic_depth_rate": stochastic_depth_rate,
            "epsilon": epsilon,
            "norm": norm,
            "norm_position": norm_position,
            "layer_scale": layer_scale,
        }
        self.stochastic_depth_rate = stochastic_depth_rate
        self.is_pre_norm = norm_position == "pre"
        self.norm = create_norm(norm, epsilon, self.dtype_policy, "norm")
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")
        self.stochastic_depth = keras.layers.Dropout(  # one draw for a whole example: the branch stays or goes
            stochastic_depth_rate, noise_shape=(None, 1, 1), dtype=self.dtype_policy, name="stochastic_depth"
        )

    def build_shared(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the norm and the layer scale."""
        self.norm.build(input_shape)
        if scale := self.options["layer_scale"]:
            self.layer_scale = self.add_weight(
                shape=(input_shape[-1],), initializer=keras.initializers.Constant(scale), name="layer_scale"
            )

    def enter(self, x: Any) -> Any:
        """Returns what the branch reads, as (B * N, D).

        Dense layers see one matrix: on a CPU, jax takes half the time for it that it takes for a batch of matrices.
        """
        return ops.reshape(self.norm(x) if self.is_pre_norm else x, (-1, x.shape[-1]))

    def skip(self, x: Any, branch: Any, training: bool | None) -> Any:
        """Returns `x` plus the branch (B * N, D)."""
        branch = ops.reshape(branch, (-1, x.shape[1], x.shape[-1]))
        branch = self.dropout(branch, training=training)
        if not self.is_pre_norm:
            branch = self.norm(branch)
        if self.options["layer_scale"]:
            branch = branch * ops.cast(self.layer_scale, branch.dtype)
        return x + self.stochastic_depth(branch, training=training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a residual layer keeps the shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {**super().get_config(), **self.options}


@keras.saving.register_keras_serializable(PACKAGE)
class SelfAttention(_Residual):
    """Multi-head self-attention with its norm before and its residual skip: `x + projection(attention(norm(x)))`.

    Args:
        num_heads: A, must divide the tokens' width D.
        dropout_rate: Share of the projection's outputs dropped in training, in [0, 1).
        attention_dropout_rate: Share of attention weights dropped in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the normalisations.
        norm: `"layer"` or `"rms"`.
        norm_position: `"pre"`, or `"post"`: `x + norm(...)`.
        layer_scale: First value of a trainable scale on the branch; 0 builds none.
        use_qkv_bias: Whether queries, keys and values have a bias.
        use_key_bias: Whether keys have one too. (It never changes the softmax; some published models have none.)
        use_projection_bias: Whether the projection has a bias.
        use_qk_norm: Whether queries and keys of each head are normalised.
        use_inner_norm: Whether the heads' output is normalised before the projection.
        use_local_attention: Whether the temperature is learned, and no token attends to itself.
        rope_style: How rotary tables pair the values of a head: `"interleaved"` (0 with 1, 2 with 3 ...) or `"half"`
            (first half with second half).
        use_fused_attention: Whether to call the backend's fused kernel (flash attention where it has one). Default
            None: on a GPU or TPU yes; on a CPU no, where the composed form trains 2 to 7 times faster (docs/log.md).
            Weights asked for or dropped in training, and local attention, are always composed. Both forms agree to
            1e-5 in float32.

    Call arguments:
        x: (B, N, D) tokens.
        rope: Tables (sine, cosine) of shape (N, D / A) or (B, N, D / A) that rotate queries and keys; default none.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too.

    Returns:
        (B, N, D), or that and the weights (B, A, N, N), in [0, 1] with rows that sum to 1.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2; pre-norm as in Dosovitskiy et al.
    2021, equation 2; rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864; local attention: Lee et al.
    2021, https://arxiv.org/abs/2112.13492, section 3.2, with one temperature a head. Queries, keys and values come
    from one product, in this order.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        norm: Literal["layer", "rms"] = "layer",
        norm_position: Literal["pre", "post"] = "pre",
        layer_scale: float = 0.0,
        use_qkv_bias: bool = True,
        use_key_bias: bool = True,
        use_projection_bias: bool = True,
        use_qk_norm: bool = False,
        use_inner_norm: bool = False,
        use_local_attention: bool = False,
        rope_style: Literal["interleaved", "half"] = "interleaved",
        use_fused_attention: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            epsilon=epsilon,
            norm=norm,
            norm_position=norm_position,
            layer_scale=layer_scale,
            **kwargs,
        )
        self.options |= {
            "num_heads": num_heads,
            "attention_dropout_rate": attention_dropout_rate,
            "use_qkv_bias": use_qkv_bias,
            "use_key_bias": use_key_bias,
            "use_projection_bias": use_projection_bias,
            "use_qk_norm": use_qk_norm,
            "use_inner_norm": use_inner_norm,
            "use_local_attention": use_local_attention,
            "rope_style": rope_style,
            "use_fused_attention": use_fused_attention,
        }
        self.num_heads = num_heads
        self.attention_dropout_rate = attention_dropout_rate
        self.use_split_bias = use_qkv_bias and not use_key_bias
        self.use_qk_norm = use_qk_norm
        self.use_inner_norm = use_inner_norm
        self.use_local_attention = use_local_attention
        self.rope_style = rope_style
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
        options, policy = self.options, self.dtype_policy
        self.build_shared(input_shape)
        self.qkv = keras.layers.Dense(
            3 * dim, use_bias=options["use_qkv_bias"] and not self.use_split_bias, dtype=policy, name="qkv"
        )
        self.qkv.build((None, dim))
        if self.use_split_bias:
            self.query_value_bias = self.add_weight(shape=(2 * dim,), initializer="zeros", name="query_value_bias")
        if self.use_qk_norm:
            self.query_norm, self.key_norm = (
                create_norm(options["norm"], options["epsilon"], policy, name) for name in ("query_norm", "key_norm")
            )
            self.query_norm.build((None, self.head_dim))
            self.key_norm.build((None, self.head_dim))
        if self.use_inner_norm:
            self.inner_norm = create_norm(options["norm"], options["epsilon"], policy, "inner_norm")
            self.inner_norm.build((None, dim))
        if self.use_local_attention:
            self.temperature = self.add_weight(
                shape=(self.num_heads, 1, 1),
                initializer=keras.initializers.Constant(self.head_dim**0.5),
                name="temperature",
            )
        self.projection = keras.layers.Dense(
            dim, use_bias=options["use_projection_bias"], dtype=policy, name="projection"
        )
        self.projection.build((None, dim))

    def call(self, x: Any, rope: Any = None, training: bool | None = None, return_attention: bool = False) -> Any:
        """Returns `x` plus the attention branch, and the attention weights if asked for."""
        _, num_tokens, dim = x.shape
        qkv = self.qkv(self.enter(x))  # (B * N, 3 * D)
        if self.use_split_bias:
            query_bias, value_bias = ops.split(ops.cast(self.query_value_bias, qkv.dtype), 2)
            qkv = qkv + ops.concatenate([query_bias, ops.zeros_like(query_bias), value_bias])
        qkv = ops.reshape(qkv, (-1, num_tokens, 3, self.num_heads, self.head_dim))
        if self.use_qk_norm or rope is not None:
            query, key = self._position(qkv[:, :, 0], rope, "query"), self._position(qkv[:, :, 1], rope, "key")
            qkv = ops.stack([query, key, qkv[:, :, 2]], axis=2)
        attention = None
        if self._is_fused(training) and not return_attention:
            query, key, value = (qkv[:, :, i] for i in range(3))  # (B, N, A, D / A)
            heads = ops.dot_product_attention(query, key, value)
        else:
            qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))
            query, key, value = qkv[0], qkv[1], qkv[2]  # (B, A, N, D / A)
            attention = self._attend(query, key)  # (B, A, N, N)
            heads = ops.matmul(self.attention_dropout(attention, training=training), value)
            heads = ops.transpose(heads, (0, 2, 1, 3))
        heads = ops.reshape(heads, (-1, dim))  # (B * N, D)
        if self.use_inner_norm:
            heads = self.inner_norm(heads)
        x = self.skip(x, self.projection(heads), training)
        return (x, attention) if return_attention else x

    def _position(self, heads: Any, rope: Any, name: str) -> Any:
        """Returns queries or keys (B, N, A, D / A), normalised and rotated as this layer does."""
        if self.use_qk_norm:
            heads = (self.query_norm if name == "query" else self.key_norm)(heads)
        return heads if rope is None else rotate(heads, rope, self.rope_style)

    def _attend(self, query: Any, key: Any) -> Any:
        """Returns the attention weights (B, A, N, N)."""
        transposed = ops.transpose(key, (0, 1, 3, 2))
        if not self.use_local_attention:
            return ops.softmax(ops.matmul(query * self.head_dim**-0.5, transposed), axis=-1)
        scores = ops.matmul(query, transposed) / ops.cast(self.temperature, query.dtype)
        itself = ops.eye(scores.shape[-1], dtype=scores.dtype)
        return ops.softmax(scores - 1e4 * itself, axis=-1)

    def _is_fused(self, training: bool | None) -> bool:
        if self.use_local_attention or (training and self.attention_dropout_rate):
            return False
        return _has_accelerator() if self.use_fused_attention is None else self.use_fused_attention


def rotate(heads: Any, rope: tuple[Any, Any], style: Literal["interleaved", "half"]) -> Any:
    """Rotates pairs of values by the angles of their token.

    Args:
        heads: (B, N, A, d) queries or keys.
        rope: Sine and cosine of the angles, (N, d) or (B, N, d) each; d values for d / 2 pairs, laid out as `style`.
        style: `"interleaved"` pairs 0 with 1, 2 with 3 ...; `"half"` pairs 0 with d / 2, 1 with d / 2 + 1 ...

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34.
    """
    sine, cosine = (ops.expand_dims(ops.cast(table, heads.dtype), -2) for table in rope)  # over the heads
    if style == "half":
        first, second = ops.split(heads, 2, axis=-1)
        turned = ops.concatenate([-second, first], axis=-1)
    else:
        pairs = ops.reshape(heads, (*(-1, *heads.shape[1:3]), heads.shape[-1] // 2, 2))
        turned = ops.reshape(ops.stack([-pairs[..., 1], pairs[..., 0]], axis=-1), (-1, *heads.shape[1:]))
    return heads * cosine + turned * sine


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
        hidden_dim: Units between the two dense layers.
        kind: `"dense"`, or `"swiglu"`: the first layer gives a gate and a value, and `activation(gate) * value`
            goes on.
        activation: `"gelu"` (exact), `"gelu_tanh"`, `"quick_gelu"` or `"silu"`.
        use_bias: Whether the dense layers have biases.
        use_inner_norm: Whether the hidden units are normalised before the last dense layer.
        dropout_rate: Share dropped after each dense layer in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the normalisations.
        norm: `"layer"` or `"rms"`.
        norm_position: `"pre"`, or `"post"`: `x + norm(...)`.
        layer_scale: First value of a trainable scale on the branch; 0 builds none.

    Call arguments:
        x: (B, N, D) tokens.
        training: Whether dropout is active.

    Returns:
        (B, N, D).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3; GELU of Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415; SwiGLU of Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        kind: Literal["dense", "swiglu"] = "dense",
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu",
        use_bias: bool = True,
        use_inner_norm: bool = False,
        dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        norm: Literal["layer", "rms"] = "layer",
        norm_position: Literal["pre", "post"] = "pre",
        layer_scale: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            epsilon=epsilon,
            norm=norm,
            norm_position=norm_position,
            layer_scale=layer_scale,
            **kwargs,
        )
        self.options |= {
            "hidden_dim": hidden_dim,
            "kind": kind,
            "activation": activation,
            "use_bias": use_bias,
            "use_inner_norm": use_inner_norm,
        }
        self.hidden_dim = hidden_dim
        self.is_gated = kind == "swiglu"
        self.activation = activation
        self.use_bias = use_bias
        self.use_inner_norm = use_inner_norm

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        units = self.hidden_dim * (2 if self.is_gated else 1)
        self.build_shared(input_shape)
        self.hidden = keras.layers.Dense(units, use_bias=self.use_bias, dtype=self.dtype_policy, name="hidden")
        self.hidden.build((None, dim))
        if self.use_inner_norm:
            norm, epsilon = self.options["norm"], self.options["epsilon"]
            self.inner_norm = create_norm(norm, epsilon, self.dtype_policy, "inner_norm")
            self.inner_norm.build((None, self.hidden_dim))
        self.output_dense = keras.layers.Dense(dim, use_bias=self.use_bias, dtype=self.dtype_policy, name="output")
        self.output_dense.build((None, self.hidden_dim))

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Returns `x` plus the MLP branch."""
        hidden = self.hidden(self.enter(x))  # (B * N, hidden_dim), or twice that
        if self.is_gated:
            gate, value = ops.split(hidden, 2, axis=-1)
            hidden = activate(gate, self.activation) * value
        else:
            hidden = activate(hidden, self.activation)
        if self.use_inner_norm:
            hidden = self.inner_norm(hidden)
        hidden = self.dropout(hidden, training=training)
        return self.skip(x, self.output_dense(hidden), training)


def activate(x: Any, name: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]) -> Any:
    """Applies an activation by name; `quick_gelu` is x * sigmoid(1.702 x), as in OpenAI's CLIP."""
    if name == "silu":
        return ops.silu(x)
    if name == "quick_gelu":
        return x * ops.sigmoid(1.702 * x)
    return ops.gelu(x, approximate=name == "gelu_tanh")


@keras.saving.register_keras_serializable(PACKAGE)
class TransformerBlock(keras.layers.Layer):
    """One block of the encoder: `x = attention(x); x = mlp(x)`, each with its own norm and skip.

    Args:
        num_heads: A, attention heads.
        mlp_dim: Hidden units of the MLP.
        num_parallel: Attentions, and MLPs, side by side: `x + sum of branches`, first of all attentions, then of all
            MLPs.
        attention: More arguments of `SelfAttention`.
        mlp: More arguments of `MLP`.
        **kwargs: Arguments that both take (dropout_rate, stochastic_depth_rate, epsilon, norm, norm_position,
            layer_scale), and those of a Keras layer.

    Call arguments:
        x: (B, N, D) tokens.
        rope: Rotary tables for the attention, or None.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too (the mean over parallel attentions).

    Returns:
        (B, N, D), or that and the attention weights (B, A, N, N).

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equations 2 and 3; parallel branches: Touvron et
    al. 2022, https://arxiv.org/abs/2203.09795, section 3.
    """

    SHARED = ("dropout_rate", "stochastic_depth_rate", "epsilon", "norm", "norm_position", "layer_scale")

    def __init__(
        self,
        num_heads: int,
        mlp_dim: int,
        *,
        num_parallel: int = 1,
        attention: dict[str, Any] | None = None,
        mlp: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self_options = {name: kwargs.pop(name) for name in self.SHARED if name in kwargs}
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.num_parallel = num_parallel
        self.attention_options = dict(attention or {})
        self.mlp_options = dict(mlp or {})
        self.shared_options = self_options
        names = ["", *(f"_{i}" for i in range(1, num_parallel))]
        policy = self.dtype_policy
        self.attentions = [
            SelfAttention(num_heads, dtype=policy, name=f"attention{name}", **self_options, **self.attention_options)
            for name in names
        ]
        self.mlps = [
            MLP(mlp_dim, dtype=policy, name=f"mlp{name}", **self_options, **self.mlp_options) for name in names
        ]

    @property
    def attention(self) -> SelfAttention:
        """The (first) attention."""
        return self.attentions[0]

    @property
    def mlp(self) -> MLP:
        """The (first) MLP."""
        return self.mlps[0]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        for layer in (*self.attentions, *self.mlps):
            layer.build(input_shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a block keeps the shape."""
        return input_shape

    def call(self, x: Any, rope: Any = None, training: bool | None = None, return_attention: bool = False) -> Any:
        """Returns the tokens after attention and MLP, and the attention weights if asked for."""
        results = [
            layer(x, rope=rope, training=training, return_attention=return_attention) for layer in self.attentions
        ]
        attention = None
        if return_attention:
            attention = sum(weights for _, weights in results) / len(results)
            results = [tokens for tokens, _ in results]
        x = _join(x, results)
        x = _join(x, [layer(x, training=training) for layer in self.mlps])
        return (x, attention) if return_attention else x

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "num_parallel": self.num_parallel,
            "attention": self.attention_options,
            "mlp": self.mlp_options,
            **self.shared_options,
        }


def _join(x: Any, results: list[Any]) -> Any:
    """Returns x + the branches of layers that returned x + branch each."""
    if len(results) == 1:
        return results[0]
    return x + sum(result - x for result in results)


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionPool(keras.layers.Layer):
    """Pools tokens by attention from one trained query, and an MLP after it (multi-head attention pooling, "MAP").

    Args:
        num_heads: A, attention heads.
        mlp_dim: Hidden units of the MLP.
        mlp: More arguments of `MLP`.

    Call arguments:
        x: (B, N, D) tokens.

    Returns:
        (B, D).

    Source: Zhai et al. 2022, https://arxiv.org/abs/2106.04560, appendix; Lee et al. 2019,
    https://arxiv.org/abs/1810.00825.
    """

    def __init__(self, num_heads: int, mlp_dim: int, *, mlp: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.mlp_options = dict(mlp or {})
        self.mlp = MLP(mlp_dim, dtype=self.dtype_policy, name="mlp", **self.mlp_options)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        self.head_dim = dim // self.num_heads
        self.latent = self.add_weight(
            shape=(1, 1, dim), initializer=keras.initializers.TruncatedNormal(stddev=dim**-0.5), name="latent"
        )
        self.query, self.key_value, self.projection = (
            keras.layers.Dense(units, dtype=self.dtype_policy, name=name)
            for units, name in ((dim, "query"), (2 * dim, "key_value"), (dim, "projection"))
        )
        for layer in (self.query, self.key_value, self.projection):
            layer.build((None, dim))
        self.mlp.build((None, 1, dim))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the pooled shape for the tokens' shape."""
        return input_shape[0], input_shape[-1]

    def call(self, x: Any) -> Any:
        """Returns the pooled vector (B, D) of tokens (B, N, D)."""
        _, num_tokens, dim = x.shape
        query = self.query(ops.reshape(ops.convert_to_tensor(self.latent), (1, dim)))
        query = ops.reshape(query, (1, self.num_heads, 1, self.head_dim)) * self.head_dim**-0.5
        pairs = self.key_value(ops.reshape(x, (-1, dim)))
        pairs = ops.reshape(pairs, (-1, num_tokens, 2, self.num_heads, self.head_dim))
        pairs = ops.transpose(pairs, (2, 0, 3, 1, 4))
        key, value = pairs[0], pairs[1]  # (B, A, N, D / A)
        weights = ops.softmax(ops.sum(query * key, axis=-1), axis=-1)  # (B, A, N)
        pooled = ops.sum(weights[..., None] * value, axis=2)  # (B, A, D / A)
        pooled = self.projection(ops.reshape(pooled, (-1, dim)))
        return self.mlp(pooled[:, None, :])[:, 0]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "mlp": self.mlp_options,
        }
