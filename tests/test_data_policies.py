import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from vitreous.data.policies import (
    RAND_AUGMENT,
    TRIVIAL_AUGMENT,
    apply_operation,
    jitter_colours,
    rand_augment,
    three_augment,
    trivial_augment,
)
from vitreous.data.transforms import augment_image, example_generator
from vitreous.spec import AugmentConfig, InputSpec


def picture(height=40, width=40, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype="uint8")


class Scripted:
    """A generator that returns what a test wants to see applied."""

    def __init__(self, choices, signs, noise=()):
        self.integers_left = [np.array(choices), np.array(signs)]
        self.noise = np.array(noise)

    def integers(self, *_):
        return self.integers_left.pop(0)

    def standard_normal(self, size):
        assert len(self.noise) == size
        return self.noise


@pytest.mark.parametrize("name", TRIVIAL_AUGMENT)
def test_every_operation(name):
    assert len(TRIVIAL_AUGMENT) == 14 and set(TRIVIAL_AUGMENT) == set(RAND_AUGMENT)
    for channels in (1, 3):
        image = picture(channels=channels)
        pillow = Image.fromarray(image.squeeze())
        most = TRIVIAL_AUGMENT[name]
        for strength in (0.0, most / 3, most):
            for signed in (strength, -strength):
                result = apply_operation(pillow, name, strength, signed, fill=128)
                assert result.mode == pillow.mode and result.size == pillow.size
        if name not in ("AutoContrast", "Equalize", "Solarize"):
            assert np.array_equal(np.asarray(apply_operation(pillow, name, 0.0, 0.0)), image.squeeze())


def test_operations_mean_what_they_say():
    image = picture()
    pillow = Image.fromarray(image)

    def apply(name, strength, signed=None, **options):
        return np.asarray(apply_operation(pillow, name, strength, strength if signed is None else signed, **options))

    assert np.array_equal(apply("TranslateX", 5)[:, :-5], image[:, 5:]) and not apply("TranslateX", 5)[:, -5:].any()
    assert np.array_equal(apply("TranslateY", 5, -5)[5:], image[:-5]) and not apply("TranslateY", 5, -5)[:5].any()
    assert (apply("TranslateX", 5, fill=128)[:, -5:] == 128).all()
    assert apply("Rotate", 45, fill=9)[0, 0].tolist() == [9, 9, 9]
    assert np.array_equal(apply("Posterize", 6), image & 0b11000000)
    assert np.array_equal(apply("Solarize", 255)[image > 0], 255 - image[image > 0])
    assert np.array_equal(apply("Rotate", 90), np.rot90(image))
    assert np.array_equal(apply("ShearX", 0.5)[0], image[0])
    assert apply("Brightness", 0.99, -0.99).max() <= 3
    assert np.ptp(apply("Color", 0.99, -0.99).astype(int), axis=2).max() <= 6


def test_trivial_augment_reaches_every_operation():
    image = Image.fromarray(picture())
    results = {np.asarray(trivial_augment(image, example_generator(0, 0, i))).tobytes() for i in range(600)}
    assert len(results) > 200


@pytest.mark.parametrize("name", RAND_AUGMENT)
@pytest.mark.parametrize("magnitude", [3.0, 10.0])
def test_rand_augment_applies_the_operation_at_its_magnitude(name, magnitude):
    image = Image.fromarray(picture(40, 50))
    side = {"TranslateX": 50, "TranslateY": 40}.get(name, 1)
    strength = RAND_AUGMENT[name] * side * magnitude / 10
    for sign, signed in ((0, strength), (1, -strength)):
        generator = Scripted([list(RAND_AUGMENT).index(name)], [sign])
        result = rand_augment(image, generator, num_ops=1, magnitude=magnitude)
        assert np.array_equal(np.asarray(result), np.asarray(apply_operation(image, name, strength, signed, fill=128)))


def test_rand_augment_applies_one_after_the_other():
    image = Image.fromarray(picture())
    names = list(RAND_AUGMENT)
    generator = Scripted([names.index("Rotate"), names.index("Posterize")], [0, 0], noise=[-1.0, 9.0])
    result = rand_augment(image, generator, num_ops=2, magnitude=9, magnitude_std=0.5)
    expected = apply_operation(image, "Rotate", 25.5, 25.5, fill=128)
    expected = apply_operation(expected, "Posterize", 4.0, 4.0)  # the strength ends at magnitude 10
    assert np.array_equal(np.asarray(result), np.asarray(expected))
    untouched = rand_augment(image, Scripted([names.index("Rotate")], [1]), num_ops=1, magnitude=0)
    assert np.array_equal(np.asarray(untouched), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_three_augment_is_one_of_three(mode):
    image = Image.fromarray(picture()).convert(mode)
    grey, solarised = image.convert("L").convert(mode), ImageOps.solarize(image, 128)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for index in range(300):
        result = three_augment(image, example_generator(0, 0, index))
        assert result.mode == mode and result.size == image.size
        if result.tobytes() == grey.tobytes():
            counts["grey"] += 1
        elif result.tobytes() == solarised.tobytes():
            counts["solarised"] += 1
        else:
            counts["blurred"] += 1
            generator = example_generator(0, 0, index)
            generator.integers(0, 3)
            radius = 0.1 + 1.9 * generator.random()
            assert result.tobytes() == image.filter(ImageFilter.GaussianBlur(radius)).tobytes()
    assert all(75 < count < 125 for count in counts.values())


def test_jitter_stays_in_its_range():
    white = Image.new("L", (4, 4), 100)
    levels = [np.asarray(jitter_colours(white, 0.3, example_generator(0, 0, i)))[0, 0] for i in range(300)]
    assert 69 <= min(levels) < 80 and 120 < max(levels) <= 131


@pytest.mark.parametrize("policy", ["trivial", "rand", "three"])
def test_policies_through_augment_image(policy):
    config = AugmentConfig(crop_scale=(1, 1), horizontal_flip_rate=0, policy=policy)
    image, spec = picture(16, 16), InputSpec(image_size=16)
    results = [augment_image(image, spec, config, example_generator(0, 0, i)) for i in range(60)]
    function = {"trivial": trivial_augment, "rand": rand_augment, "three": three_augment}[policy]
    for index, result in enumerate(results):
        expected = function(Image.fromarray(image), example_generator(0, 0, index))
        assert np.array_equal(result, np.asarray(expected))
    assert len({result.tobytes() for result in results}) > 20
