import gzip
import os
import subprocess
import sys

import numpy as np
import pytest

from vitreous.data import BUILT_IN, load_dataset
from vitreous.data.sources.built_in import _CLASS_NAMES
from vitreous.errors import DataError


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "has_column"),
    [
        ("cifar10", 10, (32, 32, 3), True),
        ("cifar100", 100, (32, 32, 3), True),
        ("mnist", 10, (28, 28), False),
        ("fashion_mnist", 10, (28, 28), False),
    ],
)
def test_keras_data_sets(monkeypatch, name, num_classes, shape, has_column):
    import keras

    rng = np.random.default_rng(0)

    def load_data():
        print("Downloading data")
        parts = []
        for repeats in (4, 1):
            labels = np.repeat(np.arange(num_classes), repeats).astype("uint8")
            images = rng.integers(0, 255, (len(labels), *shape)).astype("uint8")
            images[:, 0, 0] = labels.reshape(-1, *[1] * (len(shape) - 2))
            parts.append((images, labels[:, None] if has_column else labels))
        return tuple(parts)

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", load_data)
    dataset = load_dataset(name, val_fraction=0.25)
    assert dataset.root is None and dataset.name == name
    assert len(dataset.class_names) == len(set(dataset.class_names)) == num_classes
    counts = {split: len(images) for split, images in dataset.splits.items()}
    assert counts == {"train": 3 * num_classes, "val": num_classes, "test": num_classes}
    for images in dataset.splits.values():
        assert all(int(example.image[0, 0, 0]) == example.label for example in images)
    assert dataset.splits["test"].names[-1] == f"{name}/test/{num_classes - 1}"
    assert dataset.splits["train"].load(0, 1).shape == (*shape[:2], 1)
    assert dataset.notes[0] == "test is that of its authors"


def test_class_names():
    assert set(_CLASS_NAMES) | {"digits"} == set(BUILT_IN)
    assert list(_CLASS_NAMES["cifar100"]) == sorted(_CLASS_NAMES["cifar100"])


def test_from_the_cache_of_keras(tmp_path):
    """Keras reads its own files, placed in its cache; what it prints stays out of standard output."""
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 10)):
        labels, images = np.arange(count) % 10, np.zeros((count, 28, 28)) + (np.arange(count) % 10)[:, None, None]
        for kind, values, head in (("labels-idx1", labels, 8), ("images-idx3", images, 16)):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(head) + values.astype("uint8").tobytes())
    code = """
from vitreous.data import load_dataset
dataset = load_dataset("fashion_mnist")
found = {s: [len(images), all(e.label == e.image[0, 0, 0] for e in images)] for s, images in dataset.splits.items()}
print(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KERAS_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "{'train': [30, True], 'val': [10, True], 'test': [10, True]}\n", done.stderr


def test_without_a_network(monkeypatch):
    import keras

    def load_data():
        raise Exception("URL fetch failure on https://example.org/mnist.npz: None --\n timed out")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", load_data)
    with pytest.raises(DataError) as caught:
        load_dataset("mnist")
    assert str(caught.value) == (
        "Cannot load the data set mnist. Expected its files in the cache of Keras (KERAS_HOME, else ~/.keras), or a "
        "network to fetch them by. Received: URL fetch failure on https://example.org/mnist.npz: None -- timed out. "
        "Fetch them where there is a network, or pass a folder of images."
    )
