"""What an export says of itself: classes, preprocessing, calibration, precision, and how well it agrees."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitreous.errors import ConfigError, ExportError, MissingPathError
from vitreous.spec import InputSpec, Record, check, check_minimum, check_types

Format = Literal["onnx", "openvino", "litert", "saved_model", "torch"]
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]

KEY = "vitreous"
"""Name of the metadata inside ONNX and OpenVINO files."""

_MAX_BYTES = 2**26  # of metadata, or of an OpenVINO .xml, whose weights lie elsewhere

FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": (".onnx", ("fp32", "fp16", "int8")),
    "openvino": (".xml", ("fp32", "fp16", "bf16", "int8")),
    "litert": (".tflite", ("fp32", "fp16")),
    "saved_model": ("", ("fp32",)),
    "torch": (".pt2", ("fp32",)),
}
"""The suffix of each format (a folder has none), and the precisions it is written in."""


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """The metadata of an export.

    Args:
        format: `"onnx"`, `"openvino"`, `"litert"`, `"saved_model"` or `"torch"`.
        precision: `"fp32"`, `"fp16"`, `"bf16"` or `"int8"`.
        class_names: In the order of the logits.
        input: How an image becomes what the model takes; the normalisation happens inside the model.
        temperature: Logits divided by it give the probabilities; it has happened inside the model.
        is_multi_label: Whether probabilities are a sigmoid's, of each label on its own.
        batch_size: Images in a batch; None for any number.
        inference_precision: What OpenVINO is told to compute in: `"f32"` or `"bf16"`; empty for other formats.
        parity: What the comparison with the Keras model gave.
        run: Name of the run that was exported.
        versions: Of vitreous and of what wrote the file.
    """

    format: Format
    precision: ExportPrecision
    class_names: tuple[str, ...]
    input: InputSpec
    temperature: float = 1.0
    is_multi_label: bool = False
    batch_size: int | None = None
    inference_precision: str = ""
    parity: dict[str, Any] = None  # type: ignore[assignment]  # known only once the file is written
    run: str = ""
    versions: dict[str, Any] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_minimum(1, batch_size=1 if self.batch_size is None else self.batch_size)
        check(
            0 < self.temperature < math.inf,
            "Cannot use temperature.",
            "a positive number",
            f"temperature={self.temperature}",
            "Pass 1.0 for probabilities as they are.",
        )
        check(bool(self.class_names), "Cannot use class_names.", "one or more", "none", "Name the classes.")

    def to_json(self) -> str:
        """Returns the record as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)


def metadata_path(path: Path) -> Path:
    """Returns the JSON file beside an export that holds its metadata: inside the folder of a SavedModel."""
    is_file = any(suffix and path.suffix == suffix for suffix, _ in FORMATS.values())  # a folder may have dots too
    return path.with_suffix(".json") if is_file else path / "vitreous.json"


def check_precision(format: str, precision: str) -> None:
    """Raises `ConfigError` unless the format is written in that precision."""
    check_types(ExportRecord, {"format": format, "precision": precision})
    possible = FORMATS[format][1]
    if precision not in possible:
        raise ConfigError(
            f"Cannot export to {format} in {precision}. Expected one of {', '.join(possible)}. "
            f"Received: precision={precision!r}. Pass one of these, or another format."
        )


def check_suffix(format: str, out: str | Path | None) -> None:
    """Raises `ConfigError` unless the format is written to such a path."""
    suffix = FORMATS[format][0]
    if out is not None and Path(out).suffix != suffix:
        expected = f"a path that ends in {suffix}" if suffix else "the path of a folder, without a suffix"
        raise ConfigError(
            f"Cannot export to {out}. Expected {expected}, for format={format!r}. Received: out={str(out)!r}. "
            "Pass another --out, or another --format."
        )


def find_format(path: Path) -> str | None:
    """Returns the format of an export by its name; None for anything else, such as a run folder."""
    if (path / "saved_model.pb").is_file():
        return "saved_model"
    return next((name for name, (suffix, _) in FORMATS.items() if suffix and path.suffix == suffix), None)


def read_record(path: str | Path) -> ExportRecord:
    """Reads the metadata of an export, without loading it.

    Args:
        path: The `.onnx`, `.xml`, `.tflite` or `.pt2` file, or the folder of a SavedModel.

    Raises:
        MissingPathError: If there is no such file.
        ExportError: If it is no export of vitreous.
        MissingDependencyError: If the package that reads an `.onnx` is not installed.
    """
    path = Path(path)
    what = f"Cannot read the export {path}."
    if not path.exists():
        raise MissingPathError(
            f"{what} Expected a file that `vitreous export` wrote. Received: no such file. Check the path."
        )
    text = None
    match find_format(path):
        case "onnx":
            text = _onnx_metadata(path)
        case "openvino":
            text = _openvino_metadata(path)
        case "litert" | "saved_model" | "torch":
            beside = metadata_path(path)
            text = _read_text(beside, path) if beside.is_file() else None
    return parse_record(text, path)


def parse_record(text: str | None, path: Path) -> ExportRecord:
    """Returns the metadata from its JSON, or raises `ExportError`; `path` names the file in errors."""
    what = f"Cannot read the export {path}. Expected a file that `vitreous export` wrote, with its metadata."
    if text is None:
        raise ExportError(f"{what} Received: none in it, or beside it. Export the run again.")
    try:
        record = ExportRecord.from_dict(json.loads(text))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise ExportError(f"{what} Received: metadata that do not fit ({reason}). Export the run again.") from error
    if record.format != find_format(path):  # two exports of one name may share a .json
        raise ExportError(f"{what} Received: the metadata of an export to {record.format}. Export the run again.")
    return record


def _read_text(beside: Path, path: Path) -> str:
    """Returns the metadata that lie beside an export, or raises `ExportError`."""
    what = f"Cannot read the export {path}. Expected its metadata in {beside}."
    if (size := beside.stat().st_size) > _MAX_BYTES:
        raise ExportError(f"{what} Received: {size:,} bytes, more than {_MAX_BYTES:,}. Export the run again.")
    try:
        return beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{what} Received: {error}. Export the run again.") from error


def _onnx_metadata(path: Path) -> str | None:
    from vitreous.export.graph import import_onnx

    try:
        model = import_onnx().load(path, load_external_data=False)
    except Exception as error:  # protobuf raises what it likes
        raise ExportError(
            f"Cannot read the export {path}. Expected a whole ONNX file. Received: {error}. Export the run again."
        ) from error
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)


def _openvino_metadata(path: Path) -> str | None:
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ExportError(
            f"Cannot read the export {path}. Expected an OpenVINO .xml of at most {_MAX_BYTES:,} bytes; weights lie in "
            f"the .bin. Received: {size:,} bytes. Export the run again."
        )
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ExportError(
            f"Cannot read the export {path}. Expected a whole OpenVINO file. Received: {error}. Export the run again."
        ) from error
    entry = root.find(f"./rt_info/{KEY}")
    return None if entry is None else entry.get("value")
