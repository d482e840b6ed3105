"""Masked autoencoding: an encoder that sees a few patches of an image, and a small decoder that fills in the others.

No labels are needed. Afterwards the encoder is kept, and the decoder thrown away.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers import Patches, TransformerBlock, take_patches
from vitreous.model import VisionTransformer
from vitreous.positions import sincos_positions
from vitreous.spec import check_minimum, check_rates
from vitreous.training.recipe import MaskTarget


class MaskedAutoencoder(keras.Model):
    """Hides most patches of an image, and predicts their pixels from the rest.

    Args:
        encoder: A built model whose patches tile the image; its head is not used.
        mask_rate: Share of the patches that is hidden, in (0, 1).
        mask_size: Patches of a side of the squares that are hidden or seen as one; must divide the grid.
        mask_target: What is predicted: the pixels with the mean and variance of their patch taken out (`"patch"`), or
            those of the whole image (`"image"`).
        decoder_dim: Width of the decoder's tokens, a multiple of 64.
        num_decoder_blocks: Its blocks.

    Call arguments:
        images: (B, H, W, C) normalised, as for the encoder.
        training: Whether patches are drawn anew at each call; else the same ones are hidden at every call.

    Returns:
        (B,) float32: the mean squared error over the pixels of the hidden patches, where the target has mean 0 and
        variance 1 in each patch, or in the image.

    Raises:
        ConfigError: If patches overlap or leave gaps, or no patch would be left to see or to hide.

    Source: He et al. 2022, https://arxiv.org/abs/2111.06377, section 3; the target `"patch"` is the normalised pixels
    of section 4.1; squares in place of single patches: Xie et al. 2022, https://arxiv.org/abs/2111.09886 (SimMIM).
    Differences: tokens that are no patches do not enter the decoder; with a stem that looks beyond a patch, hidden
    patches are 0 to it, the mean colour.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_rate: float = 0.75,
        mask_size: int = 1,
        mask_target: MaskTarget = "image",
        decoder_dim: int = 128,
        num_decoder_blocks: int = 2,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        config, policy = encoder.config, self.dtype_policy
        check_rates(mask_rate=mask_rate)
        check_minimum(1, mask_size=mask_size)
        rows, columns = config.grid_size
        num_patches, num_blocks = rows * columns, (rows // mask_size) * (columns // mask_size)
        self.num_visible = round(num_blocks * (1 - mask_rate)) * mask_size**2
        is_tiled = config.patch_strides == config.patch_size and not (rows % mask_size or columns % mask_size)
        if not is_tiled or not 0 < self.num_visible < num_patches:
            raise ConfigError(
                f"Cannot mask patches of {encoder.name}. Expected patches side by side, in whole squares of "
                "mask_size, some to see and some to hide. "
                f"Received: patch_size={config.patch_size}, patch_strides={config.patch_strides}, "
                f"grid_size={config.grid_size}, mask_rate={mask_rate}, mask_size={mask_size}. "
                "Pass another model, mask_rate or mask_size."
            )
        if decoder_dim % 64:
            raise ConfigError(
                "Cannot create the decoder. Expected a multiple of 64, for heads of 64. "
                f"Received: decoder_dim={decoder_dim}. Pass for example 128."
            )
        self.encoder = encoder
        self.mask_rate = mask_rate
        self.mask_size = mask_size
        self.mask_target = mask_target
        self.patches = Patches(config.patch_size, dtype="float32", name="target_patches")
        self.decoder_projection = keras.layers.Dense(decoder_dim, dtype=policy, name="decoder_projection")
        self.decoder_blocks = [
            TransformerBlock(decoder_dim // 64, 4 * decoder_dim, dtype=policy, name=f"decoder_block_{i}")
            for i in range(num_decoder_blocks)
        ]
        self.decoder_norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=policy, name="decoder_norm")
        patch_dim = int(np.prod(config.patch_size)) * config.num_channels
        self.decoder_pixels = keras.layers.Dense(patch_dim, dtype="float32", name="decoder_pixels")
        self.seed_generator = keras.random.SeedGenerator()
        tokens = (None, num_patches, decoder_dim)
        self.mask_token = self.add_weight(
            shape=(1, 1, decoder_dim), initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="mask_token"
        )
        self.decoder_projection.build((None, self.num_visible, config.projection_dim))
        for block in self.decoder_blocks:
            block.build(tokens)
        self.decoder_norm.build(tokens)
        self.decoder_pixels.build(tokens)
        self.positions = sincos_positions(config.grid_size, decoder_dim)[None]  # (1, N, decoder_dim)
        self.built = True

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns (B,)."""
        return (input_shape[0],)

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Returns the error (B,) on the hidden patches of `images`."""
        _, predicted, wanted, is_hidden = self._predict(images, training)
        errors = ops.mean(ops.square(predicted - wanted), axis=-1)  # (B, N)
        return ops.sum(errors * is_hidden, axis=1) / (is_hidden.shape[1] - self.num_visible)

    def reconstruct(self, images: Any) -> tuple[Any, Any]:
        """Returns what the model sees of `images`, and what it makes of it.

        Returns:
            Two (B, H, W, C) float32, normalised as `images`: hidden patches are 0 in the first, and predicted in the
            second, with the mean and variance that the true patch has, or the true image.
        """
        patches, predicted, _, is_hidden = self._predict(images, False)
        mean, deviation = self._moments(patches)
        hidden = is_hidden[:, :, None]
        filled = patches * (1 - hidden) + (predicted * deviation + mean) * hidden
        size = self.encoder.config.image_size
        return self.patches.reconstruct(patches * (1 - hidden), size), self.patches.reconstruct(filled, size)

    def _predict(self, images: Any, training: bool | None) -> tuple[Any, Any, Any, Any]:
        """Returns the true patches, the predicted and the wanted normalised ones (B, N, patch_dim), and which hide."""
        config = self.encoder.config
        images = ops.cast(images, "float32")
        patches = self.patches(images)
        count, size = patches.shape[1], self.mask_size
        rows, columns = (side // size for side in config.grid_size)
        seed = self.seed_generator if training else 0
        noise = keras.random.uniform((ops.shape(images)[0], rows, columns), seed=seed)
        noise = ops.repeat(ops.repeat(noise, size, axis=1), size, axis=2)
        order = ops.argsort(ops.reshape(noise, (-1, count)), axis=1)
        places = ops.argsort(order, axis=1)  # where each patch stands in that order
        visible = order[:, : self.num_visible]
        is_hidden = ops.cast(places >= self.num_visible, "float32")  # (B, N)
        if config.stem != "none":
            images = self.patches.reconstruct(patches * (1 - is_hidden[:, :, None]), config.image_size)
        x, rope = self.encoder.enter(images, training)
        x, rope = take_patches(x, rope, visible, config.num_prefix_tokens)
        for block in self.encoder.blocks:
            x = block(x, rope=rope, training=training)
        x = self.encoder.leave(x)[:, config.num_prefix_tokens :]
        x = self.decoder_projection(x)  # (B, visible, decoder_dim)
        mask = ops.cast(self.mask_token, x.dtype) + ops.zeros_like(x[:, :1])
        x = ops.concatenate([x, ops.repeat(mask, count - self.num_visible, axis=1)], axis=1)
        x = ops.take_along_axis(x, places[:, :, None], axis=1) + ops.cast(self.positions, x.dtype)
        for block in self.decoder_blocks:
            x = block(x, training=training)
        mean, deviation = self._moments(patches)
        return patches, self.decoder_pixels(self.decoder_norm(x)), (patches - mean) / deviation, is_hidden

    def _moments(self, patches: Any) -> tuple[Any, Any]:
        """Returns the mean and the standard deviation that the target is without, broadcast over patches."""
        axes = -1 if self.mask_target == "patch" else (1, 2)
        mean = ops.mean(patches, axis=axes, keepdims=True)
        return mean, ops.sqrt(ops.var(patches, axis=axes, keepdims=True) + 1e-6)


def reconstruction_loss(errors: Any, labels: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Returns the sum of the errors (B,) that the mask keeps, their number, and 0 for answers: there are none."""
    mask = ops.convert_to_tensor(mask, "float32")
    return ops.sum(errors * mask), ops.sum(mask), ops.zeros(())
