"""The order of an epoch: shuffled, each class equally often, or several copies of an image in a batch."""

import numpy as np

from vitreous.data.image_set import ImageSet


def group_by_class(images: ImageSet) -> list[np.ndarray]:
    """Returns the indices of each class that has images, in the order of the classes: int64 arrays.

    With several labels an image, it stands in the group of each; images without any label are a group of their own.
    """
    labels = images.labels
    if images.is_multi_label:
        groups = [np.flatnonzero(column) for column in labels.T]
        groups.append(np.flatnonzero(~labels.any(axis=1)))
    else:
        groups = np.split(np.argsort(labels, kind="stable"), np.flatnonzero(np.diff(np.sort(labels))) + 1)
    return [group for group in groups if len(group)]


def draw_balanced(groups: list[np.ndarray], count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws from each group equally often, in random order.

    A group gives each of its images once before it gives one again. Where `count` is no multiple of the number of
    groups, groups drawn at random give one more.

    Args:
        groups: Indices, from `group_by_class`.
        count: How many to draw.
        generator: Where the random numbers come from.

    Returns:
        int64, (count,).

    Source: class-aware sampling, Shen et al. 2016, https://arxiv.org/abs/1512.05830, section 3.
    """
    quotas = np.full(len(groups), count // len(groups))
    quotas[generator.permutation(len(groups))[: count % len(groups)]] += 1
    drawn = []
    for group, quota in zip(groups, quotas.tolist(), strict=True):
        rounds = [generator.permutation(group) for _ in range(-(-quota // len(group)))]
        drawn.append(np.concatenate([*rounds, group[:0]])[:quota])
    return generator.permutation(np.concatenate(drawn)).astype("int64")


def repeat_in_batches(order: np.ndarray, batch_size: int, num_repeats: int) -> np.ndarray:
    """Fills each batch with several copies of its images; the epoch stays as long and reaches fewer of them.

    Copies stand as far apart in a batch as they can, so that neighbours, which may be mixed, are different images.

    Source: Hoffer et al. 2020, https://arxiv.org/abs/1901.09335; an epoch's length as in DeiT's `RASampler`.
    """
    parts, used = [], 0
    for start in range(0, len(order), batch_size):
        size = min(batch_size, len(order) - start)
        distinct = -(-size // num_repeats)
        parts.append(np.tile(order[used : used + distinct], num_repeats)[:size])
        used += distinct
    return np.concatenate(parts)


def count_earlier(order: np.ndarray) -> np.ndarray:
    """Returns how often each entry of `order` has stood in it before: int64, of its shape."""
    places = np.argsort(order, kind="stable")
    ordered = order[places]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    counts = np.empty(len(order), "int64")
    counts[places] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return counts
