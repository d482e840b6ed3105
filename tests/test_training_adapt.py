"""Low-rank updates, the head first, and learning from a teacher, step by step, on whatever backend Keras runs on."""

import numpy as np
import pytest
from layer_harness import to_numpy
from PIL import Image

from vitreous.data import Batch
from vitreous.errors import ConfigError
from vitreous.model import VisionTransformer, normalize_images
from vitreous.spec import InputSpec, ViTConfig
from vitreous.training.distillation import DistillationLoss, Teacher
from vitreous.training.losses import Loss
from vitreous.training.optimizer import create_optimizer, is_head
from vitreous.training.recipe import DistillationConfig, OptimizerConfig
from vitreous.training.step import create_step

SPEC = InputSpec(image_size=8)
VIT = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_classes=3)
RNG = np.random.default_rng(0)


def create_model(config=VIT, *, seed=0):
    """Returns a model in which nothing is zero."""
    model = VisionTransformer(config)
    rng = np.random.default_rng(seed)
    model.set_weights([rng.standard_normal(w.shape) * 0.3 for w in model.get_weights()])
    return model


def create(config=None, *, vit=VIT, loss=None, num_parts=1):
    model, average = create_model(vit), VisionTransformer(vit)
    config = config or OptimizerConfig(weight_decay=0.0)
    optimizer = create_optimizer(model, config, seed=1)
    loss = loss or Loss(3)
    return create_step(model, average, optimizer, input_spec=SPEC, loss=loss, num_parts=num_parts)


def batch(seed=0, size=4):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 8, 8, 3)).astype("uint8")
    labels = rng.integers(0, 3, size).astype("int32")
    return Batch(images=images, labels=labels, mask=np.ones(size, bool), indices=np.arange(size))


def values(model):
    return {v.path.split("/", 1)[1]: to_numpy(v).copy() for v in model.weights}


def inputs(images):
    return normalize_images(images, SPEC)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_low_rank_updates(layers):
    config = OptimizerConfig(trained="lora", lora_rank=2, lora_alpha=4.0, lora_layers=layers, clip_norm=0.0)
    step = create(config)
    before = values(step.average)
    images = inputs(batch().images)
    np.testing.assert_allclose(to_numpy(step.model(images)), to_numpy(step.average(images)), atol=1e-5)
    expected, products = {}, {}
    for i, decay in enumerate((0.0, 0.5)):
        step(batch(i), learning_rate=0.05, decay=decay)
        step.synchronize()
        own = values(step.model)
        for path in before:
            name = path.removesuffix("kernel")
            product = 0.0
            if f"{name}lora_kernel_a" in own:
                product = 2 * own[f"{name}lora_kernel_a"] @ own[f"{name}lora_kernel_b"]
                np.testing.assert_array_equal(own[path], before[path])  # what is under an update stays
                products[path] = product
            expected[path] = decay * expected.get(path, 0) + (1 - decay) * (own[path] + product)
        if not decay:  # the plain model answers as the one with updates
            np.testing.assert_allclose(to_numpy(step.model(images)), to_numpy(step.average(images)), atol=1e-5)
    for path, value in values(step.average).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6, err_msg=path)
    names = ["attention/qkv", "attention/projection"] + ["mlp/hidden", "mlp/output"] * (layers == "all")
    assert set(products) == {f"block_0/{name}/kernel" for name in names}
    assert all(np.linalg.matrix_rank(product) == 2 and np.abs(product).max() > 1e-3 for product in products.values())
    moved = {path for path, old in before.items() if not np.array_equal(old, values(step.average)[path])}
    assert moved == {*products, "head/kernel", "head/bias"}
    sizes = {"attention/qkv": 16 + 48, "attention/projection": 32, "mlp/hidden": 16 + 64, "mlp/output": 64 + 16}
    trained = sum(np.prod(variable.shape) for variable in step.optimizer.variables)
    assert trained == 2 * sum(sizes[name] for name in names) + 16 * 3 + 3


def test_the_seed_decides_low_rank_updates():
    config = OptimizerConfig(trained="lora", lora_rank=100)
    first, again, other = (create_optimizer(create_model(), config, seed=seed).updates for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(to_numpy(a.down), to_numpy(b.down))
        assert np.abs(to_numpy(a.down) - to_numpy(c.down)).max() > 0.01
        assert a.down.shape[1] == min(a.kernel.shape)  # a higher rank would say nothing more
        assert not to_numpy(a.up).any()


def test_more_blocks_than_there_are():
    with pytest.raises(ConfigError, match=r"Expected at most its 1 blocks\. Received: trained='last-2'\."):
        create_optimizer(create_model(), OptimizerConfig(trained="last-2"))


def test_the_head_first():
    step = create()
    start = values(step.model)
    for rate, is_moved in ((0.0, is_head), (1e-2, lambda path: True)):
        step(batch(), learning_rate=1e-2, decay=0.0, body_rate=rate)
        step.synchronize()
        now = values(step.model)
        assert {path for path in start if not np.array_equal(now[path], start[path])} == set(filter(is_moved, start))


def log_softmax(x):
    x = x.astype("float64")
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


LABELS, MASK = np.array([0, 2, 1, 1], "int32"), np.array([1, 1, 0, 1], "float32")
HEADS, ANSWERS = RNG.standard_normal((2, 4, 3)).astype("float32"), 3 * RNG.standard_normal((4, 3)).astype("float32")


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_distillation_by_the_book(kind, is_mixed):
    config = DistillationConfig(kind=kind, temperature=3.0, weight=0.3)
    targets = np.eye(3)[LABELS] * 0.6 + 0.4 * np.eye(3)[LABELS[::-1]] if is_mixed else np.eye(3)[LABELS]
    weights = targets @ np.array([1.0, 2.0, 0.5])
    own = -(targets * [1.0, 2.0, 0.5] * log_softmax(HEADS[0])).sum(axis=1)
    wanted = np.eye(3)[ANSWERS.argmax(axis=1)]
    taught = -(wanted * log_softmax(HEADS[1])).sum(axis=1)
    if kind == "soft":
        p, q = log_softmax(ANSWERS / 3), log_softmax(HEADS[1] / 3)
        taught = 9 * (np.exp(p) * (p - q)).sum(axis=1)
    losses = 0.7 * own + 0.3 * taught * weights
    right = (HEADS.mean(axis=0).argmax(axis=1) == targets.argmax(axis=1)) @ MASK
    loss = DistillationLoss(Loss(3, class_weights=np.array([1.0, 2.0, 0.5])), config, teacher=None)
    labels = targets.astype("float32") if is_mixed else LABELS
    found = [float(to_numpy(value)) for value in loss(tuple(HEADS), labels, MASK, ANSWERS)]
    assert found == pytest.approx([losses @ MASK, weights @ MASK, right], rel=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_of_several_labels(kind):
    targets = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], "float32")
    temperature = 2.0 if kind == "soft" else 1.0
    loss = DistillationLoss(Loss(3, True), DistillationConfig(kind=kind, weight=1.0), teacher=None)
    p, q = (1 / (1 + np.exp(-x.astype("float64") / temperature)) for x in (ANSWERS, HEADS[0]))
    if kind == "hard":
        wanted = ANSWERS > 0
        expected = -(wanted * np.log(q) + (1 - wanted) * np.log(1 - q)).mean(axis=1)
    else:
        expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=1)
    found = float(to_numpy(loss(HEADS[:1], targets, MASK, ANSWERS)[0]))
    assert found == pytest.approx(expected @ MASK, rel=1e-5)


def test_a_teacher_gets_images_as_it_learnt_them():
    """Larger, of more channels, normalised its own way, and with its classes in another order."""
    vit = VIT.replace(image_size=(16, 12))
    spec = InputSpec(image_size=(16, 12), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    teacher = Teacher(create_model(vit), spec, [2, 0, 1])
    grey = np.linspace(0, 255, 2 * 8 * 8).reshape(2, 8, 8, 1).astype("uint8")
    resized = [np.asarray(Image.fromarray(image[..., 0]).resize((12, 16), Image.Resampling.BICUBIC)) for image in grey]
    expected = (np.stack(resized)[..., None] / 255 - spec.mean) / spec.std
    np.testing.assert_allclose(to_numpy(teacher.prepare(grey)), expected, atol=1.01 / 255 / 0.5)  # Pillow rounds twice
    logits = to_numpy(teacher.model(teacher.prepare(grey)))
    np.testing.assert_allclose(to_numpy(teacher(grey)), logits[:, [2, 0, 1]], atol=1e-6)


def test_steps_with_a_teacher():
    """The loss is that of its answers, in parts too; the teacher stays; its part reaches its own head alone."""
    vit = VIT.replace(use_class_token=True, use_distillation_token=True, use_distillation_head=True)
    teacher = Teacher(create_model(VIT.replace(image_size=16), seed=5), InputSpec(image_size=16), [1, 2, 0])
    known = values(teacher.model)
    answers = to_numpy(teacher(batch().images))
    config = DistillationConfig(weight=1.0, temperature=1.0)
    step = create(vit=vit, loss=DistillationLoss(Loss(3), config, teacher), num_parts=2)
    heads = [to_numpy(x) for x in step.model(inputs(batch().images), return_heads=True)]
    p, q = log_softmax(answers), log_softmax(heads[1])
    start = values(step.model)
    loss, correct = step(batch(), learning_rate=1e-2, decay=0.0)
    assert float(to_numpy(loss)) == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-4)
    assert int(correct) == (sum(heads).argmax(axis=1) == batch().labels).sum()
    step.synchronize()
    now = values(step.model)
    assert {path for path in start if np.array_equal(now[path], start[path])} == {"head/kernel", "head/bias"}
    for path, value in values(teacher.model).items():
        np.testing.assert_array_equal(value, known[path])
