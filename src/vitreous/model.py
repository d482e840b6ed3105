"""The Vision Transformer, from an image to logits, and the way from a name to a new one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers import (
    PACKAGE,
    AttentionPool,
    ConvolutionalStem,
    PatchDropout,
    PatchEncoder,
    Patches,
    TransformerBlock,
    create_norm,
    shift_images,
)
from vitreous.positions import rope_tables
from vitreous.registry import get_spec
from vitreous.spec import InputSpec, ViTConfig


@keras.saving.register_keras_serializable(PACKAGE)
class VisionTransformer(keras.Model):
    """Vision Transformer for image classification: patches, encoder blocks, a pooled token, a linear head.

    Args:
        config: The architecture.

    Call arguments:
        images: (B, H, W, C) floating point, normalised as the model's `InputSpec` says; H, W, C as in `config`
            (any H and W that the patches divide with `has_dynamic_size`).
        training: Whether dropout is active.
        return_heads: Whether to return the logits of each head by themselves, as a tuple: of the class token's, and of
            the distillation token's where there is one.

    Returns:
        (B, K) logits; with `num_classes=0`, (B, features_dim) pooled features.

    Example:

    ```python
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=4, projection_dim=64, num_heads=4, num_classes=10))
    logits = model(images)  # (8, 32, 32, 3) -> (8, 10)
    ```

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3.1.
    """

    def __init__(self, config: ViTConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        policy = self.dtype_policy
        if config.stem == "convolution":
            self.stem = ConvolutionalStem(
                config.patch_size[0],
                config.stem_dim,
                depths=config.stem_depths,
                activation=config.activation,
                epsilon=config.epsilon,
                dtype=policy,
                name="stem",
            )
        else:
            self.patches = Patches(
                config.patch_size,
                strides=config.patch_strides,
                padding=config.patch_padding,
                dtype=policy,
                name="patches",
            )
        self.patch_encoder = PatchEncoder(
            config.projection_dim,
            use_bias=config.use_patch_bias,
            use_patch_norm=config.stem == "shifted",
            use_class_token=config.use_class_token,
            use_distillation_token=config.use_distillation_token,
            num_registers=config.num_registers,
            position=config.position,
            position_tokens=config.position_tokens,
            grid_size=config.grid_size,
            epsilon=config.epsilon,
            dtype=policy,
            name="patch_encoder",
        )
        self.dropout = keras.layers.Dropout(config.dropout_rate, dtype=policy, name="dropout")
        self.patch_dropout = PatchDropout(
            config.patch_dropout_rate, num_prefix_tokens=config.num_prefix_tokens, dtype=policy, name="patch_dropout"
        )
        self.pre_norm: Any = (
            create_norm(config.norm, config.epsilon, policy, "pre_norm") if config.use_pre_norm else None
        )
        self.blocks = [self._create_block(i) for i in range(config.num_blocks)]
        self.norm: Any = (
            None if config.final_norm == "none" else create_norm(config.norm, config.epsilon, policy, "norm")
        )
        if config.pooling == "map":
            self.attention_pool = AttentionPool(
                config.num_heads,
                config.mlp_dim,
                mlp={"activation": config.activation, "epsilon": config.epsilon, "norm": config.norm},
                dtype=policy,
                name="attention_pool",
            )
        self.head: Any
        self.distillation_head: Any
        self.head, self.distillation_head = (
            # Logits are float32 whatever the blocks compute in: a softmax over bfloat16 logits loses digits.
            keras.layers.Dense(config.num_classes, kernel_initializer="zeros", dtype="float32", name=name)
            if config.num_classes and is_wanted
            else None
            for name, is_wanted in (("head", True), ("distillation_head", config.use_distillation_head))
        )
        self.build((None, *config.image_size, config.num_channels))

    def _create_block(self, index: int) -> TransformerBlock:
        config = self.config
        return TransformerBlock(
            config.num_heads,
            config.mlp_dim,
            num_parallel=config.num_parallel,
            attention={
                "attention_dropout_rate": config.attention_dropout_rate,
                "use_qkv_bias": config.use_qkv_bias,
                "use_key_bias": config.use_key_bias,
                "use_projection_bias": config.use_projection_bias,
                "use_qk_norm": config.use_qk_norm,
                "use_inner_norm": config.use_attention_norm,
                "use_local_attention": config.use_local_attention,
                "rope_style": "half" if config.rope == "dinov3" else "interleaved",
            },
            mlp={
                "kind": config.mlp,
                "activation": config.activation,
                "use_bias": config.use_mlp_bias,
                "use_inner_norm": config.use_mlp_norm,
            },
            dropout_rate=config.dropout_rate,
            stochastic_depth_rate=config.stochastic_depth_rate * index / max(config.num_blocks - 1, 1),
            epsilon=config.epsilon,
            norm=config.norm,
            norm_position=config.norm_position,
            layer_scale=config.layer_scale,
            dtype=self.dtype_policy,
            name=f"block_{index}",
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights; the constructor has done it already."""
        if self.built:
            return
        config = self.config
        if config.stem == "convolution":
            self.stem.build(input_shape)
            patches_shape = self.stem.compute_output_shape(input_shape)
        else:
            copies = 5 if config.stem == "shifted" else 1
            patches_shape = self.patches.compute_output_shape((*input_shape[:-1], copies * config.num_channels))
        tokens_shape = (None, config.num_tokens, config.projection_dim)
        self.patch_encoder.build(patches_shape)
        if self.pre_norm is not None:
            self.pre_norm.build(tokens_shape)
        for block in self.blocks:
            block.build(tokens_shape)
        if config.pooling == "map":
            self.attention_pool.build(tokens_shape)
        if self.norm is not None:
            self.norm.build(tokens_shape if config.final_norm == "tokens" else (None, config.features_dim))
        for head in (self.head, self.distillation_head):
            if head is not None:
                head.build((None, config.features_dim))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the logits' shape for the images' shape."""
        self._check_shape(input_shape)  # a symbolic call asks for no more
        return input_shape[0], self.config.num_classes or self.config.features_dim

    def call(self, images: Any, training: bool | None = None, return_heads: bool = False) -> Any:
        """Returns the logits (B, K) of `images`, or those of each head."""
        x, rope = self.enter(images, training)  # (B, N, D)
        for block in self.blocks:
            x = block(x, rope=rope, training=training)
        x = self.leave(x)
        if return_heads:
            return (self.classify(x),) if self.distillation_head is None else self.classify_both(x)
        return self.classify(x)

    def embed(self, images: Any, training: bool | None = None) -> Any:
        """Returns the tokens (B, N, D) that enter the first block: class, distillation, registers, patches."""
        return self.enter(images, training)[0]

    def enter(self, images: Any, training: bool | None = None) -> tuple[Any, Any]:
        """Returns the tokens that enter the first block, and the rotary tables of the blocks or None."""
        config = self.config
        grid_size = self._grid_size(images)
        if config.stem == "convolution":
            patches = self.stem(images)
        else:
            if config.stem == "shifted":
                images = shift_images(images, (config.patch_size[0] // 2, config.patch_size[1] // 2))
            patches = self.patches(images)
        x = self.dropout(self.patch_encoder(patches, grid_size=grid_size), training=training)
        rope = self._rope_tables(grid_size)
        if config.patch_dropout_rate:
            dropped = self.patch_dropout(x, rope=rope, training=training)
            x, rope = (dropped, None) if rope is None else dropped
        return (x if self.pre_norm is None else self.pre_norm(x)), rope

    def _grid_size(self, images: Any) -> tuple[int, int]:
        """Returns (rows, columns) of the patches of `images`, whose size is checked."""
        if not keras.backend.is_float_dtype(dtype := keras.backend.standardize_dtype(images.dtype)):
            raise ConfigError(
                f"Cannot apply {self.name}. Expected normalised images of a floating point dtype. "
                f"Received: images.dtype={dtype}. Pass vitreous.model.normalize_images(images, input_spec)."
            )
        self._check_shape(images.shape)
        config, size = self.config, tuple(images.shape[1:3])
        # A new size must fit the patches too: the record says so.
        return config.grid_size if size == config.image_size else config.replace(image_size=size).grid_size

    def _check_shape(self, shape: tuple[int | None, ...]) -> None:
        """Raises `ConfigError` for images of another shape than the model takes."""
        config, shape = self.config, tuple(shape)
        is_known = None not in shape[1:] and (config.has_dynamic_size or shape[1:3] == config.image_size)
        if len(shape) != 4 or shape[3] != config.num_channels or not is_known:
            height, width = config.image_size
            raise ConfigError(
                f"Cannot apply {self.name}. Expected images of shape (B, H, W, C) = (B, {height}, {width}, "
                f"{config.num_channels}). Received: images.shape={shape}. Resize the images, create the "
                "model with their image_size, or with has_dynamic_size=True; H and W must be known in any case."
            )

    def _rope_tables(self, grid_size: tuple[int, int]) -> Any:
        config = self.config
        if config.rope == "none":
            return None
        tables = rope_tables(
            config.rope,
            grid_size,
            config.projection_dim // config.num_heads,
            temperature=config.rope_temperature,
            reference_grid=config.rope_reference_grid,
            num_prefix_tokens=config.num_prefix_tokens,
        )
        return tuple(ops.convert_to_tensor(table) for table in tables)

    def leave(self, x: Any) -> Any:
        """Returns the tokens that are pooled."""
        return self.norm(x) if self.config.final_norm == "tokens" else x

    def pool(self, tokens: Any, attention_tap: Any = None) -> Any:
        """Returns the one vector (B, features_dim) that the head reads from `tokens` (B, N, D).

        `attention_tap` is `AttentionPool`'s, for `pooling="map"`.
        """
        config = self.config
        patches = tokens[:, config.num_prefix_tokens :]
        if config.pooling == "map":
            pooled = self.attention_pool(patches, attention_tap=attention_tap)
        elif config.pooling == "mean":
            pooled = ops.mean(patches, axis=1)
        elif config.pooling == "class_mean":
            pooled = ops.concatenate([tokens[:, 0], ops.mean(patches, axis=1)], axis=-1)
        elif config.use_distillation_head:
            pooled = (tokens[:, 0] + tokens[:, 1]) / 2
        else:
            pooled = tokens[:, 0]
        return self.norm(pooled) if config.final_norm == "pooled" else pooled

    def classify(self, tokens: Any, attention_tap: Any = None) -> Any:
        """Returns logits (B, K) from the tokens (B, N, D) that are pooled; without a head, their pooled features.

        `attention_tap` is `AttentionPool`'s, for `pooling="map"`.
        """
        if self.head is None:
            return self.pool(tokens, attention_tap)
        if self.distillation_head is None:
            return self.head(self.pool(tokens, attention_tap))
        class_logits, distillation_logits = self.classify_both(tokens)
        return (class_logits + distillation_logits) / 2

    def classify_both(self, tokens: Any) -> tuple[Any, Any]:
        """Returns the logits (B, K) of the class token's head and of the distillation token's."""
        tokens = self.norm(tokens[:, :2]) if self.config.final_norm == "pooled" else tokens
        return self.head(tokens[:, 0]), self.distillation_head(tokens[:, 1])

    def tokens(self, images: Any, block: int | None = None) -> Any:
        """Returns the tokens that leave a block.

        Args:
            images: (B, H, W, C), as in a call.
            block: Index of the block, negative from the end; None for the last one with the final norm applied.

        Returns:
            (B, N, D): class token, distillation token and registers where there are some, then patches.

        Raises:
            ConfigError: If there is no such block.
        """
        stop = self._block_index(block) + 1
        x, rope = self.enter(images)
        for layer in self.blocks[:stop]:
            x = layer(x, rope=rope)
        return self.leave(x) if block is None else x

    def features(
        self, images: Any, block: int | None = None, *, pooling: Literal["class", "mean"] | None = None
    ) -> Any:
        """Returns pooled features (B, features_dim): the head's input, or the same reading of an earlier block.

        Args:
            images: (B, H, W, C), as in a call.
            block: Index of the block, negative from the end; None for the last. The final norm is always applied.
            pooling: `"class"` for the class token alone (the features of DINOv2 and distilled DeiT in transformers'
                terms), `"mean"` for the mean over patch tokens; both (B, D). Default: what the head reads.
        """
        self.check_features(block, pooling)
        tokens = self.tokens(images, block)
        tokens = tokens if block is None else self.leave(tokens)
        if pooling is None:
            return self.pool(tokens)
        prefix = self.config.num_prefix_tokens
        return tokens[:, 0] if pooling == "class" else ops.mean(tokens[:, prefix:], axis=1)

    def check_features(self, block: int | None = None, pooling: Literal["class", "mean"] | None = None) -> None:
        """Raises `ConfigError` if there is no such block, or no class token to pool: what `features` would raise."""
        self._block_index(block)
        if pooling == "class" and not self.config.use_class_token:
            raise ConfigError(
                f"Cannot pool the class token of {self.name}. Expected a model that has one. "
                "Received: use_class_token=False. Pass pooling='mean'."
            )

    def attention(self, images: Any, blocks: Sequence[int] | None = None) -> list[Any]:
        """Returns attention weights.

        Args:
            images: (B, H, W, C), as in a call.
            blocks: Indices of blocks, negative from the end; None for all.

        Returns:
            A list with one (B, A, N, N) for each block asked for, in that order; rows sum to 1. Parallel attentions
            follow each other along A.

        Raises:
            ConfigError: If there is no such block.
        """
        wanted = [self._block_index(i) for i in (range(len(self.blocks)) if blocks is None else blocks)]
        maps: dict[int, Any] = {}
        x, rope = self.enter(images)
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            if i in wanted:
                x, maps[i] = block(x, rope=rope, return_attention=True)
            else:
                x = block(x, rope=rope)
        return [maps[i] for i in wanted]

    def _block_index(self, block: int | None) -> int:
        count = len(self.blocks)
        index = count - 1 if block is None else block + count if block < 0 else block
        if not 0 <= index < count:
            raise ConfigError(
                f"Cannot read a block of {self.name}. Expected an index from {-count} to {count - 1}. "
                f"Received: block={block}. Pass one in that range."
            )
        return index

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this model again."""
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "VisionTransformer":
        """Builds the model from `get_config()`'s result."""
        return cls(ViTConfig.from_dict(config["config"]), **{k: v for k, v in config.items() if k != "config"})


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    **changes: Any,
) -> VisionTransformer:
    """Creates a model with random weights from its name.

    Args:
        name: A name that `list_models()` has, such as `"vit_tiny_patch16_224"`.
        num_classes: K; 0 for features without a head. Default: that of the named model.
        image_size: (H, W) in pixels or one number. Default: that of the named model.
        dtype: Keras dtype or policy, such as `"mixed_bfloat16"`. Default: Keras's global policy.
        **changes: Any other field of `ViTConfig`.

    Returns:
        A built `VisionTransformer`.

    Raises:
        UnknownNameError: If no model has that name; the nearest are named.
        ConfigError: If the values do not fit each other.

    Example:

    ```python
    model = create_model("vit_tiny_patch16_224", num_classes=3)
    ```
    """
    spec = get_spec(name, num_classes=num_classes, image_size=image_size, **changes)
    return VisionTransformer(spec.config, name=name, dtype=dtype)


def normalize_images(images: Any, spec: InputSpec) -> Any:
    """Normalises images for a model, on the backend's device.

    Args:
        images: (B, H, W, C), values 0 to 255, uint8 or floating point.
        spec: The model's input.

    Returns:
        (B, H, W, C) float32: (images / 255 - mean) / std.
    """
    scale = [1 / (255 * s) for s in spec.std]
    shift = [-m / s for m, s in zip(spec.mean, spec.std, strict=True)]
    return ops.cast(images, "float32") * ops.convert_to_tensor(scale) + ops.convert_to_tensor(shift)


def create_predict_function(model: VisionTransformer, input_spec: InputSpec) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from uint8 images to logits, compiled where the backend compiles.

    Args:
        model: A built model; its weights are read at each call.
        input_spec: How images are normalised.

    Returns:
        A function of images (B, H, W, C) uint8 that returns logits (B, K) float32, both in NumPy. Calls with the same
        B compile once.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def infer(weights: Any, other: Any, images: Any) -> Any:
            return model.stateless_call(weights, other, normalize_images(images, input_spec), training=False)[0]

        compiled = jax.jit(infer)

        def predict(images: np.ndarray) -> np.ndarray:
            weights = [v.value for v in model.trainable_variables]
            return np.asarray(compiled(weights, [v.value for v in model.non_trainable_variables], images))

    elif backend == "tensorflow":
        import tensorflow as tf

        traced = tf.function(lambda images: model(normalize_images(images, input_spec), training=False))

        def predict(images: np.ndarray) -> np.ndarray:
            return traced(tf.constant(images)).numpy()

    else:
        import torch

        def predict(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                logits = model(normalize_images(ops.convert_to_tensor(images), input_spec), training=False)
                return logits.float().cpu().numpy()

    return predict
