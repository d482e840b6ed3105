"""What a training run has learnt: measured on held-out images, drawn, and put into words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.calibration import calibrate
from vitreous.data import Dataset, ImageSet, Loader, resize_image
from vitreous.evaluation import (
    collect_logits,
    compute_all_metrics,
    compute_metrics,
    get_headline,
    sigmoid,
    softmax,
)
from vitreous.figures import (
    draw_confusion,
    draw_curves,
    draw_labels,
    draw_patches,
    draw_predictions,
    draw_reliability,
)
from vitreous.model import VisionTransformer, create_predict_function
from vitreous.spec import InputSpec, ModelSpec
from vitreous.training.distribute import Layout
from vitreous.training.fit import Evaluation, History
from vitreous.training.planning import readable, share_of
from vitreous.training.run import load_model


def evaluation_loader(
    images: ImageSet | None, input_spec: InputSpec, batch_size: int, layout: Layout | None = None
) -> Loader | None:
    """Returns batches of images without random changes, of this process's rows; None without images."""
    if not images:
        return None
    layout = layout or Layout()
    batch_size = -(-min(batch_size, len(images)) // layout.unit) * layout.unit
    return Loader(images, input_spec, batch_size=batch_size, **share_of(layout))


def measure_run(path: Path, dataset: Dataset, input_spec: InputSpec, batch_size: int, folder: Path) -> dict[str, Any]:
    """Evaluates the saved file, as read back, on the held-out images, and fits the temperature of its probabilities.

    Draws the confusion matrix, reliability and some answers.
    """
    predict = create_predict_function(load_model(path), input_spec)
    metrics: dict[str, Any] = {}
    broken: dict[str, str] = {}
    answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split in ("val", "test"):
        images = dataset.splits.get(split)
        loader = evaluation_loader(images, input_spec, batch_size)
        if loader is None or images is None:
            continue
        logits, labels, indices = collect_logits(predict, loader.epoch(0))
        broken |= loader.broken
        if not len(labels):
            continue  # not one image of this split can be read; metrics.json names them all
        metrics[split] = compute_all_metrics(logits, labels, dataset.class_names)
        answers[split] = logits, labels
        shown = split, images, indices
    if answers:
        metrics["calibration"] = calibration = calibrate(answers)
        split, images, indices = shown  # pictures of the test, or of what comes nearest
        before, after = calibration[split]["before"], calibration[split]["after"]
        draw_reliability(before, folder / "reliability.png", after=after if calibration["is_fitted"] else None)
        logits, labels = answers[split]
        logits = logits / calibration["temperature"]
        _draw_answers(images, logits, labels, indices, metrics[split], dataset.class_names, input_spec, folder)
    return {**metrics, "broken_files": broken}


def _draw_answers(
    images: ImageSet,
    logits: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    metrics: Mapping[str, Any],
    class_names: tuple[str, ...],
    input_spec: InputSpec,
    folder: Path,
) -> None:
    """Draws what was answered: the confusion matrix, or how well each label is found; and some images."""
    if images.is_multi_label:
        draw_labels(metrics, folder / "labels.png")
        is_right = ((logits > 0) == labels).all(axis=1)
        certainty = np.abs(logits).min(axis=1)
        answers = [np.flatnonzero(row).tolist() for row in logits > 0]
        truths = [np.flatnonzero(row).tolist() for row in labels]
        probabilities = sigmoid(logits)
    else:
        draw_confusion(np.array(metrics["confusion_matrix"]), class_names, folder / "confusion.png")
        probabilities = softmax(logits)
        certainty = probabilities.max(axis=1)
        is_right = logits.argmax(axis=1) == labels
        answers = [[int(answer)] for answer in logits.argmax(axis=1)]
        truths = [[int(label)] for label in labels]
    chosen = _choose_examples(is_right, certainty)
    draw_predictions(
        [images.load(int(i), input_spec.num_channels) for i in indices[chosen]],
        [truths[i] for i in chosen],
        [answers[i] for i in chosen],
        [probabilities[i, answers[i]].tolist() for i in chosen],
        class_names,
        folder / "predictions.png",
    )


def create_evaluate(
    model: VisionTransformer,
    loader: Loader,
    input_spec: InputSpec,
    class_names: tuple[str, ...],
    layout: Layout | None = None,
) -> Callable[[], Evaluation | None]:
    """Returns a function that measures `model` on validation images; None if not one of them can be read."""
    layout = layout or Layout()
    predict = layout.create_predict(model, input_spec)

    def evaluate() -> Evaluation | None:
        logits, labels, _ = layout.collect(predict, loader)
        if not len(labels):
            return None
        metrics = compute_metrics(logits, labels, class_names)
        name, headline = get_headline(metrics)
        values = {
            "loss": metrics["loss"],
            "accuracy": metrics.get("accuracy", metrics.get("label_accuracy")),
            name: headline,
        }
        return Evaluation((headline, -metrics["loss"]), values)

    return evaluate


def _choose_examples(is_right: np.ndarray, certainty: np.ndarray, count: int = 24) -> np.ndarray:
    """Returns indices for a picture: the surest mistakes first (at most half), then examples spread over the rest."""
    wrong, right = np.flatnonzero(~is_right), np.flatnonzero(is_right)
    wrong = wrong[np.argsort(-certainty[wrong], kind="stable")][: count // 2]
    spread = np.unique(np.linspace(0, len(right) - 1, min(count - len(wrong), len(right))).astype(int))
    return np.concatenate([wrong, right[spread]])


def draw_run(folder: Path, history: History, dataset: Dataset, spec: ModelSpec) -> None:
    """Draws the learning curves, and an image beside its patches."""
    if history.rows:
        names = dict.fromkeys(key for row in history.rows for key in row)
        columns = {name: [row.get(name) for row in history.rows] for name in names}
        draw_curves(columns, folder / "curves.png")
    images = dataset.splits["test" if "test" in dataset.splits else "train"]
    config = spec.config
    image = next(readable(images, range(len(images)), spec.input.num_channels), None)
    if image is None:
        return
    draw_patches(
        resize_image(image, spec.input),
        patch_size=config.patch_size,
        strides=config.patch_strides,
        padding=config.patch_padding,
        out=folder / "patches.png",
    )
