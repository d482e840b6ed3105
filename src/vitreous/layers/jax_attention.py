"""Attention on jax on a CPU for training: a few examples at a time, and their weights computed again in the backward.

The scores of a whole batch, (B, A, N, N), are tens of megabytes that every softmax and product walks through; those of
a few examples stay in the core's cache, which is worth more than computing them twice (docs/performance.md). Nothing of
size N * N is kept between forward and backward.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

_MAX_SCORES = 2**19  # at a time: 2 MiB in float32


def can_compute() -> bool:
    """Whether jax computes on one CPU device: a loop over examples would undo a batch spread over several."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _attend_some(qkv: Any) -> Any:
    """Returns the heads (b, N, D) of a few examples' queries, keys and values (b, N, 3, A, d)."""
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # (b, A, N, d)
    weights = jax.nn.softmax((query * head_dim**-0.5) @ jnp.swapaxes(key, 2, 3), axis=-1)
    heads = jnp.transpose(weights @ value, (0, 2, 1, 3))
    return heads.reshape(batch, num_tokens, num_heads * head_dim)


def _split(x: Any, scores: int) -> Any:
    """Returns `x` (B, ...) as (B / b, b, ...), b the most examples of `scores` scores each to have at a time."""
    batch = x.shape[0]
    size = max(b for b in range(1, batch + 1) if batch % b == 0 and (b == 1 or b * scores <= _MAX_SCORES))
    return x.reshape(batch // size, size, *x.shape[1:])


@jax.custom_vjp
def attend(qkv: Any) -> Any:
    """Returns the attention's heads (B, N, D) for queries, keys and values (B, N, 3, A, d)."""
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    heads = lax.map(_attend_some, _split(qkv, num_heads * num_tokens**2))
    return heads.reshape(batch, num_tokens, num_heads * head_dim)


def _forward(qkv: Any) -> tuple[Any, Any]:
    return attend(qkv), qkv


def _backward(qkv: Any, gradient: Any) -> tuple[Any]:
    scores = qkv.shape[3] * qkv.shape[1] ** 2

    def pull_back(pair: Any) -> Any:
        return jax.vjp(_attend_some, pair[0])[1](pair[1])[0]

    return (lax.map(pull_back, (_split(qkv, scores), _split(gradient, scores))).reshape(qkv.shape),)


attend.defvjp(_forward, _backward)
