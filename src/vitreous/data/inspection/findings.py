"""What an inspection finds, and what it writes: JSON for programs, a table of fixes for people."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TextIO

from vitreous.data.image_set import Dataset

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
FORMAT = 1  # of the JSON; raised when a reader of the old one could no longer read it


class Kind(NamedTuple):
    """A kind of finding.

    Args:
        severity: How bad it usually is.
        title: What it is, in a few words.
        explanation: Why it matters.
        remedy: What to do.
        action: The same in two or three words, for the table of fixes.
    """

    severity: Severity
    title: str
    explanation: str
    remedy: str
    action: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(
        "error",
        "Files that cannot be read",
        "They are damaged, cut short or no images. Training leaves them out.",
        "Replace them with whole copies, or remove them.",
        "replace or remove",
    ),
    "leak": Kind(
        "error",
        "The same image in more than one split",
        "A model remembers what it was trained on: what is measured on these images is too good.",
        "Keep each in one split: usually, remove it from training. Where splits are drawn, remove the copy.",
        "keep in one split",
    ),
    "label_conflict": Kind(
        "error",
        "The same image under different labels",
        "One image cannot be learnt as two classes, and one of its labels is wrong when it is measured.",
        "Decide which label is right and remove the other copy.",
        "decide the label",
    ),
    "label_error": Kind(
        "warning",
        "Probable label errors",
        "A model that was not trained on these images is confident of another class (confident learning).",
        "Look at each and correct the label where the model is right; many will be hard but correct.",
        "check the label",
    ),
    "near_leak": Kind(
        "warning",
        "Nearly the same image in more than one split",
        "Copies that were re-encoded, resized or recoloured, or neighbours from one series: answers on them are partly "
        "remembered.",
        "Look at the pairs and remove the training copy, or keep each series in one split.",
        "look, keep in one split",
    ),
    "near_label_conflict": Kind(
        "warning",
        "Nearly the same image under different labels",
        "One of the labels may be wrong.",
        "Look at the pairs and correct the label.",
        "check the label",
    ),
    "duplicate": Kind(
        "warning",
        "The same image more than once in a split",
        "Copies count double in training and in what is measured.",
        "Keep one of each.",
        "remove",
    ),
    "similar_class_names": Kind(
        "warning",
        "Class names that differ only in form",
        "They differ in case, spaces, or the way a character is encoded, and are probably one class.",
        "Merge them, or give them names that differ.",
        "merge or rename",
    ),
    "missing_class": Kind(
        "warning",
        "Classes missing from a split",
        "Nothing is measured for a class without held-out images, nothing is learnt for one without training images.",
        "Add images, or move some.",
        "add images",
    ),
    "imbalance": Kind(
        "warning",
        "Classes of very different size",
        "A model learns to answer the large classes, and accuracy hides the small ones.",
        "Train with --balance sampling, weights or logits, and read the recall of each class; or add images.",
        "add images",
    ),
    "few_images": Kind(
        "warning",
        "Classes with few training images",
        "Under 10 images say little of what a class looks like.",
        "Add images, or start from published weights (--pretrained).",
        "add images",
    ),
    "wrong_extension": Kind(
        "warning",
        "File names that name another format",
        "vitreous reads them by their content; other programs may refuse them.",
        "Rename them, or convert them.",
        "rename",
    ),
    "constant": Kind(
        "warning",
        "Images of one colour",
        "There is nothing in them to learn; often they stand for images that failed to load.",
        "Replace or remove them.",
        "replace or remove",
    ),
    "tiny": Kind(
        "warning",
        "Images far smaller than the others",
        "Enlarged to the model's size they are blur; often they are thumbnails or icons.",
        "Replace them with larger copies, or remove them.",
        "replace or remove",
    ),
    "extreme_aspect": Kind(
        "note",
        "Images far longer than wide, or wider than long",
        "The usual centre crop keeps less than a quarter of them.",
        "Cut them, or train with --resize-mode squash or pad.",
        "cut",
    ),
    "huge": Kind(
        "note",
        "Images of more than 50 million pixels",
        "Each costs seconds and hundreds of megabytes to decode, in every epoch.",
        "Make smaller copies once.",
        "make smaller",
    ),
    "near_duplicate": Kind(
        "note",
        "Nearly the same image more than once in a split",
        "Copies that were re-encoded, resized or recoloured, or neighbours from one series. They count almost double.",
        "Look at them; keep one where it is a copy.",
        "look",
    ),
    "label_error_seen": Kind(
        "note",
        "Probable label errors among images the model was trained on",
        "Less reliable than the others: a model repeats the labels it was trained with, so it misses many, and what it "
        "disputes it could not even learn by heart.",
        "Look at each. To find more, train on other splits (--seed) and inspect with that run.",
        "check the label",
    ),
    "dark": Kind(
        "note",
        "Very dark images",
        "Far darker than the rest of this data.",
        "Look at them; remove those that show nothing.",
        "look",
    ),
    "bright": Kind(
        "note",
        "Very bright images",
        "Far brighter than the rest of this data.",
        "Look at them; remove those that show nothing.",
        "look",
    ),
    "grey": Kind(
        "note",
        "Grey images among colour ones",
        "Their channels are repeated. Where only some classes have them, a model may learn the lack of colour.",
        "Nothing, unless they gather in some classes.",
        "look",
    ),
    "cmyk": Kind(
        "note",
        "Images in CMYK",
        "Made for print. They are turned to RGB without their colour profile, so colours may be off.",
        "Convert them to RGB with a program that applies the profile.",
        "convert to RGB",
    ),
    "deep": Kind(
        "note",
        "Images of more than 8 bits a channel",
        "They are reduced to 8 bits: 65535 becomes 255. A 12-bit image in a 16-bit file therefore turns out dark.",
        "Check that the brightness is as you want it, or convert them yourself.",
        "look",
    ),
    "palette": Kind(
        "note",
        "Images with a palette",
        "They have 256 colours at most and are turned to RGB.",
        "Nothing, unless they look banded: then use the originals.",
        "none needed",
    ),
    "alpha": Kind(
        "note",
        "Images with transparent parts",
        "They are laid over white.",
        "Nothing, unless white is wrong: then lay them over another colour.",
        "look",
    ),
    "animated": Kind(
        "note",
        "Files of several frames or pages",
        "The first one alone counts.",
        "Extract the frames that matter as images of their own.",
        "extract frames",
    ),
    "exif_rotated": Kind(
        "note",
        "Images that EXIF turns or mirrors",
        "vitreous turns them as their camera says; a program that does not will see them lying.",
        "Nothing for vitreous.",
        "none needed",
    ),
    "ignored": Kind(
        "note",
        "Files passed over",
        "They are no images by name, or lie outside the class folders.",
        "Nothing, unless images of yours are among them.",
        "look",
    ),
    "unchecked": Kind(
        "note",
        "What was not checked",
        "A limit was reached.",
        "See the details.",
        "none needed",
    ),
}
"""Every kind of finding, the ones to look at first before the others within each severity."""


@dataclass(frozen=True)
class ImageRef:
    """An image, or a file that was to be one.

    Args:
        split: `"train"`, `"val"` or `"test"`; `""` for a file that is in none.
        index: Position in the split's `ImageSet`; -1 for a file that is in none.
        file: Name of the image.
        label: Its class; several are joined by `", "`. `""` if not known.
    """

    split: str
    index: int
    file: str
    label: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        return {"split": self.split, "index": self.index, "file": self.file, "class": self.label}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One case of a finding.

    Args:
        files: The images that something should be done about.
        related: Images to see beside them: the copy that stays, the held-out image.
        detail: What is known of this case: a reason, a size, a class.
    """

    files: tuple[ImageRef, ...] = ()
    related: tuple[ImageRef, ...] = ()
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        return {
            "files": [ref.to_dict() for ref in self.files],
            "related": [ref.to_dict() for ref in self.related],
            "detail": self.detail,
        }


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about the data that its owner should know.

    Args:
        kind: A name in `KINDS`.
        items: The cases.
        detail: What is to say of all of them together; may be empty.
        severity: `"error"`, `"warning"` or `"note"`. Default: that of the kind.
    """

    kind: str
    items: tuple[Item, ...]
    detail: str = ""
    severity: Severity = "note"

    @property
    def text(self) -> Kind:
        """Title, explanation, remedy and action of the kind."""
        return KINDS[self.kind]

    @property
    def num_files(self) -> int:
        """How many images or files something should be done about."""
        return sum(len(item.files) for item in self.items)

    def example(self) -> str:
        """Returns the first case in one line."""
        item = self.items[0]
        names = [ref.file for ref in (*item.files[:2], *item.related[:1])][:2]
        return ": ".join(filter(None, (" = ".join(names), item.detail)))

    def summary(self) -> str:
        """Returns the finding in one line, with its first case."""
        said = f": {self.detail}" if self.detail else f", such as {self.example()}"
        return f"{self.text.title} ({len(self.items):,}){said}. {self.text.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "title": self.text.title,
            "explanation": self.text.explanation,
            "remedy": self.text.remedy,
            "action": self.text.action,
            "detail": self.detail,
            "num_items": len(self.items),
            "num_files": self.num_files,
            "items": [item.to_dict() for item in self.items],
        }


def create_finding(kind: str, items: Iterable[Item], detail: str = "", severity: Severity | None = None) -> Finding:
    """Returns a finding of the severity that its kind usually has, unless another is given."""
    return Finding(kind=kind, items=tuple(items), detail=detail, severity=severity or KINDS[kind].severity)


@dataclass(kw_only=True)
class Inspection:
    """What was found in a data set. Nothing in the data is changed.

    Args:
        dataset: What was looked at.
        findings: Errors first, then warnings, then notes.
        statistics: Counts and distributions: see `to_dict`.
        is_whole: Whether every image was decoded; False for the quick look before training.
        seconds: How long it took.
    """

    dataset: Dataset
    findings: list[Finding]
    statistics: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.add([])

    def add(self, findings: Iterable[Finding]) -> None:
        """Adds findings and puts all of them in their order."""
        kinds = list(KINDS)
        self.findings.extend(findings)
        self.findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), kinds.index(finding.kind)))

    def __getitem__(self, kind: str) -> Finding:
        """Returns the finding of a kind; `KeyError` if there is none."""
        return {finding.kind: finding for finding in self.findings}[kind]

    def __contains__(self, kind: str) -> bool:
        return any(finding.kind == kind for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """Returns how many findings have a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def summary(self) -> str:
        """Returns how many errors, warnings and notes there are, in words."""
        counts = ((self.count(severity), severity) for severity in SEVERITIES)
        return ", ".join(f"{count or 'no'} {name}{'s' * (count != 1)}" for count, name in counts)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON.

        Keys: `format`, `data` (name, root, class_names, notes), `is_whole`, `seconds`, `counts` (by severity),
        `findings` (each with kind, severity, title, explanation, remedy, action, detail, num_items, num_files and
        items; an item has files, related and detail; a file has split, index, file and class), and `statistics`:
        `num_images`, `class_counts` (by split, then class) and, where every image was decoded, `formats`, `modes`
        (counts) and `width`, `height`, `brightness` (min, 5%, median, 95%, max; a histogram's edges and counts).
        """
        return {
            "format": FORMAT,
            "data": {
                "name": self.dataset.name,
                "root": None if self.dataset.root is None else str(self.dataset.root),
                "class_names": list(self.dataset.class_names),
                "notes": list(self.dataset.notes),
            },
            "is_whole": self.is_whole,
            "seconds": round(self.seconds, 3),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
            "statistics": self.statistics,
        }

    def write_json(self, file: TextIO) -> None:
        r"""Writes everything as JSON, in ASCII: names that are no text keep their bytes as `\udc80` to `\udcff`."""
        json.dump(self.to_dict(), file, indent=1)
        file.write("\n")

    def write_fix_list(self, file: TextIO) -> None:
        """Writes a CSV table of what could be done, a row a file. It is a list to go through; nothing runs it."""
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIX_LIST_COLUMNS)
        for finding in self.findings:
            for item in finding.items:
                for ref in item.files:
                    related = item.related or [other for other in item.files if other != ref]
                    first = related[0].file if related else ""
                    row = (finding.kind, finding.severity, ref.split, ref.label, ref.file, first)
                    writer.writerow([*row, finding.text.action, item.detail])


FIX_LIST_COLUMNS = ("finding", "severity", "split", "class", "file", "related_file", "suggested_action", "detail")


def image_refs(dataset: Dataset, split: str, indices: Sequence[int]) -> list[ImageRef]:
    """Returns references to images of a split."""
    images = dataset.splits[split]
    return [ImageRef(split, int(i), images.names[int(i)], label_text(dataset, images.labels[int(i)])) for i in indices]


def label_text(dataset: Dataset, label: Any) -> str:
    """Returns a class name, or several, or `""`."""
    if getattr(label, "ndim", 0):
        return ", ".join(name for name, is_true in zip(dataset.class_names, label, strict=True) if is_true)
    return dataset.class_names[int(label)] if label >= 0 else ""
