"""Embeddings, and the files that hold them: Parquet and .npz, both written while the vectors are computed."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vitreous.data.sources.tables import import_pyarrow
from vitreous.errors import ConfigError, DataError, MissingPathError
from vitreous.files import replacing
from vitreous.text import escape_text

FORMAT = 1  # of the metadata; raised when an older vitreous could no longer read a new file
_KEY = b"vitreous"
_GROUP_BYTES = 1 << 24  # embeddings in a row group: what a reader of a few rows has to decode
_READ_ROWS = 4096

Label: TypeAlias = str | tuple[str, ...]
Write: TypeAlias = Callable[[Sequence[str], Sequence[Label] | None, Sequence[str], np.ndarray], None]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors of images.

    Args:
        names: Name of each image, as its source has it.
        vectors: float32 or float16: (N, D), or (N, P, D) with a vector for each of P patches, row by row.
        labels: Class of each image (where it may have several: a tuple); None where labels are not known.
        splits: Split of each image: train, val or test; all where the data has none.
        metadata: What made them: model, fingerprint of its weights, input, block, pooling, version, source.
    """

    names: list[str]
    vectors: np.ndarray
    labels: list[Label] | None
    splits: list[str]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)


def check_suffix(path: str | Path, verb: str = "write") -> None:
    """Raises `ConfigError` unless the file is one that embeddings are kept in: its suffix says so."""
    path = Path(path)
    if path.suffix.lower() not in (".parquet", ".npz"):
        raise ConfigError(
            f"Cannot {verb} embeddings. Expected a file name that ends in .parquet or .npz. "
            f"Received: {str(path)!r}. Pass another."
        )
    if path.suffix.lower() == ".parquet":
        import_pyarrow("A Parquet file of embeddings")  # before anything is computed


@contextmanager
def open_writer(path: str | Path, metadata: dict[str, Any], *, has_labels: bool) -> Iterator[Write]:
    """Yields a function of (names, labels, splits, vectors) that writes some rows; the file appears whole at the end.

    Args:
        path: A .parquet or .npz file.
        metadata: What `Embeddings.metadata` will be.
        has_labels: Whether there are labels.
    """
    path = Path(path)
    check_suffix(path)
    open_file = _open_parquet if path.suffix.lower() == ".parquet" else _open_npz
    with replacing(path) as temporary, open_file(temporary, metadata, has_labels) as write:
        yield write


@contextmanager
def _open_parquet(path: Path, metadata: dict[str, Any], has_labels: bool) -> Iterator[Write]:
    arrow = import_pyarrow("A Parquet file of embeddings")
    kind = arrow.from_numpy_dtype(np.dtype(metadata["dtype"]))
    for size in reversed(metadata["shape"]):
        kind = arrow.list_(kind, size)
    label_kind = arrow.list_(arrow.string()) if metadata["is_multi_label"] else arrow.string()
    fields = [("image", arrow.string()), ("label", label_kind), ("split", arrow.string()), ("embedding", kind)]
    schema = arrow.schema(
        [field for field in fields if has_labels or field[0] != "label"], metadata={_KEY: json.dumps(metadata)}
    )
    pending: list[Any] = []
    num_bytes = 0
    # Only what repeats gains from a dictionary; of numbers it would be as large as they are.
    writer = arrow.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=["split", "label"])

    def flush() -> None:
        nonlocal num_bytes
        if pending:
            table = arrow.Table.from_batches(pending, schema).combine_chunks()
            writer.write_table(table, row_group_size=table.num_rows)
            pending.clear()
            num_bytes = 0

    def write(names: Sequence[str], labels: Sequence[Label] | None, splits: Sequence[str], vectors: np.ndarray) -> None:
        nonlocal num_bytes
        values = arrow.array(np.ascontiguousarray(vectors).reshape(-1))
        for size in reversed(metadata["shape"]):
            values = arrow.FixedSizeListArray.from_arrays(values, size)
        columns = [arrow.array(map(_to_text, names), arrow.string()), arrow.array(splits, arrow.string()), values]
        if labels is not None:
            texts = [_to_text(each) if isinstance(each, str) else [*map(_to_text, each)] for each in labels]
            columns.insert(1, arrow.array(texts, label_kind))
        pending.append(arrow.record_batch(columns, schema=schema))
        num_bytes += vectors.nbytes
        if num_bytes >= _GROUP_BYTES:
            flush()

    with writer:
        yield write
        flush()


@contextmanager
def _open_npz(path: Path, metadata: dict[str, Any], has_labels: bool) -> Iterator[Write]:
    """Vectors go into a file of their own first: an array's header says how many rows follow."""
    raw = path.with_suffix(".raw")
    names: list[str] = []
    labels: list[str] = []
    splits: list[str] = []

    def write(
        some_names: Sequence[str], some_labels: Sequence[Label] | None, some_splits: Sequence[str], vectors: np.ndarray
    ) -> None:
        names.extend(map(_to_text, some_names))
        labels.extend(each if isinstance(each, str) else json.dumps(each) for each in some_labels or ())
        splits.extend(some_splits)
        file.write(np.ascontiguousarray(vectors).data)

    try:
        with raw.open("wb") as file:
            yield write
        arrays = {"image": names, "split": splits, "metadata": json.dumps(metadata)}
        if has_labels:
            arrays["label"] = list(map(_to_text, labels))
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(values, dtype=str), allow_pickle=False)
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, metadata["dtype"]))
            header["shape"] = (len(names), *metadata["shape"])
            with archive.open("embedding.npy", "w", force_zip64=True) as member, raw.open("rb") as source:
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(source, member, 1 << 22)
    finally:
        raw.unlink(missing_ok=True)


def _to_text(name: str) -> str:
    """Returns a name as it is, or with stray bytes written out: Parquet holds nothing but text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return escape_text(name)
    return name


def load_embeddings(path: str | Path) -> Embeddings:
    """Reads a file of embeddings.

    Args:
        path: A .parquet or .npz file that `embed_to_file` wrote.

    Raises:
        MissingPathError: If it does not exist.
        ConfigError: If its name ends otherwise.
        DataError: If it is no such file, or is damaged.
        MissingDependencyError: If pyarrow is needed and not installed.
    """
    path = Path(path)
    what = f"Cannot load the embeddings {path}."
    if not path.is_file():
        raise MissingPathError(
            f"{what} Expected a file that exists. Received: path={str(path)!r}. Make it: vitreous embed BACKBONE DATA "
            "--out FILE.parquet"
        )
    check_suffix(path, "load")
    try:
        found = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_npz(path)
        version = found.metadata["format"]
        is_whole = len(found.vectors) == len(found.names) == len(found.splits) and found.vectors.ndim in (2, 3)
        if not is_whole or (found.labels is not None and len(found.labels) != len(found.names)):
            raise ValueError(f"{len(found.names)} names, vectors of shape {found.vectors.shape}")
    except (ValueError, OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{what} Expected a file that vitreous embed wrote. Received: one that cannot be read as such ({reason}). "
            "Make it anew: vitreous embed BACKBONE DATA --out FILE.parquet"
        ) from error
    if not isinstance(version, int) or version > FORMAT:
        raise DataError(
            f"{what} Expected format {FORMAT} or older. Received: format={version!r}, written by vitreous "
            f"{found.metadata.get('vitreous', '?')}. Install that version, or make the file anew."
        )
    return found


def _read_parquet(path: Path) -> Embeddings:
    arrow = import_pyarrow("A Parquet file of embeddings")
    try:
        with arrow.parquet.ParquetFile(path) as file:
            if _KEY not in (stored := file.schema_arrow.metadata or {}):
                raise ValueError("it has no metadata of vitreous")
            metadata = json.loads(stored[_KEY])
            vectors = np.empty((file.metadata.num_rows, *metadata["shape"]), metadata["dtype"])
            texts: dict[str, list[Any]] = {name: [] for name in ("image", "label", "split")}
            start = 0
            for batch in file.iter_batches(batch_size=_READ_ROWS):
                values = batch.column("embedding")
                for _ in metadata["shape"]:
                    values = values.flatten()
                rows = slice(start, start + batch.num_rows)
                vectors[rows] = values.to_numpy(zero_copy_only=False).reshape(-1, *metadata["shape"])
                start += batch.num_rows
                for name in texts:
                    if name in batch.schema.names:
                        texts[name] += batch.column(name).to_pylist()
            has_labels = "label" in file.schema_arrow.names
    except arrow.ArrowException as error:
        raise ValueError(str(error)) from error
    labels = [tuple(each) if isinstance(each, list) else each for each in texts["label"]] if has_labels else None
    return Embeddings(texts["image"], vectors, labels, texts["split"], metadata)


def _read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as arrays:
        metadata = json.loads(str(arrays["metadata"]))
        labels: list[Label] | None = arrays["label"].tolist() if "label" in arrays else None
        if labels is not None and metadata["is_multi_label"]:
            labels = [tuple(json.loads(str(each))) for each in labels]
        return Embeddings(arrays["image"].tolist(), arrays["embedding"], labels, arrays["split"].tolist(), metadata)
