"""`AttentionPool`: tokens to one vector."""

from typing import Any

import keras
from keras import ops

from vitreous.layers.attention import get_head_dim
from vitreous.layers.blocks import MLP
from vitreous.layers.residual import PACKAGE
from vitreous.spec import check_minimum, check_types


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionPool(keras.layers.Layer):
    """Pools tokens by attention from one trained query, and an MLP after it (multi-head attention pooling, "MAP").

    Args:
        num_heads: A, attention heads.
        mlp_dim: Hidden units of the MLP.
        mlp: More arguments of `MLP`.

    Call arguments:
        x: (B, N, D) tokens.
        return_attention: Whether to return the attention weights too.
        attention_tap: (B, A, N) added to the attention weights, default none (see `SelfAttention`).

    Returns:
        (B, D), or that and the attention weights (B, A, N), in [0, 1], that sum to 1.

    Source: Zhai et al. 2022, https://arxiv.org/abs/2106.04560, appendix; Lee et al. 2019,
    https://arxiv.org/abs/1810.00825.
    """

    def __init__(self, num_heads: int, mlp_dim: int, *, mlp: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        check_types(AttentionPool.__init__, {"num_heads": num_heads, "mlp_dim": mlp_dim})
        check_minimum(1, num_heads=num_heads, mlp_dim=mlp_dim)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.mlp_options = dict(mlp or {})
        self.mlp = MLP(mlp_dim, dtype=self.dtype_policy, name="mlp", **self.mlp_options)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        self.head_dim = get_head_dim(self, dim, self.num_heads)
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

    def call(self, x: Any, return_attention: bool = False, attention_tap: Any = None) -> Any:
        """Returns the pooled vector (B, D) of tokens (B, N, D), and the attention weights if asked for."""
        _, num_tokens, dim = x.shape
        query = self.query(ops.reshape(ops.convert_to_tensor(self.latent), (1, dim)))
        query = ops.reshape(query, (1, self.num_heads, 1, self.head_dim)) * self.head_dim**-0.5
        pairs = self.key_value(ops.reshape(x, (-1, dim)))
        pairs = ops.reshape(pairs, (-1, num_tokens, 2, self.num_heads, self.head_dim))
        pairs = ops.transpose(pairs, (2, 0, 3, 1, 4))
        key, value = pairs[0], pairs[1]  # (B, A, N, D / A)
        weights = ops.softmax(ops.sum(query * key, axis=-1), axis=-1)  # (B, A, N)
        if attention_tap is not None:
            weights = weights + attention_tap
        pooled = ops.sum(weights[..., None] * value, axis=2)  # (B, A, D / A)
        pooled = self.projection(ops.reshape(pooled, (-1, dim)))
        pooled = self.mlp(pooled[:, None, :])[:, 0]
        return (pooled, weights) if return_attention else pooled

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "mlp": self.mlp_options,
        }
