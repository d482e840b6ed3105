"""What commands print and write: lines, tables, progress, files that appear whole."""

import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vitreous.errors import ConfigError
from vitreous.files import replacing
from vitreous.spec import ViTConfig
from vitreous.text import escape_text

if typing.TYPE_CHECKING:
    from vitreous.answers import AnswerWriter
    from vitreous.data.inspection import Inspection
    from vitreous.engine import Prediction


def metrics_line(split: str, metrics: dict[str, Any]) -> str:
    """Returns the measures of a split in one line."""
    from vitreous.evaluation import summarize_metrics

    return f"{split.capitalize():<8} {summarize_metrics(metrics)}"


def prediction_line(prediction: "Prediction") -> str:
    """Returns an image and its classes in one line; where it may have several, those that apply stand first."""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    answers = ", ".join(f"{escape_text(name)} {share:.1%}" for name, share in pairs)
    if prediction.labels is not None:
        answers = f"[{', '.join(map(escape_text, prediction.labels)) or 'none'}] {answers}"
    if prediction.is_sure is False:
        answers = f"not sure: {answers}"
    return f"{escape_text(str(prediction.path))}: {answers}"


def print_findings(inspection: "Inspection") -> None:
    """Prints a table of the findings; as wide as the terminal, or 120 characters where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dataset = inspection.dataset
    counts = ", ".join(f"{len(images):,} {split}" for split, images in dataset.splits.items())
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    lines = [f"Data     {dataset.name}: {len(dataset.class_names)} classes; images: {counts}"]
    lines += [f"         {note}" for note in dataset.notes]
    for line in lines:
        console.print(Text(escape_text(line)), soft_wrap=True)
    if inspection.findings:
        colours = {"error": "bold red", "warning": "yellow", "note": "blue"}
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        for name in ("", "finding", "cases", "such as"):
            table.add_column(name, justify="right" if name == "cases" else "left", overflow="fold")
        for finding in inspection.findings:
            severity = Text(finding.severity, style=colours[finding.severity])
            title = Text(finding.text.title)
            table.add_row(severity, title, f"{len(finding.items):,}", Text(escape_text(finding.example())))
        console.print(table)
        shown = [finding for finding in inspection.findings if finding.severity != "note"]
        for finding in shown:
            console.print(Text(f"{finding.text.title}: {finding.text.remedy}"), soft_wrap=True)
    console.print(Text(f"Found    {inspection.summary()} ({inspection.seconds:.1f} s)"), soft_wrap=True)


def model_lines(row: dict[str, Any]) -> list[str]:
    """Returns one model as lines to print."""
    config, image = row["config"], row["input"]
    mean, std = (" ".join(f"{value:.4g}" for value in image[key]) for key in ("mean", "std"))
    fit = {"crop": "", "squash": "squashed to a square, ", "pad": "padded to a square, "}[image["resize_mode"]]
    named = ("image_size", "patch_size", "projection_dim", "num_blocks", "num_heads", "mlp_dim", "num_classes")
    usual = ViTConfig(**{name: config[name] for name in named}).to_dict()
    special = [f"{name}={value}" for name, value in config.items() if value != usual[name]]
    lines = [
        f"Model    {row['name']}",
        f"Family   {row['family']}: {row['source']}",
        f"Size     {row['num_parameters'] / 1e6:.2f}M parameters, {row['num_macs'] / 1e9:.2f}G multiply-accumulates, "
        f"{config['num_classes'] or 'no'} classes",
        f"Encoder  {config['num_blocks']} blocks of width {config['projection_dim']}, {config['num_heads']} heads, "
        f"MLP of {config['mlp_dim']}; patches of {'x'.join(map(str, config['patch_size']))} pixels, "
        f"{row['num_tokens']} tokens",
        *([f"Special  {', '.join(special)}"] if special else []),
        f"Input    {'x'.join(map(str, row['image_size']))} pixels, {image['interpolation']}, "
        f"{fit}centre crop of {image['crop_fraction']:.4g}, mean {mean}, std {std}",
    ]
    if not row["weights"]:
        return [*lines, "Weights  none published; train it from scratch"]
    width = max(len(source["tag"]) for source in row["weights"])
    lines.append(f"Weights  {'tag':<{width}}  classes  {'licence':<12}  huggingface.co/")
    for source in row["weights"]:
        lines.append(
            f"         {source['tag']:<{width}}  {source['num_classes']:>7}  {source['license'] or 'not stated':<12}  "
            f"{source['hub_id']}"
        )
    return lines


def check_output(path: Path | None, option: str = "--out") -> None:
    """Raises `ConfigError` if a file could not be written at `path`, before anything is computed for it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        received = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ConfigError(
            f"Cannot write {path}. Expected the path of a file in a folder that exists. Received: {received}. "
            f"Pass another {option}."
        )


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Yields standard output, or a file that appears whole under its name."""
    if path is None:
        yield sys.stdout
        return
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield file
    print(f"Wrote {path}", file=sys.stderr)


@contextmanager
def open_answers(format: str, out: Path | None, **options: Any) -> "Iterator[AnswerWriter]":
    """Yields what writes predictions to standard output, or to a file that appears whole under its name.

    Args:
        format: `"text"`, or one of `vitreous.answers.WRITERS`.
        out: The file.
        **options: Of the writer.
    """
    from vitreous.answers import WRITERS, AnswerWriter, partial_path

    class TextWriter(AnswerWriter):
        """A line an image."""

        def write_row(self, prediction: "Prediction") -> None:
            """Writes a line."""
            print(prediction_line(prediction), file=self.stream)

    kind = TextWriter if format == "text" else WRITERS[format]
    writer = kind(out or sys.stdout, **options)
    try:
        with writer:
            if writer.done:
                print(f"Resume   {sum(writer.done.values()):,} images have their row", file=sys.stderr)
            yield writer
    except BaseException:
        if out is not None and writer.can_resume and partial_path(out).exists():
            command = "the same command with --resume goes on"
            print(f"Kept     what was answered so far in {partial_path(out)}; {command}", file=sys.stderr)
        raise
    if out is not None:
        print(f"Wrote {out}", file=sys.stderr)


@contextmanager
def show_progress(what: str) -> Iterator[Any]:
    """Yields a function of (done, total) that moves a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
