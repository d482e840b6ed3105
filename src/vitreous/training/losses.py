"""What training makes small: the losses of right and wrong answers, and answers to classes of unequal size."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from vitreous.data import ImageSet
from vitreous.errors import ConfigError
from vitreous.training.recipe import LossName

_TINY = 1e-8  # below this a focusing factor no longer falls, so that no power has an infinite slope


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss of a batch, and how many of its answers are right.

    With p the probability of a class and t its target (0 or 1, or a share), an example's loss is

    | name         | probabilities | loss                                                                            |
    |--------------|---------------|---------------------------------------------------------------------------------|
    | cross_entropy | softmax      | sum of -t log p                                                                 |
    | binary       | sigmoid       | mean of -t log p - (1 - t) log(1 - p)                                           |
    | focal        | softmax       | sum of -t (1 - p)^g log p                                                       |
    | focal        | sigmoid       | mean of -t (1 - p)^g log p - (1 - t) p^g log(1 - p)                             |
    | asymmetric   | sigmoid       | mean of -t (1 - p)^g+ log p - (1 - t) q^g- log(1 - q), with q = max(p - clip, 0) |

    over the K classes. With several labels an image, probabilities are a sigmoid's, and cross_entropy is binary.

    Args:
        num_classes: K.
        is_multi_label: Whether an image may have several labels, or none.
        name: `"cross_entropy"`, `"binary"`, `"focal"` or `"asymmetric"` (several labels only).
        label_smoothing: Share of the target spread over all classes (several labels: moved towards 1/2), in [0, 1);
            0 for `"asymmetric"`.
        class_weights: (K,) float; each class, or its share of a mixed image, counts so often. With several labels:
            only where the class applies.
        log_priors: (K,) float, added to the logits in training, so that the model learns what is left to say beside
            the classes' frequencies: their logarithms for a softmax, log odds for a sigmoid.
        focal_gamma: g of `"focal"`, 0 or more.
        gamma_negative: g- of `"asymmetric"`.
        gamma_positive: g+ of `"asymmetric"`.
        negative_clip: clip of `"asymmetric"`, in [0, 1): what does not apply costs nothing below that probability.

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
    https://arxiv.org/abs/2007.07314 (logit adjustment); Wightman et al. 2021, https://arxiv.org/abs/2110.00476, and
    Touvron et al. 2022, https://arxiv.org/abs/2204.07118 (binary with one label); Lin et al. 2017,
    https://arxiv.org/abs/1708.02002 (focal); Ridnik et al. 2021, https://arxiv.org/abs/2009.14119 (asymmetric).
    """

    num_classes: int
    is_multi_label: bool = False
    name: LossName = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: np.ndarray | None = None
    log_priors: np.ndarray | None = None
    focal_gamma: float = 2.0
    gamma_negative: float = 4.0
    gamma_positive: float = 0.0
    negative_clip: float = 0.05

    @property
    def is_sigmoid(self) -> bool:
        """Whether each class is a question of its own."""
        return self.is_multi_label or self.name in ("binary", "asymmetric")

    def __call__(self, logits: Any, labels: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Returns the sum of the losses, the sum of the weights, and the number of right answers."""
        targets = self.get_targets(labels)
        mask = ops.convert_to_tensor(mask, "float32")
        losses, weights = self.compute(logits, targets)  # (B,) each
        return ops.sum(losses * mask), ops.sum(weights * mask), ops.sum(self.count_right(logits, targets) * mask)

    def get_targets(self, labels: Any) -> Any:
        """Returns labels as targets (B, K) float32."""
        if len(labels.shape) == 1:
            return ops.one_hot(labels, self.num_classes, dtype="float32")
        return ops.convert_to_tensor(labels, "float32")

    def count_right(self, logits: Any, targets: Any) -> Any:
        """Returns what is right of each answer: (B,) float32 in [0, 1]."""
        if self.is_multi_label:
            return ops.mean(ops.cast((logits > 0) == (targets > 0.5), "float32"), axis=-1)
        return ops.cast(ops.argmax(logits, axis=-1) == ops.argmax(targets, axis=-1), "float32")

    def compute(self, logits: Any, targets: Any) -> tuple[Any, Any]:
        """Returns each example's loss times its weight, and its weight: (B,) float32 each."""
        logits = ops.cast(logits, "float32")
        if self.log_priors is not None:
            logits = logits + ops.convert_to_tensor(self.log_priors, "float32")
        class_weights = ops.convert_to_tensor(
            np.ones(self.num_classes) if self.class_weights is None else self.class_weights, "float32"
        )
        if not self.is_sigmoid:
            costs = self._softmax_costs(logits)
            weighted = targets * class_weights
            weights = ops.sum(weighted, axis=-1)
            smooth = ops.mean(costs, axis=-1) * weights  # each class alike, as often as the example counts
            losses = (1 - self.label_smoothing) * ops.sum(weighted * costs, axis=-1) + self.label_smoothing * smooth
            return losses, weights
        positive, negative = self._sigmoid_costs(logits)
        floor = 0.5 if self.is_multi_label else 1 / self.num_classes
        smooth = (1 - self.label_smoothing) * targets + self.label_smoothing * floor
        losses = smooth * positive + (1 - smooth) * negative
        if not self.is_multi_label:
            weights = ops.sum(targets * class_weights, axis=-1)
            return ops.mean(losses, axis=-1) * weights, weights
        losses = ops.mean(losses * (1 + targets * (class_weights - 1)), axis=-1)
        return losses, ops.ones_like(losses)

    def _softmax_costs(self, logits: Any) -> Any:
        """Returns what each class costs where it is the answer: (B, K)."""
        log_probabilities = ops.log_softmax(logits, axis=-1)
        if self.name != "focal":
            return -log_probabilities
        return -_power(-ops.expm1(log_probabilities), self.focal_gamma) * log_probabilities

    def _sigmoid_costs(self, logits: Any) -> tuple[Any, Any]:
        """Returns what each class costs where it applies, and where it does not: (B, K) each."""
        yes, no = ops.log_sigmoid(logits), ops.log_sigmoid(-logits)  # of the probability, and of what is left to 1
        if self.name == "focal":
            return -ops.exp(self.focal_gamma * no) * yes, -ops.exp(self.focal_gamma * yes) * no
        if self.name != "asymmetric":
            return -yes, -no
        positive = -ops.exp(self.gamma_positive * no) * yes
        if not self.negative_clip:
            return positive, -ops.exp(self.gamma_negative * yes) * no
        shifted = ops.maximum(ops.exp(yes) - self.negative_clip, 0.0)
        return positive, -_power(shifted, self.gamma_negative) * ops.log1p(-shifted)


def _power(base: Any, exponent: float) -> Any:
    """Returns `base` to a power, for a base in [0, 1]: finite slopes at 0 too."""
    return ops.exp(exponent * ops.log(ops.maximum(base, _TINY))) if exponent else ops.ones_like(base)


def count_labels(images: ImageSet, num_classes: int) -> np.ndarray:
    """Returns how many images each class has: int64, (K,)."""
    if images.is_multi_label:
        return images.labels.sum(axis=0, dtype="int64")
    return np.bincount(images.labels, minlength=num_classes)


def create_loss(images: ImageSet, num_classes: int, *, balance: str = "none", **options: Any) -> Loss:
    """Creates the loss for some training images.

    Args:
        images: The training images.
        num_classes: K.
        balance: What is done about classes of unequal size. `"weights"`: each class weighs the same in the loss (with
            several labels: what applies weighs as much as what does not, at most 100 times). `"logits"`: logit
            adjustment, the frequencies of the classes are added to the logits while training. `"none"` and
            `"sampling"` (the loader's matter) leave the loss alone.
        **options: More fields of `Loss`.

    Raises:
        ConfigError: If the loss is not for such images.
    """
    is_multi_label, name = images.is_multi_label, options.get("name", "cross_entropy")
    if name == "asymmetric" and not is_multi_label:
        raise ConfigError(
            "Cannot use the asymmetric loss. Expected images with several labels. Received: one label an image. "
            "Pass loss='focal' or 'binary'; for classes of unequal size, balance='logits'."
        )
    loss = Loss(num_classes, is_multi_label, **options)
    counts = np.maximum(count_labels(images, num_classes), 1).astype("float64")
    if balance == "weights":
        weights = counts.sum() / (num_classes * counts)
        if is_multi_label:
            weights = np.clip((len(images) - counts) / counts, 0.01, 100)
        return dataclasses.replace(loss, class_weights=weights)
    if balance == "logits":
        shares = counts / (len(images) if is_multi_label else counts.sum())
        shares = np.clip(shares, 0, 1 - 1e-6) if loss.is_sigmoid else shares
        return dataclasses.replace(loss, log_priors=np.log(shares / (1 - shares) if loss.is_sigmoid else shares))
    return loss
