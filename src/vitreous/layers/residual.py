"""What the residual layers share: `Residual`, their base, and the norms."""

from typing import Any, Literal

import keras
from keras import ops

from vitreous.spec import check_minimum, check_rates, check_types

PACKAGE = "vitreous"  # under this name Keras finds the layers when it loads a model


def create_norm(kind: Literal["layer", "rms"], epsilon: float, dtype: Any, name: str) -> keras.layers.Layer:
    """Creates a LayerNorm (Ba et al. 2016) or an RMSNorm (Zhang & Sennrich 2019) over the last axis."""
    cls = keras.layers.LayerNormalization if kind == "layer" else keras.layers.RMSNormalization
    return cls(epsilon=epsilon, dtype=dtype, name=name)


class Residual(keras.layers.Layer):
    """What `SelfAttention` and `MLP` share: the norm, and what happens between their branch and their skip."""

    def __init__(
        self,
        *,
        dropout_rate: float,
        stochastic_depth_rate: float,
        epsilon: float,
        norm: Literal["layer", "rms"],
        norm_position: Literal["pre", "post"],
        layer_scale: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "dropout_rate": dropout_rate,
            "stochastic_depth_rate": stochastic_depth_rate,
            "epsilon": epsilon,
            "norm": norm,
            "norm_position": norm_position,
            "layer_scale": layer_scale,
        }
        check_types(Residual.__init__, self.options)
        check_rates(dropout_rate=dropout_rate, stochastic_depth_rate=stochastic_depth_rate)
        check_minimum(0, layer_scale=layer_scale)
        self.stochastic_depth_rate = stochastic_depth_rate
        self.is_pre_norm = norm_position == "pre"
        self.norm = create_norm(norm, epsilon, self.dtype_policy, "norm")
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")
        self.stochastic_depth = keras.layers.Dropout(  # one draw for a whole example: the branch stays or goes
            stochastic_depth_rate, noise_shape=(None, 1, 1), dtype=self.dtype_policy, name="stochastic_depth"
        )

    def build_shared(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the norm and the layer scale."""
        self.norm.build(input_shape)
        if scale := self.options["layer_scale"]:
            self.layer_scale = self.add_weight(
                shape=(input_shape[-1],), initializer=keras.initializers.Constant(scale), name="layer_scale"
            )

    def enter(self, x: Any) -> Any:
        """Returns what the branch reads, as (B * N, D).

        Dense layers see one matrix: on a CPU, jax takes half the time for it that it takes for a batch of matrices.
        """
        return ops.reshape(self.norm(x) if self.is_pre_norm else x, (-1, x.shape[-1]))

    def skip(self, x: Any, branch: Any, training: bool | None) -> Any:
        """Returns `x` plus the branch (B * N, D)."""
        branch = ops.reshape(branch, (-1, x.shape[1], x.shape[-1]))
        if self.dropout.rate:
            branch = self.dropout(branch, training=training)
        if not self.is_pre_norm:
            branch = self.norm(branch)
        if self.options["layer_scale"]:
            branch = branch * ops.cast(self.layer_scale, branch.dtype)
        if self.stochastic_depth_rate:
            branch = self.stochastic_depth(branch, training=training)
        return x + branch

    def can_split(self, x: Any) -> bool:
        """Whether jax traces training on one CPU device: then a branch is faster a few examples at a time."""
        if keras.backend.backend() != "jax":
            return False
        from vitreous.layers import jax_parts

        return jax_parts.is_traced(x) and jax_parts.can_compute()

    def get_branches(self, x: Any, *dense: Any) -> Any:
        """Returns the module with the branches written by hand if it can compute this one, else None.

        Args:
            x: The tokens.
            *dense: The dense layers of the branch.
        """
        if keras.backend.backend() != "torch":
            return None
        from vitreous.layers import torch_branches

        is_plain = self.is_pre_norm and self.options["norm"] == "layer"
        is_plain = is_plain and all(layer.use_bias and not layer.quantization_mode for layer in dense)
        return torch_branches if is_plain and torch_branches.can_compute(x) else None

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `input_shape`: a residual layer keeps the shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that build this layer again."""
        return {**super().get_config(), **self.options}
