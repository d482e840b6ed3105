"""Labelled images to measure a trained model on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.folders import find_splits, list_folder, read_folder, shorten
from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.sources import image_set_of, is_built_in, load_dataset
from vitreous.errors import DataError


@dataclass(frozen=True)
class LabelledImages:
    """Images whose labels follow a trained model's classes.

    Args:
        images: Label k means the model's class k.
        split: `"train"`, `"val"`, `"test"`, or `"all"` for a folder without splits.
        broken: Files that cannot be read, and why; they are not in `images`.
    """

    images: ImageSet
    split: str
    broken: dict[str, str] = field(default_factory=dict)


def load_evaluation_images(
    data: str | Path,
    class_names: tuple[str, ...],
    *,
    split: str | None = None,
    made_by: Mapping[str, Any] | None = None,
    trained_on: str | None = None,
    trained_at: str | None = None,
) -> LabelledImages:
    """Loads the images that a trained model should be measured on.

    Args:
        data: A built-in name, or a folder laid out as for training; a single class is enough.
        class_names: The model's classes; the data's must be among them.
        split: The part wanted: train, val, test, or all. Default: test where the data has splits; all of it where it
            has none, unless the model was trained on a part of it: then the test images that were kept apart.
        made_by: Arguments of `load_dataset` (seed, val_fraction, test_fraction) that the model was trained with; they
            decide the splits that the data does not give.
        trained_on: Fingerprint of the data that the model was trained on.
        trained_at: Folder that the model was trained on.

    Raises:
        DataError: If a class is unknown to the model, there is no such split, or the model was trained on an earlier
            state of this data, so that nobody can tell which images it has seen.
    """
    root = Path(data)
    is_folder = not is_built_in(data) and root.is_dir()
    has_splits = is_folder and bool(find_splits(root, list_folder(str(root))[0]))
    dataset = None
    if not is_folder or has_splits:
        dataset = load_dataset(data, **made_by or {})
        is_given = split in (None, "test") or dataset.fingerprint == trained_on
    elif split != "all":
        dataset = _load_if_trainable(data, made_by or {})
        is_given = dataset is not None and dataset.fingerprint == trained_on
        if not is_given and split is None and trained_at != str(root.resolve()):
            dataset, is_given = None, True  # other data, all of it unseen
    if split == "all":
        dataset, is_given = None, True
    if not is_given:
        raise DataError(
            f"Cannot tell which images of {data} the model has seen. Expected the data as it was in training. "
            f"Received: other files, or no {split or 'test'} folder. Pass --split all to measure on all images, or a "
            "folder of images that were not trained on."
        )
    if dataset is None:
        if not is_folder:
            raise DataError(
                f"Cannot evaluate on all of {data}. Expected a folder. Received: {data!r}. Leave out --split."
            )
        contents = read_folder(root, min_classes=1)
        files = [file for files in contents.splits.values() for file in files]
        images = image_set_of(root, files)
        found, names, broken = "all", contents.class_names, contents.broken
    else:
        found, names, broken = split or "test", dataset.class_names, dataset.broken
        if found not in dataset.splits:
            raise DataError(
                f"Cannot evaluate on {data}. Expected a {found} split. Received: splits={list(dataset.splits)}. "
                "Pass one of these."
            )
        images = dataset.splits[found]
    if unknown := [name for name in names if name not in class_names]:
        raise DataError(
            f"Cannot evaluate on {data}. Expected classes among the model's: {shorten(class_names)}. "
            f"Received: unknown classes {shorten(unknown)}. Rename the folders, or pass the run that knows them."
        )
    position = np.array([class_names.index(name) for name in names], dtype="int32")
    relabelled = images.with_labels(position[images.labels])
    return LabelledImages(relabelled, found, broken)


def _load_if_trainable(data: str | Path, made_by: Mapping[str, Any]) -> Dataset | None:
    """Returns the data set with the splits of training; None if nothing can have been trained on it."""
    try:
        return load_dataset(data, **made_by)
    except DataError:
        return None
