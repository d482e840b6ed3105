"""Learning from a teacher: a trained model sees the same augmented images, and its answers are a second label."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from vitreous.data import Dataset
from vitreous.errors import ConfigError
from vitreous.model import VisionTransformer, normalize_images
from vitreous.registry import count_parameters
from vitreous.resize import resize_matrix
from vitreous.spec import InputSpec
from vitreous.training.losses import Loss
from vitreous.training.planning import describe_weights, fingerprint
from vitreous.training.progress import Reporter
from vitreous.training.recipe import DistillationConfig
from vitreous.training.run import Run, load_run
from vitreous.weights import import_weights


class Teacher:
    """A trained model that answers for the images of another one.

    Args:
        model: The model, built.
        input_spec: What images must go through before they enter it.
        order: (K,) where each class of the student stands among the teacher's.
        name: What messages call it. Default: the model's name.

    Call arguments:
        images: (B, H, W, C), values 0 to 255, uint8 or floating point, as the student gets them: of any size (they are
            resized on the device: bicubic, antialiased), with as many channels as the teacher takes, or one.

    Returns:
        (B, K) float32 logits, classes in the student's order.
    """

    def __init__(self, model: VisionTransformer, input_spec: InputSpec, order: Sequence[int], *, name: str = ""):
        self.model = model
        self.input_spec = input_spec
        self.order = np.asarray(order, "int32")
        self.name = name or model.name

    @property
    def fingerprint(self) -> str:
        """A sha256 of its weights: what it answers, whatever it is called."""
        return fingerprint(ops.convert_to_numpy(ops.cast(weight.value, "float32")) for weight in self.model.weights)

    def __call__(self, images: Any) -> Any:
        """Returns the teacher's logits for some images."""
        return self.arrange(self.model(self.prepare(images), training=False))

    def prepare(self, images: Any) -> Any:
        """Returns images as the model takes them."""
        images = ops.cast(images, "float32")
        (height, width), (new_height, new_width) = images.shape[1:3], self.input_spec.image_size
        if (height, width) != (new_height, new_width):
            rows, columns = (
                ops.convert_to_tensor(resize_matrix(*sizes).astype("float32"))
                for sizes in ((height, new_height), (width, new_width))
            )
            images = ops.einsum("ij,bjwc->biwc", rows, images)
            images = ops.clip(ops.einsum("ij,bhjc->bhic", columns, images), 0.0, 255.0)
        if images.shape[-1] == 1 and self.input_spec.num_channels > 1:
            images = ops.repeat(images, self.input_spec.num_channels, axis=-1)
        return normalize_images(images, self.input_spec)

    def arrange(self, logits: Any) -> Any:
        """Returns the model's logits in the student's order."""
        return ops.take(ops.cast(logits, "float32"), ops.convert_to_tensor(self.order), axis=-1)


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """Loss of a batch for labels and for a teacher's answers.

    With weight w, an example's loss is (1 - w) times that of the labels plus w times the teacher's part:

    - soft: t^2 times the divergence (Kullback-Leibler) of the student's probabilities at temperature t from the
      teacher's; with several labels, the mean over the classes of that of two probabilities each;
    - hard: the cross-entropy of the teacher's likeliest class; with several labels, of each class at probability 1/2.

    The teacher's part goes to the last head: with a distillation token, to its head alone, and the labels to the class
    token's.

    Args:
        loss: Of the labels.
        config: Kind, temperature and weight.
        teacher: Whom the training step asks.

    Call arguments:
        logits: Logits (B, K) of each head: of the class token, and of the distillation token where there is one.
        labels: As for `Loss`.
        mask: As for `Loss`.
        answers: (B, K) float32, the teacher's logits.

    Returns:
        What `Loss` does; the right answers are those of the mean of the heads.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2; Touvron et al. 2021,
    https://arxiv.org/abs/2012.12877, section 4, whose weights are 0.1 (soft, t = 3) and 0.5 (hard). Different: a
    class's weight in the loss counts for the teacher's part too.
    """

    loss: Loss
    config: DistillationConfig
    teacher: Teacher

    def __call__(self, logits: Sequence[Any], labels: Any, mask: Any, answers: Any) -> tuple[Any, Any, Any]:
        """Returns the sum of the losses, the sum of the weights, and the number of right answers."""
        targets = self.loss.get_targets(labels)
        mask = ops.convert_to_tensor(mask, "float32")
        losses, weights = self.loss.compute(logits[0], targets)
        taught = self.compare(ops.cast(logits[-1], "float32"), answers) * weights
        losses = (1 - self.config.weight) * losses + self.config.weight * taught
        correct = self.loss.count_right(sum(logits) / len(logits), targets)
        return ops.sum(losses * mask), ops.sum(weights * mask), ops.sum(correct * mask)

    def compare(self, logits: Any, answers: Any) -> Any:
        """Returns the teacher's part (B,) of the loss for a head's logits."""
        is_multi_label = self.loss.is_multi_label
        if self.config.kind == "hard":
            if is_multi_label:
                wanted = ops.cast(answers > 0, "float32")
                return ops.mean(ops.softplus(logits) - wanted * logits, axis=-1)
            wanted = ops.one_hot(ops.argmax(answers, axis=-1), self.loss.num_classes, dtype="float32")
            return -ops.sum(wanted * ops.log_softmax(logits, axis=-1), axis=-1)
        temperature = self.config.temperature
        logits, answers = logits / temperature, answers / temperature
        if is_multi_label:
            wanted = ops.sigmoid(answers)
            divergence = wanted * (ops.log_sigmoid(answers) - ops.log_sigmoid(logits))
            divergence = divergence + (1 - wanted) * (ops.log_sigmoid(-answers) - ops.log_sigmoid(-logits))
            return temperature**2 * ops.mean(divergence, axis=-1)
        wanted = ops.log_softmax(answers, axis=-1)
        return temperature**2 * ops.sum(ops.exp(wanted) * (wanted - ops.log_softmax(logits, axis=-1)), axis=-1)


def load_teacher(source: str | Path, dataset: Dataset, *, num_channels: int, dtype: Any, reporter: Reporter) -> Teacher:
    """Loads a teacher for a data set.

    Args:
        source: A run folder, or weights as `import_weights` takes them.
        dataset: What the student learns: the teacher must have its classes, which are matched by name.
        num_channels: Of the student's images.
        dtype: Keras dtype or policy to compute in.
        reporter: Where it is said what the teacher is.

    Raises:
        ConfigError: If it has other classes, or takes other images.
        RunError: If the run is not whole, or has no classes.
        WeightsError: If its weights cannot be imported.
    """
    path = Path(source)
    folder = path.parent if path.suffix == ".keras" else path
    run = load_run(folder) if (folder / "config.toml").is_file() else None
    if run is not None:
        run.check_has_classes()
        _check_run(run, source, dataset, reporter)
    report = import_weights(source, dtype=dtype)
    names = run.class_names if run is not None else report.class_names
    order = _match_classes(str(source), names, report.model.config.num_classes, dataset.class_names, reporter)
    spec = report.input_spec if run is None else run.input_spec
    if num_channels not in (1, spec.num_channels):
        raise ConfigError(
            f"Cannot learn from the teacher {source}. Expected a teacher for images of {num_channels} channels. "
            f"Received: num_channels={spec.num_channels}. Pass num_channels={spec.num_channels}, or another teacher."
        )
    height, width = spec.image_size
    reporter.note(
        f"Teacher  {source}: {report.model.name}, {count_parameters(report.model.config) / 1e6:.2f}M parameters, "
        f"{height}x{width} pixels"
    )
    return Teacher(report.model, spec, order, name=describe_weights(source))


def _check_run(run: Run, source: str | Path, dataset: Dataset, reporter: Reporter) -> None:
    """Refuses a run for the other kind of labels, and warns of one that may know the test images."""
    kinds = {False: "one label an image", True: "several labels an image"}
    if run.is_multi_label != dataset.is_multi_label:
        raise ConfigError(
            f"Cannot learn from the teacher {source}. Expected one that was trained on images with "
            f"{kinds[dataset.is_multi_label]}. Received: {kinds[run.is_multi_label]}. Pass another teacher."
        )
    data = run.config["data"]
    if data["name"] == dataset.name and data["fingerprint"] != dataset.fingerprint:
        reporter.warn(
            f"The teacher {source} was trained on {dataset.name} with other splits, or other images: it may have seen "
            "some that this run is tested on. For an honest test, train both on the same images, with the same seed."
        )


def _match_classes(
    source: str, names: Sequence[str], num_classes: int, wanted: Sequence[str], reporter: Reporter
) -> list[int]:
    """Returns where each wanted class stands among the teacher's."""
    what = f"Cannot learn from the teacher {source}."
    if not num_classes:
        raise ConfigError(
            f"{what} Expected a classifier. Received: num_classes=0, a model without a head. To start from its weights "
            "instead, pass them as pretrained."
        )
    if names and set(names) != set(wanted):
        lacking, other = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
        differences = [
            f"{title} {', '.join(each[:3])}{' ...' if each[3:] else ''}"
            for title, each in (("without", lacking), ("with", other))
            if each
        ]
        raise ConfigError(
            f"{what} Expected a teacher of the data's {len(wanted)} classes. Received: {len(names)} classes, "
            f"{', '.join(differences)}. Train one on these classes first; to start from its weights instead, pass them "
            "as pretrained."
        )
    if num_classes != len(wanted):
        raise ConfigError(
            f"{what} Expected a teacher of the data's {len(wanted)} classes. Received: num_classes={num_classes}. "
            "Train one on these classes first; to start from its weights instead, pass them as pretrained."
        )
    if names:
        return [list(names).index(name) for name in wanted]
    reporter.warn(
        f"The teacher {source} does not name its classes; they are taken to be those of the data in this order: "
        f"{', '.join(wanted[:5])}{' ...' if wanted[5:] else ''}."
    )
    return list(range(len(wanted)))
