"""Files of named tensors, read one tensor at a time and written whole or not at all: safetensors, npz, PyTorch.

Nothing here runs code from a file: pickles are refused in .npz, and PyTorch files are read by torch's weights-only
reader, or not at all. Every size that a file declares is checked against the bytes that are there before memory is
taken for it.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitreous.errors import MissingPathError, WeightsError
from vitreous.files import replacing

MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
MAX_AXES = 8

# safetensors' names of types; bfloat16 is read as uint16 and widened
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}


class Entry(NamedTuple):
    """One tensor of a file: its shape, its type as the file calls it, and how to get its values, as float32 unless it
    was asked for otherwise.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Returns float32 from the 16 bits of bfloat16 values."""
    return (bits.astype("uint32") << 16).view("float32")


def _refuse(path: Path, expected: str, received: str, remedy: str) -> WeightsError:
    return WeightsError(f"Cannot read {path}. Expected {expected}. Received: {received}. {remedy}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def read_safetensors(path: Path, *, is_exact: bool = False) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file; values are read from disk when asked for.

    Args:
        path: The file.
        is_exact: Whether values keep their type (bfloat16: as the 16 bits), instead of becoming float32.

    Raises:
        WeightsError: If the file is damaged, too short, or its header is not what the format allows.

    Source: https://github.com/huggingface/safetensors#format.
    """
    remedy, whole = "Download it again.", "a whole safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _refuse(path, whole, f"a header of {length} bytes in a file of {size}", remedy)
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            entries = {}
            for name, item in header.items():
                dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
                if dtype not in DTYPES:
                    raise _refuse(path, f"types {', '.join(DTYPES)}", f"{name} of type {dtype}", "Convert it first.")
                if not all(isinstance(x, int) and x >= 0 for x in (*shape, begin, end)) or len(shape) > MAX_AXES:
                    raise ValueError(f"{name} has shape {shape} at {begin, end}")
                if end > size - 8 - length or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                    raise ValueError(f"{name} of shape {shape} and type {dtype} lies at bytes {begin} to {end}")
                entries[name] = Entry(shape, dtype, _safetensor(path, dtype, shape, 8 + length + begin, is_exact))
        except WeightsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refuse(path, whole, f"a header that does not fit the format ({error})", remedy) from error
    return entries


def _safetensor(
    path: Path, dtype: str, shape: tuple[int, ...], offset: int, is_exact: bool
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = np.fromfile(path, DTYPES[dtype], math.prod(shape), offset=offset).reshape(shape)
        if is_exact:
            return values
        return widen_bfloat16(values) if dtype == "BF16" else values.astype("float32", copy=False)

    return read


def read_npz(path: Path) -> dict[str, Entry]:
    """Returns the arrays of an .npz file; values are read from disk when asked for. Pickled ones are refused.

    Raises:
        WeightsError: If the file is damaged, or holds Python objects.
    """
    entries = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    raise ValueError(f"{info.filename!r} beside the arrays")
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    reader = np.lib.format.read_array_header_1_0
                    shape, _, dtype = (reader if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
                    if dtype.hasobject:
                        raise _refuse(
                            path,
                            "an .npz file of plain numbers",
                            f"{name} holds pickled Python objects, which can run code",
                            "Save it again with plain arrays.",
                        )
                    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                        raise ValueError(f"{name} of shape {shape} and {info.file_size} bytes")
                kind = "BF16" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.name
                if kind != "BF16" and dtype.kind not in "fiub":
                    raise ValueError(f"{name} of type {dtype}")
                entries[name] = Entry(tuple(shape), kind, _npz_array(path, info.filename, kind))
    except WeightsError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
        raise _refuse(
            path, "a whole .npz file of arrays", str(error) or type(error).__name__, "Get it again."
        ) from error
    return entries


def _npz_array(path: Path, member: str, kind: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise _refuse(path, "a whole .npz file of arrays", f"{member}: {error}", "Get it again.") from error
        return widen_bfloat16(values.view("<u2")) if kind == "BF16" else values.astype("float32", copy=False)

    return read


def read_torch(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a PyTorch file (.pth, .bin), read by torch without running code from it.

    Raises:
        WeightsError: If torch is not installed, or the file holds more than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise _refuse(
            path,
            "safetensors, or the package torch, which can read this file without running code from it",
            "a pickled file, and torch is not installed",
            "Get the file as safetensors, or: pip install 'vitreous[torch]'",
        ) from error
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old format cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zip and its own checks raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise _refuse(
            path, "a PyTorch file of tensors and nothing else", reason, "Get the file as safetensors."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(x, torch.Tensor) for x in loaded.values()):
        raise _refuse(path, "a PyTorch file of named tensors", f"a {type(loaded).__name__}", "Save its state_dict.")

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        return lambda: tensor.detach().to(torch.float32).numpy()

    return {
        str(name): Entry(tuple(x.shape), str(x.dtype).removeprefix("torch."), reader(x)) for name, x in loaded.items()
    }


def read_index(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a model in several files, from its `*.index.json`.

    Raises:
        WeightsError: If the index is damaged, names a file outside its folder, or a file lacks a tensor.
        MissingPathError: If a file is not there.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(Path(name).name != name or name.startswith(".") for name in files):
            raise ValueError(f"files {files}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(
            path, "an index with a weight_map to files beside it", str(error), "Download it again."
        ) from error
    parts = {name: read_tensors(path.parent / name) for name in files}
    for tensor, name in weight_map.items():
        if tensor not in parts[name]:
            raise _refuse(path, f"{tensor} in {name}", f"{name} without it", "Download both again.")
    if strays := [f"{tensor} in {name}" for name in files for tensor in parts[name] if weight_map.get(tensor) != name]:
        raise _refuse(
            path, "every tensor of the files in the weight_map", ", ".join(strays[:5]), "Download them again."
        )
    return {tensor: parts[name][tensor] for tensor, name in weight_map.items()}


READERS = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
    ".index.json": read_index,
}


def read_tensors(path: Path) -> dict[str, Entry]:
    """Returns {name: entry} of a file of tensors, by the file's suffix.

    Raises:
        MissingPathError: If there is no such file.
        WeightsError: If it cannot be read, or its suffix is unknown.
    """
    if not path.is_file():
        raise MissingPathError(
            f"Cannot read weights. Expected a file. Received: path={str(path)!r}, which does not exist. Check the path."
        )
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader(path)
    raise _refuse(
        path, f"a name that ends in {', '.join(READERS)}", f"name={path.name!r}", "Rename or convert the file."
    )


# What is written: each tensor's name and shape, known before, and a function that makes its values when they are due.
Outgoing = Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]


def _ready(name: str, shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    if values.shape != shape:
        raise WeightsError(
            f"Cannot write {name}. Expected shape {shape}. Received: shape={values.shape}. Report this as a bug."
        )
    return np.ascontiguousarray(values, "<f4").reshape(shape)


def write_safetensors(path: Path, tensors: Outgoing) -> None:
    """Writes float32 tensors to a safetensors file, one at a time."""
    names, offset = sorted(tensors), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    for name in names:
        shape = tensors[name][0]
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_ready(name, tensors[name][0], tensors[name][1]()).data)


def write_npz(path: Path, tensors: Outgoing) -> None:
    """Writes float32 arrays to an uncompressed .npz file, one at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, get) in tensors.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _ready(name, shape, get()), allow_pickle=False)


def differing(path: Path, tensors: Outgoing) -> Iterator[str]:
    """Yields the names whose values in a file are not, bit for bit, those that were to be written."""
    there = read_tensors(path)
    yield from sorted(set(there) ^ set(tensors))
    for name in set(there) & set(tensors):
        shape, get = tensors[name]
        if there[name].shape != shape or there[name].read().tobytes() != _ready(name, shape, get()).tobytes():
            yield name
