"""One harness for every layer: build, config round trip, save and load, mixed precision, gradients.

It runs on whatever backend Keras runs on; tests/test_backends.py runs the tests that use it on each installed one.
"""

import inspect
from typing import Any

import keras
import numpy as np
from keras import ops


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(x))


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def first(outputs: Any) -> Any:
    """Returns the tensor of a layer that returns a tensor, or a tensor and what goes with it."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def answer(layer: keras.layers.Layer, x: np.ndarray) -> np.ndarray:
    """Returns the tensor that a layer or model makes of x; on jax as one program, which is compiled the soonest."""
    if keras.backend.backend() != "jax":
        return to_numpy(ops.cast(first(layer(x)), "float32"))
    import jax

    if not layer.built:
        layer(keras.Input(batch_shape=x.shape))

    def call(weights: Any, other: Any, x: Any) -> Any:
        return ops.cast(first(layer.stateless_call(weights, other, x)[0]), "float32")

    states = ([v.value for v in part] for part in (layer.trainable_variables, layer.non_trainable_variables))
    return to_numpy(jax.jit(call)(*states, x))


def gradients(layer: keras.layers.Layer, x: np.ndarray) -> list[np.ndarray]:
    """Returns the gradient of sum(layer(x) ** 2) by each trainable weight, in training mode."""
    backend = keras.backend.backend()
    mode = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}
    if backend == "jax":
        import jax

        def objective(weights: Any) -> Any:
            other = [v.value for v in layer.non_trainable_variables]
            return ops.sum(ops.square(layer.stateless_call(weights, other, x, **mode)[0]))

        found = jax.jit(jax.grad(objective))([v.value for v in layer.trainable_variables])  # one compilation, not many
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = ops.sum(ops.square(layer(x, **mode)))
        found = tape.gradient(value, [v.value for v in layer.trainable_variables])
    else:
        import torch

        value = ops.sum(ops.square(layer(ops.convert_to_tensor(x), **mode)))
        found = torch.autograd.grad(value, [v.value for v in layer.trainable_variables])
    return [to_numpy(g) for g in found]


def check_layer(layer: keras.layers.Layer, x: np.ndarray, output_shape: tuple[int, ...], tmp_path: Any) -> None:
    """Holds a layer against everything that Keras users expect of one."""
    cls = type(layer)

    # Build and call.
    y = answer(layer, x)
    assert y.shape == output_shape
    assert layer.compute_output_shape(x.shape) == output_shape
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(answer(layer, x), y)  # without training, a call is deterministic

    # Config round trip: the same config, and with the same weights the same answer.
    config = layer.get_config()
    twin = cls.from_config(config)
    assert twin.get_config() == config
    twin(keras.Input(batch_shape=x.shape))
    assert [w.path for w in twin.weights] == [w.path for w in layer.weights]
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(answer(twin, x), y)

    # Save and load inside a model: bit-equal.
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, first(layer(inputs)))
    model.save(tmp_path / "layer.keras")
    loaded = keras.saving.load_model(tmp_path / "layer.keras")
    np.testing.assert_array_equal(answer(loaded, x), answer(model, x))

    # A second call with another batch size.
    assert answer(layer, np.concatenate([x, x])).shape == (2 * output_shape[0], *output_shape[1:])

    # Mixed precision: float32 weights, bfloat16 output near the float32 one.
    mixed = cls.from_config({**config, "dtype": "mixed_bfloat16"})
    z = first(mixed(keras.Input(batch_shape=x.shape)))
    assert keras.backend.standardize_dtype(z.dtype) == "bfloat16"
    assert all(w.dtype == "float32" for w in mixed.trainable_weights)
    mixed.set_weights(layer.get_weights())
    scale = np.abs(y).max()
    np.testing.assert_allclose(answer(mixed, x), y, atol=0.05 * scale)

    # Every weight has a gradient that is finite and not all zero.
    if layer.trainable_weights:
        for weight, gradient in zip(layer.trainable_weights, gradients(layer, x), strict=True):
            assert gradient.shape == tuple(weight.shape), weight.path
            assert np.isfinite(gradient).all(), weight.path
            assert np.abs(gradient).max() > 0, weight.path
