"""From a model to the files of another library, read back and compared before it counts as written."""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.errors import ConfigError, WeightsError
from vitreous.files import replacing
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights import google, huggingface, mapping, timm
from vitreous.weights.load import (
    EXTRAS_MEMBER,
    FORMATS,
    LABELS,
    MEMBER,
    ImportReport,
    import_weights,
    to_float32,
    variables,
)
from vitreous.weights.mapping import Origin
from vitreous.weights.sources import read_json
from vitreous.weights.tensors import differing, write_npz, write_safetensors

if TYPE_CHECKING:
    from vitreous.model import VisionTransformer


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Args:
        format: `"timm"`, `"hf"`, `"npz"` or `"keras"`.
        paths: The files, that of the weights first.
        num_tensors: Tensors in it, each read back and equal.
        num_parameters: Numbers in them.
        notes: Where the format cannot say what the model does, in words.
    """

    format: str
    paths: tuple[Path, ...]
    num_tensors: int
    num_parameters: int
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Returns the report in a few lines."""
        lines = [
            f"Wrote {self.paths[0]} ({LABELS[self.format]}).",
            f"  {self.num_tensors} tensors, {self.num_parameters:,} numbers, read back and equal",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion read and wrote.

    Args:
        imported: The import.
        exported: The export.
    """

    imported: ImportReport
    exported: ExportReport

    def summary(self) -> str:
        """Returns the report in a few lines."""
        return f"{self.imported.summary()}\n{self.exported.summary()}"


def export_weights(
    model: "VisionTransformer",
    destination: str | Path,
    *,
    format: str | None = None,
    input_spec: InputSpec | None = None,
    class_names: Sequence[str] = (),
) -> ExportReport:
    """Writes a model's weights for another library, reads them back and compares.

    A model that was imported from the same format gets the file that it came from, if its weights are unchanged: the
    same names, and the tensors that no prediction reads.

    Args:
        model: The model.
        destination: A folder for timm and Hugging Face (config.json beside model.safetensors), or one .safetensors
            file; an .npz file; a .keras file.
        format: `"timm"`, `"hf"`, `"npz"` or `"keras"`. Default: by the suffix, .npz or .keras.
        input_spec: What images must go through; written where the format has a place. Default: mean and std of 0.5.
        class_names: Names of the classes, in the order of the logits. Default: those of the import, if there were.

    Returns:
        An `ExportReport`.

    Raises:
        WeightsError: If the format has no place for a part of the model, or what was written differs.
        ConfigError: If the format is unknown, the destination's suffix belongs to another, or what lies there would be
            lost or mixed with other files: a folder must be empty or hold an export to the same format.
    """
    destination = Path(destination)
    format = _format(format, destination)
    _check_free(format, destination)
    config, origin = model.config, getattr(model, "origin", None)
    names = tuple(class_names) or (origin.class_names if origin else ())
    if names and len(names) != config.num_classes:
        raise ConfigError(
            f"Cannot export {model.name}. Expected {config.num_classes} class names. Received: {len(names)} of them. "
            "Pass one for each output."
        )
    notes: list[str] = []
    if input_spec is None:
        input_spec = InputSpec(
            image_size=config.image_size,
            num_channels=config.num_channels,
            mean=(0.5,) * config.num_channels,
            std=(0.5,) * config.num_channels,
        )
        if format != "npz":
            notes.append("no input_spec was passed: mean and std of 0.5 are written")
    if format == "keras":
        return _export_keras(model, destination, input_spec, names, origin, notes)
    if config.stem != "none":
        raise WeightsError(
            f"Cannot write {LABELS[format]} files. Expected stem='none'. Received: stem={config.stem!r}. "
            "Export to .keras."
        )
    module = FORMATS[format]
    same = origin if origin is not None and origin.format == format and origin.style else None
    style = dict(same.style) if same else module.default_style(config)
    extras = dict(same.extras) if same else {}
    reasons = {"timm": lambda: timm.unexpressed(config, style), "npz": lambda: google.unexpressed(config)}
    if format in reasons and (found := reasons[format]()):
        raise WeightsError(
            f"Cannot write {LABELS[format]} files. Expected an architecture of that library. Received: "
            f"{'; '.join(found)}. Export to .keras."
        )
    if format == "hf":
        model_type = huggingface.model_type_of(config)
        mask = f"{style['prefix']}embeddings.mask_token"
        if model_type.startswith("dinov2") and mask not in extras:
            extras[mask] = np.zeros((1, config.projection_dim), "float32")
            notes.append("mask_token is written as zeros: the model has none")
    own = variables(model)
    arrays, expressed = module.express({path: _getter(v) for path, v in own.items()}, config)
    rules = mapping.expand(module.write_rules(style, expressed), expressed.num_blocks)
    outgoing = mapping.plan(rules, arrays, expressed, what=f"{LABELS[format]} files", extras=extras)
    if format == "npz":
        outgoing = google.stack(outgoing, style, expressed.num_blocks)
        notes += _npz_notes(config)
    path, documents = _documents(format, destination, expressed, input_spec, names, style, notes, model.name)
    (write_npz if format == "npz" else write_safetensors)(path, outgoing)
    if wrong := list(differing(path, outgoing)):
        raise WeightsError(
            f"Cannot write {path}. Expected the model's numbers when read back. Received: {len(wrong)} tensors that "
            f"differ, such as {wrong[0]}. Check the disk, and write it again."
        )
    for name, values in documents.items():
        text = json.dumps(values, indent=2) + "\n"
        with replacing(path.with_name(name)) as partial:
            partial.write_text(text, encoding="utf-8")
    paths = (path, *(path.with_name(name) for name in documents))
    return ExportReport(format, paths, len(outgoing), mapping.count_values(outgoing), tuple(notes))


def _format(format: str | None, destination: Path) -> str:
    by_suffix = {".npz": "npz", ".keras": "keras"}.get(destination.suffix)
    format = format or by_suffix
    if format not in LABELS:
        raise ConfigError(
            f"Cannot export to {destination}. Expected a format of {', '.join(LABELS)}. Received: format={format!r}. "
            "Pass one of them."
        )
    suffixes = {"npz": (".npz",), "keras": (".keras",)}.get(format, ("", ".safetensors"))
    known = (".npz", ".keras", ".safetensors", ".pth", ".bin", ".pt")
    suffix = destination.suffix if destination.suffix in known else ""
    if suffix not in suffixes:
        wanted = " or ".join(suffix or "a folder" for suffix in suffixes)
        raise ConfigError(
            f"Cannot export to {destination}. Expected {wanted} for format={format!r}. Received: "
            f"destination={str(destination)!r}. Change one of the two."
        )
    return format


_FILES = {
    "timm": ("model.safetensors", "config.json"),
    "hf": ("model.safetensors", "config.json", "preprocessor_config.json"),
}
_WEIGHT_SUFFIXES = (".safetensors", ".npz", ".keras", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".index.json")


def _check_free(format: str, destination: Path) -> None:
    """Checks that files can be written at a destination and that nothing else lies there.

    Raises:
        ConfigError: If not.
    """
    what, remedy = f"Cannot export to {destination}.", "Pass another destination."
    is_folder = format in _FILES and destination.suffix != ".safetensors"
    parent = destination if is_folder else destination.parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{what} Expected a folder to write in. Received: {parent}, which is a file. {remedy}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} Expected a folder to write in. Received: {parent}, which is read-only. {remedy}")
    if not is_folder:
        if destination.is_dir():
            raise ConfigError(f"{what} Expected the name of a file. Received: the name of a folder. {remedy}")
        beside = destination.with_name(f"{destination.stem}.json")
        if format != "keras" and os.path.lexists(beside) and not _is_export(format, beside, is_folder):
            raise ConfigError(
                f"{what} Expected {beside.name} beside it to be free, or of an earlier export. Received: {beside}, "
                "which is neither. Pass another name, or move that file away."
            )
        return
    there = sorted(x.name for x in destination.iterdir() if not x.name.startswith(".")) if parent == destination else []
    if there and _is_export(format, destination / "config.json", is_folder):
        names = ("config.json", "preprocessor_config.json")  # notes and pictures beside an export may stay
        there = [x for x in there if x not in _FILES[format] and (x in names or x.endswith(_WEIGHT_SUFFIXES))]
    if there:
        more = f" and {len(there) - 3} more" if there[3:] else ""
        raise ConfigError(
            f"{what} Expected a folder that is new, empty, or of an earlier export to {LABELS[format]}. Received: one "
            f"with {', '.join(there[:3])}{more}. Pass another folder, or empty this one."
        )


def _is_export(format: str, path: Path, is_folder: bool) -> bool:
    """Returns whether a JSON file is what an export to this format writes."""
    try:
        values = read_json(path)
    except WeightsError:
        return False
    if format == "hf":
        return "model_type" in values
    return "vitreous" in values or (is_folder and "architecture" in values)


def _getter(variable: Any) -> Any:
    return lambda: to_float32(variable)


def _npz_notes(config: ViTConfig) -> list[str]:
    if config.activation != "gelu" or abs(config.epsilon - 1e-6) > 1e-9:
        return [f"an .npz cannot say activation={config.activation!r} and epsilon={config.epsilon:g}; its .json does"]
    return []


def _documents(
    format: str,
    destination: Path,
    config: ViTConfig,
    input_spec: InputSpec,
    class_names: tuple[str, ...],
    style: dict[str, Any],
    notes: list[str],
    name: str,
) -> tuple[Path, dict[str, Any]]:
    """Returns the path of the weights, and {name: values} of the JSON files beside them."""
    own = {"config": config.to_dict(), "input": input_spec.to_dict(), "name": name, "class_names": list(class_names)}
    if format == "npz":
        return destination, {f"{destination.stem}.json": {"vitreous": own}}
    is_file = destination.suffix == ".safetensors"
    path = destination if is_file else destination / "model.safetensors"
    if format == "timm":
        values, more = timm.write_config(config, input_spec, class_names, style)
        documents = {f"{path.stem}.json" if is_file else "config.json": {**values, "vitreous": own}}
    else:
        values, more = huggingface.write_config(config, class_names, style)
        preprocessor, others = huggingface.write_preprocessor(input_spec)
        documents = {f"{path.stem}.json" if is_file else "config.json": values}
        more = [*more, *others]
        if not is_file:
            documents["preprocessor_config.json"] = preprocessor
    notes += more
    return path, documents


def _export_keras(
    model: "VisionTransformer",
    path: Path,
    input_spec: InputSpec,
    class_names: tuple[str, ...],
    origin: Origin | None,
    notes: list[str],
) -> ExportReport:
    about: dict[str, Any] = {"input": input_spec.to_dict(), "class_names": list(class_names)}
    if origin is not None:
        about["origin"] = {"source": origin.source, "format": origin.format, "style": dict(origin.style)}

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:  # of the same suffix, which Keras looks at
        model.save(partial)
        with zipfile.ZipFile(partial, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MEMBER, json.dumps(about))
            if origin is not None and origin.extras:
                buffer = io.BytesIO()
                np.savez(buffer, **origin.extras)  # type: ignore[arg-type]
                archive.writestr(EXTRAS_MEMBER, buffer.getvalue())
    back, own = variables(import_weights(path, dtype=model.dtype_policy).model), variables(model)
    wrong = sorted(back.keys() ^ own.keys())
    wrong += [
        name for name in back.keys() & own.keys() if not np.array_equal(to_float32(back[name]), to_float32(own[name]))
    ]
    if wrong:
        raise WeightsError(
            f"Cannot write {path}. Expected the model's numbers when read back. Received: {len(wrong)} variables that "
            f"differ, such as {wrong[0]}. Check the disk, and write it again."
        )
    count = sum(int(np.prod(v.shape)) for v in own.values())
    return ExportReport("keras", (path,), len(own), count, tuple(notes))


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    input_spec: InputSpec | None = None,
    **changes: Any,
) -> ConvertReport:
    """Converts weights from one format to another, in float32.

    Args:
        source: As in `import_weights`.
        destination: As in `export_weights`.
        to: `"timm"`, `"hf"`, `"npz"` or `"keras"`. Default: by the destination's suffix.
        model: As in `import_weights`.
        num_classes: As in `import_weights`.
        image_size: As in `import_weights`.
        patch_size: As in `import_weights`.
        input_spec: What images must go through. Default: what the source says.
        **changes: As in `import_weights`.

    Returns:
        A `ConvertReport`; its `summary()` is what `vitreous convert` prints.

    Raises:
        WeightsError: If a tensor does not fit, or the format has no place for a part of the model.
        ConfigError: If the destination is not free, as in `export_weights`; nothing is read then.
    """
    _check_free(_format(to, Path(destination)), Path(destination))  # a wrong destination fails before a long import
    imported = import_weights(
        source,
        model=model,
        num_classes=num_classes,
        image_size=image_size,
        patch_size=patch_size,
        dtype="float32",
        **changes,
    )
    exported = export_weights(imported.model, destination, format=to, input_spec=input_spec or imported.input_spec)
    return ConvertReport(imported, exported)
