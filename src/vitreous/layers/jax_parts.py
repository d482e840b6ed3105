"""Branches on jax on a CPU for training: a few examples at a time, and computed again in the backward.

What a branch of a whole batch leaves between its products is tens of megabytes: every operation walks through them, and
what the backward needs of them comes as fresh memory in every step, whose pages the system has to clear first. Those of
a few examples stay in the core's cache. Nothing but the branch's input is kept for the backward, so the products that
it needs are computed twice, which costs less than the memory would (docs/performance.md).
"""

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


def is_traced(x: Any) -> bool:
    """Whether jax traces what is done with `x`: a loop that it does not trace is compiled anew in every call."""
    return isinstance(x, jax.core.Tracer)


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
    # Between two loops nothing is merged, so no barrier is needed. (A custom_vjp with jax.closure_convert has the same
    # arithmetic, but jax keeps up to 4,096 of the functions that this has converted, each with its layer's weights.)
    branches = lax.map(jax.checkpoint(branch, prevent_cse=False), parts)
    return branches.reshape(-1, dim)[: batch * num_tokens]


def _get_size(batch: int, num_tokens: int, num_heads: int) -> int:
    """Returns how many examples to have at a time."""
    most = min(batch, _MAX_TOKENS // num_tokens)
    if num_heads:
        most = min(most, _MAX_SCORES // (num_heads * num_tokens**2))
    most = max(most, 1)
    whole = [size for size in range(most // 2 + 1, most + 1) if batch % size == 0]
    return whole[-1] if whole else math.ceil(batch / math.ceil(batch / most))
