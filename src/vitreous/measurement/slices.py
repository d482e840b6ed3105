"""The images of each value of a column, measured by themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data import ImageSet
from vitreous.errors import DataError
from vitreous.evaluation import compute_metrics, get_headline

_MOST_SLICES = 50
_MOST_VALUES = 12  # of a column of numbers; more, and it is cut into quarters


def get_column(images: ImageSet, name: str, source: str | Path) -> np.ndarray:
    """Returns a column beside the images, or raises `DataError` with the columns that there are."""
    if name not in images.columns:
        raise DataError(
            f"Cannot slice {source}. Expected a column {name!r} beside the images and labels. "
            f"Received: columns={list(images.columns)}. Name one of these with --slice-by; only tables and shards "
            "have columns."
        )
    return images.columns[name]


def measure_slices(
    logits: np.ndarray, labels: np.ndarray, values: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Measures the images of each value of a column by themselves.

    Args:
        logits: (N, K).
        labels: (N,) integers, or bool (N, K).
        values: (N,), the column. Numbers of more than 12 different values are cut into quarters of equally many images;
            of other values the 50 with the most images are measured.
        class_names: K names.

    Returns:
        A dict fit for JSON: `metric`, the name of the headline number; `slices`, the worst first, each with `value`,
        `num_examples`, the headline number and its `interval` (95%, Wilson; of `exact_match` with several labels an
        image), `loss` and `macro_f1`; and `num_left_out`, images of values that were not measured.
    """
    groups = _group_values(values)
    rows = []
    shown = sorted(groups.items(), key=lambda item: -len(item[1]))[:_MOST_SLICES]
    for value, places in shown:
        metrics = compute_metrics(logits[places], labels[places], class_names)
        name, headline = get_headline(metrics)
        interval = metrics.get("accuracy_interval", metrics.get("exact_match_interval"))
        exact = {} if "accuracy" in metrics else {"exact_match": metrics["exact_match"]}
        rows.append(
            {
                "value": value,
                "num_examples": len(places),
                name: headline,
                **exact,
                "interval": interval,
                "loss": metrics["loss"],
                "macro_f1": metrics["macro_f1"],
            }
        )
    rows.sort(key=lambda row: row[name])
    return {"metric": name, "slices": rows, "num_left_out": len(values) - sum(len(places) for _, places in shown)}


def _group_values(values: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the places of each value, or of each quarter of the numbers."""
    numbers = _as_numbers(values)
    groups: dict[str, np.ndarray] = {}
    is_missing = np.array([value is None or value != value or value == "" for value in values.tolist()])
    if numbers is not None and len(np.unique(numbers[~is_missing])) > _MOST_VALUES:
        known = numbers[~is_missing]
        edges = np.unique(np.quantile(known, (0, 0.25, 0.5, 0.75, 1)))
        of = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        for k in range(len(edges) - 1):
            close = "]" if k == len(edges) - 2 else ")"
            places = np.flatnonzero((of == k) & ~is_missing)
            if len(places):
                groups[f"[{edges[k]:.4g}, {edges[k + 1]:.4g}{close}"] = places
    else:
        found: dict[str, list[int]] = {}
        for place, (value, gone) in enumerate(zip(values.tolist(), is_missing.tolist(), strict=True)):
            if not gone:
                found.setdefault(str(value), []).append(place)
        groups = {text: np.array(places) for text, places in found.items()}
    if is_missing.any():
        groups["(none)"] = np.union1d(groups.get("(none)", []), np.flatnonzero(is_missing)).astype("int64")
    return groups


def _as_numbers(values: np.ndarray) -> np.ndarray | None:
    """Returns a column of numbers, or of texts that all are numbers (as CSV has them), as floats; else None."""
    try:
        return np.array([np.nan if value in (None, "") else float(value) for value in values.tolist()])
    except (TypeError, ValueError):
        return None
