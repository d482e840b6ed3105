"""What training makes small: cross-entropy over classes or over yes-and-no questions, and answers to imbalance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from vitreous.data import ImageSet


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss of a batch, and how many of its answers are right.

    With one label an image, an example's loss is the cross-entropy of a softmax over all K classes; with several, the
    mean over the classes of the cross-entropy of a sigmoid.

    Args:
        num_classes: K.
        is_multi_label: Whether an image may have several labels, or none.
        label_smoothing: Share of the target spread over all classes (sigmoid: moved towards 1/2), in [0, 1).
        class_weights: (K,) float; each class, or its share of a mixed image, counts so often. With several labels:
            only where the class applies.
        log_priors: (K,) float, added to the logits in training, so that the model learns what is left to say beside
            the classes' frequencies.

    Call arguments:
        logits: (B, K) float.
        labels: (B,) integers in [0, K), or (B, K) float targets in [0, 1]: several labels, or mixed images.
        mask: (B,) float, 1 for a real example, 0 for padding.

    Returns:
        Three float32 scalars: the sum of the examples' losses in nats, each times its weight; the sum of the weights;
        and how many were answered right: the likeliest class is the label (or has the largest share of it); with
        several labels, the mean over the classes of the right answers at probability 1/2. The loss of a batch is the
        first over the second.

    Source: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567 (label smoothing); Menon et al. 2021,
    https://arxiv.org/abs/2007.07314 (logit adjustment).
    """

    num_classes: int
    is_multi_label: bool = False
    label_smoothing: float = 0.0
    class_weights: np.ndarray | None = None
    log_priors: np.ndarray | None = None

    def __call__(self, logits: Any, labels: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Returns the sum of the losses, the sum of the weights, and the number of right answers."""
        logits = ops.cast(logits, "float32")
        mask = ops.convert_to_tensor(mask, "float32")
        if len(labels.shape) == 1:
            targets = ops.one_hot(labels, self.num_classes, dtype="float32")
        else:
            targets = ops.convert_to_tensor(labels, "float32")
        compute = self._sigmoid if self.is_multi_label else self._softmax
        losses, weights, correct = compute(logits, targets)  # (B,) each
        return ops.sum(losses * mask), ops.sum(weights * mask), ops.sum(correct * mask)

    def _softmax(self, logits: Any, targets: Any) -> tuple[Any, Any, Any]:
        answers, truth = ops.argmax(logits, axis=-1), ops.argmax(targets, axis=-1)
        if self.log_priors is not None:
            logits = logits + ops.convert_to_tensor(self.log_priors, "float32")
        class_weights = np.ones(self.num_classes) if self.class_weights is None else self.class_weights
        weighted = targets * ops.convert_to_tensor(class_weights, "float32")
        weights = ops.sum(weighted, axis=-1)
        log_probabilities = ops.log_softmax(logits, axis=-1)
        smooth = -ops.mean(log_probabilities, axis=-1) * weights  # each class alike, as often as the example counts
        losses = -ops.sum(weighted * log_probabilities, axis=-1)
        losses = (1 - self.label_smoothing) * losses + self.label_smoothing * smooth
        return losses, weights, ops.cast(answers == truth, "float32")

    def _sigmoid(self, logits: Any, targets: Any) -> tuple[Any, Any, Any]:
        correct = ops.mean(ops.cast((logits > 0) == (targets > 0.5), "float32"), axis=-1)
        if self.log_priors is not None:
            logits = logits + ops.convert_to_tensor(self.log_priors, "float32")
        smooth = (1 - self.label_smoothing) * targets + 0.5 * self.label_smoothing
        losses = -smooth * ops.log_sigmoid(logits) - (1 - smooth) * ops.log_sigmoid(-logits)
        if self.class_weights is not None:
            losses = losses * (1 + targets * (ops.convert_to_tensor(self.class_weights, "float32") - 1))
        return ops.mean(losses, axis=-1), ops.ones_like(correct), correct


def count_labels(images: ImageSet, num_classes: int) -> np.ndarray:
    """Returns how many images each class has: int64, (K,)."""
    if images.is_multi_label:
        return images.labels.sum(axis=0, dtype="int64")
    return np.bincount(images.labels, minlength=num_classes)


def create_loss(images: ImageSet, num_classes: int, *, balance: str = "none", label_smoothing: float = 0.0) -> Loss:
    """Creates the loss for some training images.

    Args:
        images: The training images.
        num_classes: K.
        balance: What is done about classes of unequal size. `"weights"`: each class weighs the same in the loss (with
            several labels: what applies weighs as much as what does not, at most 100 times). `"logits"`: logit
            adjustment, the frequencies of the classes are added to the logits while training. `"none"` and
            `"sampling"` (the loader's matter) leave the loss alone.
        label_smoothing: As for `Loss`.
    """
    counts = np.maximum(count_labels(images, num_classes), 1).astype("float64")
    weights = log_priors = None
    if balance == "weights" and images.is_multi_label:
        weights = np.clip((len(images) - counts) / counts, 0.01, 100)
    elif balance == "weights":
        weights = counts.sum() / (num_classes * counts)
    elif balance == "logits" and images.is_multi_label:
        shares = np.clip(counts / len(images), 0, 1 - 1e-6)
        log_priors = np.log(shares / (1 - shares))
    elif balance == "logits":
        log_priors = np.log(counts / counts.sum())
    return Loss(
        num_classes=num_classes,
        is_multi_label=images.is_multi_label,
        label_smoothing=label_smoothing,
        class_weights=weights,
        log_priors=log_priors,
    )
