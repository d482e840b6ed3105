"""A model looked at from inside: one pass with composed attention, and gradients by what is inside, on each backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

if TYPE_CHECKING:
    from vitreous.model import VisionTransformer

Objective = Callable[[list[Any], list[Any]], tuple[Any, list[Any]]]
Differentiated = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], tuple[list[np.ndarray], list[np.ndarray]]]


@dataclass(frozen=True)
class Trace:
    """What happened to one image inside a model, and what its target's score owes to it.

    L blocks, A heads (of all parallel attentions), N tokens, D width, K classes, all float32. Gradients are those of
    the target's logit; 0 without a target.

    Args:
        logits: (K,) of this pass; without a head, the pooled features.
        attention: (L, A, N, N) attention weights.
        attention_gradients: (L, A, N, N), the mean over the steps of `create_trace_function`.
        tokens: (L, N, D) that enter each block.
        token_gradients: (L, N, D).
        features: (N, D) tokens that are pooled, after the final norm.
        pool_attention: (A, patches) weights of attention pooling; None for other pooling.
        pool_gradients: (A, patches), the mean over the steps, or None.
    """

    logits: np.ndarray
    attention: np.ndarray
    attention_gradients: np.ndarray
    tokens: np.ndarray
    token_gradients: np.ndarray
    features: np.ndarray
    pool_attention: np.ndarray | None
    pool_gradients: np.ndarray | None


def create_gradient_function(model: "VisionTransformer", function: Objective) -> Differentiated:
    """Returns a function that computes `function` and its gradients, compiled where the backend compiles.

    Args:
        model: Whose weights `function` reads.
        function: Takes a list of sources and one of constants, tensors both; returns a scalar and a list of outputs.

    Returns:
        A function of NumPy sources and constants that returns the outputs and the gradient of the scalar by each
        source, in NumPy, float32.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        variables = model.variables

        def compute(values: Any, sources: Any, constants: Any) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(sources, constants)

        compiled = jax.jit(jax.grad(compute, argnums=1, has_aux=True))

        def call(sources: Any, constants: Any) -> Any:
            gradients, outputs = compiled([v.value for v in variables], sources, constants)
            return outputs, gradients

    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def trace(sources: Any, constants: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(sources)
                objective, outputs = function(sources, constants)
            return outputs, tape.gradient(objective, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        def call(sources: Any, constants: Any) -> Any:
            return trace(*([tf.constant(x) for x in group] for group in (sources, constants)))

    else:
        import torch

        def call(sources: Any, constants: Any) -> Any:
            with torch.enable_grad():
                sources = [ops.convert_to_tensor(x).requires_grad_(True) for x in sources]
                objective, outputs = function(sources, [ops.convert_to_tensor(x) for x in constants])
                return outputs, torch.autograd.grad(objective, sources, materialize_grads=True)

    def differentiate(
        sources: Sequence[np.ndarray], constants: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        outputs, gradients = call(list(sources), list(constants))
        return [_to_numpy(x) for x in outputs], [_to_numpy(x) for x in gradients]

    return differentiate


def _to_numpy(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


def create_trace_function(model: "VisionTransformer") -> Callable[[np.ndarray, int | None, int], Trace]:
    """Returns a function that traces one image.

    Its arguments are a normalised image (H, W, C), the index of the target class or None, and a number of steps.
    Attention is composed in this pass, so that its weights exist. Zeros are added to the weights and to the tokens: the
    gradient by these zeros is the gradient by what they are added to.

    A class token that has found its answer hardly moves any more (each norm takes out what is parallel to it), and that
    gradient says little. With several steps, gradients by attention are the mean over passes in which attention grows
    to what it is: from its weights, shares of 1 - (i + 1/2) / steps of them are taken off. Attention pooling, which
    nothing skips, grows from equal weights instead.

    Source of the steps: Hao et al. 2021, https://arxiv.org/abs/2004.11207, section 3; there a block at a time.
    """
    config = model.config
    heads = config.num_heads * config.num_parallel
    prefix = config.num_prefix_tokens
    is_map = config.pooling == "map"

    def follow(sources: list[Any], constants: list[Any]) -> tuple[Any, list[Any]]:
        attention_taps, token_taps, pool_tap = sources
        images, target = constants
        x, rope = model.enter(images)
        weights, tokens = [], []
        for i, block in enumerate(model.blocks):
            x = x + ops.cast(token_taps[i], x.dtype)
            tokens.append(x)
            x, attention = block(x, rope=rope, return_attention=True, attention_tap=attention_taps[i])
            weights.append(attention)
        x = model.leave(x)
        logits = model.classify(x, attention_tap=pool_tap if is_map else None)
        outputs = [logits, ops.stack(weights), ops.stack(tokens), x]
        if is_map:
            outputs.append(model.attention_pool(x[:, prefix:], return_attention=True)[1])
        return ops.sum(ops.cast(logits, "float32") * target), outputs

    differentiate = create_gradient_function(model, follow)

    def trace(image: np.ndarray, target: int | None, steps: int) -> Trace:
        rows, columns = config.replace(image_size=image.shape[:2]).grid_size
        num_tokens = prefix + rows * columns
        constants = [image[None], one_hot(target, config.num_classes or config.features_dim)]
        token_taps = np.zeros((config.num_blocks, 1, num_tokens, config.projection_dim), "float32")
        none = (
            np.zeros(shape, "float32")
            for shape in ((config.num_blocks, 1, heads, num_tokens, num_tokens), (1, config.num_heads, rows * columns))
        )
        attention_taps, pool_taps = none
        outputs, gradients = differentiate([attention_taps, token_taps, pool_taps], constants)
        logits, attention, tokens, features, *pool = outputs
        by_attention, by_tokens, by_pool = gradients
        if steps > 1 and target is not None:
            off_pool = pool[0] - 1 / (rows * columns) if pool else pool_taps
            by_attention, by_pool = np.zeros_like(by_attention), np.zeros_like(by_pool)
            for step in range(steps):
                share = np.float32((step + 0.5) / steps - 1)
                _, found = differentiate([share * attention, token_taps, share * off_pool], constants)
                by_attention += found[0] / steps
                by_pool += found[2] / steps
        return Trace(
            logits=logits[0],
            attention=attention[:, 0],
            attention_gradients=by_attention[:, 0],
            tokens=tokens[:, 0],
            token_gradients=by_tokens[:, 0],
            features=features[0],
            pool_attention=pool[0][0] if pool else None,
            pool_gradients=by_pool[0] if pool else None,
        )

    return trace


def create_image_gradient_function(model: "VisionTransformer") -> Callable[[np.ndarray, int], np.ndarray]:
    """Returns a function of normalised images (B, H, W, C) and a class: the gradients of its logit by the images."""

    def score(sources: list[Any], constants: list[Any]) -> tuple[Any, list[Any]]:
        logits = model(sources[0], training=False)
        return ops.sum(ops.cast(logits, "float32") * constants[0]), []

    differentiate = create_gradient_function(model, score)
    return lambda images, target: differentiate([images], [one_hot(target, model.config.num_classes)])[1][0]


def one_hot(index: int | None, length: int) -> np.ndarray:
    """Returns zeros with a 1 at `index`, float32."""
    values = np.zeros(length, "float32")
    if index is not None:
        values[index] = 1
    return values
