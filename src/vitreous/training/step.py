"""One training step on each Keras backend: loss, gradients, optimiser, and the averaged weights, without a host sync.

`create_step` returns the class for the running backend. All three compute the same mathematics:

    logits   = model(normalize(images), training=True)
    loss     = sum of losses / sum of weights, of `Loss(logits, labels, mask)`
    weights  = optimizer(gradients of the loss)
    average += (1 - decay) * (weights - average)

A `DistillationLoss` has a teacher, which is asked for the same images first, outside the gradient. Low-rank updates of
weights enter the average merged with what they update.

A batch may be worked off in parts that fit into memory; the step is that of the whole batch. The average lives in a
second model of the same architecture, so that it can be evaluated and saved like any model.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.backend import use_compile_cache
from vitreous.data import Batch
from vitreous.errors import ConfigError, RunError
from vitreous.model import VisionTransformer, normalize_images
from vitreous.spec import InputSpec
from vitreous.training.distillation import DistillationLoss
from vitreous.training.distribute import Layout
from vitreous.training.losses import Loss
from vitreous.training.optimizer import Optimizer


class Step:
    """What one step needs and keeps; a subclass for each backend does the work.

    Args:
        model: The model that gradients move.
        average: A second model of the same architecture, for the averaged weights; it starts as a copy. Where `model`
            has low-rank updates, this one has none.
        optimizer: From `create_optimizer(model, ...)`.
        input_spec: How images are normalised.
        loss: What to make small: a `Loss`, or a `DistillationLoss`.
        num_parts: Parts that a batch is worked off in; must divide the batch size.
        layout: Where the state lies, on jax. Default: on one device.

    Call arguments:
        batch: A `Batch` of uint8 images; in several processes, this one's rows.
        learning_rate: For this step.
        body_rate: The same for all weights but those of heads. Default: `learning_rate`.
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
        loss: Loss | DistillationLoss,
        num_parts: int = 1,
        layout: Layout | None = None,
    ):
        self.model = model
        self.average = average
        self.optimizer = optimizer
        self.input_spec = input_spec
        self.loss = loss
        self.num_parts = num_parts
        self.layout = layout or Layout()
        self.teacher = loss.teacher if isinstance(loss, DistillationLoss) else None
        self.heads = {"return_heads": True} if self.teacher else {}
        self.follow()
        self.setup()

    def follow(self) -> None:
        """Makes the average a copy of the model, and notes which weights each of its own follows."""
        updates = self.optimizer.updates
        thin = {id(variable) for update in updates for variable in (update.down, update.up)}
        copied = [variable for variable in self.model.weights if id(variable) not in thin]
        for mine, theirs in zip(self.average.weights, copied, strict=True):
            mine.assign(theirs)
        updated = {id(update.kernel): i for i, update in enumerate(updates)}
        places = {id(variable): i for i, variable in enumerate(self.model.trainable_variables)}
        self.followed: list[int | tuple[int, int, int]] = []
        variables = [variable for variable in self.model.variables if id(variable) not in thin]
        for mine, theirs in zip(self.average.variables, variables, strict=True):
            mine.trainable = theirs.trainable or id(theirs) in updated
            if (i := updated.get(id(theirs))) is not None:
                self.followed.append((i, places[id(updates[i].down)], places[id(updates[i].up)]))
            elif theirs.trainable:
                self.followed.append(places[id(theirs)])

    def merge(self, weights: list[Any], kernels: list[Any]) -> list[Any]:
        """Returns what the average's trainable variables follow: weights, and matrices with their updates.

        Args:
            weights: Of the model, as its `trainable_variables`.
            kernels: The matrices under the optimizer's updates, in the order of those.
        """
        merged = []
        for place in self.followed:
            if isinstance(place, int):
                merged.append(weights[place])
            else:
                i, down, up = place
                merged.append(self.optimizer.updates[i].merge(kernels[i], weights[down], weights[up]))
        return merged

    def setup(self) -> None:
        """Compiles what the backend compiles."""

    def __call__(
        self, batch: Batch, *, learning_rate: float, decay: float, body_rate: float | None = None
    ) -> tuple[Any, Any]:
        """Trains on one batch."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Puts the state of training into the Keras variables of model, average and optimizer."""

    def take(self) -> None:
        """Takes the state of training from the Keras variables: the way back from `synchronize`."""

    def get_average(self) -> list[np.ndarray]:
        """Returns the averaged weights as of the last `synchronize`, whole, as `average.get_weights()` has them."""
        if not self.layout.is_spread:
            return self.average.get_weights()
        return [self.layout.gather(variable.value) for variable in self.average.weights]

    def finish(self) -> None:
        """Puts the averaged weights whole into `average`, for whoever goes on with it."""
        self.synchronize()
        if self.layout.is_spread:
            self.average.set_weights(self.get_average())

    def snapshot(self) -> dict[str, Any]:
        """Returns all that training has changed, by name: arrays that the next steps leave alone."""
        self.synchronize()
        if keras.backend.backend() == "jax":  # jax never writes into an array; reading it may wait for later
            return {name: variable.value for name, variable in self._named().items()}
        return {name: np.array(ops.convert_to_numpy(variable.value)) for name, variable in self._named().items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts the arrays of a `snapshot` back.

        Raises:
            RunError: If they are of another model or optimiser.
        """
        values = {_place(name): array for name, array in arrays.items()}
        self.check_shapes({place: array.shape for place, array in values.items()})
        for name, variable in self._named().items():
            variable.assign(values[_place(name)])
        self.take()

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `RunError` if saved arrays, their shapes by part and place, are of another model or optimiser."""
        variables = {_place(name): variable for name, variable in self._named().items()}
        for place in dict.fromkeys([*variables, *shapes]):
            expected = tuple(variables[place].shape) if place in variables else None
            received = shapes.get(place)
            if expected != received:
                raise RunError(
                    f"Cannot restore the state of training. Expected {place} of shape {expected}. "
                    f"Received: shape={received}. The checkpoint is of another model, or of another vitreous."
                )

    def check_best(self, shapes: list[tuple[int, ...]]) -> None:
        """Raises `RunError` if the shapes of saved best weights are those of another model."""
        expected = [tuple(variable.shape) for variable in self.average.weights]
        if shapes and shapes != expected:
            raise RunError(
                f"Cannot restore the state of training. Expected {len(expected)} best weights of the model's shapes. "
                f"Received: {len(shapes)} of other shapes. The checkpoint is of another model, or of another vitreous."
            )

    # What sharded checkpoints need, on jax alone: arrays as they lie on devices, nothing gathered.

    def snapshot_parts(self) -> dict[str, Any]:
        """Returns what `snapshot` does, by part and place alone, as it lies."""
        raise NotImplementedError

    def is_finite(self, arrays: Mapping[str, Any]) -> bool:
        """Whether arrays hold nothing but numbers, wherever they lie; all processes must ask for it."""
        raise NotImplementedError

    def copy_average(self) -> list[Any]:
        """Returns what `get_average` does, as it lies."""
        raise NotImplementedError

    def place_average(self, weights: list[Any]) -> list[Any]:
        """Returns whole weights as `copy_average` has them."""
        raise NotImplementedError

    def get_places(self, num_best: int) -> dict[str, Any]:
        """Returns the sharding of each array of `snapshot_parts`, and of so many best weights beside them."""
        raise NotImplementedError

    def _named(self) -> dict[str, Any]:
        """Returns the variables under a name to save each by: part, place, and path for whoever looks into the file."""
        parts = {"model": self.model.variables, "slots": self.optimizer.slots, "average": self.average.variables}
        return {
            f"{part}/{place:04d}/{variable.path}": variable
            for part, variables in parts.items()
            for place, variable in enumerate(variables)
        }

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
        if self.num_parts == 1:
            return [arrays]
        return list(zip(*(np.split(array, self.num_parts) for array in arrays), strict=True))

    def forward(self, images: Any, labels: Any, mask: Any, *answers: Any) -> tuple[Any, Any, Any]:
        """Returns what the loss does, in training mode.

        Args:
            images: (B, H, W, C).
            labels: As for `Loss`.
            mask: As for `Loss`.
            *answers: The teacher's, where there is one.
        """
        inputs = normalize_images(images, self.input_spec)
        return self.loss(self.model(inputs, training=True, **self.heads), labels, mask, *answers)


class JaxStep(Step):
    """One compiled function from state to state; the state's buffers are donated and live here between steps.

    On several devices it is the same function, of arrays that lie as `layout` says: what is computed is a matter of the
    whole arrays, the order in which sums are added one of the devices.
    """

    def setup(self) -> None:
        """Takes the state out of the Keras variables."""
        import jax

        self._check: Any = None
        use_compile_cache()
        model, optimizer, teacher = self.model, self.optimizer, self.teacher
        places = {id(variable): i for i, variable in enumerate(model.non_trainable_variables)}
        updated = [places[id(update.kernel)] for update in optimizer.updates]

        def ask(knowledge: Any, images: Any) -> tuple[Any, ...]:
            if teacher is None:
                return ()
            logits, _ = teacher.model.stateless_call(*knowledge, teacher.prepare(images), training=False)
            return (teacher.arrange(logits),)

        def objective(weights: Any, other: Any, part: Any, answers: Any) -> Any:
            images, labels, mask = part
            inputs = normalize_images(images, self.input_spec)
            logits, other = model.stateless_call(weights, other, inputs, training=True, **self.heads)
            total, weight, correct = self.loss(logits, labels, mask, *answers)
            return total, (other, total, weight, correct)

        gradient_of = jax.grad(objective, has_aux=True)

        def step(state: Any, parts: Any, rates: Any, decay: Any, knowledge: Any) -> Any:
            weights, other, slots, average = state

            def differentiate(weights: Any, other: Any, part: Any) -> Any:
                return gradient_of(weights, other, part, ask(knowledge, part[0]))

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
            weights, slots = optimizer.apply(gradients, weights, slots, *rates)
            merged = self.merge(weights, [other[place] for place in updated])
            average = [a + (1 - decay) * (w - a) for a, w in zip(average, merged, strict=True)]
            return (weights, other, slots, average), total / weight, correct

        def stack(arrays: Any) -> Any:  # (num_parts, B / num_parts, ...); what lies on the device already stays there
            stays = isinstance(arrays[0], jax.Array) and self.num_parts == 1 and not self.layout.is_spread
            return arrays if stays else np.stack(arrays)

        self.stack = stack
        known = (teacher.model.trainable_variables, teacher.model.non_trainable_variables) if teacher else ()
        if self.layout.is_spread:
            self.specs = self._specs()
            whole = self.layout.sharding(jax.sharding.PartitionSpec())
            places = jax.tree.map(self.layout.sharding, self.specs)
            self.step = jax.jit(step, donate_argnums=0, out_shardings=(places, whole, whole))
            self.copy = jax.jit(lambda state: jax.tree.map(jax.numpy.copy, state))
            self.knowledge = [[self.layout.place(v.value, whole.spec) for v in variables] for variables in known]
        else:
            self.step = jax.jit(step, donate_argnums=0)
            self.knowledge = [[v.value for v in variables] for variables in known]
        self.take()

    def _specs(self) -> tuple[list[Any], ...]:
        """Returns how each array of the state is cut: a slot as its weight, the count of steps not at all."""
        weights, other, _, average = (
            [self.layout.spec(variable.path, tuple(variable.shape)) for variable in variables]
            for variables in self._variables()
        )
        slots = [self.layout.spec("", ())]
        for spec, is_matrix in zip(weights, self.optimizer.has_muon, strict=True):
            slots += [spec] * (1 if is_matrix else 2)
        return weights, other, slots, average

    def take(self) -> None:
        """Copies the state out of the Keras variables: a donated buffer must not be a variable's own."""
        import jax

        if not self.layout.is_spread:
            self.state = jax.tree.map(lambda v: jax.numpy.array(v.value), self._variables())
            return
        layout = self.layout

        def put(value: Any, spec: Any) -> Any:
            if isinstance(value, jax.Array) and value.sharding == layout.sharding(spec):  # of a sharded checkpoint
                return self.copy(value)
            return layout.place(layout.gather(value), spec)

        self.state = tuple(
            [put(v.value, spec) for v, spec in zip(variables, specs, strict=True)]
            for variables, specs in zip(self._variables(), self.specs, strict=True)
        )
        for variable in self.average.non_trainable_variables:  # predictions read them where they are
            variable.assign(put(variable.value, layout.spec(variable.path, tuple(variable.shape))))
        self.synchronize()  # no device is left with a second copy, and a whole one

    def _variables(self) -> tuple[list[Any], ...]:
        return (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.slots,
            self.average.trainable_variables,
        )

    def __call__(
        self, batch: Batch, *, learning_rate: float, decay: float, body_rate: float | None = None
    ) -> tuple[Any, Any]:
        """Trains on one batch."""
        parts = [self.stack(arrays) for arrays in zip(*self.split(batch), strict=True)]
        if self.layout.is_spread:
            parts = [self.layout.place_rows(part, axis=1) for part in parts]
        rates = [np.float32(learning_rate if rate is None else rate) for rate in (learning_rate, body_rate)]
        self.state, loss, correct = self.step(self.state, parts, rates, np.float32(decay), self.knowledge)
        return loss, correct

    def synchronize(self) -> None:
        """Copies the state into the Keras variables; on several devices, lends it to them until the next step."""
        import jax

        for variables, values in zip(self._variables(), self.state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                # One by one: no more than one array is there three times.
                variable.assign(value if self.layout.is_spread else jax.numpy.array(value))

    def snapshot_parts(self) -> dict[str, Any]:
        """Returns all that training has changed, as for `Step`."""
        if not self.layout.is_spread:
            return {_place(name): array for name, array in super().snapshot().items()}
        return {_place(name): array for name, array in self._copies().items()}

    def is_finite(self, arrays: Mapping[str, Any]) -> bool:
        """Whether there are only numbers, as for `Step`."""
        import jax

        def check(values: list[Any]) -> Any:
            return jax.numpy.stack([jax.numpy.isfinite(value).all() for value in values]).all()

        if self._check is None:
            whole = self.layout.sharding(jax.sharding.PartitionSpec()) if self.layout.is_spread else None
            self._check = jax.jit(check, out_shardings=whole)
        return bool(self._check(list(arrays.values())))

    def copy_average(self) -> list[Any]:
        """Returns the averaged weights, as for `Step`."""
        values = [variable.value for variable in self.average.weights]
        return self.copy(values) if self.layout.is_spread else values

    def place_average(self, weights: list[Any]) -> list[Any]:
        """Returns weights as `copy_average` has them, as for `Step`."""
        import jax

        if not self.layout.is_spread:
            return [jax.numpy.array(weight) for weight in weights]
        specs = [self.layout.spec(variable.path, tuple(variable.shape)) for variable in self.average.weights]
        return [self.layout.place(weight, spec) for weight, spec in zip(weights, specs, strict=True)]

    def get_places(self, num_best: int) -> dict[str, Any]:
        """Returns where arrays are to lie, as for `Step`."""
        import jax

        def place(variable: Any) -> Any:
            if self.layout.is_spread:
                return self.layout.sharding(specs.get(id(variable), whole))
            return jax.sharding.SingleDeviceSharding(next(iter(variable.value.devices())))

        whole = jax.sharding.PartitionSpec()
        specs = {
            id(variable): self.layout.spec(variable.path, tuple(variable.shape)) for variable in self.average.weights
        }
        if self.layout.is_spread:
            for variables, parts in zip(self._variables(), self.specs, strict=True):
                specs |= {id(variable): spec for variable, spec in zip(variables, parts, strict=True)}
        places = {_place(name): place(variable) for name, variable in self._named().items()}
        best = self.average.weights[:num_best]
        return places | {f"best/{i:04d}": place(variable) for i, variable in enumerate(best)}

    def _copies(self) -> dict[str, Any]:
        """Returns the arrays of a spread state, which the next step leaves alone."""
        copies = {
            id(variable): value
            for variables, values in zip(self._variables(), self.copy(self.state), strict=True)
            for variable, value in zip(variables, values, strict=True)
        }
        return {name: copies.get(id(variable), variable.value) for name, variable in self._named().items()}

    def snapshot(self) -> dict[str, Any]:
        """Returns all that training has changed, as for `Step`."""
        layout = self.layout
        if not layout.is_spread:
            return super().snapshot()
        if layout.num_processes > 1:  # what lies with others is asked for here; the first process keeps it
            self.synchronize()
            gathered = {name: layout.gather(variable.value) for name, variable in self._named().items()}
            return gathered if layout.is_first else {}
        return self._copies()


class TorchStep(Step):
    """Eager autograd; state lives in the Keras variables."""

    def setup(self) -> None:
        """Collects the tensors once."""
        import torch

        self.torch = torch
        self.weights = [v.value for v in self.model.trainable_variables]
        self.slots = [v.value for v in self.optimizer.slots]
        self.averages = [v.value.detach() for v in self.average.trainable_variables]
        self.kernels = [update.kernel.value.detach() for update in self.optimizer.updates]

    def __call__(
        self, batch: Batch, *, learning_rate: float, decay: float, body_rate: float | None = None
    ) -> tuple[Any, Any]:
        """Trains on one batch."""
        gradients: list[Any] = []
        sums: list[Any] = []
        for part in self.split(batch):
            tensors = [ops.convert_to_tensor(array) for array in part]
            if self.teacher is not None:
                with self.torch.no_grad():
                    tensors.append(self.teacher(tensors[0]))
            total, *counts = self.forward(*tensors)
            more = self.torch.autograd.grad(total, self.weights)
            added = [total.detach(), *counts]
            gradients = self.torch._foreach_add(gradients, more) if gradients else list(more)
            sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
        with self.torch.no_grad():
            total, weight, correct = sums
            weight = weight.clamp(min=1e-12)
            self.torch._foreach_div_(gradients, weight)
            self.optimizer.apply(gradients, self.weights, self.slots, learning_rate, body_rate)
            merged = self.merge([w.detach() for w in self.weights], self.kernels)
            self.torch._foreach_lerp_(self.averages, merged, 1 - decay)
            return total / weight, correct


class TensorFlowStep(Step):
    """One traced function, compiled by XLA; state lives in the Keras variables."""

    def setup(self) -> None:
        """Traces the step."""
        import tensorflow as tf

        weights, averages = self.model.trainable_variables, self.average.trainable_variables
        slots = self.optimizer.slots

        def step(parts: Any, rates: Any, decay: Any) -> tuple[Any, Any]:
            gradients: list[Any] = []
            sums = [0.0, 0.0, 0.0]
            for part in parts:
                answers = [] if self.teacher is None else [self.teacher(part[0])]
                with tf.GradientTape() as tape:
                    total, *counts = self.forward(*part, *answers)
                more = tape.gradient(total, [weight.value for weight in weights])
                gradients = [a + b for a, b in zip(gradients, more, strict=True)] if gradients else more
                sums = [a + b for a, b in zip(sums, (total, *counts), strict=True)]
            total, weight, correct = sums
            weight = tf.maximum(weight, 1e-12)
            moved, kept = self.optimizer.apply(
                [gradient / weight for gradient in gradients],
                [tf.convert_to_tensor(weight.value) for weight in weights],
                [tf.convert_to_tensor(slot.value) for slot in slots],
                *rates,
            )
            for variable, value in zip((*weights, *slots), (*moved, *kept), strict=True):
                variable.assign(value)
            kernels = [tf.convert_to_tensor(update.kernel.value) for update in self.optimizer.updates]
            for average, value in zip(averages, self.merge(moved, kernels), strict=True):
                average.assign(average + (1 - decay) * (value - average))
            return total / weight, correct

        self.step = tf.function(step, jit_compile=True)
        self.constant = tf.constant

    def __call__(
        self, batch: Batch, *, learning_rate: float, decay: float, body_rate: float | None = None
    ) -> tuple[Any, Any]:
        """Trains on one batch."""
        parts = [[self.constant(array) for array in part] for part in self.split(batch)]
        rates = [learning_rate if rate is None else rate for rate in (learning_rate, body_rate)]
        return self.step(parts, [self.constant(rate, "float32") for rate in rates], self.constant(decay, "float32"))


def _place(name: str) -> str:
    """Returns part and place of a saved name; paths differ between processes, since Keras counts layers."""
    return "/".join(name.split("/")[:2])


def create_step(*args: Any, **kwargs: Any) -> Step:
    """Creates the `Step` of the running Keras backend; arguments as for `Step`."""
    steps = {"jax": JaxStep, "torch": TorchStep, "tensorflow": TensorFlowStep}
    return steps[keras.backend.backend()](*args, **kwargs)
