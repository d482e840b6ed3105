"""One training step on each Keras backend: loss, gradients, AdamW, and the averaged weights, without a host sync.

`create_step` returns the class for the running backend. All three compute the same mathematics:

    logits   = model(normalize(images), training=True)
    loss     = mean over the mask of the smoothed cross-entropy
    weights  = AdamW(weights, clipped gradients)
    average += (1 - decay) * (weights - average)

The average lives in a second model of the same architecture, so that it can be evaluated and saved like any model.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.backend import use_compile_cache
from vitreous.data import Batch
from vitreous.model import VisionTransformer, normalize_images
from vitreous.spec import InputSpec
from vitreous.training.recipe import OptimizerConfig

# Not decayed: what has no direction to shrink in. Names are the last part of a weight's path.
NOT_DECAYED = ("bias", "gamma", "beta", "class_token", "position_embedding")


def create_optimizer(model: VisionTransformer, config: OptimizerConfig) -> keras.optimizers.Optimizer:
    """Creates AdamW for a model, with its weight decay kept off biases, norms, tokens and positions.

    Args:
        model: A built model.
        config: Rates; the learning rate itself is set at each step.
    """
    optimizer = keras.optimizers.AdamW(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        beta_2=config.beta_2,
        global_clipnorm=config.clip_norm or None,
    )
    optimizer.exclude_from_weight_decay(
        var_list=[weight for weight in model.trainable_variables if weight.path.split("/")[-1] in NOT_DECAYED]
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def compute_loss(logits: Any, labels: Any, mask: Any, label_smoothing: float) -> Any:
    """Returns the mean smoothed cross-entropy of the examples that the mask keeps.

    Args:
        logits: (B, K) float32.
        labels: (B,) integers in [0, K).
        mask: (B,) float32, 1 for a real example, 0 for padding.
        label_smoothing: Share of the target spread evenly over all K classes.

    Returns:
        A float32 scalar, in nats; 0 if the mask keeps nothing.
    """
    mask = ops.convert_to_tensor(mask)
    log_probabilities = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    truth = ops.take_along_axis(log_probabilities, ops.cast(labels, "int32")[:, None], axis=-1)[:, 0]
    losses = -(1 - label_smoothing) * truth - label_smoothing * ops.mean(log_probabilities, axis=-1)
    return ops.sum(losses * mask) / ops.maximum(ops.sum(mask), 1.0)


def _count_correct(logits: Any, labels: Any, mask: Any) -> Any:
    return ops.sum(
        ops.cast(ops.cast(ops.argmax(logits, axis=-1), "int32") == ops.cast(labels, "int32"), "float32") * mask
    )


class Step:
    """What one step needs and keeps; a subclass for each backend does the work.

    Args:
        model: The model that gradients move.
        average: A second model of the same architecture, for the averaged weights; it starts as a copy.
        optimizer: From `create_optimizer(model, ...)`.
        input_spec: How images are normalised.
        label_smoothing: Of the loss.

    Call arguments:
        batch: A `Batch` of uint8 images.
        learning_rate: For this step.
        decay: Of the averaged weights, in [0, 1).

    Returns:
        The loss, and how many of the batch were answered right, both as scalars on the device: reading them waits.
    """

    def __init__(
        self,
        model: VisionTransformer,
        average: VisionTransformer,
        optimizer: keras.optimizers.Optimizer,
        *,
        input_spec: InputSpec,
        label_smoothing: float,
    ):
        self.model = model
        self.average = average
        self.optimizer = optimizer
        self.input_spec = input_spec
        self.label_smoothing = label_smoothing
        average.set_weights(model.get_weights())
        self.setup()

    def setup(self) -> None:
        """Compiles what the backend compiles."""

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Puts the state of training into the Keras variables of model, average and optimizer."""

    def forward(self, images: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        """Returns loss and logits in training mode."""
        logits = self.model(normalize_images(images, self.input_spec), training=True)
        return compute_loss(logits, labels, mask, self.label_smoothing), logits


class JaxStep(Step):
    """One compiled function from state to state; the state's buffers are donated and live here between steps."""

    def setup(self) -> None:
        """Takes the state out of the Keras variables."""
        import jax

        use_compile_cache()
        model, optimizer = self.model, self.optimizer
        rate_index = next(i for i, v in enumerate(optimizer.variables) if v is optimizer._learning_rate)

        def step(state: Any, images: Any, labels: Any, mask: Any, learning_rate: Any, decay: Any) -> Any:
            weights, other, optimizer_state, average = state

            def objective(weights: Any, other: Any) -> Any:
                logits, other = model.stateless_call(
                    weights, other, normalize_images(images, self.input_spec), training=True
                )
                return compute_loss(logits, labels, mask, self.label_smoothing), (logits, other)

            (loss, (logits, other)), gradients = jax.value_and_grad(objective, has_aux=True)(weights, other)
            optimizer_state = list(optimizer_state)
            optimizer_state[rate_index] = learning_rate
            weights, optimizer_state = optimizer.stateless_apply(optimizer_state, gradients, weights)
            average = [a + (1 - decay) * (w - a) for a, w in zip(average, weights, strict=True)]
            return (weights, other, optimizer_state, average), loss, _count_correct(logits, labels, mask)

        self.step = jax.jit(step, donate_argnums=0)
        # Copies: a donated buffer must not be a Keras variable's own.
        self.state = jax.tree.map(lambda v: jax.numpy.array(v.value), self._variables())

    def _variables(self) -> tuple[list[Any], ...]:
        return (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
            self.average.trainable_variables,
        )

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        self.state, loss, correct = self.step(
            self.state,
            batch.images,
            batch.labels,
            batch.mask.astype("float32"),
            np.float32(learning_rate),
            np.float32(decay),
        )
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
        self.averages = [v.value.detach() for v in self.average.trainable_variables]
        self.update: Any = self._update
        if type(self.optimizer) is keras.optimizers.AdamW:
            self.update = FusedAdamW(self.optimizer, self.model.trainable_variables)

    def _update(self, gradients: Any, learning_rate: float) -> None:
        """Moves the weights as Keras does it."""
        self.optimizer.apply(list(gradients), self.model.trainable_variables)

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        images, labels, mask = (
            ops.convert_to_tensor(x) for x in (batch.images, batch.labels, batch.mask.astype("float32"))
        )
        loss, logits = self.forward(images, labels, mask)
        gradients = self.torch.autograd.grad(loss, self.weights)
        with self.torch.no_grad():
            self.optimizer.learning_rate = learning_rate
            self.update(gradients, learning_rate)
            self.torch._foreach_lerp_(self.averages, [w.detach() for w in self.weights], 1 - decay)
            return loss.detach(), _count_correct(logits, labels, mask)


class FusedAdamW:
    """Keras's AdamW on torch in one kernel: the same mathematics on the optimizer's own variables.

    Args:
        optimizer: A built AdamW, as `create_optimizer` makes it.
        variables: What it was built for.

    Call arguments:
        gradients: One for each variable; they may be overwritten.
        learning_rate: For this step.
    """

    def __init__(self, optimizer: keras.optimizers.AdamW, variables: list[Any]):
        import torch

        self.torch = torch
        self.optimizer = optimizer
        self.count: int | None = None  # of the steps done; read from the optimizer at the first one
        columns = [[], []]  # type: list[list[tuple[int, Any, Any, Any]]]
        for i, variable in enumerate(variables):
            moments = (optimizer._momentums[i].value.detach(), optimizer._velocities[i].value.detach())
            columns[optimizer._use_weight_decay(variable)].append((i, variable.value.detach(), *moments))
        self.groups = [
            (tuple(zip(*column, strict=True)), decay)
            for column, decay in zip(columns, (0.0, optimizer.weight_decay or 0.0), strict=True)
            if column
        ]
        self.step = torch.zeros((), device=variables[0].value.device)

    def __call__(self, gradients: Any, learning_rate: float) -> None:
        """Moves the weights."""
        torch, optimizer = self.torch, self.optimizer
        if self.count is None:
            self.count = int(optimizer.iterations.value)
            self.step += self.count
        self.count += 1
        self.step += 1
        optimizer.iterations.assign_add(1)
        scale = None
        if clip := optimizer.global_clipnorm:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
            scale = torch.clamp(norm / clip, min=1.0)  # the kernel divides gradients by it
        correction = math.sqrt(1 - optimizer.beta_2**self.count)
        for (indices, weights, momentums, velocities), decay in self.groups:
            torch._fused_adamw_(
                list(weights),
                [gradients[i] for i in indices],
                list(momentums),
                list(velocities),
                [],
                [self.step] * len(indices),
                lr=learning_rate,
                beta1=optimizer.beta_1,
                beta2=optimizer.beta_2,
                weight_decay=decay,
                eps=optimizer.epsilon / correction,  # Keras adds it before the correction, torch after
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=None,
            )


class TensorFlowStep(Step):
    """One traced function, compiled by XLA; state lives in the Keras variables."""

    def setup(self) -> None:
        """Traces the step."""
        import tensorflow as tf

        weights, averages = self.model.trainable_variables, self.average.trainable_variables

        def step(images: Any, labels: Any, mask: Any, decay: Any) -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                loss, logits = self.forward(images, labels, mask)
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            for average, weight in zip(averages, weights, strict=True):
                average.assign(average + (1 - decay) * (weight - average))
            return loss, _count_correct(logits, labels, mask)

        self.step = tf.function(step, jit_compile=True)
        self.constant = tf.constant

    def __call__(self, batch: Batch, *, learning_rate: float, decay: float) -> tuple[Any, Any]:
        """Trains on one batch."""
        self.optimizer.learning_rate = learning_rate
        return self.step(
            self.constant(batch.images),
            self.constant(batch.labels),
            self.constant(batch.mask.astype("float32")),
            self.constant(decay, "float32"),
        )


def create_step(*args: Any, **kwargs: Any) -> Step:
    """Creates the `Step` of the running Keras backend; arguments as for `Step`."""
    steps = {"jax": JaxStep, "torch": TorchStep, "tensorflow": TensorFlowStep}
    return steps[keras.backend.backend()](*args, **kwargs)
