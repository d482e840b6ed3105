"""From what a column holds to classes and labels."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def to_text(value: Any) -> str | None:
    """Returns a value as the name of a class; None if it is missing (None, not a number, or blank).

    Example:
        >>> [to_text(value) for value in (" cat ", 3, 3.0, 0.5, float("nan"), "")]
        ['cat', '3', '3', '0.5', None, None]
    """
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip() or None


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names in order: as numbers if all of them are, else as text.

    Example:
        >>> sort_names(["10", "9"]), sort_names(["b", "10", "9"])
        (('9', '10'), ('10', '9', 'b'))
    """
    names = set(names)
    if all(_NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def parse_labels(
    values: Sequence[Any], separator: str | None = None, names: Sequence[str] | None = None
) -> tuple[list[tuple[str, ...] | None], bool]:
    """Reads the labels in a column.

    Args:
        values: A label each: text, a number, or a list of those for several labels.
        separator: What parts several labels in a text; a blank text then means none of them.
        names: Names that integers stand for, if they do.

    Returns:
        For each value its labels, or None if it is missing; and whether a value may have several.
    """

    def read(value: Any) -> str | None:
        if names is not None and isinstance(value, int | np.integer):
            return names[int(value)] if 0 <= value < len(names) else None
        return to_text(value)

    def read_all(value: Any) -> tuple[str, ...] | None:
        if separator is not None and isinstance(value, str):
            value = value.split(separator)
        if isinstance(value, list | tuple | np.ndarray):
            return tuple(dict.fromkeys(label for label in map(read, value) if label is not None))
        label = read(value)
        return None if label is None else (label,)

    has_lists = any(isinstance(value, list | tuple | np.ndarray) for value in values)
    return [read_all(value) for value in values], has_lists or separator is not None


def encode_labels(labels: Sequence[tuple[str, ...]], class_names: Sequence[str], is_multi_label: bool) -> np.ndarray:
    """Returns labels as numbers: int32 (N,), or bool (N, K) with several labels. Every label must be a class."""
    position = {name: k for k, name in enumerate(class_names)}
    if not is_multi_label:
        return np.array([position[each[0]] for each in labels], "int32")
    encoded = np.zeros((len(labels), len(class_names)), bool)
    for row, each in enumerate(labels):
        encoded[row, [position[name] for name in each]] = True
    return encoded
