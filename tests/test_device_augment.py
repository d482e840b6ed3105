"""Images changed on the device, held against the operations on the CPU that they stand for."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from device_augment import NAMES, Changes, DeviceLoader, change_images, compile_function, draw_changes, mix_targets
from keras import ops
from layer_harness import to_numpy

from vitreous.data.policies import TRIVIAL_AUGMENT, apply_operation
from vitreous.errors import ConfigError
from vitreous.registry import count_parameters
from vitreous.spec import AugmentConfig

SIZE = (12, 16)


def draw(count=8, seed=0):
    """Returns images with smooth parts and with noise, of different ranges."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 200, SIZE[1])[None, None, :, None] * np.linspace(0.6, 1, 3)
    noise = rng.integers(-40, 40, (count, *SIZE, 3)) * rng.random((count, 1, 1, 1))
    return np.clip(ramp + noise, 0, 255).astype("uint8")


CHANGE = compile_function(lambda pixels, arrays: change_images(pixels, arrays, SIZE))


def change(images, changes):
    pixels = ops.convert_to_tensor(images.reshape(-1, 3))
    return to_numpy(CHANGE(pixels, {name: ops.convert_to_tensor(array) for name, array in vars(changes).items()}))


def test_nothing_changes_nothing():
    images = draw()
    index = np.array([3, 0, 3])
    np.testing.assert_array_equal(change(images, Changes.none(index)), images[index])


def test_operations_are_those_on_the_cpu():
    """Every operation, in both directions and at three strengths; up to a level, and but for pixels on an edge."""
    images, cases = draw(), list(itertools.product(NAMES, (0.2, 0.5, 0.97), (-1, 1), range(2)))
    changes, wanted = Changes.none(np.arange(len(cases)) % len(images)), []
    for row, (name, share, sign, _) in enumerate(cases):
        strength = TRIVIAL_AUGMENT[name] * share
        changes.operate(row, name, strength, sign * strength, SIZE)
        image = Image.fromarray(images[changes.index[row]])
        wanted.append(np.asarray(apply_operation(image, name, strength, sign * strength)))
    far = np.abs(change(images, changes).astype(int) - np.stack(wanted)) > 1
    assert [case for case, image in zip(cases, far, strict=True) if image.mean() > 0.01] == []
    is_changed = (np.stack(wanted) != images[changes.index]).any(axis=(1, 2, 3))
    assert is_changed.mean() > 0.85  # the operations are there to be seen


def test_shifts_and_flips():
    images = draw(1)
    changes = Changes.none(np.zeros(2, int))
    changes.shift[:] = [[2, -3], [0, 0]]
    changes.is_flipped[:] = [False, True]
    shifted, flipped = change(images, changes)
    padded = np.pad(images[0], ((4, 4), (4, 4), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(shifted, padded[4 + 2 : 16 + 2, 4 - 3 : 20 - 3])
    np.testing.assert_array_equal(flipped, images[0][:, ::-1])


def test_mixing_follows_its_targets():
    """Of images of one level each, the level of the mixed image tells what share of each is in it."""
    levels = np.array([0, 80, 160, 240], "uint8")
    images = np.broadcast_to(levels[:, None, None, None], (4, *SIZE, 3)).copy()
    labels, seen = np.arange(4), set()
    config = AugmentConfig(crop_scale=(1, 1), horizontal_flip_rate=0, mixup_alpha=1.0, cutmix_alpha=1.0, mix_rate=0.8)
    for seed in range(6):
        changes = draw_changes(labels, config, SIZE, np.random.default_rng(seed))
        targets = mix_targets(labels, 4, changes, SIZE)
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        mixed = change(images, changes)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), targets @ levels, atol=0.51)
        seen |= {
            (len(np.unique(image)) > 1, target.max() < 0.999) for image, target in zip(mixed, targets, strict=True)
        }
    assert seen == {(False, False), (False, True), (True, True)}  # left alone, mixup, cutmix


def test_loader_shows_each_image_once_an_epoch():
    images, labels = draw(9), np.arange(9) % 3
    config = AugmentConfig(crop_scale=(1, 1), shift_pixels=2, policy="trivial")
    loader = DeviceLoader(images, labels, batch_size=3, config=config, num_classes=3, seed=1)
    assert loader.num_batches == 3
    stream, again = loader.stream(), loader.stream()
    orders = []
    for epoch in range(2):
        batches = [next(stream) for _ in range(3)]
        assert stream.state() == {"epoch": epoch, "batch": 3}
        orders.append(np.concatenate([batch.indices for batch in batches]))
        assert sorted(orders[-1]) == list(range(9))
        for batch in batches:
            np.testing.assert_array_equal(batch.labels, labels[batch.indices])
            np.testing.assert_array_equal(to_numpy(batch.images), to_numpy(next(again).images))
    assert orders[0].tolist() != orders[1].tolist()


def test_what_is_not_made_here_is_refused():
    config = AugmentConfig(policy="rand", erasing_rate=0.1)
    with pytest.raises(
        ConfigError, match=r"Received: crop_scale=\(0\.35, 1\.0\), policy='rand', .*'erasing_rate': 0\.1"
    ):
        DeviceLoader(draw(), np.zeros(8, int), batch_size=2, config=config, num_classes=2)
    config = AugmentConfig(crop_scale=(1, 1), num_repeats=2)
    with pytest.raises(ConfigError, match=r"policy='none', num_repeats=2, "):
        DeviceLoader(draw(), np.zeros(8, int), batch_size=2, config=config, num_classes=2)


@pytest.mark.parametrize("has_arrays", [True, False])
def test_cifar_gpu_in_miniature(tmp_path, monkeypatch, capsys, has_arrays):
    """Reads both kinds of data; trains on the arrays alone, which takes a compilation."""
    import cifar_gpu

    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = (np.where(labels, 160, 40)[:, None, None, None] + rng.integers(0, 60, (48, 16, 16, 3))).astype("uint8")
    if not has_arrays:
        for i, image in enumerate(images):
            folder = tmp_path / ("test", "train")[i % 3 > 0] / ("dark", "light")[labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:02d}.png")
        splits, num_classes = cifar_gpu.read_images(str(tmp_path), 16)
        assert num_classes == 2 and len(splits["train"][0]) == 32
        np.testing.assert_array_equal(splits["test"][1], splits["test"][0].mean(axis=(1, 2, 3)) > 130)
        return
    data, out = tmp_path / "images.npz", tmp_path / "table.md"
    np.savez(data, x_train=images, y_train=labels[:, None], x_test=images[:5], y_test=labels[:5, None])
    monkeypatch.setattr(sys, "argv", ["cifar_gpu.py", str(data), "--miniature", "--out", str(out)])
    cifar_gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["num_images_seen"] == 96 and found["num_parameters"] < 7e6 and found["num_classes"] == 2
    assert found["accuracy"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert 0 < found["mfu"] < 1 and found["loader_images_per_second"] > 0
    assert f"| test accuracy | {found['accuracy']:.2%} |" in out.read_text()
    np.savez(data, x_train=images, y_train=labels, x_test=images[:, :8], y_test=labels)
    with pytest.raises(SystemExit, match=r"expected uint8 \(N, 16, 16, 3\), received uint8 \(48, 8, 16, 3\)"):
        cifar_gpu.main()
    np.savez(data, x_train=images, y_train=labels)
    with pytest.raises(SystemExit, match=r"expected x_test and y_test among \['x_train', 'y_train'\]"):
        cifar_gpu.main()


def test_the_model_for_a_gpu_is_small():
    import cifar_gpu

    options = cifar_gpu.parse(["CIFAR100"])
    config = cifar_gpu.describe_model(options, 100)
    assert config.num_patches == 256 and 4e6 < count_parameters(config) < 7e6
