"""What training says while it runs: a live bar in a terminal, plain lines elsewhere, nothing if asked."""

import sys
import time
from collections.abc import Mapping
from typing import Any


def format_seconds(seconds: float) -> str:
    """Returns a duration as people write it: `42s`, `3m05s`, `2h07m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Reporter:
    """Says nothing; the base of the reporters that do."""

    def note(self, text: str) -> None:
        """Says one line."""

    def warn(self, text: str) -> None:
        """Says one line about something that should not be."""

    def step(self, status: "Status") -> None:
        """Shows where training stands; called often, must be cheap."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Shows one row of the history."""

    def close(self) -> None:
        """Ends the live display."""


class Status:
    """Where training stands.

    Args:
        progress: Share done, in [0, 1].
        epoch: Passes over the data begun, from 1.
        loss: Smoothed training loss, in nats.
        accuracy: Smoothed training accuracy, in [0, 1]; None where there are no answers.
        images_per_second: Lately.
        seconds_left: Estimate.
    """

    __slots__ = ("accuracy", "epoch", "images_per_second", "loss", "progress", "seconds_left")

    def __init__(
        self,
        *,
        progress: float,
        epoch: int,
        loss: float,
        accuracy: float | None,
        images_per_second: float,
        seconds_left: float,
    ):
        self.progress = progress
        self.epoch = epoch
        self.loss = loss
        self.accuracy = accuracy
        self.images_per_second = images_per_second
        self.seconds_left = seconds_left

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f"acc {self.accuracy:.1%}  "
        return (
            f"epoch {self.epoch}  loss {self.loss:.3f}  {accuracy}"
            f"{self.images_per_second:.0f} img/s  {format_seconds(self.seconds_left)} left"
        )


def format_row(row: Mapping[str, Any]) -> str:
    """Returns one row of the history as a line."""
    text = f"epoch {row['epoch']:>3}"
    for split in ("train", "val"):
        if row.get(f"{split}_loss") is not None:
            text += f"  {split} loss {row[f'{split}_loss']:.3f}"
        for name, label in (("accuracy", "acc"), ("mean_average_precision", "mAP")):
            if row.get(f"{split}_{name}") is not None:
                text += f" {label} {row[f'{split}_{name}']:.1%}"
    return f"{text}  {row['images_per_second']:.0f} img/s  {format_seconds(row['seconds'])}"


class LineReporter(Reporter):
    """Plain lines: each row of the history, and in long epochs a line every 30 seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.has_reader = True

    def note(self, text: str) -> None:
        """Prints one line; once the reader of our output has gone (as `head` does), training goes on in silence."""
        if self.has_reader:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                self.has_reader = False

    def warn(self, text: str) -> None:
        """Prints one line to standard error."""
        print(f"Warning: {text}", file=sys.stderr, flush=True)

    def step(self, status: Status) -> None:
        """Prints a line if the last one is old."""
        if time.monotonic() - self.last > 30:
            self.note(f"{status.progress:4.0%}  {status}")
            self.last = time.monotonic()

    def row(self, row: Mapping[str, Any]) -> None:
        """Prints one row of the history."""
        self.note(format_row(row))
        self.last = time.monotonic()


class BarReporter(Reporter):
    """A live progress bar, with the rows of the history above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.progress = Progress(
            TextColumn("[bold]train"), BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}")
        )
        self.task = self.progress.add_task("", total=1.0, visible=False)
        self.is_live = False

    def note(self, text: str) -> None:
        """Prints one line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints one yellow line above the bar."""
        self.progress.console.print(f"Warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def step(self, status: Status) -> None:
        """Moves the bar."""
        if not self.is_live:
            self.progress.start()
            self.is_live = True
        self.progress.update(self.task, completed=status.progress, description=str(status), visible=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """Prints one row of the history above the bar."""
        self.note(format_row(row))

    def close(self) -> None:
        """Takes the bar away."""
        if self.is_live:
            self.progress.update(self.task, visible=False)
            self.progress.stop()
            self.is_live = False


def create_reporter() -> Reporter:
    """Creates the reporter that fits standard output: a bar in a terminal, else lines."""
    return BarReporter() if sys.stdout.isatty() else LineReporter()
