"""The check after every export: the same images through the Keras model and through the file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data import Loader, load_evaluation_images
from vitreous.errors import ConfigError, DataError, ExportError, MissingPathError
from vitreous.evaluation import compute_metrics, get_headline, sigmoid, softmax
from vitreous.spec import InputSpec
from vitreous.training import Run

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of a logit, as a share of the largest logit of the images or of 1, whichever is more."""

NUM_IMAGES = 256
NUM_LABELLED = 1024  # where accuracy decides: 8-bit exports

_BATCH = 16


@dataclass(frozen=True)
class CheckImages:
    """Images to compare on.

    Args:
        images: uint8, (N, H, W, C), of the model's size.
        labels: (N,), or bool (N, K); None where they are not known.
        source: What they are, in words.
        names: Of each image.
    """

    images: np.ndarray
    labels: np.ndarray | None
    source: str
    names: tuple[str, ...] = ()

    def batches(self, size: int = _BATCH) -> Iterator[np.ndarray]:
        """Yields the images, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size]

    def filled(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Yields batches to calibrate on; those of a fixed `size` are filled up with the first images, over again."""
        for batch in self.batches(size or _BATCH):
            missing = 0 if size is None else size - len(batch)
            yield np.concatenate([batch, np.resize(self.images, (missing, *batch.shape[1:]))]) if missing else batch


def collect_images(run: Run, *, data: str | Path | None = None, need_labels: bool = False) -> CheckImages:
    """Returns images to check an export of a run on.

    Args:
        run: The run.
        data: Labelled images, a source as for `load_dataset`. Default: the validation images of the run's own data;
            where these are no longer to be had, and no labels are needed, generated images.
        need_labels: Whether accuracy will be measured: then more images are taken, and generated ones do not do.

    Raises:
        DataError: If labels are needed and there are none, or `data` cannot be used.
    """
    record = run.config["data"]
    count = NUM_LABELLED if need_labels else NUM_IMAGES
    try:
        if (source := run.data_source if data is None else data) is None:
            raise DataError("the run was trained on a Dataset made in Python.")
        split = None
        if data is None:
            split = "val" if "val" in run.metrics else "test"
        found = load_evaluation_images(
            source,
            run.class_names,
            split=split,
            made_by=record["split"],
            trained_on=record["fingerprint"],
            trained_at=record["root"],
            is_multi_label=run.is_multi_label,
        )
    except (DataError, MissingPathError) as error:
        if data is not None:
            raise
        if need_labels:
            raise DataError(
                "Cannot export in int8. Expected labelled images, to calibrate on and to measure what it costs. "
                f"Received: none, since the run's own data cannot be read ({error}). Pass --data."
            ) from error
        return CheckImages(generate_images(run.input_spec), None, f"generated images (no data: {_first(error)})")
    places = np.unique(np.linspace(0, len(found.images) - 1, min(count, len(found.images))).astype(int))
    chosen = found.images.take(places)
    loader = Loader(chosen, run.input_spec, batch_size=min(_BATCH, len(chosen)), cache_bytes=0)
    parts = [(b.images[b.mask], b.labels[b.mask], b.indices[b.mask]) for b in loader.epoch(0)]
    images, labels, indices = (np.concatenate(part) for part in zip(*parts, strict=True))
    names = tuple(chosen.names[int(i)] for i in indices)
    kind = {"val": "validation images", "test": "test images", "train": "training images"}.get(found.split, "images")
    return CheckImages(images, labels, f"{kind} of {source}", names)


def _first(error: Exception) -> str:
    """Returns the first sentence of a message."""
    return str(error).split(". ")[0].rstrip(".")


def generate_images(input_spec: InputSpec, count: int = 32) -> np.ndarray:
    """Returns uint8 images (count, H, W, C) to compare on: half of them soft patches of colour, half noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = input_spec.image_size
    images = rng.integers(0, 256, (count, height, width, input_spec.num_channels)).astype("uint8")
    for image in images[: count // 2]:
        for channel in range(input_spec.num_channels):
            small = Image.fromarray(rng.integers(0, 256, (4, 4)).astype("uint8"))
            image[..., channel] = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return images


def run_batches(
    infer: Callable[[np.ndarray], Any], images: CheckImages, batch_size: int | None = None
) -> tuple[np.ndarray, ...]:
    """Returns the outputs of `infer` for all images, with batches filled up to `batch_size` where that is fixed."""
    size = batch_size or _BATCH
    results = []
    for batch in images.batches(size):
        padded = batch
        if batch_size and len(batch) < size:
            padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), "uint8")])
        outputs = infer(padded)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append(tuple(np.asarray(output)[: len(batch)] for output in outputs))
    return tuple(np.concatenate(part) for part in zip(*results, strict=True))


def compare(
    expected: np.ndarray,
    logits: np.ndarray,
    probabilities: np.ndarray,
    images: CheckImages,
    *,
    precision: str,
    temperature: float,
    is_multi_label: bool,
    class_names: tuple[str, ...],
    max_drop: float,
) -> dict[str, Any]:
    """Compares an export with the Keras model.

    Args:
        expected: (N, K) logits of the Keras model.
        logits: (N, K) logits of the export.
        probabilities: (N, K) probabilities of the export.
        images: What both saw.
        precision: Of the export.
        temperature: Of the probabilities.
        is_multi_label: Whether they are a sigmoid's.
        class_names: K names.
        max_drop: For int8: how many points of accuracy may be lost, in percent.

    Returns:
        A dict fit for JSON: `images`, `num_images`, `max_logit_difference`, `mean_logit_difference`, `tolerance`,
        `max_probability_difference`, `top1_agreement` (share of images with the same answer; with several labels, of
        all answers), and with int8 `measure`, `before`, `after`.

    Raises:
        ExportError: If the difference is beyond the tolerance, or int8 costs more than `max_drop`.
    """
    to_shares = sigmoid if is_multi_label else softmax
    difference = np.abs(logits - expected)
    same = (logits > 0) == (expected > 0) if is_multi_label else logits.argmax(1) == expected.argmax(1)
    result: dict[str, Any] = {
        "images": images.source,
        "num_images": len(expected),
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "max_probability_difference": float(np.abs(probabilities - to_shares(expected / temperature)).max()),
        "top1_agreement": float(same.mean()),
    }
    if not (np.isfinite(logits).all() and np.isfinite(probabilities).all()):
        raise ExportError(
            f"The export does not agree with the model. Expected finite logits. Received: NaN or infinity in "
            f"{precision}. Export with another precision, such as fp32."
        )
    # Whatever the precision: these probabilities must be those of these logits.
    inner = float(np.abs(probabilities - to_shares(logits / temperature)).max())
    if precision == "int8":
        if images.labels is None:
            raise ConfigError(
                "Cannot export in int8. Expected labelled images. Received: images without labels. Pass --data."
            )
        (measure, before), (_, after) = (
            get_headline(compute_metrics(each, images.labels, class_names)) for each in (expected, logits)
        )
        result |= {"measure": measure, "before": before, "after": after, "max_drop": max_drop}
        if before - after > max_drop / 100:
            raise ExportError(
                f"The int8 export loses too much. Expected at most {max_drop:g} points of {measure.replace('_', ' ')}. "
                f"Received: {before:.2%} before, {after:.2%} after, on {len(expected)} {images.source}. "
                "Pass --precision bf16 or fp16, or a larger --max-drop."
            )
    else:
        tolerance = TOLERANCES[precision] * max(1.0, float(np.abs(expected).max()))
        result["tolerance"] = tolerance
        if difference.max() > tolerance:
            raise ExportError(
                f"The export does not agree with the model. Expected logits within {tolerance:.2g} in {precision}. "
                f"Received: a difference of {difference.max():.2g} on {len(expected)} {images.source}; "
                f"{same.mean():.1%} of the answers are the same. Export with a higher precision, such as fp32."
            )
    if inner > 5e-3:
        raise ExportError(
            "The export does not agree with itself. Expected the probabilities of its logits. Received: a difference "
            f"of {inner:.2g}. Export with a higher precision, such as fp32."
        )
    return result
