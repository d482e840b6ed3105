"""`MLP`, and `TransformerBlock`: attention, then MLP."""

from typing import Any, Literal

import keras
from keras import ops

from vitreous.layers.attention import SelfAttention, has_accelerator
from vitreous.layers.residual import PACKAGE, Residual, create_norm
from vitreous.spec import check_minimum, check_types


@keras.saving.register_keras_serializable(PACKAGE)
class MLP(Residual):
    """Two dense layers with their norm before and their residual skip: `x + dense(activation(dense(norm(x))))`.

    The skip comes right after the last dense layer, inside this layer.

    Args:
        hidden_dim: Units between the two dense layers.
        kind: `"dense"`, or `"swiglu"`: the first layer gives a gate and a value, and `activation(gate) * value`
            goes on.
        activation: `"gelu"` (exact), `"gelu_tanh"`, `"quick_gelu"` or `"silu"`.
        use_bias: Whether the dense layers have biases.
        use_inner_norm: Whether the hidden units are normalised before the last dense layer.
        dropout_rate: Share dropped after each dense layer in training, in [0, 1).
        stochastic_depth_rate: Probability that the whole branch is dropped for an example in training.
        epsilon: Of the normalisations.
        norm: `"layer"` or `"rms"`.
        norm_position: `"pre"`, or `"post"`: `x + norm(...)`.
        layer_scale: First value of a trainable scale on the branch; 0 builds none.

    Call arguments:
        x: (B, N, D) tokens.
        training: Whether dropout is active.

    Returns:
        (B, N, D).

    Raises:
        ConfigError: If an argument is out of range or none of the choices.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3; GELU of Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415; SwiGLU of Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        kind: Literal["dense", "swiglu"] = "dense",
        activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu",
        use_bias: bool = True,
        use_inner_norm: bool = False,
        dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        epsilon: float = 1e-6,
        norm: Literal["layer", "rms"] = "layer",
        norm_position: Literal["pre", "post"] = "pre",
        layer_scale: float = 0.0,
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
            "hidden_dim": hidden_dim,
            "kind": kind,
            "activation": activation,
            "use_bias": use_bias,
            "use_inner_norm": use_inner_norm,
        }
        check_types(MLP.__init__, self.options)
        check_minimum(1, hidden_dim=hidden_dim)
        self.hidden_dim = hidden_dim
        self.is_gated = kind == "swiglu"
        self.activation = activation
        self.use_bias = use_bias
        self.use_inner_norm = use_inner_norm

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        dim = int(input_shape[-1])  # type: ignore[arg-type]
        units = self.hidden_dim * (2 if self.is_gated else 1)
        self.build_shared(input_shape)
        self.hidden = keras.layers.Dense(units, use_bias=self.use_bias, dtype=self.dtype_policy, name="hidden")
        self.hidden.build((None, dim))
        if self.use_inner_norm:
            norm, epsilon = self.options["norm"], self.options["epsilon"]
            self.inner_norm = create_norm(norm, epsilon, self.dtype_policy, "inner_norm")
            self.inner_norm.build((None, self.hidden_dim))
        self.output_dense = keras.layers.Dense(dim, use_bias=self.use_bias, dtype=self.dtype_policy, name="output")
        self.output_dense.build((None, self.hidden_dim))

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Returns `x` plus the MLP branch."""
        is_special = self.is_gated or self.use_inner_norm or not self.activation.startswith("gelu")
        if not is_special and not (training and self.dropout.rate):
            branches = self.get_branches(x, self.hidden, self.output_dense)
            if branches:
                return self.skip(x, branches.transform(self, x), training)
        if training and not self.dropout.rate and self.can_split(x):
            from vitreous.layers import jax_parts

            return self.skip(x, jax_parts.compute(lambda part: self._compose(part, True), x), training)
        return self.skip(x, self._compose(x, training), training)

    def _compose(self, x: Any, training: bool | None) -> Any:
        """Returns the branch (B * N, D)."""
        hidden = self.hidden(self.enter(x))  # (B * N, hidden_dim), or twice that
        if self.is_gated:
            gate, value = ops.split(hidden, 2, axis=-1)
            hidden = activate(gate, self.activation) * value
        else:
            hidden = activate(hidden, self.activation)
        if self.use_inner_norm:
            hidden = self.inner_norm(hidden)
        if self.dropout.rate:
            hidden = self.dropout(hidden, training=training)
        return self.output_dense(hidden)


def activate(x: Any, name: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]) -> Any:
    """Applies an activation by name; `quick_gelu` is x * sigmoid(1.702 x), as in OpenAI's CLIP."""
    if name == "silu":
        return ops.silu(x)
    if name == "quick_gelu":
        return x * ops.sigmoid(1.702 * x)
    if name == "gelu" and keras.backend.backend() == "jax" and x.dtype == "float32" and not has_accelerator():
        return x * (0.5 + 0.5 * ops.erf(x * 0.5**0.5))  # ops.gelu calls erfc, which takes XLA twice as long on a CPU
    return ops.gelu(x, approximate=name == "gelu_tanh")


@keras.saving.register_keras_serializable(PACKAGE)
class TransformerBlock(keras.layers.Layer):
    """One block of the encoder: `x = attention(x); x = mlp(x)`, each with its own norm and skip.

    Args:
        num_heads: A, attention heads.
        mlp_dim: Hidden units of the MLP.
        num_parallel: Attentions, and MLPs, side by side: `x + sum of branches`, first of all attentions, then of all
            MLPs.
        attention: More arguments of `SelfAttention`.
        mlp: More arguments of `MLP`.
        **kwargs: Arguments that both take (dropout_rate, stochastic_depth_rate, epsilon, norm, norm_position,
            layer_scale), and those of a Keras layer.

    Call arguments:
        x: (B, N, D) tokens.
        rope: Rotary tables for the attention, or None.
        training: Whether dropout is active.
        return_attention: Whether to return the attention weights too.
        attention_tap: Added to the attention weights, shaped as they are; default none (see `SelfAttention`).

    Returns:
        (B, N, D), or that and the attention weights (B, num_parallel * A, N, N): the heads of one attention after those
        of the other.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equations 2 and 3; parallel branches: Touvron et
    al. 2022, https://arxiv.org/abs/2203.09795, section 3.
    """

    SHARED = ("dropout_rate", "stochastic_depth_rate", "epsilon", "norm", "norm_position", "layer_scale")

    def __init__(
        self,
        num_heads: int,
        mlp_dim: int,
        *,
        num_parallel: int = 1,
        attention: dict[str, Any] | None = None,
        mlp: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self_options = {name: kwargs.pop(name) for name in self.SHARED if name in kwargs}
        super().__init__(**kwargs)
        check_types(TransformerBlock.__init__, {"mlp_dim": mlp_dim, "num_parallel": num_parallel})
        check_minimum(1, mlp_dim=mlp_dim, num_parallel=num_parallel)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.num_parallel = num_parallel
        self.attention_options = dict(attention or {})
        self.mlp_options = dict(mlp or {})
        self.shared_options = self_options
        names = ["", *(f"_{i}" for i in range(1, num_parallel))]
        policy = self.dtype_policy
        self.attentions = [
            SelfAttention(num_heads, dtype=policy, name=f"attention{name}", **self_options, **self.attention_options)
            for name in names
        ]
        self.mlps = [
            MLP(mlp_dim, dtype=policy, name=f"mlp{name}", **self_options, **self.mlp_options) for name in names
        ]

    @property
    def attention(self) -> SelfAttention:
        """The (first) attention."""
        return self.attentions[0]

    @property
    def mlp(self) -> MLP:
        """The (first) MLP."""
        return self.mlps[0]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for tokens of `input_shape`."""
        for layer in (*self.attentions, *self.mlps):
            layer.build(input_shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a block keeps the shape."""
        return input_shape

    def call(
        self,
        x: Any,
        rope: Any = None,
        training: bool | None = None,
        return_attention: bool = False,
        attention_tap: Any = None,
    ) -> Any:
        """Returns the tokens after attention and MLP, and the attention weights if asked for."""
        count = len(self.attentions)
        taps = [None] * count if attention_tap is None else ops.split(attention_tap, count, axis=1)
        results = [
            layer(x, rope=rope, training=training, return_attention=return_attention, attention_tap=tap)
            for layer, tap in zip(self.attentions, taps, strict=True)
        ]
        attention = None
        if return_attention:
            attention = ops.concatenate([weights for _, weights in results], axis=1)
            results = [tokens for tokens, _ in results]
        x = _join(x, results)
        x = _join(x, [layer(x, training=training) for layer in self.mlps])
        return (x, attention) if return_attention else x

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "num_parallel": self.num_parallel,
            "attention": self.attention_options,
            "mlp": self.mlp_options,
            **self.shared_options,
        }


def _join(x: Any, results: list[Any]) -> Any:
    """Returns x + the branches of layers that returned x + branch each."""
    if len(results) == 1:
        return results[0]
    return x + sum(result - x for result in results)
