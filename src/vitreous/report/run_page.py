"""What a report shows, put into words, tables and figures for its template."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.evaluation import TITLES, get_headline
from vitreous.explanation.perturbation import find_edges
from vitreous.figures import draw_confusion, draw_curves, draw_reliability, draw_selection, shorten
from vitreous.figures.explanation import lay_over
from vitreous.registry import count_macs
from vitreous.report.inspection import MAX_NAMES, describe_data, describe_finding
from vitreous.report.page import draw_inside, make_thumbnail, render_page
from vitreous.report.run import Case, RunFacts
from vitreous.spec import ViTConfig
from vitreous.text import escape_text
from vitreous.training.card import list_confusions
from vitreous.training.progress import format_seconds

if TYPE_CHECKING:
    from markupsafe import Markup

_MOST_CELLS = 20  # classes up to which the confusion matrix is a table; beyond, a picture
_MOST_ROWS = 40  # of a table of classes
_MOST_CONFUSIONS = 6
_PICTURE = 128  # pixels of an example's longer side, at most


def render_run(facts: RunFacts) -> str:
    """Returns the report of a run as one HTML page.

    Args:
        facts: What `collect_facts` returned.

    Returns:
        HTML in which every text from the data is escaped. It loads nothing, and its content security policy forbids
        it to.
    """
    run, metrics = facts.run, facts.metrics
    config, inspection = run.config, facts.inspection
    calibration = metrics["calibration"]
    return render_page(
        "run.html.j2",
        name=escape_text(run.path.absolute().name),
        data_name=escape_text(config["data"]["name"]),
        source=escape_text(metrics["data"]) if metrics["data"] != config["data"]["name"] else "",
        split={"val": "validation", "all": ""}.get(metrics["split"], metrics["split"]),
        model=config["model"]["name"],
        num_classes=len(run.class_names),
        is_multi_label=run.is_multi_label,
        is_interrupted=bool(run.metrics.get("is_interrupted")),
        tiles=_tiles(facts),
        summary=_summary(facts),
        num_examples=metrics["num_examples"],
        notes=[escape_text(note) for note in config["data"].get("notes", [])],
        root=escape_text(config["data"]["root"]),
        splits=config["data"].get("num_images", {}),
        data=None if inspection is None else describe_data(inspection.statistics),
        findings=[]
        if inspection is None
        else [describe_finding(finding, inspection.dataset) for finding in inspection.findings],
        is_whole=inspection is not None and inspection.is_whole,
        max_names=MAX_NAMES,
        data_note=escape_text(facts.data_note),
        training=_training(facts),
        curves=_curves(facts),
        numbers=_numbers(metrics),
        confusion=_confusion(facts),
        confusions=[
            (escape_text(truth), escape_text(answer), count, total)
            for truth, answer, count, total in list_confusions(metrics, run.class_names, most=_MOST_CONFUSIONS)
        ],
        classes=_classes(metrics),
        num_unlisted=max(0, len(metrics["recall"]) - _MOST_ROWS),
        temperature=calibration["temperature"],
        calibration=[
            (when, calibration[when])
            for when in (("before", "after") if calibration["temperature"] != 1 else ("before",))
        ],
        reliability=_reliability(calibration),
        selection=draw_inside(
            partial(draw_selection, metrics["selection"]),
            name="selection",
            alt="Accuracy of the surest answers against the share of images that they are",
        ),
        thresholds={
            target: {**found, "interval": _interval(*found["accuracy_interval"])}
            for target, found in metrics["selection"]["thresholds"].items()
        },
        aurc=(metrics["selection"]["aurc"], metrics["selection"]["aurc_best"]),
        robustness=_robustness(facts),
        run_path=escape_text(str(run.path)),
        mistakes=[_case(case, is_multi_label=run.is_multi_label) for case in facts.mistakes],
        unsure=[_case(case, is_multi_label=run.is_multi_label) for case in facts.unsure],
        num_mistakes=int((~facts.answers.is_right).sum()),
        broken=[(escape_text(file), escape_text(reason)) for file, reason in facts.answers.broken.items()],
        speed=_speed(facts),
        commands=[("The run", config["command"]), ("This page", facts.command)],
        versions=[(name, escape_text(str(value))) for name, value in config["versions"].items()],
        config_text="\n".join(
            escape_text(line) for line in (run.path / "config.toml").read_text(encoding="utf-8").splitlines()
        ),
        fingerprint=config["data"]["fingerprint"],
        seed=config["seed"],
        seconds=facts.seconds,
    )


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _interval(low: float, high: float, digits: int = 1) -> str:
    return f"{100 * low:.{digits}f} to {_percent(high, digits)}"


def _words(name: str) -> str:
    return name.replace("_", " ")


# ----- at the top


def _tiles(facts: RunFacts) -> list[dict[str, str]]:
    """Returns the few numbers that sum up a run: a value, what it is, and what it rests on."""
    metrics, calibration = facts.metrics, facts.metrics["calibration"]
    name, value = get_headline(metrics)
    interval = metrics["intervals"].get(name)
    tiles = [
        {
            "value": _percent(value),
            "what": _words(name),
            "about": f"95% interval {_interval(interval['low'], interval['high'])}" if interval else "no interval",
        }
    ]
    before, after = (calibration[when]["ece"] for when in ("before", "after"))
    is_mended = calibration["temperature"] != 1
    tiles.append(
        {
            "value": _percent(after),
            "what": "calibration error",
            "about": f"{_percent(before)} before the temperature" if is_mended else "no temperature was fitted",
        }
    )
    if table := facts.robustness:
        interval = table.get("mean_interval")
        tiles.append(
            {
                "value": _percent(table["mean"]),
                "what": f"{_words(table['metric'])} under corruptions",
                "about": f"95% interval {_interval(*interval)}" if interval else f"{_percent(table['clean'])} without",
            }
        )
    speed = facts.speed
    tiles.append(
        {
            "value": f"{speed['images_per_second']:,.0f}",
            "what": "images a second",
            "about": f"{speed['backend']}, batches of {speed['batch_size']}",
        }
    )
    return tiles


def _summary(facts: RunFacts) -> list[str]:
    """Returns what to know first, in sentences; each follows from a number on the page."""
    metrics, lines = facts.metrics, []
    recalls = metrics["recall"]
    if len(recalls) > 1:
        name = min(recalls, key=lambda each: recalls[each])
        low, high = metrics["recall_interval"][name]
        lines.append(
            f"The weakest class is {escape_text(name)}: {_percent(recalls[name])} of its {metrics['support'][name]:,} "
            f"images are found (95% interval {_interval(low, high)})."
        )
    for truth, answer, count, total in list_confusions(metrics, facts.run.class_names, most=1):
        if count > 1:
            mistake = f"{escape_text(truth)} answered as {escape_text(answer)}"
            lines.append(f"The most frequent mistake is {mistake}: {count:,} of {total:,} images.")
    overall = facts.answers.is_right.mean()
    for target, found in metrics["selection"]["thresholds"].items():
        if float(target) <= overall or found["accuracy"] is None:
            continue
        lines.append(
            f"Held back below a probability of {found['threshold']:.2f} (chosen on validation images for "
            f"{float(target):.0%}), {_percent(found['accuracy'])} of the answers are right, and "
            f"{_percent(found['coverage'])} of the images get one."
        )
        break
    if table := facts.robustness:
        worst, row = min(table["corruptions"].items(), key=lambda item: item[1]["mean"])
        lines.append(
            f"It suffers most from {_words(worst)}: {_percent(row['mean'])} where {_percent(table['clean'])} are right."
        )
    if facts.inspection is not None and (facts.inspection.count("error") or facts.inspection.count("warning")):
        lines.append(f"The check of the training data has {facts.inspection.summary()}: read them before the numbers.")
    few = [name for name, count in metrics["support"].items() if count < 30]
    if few:
        lines.append(
            f"{len(few):,} of {len(metrics['support']):,} classes have under 30 test images: their numbers are rough."
        )
    return lines


# ----- data and training


def _training(facts: RunFacts) -> list[tuple[str, str]]:
    """Returns how the model was trained, as names and values."""
    config, metrics = facts.run.config, facts.run.metrics
    model = ViTConfig.from_dict({key: value for key, value in config["model"].items() if key != "name"})
    recipe = config.get("recipe", {})
    optimizer = recipe.get("optimizer", {})
    spec = facts.run.input_spec
    height, width = model.image_size
    rows = [
        (
            "Model",
            f"{config['model']['name']}: {model.num_blocks} blocks of width {model.projection_dim}, "
            f"{model.num_heads} heads",
        ),
        ("Parameters", f"{metrics['num_parameters']:,}" if "num_parameters" in metrics else "–"),
        ("Work for an image", f"{count_macs(model) / 1e6:,.1f} million multiply-accumulates"),
        (
            "Input",
            f"{height} × {width} pixels, {model.num_channels} channel{'s' * (model.num_channels != 1)}, patches of "
            f"{' × '.join(map(str, model.patch_size))}; {spec.resize_mode}, {spec.interpolation}",
        ),
        ("Start", escape_text(str(config.get("pretrained", "random weights")))),
        ("Recipe", escape_text(str(config["recipe_name"]))),
        (
            "Optimizer",
            ", ".join(
                [
                    str(optimizer.get("name", "–")),
                    f"learning rate {optimizer.get('learning_rate', '–')}",
                    f"batches of {recipe.get('batch_size', '–')}",
                ]
            ),
        ),
        (
            "Length",
            f"{metrics['num_images_seen']:,} images in {metrics['num_steps']:,} steps, "
            f"{format_seconds(metrics['train_seconds'])}",
        ),
        ("Precision", str(config["versions"].get("policy", "–"))),
    ]
    return rows


def _curves(facts: RunFacts) -> "list[Markup]":
    """Returns the learning curves, a figure each, so that a phone shows them one below the other."""
    history = facts.history
    epochs = [number for number in history.get("epoch", []) if number is not None]
    if not epochs or len(epochs) < len(history["epoch"]):
        return []
    figures = []
    for names in (
        ("loss", "train_loss", "val_loss"),
        ("accuracy", "train_accuracy", "val_accuracy"),
        ("mean average precision", "val_mean_average_precision"),
        ("learning rate", "learning_rate"),
    ):
        title, *columns = names
        values = {name.removeprefix("train_"): history[name] for name in columns if name in history}
        values = {name: column for name, column in values.items() if any(value is not None for value in column)}
        if not values:
            continue
        figures.append(
            draw_inside(
                partial(draw_curves, {"epoch": epochs, **values}),
                name=f"curve-{title.replace(' ', '-')}",
                alt=f"{title.capitalize()} against the epoch",
            )
        )
    return figures


# ----- answers


def _numbers(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the rows of the table of metrics."""
    rows = []
    for name, title in {"accuracy": "accuracy", **TITLES}.items():
        if metrics.get(name) is None:
            continue
        interval = metrics["intervals"].get(name)
        rows.append(
            {
                "title": title,
                "value": _percent(metrics[name], 2),
                "interval": _interval(interval["low"], interval["high"], 2) if interval else "–",
                "method": interval["method"] if interval else "",
            }
        )
    loss = metrics["intervals"]["loss"]
    rows.append(
        {
            "title": "loss (nats)",
            "value": f"{metrics['loss']:.4f}",
            "interval": f"{loss['low']:.4f} to {loss['high']:.4f}",
            "method": loss["method"],
        }
    )
    return rows


def _confusion(facts: RunFacts) -> dict[str, Any] | None:
    """Returns the confusion matrix: cells of a table for few classes, a picture for many, nothing for labels."""
    if "confusion_matrix" not in facts.metrics:
        return None
    matrix, names = np.array(facts.metrics["confusion_matrix"]), facts.run.class_names
    if len(names) > _MOST_CELLS:
        draw: Callable[[Path], Path] = partial(draw_confusion, matrix, [escape_text(name) for name in names])
        alt = f"Confusion matrix of {len(names)} classes: answers against the truth"
        return {"figure": draw_inside(draw, name="confusion", alt=alt), "rows": []}
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return {
        "figure": None,
        "names": [escape_text(name) for name in names],
        "short": [shorten(escape_text(name), 14) for name in names],
        "is_turned": max(map(len, names)) > 3,
        "rows": [
            {
                "name": escape_text(names[i]),
                "cells": [
                    {
                        "count": int(matrix[i, j]),
                        "depth": round(100 * float(np.sqrt(shares[i, j]))) if matrix[i, j] else 0,
                        "is_right": i == j,
                        "title": f"{escape_text(names[i])} answered as {escape_text(names[j])}: "
                        f"{matrix[i, j]:,} ({_percent(shares[i, j])})",
                    }
                    for j in range(len(names))
                ],
            }
            for i in range(len(names))
        ],
    }


def _classes(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each class that some image has; of many, those of the lowest F1, the lowest first."""
    names = list(metrics["recall"])
    if len(names) > _MOST_ROWS:
        names = sorted(names, key=lambda name: metrics["f1"][name])[:_MOST_ROWS]
    return [
        {
            "name": escape_text(name),
            "support": metrics["support"][name],
            "interval": _interval(*metrics["recall_interval"][name]),
            **{kind: metrics[kind].get(name) for kind in ("precision", "recall", "f1", "roc_auc", "average_precision")},
        }
        for name in names
    ]


def _reliability(calibration: dict[str, Any]) -> "list[Markup]":
    parts = [("before", "before the temperature"), ("after", "after the temperature")]
    if calibration["temperature"] == 1:
        parts = [("before", "as trained")]
    return [
        draw_inside(
            partial(draw_reliability, calibration[when], title=title),
            name=f"reliability-{when}",
            alt=f"How often answers are right against how sure they are, {title}: calibration error "
            f"{_percent(calibration[when]['ece'])}",
        )
        for when, title in parts
    ]


def _robustness(facts: RunFacts) -> dict[str, Any] | None:
    table = facts.robustness
    if table is None:
        return None
    clean = max(table["clean"], 1e-9)

    def cell(value: float) -> dict[str, Any]:
        return {"value": value, "depth": round(100 * min(value / clean, 1.0) ** 2)}

    return {
        **{key: table[key] for key in ("mean", "clean", "num_examples", "severities")},
        "metric": _words(table["metric"]),
        "interval": _interval(*table["mean_interval"]) if "mean_interval" in table else None,
        "groups": [(name, value) for name, value in table["groups"].items()],
        "rows": [
            (_words(name), [cell(row[str(level)]) for level in table["severities"]], cell(row["mean"]))
            for name, row in table["corruptions"].items()
        ],
    }


# ----- images


def _case(case: Case, *, is_multi_label: bool) -> dict[str, Any]:
    """Returns an answer with its image and, beside it, what speaks for it."""
    explanation = case.explanation
    image = explanation.image
    edges = find_edges(explanation.grid, (image.shape[0], image.shape[1]))
    laid, _ = lay_over(image, explanation.values().reshape(explanation.grid_size), edges)
    overlay = np.rint(255 * np.clip(laid, 0, 1)).astype("uint8")
    return {
        "file": escape_text(case.name),
        "truth": _join(case.truths),
        "answer": _join([name for name, _ in case.answers[: None if is_multi_label else 1]]),
        "probabilities": [(escape_text(name), share) for name, share in case.answers],
        "is_right": case.is_right,
        "explained": escape_text(case.explained),
        "uri": make_thumbnail(image, _PICTURE),
        "overlay": make_thumbnail(overlay, _PICTURE),
        "is_small": max(image.shape[:2]) <= _PICTURE,
    }


def _join(names: Sequence[str]) -> str:
    return ", ".join(map(escape_text, names)) or "(none)"


# ----- speed and environment


def _speed(facts: RunFacts) -> list[tuple[str, str]]:
    speed = facts.speed
    peak = speed["peak_bytes"]
    return [
        ("Throughput", f"{speed['images_per_second']:,.1f} images a second in batches of {speed['batch_size']}"),
        ("One image", f"{1000 * speed['seconds_per_image']:,.2f} ms"),
        ("On", f"{speed['backend']}, {escape_text(speed['device'])}"),
        ("model.keras", f"{speed['model_bytes'] / 1e6:,.2f} MB"),
        ("Memory at most", "not known on this system" if peak is None else f"{peak / 1e6:,.0f} MB, the whole process"),
    ]
