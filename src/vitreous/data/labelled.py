"""Labelled images to measure a trained model on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.sources import change_config, make_dataset, read_source, source_path
from vitreous.data.sources.contents import Contents, shorten
from vitreous.errors import DataError
from vitreous.spec import DataConfig


@dataclass(frozen=True)
class LabelledImages:
    """Images whose labels follow a trained model's classes.

    Args:
        images: Label k means the model's class k; with several labels an image, so does column k.
        split: `"train"`, `"val"`, `"test"`, or `"all"` for a source without splits.
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
    changes: Mapping[str, Any] | None = None,
    trained_on: str | None = None,
    trained_at: str | None = None,
    is_multi_label: bool | None = None,
) -> LabelledImages:
    """Loads the images that a trained model should be measured on.

    Args:
        data: A source as for `load_dataset`; a single class is enough.
        class_names: The model's classes; the data's must be among them.
        split: The part wanted: train, val, test, or all; of other data than that of training, as that data gives it.
            Default: test where the data has splits; all of it where it has none, unless the model was trained on a
            part of it: then the test images that were kept apart.
        made_by: Arguments of `load_dataset` (seed, val_fraction, label_column) that the model was trained with; they
            decide the splits that the data does not give, and which column is what. Other data may lack the columns
            of splits and groups.
        changes: Those that differ now. Columns named here must be there.
        trained_on: Fingerprint of the data that the model was trained on.
        trained_at: Path or URL that the model was trained on.
        is_multi_label: Whether the model answers with several labels; one label an image then becomes several of which
            one applies. Default: as the data.

    Raises:
        DataError: If a class is unknown to the model, there is no such split, the data has several labels an image and
            the model one, or the model was trained on an earlier state of this data, so that nobody can tell which
            images it has seen.
    """
    changes = {name: value for name, value in (changes or {}).items() if value is not None}
    options = {**(made_by or {}), **changes}
    seed = options.pop("seed", 0)
    config = change_config(None, options)
    contents = read_source(data, config, min_classes=1, may_lack={"split_column", "group_column"} - set(changes))
    dataset = _as_trained(data, contents, config, seed, trained_on)
    splits = dict(contents.splits if dataset is None else dataset.splits)
    if dataset is None and "val" in splits and split != "val":
        splits.setdefault("test", splits["val"])  # the only held-out part is the test set, whatever its name
    is_changed = dataset is None and trained_at == str(source_path(data))
    found = split or ("test" if dataset is not None or is_changed or "test" in splits else "all")
    if found == "all":
        images = contents.all_images()
    elif dataset is None and ("all" in splits or (is_changed and (found != "test" or "test" not in splits))):
        raise DataError(
            f"Cannot tell which images of {data} the model has seen. Expected the data as it was in training. "
            f"Received: other files, or no {found} folder. Pass --split all to measure on all images, or a "
            "folder of images that were not trained on."
        )
    elif found not in splits:
        raise DataError(
            f"Cannot evaluate on {data}. Expected a {found} split. Received: splits={list(splits)}. "
            "Pass one of these, or all."
        )
    else:
        images = splits[found]
    names = contents.class_names
    if unknown := [name for name in names if name not in class_names]:
        raise DataError(
            f"Cannot evaluate on {data}. Expected classes among the model's: {shorten(class_names)}. "
            f"Received: unknown classes {shorten(unknown)}. Rename the folders, or pass the run that knows them."
        )
    position = np.array([class_names.index(name) for name in names], dtype="int32")
    labels = _relabel(data, images, position, len(class_names), is_multi_label)
    return LabelledImages(images.with_labels(labels), found, contents.broken)


def _relabel(
    data: str | Path, images: ImageSet, position: np.ndarray, num_classes: int, is_multi_label: bool | None
) -> np.ndarray:
    """Returns the labels in the model's classes, one or several as the model has them."""
    if images.is_multi_label and is_multi_label is False:
        raise DataError(
            f"Cannot evaluate on {data}. Expected one label an image, as the model was trained with. "
            "Received: several labels an image. Pass data with one label an image, or another run."
        )
    if not images.is_multi_label and not is_multi_label:
        return position[images.labels]
    labels = np.zeros((len(images), num_classes), bool)
    if images.is_multi_label:
        labels[:, position] = images.labels
    else:
        labels[np.arange(len(images)), position[images.labels]] = True
    return labels


def _as_trained(
    data: str | Path, contents: Contents, config: DataConfig, seed: int, trained_on: str | None
) -> Dataset | None:
    """Returns the data set with the splits of training; None if it is not what the model was trained on."""
    if not {"train", "all"} & set(contents.splits):
        return None
    try:
        dataset = make_dataset(data, contents, config, seed=seed)
    except DataError:
        return None
    return dataset if dataset.fingerprint == trained_on else None
