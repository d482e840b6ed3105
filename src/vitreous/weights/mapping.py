"""How tensors of another library and variables of ours correspond: one list of rules, used in both directions.

A `Rule` pairs one variable path of ours with the names of one or more foreign tensors, and says how the numbers are
laid out there. `{i}` in a name stands for the number of a block. A format (timm, Hugging Face, Google) is a list of
rules; `match` reads a file by it, `plan` writes one, and both account for every tensor: what is missing, unexpected or
misshaped is an error that names it.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitreous.errors import WeightsError
from vitreous.registry import get_spec, list_models
from vitreous.resize import resize_patch_kernel, resize_position_embedding
from vitreous.spec import ViTConfig
from vitreous.weights.tensors import Entry, Outgoing

Shape = tuple[int, ...]
Arrays = dict[str, Callable[[], np.ndarray]]  # path: a function that makes its values


@dataclass(frozen=True)
class Layout:
    """How foreign tensors hold a variable of ours.

    Args:
        read: From the foreign arrays to ours.
        write: From our array to so many foreign ones, for an architecture.
    """

    read: Callable[[list[np.ndarray]], np.ndarray]
    write: Callable[[np.ndarray, int, ViTConfig], list[np.ndarray]]


def _heads(config: ViTConfig) -> tuple[int, int]:
    return config.num_heads, config.projection_dim // config.num_heads


SAME = Layout(lambda a: a[0], lambda x, n, c: [x])
# torch's linear layers are (out, in); several of them stand beside each other in ours
LINEAR = Layout(
    lambda a: np.concatenate([x.T for x in a], axis=1) if len(a) > 1 else a[0].T,
    lambda x, n, c: [part.T for part in np.split(x, n, axis=1)],
)
JOINED = Layout(lambda a: np.concatenate(a, axis=-1), lambda x, n, c: np.split(x, n, axis=-1))
# torch's convolutions are (D, C, P_h, P_w)
CONVOLUTION = Layout(
    lambda a: a[0].transpose(2, 3, 1, 0).reshape(-1, a[0].shape[0]),
    lambda x, n, c: [x.reshape(*c.patch_size, c.num_channels, -1).transpose(3, 2, 0, 1)],
)
# flax's convolutions are (P_h, P_w, C, D), its heads (D, A, head_dim), and (A, head_dim, D) on the way out
FLAX_CONVOLUTION = Layout(
    lambda a: a[0].reshape(-1, a[0].shape[-1]),
    lambda x, n, c: [x.reshape(*c.patch_size, c.num_channels, -1)],
)
FLAX_HEADS = Layout(
    lambda a: np.concatenate([x.reshape(x.shape[0], -1) for x in a], axis=1),
    lambda x, n, c: [part.reshape(part.shape[0], *_heads(c)) for part in np.split(x, n, axis=1)],
)
FLAX_HEADS_BIAS = Layout(
    lambda a: np.concatenate([x.reshape(-1) for x in a]),
    lambda x, n, c: [part.reshape(_heads(c)) for part in np.split(x, n)],
)
FLAX_HEADS_OUT = Layout(
    lambda a: a[0].reshape(-1, a[0].shape[-1]), lambda x, n, c: [x.reshape(*_heads(c), x.shape[-1])]
)


@dataclass(frozen=True)
class Rule:
    """One variable of ours and the foreign tensors that hold it; `{i}` stands for the number of a block."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    def at(self, i: int) -> "Rule":
        """Returns the rule for block `i`."""
        return Rule(self.ours.format(i=i), tuple(name.format(i=i) for name in self.theirs), self.layout)


def expand(rules: Iterable[Rule], num_blocks: int) -> list[Rule]:
    """Returns the rules with each one of a block repeated for all blocks."""
    found = []
    for rule in rules:
        found += [rule.at(i) for i in range(num_blocks)] if "{i}" in rule.ours else [rule]
    return found


@dataclass(frozen=True)
class Extra:
    """Tensors that a file may hold and that no model here reads.

    Args:
        pattern: What their names match.
        reason: Why they are not used, for the report.
        is_kept: Whether their values travel with the model and come back on export to the same format.
    """

    pattern: str
    reason: str
    is_kept: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from: enough to write the same file again. It travels with the model.

    Args:
        source: What was imported, as the user named it.
        format: `"timm"`, `"hf"`, `"npz"` or `"keras"`.
        style: Which of a format's ways of naming the file used.
        extras: {name: values} of tensors that no model here reads but the file had.
        class_names: Names of the classes, where the source had them.
    """

    source: str
    format: str
    style: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


# ---- our side ----


@functools.lru_cache(maxsize=512)
def _variable_shapes(config: ViTConfig) -> tuple[tuple[str, Shape], ...]:
    dim, hidden, head = config.projection_dim, config.mlp_dim, config.projection_dim // config.num_heads
    shapes: dict[str, Shape] = {}

    def dense(path: str, rows: int, columns: int, use_bias: bool = True) -> None:
        shapes[f"{path}/kernel"] = (rows, columns)
        if use_bias:
            shapes[f"{path}/bias"] = (columns,)

    def norm(path: str, width: int) -> None:
        shapes[f"{path}/gamma"] = (width,)
        if config.norm == "layer":
            shapes[f"{path}/beta"] = (width,)

    patch_dim = config.patch_size[0] * config.patch_size[1] * config.num_channels
    dense("patch_encoder/projection", patch_dim, dim, config.use_patch_bias)
    for name, count in (
        ("class_token", int(config.use_class_token)),
        ("distillation_token", int(config.use_distillation_token)),
        ("registers", config.num_registers),
        ("position_embedding", config.num_prefix_positions + config.num_patches if config.position == "learned" else 0),
    ):
        if count:
            shapes[f"patch_encoder/{name}"] = (1, count, dim)
    if config.use_pre_norm:
        norm("pre_norm", dim)
    for i in range(config.num_blocks):
        for j in range(config.num_parallel):
            suffix = f"_{j}" if j else ""
            attention, mlp = f"block_{i}/attention{suffix}", f"block_{i}/mlp{suffix}"
            norm(f"{attention}/norm", dim)
            dense(f"{attention}/qkv", dim, 3 * dim, config.use_qkv_bias and config.use_key_bias)
            if config.use_qkv_bias and not config.use_key_bias:
                shapes[f"{attention}/query_value_bias"] = (2 * dim,)
            if config.use_qk_norm:
                norm(f"{attention}/query_norm", head)
                norm(f"{attention}/key_norm", head)
            if config.use_local_attention:
                shapes[f"{attention}/temperature"] = (config.num_heads, 1, 1)
            if config.use_attention_norm:
                norm(f"{attention}/inner_norm", dim)
            dense(f"{attention}/projection", dim, dim, config.use_projection_bias)
            norm(f"{mlp}/norm", dim)
            dense(f"{mlp}/hidden", dim, hidden * (2 if config.mlp == "swiglu" else 1), config.use_mlp_bias)
            if config.use_mlp_norm:
                norm(f"{mlp}/inner_norm", hidden)
            dense(f"{mlp}/output", hidden, dim, config.use_mlp_bias)
            if config.layer_scale:
                shapes[f"{attention}/layer_scale"] = shapes[f"{mlp}/layer_scale"] = (dim,)
    if config.final_norm != "none":
        norm("norm", dim)
    if config.pooling == "map":
        shapes["attention_pool/latent"] = (1, 1, dim)
        dense("attention_pool/query", dim, dim)
        dense("attention_pool/key_value", dim, 2 * dim)
        dense("attention_pool/projection", dim, dim)
        norm("attention_pool/mlp/norm", dim)
        dense("attention_pool/mlp/hidden", dim, hidden)
        dense("attention_pool/mlp/output", hidden, dim)
    if config.num_classes:
        dense("head", config.features_dim, config.num_classes)
        if config.use_distillation_head:
            dense("distillation_head", config.features_dim, config.num_classes)
    return tuple(shapes.items())


def variable_shapes(config: ViTConfig) -> dict[str, Shape]:
    """Returns {path: shape} of every variable of a model with this architecture, without building it.

    The paths are those of the Keras model, without its own name in front. For `stem="none"`.
    """
    return dict(_variable_shapes(config))


def is_head(path: str) -> bool:
    """Whether a variable belongs to a head, which a new number of classes replaces."""
    return path.startswith(("head/", "distillation_head/"))


# ---- reading ----


def _placeholder(shape: Shape) -> np.ndarray:
    """Returns an array of a shape that takes no memory."""
    return np.broadcast_to(np.zeros((), "int8"), shape)


def find(rules: Sequence[Rule], names: Iterable[str]) -> tuple[dict[str, Rule], dict[str, str]]:
    """Returns {path: the rule that reads it} for the tensors of a file, and {tensor: why} for those left over.

    A rule reads when all its tensors are there; of two rules for one path, the first counts.
    """
    left, used = dict.fromkeys(names), {}
    for rule in rules:
        if rule.ours not in used and all(name in left for name in rule.theirs):
            used[rule.ours] = rule
            for name in rule.theirs:
                del left[name]
    siblings: dict[str, str] = {}
    for rule in rules:
        if rule.ours not in used and any(name in left for name in rule.theirs):
            lacking = [name for name in rule.theirs if name not in left]
            siblings |= {name: f"without {', '.join(lacking)}" for name in rule.theirs if name in left}
    return used, {name: siblings.get(name, "") for name in left}


def foreign_shapes(rule: Rule, shape: Shape, config: ViTConfig) -> dict[str, Shape]:
    """Returns {name: shape} of the foreign tensors that hold a variable of ours."""
    parts = rule.layout.write(_placeholder(shape), len(rule.theirs), config)
    return {name: part.shape for name, part in zip(rule.theirs, parts, strict=True)}


def our_shape(rule: Rule, entries: Mapping[str, Entry]) -> Shape | None:
    """Returns the shape that a variable of ours takes from the file's tensors; None if they do not go together."""
    try:
        return rule.layout.read([_placeholder(entries[name].shape) for name in rule.theirs]).shape
    except (ValueError, IndexError):
        return None


def fitting_models(shapes: Mapping[str, Shape | None]) -> list[str]:
    """Returns the names in the registry whose variables have exactly these shapes; heads are left out."""
    wanted = {path: shape for path, shape in shapes.items() if not is_head(path)}
    found = []
    for name in list_models():
        config = get_spec(name).config
        if config.stem == "none" and len(wanted) > 4:
            theirs = {path: shape for path, shape in variable_shapes(config).items() if not is_head(path)}
            if theirs == wanted:
                found.append(name)
    return found


def advice(shapes: Mapping[str, Shape | None]) -> str:
    """Returns the last part of an error about shapes: the model that would fit, if one does."""
    names = fitting_models(shapes)
    if not names:
        return "No model in the registry has such shapes; check the file, or pass its config."
    return f"The file matches {', '.join(names[:3])}; pass {'that name' if len(names) == 1 else 'one of these'}."


def match(
    rules: Sequence[Rule], entries: Mapping[str, Entry], config: ViTConfig, *, source: str = "the file"
) -> tuple[Arrays, list[str]]:
    """Finds every variable of an architecture in a file, and a use for every tensor.

    Args:
        rules: The format's rules, expanded to the file's blocks.
        entries: The file's tensors, without those that are deliberately unused.
        config: The architecture.
        source: Name of the file, for messages.

    Returns:
        {path: a function that reads it}, and the names of the tensors that these read.

    Raises:
        WeightsError: If a tensor is missing, unexpected or misshaped; all of them are counted, the first ones named.
    """
    used, left = find(rules, entries)
    ours = {path: our_shape(rule, entries) for path, rule in used.items()}
    expected = variable_shapes(config)
    by_path: dict[str, Rule] = {}
    for rule in rules:
        by_path.setdefault(rule.ours, rule)
    misshaped = []
    for path in expected:
        if path in used:
            for name, shape in foreign_shapes(used[path], expected[path], config).items():
                if entries[name].shape != shape:
                    misshaped.append((name, shape, entries[name].shape))
    missing = [
        name
        for path in expected
        if path not in used
        for name in (by_path[path].theirs if path in by_path else (path,))
        if name not in entries
    ]
    unexpected = [f"{name} ({why})" if why else name for name, why in left.items()]
    unexpected += [name for path, rule in used.items() if path not in expected for name in rule.theirs]
    if misshaped:
        name, shape, received = misshaped[0]
        others = f" {len(misshaped) - 1} more: {_some(x[0] for x in misshaped[1:])}." if misshaped[1:] else ""
        raise WeightsError(
            f"Cannot load {name}. Expected shape {shape}. Received: shape={received}.{others} {advice(ours)}"
        )
    if missing:
        also = f", and unexpected {_some(unexpected)}" if unexpected else ""
        raise WeightsError(
            f"Cannot load {source}. Expected the tensors of the model. Received: {len(missing)} missing: "
            f"{_some(missing)}{also}. {advice(ours)}"
        )
    if unexpected:
        raise WeightsError(
            f"Cannot load {source}. Expected only tensors that the model reads. Received: {len(unexpected)} "
            f"unexpected: {_some(unexpected)}. {advice(ours)}"
        )

    def reader(rule: Rule) -> Callable[[], np.ndarray]:
        return lambda: rule.layout.read([entries[name].read() for name in rule.theirs])

    return {path: reader(used[path]) for path in expected}, [n for rule in used.values() for n in rule.theirs]


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ---- writing ----


def plan(
    rules: Sequence[Rule],
    arrays: Arrays,
    config: ViTConfig,
    *,
    what: str,
    extras: Mapping[str, np.ndarray] | None = None,
) -> dict[str, tuple[Shape, Callable[[], np.ndarray]]]:
    """Says what a file of another format will hold: the reverse of `match`.

    Raises:
        WeightsError: If the format has no place for a variable.
    """
    shapes = variable_shapes(config)
    by_path: dict[str, Rule] = {}
    for rule in rules:
        by_path.setdefault(rule.ours, rule)
    if homeless := [path for path in shapes if path not in by_path]:
        raise WeightsError(
            f"Cannot write {what}. Expected variables that it has a place for. Received: {_some(homeless)}. "
            "Export to timm or to .keras, or change the architecture."
        )
    outgoing: dict[str, tuple[Shape, Callable[[], np.ndarray]]] = {}

    def part(rule: Rule, index: int) -> Callable[[], np.ndarray]:
        return lambda: rule.layout.write(arrays[rule.ours](), len(rule.theirs), config)[index]

    for path, shape in shapes.items():
        rule = by_path[path]
        for index, (name, foreign) in enumerate(foreign_shapes(rule, shape, config).items()):
            outgoing[name] = (foreign, part(rule, index))
    for name, values in (extras or {}).items():
        outgoing[name] = (values.shape, lambda values=values: values)  # type: ignore[misc]
    return outgoing


def count_values(tensors: Outgoing) -> int:
    """Returns how many numbers a plan writes."""
    return sum(math.prod(shape) for shape, _ in tensors.values())


# ---- architectures from shapes ----


def infer_fields(shapes: Mapping[str, Shape | None]) -> dict[str, Any]:
    """Returns the fields of `ViTConfig` that paths and shapes settle.

    What they leave open: heads, epsilon, activation, rotary positions, where a block normalises, the image's size.

    Args:
        shapes: {path: shape} of our variables, as a file's tensors give them.

    Raises:
        WeightsError: If there is no patch projection to start from.
    """
    known: dict[str, Shape] = {path: shape for path, shape in shapes.items() if shape is not None}
    kernel = known.get("patch_encoder/projection/kernel")
    blocks = {int(m[1]) for path in known if (m := re.match(r"block_(\d+)/", path))}
    mlp = known.get("block_0/mlp/output/kernel")
    if kernel is None or not blocks or mlp is None:
        raise WeightsError(
            "Cannot tell the architecture from the tensors. Expected a patch projection and blocks. Received: "
            f"{_some(known) or 'none of them'}. Pass a file of a plain Vision Transformer."
        )

    def count(path: str) -> int:
        return known[path][1] if path in known else 0

    hidden = known.get("block_0/mlp/hidden/kernel", (0, 0))[1]
    pooling = "map" if "attention_pool/latent" in known else "class"
    if not count("patch_encoder/class_token"):
        pooling = "mean" if pooling == "class" else pooling
    head = known.get("head/kernel", (0, 0))
    fields: dict[str, Any] = {
        "use_patch_bias": "patch_encoder/projection/bias" in known,
        "projection_dim": kernel[1],
        "num_blocks": max(blocks) + 1,
        "mlp_dim": mlp[0],
        "num_classes": head[1],
        "use_class_token": count("patch_encoder/class_token") > 0,
        "use_distillation_token": count("patch_encoder/distillation_token") > 0,
        "use_distillation_head": "distillation_head/kernel" in known,
        "num_registers": count("patch_encoder/registers"),
        "position": "learned" if "patch_encoder/position_embedding" in known else "none",
        "use_pre_norm": "pre_norm/gamma" in known,
        "norm": "layer" if "block_0/attention/norm/beta" in known else "rms",
        "final_norm": "tokens" if "norm/gamma" in known else "none",
        "use_qk_norm": "block_0/attention/query_norm/gamma" in known,
        "use_attention_norm": "block_0/attention/inner_norm/gamma" in known,
        "use_qkv_bias": "block_0/attention/qkv/bias" in known or "block_0/attention/query_value_bias" in known,
        "use_key_bias": "block_0/attention/query_value_bias" not in known,
        "use_projection_bias": "block_0/attention/projection/bias" in known,
        "use_local_attention": "block_0/attention/temperature" in known,
        "num_parallel": 1 + sum(bool(re.match(r"block_0/mlp_\d+/output/kernel", path)) for path in known),
        "mlp": "swiglu" if hidden == 2 * mlp[0] else "dense",
        "use_mlp_norm": "block_0/mlp/inner_norm/gamma" in known,
        "use_mlp_bias": "block_0/mlp/output/bias" in known,
        "layer_scale": 1e-5 if "block_0/attention/layer_scale" in known else 0.0,
        "pooling": "class_mean" if head[0] == 2 * kernel[1] else pooling,
    }
    if fields["mlp"] == "swiglu":
        fields["activation"] = "silu"
    if fields["use_qk_norm"]:
        fields["num_heads"] = kernel[1] // known["block_0/attention/query_norm/gamma"][0]
    elif fields["use_local_attention"]:
        fields["num_heads"] = known["block_0/attention/temperature"][0]
    return fields


def infer_grid(
    fields: Mapping[str, Any], num_positions: int, grids: Iterable[tuple[int, int]] = ()
) -> tuple[tuple[int, int], str] | None:
    """Returns the grid of patches and which tokens have a position, from the number of positions.

    Args:
        fields: What `infer_fields` returned.
        num_positions: Positions in the file.
        grids: Grids to try first, such as that of an image size the user named; else a square one.

    Returns:
        ((rows, columns), `position_tokens`), or None if no grid has so many patches.
    """
    first = int(fields["use_class_token"]) + int(fields["use_distillation_token"])
    choices = [("all", first + fields["num_registers"]), ("class", first), ("patches", 0)]
    if fields.get("position_tokens"):
        choices = [choice for choice in choices if choice[0] == fields["position_tokens"]]
    for grid in grids:
        for tokens, prefix in choices:
            if grid[0] * grid[1] == num_positions - prefix:
                return grid, tokens
    for tokens, prefix in choices:
        side = math.isqrt(max(num_positions - prefix, 0))
        if side and side * side == num_positions - prefix:
            return (side, side), tokens
    return None


# ---- from one architecture to another ----


def adapt(arrays: Arrays, old: ViTConfig, new: ViTConfig) -> tuple[Arrays, list[str]]:
    """Fits weights to another image size, patch size or number of classes.

    Returns:
        {path: a function that makes its values} without the heads that stay fresh, and what was done, in words.

    Raises:
        WeightsError: If the two differ in anything else.
    """
    arrays, notes = dict(arrays), []
    if new.patch_size != old.patch_size:
        if old.stem != "none":
            raise WeightsError(
                f"Cannot fit the weights to another patch size. Expected {_by(old.patch_size)}, that of the stem. "
                f"Received: patch_size={new.patch_size}. Leave out patch_size."
            )
        read_kernel = arrays["patch_encoder/projection/kernel"]

        def kernel() -> np.ndarray:
            values = read_kernel().reshape(*old.patch_size, old.num_channels, -1)
            return resize_patch_kernel(values, new.patch_size).reshape(-1, old.projection_dim)

        arrays["patch_encoder/projection/kernel"] = kernel
        notes.append(f"patches resized {_by(old.patch_size)} -> {_by(new.patch_size)}")
    if old.position == "learned" and new.grid_size != old.grid_size:
        read_positions = arrays["patch_encoder/position_embedding"]
        arrays["patch_encoder/position_embedding"] = lambda: resize_position_embedding(
            read_positions(), old.grid_size, new.grid_size, old.num_prefix_positions
        )
        notes.append(f"positions resized {_by(old.grid_size)} -> {_by(new.grid_size)}")
    if new.num_classes != old.num_classes:
        arrays = {path: get for path, get in arrays.items() if not is_head(path)}
        if new.num_classes:
            notes.append(f"fresh head for {new.num_classes} classes (the file has {old.num_classes or 'none'})")
        else:
            notes.append(f"no head (the file has one for {old.num_classes} classes)")
    elif new.num_classes and old.pooling != new.pooling and old.features_dim != new.features_dim:
        arrays = {path: get for path, get in arrays.items() if not is_head(path)}
        notes.append(f"fresh head, because pooling changes from {old.pooling} to {new.pooling}")
    if new.stem != "none":  # `variable_shapes` knows of none; the model that is filled checks them
        return arrays, notes
    wanted = {path for path in variable_shapes(new) if path in arrays or not is_head(path)}
    if differing := sorted(wanted ^ set(arrays)):
        raise WeightsError(
            f"Cannot fit the weights to the architecture asked for. Expected changes of image size, patch size or "
            f"classes only. Received: a difference in {_some(differing)}. Leave the other fields as the file has them."
        )
    return arrays, notes


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def fold_positions(arrays: Arrays, config: ViTConfig, tokens: str) -> tuple[Arrays, ViTConfig]:
    """Writes the positions of prefix tokens another way, with the same sums.

    A token's own position can be added to the token itself (`"all"` or `"class"` to `"patches"`), and tokens without
    a position have the position 0 (the other way round).
    """
    if config.position != "learned" or config.position_tokens == tokens:
        return arrays, config
    new = config.replace(position_tokens=tokens)
    before, after = config.num_prefix_positions, new.num_prefix_positions
    if before == after:
        return arrays, new
    arrays, positions = dict(arrays), arrays["patch_encoder/position_embedding"]
    if after > before:

        def padded() -> np.ndarray:
            values = positions()
            zeros = np.zeros((1, after - before, values.shape[-1]), values.dtype)
            return np.concatenate([values[:, :before], zeros, values[:, before:]], axis=1)

        arrays["patch_encoder/position_embedding"] = padded
        return arrays, new

    def added(get: Callable[[], np.ndarray], start: int) -> Callable[[], np.ndarray]:
        def values() -> np.ndarray:
            token = get()
            return token + positions()[:, start : start + token.shape[1]]

        return values

    arrays["patch_encoder/position_embedding"] = lambda: np.concatenate(
        [positions()[:, :after], positions()[:, before:]], axis=1
    )
    start = 0
    for name, count in (
        ("class_token", int(config.use_class_token)),
        ("distillation_token", int(config.use_distillation_token)),
        ("registers", config.num_registers),
    ):
        if count and after <= start < before:
            arrays[f"patch_encoder/{name}"] = added(arrays[f"patch_encoder/{name}"], start)
        start += count
    return arrays, new
