"""Checkpoints: the state of training on disk, so that a run that was killed goes on as if nothing had happened.

    checkpoints/
        000012/                  numbered in the order of saving; the last few are kept
            checkpoint.json      counters, history, position in the data, configuration; size and sha256 of each file
            arrays.safetensors   weights, optimiser, average, seed generators, best weights so far
        000013/

A checkpoint is written under a name that no reader takes, by a thread of its own, and appears by one rename after
every byte is on the disk. It is read only if its sizes and checksums agree; a damaged one is passed over for the one
before. `checkpoint.json` names its files. Nothing is pickled. What several processes write together, each its part, is
another kind of the same (`vitreous.training.sharded`); any run reads both.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous import __version__
from vitreous.errors import RunError, WeightsError
from vitreous.training.recipe import Interval
from vitreous.weights.tensors import DTYPES, read_safetensors

# Raised when an older vitreous could no longer read a new checkpoint of the kind.
FORMAT = 1
FORMAT_SHARDED = 2
MAX_JSON_BYTES = 2**28

# What Orbax makes: a tree of its own, and one for each process.
SHARDED_FILE = re.compile(
    r"arrays/(_METADATA|_sharding|array_metadatas/process_\d+|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]+))"
)
_FILES = {FORMAT: re.compile(r"arrays[a-z0-9-]*\.safetensors"), FORMAT_SHARDED: SHARDED_FILE}
_NUMBER = re.compile(r"\d{6,}")
_TYPE_NAMES = {name: kind for kind, name in DTYPES.items() if kind != "BF16"}


Check = Callable[[Path, Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, as read.

    Args:
        path: Its folder.
        state: Plain values, as they were saved.
        arrays: Arrays by name, as they were saved; those of a sharded one are still to be read.
        config: The configuration of the run.
        shapes: Of a sharded one: the shape of each array, by name.
    """

    path: Path
    state: dict[str, Any]
    arrays: dict[str, np.ndarray]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] | None = None


class Checkpoints:
    """The checkpoints of one run: saves them now and then, and finds the newest whole one.

    A full disk, or one that may not be written, ends nothing: it is said once, and again when it changes, and the next
    save tries again.

    Args:
        folder: Where they lie; made when first needed.
        interval: How often to save.
        keep: How many are kept.
        config: The configuration of the run, fit for JSON; saved with each.
        report: Called with a line of text about what is wrong, on the thread that trains.

    As a context manager, it waits at the end for what is being written.

    Attributes:
        is_sharded: Whether all processes save, each the parts that it holds.
    """

    is_sharded = False

    def __init__(
        self,
        folder: str | Path,
        *,
        interval: Interval,
        keep: int = 2,
        config: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.folder = Path(folder)
        self.interval = interval
        self.keep = keep
        self.config = dict(config or {})
        self.report = report
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the thread, and no matter of the disk
        self._problems: dict[str, str] = {}  # what cannot be written, and why
        self._told: dict[str, str] = {}
        self._damaged: set[Path] = set()
        self._last_time, self._last_step = time.monotonic(), 0

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def is_due(self, num_steps: int) -> bool:
        """Whether to save after so many steps; never while the last save is still being written."""
        self._tell()
        if self.is_writing:
            return False
        if self.interval.steps is not None:
            return num_steps - self._last_step >= self.interval.steps
        if self.interval.seconds is not None:
            return time.monotonic() - self._last_time >= self.interval.seconds
        return False

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, num_steps: int) -> None:
        """Counts the interval to the next save from here."""
        self._last_time, self._last_step = time.monotonic(), num_steps

    def save(self, state: Mapping[str, Any], arrays: Mapping[str, Any], *, num_steps: int) -> None:
        """Begins to write a checkpoint; one that is still being written is waited for.

        Args:
            state: Plain values, fit for JSON.
            arrays: What NumPy can make arrays of, by name. They must not change any more.
            num_steps: Steps done, to count the interval from.
        """
        self.wait()
        self.start(num_steps)
        self._thread = threading.Thread(
            target=self._save, args=(dict(state), dict(arrays)), name="vitreous-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written, and says what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._tell()

    def proceed(self) -> None:
        """Goes on with a save that several processes write, where that is due; called between two steps in all."""

    def finish(self) -> None:
        """Waits until the last save is whole, or has failed, in all processes; all must call it."""
        self.wait()

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Writes something else of the run; a full disk is said, and ends nothing.

        Args:
            what: What is written, in the singular.
            write: Writes it.
        """
        try:
            write()
        except OSError as error:
            self._problems[what] = error.strerror or str(error)
        else:
            self._problems.pop(what, None)

    def load(self, check: Check | None = None) -> Checkpoint | None:
        """Reads the newest whole checkpoint; a damaged one is said, and passed over. None where there is none at all.

        Args:
            check: Compares the files of a sharded one, as `check_files`, which is the default.

        Raises:
            RunError: If all are damaged, or one was written by a newer vitreous.
        """
        for path in (found := self._list()):
            try:
                checkpoint = read_checkpoint(path, check)
            except _NewerError:
                raise
            except RunError as error:
                if path not in self._damaged:
                    self.report(f"{error} The checkpoint before it is taken.")
                self._damaged.add(path)
                continue
            return checkpoint
        if found:
            raise RunError(
                f"Cannot resume. Expected a whole checkpoint in {self.folder}. Received: {len(found)}, all damaged. "
                "Start anew with --no-resume (resume='never')."
            )
        return None

    def load_config(self) -> dict[str, Any] | None:
        """Reads the configuration that the newest checkpoint was saved with; None where there is none. Errors as for
        `load`.
        """
        for path in self._list():
            try:
                return dict(_read_content(path)["config"])
            except _NewerError:
                raise
            except RunError:
                continue  # `load` says so
        self.load()
        return None

    def _list(self) -> list[Path]:
        """Returns the folders that are checkpoints by name, the newest first."""
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        return [self.folder / name for name in sorted(filter(_NUMBER.fullmatch, names), key=int, reverse=True)]

    def _tell(self) -> None:
        """Says, on the thread that trains, what is new about the disk; raises what the thread could not answer."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        problems = dict(self._problems)
        for what, reason in problems.items():
            if self._told.get(what) != reason:
                self.report(
                    f"Cannot write the {what} in {self.folder.parent}: {reason}. Training goes on, its state is in "
                    "memory; it is tried again when the next one is due."
                )
        for what in self._told.keys() - problems.keys():
            self.report(f"The {what} can be written again.")
        self._told = problems

    def _save(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        try:
            self.attempt("checkpoint", lambda: self._write(state, arrays))
        except BaseException as error:
            self._error = error

    def _write(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        values = {name: np.asarray(array) for name, array in arrays.items()}
        if not all(np.isfinite(value).all() for value in values.values() if value.dtype.kind == "f"):
            return  # training has diverged, and the loss will say so; the last good state stays the last one
        write_checkpoint(self._next(), state, values, self.config)
        self._remove_old()

    def _next(self) -> Path:
        """Returns where the next checkpoint goes."""
        found = self._list()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{int(found[0].name) + 1 if found else 1:06d}"

    def _remove_old(self) -> None:
        """Removes all but the last few whole checkpoints."""
        whole = [path for path in self._list() if path not in self._damaged]
        for path in [*whole[self.keep :], *self._damaged]:
            # Under a name that no reader takes first: what is half removed is no checkpoint.
            doomed = path.with_name(f".{path.name}.tmp")
            with contextlib.suppress(OSError):
                os.rename(path, doomed)
                shutil.rmtree(doomed)
        self._damaged.clear()


class _NewerError(RunError):
    """The checkpoint was written by a newer vitreous: an older one is no answer."""


def write_checkpoint(
    path: Path, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes a checkpoint, which appears whole or not at all.

    Args:
        path: Its folder, which must not exist.
        state: Plain values, fit for JSON.
        arrays: Arrays of numbers by name.
        config: The configuration of the run, fit for JSON.

    Raises:
        OSError: If it cannot be written; nothing is left then.
    """
    temporary = begin_folder(path)
    try:
        size, digest = _write_arrays(temporary / "arrays.safetensors", arrays)
        files = {"arrays.safetensors": {"size": size, "sha256": digest}}
        publish_folder(path, {"format": FORMAT, "files": files, "state": dict(state), "config": dict(config)})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_folder(path: Path) -> Path:
    """Returns an empty folder beside a checkpoint to be, under a name that no reader takes."""
    for stale in path.parent.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.mkdir()
    return temporary


def publish_folder(path: Path, content: Mapping[str, Any]) -> None:
    """Writes checkpoint.json into the folder that `begin_folder(path)` returned, and gives it its name."""
    content = {"vitreous": __version__, **content}
    temporary = path.with_name(f".{path.name}.tmp")
    with (temporary / "checkpoint.json").open("wb", buffering=0) as file:
        _write_whole(file, json.dumps({"sha256": _digest(content), "content": content}).encode())
    sync_folder(temporary)
    os.rename(temporary, path)
    sync_folder(path.parent)


def read_checkpoint(path: Path, check: Check | None = None) -> Checkpoint:
    """Reads a checkpoint; nothing in it is executed, and no memory is taken that its bytes do not fill.

    Args:
        path: Its folder.
        check: Compares the files of a sharded one, as `check_files`, which is the default; its arrays are not read.

    Raises:
        RunError: If it is damaged, or was written by a newer vitreous.
    """
    content = _read_content(path)
    is_sharded, files = content["format"] == FORMAT_SHARDED, content["files"]
    for name in files:
        if not _FILES[content["format"]].fullmatch(name):
            raise _refuse(path, f"a file called {name!r}, which may lie anywhere")
    arrays: dict[str, np.ndarray] = {}
    if is_sharded:
        shapes = _read_shapes(path, content.get("arrays"))
        beside = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {*files}
        if beside := beside - {"checkpoint.json"}:
            raise _refuse(path, f"{min(beside)!r}, which checkpoint.json does not name")
        (check or check_files)(path, files)
        return Checkpoint(path, content["state"], arrays, content["config"], shapes)
    check_files(path, files)
    for name in files:
        try:
            arrays |= {key: entry.read() for key, entry in read_safetensors(path / name, is_exact=True).items()}
        except WeightsError as error:
            raise _refuse(path, str(error)) from error
    return Checkpoint(path, content["state"], arrays, content["config"])


def check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Compares files with what checkpoint.json says of them.

    Args:
        path: The folder of the checkpoint.
        files: Size and sha256 of each, by name.

    Raises:
        RunError: If one is another.
    """
    for name, told in files.items():
        file = path / name
        if not file.is_file() or any(part.is_symlink() for part in (file, *file.parents[: name.count("/")])):
            raise _refuse(path, f"no file {name}")
        if not isinstance(told, dict) or file.stat().st_size != told.get("size"):
            raise _refuse(path, f"{name} of {file.stat().st_size} bytes")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != told.get("sha256"):
                raise _refuse(path, f"{name}, whose checksum is another")


def _read_shapes(path: Path, told: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a sharded checkpoint's arrays. Errors as for `read_checkpoint`."""
    shapes = told.items() if isinstance(told, dict) else ()
    if not shapes or not all(isinstance(shape, list) and all(type(n) is int for n in shape) for _, shape in shapes):
        raise _refuse(path, "checkpoint.json without the shapes of the arrays")
    return {name: tuple(shape) for name, shape in shapes}


def _read_content(path: Path) -> dict[str, Any]:
    """Returns what checkpoint.json says, if it is what was written. Errors as for `read_checkpoint`."""
    content = _read_json(path)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT_SHARDED:
        raise _NewerError(
            f"Cannot read the checkpoint {path}. Expected format {FORMAT_SHARDED} or older. "
            f"Received: format={version}, written by vitreous {content.get('vitreous', '?')}. Install that version."
        )
    parts = {name: content.get(name) for name in ("files", "state", "config")}
    if version not in (FORMAT, FORMAT_SHARDED) or not all(isinstance(part, dict) for part in parts.values()):
        raise _refuse(path, f"a checkpoint.json with format={version!r} and {', '.join(parts)} of other types")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "checkpoint.json"
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise _refuse(path, f"a checkpoint.json of {file.stat().st_size} bytes")
        loaded = json.loads(file.read_text(encoding="utf-8"))
        content = loaded["content"]
        if loaded["sha256"] != _digest(content):
            raise _refuse(path, "checkpoint.json, whose checksum is another")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
        raise _refuse(path, f"checkpoint.json: {reason}") from error
    if not isinstance(content, dict):
        raise _refuse(path, "checkpoint.json without content")
    return content


def _refuse(path: Path, received: str) -> RunError:
    return RunError(
        f"Cannot read the checkpoint {path}. Expected the files that were written. Received: {received}. "
        "It is of no use any more."
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[int, str]:
    """Writes a safetensors file in which each array keeps its type; returns its size and sha256."""
    header, offset = {}, 0
    for name, array in arrays.items():
        kind = _TYPE_NAMES[array.dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = (np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).data for array in arrays.values())
    with path.open("wb", buffering=0) as file:
        digest = _write_whole(file, len(text).to_bytes(8, "little") + text, *parts)
    return 8 + len(text) + offset, digest


def _write_whole(file: io.FileIO, *parts: Any) -> str:
    """Writes bytes until the disk has them; returns their sha256."""
    digest = hashlib.sha256()
    for part in parts:
        view = memoryview(part).cast("B")
        digest.update(view)
        while view:
            view = view[file.write(view) or 0 :]
    os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk, where the system has a way to."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
