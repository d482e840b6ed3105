"""Data sets that are known by name."""

from collections.abc import Callable
from pathlib import Path

from vitreous.data.contents import Contents
from vitreous.data.image_set import ImageSet
from vitreous.data.splits import stratified_split


def is_built_in(data: str | Path) -> bool:
    """Whether `data` is a built-in name: a bare one, and a string, so that a folder of that name can still be given."""
    return isinstance(data, str) and data in BUILT_IN


def load_built_in(name: str) -> Contents:
    """Loads a built-in data set, with its own test set."""
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


_LOADERS: dict[str, Callable[[str], Contents]] = {"digits": _load_digits}

BUILT_IN = tuple(_LOADERS)
"""Data sets that need no path."""
