"""A run measured on labelled images."""

from pathlib import Path
from typing import Any

from vitreous.data import Loader, load_evaluation_images
from vitreous.errors import DataError
from vitreous.evaluation import collect_logits, compute_metrics
from vitreous.model import create_predict_function
from vitreous.training import Run, load_run

_BATCH = 64


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
