"""Confident learning: which labels are probably wrong, from a model's probabilities. NumPy alone."""

from dataclasses import dataclass

import numpy as np

from vitreous.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """Labels that a model disputes with confidence, the most disputed first.

    Args:
        indices: Of the examples; int64, (M,).
        suggested: Class that the model is confident of instead; int64, (M,).
        margins: Probability of the given label less that of the suggested class, in [-1, 0); rising; float64, (M,).
        thresholds: Mean probability of each class among the examples labelled so; inf for a class without examples;
            float64, (K,).
        noise_rate: Share of all examples whose label is estimated to be wrong, in [0, 1].
    """

    indices: np.ndarray
    suggested: np.ndarray
    margins: np.ndarray
    thresholds: np.ndarray
    noise_rate: float


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Finds labels that are probably wrong.

    A class is believed of an example if its probability reaches the mean probability that the class has among the
    examples labelled so. An example is disputed if the most probable class that is believed of it is not its label.

    Args:
        probabilities: (N, K), rows sum to 1; best from a model that was not trained on these examples.
        labels: (N,) integers in [0, K): the labels as given.

    Returns:
        `LabelErrors`.

    Raises:
        DataError: If the shapes do not fit, or there are no examples.

    Source: Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", J. Artif.
    Intell. Res. 70: the confident joint of section 3.1 (equations 1 and 2, ties to the more probable class), its
    calibration (equation 3), and off-diagonal members of the joint as errors (section 3.2, method 2), ordered by
    normalised margin.
    """
    labels = np.asarray(labels, "int64")
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise DataError(
            "Cannot look for label errors. Expected probabilities (N, K) and labels (N,) of one or more examples. "
            f"Received: probabilities.shape={probabilities.shape}, labels.shape={labels.shape}. "
            "Pass those of the same examples."
        )
    count, num_classes = probabilities.shape
    rows = np.arange(count)
    own = probabilities[rows, labels].astype("float64")
    sizes = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, own, minlength=num_classes)
    thresholds = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    believed = np.where(probabilities >= thresholds, probabilities, -1.0)  # (N, K)
    answers = believed.argmax(axis=1)
    is_sure = believed[rows, answers] >= 0
    joint = np.bincount(labels[is_sure] * num_classes + answers[is_sure], minlength=num_classes**2)
    joint = joint.reshape(num_classes, num_classes).astype("float64")
    joint[joint.sum(axis=1) == 0] += np.eye(num_classes)[joint.sum(axis=1) == 0]  # nothing known: labels stand
    joint *= (sizes / joint.sum(axis=1))[:, None] / count
    found = np.flatnonzero(is_sure & (answers != labels))
    margins = own[found] - probabilities[found, answers[found]]
    order = np.argsort(margins, kind="stable")
    return LabelErrors(found[order], answers[found][order], margins[order], thresholds, float(1 - joint.trace()))
