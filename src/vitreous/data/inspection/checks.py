"""Findings that need no comparison of images: names, counts, and what was measured of each image alone."""

import os
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vitreous.data.image_set import Dataset
from vitreous.data.inspection.duplicates import Places
from vitreous.data.inspection.findings import Finding, ImageRef, Item, create_finding
from vitreous.data.inspection.scan import (
    ALPHA,
    ANIMATED,
    CMYK,
    CONSTANT,
    DEEP,
    GREY,
    PALETTE,
    ROTATED,
    Scan,
)
from vitreous.data.sources.contents import shorten

FEW_IMAGES = 10
"""Training images of a class below which there are few."""

IMBALANCE_NOTE, IMBALANCE_WARNING = 3.0, 10.0
"""Largest class over smallest, in training images, from which imbalance is worth a note, and a warning."""

HUGE_PIXELS = 50_000_000
EXTREME_ASPECT = 4.0
TINY_SIDE, TINY_SHARE = 64, 0.25
"""An image is tiny if its shorter side is below both: so many pixels, and this share of the data's median."""

DARK, BRIGHT, OUTLIER_SCORE = 25.0, 230.0, 3.5
"""Mean levels of 255 beyond which an image may be dark or bright, and the modified z-score that it must have too."""

_SUFFIXES = {
    ("JPEG", "MPO"): (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    ("PNG",): (".png", ".apng"),
    ("TIFF",): (".tif", ".tiff"),
    ("BMP", "DIB"): (".bmp", ".dib"),
    ("JPEG2000",): (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    ("PPM",): (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    ("WEBP",): (".webp",),
    ("AVIF",): (".avif",),
    ("GIF",): (".gif",),
    ("QOI",): (".qoi",),
}
_FORMATS_OF = {suffix: formats for formats, suffixes in _SUFFIXES.items() for suffix in suffixes}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"qoif", "QOI"),
)


def format_of(head: bytes) -> str | None:
    """Returns Pillow's name of the format that a file's first 12 bytes show, or None if they do not say."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def is_misnamed(file: str, format_name: str) -> bool:
    """Whether a file's suffix names another format than its content has."""
    expected = _FORMATS_OF.get(os.path.splitext(file)[1].lower())
    return expected is not None and format_name not in expected


def check_classes(dataset: Dataset) -> Iterator[Finding]:
    """Yields what names and counts say: nothing is read."""
    if dataset.broken:
        items = [Item(files=(ImageRef("", -1, file, ""),), detail=why) for file, why in dataset.broken.items()]
        yield create_finding("unreadable", items, f"{len(items):,} by their header")
    if dataset.num_ignored:
        yield create_finding("ignored", [Item(detail=f"{dataset.num_ignored:,} in all")])
    forms: dict[str, list[str]] = {}
    for name in dataset.class_names:
        forms.setdefault(_plain_form(name), []).append(name)
    if alike := [names for names in forms.values() if len(names) > 1]:
        yield create_finding("similar_class_names", [Item(detail=" = ".join(map(repr, names))) for names in alike])
    counts = class_counts(dataset)
    yield from _check_missing(dataset, counts)
    yield from _check_balance(dataset, counts["train"])


def _plain_form(name: str) -> str:
    """Returns a name without case, spaces, underscores, hyphens and differences of encoding."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(text.replace("_", " ").replace("-", " ").split())


def class_counts(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns the images of each class in each split: int64, (K,). Several labels an image count several times."""
    counts = {}
    for split, images in dataset.splits.items():
        labels = images.labels
        known = labels if images.is_multi_label else labels[labels >= 0]
        num_classes = len(dataset.class_names)
        counts[split] = known.sum(axis=0) if images.is_multi_label else np.bincount(known, minlength=num_classes)
    return counts


def _check_missing(dataset: Dataset, counts: dict[str, np.ndarray]) -> Iterator[Finding]:
    items = []
    for split, numbers in counts.items():
        names = [name for name, number in zip(dataset.class_names, numbers, strict=True) if number == 0]
        if names and len(names) < len(numbers):
            items.append(Item(detail=f"{split} has no image of {shorten(names, 20)}"))
    if items:
        yield create_finding("missing_class", items)


def _check_balance(dataset: Dataset, counts: np.ndarray) -> Iterator[Finding]:
    present = counts[counts > 0]
    few = np.flatnonzero((counts > 0) & (counts < FEW_IMAGES))
    if len(few):
        items = [Item(detail=f"{dataset.class_names[k]}: {counts[k]}") for k in few]
        yield create_finding("few_images", items, f"{len(few):,} of {len(counts):,} classes")
    if len(present) < 2 or (ratio := present.max() / present.min()) < IMBALANCE_NOTE:
        return
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    ends = order if len(order) <= 10 else np.concatenate([order[:5], order[-5:]])
    yield create_finding(
        "imbalance",
        [Item(detail=f"{dataset.class_names[k]}: {counts[k]:,}") for k in ends],
        f"{dataset.class_names[order[0]]} has {ratio:.1f} times the training images of {dataset.class_names[order[-1]]}"
        f" ({counts[order[0]]:,} and {counts[order[-1]]:,})",
        severity="warning" if ratio >= IMBALANCE_WARNING else "note",
    )


def check_images(dataset: Dataset, scan: Scan) -> Iterator[Finding]:
    """Yields what was measured of single images."""
    places = Places(dataset)

    def items(chosen: np.ndarray, text: Callable[[int], str], order: np.ndarray | None) -> list[Item]:
        found = np.flatnonzero(chosen)
        if order is not None:
            found = found[np.argsort(order[found], kind="stable")]
        return [Item(files=(places.ref(int(i)),), detail=text(int(i))) for i in found]

    if scan.broken:
        found = [Item(files=(places.ref(i),), detail=why) for i, why in sorted(scan.broken.items())]
        yield create_finding("unreadable", found, f"{len(found):,} when decoded whole")
    readable = scan.is_readable
    heights, widths = np.maximum(scan.heights, 1).astype("int64"), np.maximum(scan.widths, 1).astype("int64")
    shorter, longer = np.minimum(heights, widths), np.maximum(heights, widths)

    def size(i: int) -> str:
        return f"{widths[i]} x {heights[i]}"

    def level(i: int) -> str:
        return f"mean {scan.brightness[i]:.0f} of 255"

    def mode(i: int) -> str:
        return scan.mode_names[scan.modes[i]]

    usual = float(np.median(shorter[readable])) if readable.any() else 0.0
    is_tiny = np.less(shorter, min(TINY_SIDE, TINY_SHARE * usual))
    constant = scan.flags & CONSTANT > 0
    outlier = np.abs(_modified_z(scan.brightness, readable)) > OUTLIER_SCORE
    is_grey = scan.flags & GREY > 0
    is_mixed = is_grey[readable].any() and not is_grey[readable].all()
    misnamed = np.zeros(len(scan), bool)
    names = [name for images in dataset.splits.values() for name in images.names]
    for number, format_name in enumerate(scan.format_names):
        if format_name != "array":
            members = np.flatnonzero(readable & (scan.formats == number))
            misnamed[members] = [is_misnamed(names[i], format_name) for i in members]
    for kind, chosen, text, *order in (
        ("wrong_extension", misnamed, lambda i: f"holds {scan.format_names[scan.formats[i]]}"),
        ("constant", constant, lambda i: f"{size(i)}, {level(i)}"),
        ("tiny", is_tiny, size, shorter),
        ("huge", heights * widths > HUGE_PIXELS, size, -heights * widths),
        ("extreme_aspect", longer > EXTREME_ASPECT * shorter, size, shorter / longer),
        ("dark", outlier & ~constant & (scan.brightness < DARK), level, scan.brightness),
        ("bright", outlier & ~constant & (scan.brightness > BRIGHT), level, -scan.brightness),
        ("grey", is_grey & is_mixed, mode),
        ("cmyk", scan.flags & CMYK > 0, size),
        ("deep", scan.flags & DEEP > 0, mode),
        ("palette", scan.flags & PALETTE > 0, mode),
        ("alpha", scan.flags & ALPHA > 0, mode),
        ("animated", scan.flags & ANIMATED > 0, size),
        ("exif_rotated", scan.flags & ROTATED > 0, size),
    ):
        if found := items(chosen & readable, text, *(order or [None])):
            detail = f"{len(found):,} of {len(scan):,} images"
            yield create_finding(kind, found, detail + _where(dataset, found) if kind == "grey" else detail)


def _where(dataset: Dataset, items: list[Item]) -> str:
    """Says in which classes images lie, where they gather in a few of them."""
    classes = sorted({ref.label for item in items for ref in item.files})
    few = len(classes) <= len(dataset.class_names) / 2
    return f", all in {shorten(classes)}" if few and any(classes) else ""


def _modified_z(values: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Returns how far each value lies from the median, in standard deviations estimated robustly.

    Source: Iglewicz and Hoaglin 1993, "How to detect and handle outliers": 0.6745 (x - median) / MAD.
    """
    if not readable.any():
        return np.zeros(len(values))
    median = np.median(values[readable])
    spread = np.median(np.abs(values[readable] - median))
    return 0.6745 * (values - median) / max(float(spread), 1.0)


def statistics(dataset: Dataset, scan: Scan | None = None) -> dict[str, Any]:
    """Returns counts and distributions, fit for JSON; see `Inspection.to_dict`."""
    counts = class_counts(dataset)
    found: dict[str, Any] = {
        "num_images": {split: len(images) for split, images in dataset.splits.items()},
        "class_counts": {
            split: dict(zip(dataset.class_names, numbers.tolist(), strict=True)) for split, numbers in counts.items()
        },
    }
    if scan is None or not scan.is_readable.any():
        return found
    readable = scan.is_readable
    for kind, names, numbers in (
        ("formats", scan.format_names, scan.formats),
        ("modes", scan.mode_names, scan.modes),
    ):
        tally = np.bincount(numbers[readable], minlength=len(names))
        found[kind] = {name: int(count) for name, count in zip(names, tally, strict=True)}
    for kind, values in (("width", scan.widths), ("height", scan.heights), ("brightness", scan.brightness)):
        found[kind] = _distribution(values[readable], is_level=kind == "brightness")
    return found


def _distribution(values: np.ndarray, *, is_level: bool) -> dict[str, Any]:
    """Returns quantiles and a histogram: of levels in 32 equal bins, of sizes in 24 whose width grows with the size."""
    least, most = float(values.min()), float(values.max())
    if is_level:
        edges = np.linspace(0, 255, 33)
    elif most - least < 24:
        edges = np.arange(least, most + 2)
    else:
        edges = np.geomspace(least, most + 1, 25)
    heights, edges = np.histogram(values, edges)
    marks = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return {
        **dict(zip(("min", "p5", "median", "p95", "max"), (round(float(mark), 2) for mark in marks), strict=True)),
        "histogram": {"edges": [round(float(edge), 2) for edge in edges], "counts": heights.tolist()},
    }
