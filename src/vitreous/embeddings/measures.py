"""Classifiers on features, and their scores: for one label an image, and for several."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vitreous.embeddings.neighbours import search
from vitreous.evaluation import draw_ranks, wilson_interval

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO
STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # C, of which validation images choose
DEFAULT_STRENGTH = 1e-2  # where there are none, and where labels are few
_NUM_RESAMPLES = 200  # of the bootstrap
_MAX_STEPS = 300  # of the solver; what has not converged by then predicts as well


class Measure(Protocol):
    """How features are judged. Labels are int (N,), or bool (N, K) where an image may have several."""

    name: str

    def evaluate(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Returns how well logits (N, K) answer, in [0, 1]."""
        ...

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Returns `score` in [0, 1], and its `interval` of 95%, of logits (N, K)."""
        ...

    def score_classes(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns a score for each class that some image has, by its name."""
        ...

    def guess(self, bank: np.ndarray, count: int) -> np.ndarray:
        """Returns the logits (count, K) of whoever knows only how frequent each class is in `bank`."""
        ...

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Returns labels as float32 (N, K), 1 where a class applies."""
        ...

    def fit(
        self, features: np.ndarray, labels: np.ndarray, strength: float, others: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Fits a logistic regression of strength C; returns the logits (N, K) of each of some other features."""
        ...


def vote(measure: Measure, bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the votes (Q, K) of the nearest features in the bank, each weighted by exp(cosine / temperature)."""
    similarities, indices = search(bank, queries, min(NEIGHBOURS, len(bank)))
    weights = np.exp((similarities - 1) / TEMPERATURE)  # 1 for the very same: nothing overflows
    shares = measure.encode(labels)
    votes = np.zeros((len(queries), shares.shape[1]), "float32")
    for column in range(indices.shape[1]):  # (Q, k, K) at once would be large
        votes += weights[:, column, None] * shares[indices[:, column]]
    return votes


def choose_strength(
    measure: Measure, features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray
) -> float:
    """Returns the strength C with the best score on validation images; of equals, the smallest."""
    if not len(val_labels):
        return DEFAULT_STRENGTH
    scores = []
    for strength in STRENGTHS:
        (logits,) = measure.fit(features, labels, strength, [val_features])
        scores.append(measure.evaluate(logits, val_labels))
    return STRENGTHS[int(np.argmax(scores))]


class SingleLabel:
    """Accuracy, with Wilson's interval.

    Args:
        class_names: K names.
    """

    name = "accuracy"

    def __init__(self, class_names: Sequence[str]):
        self.class_names = class_names

    def evaluate(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Returns accuracy."""
        return float((logits.argmax(axis=1) == labels).mean())

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Returns accuracy and interval."""
        correct = int((logits.argmax(axis=1) == labels).sum())
        return {"score": correct / len(labels), "interval": list(wilson_interval(correct, len(labels)))}

    def score_classes(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the recall of each class."""
        is_right = logits.argmax(axis=1) == labels
        return {self.class_names[k]: float(is_right[labels == k].mean()) for k in np.unique(labels).tolist()}

    def guess(self, bank: np.ndarray, count: int) -> np.ndarray:
        """Returns how often each class is in the bank."""
        return np.tile(np.bincount(bank, minlength=len(self.class_names)), (count, 1))

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Returns one-hot labels."""
        return np.eye(len(self.class_names), dtype="float32")[labels]

    def fit(
        self, features: np.ndarray, labels: np.ndarray, strength: float, others: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Fits one multinomial regression; a class without an image gets minus infinity."""
        model = _fit(features, labels, strength)
        found = []
        for each in others:
            logits = np.full((len(each), len(self.class_names)), -np.inf)
            logits[:, model.classes_] = model.predict_log_proba(each)
            found.append(logits)
        return found


class MultiLabel:
    """Mean average precision over the labels that some image has, with a bootstrap interval over images.

    Args:
        class_names: K names.
    """

    name = "mean average precision"

    def __init__(self, class_names: Sequence[str]):
        self.class_names = class_names

    def evaluate(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Returns mean average precision."""
        return float(np.mean([*self.score_classes(logits, labels).values()])) if labels.any() else 0.0

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Returns mean average precision and interval."""
        found = labels.any(axis=0)
        if not found.any():
            return {"score": 0.0, "interval": [0.0, 1.0]}
        draws = draw_ranks(logits[:, found], labels[:, found], _NUM_RESAMPLES, np.random.default_rng(0))
        interval = np.nanquantile(draws["mean_average_precision"], (0.025, 0.975)).tolist()
        return {"score": self.evaluate(logits, labels), "interval": interval}

    def score_classes(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the average precision of each label."""
        from sklearn.metrics import average_precision_score

        found = np.flatnonzero(labels.any(axis=0)).tolist()
        return {self.class_names[k]: float(average_precision_score(labels[:, k], logits[:, k])) for k in found}

    def guess(self, bank: np.ndarray, count: int) -> np.ndarray:
        """Returns how often each label is in the bank: the same for every image, so that a label's precision is its
        share.
        """
        return np.tile(bank.mean(axis=0), (count, 1))

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Returns the labels."""
        return labels.astype("float32")

    def fit(
        self, features: np.ndarray, labels: np.ndarray, strength: float, others: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Fits a regression for each label; one that all images have, or none, gets the same logit everywhere."""
        found = [np.zeros((len(each), len(self.class_names))) for each in others]
        for k in np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0)):
            model = _fit(features, labels[:, k], strength)
            for logits, each in zip(found, others, strict=True):
                logits[:, k] = model.decision_function(each)
        return found


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn requires it

    # One thread: the products are small, and on a busy machine threads that wait for each other cost 50 times as much.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=_MAX_STEPS).fit(features, labels)
