"""A run at work: classify images."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vitreous.calibration import check_threshold, get_confidence
from vitreous.data import DataConfig, ImageSet, load_images, resize_image
from vitreous.data.sources.contents import reason_of
from vitreous.errors import ConfigError, ImageError, MissingPathError
from vitreous.evaluation import sigmoid, softmax
from vitreous.model import create_predict_function
from vitreous.training import Run, load_run

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a run says of one image.

    Args:
        path: The image: its file, or its name in the source that it comes from.
        classes: Class names, the most probable first.
        probabilities: Of these classes, in [0, 1]; they sum to 1 over all classes unless an image may have several.
        labels: Where an image may have several classes: those with a probability of 1/2 or more, the most probable
            first. None where it has one.
        is_sure: Whether the answer reaches the threshold that was asked for. None without one.
    """

    path: Path | str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    labels: tuple[str, ...] | None = None
    is_sure: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        sure = {} if self.is_sure is None else {"is_sure": self.is_sure}
        return {
            "image": str(self.path),
            **sure,
            **labels,
            "predictions": [{"class": c, "probability": p} for c, p in pairs],
        }


def predict(
    run: str | Path | Run,
    images: str | Path | Iterable[str | Path],
    *,
    top_k: int = 5,
    threshold: float | None = None,
    image_column: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_error: Callable[[str, str], None] | None = None,
) -> list[Prediction]:
    """Classifies images.

    Args:
        run: A run, or its folder.
        images: Image files, folders of images (walked, in sorted order), and other sources as for `load_dataset`;
            labels are not needed.
        top_k: How many classes to name for each image, at most.
        threshold: Probability in [0, 1] below which an answer is not sure: that of the most probable class; with
            several labels an image, that of its least sure label being as it is answered.
        image_column: Column of a table that holds the images. Default: found by its name.
        on_progress: Called with the images done and the images in all.
        on_error: Called with the name of an image that cannot be read, and why; it is then left out. Default: it ends
            the prediction.

    Returns:
        One `Prediction` for each image, in order.

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
    if top_k < 1:
        raise ConfigError(
            f"Cannot name classes. Expected top_k of at least 1. Received: top_k={top_k}. Pass 1 or more."
        )
    check_threshold(threshold)
    run = run if isinstance(run, Run) else load_run(run)
    run.check_has_classes()
    found = load_images(images, DataConfig(image_column=image_column))
    spec = run.input_spec
    infer = create_predict_function(run.load_model(), spec)
    compute_shares = sigmoid if run.is_multi_label else softmax
    names = run.class_names
    predictions: list[Prediction] = []

    def read(index: int) -> np.ndarray | str:
        """Returns the pixels of an image, or why it cannot be read."""
        try:
            return resize_image(found.load(index, spec.num_channels), spec)
        except (ImageError, MissingPathError) as error:
            if on_error is None:
                raise
            return reason_of(error)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for start, results in _ahead(pool, read, len(found)):
            for index, result in enumerate(results, start):
                if isinstance(result, str) and on_error:
                    on_error(str(_name(found, index)), result)
            indices = [start + i for i, result in enumerate(results) if not isinstance(result, str)]
            if indices:
                batch = np.stack([result for result in results if not isinstance(result, str)])
                padded = np.concatenate([batch, np.zeros((_BATCH - len(batch), *batch.shape[1:]), "uint8")])
                logits = infer(padded if len(found) > _BATCH else batch)[: len(batch)]
                for index, shares in zip(indices, compute_shares(logits / run.temperature), strict=True):
                    order = np.argsort(-shares, kind="stable")
                    best = order[:top_k]
                    labels = tuple(names[i] for i in order if shares[i] >= 0.5) if run.is_multi_label else None
                    predictions.append(
                        Prediction(
                            _name(found, index),
                            tuple(names[i] for i in best),
                            tuple(float(shares[i]) for i in best),
                            labels,
                            None if threshold is None else is_sure(shares, threshold, run.is_multi_label),
                        )
                    )
            if on_progress:
                on_progress(start + len(results), len(found))
    return predictions


def is_sure(probabilities: np.ndarray, threshold: float, is_multi_label: bool) -> bool:
    """Returns whether an answer, (K,) probabilities, reaches a threshold."""
    return bool(get_confidence(probabilities, is_multi_label=is_multi_label) >= threshold)


def _name(images: ImageSet, index: int) -> Path | str:
    """Returns what to call an image: its file if that was named, else its name in the source."""
    name, path = images.names[index], images.path(index)
    return path if path is not None and str(path) == name else name


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], np.ndarray | str], num_images: int
) -> Iterator[tuple[int, list[np.ndarray | str]]]:
    """Yields batches of what `read` returns with the index of their first, while the next batch is being read."""
    starts = range(0, num_images, _BATCH)
    pending = [pool.submit(read, index) for index in range(min(_BATCH, num_images))]
    for start in starts:
        next_batch = range(start + _BATCH, min(start + 2 * _BATCH, num_images))
        following = [pool.submit(read, index) for index in next_batch]
        try:
            yield start, [future.result() for future in pending]
        except BaseException:
            for future in (*pending, *following):
                future.cancel()
            raise
        pending = following


def write_predictions_json(predictions: Sequence[Prediction], file: TextIO) -> None:
    """Writes predictions as one JSON array."""
    json.dump([prediction.to_dict() for prediction in predictions], file, indent=2, ensure_ascii=False)
    file.write("\n")


def write_predictions_csv(predictions: Sequence[Prediction], file: TextIO) -> None:
    """Writes predictions as CSV: a row an image, two columns (class, probability) for each rank.

    Where an image may have several classes, a column `labels` has those that apply, with semicolons between them; with
    a threshold, a column `is_sure` says true or false.
    """
    ranks = range(1, 1 + max((len(p.classes) for p in predictions), default=0))
    writer = csv.writer(file, lineterminator="\n")
    has_labels = any(p.labels is not None for p in predictions)
    has_threshold = any(p.is_sure is not None for p in predictions)
    names = [f"{field}_{rank}" for rank in ranks for field in ("class", "probability")]
    writer.writerow(["image", *(["is_sure"] if has_threshold else []), *(["labels"] if has_labels else []), *names])
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        labels = [";".join(p.labels or ())] if has_labels else []
        sure = [str(bool(p.is_sure)).lower()] if has_threshold else []
        writer.writerow([p.path, *sure, *labels, *(value for name, share in pairs for value in (name, f"{share:.6f}"))])
