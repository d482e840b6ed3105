"""Where images come from: folders, and data sets that come along. A `Dataset` holds names and labels, not pixels."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vitreous.data.folders import LAYOUT, ImageFile, folder_error, is_image_name, read_folder, shorten, walk_files
from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.splits import check_fractions, stratified_split
from vitreous.errors import DataError, MissingPathError

BUILT_IN = ("digits",)
"""Data sets that need no folder."""


def is_built_in(data: str | Path) -> bool:
    """Whether `data` is a built-in name: a bare one, and a string, so that a folder of that name can still be given."""
    return isinstance(data, str) and data in BUILT_IN


def load_dataset(data: str | Path, *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1) -> Dataset:
    """Finds the images of a data set, their classes and their splits. No pixels are read but those of the headers.

    A folder holds one folder for each class; or train/ (training/), val/ (valid/, validation/) and test/ (testing/),
    in any case, with one folder for each class in them. Images in folders below a class count for that class.

    - val and test given: both are used as they are.
    - One of them given: it is the test set, whatever its name; validation images are drawn from train.
    - None given: both are drawn.

    What is drawn is drawn at random and class by class; see `stratified_split`. Hidden files are passed over.

    Args:
        data: A folder, or the name of a built-in set: `"digits"` (1797 grey images of 8x8 pixels, 360 of them for test
            whatever the seed). A folder of that very name is reached as `./digits`.
        seed: Decides what is drawn.
        val_fraction: Share of the images drawn for validation, in [0, 1).
        test_fraction: Share of the images drawn for test, in [0, 1).

    Returns:
        A `Dataset`.

    Raises:
        MissingPathError: If `data` is neither.
        DataError: If the folder is not laid out like that, or a class has no readable image.
        ConfigError: If the shares leave nothing to train on.
    """
    check_fractions(val_fraction, test_fraction)
    if is_built_in(data):
        return _load_digits(seed, val_fraction)
    root = Path(data)
    if not root.exists():
        nearest = difflib.get_close_matches(str(data), BUILT_IN, n=1)
        raise MissingPathError(
            f"Cannot load the data set {data}. Expected a folder, or a built-in name: {', '.join(BUILT_IN)}. "
            f"Received: data={str(data)!r}, which does not exist. "
            + (f"Did you mean {nearest[0]}?" if nearest else "Check the path.")
        )
    if not root.is_dir():
        raise DataError(
            f"Cannot load the data set {data}. Expected a folder. Received: a file. Unpack it. The layout is {LAYOUT}."
        )
    return _load_folder(root, seed, val_fraction, test_fraction)


def list_image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the image files that `paths` name: files as they are given, folders searched to the bottom, sorted.

    Raises:
        MissingPathError: If a path does not exist.
        DataError: If a folder has no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise MissingPathError(
                f"Cannot find images. Expected files and folders that exist. Received: path={str(path)!r}. "
                "Check the path."
            )
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path / name for name, _ in walk_files(str(path)) if is_image_name(name))
        if not found:
            raise folder_error(path, "image files in it", "none", "Name a folder that has some.")
        files += found
    return files


def _load_digits(seed: int, val_fraction: float) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = np.round(digits.images * (255 / 16)).astype("uint8")[..., None]  # (1797, 8, 8, 1)
    images = ImageSet([f"digits/{i}" for i in range(len(arrays))], digits.target, arrays=arrays)
    rest, test = stratified_split(images.labels, 360 / len(images), seed=0)
    splits = {"train": images.take(rest), "test": images.take(test)}
    notes = ["test is the same 360 images for every seed", *_draw(splits, "val", val_fraction, seed)]
    class_names = tuple(str(name) for name in digits.target_names)
    return Dataset(name="digits", root=None, class_names=class_names, splits=_in_order(splits), notes=notes)


def _load_folder(root: Path, seed: int, val_fraction: float, test_fraction: float) -> Dataset:
    contents = read_folder(root)
    splits = {split: image_set_of(root, files) for split, files in contents.splits.items() if files}
    notes = contents.notes
    if "all" in splits:
        splits["train"] = splits.pop("all")
    if "val" in splits and "test" in splits:
        notes.append("train, val and test are as the folders give them")
    elif "val" in splits or "test" in splits:
        held_out = "val" if "val" in splits else "test"
        splits["test"] = splits.pop(held_out)
        notes.append(f"test is the folder {splits['test'].names[0].split('/')[0]}/")
        notes += _draw(splits, "val", val_fraction, seed)
    else:
        num_images = len(splits["train"])
        notes += _draw(splits, "test", test_fraction, seed)
        notes += _draw(splits, "val", val_fraction * num_images / len(splits["train"]), seed)
    num_classes = len(contents.class_names)
    counts = {split: np.bincount(images.labels, minlength=num_classes) for split, images in splits.items()}
    total = sum(counts.values())
    missing = {f"without a {split} image": (counts[split] == 0) & (total > 1) for split in counts if split != "train"}
    for text, chosen in {"in train only, having one image": total == 1, **missing}.items():
        if chosen.any():
            names = [name for name, is_chosen in zip(contents.class_names, chosen, strict=True) if is_chosen]
            notes.append(f"{len(names)} of {num_classes} classes {text}: {shorten(names)}")
    return Dataset(
        name=root.resolve().name or str(root),
        root=root,
        class_names=contents.class_names,
        splits=_in_order(splits),
        broken=contents.broken,
        num_ignored=contents.num_ignored,
        notes=notes,
    )


def image_set_of(root: Path, files: list[ImageFile]) -> ImageSet:
    """Returns the images of `read_folder`'s files, which must be at least one."""
    names, sizes, labels = zip(*((file.name, file.num_bytes, file.label) for file in files), strict=True)
    return ImageSet(names, labels, root=root, file_sizes=sizes)


def _draw(splits: dict[str, ImageSet], split: str, fraction: float, seed: int) -> list[str]:
    """Moves a share of train into a new split; returns the note that says so."""
    train = splits["train"]
    kept, drawn = stratified_split(train.labels, fraction, seed)
    if not len(drawn):
        return [f"there is no {split} split: its share is 0, or every class has one image"]
    splits["train"], splits[split] = train.take(kept), train.take(drawn)
    return [f"{split} is {len(drawn)} of {len(train)} training images, drawn class by class with seed {seed}"]


def _in_order(splits: dict[str, ImageSet]) -> dict[str, ImageSet]:
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}
