"""An inspection as one HTML page: thumbnails inside, nothing loaded from elsewhere, light and dark, wide and narrow."""

from collections.abc import Sequence
from typing import Any

from vitreous.data import Dataset
from vitreous.data.inspection import Finding, ImageRef, Inspection, Item
from vitreous.errors import ImageError, MissingPathError
from vitreous.report.page import THUMBNAIL_SIZE, make_thumbnail, render_page
from vitreous.text import escape_text

MAX_ITEMS = 12
"""Cases of a finding that are shown with thumbnails."""

MAX_NAMES = 200
"""Cases of a finding that are listed by name; the JSON has all."""

_MAX_THUMBNAILS = 6  # of a case
_MAX_CLASSES = 24  # shown as bars


def render_inspection(inspection: Inspection) -> str:
    """Returns an inspection as one HTML page.

    Args:
        inspection: What `vitreous.inspect` returned. Images are read again for the thumbnails.

    Returns:
        HTML in which every text from the data is escaped. It loads nothing, and its content security policy forbids
        it to.
    """
    statistics = inspection.statistics
    return render_page(
        "inspection.html.j2",
        name=escape_text(inspection.dataset.name),
        root=escape_text(str(inspection.dataset.root)) if inspection.dataset.root else None,
        summary=inspection.summary(),
        verdict=_verdict(inspection),
        counts=[(severity, inspection.count(severity)) for severity in ("error", "warning", "note")],  # type: ignore[arg-type]
        num_images=sum(statistics["num_images"].values()),
        splits=statistics["num_images"],
        num_classes=len(inspection.dataset.class_names),
        notes=[escape_text(note) for note in inspection.dataset.notes],
        is_whole=inspection.is_whole,
        seconds=inspection.seconds,
        findings=[describe_finding(finding, inspection.dataset) for finding in inspection.findings],
        data=describe_data(statistics),
        max_names=MAX_NAMES,
    )


def describe_data(statistics: dict[str, Any]) -> dict[str, Any]:
    """Returns what `data_cards` of parts.html.j2 shows, from the statistics of an inspection."""
    return {
        "classes": _classes(statistics["class_counts"]),
        "charts": [
            _chart("Width", "pixels", statistics.get("width")),
            _chart("Height", "pixels", statistics.get("height")),
            _chart("Brightness", "mean level, 0 to 255", statistics.get("brightness")),
        ],
        "kinds": [
            (title, sorted(statistics.get(key, {}).items(), key=lambda pair: -pair[1]))
            for title, key in (("Format", "formats"), ("Mode", "modes"))
        ],
    }


def _verdict(inspection: Inspection) -> str:
    if inspection.count("error"):
        return "Mend the errors before you trust a number measured on this data."
    if inspection.count("warning"):
        return "Nothing breaks, but look at the warnings before you train."
    return "Nothing stands in the way of training." + (" The notes are good to know." if inspection.findings else "")


def describe_finding(finding: Finding, dataset: Dataset) -> dict[str, Any]:
    """Returns what `finding_card` of parts.html.j2 shows."""
    has_images = any(ref.index >= 0 for item in finding.items for ref in (*item.files, *item.related))
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "title": finding.text.title,
        "explanation": finding.text.explanation,
        "remedy": finding.text.remedy,
        "detail": escape_text(finding.detail),
        "count": len(finding.items),
        "items": [_item(item, dataset) for item in finding.items[:MAX_ITEMS]] if has_images else [],
        "names": [(_names(item), escape_text(item.detail)) for item in finding.items[:MAX_NAMES]],
        "num_unlisted": max(0, len(finding.items) - MAX_NAMES),
    }


def _names(item: Item) -> list[str]:
    return [escape_text(ref.file) for ref in (*item.files, *item.related)]


def _item(item: Item, dataset: Dataset) -> dict[str, Any]:
    related = item.related[: max(1, _MAX_THUMBNAILS - len(item.files))]
    files = item.files[: _MAX_THUMBNAILS - len(related)]
    return {
        "detail": escape_text(item.detail),
        "images": [_image(ref, dataset) for ref in (*files, *related)],
        "num_more": len(item.files) + len(item.related) - len(files) - len(related),
    }


def _image(ref: ImageRef, dataset: Dataset) -> dict[str, Any]:
    uri, size = _thumbnail(ref, dataset)
    return {
        "file": escape_text(ref.file),
        "split": ref.split,
        "label": escape_text(ref.label),
        "uri": uri,
        "is_small": max(size) <= THUMBNAIL_SIZE,
    }


def _thumbnail(ref: ImageRef, dataset: Dataset) -> tuple[str | None, Sequence[int]]:
    """Returns an image as a data URI of at most 112 pixels, and its size; None if it cannot be read."""
    if ref.index < 0:
        return None, (0, 0)
    try:
        pixels = dataset.splits[ref.split].load(ref.index, 3, min_size=THUMBNAIL_SIZE)
    except (ImageError, MissingPathError):
        return None, (0, 0)
    return make_thumbnail(pixels), pixels.shape[1::-1]


def _classes(counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Returns a bar for each class: of many, the largest and the smallest."""
    names = list(counts["train"])
    total = {name: sum(split[name] for split in counts.values()) for name in names}
    order = sorted(names, key=lambda name: -total[name]) if len(names) > _MAX_CLASSES else names
    hidden = max(0, len(names) - _MAX_CLASSES)
    most = max(max(total.values(), default=0), 1)
    rows: list[dict[str, Any]] = [
        {
            "name": escape_text(name),
            "total": total[name],
            "parts": [(split, 100 * number[name] / most, number[name]) for split, number in counts.items()],
        }
        for name in (order[: _MAX_CLASSES // 2] + order[-_MAX_CLASSES // 2 :] if hidden else order)
    ]
    return {"rows": rows, "num_hidden": hidden, "half": _MAX_CLASSES // 2, "splits": list(counts)}


def _chart(title: str, unit: str, distribution: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the bars of a histogram in a box of 100 x 40."""
    if distribution is None:
        return None
    counts = distribution["histogram"]["counts"]
    edges = distribution["histogram"]["edges"]
    most, width = max(counts), 100 / len(counts)
    bars = [
        {
            "x": round(i * width, 2),
            "width": round(width * 0.86, 2),
            "height": round(max(40 * count / most, 0.8 if count else 0), 2),
            "label": f"{low:,.0f} to {high:,.0f}: {count:,}",
        }
        for i, (count, low, high) in enumerate(zip(counts, edges[:-1], edges[1:], strict=True))
    ]
    words = {key: f"{distribution[key]:,.0f}" for key in ("min", "p5", "median", "p95", "max")}
    ends = (f"{edges[0]:,.0f}", f"{edges[-1] if unit.startswith('mean') else distribution['max']:,.0f}")
    is_single = distribution["min"] == distribution["max"]
    return {"is_single": is_single, "title": title, "unit": unit, "bars": bars, "ends": ends, **words}
