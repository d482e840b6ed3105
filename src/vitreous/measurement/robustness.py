"""A classifier under common corruptions."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vitreous.backend import count_cores
from vitreous.data import ImageSet, Loader
from vitreous.data.corruptions import CORRUPTION_GROUPS, CORRUPTIONS, SEVERITIES, corrupt_image
from vitreous.errors import DataError
from vitreous.evaluation import NUM_DRAWS, compute_metrics, get_headline
from vitreous.measurement.views import Predict
from vitreous.spec import InputSpec

_BATCH = 64


def draw_sample(num_images: int, most: int) -> np.ndarray:
    """Returns the rising indices of at most so many images, drawn at random, always the same."""
    if num_images <= most:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:most])


def measure_robustness(
    predict: Predict,
    images: ImageSet,
    input_spec: InputSpec,
    class_names: Sequence[str],
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    indices: np.ndarray | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measures a classifier on images that are corrupted in 15 ways, after they have been resized for the model.

    Args:
        predict: uint8 images (B, H, W, C) to logits (B, K).
        images: Labelled images; all of them are held in memory, as the model takes them.
        input_spec: How they are resized.
        class_names: K names.
        corruptions: Some of `CORRUPTIONS`.
        severities: Some of 1 to 5.
        indices: What decides, with the seed, the random numbers of each image. Default: its position.
        seed: As said.
        on_batch: Called with the number of images of each batch.

    Returns:
        A dict fit for JSON: `metric`, the name of the headline number (accuracy; mean average precision with several
        labels an image); `num_examples`; `clean`, on the same images as they are; `corruptions`: by name and severity,
        and its `mean`; `groups`: the mean over noise, blur, weather, digital; `mean`, over everything, and, with one
        label an image, its `mean_interval` (95%, bootstrap over images, 1000 draws).

    Raises:
        DataError: If not one image can be read.

    Source: see `vitreous.data.corruptions`. Difference: ImageNet-C corrupts images of 224 pixels cut from larger ones,
    CIFAR-10-C stored ones; here it is always the image that enters the model.
    """
    loader = Loader(images, input_spec, batch_size=min(_BATCH, len(images)), cache_bytes=0)
    batches = [
        (batch.images[batch.mask], batch.labels[batch.mask], batch.indices[batch.mask]) for batch in loader.epoch(0)
    ]
    pixels, labels, places = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if not len(labels):
        raise DataError(
            f"Cannot measure robustness. Expected images that can be read. Received: {len(images)} that cannot. "
            "Measure more images, or look at them: vitreous inspect DATA."
        )
    keys = places if indices is None else np.asarray(indices)[places]
    labels = labels.astype(bool) if images.is_multi_label else labels
    rights: list[np.ndarray] = []

    def measure(logits: np.ndarray) -> tuple[str, float]:
        return get_headline(compute_metrics(logits, labels, class_names))

    with ThreadPoolExecutor(count_cores()) as pool:
        name, clean = measure(_predict_changed(predict, pixels, None, pool, on_batch))
        table: dict[str, dict[str, float]] = {}
        for corruption in corruptions:
            row: dict[str, float] = {}
            for severity in severities:

                def change(i: int, corruption: str = corruption, severity: int = severity) -> np.ndarray:
                    return corrupt_image(pixels[i], corruption, severity, seed=seed, index=int(keys[i]))

                logits = _predict_changed(predict, pixels, change, pool, on_batch)
                row[str(severity)] = measure(logits)[1]
                if not images.is_multi_label:
                    rights.append(logits.argmax(axis=1) == labels)
            table[corruption] = {**row, "mean": float(np.mean(list(row.values())))}
    result: dict[str, Any] = {
        "metric": name,
        "num_examples": len(labels),
        "clean": clean,
        "mean": float(np.mean([row["mean"] for row in table.values()])),
    }
    if rights:
        by_image = np.mean(rights, axis=0)
        total, generator = len(by_image), np.random.default_rng(0)
        means = [by_image[generator.integers(0, total, total)].mean() for _ in range(NUM_DRAWS)]
        result["mean_interval"] = np.percentile(means, (2.5, 97.5)).tolist()
    groups = {
        kind: [table[name]["mean"] for name in names if name in table] for kind, names in CORRUPTION_GROUPS.items()
    }
    result["groups"] = {kind: float(np.mean(means)) for kind, means in groups.items() if means}
    return {**result, "severities": list(severities), "corruptions": table}


def _predict_changed(
    predict: Predict,
    pixels: np.ndarray,
    change: Callable[[int], np.ndarray] | None,
    pool: ThreadPoolExecutor,
    on_batch: Callable[[int], None] | None,
) -> np.ndarray:
    """Returns the logits of changed images; the next batch is changed while one is predicted."""
    size = min(_BATCH, len(pixels))
    parts = []
    for batch in _changed_batches(pixels, size, change, pool):
        padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), "uint8")])
        parts.append(np.asarray(predict(padded), "float32")[: len(batch)])
        if on_batch:
            on_batch(len(batch))
    return np.concatenate(parts)


def _changed_batches(
    pixels: np.ndarray, size: int, change: Callable[[int], np.ndarray] | None, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    starts = range(0, len(pixels), size)
    if change is None:
        yield from (pixels[start : start + size] for start in starts)
        return
    pending = [pool.submit(change, i) for i in range(min(size, len(pixels)))]
    for start in starts:
        following = [pool.submit(change, i) for i in range(start + size, min(start + 2 * size, len(pixels)))]
        yield np.stack([future.result() for future in pending])
        pending = following
