import numpy as np
import pytest

from vitreous.data.image_set import ImageSet
from vitreous.data.mixing import Mix, draw_mix, mix_pairs
from vitreous.data.pipeline import Loader
from vitreous.data.transforms import MIXING, example_generator
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

MIXUP, CUTMIX = AugmentConfig(mixup_alpha=0.8), AugmentConfig(cutmix_alpha=1.0)
STILL = AugmentConfig(crop_scale=(1, 1), horizontal_flip_rate=0)
SPEC = InputSpec(image_size=12)


def images_in_memory(count=37, num_classes=5):
    arrays = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), dtype="uint8")
    return ImageSet([f"memory/{i}" for i in range(count)], np.arange(count) % num_classes, arrays=arrays)


def batch(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 10, 3), dtype="uint8"), np.eye(count, dtype="float32"), np.ones(count, bool)


def test_mixup_is_the_weighted_mean_of_a_pair():
    images, targets, mask = batch()
    before = images.astype(float)
    mix_pairs(images, targets, mask, Mix(192 / 256))
    assert np.abs(images[0] - (0.75 * before[0] + 0.25 * before[1])).max() <= 0.5
    assert np.abs(images[1] - (0.75 * before[1] + 0.25 * before[0])).max() <= 0.5
    assert np.abs(images[3] - (0.75 * before[3] + 0.25 * before[2])).max() <= 0.5
    assert np.array_equal(images[4], before[4])  # without a partner
    assert targets[0].tolist() == [0.75, 0.25, 0, 0, 0] and targets[3].tolist() == [0, 0, 0.25, 0.75, 0]
    assert targets[4].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("weight", [0, 1, 128, 255, 256])
def test_mixup_at_its_ends_does_not_overflow(weight):
    images = np.stack([np.full((4, 4, 3), 255, "uint8"), np.full((4, 4, 3), 255, "uint8")])
    mix_pairs(images, np.eye(2, dtype="float32"), np.ones(2, bool), Mix(weight / 256))
    assert (images == 255).all()


def test_cutmix_swaps_the_rectangle():
    images, targets, mask = batch(4)
    before = images.copy()
    mix_pairs(images, targets, mask, Mix(1 - 12 / 80, (2, 1, 6, 4)))
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        expected = before[row].copy()
        expected[1:4, 2:6] = before[other, 1:4, 2:6]
        assert np.array_equal(images[row], expected)
        assert np.allclose(targets[row, [row, other]], [0.85, 0.15])
        assert np.isclose((images[row] != before[row]).any(axis=-1).mean(), 0.15)


def test_padding_is_not_mixed():
    images, targets, mask = batch(4)
    mask[3] = False
    before, before_targets = images.copy(), targets.copy()
    mix_pairs(images, targets, mask, Mix(0.5))
    assert not np.array_equal(images[:2], before[:2])
    assert np.array_equal(images[2:], before[2:]) and np.array_equal(targets[2:], before_targets[2:])


def test_shares_of_several_labels_are_mixed():
    images, _, mask = batch(2)
    targets = np.array([[1, 1, 0], [0, 1, 0]], "float32")
    mix_pairs(images, targets, mask, Mix(0.75))
    assert targets.tolist() == [[0.75, 1, 0], [0.25, 1, 0]]


def draws(config, count=4000, size=(224, 224)):
    return [draw_mix(config, size, example_generator(0, 0, number, MIXING)) for number in range(count)]


def test_shares_follow_beta():
    shares = np.array([mix.share for mix in draws(MIXUP)])
    assert abs(shares.mean() - 0.5) < 0.02 and abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(a, a)
    assert np.array_equal(shares * 256, np.round(shares * 256))
    assert draw_mix(AugmentConfig(), (224, 224), example_generator(0, 0, 0)) is None


def test_boxes_of_cutmix():
    mixes = [mix for mix in draws(CUTMIX, size=(100, 60)) if mix is not None]
    assert len(mixes) > 3900
    for mix in mixes:
        left, top, right, bottom = mix.box
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 100
        assert mix.share == 1 - (right - left) * (bottom - top) / 6000
    middles = np.array([(mix.box[0] + mix.box[2]) / 2 for mix in mixes])
    assert abs(middles.mean() - 30) < 1.5


def test_rates():
    both = AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mix_rate=0.6, mix_switch_rate=0.25)
    mixes = draws(both)
    mixed = [mix for mix in mixes if mix is not None]
    assert 0.57 < len(mixed) / len(mixes) < 0.63
    assert 0.22 < np.mean([mix.box is not None for mix in mixed]) < 0.28


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_loader_gives_mixed_targets(config):
    images = images_in_memory()
    config = STILL.replace(mixup_alpha=config.mixup_alpha, cutmix_alpha=config.cutmix_alpha)
    loader = Loader(images, SPEC, batch_size=16, augment=config, num_classes=6, seed=3)
    for number, got in enumerate(loader.epoch(1)):
        assert got.labels.shape == (16, 6) and got.labels.dtype == np.float32
        assert np.allclose(got.labels[got.mask].sum(axis=1), 1) and not got.labels[~got.mask].any()
        pixels = np.zeros((16, 12, 12, 3), "uint8")
        targets = np.zeros((16, 6), "float32")
        for row in np.flatnonzero(got.mask):
            pixels[row] = images.load(got.indices[row])
            targets[row, images.labels[got.indices[row]]] = 1
        mix = draw_mix(config, (12, 12), example_generator(3, 1, number, MIXING))
        mix_pairs(pixels, targets, got.mask, mix)
        assert np.array_equal(got.images, pixels) and np.array_equal(got.labels, targets)


def test_batches_that_are_not_mixed_have_targets_too():
    config = STILL.replace(mixup_alpha=1.0, mix_rate=0.01)
    (got,) = Loader(images_in_memory(4), SPEC, batch_size=4, augment=config, num_classes=5).epoch(0)
    assert np.array_equal(got.labels, np.eye(5, dtype="float32")[[0, 1, 2, 3]])


def test_several_labels_an_image():
    images = images_in_memory(6).with_labels(np.array([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0], [0, 0]], bool))
    one, last = Loader(images, SPEC, batch_size=4).epoch(0)
    assert one.labels.dtype == np.float32 and one.labels.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]
    assert last.labels.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    config = STILL.replace(mixup_alpha=1.0)
    mixed, _ = Loader(images, SPEC, batch_size=4, augment=config).epoch(0)
    share = draw_mix(config, (12, 12), example_generator(0, 0, 0, MIXING)).share
    assert np.allclose(mixed.labels[:2], [[share, 0], [1 - share, 0]])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [7, 16, 37])
def test_mixed_batches_do_not_depend_on_the_workers(num_workers, batch_size):
    config = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, policy="rand", erasing_rate=0.5, num_repeats=2)
    options = {"batch_size": batch_size, "augment": config, "num_classes": 5, "shuffle": True, "seed": 5}
    alone = list(Loader(images_in_memory(), SPEC, num_workers=0, **options).epoch(1))
    threaded = list(Loader(images_in_memory(), SPEC, num_workers=num_workers, **options).epoch(1))
    for one, other in zip(alone, threaded, strict=True):
        for field in ("images", "labels", "mask", "indices"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


def test_errors():
    with pytest.raises(ConfigError, match=r"Cannot mix images\. Expected num_classes of 5 or more\. Received: num_cla"):
        Loader(images_in_memory(), SPEC, batch_size=4, augment=MIXUP)
    with pytest.raises(ConfigError, match=r"Received: num_classes=4\. Pass the number of classes\."):
        Loader(images_in_memory(), SPEC, batch_size=4, augment=MIXUP, num_classes=4)
    unknown = images_in_memory().with_labels(np.full(37, -1))
    with pytest.raises(ConfigError, match=r"Expected a label for each image\. Received: 37 images without one\."):
        Loader(unknown, SPEC, batch_size=4, augment=CUTMIX, num_classes=4)
