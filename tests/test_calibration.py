import numpy as np
import pytest

from vitreous.calibration import (
    calibrate,
    check_threshold,
    choose_threshold,
    compute_calibration,
    compute_nll,
    compute_selection,
    describe_calibration,
    fit_temperature,
    get_confidence,
    get_is_right,
    measure_threshold,
    to_probabilities,
)
from vitreous.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def honest():
    """Logits (4000, 5) and labels that follow their probabilities: the best temperature is 1."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((4000, 5))
    shares = to_probabilities(logits, is_multi_label=False)
    return logits, (shares.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)


@pytest.fixture(scope="module")
def honest_labels():
    """The same with several labels an image."""
    rng = np.random.default_rng(1)
    logits = 1.5 * rng.standard_normal((4000, 3))
    return logits, rng.random((4000, 3)) < to_probabilities(logits, is_multi_label=True)


def test_numbers_equal_scikit_learn(honest):
    from sklearn.metrics import brier_score_loss, log_loss

    logits, labels = honest
    shares = to_probabilities(logits, is_multi_label=False)
    found = compute_calibration(logits, labels)
    assert found["nll"] == pytest.approx(log_loss(labels, shares))
    one_vs_rest = sum(brier_score_loss(labels == k, shares[:, k]) for k in range(5))
    assert found["brier"] == pytest.approx(one_vs_rest)
    rng = np.random.default_rng(0)
    logits, truth = rng.standard_normal((300, 4)), rng.random((300, 4)) < 0.4
    found = compute_calibration(logits, truth)
    shares = to_probabilities(logits, is_multi_label=True)
    assert found["brier"] == pytest.approx(brier_score_loss(truth.ravel(), shares.ravel()))
    assert found["nll"] == pytest.approx(log_loss(truth.ravel(), shares.ravel()))


def test_expected_calibration_error_by_hand():
    # Ten answers at 0.9 of which seven are right, and ten at 0.6 of which six are: (10 * 0.2 + 10 * 0) / 20.
    sure = np.log([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    labels = np.array([0] * 7 + [1] * 3 + [0] * 6 + [1] * 4)
    found = compute_calibration(sure, labels, num_bins=10)
    assert found["ece"] == pytest.approx(0.1)
    assert [(b["count"], round(b["accuracy"], 6)) for b in found["reliability"]] == [(10, 0.6), (10, 0.7)]
    assert compute_calibration(sure, labels, num_bins=2)["ece_equal_mass"] == pytest.approx(0.1)
    # One bin of equal width [0.5, 1] holds both: |0.75 - 0.65|
    assert compute_calibration(sure, labels, num_bins=2)["ece"] == pytest.approx(0.1)


def test_bins_of_equal_mass_hold_equally_many_images(honest):
    logits, labels = honest
    honest_error = compute_calibration(logits, labels)
    assert honest_error["ece_equal_mass"] < 0.03 and honest_error["ece"] < 0.03
    sure = compute_calibration(4 * logits, labels)
    assert sure["ece"] > 0.2 and abs(sure["ece"] - sure["ece_equal_mass"]) < 0.02
    assert sum(each["count"] for each in sure["reliability"]) == len(labels)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["honest", "honest_labels"])
def test_the_temperature_undoes_a_factor(request, kind, factor):
    logits, labels = request.getfixturevalue(kind)
    temperature = fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor, rel=0.06)
    best = compute_nll(factor * logits, labels, temperature=temperature)
    around = [compute_nll(factor * logits, labels, temperature=temperature * step) for step in (0.999, 1.001)]
    assert best < min(around)  # a minimum, exact to a thousandth
    assert fit_temperature((factor * logits).astype("float32"), labels) == pytest.approx(temperature, rel=1e-5)


def test_calibration_on_validation_helps_the_test(honest):
    logits, labels = 3 * honest[0], honest[1]
    found = calibrate({"val": (logits[:2000], labels[:2000]), "test": (logits[2000:], labels[2000:])})
    assert found["is_fitted"] and found["reason"] is None and found["num_examples"] == 2000
    for split in ("val", "test"):
        before, after = found[split]["before"], found[split]["after"]
        assert after["ece"] < before["ece"] / 4 and after["nll"] < before["nll"] and after["brier"] < before["brier"]
    text = describe_calibration(found)
    assert text.startswith(
        f"temperature {found['temperature']:.3f}, fitted on 2,000 val images; test calibration error"
    )


def test_no_temperature_where_none_can_be_trusted(honest):
    logits, labels = honest
    few = calibrate({"val": (logits[:49], labels[:49])})
    assert few["temperature"] == 1.0 and not few["is_fitted"] and few["thresholds"] == {}
    assert describe_calibration(few) == "no temperature fitted: 49 val images, fewer than 50"
    assert few["val"]["before"] == few["val"]["after"]
    assert calibrate({"test": (logits, labels)})["reason"] == "0 val images, fewer than 50"
    right = calibrate({"val": (logits, logits.argmax(axis=1))})
    assert right["temperature"] == 1.0 and "(nearly) all are right" in right["reason"]
    chance = np.random.default_rng(0).permutation(labels)
    assert "no better than chance" in calibrate({"val": (-logits, labels)})["reason"]
    assert calibrate({"val": (logits, chance)})["temperature"] >= 1
    with pytest.raises(DataError, match=r"Received: answers of which \(nearly\) all are right\. Use more validation"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(ConfigError, match=r"not trained on\. Received: fitted_on='train'\. Pass validation images\."):
        calibrate({"train": (logits, labels)}, fitted_on="train")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refused_temperatures(honest, temperature):
    with pytest.raises(ConfigError, match=r"Expected a temperature above 0\. Received: temperature="):
        compute_calibration(*honest, temperature=temperature)


def test_refused_data():
    with pytest.raises(DataError, match=r"Received: 0 rows of logits, 0 labels\."):
        compute_calibration(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(DataError, match=r"Received: 2 rows of logits, 3 labels\."):
        fit_temperature(np.zeros((2, 3)), np.zeros(3, int))


def test_extreme_logits_stay_finite():
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0], [0.0, 0.0]])
    found = compute_calibration(logits, np.array([1, 1, 0]))
    assert np.isfinite([found[name] for name in ("ece", "ece_equal_mass", "nll", "brier")]).all()
    found = compute_calibration(logits, np.ones((3, 2), bool))
    assert np.isfinite(found["nll"])


def test_selection_by_hand():
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    is_right = np.array([True, False, True, True])
    found = compute_selection(confidence, is_right)
    assert [p["coverage"] for p in found["curve"]] == [0.25, 0.5, 0.75, 1.0]
    assert [p["accuracy"] for p in found["curve"]] == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found["aurc_best"] == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    # Equal confidences are one step, whatever their order: it has the error of chance.
    same = [compute_selection(np.full(4, 0.5), order) for order in (is_right, is_right[::-1])]
    assert same[0]["aurc"] == same[1]["aurc"] == pytest.approx(0.25)
    assert len(same[0]["curve"]) == 1
    assert choose_threshold(confidence, is_right, 0.7, min_answered=1) == {
        "threshold": 0.0,  # all answers together have it
        "coverage": 1.0,
        "accuracy": 0.75,
    }
    assert choose_threshold(confidence, is_right, 0.9, min_answered=1)["threshold"] == 0.9
    assert choose_threshold(confidence, is_right, 0.9, min_answered=2) is None
    with pytest.raises(ConfigError, match=r"Expected an accuracy in \(0, 1\]\. Received: accuracy=95\."):
        choose_threshold(confidence, is_right, 95.0)
    assert measure_threshold(confidence, is_right, 0.75) == {
        "threshold": 0.75,
        "num_answered": 2,
        "num_right": 1,
        "coverage": 0.5,
        "accuracy": 0.5,
    }
    assert measure_threshold(confidence, is_right, 0.95)["accuracy"] is None
    with pytest.raises(DataError, match="Expected one or more answers"):
        compute_selection(np.zeros(0), np.zeros(0, bool))


def test_a_threshold_keeps_its_promise_on_other_images(honest):
    logits, labels = honest
    confidence = get_confidence(to_probabilities(logits, is_multi_label=False), is_multi_label=False)
    is_right = get_is_right(logits, labels)
    chosen = choose_threshold(confidence[:2000], is_right[:2000], 0.8)
    assert chosen["accuracy"] >= 0.8 > is_right.mean()
    assert measure_threshold(confidence[2000:], is_right[2000:], chosen["threshold"])["accuracy"] > 0.75


def test_confidence_of_several_labels():
    shares = np.array([[0.9, 0.2], [0.6, 0.05]])
    assert get_confidence(shares, is_multi_label=True).tolist() == [0.8, 0.6]
    assert get_is_right(np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[1, 0], [1, 0]], bool)).tolist() == [True, False]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), 80])
def test_refused_thresholds(threshold):
    with pytest.raises(ConfigError, match=r"Expected a probability in \[0, 1\]\. Received: threshold="):
        check_threshold(threshold)
