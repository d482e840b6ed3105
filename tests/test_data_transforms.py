import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vitreous.data.images import resize_image
from vitreous.data.transforms import MIXING, augment_image, crop_box, erase, example_generator
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig, InputSpec

OFF = AugmentConfig(crop_scale=(1, 1), horizontal_flip_rate=0)
SPEC = InputSpec(image_size=16)


def picture(height=24, width=30, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype="uint8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crop_scale": (0, 1)},
            r"Cannot use crop_scale\. Expected two rising numbers .*up to 1\. Received: crop_scale=",
        ),
        ({"crop_scale": (0.5, 1.1)}, r"Cannot use crop_scale\. .*Pass a pair such as \(0\.35, 1\.0\)\."),
        ({"crop_scale": (0.9, 0.5)}, r"Cannot use crop_scale\."),
        ({"crop_scale": 0.5}, r"Received: crop_scale=0\.5\."),
        (
            {"crop_ratio": (2, 1)},
            r"Cannot use crop_ratio\. Expected two rising numbers \(smallest, largest\), above 0\.",
        ),
        ({"horizontal_flip_rate": 1.5}, r"Expected a value in \[0, 1\]\. Received: horizontal_flip_rate=1\.5\."),
        ({"colour_jitter": -0.1}, r"Received: colour_jitter=-0\.1\. Pass 0 to turn it off\."),
        ({"erasing_rate": 2}, r"Received: erasing_rate=2\."),
        ({"policy": "auto"}, r"Cannot use policy\. Expected .*'three'.* Received: policy='auto'\. Pass one of them\."),
        ({"rand_magnitude": 11}, r"Expected a value in \[0, 10\]\. Received: rand_magnitude=11\."),
        ({"rand_num_ops": 0}, r"Cannot use rand_num_ops\. Expected at least 1\."),
        ({"mixup_alpha": -1}, r"Expected a value in \[0, 100\]\. Received: mixup_alpha=-1\. Pass 0 to turn it off\."),
        ({"mix_rate": 1.1}, r"Received: mix_rate=1\.1\."),
        ({"num_repeats": 0}, r"Cannot use num_repeats\. Expected at least 1\. Received: num_repeats=0\."),
        ({"shift_pixels": -1}, r"Expected 0 or more pixels\. Received: shift_pixels=-1\. Pass 0 to turn it off\."),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**options)


def test_config_round_trip():
    config = AugmentConfig(crop_scale=(0.2, 0.9), policy="trivial")
    assert AugmentConfig.from_dict(config.to_dict()) == config
    assert config.has_crop and not OFF.has_crop


def test_import_is_light():
    code = "import sys, vitreous.data; print(sorted({'PIL', 'sklearn', 'scipy', 'keras', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_generator_depends_on_its_three_numbers_alone():
    draws = {
        numbers: example_generator(*numbers).random(4).tobytes() for numbers in itertools.product(range(3), repeat=3)
    }
    assert len(set(draws.values())) == 27
    assert example_generator(1, 2, 0).random(4).tobytes() == draws[1, 2, 0]
    assert example_generator(-1, 0, 0).random() == example_generator(2**64 - 1, 0, 0).random()
    generator = example_generator(7, 3, 5)
    generator.random(100_000)  # counts up in the lower half of the counter only
    assert generator.bit_generator.state["state"]["counter"][2:].tolist() == [3, 5]
    streams = {example_generator(1, 2, 0, stream).random() for stream in (0, 1, 2, MIXING)}
    assert len(streams) == 4 and example_generator(1, 2, 0).random() in streams
    assert example_generator(5, 3, 7).random() == 0.4682978628704735  # results under a given seed must not change


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(crop_scale=(1, 1), shift_pixels=4),
        AugmentConfig(policy="trivial", colour_jitter=0.4, erasing_rate=1.0, shift_pixels=2),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augment_image(config, channels):
    image = picture(channels=channels)
    spec = InputSpec(image_size=(12, 20), num_channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    before = image.copy()
    results = [augment_image(image, spec, config, example_generator(0, 0, i)) for i in range(40)]
    again = [augment_image(image, spec, config, example_generator(0, 0, i)) for i in range(40)]
    assert all(result.shape == (12, 20, channels) and result.dtype == np.uint8 for result in results)
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert len({result.tobytes() for result in results}) > 30
    assert np.array_equal(image, before)


def test_nothing_random_is_evaluation():
    image = picture()
    assert np.array_equal(augment_image(image, SPEC, OFF, example_generator(0, 0, 0)), resize_image(image, SPEC))


def test_a_wrong_array_is_an_error():
    with pytest.raises(ConfigError, match=r"Expected uint8 of shape \(H, W, 3\)\."):
        augment_image(picture(channels=1), SPEC, AugmentConfig(), example_generator(0, 0, 0))


def test_flip():
    image = picture(16, 16)
    always, half = OFF.replace(horizontal_flip_rate=1), OFF.replace(horizontal_flip_rate=0.5)
    assert np.array_equal(augment_image(image, SPEC, always, example_generator(0, 0, 0)), image[:, ::-1])
    flips = [
        augment_image(image, SPEC, half, example_generator(0, 0, i))[0, 0, 0] != image[0, 0, 0] for i in range(400)
    ]
    assert 0.4 < np.mean(flips) < 0.6


def test_crop_box_keeps_its_bounds():
    config = AugmentConfig(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    shares, ratios = [], []
    for index in range(500):
        left, top, right, bottom = crop_box(200, 300, config, example_generator(0, 0, index))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        shares.append((right - left) * (bottom - top) / 60_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.19 < min(shares) < 0.23 and 0.55 < max(shares) < 0.61
    assert 0.49 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.05


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 1000, (493, 0, 506, 10)), (1000, 10, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1))],
)
def test_crop_of_an_image_that_no_ratio_fits(height, width, box):
    config = AugmentConfig(crop_scale=(0.9, 1.0))
    assert crop_box(height, width, config, example_generator(0, 0, 0)) == box


def test_crop_is_one_antialiased_resize_of_the_box():
    image = picture(60, 80)
    config = AugmentConfig(horizontal_flip_rate=0)
    box = crop_box(60, 80, config, example_generator(3, 1, 4))
    expected = np.asarray(Image.fromarray(image).crop(box).resize((16, 16), Image.Resampling.BICUBIC), int)
    assert np.abs(augment_image(image, SPEC, config, example_generator(3, 1, 4)) - expected).max() <= 1


def test_shift_reflects():
    image = picture(16, 16)
    config = OFF.replace(shift_pixels=4)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {
        padded[top : top + 16, left : left + 16].tobytes(): (top, left)
        for top, left in itertools.product(range(9), repeat=2)
    }
    seen = {windows[augment_image(image, SPEC, config, example_generator(0, 0, i)).tobytes()] for i in range(900)}
    assert len(seen) == 81
    far = augment_image(image, SPEC, OFF.replace(shift_pixels=500), example_generator(0, 0, 0))
    assert far.shape == image.shape
    tiny = InputSpec(image_size=1)
    assert augment_image(picture(1, 1), tiny, config, example_generator(0, 0, 0)).shape == (1, 1, 3)


def test_colour_jitter():
    grey = np.full((16, 16, 3), 100, "uint8")
    config = OFF.replace(colour_jitter=0.4)
    values = [augment_image(grey, SPEC, config, example_generator(0, 0, i))[0, 0] for i in range(300)]
    assert all(value.min() == value.max() for value in values)  # grey stays grey
    means = [int(value[0]) for value in values]
    assert 58 <= min(means) < 70 and 130 < max(means) <= 142  # brightness alone moves a flat image


def test_erasing():
    image = np.zeros((40, 50, 3), "uint8")
    shares = []
    for index in range(300):
        changed = (erase(image, example_generator(0, 0, index)) != 0).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        shares.append(len(rows) * len(columns) / 2000)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one rectangle
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.36
    assert not image.any()
    config = OFF.replace(erasing_rate=0.25)
    spec = InputSpec(image_size=(40, 50))
    changes = [augment_image(image, spec, config, example_generator(0, 0, i)).any() for i in range(400)]
    assert 0.18 < np.mean(changes) < 0.32
    assert erase(picture(1, 1), example_generator(0, 0, 0)).shape == (1, 1, 3)
