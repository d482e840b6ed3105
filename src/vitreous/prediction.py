"""A run at work: classify images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitreous.engine import Engine, Prediction
from vitreous.export.record import ExportPrecision
from vitreous.training import Run

__all__ = ["Prediction", "predict"]


def predict(
    run: str | Path | Run,
    images: Any,
    *,
    top_k: int = 5,
    threshold: float | None = None,
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
        threshold: Probability in [0, 1] below which an answer is not sure: that of the most probable class; with
            several labels an image, that of its least sure label being as it is answered.
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
    predictions = engine.predict(
        images,
        top_k=top_k,
        threshold=threshold,
        image_column=image_column,
        on_progress=on_progress,
        on_error=on_error,
    )
    return list(predictions)
