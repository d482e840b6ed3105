"""Files of predictions, written row by row: CSV, JSON, JSON lines, Parquet. An interrupted one can be gone on with.

Rows go to `NAME.partial`, which becomes NAME when all images are done. CSV and JSON lines stay there when they are
interrupted; with `resume`, the images that have a row are not asked for again. `NAME.partial.json` says what answered
them, so that no file holds answers of two models.
"""

import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vitreous.engine import Prediction
from vitreous.errors import ConfigError, MissingDependencyError

_ROW_GROUP = 10_000


def partial_path(path: Path) -> Path:
    """Returns where the rows of an unfinished file are."""
    return path.with_name(f"{path.name}.partial")


def origin_path(path: Path) -> Path:
    """Returns where it is written what answered the rows of an unfinished file."""
    return path.with_name(f"{path.name}.partial.json")


class AnswerWriter(ABC):
    """Writes predictions; a context manager.

    Args:
        out: A file, which appears whole under its name; or a stream, which is left open.
        num_ranks: How many classes each row names.
        has_labels: Whether an image may have several labels.
        threshold: Probability from which an answer is sure; None for rows that do not say it.
        resume: Whether to go on with rows of an earlier start.
        origin: What answers, as names and values fit for JSON: an unfinished file of another origin is not gone on
            with.

    Attributes:
        done: {image: rows} that were there already.
        num_rows: Rows written by this one.
    """

    can_resume = False

    def __init__(
        self,
        out: Path | TextIO,
        *,
        num_ranks: int,
        has_labels: bool,
        threshold: float | None = None,
        resume: bool = False,
        origin: Mapping[str, Any] | None = None,
    ):
        self.path = out if isinstance(out, Path) else None
        self.num_ranks = num_ranks
        self.has_labels = has_labels
        self.threshold = threshold
        self.has_threshold = threshold is not None
        self.origin = dict(origin or {})
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
        size = 0
        if self.path is not None:
            if self.resume:
                size = self._go_on(self.path)
            self.open(partial_path(self.path), "a" if self.resume else "w")
            if self.can_resume:
                origin_path(self.path).write_text(json.dumps(self.origin), encoding="utf-8")
        if not size:
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
        elif self.can_resume and (self.num_rows or self.done):
            return
        partial.unlink(missing_ok=True)
        origin_path(self.path).unlink(missing_ok=True)

    def _go_on(self, path: Path) -> int:
        """Reads the rows that are whole, and cuts off one that is not. Returns how many bytes stay.

        Nothing is changed before all is known to fit.
        """
        partial = partial_path(path)
        source = partial if partial.exists() else path
        if not source.exists():
            return 0
        size = 0
        try:
            if source == partial:
                self._check_origin(origin_path(path))
            with source.open("rb") as file:

                def lines() -> Iterator[str]:
                    nonlocal size
                    for line in file:
                        if line.endswith(b"\n"):
                            size += len(line)
                            yield line.decode("utf-8", "surrogateescape")

                self.done = self.read(lines())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            raise ConfigError(
                f"Cannot resume {path}. Expected rows as this command writes them, of the same model, with the same "
                f"options. Received: {source}, {error}. Remove it, or leave out --resume."
            ) from error
        if source == path:
            os.replace(path, partial)
        os.truncate(partial, size)
        return size

    def _check_origin(self, path: Path) -> None:
        """Raises `ValueError` if the rows of an unfinished file come from elsewhere."""
        if not path.is_file():
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self.origin))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ValueError(f"{name}={before.get(name)!r} before, {now.get(name)!r} now")

    def check_sure(self, share: float, is_sure: bool) -> None:
        """Raises `ValueError` if a row was judged by another threshold; `share` is its highest probability.

        With several labels an image, a row does not hold what the threshold is about.
        """
        if self.threshold is None or self.has_labels:
            return
        if abs(share - self.threshold) > 1e-6 and (share > self.threshold) != is_sure:  # CSV has 6 digits
            raise ValueError(f"a row of probability {share} with is_sure={is_sure}, threshold={self.threshold}")

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

    def read(self, lines: Iterator[str]) -> Counter[str]:
        """Returns the images that have a row in an unfinished file, of which these are the whole lines.

        Raises:
            ValueError: If a row is not such as this writer writes.
        """
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

    def read(self, lines: Iterator[str]) -> Counter[str]:
        """Returns the images that have a row."""
        rows, columns = csv.reader(lines, strict=True), self.columns()
        done: Counter[str] = Counter()
        if (header := next(rows, None)) is None:
            return done
        if header != columns:
            raise ValueError(f"columns {', '.join(header)}")
        share = columns.index("probability_1")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} values")
            self.check_sure(float(row[share]), row[1] == "true")
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

    def read(self, lines: Iterator[str]) -> Counter[str]:
        """Returns the images that have a row."""
        keys = {"image", "predictions"}
        keys |= {"is_sure"} if self.has_threshold else set()
        keys |= {"labels"} if self.has_labels else set()
        done: Counter[str] = Counter()
        for line in lines:
            row = json.loads(line)
            if set(row) != keys:
                raise ValueError(f"a row of {', '.join(row)}")
            if len(row["predictions"]) != self.num_ranks:
                raise ValueError(f"a row of {len(row['predictions'])} classes")
            self.check_sure(row["predictions"][0]["probability"], row.get("is_sure", True))
            done[row["image"]] += 1
        return done

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
