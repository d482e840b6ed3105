"""The same image twice: in a split, in two splits, under two labels; to the pixel, or nearly."""

from collections.abc import Callable, Iterable

import numpy as np

from vitreous.data.hashing import (
    MAX_DISTANCE,
    THUMBNAIL_SIZE,
    close_pairs,
    connected_groups,
    detail_similarity,
    similarity,
)
from vitreous.data.image_set import Dataset
from vitreous.data.images import to_array, to_pillow
from vitreous.data.inspection.findings import Finding, ImageRef, Item, create_finding, image_refs
from vitreous.data.inspection.scan import CONSTANT, Scan, shrink
from vitreous.errors import ImageError, MissingPathError

MIN_SIDE = 16
"""Shorter side, in pixels, below which images are compared to the pixel only: too little is in them to tell copies."""

MIN_DETAIL = 0.3
"""Correlation of the detail of two thumbnails (`detail_similarity`) below which they only share their light."""

MIN_CONTRAST = 4.0
"""Standard deviation of the grey thumbnail, in levels of 255, below which a perceptual hash is noise."""

_MAX_PAIRS = 1 << 22
_PAIRS_AT_ONCE = 200


class Places:
    """Positions in all splits together, and what stands there.

    Args:
        dataset: The data.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.names = list(dataset.splits)
        self.starts = np.cumsum([0, *(len(images) for images in dataset.splits.values())])
        self.splits = np.repeat(np.arange(len(self.names)), np.diff(self.starts))
        self.labels = _label_ids(dataset)

    def ref(self, place: int) -> ImageRef:
        """Returns the image at a place."""
        split = int(self.splits[place])
        return image_refs(self.dataset, self.names[split], [place - int(self.starts[split])])[0]

    def refs(self, places: Iterable[int]) -> tuple[ImageRef, ...]:
        """Returns the images at some places."""
        return tuple(self.ref(int(place)) for place in places)


def _label_ids(dataset: Dataset) -> np.ndarray:
    """Returns a number for each image, the same for the same label or set of labels; int64, (N,)."""
    labels = np.concatenate([images.labels for images in dataset.splits.values()])
    return labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].ravel()


def groups_of_equal(keys: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Returns the groups of two or more places whose keys are equal, in the order of their first place."""
    _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    is_shared = counts[numbers] > 1
    numbers, places = numbers[is_shared], places[is_shared]
    order = np.lexsort((places, numbers))
    edges = np.flatnonzero(np.diff(numbers[order])) + 1
    groups = np.split(places[order], edges) if len(order) else []
    return sorted(groups, key=lambda group: int(group[0]))


def exact_findings(places: Places, groups: Iterable[np.ndarray], how: str) -> list[Finding]:
    """Returns leaks, label conflicts and duplicates.

    Args:
        places: What stands where.
        groups: Places of images that are the same.
        how: What "the same" means.
    """
    leaks, conflicts, copies = [], [], []
    for group in groups:
        splits, labels = places.splits[group], places.labels[group]
        if splits.min() != splits.max():
            leaks.append(_across(places, group))
        if _disagree(labels):
            conflicts.append(_disputed(places, group))
        for split, label in np.unique(np.stack([splits, labels], axis=1), axis=0):
            inside = group[(splits == split) & (labels == label)]
            if len(inside) > 1:
                copies.append(Item(files=places.refs(inside[1:]), related=places.refs(inside[:1])))
    found = {"leak": leaks, "label_conflict": conflicts, "duplicate": copies}
    return [create_finding(kind, items, _how_many(items, how)) for kind, items in found.items() if items]


def _how_many(items: list[Item], how: str) -> str:
    count = sum(len(item.files) for item in items)
    return f"{_plural(count, 'image')} in {_plural(len(items), 'group')}, compared by {how}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _disagree(labels: np.ndarray) -> bool:
    known = labels[labels >= 0]
    return len(known) > 1 and known.min() != known.max()


def _across(places: Places, group: np.ndarray, detail: str = "") -> Item:
    """A group over several splits: what lies in the first of them is to go, the rest is held out."""
    first = places.splits[group] == places.splits[group].min()
    names = sorted({places.names[split] for split in places.splits[group]}, key=places.names.index)
    return Item(
        files=places.refs(group[first]),
        related=places.refs(group[~first]),
        detail=", ".join(filter(None, (_listed(names), detail))),
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


def _disputed(places: Places, group: np.ndarray, detail: str = "") -> Item:
    files = places.refs(group)
    labels = " or ".join(dict.fromkeys(ref.label for ref in files))
    return Item(files=files, detail=", ".join(filter(None, (labels, detail))))


PIXELS = "their decoded pixels (BLAKE2b of 8-bit RGB, EXIF rotation applied)"


def duplicate_findings(
    dataset: Dataset,
    scan: Scan,
    *,
    min_similarity: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Finds copies, to the pixel and nearly.

    Near copies are looked for by perceptual hash (`close_pairs`) and then held against each other as colour thumbnails
    of 32 x 32 pixels, light and detail; so two skies do not pass for copies because their hashes agree. Images of a
    shorter side under 16 pixels, and those that are almost flat, are compared to the pixel only.

    Args:
        dataset: The data.
        scan: What was measured of it.
        min_similarity: Correlation of two thumbnails from which they count as copies, in (0, 1].
        on_progress: Called with the pairs compared and the pairs in all.
    """
    places = Places(dataset)
    readable = np.flatnonzero(scan.is_readable)
    keys = np.unique(scan.pixel_hashes[readable], return_inverse=True)[1]
    groups = groups_of_equal(keys, readable)
    is_constant = scan.flags & CONSTANT > 0
    findings = exact_findings(places, [group for group in groups if not is_constant[group[0]]], PIXELS)

    # One image stands for all that agree in pixels, split and label.
    identity = np.stack([keys, places.splits[readable], places.labels[readable]], axis=1)
    chosen = readable[np.unique(identity, axis=0, return_index=True)[1]]
    shorter = np.minimum(scan.heights, scan.widths)[chosen]
    chosen = np.sort(chosen[(shorter >= MIN_SIDE) & (scan.contrast[chosen] >= MIN_CONTRAST)])
    pairs = close_pairs(scan.hashes[chosen], MAX_DISTANCE, _MAX_PAIRS)
    if len(pairs) > _MAX_PAIRS:
        detail = f"more than {_MAX_PAIRS:,} pairs of perceptual hashes are close; the first were compared"
        findings.append(create_finding("unchecked", [Item(detail=detail)]))
    pairs = chosen[pairs]
    pairs = pairs[scan.pixel_hashes[pairs[:, 0]] != scan.pixel_hashes[pairs[:, 1]]]
    alike = _similarities(places, pairs, on_progress)
    is_near = alike >= min_similarity
    return findings + _near_findings(places, pairs[is_near], alike[is_near])


def _similarities(
    places: Places, pairs: np.ndarray, on_progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Returns the similarity of the colour thumbnails of each pair, 0 where their detail differs; float32, (M,)."""
    alike = np.zeros(len(pairs), "float32")
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[start : start + _PAIRS_AT_ONCE]
        wanted, where = np.unique(some, return_inverse=True)
        thumbnails = np.stack([_thumbnail(places, int(place)) for place in wanted])
        first, second = where.reshape(-1, 2).T
        one, other = thumbnails[first], thumbnails[second]
        is_copy = detail_similarity(one, other) >= MIN_DETAIL
        alike[start : start + len(some)] = np.where(is_copy, similarity(one, other), 0)
        if on_progress:
            on_progress(start + len(some), len(pairs))
    return alike


def _thumbnail(places: Places, place: int) -> np.ndarray:
    """Returns uint8, (32, 32, 3); black, and so like nothing, if the image went away since it was measured."""
    split = int(places.splits[place])
    images = places.dataset.splits[places.names[split]]
    try:
        pixels = images.load(place - int(places.starts[split]), 3)
    except (ImageError, MissingPathError):
        return np.zeros((THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), "uint8")
    return to_array(shrink(to_pillow(pixels)))


def _near_findings(places: Places, pairs: np.ndarray, alike: np.ndarray) -> list[Finding]:
    splits, labels = places.splits[pairs], places.labels[pairs]
    crosses = splits[:, 0] != splits[:, 1]
    disputes = (labels[:, 0] != labels[:, 1]) & (labels >= 0).all(axis=1)
    findings = []
    for kind, chosen in (
        ("near_leak", crosses),
        ("near_label_conflict", disputes),
        ("near_duplicate", ~crosses & ~disputes),
    ):
        items = []
        for members, least in _groups(pairs[chosen], alike[chosen]):
            group = np.array(members)
            detail = f"similarity {least:.3f}" + (" or more" if len(group) > 2 else "")
            if kind == "near_leak":
                items.append(_across(places, group, detail))
            elif kind == "near_label_conflict":
                items.append(_disputed(places, group, detail))
            else:
                items.append(Item(files=places.refs(group[1:]), related=places.refs(group[:1]), detail=detail))
        if items:
            how = "perceptual hash, then thumbnails of 32 x 32 pixels"
            findings.append(create_finding(kind, items, _how_many(items, how)))
    return findings


def _groups(pairs: np.ndarray, alike: np.ndarray) -> list[tuple[list[int], float]]:
    """Returns groups of places joined by pairs, with the least similarity of a pair in each; the most alike first."""
    groups = connected_groups(map(tuple, pairs.tolist()))  # type: ignore[arg-type]
    group_of = {place: number for number, group in enumerate(groups) for place in group}
    least = np.ones(len(groups))
    np.minimum.at(least, [group_of[int(i)] for i in pairs[:, 0]], alike)
    return sorted(
        ((group, float(value)) for group, value in zip(groups, least, strict=True)), key=lambda pair: -pair[1]
    )
