"""Which way to project patches is fastest? Extract + dense, reshape + dense, or convolution, with the same weights.

    KERAS_BACKEND=jax python benchmarks/patch_projection.py

Prints a table of milliseconds (forward; forward + backward, by weights), medians of interleaved runs, and as its last
line the same as JSON.
"""

import argparse
import json
import time

import keras
import numpy as np
from keras import ops

from vitreous.layers import Patches


def ways(kernel, size, channels):
    """Returns {name: function(images, kernel)}; all compute the same tokens (B, N, D)."""
    patches = Patches(size)
    dim = kernel.shape[-1]

    def reshape_dense(images, kernel):
        return ops.matmul(patches(images), kernel)

    def extract_dense(images, kernel):
        cut = ops.image.extract_patches(images, size)
        return ops.matmul(ops.reshape(cut, (cut.shape[0], -1, size * size * channels)), kernel)

    def convolution(images, kernel):
        tokens = ops.conv(images, ops.reshape(kernel, (size, size, channels, dim)), strides=size)
        return ops.reshape(tokens, (images.shape[0], -1, dim))

    return {"reshape + dense": reshape_dense, "extract + dense": extract_dense, "convolution": convolution}


def runners(function, images, kernel):
    """Returns (forward, forward + backward) of `function` as calls that wait for the result."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        forward = jax.jit(function)
        both = jax.jit(jax.grad(lambda kernel, images: ops.sum(ops.square(function(images, kernel)))))
        return lambda: jax.block_until_ready(forward(images, kernel)), lambda: jax.block_until_ready(
            both(kernel, images)
        )
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def both():
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                loss = ops.sum(ops.square(function(images, kernel)))
            return tape.gradient(loss, kernel)

        forward = tf.function(lambda: function(images, kernel), jit_compile=True)
        return lambda: forward().numpy(), lambda: both().numpy()
    import torch

    def forward():
        with torch.no_grad():
            return function(images, kernel)

    def both():
        leaf = kernel.detach().requires_grad_()
        return torch.autograd.grad(ops.sum(ops.square(function(images, leaf))), leaf)

    return forward, both


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    print(f"backend {keras.backend.backend()}\n{'case':<28}{'way':<18}{'forward ms':>11}{'with backward':>15}")
    for batch, image, size, dim in ((32, 224, 16, 192), (128, 32, 4, 128)):
        images = ops.convert_to_tensor(rng.standard_normal((batch, image, image, 3)).astype("float32"))
        kernel = ops.convert_to_tensor(rng.standard_normal((size * size * 3, dim)).astype("float32"))
        found = ways(kernel, size, 3)
        expected = ops.convert_to_numpy(found["reshape + dense"](images, kernel))
        for function in found.values():
            np.testing.assert_allclose(ops.convert_to_numpy(function(images, kernel)), expected, atol=1e-2)
        calls = {name: runners(function, images, kernel) for name, function in found.items()}
        times = {name: ([], []) for name in calls}
        for _ in range(arguments.repeats + 2):
            for name, pair in calls.items():
                for kept, call in zip(times[name], pair, strict=True):
                    start = time.perf_counter()
                    call()
                    kept.append(time.perf_counter() - start)
        for name, pair in times.items():
            forward, both = (float(np.median(kept[2:])) * 1e3 for kept in pair)
            case = f"B {batch}, {image} px, P {size}, D {dim}"
            print(f"{case:<28}{name:<18}{forward:>11.2f}{both:>15.2f}")
            rows.append({"case": case, "way": name, "forward_ms": forward, "forward_backward_ms": both})
    print(json.dumps({"backend": keras.backend.backend(), "rows": rows}))


if __name__ == "__main__":
    main()
