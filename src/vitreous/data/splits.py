"""Stratified splits: every class appears in each part in (nearly) its own proportion."""

from collections.abc import Sequence

import numpy as np

from vitreous.spec import check


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raises `ConfigError` unless both are shares and something is left for training."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        check(0 <= value < 1, f"Cannot use {name}.", "a share in [0, 1)", f"{name}={value}", "Pass one such as 0.1.")
    check(
        val_fraction + test_fraction < 1,
        "Cannot split the images.",
        "val_fraction + test_fraction below 1",
        f"val_fraction={val_fraction}, test_fraction={test_fraction}",
        "Pass smaller shares.",
    )


def stratified_split(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two, class by class, at random.

    Each class keeps at least one example in the first part, so a class of one example is never split. Where there are
    enough examples the second part has at least as many as there are classes, even if that is more than `fraction`.

    Args:
        labels: Class of each example.
        fraction: Share of the examples that goes into the second part, in [0, 1).
        seed: The same seed gives the same split.

    Returns:
        Two int64 arrays of rising indices: what is kept, and what is held out. The second is empty if `fraction` is 0
        or every class has a single example.
    """
    labels = np.asarray(labels)
    everything = np.arange(len(labels))
    classes, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    eligible = everything[counts[places] > 1]
    num_classes = int((counts > 1).sum())
    if fraction == 0 or not num_classes:
        return everything, everything[:0]
    num_held_out = min(max(round(fraction * len(labels)), num_classes), len(eligible) - num_classes)
    held_out = _draw(labels[eligible], num_held_out, seed)
    held_out = eligible[held_out]
    for label in classes[counts > 1]:  # a rounding may have taken all of a small class
        members = held_out[labels[held_out] == label]
        if len(members) == counts[classes == label][0]:
            held_out = np.setdiff1d(held_out, members[:1])
    held_out = np.sort(held_out)
    return np.setdiff1d(everything, held_out), held_out


def _draw(labels: np.ndarray, num_drawn: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(
        n_splits=1, test_size=num_drawn, train_size=len(labels) - num_drawn, random_state=seed % 2**32
    )
    ((_, drawn),) = splitter.split(np.zeros(len(labels)), labels)
    return drawn
