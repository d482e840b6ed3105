"""Metrics from logits, in NumPy: the same numbers whatever computed the logits."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Computes the numbers that cost no time: what training watches. `compute_all_metrics` has the rest.

    Args:
        logits: (N, K).
        labels: (N,) integers in [0, K); or bool (N, K) where an image may have several labels, or none.
        class_names: K names.

    Returns:
        A dict fit for JSON, with `num_examples` and `loss` (in nats).

        With one label an image: `accuracy` and `accuracy_interval` (95%, Wilson), `top5_accuracy` where K > 5;
        `macro_precision`, `macro_recall` and `macro_f1` (means over the classes present); `weighted`, a dict of
        `precision`, `recall` and `f1` weighted by support; `precision`, `recall`, `f1` and `support` by name of the
        classes present; and `confusion_matrix` (rows: truth).

        With several: `mean_average_precision` over the classes that apply to some image; at probability 1/2
        `micro_f1`, `macro_precision`, `macro_recall`, `macro_f1` (over the same classes), `weighted`, `label_accuracy`
        (share of right answers of all N * K), `exact_match` (share of images with all K right) and
        `exact_match_interval` (95%, Wilson); `average_precision`, `precision`, `recall`, `f1` and `support` by class
        name; the loss is the mean over all N * K answers.

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
    is_there = support > 0
    values = class_shares(matrix.diagonal(), matrix.sum(axis=0), support)
    shares = dict(zip(("precision", "recall", "f1"), values, strict=True))
    names = [name for name, is_present in zip(class_names, is_there, strict=True) if is_present]
    metrics: dict[str, Any] = {
        "accuracy": correct / total,
        "accuracy_interval": list(wilson_interval(correct, total)),
        "loss": float((log_sum - wide[np.arange(total), labels]).mean()),
        **{f"macro_{kind}": float(values[is_there].mean()) for kind, values in shares.items()},
        "num_examples": total,
        "weighted": {kind: float(values @ support / total) for kind, values in shares.items()},
        **{kind: dict(zip(names, values[is_there].tolist(), strict=True)) for kind, values in shares.items()},
        "support": dict(zip(names, support[is_there].tolist(), strict=True)),
        "confusion_matrix": matrix.tolist(),
    }
    if num_classes > 5:
        top = np.argpartition(-logits, 5, axis=1)[:, :5]
        metrics["top5_accuracy"] = float((top == labels[:, None]).any(axis=1).mean())
    return metrics


def class_shares(
    hits: np.ndarray, claimed: np.ndarray, support: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns precision, recall and F1, from counts of the same shape: right answers, answers, and truths of a class.

    A share of nothing is 0, as in scikit-learn with `zero_division=0`.
    """
    return hits / np.maximum(claimed, 1), hits / np.maximum(support, 1), 2 * hits / np.maximum(claimed + support, 1)


def _compute_multi_label_metrics(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score

    answers = logits > 0
    right = answers == labels  # (N, K)
    exact = int(right.all(axis=1).sum())
    hits, claimed, support = (counts.sum(axis=0) for counts in (answers & labels, answers, labels))  # (K,)
    precision, recall, f1 = class_shares(hits, claimed, support)
    applies = support > 0
    names = [name for name, is_there in zip(class_names, applies, strict=True) if is_there]
    precisions = [float(average_precision_score(labels[:, k], logits[:, k])) for k in np.flatnonzero(applies)]

    def by_name(values: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, values[applies].tolist(), strict=True))

    return {
        "mean_average_precision": float(np.mean(precisions)) if names else 0.0,
        "macro_precision": float(precision[applies].mean()) if names else 0.0,
        "macro_recall": float(recall[applies].mean()) if names else 0.0,
        "weighted": {
            "precision": float(precision @ support / max(support.sum(), 1)),
            "recall": float(hits.sum() / max(support.sum(), 1)),
            "f1": float(f1 @ support / max(support.sum(), 1)),
        },
        "micro_f1": float(2 * hits.sum() / max(claimed.sum() + support.sum(), 1)),
        "macro_f1": float(f1[applies].mean()) if names else 0.0,
        "label_accuracy": float(right.mean()),
        "exact_match": exact / len(labels),
        "exact_match_interval": list(wilson_interval(exact, len(labels))),
        "loss": float((np.logaddexp(0, logits) - labels * logits).mean()),
        "num_examples": len(labels),
        "average_precision": dict(zip(names, precisions, strict=True)),
        "precision": by_name(precision),
        "recall": by_name(recall),
        "f1": by_name(f1),
        "support": by_name(support),
    }


NUM_DRAWS, SEED = 1000, 0  # of the bootstrap
_MOST_WORK = 3e8  # examples times classes times draws of the bootstrap of ranks: seconds
_FEWEST_DRAWS = 200


def compute_all_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = SEED,
) -> dict[str, Any]:
    """Computes what a report says of a classifier: `compute_metrics`, how well it ranks, and how sure all of it is.

    Args:
        logits: (N, K).
        labels: (N,) integers in [0, K); or bool (N, K) where an image may have several labels, or none.
        class_names: K names.
        num_draws: Draws of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        What `compute_metrics` returns, and

        - `roc_auc` and `average_precision` by class name, each class against the rest, and their means `macro_roc_auc`
          and `mean_average_precision`: over the classes that apply to some image; the former without those that apply
          to every image. `macro_roc_auc` is None where there is no such class. With one label an image, the score of a
          class is its probability.
        - `intervals`: 95% confidence intervals by name of the number: `low`, `high` and `method`, which is "wilson"
          for shares of images, and "bootstrap" for all else: percentiles over `num_draws` draws of N images with
          replacement. Of `macro_roc_auc` and `mean_average_precision` there may be fewer draws, and none where they
          would take minutes.
        - `recall_interval` by class name (95%, Wilson).
        - `bootstrap`: `num_draws`, `num_rank_draws` (0: no intervals) and `seed`.

    Raises:
        DataError: If N is 0.
    """
    metrics = compute_metrics(logits, labels, class_names)
    is_multi_label = labels.ndim == 2
    wide = logits.astype("float64")
    scores = wide if is_multi_label else softmax(wide)
    truth = labels.astype(bool) if is_multi_label else labels[:, None] == np.arange(len(class_names))
    total = len(labels)
    places = np.flatnonzero(truth.any(axis=0)).tolist()
    names = [class_names[k] for k in places]
    areas, precisions = rank_scores(scores[:, places], truth[:, places], np.ones((1, total), "float32"))
    metrics["roc_auc"] = {name: area for name, area in zip(names, areas[0].tolist(), strict=True) if area == area}
    metrics["macro_roc_auc"] = float(np.nanmean(areas)) if metrics["roc_auc"] else None
    if not is_multi_label:
        metrics["average_precision"] = dict(zip(names, precisions[0].tolist(), strict=True))
        metrics["mean_average_precision"] = float(precisions.mean())
    support = metrics["support"]
    metrics["recall_interval"] = {
        name: list(wilson_interval(round(metrics["recall"][name] * count), count)) for name, count in support.items()
    }
    intervals: dict[str, Any] = {}
    for name in ("exact_match",) if is_multi_label else ("accuracy", "top5_accuracy"):
        if name in metrics:
            low, high = wilson_interval(round(metrics[name] * total), total)
            intervals[name] = {"low": low, "high": high, "method": "wilson"}
    generator = np.random.default_rng(seed)
    draws = _draw_counts(metrics, truth, wide, num_draws, generator)
    num_rank_draws = min(num_draws, int(_MOST_WORK / max(truth[:, places].size, 1)))
    if num_rank_draws < min(_FEWEST_DRAWS, num_draws) or not names:
        num_rank_draws = 0
    else:
        draws |= draw_ranks(scores[:, places], truth[:, places], num_rank_draws, generator)
    for name, values in draws.items():
        if not np.isfinite(values).any():
            continue
        low, high = np.nanpercentile(values, (2.5, 97.5)).tolist()
        intervals[name] = {"low": low, "high": high, "method": "bootstrap"}
    bootstrap = {"num_draws": num_draws, "num_rank_draws": num_rank_draws, "seed": seed}
    return {**metrics, "intervals": intervals, "bootstrap": bootstrap}


def _draw_counts(
    metrics: Mapping[str, Any], truth: np.ndarray, logits: np.ndarray, num_draws: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns what the bootstrap gives for numbers that counts and means decide; (num_draws,) each."""
    total = len(truth)
    values: dict[str, np.ndarray] = {}
    if "confusion_matrix" in metrics:
        values |= _draw_confusions(np.array(metrics["confusion_matrix"]), num_draws, generator)
        peak = logits.max(axis=1)
        losses = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1)) - logits[truth]
    else:
        losses = (np.logaddexp(0, logits) - truth * logits).mean(axis=1)
    answers = logits > 0
    for size in _chunk_sizes(num_draws, total):
        weights = _draw_weights(total, size, generator)
        parts = {"loss": weights @ losses.astype("float32") / total}
        if "confusion_matrix" not in metrics:
            hits, claimed, support = (
                weights @ counts.astype("float32") for counts in (answers & truth, answers, truth)
            )  # (draws, K)
            applies = support > 0
            for kind, shares in zip(("precision", "recall", "f1"), class_shares(hits, claimed, support), strict=True):
                parts[f"macro_{kind}"] = (shares * applies).sum(axis=1) / np.maximum(applies.sum(axis=1), 1)
            parts["micro_f1"] = 2 * hits.sum(axis=1) / np.maximum((claimed + support).sum(axis=1), 1)
        for name, part in parts.items():
            values[name] = np.concatenate([values.get(name, part[:0]), part])
    return values


def _draw_confusions(matrix: np.ndarray, num_draws: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws images anew, which is drawing the cells of their confusion matrix anew, from a multinomial."""
    from scipy.sparse import csr_array

    rows, columns = np.nonzero(matrix)
    counts = matrix[rows, columns]
    places, ones, shape = np.arange(len(rows)), np.ones(len(rows)), (len(matrix), len(rows))
    by_row, by_column = (csr_array((ones, (of, places)), shape=shape) for of in (rows, columns))
    diagonal = csr_array((np.where(rows == columns, 1.0, 0.0), (rows, places)), shape=shape)
    parts: dict[str, list[np.ndarray]] = {}
    for size in _chunk_sizes(num_draws, len(counts)):
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size).T.astype("float64")  # (cells, draws)
        hits, claimed, support = (sums @ drawn for sums in (diagonal, by_column, by_row))  # (K, draws)
        is_there = support > 0
        for kind, shares in zip(("precision", "recall", "f1"), class_shares(hits, claimed, support), strict=True):
            parts.setdefault(f"macro_{kind}", []).append((shares * is_there).sum(axis=0) / is_there.sum(axis=0))
    return {name: np.concatenate(values) for name, values in parts.items()}


_CHUNK_SIZE = 5_000_000  # images, or cells, times draws at a time: what bounds the memory


def _chunk_sizes(num_draws: int, width: int) -> Iterator[int]:
    """Yields numbers of draws that add up to `num_draws`: at most 100 at a time, fewer where a draw is wide."""
    most = min(100, max(1, _CHUNK_SIZE // width))
    for start in range(0, num_draws, most):
        yield min(most, num_draws - start)


def _draw_weights(total: int, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    """Returns how often each of N images is drawn, in each of the draws: float32 (num_draws, N)."""
    drawn = generator.integers(0, total, (num_draws, total))
    return np.stack([np.bincount(row, minlength=total) for row in drawn]).astype("float32")


def draw_ranks(
    scores: np.ndarray, truth: np.ndarray, num_draws: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws N images with replacement, many times, and ranks them.

    Args:
        scores: (N, K): the higher, the more the model thinks that the class applies.
        truth: bool (N, K).
        num_draws: How many times.
        generator: Of random numbers.

    Returns:
        `macro_roc_auc` and `mean_average_precision` of each draw, float64 (num_draws,): means over the classes that can
        be ranked in it; NaN where there is none.
    """
    areas: list[np.ndarray] = []
    precisions: list[np.ndarray] = []
    for size in _chunk_sizes(num_draws, len(truth)):
        weights = _draw_weights(len(truth), size, generator)
        for values, means in zip(rank_scores(scores, truth, weights), (areas, precisions), strict=True):
            is_known = np.isfinite(values)
            count = is_known.sum(axis=1)
            means.append(np.where(count > 0, np.where(is_known, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan))
    return {"macro_roc_auc": np.concatenate(areas), "mean_average_precision": np.concatenate(precisions)}


def rank_scores(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes ROC-AUC and average precision of each class under many weightings of the images at once.

    Args:
        scores: (N, K): the higher, the more the model thinks that the class applies.
        truth: bool (N, K).
        weights: (D, N): D weightings, such as how often each draw of a bootstrap has each image.

    Returns:
        ROC-AUC and average precision, each (D, K) in [0, 1]; NaN where a weighting has no image with the class, and
        the former where it has none without it. They equal `roc_auc_score` and `average_precision_score` of
        scikit-learn, which would take a loop over the draws.
    """
    num_draws, num_classes = len(weights), scores.shape[1]
    areas, precisions = np.full((num_draws, num_classes), np.nan), np.full((num_draws, num_classes), np.nan)
    for k in range(num_classes):
        order = np.argsort(-scores[:, k], kind="stable")
        ranked = scores[order, k]
        is_last = np.append(ranked[1:] != ranked[:-1], True)  # of images with one score
        group = np.cumsum(is_last) - is_last
        last = np.flatnonzero(is_last)
        hits = np.flatnonzero(truth[order, k])
        if not len(hits):
            continue
        sums = np.cumsum(weights[:, order], axis=1, dtype="float64")  # (D, N), of all images down to each score
        hit_weights = weights[:, order[hits]]
        hit_sums = np.cumsum(hit_weights, axis=1, dtype="float64")
        of_hit = group[hits]
        end = last[of_hit]
        start = np.where(of_hit > 0, last[of_hit - 1], -1)
        # How many hits lie down to the end of a group, and before it, as places in `hit_sums`.
        num_to_end, num_before = (np.searchsorted(hits, edge, side="right") for edge in (end, start))
        padded = np.concatenate([np.zeros((num_draws, 1)), hit_sums], axis=1)
        hits_to_end, hits_before = padded[:, num_to_end], padded[:, num_before]
        all_to_end = sums[:, end]
        all_before = np.where(start >= 0, sums[:, start], 0)
        misses_to_end, misses_before = all_to_end - hits_to_end, all_before - hits_before
        total_hits = hit_sums[:, -1]
        total_misses = sums[:, -1] - total_hits
        with np.errstate(invalid="ignore", divide="ignore"):
            below = total_misses[:, None] - (misses_to_end + misses_before) / 2
            areas[:, k] = (hit_weights * below).sum(axis=1) / (total_hits * total_misses)
            precisions[:, k] = np.nansum(hit_weights * hits_to_end / all_to_end, axis=1) / total_hits
    return areas, precisions


TITLES = {
    "top5_accuracy": "top-5 accuracy",
    "macro_precision": "precision, mean over classes",
    "macro_recall": "recall, mean over classes",
    "macro_f1": "F1, mean over classes",
    "micro_f1": "F1 over all labels",
    "macro_roc_auc": "ROC-AUC, mean over classes",
    "mean_average_precision": "average precision, mean over classes",
    "exact_match": "all labels right",
}
"""What numbers of `compute_all_metrics` are called in tables, beside the accuracy and the loss."""


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
