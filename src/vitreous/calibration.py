"""Whether probabilities mean what they say, a temperature that mends them, and answers held back when unsure.

NumPy on logits, whatever computed them. With one label an image, a probability is that of the answer (the most probable
class). With several, each of the K labels of an image has a probability of its own, and all N * K of them count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitreous.errors import ConfigError, DataError

NUM_BINS = 15
MIN_EXAMPLES = 50
"""Images below which no temperature is fitted: it would follow chance."""

_COLDEST, _HOTTEST = 0.05, 20.0
TARGETS = (0.9, 0.95, 0.99)
"""Accuracies for which a run keeps a threshold."""


def to_probabilities(logits: np.ndarray, *, is_multi_label: bool, temperature: float = 1.0) -> np.ndarray:
    """Returns probabilities (N, K) for logits (N, K): a softmax, or a sigmoid with several labels an image."""
    from scipy.special import expit, softmax

    scaled = np.asarray(logits, "float64") / temperature
    return expit(scaled) if is_multi_label else softmax(scaled, axis=-1)


def get_confidence(probabilities: np.ndarray, *, is_multi_label: bool) -> np.ndarray:
    """Returns how sure each answer is, (N,): the probability of the most probable class.

    With several labels an image: the probability that the model gives to its least sure label being as it says, which
    is at least 1/2.
    """
    if not is_multi_label:
        return probabilities.max(axis=-1)
    return np.maximum(probabilities, 1 - probabilities).min(axis=-1)


def get_is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns whether each answer is right, bool (N,); with several labels an image, whether all K are."""
    return ((logits > 0) == labels.astype(bool)).all(axis=1) if labels.ndim == 2 else logits.argmax(axis=1) == labels


# ----- calibration


def compute_calibration(
    logits: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Computes how far probabilities are from what happens.

    Args:
        logits: (N, K).
        labels: (N,) integers in [0, K); or bool (N, K) where an image may have several labels.
        temperature: Above 0; logits are divided by it.
        num_bins: Bins of the calibration error.

    Returns:
        A dict fit for JSON: `ece` and `ece_equal_mass`, the expected calibration error in [0, 1] over bins of equal
        width and over bins of equally many images; `nll`, the negative log-likelihood in nats (with several labels,
        the mean over all N * K); `brier`, the mean squared distance from what happened, summed over classes, in [0, 2]
        (with several labels, the mean over all N * K, in [0, 1]); `reliability`, a list with `low`, `high`, `count`,
        `confidence` and `accuracy` of each bin of equal width that is not empty.

    Raises:
        DataError: If N is 0.
        ConfigError: If the temperature is not above 0.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 2; bins of equal mass: Nixon et al. 2019,
    https://arxiv.org/abs/1904.01685. The error is biased upwards where bins hold few images.
    """
    _check(logits, labels)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"Cannot compute calibration. Expected a temperature above 0. Received: temperature={temperature}. "
            "Pass 1.0 to leave probabilities as they are."
        )
    is_multi_label = labels.ndim == 2
    shares = to_probabilities(logits, is_multi_label=is_multi_label, temperature=temperature)
    if is_multi_label:
        truth = labels.astype(bool)
        confidence, is_right = shares.ravel(), truth.ravel()
        brier = float(((shares - truth) ** 2).mean())
    else:
        confidence, is_right = shares.max(axis=1), shares.argmax(axis=1) == labels
        at_truth = shares[np.arange(len(labels)), labels]
        brier = float(((shares**2).sum(axis=1) - 2 * at_truth + 1).mean())
    edges = np.linspace(0, 1, num_bins + 1)
    of_width = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)  # (low, high]
    ranks = np.empty(len(confidence), int)
    ranks[np.argsort(confidence, kind="stable")] = np.arange(len(confidence))
    of_mass = ranks * num_bins // len(confidence)
    counts, means, shares_right = _bin(of_width, confidence, is_right, num_bins)
    return {
        "ece": _expected_error(counts, means, shares_right),
        "ece_equal_mass": _expected_error(*_bin(of_mass, confidence, is_right, num_bins)),
        "nll": compute_nll(logits, labels, temperature=temperature),
        "brier": brier,
        "reliability": [
            {
                "low": float(edges[k]),
                "high": float(edges[k + 1]),
                "count": int(counts[k]),
                "confidence": float(means[k]),
                "accuracy": float(shares_right[k]),
            }
            for k in np.flatnonzero(counts)
        ],
    }


def _bin(
    places: np.ndarray, confidence: np.ndarray, is_right: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the count, the mean confidence and the accuracy of each bin."""
    counts = np.bincount(places, minlength=num_bins)
    divisor = np.maximum(counts, 1)
    sums = (np.bincount(places, weights=values, minlength=num_bins) for values in (confidence, is_right))
    means, shares_right = (each / divisor for each in sums)
    return counts, means, shares_right


def _expected_error(counts: np.ndarray, means: np.ndarray, shares_right: np.ndarray) -> float:
    return float((counts * np.abs(means - shares_right)).sum() / counts.sum())


def compute_nll(logits: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0) -> float:
    """Returns the negative log-likelihood in nats: of the true class, or the mean over labels where there are several.

    Args: as for `compute_calibration`.
    """
    from scipy.special import log_softmax

    scaled = np.asarray(logits, "float64") / temperature
    if labels.ndim == 2:
        return float((np.logaddexp(0, scaled) - labels.astype(bool) * scaled).mean())
    return float(-log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature that gives images they were not trained on the least negative log-likelihood.

    The likelihood is convex in 1 / temperature, so its slope has one root at most, which is found to 1e-10.

    Args:
        logits: (N, K) of validation images.
        labels: (N,) integers in [0, K); or bool (N, K): one temperature for all labels, on their mean cross-entropy.

    Returns:
        The temperature, between 0.05 and 20.

    Raises:
        DataError: If N is 0, or no temperature in that range is best: all answers are right, or no better than chance.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2. Difference: an exact root, no descent.
    """
    _check(logits, labels)
    found = _find_temperature(logits, labels)
    if isinstance(found, str):
        raise DataError(
            f"Cannot fit a temperature. Expected one between {_COLDEST:g} and {_HOTTEST:g} to be best. "
            f"Received: {found}. Use more validation images, or leave the temperature at 1."
        )
    return found


def _find_temperature(logits: np.ndarray, labels: np.ndarray) -> float | str:
    """Returns the best temperature, or why there is none."""
    from scipy.optimize import brentq
    from scipy.special import expit, softmax

    wide = np.asarray(logits, "float64")
    if labels.ndim == 2:
        truth = labels.astype(bool)

        def slope(sharpness: float) -> float:
            return float((wide * (expit(sharpness * wide) - truth)).mean())

    else:
        at_truth = wide[np.arange(len(labels)), labels]

        def slope(sharpness: float) -> float:
            return float(((softmax(sharpness * wide, axis=1) * wide).sum(axis=1) - at_truth).mean())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if slope(low) >= 0:
        return "answers no better than chance"
    if slope(high) <= 0:
        return "answers of which (nearly) all are right"
    return 1 / float(brentq(slope, low, high, xtol=1e-12, rtol=1e-10))


def calibrate(
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    fitted_on: str = "val",
    min_examples: int = MIN_EXAMPLES,
) -> dict[str, Any]:
    """Fits a temperature on validation images and says what it does to every split.

    Args:
        answers: (logits, labels) of splits by name, such as `"val"` and `"test"`.
        fitted_on: The split to fit on.
        min_examples: Images that it must have.

    Returns:
        A dict fit for JSON: `temperature` (1.0 where none was fitted), `is_fitted`, `reason` (why not, else None),
        `fitted_on`, `num_examples` (of that split), `thresholds` (by wanted accuracy, see `choose_threshold`, chosen on
        that split after the temperature) and, by name of the split, `before` and `after`: see `compute_calibration`.
        What stands under `fitted_on` is flattered by the fit.

    Raises:
        ConfigError: If `fitted_on` is `"train"`: a model is surer of images that it has seen than of others, so that a
            temperature fitted on them would be wrong for all others.
    """
    if fitted_on == "train":
        raise ConfigError(
            "Cannot calibrate. Expected images that the model was not trained on. Received: fitted_on='train'. "
            "Pass validation images."
        )
    logits, labels = answers.get(fitted_on, (np.zeros((0, 1)), np.zeros(0, int)))
    temperature, reason = 1.0, None
    if len(labels) < min_examples:
        reason = f"{len(labels)} {fitted_on} images, fewer than {min_examples}"
    elif isinstance(found := _find_temperature(logits, labels), str):
        reason = found
    else:
        temperature = found
    thresholds: dict[str, Any] = {}
    if len(labels) >= min_examples:
        is_multi_label = labels.ndim == 2
        shares = to_probabilities(logits, is_multi_label=is_multi_label, temperature=temperature)
        confidence = get_confidence(shares, is_multi_label=is_multi_label)
        is_right = get_is_right(logits, labels)
        thresholds = {f"{target:g}": choose_threshold(confidence, is_right, target) for target in TARGETS}
    splits = {
        name: {
            "before": compute_calibration(*pair),
            "after": compute_calibration(*pair, temperature=temperature),
        }
        for name, pair in answers.items()
        if len(pair[1])
    }
    return {
        "temperature": temperature,
        "is_fitted": reason is None,
        "reason": reason,
        "fitted_on": fitted_on,
        "num_examples": len(labels),
        "thresholds": thresholds,
        **splits,
    }


def describe_calibration(calibration: Mapping[str, Any]) -> str:
    """Returns what `calibrate` returned in one line."""
    if not calibration["is_fitted"]:
        return f"no temperature fitted: {calibration['reason']}"
    text = (
        f"temperature {calibration['temperature']:.3f}, fitted on {calibration['num_examples']:,} "
        f"{calibration['fitted_on']} images"
    )
    split = next((name for name in ("test", calibration["fitted_on"]) if name in calibration), None)
    if split:
        before, after = (calibration[split][when] for when in ("before", "after"))
        text += (
            f"; {split} calibration error {before['ece']:.2%} before, {after['ece']:.2%} after; "
            f"negative log-likelihood {before['nll']:.3f} before, {after['nll']:.3f} after"
        )
    return text


# ----- selective prediction


def compute_selection(confidence: np.ndarray, is_right: np.ndarray, *, num_points: int = 101) -> dict[str, Any]:
    """Computes how accurate the answers are if only the surest are given.

    Args:
        confidence: (N,): how sure each answer is.
        is_right: bool (N,).
        num_points: Points of the curve, at most.

    Returns:
        A dict fit for JSON: `aurc`, the area under the curve of error against coverage, in [0, 1] (0 is best; an order
        by chance has the plain error); `aurc_best`, that of an order which puts all right answers first; and `curve`, a
        list with `coverage`, `accuracy` and `threshold`, coverage rising to 1.

    Raises:
        DataError: If N is 0.

    Source: the curve, Geifman and El-Yaniv 2017, https://arxiv.org/abs/1705.08500; the area under it, Geifman et al.
    2018, https://arxiv.org/abs/1805.08206. Difference: answers of equal confidence count as one step, in which errors
    are spread evenly.
    """
    confidence, is_right = np.asarray(confidence), np.asarray(is_right, bool)
    if not len(confidence):
        raise DataError("Cannot compute the curve. Expected one or more answers. Received: none. Pass labelled images.")
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    total = len(ranked)
    num_right = np.cumsum(is_right[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of each confidence
    answered = last + 1
    accuracy = num_right[last] / answered
    # Inside a step of equal confidences, what an order by chance would give: the line between its ends.
    smooth = np.interp(np.arange(1, total + 1), np.append(0, answered), np.append(0, num_right[last]))
    places = np.arange(1, total + 1)
    best = np.maximum(0, places - is_right.sum()) / places
    shown = np.unique(np.linspace(0, len(last) - 1, min(num_points, len(last))).astype(int))
    return {
        "aurc": float((1 - smooth / places).mean()),
        "aurc_best": float(best.mean()),
        "curve": [
            {
                "coverage": float(answered[k] / total),
                "accuracy": float(accuracy[k]),
                "threshold": float(ranked[last[k]]),
            }
            for k in shown
        ],
    }


def choose_threshold(
    confidence: np.ndarray, is_right: np.ndarray, accuracy: float, *, min_answered: int = 20
) -> dict[str, float] | None:
    """Finds the lowest threshold from which on the answers have a wanted accuracy.

    Args:
        confidence: (N,): how sure each answer is.
        is_right: bool (N,).
        accuracy: Wanted, in (0, 1].
        min_answered: Answers that must be left: an accuracy of fewer says little.

    Returns:
        `threshold`, and the `coverage` and `accuracy` of the answers at or above it; 0 where all answers together are
        that accurate, None where no threshold is enough. On other images both will differ: choose on validation
        images, measure on test images.

    Raises:
        ConfigError: If the accuracy is not in (0, 1].
        DataError: If N is 0.
    """
    if not 0 < accuracy <= 1:
        raise ConfigError(
            f"Cannot choose a threshold. Expected an accuracy in (0, 1]. Received: accuracy={accuracy}. "
            "Pass for example 0.95."
        )
    curve = compute_selection(confidence, is_right, num_points=len(confidence))["curve"]
    found = [p for p in curve if p["accuracy"] >= accuracy and p["coverage"] * len(confidence) >= min_answered - 0.5]
    if not found:
        return None
    return found[-1] if found[-1]["coverage"] < 1 else {**found[-1], "threshold": 0.0}


def measure_threshold(confidence: np.ndarray, is_right: np.ndarray, threshold: float) -> dict[str, Any]:
    """Returns what a threshold does.

    Args:
        confidence: (N,): how sure each answer is.
        is_right: bool (N,).
        threshold: Answers below it are held back.

    Returns:
        `threshold`, `num_answered`, `num_right` (of these), `coverage` and `accuracy` (None without answers).
    """
    is_sure = np.asarray(confidence) >= threshold
    count = int(is_sure.sum())
    return {
        "threshold": threshold,
        "num_answered": count,
        "num_right": int(np.asarray(is_right)[is_sure].sum()),
        "coverage": count / max(len(is_sure), 1),
        "accuracy": float(np.asarray(is_right)[is_sure].mean()) if count else None,
    }


def check_threshold(threshold: float | None) -> None:
    """Raises `ConfigError` for a threshold that is no probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(
            f"Cannot use the threshold. Expected a probability in [0, 1]. Received: threshold={threshold}. "
            "Pass for example 0.8."
        )


def _check(logits: np.ndarray, labels: Sequence[Any] | np.ndarray) -> None:
    if not len(labels) or len(logits) != len(labels):
        raise DataError(
            "Cannot compute calibration. Expected logits of one or more labelled images. "
            f"Received: {len(logits)} rows of logits, {len(labels)} labels. Pass both of the same images."
        )
