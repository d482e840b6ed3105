"""The run folder: what training leaves, written whole or not at all, and read again.

    model.keras     the trained weights (their average over the last steps) and the architecture
    config.toml     every option as it was resolved: recipe, input, classes, data, versions, seed
    history.csv     a row for each evaluation while training; history.jsonl, the same as JSON lines
    metrics.json    what was measured on model.keras as read back from disk; the temperature of its probabilities
    *.png           curves, confusion matrix, reliability, one image beside its patches, test images with answers
    README.md       what all this is, and the command that made it

While training goes on, all lies in a folder beside it, from which an unfinished run is resumed:

    .NAME.partial/
        lock            held by the process that writes here, with its number
        call.json       what was asked for, so that `--resume` can ask for it again
        checkpoints/    the state of training (`vitreous.training.checkpoint`)
        run/            the files above; one rename makes it the run
        old/            for a moment, the run that is replaced
"""

import contextlib
import csv
import io
import json
import math
import os
import shlex
import shutil
import socket
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from vitreous.data import decode_image, resize_image
from vitreous.data.sources import source_path
from vitreous.errors import MissingPathError, RunError, RunExistsError
from vitreous.files import write_text
from vitreous.registry import count_parameters
from vitreous.spec import InputSpec, ViTConfig

if TYPE_CHECKING:  # a run can be read, and refused, without waiting for Keras
    from vitreous.model import VisionTransformer

Resume = Literal["auto", "only", "never"]

_MAX_CONFIG_BYTES = 2**24
_MAX_TOKENS = 2**20
_LOCKED_BYTE = 2**20  # of the lock on Windows, beyond its text
FORMAT = 1  # of the folder; raised when an older vitreous could no longer read a new run


@dataclass(frozen=True)
class Run:
    """A finished run, as it lies on disk.

    Args:
        path: The folder.
        config: What `config.toml` holds.
        metrics: What `metrics.json` holds.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.config["data"]["class_names"])

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none: probabilities are then a sigmoid's."""
        return bool(self.config["data"].get("is_multi_label", False))

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities, above 0; 1.0 where none was fitted.

        Fitted on validation images at the end of training, so that a probability of 80% is right in 80% of cases.

        Raises:
            RunError: If `metrics.json` holds something else.
        """
        temperature = self.metrics.get("calibration", {}).get("temperature", 1.0)
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise RunError(
                f"Cannot use the run {self.path}. Expected a temperature above 0 in metrics.json. "
                f"Received: temperature={temperature!r}. Fit it anew: vitreous calibrate {self.path}."
            )
        return float(temperature)

    def check_has_classes(self) -> None:
        """Raises `RunError` for a run that answers nothing: one of `pretrain`."""
        if not self.class_names:
            raise RunError(
                f"Cannot classify with {self.path}. Expected a run of `vitreous train`. Received: a run "
                "without classes, as `vitreous pretrain` leaves it. "
                f"Train from it: vitreous train DATA --pretrained {self.path}."
            )

    @property
    def data_source(self) -> str | None:
        """The data that it was trained on, as `load_dataset` takes it; None for a `Dataset` made in Python."""
        record = self.config["data"]
        own: dict[str, str | None] = {"(built in)": record["name"], "(from Python)": None}
        return own.get(record["root"], record["root"])

    def is_trained_on(self, data: str | Path) -> bool:
        """Returns whether `data` is the source that it was trained on: the same name, path or URL."""
        own = self.data_source
        if own is None:
            return False
        is_name = self.config["data"]["root"] == "(built in)"
        return (str(data) if is_name else str(source_path(data))) == own

    @property
    def input_spec(self) -> InputSpec:
        """What images must go through before they enter the model."""
        return InputSpec.from_dict(self.config["input"])

    def load_model(self) -> "VisionTransformer":
        """Loads the trained model, in float32; of a pretraining run, the encoder.

        Raises:
            RunError: If `model.keras` is missing or damaged.
        """
        model = load_model(self.path / "model.keras")
        if model.config.num_classes != len(self.class_names):
            raise RunError(
                f"Cannot load the run {self.path}. Expected as many class names as the model has outputs, "
                f"{model.config.num_classes}. Received: {len(self.class_names)} in config.toml. Restore the file."
            )
        return model

    def prepare(self, images: Iterable[Any]) -> Any:
        """Reads images as the model takes them.

        Args:
            images: Files, or uint8 arrays (H, W) or (H, W, C) of any size.

        Returns:
            (B, H, W, C) float32 of the running backend, resized and normalised.

        Raises:
            ImageError: If one cannot be read; it is named.
        """
        from vitreous.model import normalize_images

        spec = self.input_spec
        arrays = []
        for image in images:
            source = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            arrays.append(resize_image(decode_image(source, spec.num_channels), spec))
        return normalize_images(np.stack(arrays), spec)


def load_run(path: str | Path) -> Run:
    """Reads a run folder; the model itself is loaded by `Run.load_model()`.

    Args:
        path: The folder that `train` left.

    Raises:
        MissingPathError: If there is no such folder.
        RunError: If the folder is no run, is not whole, or was written by a newer vitreous.
    """
    path = Path(path)
    what = f"Cannot load the run {path}."
    expected = "Expected a folder with model.keras, config.toml and metrics.json, as `vitreous train` leaves it."
    if not path.exists():
        raise MissingPathError(f"{what} {expected} Received: run={str(path)!r}, which does not exist. Check the path.")
    missing = [name for name in ("model.keras", "config.toml", "metrics.json") if not (path / name).is_file()]
    if missing:
        found = "a file" if path.is_file() else f"missing {', '.join(missing)}"
        raise RunError(f"{what} {expected} Received: {found}. Pass a run folder.")
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{what} {expected} Received: a damaged file ({error}). Train again.") from error
    version = config.get("format")
    if not isinstance(version, int):
        raise RunError(f"{what} {expected} Received: config.toml with format={version!r}. Pass a run folder.")
    if version > FORMAT:
        raise RunError(
            f"{what} Expected a run of format {FORMAT} or older. Received: format={version}, written by vitreous "
            f"{config.get('versions', {}).get('vitreous', '?')}. Install that version."
        )
    required = {"": ("seed", "input", "data"), "data": ("name", "root", "fingerprint", "class_names", "split")}
    for table, keys in required.items():
        values = config.get(table, {}) if table else config
        if lacking := [key for key in keys if key not in values]:
            raise RunError(
                f"{what} {expected} Received: config.toml without {', '.join(lacking)}. "
                "Train again, or restore the file."
            )
    return Run(path, config, metrics)


def find_run(source: str | Path) -> Run | None:
    """Reads the run that a path is the folder of, or the `model.keras` of; None if it is something else.

    Raises:
        RunError: If the folder is a run, but a damaged one.
    """
    path = Path(source)
    folder = path.parent if path.name == "model.keras" else path
    return load_run(folder) if (folder / "config.toml").is_file() else None


def load_model(path: str | Path) -> "VisionTransformer":
    """Loads a model that vitreous saved as `.keras`.

    Raises:
        MissingPathError: If the file does not exist.
        RunError: If it is damaged, or holds something else.
    """
    import keras

    from vitreous.model import VisionTransformer

    path = Path(path)
    if not path.is_file():
        raise MissingPathError(
            f"Cannot load a model. Expected a .keras file. Received: path={str(path)!r}, which does not exist. "
            "Check the path."
        )
    try:
        _check_archive(path)
        model = keras.saving.load_model(path, compile=False)
    except RunError:
        raise
    except (ValueError, OSError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(
            f"Cannot load a model. Expected a whole .keras file of a VisionTransformer. Received: {path}, {reason}. "
            "Take it from a finished run."
        ) from error
    if not isinstance(model, VisionTransformer):
        raise _refuse_content(path, f"a {type(model).__name__}")
    return model


def _check_archive(path: Path) -> None:
    """Refuses what is no model of ours before Keras builds anything from it, and what would take more memory than it
    has bytes.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(sizes.values()) > 4 * path.stat().st_size + _MAX_CONFIG_BYTES:
            raise _refuse_content(path, f"{sum(sizes.values())} bytes, packed into {path.stat().st_size}")
        if sizes["config.json"] > _MAX_CONFIG_BYTES:
            raise _refuse_content(path, f"a config.json of {sizes['config.json']} bytes")
        described = json.loads(archive.read("config.json"))
    if described["registered_name"] != "vitreous>VisionTransformer":
        raise _refuse_content(path, f"a {described['class_name']}")
    config = ViTConfig.from_dict(described["config"]["config"])
    if config.num_tokens > _MAX_TOKENS or count_parameters(config) > sizes["model.weights.h5"]:
        raise _refuse_content(
            path,
            f"a model of {config.num_tokens} tokens and {count_parameters(config)} weights in "
            f"{sizes['model.weights.h5']} bytes",
        )


def _refuse_content(path: Path, content: str) -> RunError:
    return RunError(
        f"Cannot load a model. Expected a VisionTransformer. Received: {path}, which holds {content}. "
        "Take it from a finished run."
    )


def is_run(path: Path) -> bool:
    """Whether a folder is a whole run: nothing else may be replaced."""
    try:
        load_run(path)
    except (RunError, MissingPathError):
        return False
    return True


def partial_folder(path: str | Path) -> Path:
    """Returns where a run that will lie at `path` lies until it is finished."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.partial")


class RunWriter:
    """Writes a run folder beside its final place and moves it there at the end.

    Args:
        path: Where the run will be.
        overwrite: Whether a run that is there already may be replaced, once the new one is whole.
        resume: What is done about an unfinished run: `"auto"` continues it, `"only"` does nothing else, `"never"`
            removes it.
        report: Called with a line of text about what is not as it should be.

    Attributes:
        folder: The folder beside the final place.
        partial: The folder in it that becomes the run.
        checkpoints: The folder in it for checkpoints; there may be some of an unfinished run.

    Raises:
        RunExistsError: If something is there and `overwrite` is False, or it is no run, or another process writes it.
        RunError: If the folder cannot be written, or there is nothing to resume.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: Resume = "auto",
        report: Callable[[str], None] = lambda text: None,
    ):
        self.path = Path(path).absolute()
        self.overwrite = overwrite
        self.report = report
        self.folder = partial_folder(self.path)
        self.partial, self.checkpoints = self.folder / "run", self.folder / "checkpoints"
        what = f"Cannot write the run {path}."
        is_new = not self.folder.exists()
        if is_new:
            self._check_place(what)
            if resume == "only":
                raise RunError(
                    f"Cannot resume {path}. Expected an unfinished run. Received: nothing at {self.folder}. "
                    "Train without --resume."
                )
        elif not (self.folder / "lock").is_file():
            raise RunExistsError(
                f"{what} Expected {self.folder} to be free, or to be an unfinished run. Received: something else. "
                "Pass another --out."
            )
        try:
            self._lock = self._take_lock(what)
            if (self.folder / "old").exists() and not self.path.exists():
                os.rename(self.folder / "old", self.path)  # a finish that was cut short
            try:
                self._check_place(what)
            except RunExistsError:
                if is_new or (is_run(self.path) and not self.partial.exists()):
                    self.discard()  # its run has been finished
                else:
                    self._release()
                raise
            # Where run/ is missing, it has become the run, and what is left here is of no use.
            if resume == "never" or not (self.checkpoints.is_dir() and self.partial.is_dir()):
                self.clear()
            _empty(self.partial)
        except OSError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"{what} Expected a folder that can be written. Received: {error.strerror or error}. "
                "Pass another --out."
            ) from error

    def _check_place(self, what: str) -> None:
        """Raises `RunExistsError` if what lies at the final place may not be replaced."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not is_run(self.path):
            kind = "folder" if self.path.is_dir() else "file"
            raise RunExistsError(
                f"{what} Expected a free path, or a run to replace. Received: a {kind} that is no run. "
                "Pass another --out."
            )
        if not self.overwrite:
            raise RunExistsError(
                f"{what} Expected a free path. Received: out={str(self.path)!r}, where a run lies. "
                "Pass another --out, or --overwrite to replace it."
            )

    def _take_lock(self, what: str) -> int | None:
        """Returns the open lock, which the system gives back when this process ends, however it ends."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the process that had it has just finished
            try:
                _lock_file(lock)
            except BlockingIOError as error:
                os.lseek(lock, 0, os.SEEK_SET)
                holder = os.read(lock, 200).decode(errors="replace").strip() or "unknown"
                os.close(lock)
                raise RunExistsError(
                    f"{what} Expected no other process to write it. Received: {holder}, which does. "
                    "Wait for it, stop it, or pass another --out."
                ) from error
            except OSError as error:
                self.report(f"{self.folder} cannot be locked ({error.strerror}): start nothing else on this run.")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / "lock")):
                    break
            os.close(lock)
        os.lseek(lock, 0, os.SEEK_SET)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Removes everything of the unfinished run; what is written from here on is a new one."""
        _empty(self.folder, but="lock")
        self.partial.mkdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole."""
        write_text(self.partial / name, text)

    def write_call(self, call: Mapping[str, Any]) -> None:
        """Writes what was asked for, beside the run."""
        write_text(self.folder / "call.json", json.dumps(call, indent=2))

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes all rows of `history.csv` and `history.jsonl` anew."""
        text = io.StringIO(newline="")
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_text("history.csv", text.getvalue())
        self.write_text("history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self) -> Path:
        """Moves the folder to its final place and returns that.

        If another run has come to lie there meanwhile, and none may be replaced, the place is the next free
        `PATH-2`, `PATH-3` ...
        """
        place, number = self.path, 1
        while True:
            if self.overwrite and is_run(place):
                os.replace(place, self.folder / "old")
            try:
                os.rename(self.partial, place)  # refuses a folder that is not empty
            except OSError:
                if not place.exists():
                    raise
                number += 1
                place = self.path.with_name(f"{self.path.name}-{number}")
                continue
            self.discard()
            return place

    def keep(self) -> str | None:
        """Lets go of the run, so that it can be resumed, or removes it where there is nothing to resume from.

        Returns:
            What is left, in words; None for nothing.
        """
        has_model = (self.partial / "model.keras").is_file()
        if self.checkpoints.is_dir() and any(not entry.name.startswith(".") for entry in self.checkpoints.iterdir()):
            self._release()
            model = f" (the trained model: {self.partial / 'model.keras'})" if has_model else ""
            return f"continue it with --resume {shlex.quote(str(self.path))}{model}"
        if has_model:
            self._release()
            return f"the trained model is kept in {self.partial}"
        self.discard()
        return None

    def discard(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):
            _empty(self.folder, but="lock")
            if sys.platform == "win32":  # which removes no file that is open
                self._release()
            (self.folder / "lock").unlink()  # last: until then, nobody else begins here
            self.folder.rmdir()
        self._release()


def _lock_file(descriptor: int) -> None:
    """Locks an open file for this process.

    Raises:
        BlockingIOError: If another process has it.
        OSError: If the file system knows no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)  # others may read what lies before it
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _empty(folder: Path, *, but: str = "") -> None:
    """Removes what lies in a folder, but for one name."""
    for entry in [*folder.iterdir()]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != but:
            entry.unlink()
