"""Branches on jax on a CPU for training: a few examples at a time, and computed again in the backward.

What a branch of a whole batch leaves between its products is tens of megabytes: every operation walks through them, and
what the backward needs of them comes as fresh memory in every step, whose pages the system has to clear first. Those of
a few examples stay in the core's cache. Nothing but the branch's input is kept for the backward, so the products that
it needs are computed twice, which costs less than the memory would (docs/performance.md).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

_MAX_TOKENS = 1100  # at a time
_MAX_SCORES = 2**19  # of attention at a time: 2 MiB in float32


def can_compute() -> bool:
    """Whether jax computes on one CPU device: a loop over examples would undo a batch spread over several."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def compute(branch: Callable[[Any], Any], x: Any, *, num_heads: int = 0) -> Any:
    """Returns `branch(x)` (B * N, D), computed in parts.

    Args:
        branch: From tokens (b, N, D) of any b examples to (b * N, D), each example by itself, and without randomness.
            It may read weights from outside.
        x: (B, N, D) tokens.
        num_heads: A of an attention; 0 if the branch is none.
    """
    batch, num_tokens, dim = x.shape
    size = _get_size(batch, num_tokens, num_heads)
    padding = -batch % size
    parts = jnp.pad(x, ((0, padding), (0, 0), (0, 0))) if padding else x
    parts = parts.reshape(-1, size, num_tokens, dim)
    function, weights = jax.closure_convert(branch, parts[0])
    return _compute(function, parts, *weights).reshape(-1, dim)[: batch * num_tokens]


def _get_size(batch: int, num_tokens: int, num_heads: int) -> int:
    """Returns how many examples to have at a time."""
    most = min(batch, _MAX_TOKENS // num_tokens)
    if num_heads:
        most = min(most, _MAX_SCORES // (num_heads * num_tokens**2))
    most = max(most, 1)
    whole = [size for size in range(most // 2 + 1, most + 1) if batch % size == 0]
    return whole[-1] if whole else math.ceil(batch / math.ceil(batch / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(function: Callable[..., Any], parts: Any, *weights: Any) -> Any:
    return lax.map(lambda part: function(part, *weights), parts)


def _forward(function: Callable[..., Any], parts: Any, *weights: Any) -> tuple[Any, Any]:
    return _compute(function, parts, *weights), (parts, weights)


def _backward(function: Callable[..., Any], saved: Any, gradient: Any) -> tuple[Any, ...]:
    parts, weights = saved

    def pull_back(sums: Any, pair: Any) -> tuple[Any, Any]:
        d_part, *d_weights = jax.vjp(function, pair[0], *weights)[1](pair[1])
        return [a + b for a, b in zip(sums, d_weights, strict=True)], d_part

    d_weights, d_parts = lax.scan(pull_back, [jnp.zeros_like(weight) for weight in weights], (parts, gradient))
    return d_parts, *d_weights


_compute.defvjp(_forward, _backward)
