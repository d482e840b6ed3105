"""Commands that measure a run: how good it is, how sure it may be."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from vitreous.cli.options import DATA, Backend, ColumnOptions, describe_source, given, start_backend
from vitreous.cli.printing import check_output, metrics_line, open_output, show_progress
from vitreous.errors import ConfigError
from vitreous.text import escape_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ROBUSTNESS = Group.create_ordered("Robustness")

_MOST_ROWS = 40  # of a table of classes


def evaluate(
    run: Path,
    data: Annotated[
        str | None, describe_source("Labelled images:", "Default: the data the run was trained on.")
    ] = None,
    /,
    *,
    split: Literal["train", "val", "test", "all"] | None = None,
    threshold: float | None = None,
    tta: str | None = None,
    slice_by: str | None = None,
    json_output: Annotated[Path | None, Parameter(name="--json", allow_leading_hyphen=True)] = None,
    plots: Path | None = None,
    robustness: Annotated[bool, Parameter(negative=(), group=ROBUSTNESS)] = False,
    corruptions: Annotated[str | None, Parameter(group=ROBUSTNESS)] = None,
    severities: Annotated[str | None, Parameter(group=ROBUSTNESS)] = None,
    max_images: Annotated[int, Parameter(group=ROBUSTNESS)] = 1000,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Measure a run on labelled images: accuracy, classes, calibration, coverage; robustness, slices.

    Intervals are of 95%: Wilson's for shares of images, the percentile bootstrap (1000 draws) for all else.

    Args:
        run: Folder of the run.
        data: Labelled images.
        split: Which part of the data. Default: its test images; all images of a folder without splits.
        threshold: Probability in [0, 1] below which an answer counts as "not sure".
        tta: Views of each image to average: flip (the image and its mirror image), or 2 to 10 (shifts, then their
            mirror images). Takes that many times as long.
        slice_by: Column of the data's table: measure each of its values by itself.
        json_output: JSON file to write, with everything; - for standard output, in place of the tables.
        plots: Folder for pictures: confusion, reliability, coverage, robustness.
        robustness: Measure under the 15 common corruptions, at severities 1 to 5, of images as they enter the model.
        corruptions: Some of them, with commas. Default: all.
        severities: Some of them, with commas: 1,3,5. Default: all.
        max_images: How many images, drawn at random, are corrupted.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns, where they differ from those of training.
    """
    from vitreous.training import load_run

    is_piped = str(json_output) == "-"
    if json_output is not None and str(json_output).startswith("-") and not is_piped:
        raise ConfigError(
            "Cannot write JSON. Expected a file, or - for standard output. "
            f"Received: json={str(json_output)!r}. Pass --json FILE."
        )
    if not is_piped:
        check_output(json_output, "--json")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise ConfigError(
            f"Cannot write pictures. Expected a folder. Received: plots={str(plots)!r}, a file. Pass another --plots."
        )
    views: Any = int(tta) if tta is not None and tta.isdecimal() else tta
    levels = None if severities is None else [_read_severity(part) for part in severities.split(",")]
    loaded = load_run(run)  # first: a wrong path should not cost the time that Keras takes to start
    start_backend(backend)
    from vitreous.measurement import evaluate as evaluate_run

    with show_progress("images") as on_progress:
        metrics = evaluate_run(
            loaded,
            data,
            split=split,
            threshold=threshold,
            tta=views,
            slice_by=slice_by,
            robustness=robustness,
            corruptions=None if corruptions is None else [part.strip() for part in corruptions.split(",")],
            severities=levels,
            max_images=max_images,
            plots=plots,
            on_progress=on_progress,
            **given(columns),
        )
    if is_piped:
        print(json.dumps(metrics, indent=2, ensure_ascii=False))
    else:
        print_metrics(metrics)
        if json_output is not None:
            with open_output(json_output) as file:
                json.dump(metrics, file, indent=2, ensure_ascii=False)
                file.write("\n")
    if plots is not None:
        print(f"Wrote pictures to {plots}", file=sys.stderr)
    for name, reason in metrics["broken_files"].items():
        print(f"Warning: left out {escape_text(name)}: {escape_text(reason)}", file=sys.stderr)
    return 0


def _read_severity(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"Cannot read --severities. Expected numbers from 1 to 5, with commas. Received: {text!r}. Pass 1,3,5."
        ) from error


def calibrate(
    run: Path,
    data: Annotated[
        str | None, describe_source("Labelled images that the model has not seen:", "Default: those of validation.")
    ] = None,
    /,
    *,
    split: Literal["val", "test", "all"] | None = None,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Fit the temperature of a run's probabilities anew, so that they mean what they say, and keep it in the run.

    Training does this at its end; answers stay the same, how sure they are changes.

    Args:
        run: Folder of the run.
        data: Labelled images.
        split: Which part of the data. Default: the validation images of the run's own data.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns, where they differ from those of training.
    """
    from vitreous.training import load_run

    loaded = load_run(run)
    start_backend(backend)
    from vitreous.calibration import describe_calibration
    from vitreous.measurement import calibrate_run

    calibrated = calibrate_run(loaded, data, split=split, **given(columns))
    print(f"Sure     {describe_calibration(calibrated.metrics['calibration'])}")
    print(f"Look at  {run}/reliability.png")
    return 0


# ----- tables


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints what `evaluate` returned; as wide as the terminal, or 120 characters where there is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    _say(console, metrics_line(metrics["split"], metrics))
    _print_numbers(console, metrics)
    _print_classes(console, metrics)
    _print_sureness(console, metrics)
    if "slices" in metrics:
        _print_slices(console, metrics["slices"])
    if "robustness" in metrics:
        _print_robustness(console, metrics["robustness"])


def _say(console: "Console", text: str) -> None:
    from rich.text import Text

    console.print(Text(text), soft_wrap=True)


def _create_table(*columns: str) -> "Table":
    """Returns an empty table: the first column to the left, numbers to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _interval(low: float, high: float) -> str:
    return f"{low:.2%} to {high:.2%}"


def _print_numbers(console: "Console", metrics: dict[str, Any]) -> None:
    from vitreous.evaluation import TITLES

    table = _create_table("", "", "95% interval", "")
    for name, title in TITLES.items():
        if metrics.get(name) is None:
            continue
        interval = metrics["intervals"].get(name)
        shown = _interval(interval["low"], interval["high"]) if interval else "-"
        table.add_row(title, _percent(metrics[name]), shown, interval["method"] if interval else "")
    loss = metrics["intervals"]["loss"]
    table.add_row("loss", f"{metrics['loss']:.4f}", f"{loss['low']:.4f} to {loss['high']:.4f}", loss["method"])
    if "tta" in metrics:
        _say(console, f"Views    the mean over {metrics['tta']['num_views']}: {'; '.join(metrics['tta']['views'])}")
    console.print(table)


def _print_classes(console: "Console", metrics: dict[str, Any]) -> None:
    from rich.text import Text

    names = sorted(metrics["recall"], key=lambda name: metrics["f1"][name])
    table = _create_table("class", "images", "precision", "recall", "95% interval", "F1", "ROC-AUC", "avg. precision")
    shown = metrics["recall"] if len(names) <= _MOST_ROWS else names[:_MOST_ROWS]
    for name in shown:
        table.add_row(
            Text(escape_text(name)),
            f"{metrics['support'][name]:,}",
            *(_percent(metrics[kind][name]) for kind in ("precision", "recall")),
            _interval(*metrics["recall_interval"][name]),
            _percent(metrics["f1"][name]),
            *(_percent(metrics[kind].get(name)) for kind in ("roc_auc", "average_precision")),
        )
    console.print(table)
    if len(names) > _MOST_ROWS:
        _say(console, f"         the {_MOST_ROWS} classes of lowest F1, of {len(names):,}; --json has them all")


def _print_sureness(console: "Console", metrics: dict[str, Any]) -> None:
    calibration, selection = metrics["calibration"], metrics["selection"]
    before, after = calibration["before"], calibration["after"]
    is_cooled = calibration["temperature"] != 1
    parts = [("before", before), ("after", after)] if is_cooled else [("", before)]
    table = _create_table(
        f"temperature {calibration['temperature']:.3f}" if is_cooled else "no temperature",
        "calibration error",
        "of equal mass",
        "log-likelihood",
        "Brier",
    )
    for name, part in parts:
        shares = (_percent(part["ece"]), _percent(part["ece_equal_mass"]))
        table.add_row(name, *shares, f"{-part['nll']:.4f}", f"{part['brier']:.4f}")
    console.print(table)
    rows = [(f"for {float(target):.0%}", found) for target, found in selection["thresholds"].items()]
    if "threshold" in metrics:
        rows.append(("asked for", metrics["threshold"]))
    _say(
        console,
        f"Coverage area of error under coverage {selection['aurc']:.4f} (at best {selection['aurc_best']:.4f})",
    )
    if rows:
        table = _create_table("threshold", "", "answered", "accuracy of these", "95% interval")
        for name, found in rows:
            table.add_row(
                name,
                f"{found['threshold']:.3f}",
                _percent(found["coverage"]),
                _percent(found["accuracy"]),
                _interval(*found["accuracy_interval"]),
            )
        console.print(table)


def _print_slices(console: "Console", slices: dict[str, Any]) -> None:
    from rich.text import Text

    metric = slices["metric"]
    of = "95% interval" if metric == "accuracy" else "all labels right, 95%"
    table = _create_table(escape_text(slices["column"]), "images", metric.replace("_", " "), of, "F1", "loss")
    for row in slices["slices"]:
        table.add_row(
            Text(escape_text(row["value"])),
            f"{row['num_examples']:,}",
            _percent(row[metric]),
            _interval(*row["interval"]),
            _percent(row["macro_f1"]),
            f"{row['loss']:.4f}",
        )
    console.print(table)
    if slices["num_left_out"]:
        _say(console, f"         {slices['num_left_out']:,} images of rarer values are left out")


def _print_robustness(console: "Console", robustness: dict[str, Any]) -> None:
    levels = [str(severity) for severity in robustness["severities"]]
    table = _create_table(f"{robustness['metric'].replace('_', ' ')} at severity", *levels, "mean")
    for name, row in robustness["corruptions"].items():
        table.add_row(name.replace("_", " "), *(_percent(row[level]) for level in (*levels, "mean")))
    console.print(table)
    interval = f" (95% interval {_interval(*robustness['mean_interval'])})" if "mean_interval" in robustness else ""
    groups = ", ".join(f"{name} {share:.2%}" for name, share in robustness["groups"].items())
    _say(
        console,
        f"Robust   mean corruption {robustness['metric'].replace('_', ' ')} {robustness['mean']:.2%}{interval}; "
        f"without corruption {robustness['clean']:.2%} of the same {robustness['num_examples']:,} images; {groups}",
    )
