"""Data sets that are known by name."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from vitreous.data.image_set import ImageSet
from vitreous.data.sources.contents import Contents
from vitreous.data.splits import stratified_split
from vitreous.errors import DataError


def is_built_in(data: str | Path) -> bool:
    """Whether `data` is a built-in name: a bare one, and a string, so that a folder of that name can still be given."""
    return isinstance(data, str) and data in BUILT_IN


def load_built_in(name: str) -> Contents:
    """Loads a built-in data set, with its own test set.

    Raises:
        DataError: If its files are not on this machine and cannot be fetched.
    """
    return _LOADERS[name](name)


def _load_digits(name: str) -> Contents:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = np.round(digits.images * (255 / 16)).astype("uint8")[..., None]  # (1797, 8, 8, 1)
    images = ImageSet([f"digits/{i}" for i in range(len(arrays))], digits.target, arrays=arrays)
    rest, test = stratified_split(images.labels, 360 / len(images), seed=0)
    return Contents(
        name=name,
        class_names=tuple(str(name) for name in digits.target_names),
        splits={"train": images.take(rest), "test": images.take(test)},
        places={"test": "the same 360 images for every seed"},
    )


def _load_from_keras(name: str) -> Contents:
    """Loads one of `keras.datasets`: from Keras's cache, or by a download into it."""
    import keras  # the backend is settled by then: importing vitreous does that

    what = getattr(keras.datasets, name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the download shows how far it is
            (train_images, train_labels), (test_images, test_labels) = what.load_data()
    except Exception as error:  # Keras raises a plain Exception where the network fails
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"Cannot load the data set {name}. Expected its files in the cache of Keras (KERAS_HOME, else "
            f"~/.keras), or a network to fetch them by. Received: {reason}. Fetch them where there "
            "is a network, or pass a folder of images."
        ) from error
    splits = {}
    for split, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        arrays = images[..., None] if images.ndim == 3 else images
        names = [f"{name}/{split}/{i}" for i in range(len(arrays))]
        splits[split] = ImageSet(names, labels.reshape(-1), arrays=arrays)
    return Contents(name=name, class_names=_CLASS_NAMES[name], splits=splits, places={"test": "that of its authors"})


_DIGITS = tuple("0123456789")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
_CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
    "mnist": _DIGITS,
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
_LOADERS: dict[str, Callable[[str], Contents]] = {
    "digits": _load_digits,
    **dict.fromkeys(("cifar10", "cifar100", "mnist", "fashion_mnist"), _load_from_keras),
}

BUILT_IN = tuple(_LOADERS)
"""Data sets that need no path."""
