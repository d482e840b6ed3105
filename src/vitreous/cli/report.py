"""The command that writes the report of a run."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from vitreous.cli.options import DATA, Backend, ColumnOptions, describe_source, given, start_backend
from vitreous.cli.printing import check_output, metrics_line, show_progress
from vitreous.text import escape_text

if TYPE_CHECKING:
    from vitreous.report import RunReport

ROBUSTNESS = Group.create_ordered("Robustness")


def report(
    run: Path,
    data: Annotated[
        str | None, describe_source("Labelled images to measure it on:", "Default: the data the run was trained on.")
    ] = None,
    /,
    *,
    out: Path | None = None,
    split: Literal["train", "val", "test", "all"] | None = None,
    num_examples: int = 12,
    check_images: Annotated[bool, Parameter(negative=())] = False,
    robustness: Annotated[bool, Parameter(negative=(), group=ROBUSTNESS)] = False,
    max_images: Annotated[int, Parameter(group=ROBUSTNESS)] = 1000,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Write all there is to know of a run into one HTML file: data, curves, answers, sureness, mistakes, speed.

    Pictures are inside, nothing is loaded from elsewhere: it can be mailed, printed, read on a phone.

    Args:
        run: Folder of the run.
        data: Labelled images.
        out: File to write. Default: report.html in the run's folder.
        split: Which part of the data. Default: its test images; all images of a folder without splits.
        num_examples: How many mistakes to show, and half as many uncertain answers: 0 to 100.
        check_images: Decode every image of the training data and compare it with all others, as inspect does.
        robustness: Measure under the 15 common corruptions, at severities 1 to 5; the model card then says so too.
        max_images: How many images, drawn at random, are corrupted.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns, where they differ from those of training.
    """
    from vitreous.training import load_run

    check_output(out)
    loaded = load_run(run)  # first: a wrong path should not cost the time that Keras takes to start
    start_backend(backend)
    from vitreous.report import write_report

    with show_progress("images") as on_progress:
        written = write_report(
            loaded,
            data,
            out=out,
            split=split,
            robustness=robustness,
            max_images=max_images,
            check_images=check_images,
            num_examples=num_examples,
            on_progress=on_progress,
            **given(columns),
        )
    print(metrics_line(written.facts.metrics["split"], written.facts.metrics))
    print(report_line(written))
    if written.has_card:
        print(f"Card     {shlex.quote(str(run / 'README.md'))} names these limits")
    for name, reason in written.facts.answers.broken.items():
        print(f"Warning: left out {escape_text(name)}: {escape_text(reason)}", file=sys.stderr)
    return 0


def report_line(written: "RunReport") -> str:
    """Returns where a report is, how large it is and how long it took, in one line."""
    place = Path(os.path.relpath(written.path)) if written.path.absolute().is_relative_to(Path.cwd()) else written.path
    return f"Report   {place} ({written.num_bytes / 1024:,.0f} KB, {written.facts.seconds:.1f} s)"
