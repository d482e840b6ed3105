"""Where the bytes or the pixels of images lie. An `ImageSet` names rows of a store; the store hands them out.

A store is read from several threads at once. It holds no pixels but those it was given, and opens what it needs when it
is asked, so that a million images cost the memory of their names.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


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
