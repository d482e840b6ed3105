"""timm's names, arguments and config.json: VisionTransformer, VisionTransformerDistilled and Eva (EVA-02, DINOv3).

Source: timm 1.0.31, `timm/models/vision_transformer.py`, `deit.py`, `eva.py` and `_hub.py`
(https://github.com/huggingface/pytorch-image-models).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vitreous.errors import WeightsError
from vitreous.registry import get_spec, list_models
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights.mapping import CONVOLUTION, JOINED, LINEAR, Arrays, Extra, Rule, fold_positions

FIRST = "patch_embed.proj.weight"  # a file with this name is timm's

EXTRAS = (
    Extra(
        r"rope\.(periods|pos_embed\w*|freqs\w*|bands)", "a table that is computed from the architecture", is_kept=True
    ),
    Extra(r"blocks\.\d+\.attn\.(k_bias|relative_position_index)", "a buffer without numbers of its own", is_kept=True),
    Extra(r"mask_token", "of masked pretraining; no prediction reads it", is_kept=True),
)


def style_of(names: Collection[str]) -> dict[str, Any]:
    """Returns which of timm's spellings a file uses.

    `is_eva`: layer scale is `gamma_1`, biases of q and v stand alone; `has_split_qkv`: q, k and v in matrices of their
    own; `has_split_swiglu`: the gate too.
    """
    tails = {name.split(".", 2)[2] for name in names if re.match(r"blocks\.\d+\.", name)}
    return {
        "is_eva": bool(tails & {"gamma_1", "attn.q_bias", "attn.q_proj.weight", "mlp.fc1_g.weight"}),
        "has_split_qkv": "attn.q_proj.weight" in tails,
        "has_split_swiglu": "mlp.fc1_g.weight" in tails,
    }


def default_style(config: ViTConfig) -> dict[str, Any]:
    """Returns how timm itself spells this architecture."""
    is_eva = config.rope != "none" or (config.use_qkv_bias and not config.use_key_bias)
    has_split_swiglu = config.mlp == "swiglu" and (config.use_mlp_norm or (is_eva and config.rope == "dinov3"))
    return {
        "is_eva": is_eva,
        "has_split_qkv": is_eva and config.mlp == "swiglu" and config.use_mlp_norm,
        "has_split_swiglu": has_split_swiglu,
    }


def rules(style: Mapping[str, Any]) -> list[Rule]:
    """Returns what corresponds to what, for a way of spelling."""
    return list(_rules(style))


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/gamma", (f"{theirs}.weight",))
    yield Rule(f"{ours}/beta", (f"{theirs}.bias",))


def _dense(ours: str, *theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), LINEAR)
    yield Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), JOINED)


def _rules(style: Mapping[str, Any]) -> Iterator[Rule]:
    yield Rule("patch_encoder/projection/kernel", (FIRST,), CONVOLUTION)
    yield Rule("patch_encoder/projection/bias", ("patch_embed.proj.bias",))
    yield Rule("patch_encoder/class_token", ("cls_token",))
    yield Rule("patch_encoder/distillation_token", ("dist_token",))
    yield Rule("patch_encoder/registers", ("reg_token",))
    yield Rule("patch_encoder/position_embedding", ("pos_embed",))
    yield from _norm("pre_norm", "norm_pre")
    # One attention and one MLP in a block, or two of each side by side (timm's ParallelThingsBlock).
    block = "blocks.{i}."
    scales = ("gamma_1", "gamma_2") if style["is_eva"] else ("ls1.gamma", "ls2.gamma")
    yield from _attention("block_{i}/attention", block + "norm1", block + "attn", block + scales[0], style)
    yield from _mlp("block_{i}/mlp", block + "norm2", block + "mlp", block + scales[1], style)
    for j in range(2):
        suffix, a, m = f"_{j}" if j else "", f"{block}attns.{j}.", f"{block}ffns.{j}."
        yield from _attention(f"block_{{i}}/attention{suffix}", a + "norm", a + "attn", a + "ls.gamma", style)
        yield from _mlp(f"block_{{i}}/mlp{suffix}", m + "norm", m + "mlp", m + "ls.gamma", style)
    yield from _norm("norm", "norm")
    yield from _norm("norm", "fc_norm")
    yield Rule("attention_pool/latent", ("attn_pool.latent",))
    yield from _dense("attention_pool/query", "attn_pool.q")
    yield from _dense("attention_pool/key_value", "attn_pool.kv")
    yield from _dense("attention_pool/projection", "attn_pool.proj")
    yield from _norm("attention_pool/mlp/norm", "attn_pool.norm")
    yield from _dense("attention_pool/mlp/hidden", "attn_pool.mlp.fc1")
    yield from _dense("attention_pool/mlp/output", "attn_pool.mlp.fc2")
    yield from _dense("head", "head")
    yield from _dense("distillation_head", "head_dist")


def _attention(ours: str, norm: str, theirs: str, scale: str, style: Mapping[str, Any]) -> Iterator[Rule]:
    yield from _norm(f"{ours}/norm", norm)
    if style["has_split_qkv"]:
        yield from _dense(f"{ours}/qkv", *(f"{theirs}.{name}_proj" for name in "qkv"))
        yield Rule(f"{ours}/query_value_bias", (f"{theirs}.q_proj.bias", f"{theirs}.v_proj.bias"), JOINED)
    else:
        yield from _dense(f"{ours}/qkv", f"{theirs}.qkv")
        yield Rule(f"{ours}/query_value_bias", (f"{theirs}.q_bias", f"{theirs}.v_bias"), JOINED)
    yield from _norm(f"{ours}/query_norm", f"{theirs}.q_norm")
    yield from _norm(f"{ours}/key_norm", f"{theirs}.k_norm")
    yield from _norm(f"{ours}/inner_norm", f"{theirs}.norm")
    yield from _dense(f"{ours}/projection", f"{theirs}.proj")
    yield Rule(f"{ours}/layer_scale", (scale,))


def _mlp(ours: str, norm: str, theirs: str, scale: str, style: Mapping[str, Any]) -> Iterator[Rule]:
    yield from _norm(f"{ours}/norm", norm)
    hidden = ("fc1_g", "fc1_x") if style["has_split_swiglu"] else ("fc1",)
    yield from _dense(f"{ours}/hidden", *(f"{theirs}.{name}" for name in hidden))
    yield from _norm(f"{ours}/inner_norm", f"{theirs}.norm")
    yield from _dense(f"{ours}/output", f"{theirs}.fc2")
    yield Rule(f"{ours}/layer_scale", (scale,))


def is_norm_of(rule: Rule, config: ViTConfig) -> bool:
    """Whether a rule is not of the last normalisation, or of the one that timm would have in this architecture."""
    return not rule.ours.startswith("norm/") or rule.theirs[0].startswith("fc_norm.") == (config.final_norm == "pooled")


def write_rules(style: Mapping[str, Any], config: ViTConfig) -> list[Rule]:
    """Returns the rules to write an architecture with: where two name one variable, the one that timm would use."""

    def is_wanted(rule: Rule) -> bool:
        name = rule.theirs[0]
        if not is_norm_of(rule, config):
            return False
        if rule.ours.startswith("block_"):
            return (".attns." in name or ".ffns." in name) == (config.num_parallel == 2)
        return True

    return [rule for rule in rules(style) if is_wanted(rule)]


def express(arrays: Arrays, config: ViTConfig) -> tuple[Arrays, ViTConfig]:
    """Returns the model in terms that timm has: positions are of all tokens, or of patches only."""
    if config.use_distillation_token:
        return fold_positions(arrays, config, "all")
    if config.position_tokens == "class":
        return fold_positions(arrays, config, "patches" if config.num_registers else "all")
    return arrays, config


# ---- arguments and config.json ----

_ACTIVATIONS = {"gelu": "gelu", "gelutanh": "gelu_tanh", "quickgelu": "quick_gelu", "silu": "silu", "swish": "silu"}
_POOLINGS = {"token": "class", "avg": "mean", "map": "map"}
_ROPES = {"cat": "eva", "dinov3": "dinov3"}

# Arguments whose effect the tensors' names and shapes settle, and those that matter in training only.
_SETTLED = (
    "patch_size in_chans num_classes embed_dim depth mlp_ratio qkv_bias qkv_fused qk_norm scale_attn_norm "
    "scale_mlp_norm proj_bias class_token reg_tokens num_reg_tokens pos_embed pre_norm final_norm fc_norm swiglu_mlp "
    "swiglu_align_to scale_mlp scale_attn_inner use_abs_pos_emb use_pre_transformer_norm use_post_transformer_norm "
    "use_fc_norm attn_pool_mlp_ratio drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate "
    "drop_path_rate weight_init fix_init head_init_scale rope_shift_coords rope_jitter_coords rope_rescale_coords "
    "device dtype"
)
_READ = (
    "num_heads img_size dynamic_img_size init_values norm_layer act_layer no_embed_class use_rot_pos_emb rope_type "
    "rope_temperature rope_rotate_half ref_feat_shape use_post_norm block_fn global_pool attn_pool_num_heads"
)
# The values with which timm computes what is computed here; layers go by their names.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pool_include_prefix": (False,),
    "dynamic_img_pad": (False,),
    "embed_norm_layer": ("",),
    "embed_layer": ("patchembed",),
    "mlp_layer": ("mlp", "swiglupacked", "swiglu"),
    "attn_layer": ("attention", "attn"),
    "attn_type": ("eva",),
    "attn_only_layer_scale": (False,),
    "num_kv_heads": (),
    "rope_mrope_section": (),
}
_ROPE_ONLY: dict[str, tuple[Any, ...]] = {"rope_grid_offset": (0,), "rope_grid_indexing": ("ij",)}


def _refuse(key: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(
        f"Cannot read the arguments of timm's model. Expected {expected}. Received: {key}={value!r}. Pass the "
        "architecture as config if it is one of vitreous; else the model cannot be imported."
    )


def _layer(value: Any) -> str:
    """Returns the name of a layer, as timm compares them: from a name, or from a class or partial as text."""
    text = str(value)
    if "GluMlp" in text and "SiLU" in text and "gate_last=False" in text:
        return "swiglupacked"
    found = re.search(r"<class '([\w.]+)'>", text)
    text = found[1] if found else re.sub(r"^(functools\.)?partial\((\w+)(, eps=[^,)]*)?\)$", r"\2", text)
    return text.rsplit(".", 1)[-1].replace("_", "").lower() if re.fullmatch(r"[\w.]+", text) else text


def _among(key: str, value: Any, names: Mapping[str, str]) -> str:
    name = _layer(value) if key == "act_layer" else value
    if not isinstance(name, str) or name not in names:
        choices = dict.fromkeys(names.values() if key == "act_layer" else names)
        raise _refuse(key, value, f"{key} of {', '.join(choices)}")
    return names[name]


def _check_only(arguments: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in only.items():
        value = arguments.get(key)
        if value is not None and value not in values and _layer(value) not in values:
            raise _refuse(key, value, f"{key} of {', '.join(map(repr, values)) or None}")


def pooling_of(arguments: Mapping[str, Any], num_classes: int) -> str | None:
    """Returns the `pooling` that timm's `global_pool` is; None if the arguments do not tell.

    Raises:
        WeightsError: If there is none such here.
    """
    pool = arguments.get("global_pool")
    if pool is None or (pool == "" and not num_classes):  # without a head, both return tokens
        return None
    return _among("global_pool", pool, _POOLINGS)


def _norm_fields(value: Any, inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `norm_layer` says: without an epsilon of its own, timm's layers have 1e-6."""
    kind = _layer(value) if value else "layernorm"
    if kind not in ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32"):
        raise _refuse("norm_layer", value, "norm_layer of layernorm, rmsnorm")
    if value and kind.startswith("rms") != (inferred["norm"] == "rms"):
        raise _refuse("norm_layer", value, f"the {inferred['norm']} normalisation that the tensors have")
    text = str(value)
    match = re.search(r"eps=([\d.e+-]+)", text)
    return {"epsilon": float(match[1]) if match else 1e-5 if "torch.nn" in text else 1e-6}


def _rope_fields(arguments: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of rotary positions, from what the arguments say and, of the rest, the named base."""
    own = base.get("rope", "none")
    used = arguments.get("use_rot_pos_emb")
    if not (own != "none" if used is None else used):
        return {"rope": "none", "rope_temperature": None, "rope_reference_grid": (0, 0)} if own != "none" else {}
    rope = own if own != "none" else "eva"
    if arguments.get("rope_type") is not None:
        rope = _among("rope_type", arguments["rope_type"], _ROPES)
    _check_only(arguments, _ROPE_ONLY)
    is_half = arguments.get("rope_rotate_half")
    is_half = own == "dinov3" if is_half is None else bool(is_half)
    if is_half != (rope == "dinov3"):
        raise _refuse("rope_rotate_half", is_half, f"rope_rotate_half={not is_half} with this rope_type")
    fields: dict[str, Any] = {
        "rope": rope,
        "rope_temperature": float(arguments.get("rope_temperature") or base.get("rope_temperature") or 10000.0),
    }
    if "ref_feat_shape" in arguments:
        grid = arguments["ref_feat_shape"] or 0
        fields["rope_reference_grid"] = tuple(grid) if isinstance(grid, list | tuple) else (grid, grid)
    return fields


def fields_from_arguments(
    arguments: Mapping[str, Any], inferred: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the fields of `ViTConfig` that tensors cannot settle, from a timm model's arguments.

    Args:
        arguments: Arguments of timm's VisionTransformer or Eva, layers as their names.
        inferred: What the tensors settle (`infer_fields`).
        base: Fields of the architecture that the arguments change. Default: the defaults of timm's classes.

    Raises:
        WeightsError: If an argument, or its value, makes timm compute what is not computed here.
    """
    base = base or {}
    known = {*_SETTLED.split(), *_READ.split(), *_ONLY, *_ROPE_ONLY}
    for key, value in arguments.items():
        if key not in known:
            raise _refuse(key, value, "arguments of VisionTransformer and Eva that have a counterpart here")
    _check_only(arguments, _ONLY)
    fields: dict[str, Any] = {}
    for key, name in (("num_heads", "num_heads"), ("img_size", "image_size")):
        if arguments.get(key) is not None:
            value = arguments[key]
            fields[name] = tuple(value) if isinstance(value, list) else value
    heads = arguments.get("attn_pool_num_heads")
    if heads is not None and heads != fields.get("num_heads", base.get("num_heads")):
        raise _refuse("attn_pool_num_heads", heads, "as many heads as in the blocks")
    if "dynamic_img_size" in arguments:
        fields["has_dynamic_size"] = bool(arguments["dynamic_img_size"])
    if arguments.get("init_values"):
        fields["layer_scale"] = float(arguments["init_values"]) if inferred["layer_scale"] else 0.0
    if "norm_layer" in arguments:
        fields |= _norm_fields(arguments["norm_layer"], inferred)
    if arguments.get("swiglu_mlp") is not None:  # Eva's, which takes no act_layer
        fields["activation"] = "silu" if arguments["swiglu_mlp"] else "gelu"
    if "act_layer" in arguments:
        fields["activation"] = _among("act_layer", arguments["act_layer"] or "gelu", _ACTIVATIONS)
    if "no_embed_class" in arguments:
        fields["position_tokens"] = "patches" if arguments["no_embed_class"] else "all"
    fields |= _rope_fields(arguments, base)
    if arguments.get("use_post_norm") is not None:
        fields["norm_position"] = "post" if arguments["use_post_norm"] else "pre"
    if arguments.get("block_fn") is not None:
        blocks = {"block": "pre", "respostblock": "post", "parallelthingsblock": "pre"}
        block = _layer(arguments["block_fn"])
        if block not in blocks:
            raise _refuse("block_fn", arguments["block_fn"], "block_fn of Block, ResPostBlock, ParallelThingsBlock")
        fields["norm_position"] = blocks[block]
    if pooling := pooling_of(arguments, inferred["num_classes"]):
        fields["pooling"] = pooling
    return fields


def unread(arguments: Mapping[str, Any]) -> list[str]:
    """Returns the arguments that only `fields_from_arguments` reads, sorted."""
    return sorted(key for key in arguments if key not in {*_SETTLED.split(), "img_size", "global_pool"})


def settle_pooling(
    base: Mapping[str, Any], inferred: Mapping[str, Any], told: str | None, name: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns how a file of a named architecture pools and where it normalises last, and notes on what differs.

    timm takes both from one argument, so files of one name have either. What is told or proven counts: `fc_norm`
    proves pooling, and of the mean where nothing else is said. `norm` alone proves no other pooling.

    Args:
        base: Fields of the named architecture.
        inferred: What the tensors settle (`infer_fields`).
        told: Pooling that the config beside the file or the user names, if they do.
        name: Name of the architecture, for the notes.
    """
    settled = {"pooling": told or base["pooling"], "final_norm": base["final_norm"]}
    if inferred["final_norm"] == "pooled" != base["final_norm"]:
        settled["final_norm"] = "pooled"
        if told is None and settled["pooling"] == "class":
            settled["pooling"] = "mean"
    elif told is not None and inferred["final_norm"] == "tokens" and base["final_norm"] == "pooled":
        settled["final_norm"] = "tokens"
    text = ", ".join(f"{key}={value!r}" for key, value in settled.items() if value != base[key])
    return settled, [f"{text}, as the file has it; {name} itself differs there"] if text else []


def check_import(config: ViTConfig, style: Mapping[str, Any], source: str) -> None:
    """Raises `WeightsError` if timm's model computes something else than ours, with the same tensors."""
    if _pools_prefix(config, style):
        raise WeightsError(
            f"Cannot import {source}. Expected attention pooling over patches. Received: timm's Eva with "
            f"global_pool='map' and {config.num_prefix_tokens} tokens before the patches, which it pools too. Import a "
            "model with another pooling, or without class token and registers."
        )


def _pools_prefix(config: ViTConfig, style: Mapping[str, Any]) -> bool:
    """Whether timm would pool the prefix too, which we leave out: its Eva does, its VisionTransformer does not."""
    is_eva = style["is_eva"] or config.rope != "none"
    return is_eva and config.pooling == "map" and config.num_prefix_tokens > 0


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a timm config.json, as on the hub.

    Returns:
        `architecture` (a name), `arguments` (of timm's model), `input` (fields of `InputSpec`), `class_names`.
    """
    # Old files hold the pretrained_cfg at the top level.
    pretrained = {**config, **config.get("pretrained_cfg", {})}
    arguments = dict(config.get("model_args") or {})
    if config.get("global_pool"):
        arguments.setdefault("global_pool", config["global_pool"])
    fields: dict[str, Any] = {}
    if size := pretrained.get("input_size"):
        fields["image_size"], fields["num_channels"] = (int(size[1]), int(size[2])), int(size[0])
        arguments.setdefault("img_size", list(fields["image_size"]))
    for key in ("mean", "std"):
        if pretrained.get(key):
            fields[key] = tuple(pretrained[key])
    if pretrained.get("interpolation") in ("nearest", "bilinear", "bicubic", "lanczos"):
        fields["interpolation"] = pretrained["interpolation"]
    if pretrained.get("crop_pct"):
        fields["crop_fraction"] = min(float(pretrained["crop_pct"]), 1.0)
    if mode := pretrained.get("crop_mode"):
        fields["resize_mode"] = {"squash": "squash", "border": "pad"}.get(mode, "crop")
    return {
        "architecture": config.get("architecture") or config.get("model_name"),
        "arguments": arguments,
        "input": fields,
        "class_names": tuple(pretrained.get("label_names") or ()),
    }


def _mlp_ratio(config: ViTConfig, style: Mapping[str, Any]) -> float:
    packed = config.mlp == "swiglu" and not style["is_eva"]
    hidden = config.mlp_dim * (2 if packed else 1)
    ratio = hidden / config.projection_dim
    return ratio if int(config.projection_dim * ratio) == hidden else ratio + 1e-7


def _architecture(config: ViTConfig, style: Mapping[str, Any]) -> str:
    """Returns the timm name whose layers are of the right kinds; the numbers go into `model_args`."""
    if style["is_eva"]:
        return "vit_base_patch16_dinov3" if config.epsilon == 1e-5 else "eva02_base_patch14_224"
    if config.use_distillation_head or config.use_distillation_token:
        return "deit_base_distilled_patch16_224"
    if config.num_parallel == 2:
        return "vit_base_patch16_18x2_224"
    if config.norm_position == "post":
        return "vit_base_patch16_rpn_224"
    if config.mlp == "swiglu":
        return "vit_giant_patch14_dinov2"
    if config.epsilon == 1e-5:
        return "vit_base_patch16_clip_224"
    return "vit_base_patch16_224"


def model_arguments(config: ViTConfig, style: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that make timm build this architecture, as plain values."""
    is_eva = style["is_eva"]
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.projection_dim,
        "depth": config.num_blocks,
        "num_heads": config.num_heads,
        "mlp_ratio": _mlp_ratio(config, style),
        "qkv_bias": config.use_qkv_bias,
        "qk_norm": config.use_qk_norm,
        "init_values": config.layer_scale or None,
        "class_token": config.use_class_token,
        "no_embed_class": config.position_tokens == "patches",
        "global_pool": {"class": "token", "mean": "avg", "map": "map"}.get(config.pooling, "token"),
        "dynamic_img_size": config.has_dynamic_size,
    }
    if is_eva:
        arguments |= {
            "num_reg_tokens": config.num_registers,
            "qkv_fused": not style["has_split_qkv"],
            "swiglu_mlp": config.mlp == "swiglu",
            "swiglu_align_to": 8 if style["has_split_swiglu"] and not config.use_mlp_norm else 0,
            "scale_mlp": config.use_mlp_norm,
            "scale_attn_inner": config.use_attention_norm,
            "use_abs_pos_emb": config.position == "learned",
            "use_rot_pos_emb": config.rope != "none",
            "rope_type": "dinov3" if config.rope == "dinov3" else "cat",
            "rope_temperature": config.rope_temperature,
            "rope_rotate_half": config.rope == "dinov3",
            "ref_feat_shape": list(config.rope_reference_grid) if config.rope_reference_grid[0] else None,
            "use_post_norm": config.norm_position == "post",
            "use_pre_transformer_norm": config.use_pre_norm,
            "use_post_transformer_norm": config.final_norm == "tokens",
            "use_fc_norm": config.final_norm == "pooled",
        }
        return arguments
    arguments |= {
        "reg_tokens": config.num_registers,
        "pos_embed": "learn" if config.position == "learned" else "none",
        "pre_norm": config.use_pre_norm,
        "final_norm": config.final_norm != "none",
        "fc_norm": config.final_norm == "pooled",
        "scale_attn_norm": config.use_attention_norm,
        "scale_mlp_norm": config.use_mlp_norm,
        "proj_bias": config.use_projection_bias,
    }
    if config.mlp != "swiglu":
        arguments["act_layer"] = config.activation
    if config.norm == "rms":
        arguments["norm_layer"] = "rmsnorm"
    return arguments


def unexpressed(config: ViTConfig, style: Mapping[str, Any]) -> list[str]:
    """Returns what timm's models do not have, of an architecture, in words; its file cannot hold such a model."""
    is_eva, has_distillation = style["is_eva"], config.use_distillation_token
    special = {
        "a distillation token": has_distillation,
        f"num_parallel={config.num_parallel}": config.num_parallel > 1,
        "norm_position='post'": config.norm_position == "post" and not is_eva,
        "mlp='swiglu'": config.mlp == "swiglu" and not is_eva,
    }
    together = [name for name, is_there in special.items() if is_there]  # each is a class of its own in timm
    checks = (
        (config.stem != "none", f"stem={config.stem!r}"),
        (
            config.patch_strides != config.patch_size or config.patch_padding != "valid",
            "overlapping or padded patches",
        ),
        (config.position == "sincos", "position='sincos'"),
        (config.use_local_attention, "use_local_attention=True"),
        (config.pooling == "class_mean", "pooling='class_mean'"),
        (config.num_parallel > 2, f"num_parallel={config.num_parallel}"),
        (len(together) > 1, " with ".join(together)),
        (
            has_distillation and config.num_classes > 0 and not config.use_distillation_head,
            "a distillation token without its head",
        ),
        (
            has_distillation and (config.num_registers > 0 or config.pooling != "class"),
            "a distillation token with registers, or with another pooling than of the class token",
        ),
        (
            config.use_patch_bias == config.use_pre_norm,
            f"use_patch_bias={config.use_patch_bias} with use_pre_norm={config.use_pre_norm}",
        ),
        (
            config.use_mlp_bias != config.use_projection_bias or (is_eva and not config.use_mlp_bias),
            f"use_mlp_bias={config.use_mlp_bias} with use_projection_bias={config.use_projection_bias}",
        ),
        (
            config.mlp == "swiglu" and config.activation != "silu",
            f"mlp='swiglu' with activation={config.activation!r}",
        ),
        (config.norm_position == "post" and config.layer_scale > 0, "norm_position='post' with layer_scale"),
        (
            is_eva and config.mlp == "dense" and config.activation != "gelu",
            f"rotary or key-bias-free attention with activation={config.activation!r}",
        ),
        (is_eva and config.norm == "rms", "rotary or key-bias-free attention with norm='rms'"),
        (is_eva and config.use_qkv_bias and config.use_key_bias, "rotary attention with use_key_bias=True"),
        (
            _pools_prefix(config, style),
            "rotary or key-bias-free attention with pooling='map' and tokens before the patches",
        ),
        (is_eva and bool(together), f"rotary or key-bias-free attention with {' and '.join(together)}"),
    )
    return [reason for is_wrong, reason in checks if is_wrong]


def write_config(
    config: ViTConfig, input_spec: InputSpec, class_names: tuple[str, ...], style: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the config.json of a timm folder (`timm.create_model("local-dir:FOLDER")`), and notes on what differs."""
    notes = []
    same = {"num_classes": 0, "has_dynamic_size": False, "layer_scale": 0.0}
    names = [n for n in list_models() if get_spec(n).config.replace(**same) == config.replace(**same)]
    is_own = names and names[0].startswith(("vit_pico", "vit_nano", "vit_micro"))
    epsilon = 1e-5 if _architecture(config, style).endswith(("clip_224", "dinov3")) else 1e-6
    if abs(config.epsilon - epsilon) > 1e-9:
        notes.append(f"timm computes with epsilon={epsilon:g}, the model with {config.epsilon:g}")
    has_heads = config.use_distillation_head
    pretrained: dict[str, Any] = {
        "input_size": [config.num_channels, *config.image_size],
        "fixed_input_size": True,
        "interpolation": input_spec.interpolation,
        "crop_pct": input_spec.crop_fraction,
        "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[input_spec.resize_mode],
        "mean": list(input_spec.mean),
        "std": list(input_spec.std),
        "num_classes": config.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if has_heads else "head",
    }
    if class_names:
        pretrained["label_names"] = list(class_names)
    arguments = model_arguments(config, style)
    return {
        "architecture": names[0] if names and not is_own else _architecture(config, style),
        "num_classes": config.num_classes,
        "num_features": config.projection_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        "vitreous": {"config": config.to_dict(), "input": input_spec.to_dict()},
    }, notes
