"""Metrics from logits, in NumPy: the same numbers whatever computed the logits."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vitreous.errors import DataError


def collect_logits(
    predict: Callable[[np.ndarray], np.ndarray], batches: Iterable[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs a predict function over batches and keeps what is real.

    Args:
        predict: uint8 images (B, H, W, C) to float logits (B, K).
        batches: Of `vitreous.data.Batch`; entries whose mask is False are left out.

    Returns:
        Logits (N, K) float32, labels (N,) int32, and indices (N,) int64 of the examples.
    """
    logits, labels, indices = [], [], []
    for batch in batches:
        logits.append(np.asarray(predict(batch.images), dtype="float32")[batch.mask])
        labels.append(batch.labels[batch.mask])
        indices.append(batch.indices[batch.mask])
    return np.concatenate(logits), np.concatenate(labels), np.concatenate(indices)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities (N, K) that sum to 1 along the last axis, for logits (N, K)."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def confusion_matrix(labels: np.ndarray, answers: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts answers by truth.

    Args:
        labels: (N,) integers in [0, K): the truth.
        answers: (N,) integers in [0, K): the model's answers.
        num_classes: K.

    Returns:
        (K, K) int64; row: truth, column: answer.
    """
    return np.bincount(labels * num_classes + answers, minlength=num_classes**2).reshape(num_classes, num_classes)


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of a share, by Wilson's score method.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    margin = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(centre - margin, 0.0), min(centre + margin, 1.0)


def compute_metrics(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Computes what a report says of a classifier.

    Args:
        logits: (N, K).
        labels: (N,) integers in [0, K).
        class_names: K names.

    Returns:
        A dict fit for JSON: `accuracy` and `accuracy_interval` (95%, Wilson), `top5_accuracy` where K > 5, `loss`
        (mean cross-entropy in nats), `macro_recall` (mean over the classes present), `num_examples`, `recall` by class
        name, and `confusion_matrix` (rows: truth).

    Raises:
        DataError: If N is 0.
    """
    num_classes = len(class_names)
    if not len(labels):
        raise DataError(
            "Cannot compute metrics. Expected at least one labelled image that can be read. Received: none. "
            "Pass data with readable images."
        )
    labels = labels.astype("int64")
    answers = logits.argmax(axis=1)
    correct = int((answers == labels).sum())
    total = len(labels)
    wide = logits.astype("float64")
    peak = wide.max(axis=1)
    log_sum = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    matrix = confusion_matrix(labels, answers, num_classes)
    support = matrix.sum(axis=1)
    recall = matrix.diagonal() / np.maximum(support, 1)
    metrics: dict[str, Any] = {
        "accuracy": correct / total,
        "accuracy_interval": list(wilson_interval(correct, total)),
        "loss": float((log_sum - wide[np.arange(total), labels]).mean()),
        "macro_recall": float(recall[support > 0].mean()),
        "num_examples": total,
        "recall": {name: float(r) for name, r, n in zip(class_names, recall, support, strict=True) if n},
        "confusion_matrix": matrix.tolist(),
    }
    if num_classes > 5:
        top = np.argpartition(-logits, 5, axis=1)[:, :5]
        metrics["top5_accuracy"] = float((top == labels[:, None]).any(axis=1).mean())
    return metrics
