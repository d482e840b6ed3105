"""Patches to tokens: `PatchEncoder`, and `PatchDropout` after it."""

import math
from typing import Any, Literal

import keras
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers.residual import PACKAGE
from vitreous.patches import as_pair
from vitreous.positions import resize_grid_matrix, sincos_positions
from vitreous.spec import check_minimum, check_rates, check_types


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
        patches: (B, N, patch_dim), or a grid (B, rows, columns, patch_dim), from `Patches`.
        grid_size: (rows, columns) of these patches, where it is not the layer's own: positions are resized to it. Not
            needed with a grid.

    Returns:
        (B, prefix + N, D) tokens: class, distillation, registers, patches.

    Raises:
        ConfigError: If an argument is out of range, or there are other patches than positions.

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
        options = {
            "projection_dim": projection_dim,
            "num_registers": num_registers,
            "position": position,
            "position_tokens": position_tokens,
            "epsilon": epsilon,
        }
        check_types(PatchEncoder.__init__, options)
        check_minimum(1, projection_dim=projection_dim)
        check_minimum(0, num_registers=num_registers)
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
        self.grid_size = None if grid_size is None else as_pair(grid_size, "grid_size")
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
        input_shape = self._flat_shape(input_shape)
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
            self.num_patches = int(input_shape[1])  # type: ignore[arg-type]  # that have a position
            without = {"all": 0, "class": self.num_registers, "patches": self.num_prefix_tokens}[self.position_tokens]
            self.position_embedding = self.add_weight(
                shape=(1, self.num_prefix_tokens - without + self.num_patches, dim),
                initializer=keras.initializers.TruncatedNormal(stddev=0.02),
                name="position_embedding",
            )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the tokens' shape for the patches' shape."""
        batch, count, _ = self._flat_shape(input_shape)
        return batch, count + self.num_prefix_tokens, self.projection_dim  # type: ignore[operator]

    def _flat_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape (B, N, patch_dim) of patches, or of a grid of patches."""
        if len(shape) not in (3, 4) or None in shape[1:]:
            raise ConfigError(
                f"Cannot encode patches. Expected shape (B, N, patch_dim) or (B, rows, columns, patch_dim), all but B "
                f"known. Received: patches.shape={tuple(shape)}. Pass what Patches returns for images of a known size."
            )
        return (shape[0], math.prod(shape[1:-1]), shape[-1])  # type: ignore[arg-type]

    def call(self, patches: Any, grid_size: tuple[int, int] | None = None) -> Any:
        """Turns `patches` (B, N, patch_dim), or a grid of them, into tokens."""
        flat_shape = self._flat_shape(patches.shape)
        if len(patches.shape) == 4:
            grid_size = (patches.shape[1], patches.shape[2])
            patches = ops.reshape(patches, (-1, *flat_shape[1:]))
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
        covered = positions.shape[1] - self.num_patches  # tokens of the prefix
        if grid_size and self.grid_size and grid_size != self.grid_size:
            matrix = resize_grid_matrix(self.grid_size, grid_size)  # (new N, old N)
            positions = ops.cast(positions, "float32")
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


def take_patches(x: Any, rope: Any, chosen: Any, num_prefix_tokens: int) -> tuple[Any, Any]:
    """Takes some patch tokens of each example, and the rows of the rotary tables that belong to them.

    Args:
        x: (B, N, D) tokens.
        rope: Rotary tables (N, D / A) each, or None.
        chosen: (B, kept) integers, places among the patch tokens.
        num_prefix_tokens: Tokens at the start that all stay.

    Returns:
        (B, num_prefix_tokens + kept, D) tokens, and tables of (B, num_prefix_tokens + kept, D / A) each, or None.
    """
    prefix = num_prefix_tokens
    x = ops.concatenate([x[:, :prefix], ops.take_along_axis(x[:, prefix:], chosen[:, :, None], axis=1)], axis=1)
    if rope is None:
        return x, None
    prefix_rows = [ops.zeros_like(chosen[:, :1]) + i for i in range(prefix)]  # (B, 1) each
    rows = ops.concatenate([*prefix_rows, chosen + prefix], axis=1)
    return x, tuple(ops.take(table, rows, axis=0) for table in rope)


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
        options = {"rate": rate, "num_prefix_tokens": num_prefix_tokens, "seed": seed}
        check_types(PatchDropout.__init__, options)
        check_rates(rate=rate)
        check_minimum(0, num_prefix_tokens=num_prefix_tokens)
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
        x, rope = take_patches(x, rope, ops.sort(ops.argsort(noise, axis=1)[:, :kept], axis=1), prefix)
        return x if rope is None else (x, rope)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "rate": self.rate,
            "num_prefix_tokens": self.num_prefix_tokens,
            "seed": self.seed,
        }
