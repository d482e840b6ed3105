"""export_model: from a run to a file that gives the same answers elsewhere, checked before it appears."""

import importlib.metadata
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous import __version__
from vitreous.errors import ConfigError, ExportError
from vitreous.export.bundle import write_bundle
from vitreous.export.child import check_packages, run_child
from vitreous.export.graph import build_graph, import_onnx
from vitreous.export.onnx_files import quantize_onnx, save_onnx
from vitreous.export.openvino_files import (
    HINTS,
    convert_to_openvino,
    quantize_openvino,
    save_openvino,
)
from vitreous.export.parity import CheckImages, collect_images, compare, run_batches
from vitreous.export.record import (
    FORMATS,
    ExportPrecision,
    ExportRecord,
    Format,
    check_precision,
    check_suffix,
    find_format,
    metadata_path,
)
from vitreous.export.runtimes import import_openvino, load_runtime
from vitreous.spec import check, check_minimum
from vitreous.training import Run, load_run

_WRITERS = {
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "litert": ("tensorflow_cpu", "tensorflow", "ai-edge-litert"),
    "saved_model": ("tensorflow_cpu", "tensorflow"),
    "torch": ("torch",),
}


@dataclass(frozen=True)
class Export:
    """What `export_model` wrote.

    Args:
        path: The file, or the folder of a SavedModel.
        record: Its metadata, with what the check found.
        num_bytes: Size of all its files.
        bundle: The zip file, if one was asked for.
    """

    path: Path
    record: ExportRecord
    num_bytes: int
    bundle: Path | None = None

    def summary(self) -> str:
        """Returns lines to print: what was written, and how well it agrees."""
        record, parity = self.record, self.record.parity
        batch = f"batches of {record.batch_size}" if record.batch_size else "any batch size"
        height, width = record.input.image_size
        lines = [
            f"Export   {self.path} ({record.format}, {record.precision}, {self.num_bytes / 1e6:.1f} MB)",
            f"Input    uint8 images of {height}x{width}x{record.input.num_channels}, {batch}; normalisation inside"
            + (f", temperature {record.temperature:.3f} inside" if record.temperature != 1 else ""),
            f"Check    {parity['num_images']} {parity['images']}: largest difference of a logit "
            f"{parity['max_logit_difference']:.1e}"
            + (f" (limit {parity['tolerance']:.1e})" if "tolerance" in parity else "")
            + f", same answer on {parity['top1_agreement']:.2%}",
        ]
        if "measure" in parity:
            lines.append(
                f"Cost     {parity['measure'].replace('_', ' ')} {parity['before']:.2%} before, {parity['after']:.2%} "
                f"after (limit: a loss of {parity['max_drop']:g} points)"
            )
        if self.bundle:
            lines.append(f"Bundle   {self.bundle}: unzip it, then: python run.py")
        return "\n".join(lines)


def export_model(
    run: str | Path | Run,
    *,
    format: Format = "openvino",
    precision: ExportPrecision = "fp32",
    batch_size: int | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    max_drop: float = 1.0,
    bundle: bool = False,
    on_message: Callable[[str], None] | None = None,
) -> Export:
    """Exports a run to a file that takes uint8 images and gives logits and calibrated probabilities.

    Normalisation and temperature are inside the file; images come resized, by a rule that stands in its metadata. The
    same images go through the Keras model and through the file in its own runtime; if they do not agree, nothing is
    left.

    Args:
        run: A run, or its folder.
        format: `"onnx"`, `"openvino"`, `"litert"`, `"saved_model"` or `"torch"`.
        precision: `"fp32"`; `"fp16"` (ONNX: computed in it; OpenVINO, LiteRT: weights stored in it); `"bf16"`
            (OpenVINO: computed in it, weights stored in fp16); `"int8"` (ONNX, OpenVINO: calibrated on labelled
            images).
        batch_size: Images in a batch. Default: any number.
        out: Where to write. Default: `export/NAME-FORMAT-PRECISION` in the run's folder.
        data: Labelled images for the check, a source as for `load_dataset`. Default: the run's validation images.
        max_drop: How many points (percent) of accuracy int8 may cost.
        bundle: Whether to write a zip too: the model, its metadata, an image with its answer, and a script that
            gives it without vitreous.
        on_message: Called with lines that say what happens.

    Returns:
        An `Export`.

    Raises:
        ExportError: If the file does not agree with the model, or int8 costs too much.
        ConfigError: If the format has no such precision, or the path does not fit the format.
        MissingDependencyError: If a package of the format is not installed; the extra is named.
        RunError: If `run` is no run with classes.
        DataError: If int8 is asked for and there are no labelled images.
    """
    check_precision(format, precision)
    check_minimum(1, batch_size=1 if batch_size is None else batch_size)
    check(max_drop >= 0, "Cannot use max_drop.", "0 or more points", f"max_drop={max_drop}", "Pass 1.")
    run = run if isinstance(run, Run) else load_run(run)
    run.check_has_classes()
    target = _target(run, format, precision, out)
    _check_packages(format, precision)
    say = on_message or (lambda text: None)
    say(f"Reading the images for the check of {run.path.name}")
    images = collect_images(run, data=data, need_labels=precision == "int8")
    record = create_record(run, format, precision, batch_size)
    return write_export(run, target, record, images, max_drop=max_drop, bundle=bundle, say=say)


def create_record(run: Run, format: Format, precision: ExportPrecision, batch_size: int | None = None) -> ExportRecord:
    """Returns the metadata of an export of a run, without what the check will find."""
    return ExportRecord(
        format=format,
        precision=precision,
        class_names=run.class_names,
        input=run.input_spec,
        temperature=run.temperature,
        is_multi_label=run.is_multi_label,
        batch_size=batch_size,
        inference_precision=HINTS[precision] if format == "openvino" else "",
        run=run.path.name,
        versions=_versions(format),
    )


def write_export(
    run: Run,
    target: Path,
    record: ExportRecord,
    images: CheckImages,
    *,
    max_drop: float = 1.0,
    bundle: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Writes an export beside its place, checks it, and moves it there.

    Args:
        run: What is exported.
        target: The place.
        record: The metadata, without what the check will find.
        images: For the check, and to calibrate on.
        max_drop: As for `export_model`.
        bundle: As for `export_model`.
        say: Called with lines that say what happens.
    """
    from vitreous.model import create_predict_function

    model = run.load_model()
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise ExportError(
            f"Cannot export to {target}. Expected a folder that can be written. Received: {error.strerror or error}. "
            "Pass another --out."
        ) from error
    try:
        place = partial / target.name
        say(f"Running {len(images.images)} {images.source} through the Keras model")
        (expected,) = run_batches(create_predict_function(model, record.input), images)
        if not np.isfinite(expected).all():
            raise ExportError(
                f"Cannot export {run.path}. Expected a model that gives finite logits. Received: NaN or infinity from "
                "the Keras model itself. Train it again."
            )
        say(f"Writing {record.format} in {record.precision}")
        logits, probabilities, save = _write(run, model, place, record, images)
        parity = compare(
            expected,
            logits,
            probabilities,
            images,
            precision=record.precision,
            temperature=record.temperature,
            is_multi_label=record.is_multi_label,
            class_names=record.class_names,
            max_drop=max_drop,
        )
        record = record.replace(parity=parity)
        save(record)
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        files = move_files(partial, target)
        archive = None
        if bundle:
            archive = target.with_name(f"{target.stem if FORMATS[record.format][0] else target.name}.zip")
            best = int(probabilities[0].argmax())
            answer = {
                "class": record.class_names[best],
                "probability": float(probabilities[0, best]),
                "logits": [float(value) for value in logits[0]],
            }
            write_bundle(files, archive, record, images.images[0], answer)
        num_bytes = sum(path.stat().st_size for path in files.values())
        return Export(target, record, num_bytes, archive)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    run: Run, model: Any, place: Path, record: ExportRecord, images: CheckImages
) -> tuple[np.ndarray, np.ndarray, Callable[[ExportRecord], None]]:
    """Writes the files and runs them. Returns logits, probabilities, and what writes the metadata afterwards."""
    if record.format not in ("onnx", "openvino"):
        scratch = place.parent / "scratch"
        scratch.mkdir()
        answers = run_child(
            run.path,
            {record.format: place},
            images.images,
            scratch,
            precision=record.precision,
            temperature=record.temperature,
            is_multi_label=record.is_multi_label,
            batch_size=record.batch_size,
        )
        if record.format == "litert":
            runtime, _ = load_runtime(place, record=record)
            answers["litert"] = run_batches(runtime, images, record.batch_size)  # type: ignore[assignment]

        def save_beside(done: ExportRecord) -> None:
            metadata_path(place).write_text(done.to_json(), encoding="utf-8")

        return *answers[record.format], save_beside

    import keras

    from vitreous.weights.load import variables

    weights = {path: keras.ops.convert_to_numpy(v) for path, v in variables(model).items()}
    is_onnx = record.format == "onnx"
    graph: Any = build_graph(
        model.config,
        weights,
        record.input,
        temperature=record.temperature,
        is_multi_label=record.is_multi_label,
        batch_size=record.batch_size,
        dtype="float16" if is_onnx and record.precision == "fp16" else "float32",
    )
    graph = graph if is_onnx else convert_to_openvino(graph)
    if record.precision == "int8":
        graph = (quantize_onnx if is_onnx else quantize_openvino)(graph, images, record.batch_size)

    def save(done: ExportRecord) -> None:
        (save_onnx if is_onnx else save_openvino)(graph, place, done)

    save(record)
    runtime, _ = load_runtime(place, record=record)
    logits, probabilities = run_batches(runtime, images, record.batch_size)
    return logits, probabilities, save


def _target(run: Run, format: str, precision: str, out: str | Path | None) -> Path:
    """Returns where an export goes, if it may."""
    suffix = FORMATS[format][0]
    path = run.path / "export" / f"{run.path.name}-{format}-{precision}{suffix}" if out is None else Path(out)
    check_suffix(format, out)
    _check_free(path, format)
    return path


def _check_free(path: Path, format: str) -> None:
    """Raises `ConfigError` if an export would take the place of something that is none."""
    if FORMATS[format][0]:
        beside = {"onnx": [], "openvino": [path.with_suffix(".bin")]}.get(format, [metadata_path(path)])
        taken = [place for place in (path, *beside) if place.is_dir()]
    else:
        is_free = not path.exists() or (path.is_dir() and (not any(path.iterdir()) or find_format(path) == format))
        taken = [] if is_free else [path]
    if taken:
        raise ConfigError(
            f"Cannot export to {path}. Expected a free path, or an export to replace. "
            f"Received: a {'folder' if taken[0].is_dir() else 'file'} that is none, {taken[0]}. Pass another --out."
        )


def _check_packages(format: str, precision: str) -> None:
    """Raises `MissingDependencyError` before any work is done, if a package is not there."""
    if format not in ("onnx", "openvino"):
        check_packages(format)
        return
    import_onnx()
    if format == "openvino":
        import_openvino()


def _versions(format: str) -> dict[str, str]:
    found = {"vitreous": __version__}
    for package in _WRITERS[format]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # TensorFlow comes under either of two names
    return found


def move_files(partial: Path, target: Path) -> dict[str, Path]:
    """Moves what lies in `partial` beside the target. Returns {name in a bundle: file}, the model first."""
    for path in sorted(partial.iterdir()):
        place = target.with_name(path.name)
        if place.is_dir():  # nothing takes the place of a folder in one step: the old one goes aside first
            aside = partial / f"{path.name}.old"
            os.replace(place, aside)
        os.replace(path, place)
    if target.is_dir():
        return {f"{target.name}/{p.relative_to(target)}": p for p in sorted(target.rglob("*")) if p.is_file()}
    files = [target, target.with_suffix(".bin")] if target.suffix == ".xml" else [target]
    return {path.name: path for path in files}
