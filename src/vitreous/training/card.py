"""The model card: README.md of a run, with the metadata block that the Hugging Face hub reads.

What it says of use and limits follows from what was measured; nothing else is claimed.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous import __version__
from vitreous.calibration import describe_calibration
from vitreous.errors import UnknownNameError
from vitreous.evaluation import get_headline, summarize_metrics
from vitreous.registry import list_weights
from vitreous.text import escape_text

if TYPE_CHECKING:
    from vitreous.training.fit import History

LIMITS_BEGIN, LIMITS_END = "<!-- measured limits -->", "<!-- end of measured limits -->"
"""What lies between is written anew by `vitreous report`; all else of README.md is its owner's."""

_MOST_CLASSES = 30  # named in the card
_FEW_EXAMPLES = 30  # of a class, under which its numbers are rough
_HUB_LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause", "openrail"}
_OTHER_WEIGHTS = {
    "best.keras": "the averaged weights that scored best in validation, where those were not the last",
    "last.keras": "the last averaged weights; model.keras has those that scored best in validation",
}


def describe_results(
    path: Path, folder: Path, config: Mapping[str, Any], metrics: Mapping[str, Any], history: "History"
) -> str:
    """Returns the model card of a run.

    Args:
        path: Where the run will lie; its name is the model's.
        folder: Where its files lie now.
        config: What `config.toml` holds.
        metrics: What `metrics.json` holds.
        history: Of training.
    """
    data, spec = config["data"], config["input"]
    kept = [f"- `{name}`: {what}" for name, what in _OTHER_WEIGHTS.items() if (folder / name).exists()]
    answers = "labels" if data["is_multi_label"] else "confusion"
    lines = [*_metadata(path.name, config, metrics), f"# {_literal(path.name)}", ""]
    for split in ("test", "val"):
        if split in metrics:
            name, value = get_headline(metrics[split])
            lines += [f"{split} {name.replace('_', ' ')} **{value:.2%}**: {summarize_metrics(metrics[split])}.", ""]
    if "calibration" in metrics:
        lines += [f"Probabilities: {describe_calibration(metrics['calibration'])}.", ""]
    height, width = spec["image_size"]
    what = "which of these classes apply, several or none" if data["is_multi_label"] else "one of these classes, always"
    return "\n".join(
        [
            *lines,
            f"{config['model']['name']} on {_literal(data['name'])} ({len(data['class_names'])} classes), "
            f"{metrics['num_images_seen']:,} images seen in {history.seconds:.0f} s, seed {config['seed']}"
            + (", interrupted." if history.is_interrupted else "."),
            "",
            f"Made by vitreous {__version__} with `{config['command']}`.",
            "",
            "## Intended use",
            "",
            f"Images like those of {_literal(data['name'])}, resized to {height} x {width} pixels. The model answers "
            f"{what}: {_name_classes(data['class_names'])}.",
            *_describe_thresholds(metrics),
            "",
            f"Classify images: `vitreous predict {shlex.quote(path.name)} IMAGE...` in the folder above.",
            "",
            "## Limits",
            "",
            LIMITS_BEGIN,
            *describe_limits(metrics, data["class_names"]),
            LIMITS_END,
            "",
            "## Files",
            "",
            "- `model.keras`: weights and architecture; load with `vitreous.load_run(PATH).load_model()`",
            *kept,
            "- `config.toml`: every option, the classes, the data's fingerprint, versions",
            "- `history.csv`, `history.jsonl`, `curves.png`: training as it went",
            f"- `metrics.json`, `{answers}.png`, `predictions.png`, `reliability.png`: measured on `model.keras`, "
            "read back from this folder",
            "- `augmented.png`, `patches.png`: images as training and as the model see them",
            "- `report.html`, where it was asked for (`vitreous report`): all of this to look at, and mistakes",
            "",
        ]
    )


def update_limits(text: str, lines: Sequence[str]) -> str | None:
    """Returns a card with other limits in it; None if the marks between which they stand are not there."""
    before, begin, rest = text.partition(LIMITS_BEGIN)
    _, end, after = rest.partition(LIMITS_END)
    if not (begin and end):
        return None
    return "\n".join([before + begin, *lines, end + after])


def describe_limits(
    metrics: Mapping[str, Any], class_names: Sequence[str], *, robustness: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns what was measured of where the model fails, a line of a list each.

    Args:
        metrics: By split, as `metrics.json` holds them.
        class_names: K names.
        robustness: What `measure_robustness` returned. Default: not measured, which the lines then say.
    """
    split = next((name for name in ("test", "val") if name in metrics), None)
    if split is None:
        return ["- Nothing was measured: there were no labelled images beside those of training."]
    found = metrics[split]
    kind = "test" if split == "test" else "validation"
    lines = [f"- Measured on {found['num_examples']:,} {kind} images of the same source, and on no other."]
    if weak := _weakest(found):
        lines.append(f"- {weak}")
    if confused := list_confusions(found, class_names, most=1):
        truth, answer, count, total = confused[0]
        lines.append(
            f"- Most often confused: {_literal(truth)} answered as {_literal(answer)}, {count:,} of {total:,} images."
        )
    few = [name for name, count in found["support"].items() if count < _FEW_EXAMPLES]
    if few:
        lines.append(f"- Rough numbers, from under {_FEW_EXAMPLES} images of a class: {_name_classes(few)}.")
    if robustness is None:
        lines.append("- Under noise, blur, fog and the like: not measured (`vitreous report RUN --robustness`).")
    else:
        worst, row = min(robustness["corruptions"].items(), key=lambda item: item[1]["mean"])
        lines.append(
            f"- Under corruptions (Hendrycks and Dietterich 2019) the {robustness['metric'].replace('_', ' ')} falls "
            f"from {robustness['clean']:.1%} to {robustness['mean']:.1%} on average, on "
            f"{robustness['num_examples']:,} images; worst under {worst.replace('_', ' ')}: {row['mean']:.1%}."
        )
    return lines


def list_confusions(
    metrics: Mapping[str, Any], class_names: Sequence[str], *, most: int
) -> list[tuple[str, str, int, int]]:
    """Returns the most frequent mistakes: (true class, answered class, how often, images of the true class).

    Args:
        metrics: What `compute_metrics` returned.
        class_names: K names.
        most: How many, at most; none where an image may have several labels.
    """
    if "confusion_matrix" not in metrics:
        return []
    matrix, names = np.array(metrics["confusion_matrix"]), class_names
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    return [(names[i], names[j], int(matrix[i, j]), int(matrix[i].sum())) for i, j in pairs if wrong[i, j]]


def _weakest(metrics: Mapping[str, Any]) -> str:
    recalls = metrics["recall"]
    if len(recalls) < 2:
        return ""
    name = min(recalls, key=lambda each: recalls[each])
    interval = metrics.get("recall_interval", {}).get(name)
    said = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return (
        f"Weakest class: {_literal(name)}, found in {recalls[name]:.1%}{said} of {metrics['support'][name]:,} images."
    )


def _describe_thresholds(metrics: Mapping[str, Any]) -> list[str]:
    thresholds = metrics.get("calibration", {}).get("thresholds", {})
    said = [
        f"from {chosen['threshold']:.2f} on, {chosen['accuracy']:.1%} of the answers are right and "
        f"{chosen['coverage']:.1%} of the images are answered"
        for chosen in thresholds.values()
        if chosen is not None and chosen["threshold"] > 0
    ]
    if not said:
        return []
    return [
        "",
        f"Answers can be held back below a probability (`--threshold`). On validation images: {'; '.join(said)}.",
    ]


def _name_classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_CLASSES:,} more" if len(names) > _MOST_CLASSES else ""
    return ", ".join(map(_literal, names[:_MOST_CLASSES])) + more


def _literal(text: str) -> str:
    """Returns a text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", escape_text(str(text)))


def _metadata(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Returns the block at the top, in YAML; each text is a JSON string, which is YAML too."""
    source = config.get("pretrained")
    license_name = _find_license(source) if source else ""
    lines = ["---", "library_name: keras", "pipeline_tag: image-classification"]
    if license_name in _HUB_LICENSES:
        lines.append(f"license: {license_name}")
    elif license_name:
        lines += ["license: other", f"license_name: {_quote(license_name)}"]
    if source and source.startswith(("timm/", "hf:")):
        lines.append(f"base_model: {_quote(source.removeprefix('hf:'))}")
    lines += ["tags:", "- keras", "- vitreous", "- vision-transformer", "- image-classification"]
    found = {split: metrics[split] for split in ("test", "val") if split in metrics}
    if not found:
        return [*lines, "---", ""]
    data = _quote(config["data"]["name"])
    lines += ["model-index:", f"- name: {_quote(name)}", "  results:"]
    for split, numbers in found.items():
        lines += [
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {data}",
            f"      type: {data}",
            f"      split: {'test' if split == 'test' else 'validation'}",
            "    metrics:",
        ]
        for kind, (key, title) in _METRICS.items():
            if numbers.get(key) is not None:
                lines += [f"    - type: {kind}", f"      value: {numbers[key]:.6g}", f"      name: {title}"]
    return [*lines, "---", ""]


def _find_license(source: str) -> str:
    """Returns the licence of published weights, as their publisher names it; "" where nobody here knows it."""
    try:
        found = list_weights(source.removeprefix("timm/"))
    except UnknownNameError:
        return ""
    return found[0].license if found else ""


_METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("macro_f1", "F1, mean over classes"),
    "mean_average_precision": ("mean_average_precision", "average precision, mean over classes"),
    "loss": ("loss", "cross-entropy"),
}


def _quote(text: str) -> str:
    return json.dumps(escape_text(str(text)), ensure_ascii=False)
