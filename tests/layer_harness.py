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


def gradients(layer: keras.layers.Layer, x: np.ndarray) -> list[np.ndarray]:
    """Returns the gradient of sum(layer(x) ** 2) by each trainable weight, in training mode."""
    backend = keras.backend.backend()
    mode = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}
    if backend == "jax":
        import jax

        def objective(weights: Any) -> Any:
            other = [v.value for v in layer.non_trainable_variables]
            return ops.sum(ops.square(layer.stateless_call(weights, other, x, **mode)[0]))

        found = jax.grad(objective)([v.value for v in layer.trainable_variables])
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
    y = to_numpy(first(layer(x)))
    assert y.shape == output_shape
    assert layer.compute_output_shape(x.shape) == output_shape
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(to_numpy(first(layer(x))), y)  # without training, a call is deterministic

    # Config round trip: the same config, and with the same weights the same answer.
    config = layer.get_config()
    twin = cls.from_config(config)
    assert twin.get_config() == config
    twin(x)
    assert [w.path for w in twin.weights] == [w.path for w in layer.weights]
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(to_numpy(first(twin(x))), y)

    # Save and load inside a model: bit-equal.
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, first(layer(inputs)))
    model.save(tmp_path / "layer.keras")
    loaded = keras.saving.load_model(tmp_path / "layer.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))

    # A second call with another batch size.
    assert to_numpy(first(layer(np.concatenate([x, x])))).shape == (2 * output_shape[0], *output_shape[1:])

    # Mixed precision: float32 weights, bfloat16 output near the float32 one.
    mixed = cls.from_config({**config, "dtype": "mixed_bfloat16"})
    z = first(mixed(x))
    assert keras.backend.standardize_dtype(z.dtype) == "bfloat16"
    assert all(w.dtype == "float32" for w in mixed.trainable_weights)
    mixed.set_weights(layer.get_weights())
    scale = np.abs(y).max()
    np.testing.assert_allclose(to_numpy(ops.cast(first(mixed(x)), "float32")), y, atol=0.05 * scale)

    # Every weight has a gradient that is finite and not all zero.
    if layer.trainable_weights:
        for weight, gradient in zip(layer.trainable_weights, gradients(layer, x), strict=True):
            assert gradient.shape == tuple(weight.shape), weight.path
            assert np.isfinite(gradient).all(), weight.path
            assert np.abs(gradient).max() > 0, weight.path
