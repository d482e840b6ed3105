import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from test_data_jpeg import photograph

from vitreous.data import resampling
from vitreous.data.images import resize_image
from vitreous.data.resampling import flip_columns, resize_batch, resize_box, resize_image_fast
from vitreous.spec import InputSpec

FILTERS = ["nearest", "bilinear", "bicubic", "lanczos"]


def by_pillow(image, box, spec):
    pillow = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).crop(box)
    filtered = pillow.resize(spec.image_size[::-1], Image.Resampling[spec.interpolation.upper()])
    return np.asarray(filtered).astype(int).reshape(*spec.image_size, -1)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_pillow(interpolation, channels):
    options = {"num_channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    rng = np.random.default_rng(0)
    for case in range(60):
        height, width = rng.integers(80, 400, 2).tolist()
        image = photograph(height, width, seed=case)[:, :, :channels]
        left, top = int(rng.integers(0, width - 50)), int(rng.integers(0, height - 50))
        box = (left, top, int(rng.integers(left + 50, width + 1)), int(rng.integers(top + 50, height + 1)))
        spec = InputSpec(image_size=(96, 128), interpolation=interpolation, **options)
        result = resize_box(image, box, spec)
        assert result.shape == (96, 128, channels) and result.dtype == np.uint8
        differences = np.abs(result - by_pillow(image, box, spec))
        assert differences.max() <= 2 and (differences > 1).mean() < 1e-3 and (differences > 0).mean() < 0.05


def test_noise_and_specks_to_two_levels():
    rng = np.random.default_rng(0)
    spec = InputSpec(image_size=64)
    for case in range(100):
        height, width = rng.integers(1, 200 if case % 2 else 9, 2).tolist()
        noise = rng.integers(0, 256, (height, width, 3), dtype="uint8")
        box = (0, 0, width, height)
        assert np.abs(resize_box(noise, box, spec) - by_pillow(noise, box, spec)).max() <= 2, case


def test_without_kernels_pillow_does_it(monkeypatch):
    image, spec = photograph(), InputSpec(image_size=40)
    monkeypatch.setattr(resampling, "_kernels", lambda: None)
    box = (5, 7, 90, 80)
    assert np.array_equal(resize_box(image, box, spec), by_pillow(image, box, spec))


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("target", [96, (96, 128), (40, 20)])
def test_images_as_for_evaluation(mode, target):
    rng = np.random.default_rng(0)
    for case in range(40):
        height, width = rng.integers(30, 400, 2).tolist()
        interpolation, fraction = FILTERS[1 + case % 3], (0.875, 1.0)[case // 3 % 2]
        spec = InputSpec(image_size=target, resize_mode=mode, interpolation=interpolation, crop_fraction=fraction)
        image = photograph(height, width, seed=case)
        result, expected = resize_image_fast(image, spec), resize_image(image, spec)
        assert result.shape == expected.shape and result.dtype == np.uint8
        differences = np.abs(result - expected.astype(int))
        assert differences.max() <= 2 and (differences > 1).mean() < 1e-3 and (differences > 0).mean() < 0.05


def test_specks_and_strips_as_for_evaluation():
    rng = np.random.default_rng(0)
    for case in range(60):
        height, width = rng.integers(1, 9, 2).tolist()
        shape = ((height, width), (height, 90 * width), (90 * height, width))[case % 3]
        noise = rng.integers(0, 256, (*shape, 3), dtype="uint8")
        for mode in ("crop", "squash", "pad"):
            spec = InputSpec(image_size=(32, 48), resize_mode=mode, crop_fraction=0.9)
            difference = resize_image_fast(noise, spec) - resize_image(noise, spec).astype(int)
            assert np.abs(difference).max() <= 2, (case, mode)


@pytest.mark.parametrize(
    ("height", "width", "target", "fraction"),
    [(108, 21, 32, 0.9), (121, 15, 32, 0.7), (155, 118, (5, 121), 0.95), (399, 30, (36, 87), 0.5)],
)
def test_narrow_images_cut_on_both_sides(height, width, target, fraction):
    """The package read beyond its memory where one box cut rows and columns."""
    spec = InputSpec(image_size=target, resize_mode="squash", crop_fraction=fraction)
    image = photograph(height, width)
    assert np.abs(resize_image_fast(image, spec) - resize_image(image, spec).astype(int)).max() <= 2


def test_images_that_need_no_kernels(monkeypatch):
    image = photograph(60, 50)
    for spec in (
        InputSpec(image_size=(60, 50), crop_fraction=1.0),
        InputSpec(image_size=(30, 25), crop_fraction=0.5),
        InputSpec(image_size=(40, 45), crop_fraction=0.5, interpolation="nearest"),
    ):
        assert np.array_equal(resize_image_fast(image, spec), resize_image(image, spec))
    monkeypatch.setattr(resampling, "_kernels", lambda: None)
    spec = InputSpec(image_size=(33, 44))
    assert np.array_equal(resize_image_fast(image, spec), resize_image(image, spec))


@pytest.mark.parametrize("side", [20, 100])
def test_whole_batches(side):
    images = np.stack([photograph(side, side + 4, seed=seed) for seed in range(5)])
    spec = InputSpec(image_size=(15, 18), interpolation="bilinear")
    expected = [resize_box(image, (0, 0, side + 4, side), spec) for image in images]
    counted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            counted.append(args)
            return super().submit(*args, **kwargs)

    with Pool(2) as pool:
        for result in (resize_batch(images, spec), resize_batch(images, spec, pool)):
            assert np.array_equal(result, expected)
    assert len(counted) == (5 if side == 100 else 0)  # small images cost less than handing them over


def test_nothing_to_resize():
    image = photograph()
    assert np.array_equal(resize_box(image, (3, 4, 43, 44), InputSpec(image_size=40)), image[4:44, 3:43])


def test_threads_do_not_disturb_each_other():
    image, spec = photograph(300, 400), InputSpec(image_size=224)
    boxes = [(i, i, 200 + i, 150 + 2 * i) for i in range(40)]
    expected = [resize_box(image, box, spec) for box in boxes]
    results = {}

    def work(name):
        results[name] = [resize_box(image, box, spec) for box in boxes]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(4):
        assert all(np.array_equal(one, other) for one, other in zip(results[name], expected, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_flip(channels):
    image = photograph()[:, :, :channels]
    assert np.array_equal(flip_columns(image), image[:, ::-1])
