"""Decoded images, kept so that only the first epoch costs their decoding: in memory, or in a memory-mapped file."""

import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Literal

import numpy as np

MEMORY_BYTES = 1 << 30
_SEGMENT_BYTES = 1 << 26  # a map for each image would soon be more than a process may have


class DecodeCache:
    """Keeps the first arrays that fit. It may be used by several threads at once.

    Args:
        kind: Where: `"memory"`, `"disk"` or `"none"`.
        max_bytes: Size, in bytes. Default: 1 GiB of memory, or half of the disk's free space.
        folder: Folder of the file, for `"disk"`. Default: the system's folder for temporary files. The file has no name
            there (on Windows: is removed when it is closed), so that nothing is left behind whatever happens.

    Attributes:
        num_bytes: Bytes kept.
        is_full: Whether an array has found no room, or none is ever kept.
        problem: Why nothing more is kept although there would be room, or None: the disk is full.

    Raises:
        OSError: If there can be no file in `folder`.
    """

    def __init__(
        self,
        kind: Literal["memory", "disk", "none"],
        *,
        max_bytes: int | None = None,
        folder: str | Path | None = None,
    ):
        self.kind = kind
        self.num_bytes = 0
        self.problem: str | None = None
        self.is_full = kind == "none"
        self.is_told = False  # whether the user has been told of the problem
        self._arrays: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        if kind == "disk":
            folder = folder or tempfile.gettempdir()
            self._segment: mmap.mmap | None = None  # the part of the file that is being filled
            self._start = self._used = 0
            self._file = tempfile.TemporaryFile(dir=folder, prefix="vitreous-cache-", buffering=0)  # noqa: SIM115
            max_bytes = shutil.disk_usage(folder).free // 2 if max_bytes is None else max_bytes
        self.max_bytes = MEMORY_BYTES if max_bytes is None else max_bytes
        if kind == "none":
            self.max_bytes = 0

    def __len__(self) -> int:
        return len(self._arrays)

    def get(self, key: int) -> np.ndarray | None:
        """Returns what was kept under a key, or None. An array from a file is read-only."""
        return self._arrays.get(key)

    def put(self, key: int, array: np.ndarray) -> None:
        """Keeps an array, uint8, unless there is no room or the key has one."""
        if array.nbytes > self.max_bytes - self.num_bytes or self.problem:
            self.is_full = True
            return
        with self._lock:
            if key in self._arrays or self.problem or self.num_bytes + array.nbytes > self.max_bytes:
                return
            if self.kind == "disk":
                kept = self._write(array)
                if kept is None:
                    return
                array = kept
            self._arrays[key] = array
            self.num_bytes += array.nbytes

    def _write(self, array: np.ndarray) -> np.ndarray | None:
        """Appends an array to the file and returns it from there; the first error of the disk ends writing."""
        if array.nbytes > _SEGMENT_BYTES:
            return None
        data = np.ascontiguousarray(array).data.cast("B")
        try:
            if self._segment is None or self._used + array.nbytes > _SEGMENT_BYTES:
                start = self._file.seek(0, os.SEEK_END)
                self._file.truncate(start + _SEGMENT_BYTES)  # takes no room on the disk until it is written
                self._segment = mmap.mmap(self._file.fileno(), _SEGMENT_BYTES, offset=start, access=mmap.ACCESS_READ)
                self._start, self._used = start, 0
            self._file.seek(self._start + self._used)
            written = 0
            while written < len(data):  # written, not assigned to the map: a full disk is then an error, not a signal
                written += self._file.write(data[written:])
        except OSError as error:
            self.problem = error.strerror or str(error)
            return None
        kept = np.frombuffer(self._segment, "uint8", array.nbytes, self._used).reshape(array.shape)
        self._used += array.nbytes
        return kept

    def close(self) -> None:
        """Forgets everything; a file is gone with it once no array from it is in use."""
        with self._lock:
            self._arrays.clear()
            self.num_bytes = self.max_bytes = 0
            if self.kind == "disk":
                self._segment = None
                self._file.close()
