"""The inspection of a data set, and what a trained model has to say about its labels."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.data import Dataset, Loader, load_dataset
from vitreous.data.inspection import MIN_SIMILARITY, Finding, Inspection, Item, inspect_dataset
from vitreous.data.inspection.findings import create_finding, image_refs
from vitreous.data.sources import source_path
from vitreous.errors import ConfigError, DataError
from vitreous.training import load_run

if TYPE_CHECKING:
    from vitreous.training import Run

_BATCH = 64


def inspect(
    data: str | Path | Dataset,
    *,
    run: "str | Path | Run | None" = None,
    seed: int | None = None,
    min_similarity: float = MIN_SIMILARITY,
    on_progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> Inspection:
    """Looks for what is wrong with labelled images: broken files, copies, leaks, conflicts, odd images, classes.

    Nothing is deleted or changed.

    Args:
        data: As `train` takes it, or a loaded `Dataset`.
        run: A run, or its folder: its model disputes labels. Columns and splits are then those of its training where
            the data has them.
        seed: Decides the splits that the data does not give. Default: the run's, or 0.
        min_similarity: Correlation of two thumbnails, in (0, 1], from which images count as nearly the same.
        on_progress: Called with the images done and the images in all; once more from the start for the run.
        **changes: Fields of `DataConfig` (`label_column="species"`); they come before those of the run.

    Returns:
        What was found: `findings`, `statistics`, `write_json`, `write_fix_list`.

    Raises:
        ConfigError: If an option is out of range, or stands beside a `Dataset`.
        DataError: If the data cannot be used, or has classes that the run does not know.
        MissingPathError: If a path does not exist.
        RunError: If `run` is no run.

    Example:

    ```python
    inspection = vitreous.inspect("photos/")
    for finding in inspection.findings:
        print(finding.severity, finding.summary())
    ```
    """
    if isinstance(run, str | Path):
        run = load_run(run)
    dataset = _load(data, run, seed, {name: value for name, value in changes.items() if value is not None})
    if run:
        _check_run(dataset, run)
    inspection = inspect_dataset(dataset, min_similarity=min_similarity, on_progress=on_progress)
    if run:
        inspection.add(label_findings(dataset, run, on_progress=on_progress))
    return inspection


_PARTS = ("group_column", "num_folds", "fold")  # what decides splits, and other data need not have


def _load(data: str | Path | Dataset, run: "Run | None", seed: int | None, changes: dict[str, Any]) -> Dataset:
    """Loads the data by the caller's options and those of the run that fit: all; all but groups and folds; none."""
    if isinstance(data, Dataset):
        given = [*changes, *(["seed"] if seed is not None else [])]
        if given:
            raise ConfigError(
                f"Cannot split the data set {data.name}. Expected no options of the data beside a Dataset. "
                f"Received: {', '.join(given)}. Pass them to load_dataset."
            )
        return data
    made_by: dict[str, Any] = dict(run.config["data"]["split"]) if run else {}
    own_seed = made_by.pop("seed", 0)
    seed = own_seed if seed is None else seed
    for options in (made_by, {name: value for name, value in made_by.items() if name not in _PARTS}):
        with contextlib.suppress(DataError):
            return load_dataset(data, seed=seed, **{**options, **changes})
    return load_dataset(data, seed=seed, **changes)


def _check_run(dataset: Dataset, run: "Run") -> None:
    unknown = [name for name in dataset.class_names if name not in run.class_names]
    if unknown or dataset.is_multi_label:
        received = f"unknown classes {unknown[:5]}" if unknown else "several labels an image"
        raise DataError(
            f"Cannot look for label errors with the run {run.path}. Expected one label an image, of the run's classes "
            f"{list(run.class_names[:5])}. Received: {received}. Pass a run that was trained on these classes, or "
            "none."
        )


def label_findings(
    dataset: Dataset, run: "Run", *, on_progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Finds probable label errors by confident learning, apart for images the model has seen in training and others.

    Args:
        dataset: The data; its classes are among the run's.
        run: Whose model to ask.
        on_progress: Called with the images done and the images in all.

    Returns:
        `label_error` for images that the model was not trained on, `label_error_seen` for those that it was, or may
        have been: all images, where the run was trained in the same folder when it held other files.
    """
    from vitreous.evaluation import softmax
    from vitreous.label_errors import find_label_errors
    from vitreous.model import create_predict_function

    predict = create_predict_function(run.load_model(), run.input_spec)
    to_run = np.array([run.class_names.index(name) for name in dataset.class_names])
    total, done = sum(map(len, dataset.splits.values())), 0
    answers: dict[bool, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]] = {True: [], False: []}
    for split, images in dataset.splits.items():
        if not len(images):
            continue
        loader = Loader(images, run.input_spec, batch_size=min(_BATCH, len(images)), cache_bytes=0)
        parts = []
        for batch in loader.epoch(0):
            known = batch.mask & (images.labels[batch.indices] >= 0)
            logits = np.asarray(predict(batch.images), "float32")[known][:, to_run]
            parts.append((batch.indices[known], logits))
            done += int((batch.indices >= 0).sum())
            if on_progress:
                on_progress(done, total)
        indices = np.concatenate([part[0] for part in parts])
        probabilities = softmax(np.concatenate([part[1] for part in parts]))
        answers[_may_have_seen(dataset, run, split)].append((split, indices, images.labels[indices], probabilities))
    findings = []
    for is_seen, parts_of in answers.items():
        if not sum(len(part[1]) for part in parts_of):
            continue
        refs = [ref for split, indices, _, _ in parts_of for ref in image_refs(dataset, split, indices.tolist())]
        labels = np.concatenate([part[2] for part in parts_of])
        probabilities = np.concatenate([part[3] for part in parts_of])
        errors = find_label_errors(probabilities, labels)
        items = [
            Item(
                files=(refs[i],),
                detail=f"labelled {refs[i].label} ({probabilities[i, labels[i]]:.1%}), "
                f"rather {dataset.class_names[k]} ({probabilities[i, k]:.1%})",
            )
            for i, k in zip(errors.indices.tolist(), errors.suggested.tolist(), strict=True)
        ]
        if items:
            accuracy = float((probabilities.argmax(axis=1) == labels).mean())
            detail = (
                f"{len(items):,} of {len(labels):,} images by {run.path.name}, accuracy on them {accuracy:.1%}; "
                f"estimated share of wrong labels {errors.noise_rate:.1%}, an upper figure where the model errs"
            )
            findings.append(create_finding("label_error_seen" if is_seen else "label_error", items, detail))
    return findings


def _may_have_seen(dataset: Dataset, run: "Run", split: str) -> bool:
    """Whether the run's model may have been trained on a split."""
    record = run.config["data"]
    if dataset.fingerprint == record["fingerprint"]:
        return split == "train"
    return dataset.root is not None and str(source_path(dataset.root)) == record["root"]
