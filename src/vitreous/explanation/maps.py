"""From a trace, or from the weights alone, to maps: each method as it is defined, in NumPy.

Letters: L blocks, A heads, N tokens (prefix and patches), P patches, D width, C channels.
"""

from typing import TYPE_CHECKING

import numpy as np

from vitreous.errors import ConfigError
from vitreous.positions import resize_grid_matrix, rope_tables, sincos_positions

if TYPE_CHECKING:
    from vitreous.explanation.trace import Trace
    from vitreous.model import VisionTransformer
    from vitreous.spec import ViTConfig


def get_read_out(config: "ViTConfig", num_patches: int) -> np.ndarray:
    """Returns how much of each token the head reads, (N,) float32 that sum to 1.

    The class token alone; with a head of its own, the distillation token as much; the mean over patches; for
    `"class_mean"`, half of each. For attention pooling this is the mean; `read_patches` has the pool's own weights.
    """
    prefix = config.num_prefix_tokens
    shares = np.zeros(prefix + num_patches, "float32")
    if config.pooling in ("class", "class_mean"):
        count = 2 if config.use_distillation_head else 1
        shares[:count] = 1 / count
    if config.pooling != "class":
        shares[prefix:] += 1 / num_patches
    return shares / shares.sum()


def read_patches(
    config: "ViTConfig", weights: np.ndarray, trace: "Trace", *, use_gradients: bool = False
) -> np.ndarray:
    """Returns what the head reads of each patch at the input, (P,), by what tokens at the output take of the input.

    Args:
        config: The architecture: which tokens are pooled.
        weights: (N, N), a row for each token at the output.
        trace: Where the weights of attention pooling are.
        use_gradients: Whether attention pooling counts with the positive gradients of its weights, as in `relate`.
    """
    prefix = config.num_prefix_tokens
    if trace.pool_attention is None or trace.pool_gradients is None:
        return get_read_out(config, len(weights) - prefix) @ weights[:, prefix:]
    shares = trace.pool_attention
    if use_gradients:
        shares = np.maximum(trace.pool_gradients * shares, 0)
    return shares.mean(axis=0) @ weights[prefix:, prefix:]


def read_relevance(config: "ViTConfig", relevance: np.ndarray, trace: "Trace") -> np.ndarray:
    """Returns how relevant each patch is for the class, (P,), by `relate`'s (N, N)."""
    # What a mean over patches has of each patch itself is the same for all, and left out.
    itself = 0 if config.pooling == "map" else np.eye(len(relevance), dtype="float32")
    return read_patches(config, relevance - itself, trace, use_gradients=True)


def roll_out(attention: np.ndarray) -> np.ndarray:
    """Returns attention rollout: how much of each token's value comes from each token at the input.

    Args:
        attention: (L, A, N, N), rows that sum to 1.

    Returns:
        (N, N) float32, in [0, 1], rows that sum to 1.

    Source: Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928, section 3: the mean over heads, the residual skip as
    an identity of equal weight, each row normalised, block after block.
    """
    result = np.eye(attention.shape[-1])
    for block in attention.mean(axis=1):
        mixed = block.astype("float64") + np.eye(len(block))
        result = (mixed / mixed.sum(axis=-1, keepdims=True)) @ result
    return result.astype("float32")


def relate(attention: np.ndarray, gradients: np.ndarray, num_parallel: int = 1) -> np.ndarray:
    """Returns how relevant each token at the input is for each token at the output, for the class of the gradients.

    Args:
        attention: (L, A, N, N).
        gradients: (L, A, N, N), of the class's logit by the attention weights.
        num_parallel: Attentions side by side in each block; their branches are summed.

    Returns:
        (N, N) float32, 0 or more.

    Source: Chefer et al. 2021, https://arxiv.org/abs/2103.15679, equations 5 and 6: R starts as the identity, and each
    block adds mean over heads of (gradient * attention)+, times R.
    """
    result = np.eye(attention.shape[-1])
    for weights, gradient in zip(attention, gradients, strict=True):
        positive = np.maximum(gradient.astype("float64") * weights, 0)
        result = result + num_parallel * positive.mean(axis=0) @ result
    return result.astype("float32")


def weigh_tokens(tokens: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns Grad-CAM on patch tokens.

    Args:
        tokens: (P, D) that enter a block.
        gradients: (P, D), of the class's logit.

    Returns:
        The map (P,), 0 or more: the positive part of each token's product with the weights; and the weights (D,): the
        mean gradient over patches.

    Source: Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2, with tokens for positions.
    """
    weights = gradients.mean(axis=0)
    return np.maximum(tokens @ weights, 0), weights


def find_components(features: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns principal components of vectors.

    Args:
        features: (P, D).
        count: Components wanted; fewer where P or D is smaller.

    Returns:
        Each vector's scores (P, count), the components (count, D) with their largest value positive, and the share of
        the variance that each explains (count,).
    """
    centred = features.astype("float64") - features.mean(axis=0)
    left, scales, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    shares = scales**2 / max(float((scales**2).sum()), np.finfo(float).tiny)
    scores = left * scales * signs
    components = right * signs[:, None]
    return scores[:, :count].astype("float32"), components[:count].astype("float32"), shares[:count].astype("float32")


def colour_scores(scores: np.ndarray) -> np.ndarray:
    """Returns scores (P, 3) as colours in [0, 1]: each component from its 2nd percentile to its 98th."""
    low, high = np.percentile(scores, (2, 98), axis=0)
    spread = np.where(high > low, high - low, 1)
    return np.clip((scores - low) / spread, 0, 1).astype("float32")


def get_positions(model: "VisionTransformer", grid_size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Returns a vector for the position of each patch, and what these are.

    Args:
        model: Whose positions.
        grid_size: (rows, columns) of patches; learned positions are resized to it.

    Returns:
        (P, F) float32, and `"learned"` or `"sincos"`, which are added to the tokens (F is D); or `"rotary"`, by which
        queries and keys are turned: the cosines and the sines of the angles.

    Raises:
        ConfigError: If the model has no positions.
    """
    config = model.config
    if config.position == "learned":
        vectors = np.asarray(model.patch_encoder.position_embedding)[0, config.num_prefix_positions :]
        if grid_size != config.grid_size:
            vectors = resize_grid_matrix(config.grid_size, grid_size) @ vectors
        return vectors, "learned"
    if config.position == "sincos":
        return sincos_positions(grid_size, config.projection_dim), "sincos"
    if config.rope != "none":
        tables = rope_tables(
            config.rope,
            grid_size,
            config.projection_dim // config.num_heads,
            temperature=config.rope_temperature,
            reference_grid=config.rope_reference_grid,
        )
        return np.concatenate(tables, axis=1), "rotary"
    raise ConfigError(
        f"Cannot compare positions of {model.name}. Expected a model that has some. Received: position='none', "
        "rope='none'. Pass another."
    )


def compare_positions(model: "VisionTransformer", grid_size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Returns how similar the positions of patches are to each other, and which positions these are.

    Args:
        model: Whose positions.
        grid_size: (rows, columns) of patches.

    Returns:
        (P, P) float32 cosine similarities, in [-1, 1], and the kind, as of `get_positions`. For rotary positions it is
        the similarity that the rotation leaves of a query and an equal key: the mean cosine of the angles between the
        two patches.

    Raises:
        ConfigError: If the model has no positions.
    """
    vectors, kind = get_positions(model, grid_size)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, np.finfo("float32").tiny)
    return (units @ units.T).astype("float32"), kind


def get_filters(model: "VisionTransformer") -> np.ndarray:
    """Returns what the model looks for first: filters (D, P_h, P_w, C) float32.

    Those of the patch projection; of a shifted stem, its part for the image that is not shifted; of a convolutional
    stem, those of its first convolution, 3 x 3 pixels.
    """
    config = model.config
    if config.stem == "convolution":
        kernel = np.asarray(model.stem.convolutions[0].kernel, "float32")  # (3, 3, C, D)
    else:
        kernel = np.asarray(model.patch_encoder.projection.kernel, "float32")
        kernel = kernel.reshape(*config.patch_size, -1, config.projection_dim)[:, :, : config.num_channels]
    return kernel.transpose(3, 0, 1, 2)
