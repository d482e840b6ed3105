import numpy as np
import pytest

from vitreous.errors import DataError
from vitreous.label_errors import find_label_errors


def test_finds_flipped_labels_and_no_others():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 800)
    probabilities = np.full((800, 4), 0.05)
    probabilities[np.arange(800), truth] = generator.uniform(0.7, 1, 800)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = truth.copy()
    flipped = generator.choice(800, 40, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 4
    errors = find_label_errors(probabilities, labels)
    assert set(errors.indices) <= set(flipped)
    assert len(errors.indices) > 30
    np.testing.assert_array_equal(errors.suggested, truth[errors.indices])
    assert (np.diff(errors.margins) >= 0).all() and (errors.margins < 0).all()
    assert errors.noise_rate == pytest.approx(0.05, abs=0.015)


def test_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.95, 0.05]])
    labels = np.array([0, 0, 1, 1, 1])
    errors = find_label_errors(probabilities, labels)
    np.testing.assert_allclose(errors.thresholds, [0.8, (0.8 + 0.6 + 0.05) / 3])
    assert errors.indices.tolist() == [4]
    assert errors.suggested.tolist() == [0]
    np.testing.assert_allclose(errors.margins, [-0.9])
    # joint: label 0 is sure once (example 0), label 1 twice of itself and once of 0; rows sum to 2/5 and 3/5
    assert errors.noise_rate == pytest.approx(1 - (2 / 5 + 3 / 5 * 2 / 3))


def test_an_unsure_model_disputes_nothing():
    """A class that is always likely has a high threshold, so being the answer is not enough to dispute."""
    probabilities = np.array([[0.6, 0.4], [0.62, 0.38], [0.55, 0.45], [0.5, 0.5]])
    errors = find_label_errors(probabilities, np.array([0, 0, 1, 1]))
    assert errors.indices.tolist() == []  # class 0 is the answer everywhere, below its threshold of 0.61 for label 1


def test_class_without_examples():
    probabilities = np.array([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    errors = find_label_errors(probabilities, np.array([0, 0, 1]))
    assert errors.thresholds[2] == np.inf
    assert 2 not in errors.suggested


def test_wrong_shapes():
    with pytest.raises(DataError, match=r"Received: probabilities.shape=\(2, 2\), labels.shape=\(3,\)"):
        find_label_errors(np.ones((2, 2)), np.zeros(3, int))
    with pytest.raises(DataError, match="one or more examples"):
        find_label_errors(np.ones((0, 2)), np.zeros(0, int))
