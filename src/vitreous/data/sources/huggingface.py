"""Data sets of Hugging Face's `datasets`, as `save_to_disk` leaves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.sources.columns import Rows, find_image_column, hint_groups
from vitreous.data.sources.contents import SPLIT_NAMES, shorten, source_error
from vitreous.data.sources.tables import ArrowImages, names_of_paths
from vitreous.data.stores import FolderStore, JoinedStore, Store
from vitreous.errors import MissingDependencyError
from vitreous.spec import DataConfig

_BATCH = 1000


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` left this folder: one data set, or several splits."""
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_one or (folder / "dataset_dict.json").is_file()


def read_saved_dataset(folder: Path, config: DataConfig) -> Rows:
    """Reads a data set that `save_to_disk` left. Images stay on disk, mapped into memory.

    Args:
        folder: The folder.
        config: Which column is what. Classes have the names that a `ClassLabel` gives them.

    Raises:
        MissingDependencyError: If `datasets` is not installed.
        DataError: If the folder is damaged, or nobody can tell which column holds the images.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "datasets", f"The data set {folder}") from error

    what = f"the data set {folder}"
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever Arrow and datasets raise for a file that is not theirs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise source_error(what, "a folder that save_to_disk left", reason, "Save it anew.") from error
    notes: list[str] = []
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"all": loaded}
    if known := {name: part for name, part in parts.items() if name.lower() in SPLIT_NAMES}:
        if unknown := [name for name in parts if name not in known]:
            notes.append(f"splits passed over: {shorten(unknown)}")
        parts = known
    features = next(iter(parts.values())).features
    if any(set(part.features) != set(features) for part in parts.values()):
        columns = {name: sorted(part.features) for name, part in parts.items()}
        raise source_error(what, "the same columns in every split", f"columns={columns}", "Save it with equal columns.")
    if not sum(map(len, parts.values())):
        raise source_error(what, "images", "an empty data set", "Save one with rows.")
    kinds = {name: _kind(datasets, feature) for name, feature in features.items()}
    plain = [name for name, kind in kinds.items() if kind == "plain"]
    values = {name: [each for part in parts.values() for each in part.select_columns([name])[name]] for name in plain}
    candidates: dict[str, Any] = {name: values.get(name, _Bytes()) for name, kind in kinds.items() if kind != "other"}
    column = find_image_column(what, config.image_column, candidates, notes)
    names, store, sizes = _images(folder, parts, column, values)
    others = {name: each for name, each in values.items() if name != column}
    names_of = {name: _class_names(datasets, features[name]) for name in others}
    has_splits = isinstance(loaded, datasets.DatasetDict) and bool(known)
    return Rows(
        what=what,
        name=folder.resolve().name,
        names=names,
        store=store,
        columns=others,
        file_sizes=sizes,
        class_names={name: each for name, each in names_of.items() if each is not None},
        splits=[SPLIT_NAMES[name.lower()] for name, part in parts.items() for _ in range(len(part))]
        if has_splits
        else None,
        splits_given_by="the splits of the data set",
        notes=notes + hint_groups(others, config),
    )


class _Bytes:
    """A column of images, which is not read to find out whether it is one."""

    is_bytes = True


def _kind(datasets: Any, feature: Any) -> str:
    """Returns "images" for a column of images, "plain" for text, numbers and lists of those, and "other"."""
    if isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and "binary" in feature.dtype):
        return "images"
    inner = feature
    while getattr(inner, "feature", None) is not None:
        inner = inner.feature
    return "plain" if isinstance(inner, datasets.Value | datasets.ClassLabel) else "other"


def _class_names(datasets: Any, feature: Any) -> list[str] | None:
    """Returns the names of a `ClassLabel`, or of a list of them."""
    inner = getattr(feature, "feature", None) or feature
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _images(
    folder: Path, parts: Mapping[str, Any], column: str, values: Mapping[str, list[Any]]
) -> tuple[list[str], Store, np.ndarray | None]:
    """Returns name, store and bytes of the images."""
    if column in values:  # paths
        return [str(path) for path in values[column]], FolderStore(folder), None
    stores = [SavedImages(part, column, str(folder)) for part in parts.values()]
    names = [name for store, split in zip(stores, parts, strict=True) for name in store.names(split)]
    if len(set(names)) < len(names):
        names = [f"{split}/{row}" for split, part in parts.items() for row in range(len(part))]
    sizes = np.concatenate([store.sizes() for store in stores])
    return names, JoinedStore(stores, [len(store) for store in stores]), sizes


class SavedImages(ArrowImages):
    """A column of images in a `datasets.Dataset`, whose rows may be any of those that lie on disk.

    Args:
        dataset: The data set.
        column: Which column.
        root: Folder that paths count from.
    """

    def __init__(self, dataset: Any, column: str, root: str):
        self.dataset = dataset.select_columns([column]).with_format("arrow")
        self.column = column
        self.root = root

    def __len__(self) -> int:
        return len(self.dataset)

    def _batches(self) -> list[ArrowImages]:
        return [ArrowImages(batch.column(self.column)) for batch in self.dataset.iter(_BATCH)]

    def names(self, stem: str) -> list[str]:
        """Returns a name for each image: its path where every image has another one, else the row's number."""
        return names_of_paths([path for batch in self._batches() for path in batch.paths()], stem, len(self))

    def sizes(self) -> np.ndarray:
        """Returns the bytes of each image; 0 where it has none."""
        return np.concatenate([batch.sizes() for batch in self._batches()] or [np.zeros(0, int)])

    def _cell(self, row: int) -> tuple[Any, Any]:
        return ArrowImages(self.dataset[row].column(self.column))._cell(0)
