"""Commands that put data and a run to use: classify, look for what is wrong."""

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitreous.cli.options import DATA, Backend, SplitOptions, describe_source, given, start_backend
from vitreous.cli.printing import (
    check_output,
    open_answers,
    open_output,
    print_findings,
    show_progress,
)
from vitreous.errors import ConfigError
from vitreous.text import escape_text


def predict(
    run: Path,
    images: Annotated[
        list[str],
        Parameter(required=True),
        describe_source("Image files; folders of images;", "Labels are not needed."),
    ],
    /,
    *,
    top_k: int = 5,
    csv_output: Annotated[bool, Parameter(name="--csv", negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    jsonl_output: Annotated[bool, Parameter(name="--jsonl", negative=())] = False,
    parquet_output: Annotated[bool, Parameter(name="--parquet", negative=())] = False,
    threshold: float | None = None,
    image_column: str | None = None,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    precision: Literal["fp32", "bf16"] | None = None,
    backend: Backend | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
) -> int:
    """Classify images: the most probable classes of each, with probabilities.

    Rows are written as they come, and memory stays flat however many images there are. On a CPU with OpenVINO
    (vitreous[openvino]) a run is exported once and then computed by that, without Keras.

    Args:
        run: Folder of the run, or a file that `vitreous export` wrote (.onnx, .xml, .tflite).
        images: Images, labelled or not.
        top_k: How many classes to name for each image, at most.
        csv_output: Print CSV.
        json_output: Print one JSON array.
        jsonl_output: Print JSON lines: an object an image.
        parquet_output: Write Parquet, to the file of --out.
        threshold: Probability in [0, 1] below which an answer is "not sure"; `vitreous evaluate` shows what one does.
        image_column: Column of a table that holds the images. Default: found by its name.
        out: File to write instead of printing. Rows gather in OUT.partial until all are there.
        resume: Go on with the rows of --out that an interrupted start left; images that have one are skipped.
        precision: fp32, or bf16 (faster on processors that have it) for a run on a CPU. Default: fp32.
        backend: Keras backend, to run a run on it. Default: OpenVINO on a CPU where it is installed, else
            KERAS_BACKEND, else the fastest backend installed for this hardware.
        ray: Compute on the machines of a Ray cluster (vitreous[ray]): auto for one that this machine belongs to,
            HOST:6379 or ray://HOST:10001 for one elsewhere, local for a trial on this machine. Images must lie where
            all machines see them: the same path, or a URL.
        ray_workers: Workers on that cluster, at most. Default: as many as it has cores or GPUs for.
    """
    chosen = {"csv": csv_output, "json": json_output, "jsonl": jsonl_output, "parquet": parquet_output}
    formats = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(formats) > 1:
        raise ConfigError(
            f"Cannot print two formats. Expected one of --csv, --json, --jsonl and --parquet. Received: "
            f"{'both' if len(formats) == 2 else 'more'}. Pass one of them, or run twice."
        )
    if ray_workers is not None and ray is None:
        raise ConfigError(
            f"Cannot predict. Expected --ray, whose workers --ray-workers limits. Received: ray_workers={ray_workers} "
            "alone. Pass --ray ADDRESS too."
        )
    check_output(out)
    from vitreous.calibration import check_threshold
    from vitreous.data import DataConfig, load_images
    from vitreous.data.sources.folders import is_image_name
    from vitreous.engine import Engine
    from vitreous.export.record import find_format
    from vitreous.ray_engine import RayEngine
    from vitreous.training import load_run

    check_threshold(threshold)
    if not find_format(run):
        load_run(run)  # first: a wrong path should not cost the time that all else takes
    found = load_images(images, DataConfig(image_column=image_column))
    failed: list[tuple[str, str]] = []
    is_each_named = all(os.path.isfile(image) and is_image_name(str(image)) for image in images)
    choices: dict[str, Any] = {
        "precision": precision,
        "backend": backend,
        "on_message": lambda text: print(text, file=sys.stderr),
    }
    described: dict[str, object] = {"threshold": threshold, "top_k": top_k}
    if out is not None:
        described["model"] = _digest(run)
    start: contextlib.AbstractContextManager[Engine | RayEngine]
    if ray is None:
        start = contextlib.nullcontext(Engine(run, **choices))
    else:
        start = RayEngine(run, address=ray, max_workers=ray_workers, **choices)
    with (
        start as engine,
        open_answers(
            formats[0] if formats else "text",
            out,
            num_ranks=min(top_k, len(engine.class_names)),
            has_labels=engine.is_multi_label,
            threshold=threshold,
            resume=resume,
            origin={**described, "precision": engine.precision},
        ) as writer,
        show_progress("images") as on_progress,
    ):
        predictions = engine.predict(
            found,
            top_k=top_k,
            threshold=threshold,
            skip=writer.done,
            on_progress=on_progress,
            # A file that the user names must be readable; in a folder or a table one bad file stops nothing.
            on_error=None if is_each_named else lambda name, reason: failed.append((name, reason)),
        )
        for prediction in predictions:
            writer.write(prediction)
    for name, reason in failed:
        print(f"Warning: left out {escape_text(name)}: {reason}", file=sys.stderr)
    return 0


def _digest(run: Path) -> str:
    """Returns what tells the weights of a run, or of an export, from others."""
    file = run / "model.keras" if run.is_dir() else run.with_suffix(".bin") if run.suffix == ".xml" else run
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "openvino", "litert", "saved_model", "torch"] = "openvino",
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    batch: str = "dynamic",
    out: Path | None = None,
    data: Annotated[str | None, describe_source("Labelled images:", "Default: the run's validation images.")] = None,
    max_drop: float = 1.0,
    bundle: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    backend: Backend | None = None,
) -> int:
    """Export a run to a file that gives the same answers elsewhere: uint8 images in, calibrated probabilities out.

    The same images go through the Keras model and through the file in its own runtime. If they do not agree within the
    tolerance of the precision, the file is removed and the command fails.

    Args:
        run: Folder of the run.
        format: What to write: onnx (.onnx), openvino (.xml and .bin), litert (.tflite), saved_model (a folder), torch
            (.pt2). Each needs the extra of its name: vitreous[onnx]; saved_model needs vitreous[tensorflow].
        precision: fp32; fp16 (onnx, openvino, litert); bf16 (openvino); int8 (onnx, openvino: vitreous[int8]),
            calibrated on labelled images.
        batch: Images in a batch, or dynamic for any number.
        out: Where to write. Default: export/NAME-FORMAT-PRECISION in the run's folder.
        data: Images to check on, and to calibrate int8 with.
        max_drop: Points of accuracy, in percent, that int8 may cost.
        bundle: Write a zip too: model, metadata, an image with its answer, and a short script that needs no vitreous.
        json_output: Print the metadata as JSON.
        backend: Keras backend of the model to compare with. Default: KERAS_BACKEND, else the fastest one installed.
    """
    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ConfigError(
            f"Cannot read --batch. Expected a positive number, or dynamic. Received: batch={batch!r}. Pass for "
            "example 1."
        )
    from vitreous.export.record import check_precision, check_suffix

    check_precision(format, precision)  # before anything takes seconds to load
    check_suffix(format, out)
    from vitreous.training import load_run

    loaded = load_run(run)
    start_backend(backend)
    from vitreous.export import export_model

    export = export_model(
        loaded,
        format=format,
        precision=precision,
        batch_size=None if batch == "dynamic" else int(batch),
        out=out,
        data=data,
        max_drop=max_drop,
        bundle=bundle,
        on_message=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(export.record.to_json() if json_output else export.summary())
    return 0


def inspect(
    data: Annotated[str, describe_source("Labelled images:")],
    /,
    *,
    html: Path | None = None,
    json_output: Annotated[Path | None, Parameter(name="--json")] = None,
    fix_list: Path | None = None,
    run: Path | None = None,
    min_similarity: float = 0.9,
    strict: Annotated[bool, Parameter(negative=())] = False,
    seed: int | None = None,
    backend: Backend | None = None,
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Look for what is wrong with labelled images, before or after training. Nothing is deleted or changed.

    Broken files, copies, the same image in training and test or under two classes, odd and extreme images, unequal
    classes; with a run, labels that its model disputes.

    Args:
        data: Labelled images.
        html: Page to write, with thumbnails; one file that needs no network.
        json_output: JSON file to write, with everything.
        fix_list: CSV table to write: each file, what was found, what could be done.
        run: Folder of a run whose model looks for wrong labels. Columns and splits are those of its training where the
            data has them.
        min_similarity: Correlation of two thumbnails, in (0, 1], from which images count as nearly the same.
        strict: Exit with code 1 if there are errors.
        seed: Decides the splits that the data does not give. Default: the run's, or 0.
        backend: Keras backend, for --run. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
    """
    outputs = {"--html": html, "--json": json_output, "--fix-list": fix_list}
    for option, path in outputs.items():
        check_output(path, option)
    from vitreous.inspection import inspect as inspect_data

    if run:
        from vitreous.training import load_run

        load_run(run)
        start_backend(backend)
    with show_progress("images") as on_progress:
        inspection = inspect_data(
            data, run=run, seed=seed, min_similarity=min_similarity, on_progress=on_progress, **given(data_options)
        )
    print_findings(inspection)
    if html:
        from vitreous.report import render_inspection

        page = render_inspection(inspection)
        with open_output(html) as file:
            file.write(page)
    if json_output:
        with open_output(json_output) as file:
            inspection.write_json(file)
    if fix_list:
        with open_output(fix_list) as file:
            inspection.write_fix_list(file)
    return 1 if strict and inspection.count("error") else 0
