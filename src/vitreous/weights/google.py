"""Google's .npz files: those of the ViT repository and those of big_vision, the latter with stacked blocks or not.

Source: https://github.com/google-research/vision_transformer (`vit_jax/models_vit.py`),
https://github.com/google-research/big_vision (`big_vision/models/vit.py`); timm 1.0.31 reads the same names
(`_load_weights`). As there, the GELU is the exact one.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from vitreous.errors import WeightsError
from vitreous.spec import ViTConfig
from vitreous.weights.mapping import (
    FLAX_CONVOLUTION,
    FLAX_HEADS,
    FLAX_HEADS_BIAS,
    FLAX_HEADS_OUT,
    SAME,
    Arrays,
    Extra,
    Rule,
    fold_positions,
)
from vitreous.weights.tensors import Entry

FIRST = "embedding/kernel"
PREFIXES = ("opt/target/", "params/img/", "params/", "img/", "")

EXTRAS = (
    Extra(r"(params/)?txt/.*|(params/)?(t|b)", "the text tower and its temperature; images do not need them"),
    Extra(r"opt/state/.*|state/.*|(params/)?step|extra/.*", "the optimizer's state"),
)


def style_of(names: Collection[str]) -> dict[str, Any]:
    """Returns which spelling a file uses: its prefix, big_vision's names or not, stacked blocks or not."""
    prefix = next(p for p in PREFIXES if p + FIRST in names)
    return {
        "prefix": prefix,
        "is_big_vision": f"{prefix}pos_embedding" in names
        or any("MultiHeadDotProductAttention_0/" in name for name in names),
        "is_stacked": f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in names,
    }


def unexpressed(config: ViTConfig) -> list[str]:
    """Returns what Google's models do not have, of an architecture, in words, where no variable shows it."""
    checks = (
        (
            config.patch_strides != config.patch_size or config.patch_padding != "valid",
            "overlapping or padded patches",
        ),
        (config.position != "learned", f"position={config.position!r}"),
        (config.rope != "none", f"rope={config.rope!r}"),
        (config.norm != "layer" or config.norm_position != "pre", "norm='rms' or norm_position='post'"),
        (config.final_norm != "tokens", f"final_norm={config.final_norm!r}"),
        (config.mlp != "dense", f"mlp={config.mlp!r}"),
        (config.pooling == "class_mean", "pooling='class_mean'"),
        (not config.use_qkv_bias or not config.use_key_bias, "queries, keys or values without a bias"),
        (not config.use_projection_bias or not config.use_mlp_bias, "layers without a bias"),
        (not config.use_patch_bias, "use_patch_bias=False"),
    )
    return [reason for is_wrong, reason in checks if is_wrong]


def default_style(config: ViTConfig) -> dict[str, Any]:
    """Returns the spelling of a new export: the ViT repository's, or big_vision's where only that has the parts."""
    is_big_vision = config.pooling == "map" or config.position_tokens == "patches" or not config.use_class_token
    return {"prefix": "params/" if is_big_vision else "", "is_big_vision": is_big_vision, "is_stacked": False}


def rules(style: Mapping[str, Any]) -> list[Rule]:
    """Returns what corresponds to what, for a way of spelling; stacked blocks as if they were not."""
    return list(_rules(style))


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/gamma", (f"{theirs}/scale",))
    yield Rule(f"{ours}/beta", (f"{theirs}/bias",))


def _dense(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", (f"{theirs}/kernel",))
    yield Rule(f"{ours}/bias", (f"{theirs}/bias",))


def _heads(ours: str, theirs: str, *parts: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", tuple(f"{theirs}/{part}/kernel" for part in parts), FLAX_HEADS)
    yield Rule(f"{ours}/bias", tuple(f"{theirs}/{part}/bias" for part in parts), FLAX_HEADS_BIAS)


def _out(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}/kernel", (f"{theirs}/out/kernel",), FLAX_HEADS_OUT)
    yield Rule(f"{ours}/bias", (f"{theirs}/out/bias",))


def _rules(style: Mapping[str, Any]) -> Iterator[Rule]:
    prefix, is_big_vision = style["prefix"], style["is_big_vision"]
    yield Rule("patch_encoder/projection/kernel", (prefix + FIRST,), FLAX_CONVOLUTION)
    yield Rule("patch_encoder/projection/bias", (prefix + "embedding/bias",))
    yield Rule("patch_encoder/class_token", (prefix + "cls",))
    position = "pos_embedding" if is_big_vision else "Transformer/posembed_input/pos_embedding"
    yield Rule("patch_encoder/position_embedding", (prefix + position,), SAME)
    attention, mlp, norm = (0, 0, 1) if is_big_vision else (1, 3, 2)
    block = prefix + "Transformer/encoderblock_{i}/"
    heads, dense = f"{block}MultiHeadDotProductAttention_{attention}", f"{block}MlpBlock_{mlp}"
    yield from _norm("block_{i}/attention/norm", block + "LayerNorm_0")
    yield from _heads("block_{i}/attention/qkv", heads, "query", "key", "value")
    yield from _out("block_{i}/attention/projection", heads)
    yield from _norm("block_{i}/mlp/norm", f"{block}LayerNorm_{norm}")
    yield from _dense("block_{i}/mlp/hidden", f"{dense}/Dense_0")
    yield from _dense("block_{i}/mlp/output", f"{dense}/Dense_1")
    yield from _norm("norm", prefix + "Transformer/encoder_norm")
    pool = prefix + "MAPHead_0/"
    yield Rule("attention_pool/latent", (pool + "probe",))
    yield from _heads("attention_pool/query", pool + "MultiHeadDotProductAttention_0", "query")
    yield from _heads("attention_pool/key_value", pool + "MultiHeadDotProductAttention_0", "key", "value")
    yield from _out("attention_pool/projection", pool + "MultiHeadDotProductAttention_0")
    yield from _norm("attention_pool/mlp/norm", pool + "LayerNorm_0")
    yield from _dense("attention_pool/mlp/hidden", pool + "MlpBlock_0/Dense_0")
    yield from _dense("attention_pool/mlp/output", pool + "MlpBlock_0/Dense_1")
    yield from _dense("head", prefix + "head")


def write_rules(style: Mapping[str, Any], config: ViTConfig) -> list[Rule]:
    """Returns the rules to write an architecture with."""
    return rules(style)


def express(arrays: Arrays, config: ViTConfig) -> tuple[Arrays, ViTConfig]:
    """Returns the model in Google's terms: the class token, if there is one, has a position."""
    if config.position_tokens == "patches" and config.use_class_token:
        return fold_positions(arrays, config, "patches")
    return fold_positions(arrays, config, "all")


def hints(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns what the shapes tell beyond `infer_fields`: the number of heads."""
    for name, entry in entries.items():
        if re.search(r"encoderblock_0/MultiHeadDotProductAttention_\d/query/kernel$", name) and len(entry.shape) == 3:
            return {"num_heads": entry.shape[1]}
    return {}


_STACKED = "Transformer/encoderblock/"


def unstack(entries: Mapping[str, Entry], style: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the tensors with those of all blocks in one array taken apart, block by block."""
    stacked = style["prefix"] + _STACKED
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if not style["is_stacked"] or not name.startswith(stacked):
            found[name] = entry
            continue
        cache: dict[str, np.ndarray] = {}
        if not entry.shape:
            raise WeightsError(
                f"Cannot load {name}. Expected an array with one part for each block. Received: a single number. "
                "Check the file."
            )
        count = entry.shape[0]

        def part(
            i: int, entry: Entry = entry, cache: dict[str, np.ndarray] = cache, last: int = count - 1
        ) -> np.ndarray:
            if not cache:
                cache["values"] = entry.read()
            values = np.array(cache["values"][i])
            if i == last:  # blocks are read in order: the stack is not needed any more
                cache.clear()
            return values

        for i in range(count):
            single = name.replace(_STACKED, f"Transformer/encoderblock_{i}/")
            found[single] = Entry(entry.shape[1:], entry.dtype, lambda i=i, part=part: part(i))  # type: ignore[misc]
    return found


def stack(
    tensors: Mapping[str, tuple[tuple[int, ...], Any]], style: Mapping[str, Any], num_blocks: int
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns what will be written with the blocks' arrays stacked: the reverse of `unstack`."""
    if not style["is_stacked"]:
        return dict(tensors)
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, (shape, get) in tensors.items():
        if not (match := re.search(r"Transformer/encoderblock_(\d+)/", name)):
            found[name] = (shape, get)
        elif match[1] == "0":
            getters = [tensors[name.replace("encoderblock_0/", f"encoderblock_{i}/")][1] for i in range(num_blocks)]
            found[name.replace("encoderblock_0/", "encoderblock/")] = (
                (num_blocks, *shape),
                lambda getters=getters: np.stack([get() for get in getters]),
            )
    return found
