"""Where images come from: folders, tables, archives, shards, the network, and data sets that come along.

`read_source` finds out which kind of source it is and reads it; `make_dataset` draws the splits that it does not give.
No pixels are read but those of headers.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.sources.archives import (
    ARCHIVE_SUFFIXES,
    archive_suffix,
    index_tar,
    tree_of_tar,
    tree_of_zip,
)
from vitreous.data.sources.built_in import BUILT_IN, is_built_in, load_built_in
from vitreous.data.sources.columns import Rows, is_image_path
from vitreous.data.sources.contents import Contents, join_images, members_of, shorten, source_error
from vitreous.data.sources.folders import LAYOUT, FolderTree, Tree, folder_error, is_image_name, read_folder, walk_files
from vitreous.data.sources.huggingface import is_saved_dataset, read_saved_dataset
from vitreous.data.sources.labels import to_text
from vitreous.data.sources.remote import RemoteStore, fetch, is_remote, list_files, match_urls, tree_of_url
from vitreous.data.sources.shards import expand_braces, is_pattern, is_shard, match_files, read_shards, shards_in
from vitreous.data.sources.tables import TABLE_SUFFIXES, read_table
from vitreous.data.splits import assign_folds, split_examples
from vitreous.errors import DataError, MissingPathError
from vitreous.spec import DataConfig


def load_dataset(data: str | Path, *, seed: int = 0, config: DataConfig | None = None, **changes: Any) -> Dataset:
    """Finds the images of a data set, their classes and their splits. No pixels are read but those of the headers.

    The data are one of these:

    - A folder with one folder for each class; or train/ (training/), val/ (valid/, validation/, dev/, eval/,
      evaluation/) and test/ (testing/), in any case, with one folder for each class in them. Images in folders below
      a class count for that class.
    - An archive (.zip, .tar, .tar.gz ...) laid out as such a folder.
    - WebDataset shards: a .tar, a folder of them, or a pattern (`"shard-{000..012}.tar"`), with labels in .cls, .txt or
      .json members.
    - A folder that `save_to_disk` of Hugging Face's `datasets` left.
    - The URL (s3://, gs://, https://) of a folder, a table, an archive or shards. The images of a folder or of a table
      are fetched when they are read, and not checked before.
    - A table (.csv, .tsv, .jsonl, .parquet) with a column of paths, URLs or (Parquet) bytes, a column of labels, one
      label or several, and perhaps a column that says train, val or test. Paths count from the table's folder.

    What the source gives decides the splits:

    - val and test given: both are used as they are.
    - One of them given: it is the test set, whatever its name; validation images are drawn from train.
    - None given: both are drawn; or the test set is one of `num_folds` parts.

    What is drawn is drawn at random: class by class (see `stratified_split`), label by label where an image may have
    several, and by whole groups where there is a `group_column`. Hidden files are passed over.

    Args:
        data: One of the above, or the name of a built-in set: `"digits"` (1797 grey images of 8x8 pixels, 360 of them
            for test whatever the seed); `"cifar10"`, `"cifar100"`, `"mnist"`, `"fashion_mnist"` (fetched by Keras into
            its cache). A folder of that very name is reached as `./digits`.
        seed: Decides what is drawn.
        config: Columns and splits. Default: `DataConfig()`.
        **changes: Fields of `DataConfig` that differ from `config`.

    Returns:
        A `Dataset`.

    Raises:
        MissingPathError: If `data` is neither.
        DataError: If the source is not laid out like that, or a class has no readable image.
        ConfigError: If an option is out of range; if the shares leave nothing to train on.

    Example:

    ```python
    dataset = vitreous.load_dataset("birds.csv", label_column="species", val_fraction=0.2)
    ```
    """
    config = change_config(config, changes)
    return make_dataset(data, read_source(data, config), config, seed=seed)


def change_config(config: DataConfig | None, changes: dict[str, Any]) -> DataConfig:
    """Returns a config with some fields changed.

    Raises:
        UnknownNameError: If there is no such field.
        ConfigError: If a value is out of range.
    """
    return DataConfig.from_dict({**(config or DataConfig()).to_dict(), **changes})


def read_source(
    data: str | Path, config: DataConfig, *, min_classes: int = 2, may_lack: Collection[str] = ()
) -> Contents:
    """Reads what a source holds; nothing is drawn.

    Args:
        data: As for `load_dataset`.
        config: Which column is what.
        min_classes: Classes that there must be: 2 to train, 1 to evaluate.
        may_lack: Which of `split_column` and `group_column` need not be there.

    Raises:
        MissingPathError: If there is no such source.
        DataError: If it cannot be used.
    """
    if is_built_in(data):
        return load_built_in(str(data))
    source = _open_remote(str(data), config) if is_remote(data) else _open_local(data, config)
    if isinstance(source, Rows):
        return source.label(config, min_classes=min_classes, may_lack=may_lack)
    contents = read_folder(source, min_classes=min_classes)
    contents.name = _name_of(data)
    return contents


def _open_local(data: str | Path, config: DataConfig) -> Tree | Rows:
    """Returns what lies at a path: images with columns, or a tree of files."""
    if is_pattern(data):
        _check_are_tars(str(data), paths := match_files(str(data)))
        return read_shards(paths, config, name=_name_of(data), source=str(data))
    path = Path(data)
    if not path.exists():
        nearest = difflib.get_close_matches(str(data), BUILT_IN, n=1)
        raise MissingPathError(
            f"Cannot load the data set {data}. Expected a folder, a file, or a built-in name: {', '.join(BUILT_IN)}. "
            f"Received: data={str(data)!r}, which does not exist. "
            + (f"Did you mean {nearest[0]}?" if nearest else "Check the path.")
        )
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved_dataset(path, config)
        if shards := shards_in(path):
            return read_shards(shards, config, name=_name_of(data), source=str(path))
        return FolderTree(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return read_table(path, config)
    if archive_suffix(path):
        return _open_archive(path, config, path)
    raise DataError(
        f"Cannot load the data set {data}. Expected a folder, a table ({', '.join(TABLE_SUFFIXES)}) or an archive "
        f"({', '.join(ARCHIVE_SUFFIXES)}). Received: a file of another kind. The layout of a folder is {LAYOUT}."
    )


def _open_remote(url: str, config: DataConfig) -> Tree | Rows:
    """Returns what lies at a URL. Tables, archives and shards are fetched, images of a folder when they are read."""
    if is_pattern(url):
        urls = [found for each in expand_braces(url) for found in match_urls(each)]
        _check_are_tars(url, list(map(Path, urls)))
        return read_shards([fetch(each) for each in urls], config, name=_name_of(url), source=url)
    bare = re.sub(r"[?#].*", "", url)
    if Path(bare).suffix.lower() in TABLE_SUFFIXES:
        return read_table(fetch(url), config, root=bare.rpartition("/")[0], source=url)
    if archive_suffix(bare):
        return _open_archive(fetch(url), config, url)
    files = list_files(url)
    if all(name.endswith(".tar") for name in files):
        shards = [fetch(f"{url.rstrip('/')}/{name}") for name in sorted(files)]
        return read_shards(shards, config, name=_name_of(url), source=url)
    return tree_of_url(url, files)


def _check_are_tars(pattern: str, paths: Sequence[Path]) -> None:
    if other := [path.name for path in paths if path.suffix != ".tar"]:
        raise source_error(
            f"the files {pattern}", "tar shards", shorten(other), "Name one file, a folder, or a pattern of .tar files."
        )


def _name_of(data: str | Path) -> str:
    """Returns what to call the data set at a path."""
    path = Path(source_path(data))
    if is_pattern(data):
        return re.sub(r"[-_.]+$", "", re.split(r"[{*?]", path.name)[0]) or path.parent.name
    name = path.name or str(path)
    return name[: -len(archive_suffix(name) or "")] or name if archive_suffix(name) else name


def _open_archive(path: Path, config: DataConfig, source: str | Path) -> Tree | Rows:
    """Returns what an archive holds: a tree, or the examples of a shard."""
    if archive_suffix(path) == ".zip":
        return tree_of_zip(path, source)
    index = index_tar(path)
    if is_shard(index):
        return read_shards([path], config, name=_name_of(source), source=str(source), indices=[index])
    return tree_of_tar(index, source)


def source_path(data: str | Path) -> str | Path:
    """Returns where a source lies: its whole path, or its URL."""
    return str(data) if is_remote(data) else Path(data).resolve()


def make_dataset(data: str | Path, contents: Contents, config: DataConfig, *, seed: int = 0) -> Dataset:
    """Draws the splits that a source does not give.

    Args:
        data: The source.
        contents: What it holds.
        config: What to draw.
        seed: The same seed draws the same images.

    Raises:
        DataError: If folds are wanted of a source that is split already, or groups of one without that column or with
            a single group.
    """
    splits, notes = dict(contents.splits), list(contents.notes)
    column = config.group_column
    if column is not None and any(column not in images.columns for images in splits.values()):
        raise source_error(
            str(data),
            "a source with columns, one of them group_column",
            f"group_column={column!r}",
            "List the images in a table that has this column, or leave it out.",
        )
    if "all" in splits:
        splits["train"] = splits.pop("all")
    if config.num_folds is not None:
        notes += _draw_fold(data, splits, contents, config.num_folds, config, seed)
    elif "val" in splits and "test" in splits:
        notes.append(f"train, val and test are as {contents.given_by} give them")
    elif "val" in splits or "test" in splits:
        held_out = "val" if "val" in splits else "test"
        splits["test"] = splits.pop(held_out)
        notes.append(f"test is {contents.places.get(held_out, 'as ' + contents.given_by + ' give it')}")
        if config.val_fraction:
            _check_groups(data, splits["train"], config)
        notes += _draw(splits, "val", config.val_fraction, config, seed)
    else:
        num_images = len(splits["train"])
        if config.val_fraction or config.test_fraction:
            _check_groups(data, splits["train"], config)
        notes += _draw(splits, "test", config.test_fraction, config, seed)
        notes += _draw(splits, "val", config.val_fraction * num_images / len(splits["train"]), config, seed)
    notes += _notes_on_groups(splits, config)
    notes += _notes_on_classes(splits, contents.class_names)
    return Dataset(
        name=contents.name,
        root=None if is_built_in(data) else str(data) if is_remote(data) else Path(data),
        class_names=contents.class_names,
        splits={split: splits[split] for split in ("train", "val", "test") if split in splits},
        broken=contents.broken,
        num_ignored=contents.num_ignored,
        notes=notes,
    )


def _groups(images: ImageSet, config: DataConfig) -> np.ndarray | None:
    """Returns the group of each image; None if there are none. An image without a value is a group of its own."""
    if config.group_column is None:
        return None
    values = map(to_text, images.columns[config.group_column])
    return np.array([f"#{row}" if v is None else f"={v}" for v, row in zip(values, images.rows, strict=True)])


def _check_groups(data: str | Path, images: ImageSet, config: DataConfig) -> None:
    groups = _groups(images, config)
    if groups is not None and len(np.unique(groups)) < 2:
        raise DataError(
            f"Cannot split {data} by whole groups. Expected at least two groups of {config.group_column}. "
            "Received: 1. Leave out group_column, or set val_fraction and test_fraction to 0."
        )


def _draw(splits: dict[str, ImageSet], split: str, fraction: float, config: DataConfig, seed: int) -> list[str]:
    """Moves a share of train into a new split; returns the note that says so."""
    train = splits["train"]
    groups = _groups(train, config)
    kept, drawn = split_examples(train.labels, fraction, seed, groups)
    if not len(drawn):
        why = "every class has one image" if groups is None else f"no group of {config.group_column} can be spared"
        return [f"there is no {split} split: its share is 0, or {why}"]
    splits["train"], splits[split] = train.take(kept), train.take(drawn)
    return [f"{split} is {len(drawn)} of {len(train)} training images, drawn {_manner(train, config)} with seed {seed}"]


def _manner(images: ImageSet, config: DataConfig) -> str:
    if config.group_column is not None:
        return f"by whole groups of {config.group_column}"
    return "label by label" if images.is_multi_label else "class by class"


def _draw_fold(
    data: str | Path, splits: dict[str, ImageSet], contents: Contents, num_folds: int, config: DataConfig, seed: int
) -> list[str]:
    """Makes one fold the test set, and draws val from the rest; returns the notes that say so."""
    if len(splits) > 1:
        raise DataError(
            f"Cannot make {num_folds} folds of {data}. Expected data that is not split. "
            f"Received: splits={list(contents.splits)}. Leave out the folds, or name the training images alone."
        )
    images, fold = splits["train"], config.fold or 1
    groups = _groups(images, config)
    num_parts = len(images) if groups is None else len(np.unique(groups))
    if num_parts < num_folds:
        unit = "images" if groups is None else f"groups of {config.group_column}"
        raise DataError(
            f"Cannot make {num_folds} folds of {data}. Expected at least as many {unit}. "
            f"Received: {num_parts}. Make fewer folds."
        )
    is_test = assign_folds(images.labels, num_folds, seed, groups) == fold - 1
    splits["train"], splits["test"] = images.take(np.flatnonzero(~is_test)), images.take(np.flatnonzero(is_test))
    note = (
        f"test is fold {fold} of {num_folds}, {is_test.sum()} of {len(images)} images, "
        f"drawn {_manner(images, config)} with seed {seed}"
    )
    share = config.val_fraction * len(images) / len(splits["train"])
    return [note, *_draw(splits, "val", min(share, 0.99), config, seed)]


def _notes_on_groups(splits: dict[str, ImageSet], config: DataConfig) -> list[str]:
    if config.group_column is None:
        return []
    groups = {split: [to_text(v) for v in images.columns[config.group_column]] for split, images in splits.items()}
    known = {split: {name for name in names if name is not None} for split, names in groups.items()}
    unknown = sum(name is None for names in groups.values() for name in names)
    notes = [f"{unknown} images have no {config.group_column}, and are a group each"] if unknown else []
    for split in ("val", "test"):
        if shared := sorted(known.get(split, set()) & known["train"]):
            notes.append(
                f"{len(shared)} groups of {config.group_column} are in train and in {split}, as the data give them: "
                f"{shorten(shared)}"
            )
    return notes


def _notes_on_classes(splits: dict[str, ImageSet], class_names: tuple[str, ...]) -> list[str]:
    """Returns notes on the classes that some split lacks."""
    num_classes = len(class_names)
    counts = {split: np.array([len(m) for m in members_of(images, num_classes)]) for split, images in splits.items()}
    total = sum(counts.values())
    missing = {f"without a {split} image": (counts[split] == 0) & (total > 1) for split in counts if split != "train"}
    missing = {"in train only, having one image": (total == 1) & (counts["train"] == 1), **missing}
    missing["without a train image"] = counts["train"] == 0
    notes = []
    for text, chosen in missing.items():
        if chosen.any():
            names = [name for name, is_chosen in zip(class_names, chosen, strict=True) if is_chosen]
            notes.append(f"{len(names)} of {num_classes} classes {text}: {shorten(names)}")
    return notes


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


def load_images(paths: str | Path | Iterable[str | Path], config: DataConfig | None = None) -> ImageSet:
    """Finds images without asking for labels.

    Args:
        paths: Image files, folders of images (searched to the bottom), and every other source that `load_dataset`
            takes; in that order.
        config: Which column of a table holds the images.

    Returns:
        An `ImageSet` with labels -1. Files are named by their path, other images as their source names them.

    Raises:
        MissingPathError: If a path does not exist.
        DataError: If a source has no images.
    """
    config = config or DataConfig()
    parts = [_images_at(path, config) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    return join_images(parts)


def _images_in(tree: Tree) -> ImageSet:
    """Returns all images of a tree."""
    found = sorted((name, size) for name, size in tree.walk("") if is_image_name(name))
    if not found:
        raise source_error(tree.what, "image files in it", "none", "Name one that has some.")
    names, sizes = zip(*found, strict=True)
    return tree.image_set(names, np.full(len(names), -1), sizes)


def _images_at(path: str | Path, config: DataConfig) -> ImageSet:
    if is_built_in(path):
        return load_built_in(str(path)).all_images()
    if is_remote(path):
        if is_image_path(str(path)):
            return ImageSet([str(path)], store=RemoteStore())
        source = _open_remote(str(path), config)
    else:
        is_listed = is_pattern(path) or archive_suffix(path) or Path(path).suffix.lower() in TABLE_SUFFIXES
        if not is_listed and not Path(path).is_dir():
            return ImageSet([str(file) for file in list_image_files([path])])
        source = _open_local(path, config)
    if isinstance(source, FolderTree):
        return ImageSet([str(file) for file in list_image_files([path])])
    return source.images() if isinstance(source, Rows) else _images_in(source)
