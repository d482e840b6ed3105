"""Where images come from: folders, and data sets that come along. A `Dataset` holds names and labels, not pixels."""

import difflib
import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from vitreous.data.folders import LAYOUT, ImageFile, folder_error, is_image_name, read_folder, shorten, walk_files
from vitreous.data.images import decode_image
from vitreous.data.splits import check_fractions, stratified_split
from vitreous.errors import DataError, MissingPathError

BUILT_IN = ("digits",)
"""Data sets that need no folder."""


@dataclass(frozen=True, eq=False)
class Example:
    """One image and its label.

    Args:
        image: uint8, (H, W, C).
        label: Class, from 0; -1 if it is not known.
    """

    image: np.ndarray
    label: int


class ImageSet(Sequence[Example]):
    """Images in an order, each with a name and a label; the pixels are read when asked for.

    Args:
        names: A name for each image. For files, the path relative to `root`.
        labels: Class of each image, from 0. Default: -1, not known.
        root: Folder of the files.
        arrays: The images themselves, uint8 of shape (N, H, W, C), or a list of (H, W, C); `root` is then not used.
        file_sizes: Bytes of each file, where known.

    Example:
        >>> import numpy as np
        >>> images = ImageSet(["a", "b"], [0, 1], arrays=np.zeros((2, 8, 8, 1), "uint8"))
        >>> images.load(1, num_channels=3).shape
        (8, 8, 3)
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        root: str | Path | None = None,
        arrays: Sequence[np.ndarray] | np.ndarray | None = None,
        file_sizes: Sequence[int] | np.ndarray | None = None,
    ):
        self.names = list(names)
        self.labels = np.asarray(np.full(len(self.names), -1) if labels is None else labels, "int32")
        self.root = None if root is None else Path(root)
        self.arrays = arrays
        self.file_sizes = np.asarray(np.zeros(len(self.names)) if file_sizes is None else file_sizes, "int64")
        parts = (self.names, self.labels, self.file_sizes, self.names if arrays is None else arrays)
        if len({len(part) for part in parts}) != 1:
            raise DataError(
                "Cannot build an ImageSet. Expected as many labels, sizes and arrays as names. Received: "
                f"{len(self.names)} names, {len(self.labels)} labels, {len(self.file_sizes)} file sizes, "
                f"{'no' if arrays is None else len(arrays)} arrays. Pass one of each for every image."
            )

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageSet": ...
    def __getitem__(self, index: int | slice) -> "Example | ImageSet":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        index = range(len(self))[index]
        return Example(self.load(index), int(self.labels[index]))

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images)"

    def path(self, index: int) -> Path | None:
        """Returns the file of an image, or None if it is held in memory."""
        return None if self.arrays is not None else Path(self.root or "", self.names[index])

    def load(self, index: int, num_channels: int = 3, *, min_size: int | None = None) -> np.ndarray:
        """Reads the pixels of one image.

        Args:
            index: Position, from 0.
            num_channels: 3 (RGB) or 1 (grey).
            min_size: As for `decode_image`.

        Returns:
            uint8, (H, W, num_channels). An image held in memory is returned itself where its channels agree.

        Raises:
            ImageError: If the file is not a whole image.
            MissingPathError: If the file is no longer there.
        """
        if self.arrays is None:
            path = os.path.join(self.root or "", self.names[index])
            return decode_image(path, num_channels, name=self.names[index], min_size=min_size)
        array = self.arrays[index]
        if array.shape[-1] == num_channels:
            return array
        if array.shape[-1] == 1:
            return np.repeat(array, num_channels, axis=-1)
        from PIL import Image

        return decode_image(Image.fromarray(array), num_channels, name=self.names[index])

    def take(self, indices: Iterable[int] | np.ndarray) -> "ImageSet":
        """Returns the images at `indices`, in that order."""
        places = np.fromiter(indices, "int64") if not isinstance(indices, np.ndarray) else indices
        arrays = self.arrays
        if arrays is not None:
            arrays = arrays[places] if isinstance(arrays, np.ndarray) else [arrays[i] for i in places]
        return ImageSet(
            [self.names[i] for i in places],
            self.labels[places],
            root=self.root,
            arrays=arrays,
            file_sizes=self.file_sizes[places],
        )


@dataclass(kw_only=True)
class Dataset:
    """Images in splits, their classes, and what was found on the way.

    Args:
        name: Built-in name, or name of the folder.
        root: The folder; None for a built-in set.
        class_names: Name of each class; label k means `class_names[k]`.
        splits: `ImageSet` under `"train"`, and under `"val"` and `"test"` where there are such images.
        broken: Files that look like images by name and are not, with the reason; they are in no split.
        num_ignored: Files that are no images by name, or that lie outside the class folders.
        notes: Facts worth printing, a line each.
    """

    name: str
    root: Path | None
    class_names: tuple[str, ...]
    splits: dict[str, ImageSet]
    broken: dict[str, str] = field(default_factory=dict)
    num_ignored: int = 0
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 in hex over classes, splits, names, labels, file sizes, and pixels held in memory; not over `root`."""
        digest = hashlib.sha256()

        def add(*texts: str) -> None:
            digest.update("\0".join((*texts, "\n")).encode("utf-8", "surrogateescape"))

        add("classes", *self.class_names)
        for split, images in sorted(self.splits.items()):
            add("split", split, str(len(images)), *images.names)
            digest.update(images.labels.astype("<i4").tobytes())
            digest.update(images.file_sizes.astype("<i8").tobytes())
            for array in () if images.arrays is None else images.arrays:
                add("array", str(array.shape))
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


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
