"""The Vision Transformer, from an image to logits, and the way from a name to a new one."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers import PACKAGE, PatchEncoder, Patches, TransformerBlock
from vitreous.registry import get_spec
from vitreous.spec import InputSpec, ViTConfig


@keras.saving.register_keras_serializable(PACKAGE)
class VisionTransformer(keras.Model):
    """Vision Transformer for image classification: patches, encoder blocks, a pooled token, a linear head.

    Args:
        config: The architecture.

    Call arguments:
        images: (B, H, W, C) floating point, normalised as the model's `InputSpec` says; H, W, C as in `config`.
        training: Whether dropout is active.

    Returns:
        (B, K) logits; with `num_classes=0`, (B, D) pooled features.

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
        self.patches = Patches(
            config.patch_size,
            strides=config.patch_strides,
            padding=config.patch_padding,
            dtype=self.dtype_policy,
            name="patches",
        )
        self.patch_encoder = PatchEncoder(
            config.projection_dim,
            use_class_token=config.use_class_token,
            dtype=self.dtype_policy,
            name="patch_encoder",
        )
        self.dropout = keras.layers.Dropout(config.dropout_rate, dtype=self.dtype_policy, name="dropout")
        last = max(config.num_blocks - 1, 1)
        self.blocks = [
            TransformerBlock(
                config.num_heads,
                config.mlp_dim,
                activation=config.activation,
                dropout_rate=config.dropout_rate,
                attention_dropout_rate=config.attention_dropout_rate,
                stochastic_depth_rate=config.stochastic_depth_rate * i / last,
                epsilon=config.epsilon,
                dtype=self.dtype_policy,
                name=f"block_{i}",
            )
            for i in range(config.num_blocks)
        ]
        self.norm = keras.layers.LayerNormalization(epsilon=config.epsilon, dtype=self.dtype_policy, name="norm")
        # Logits are float32 whatever the blocks compute in: a softmax over bfloat16 logits loses digits.
        self.head = (
            keras.layers.Dense(config.num_classes, kernel_initializer="zeros", dtype="float32", name="head")
            if config.num_classes
            else None
        )
        self.build((None, *config.image_size, config.num_channels))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights; the constructor has done it already."""
        if self.built:
            return
        config = self.config
        patches_shape = self.patches.compute_output_shape(input_shape)
        tokens_shape = (None, config.num_tokens, config.projection_dim)
        self.patch_encoder.build(patches_shape)
        for block in self.blocks:
            block.build(tokens_shape)
        self.norm.build(tokens_shape)
        if self.head is not None:
            self.head.build((None, config.projection_dim))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the logits' shape for the images' shape."""
        return input_shape[0], self.config.num_classes or self.config.projection_dim

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Returns the logits (B, K) of `images`."""
        x = self.embed(images, training=training)  # (B, N, D)
        for block in self.blocks:
            x = block(x, training=training)
        features = self.pool(self.norm(x))  # (B, D)
        return features if self.head is None else self.head(features)

    def embed(self, images: Any, training: bool | None = None) -> Any:
        """Returns the tokens (B, N, D) that enter the first block."""
        if tuple(images.shape[1:]) != (expected := (*self.config.image_size, self.config.num_channels)):
            raise ConfigError(
                f"Cannot apply {self.name}. Expected images of shape (B, H, W, C) = (B, {', '.join(map(str, expected))}"
                f"). Received: images.shape={tuple(images.shape)}. Resize the images, or create the model with their "
                "image_size."
            )
        return self.dropout(self.patch_encoder(self.patches(images)), training=training)

    def pool(self, tokens: Any) -> Any:
        """Returns the one vector (B, D) that the head reads from normalised `tokens` (B, N, D)."""
        if self.config.pooling == "class":
            return tokens[:, 0]
        return ops.mean(tokens[:, int(self.config.use_class_token) :], axis=1)  # patch tokens only

    def tokens(self, images: Any, block: int | None = None) -> Any:
        """Returns the tokens that leave a block.

        Args:
            images: (B, H, W, C), as in a call.
            block: Index of the block, negative from the end; None for the last one with the final norm applied.

        Returns:
            (B, N, D), the class token first where there is one.

        Raises:
            ConfigError: If there is no such block.
        """
        stop = self._block_index(block) + 1
        x = self.embed(images)
        for layer in self.blocks[:stop]:
            x = layer(x)
        return self.norm(x) if block is None else x

    def features(self, images: Any, block: int | None = None) -> Any:
        """Returns pooled features (B, D): the head's input, or the same reading of an earlier block.

        Args:
            images: (B, H, W, C), as in a call.
            block: Index of the block, negative from the end; None for the last. The final norm is always applied.
        """
        tokens = self.tokens(images, block)
        return self.pool(tokens if block is None else self.norm(tokens))

    def attention(self, images: Any, blocks: Sequence[int] | None = None) -> list[Any]:
        """Returns attention weights.

        Args:
            images: (B, H, W, C), as in a call.
            blocks: Indices of blocks, negative from the end; None for all.

        Returns:
            A list with one (B, A, N, N) for each block asked for, in that order; rows sum to 1.

        Raises:
            ConfigError: If there is no such block.
        """
        wanted = [self._block_index(i) for i in (range(len(self.blocks)) if blocks is None else blocks)]
        maps: dict[int, Any] = {}
        x = self.embed(images)
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            if i in wanted:
                x, maps[i] = block(x, return_attention=True)
            else:
                x = block(x)
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
