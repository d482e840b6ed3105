"""From published weights to a model: what the file is, which architecture it holds, and every number in its place."""

import dataclasses
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.errors import ConfigError, UnknownNameError, WeightsError
from vitreous.patches import as_pair
from vitreous.registry import get_spec, list_models
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights import google, huggingface, mapping, timm
from vitreous.weights.mapping import Arrays, Origin, Rule
from vitreous.weights.sources import Source, describing, locate, watched
from vitreous.weights.tensors import Entry, read_tensors

if TYPE_CHECKING:
    from vitreous.model import VisionTransformer

FORMATS: dict[str, ModuleType] = {"timm": timm, "hf": huggingface, "npz": google}
LABELS = {"timm": "timm", "hf": "Hugging Face", "npz": "Google npz", "keras": "Keras"}
MEMBER, EXTRAS_MEMBER = "vitreous.json", "vitreous_extras.npz"  # what a .keras file of ours holds beside Keras's own


@dataclass(frozen=True)
class ImportReport:
    """What an import did, and its model.

    Args:
        source: What was imported, as the user named it.
        format: `"timm"`, `"hf"`, `"npz"` or `"keras"`.
        model: The model, with the weights.
        input_spec: What images must go through before they enter it.
        class_names: Names of the classes, where the source has them and the head is the source's.
        num_matched: Tensors of the source that the model reads.
        num_parameters: Numbers in the model.
        unused: {tensor: why} that the source holds and the model does not read.
        notes: What was done or assumed beyond that, in words.
    """

    source: str
    format: str
    model: "VisionTransformer"
    input_spec: InputSpec
    class_names: tuple[str, ...]
    num_matched: int
    num_parameters: int
    unused: Mapping[str, str]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Returns the report in a few lines."""
        config = self.model.config
        lines = [
            f"Imported {self.source} ({LABELS[self.format]}) as {self.model.name}.",
            f"  {self.num_matched} tensors matched, {len(self.unused)} unused, {self.num_parameters:,} parameters",
            f"  image {config.image_size[0]}x{config.image_size[1]}, patch {config.patch_size[0]}x"
            f"{config.patch_size[1]}, {config.num_blocks} blocks of width {config.projection_dim}, "
            f"{config.num_classes or 'no'} classes",
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.unused.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if names[1:] else ""
            lines.append(f"  unused: {names[0]}{more}: {why}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass
class _Reading:
    """What is known of a file before its model exists."""

    config: ViTConfig
    arrays: Arrays
    input: dict[str, Any]
    origin: Origin
    name: str
    format: str
    num_matched: int = 0
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def import_weights(
    source: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    config: ViTConfig | None = None,
    **changes: Any,
) -> ImportReport:
    """Imports weights and builds their model.

    Args:
        source: A file (.safetensors, .npz, .keras, .pth, .bin, .index.json), a folder with one, `hf:OWNER/NAME`,
            `hf:OWNER/NAME@REVISION` or `timm/NAME.TAG`. The last three come through huggingface_hub and its cache.
        model: Name of the model that the weights are of (`list_models()`). Default: what the files beside the weights
            say, or else the tensors' shapes.
        num_classes: K wanted; another number than the file's gets a fresh head, 0 none. Default: the file's.
        image_size: (H, W) wanted, in pixels, or one number; learned positions are resized. Default: the file's.
        patch_size: (P_h, P_w) wanted, in pixels, or one number; the projection is resized. Default: the file's.
        dtype: Keras dtype or policy of the model, such as `"mixed_bfloat16"`. Default: Keras's global policy.
        config: The architecture that the weights are of, instead of a name.
        **changes: Fields of `ViTConfig` that the file leaves open, such as `num_heads`, or rates for training.

    Returns:
        An `ImportReport` with the model.

    Raises:
        WeightsError: If a tensor is missing, unexpected or misshaped, or a file cannot be read or fetched.
        MissingPathError: If a path does not exist.
        MissingDependencyError: If the source is on the hub and huggingface_hub is not installed.
        UnknownNameError: If no model has that name.
        ConfigError: If the values do not fit each other.

    Example:

    ```python
    report = import_weights("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=3)
    print(report.summary())
    ```
    """
    for key in changes:
        if key not in ViTConfig.__dataclass_fields__:
            raise UnknownNameError("field of ViTConfig", key, ViTConfig.__dataclass_fields__)
    if model is not None:
        get_spec(model)  # an unknown name fails before anything is fetched
    found = locate(source)
    wanted = None if image_size is None else as_pair(image_size, "image_size")
    if found.path.suffix == ".keras":
        with describing(found, MEMBER):
            reading = _read_keras(found)
        _check_settled(found.name, reading.config, model, config, changes)
        changes = {key: value for key, value in changes.items() if key not in ("image_size", "patch_size")}
    else:
        reading = _read_foreign(found, model, num_classes, wanted, config, changes)
    old = reading.config.replace(**changes)
    target = old
    if num_classes is not None:
        target = target.replace(num_classes=num_classes)
    if patch_size is not None:
        target = target.replace(
            patch_size=as_pair(patch_size, "patch_size"), patch_strides=None, image_size=wanted or old.image_size
        )
    if wanted is not None:
        target = target.replace(image_size=wanted)
    arrays, notes = mapping.adapt(reading.arrays, old, target)
    built = _build(target, arrays, reading.name, dtype)
    class_names = reading.origin.class_names if target.num_classes == old.num_classes else ()
    built.origin = dataclasses.replace(reading.origin, class_names=class_names)
    spec = InputSpec(**{**reading.input, "image_size": target.image_size, "num_channels": target.num_channels})
    return ImportReport(
        source=found.name,
        format=reading.format,
        model=built,
        input_spec=spec,
        class_names=class_names,
        num_matched=reading.num_matched,
        num_parameters=sum(math.prod(v.shape) for v in variables(built).values()),
        unused=reading.unused,
        notes=(*reading.notes, *notes),
    )


# Fields that say nothing about what weights compute: they may always be changed.
_FREE = ("image_size", "patch_size", "num_classes", "has_dynamic_size")


def _check_settled(
    source: str, settled: ViTConfig, model: str | None, config: ViTConfig | None, changes: Mapping[str, Any]
) -> None:
    """Raises `WeightsError` if a name, an architecture or changes contradict what a .keras file says of itself."""
    other = config or (get_spec(model).config if model else settled)
    asked = {**other.to_dict(), **changes}
    for key, value in settled.replace(**{k: v for k, v in asked.items() if k not in _FREE}).to_dict().items():
        is_rate = key.endswith("_rate") or (key in ("patch_strides", "rope_reference_grid") and key not in changes)
        if value != settled.to_dict()[key] and key not in _FREE and not is_rate:
            raise WeightsError(
                f"Cannot import {source}. Expected {key}={settled.to_dict()[key]!r}, as the file says. "
                f"Received: {key}={value!r}. Leave out the model's name and this field."
            )


def variables(model: "VisionTransformer") -> dict[str, Any]:
    """Returns {path: variable} of a model's weights, without the model's own name in the path.

    Keras calls the factor of an RMSNorm `scale` and that of a LayerNorm `gamma`; here both are `gamma`.
    """
    prefix = f"{model.name}/"
    return {re.sub(r"norm/scale$", "norm/gamma", v.path.removeprefix(prefix)): v for v in model.weights}


def _build(config: ViTConfig, arrays: Arrays, name: str, dtype: Any) -> "VisionTransformer":
    """Creates the model with these weights, one at a time: no random numbers are drawn only to be replaced."""
    import keras

    from vitreous.model import VisionTransformer

    # In this scope Keras notes how a variable will be initialised and does so at its end: then from the file. An error
    # there would leave its notes half done for good, so errors are kept and raised after it.
    errors: list[Exception] = []
    with keras.StatelessScope():
        model = VisionTransformer(config, name=re.sub(r"\W+", "_", name) or "vit", dtype=dtype)
        own = variables(model)
        if lacking := [path for path in own if path not in arrays and not mapping.is_head(path)]:
            raise WeightsError(
                f"Cannot fill {lacking[0]}. Expected weights for every variable. Received: none for {len(lacking)} of "
                "them. Report this as a bug."
            )
        for path, get in arrays.items():
            if path not in own:
                raise WeightsError(
                    f"Cannot fill {path}. Expected a variable of the model. Received: variables {', '.join(own)}. "
                    "Report this as a bug."
                )
            own[path]._initializer = _Filled(path, get, errors)
    if errors:
        raise errors[0]
    return model


class _Filled:
    """An initializer that returns the values of a file; if it cannot, it returns zeros and notes the error."""

    def __init__(self, path: str, get: Callable[[], np.ndarray], errors: list[Exception]):
        self.path = path
        self.get = get
        self.errors = errors

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        import keras

        try:
            values = self.get()
            if values.shape != tuple(shape):
                raise WeightsError(
                    f"Cannot fill {self.path}. Expected shape {tuple(shape)}. Received: shape={values.shape}. "
                    "Leave out the fields that change the grid of patches, or pass image_size and patch_size."
                )
        except Exception as error:
            self.errors.append(error)
            values = np.zeros(shape, "float32")
        return keras.ops.cast(keras.ops.convert_to_tensor(np.ascontiguousarray(values)), dtype or "float32")


# ---- files of other libraries ----


def format_of(entries: Mapping[str, Entry], name: str) -> str:
    """Returns the format that a file's names are of.

    Raises:
        WeightsError: If they are of none.
    """
    if timm.FIRST in entries:
        return "timm"
    if any(re.fullmatch(r"(\w+\.)?" + re.escape(huggingface.FIRST), key) for key in entries):
        return "hf"
    if any(prefix + google.FIRST in entries for prefix in google.PREFIXES):
        return "npz"
    received = ", ".join(list(entries)[:3]) or "no tensors"
    raise WeightsError(
        f"Cannot import {name}. Expected a Vision Transformer with the names of timm ({timm.FIRST}), Hugging Face "
        f"([PREFIX.]{huggingface.FIRST}) or Google ({google.FIRST}). Received: {received}. Pass a file of a plain ViT."
    )


def _read_foreign(
    found: Source,
    model: str | None,
    num_classes: int | None,
    image_size: tuple[int, int] | None,
    given: ViTConfig | None,
    changes: dict[str, Any],
) -> _Reading:
    entries = read_tensors(found.path)
    format = format_of(entries, found.name)
    module = FORMATS[format]
    style = module.style_of(entries)
    if format == "npz":
        entries = google.unstack(entries, style)
    entries, unused, extras = _set_aside(module, entries)
    if left_out := _pre_logits(entries, num_classes, found.name):
        unused |= dict.fromkeys(left_out, "the pretraining head's hidden layer; the new head does without")
        entries = {name: entry for name, entry in entries.items() if name not in left_out}
    blocks = [
        int(m[1]) for name in entries if (m := re.search(r"(?:^|[./])(?:blocks\.|layers?\.|encoderblock_)(\d+)", name))
    ]
    if max(blocks, default=0) > 1000:
        raise WeightsError(
            f"Cannot import {found.name}. Expected up to 1000 blocks. Received: block {max(blocks)}. Check the file."
        )
    rules = mapping.expand(module.rules(style), max(blocks, default=0) + 1)
    fields, shapes = _infer(format, rules, entries)
    reading = _Reading(
        config=None,  # type: ignore[arg-type]  # settled below
        arrays={},
        input={},
        origin=Origin(found.name, format, style, extras),
        name=model or found.model or "vit",
        format=format,
        unused=unused,
    )
    entries = watched(entries, found.name, reading.notes)
    with describing(found):
        _settle(reading, found, format, model, fields, shapes, image_size, given, changes)
        _fill_input(reading)
    if reading.config.num_blocks != (num_blocks := max(blocks, default=-1) + 1):
        raise WeightsError(
            f"Cannot import {found.name}. Expected {reading.config.num_blocks} blocks, as its description or the "
            f"model's name says. Received: {num_blocks} blocks in the file. {mapping.advice(shapes)}"
        )
    if format == "timm":
        timm.check_import(reading.config, style, found.name)
        rules = [rule for rule in rules if timm.is_norm_of(rule, reading.config)]
    reading.arrays, names = mapping.match(rules, entries, reading.config, source=found.name)
    reading.num_matched = len(names)
    return reading


def _set_aside(
    module: ModuleType, entries: dict[str, Entry]
) -> tuple[dict[str, Entry], dict[str, str], dict[str, np.ndarray]]:
    """Parts the tensors that no model reads from the others: those left, {name: why}, and the values kept of them."""
    left, unused, extras = dict(entries), {}, {}
    for extra in module.EXTRAS:
        for name in [name for name in left if re.fullmatch(extra.pattern, name)]:
            unused[name] = extra.reason
            if extra.is_kept:
                extras[name] = left[name].read()
            del left[name]
    return left, unused, extras


def _pre_logits(entries: Mapping[str, Entry], num_classes: int | None, name: str) -> list[str]:
    """Returns the tensors of a hidden layer before Google's ImageNet-21k head, which only a new head can do without."""
    names = [name for name in entries if re.fullmatch(r"(.*/)?pre_logits/(kernel|bias)", name)]
    if not names:
        return []
    heads = [entry.shape[-1] for name, entry in entries.items() if name.endswith("head/bias") and entry.shape]
    if num_classes is None or num_classes in heads:
        raise WeightsError(
            f"Cannot import {name}. Expected a linear head. Received: {names[0]}, a hidden layer before it. Pass "
            "num_classes for a fresh head, or 0 for features."
        )
    return names


def _infer(
    format: str, rules: list[Rule], entries: Mapping[str, Entry]
) -> tuple[dict[str, Any], dict[str, mapping.Shape | None]]:
    used, _ = mapping.find(rules, entries)
    shapes = {path: mapping.our_shape(rule, entries) for path, rule in used.items()}
    fields = mapping.infer_fields(shapes)
    first = used["patch_encoder/projection/kernel"].theirs[0]
    kernel = entries[first].shape
    if len(kernel) != 4:
        raise WeightsError(f"Cannot load {first}. Expected four axes. Received: shape={kernel}. Check the file.")
    fields["patch_size"], fields["num_channels"] = (
        (kernel[:2], kernel[2]) if format == "npz" else (kernel[2:], kernel[1])
    )
    if "norm/gamma" in used and used["norm/gamma"].theirs[0].startswith("fc_norm"):
        fields["final_norm"] = "pooled"
        fields["pooling"] = "mean" if fields["pooling"] == "class" else fields["pooling"]
    if format == "npz":
        fields |= google.hints(entries)
    if format == "hf":
        fields["position_tokens"] = "class" if fields["num_registers"] else "all"
        if fields["layer_scale"]:
            fields["layer_scale"] = 1.0
    return fields, shapes


def _settle(
    reading: _Reading,
    found: Source,
    format: str,
    model: str | None,
    fields: dict[str, Any],
    shapes: dict[str, mapping.Shape | None],
    image_size: tuple[int, int] | None,
    given: ViTConfig | None,
    changes: dict[str, Any],
) -> None:
    """Finds the architecture of a file: what the user says, what lies beside it, or what its shapes leave."""
    beside, num_classes = found.config, fields["num_classes"]
    own = beside.get("vitreous") if isinstance(beside.get("vitreous"), Mapping) else None
    name = model or found.model
    if format == "hf" and beside.get("model_type"):
        settled, class_names = huggingface.read_config(beside)
        reading.origin = dataclasses.replace(reading.origin, class_names=class_names[:num_classes])
        if found.preprocessor:
            reading.input, notes = huggingface.read_preprocessor(found.preprocessor)
            reading.notes += notes
        else:
            reading.notes.append("no preprocessor_config.json: mean and std of 0.5 are assumed")
        if given is None and model is None:
            kept = ("num_classes", "use_distillation_head", "pooling")
            if not num_classes and settled["layer_scale"] and settled["num_registers"] == 0:
                fields["pooling"] = "class"
            reading.config = ViTConfig(**{**{key: fields[key] for key in kept}, **settled})
            reading.name = str(beside.get("_name_or_path") or beside["model_type"]).rsplit("/", 1)[-1] or "vit"
            reading.notes += _rest(fields, num_classes)
            return
    if own is not None and given is None and model is None:
        try:
            reading.config = ViTConfig.from_dict(own["config"])
            reading.input = InputSpec.from_dict(own.get("input", {})).to_dict()
        except (KeyError, TypeError, ConfigError) as error:
            raise WeightsError(
                f"Cannot read what lies beside {found.path}. Expected the config that vitreous wrote. Received: "
                f"{error}. Pass the model's name, or convert again."
            ) from error
        reading.name = str(own.get("name") or found.path.stem)
        reading.origin = dataclasses.replace(reading.origin, class_names=tuple(own.get("class_names", ())))
        return
    arguments: dict[str, Any] = {}
    if format == "timm" and (beside.get("architecture") or beside.get("model_name")):
        read = timm.read_config(beside)
        arguments, reading.input = read["arguments"], read["input"]
        reading.origin = dataclasses.replace(reading.origin, class_names=read["class_names"][:num_classes])
        name = model or read["architecture"] or found.model
    elif isinstance(beside.get("arguments"), Mapping):  # a description of how timm or transformers built the model
        arguments = dict(beside["arguments"])
        if str(beside.get("cls", "")).startswith(("ViT", "DeiT", "Dinov2")) and given is None and model is None:
            model_type = re.sub(r"(For|Model).*", "", beside["cls"])
            model_type = {"Dinov2WithRegisters": "dinov2_with_registers"}.get(model_type, model_type.lower())
            arguments |= {"model_type": model_type}
            described = dataclasses.replace(found, config=arguments)
            _settle(reading, described, format, model, fields, shapes, image_size, given, changes)
            return
    if given is not None:
        reading.config = given.replace(num_classes=num_classes, use_distillation_head=fields["use_distillation_head"])
        return
    spec = get_spec(name) if name in list_models() else None
    if spec is not None:
        base = {key: getattr(spec.config, key) for key in ViTConfig.__dataclass_fields__}
        reading.input = {**spec.input.to_dict(), **reading.input}
        reading.name = spec.name
        fixed = {"num_classes": num_classes, "use_distillation_head": fields["use_distillation_head"]}
        told = changes.get("pooling") or timm.pooling_of(arguments, num_classes)
        pooled, notes = timm.settle_pooling(base, fields, told, spec.name) if format == "timm" else ({}, [])
        reading.notes += notes
        if model is not None or not (arguments.keys() - {"img_size", "global_pool"}):
            settled = {**base, **pooled, **fixed}
            if others := timm.unread(arguments):
                reading.notes.append(f"not read, because the model is named: {', '.join(others)} in config.json")
            if arguments.get("img_size") and model is None:
                settled["image_size"] = tuple(arguments["img_size"])
        else:  # the config changes the named architecture: tensors tell the sizes, arguments the rest
            settled = {**base, **fields, "patch_strides": None, "pooling": pooled["pooling"]}
            settled["activation"] = base["activation"]
            if not arguments.keys() & {"final_norm", "fc_norm", "use_fc_norm", "use_post_transformer_norm"}:
                settled["final_norm"] = pooled["final_norm"]
            settled |= timm.fields_from_arguments(arguments, fields, base)
        if base["pooling"] == "class_mean" and not num_classes:
            settled["pooling"] = base["pooling"]
        reading.config = _with_grid(settled, fields, shapes, image_size, reading.notes)
        return
    if name is not None and (found.model or beside.get("architecture") or beside.get("model_name")):
        raise WeightsError(
            f"Cannot import {found.name}. Expected an architecture of the registry, because tensors do not tell how "
            f"they are computed with. Received: architecture={name!r}. {mapping.advice(shapes)}"
        )
    if arguments:
        settled = {**fields, **timm.fields_from_arguments(arguments, fields)}
        if "num_heads" not in settled:
            settled["num_heads"] = 12  # timm's default
    else:
        settled = {**fields, **_by_shapes(reading, found, format, fields, shapes, changes)}
    settled |= changes
    if not reading.input:
        reading.notes.append("nothing beside the file tells mean and std: 0.5 is assumed")
    reading.config = _with_grid(settled, fields, shapes, image_size, reading.notes)


def _fill_input(reading: _Reading) -> None:
    """Gives mean and std a value for each channel, where they have one for all."""
    for key in ("mean", "std"):
        values = tuple(float(x) for x in reading.input.get(key, (0.5,)))
        values = values[:1] * reading.config.num_channels if len({*values}) == 1 else values
        reading.input = {**reading.input, key: values}


def _rest(fields: Mapping[str, Any], num_classes: int) -> list[str]:
    return [] if num_classes else ["the file has no head: the model returns features"]


# What shapes leave open; of models that agree in all but the last two, any will do.
_OPEN = (
    *("num_heads", "epsilon", "activation", "rope", "rope_temperature", "rope_reference_grid", "norm_position"),
    *("position_tokens", "pooling", "final_norm", "layer_scale", "image_size"),
)


def _by_shapes(
    reading: _Reading,
    found: Source,
    format: str,
    fields: dict[str, Any],
    shapes: dict[str, mapping.Shape | None],
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Returns what shapes leave open, from the models of the registry that have these shapes."""
    names = [n for n in mapping.fitting_models(shapes) if get_spec(n).config.final_norm == fields["final_norm"]]
    neutral = {"num_classes": 0, "has_dynamic_size": False}
    configs = {name: get_spec(name).config.replace(**neutral) for name in names}
    choices = {tuple(getattr(config, key) for key in _OPEN[:-2]): name for name, config in configs.items()}
    if len(choices) == 1:
        config = configs[names[0]]
        reading.name = names[0]
        reading.input = {**get_spec(names[0]).input.to_dict(), **reading.input}
        reading.notes.append(f"taken for {names[0]}, whose shapes it has")
        chosen = {key: getattr(config, key) for key in _OPEN if key != "layer_scale"}
        return {**chosen, "layer_scale": config.layer_scale or fields["layer_scale"]}
    if "num_heads" in fields or "num_heads" in changes:
        assumed = [key for key in ("epsilon", "activation") if key not in fields and key not in changes]
        defaults = {"epsilon": 1e-12 if format == "hf" and not fields["layer_scale"] else 1e-6, "activation": "gelu"}
        if assumed:
            text = ", ".join(f"{key}={defaults[key]}" for key in assumed)
            reading.notes.append(f"assumed, because shapes do not tell: {text}")
        return {key: defaults[key] for key in assumed}
    if names:
        raise WeightsError(
            f"Cannot import {found.name}. Expected a name, because models of the same shapes compute differently. "
            f"Received: shapes of {', '.join(names[:6])}{' ...' if names[6:] else ''}. Pass one of them as the model."
        )
    raise WeightsError(
        f"Cannot import {found.name}. Expected a config.json beside it, or a model's name: tensors do not tell the "
        f"number of heads. Received: the file alone, of width {fields['projection_dim']} with "
        f"{fields['num_blocks']} blocks, like no model in the registry. Pass num_heads, and any other field of "
        "ViTConfig that differs from its default."
    )


def _with_grid(
    settled: dict[str, Any],
    fields: dict[str, Any],
    shapes: dict[str, mapping.Shape | None],
    image_size: tuple[int, int] | None,
    notes: list[str],
) -> ViTConfig:
    """Returns the architecture with the image size that the number of positions allows."""
    positions, patch = shapes.get("patch_encoder/position_embedding"), fields["patch_size"]

    def grid(size: Any) -> tuple[int, int]:
        pair = as_pair(size, "image_size")
        return pair[0] // patch[0], pair[1] // patch[1]

    if positions is None or "patch_size" not in settled or tuple(settled["patch_size"]) != tuple(patch):
        if "image_size" not in settled and image_size is not None:
            settled = {**settled, "image_size": image_size}
        return ViTConfig(**settled)
    sizes = [settled["image_size"]] if "image_size" in settled else []
    told = {**fields, "position_tokens": settled.get("position_tokens")}
    found = mapping.infer_grid(told, positions[1], [grid(size) for size in sizes])
    if found is None or (sizes and found[0] != grid(sizes[0])):
        if sizes:
            return ViTConfig(**settled)  # `match` says what does not fit
        found = mapping.infer_grid(told, positions[1], [grid(image_size)] if image_size else [])
        if found is None:
            raise WeightsError(
                f"Cannot tell the image size from {positions[1]} positions. Expected a square grid of patches, or the "
                f"size. Received: image_size={image_size}. Pass the image_size that the file was trained with."
            )
    if not sizes:
        other = mapping.infer_grid(told, positions[1], [grid(image_size)]) if image_size else None
        (rows, columns), tokens = other or found
        settled = {**settled, "image_size": (rows * patch[0], columns * patch[1]), "position_tokens": tokens}
    else:
        settled = {**settled, "position_tokens": settled.get("position_tokens") or found[1]}
    return ViTConfig(**settled)


# ---- our own files ----


def _read_keras(found: Source) -> _Reading:
    import keras

    from vitreous.model import VisionTransformer

    what = f"Cannot import {found.name}. Expected a whole .keras file of a VisionTransformer."
    try:
        with zipfile.ZipFile(found.path) as archive:
            about = json.loads(archive.read(MEMBER)) if MEMBER in archive.namelist() else {}
            extras = {}
            if EXTRAS_MEMBER in archive.namelist():
                with np.load(io.BytesIO(archive.read(EXTRAS_MEMBER)), allow_pickle=False) as arrays:
                    extras = {name: arrays[name] for name in arrays.files}
        model = keras.saving.load_model(found.path, compile=False, safe_mode=True)
    except (ValueError, OSError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{what} Received: {reason}. Take it from a finished run.") from error
    if not isinstance(model, VisionTransformer):
        raise WeightsError(f"{what} Received: a {type(model).__name__}. Pass a model of vitreous.")
    own = variables(model)
    notes = []
    spec = about.get("input")
    if not spec:
        spec = _run_input(found.path)
        if spec is None:
            spec, notes = {}, ["the file does not tell mean and std: 0.5 is assumed"]
    origin = about.get("origin", {})
    return _Reading(
        config=model.config,
        arrays={path: (lambda v=v: to_float32(v)) for path, v in own.items()},  # type: ignore[misc]
        input=InputSpec.from_dict(spec).to_dict(),
        origin=Origin(
            found.name,
            origin.get("format", "keras"),
            origin.get("style", {}),
            extras,
            tuple(about.get("class_names", ())),
        ),
        name=model.name,
        format="keras",
        num_matched=len(own),
        notes=notes,
    )


def _run_input(path: Path) -> dict[str, Any] | None:
    """Returns the input of the run that a model.keras lies in; None if it lies in none."""
    import tomllib

    config = path.with_name("config.toml")
    if not config.is_file():
        return None
    try:
        return tomllib.loads(config.read_text(encoding="utf-8")).get("input")
    except (ValueError, OSError):
        return None


def to_float32(variable: Any) -> np.ndarray:
    """Returns a variable's values in float32."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32")))
