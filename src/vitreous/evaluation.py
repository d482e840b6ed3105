"""Metrics from logits, in NumPy: the same numbers whatever computed the logits."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        Logits (N, K) float32, labels (N,) int32 or (N, K), and indices (N,) int64 of the examples.
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


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of each label on its own, in (0, 1), for logits of any shape."""
    return np.exp(-np.logaddexp(0, -logits))


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
        labels: (N,) integers in [0, K); or bool (N, K) where an image may have several labels, or none.
        class_names: K names.

    Returns:
        A dict fit for JSON, with `num_examples` and `loss` (in nats).

        With one label an image: `accuracy` and `accuracy_interval` (95%, Wilson), `top5_accuracy` where K > 5,
        `macro_recall` (mean over the classes present), `recall` by class name, and `confusion_matrix` (rows: truth).

        With several: `mean_average_precision` over the classes that apply to some image; at probability 1/2
        `micro_f1`, `macro_f1` (over the same classes), `label_accuracy` (share of right answers of all N * K),
        `exact_match` (share of images with all K right) and `exact_match_interval` (95%, Wilson); `average_precision`,
        `precision`, `recall` and `support` by class name; the loss is the mean over all N * K answers.

    Raises:
        DataError: If N is 0.
    """
    num_classes = len(class_names)
    if not len(labels):
        raise DataError(
            "Cannot compute metrics. Expected at least one labelled image that can be read. Received: none. "
            "Pass data with readable images."
        )
    if labels.ndim == 2:
        return _compute_multi_label_metrics(logits.astype("float64"), labels.astype(bool), class_names)
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


def _compute_multi_label_metrics(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score

    answers = logits > 0
    right = answers == labels  # (N, K)
    exact = int(right.all(axis=1).sum())
    hits, claimed, support = (counts.sum(axis=0) for counts in (answers & labels, answers, labels))  # (K,)
    f1 = 2 * hits / np.maximum(claimed + support, 1)
    applies = support > 0
    names = [name for name, is_there in zip(class_names, applies, strict=True) if is_there]
    precisions = [float(average_precision_score(labels[:, k], logits[:, k])) for k in np.flatnonzero(applies)]

    def by_name(values: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, values[applies].tolist(), strict=True))

    return {
        "mean_average_precision": float(np.mean(precisions)) if names else 0.0,
        "micro_f1": float(2 * hits.sum() / max(claimed.sum() + support.sum(), 1)),
        "macro_f1": float(f1[applies].mean()) if names else 0.0,
        "label_accuracy": float(right.mean()),
        "exact_match": exact / len(labels),
        "exact_match_interval": list(wilson_interval(exact, len(labels))),
        "loss": float((np.logaddexp(0, logits) - labels * logits).mean()),
        "num_examples": len(labels),
        "average_precision": dict(zip(names, precisions, strict=True)),
        "precision": by_name(hits / np.maximum(claimed, 1)),
        "recall": by_name(hits / np.maximum(support, 1)),
        "support": by_name(support),
    }


def get_headline(metrics: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the name and the value of the one number that sums up what `compute_metrics` returned."""
    name = "accuracy" if "accuracy" in metrics else "mean_average_precision"
    return name, metrics[name]


def summarize_metrics(metrics: Mapping[str, Any]) -> str:
    """Returns what `compute_metrics` returned as one line: the headline, what it rests on, and the loss."""
    number = f"{metrics['num_examples']:,} images"
    if "accuracy" in metrics:
        low, high = metrics["accuracy_interval"]
        text = f"accuracy {metrics['accuracy']:.2%} of {number} (95% interval {low:.2%} to {high:.2%})"
    else:
        low, high = metrics["exact_match_interval"]
        text = (
            f"mean average precision {metrics['mean_average_precision']:.2%} on {number}; "
            f"F1 {metrics['micro_f1']:.2%} (micro), {metrics['macro_f1']:.2%} (macro); "
            f"all labels right {metrics['exact_match']:.2%} (95% interval {low:.2%} to {high:.2%})"
        )
    return f"{text}, loss {metrics['loss']:.3f}"
