"""What a source holds before anything is drawn: its classes, its images by split, and which of them are broken."""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vitreous.data.image_set import ImageSet
from vitreous.data.stores import JoinedStore
from vitreous.errors import DataError, ImageError, MissingPathError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders, and words in a column, that mean a split, in lower case."""

_NUM_THREADS = 4
_CHUNK = 256


@dataclass(kw_only=True)
class Contents:
    """What a source holds.

    Args:
        name: What to call the data set.
        class_names: Name of each class; label k means `class_names[k]`.
        splits: `ImageSet` under `"train"`, `"val"` and `"test"` as the source gives them; `"all"` alone if it gives
            none. Broken images are in none.
        broken: Images that cannot be read, and why.
        num_ignored: Files that were passed over.
        notes: Facts worth printing, a line each.
        given_by: What gives the splits, in words.
        places: What each split is in the source, in words.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, ImageSet]
    broken: dict[str, str] = field(default_factory=dict)
    num_ignored: int = 0
    notes: list[str] = field(default_factory=list)
    given_by: str = "the folders"
    places: dict[str, str] = field(default_factory=dict)

    @property
    def has_splits(self) -> bool:
        """Whether the source itself says what is for training and what is held out."""
        return "all" not in self.splits

    @property
    def main(self) -> str:
        """Split that the training images are in: `"train"`, or `"all"`."""
        return "train" if self.has_splits else "all"

    def all_images(self) -> ImageSet:
        """Returns the images of all splits."""
        return join_images(list(self.splits.values()))


def join_images(parts: Sequence[ImageSet]) -> ImageSet:
    """Returns the images of several sets, one after another; columns that all of them have are kept."""
    first = parts[0]
    if len(parts) == 1:
        return first
    store, rows = first.store, [part.rows for part in parts]
    if any(part.store is not store for part in parts):
        lengths = [int(part.rows.max(initial=-1)) + 1 for part in parts]
        store = JoinedStore([part.store for part in parts], lengths)
        rows = [part.rows + start for part, start in zip(parts, [0, *np.cumsum(lengths)[:-1]], strict=True)]
    shared = [name for name in first.columns if all(name in part.columns for part in parts)]
    return ImageSet(
        [name for part in parts for name in part.names],
        np.concatenate([part.labels for part in parts]),
        store=store,
        rows=np.concatenate(rows),
        file_sizes=np.concatenate([part.file_sizes for part in parts]),
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in shared},
    )


def source_error(what: str, expected: str, received: str, remedy: str) -> DataError:
    """Returns the error that says why a source cannot be used.

    Args:
        what: The source, such as `"the folder photos"`.
        expected: What was expected.
        received: What was found.
        remedy: What to do, a sentence.
    """
    return DataError(f"Cannot use {what}. Expected {expected}. Received: {received}. {remedy}")


def shorten(names: Iterable[str], most: int = 5) -> str:
    """Returns a few of `names`, and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def members_of(images: ImageSet, num_classes: int) -> list[np.ndarray]:
    """Returns the positions of the images of each class, rising."""
    if images.is_multi_label:
        return [np.flatnonzero(images.labels[:, k]) for k in range(num_classes)]
    order = np.argsort(images.labels, kind="stable")
    ends = np.searchsorted(images.labels[order], np.arange(num_classes + 1))
    return [order[start:end] for start, end in itertools.pairwise(ends)]


def find_broken(images: ImageSet) -> dict[int, str]:
    """Looks at the header of every image, in threads; returns the positions of the broken ones, and why."""

    def check(start: int) -> list[tuple[int, str | None]]:
        places = range(start, min(start + _CHUNK, len(images)))
        return [(place, _check(images, place)) for place in places]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        chunks = pool.map(check, range(0, len(images), _CHUNK))
        return {place: reason for chunk in chunks for place, reason in chunk if reason}


def _check(images: ImageSet, place: int) -> str | None:
    try:
        return images.store.check(int(images.rows[place]), images.names[place])
    except (ImageError, MissingPathError) as error:
        return reason_of(error)


def reason_of(error: ImageError | MissingPathError) -> str:
    """Returns why an image could not be read, in a few words."""
    return error.reason if isinstance(error, ImageError) else "a file that is not there"


def leave_out_broken(
    what: str, splits: dict[str, ImageSet], class_names: tuple[str, ...], remedy: str, *, min_classes: int = 2
) -> tuple[dict[str, ImageSet], dict[str, str]]:
    """Leaves out images whose header is broken; to train, makes sure that each class has one that can be decoded.

    Args:
        what: The source, for errors.
        splits: Labelled images.
        class_names: The classes. Images of `"train"` or `"all"` are decoded, class by class, until one succeeds.
        remedy: What to do about a class without a readable image.
        min_classes: 2 to train; 1 to evaluate, where a single readable image is enough.

    Returns:
        The splits without what is broken (a split of which nothing is left is dropped), and the broken images with the
        reason.

    Raises:
        DataError: If a class has no readable training image; or no image at all can be read.
    """
    found = {split: find_broken(images) for split, images in splits.items()}
    main = next(split for split in ("train", "all", *splits) if split in splits)
    images, broken = splits[main], found[main]
    good: set[int] = set()
    for name, members in zip(class_names, members_of(images, len(class_names)), strict=True):
        if any(_decodes(images, int(place), broken, good) for place in members) or min_classes < 2:
            continue
        reasons = [f"{images.names[place]}: {broken[place]}" for place in members]
        raise source_error(
            what,
            "a readable training image in every class",
            f"class={name!r} with {len(members)} image files" + (f" ({shorten(reasons, 2)})" if reasons else ""),
            remedy,
        )
    kept = {}
    for split, images in splits.items():
        places = [place for place in range(len(images)) if place not in found[split]]
        if places:
            kept[split] = images.take(places) if found[split] else images
    told = {splits[split].names[place]: reason for split in splits for place, reason in found[split].items()}
    if not kept:
        shown = shorten([f"{name}: {reason}" for name, reason in told.items()], 2)
        raise source_error(what, "an image that can be read", f"{len(told)} broken ones ({shown})", remedy)
    return kept, told


def _decodes(images: ImageSet, place: int, broken: dict[int, str], good: set[int]) -> bool:
    """Whether an image can be decoded; it joins `broken` or `good`."""
    if place not in broken and place not in good:
        try:
            images.load(place, min_size=1)
            good.add(place)
        except (ImageError, MissingPathError) as error:
            broken[place] = reason_of(error)
    return place in good
