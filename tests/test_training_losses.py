"""Every loss against plain NumPy in float64, on whatever backend Keras runs on."""

import keras
import numpy as np
import pytest
from layer_harness import to_numpy

from vitreous.data import ImageSet
from vitreous.errors import ConfigError, UnknownNameError
from vitreous.training.losses import Loss, create_loss
from vitreous.training.recipe import Recipe

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((5, 4))).astype("float32")
LABELS = np.array([0, 3, 1, 1, 2], "int32")
SHARES = np.array([[0.7, 0.3, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0.6, 0, 0.4], [0, 0, 1, 0]], "float32")
TAGS = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "float32")
MASK = np.array([1, 1, 0, 1, 1], "float32")
WEIGHTS = np.array([0.5, 1, 2, 4])
PRIORS = np.log([0.5, 0.3, 0.1, 0.1])


def mean(loss, labels, logits=LOGITS):
    """Returns the loss of the batch."""
    total, weight, _ = (float(to_numpy(value)) for value in loss(logits, labels, MASK))
    return total / weight


def softmax(logits):
    powers = np.exp(logits.astype("float64"))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits.astype("float64")))


def average(losses, weights=1.0):
    return (losses * weights * MASK).sum() / (weights * MASK).sum()


@pytest.mark.parametrize("targets", [np.eye(4)[LABELS], SHARES], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_one_label(targets, smoothing):
    p = softmax(LOGITS + PRIORS)
    costs = -((1 - p) ** 1.5) * np.log(p)
    weights = targets @ WEIGHTS
    losses = (1 - smoothing) * (targets * WEIGHTS * costs).sum(axis=1) / weights + smoothing * costs.mean(axis=1)
    loss = Loss(4, name="focal", focal_gamma=1.5, label_smoothing=smoothing, class_weights=WEIGHTS, log_priors=PRIORS)
    assert mean(loss, targets.astype("float32")) == pytest.approx(average(losses, weights), rel=1e-5)


@pytest.mark.parametrize("targets", [np.eye(4)[LABELS], SHARES], ids=["labels", "mixed"])
def test_yes_or_no_questions_with_one_label(targets):
    """Each image counts as its classes do; smoothing spreads its share over all classes."""
    p, smooth = sigmoid(LOGITS), 0.8 * targets + 0.2 / 4
    losses = -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).mean(axis=1)
    loss = Loss(4, name="binary", label_smoothing=0.2, class_weights=WEIGHTS)
    assert mean(loss, targets.astype("float32")) == pytest.approx(average(losses, targets @ WEIGHTS), rel=1e-5)
    right = (LOGITS.argmax(axis=1) == targets.argmax(axis=1)) @ MASK
    assert float(to_numpy(loss(LOGITS, targets.astype("float32"), MASK)[2])) == right


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_several_labels(smoothing):
    p, smooth = sigmoid(LOGITS + PRIORS), (1 - smoothing) * TAGS + smoothing / 2
    costs = -smooth * (1 - p) ** 2 * np.log(p) - (1 - smooth) * p**2 * np.log(1 - p)
    losses = (costs * np.where(TAGS > 0, WEIGHTS, 1)).mean(axis=1)
    loss = Loss(4, True, name="focal", label_smoothing=smoothing, class_weights=WEIGHTS, log_priors=PRIORS)
    assert mean(loss, TAGS) == pytest.approx(average(losses), rel=1e-5)


@pytest.mark.parametrize(("negative", "positive", "clip"), [(4, 0, 0.05), (2, 1, 0), (0.5, 0.5, 0.2), (0, 0, 0.3)])
def test_asymmetric(negative, positive, clip):
    p = sigmoid(LOGITS)
    shifted = np.maximum(p - clip, 0)
    costs = -TAGS * (1 - p) ** positive * np.log(p) - (1 - TAGS) * shifted**negative * np.log(1 - shifted)
    losses = (costs * np.where(TAGS > 0, WEIGHTS, 1)).mean(axis=1)
    loss = Loss(
        4,
        True,
        name="asymmetric",
        class_weights=WEIGHTS,
        gamma_negative=negative,
        gamma_positive=positive,
        negative_clip=clip,
    )
    assert mean(loss, TAGS) == pytest.approx(average(losses), rel=1e-5)


def test_without_focus_the_losses_are_cross_entropy():
    plain, tags = mean(Loss(4), LABELS), mean(Loss(4, True), TAGS)
    assert mean(Loss(4, name="focal", focal_gamma=0.0), LABELS) == pytest.approx(plain, rel=1e-6)
    assert mean(Loss(4, True, name="binary"), TAGS) == pytest.approx(tags, rel=1e-6)
    assert mean(Loss(4, True, name="focal", focal_gamma=0.0), TAGS) == pytest.approx(tags, rel=1e-6)
    flat = Loss(4, True, name="asymmetric", gamma_negative=0.0, gamma_positive=0.0, negative_clip=0.0)
    assert mean(flat, TAGS) == pytest.approx(tags, rel=1e-6)


def gradient(loss, logits, labels):
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(lambda x: loss(x, labels, MASK)[0])(logits))
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(logits)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = loss(x, labels, MASK)[0]
        return tape.gradient(total, x).numpy()
    import torch

    x = torch.tensor(logits, requires_grad=True)
    loss(x, torch.from_numpy(labels), torch.from_numpy(MASK))[0].backward()
    return x.grad.numpy()


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (Loss(4, name="focal", focal_gamma=0.5), LABELS),
        (Loss(4, True, name="focal", focal_gamma=0.5), TAGS),
        (Loss(4, True, name="asymmetric", gamma_negative=0.5), TAGS),
        (Loss(4, name="binary"), LABELS),
    ],
)
def test_slopes_are_finite_and_right(loss, labels):
    """Also where an answer is surely right or wrong, and where the asymmetric loss leaves an answer alone."""
    for logits in (np.zeros_like(LOGITS), 90 * np.sign(LOGITS), -90 * np.sign(LOGITS)):
        assert np.isfinite(gradient(loss, logits.astype("float32"), labels)).all()
    found = gradient(loss, LOGITS, labels)
    for place in ((0, 0), (0, 3), (1, 1), (4, 2)):
        moved = [LOGITS.copy(), LOGITS.copy()]
        moved[0][place] += 0.01
        moved[1][place] -= 0.01
        high, low = (float(to_numpy(loss(x, labels, MASK)[0])) for x in moved)
        assert found[place] == pytest.approx((high - low) / 0.02, abs=2e-3)
    assert not found[2].any()  # masked


def test_the_loss_of_images():
    images = ImageSet(list("abcdef"), [0, 0, 0, 1, 1, 2], arrays=np.zeros((6, 2, 2, 3), "uint8"))
    shares = np.array([3, 2, 1]) / 6
    loss = create_loss(images, 3, balance="logits", name="binary")
    np.testing.assert_allclose(loss.log_priors, np.log(shares / (1 - shares)))  # of yes or no, one class at a time
    np.testing.assert_allclose(create_loss(images, 3, balance="logits", name="focal").log_priors, np.log(shares))
    assert create_loss(images, 3, balance="weights", name="focal", focal_gamma=3.0).focal_gamma == 3
    with pytest.raises(
        ConfigError, match=r"Expected images with several labels\. Received: one label an image\. Pass loss='focal' or"
    ):
        create_loss(images, 3, name="asymmetric")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"loss": "hinge"}, ConfigError, r"Cannot use loss\. Expected 'cross_entropy', 'binary', 'focal' or 'asym"),
        (
            {"loss": "asymmetric"},
            ConfigError,
            r"Received: loss='asymmetric', label_smoothing=0\.1",
        ),
        (
            {"gamma_positive": 5.0},
            ConfigError,
            r"Received: gamma_negative=4, gamma_positive=5\. Pass for",
        ),
        ({"focal_gamma": -1.0}, ConfigError, r"Cannot use focal_gamma\. Expected 0 to 100\. Received: focal_gamma=-1"),
        ({"negative_clip": 1.0}, ConfigError, r"Cannot use negative_clip\. Expected a value in \[0, 1\)"),
        ({"focal_gama": 1.0}, UnknownNameError, r"Nearest: focal_gamma"),
        ({"distillation": {"temperature": 0.0}}, ConfigError, r"Cannot use temperature of distillation\. Expected a"),
        ({"distillation": {"kind": "firm"}}, ConfigError, r"Cannot use kind\. Expected 'soft' or 'hard'"),
        ({"optimizer": {"trained": "lora-8"}}, ConfigError, r"Expected all, head, lora, or last-N .* trained='lora-8'"),
        ({"optimizer": {"lora_rank": 0}}, ConfigError, r"Cannot use lora_rank\. Expected a value from 1 to"),
        ({"optimizer": {"head_first_fraction": 1.0}}, ConfigError, r"Cannot use head_first_fraction\. .* 0 to 0\.99"),
    ],
)
def test_senseless_options(values, error, message):
    with pytest.raises(error, match=message):
        Recipe.from_dict(values)


def test_changing_to_the_asymmetric_loss_turns_smoothing_off():
    recipe = Recipe().merge({"loss": "asymmetric", "optimizer": {"learning_rate": 1e-4}})
    assert (recipe.optimizer.label_smoothing, recipe.optimizer.learning_rate) == (0, 1e-4)
    with pytest.raises(ConfigError, match=r"Cannot smooth the labels of the asymmetric loss"):
        Recipe().merge({"loss": "asymmetric", "optimizer": {"label_smoothing": 0.1}})
