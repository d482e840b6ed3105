"""A run at work: classify images, and measure the run on labelled ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitreous.data import Loader, load_evaluation_images
from vitreous.engine import Engine, Prediction
from vitreous.errors import DataError
from vitreous.evaluation import collect_logits, compute_metrics
from vitreous.export.record import ExportPrecision
from vitreous.model import create_predict_function
from vitreous.training import Run, load_run

_BATCH = 64

__all__ = ["Prediction", "evaluate", "predict"]


def predict(
    run: str | Path | Run,
    images: Any,
    *,
    top_k: int = 5,
    precision: ExportPrecision | None = None,
    backend: str | None = None,
    image_column: str | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    on_error: Callable[[str, str], None] | None = None,
) -> list[Prediction]:
    """Classifies images.

    Args:
        run: A run, or its folder; or a file that `export_model` wrote.
        images: Image files, folders of images (walked, in sorted order), and other sources as for `load_dataset`;
            labels are not needed. Also arrays, and iterators, as for `Engine.predict`.
        top_k: How many classes to name for each image, at most.
        precision: `"fp32"` or `"bf16"`, as for `Engine`.
        backend: Keras backend, as for `Engine`. Default: OpenVINO on a CPU where it is installed.
        image_column: Column of a table that holds the images. Default: found by its name.
        on_progress: Called with the images done and the images in all.
        on_error: Called with the name of an image that cannot be read, and why; it is then left out. Default: it ends
            the prediction.

    Returns:
        One `Prediction` for each image, in order. For very many images, `Engine.predict` yields them one by one.

    Raises:
        MissingPathError: If a path does not exist.
        DataError: If a folder holds no images.
        ImageError: If an image cannot be read, without `on_error`; it is named.
        RunError: If `run` is no run.

    Example:

    ```python
    for prediction in vitreous.predict("runs/digits-1", "photos/"):
        print(prediction.path, prediction.classes[0], prediction.probabilities[0])
    ```
    """
    engine = Engine(run, precision=precision, backend=backend)
    return list(
        engine.predict(images, top_k=top_k, image_column=image_column, on_progress=on_progress, on_error=on_error)
    )


def evaluate(
    run: str | Path | Run, data: str | Path | None = None, *, split: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Measures a run on labelled images.

    Args:
        run: A run, or its folder.
        data: A source as for `load_dataset`, whose classes are named as the run's (not all need be there). Default: the
            data that the run was trained on.
        split: `"train"`, `"val"`, `"test"` or `"all"` of that data. Default: its test images; for a folder without
            splits, all its images, unless the run was trained on that very folder: then those held out from training.
        **changes: Fields of `DataConfig` (`label_column="species"`) that differ from those of training.

    Returns:
        What `vitreous.evaluation.compute_metrics` returns, and `data`, `split` and `broken_files`.

    Raises:
        DataError: If the data cannot be used, or has a class that the run does not know.
        RunError: If `run` is no run.
    """
    run = run if isinstance(run, Run) else load_run(run)
    run.check_has_classes()
    record = run.config["data"]
    if data is None and record["root"] == "(from Python)":
        raise DataError(
            "Cannot evaluate. Expected data: this run was trained on a Dataset made in Python. Received: data=None. "
            "Pass a folder."
        )
    source = data if data is not None else record["name"] if record["root"] == "(built in)" else record["root"]
    found = load_evaluation_images(
        source,
        run.class_names,
        split=split,
        made_by=record["split"],
        changes=changes,
        trained_on=record["fingerprint"],
        trained_at=record["root"],
        is_multi_label=run.is_multi_label,
    )
    loader = Loader(found.images, run.input_spec, batch_size=min(_BATCH, len(found.images)), cache_bytes=0)
    infer = create_predict_function(run.load_model(), run.input_spec)
    logits, labels, _ = collect_logits(infer, loader.epoch(0))
    metrics = compute_metrics(logits, labels, run.class_names)
    return {"data": str(source), "split": found.split, **metrics, "broken_files": {**found.broken, **loader.broken}}
