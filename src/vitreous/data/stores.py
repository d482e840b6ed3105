"""Where the bytes or the pixels of images lie. An `ImageSet` names rows of a store; the store hands them out.

A store is read from several threads at once. It holds no pixels but those it was given, and opens what it needs when it
is asked, so that a million images cost the memory of their names.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vitreous.data.images import HEAD_BYTES, check_image_header, is_plain_header
from vitreous.errors import ImageError, MissingPathError


class Store(Protocol):
    """What an `ImageSet` reads from."""

    def read(self, row: int, name: str) -> Path | bytes | np.ndarray:
        """Returns one image: a file to decode, the bytes of one, or pixels (uint8, (H, W, C)).

        Args:
            row: Which image of the store, from 0.
            name: Name of the image.

        Raises:
            MissingPathError: If the image is no longer there.
            ImageError: If it cannot be read.
        """
        ...

    def path(self, row: int, name: str) -> Path | None:
        """Returns the image's own file on this machine, or None if it has none."""
        ...

    def check(self, row: int, name: str) -> str | None:
        """Looks at the first bytes, where that is quick. Returns why the image cannot be read, or None."""
        ...


class FolderStore:
    """Files below a folder; the name of an image is its path relative to the folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def read(self, row: int, name: str) -> Path:
        """Returns the file."""
        return Path(os.path.join(self.root, name))

    path = read

    def check(self, row: int, name: str) -> str | None:
        """Returns what is wrong with the header of the file, or None."""
        return check_image_header(os.path.join(self.root, name))


class ArrayStore:
    """Images in memory.

    Args:
        arrays: uint8, (N, H, W, C), or N arrays of (H, W, C).
    """

    def __init__(self, arrays: Sequence[np.ndarray] | np.ndarray):
        self.arrays = arrays

    def read(self, row: int, name: str) -> np.ndarray:
        """Returns the pixels."""
        return self.arrays[row]

    def path(self, row: int, name: str) -> None:
        """Returns None: there is no file."""
        return None

    def check(self, row: int, name: str) -> None:
        """Returns None: pixels are what they are."""
        return None


class SpanStore:
    """Spans of bytes in files: the members of archives that are not compressed. Each read opens its file anew.

    Args:
        paths: The files.
        files: Which of them each image lies in: integers, (N,).
        offsets: Where its bytes begin: integers, (N,).
        sizes: How many there are: integers, (N,).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        files: Sequence[int] | np.ndarray,
        offsets: Sequence[int],
        sizes: Sequence[int] | np.ndarray,
    ):
        self.paths = list(paths)
        self.files = np.asarray(files, "int32")
        self.offsets = np.asarray(offsets, "int64")
        self.sizes = np.asarray(sizes, "int64")

    def read(self, row: int, name: str) -> bytes:
        """Returns the bytes of the image."""
        return self._read(row, name, int(self.sizes[row]))

    def path(self, row: int, name: str) -> None:
        """Returns None: the image has no file of its own."""
        return None

    def check(self, row: int, name: str) -> str | None:
        """Returns what is wrong with the image's first bytes, or None."""
        size = int(self.sizes[row])
        head = self.read_head(row, name, HEAD_BYTES)
        if is_plain_header(head):
            return None
        return check_image_header(head if size <= HEAD_BYTES else self.read(row, name))

    def read_head(self, row: int, name: str, size: int) -> bytes:
        """Returns the first `size` bytes of the image, or all of them where there are fewer."""
        return self._read(row, name, min(size, int(self.sizes[row])))

    def _read(self, row: int, name: str, size: int) -> bytes:
        return read_span(self.paths[self.files[row]], int(self.offsets[row]), size, name)


class JoinedStore:
    """Several stores behind one another.

    Args:
        stores: The stores.
        lengths: How many rows each has.
    """

    def __init__(self, stores: Sequence[Store], lengths: Sequence[int]):
        self.stores = list(stores)
        self.ends = np.cumsum(lengths)

    def find(self, row: int) -> tuple[Store, int]:
        """Returns the store of a row, and the row in it."""
        place = int(np.searchsorted(self.ends, row, side="right"))
        return self.stores[place], row - int(self.ends[place - 1] if place else 0)

    def read(self, row: int, name: str) -> Path | bytes | np.ndarray:
        """Returns the image as its own store has it."""
        store, row = self.find(row)
        return store.read(row, name)

    def path(self, row: int, name: str) -> Path | None:
        """Returns the image's own file, if it has one."""
        store, row = self.find(row)
        return store.path(row, name)

    def check(self, row: int, name: str) -> str | None:
        """Returns what its own store says."""
        store, row = self.find(row)
        return store.check(row, name)


def read_span(path: Path, offset: int, size: int, name: str) -> bytes:
    """Returns `size` bytes of a file, from `offset`. Several threads may do so at once.

    Args:
        path: The file.
        offset: First byte.
        size: Bytes wanted.
        name: What to call them in errors.

    Raises:
        MissingPathError: If the file is gone.
        ImageError: If it cannot be read, or is shorter than it was.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except FileNotFoundError as error:
        raise MissingPathError(
            f"Cannot read the image {name}. Expected a file that exists. Received: path={str(path)!r}. Check the path."
        ) from error
    except OSError as error:
        raise ImageError(name, error.strerror or str(error)) from error
    if len(data) < size:
        raise ImageError(name, f"{len(data)} of its {size} bytes in {path}")
    return data
