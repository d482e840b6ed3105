"""The run folder: what training leaves, written whole or not at all, and read again.

    model.keras     the trained weights (their average over the last steps) and the architecture
    config.toml     every option as it was resolved: recipe, input, classes, data, versions, seed
    history.csv     a row for each evaluation while training; history.jsonl, the same as JSON lines
    metrics.json    what was measured on model.keras as read back from disk; the temperature of its probabilities
    *.png           curves, confusion matrix, reliability, one image beside its patches, test images with answers
    README.md       what all this is, and the command that made it

While training goes on, the files lie in a folder beside it whose name ends in `.partial`; one rename makes it a run.
"""

import csv
import json
import math
import os
import shutil
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vitreous.data import decode_image, resize_image
from vitreous.errors import MissingPathError, RunError, RunExistsError
from vitreous.spec import InputSpec

if TYPE_CHECKING:  # a run can be read, and refused, without waiting for Keras
    from vitreous.model import VisionTransformer

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
        model = keras.saving.load_model(path, compile=False)
    except (ValueError, OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(
            f"Cannot load a model. Expected a whole .keras file of a VisionTransformer. Received: {path}, {reason}. "
            "Take it from a finished run."
        ) from error
    if not isinstance(model, VisionTransformer):
        raise RunError(
            f"Cannot load a model. Expected a VisionTransformer. Received: {path}, which holds a "
            f"{type(model).__name__}. Take it from a finished run."
        )
    return model


def _is_run(path: Path) -> bool:
    """Whether a folder is a whole run: nothing else may be replaced."""
    try:
        load_run(path)
    except (RunError, MissingPathError):
        return False
    return True


class RunWriter:
    """Writes a run folder beside its final place and moves it there at the end.

    Args:
        path: Where the run will be.
        overwrite: Whether a run that is there already may be replaced, once the new one is whole.

    Raises:
        RunExistsError: If something is there and `overwrite` is False, or it is no run.
        RunError: If the folder cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path = Path(path).absolute()
        self.overwrite = overwrite
        what = f"Cannot write the run {path}."
        if self.path.exists():
            is_empty = self.path.is_dir() and not any(self.path.iterdir())
            if not is_empty and not _is_run(self.path):
                kind = "folder" if self.path.is_dir() else "file"
                raise RunExistsError(
                    f"{what} Expected a free path, or a run to replace. Received: a {kind} that is no run. "
                    "Pass another --out."
                )
            if not overwrite and not is_empty:
                raise RunExistsError(
                    f"{what} Expected a free path. Received: out={str(self.path)!r}, where a run lies. "
                    "Pass another --out, or --overwrite to replace it."
                )
        self.partial = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex[:8]}.partial")
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{what} Expected a folder that can be written. Received: {error.strerror or error}. "
                "Pass another --out."
            ) from error

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole."""
        temporary = self.partial / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.partial / name)

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes all rows of `history.csv` and `history.jsonl` anew."""
        temporary = self.partial / ".history.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, fieldnames=list(names), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.partial / "history.csv")
        self.write_text("history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self) -> Path:
        """Moves the folder to its final place and returns that.

        If another run has come to lie there meanwhile, and none may be replaced, the place is the next free
        `PATH-2`, `PATH-3` ...
        """
        place, number = self.path, 1
        while True:
            old = self.partial.with_suffix(".old")
            if self.overwrite and _is_run(place):
                os.replace(place, old)
            try:
                os.rename(self.partial, place)  # refuses a folder that is not empty
            except OSError:
                if not place.exists():
                    raise
                number += 1
                place = self.path.with_name(f"{self.path.name}-{number}")
                continue
            shutil.rmtree(old, ignore_errors=True)
            return place

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
