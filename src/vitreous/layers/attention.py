"""`SelfAttention`: tokens read from each other."""

import functools
import importlib
from typing import Any, Literal

import keras
from keras import ops

from vitreous.errors import ConfigError
from vitreous.layers.residual import PACKAGE, Residual, create_norm
from vitreous.spec import check_minimum, check_rates, check_types


@keras.saving.register_keras_serializable(PACKAGE)
class SelfAttention(Residual):
    """Multi-head self-attention with its norm before and its residual skip: `x + projection(attention(norm(x)))`.

    Args:
        num_heads: A, must divide the tokens' width D.
        dropout_rate: Share of the projection's outputs dropped in training, in [0, 1).
        attention_dropout_rate: Share of attention weights dropped in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the normalisations.
        norm: `"layer"` or `"rms"`.
        norm_position: `"pre"`, or `"post"`: `x + norm(...)`.
        layer_scale: First value of a trainable scale on the branch; 0 builds none.
        use_qkv_bias: Whether queries, keys and values have a bias.
        use_key_bias: Whether keys have one too. (It never changes the softmax; some published models have none.)
        use_projection_bias: Whether the projection has a bias.
        use_qk_norm: Whether queries and keys of each head are normalised.
        use_inner_norm: Whether the heads' output is normalised before the projection.
        use_local_attention: Whether the temperature is learned, and no token attends to itself.
        rope_style: How rotary tables pair the values of a head: `"interleaved"` (0 with 1, 2 with 3 ...) or `"half"`
            (first half with second half).
        use_fused_attention: Whether to call the backend's fused kernel (flash attention where it has one). Default
            None: on a GPU or TPU yes; on a CPU no, where the composed form trains 2 to 7 times faster (docs/log.md).
            Weights asked for, tapped, or dropped in training, and local attention, are always composed. Both forms
            agree to 1e-5 in float32.

    Call arguments:
        x: (B, N, D) tokens.
        rope: Tables (sine, cosine) of shape (N, D / A) or (B, N, D / A) that rotate queries and keys; default none.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too.
        attention_tap: (B, A, N, N) added to the attention weights, default none. Zeros change nothing, and the gradient
            by them is the gradient by the weights.

    Returns:
        (B, N, D), or that and the weights (B, A, N, N), in [0, 1] with rows that sum to 1.

    Raises:
        ConfigError: If an argument is out of range, or `num_heads` does not divide D.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2; pre-norm as in Dosovitskiy et al.
    2021, equation 2; rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864; local attention: Lee et al.
    2021, https://arxiv.org/abs/2112.13492, section 3.2, with one temperature a head. Queries, keys and values come
    from one product, in this order.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        norm: Literal["layer", "rms"] = "layer",
        norm_position: Literal["pre", "post"] = "pre",
        layer_scale: float = 0.0,
        use_qkv_bias: bool = True,
        use_key_bias: bool = True,
        use_projection_bias: bool = True,
        use_qk_norm: bool = False,
        use_inner_norm: bool = False,
        use_local_attention: bool = False,
        rope_style: Literal["interleaved", "half"] = "interleaved",
        use_fused_attention: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            epsilon=epsilon,
            norm=norm,
            norm_position=norm_position,
            layer_scale=layer_scale,
            **kwargs,
        )
        self.options |= {
            "num_heads": num_heads,
            "attention_dropout_rate": attention_dropout_rate,
            "use_qkv_bias": use_qkv_bias,
            "use_key_bias": use_key_bias,
            "use_projection_bias": use_projection_bias,
            "use_qk_norm": use_qk_norm,
            "use_inner_norm": use_inner_norm,
            "use_local_attention": use_local_attention,
            "rope_style": rope_style,
            "use_fused_attention": use_fused_attention,
        }
        check_types(SelfAttention.__init__, self.options)
        check_minimum(1, num_heads=num_heads)
        check_rates(attention_dropout_rate=attention_dropout_rate)
        self.num_heads = num_heads
        self.attention_dropout_rate = attention_dropout_rate
        self.use_split_bias = use_qkv_bias and not use_key_bias
        self.use_qk_norm = use_qk_norm
        self.use_inner_norm = use_inner_norm
        self.use_local_attention = use_local_attention
        self.rope_style = rope_style
        self.use_fused_attention = use_fused_attention
        self.attention_dropout = keras.layers.Dropout(
            attention_dropout_rate, dtype=self.dtype_policy, name="attention_dropout"
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        self.head_dim = get_head_dim(self, dim, self.num_heads)
        options, policy = self.options, self.dtype_policy
        self.build_shared(input_shape)
        self.qkv = keras.layers.Dense(
            3 * dim, use_bias=options["use_qkv_bias"] and not self.use_split_bias, dtype=policy, name="qkv"
        )
        self.qkv.build((None, dim))
        if self.use_split_bias:
            self.query_value_bias = self.add_weight(shape=(2 * dim,), initializer="zeros", name="query_value_bias")
        if self.use_qk_norm:
            self.query_norm, self.key_norm = (
                create_norm(options["norm"], options["epsilon"], policy, name) for name in ("query_norm", "key_norm")
            )
            self.query_norm.build((None, self.head_dim))
            self.key_norm.build((None, self.head_dim))
        if self.use_inner_norm:
            self.inner_norm = create_norm(options["norm"], options["epsilon"], policy, "inner_norm")
            self.inner_norm.build((None, dim))
        if self.use_local_attention:
            self.temperature = self.add_weight(
                shape=(self.num_heads, 1, 1),
                initializer=keras.initializers.Constant(self.head_dim**0.5),
                name="temperature",
            )
        self.projection = keras.layers.Dense(
            dim, use_bias=options["use_projection_bias"], dtype=policy, name="projection"
        )
        self.projection.build((None, dim))

    def call(
        self,
        x: Any,
        rope: Any = None,
        training: bool | None = None,
        return_attention: bool = False,
        attention_tap: Any = None,
    ) -> Any:
        """Returns `x` plus the attention branch, and the attention weights if asked for."""
        is_looked_at = return_attention or attention_tap is not None
        if not is_looked_at and (branches := self._get_branches(x, rope, training)):
            return self.skip(x, branches.attend(self, x), training)
        if training and not is_looked_at and self._is_split(x, rope):
            from vitreous.layers import jax_parts

            branch = jax_parts.compute(lambda part: self._compose(part, rope, True)[0], x, num_heads=self.num_heads)
            return self.skip(x, branch, training)
        is_fused = self._is_fused(training) and not is_looked_at
        branch, attention = self._compose(x, rope, training, is_fused, attention_tap)
        x = self.skip(x, branch, training)
        return (x, attention) if return_attention else x

    def _compose(
        self, x: Any, rope: Any, training: bool | None, is_fused: bool = False, attention_tap: Any = None
    ) -> tuple[Any, Any]:
        """Returns the branch (B * N, D), and the attention weights (B, A, N, N) or None."""
        _, num_tokens, dim = x.shape
        qkv = self.qkv(self.enter(x))  # (B * N, 3 * D)
        if self.use_split_bias:
            query_bias, value_bias = ops.split(ops.cast(self.query_value_bias, qkv.dtype), 2)
            qkv = qkv + ops.concatenate([query_bias, ops.zeros_like(query_bias), value_bias])
        qkv = ops.reshape(qkv, (-1, num_tokens, 3, self.num_heads, self.head_dim))
        if self.use_qk_norm or rope is not None:
            query, key = self._position(qkv[:, :, 0], rope, "query"), self._position(qkv[:, :, 1], rope, "key")
            qkv = ops.stack([query, key, qkv[:, :, 2]], axis=2)
        attention = None
        if is_fused:
            query, key, value = (qkv[:, :, i] for i in range(3))  # (B, N, A, D / A)
            heads = ops.dot_product_attention(query, key, value)
        else:
            qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))
            query, key, value = qkv[0], qkv[1], qkv[2]  # (B, A, N, D / A)
            attention = self._attend(query, key)  # (B, A, N, N)
            if attention_tap is not None:
                attention = attention + attention_tap
            weights = self.attention_dropout(attention, training=training) if self.attention_dropout_rate else attention
            heads = ops.matmul(weights, value)
            heads = ops.transpose(heads, (0, 2, 1, 3))
        heads = ops.reshape(heads, (-1, dim))  # (B * N, D)
        if self.use_inner_norm:
            heads = self.inner_norm(heads)
        return self.projection(heads), attention

    def _get_branches(self, x: Any, rope: Any, training: bool | None) -> Any:
        """Returns the module that computes this branch in one operation, or None."""
        is_special = self.use_qk_norm or self.use_inner_norm or self.use_local_attention or self.use_fused_attention
        if is_special or self.use_split_bias or rope is not None or (training and self.attention_dropout_rate):
            return None
        return self.get_branches(x, self.qkv, self.projection)

    def _is_split(self, x: Any, rope: Any) -> bool:
        """Whether a few examples at a time are faster, and give the same: no draws, no tables by example."""
        is_by_example = rope is not None and len(rope[0].shape) == 3
        return self.can_split(x) and not (is_by_example or self.attention_dropout_rate or self.use_fused_attention)

    def _position(self, heads: Any, rope: Any, name: str) -> Any:
        """Returns queries or keys (B, N, A, D / A), normalised and rotated as this layer does."""
        if self.use_qk_norm:
            heads = (self.query_norm if name == "query" else self.key_norm)(heads)
        return heads if rope is None else rotate(heads, rope, self.rope_style)

    def _attend(self, query: Any, key: Any) -> Any:
        """Returns the attention weights (B, A, N, N)."""
        transposed = ops.transpose(key, (0, 1, 3, 2))
        if not self.use_local_attention:
            return ops.softmax(ops.matmul(query * self.head_dim**-0.5, transposed), axis=-1)
        scores = ops.matmul(query, transposed) / ops.cast(self.temperature, query.dtype)
        itself = ops.eye(scores.shape[-1], dtype=scores.dtype)
        return ops.softmax(scores - 1e4 * itself, axis=-1)

    def _is_fused(self, training: bool | None) -> bool:
        if self.use_local_attention or (training and self.attention_dropout_rate):
            return False
        return has_accelerator() if self.use_fused_attention is None else self.use_fused_attention


def rotate(heads: Any, rope: tuple[Any, Any], style: Literal["interleaved", "half"]) -> Any:
    """Rotates pairs of values by the angles of their token.

    Args:
        heads: (B, N, A, d) queries or keys.
        rope: Sine and cosine of the angles, (N, d) or (B, N, d) each; d values for d / 2 pairs, laid out as `style`.
        style: `"interleaved"` pairs 0 with 1, 2 with 3 ...; `"half"` pairs 0 with d / 2, 1 with d / 2 + 1 ...

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34.
    """
    sine, cosine = (ops.expand_dims(ops.cast(table, heads.dtype), -2) for table in rope)  # over the heads
    if style == "half":
        first, second = ops.split(heads, 2, axis=-1)
        turned = ops.concatenate([-second, first], axis=-1)
    else:
        pairs = ops.reshape(heads, (*(-1, *heads.shape[1:3]), heads.shape[-1] // 2, 2))
        turned = ops.reshape(ops.stack([-pairs[..., 1], pairs[..., 0]], axis=-1), (-1, *heads.shape[1:]))
    return heads * cosine + turned * sine


def get_head_dim(layer: keras.layers.Layer, dim: int, num_heads: int) -> int:
    """Returns the width of one head."""
    if dim % num_heads:
        raise ConfigError(
            f"Cannot build {type(layer).__name__}. Expected a width divisible by num_heads. Received: width={dim}, "
            f"num_heads={num_heads}. Change one of the two."
        )
    return dim // num_heads


@functools.cache
def has_accelerator() -> bool:
    """Whether the backend computes on a GPU or TPU by default."""
    backend = importlib.import_module(keras.backend.backend())
    if keras.backend.backend() == "jax":
        return backend.default_backend() != "cpu"
    if keras.backend.backend() == "torch":
        return backend.cuda.is_available()
    return bool(backend.config.list_physical_devices("GPU"))
