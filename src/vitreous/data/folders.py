"""What a folder of images holds: its layout, its classes, its files, and which of them are broken."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vitreous.data.images import IMAGE_SUFFIXES, check_image_header, decode_image
from vitreous.errors import DataError, ImageError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folder names that mean a split, in lower case."""

LAYOUT = "one folder of images for each class, or train/, val/ and test/ with one folder for each class in each"

_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}
_NUM_THREADS = 4
_CHUNK = 256


@dataclass(frozen=True)
class ImageFile:
    """A file that is an image by name: its path relative to the data's folder, its bytes, and its class."""

    name: str
    num_bytes: int
    label: int


@dataclass
class FolderContents:
    """What `read_folder` found; `splits` has `"all"` alone where the folder gives no splits."""

    class_names: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    broken: dict[str, str] = field(default_factory=dict)
    num_ignored: int = 0
    notes: list[str] = field(default_factory=list)


def folder_error(folder: str | Path, expected: str, received: str, remedy: str) -> DataError:
    """Returns the error that says why a folder cannot be used."""
    return DataError(f"Cannot use the folder {folder}. Expected {expected}. Received: {received}. {remedy}")


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def shorten(names: Iterable[str], most: int = 5) -> str:
    """Returns a few of `names`, and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def read_folder(root: Path, *, min_classes: int = 2) -> FolderContents:
    """Reads the layout, the classes and the files of a folder, and the header of every image.

    Args:
        root: The folder.
        min_classes: Classes that there must be: 2 to train, 1 to evaluate.

    Raises:
        DataError: If the folder is not laid out as `LAYOUT` says, or a class has no readable training image.
    """
    reader = _FolderReader(root, min_classes)
    folders, files = list_folder(str(root))
    split_folders = find_splits(root, folders)
    reader.pass_over(files)
    if not split_folders:
        classes = {"all": reader.scan_classes("", folders)}
    else:
        if others := [name for name in folders if name not in split_folders.values()]:
            reader.notes.append(f"Folders beside the splits passed over: {shorten(others)}")
        classes = {}
        for split, name in split_folders.items():
            subfolders, files = list_folder(os.path.join(root, name))
            num_images = reader.pass_over(files)
            found = reader.scan_classes(f"{name}/", subfolders)
            if split != "train" and not any(found.values()):
                reader.notes.append(f"{name}/ is not used: it has {num_images} images, and none in a class folder")
            else:
                classes[split] = found
    return reader.finish(classes)


def find_splits(root: Path, folders: list[str]) -> dict[str, str]:
    """Returns split to folder name; empty if the folders are classes."""
    named = [name for name in folders if name.lower() in SPLIT_NAMES]
    train = [name for name in named if SPLIT_NAMES[name.lower()] == "train"]
    has_classes_in_train = any(list_folder(os.path.join(root, name))[0] for name in train)
    if not named or (len(named) < len(folders) and not has_classes_in_train):
        return {}
    splits: dict[str, str] = {}
    for name in named:
        split = SPLIT_NAMES[name.lower()]
        if split in splits:
            raise folder_error(
                root, f"one folder for {split}", f"folders={[splits[split], name]}", "Rename or merge one of them."
            )
        splits[split] = name
    if not train:
        raise folder_error(root, "a folder train/ beside the others", f"folders={named}", "Add train/, or rename one.")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


class _FolderReader:
    """Collects what is found in a folder, class by class."""

    def __init__(self, root: Path, min_classes: int):
        self.root = root
        self.min_classes = min_classes
        self.notes: list[str] = []
        self.num_loose_images = 0
        self.other_suffixes: Counter[str] = Counter()

    def pass_over(self, files: list[tuple[str, int]]) -> int:
        """Counts files outside the class folders; returns how many of them are images."""
        num_images = sum(is_image_name(name) for name, _ in files)
        self.num_loose_images += num_images
        self.other_suffixes.update(_suffix(name) for name, _ in files if not is_image_name(name))
        return num_images

    def scan_classes(self, prefix: str, folders: list[str]) -> dict[str, list[tuple[str, int]]]:
        """Returns class to its image files, named relative to the root."""
        parent = os.path.join(self.root, prefix)
        classes = {}
        for folder in folders:
            files = list(walk_files(os.path.join(parent, folder), seen=(str(self.root), parent)))
            classes[folder] = [(f"{prefix}{folder}/{name}", size) for name, size in files if is_image_name(name)]
            self.other_suffixes.update(_suffix(name) for name, _ in files if not is_image_name(name))
        return classes

    def finish(self, classes: dict[str, dict[str, list[tuple[str, int]]]]) -> FolderContents:
        """Checks the classes and the files."""
        main = "all" if "all" in classes else "train"
        class_names = tuple(sorted(classes[main]))
        self.check_classes(class_names)
        for name in class_names:
            if not name.isprintable():
                raise folder_error(
                    self.root, "class folders with names in Unicode", f"name={name!r}", "Rename this folder."
                )
        for split, found in classes.items():
            if unknown := sorted(name for name in found if found[name] and name not in class_names):
                raise folder_error(
                    self.root,
                    "the classes of held-out images among those of the training images",
                    f"unknown classes in {split}: {shorten(unknown)}",
                    "Rename or remove these folders, or add training images for them.",
                )
        splits = {
            split: [ImageFile(*file, label) for label, name in enumerate(class_names) for file in found.get(name, ())]
            for split, found in classes.items()
        }
        broken = _find_broken(self.root, [file for files in splits.values() for file in files])
        self.check_readable(class_names, splits[main], broken)
        splits = {split: [file for file in files if file.name not in broken] for split, files in splits.items()}
        num_ignored = self.num_loose_images + self.other_suffixes.total()
        if num_ignored:
            parts = [f"{count} {suffix}" for suffix, count in self.other_suffixes.most_common()]
            if self.num_loose_images:
                parts.insert(0, f"{self.num_loose_images} images outside the class folders")
            self.notes.append(f"{num_ignored} files passed over: {shorten(parts)}")
        return FolderContents(class_names, splits, broken, num_ignored, self.notes)

    def check_classes(self, class_names: tuple[str, ...]) -> None:
        if len(class_names) >= self.min_classes:
            return
        remedy = f"The layout is {LAYOUT}."
        if class_names:
            inner = [os.path.join(self.root, name, class_names[0]) for name in ("", "train", "training")]
            inner = [folder for folder in inner if os.path.isdir(folder) and len(list_folder(folder)[0]) > 1]
            remedy = f"If the classes are the folders in {inner[0]}, pass that folder. {remedy}" if inner else remedy
            raise folder_error(self.root, "at least two classes", f"classes={list(class_names)}", remedy)
        if self.num_loose_images:
            raise folder_error(
                self.root,
                "class folders",
                f"{self.num_loose_images} images that lie in no class folder",
                f"Sort them into folders. {remedy}",
            )
        raise folder_error(self.root, "images in class folders", "an empty folder", remedy)

    def check_readable(self, class_names: tuple[str, ...], files: list[ImageFile], broken: dict[str, str]) -> None:
        """Decodes images of each class until one succeeds; those that fail join `broken`."""
        members: list[list[ImageFile]] = [[] for _ in class_names]
        for file in files:
            members[file.label].append(file)
        for name, candidates in zip(class_names, members, strict=True):
            if any(file.name not in broken and self._decodes(file, broken) for file in candidates):
                continue
            reasons = [f"{file.name}: {broken[file.name]}" for file in candidates]
            raise folder_error(
                self.root,
                "a readable training image in every class",
                f"class={name!r} with {len(candidates)} image files" + (f" ({shorten(reasons, 2)})" if reasons else ""),
                "Add images to this folder, or remove it.",
            )

    def _decodes(self, file: ImageFile, broken: dict[str, str]) -> bool:
        try:
            decode_image(self.root / file.name, min_size=1)
        except ImageError as error:
            broken[file.name] = error.reason
        return file.name not in broken


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _find_broken(root: Path, files: list[ImageFile]) -> dict[str, str]:
    def check(chunk: list[ImageFile]) -> list[tuple[str, str | None]]:
        return [(file.name, check_image_header(os.path.join(root, file.name))) for file in chunk]

    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return {name: reason for chunk in pool.map(check, chunks) for name, reason in chunk if reason}
