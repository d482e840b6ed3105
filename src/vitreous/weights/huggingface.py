"""Hugging Face's names, config.json and preprocessor_config.json: ViT, DeiT, distilled DeiT, DINOv2 (with registers).

transformers 5 names tensors in a new way and reads the old one too; files on the hub have the old one. Both are read;
a new export has the old names, which every version of transformers reads.

Source: transformers 5.23 (`models/{vit,deit,dinov2,dinov2_with_registers}`, `conversion_mapping.py`) and 4.57.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vitreous.errors import WeightsError
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights.mapping import CONVOLUTION, JOINED, LINEAR, Arrays, Extra, Rule, fold_positions

FIRST = "embeddings.patch_embeddings.projection.weight"  # a file with this name, after a prefix, is Hugging Face's

EXTRAS = (
    Extra(r"(\w+\.)?embeddings\.mask_token", "of masked pretraining; no prediction reads it", is_kept=True),
    Extra(r"(\w+\.)?pooler\.dense\.(weight|bias)", "the tanh pooler; the head does not read it", is_kept=True),
)

_PREFIXES = {"vit": "vit.", "deit": "deit.", "dinov2": "dinov2.", "dinov2_with_registers": "dinov2_with_registers."}
_MODEL_TYPES = tuple(_PREFIXES)
# DEFAULTS are those of transformers' config classes, for keys that a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def style_of(names: Collection[str]) -> dict[str, Any]:
    """Returns which spelling a file uses: its prefix, the family, and whether names are those of transformers 4."""
    first = next(name for name in names if name.endswith(FIRST))
    prefix = first.removesuffix(FIRST)
    is_dinov2 = any(".layer_scale1." in name for name in names)
    return {
        "prefix": prefix,
        "family": "dinov2" if is_dinov2 else "deit" if any("distillation_token" in n for n in names) else "vit",
        "is_old": any(name.endswith("attention.query.weight") for name in names),
        "has_packed_swiglu": any(name.endswith("mlp.weights_in.weight") for name in names),
        "has_two_heads": "cls_classifier.weight" in names,
    }


def _dense(ours: str, *theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), LINEAR)
    yield Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), JOINED)


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/gamma", (f"{theirs}.weight",))
    yield Rule(f"{ours}/beta", (f"{theirs}.bias",))


def rules(style: Mapping[str, Any]) -> list[Rule]:
    """Returns what corresponds to what, for a way of spelling."""
    return list(_rules(style))


def _rules(style: Mapping[str, Any]) -> Iterator[Rule]:
    prefix, is_old, is_dinov2 = style["prefix"], style["is_old"], style["family"] == "dinov2"
    embeddings = prefix + "embeddings."
    yield Rule("patch_encoder/projection/kernel", (prefix + FIRST,), CONVOLUTION)
    yield Rule("patch_encoder/projection/bias", (embeddings + "patch_embeddings.projection.bias",))
    yield Rule("patch_encoder/class_token", (embeddings + "cls_token",))
    yield Rule("patch_encoder/distillation_token", (embeddings + "distillation_token",))
    yield Rule("patch_encoder/registers", (embeddings + "register_tokens",))
    yield Rule("patch_encoder/position_embedding", (embeddings + "position_embeddings",))
    block = prefix + ("encoder.layer.{i}." if is_old or is_dinov2 else "layers.{i}.")
    attention, mlp = "block_{i}/attention", "block_{i}/mlp"
    if is_old:
        inner = block + "attention.attention."
        yield from _dense(f"{attention}/qkv", inner + "query", inner + "key", inner + "value")
        yield from _dense(f"{attention}/projection", block + "attention.output.dense")
    else:
        inner = block + "attention."
        yield from _dense(f"{attention}/qkv", inner + "q_proj", inner + "k_proj", inner + "v_proj")
        yield from _dense(f"{attention}/projection", inner + "o_proj")
    if is_dinov2:
        yield from _norm(f"{attention}/norm", block + "norm1")
        yield from _norm(f"{mlp}/norm", block + "norm2")
        yield Rule(f"{attention}/layer_scale", (block + "layer_scale1.lambda1",))
        yield Rule(f"{mlp}/layer_scale", (block + "layer_scale2.lambda1",))
        if style["has_packed_swiglu"]:
            yield from _dense(f"{mlp}/hidden", block + "mlp.weights_in")
            yield from _dense(f"{mlp}/output", block + "mlp.weights_out")
        else:
            yield from _dense(f"{mlp}/hidden", block + "mlp.fc1")
            yield from _dense(f"{mlp}/output", block + "mlp.fc2")
            yield from _dense(f"{mlp}/hidden", block + "mlp.gate_proj", block + "mlp.up_proj")
            yield from _dense(f"{mlp}/output", block + "mlp.down_proj")
    else:
        yield from _norm(f"{attention}/norm", block + "layernorm_before")
        yield from _norm(f"{mlp}/norm", block + "layernorm_after")
        yield from _dense(f"{mlp}/hidden", block + ("intermediate.dense" if is_old else "mlp.fc1"))
        yield from _dense(f"{mlp}/output", block + ("output.dense" if is_old else "mlp.fc2"))
    yield from _norm("norm", prefix + "layernorm")
    yield from _dense("head", "cls_classifier" if style["has_two_heads"] else "classifier")
    yield from _dense("distillation_head", "distillation_classifier")


def write_rules(style: Mapping[str, Any], config: ViTConfig) -> list[Rule]:
    """Returns the rules to write an architecture with."""
    rest = ("mlp.fc1", "mlp.fc2") if config.mlp == "swiglu" else ("mlp.gate_proj", "mlp.down_proj")
    if style["family"] != "dinov2":
        return rules(style)
    return [rule for rule in rules(style) if not any(f".{name}." in rule.theirs[0] for name in rest)]


def model_type_of(config: ViTConfig) -> str:
    """Returns the family of transformers that has this architecture.

    Raises:
        WeightsError: If none has; the reasons are named.
    """
    is_dinov2 = config.layer_scale > 0 or config.pooling == "class_mean"
    reasons = []
    for is_wrong, reason in (
        (config.stem != "none", f"stem={config.stem!r}"),
        (
            config.patch_strides != config.patch_size or config.patch_padding != "valid",
            "overlapping or padded patches",
        ),
        (not config.use_class_token, "use_class_token=False"),
        (config.position != "learned", f"position={config.position!r}"),
        (config.rope != "none", f"rope={config.rope!r}"),
        (config.use_pre_norm, "use_pre_norm=True"),
        (not config.use_patch_bias, "use_patch_bias=False"),
        (config.norm != "layer", f"norm={config.norm!r}"),
        (config.norm_position != "pre", f"norm_position={config.norm_position!r}"),
        (config.final_norm != "tokens", f"final_norm={config.final_norm!r}"),
        (config.use_qk_norm, "use_qk_norm=True"),
        (config.use_attention_norm or config.use_mlp_norm, "norms inside attention or MLP"),
        (config.use_qkv_bias and not config.use_key_bias, "use_key_bias=False"),
        (not config.use_projection_bias or not config.use_mlp_bias, "layers without a bias"),
        (config.use_local_attention, "use_local_attention=True"),
        (config.num_parallel != 1, f"num_parallel={config.num_parallel}"),
        (config.pooling not in ("class", "class_mean"), f"pooling={config.pooling!r}"),
        (
            is_dinov2 and config.num_classes > 0 and config.pooling != "class_mean",
            "a head that reads the class token alone, with layer_scale (DINOv2's head reads class and mean)",
        ),
        (config.pooling == "class_mean" and not config.layer_scale, "pooling='class_mean' without layer_scale"),
        (is_dinov2 and config.use_distillation_token, "a distillation token with layer_scale"),
        (config.num_registers > 0 and not is_dinov2, "registers without layer_scale"),
        (config.mlp == "swiglu" and not is_dinov2, "mlp='swiglu' without layer_scale"),
        (config.mlp == "swiglu" and config.activation != "silu", f"mlp='swiglu' with {config.activation!r}"),
        (config.mlp == "swiglu" and config.mlp_dim % 8 != 0, f"mlp_dim={config.mlp_dim}, no multiple of 8"),
    ):
        if is_wrong:
            reasons.append(reason)
    if reasons:
        raise WeightsError(
            "Cannot write Hugging Face files. Expected an architecture of ViT, DeiT or DINOv2. Received: "
            f"{'; '.join(reasons)}. Export to timm or to .keras."
        )
    if is_dinov2:
        return "dinov2_with_registers" if config.num_registers else "dinov2"
    return "deit" if config.use_distillation_token else "vit"


def default_style(config: ViTConfig) -> dict[str, Any]:
    """Returns the spelling of a new export: the names that files on the hub have."""
    model_type = model_type_of(config)
    return {
        "prefix": _PREFIXES[model_type] if config.num_classes else "",
        "family": "dinov2" if model_type.startswith("dinov2") else model_type,
        "is_old": True,
        "has_packed_swiglu": config.mlp == "swiglu",
        "has_two_heads": config.use_distillation_head,
    }


def express(arrays: Arrays, config: ViTConfig) -> tuple[Arrays, ViTConfig]:
    """Returns the model in terms that transformers has: the prefix tokens but registers have positions."""
    return fold_positions(arrays, config, "class" if config.num_registers else "all")


# ---- config.json ----


def read_config(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the fields of `ViTConfig` from a config.json, and the names of the classes.

    The head is left to the tensors: whether there is one, and of how many classes.

    Raises:
        WeightsError: If it is of a family or an activation that is not read here.
    """
    model_type = values.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise WeightsError(
            f"Cannot read config.json. Expected a model_type of {', '.join(_MODEL_TYPES)}. "
            f"Received: model_type={model_type!r}. Take the same model from timm, where it has one."
        )
    is_dinov2 = model_type.startswith("dinov2")

    def get(key: str) -> Any:
        return _DEFAULTS[key] if values.get(key) is None else values[key]

    if (act := get("hidden_act")) not in _ACTIVATIONS:
        raise WeightsError(
            f"Cannot read config.json. Expected a hidden_act of {', '.join(_ACTIVATIONS)}. Received: "
            f"hidden_act={act!r}. This model cannot be imported."
        )
    width, use_swiglu = int(get("hidden_size")), is_dinov2 and bool(get("use_swiglu_ffn"))
    hidden = int(width * get("mlp_ratio")) if is_dinov2 else int(get("intermediate_size"))
    num_registers = int(get("num_register_tokens")) if model_type == "dinov2_with_registers" else 0
    patch_size = values.get("patch_size", 14 if model_type == "dinov2" else 16)
    fields = {
        "image_size": _pair(get("image_size")),
        "patch_size": _pair(patch_size),
        "num_channels": int(get("num_channels")),
        "projection_dim": width,
        "num_blocks": int(get("num_hidden_layers")),
        "num_heads": int(get("num_attention_heads")),
        "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if use_swiglu else hidden,
        "mlp": "swiglu" if use_swiglu else "dense",
        "activation": "silu" if use_swiglu else _ACTIVATIONS[act],
        "use_qkv_bias": bool(get("qkv_bias")),
        "epsilon": float(values.get("layer_norm_eps", 1e-6 if is_dinov2 else 1e-12)),
        "layer_scale": float(get("layerscale_value")) if is_dinov2 else 0.0,
        "use_distillation_token": model_type == "deit",
        "num_registers": num_registers,
        "position_tokens": "class" if num_registers else "all",
        # transformers resizes DINOv2's positions at every call; ViT's and DeiT's only on request
        "has_dynamic_size": False,
    }
    labels = values.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return fields, () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def _one(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def write_config(
    config: ViTConfig, class_names: tuple[str, ...], style: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the config.json of an architecture, and notes on what differs."""
    model_type, notes = model_type_of(config), []
    is_dinov2 = model_type.startswith("dinov2")
    base = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[
        model_type
    ]
    head = "ForImageClassificationWithTeacher" if config.use_distillation_head else "ForImageClassification"
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
    names = class_names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    values: dict[str, Any] = {
        "architectures": [base + (head if config.num_classes else "Model")],
        "model_type": model_type,
        "hidden_size": config.projection_dim,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu" if config.mlp == "swiglu" else activations[config.activation],
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "layer_norm_eps": config.epsilon,
        "image_size": _one(config.image_size),
        "patch_size": _one(config.patch_size),
        "num_channels": config.num_channels,
        "qkv_bias": config.use_qkv_bias,
        "dtype": "float32",
    }
    if is_dinov2:
        ratio = _mlp_ratio(config)
        values |= {
            "mlp_ratio": int(ratio) if float(ratio).is_integer() else ratio,
            "layerscale_value": config.layer_scale,
            "use_swiglu_ffn": config.mlp == "swiglu",
        }
        if config.num_registers:
            values["num_register_tokens"] = config.num_registers
        if config.patch_size[0] != config.patch_size[1]:
            notes.append("transformers resizes positions for square patches only")
    else:
        values["intermediate_size"] = config.mlp_dim
    if config.num_classes:
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
    return values, notes


def _mlp_ratio(config: ViTConfig) -> float:
    if config.mlp != "swiglu":
        return config.mlp_dim / config.projection_dim
    for ratio in (4, *(x / 8 for x in range(1, 129))):  # the hidden units are two thirds, rounded up to eights
        if (int(int(config.projection_dim * ratio) * 2 / 3) + 7) // 8 * 8 == config.mlp_dim:
            return ratio
    return math.ceil(config.mlp_dim * 1.5) / config.projection_dim


# ---- preprocessor_config.json ----

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_OTHER_FILTERS = {4: "box", 5: "hamming"}


def read_preprocessor(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of `InputSpec` from a preprocessor_config.json, and notes on what differs.

    A mean or std that is one number is that of three channels.

    Raises:
        WeightsError: If images are resized or rescaled in a way that is not known here.
    """
    fields: dict[str, Any] = {}
    notes = []
    size = values.get("size")
    resized = size
    if isinstance(size, Mapping):
        resized = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    crop = values.get("crop_size")
    if isinstance(crop, Mapping):
        crop = (crop["height"], crop["width"])
    if not values.get("do_resize", True):
        fields["resize_mode"] = "crop" if values.get("do_center_crop") else "squash"
        notes.append("the file leaves images at their size (do_resize=false); here they are brought to the model's")
    elif values.get("do_center_crop") and crop and resized:
        crop, resized = _pair(crop), _pair(resized)
        fields |= {
            "image_size": crop,
            "resize_mode": "crop",
            "crop_fraction": min(crop[0] / resized[0], 1.0),
        }
        if isinstance(size, Mapping) and "height" in size:
            fields["resize_mode"] = "squash"
            if crop[0] * resized[1] != crop[1] * resized[0]:
                notes.append("the file crops its two sides by different shares; here by that of the height")
    elif resized:
        fields |= {"image_size": _pair(resized), "resize_mode": "squash"}
    if values.get("do_normalize", True):
        for key in ("mean", "std"):
            if (value := values.get(f"image_{key}")) is not None:
                fields[key] = (float(value),) * 3 if isinstance(value, int | float) else tuple(map(float, value))
    else:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    # The file computes (x * factor - mean) / std, and `InputSpec` (x / 255 - mean) / std.
    factor = values.get("rescale_factor")
    factor = 1.0 if not values.get("do_rescale", True) else 1 / 255 if factor is None else float(factor)
    if not (math.isfinite(factor) and factor > 0) or values.get("rescale_offset"):
        raise WeightsError(
            "Cannot read preprocessor_config.json. Expected images to be multiplied by a positive rescale_factor. "
            f"Received: rescale_factor={values.get('rescale_factor')!r}, rescale_offset="
            f"{values.get('rescale_offset', False)!r}. Correct the file, or remove it and pass mean and std yourself."
        )
    if abs(factor * 255 - 1) > 1e-6:
        for key in ("mean", "std"):
            fields[key] = tuple(x / (factor * 255) for x in fields.get(key, (0.5, 0.5, 0.5)))
        what = f"by {factor:g}" if values.get("do_rescale", True) else "by nothing (do_rescale=false)"
        notes.append(f"the file rescales images {what}, not by 1/255: mean and std are divided by {factor * 255:g}")
    resample = 2 if values.get("resample") is None else values["resample"]
    if resample not in _RESAMPLE and resample not in _OTHER_FILTERS:
        raise WeightsError(
            "Cannot read preprocessor_config.json. Expected a resample of 0 to 5, a filter of Pillow. Received: "
            f"resample={resample!r}. Correct the file."
        )
    if resample in _OTHER_FILTERS:
        notes.append(f"the file resizes images with the {_OTHER_FILTERS[resample]} filter; here it is bilinear")
    fields["interpolation"] = _RESAMPLE.get(resample, "bilinear")
    return fields, notes


def write_preprocessor(spec: InputSpec) -> tuple[dict[str, Any], list[str]]:
    """Returns the preprocessor_config.json of an input, and notes on what differs."""
    notes = []
    height, width = spec.image_size
    values: dict[str, Any] = {
        "do_resize": True,
        "resample": {name: number for number, name in _RESAMPLE.items()}[spec.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.resize_mode == "crop":
        values |= {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": spec.num_channels == 3,
            "size": {"shortest_edge": round(min(height, width) / spec.crop_fraction)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
        if height != width:
            notes.append("transformers fits the image's shorter side only, whatever the crop's aspect")
    elif spec.resize_mode == "squash" and spec.crop_fraction < 1:
        values |= {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": spec.num_channels == 3,
            "size": {side: int(x / spec.crop_fraction) for side, x in (("height", height), ("width", width))},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    else:
        values |= {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
        if spec.resize_mode == "pad":
            notes.append("transformers cannot pad to an aspect; the files squash images instead")
    return values, notes
