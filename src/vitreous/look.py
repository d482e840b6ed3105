"""`look`: all that the page shows of one image, as plain values: the answer, what is inside, and how it came about."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.calibration import get_confidence
from vitreous.explanation import maps
from vitreous.explanation.perturbation import find_edges
from vitreous.registry import count_parameters

if TYPE_CHECKING:
    from vitreous.explanation import Explainer
    from vitreous.explanation.trace import Trace

FORMAT = 1
"""Of what `look` returns; the page says so when it meets another."""

NUM_SHOWN = 16
"""Values of a token that are shown; the rest would say no more to the eye."""

MAX_ATTENTION_BYTES = 6_000_000
"""Attention weights that are sent: all of vit_base at 224 pixels. Of larger models it is the mean over heads, and where
that is too much, of some of the blocks."""

_MOST_CLASSES = 3  # explained without being asked for
_STEPS = 4  # as in Explainer.explain


def look(
    explainer: "Explainer",
    image: np.ndarray | str | Path,
    *,
    classes: Sequence[int | str] | None = None,
    top_k: int = 5,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Looks inside a model while it answers one image.

    Letters: P patches, N tokens (prefix and patches), K classes, L blocks, A heads.

    Args:
        explainer: The model.
        image: uint8 (H, W), (H, W, 1) or (H, W, 3) of any size, as it was decoded, or a file.
        classes: Classes to show the relevance for, by name or index. Default: the three most probable ones.
        top_k: How many of the most probable classes are listed, at least 1.
        threshold: Probability from which on an answer counts as sure. Default: no such judgement.

    Returns:
        Plain values, fit for JSON:

        - `format`: 1.
        - `model`: `name`, `image_size` (H, W), `patch_size`, `grid` (rows, columns), `edges` (pixel rows and columns
          between which the patches' cells lie), `num_channels`, `num_blocks`, `num_heads`, `projection_dim`, `mlp_dim`,
          `prefix_tokens` (names), `num_parameters`, `classes` (names), `is_multi_label`, `temperature`, `pooling`,
          `stem`, `mean` and `std` (of the normalisation).
        - `image`: PNG of what enters the model, as a data URL.
        - `predictions`: the most probable classes first: `class`, `index`, `logit`, `probability`. `other`: the
          probability of all the rest together; None with several labels an image. `log_sum`: the logarithm of the sum
          of exp(logit / temperature) over all classes. `is_sure`: None without a threshold.
        - `read_out`: (N,) how much of each token the head reads; sums to 1.
        - `attention`: of `blocks` and `heads` (indices; None for the mean over them): a row of N weights for each
          token. Rows are packed: `shape`, `dtype` "uint8", `data` in base64, and `scales`, base64 of little-endian
          float32: a weight is its byte / 255 * the scale of its row.
        - `rollout`: packed in the same way, (N, N).
        - `relevance`: (P,) for each class, by name; empty without a head.
        - `positions`: similarities (P, P) in [-1, 1] in bytes from `low` to `high`, and their `kind`; None if the model
          has none.
        - `walk`: numbers on the way: `projected` and `position` (P, 16), the first values of each patch's token and of
          its position (None where none is added); `blocks`: how much `attention` and `mlp` add to tokens, as shares of
          the tokens' lengths; `answers`: probabilities of the listed classes if the head read the tokens that enter
          block 0, 1, ..., and those that leave the last; `pooled`: the first values of what the head reads.

    Raises:
        UnknownNameError: If there is no such class.
        ConfigError: If there is no class of such an index, or the image is none.
        ImageError: If the file cannot be read.
    """
    config, num_classes = explainer.config, explainer.config.num_classes
    targets = None if classes is None else list(dict.fromkeys(explainer.find_class(each) for each in classes))
    pixels = explainer.prepare(image)
    logits = explainer.predict(pixels[None])[0].astype("float64") if num_classes else np.zeros(0)
    order = np.argsort(-logits, kind="stable")
    listed = [int(index) for index in order[:top_k]]
    if targets is None:
        targets = listed[:_MOST_CLASSES]
    traces = {target: explainer.trace(pixels, target, _STEPS) for target in targets}
    trace = next(iter(traces.values())) if traces else explainer.trace(pixels)
    return {
        "format": FORMAT,
        "model": _describe(explainer),
        "image": _to_data_url(pixels),
        **_list_answers(explainer, logits, listed, threshold),
        "read_out": _plain(_read_out(explainer, trace)),
        "attention": _choose_attention(trace.attention),
        "rollout": _pack_rows(maps.roll_out(trace.attention)),
        "relevance": {
            get_class_name(explainer, target): _plain(
                maps.read_relevance(
                    config, maps.relate(each.attention, each.attention_gradients, config.num_parallel), each
                )
            )
            for target, each in traces.items()
        },
        "positions": _compare_positions(explainer),
        "walk": _walk(explainer, pixels, trace, listed),
    }


def get_class_name(explainer: "Explainer", index: int) -> str:
    """Returns what a class is called; `class 3` where classes have no names."""
    return explainer.class_names[index] if explainer.class_names else f"class {index}"


def _describe(explainer: "Explainer") -> dict[str, Any]:
    config, spec = explainer.config, explainer.input_spec
    rows, columns = find_edges(config.patch_grid, config.image_size)
    prefix = ["class"] * config.use_class_token + ["distillation"] * config.use_distillation_token
    return {
        "name": explainer.model.name,
        "image_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "grid": list(config.grid_size),
        "edges": [rows.tolist(), columns.tolist()],
        "num_channels": config.num_channels,
        "num_blocks": config.num_blocks,
        "num_heads": config.num_heads * config.num_parallel,
        "projection_dim": config.projection_dim,
        "mlp_dim": config.mlp_dim,
        "prefix_tokens": prefix + ["register"] * config.num_registers,
        "num_parameters": count_parameters(config),
        "classes": [get_class_name(explainer, index) for index in range(config.num_classes)],
        "is_multi_label": explainer.is_multi_label,
        "temperature": explainer.temperature,
        "pooling": config.pooling,
        "stem": config.stem,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }


def _to_data_url(pixels: np.ndarray) -> str:
    from vitreous.data.images import to_pillow

    file = io.BytesIO()
    to_pillow(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _list_answers(
    explainer: "Explainer", logits: np.ndarray, listed: list[int], threshold: float | None
) -> dict[str, Any]:
    """Returns the listed classes with their probabilities, and what is left for the others."""
    if not len(logits):
        return {"predictions": [], "other": None, "log_sum": None, "is_sure": None}
    shares = explainer.probabilities(logits[None])[0]
    scaled = logits / explainer.temperature
    confidence = float(get_confidence(shares, is_multi_label=explainer.is_multi_label))
    return {
        "predictions": [
            {
                "class": get_class_name(explainer, index),
                "index": index,
                "logit": float(logits[index]),
                "probability": float(shares[index]),
            }
            for index in listed
        ],
        "other": None if explainer.is_multi_label else max(0.0, 1 - float(shares[listed].sum())),
        "log_sum": float(np.logaddexp.reduce(scaled)),
        "is_sure": None if threshold is None else confidence >= threshold,
    }


def _read_out(explainer: "Explainer", trace: "Trace") -> np.ndarray:
    """Returns how much of each token the head reads, (N,); for attention pooling, the mean over the pool's heads."""
    config = explainer.config
    if trace.pool_attention is None:
        return maps.get_read_out(config, math.prod(config.grid_size))
    return np.concatenate([np.zeros(config.num_prefix_tokens), trace.pool_attention.mean(axis=0)])


def _choose_attention(attention: np.ndarray) -> dict[str, Any]:
    """Returns as much of the attention (L, A, N, N) as may be sent."""
    blocks, heads = range(len(attention)), list(range(attention.shape[1]))
    if attention.size > MAX_ATTENTION_BYTES:
        attention, heads = attention.mean(axis=1, keepdims=True), []
        most = max(1, MAX_ATTENTION_BYTES // attention[0].size)
        if most < len(blocks):
            blocks = np.unique(np.linspace(len(blocks) - 1, 0, most).round().astype(int)).tolist()
            attention = attention[blocks]
    return {"blocks": list(blocks), "heads": heads or None, **_pack_rows(attention)}


def _pack_rows(values: np.ndarray) -> dict[str, Any]:
    """Returns values of 0 or more in bytes, each row on its own scale."""
    scales = values.max(axis=-1, keepdims=True)
    codes = np.rint(255 * values / np.where(scales > 0, scales, 1)).astype("uint8")
    return {
        "shape": list(values.shape),
        "dtype": "uint8",
        "data": base64.b64encode(codes.tobytes()).decode(),
        "scales": base64.b64encode(scales.astype("<f4").tobytes()).decode(),
    }


def _compare_positions(explainer: "Explainer") -> dict[str, Any] | None:
    """Returns similarities of positions in bytes."""
    if explainer.why_not("positions"):
        return None
    values, kind = maps.compare_positions(explainer.model, explainer.config.grid_size)
    low, high = float(values.min()), float(values.max())
    codes = np.rint(255 * (values - low) / ((high - low) or 1)).astype("uint8")
    return {
        "kind": kind,
        "shape": list(values.shape),
        "dtype": "uint8",
        "data": base64.b64encode(codes.tobytes()).decode(),
        "low": low,
        "high": high,
    }


def _walk(explainer: "Explainer", pixels: np.ndarray, trace: "Trace", listed: list[int]) -> dict[str, Any]:
    """Returns numbers on the way from patches to the answer."""
    from keras import ops

    def to_numpy(x: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))

    config, model = explainer.config, explainer.model
    prefix = config.num_prefix_tokens
    entered = trace.tokens[0, prefix:]
    position = None
    if config.position != "none" and not config.use_pre_norm:  # a norm after the sum hides both parts of it
        vectors, _ = maps.get_positions(model, config.grid_size)
        position = vectors
        entered = entered - position

    rope = None
    if config.rope != "none":
        rope = model.enter(ops.convert_to_tensor(explainer.normalize(pixels[None])))[1]
    tokens = [ops.convert_to_tensor(x[None]) for x in trace.tokens]
    last = to_numpy(model.blocks[-1](tokens[-1], rope=rope))
    states = np.concatenate([trace.tokens, last])  # (L + 1, N, D)
    blocks = []
    for block, entering, x, left in zip(model.blocks, tokens, states[:-1], states[1:], strict=True):
        middle = x + sum(to_numpy(attention(entering, rope=rope))[0] - x for attention in block.attentions)
        length = np.linalg.norm(x, axis=-1).mean()
        blocks.append(
            {
                "attention": _share(middle - x, length),
                "mlp": _share(left - middle, length),
            }
        )
    features = model.leave(ops.convert_to_tensor(states))
    answers = None
    if listed:
        logits = to_numpy(model.classify(features))
        answers = [_plain(row) for row in explainer.probabilities(logits)[:, listed]]
    return {
        "projected": [_plain(row) for row in entered[:, :NUM_SHOWN]],
        "position": None if position is None else [_plain(row) for row in position[:, :NUM_SHOWN]],
        "blocks": blocks,
        "answers": answers,
        "pooled": _plain(to_numpy(model.pool(features))[-1, :NUM_SHOWN]),
    }


def _share(added: np.ndarray, length: float) -> float:
    """Returns how long what is added to the tokens (N, D) is, in the mean, as a share of a length."""
    return float(f"{np.linalg.norm(added, axis=-1).mean() / max(length, np.finfo('float32').tiny):.4g}")


def _plain(values: np.ndarray) -> list[float]:
    """Returns numbers of four digits, which JSON writes short."""
    return [float(f"{value:.4g}") for value in values]
