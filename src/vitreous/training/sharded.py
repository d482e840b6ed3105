"""Sharded checkpoints: each process writes the parts of arrays that it holds, and reads those that it is to hold.

    000012/
        checkpoint.json         as of a whole checkpoint, written last; and the shape of each array
        arrays/                 a PyTree as Orbax has it, which Orbax reads without vitreous, too
            ocdbt.process_0/    what each process wrote
            manifest.ocdbt, d/  where the parts of each array lie

Nothing is gathered. Orbax cuts, writes and reads arrays; its own
checkpointer is not used, since its processes wait at barriers, for minutes, when one of them finds its disk full. Here
each writes in a thread, and they tell each other between two steps whether all are done, and what went wrong.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.errors import ConfigError, MissingDependencyError, RunError
from vitreous.training.checkpoint import (
    FORMAT_SHARDED,
    SHARDED_FILE,
    Checkpoint,
    Checkpoints,
    begin_folder,
    check_files,
    publish_folder,
    sync_folder,
)
from vitreous.training.distribute import Layout

_ARRAYS = "arrays"
_FAILURES = (OSError, ValueError, RuntimeError)  # what tensorstore makes of a disk that is full or gone


def check_orbax() -> None:
    """Raises `MissingDependencyError` where Orbax is not installed, `ConfigError` where the backend is not jax."""
    import keras

    if (backend := keras.backend.backend()) != "jax":
        raise ConfigError(
            f"Cannot save sharded checkpoints with the {backend} backend. Expected jax, whose arrays Orbax knows. "
            f"Received: checkpoints='sharded', backend={backend!r}. Pass --backend jax, or leave --checkpoints out."
        )
    _orbax()


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise MissingDependencyError("orbax-checkpoint", "orbax", "Sharded checkpoints") from error
    return orbax.checkpoint


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of one run, written by all of its processes.

    They wait for each other in `save`, `proceed` and `finish` alone, which all must call after the same step.

    Args:
        folder: As for `Checkpoints`; that of the first process is meant.
        layout: The processes.
        **options: As for `Checkpoints`.
    """

    is_sharded = True

    def __init__(self, folder: str | Path, *, layout: Layout, **options: Any):
        super().__init__(folder, **options)
        self.layout = layout
        self._part: _Part | None = None  # of a save that is not whole yet

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written, by any process."""
        return self._part is not None or super().is_writing

    def save(self, state: Mapping[str, Any], arrays: Mapping[str, Any], *, num_steps: int) -> None:
        """Begins to write a checkpoint; one that is still being written is waited for.

        Args:
            state: Plain values, fit for JSON; the first process's count.
            arrays: jax arrays by name, as they lie on all devices. They must not change any more.
            num_steps: Steps done, to count the interval from.
        """
        if self.layout.num_processes == 1:
            super().save(state, arrays, num_steps=num_steps)
            return
        self.finish()
        self.wait()  # until it has its name: the next one is numbered after it
        self.start(num_steps)
        begun: list[str] = []
        if self.layout.is_first:
            self.attempt("checkpoint", lambda: begun.append(str(begin_folder(self._next()).absolute())))
        if begun := self.layout.share(begun):
            self._part = _Part(Path(begun[0]), dict(state), dict(arrays), self.layout.process_index)

    def proceed(self) -> None:
        """Makes a checkpoint of what all processes have written, once they have."""
        if self._part is not None and self.layout.agree_all(not self._part.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Waits until the last save is whole, or has failed, in all processes."""
        part, self._part = self._part, None
        self.layout.forget_all()
        if part is None:
            self.wait()
            return
        part.thread.join()
        told = self.layout.gather_values([part.files, part.problem])
        if not self.layout.is_first:
            return
        files = {name: record for mine, _ in told for name, record in mine.items()}
        problems = [f"process {index}: {problem}" for index, (_, problem) in enumerate(told) if problem]
        # What is left to do takes long on a network, and concerns no other process.
        self._thread = threading.Thread(
            target=self._complete, args=(part, files, problems), name="vitreous-checkpoint", daemon=True
        )
        self._thread.start()

    def _complete(self, part: "_Part", files: dict[str, Any], problems: list[str]) -> None:
        """Writes, in the first process, what makes a checkpoint of all parts."""

        def write() -> None:
            if problems:
                raise OSError("; ".join(problems))
            _publish(part.folder, part.state, part.shapes, self.config, files)
            self._remove_old()

        try:
            self.attempt("checkpoint", write)
        except BaseException as error:
            self._error = error
        finally:
            shutil.rmtree(part.folder, ignore_errors=True)

    def wait(self) -> None:
        """Waits until this process writes nothing, and says what went wrong; without the others."""
        if self._part is not None:
            self._part.thread.join()
        super().wait()

    def _write(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Writes a checkpoint of a single process."""
        temporary = begin_folder(self._next())
        try:
            files = write_part(temporary, arrays, 0)
            _publish(temporary, state, _shapes(arrays), self.config, files)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._remove_old()


class _Part:
    """What one process writes of a checkpoint, in a thread."""

    def __init__(self, folder: Path, state: dict[str, Any], arrays: dict[str, Any], process_index: int):
        self.folder, self.state, self.shapes = folder, state, _shapes(arrays)
        self.files: dict[str, Any] = {}
        self.problem: str | None = None
        self.thread = threading.Thread(
            target=self._write, args=(arrays, process_index), name="vitreous-part", daemon=True
        )
        self.thread.start()

    def _write(self, arrays: dict[str, Any], process_index: int) -> None:
        try:
            if not self.folder.is_dir():
                raise OSError(f"{self.folder} is not there: all processes need the same file system")
            self.files = write_part(self.folder, arrays, process_index)
        except OSError as error:
            self.problem = error.strerror or str(error)
        except BaseException as error:
            self.problem = f"{type(error).__name__}: {error}"


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def write_part(folder: Path, arrays: Mapping[str, Any], process_index: int) -> dict[str, Any]:
    """Writes what lies in this process.

    Args:
        folder: Of the checkpoint to be.
        arrays: jax arrays by name.
        process_index: Which process this is.

    Returns:
        Size and sha256 of each file that this process wrote, by name.

    Raises:
        OSError: If it cannot be written.
    """
    ocp = _orbax()
    place = folder / _ARRAYS
    place.mkdir(exist_ok=True)
    try:
        _handler(ocp).save(_path(place), args=ocp.args.PyTreeSave(dict(arrays)))
    except _FAILURES as error:
        raise _as_os_error(error) from error
    own = [path for path in place.glob(f"ocdbt.process_{process_index}/**/*") if path.is_file()]
    own += place.glob(f"array_metadatas/process_{process_index}")
    return _describe(folder, own)


def _publish(
    temporary: Path,
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    files: Mapping[str, Any],
) -> None:
    """Makes one tree of all parts, and a checkpoint of the folder. Raises `OSError`."""
    place = temporary / _ARRAYS
    for name, told in files.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != told["size"]:
            raise OSError(f"{name} is not seen by the first process: all processes need the same file system")
    try:
        _handler(_orbax()).finalize(_path(place))
    except _FAILURES as error:
        raise _as_os_error(error) from error
    names = {path.relative_to(temporary).as_posix(): path for path in place.rglob("*") if path.is_file()}
    if unknown := [name for name in names if not SHARDED_FILE.fullmatch(name)]:  # no reader would take them
        raise OSError(f"Orbax {_orbax().__version__} wrote {unknown[0]}, which this vitreous does not know")
    files = {**files, **_describe(temporary, [path for name, path in names.items() if name not in files])}
    content = {
        "format": FORMAT_SHARDED,
        "files": files,
        "arrays": {name: list(shape) for name, shape in shapes.items()},
        "state": dict(state),
        "config": dict(config),
    }
    publish_folder(temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp")), content)


def _describe(folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Puts files on the disk; returns their sizes and checksums by name."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    for each in {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}:
        sync_folder(each)
    return found


def _as_os_error(error: Exception) -> OSError:
    """Returns what tensorstore says of a disk as Python says it."""
    found = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    if found:
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number))
    return error if isinstance(error, OSError) else OSError(str(error).splitlines()[0])


def _handler(ocp: Any) -> Any:
    # Weights hardly become smaller: a file that is not packed needs no memory that its bytes do not fill.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)


def _path(place: Path) -> Any:
    from etils import epath

    return epath.Path(place.absolute())


def load_checkpoint(checkpoints: Checkpoints, layout: Layout) -> Checkpoint | None:
    """Returns the newest whole checkpoint, in all processes; of a sharded one, each has compared a part of the files.

    Errors as for `Checkpoints.load`, in all processes.

    Raises:
        ConfigError: If processes do not share the file system that a sharded checkpoint needs.
    """
    if layout.num_processes == 1:
        return checkpoints.load()
    if checkpoints.is_sharded:
        _check_seen(layout, Path(layout.share(str(checkpoints.folder.parent.absolute()))))
    if not layout.is_first:
        while "check" in (told := layout.share(None)):
            with contextlib.suppress(RunError):  # the first process says it
                _check_together(layout, Path(told["check"]), told["files"])
        if "error" in told:
            raise RunError(told["error"])
        if told["found"] is None:
            return None
        path, state, config, shapes = told["found"]
        shapes = shapes and {name: tuple(shape) for name, shape in shapes.items()}
        return Checkpoint(Path(path), state, layout.share_arrays({}), config, shapes)

    def check(path: Path, files: Mapping[str, Any]) -> None:
        layout.share({"check": str(path.absolute()), "files": dict(files)})
        _check_together(layout, path, files)

    try:
        found = checkpoints.load(check)
    except RunError as error:
        layout.share({"error": str(error)})
        raise
    layout.share({"found": found and [str(found.path.absolute()), found.state, found.config, found.shapes]})
    if found is None:
        return None
    return Checkpoint(found.path, found.state, layout.share_arrays(found.arrays), found.config, found.shapes)


def _check_seen(layout: Layout, folder: Path) -> None:
    """Raises `ConfigError` in all processes if one of them does not see a folder of the first one."""
    seen = layout.gather_values(folder.is_dir())
    if not all(seen):
        raise ConfigError(
            f"Cannot use sharded checkpoints in {layout.num_processes} processes. Expected a file system that all of "
            f"them share. Received: process {seen.index(False)} does not see {folder}. Pass an --out that all machines "
            "see."
        )


def _check_together(layout: Layout, path: Path, files: Mapping[str, Any]) -> None:
    """Has each process compare its share of the files; raises the first error in all."""
    _check_seen(layout, path)
    mine = list(files.items())[layout.process_index :: layout.num_processes]
    problem = None
    try:
        check_files(path, dict(mine))
    except (RunError, OSError) as error:
        problem = str(error)
    if problems := list(filter(None, layout.gather_values(problem))):
        raise RunError(problems[0])


def read_arrays(checkpoint: Checkpoint, places: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Reads the arrays of a sharded checkpoint, each process what it is to hold.

    Args:
        checkpoint: As `load_checkpoint` returned it.
        places: The sharding of each array, by name.
        layout: The processes; all must call it.

    Returns:
        jax arrays by name.

    Raises:
        RunError: If they are not what checkpoint.json says.
        MissingDependencyError: If Orbax is not installed.
    """
    ocp = _orbax()
    shapes = checkpoint.shapes or {}
    place = checkpoint.path / _ARRAYS
    problem, found = None, {}
    try:
        _check_metadata(place, shapes)
        wanted = {
            name: ocp.ArrayRestoreArgs(sharding=places[name], global_shape=shape) for name, shape in shapes.items()
        }
        item = dict.fromkeys(shapes, np.zeros(()))
        found = dict(_handler(ocp).restore(_path(place), args=ocp.args.PyTreeRestore(item=item, restore_args=wanted)))
    except Exception as error:  # Orbax says of a part that is not there just that, and the others wait for an answer
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    if problems := list(filter(None, layout.gather_values(problem))):
        raise RunError(
            f"Cannot read the checkpoint {checkpoint.path}. Expected the arrays that checkpoint.json names. "
            f"Received: {problems[0]}. Remove that folder: the checkpoint before it is taken then."
        )
    return found


def _check_metadata(place: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` if an array is another than checkpoint.json says, or takes memory that no bytes fill."""
    import tensorstore

    base = {"driver": "file", "path": f"{place.absolute()}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for name, shape in shapes.items():
        told = json.loads(store.read(f"{name}/.zarray").result().value)
        chunks = told["chunks"]
        fits = len(chunks) == len(shape) and all(0 < n <= max(size, 1) for n, size in zip(chunks, shape, strict=True))
        if tuple(told["shape"]) != shape or told["compressor"] is not None or told.get("filters") or not fits:
            raise ValueError(f"{name} of shape {told['shape']} in parts of {chunks}")
