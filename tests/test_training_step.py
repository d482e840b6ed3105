"""One training step against plain NumPy and a plain AdamW, on whatever backend Keras runs on."""

import keras
import numpy as np
import pytest
from layer_harness import to_numpy

from vitreous.data import Batch, ImageSet
from vitreous.errors import ConfigError
from vitreous.model import VisionTransformer, normalize_images
from vitreous.spec import InputSpec, ViTConfig
from vitreous.training.losses import Loss, create_loss
from vitreous.training.optimizer import create_optimizer, get_depth, is_decayed, is_muon, orthogonalize
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.step import create_step

SPEC = InputSpec(image_size=8)


def create(changes=None, *, dtype=None, config=None, loss=None, num_parts=1):
    vit = ViTConfig(
        image_size=8,
        patch_size=4,
        projection_dim=16,
        num_heads=2,
        num_classes=3,
        **{"num_blocks": 1, **(changes or {})},
    )
    config = config or OptimizerConfig()
    model, average = (VisionTransformer(vit, dtype=dtype) for _ in range(2))
    loss = loss or Loss(num_classes=3, label_smoothing=config.label_smoothing)
    return create_step(model, average, create_optimizer(model, config), input_spec=SPEC, loss=loss, num_parts=num_parts)


def batch(seed=0, size=6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size).astype("int32")
    images = rng.integers(0, 60, (size, 8, 8, 3)).astype("uint8")
    images[np.arange(size), labels * 2] += 150  # one row of pixels tells the class
    mask = np.ones(size, bool)
    return Batch(images=images, labels=labels, mask=mask, indices=np.arange(size))


def weights(model):
    return [to_numpy(v).copy() for v in model.trainable_variables]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def compute(loss, *arguments):
    """Returns the mean loss and the number of right answers."""
    total, weight, correct = (float(to_numpy(value)) for value in loss(*arguments))
    return [total / max(weight, 1e-12), correct]


LOGITS = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
LABELS, MASK = np.array([0, 2, 1, 1], "int32"), np.array([1, 1, 0, 1], "float32")


def test_loss_is_the_smoothed_cross_entropy_of_the_mask():
    targets = np.eye(3)[LABELS] * 0.9 + 0.1 / 3
    losses = -(targets * log_softmax(LOGITS)).sum(axis=1)
    right = (LOGITS.argmax(axis=1) == LABELS) @ MASK
    loss = Loss(num_classes=3, label_smoothing=0.1)
    assert compute(loss, LOGITS, LABELS, MASK) == pytest.approx([(losses * MASK).sum() / MASK.sum(), right], abs=1e-6)
    assert compute(loss, LOGITS, LABELS, 0 * MASK) == [0, 0]


def test_targets_of_mixed_images_are_shares():
    targets = np.array([[0.7, 0.3, 0], [0, 0, 1], [1, 0, 0], [0, 0.4, 0.6]], "float32")
    expected = -(targets * log_softmax(LOGITS)).sum(axis=1) @ MASK / MASK.sum()
    right = (LOGITS.argmax(axis=1) == targets.argmax(axis=1)) @ MASK
    assert compute(Loss(num_classes=3), LOGITS, targets, MASK) == pytest.approx([expected, right], abs=1e-6)


def test_class_weights_make_classes_count_alike():
    images = ImageSet(list("abcdef"), [0, 0, 0, 1, 1, 2], arrays=np.zeros((6, 2, 2, 3), "uint8"))
    loss = create_loss(images, 3, balance="weights")
    np.testing.assert_allclose(loss.class_weights, [6 / 9, 1, 2])
    each = -log_softmax(LOGITS)[np.arange(4), LABELS]
    weights = loss.class_weights[LABELS] * MASK
    assert compute(loss, LOGITS, LABELS, MASK)[0] == pytest.approx(each @ weights / weights.sum(), abs=1e-6)


def test_class_weights_go_with_the_shares_of_mixed_images():
    loss = Loss(num_classes=2, class_weights=np.array([2 / 3, 2.0]))
    logits, targets = np.array([[2.0, 0.0], [0.5, 1.0]], "float32"), np.array([[0.5, 0.5], [0, 1]], "float32")
    losses = -(targets * loss.class_weights * log_softmax(logits)).sum()
    assert compute(loss, logits, targets, np.ones(2, "float32"))[0] == pytest.approx(losses / (4 / 3 + 2), abs=1e-6)


def test_logit_adjustment_adds_log_frequencies():
    images = ImageSet(list("abcdef"), [0, 0, 0, 1, 1, 2], arrays=np.zeros((6, 2, 2, 3), "uint8"))
    shifted = log_softmax(LOGITS + np.log([3 / 6, 2 / 6, 1 / 6]))
    expected = -shifted[np.arange(4), LABELS] @ MASK / MASK.sum()
    right = (LOGITS.argmax(axis=1) == LABELS) @ MASK  # answers are those without the adjustment
    loss = create_loss(images, 3, balance="logits")
    assert compute(loss, LOGITS, LABELS, MASK) == pytest.approx([expected, right], abs=1e-6)


def test_several_labels_are_questions_of_their_own():
    targets = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], bool)
    images = ImageSet(list("abcd"), targets, arrays=np.zeros((4, 2, 2, 3), "uint8"))
    sigmoid = 1 / (1 + np.exp(-LOGITS.astype("float64")))
    for balance, positive in (("none", np.ones(3)), ("weights", np.array([1.0, 1.0, 1.0]))):
        smooth = targets * 0.9 + 0.05
        losses = -smooth * np.log(sigmoid) - (1 - smooth) * np.log(1 - sigmoid)
        losses = (losses * np.where(targets, positive, 1)).mean(axis=1)
        right = ((LOGITS > 0) == targets).mean(axis=1) @ MASK
        loss = create_loss(images, 3, balance=balance, label_smoothing=0.1)
        expected = [losses @ MASK / MASK.sum(), right]
        assert compute(loss, LOGITS, targets.astype("float32"), MASK) == pytest.approx(expected, abs=1e-6)
    rare = images.take([0, 3, 3, 3])
    np.testing.assert_allclose(create_loss(rare, 3, balance="weights").class_weights, [3, 1 / 3, 3])
    np.testing.assert_allclose(create_loss(rare, 3, balance="logits").log_priors, np.log([1 / 3, 3, 1 / 3]))


def test_one_step_is_adamw_with_decay_on_kernels_only():
    """At AdamW's first step each weight moves by rate * sign(gradient), and decayed ones shrink by rate * decay."""
    rate = 1e-3
    step = create({"num_blocks": 2}, config=OptimizerConfig(weight_decay=0.5, clip_norm=0.0))
    before = weights(step.model)
    step(batch(), learning_rate=rate, decay=0.0)
    step.synchronize()
    paths = [v.path.split("/", 1)[1] for v in step.model.trainable_variables]
    for path, old, new in zip(paths, before, weights(step.model), strict=True):
        is_decayed = path.endswith("kernel")
        moved = new - old * (1 - rate * 0.5 * is_decayed)
        assert np.abs(moved).max() <= rate * 1.01, path
        if path.startswith("head"):  # the only gradient at the start that no zero head hides
            assert np.abs(moved).max() >= rate * 0.9, path
    assert sum(p.endswith("kernel") for p in paths) == 1 + 2 * 4 + 1


def test_the_average_follows_the_weights():
    step = create()
    start = weights(step.average)
    np.testing.assert_array_equal(start[0], weights(step.model)[0])
    expected = start
    for decay in (0.0, 0.5, 0.9):
        step(batch(), learning_rate=1e-2, decay=decay)
        step.synchronize()
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights(step.model), strict=True)]
        for a, b in zip(weights(step.average), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_reported_loss_and_count_are_those_of_the_model():
    step = create()
    b = batch()
    b.mask[-1] = False
    logits = step.model(normalize_images(b.images, SPEC))
    expected = compute(step.loss, logits, b.labels, b.mask.astype("float32"))[0]
    right = (to_numpy(logits).argmax(axis=1) == b.labels)[b.mask].sum()
    loss, correct = step(b, learning_rate=1e-3, decay=0.9)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert int(correct) == right


def test_masked_examples_have_no_influence():
    results = []
    for fill in (0, 200):
        keras.utils.set_random_seed(3)
        step = create()
        b = batch()
        b.mask[-2:] = False
        b.images[-2:] = fill
        step(b, learning_rate=1e-2, decay=0.0)
        step.synchronize()
        results.append(weights(step.model))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16"])
def test_learns(dtype):
    keras.utils.set_random_seed(0)
    step = create({"dropout_rate": 0.1, "stochastic_depth_rate": 0.1}, dtype=dtype)
    losses = [float(step(batch(i, 32), learning_rate=5e-3, decay=0.9)[0]) for i in range(60)]
    assert np.mean(losses[:3]) == pytest.approx(np.log(3), abs=0.15)
    assert np.mean(losses[-3:]) < 0.65  # smoothed targets leave at least 0.29
    assert all(np.isfinite(losses))


def test_clipping_bounds_the_step_of_large_gradients():
    """With momentum off the update is scale-free, so clipping shows in the second moment that AdamW keeps."""
    norms = []
    for clip in (0.0, 1e-3):
        keras.utils.set_random_seed(0)
        step = create(config=OptimizerConfig(clip_norm=clip))
        step(batch(), learning_rate=1e-3, decay=0.0)
        step.synchronize()
        velocity = [to_numpy(v) for v in step.optimizer.slots if v.path.startswith("v_")]
        assert len(velocity) == len(step.optimizer.variables)
        norms.append(np.sqrt(sum(v.sum() for v in velocity) / (1 - 0.99)))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=0.05)


def adamw(w, gradients, rate, decay, beta_2):
    """AdamW by the book, in float64."""
    m = v = np.zeros_like(w)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, beta_2 * v + (1 - beta_2) * g * g
        w = w - rate * decay * w
        w = w - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - beta_2**step)) + 1e-8)
    return w


def waves(weight):
    return np.cos(np.arange(weight.size)).reshape(weight.shape)


def move(config, gradients, rate=1e-2):
    """Returns paths, weights before and after some steps with given gradients."""
    model = create({"num_blocks": 2}, config=config).model
    optimizer = create_optimizer(model, config)
    before = weights(model)
    values, slots = (
        [keras.ops.convert_to_tensor(to_numpy(v).copy()) for v in vs]
        for vs in (model.trainable_variables, optimizer.slots)
    )
    for scale in gradients:
        given = [keras.ops.convert_to_tensor((scale * waves(w)).astype("float32")) for w in before]
        values, slots = optimizer.apply(given, values, slots, rate)
    return optimizer, before, [to_numpy(v) for v in values]


def test_adamw_by_the_book():
    config = OptimizerConfig(weight_decay=0.3, clip_norm=0.0, layer_decay=0.5)
    optimizer, before, after = move(config, (1.0, -0.5, 2.0))
    depths = set()
    for variable, old, new in zip(optimizer.variables, before, after, strict=True):
        depth = get_depth(variable.path, 2)
        depths.add(depth)
        gradients = [scale * waves(old) for scale in (1.0, -0.5, 2.0)]
        decay = 0.3 if is_decayed(variable.path) else 0.0
        expected = adamw(old.astype("float64"), gradients, 1e-2 * 0.5 ** (3 - depth), decay, 0.99)
        np.testing.assert_allclose(new, expected, atol=2e-6, err_msg=variable.path)
    assert depths == {0, 1, 2, 3}


def test_orthogonalize_leaves_singular_values_near_one():
    rng = np.random.default_rng(0)
    for shape in ((16, 16), (16, 64), (64, 16)):
        matrix = rng.standard_normal(shape).astype("float32")
        result = to_numpy(orthogonalize(keras.ops.convert_to_tensor(matrix))) / (0.2 * max(shape) ** 0.5)
        values = np.linalg.svd(result, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        assert (result * (u @ v)).sum() / np.sqrt((result**2).sum() * min(shape)) > 0.97  # the same directions


def test_orthogonalize_takes_a_convolution_as_one_matrix_and_parts_by_themselves():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 4, 24)).astype("float32")
    convert = keras.ops.convert_to_tensor
    flat = to_numpy(orthogonalize(convert(kernel.reshape(36, 24))))
    np.testing.assert_array_equal(to_numpy(orthogonalize(convert(kernel))), flat.reshape(kernel.shape))
    parts = [to_numpy(orthogonalize(convert(part))) for part in np.split(flat, 3, axis=1)]
    np.testing.assert_allclose(to_numpy(orthogonalize(convert(flat), 3)), np.concatenate(parts, axis=1), atol=1e-5)
    assert is_muon("vit/stem/convolution_0/kernel") and not is_muon("vit/stem/norm_0/gamma")
    assert is_muon("vit/patch_encoder/projection/kernel") and not is_muon("vit/patch_encoder/class_token")
    assert not is_muon("vit/head/kernel") and not is_muon("vit/attention_pool/qkv/kernel")


def test_muon_moves_the_matrices_before_the_head():
    config = OptimizerConfig(name="muon", weight_decay=0.3, clip_norm=0.0)
    optimizer, before, after = move(config, (1.0, -0.5))
    paths = [v.path for v in optimizer.variables]
    assert sum(map(is_muon, paths)) == 1 + 2 * 4 and not any(is_muon(p) for p in paths if "head" in p)
    for path, old, new in zip(paths, before, after, strict=True):
        gradients = [scale * waves(old) for scale in (1.0, -0.5)]
        if not is_muon(path):
            expected = adamw(old.astype("float64"), gradients, 1e-2, 0.3 * is_decayed(path), 0.99)
        else:
            expected, m = old, 0
            for g in gradients:
                m = 0.95 * m + g
                parts = 3 if path.endswith("qkv/kernel") else 1
                update = to_numpy(orthogonalize(keras.ops.convert_to_tensor((g + 0.95 * m).astype("float32")), parts))
                expected = expected * (1 - 1e-2 * 0.3) - 1e-2 * update
        np.testing.assert_allclose(new, expected, atol=1e-5, err_msg=path)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the form in place is torch's")
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_the_form_in_place_equals_the_pure_one(name, clip_norm):
    config = OptimizerConfig(name=name, clip_norm=clip_norm, weight_decay=0.3, layer_decay=0.7)
    model = create({"num_blocks": 2}, config=config).model
    optimizer = create_optimizer(model, config)
    results = []
    for apply in (optimizer._apply, optimizer._apply_in_place):
        draw = np.random.default_rng(1)
        values, slots = (
            [keras.ops.convert_to_tensor(to_numpy(v).copy()) for v in variables]
            for variables in (model.trainable_variables, optimizer.slots)
        )
        for rate in (1e-2, 2e-2, 5e-3):
            given = [keras.ops.convert_to_tensor(draw.standard_normal(v.shape).astype("float32")) for v in values]
            values, slots = apply(given, values, slots, rate)
        results.append([to_numpy(v) for v in (*values, *slots)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_muon_learns():
    keras.utils.set_random_seed(0)
    step = create(config=OptimizerConfig(name="muon"))
    losses = [float(step(batch(i, 32), learning_rate=5e-3, decay=0.9)[0]) for i in range(60)]
    assert np.mean(losses[-3:]) < 0.65


def test_parts_of_a_batch_make_the_step_of_the_whole():
    results = []
    for num_parts in (1, 2, 3):
        keras.utils.set_random_seed(3)
        step = create(num_parts=num_parts)
        b = batch()
        b.mask[1] = False  # so that the parts weigh differently
        step.model.head.kernel.assign(np.random.default_rng(0).standard_normal((16, 3)))
        loss, correct = step(b, learning_rate=1e-2, decay=0.5)
        step.synchronize()
        # m is a tenth of the gradient; weights would not do: AdamW's first step blows up gradients of nearly 0
        results.append([np.array(float(loss)), np.array(float(correct)), *map(to_numpy, step.optimizer.slots)])
    assert max(np.abs(value).max() for value in results[0][3:]) > 1e-3
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ConfigError, match=r"Received: batch_size=6, num_parts=4\."):
        create(num_parts=4)(batch(), learning_rate=1e-2, decay=0.5)


@pytest.mark.parametrize(("trained", "count"), [("head", 2), ("last-1", 2 + 2 + 12)])
def test_weights_that_stay(trained, count):
    step = create({"num_blocks": 2}, config=OptimizerConfig(trained=trained))
    before = [to_numpy(v).copy() for v in step.model.weights]
    for i in range(2):  # the head is zero at first, and hides what is behind it
        step(batch(i), learning_rate=1e-2, decay=0.5)
    step.synchronize()
    paths = [weight.path.split("/")[1] for weight in step.model.weights]
    for model in (step.model, step.average):
        moved = [
            path
            for path, old, new in zip(paths, before, model.weights, strict=True)
            if not np.array_equal(old, to_numpy(new))
        ]
        assert len(model.trainable_variables) == len(moved) == count
        assert set(moved) <= {"head", "norm", "block_1"}
