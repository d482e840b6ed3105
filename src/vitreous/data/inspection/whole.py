"""The whole inspection of a data set, and the quick look before training."""

import hashlib
import time
from pathlib import Path

import numpy as np

from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.inspection.checks import check_classes, check_images, format_of, is_misnamed, statistics
from vitreous.data.inspection.duplicates import Places, duplicate_findings, exact_findings, groups_of_equal
from vitreous.data.inspection.findings import Finding, Inspection, Item, create_finding
from vitreous.data.inspection.scan import Progress, scan_dataset
from vitreous.data.sources.remote import RemoteStore
from vitreous.data.stores import JoinedStore, SpanStore, Store
from vitreous.errors import ImageError, MissingPathError
from vitreous.spec import check

MIN_SIMILARITY = 0.9
"""Correlation of two thumbnails from which two images count as nearly the same."""

FAST_MAX_FILES = 100_000
FAST_MAX_BYTES = 1 << 28
"""What the quick look reads at most."""

_HEAD_BYTES = 12  # that show the format


def inspect_dataset(
    dataset: Dataset,
    *,
    min_similarity: float = MIN_SIMILARITY,
    num_workers: int | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """Looks at everything in a data set: names, counts, each file decoded whole, each image against all others.

    Args:
        dataset: The data. Nothing of it is changed.
        min_similarity: Correlation of two thumbnails, in (0, 1], from which images count as nearly the same.
        num_workers: Threads that decode. Default: one for small files, else one for each core, up to 8.
        on_progress: Called with the images done and the images in all.

    Returns:
        What was found.

    Raises:
        ConfigError: If `min_similarity` or `num_workers` is out of range.
    """
    check(
        0 < min_similarity <= 1,
        "Cannot compare images.",
        "a correlation in (0, 1]",
        f"min_similarity={min_similarity}",
        "Pass for example 0.9.",
    )
    check(
        num_workers is None or num_workers > 0,
        "Cannot start threads.",
        "at least 1",
        f"num_workers={num_workers}",
        "Pass 1 or more, or leave it out.",
    )
    start = time.perf_counter()
    scan = scan_dataset(dataset, num_workers=num_workers, on_progress=on_progress)
    findings = _joined([*check_classes(dataset), *check_images(dataset, scan)])
    findings += duplicate_findings(dataset, scan, min_similarity=min_similarity)
    seconds = time.perf_counter() - start
    return Inspection(dataset=dataset, findings=findings, statistics=statistics(dataset, scan), seconds=seconds)


def _joined(findings: list[Finding]) -> list[Finding]:
    """Makes one finding of two of a kind: files that their header, and files that decoding, shows to be broken."""
    kinds: dict[str, Finding] = {}
    for finding in findings:
        if other := kinds.get(finding.kind):
            finding = create_finding(
                finding.kind, (*other.items, *finding.items), f"{other.detail}, {finding.detail}", other.severity
            )
        kinds[finding.kind] = finding
    return list(kinds.values())


def inspect_fast(dataset: Dataset) -> Inspection:
    """Looks at what costs little: names and counts, suffixes against the first bytes of files, and equal files.

    Files are compared where their sizes agree, by BLAKE2b of their bytes; images in memory by their pixels. Beyond
    100,000 files or 256 MiB to read, that part is left out; so are images on other machines, of which none is fetched.
    Notes say so.

    Args:
        dataset: The data. Nothing of it is changed.

    Returns:
        What was found, with `is_whole` False.
    """
    start = time.perf_counter()
    findings = [*check_classes(dataset), *_compare_files(dataset)]
    seconds = time.perf_counter() - start
    return Inspection(
        dataset=dataset, findings=findings, statistics=statistics(dataset), is_whole=False, seconds=seconds
    )


def _compare_files(dataset: Dataset) -> list[Finding]:
    places = Places(dataset)
    near = np.concatenate([_find_near(images) for images in dataset.splits.values()])
    findings, unchecked = [], []
    if num_far := int((~near).sum()):
        unchecked.append(f"images on other machines ({num_far:,}) are not fetched before training")
    sizes = np.concatenate([images.file_sizes for images in dataset.splits.values()])
    _, where, counts = np.unique(sizes[near], return_inverse=True, return_counts=True)
    is_shared = np.zeros(len(sizes), bool)
    is_shared[near] = counts[where] > 1  # without a known size (0), all of them
    if near.sum() > FAST_MAX_FILES or sizes[is_shared].sum() > FAST_MAX_BYTES:
        unchecked.append(f"{near.sum():,} files are too many to compare before training")
    elif near.any():
        found = _compare_near(dataset, places, np.flatnonzero(near).tolist(), is_shared)
        if found is None:
            unchecked.append("the images are too large to compare before training")
        findings += found or []
    if unchecked:
        items = [Item(detail=f"{text}: vitreous inspect compares them") for text in unchecked]
        findings.append(create_finding("unchecked", items))
    return findings


def _find_near(images: ImageSet) -> np.ndarray:
    """Returns which images lie on this machine: bool, (N,)."""
    return np.array([_is_near(images, index) for index in range(len(images))], bool)


def _is_near(images: ImageSet, index: int) -> bool:
    store, row = _find_store(images, index)
    return not isinstance(store, RemoteStore) or store.path(row, images.names[index]) is not None


def _find_store(images: ImageSet, index: int) -> tuple[Store, int]:
    """Returns the store that an image lies in itself, and its row there."""
    store, row = images.store, int(images.rows[index])
    while isinstance(store, JoinedStore):
        store, row = store.find(row)
    return store, row


def _compare_near(dataset: Dataset, places: Places, near: list[int], is_shared: np.ndarray) -> list[Finding] | None:
    """Returns equal files and misnamed ones among images on this machine; None if there is too much to read."""
    misnamed: list[Item] = []
    keys, shared, num_read = [], [], 0
    splits = list(dataset.splits.values())
    for place in near:
        split = int(places.splits[place])
        images, index = splits[split], place - int(places.starts[split])
        try:
            head, content, num_bytes = _read(images, index, whole=bool(is_shared[place]))
        except (ImageError, MissingPathError, OSError):
            continue  # the loader names it when training comes to it
        format_name = format_of(head)
        if format_name and is_misnamed(images.names[index], format_name):
            misnamed.append(Item(files=(places.ref(place),), detail=f"holds {format_name}"))
        if content is not None:
            keys.append(hashlib.blake2b(content, digest_size=16).digest())
            shared.append(place)
        num_read += num_bytes
        if num_read > FAST_MAX_BYTES:  # images in memory, packed, or of unknown size
            return None
    groups = groups_of_equal(np.array(keys, "V16"), np.array(shared, "int64")) if keys else []
    findings = exact_findings(places, groups, "their bytes")
    if misnamed:
        findings.append(create_finding("wrong_extension", misnamed, f"{len(misnamed):,} of {len(near):,} images"))
    return findings


def _read(images: ImageSet, index: int, *, whole: bool) -> tuple[bytes, bytes | None, int]:
    """Returns the first bytes of an image, all of them if asked for, and how many were read."""
    store, row = _find_store(images, index)
    if isinstance(store, SpanStore) and not whole:
        return store.read_head(row, images.names[index], _HEAD_BYTES), None, _HEAD_BYTES
    source = store.read(row, images.names[index])
    if isinstance(source, np.ndarray):
        if not whole:
            return b"", None, 0
        content = str(source.shape).encode() + np.ascontiguousarray(source).tobytes()
        return b"", content, len(content)
    if isinstance(source, Path):
        with open(source, "rb", buffering=0) as file:
            source = file.read(-1 if whole else _HEAD_BYTES)
    return source[:_HEAD_BYTES], source if whole else None, len(source)
