"""Splits: every class appears in each part in (nearly) its own proportion, and what belongs together stays together."""

from collections.abc import Sequence

import numpy as np

_MOST_PLACED = 100_000  # groups placed over all tries, which takes seconds


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


def iterative_split(
    labels: np.ndarray,
    shares: Sequence[float] | np.ndarray,
    seed: int,
    groups: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """Shares out examples with several labels, or examples that come in groups, so that each part has its share.

    The label with the fewest examples left is shared out first, each group going where most of that label is still
    wanted. Of up to 20 such tries with groups (fewer with many, 1 without), the one counts whose parts come nearest to
    their shares, in size and in each label; the first part lacks no label if that can be helped.

    Args:
        labels: int (N,), the class of each example; or bool (N, K), its labels.
        shares: Share of the examples that each of the F parts should get; they sum to 1.
        seed: The same seed gives the same parts.
        groups: (N,) Examples with equal values go to the same part. Default: each goes by itself.

    Returns:
        Part of each example: int64, (N,), in [0, F).

    Source: Sechidis et al. 2011, "On the stratification of multi-label data", algorithm 1. Differences: what is
    wanted counts relative to a part's share, whole groups move, and the best of several tries is taken.
    """
    if labels.ndim == 1:
        labels = labels[:, None] == np.unique(labels)
    if groups is None:
        places, sizes = np.arange(len(labels)), np.ones(len(labels), int)
        counts = labels.astype("float64")
    else:
        _, places, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        counts = np.zeros((len(sizes), labels.shape[1]))
        np.add.at(counts, places, labels)
    wanted = np.asarray(shares, "float64")
    generator = np.random.default_rng(seed % 2**64)
    num_tries = 1 if groups is None else max(1, min(20, _MOST_PLACED // len(sizes)))
    tries = [_share_out(counts, sizes, wanted, generator) for _ in range(num_tries)]
    return min(tries, key=lambda parts: _distance(parts, counts, sizes, wanted))[places]


def _share_out(counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the part of each group, for labels (G, K), sizes (G,) and shares (F,)."""
    order = generator.permutation(len(counts))
    wanted, room = np.outer(shares, counts.sum(axis=0)), shares * sizes.sum()  # (F, K), (F,)
    parts = np.full(len(counts), -1)
    holders = [order[counts[order, k] > 0] for k in range(counts.shape[1])]
    num_left = np.array([len(members) for members in holders], "float64")
    while True:
        num_left[num_left <= 0] = np.inf
        if not len(num_left) or np.isinf(num_left).all():
            break
        label = int(num_left.argmin())
        for group in holders[label]:
            if parts[group] < 0:
                need = np.stack([wanted[:, label] / shares, room / shares, generator.random(len(shares))])
                part = int(np.lexsort(need[::-1].round(9))[-1])
                parts[group] = part
                wanted[part] -= counts[group]
                room[part] -= sizes[group]
                num_left -= counts[group] > 0
        num_left[label] = np.inf
    for group in order[parts[order] < 0]:  # without any label
        part = int((room / shares).argmax())
        parts[group] = part
        room[part] -= sizes[group]
    return parts


def _distance(parts: np.ndarray, counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray) -> float:
    """Returns how far the parts are from their shares; labels that the first part lacks weigh most."""
    num_parts = len(shares)
    found = np.stack([counts[parts == part].sum(axis=0) for part in range(num_parts)])
    got = np.bincount(parts, weights=sizes, minlength=num_parts) / sizes.sum()
    totals = np.maximum(counts.sum(axis=0), 1)
    off = np.abs(found / totals - shares[:, None]).mean() if counts.shape[1] else 0.0
    lacking = (found[0] == 0) & (counts.sum(axis=0) > 0)
    return float(1000 * lacking.sum() + 10 * (got == 0).sum() + num_parts * np.abs(got - shares).mean() + off)


def split_examples(
    labels: np.ndarray, fraction: float, seed: int, groups: Sequence[object] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two: class by class, label by label, or by whole groups.

    Args:
        labels: int (N,) or bool (N, K).
        fraction: Share of the examples that goes into the second part, in [0, 1).
        seed: The same seed gives the same split.
        groups: (N,) Examples with equal values stay together.

    Returns:
        Two int64 arrays of rising indices: what is kept, and what is held out. Every label keeps an example in the
        first part; the second is empty if nothing can be held out then, as where each group has a label to itself.
    """
    if labels.ndim == 1 and groups is None:
        return stratified_split(labels, fraction, seed)
    everything = np.arange(len(labels))
    num_groups = len(labels) if groups is None else len(np.unique(np.asarray(groups)))
    if fraction == 0 or num_groups < 2:
        return everything, everything[:0]
    is_held_out = iterative_split(labels, (1 - fraction, fraction), seed, groups) == 1
    indicators = labels if labels.ndim == 2 else labels[:, None] == np.unique(labels)
    group_of = everything if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    for label in np.flatnonzero(~indicators[~is_held_out].any(axis=0) & indicators.any(axis=0)):
        if not indicators[~is_held_out, label].any():  # all of it would be held out: one group comes back
            members = group_of[indicators[:, label] & is_held_out]
            is_held_out &= group_of != members[np.bincount(group_of)[members].argmin()]
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def assign_folds(
    labels: np.ndarray, num_folds: int, seed: int, groups: Sequence[object] | np.ndarray | None = None
) -> np.ndarray:
    """Shares out examples over folds of nearly equal size: class by class, label by label, or by whole groups.

    Args:
        labels: int (N,) or bool (N, K).
        num_folds: F, at least 2.
        seed: The same seed gives the same folds.
        groups: (N,) Examples with equal values are in the same fold.

    Returns:
        Fold of each example: int64, (N,), in [0, F).
    """
    if labels.ndim == 2 or groups is not None:
        return iterative_split(labels, np.full(num_folds, 1 / num_folds), seed, groups)
    order = np.random.default_rng(seed % 2**64).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), "int64")
    folds[order] = np.arange(len(labels)) % num_folds  # dealt out class by class, so that no two folds differ by more
    return folds
