"""One training step on each Keras backend: loss, gradients, optimiser, and the averaged weights, without a host sync.

`create_step` returns the class for the running backend. All three compute the same mathematics:

    logits   = model(normalize(images), training=True)
    loss     = sum of losses / sum of weights, of `Loss(logits, labels, mask)`
    weights  = optimizer(gradients of the loss)
    average += (1 - decay) * (weights - average)

A batch may be worked off in parts that fit into memory; the step is that of the whole batch. The average lives in a
second model of the same architecture, so that it can be evaluated and saved like any model.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.backend import use_compile_cache
from vitreous.data import Batch
from vitreous.errors import ConfigError
from vitreous.model import VisionTransformer, normalize_images
from vitreous.spec import InputSpec
from vitreous.training.losses import Loss
from vitreous.training.optimizer import Optimizer


class Step:
    """What one step needs and keeps; a subclass for each backend does the work.

    Args:
        model: The model that gradients move.
        average: A second model of the same architecture, for the averaged weights; it starts as a copy.
        optimizer: From `create_optimizer(model, ...)`.
        input_spec: How images are normalised.
        loss: What to make small.
        num_parts: Parts that a batch is worked off in; must divide the batch size.

    Call arguments:
        batch: A `Batch` of uint8 images.
        learning_rate: For this step.
        decay: Of the averaged weights, in [0, 1).

    Returns:
        The loss, and how many of the batch were answered right (see `Loss`), both as scalars on the device: reading
        them waits.
    """

    def __init__(
        self,
        model: VisionTransformer,
        average: VisionTransformer,
        optimizer: Optimizer,
        *,
        input_spec: InputSpec,
        loss: Loss,
        num_parts: int = 1,
    ):
        self.model = model
        self.average = average
        self.optimizer = optimizer
        self.input_spec = input_spec
        self.loss = loss
        self.num_parts = num_parts
        average.set_weights(model.get_weights())
        for mine, theirs in zip(average.variables, model.variables, strict=True):
            mine.trainable = theirs.trainable
        self.setup()

    def setup(self) -> None:
        """Compiles what the backend compiles."""

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Puts the state of training into the Keras variables of model, average and optimizer."""

    def split(self, batch: Batch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Returns images, labels and mask of each part of a batch.

        Raises:
            ConfigError: If the parts would not be equal.
        """
        if len(batch.images) % self.num_parts:
            raise ConfigError(
                "Cannot split a batch. Expected a batch size that the number of parts divides. "
                f"Received: batch_size={len(batch.images)}, num_parts={self.num_parts}. Pass another of the two."
            )
        arrays = batch.images, batch.labels, batch.mask.astype("float32")
        return list(zip(*(np.split(array, self.num_parts) for array in arrays), strict=True))

    def forward(self, images: Any, labels: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Returns what the loss does, in training mode."""
        return self.loss(self.model(normalize_images(images, self.input_spec), training=True), labels, mask)


class JaxStep(Step):
    """One compiled function from state to state; the state's buffers are donated and live here between steps."""

    def setup(self) -> None:
        """Takes the state out of the Keras variables."""
        import jax

        use_compile_cache()
        model, optimizer = self.model, self.optimizer

        def objective(weights: Any, other: Any, part: Any) -> Any:
            images, labels, mask = part
            logits, other = model.stateless_call(
                weights, other, normalize_images(images, self.input_spec), training=True
            )
            total, weight, correct = self.loss(logits, labels, mask)
            return total, (other, total, weight, correct)

        differentiate = jax.grad(objective, has_aux=True)

        def step(state: Any, parts: Any, learning_rate: Any, decay: Any) -> Any:
            weights, other, slots, average = state
            if self.num_parts == 1:
                gradients, (other, total, weight, correct) = differentiate(weights, other, [x[0] for x in parts])
            else:

                def add(carry: Any, part: Any) -> Any:
                    gradients, other, *sums = carry
                    more, (other, *added) = differentiate(weights, other, part)
                    gradients = [a + b for a, b in zip(gradients, more, strict=True)]
                    return (gradients, other, *(a + b for a, b in zip(sums, added, strict=True))), None

                zeros = [jax.numpy.zeros_like(weight) for weight in weights]
                carry, _ = jax.lax.scan(add, (zeros, other, 0.0, 0.0, 0.0), parts)
                gradients, other, total, weight, correct = carry
            weight = jax.numpy.maximum(weight, 1e-12)
            gradients = [gradient / weight for gradient in gradients]
            weights, slots = optimizer.apply(gradients, weights, slots, learning_rate)
            average = [a + (1 - decay) * (w - a) for a, w in zip(average, weights, strict=True)]
            return (weights, other, slots, average), total / weight, correct

        self.step = jax.jit(step, donate_argnums=0)
        # Copies: a donated buffer must not be a Keras variable's own.
        self.state = jax.tree.map(lambda v: jax.numpy.array(v.value), self._variables())

    def _variables(self) -> tuple[list[Any], ...]:
        return (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.slots,
            self.average.trainable_variables,
        )

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        parts = [np.stack(arrays) for arrays in zip(*self.split(batch), strict=True)]  # (num_parts, B / num_parts, ...)
        self.state, loss, correct = self.step(self.state, parts, np.float32(learning_rate), np.float32(decay))
        return loss, correct

    def synchronize(self) -> None:
        """Copies the state into the Keras variables."""
        import jax

        for variables, values in zip(self._variables(), self.state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(jax.numpy.array(value))


class TorchStep(Step):
    """Eager autograd; state lives in the Keras variables."""

    def setup(self) -> None:
        """Collects the tensors once."""
        import torch

        self.torch = torch
        self.weights = [v.value for v in self.model.trainable_variables]
        self.slots = [v.value for v in self.optimizer.slots]
        self.averages = [v.value.detach() for v in self.average.trainable_variables]

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        gradients: list[Any] = []
        sums: list[Any] = []
        for part in self.split(batch):
            total, *counts = self.forward(*(ops.convert_to_tensor(array) for array in part))
            more = self.torch.autograd.grad(total, self.weights)
            added = [total.detach(), *counts]
            gradients = self.torch._foreach_add(gradients, more) if gradients else list(more)
            sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
        with self.torch.no_grad():
            total, weight, correct = sums
            weight = weight.clamp(min=1e-12)
            self.torch._foreach_div_(gradients, weight)
            self.optimizer.apply(gradients, self.weights, self.slots, learning_rate)
            self.torch._foreach_lerp_(self.averages, [w.detach() for w in self.weights], 1 - decay)
            return total / weight, correct


class TensorFlowStep(Step):
    """One traced function, compiled by XLA; state lives in the Keras variables."""

    def setup(self) -> None:
        """Traces the step."""
        import tensorflow as tf

        weights, averages = self.model.trainable_variables, self.average.trainable_variables
        slots = self.optimizer.slots

        def step(parts: Any, learning_rate: Any, decay: Any) -> tuple[Any, Any]:
            gradients: list[Any] = []
            sums = [0.0, 0.0, 0.0]
            for part in parts:
                with tf.GradientTape() as tape:
                    total, *counts = self.forward(*part)
                more = tape.gradient(total, [weight.value for weight in weights])
                gradients = [a + b for a, b in zip(gradients, more, strict=True)] if gradients else more
                sums = [a + b for a, b in zip(sums, (total, *counts), strict=True)]
            total, weight, correct = sums
            weight = tf.maximum(weight, 1e-12)
            moved, kept = self.optimizer.apply(
                [gradient / weight for gradient in gradients],
                [tf.convert_to_tensor(weight.value) for weight in weights],
                [tf.convert_to_tensor(slot.value) for slot in slots],
                learning_rate,
            )
            for variable, value in zip((*weights, *slots), (*moved, *kept), strict=True):
                variable.assign(value)
            for average, value in zip(averages, moved, strict=True):
                average.assign(average + (1 - decay) * (value - average))
            return total / weight, correct

        self.step = tf.function(step, jit_compile=True)
        self.constant = tf.constant

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        parts = [[self.constant(array) for array in part] for part in self.split(batch)]
        return self.step(parts, self.constant(learning_rate, "float32"), self.constant(decay, "float32"))


def create_step(*args: Any, **kwargs: Any) -> Step:
    """Creates the `Step` of the running Keras backend; arguments as for `Step`."""
    steps = {"jax": JaxStep, "torch": TorchStep, "tensorflow": TensorFlowStep}
    return steps[keras.backend.backend()](*args, **kwargs)
