"""Files of predictions, written row by row: CSV, JSON, JSON lines, Parquet. An interrupted one can be gone on with.

Rows go to `NAME.partial`, which becomes NAME when all images are done. CSV and JSON lines stay there when they are
interrupted; with `resume`, the images that have a row are not asked for again.
"""

import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vitreous.engine import Prediction
from vitreous.errors import ConfigError, MissingDependencyError

_ROW_GROUP = 10_000


def partial_path(path: Path) -> Path:
    """Returns where the rows of an unfinished file are."""
    return path.with_name(f"{path.name}.partial")


class AnswerWriter(ABC):
    """Writes predictions; a context manager.

    Args:
        out: A file, which appears whole under its name; or a stream, which is left open.
        num_ranks: How many classes each row names.
        has_labels: Whether an image may have several labels.
        has_threshold: Whether rows say if an answer is sure.
        resume: Whether to go on with rows of an earlier start.

    Attributes:
        done: {image: rows} that were there already.
        num_rows: Rows written by this one.
    """

    can_resume = False

    def __init__(
        self, out: Path | TextIO, *, num_ranks: int, has_labels: bool, has_threshold: bool = False, resume: bool = False
    ):
        self.path = out if isinstance(out, Path) else None
        self.num_ranks = num_ranks
        self.has_labels = has_labels
        self.has_threshold = has_threshold
        self.done: Counter[str] = Counter()
        self.num_rows = 0
        if resume and (self.path is None or not self.can_resume):
            raise ConfigError(
                "Cannot resume. Expected a CSV or JSON lines file, named with --out. Received: "
                f"{'no file' if self.path is None else 'another format'}. Pass --csv or --jsonl, and --out."
            )
        self.resume = resume
        self.stream: Any = None if isinstance(out, Path) else out

    def __enter__(self) -> Self:
        if self.path is not None:
            partial = partial_path(self.path)
            if self.resume:
                if not partial.exists() and self.path.exists():
                    os.replace(self.path, partial)
                self._cut(partial)
            self.open(partial, "a" if self.resume else "w")
        if not self.done:
            self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        if self.path is None:
            return
        self.close()
        partial = partial_path(self.path)
        if kind is None:
            os.replace(partial, self.path)
        elif not self.can_resume or not (self.num_rows or self.done):
            partial.unlink(missing_ok=True)

    def _cut(self, partial: Path) -> None:
        """Reads the rows that are whole, and cuts off one that is not."""
        if not partial.exists():
            return
        with partial.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            while size > 0:  # back to the last whole line
                step = min(size, 1 << 16)
                file.seek(size - step)
                place = file.read(step).rfind(b"\n")
                if place >= 0:
                    size = size - step + place + 1
                    break
                size -= step
            file.truncate(size)
        try:
            with partial.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
                self.done = self.read(text) if size else Counter()
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ConfigError(
                f"Cannot resume {self.path}. Expected rows as this command writes them, with the same --top-k. "
                f"Received: {partial}, {error}. Remove it, or leave out --resume."
            ) from error

    def open(self, partial: Path, mode: str) -> None:
        """Opens the unfinished file."""
        self.stream = partial.open(mode, newline="", encoding="utf-8", errors="surrogateescape")

    def close(self) -> None:
        """Closes it."""
        self.stream.close()

    def begin(self) -> None:
        """Writes what stands before the first row, if anything."""
        return

    def end(self) -> None:
        """Writes what stands after the last row, if anything."""
        return

    def read(self, text: TextIO) -> Counter[str]:
        """Returns the images that have a row in an unfinished file."""
        raise NotImplementedError

    def write(self, prediction: Prediction) -> None:
        """Writes a row."""
        self.write_row(prediction)
        self.num_rows += 1

    @abstractmethod
    def write_row(self, prediction: Prediction) -> None:
        """Writes a row in this format."""

    def columns(self) -> list[str]:
        """Returns the names of the columns of a table."""
        ranks = range(1, 1 + self.num_ranks)
        names = [f"{field}_{rank}" for rank in ranks for field in ("class", "probability")]
        return ["image", *(["is_sure"] if self.has_threshold else []), *(["labels"] if self.has_labels else []), *names]


class CsvWriter(AnswerWriter):
    """A row an image, two columns (class, probability) for each rank; several labels with semicolons between them."""

    can_resume = True

    def begin(self) -> None:
        """Writes the header."""
        self._write(self.columns())

    def _write(self, values: list[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self.stream.write(line.getvalue())

    def read(self, text: TextIO) -> Counter[str]:
        """Returns the images that have a row."""
        rows = csv.reader(text, strict=True)
        if (header := next(rows, None)) != self.columns():
            raise ValueError(f"columns {header}")
        done: Counter[str] = Counter()
        for row in rows:
            if len(row) != len(self.columns()):
                raise ValueError(f"a row of {len(row)} values")
            done[row[0]] += 1
        return done

    def write_row(self, prediction: Prediction) -> None:
        """Writes a row."""
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        labels = [";".join(prediction.labels or ())] if self.has_labels else []
        sure = [str(bool(prediction.is_sure)).lower()] if self.has_threshold else []
        self._write(
            [prediction.path, *sure, *labels, *(value for name, share in pairs for value in (name, f"{share:.6f}"))]
        )


class JsonLinesWriter(AnswerWriter):
    """A JSON object an image, each on its line."""

    can_resume = True

    def read(self, text: TextIO) -> Counter[str]:
        """Returns the images that have a row."""
        return Counter(json.loads(line)["image"] for line in text)

    def write_row(self, prediction: Prediction) -> None:
        """Writes a row."""
        self.stream.write(json.dumps(prediction.to_dict(), ensure_ascii=False) + "\n")


class JsonWriter(AnswerWriter):
    """One JSON array."""

    def write_row(self, prediction: Prediction) -> None:
        """Writes an element."""
        text = json.dumps(prediction.to_dict(), indent=2, ensure_ascii=False).replace("\n", "\n  ")
        self.stream.write(f"{',' if self.num_rows else '['}\n  {text}")

    def end(self) -> None:
        """Closes the array."""
        self.stream.write("\n]\n" if self.num_rows else "[]\n")


class ParquetWriter(AnswerWriter):
    """The columns of the CSV file, in row groups; labels are a list."""

    def __init__(self, out: Path | TextIO, **options: Any):
        if not isinstance(out, Path):
            raise ConfigError("Cannot print Parquet. Expected a file. Received: none. Pass --out FILE.parquet.")
        super().__init__(out, **options)
        self.rows: list[list[Any]] = []

    def open(self, partial: Path, mode: str) -> None:
        """Opens the file."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingDependencyError("pyarrow", "tables", "Parquet") from error
        kinds = {"labels": pyarrow.list_(pyarrow.string()), "is_sure": pyarrow.bool_()}
        fields = [
            (name, kinds.get(name, pyarrow.float32() if name.startswith("prob") else pyarrow.string()))
            for name in self.columns()
        ]
        self.arrow, self.schema = pyarrow, pyarrow.schema(fields)
        self.stream = pyarrow.parquet.ParquetWriter(partial, self.schema)

    def write_row(self, prediction: Prediction) -> None:
        """Keeps a row; every 10,000 are written."""
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        labels = [list(prediction.labels or ())] if self.has_labels else []
        name = str(prediction.path).encode("utf-8", "replace").decode()
        sure = [bool(prediction.is_sure)] if self.has_threshold else []
        self.rows.append([name, *sure, *labels, *(value for pair in pairs for value in pair)])
        if len(self.rows) == _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.schema)
        arrays = [self.arrow.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        self.stream.write_table(self.arrow.table(arrays, schema=self.schema))
        self.rows = []

    def end(self) -> None:
        """Writes the rows that are left."""
        self._flush()


WRITERS: dict[str, type[AnswerWriter]] = {
    "csv": CsvWriter,
    "json": JsonWriter,
    "jsonl": JsonLinesWriter,
    "parquet": ParquetWriter,
}
