"""A run measured on labelled images: how good, how sure, how robust; and its probabilities mended."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitreous.calibration import (
    calibrate,
    check_threshold,
    compute_calibration,
    compute_selection,
    get_confidence,
    get_is_right,
    measure_threshold,
    to_probabilities,
)
from vitreous.data import ImageSet, Loader, load_evaluation_images
from vitreous.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruptions
from vitreous.data.labelled import LabelledImages
from vitreous.data.sources import source_path
from vitreous.errors import ConfigError, DataError, WeightsError
from vitreous.evaluation import collect_logits, compute_all_metrics, wilson_interval
from vitreous.files import write_text
from vitreous.measurement.robustness import draw_sample, measure_robustness
from vitreous.measurement.slices import get_column, measure_slices
from vitreous.measurement.views import Predict, average_views, create_views, describe_view
from vitreous.model import create_predict_function
from vitreous.training import Run, load_run
from vitreous.training.planning import readable

Progress = Callable[[int, int], None]

_BATCH = 64


def evaluate(
    run: str | Path | Run,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    threshold: float | None = None,
    tta: Literal["flip"] | int | None = None,
    slice_by: str | None = None,
    robustness: bool = False,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    max_images: int = 1000,
    plots: str | Path | None = None,
    predict: Predict | None = None,
    on_progress: Progress | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measures a run on labelled images.

    Args:
        run: A run, or its folder.
        data: A source as for `load_dataset`, whose classes are named as the run's (not all need be there). Default: the
            data that the run was trained on.
        split: `"train"`, `"val"`, `"test"` or `"all"` of that data. Default: its test images; for a folder without
            splits, all its images, unless the run was trained on that very folder: then those held out from training.
        threshold: Probability in [0, 1] below which an answer counts as "not sure".
        tta: Views of each image whose probabilities are averaged (test-time augmentation): `"flip"` for the image and
            its mirror image; 2 to 10 for as many of: the image, four diagonal shifts by a 16th of the side, and the
            mirror images of these five. Default: the image alone.
        slice_by: Column of the data's table: measures each of its values by itself.
        robustness: Whether to measure under the 15 common corruptions, at severities 1 to 5.
        corruptions: Which of them. Default: all. Naming some turns `robustness` on.
        severities: Which of 1 to 5. Default: all. Naming some turns `robustness` on.
        max_images: How many images, drawn at random, are corrupted; each corruption takes the same.
        plots: Folder for pictures of all this.
        predict: Function of uint8 images (B, H, W, C) that returns logits (B, K), such as an exported model. Default:
            the run's own model.
        on_progress: Called with the images done and the images in all, over all passes.
        **changes: Fields of `DataConfig` (`label_column="species"`) that differ from those of training.

    Returns:
        What `vitreous.evaluation.compute_all_metrics` returns, for the logits as they are, and

        - `data`, `split`, `broken_files`;
        - `calibration`: `temperature` (the run's), and what `compute_calibration` gives `before` and `after` it;
        - `selection`: what `compute_selection` gives, with the temperature, and `thresholds`: what those do that were
          chosen on validation images for accuracies of 90, 95 and 99%;
        - where asked for, `threshold`, `tta`, `slices`, `robustness`: see `measure_threshold`, `create_views`,
          `measure_slices`, `measure_robustness`.

    Raises:
        ConfigError: If an option cannot work.
        DataError: If the data cannot be used, or has a class that the run does not know, or not that column.
        RunError: If `run` is no run.
        WeightsError: If the answers are not one finite number for each class.

    Example:

    ```python
    metrics = vitreous.evaluate("runs/photos-1", "new/", robustness=True)
    print(metrics["accuracy"], metrics["robustness"]["mean"])
    ```
    """
    run = run if isinstance(run, Run) else load_run(run)
    run.check_has_classes()
    check_threshold(threshold)
    robustness = robustness or corruptions is not None or severities is not None
    names = CORRUPTIONS if corruptions is None else tuple(dict.fromkeys(corruptions))
    levels = SEVERITIES if severities is None else tuple(sorted(set(severities)))
    check_corruptions(names, levels)
    if max_images < 1:
        raise ConfigError(
            f"Cannot measure robustness. Expected one or more images. Received: max_images={max_images}. "
            "Leave it out for 1000."
        )
    views = create_views(tta)
    source, found = load_images_of(run, data, split=split, **changes)
    images = found.images
    column = None if slice_by is None else get_column(images, slice_by, source)
    infer = predict or create_predict_function(run.load_model(), run.input_spec)
    if len(views) > 1:
        infer = average_views(infer, views, is_multi_label=run.is_multi_label, temperature=run.temperature)
    sample = draw_sample(len(images), max_images)
    passes = len(names) * len(levels) + 1 if robustness else 0
    progress = _Progress(on_progress, len(images) + passes * len(sample))
    answers = collect_answers(run, source, found, predict=infer, on_batch=progress.add)
    result = measure_answers(run, answers)
    confidence, is_right = answers.confidence, answers.is_right
    if threshold is not None:
        result["threshold"] = _measure_threshold(confidence, is_right, threshold)
    if len(views) > 1:
        result["tta"] = {"num_views": len(views), "views": [describe_view(view) for view in views]}
    if column is not None:
        result["slices"] = {
            "column": slice_by,
            **measure_slices(answers.logits, answers.labels, column[answers.indices], run.class_names),
        }
    if robustness:
        result["robustness"] = measure_robustness(
            infer,
            images.take(sample),
            run.input_spec,
            run.class_names,
            corruptions=names,
            severities=levels,
            indices=sample,
            on_batch=progress.add,
        )
    if plots is not None:
        draw_evaluation(result, images, run, plots)
    return {**result, "broken_files": answers.broken}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a run answers to labelled images.

    Args:
        source: Where the images come from.
        split: Which part of it.
        images: All images of that part.
        logits: float32 (N, K), of the images that can be read.
        labels: (N,) integers in [0, K); or bool (N, K) where an image may have several labels.
        indices: int64 (N,): which of `images` they are.
        confidence: (N,) in [0, 1]: how sure each answer is, with the run's temperature; see `get_confidence`.
        broken: Files that cannot be read, and why.
    """

    source: str | Path
    split: str
    images: ImageSet
    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    confidence: np.ndarray
    broken: dict[str, str]

    @property
    def is_right(self) -> np.ndarray:
        """Whether each answer is right, bool (N,); with several labels an image, whether all K are."""
        return get_is_right(self.logits, self.labels)


def collect_answers(
    run: Run,
    source: str | Path,
    found: LabelledImages,
    *,
    predict: Predict,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Asks a run about labelled images.

    Args:
        run: The run.
        source: Where the images come from; see `load_images_of`.
        found: The images.
        predict: uint8 images (B, H, W, C) to logits (B, K).
        on_batch: Called with the number of images of each batch.

    Raises:
        WeightsError: If the answers are not one finite number for each class.
    """
    images = found.images
    loader = Loader(images, run.input_spec, batch_size=min(_BATCH, len(images)), cache_bytes=0)
    counted = _counted(predict, on_batch, len(images)) if on_batch else predict
    logits, labels, indices = collect_logits(counted, loader.epoch(0))
    _check_logits(logits, run, images.names, indices)
    shares = to_probabilities(logits, is_multi_label=run.is_multi_label, temperature=run.temperature)
    return Answers(
        source=source,
        split=found.split,
        images=images,
        logits=logits,
        labels=labels,
        indices=indices,
        confidence=get_confidence(shares, is_multi_label=run.is_multi_label),
        broken={**found.broken, **loader.broken},
    )


def measure_answers(run: Run, answers: Answers) -> dict[str, Any]:
    """Computes what `evaluate` returns without being asked for more: metrics, calibration, selection."""
    logits, labels = answers.logits, answers.labels
    confidence, is_right = answers.confidence, answers.is_right
    result: dict[str, Any] = {"data": str(answers.source), "split": answers.split}
    result |= compute_all_metrics(logits, labels, run.class_names)
    result["calibration"] = {
        "temperature": run.temperature,
        "before": compute_calibration(logits, labels),
        "after": compute_calibration(logits, labels, temperature=run.temperature),
    }
    result["selection"] = {
        **compute_selection(confidence, is_right),
        "thresholds": {
            target: _measure_threshold(confidence, is_right, chosen["threshold"])
            for target, chosen in run.metrics.get("calibration", {}).get("thresholds", {}).items()
            if chosen is not None
        },
    }
    return result


def calibrate_run(
    run: str | Path | Run, data: str | Path | None = None, *, split: str | None = None, **changes: Any
) -> Run:
    """Fits the temperature of a run's probabilities anew, and writes it into the run.

    `train` does it at its end. This is for runs of an older vitreous, for a run without validation images, and for
    images from where the model is put to use.

    Args:
        run: A run, or its folder.
        data: Labelled images that the model was not trained on. Default: the data that the run was trained on.
        split: Part of it. Default: its validation images; of other data, as for `evaluate`.
        **changes: Fields of `DataConfig` that differ from those of training.

    Returns:
        The run as it lies on disk then: `run.temperature`, `run.metrics["calibration"]`, `reliability.png`.

    Raises:
        ConfigError: If the images are those of training.
        DataError: If the data cannot be used, or no temperature can be fitted.
        RunError: If `run` is no run.
    """
    run = run if isinstance(run, Run) else load_run(run)
    run.check_has_classes()
    is_own = data is None or run.is_trained_on(data)
    part = split or ("val" if is_own else None)
    if is_own and part in ("train", "all"):
        raise ConfigError(
            "Cannot calibrate. Expected images that the model was not trained on. "
            f"Received: split={part!r} of the data of training. Leave --split out for the validation images."
        )
    source, found = load_images_of(run, data, split=part, **changes)
    infer = create_predict_function(run.load_model(), run.input_spec)
    name = found.split if is_own else str(source_path(source))  # a whole path: no folder's name is that of a result
    answers = {name: _collect(infer, found.images, run)}
    if is_own and found.split == "val":
        try:
            _, test = load_images_of(run, data, split="test", **changes)
        except DataError:  # a run without test images
            pass
        else:
            answers["test"] = _collect(infer, test.images, run)
    calibration = calibrate(answers, fitted_on=name)
    if not calibration["is_fitted"]:
        raise DataError(
            f"Cannot calibrate {run.path}. Expected images that a temperature can be fitted on. "
            f"Received: {calibration['reason']}. The run is as it was; pass more images."
        )
    metrics = {**run.metrics, "calibration": calibration}
    write_text(run.path / "metrics.json", json.dumps(metrics, indent=2))
    from vitreous.figures import draw_reliability

    shown = calibration["test" if "test" in calibration else name]
    draw_reliability(shown["before"], run.path / "reliability.png", after=shown["after"])
    return load_run(run.path)


def load_images_of(
    run: Run, data: str | Path | None = None, *, split: str | None = None, **changes: Any
) -> tuple[str | Path, LabelledImages]:
    """Returns the source, and the images of it to measure the run on. Args: as for `evaluate`."""
    record = run.config["data"]
    source = run.data_source if data is None else data
    if source is None:
        raise DataError(
            "Cannot evaluate. Expected data: this run was trained on a Dataset made in Python. Received: data=None. "
            "Pass a folder."
        )
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
    return source, found


def _collect(predict: Predict, images: ImageSet, run: Run) -> tuple[np.ndarray, np.ndarray]:
    loader = Loader(images, run.input_spec, batch_size=min(_BATCH, len(images)), cache_bytes=0)
    logits, labels, indices = collect_logits(predict, loader.epoch(0))
    _check_logits(logits, run, images.names, indices)
    return logits, labels


def _check_logits(logits: np.ndarray, run: Run, names: Sequence[str], indices: np.ndarray) -> None:
    """Raises `WeightsError` for answers that no number could be made of."""
    count = len(run.class_names)
    if logits.shape[1:] != (count,):
        raise WeightsError(
            f"Cannot measure {run.path}. Expected logits (B, {count}), one for each class. "
            f"Received: logits of shape {('B', *logits.shape[1:])}. Pass the predict function of a model of this run."
        )
    is_finite = np.isfinite(logits).all(axis=1)
    if not is_finite.all():
        raise WeightsError(
            f"Cannot measure {run.path}. Expected finite logits. Received: NaN or infinity for "
            f"{names[indices[is_finite.argmin()]]}. The weights are damaged: train again, or restore model.keras."
        )


def _measure_threshold(confidence: np.ndarray, is_right: np.ndarray, threshold: float) -> dict[str, Any]:
    """Adds 95% intervals (Wilson) to what `measure_threshold` returns."""
    found = measure_threshold(confidence, is_right, threshold)
    return {
        **found,
        "accuracy_interval": list(wilson_interval(found["num_right"], found["num_answered"])),
        "coverage_interval": list(wilson_interval(found["num_answered"], len(is_right))),
    }


class _Progress:
    """Adds up the images of several passes."""

    def __init__(self, report: Progress | None, total: int):
        self.report, self.done, self.total = report, 0, total

    def add(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        if self.report:
            self.report(self.done, self.total)


def _counted(predict: Predict, on_batch: Callable[[int], None], total: int) -> Predict:
    """Returns the same function, which reports its images; the last batch of a pass is padded, and counts in part."""
    left = total

    def counted(images: np.ndarray) -> np.ndarray:
        nonlocal left
        logits = predict(images)
        count = min(left, len(images))
        left -= count
        on_batch(count)
        return logits

    return counted


def draw_evaluation(result: dict[str, Any], images: ImageSet, run: Run, folder: str | Path) -> list[Path]:
    """Draws what `evaluate` returned: confusion or labels, reliability, accuracy against coverage, robustness.

    Returns:
        The files written.
    """
    from vitreous.data import resize_image
    from vitreous.figures import (
        draw_confusion,
        draw_corruptions,
        draw_labels,
        draw_reliability,
        draw_robustness,
        draw_selection,
    )

    folder = Path(folder)
    written = []
    if run.is_multi_label:
        if result["average_precision"]:
            written.append(draw_labels(result, folder / "labels.png"))
    else:
        written.append(draw_confusion(np.array(result["confusion_matrix"]), run.class_names, folder / "confusion.png"))
    calibration = result["calibration"]
    after = calibration["after"] if calibration["temperature"] != 1 else None
    written.append(draw_reliability(calibration["before"], folder / "reliability.png", after=after))
    written.append(draw_selection(result["selection"], folder / "selection.png"))
    if "robustness" in result:
        table = result["robustness"]
        written.append(draw_robustness(table, folder / "robustness.png"))
        image = next(readable(images, range(len(images)), run.input_spec.num_channels))
        grid = draw_corruptions(
            resize_image(image, run.input_spec),
            folder / "corruptions.png",
            corruptions=list(table["corruptions"]),
            severities=table["severities"],
        )
        written.append(grid)
    return written
