"""What a tree of files holds: its layout, its classes, its images. The tree may be a folder, an archive, or remote."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vitreous.data.image_set import ImageSet
from vitreous.data.images import IMAGE_SUFFIXES
from vitreous.data.sources.contents import SPLIT_NAMES, Contents, leave_out_broken, shorten, source_error
from vitreous.data.stores import FolderStore, Store
from vitreous.errors import DataError

LAYOUT = "one folder of images for each class, or train/, val/ and test/ with one folder for each class in each"

_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}


class Tree(Protocol):
    """Folders and files, whatever holds them. A prefix is a folder's path from the root, with a slash at its end."""

    what: str
    """What to call the tree in errors, such as `"the folder photos"`."""
    root: str
    """Where it lies."""
    notes: list[str]
    """Facts worth printing."""
    passed_over: Mapping[str, int]
    """How many files cannot be reached, by why not, in words."""

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Returns the folders, and the files with their bytes, sorted, without hidden ones; nothing if it is none."""
        ...

    def walk(self, prefix: str, seen: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
        """Yields the files below a folder, as (path relative to it, bytes), sorted; `seen` are not entered."""
        ...

    def image_set(self, names: Sequence[str], labels: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> ImageSet:
        """Returns the files of these names as images."""
        ...


class FolderTree:
    """A folder on this machine.

    Args:
        root: The folder.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self.what = f"the folder {root}"
        self.notes: list[str] = []
        self.passed_over: Mapping[str, int] = {}

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Returns the folders and files in a folder."""
        folder = os.path.join(self.root, prefix)
        return list_folder(folder) if os.path.isdir(folder) else ([], [])

    def walk(self, prefix: str, seen: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
        """Yields the files below a folder."""
        return walk_files(os.path.join(self.root, prefix), seen=[os.path.join(self.root, each) for each in seen])

    def image_set(self, names: Sequence[str], labels: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> ImageSet:
        """Returns files as images."""
        return ImageSet(names, labels, store=FolderStore(self.root), file_sizes=sizes)


class ListedTree:
    """Files known by a list of their names.

    Where everything else lies in a single folder, as in many archives, that folder is taken for the root.

    Args:
        what: What to call it in errors.
        root: Where it lies.
        names: Path of each file; row n of `store` is file n.
        sizes: Bytes of each file.
        store: What reads them.
        notes: Facts worth printing.
        keeps_root: Whether the root stays the root, whatever lies in it.
        passed_over: How many files are not among them, by why not, in words.
    """

    def __init__(
        self,
        what: str,
        root: str,
        names: Sequence[str],
        sizes: Sequence[int],
        store: Store,
        *,
        notes: Iterable[str] = (),
        keeps_root: bool = False,
        passed_over: Mapping[str, int] | None = None,
    ):
        self.what, self.root, self.store = what, root, store
        self.notes = list(notes)
        self.passed_over: Mapping[str, int] = passed_over or {}
        self.rows = {name: row for row, name in enumerate(names) if not _is_hidden(name)}
        self._folders: dict[str, set[str]] = {"": set()}
        self._files: dict[str, list[tuple[str, int]]] = {}
        for name, row in self.rows.items():
            prefix, slash, file = name.rpartition("/")
            self._files.setdefault(prefix + slash, []).append((file, sizes[row]))
            while prefix and f"{prefix}/" not in self._folders:
                self._folders[f"{prefix}/"] = set()
                prefix = prefix.rpartition("/")[0]
        for prefix in sorted(filter(None, self._folders)):
            parent, slash, name = prefix[:-1].rpartition("/")
            self._folders[parent + slash].add(name)
        self.top = ""
        while not keeps_root and not self._files.get(self.top) and len(self._folders[self.top]) == 1:
            (only,) = self._folders[self.top]
            if not self._folders[f"{self.top}{only}/"] or only.lower() in SPLIT_NAMES:
                break
            self.top += f"{only}/"

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Returns the folders and files in a folder."""
        prefix = self.top + prefix
        return sorted(self._folders.get(prefix, ())), sorted(self._files.get(prefix, ()))

    def walk(self, prefix: str, seen: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
        """Yields the files below a folder."""
        pending = [""]
        while pending:
            inner = pending.pop()
            folders, files = self.entries(prefix + inner)
            yield from ((inner + name, size) for name, size in files)
            pending += [f"{inner}{name}/" for name in reversed(folders)]

    def image_set(self, names: Sequence[str], labels: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> ImageSet:
        """Returns files as images, named as from `top`."""
        rows = [self.rows[self.top + name] for name in names]
        return ImageSet(names, labels, store=self.store, rows=rows, file_sizes=sizes)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _IGNORED for part in name.split("/"))


def folder_error(folder: str | Path, expected: str, received: str, remedy: str) -> DataError:
    """Returns the error that says why a folder cannot be used."""
    return source_error(f"the folder {folder}", expected, received, remedy)


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_folder(folder: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Returns subfolders, and files with their bytes (-1: a link to nothing), sorted, without hidden ones."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name.lower() in _IGNORED:
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append((entry.name, entry.stat().st_size))
                elif entry.is_symlink():
                    files.append((entry.name, -1))
    except OSError as error:
        raise folder_error(
            folder, "a folder that can be listed", f"reason={error.strerror!r}", "Check its permissions."
        ) from error
    return folders, files


def walk_files(folder: str, seen: Iterable[str] = ()) -> Iterator[tuple[str, int]]:
    """Yields the files below a folder, as (path relative to it, bytes), sorted.

    A folder that links lead back to is entered once, so that a loop of links ends.

    Args:
        folder: Where to start.
        seen: Folders not to enter.
    """
    visited = {_identity(path) for path in (*seen, folder)}
    pending = [""]
    while pending:
        prefix = pending.pop()
        folders, files = list_folder(os.path.join(folder, prefix))
        for name, num_bytes in files:
            yield prefix + name, num_bytes
        for name in reversed(folders):
            identity = _identity(os.path.join(folder, prefix + name))
            if identity not in visited:
                visited.add(identity)
                pending.append(f"{prefix}{name}/")


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_folder(root: str | Path | Tree, *, min_classes: int = 2) -> Contents:
    """Reads the layout, the classes and the files of a tree, and the header of every image.

    Args:
        root: The folder, or another tree.
        min_classes: Classes that there must be: 2 to train; 1 to evaluate, where held-out images may have classes of
            their own, and a class no training image.

    Raises:
        DataError: If the tree is not laid out as `LAYOUT` says, or a class has no readable training image.
    """
    tree = FolderTree(root) if isinstance(root, str | Path) else root
    reader = _FolderReader(tree, min_classes)
    folders, files = tree.entries("")
    split_folders = find_splits(tree, folders)
    reader.pass_over(files)
    if not split_folders:
        classes = {"all": reader.scan_classes("", folders)}
    else:
        if others := [name for name in folders if name not in split_folders.values()]:
            reader.notes.append(f"Folders beside the splits passed over: {shorten(others)}")
        classes = {}
        for split, name in split_folders.items():
            subfolders, files = tree.entries(f"{name}/")
            num_images = reader.pass_over(files)
            found = reader.scan_classes(f"{name}/", subfolders)
            if split != "train" and not any(found.values()):
                reader.notes.append(f"{name}/ is not used: it has {num_images} images, and none in a class folder")
            else:
                classes[split] = found
    contents = reader.finish(classes)
    contents.places = {split: f"the folder {name}/" for split, name in split_folders.items()}
    return contents


def find_splits(tree: Tree, folders: list[str]) -> dict[str, str]:
    """Returns split to folder name; empty if the folders are classes."""
    named = [name for name in folders if name.lower() in SPLIT_NAMES]
    train = [name for name in named if SPLIT_NAMES[name.lower()] == "train"]
    has_classes_in_train = any(tree.entries(f"{name}/")[0] for name in train)
    if not named or (len(named) < len(folders) and not has_classes_in_train):
        return {}
    splits: dict[str, str] = {}
    for name in named:
        split = SPLIT_NAMES[name.lower()]
        if split in splits:
            raise source_error(
                tree.what, f"one folder for {split}", f"folders={[splits[split], name]}", "Rename or merge one of them."
            )
        splits[split] = name
    if not train:
        raise source_error(
            tree.what, "a folder train/ beside the others", f"folders={named}", "Add train/, or rename one."
        )
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


class _FolderReader:
    """Collects what is found in a tree, class by class."""

    def __init__(self, tree: Tree, min_classes: int):
        self.tree = tree
        self.min_classes = min_classes
        self.notes = list(tree.notes)
        self.num_loose_images = 0
        self.other_suffixes: Counter[str] = Counter()

    def error(self, expected: str, received: str, remedy: str) -> DataError:
        return source_error(self.tree.what, expected, received, remedy)

    def pass_over(self, files: list[tuple[str, int]]) -> int:
        """Counts files outside the class folders; returns how many of them are images."""
        num_images = sum(is_image_name(name) for name, _ in files)
        self.num_loose_images += num_images
        self.other_suffixes.update(_suffix(name) for name, _ in files if not is_image_name(name))
        return num_images

    def scan_classes(self, prefix: str, folders: list[str]) -> dict[str, list[tuple[str, int]]]:
        """Returns class to its image files, named relative to the root."""
        classes = {}
        for folder in folders:
            files = list(self.tree.walk(f"{prefix}{folder}/", seen=("", prefix)))
            classes[folder] = [(f"{prefix}{folder}/{name}", size) for name, size in files if is_image_name(name)]
            self.other_suffixes.update(_suffix(name) for name, _ in files if not is_image_name(name))
        return classes

    def finish(self, classes: dict[str, dict[str, list[tuple[str, int]]]]) -> Contents:
        """Checks the classes and the files."""
        main = "all" if "all" in classes else "train"
        class_names = tuple(sorted(classes[main]))
        if self.min_classes < 2:
            class_names = tuple(sorted({name for found in classes.values() for name, files in found.items() if files}))
        self.check_classes(class_names)
        for name in class_names:
            if not name.isprintable():
                raise self.error("class folders with names in Unicode", f"name={name!r}", "Rename this folder.")
        for split, found in classes.items():
            if unknown := sorted(name for name in found if found[name] and name not in class_names):
                raise self.error(
                    "the classes of held-out images among those of the training images",
                    f"unknown classes in {split}: {shorten(unknown)}",
                    "Rename or remove these folders, or add training images for them.",
                )
        splits = {}
        for split, found in classes.items():
            files = [(*file, label) for label, name in enumerate(class_names) for file in found.get(name, ())]
            names, sizes, labels = zip(*files, strict=True) if files else ((), (), ())
            splits[split] = self.tree.image_set(names, labels, sizes)
        remedy = "Add images to this folder, or remove it."
        splits, broken = leave_out_broken(self.tree.what, splits, class_names, remedy, min_classes=self.min_classes)
        num_ignored = self.num_loose_images + self.other_suffixes.total() + sum(self.tree.passed_over.values())
        if num_ignored:
            parts = [f"{count} {suffix}" for suffix, count in self.other_suffixes.most_common()]
            if self.num_loose_images:
                parts.insert(0, f"{self.num_loose_images} images outside the class folders")
            parts += [f"{count} {why}" for why, count in self.tree.passed_over.items()]
            self.notes.append(f"{num_ignored} {'file' if num_ignored == 1 else 'files'} passed over: {shorten(parts)}")
        return Contents(
            name=os.path.basename(os.path.abspath(self.tree.root)) or self.tree.root,
            class_names=class_names,
            splits=splits,
            broken=broken,
            num_ignored=num_ignored,
            notes=self.notes,
        )

    def check_classes(self, class_names: tuple[str, ...]) -> None:
        if len(class_names) >= self.min_classes:
            return
        remedy = f"The layout is {LAYOUT}."
        if class_names:
            inner = [f"{prefix}{class_names[0]}" for prefix in ("", "train/", "training/")]
            inner = [os.path.join(self.tree.root, name) for name in inner if len(self.tree.entries(f"{name}/")[0]) > 1]
            remedy = f"If the classes are the folders in {inner[0]}, pass that folder. {remedy}" if inner else remedy
            raise self.error("at least two classes", f"classes={list(class_names)}", remedy)
        if self.num_loose_images:
            raise self.error(
                "class folders",
                f"{self.num_loose_images} images that lie in no class folder",
                f"Sort them into folders. {remedy}",
            )
        raise self.error("images in class folders", "an empty folder", remedy)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"
