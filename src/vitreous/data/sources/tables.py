"""Tables of images: CSV, TSV, JSON lines, and Parquet with paths or with the images themselves."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data.images import HEAD_BYTES, check_image_header, is_plain_header
from vitreous.data.sources.cache import cached_file
from vitreous.data.sources.columns import Rows, find_image_column, hint_groups, is_image_path
from vitreous.data.sources.contents import shorten, source_error
from vitreous.data.sources.labels import to_text
from vitreous.data.sources.remote import RemoteStore, is_remote
from vitreous.data.stores import FolderStore, Store
from vitreous.errors import ImageError, MissingDependencyError
from vitreous.spec import DataConfig

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of the files that are tables."""

_MEMORY_BYTES = 1 << 30  # images in a Parquet file up to here are kept in memory; more go into a file that is mapped


def read_table(path: Path, config: DataConfig, *, root: str | Path | None = None, source: str | None = None) -> Rows:
    """Reads a table of images.

    Args:
        path: The file, with one of `TABLE_SUFFIXES`.
        config: Which column is what. `image_column` is found by its name or by its values if it is None.
        root: Folder that paths count from. Default: the table's own.
        source: What to call the table in errors. Default: its path.

    Raises:
        DataError: If the file is no such table, or nobody can tell which column holds the images.
        MissingDependencyError: If a Parquet file is to be read without pyarrow.
    """
    what = f"the table {source or path}"
    columns = _READERS[path.suffix.lower()](path, what)
    notes: list[str] = []
    column = find_image_column(what, config.image_column, columns, notes)
    values = columns.pop(column)
    root = path.parent if root is None else root
    others = {name: list(each) for name, each in columns.items() if not isinstance(each, ArrowImages)}
    if dropped := [name for name in columns if name not in others]:
        notes.append(f"columns of bytes that are not used: {shorten(dropped)}")
    store: Store
    sizes: np.ndarray | None = None
    if isinstance(values, ArrowImages):
        values.root = str(root)
        names, store, sizes = values.names(path.stem), values, values.sizes()
    else:
        texts = [to_text(value) for value in values]
        if missing := sum(text is None for text in texts):
            notes.append(f"{missing} rows without an image are left out")
            keep = [row for row, text in enumerate(texts) if text is not None]
            others = {name: [each[row] for row in keep] for name, each in others.items()}
        names = [text for text in texts if text is not None]
        is_far = is_remote(str(root)) or any(map(is_remote, names))
        if not names:
            raise source_error(what, "images", f"an empty column {column!r}", "Fill it, or name another one.")
        store = RemoteStore(root) if is_far else FolderStore(root)
        if is_far:
            notes.append("remote images are fetched in training; a broken one is found when it is read")
        sizes = np.array([0 if is_far else _size(os.path.join(root, name)) for name in names])
        if (sizes < 0).all():
            raise source_error(
                what,
                f"paths of images in the column {column!r}",
                f"{len(names)} paths to no file, such as {names[0]!r}",
                f"Paths count from {root}: mend them, or name another column with image_column (--image-column).",
            )
    return Rows(
        what=what,
        name=path.stem,
        names=names,
        store=store,
        columns=others,
        file_sizes=sizes,
        remedy=f"Paths count from {root}. Mend them, or leave out these rows.",
        notes=notes + hint_groups(others, config),
    )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _read_delimited(path: Path, what: str) -> dict[str, Sequence[Any]]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise source_error(
                        what,
                        f"{len(header)} values in every row, as in the first line",
                        f"{len(row)} in line {reader.line_num}",
                        "Mend that line; put quotes around a value that holds the delimiter.",
                    )
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise source_error(what, "text in UTF-8, with a delimiter", str(error), "Save it as CSV in UTF-8.") from error
    _check_header(what, header, len(rows))
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def _check_header(what: str, header: list[str], num_rows: int) -> None:
    if not num_rows:
        raise source_error(what, "a line of column names, and rows below it", f"{num_rows} rows", "Add rows.")
    if any(map(is_image_path, header)):
        raise source_error(
            what,
            "a first line with the names of the columns",
            f"first line={header}",
            "Add a line such as image,label.",
        )
    if len(set(header)) < len(header) or "" in header:
        raise source_error(what, "a name of its own for every column", f"columns={header}", "Rename the columns.")


def _read_json_lines(path: Path, what: str) -> dict[str, Sequence[Any]]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise source_error(
                    what, "a JSON object in every line", f"line {number}: {error}", "Mend it."
                ) from error
            if not isinstance(row, dict):
                raise source_error(what, "a JSON object in every line", f"line {number}: {row!r:.60}", "Mend it.")
            if row:
                rows.append(row)
    if not rows:
        raise source_error(what, "a JSON object in every line", "no rows", "Add rows.")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def import_pyarrow(purpose: str) -> Any:
    """Returns pyarrow.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "tables", purpose) from error
    return pyarrow


def _read_parquet(path: Path, what: str) -> dict[str, Any]:
    arrow = import_pyarrow(f"The table {path}")
    try:
        file = arrow.parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise source_error(what, "a Parquet file", str(error).splitlines()[0], "Write it anew.") from error
    schema = file.schema_arrow
    has_bytes = [field.name for field in schema if _holds_bytes(arrow, field.type)]
    num_bytes = sum(
        column.total_uncompressed_size
        for i in range(file.metadata.num_row_groups)
        for column in map(file.metadata.row_group(i).column, range(file.metadata.num_columns))
        if column.path_in_schema.split(".")[0] in has_bytes
    )
    if not file.metadata.num_rows:
        raise source_error(what, "rows", "0 rows", "Add rows.")
    table = _map_parquet(arrow, path, file) if num_bytes > _MEMORY_BYTES else file.read()
    return {
        name: ArrowImages(table.column(name)) if name in has_bytes else table.column(name).to_pylist()
        for name in table.column_names
    }


def _holds_bytes(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def _map_parquet(arrow: Any, path: Path, file: Any) -> Any:
    """Returns the table of a Parquet file from a copy whose rows can be read at random without being in memory."""

    def write(target: Path) -> None:
        with arrow.OSFile(str(target), "wb") as sink, arrow.ipc.new_file(sink, file.schema_arrow) as writer:
            for batch in file.iter_batches(batch_size=256):
                writer.write_batch(batch)

    copy = cached_file(path, ".arrow", write)
    return arrow.ipc.open_file(arrow.memory_map(str(copy))).read_all()


class ArrowImages:
    """The images in a column of an Arrow table, as a store: bytes, or records of `bytes` and `path`.

    Args:
        column: pyarrow.ChunkedArray.
        root: Folder that paths count from.
    """

    is_bytes = True

    def __init__(self, column: Any, root: str = ""):
        import pyarrow

        self.root = root
        is_record = pyarrow.types.is_struct(column.type)
        self._bytes, self._paths = column, None
        if is_record:
            parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
            self._bytes, self._paths = parts["bytes"], parts.get("path")

    def __len__(self) -> int:
        return len(self._bytes)

    def names(self, stem: str) -> list[str]:
        """Returns a name for each image: its path where every image has another one, else the row's number."""
        return names_of_paths(self.paths(), stem, len(self))

    def paths(self) -> list[str | None]:
        """Returns the path beside each image; nothing where the column has none."""
        return self._paths.to_pylist() if self._paths is not None else []

    def sizes(self) -> np.ndarray:
        """Returns the bytes of each image; 0 where it has none."""
        import pyarrow.compute

        return pyarrow.compute.fill_null(pyarrow.compute.binary_length(self._bytes), 0).to_numpy()

    def _cell(self, row: int) -> tuple[Any, Any]:
        """Returns the bytes and the path of one image, as Arrow has them; None for what is not there."""
        data, path = self._bytes[row], self._paths[row] if self._paths is not None else None
        return data if data.is_valid else None, path if path is not None and path.is_valid else None

    def path(self, row: int, name: str) -> Path | None:
        """Returns the file of an image that is not in the table itself."""
        data, path = self._cell(row)
        return None if data is not None or path is None else Path(os.path.join(self.root, path.as_py()))

    def read(self, row: int, name: str) -> bytes | Path:
        """Returns the bytes of an image, or its file."""
        data, path = self._cell(row)
        if data is not None:
            return data.as_py()
        if path is None:
            raise ImageError(name, "no bytes in this row")
        return Path(os.path.join(self.root, path.as_py()))

    def check(self, row: int, name: str) -> str | None:
        """Returns what is wrong with the first bytes of an image, or None."""
        data, _ = self._cell(row)
        if data is None:
            return check_image_header(self.read(row, name))
        buffer = data.as_buffer()
        if is_plain_header(buffer.slice(0, min(HEAD_BYTES, buffer.size)).to_pybytes()):
            return None
        return check_image_header(buffer.to_pybytes())


def names_of_paths(paths: Sequence[str | None], stem: str, count: int) -> list[str]:
    """Returns names for `count` images: the paths if there is another one for each, else `STEM/ROW`."""
    known = [path for path in paths if path]
    if len(set(known)) == count:
        return known
    return [f"{stem}/{row}" for row in range(count)]


_READERS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
