"""Which images look alike: perceptual hashes, the pairs of hashes that are close, and how alike two thumbnails are.

All of it is NumPy on arrays, and none of it compares every image with every other.
"""

from collections.abc import Iterable, Iterator

import numpy as np

THUMBNAIL_SIZE = 32
"""Pixels of a side of the thumbnails that are hashed and compared."""

MAX_DISTANCE = 7
"""Largest Hamming distance that `close_pairs` finds completely: see there."""

_BANDS, _BITS = 4, 16
_CHUNK = 1 << 17


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes what an image shows: the signs of its 63 lowest frequencies against their median.

    Args:
        thumbnails: Grey, (N, 32, 32), any dtype.

    Returns:
        uint64, (N,). A re-encoded, resized or slightly recoloured copy differs in a few bits, another image in about
        half of them. Of a flat image the hash is noise.

    Source: pHash as described in Zauner 2010, "Implementation and benchmarking of perceptual image hash functions",
    section 3.2.1, without the mean filter before it and with the constant term left out.
    """
    size, low = THUMBNAIL_SIZE, 8
    cosines = np.cos(np.pi * (2 * np.arange(size) + 1) * np.arange(low)[:, None] / (2 * size)).astype("float32")
    frequencies = (cosines @ thumbnails.astype("float32") @ cosines.T).reshape(-1, low * low)[:, 1:]  # (N, 63)
    bits = np.zeros((len(frequencies), low * low), bool)
    bits[:, 1:] = frequencies > np.partition(frequencies, 31, axis=1)[:, 31:32]
    return np.packbits(bits, axis=1).view(">u8").ravel().astype("uint64")


def close_pairs(hashes: np.ndarray, max_distance: int = MAX_DISTANCE, max_pairs: int = 1 << 22) -> np.ndarray:
    """Finds the pairs of hashes that differ in few bits, by multi-index hashing.

    The hash is cut into four bands of 16 bits. Two hashes that differ in 7 bits or fewer differ in one bit or none in
    some band; so each band is sorted once, and looked up as it is and with each of its bits turned. For hashes spread
    evenly that is N * 4 * 17 * N / 65,536 / 2 comparisons, a thousandth of all N * N / 2.

    Args:
        hashes: uint64, (N,).
        max_distance: Bits that may differ, 0 to 7.
        max_pairs: Stop when more pairs than this are found.

    Returns:
        int64, (M, 2), i < j in each row, rows sorted, each pair once. M > `max_pairs` says that there are more.

    Source: Norouzi, Punjani and Fleet 2012, "Fast search in Hamming space with multi-index hashing".
    """
    count = len(hashes)
    found = [np.empty(0, "int64")]
    for i, j in _candidates(hashes):
        is_close = np.bitwise_count(hashes[i] ^ hashes[j]) <= max_distance
        i, j = i[is_close], j[is_close]
        found.append(np.minimum(i, j) * count + np.maximum(i, j))
        if sum(map(len, found)) > max_pairs:
            found = [np.unique(np.concatenate(found))]  # the bands find most pairs again
            if len(found[0]) > max_pairs:
                break
    pairs = np.unique(np.concatenate(found))
    return np.stack(np.divmod(pairs, max(count, 1)), axis=1)


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields positions (i, j) of hashes that agree in a band but for one bit, a bounded number at a time."""
    for band in range(_BANDS):
        keys = ((hashes >> np.uint64(band * _BITS)) & np.uint64(2**_BITS - 1)).astype("int64")
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.searchsorted(keys, np.arange(2**_BITS + 1))
        for flip in (0, *(1 << bit for bit in range(_BITS))):
            sources = np.flatnonzero(keys & flip == 0)  # with a bit turned: from 0 to 1 only, so each pair once
            first = sources + 1 if flip == 0 else starts[keys[sources] | flip]
            counts = starts[(keys[sources] | flip) + 1] - first
            ends = np.cumsum(counts)
            place = 0
            while place < len(sources):
                before = int(ends[place - 1]) if place else 0
                stop = max(place + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
                some = counts[place:stop]
                steps = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
                yield order[np.repeat(sources[place:stop], some)], order[np.repeat(first[place:stop], some) + steps]
                place = stop


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Measures how alike thumbnails are, whatever their brightness and contrast.

    Args:
        first: (M, ...), any dtype.
        second: As many of the same shape.

    Returns:
        float32, (M,): the correlation over all their values, in [-1, 1]; 0 where one of the two is constant.
    """
    a, b = (x.reshape(len(x), -1).astype("float32") for x in (first, second))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a), "float32"), where=scale > 0)


def detail_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Measures how alike the detail of thumbnails is: `similarity` of the steps from each pixel to the next.

    Two skies that grow darker to the same side are alike; their detail is not.

    Args:
        first: (M, H, W, C), any dtype.
        second: As many of the same shape.

    Returns:
        float32, (M,), in [-1, 1].
    """
    return similarity(_steps(first), _steps(second))


def _steps(images: np.ndarray) -> np.ndarray:
    wide = images.astype("float32")
    steps = (np.diff(wide, axis=axis).reshape(len(wide), -1) for axis in (1, 2))
    return np.concatenate(list(steps), axis=1)


def connected_groups(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Returns the groups that pairs join, each sorted, ordered by their first member."""
    parent: dict[int, int] = {}

    def root(item: int) -> int:
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for i, j in pairs:
        first, second = sorted((root(int(i)), root(int(j))))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for item in sorted(parent):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())
