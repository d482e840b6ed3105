"""Images with columns beside them, as tables and shards have them: which column is what, and what follows from it."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.image_set import ImageSet
from vitreous.data.images import IMAGE_SUFFIXES
from vitreous.data.sources.contents import SPLIT_NAMES, Contents, leave_out_broken, shorten, source_error
from vitreous.data.sources.labels import encode_labels, parse_labels, sort_names, to_text
from vitreous.data.stores import Store
from vitreous.errors import DataError
from vitreous.spec import DataConfig

# Names of columns, the most telling first: a name counts only if no earlier line has one.
_IMAGE_NAMES = (
    ("image", "images", "img"),
    ("image_path", "img_path", "path", "filepath", "file_path", "image_file", "filename", "file_name", "file"),
    ("image_name", "image_url", "url", "photo", "picture"),
)
_LABEL_NAMES = (
    ("cls",),
    ("label", "labels"),
    ("class", "class_name", "classes", "category", "categories", "target", "tag", "tags", "fine_label"),
    ("species", "diagnosis", "breed", "y"),
    ("txt",),
)
_SPLIT_NAMES = (("split",), ("subset", "set", "partition", "usage", "data_set", "dataset"))
_GROUP_NAMES = re.compile(
    r"(patient|subject|person|camera|group|scene|location|video|study|animal|site)(_?(id|no|name))?"
)
_OPTIONS = {
    "images": "image_column (--image-column)",
    "labels": "label_column (--label-column)",
    "splits": "split_column (--split-column)",
    "groups": "group_column (--group-column)",
}


@dataclass(kw_only=True)
class Rows:
    """Images, each with a value in every column.

    Args:
        what: The source in errors, such as `"the table birds.csv"`.
        name: What to call the data set.
        names: Name of each image.
        store: Where the images lie; row n is image n.
        columns: The other columns, N values each.
        file_sizes: Bytes of each image, where known.
        class_names: Names that the integers of a column stand for.
        splits: Split that each row is in, where the source says so by where the row lies.
        splits_given_by: What says so, in words.
        remedy: What to do where no image of a class can be read.
        notes: Facts worth printing.
    """

    what: str
    name: str
    names: Sequence[str]
    store: Store
    columns: Mapping[str, Sequence[Any]]
    file_sizes: Sequence[int] | np.ndarray | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    splits: Sequence[str] | None = None
    splits_given_by: str = "the shards"
    remedy: str = "Mend the images, or leave out these rows."
    notes: list[str] = field(default_factory=list)

    def images(self, without: Sequence[str] = ()) -> ImageSet:
        """Returns all images, without labels; columns named in `without` are left out."""
        columns = {name: as_array(values) for name, values in self.columns.items() if name not in without}
        return ImageSet(self.names, store=self.store, file_sizes=self.file_sizes, columns=columns)

    def label(self, config: DataConfig, *, min_classes: int = 2, may_lack: Collection[str] = ()) -> Contents:
        """Returns the images with the labels and the splits that the columns give.

        Args:
            config: Which column is what.
            min_classes: Classes that there must be: 2 to train, 1 to evaluate or with several labels. To evaluate,
                held-out images may have classes of their own.
            may_lack: Which of `split_column` and `group_column` need not be there.

        Raises:
            DataError: If a column is not there or cannot be told, there are too few classes, or a class has no readable
                training image.
        """
        notes = list(self.notes)
        column = self._find("labels", config.label_column, _LABEL_NAMES, notes, used=(config.group_column,))
        self._check_group_column(config, column)
        if column is None:
            raise unsure(self.what, "labels", self.columns)
        if config.group_column is not None and "group_column" not in may_lack:
            self._find("groups", config.group_column, (), notes)
        parsed, is_multi_label = parse_labels(
            self.columns[column], config.label_separator, self.class_names.get(column)
        )
        notes += _notes_on_labels(parsed, self.columns[column], is_multi_label, column)
        rows = np.array([row for row, labels in enumerate(parsed) if labels is not None], "int64")
        splits, given_by, left_out = self._split_rows(rows, config, notes, is_strict=min_classes > 1, may_lack=may_lack)
        if left_out:
            notes.append(left_out)
        main = [split for split in ("train", "all") if split in splits] if min_classes > 1 else list(splits)
        declared = self.class_names.get(column)
        used = {name for split in main for row in splits[split] for name in parsed[row] or ()}
        class_names = sort_names(used) if declared is None else tuple(name for name in declared if name in used)
        if declared is not None and len(class_names) < len(declared):
            unused = [name for name in declared if name not in used]
            notes.append(f"{len(unused)} of {len(declared)} named classes have no training image: {shorten(unused)}")
        if odd := [name for name in class_names if not name.isprintable()]:
            raise source_error(
                self.what,
                "labels in Unicode that can be printed",
                f"label={odd[0]!r} in {column!r}",
                "Mend this label.",
            )
        if len(class_names) < (1 if is_multi_label else min_classes):
            raise source_error(
                self.what,
                "at least two classes" if min_classes > 1 and not is_multi_label else "labels",
                f"classes={list(class_names)} in the column {column!r} of {len(rows)} labelled images",
                f"Name the column of the labels with {_OPTIONS['labels']}.",
            )
        if min_classes > 1 and not is_multi_label and len(class_names) == len(splits[main[0]]) > 10:
            raise source_error(
                self.what,
                "classes with several images each",
                f"{len(class_names)} classes for {len(class_names)} images in the column {column!r}",
                f"Name the column of the labels with {_OPTIONS['labels']}.",
            )
        for split, places in splits.items():
            if unknown := sort_names({name for row in places for name in parsed[row] or ()} - used):
                raise source_error(
                    self.what,
                    "the classes of held-out images among those of the training images",
                    f"unknown classes in {split}: {shorten(unknown)}",
                    "Mend these labels, or add training images for them.",
                )
        images = self.images(without=(column,))
        sets = {}
        for split, places in splits.items():
            labels = encode_labels([parsed[row] or () for row in places], class_names, is_multi_label)
            sets[split] = images.take(places).with_labels(labels)
        sets, broken = leave_out_broken(self.what, sets, class_names, self.remedy, min_classes=min_classes)
        return Contents(
            name=self.name,
            class_names=class_names,
            splits=sets,
            broken=broken,
            notes=notes,
            given_by=given_by,
        )

    def _find(
        self,
        kind: str,
        given: str | None,
        names: Sequence[Sequence[str]],
        notes: list[str],
        used: Sequence[str | None] = (),
    ) -> str | None:
        return find_column(self.what, kind, given, names, self.columns, notes, used)

    def _check_group_column(self, config: DataConfig, column: str | None) -> None:
        """Makes sure that the groups are not the labels, which are in `column`, as far as one knows."""
        group = config.group_column
        if group is None or group not in self.columns:
            return
        if config.label_column is None:
            is_label = _tier(group, _LABEL_NAMES) < (
                len(_LABEL_NAMES) if column is None else _tier(column, _LABEL_NAMES)
            )
        else:
            is_label = config.label_column == group
        if is_label:
            raise source_error(
                self.what,
                "groups in another column than the labels",
                f"group_column={group!r}",
                f"Name another column for the groups, or for the labels, with {_OPTIONS['labels']}.",
            )

    def _split_rows(
        self,
        rows: np.ndarray,
        config: DataConfig,
        notes: list[str],
        *,
        is_strict: bool,
        may_lack: Collection[str] = (),
    ) -> tuple[dict[str, np.ndarray], str, str]:
        """Returns the rows of each split, what gives the splits, and a note on the rows that are in none."""
        if self.splits is not None and config.split_column is None:
            values: list[str | None] = list(self.splits)
            given_by = self.splits_given_by
        else:
            if config.split_column not in (None, *self.columns) and "split_column" in may_lack:
                return {"all": rows}, "", ""  # other data than those of training: all of it is measured
            column = find_column(self.what, "splits", config.split_column, _SPLIT_NAMES, self.columns, [])
            if column is None:
                return {"all": rows}, "", ""
            texts = [to_text(value) for value in self.columns[column]]
            values = [SPLIT_NAMES.get((text or "").lower()) for text in texts]
            unknown = sorted({text for text, value in zip(texts, values, strict=True) if text and value is None})
            is_meant = (
                config.split_column is not None or any(values) or (is_strict and _tier(column, _SPLIT_NAMES) == 0)
            )
            if unknown and not is_meant:
                notes.append(f"the column {column} is not used as split: {shorten(unknown)} is not train, val or test")
                return {"all": rows}, "", ""
            if unknown:
                raise source_error(
                    self.what,
                    f"one of {', '.join(SPLIT_NAMES)} in the column {column!r}",
                    f"values={unknown[:5]}",
                    "Rename these values, or "
                    + ("the column." if config.split_column is None else "leave out split_column."),
                )
            given_by = f"the values of {column}"
            if config.split_column is None:
                notes.append(f"splits: column {column}")
        found = {s: rows[[values[row] == s for row in rows]] for s in ("train", "val", "test")}
        splits = {split: places for split, places in found.items() if len(places)}
        if is_strict and "train" not in splits:
            raise source_error(
                self.what, "images for training", f"splits={list(splits)}", "Mark some as train, or drop the splits."
            )
        if not splits:
            return {"all": rows}, "", ""
        num_left = len(rows) - sum(map(len, splits.values()))
        return splits, given_by, f"{num_left} images in no split are left out" if num_left else ""


def find_column(
    what: str,
    kind: str,
    given: str | None,
    names: Sequence[Sequence[str]],
    columns: Mapping[str, Any],
    notes: list[str],
    used: Sequence[str | None] = (),
) -> str | None:
    """Returns the column that was named, or the one whose name tells what it holds; None if no name does.

    Args:
        what: The source in errors.
        kind: What the column holds: images, labels, splits or groups.
        given: The name, if one was given.
        names: Names that tell it, the most telling first.
        columns: The columns that there are.
        notes: A line is added if the column was not named.
        used: Columns that hold something else.

    Raises:
        DataError: If there is no column of that name, or several columns may be meant.
    """
    if given is not None:
        if given not in columns:
            raise source_error(
                what,
                f"a column {given!r} for the {kind}",
                f"columns={list(columns)}",
                f"Name one of these with {_OPTIONS[kind]}.",
            )
        return given
    for tier in range(len(names)):
        found = [name for name in columns if name not in used and _tier(name, names) == tier]
        if len(found) > 1:
            raise unsure(what, kind, columns, found)
        if found:
            notes.append(f"{kind}: column {found[0]}")
            return found[0]
    return None


def _tier(column: str, names: Sequence[Sequence[str]]) -> int:
    """Returns how telling the name of a column is: 0 is the most, the number of tiers is not at all."""
    normal = re.sub(r"[\s.-]+", "_", column.strip().lower())
    return next((number for number, tier in enumerate(names) if normal in tier), len(names))


def unsure(what: str, kind: str, columns: Mapping[str, Any], candidates: Sequence[str] = ()) -> DataError:
    """Returns the error that says that nobody can tell which column is meant."""
    received = f"columns={list(columns)}" + (f", of which {shorten(candidates)} may be meant" if candidates else "")
    return source_error(what, f"to know which column holds the {kind}", received, f"Name it with {_OPTIONS[kind]}.")


def find_image_column(what: str, given: str | None, columns: Mapping[str, Sequence[Any]], notes: list[str]) -> str:
    """Returns the column of the images: the one that was named, or is named so, or the only one that looks so.

    Raises:
        DataError: If there is none, or several columns may be meant.
    """
    looks = [name for name, values in columns.items() if _looks_like_images(values)]
    if given is None and len(looks) == 1:
        notes.append(f"images: column {looks[0]}")
        return looks[0]
    among = {name: columns[name] for name in looks} or columns
    found = find_column(what, "images", given, _IMAGE_NAMES, columns if given is not None else among, notes)
    if found is None:
        raise unsure(what, "images", columns, looks)
    return found


def _looks_like_images(values: Sequence[Any]) -> bool:
    """Whether the first values are names of image files, or bytes."""
    if getattr(values, "is_bytes", False):
        return True
    sample = [value for value in values[:100] if value not in (None, "")]
    return bool(sample) and all(isinstance(value, str) and is_image_path(value) for value in sample)


def is_image_path(text: str) -> bool:
    """Whether a path or URL is an image by its suffix."""
    path = re.sub(r"[?#].*", "", text) if "://" in text else text
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def as_array(values: Sequence[Any]) -> np.ndarray:
    """Returns a column as an array of one dimension: numbers as such, all else as objects."""
    if isinstance(values, np.ndarray):
        return values
    if values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return np.asarray(values)
    return np.fromiter(values, object, len(values))


def _notes_on_labels(
    parsed: Sequence[tuple[str, ...] | None], values: Sequence[Any], is_multi_label: bool, column: str
) -> list[str]:
    notes = []
    if num_missing := sum(labels is None for labels in parsed):
        notes.append(f"{num_missing} images without a label are left out")
    if is_multi_label:
        if num_empty := sum(labels == () for labels in parsed):
            notes.append(f"{num_empty} images have none of the labels")
        return notes
    for separator in "|;,":
        num = sum(isinstance(value, str) and separator in value for value in values)
        if num * 10 > len(values):
            notes.append(
                f"{num} texts in {column} hold {separator!r}: if that parts several labels, "
                f"pass --label-separator '{separator}'"
            )
            break
    return notes


def hint_groups(columns: Mapping[str, Sequence[Any]], config: DataConfig) -> list[str]:
    """Returns notes on columns that may say which images belong together, where no group column was named."""
    if config.group_column is not None:
        return []
    return [
        f"if images of one {name} belong together, pass --group-column {name}"
        for name in columns
        if _GROUP_NAMES.fullmatch(name.strip().lower()) and name != config.label_column
    ][:1]


def stem_of(path: str | Path) -> str:
    """Returns the name of a file without its suffix, or of a folder."""
    return Path(path).stem or str(path)
