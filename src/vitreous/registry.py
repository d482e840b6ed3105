"""Model names, as timm writes them, and what they stand for: architecture, input and published weights.

The table itself stands in `vitreous.registry_table`. A name may carry the tag of published weights, as in timm:
`vit_base_patch16_224.augreg_in21k` has the classes and the input of these weights; `vit_base_patch16_224` alone has
those of its first tag.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from vitreous.errors import UnknownNameError
from vitreous.patches import as_pair
from vitreous.registry_table import FAMILIES, HALF, TAGS, WORDS, Family, Model
from vitreous.spec import InputSpec, ModelSpec, ViTConfig, WeightsSource


def _expand(names: str) -> Iterator[str]:
    """Yields every name that `a_{b,c}_d` stands for, as in a shell."""
    parts = re.split(r"\{(.*?)\}", names)
    yield from map("".join, itertools.product(*(part.split(",") if i % 2 else [part] for i, part in enumerate(parts))))


_MODELS = {name: (family, model) for family in FAMILIES for model in family.models for name in _expand(model.name)}


def _read_name(name: str, family: Family, model: Model) -> dict[str, Any]:
    """Returns what a name's family, its words and its own line say, in fields of `ViTConfig` and `InputSpec`."""
    fields = dict(family.changes)
    for word in name.split("_"):
        if word.isdigit():
            fields["image_size"] = int(word)
        elif number := re.fullmatch(r"(patch|reg)(\d+)", word):
            fields["patch_size" if number[1] == "patch" else "num_registers"] = int(number[2])
        fields |= WORDS.get(word, {}) | family.words.get(word, {})
    return fields | model.changes


def _read_weights(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the tag in `tag/0.95/squash`, and what it and the words behind it change."""
    tag, *words = text.split("/")
    changes: dict[str, Any] = {}
    for pattern, fields in TAGS:
        if fnmatchcase(tag, pattern):
            changes |= fields
    for word in words:
        if word == "half":
            changes |= HALF
        else:
            changes |= {"resize_mode": "squash"} if word == "squash" else {"crop_fraction": float(word)}
    return tag, changes


def _pick(record: type, fields: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(record)}
    return {name: value for name, value in fields.items() if name in names}


@functools.cache
def _weights(name: str) -> dict[str, WeightsSource]:
    family, model = _MODELS[name]
    fields = {"num_classes": ViTConfig.num_classes, "license": family.license, **_read_name(name, family, model)}
    sources = {}
    for tag, changes in map(_read_weights, model.weights.split()):
        settled = fields | changes
        sources[tag] = WeightsSource(
            model=name,
            tag=tag,
            hub_id=f"{family.owner}/{name.replace('_quickgelu', '')}.{tag}",  # one file serves both activations
            license=settled["license"],
            num_classes=settled["num_classes"],
            input=InputSpec(**_pick(InputSpec, settled)),
        )
    return sources


@functools.cache
def _spec(name: str, tag: str) -> ModelSpec:
    family, model = _MODELS[name]
    fields = _read_name(name, family, model)
    config, input_spec = ViTConfig(**_pick(ViTConfig, fields)), InputSpec(**_pick(InputSpec, fields))
    if tag:
        source = _weights(name)[tag]
        config, input_spec = config.replace(num_classes=source.num_classes), source.input
    return ModelSpec(name=name, config=config, input=input_spec)


def _split(name: str) -> tuple[str, str]:
    """Returns the model's name and the tag of its weights: the first one's if `name` has none, "" if there are none."""
    model, _, tag = name.partition(".")
    if model not in _MODELS:
        raise UnknownNameError("model", model, _MODELS, "List them all with: vitreous models")
    tags = _weights(model)
    if tag and tag not in tags:
        hint = f"{model} has {', '.join(tags) if tags else 'no published weights; pass its name alone'}."
        raise UnknownNameError("tag", tag, tags, hint)
    return model, tag or next(iter(tags), "")


def list_models(pattern: str = "*", *, has_weights: bool = False) -> list[str]:
    """Lists the names of the models.

    Args:
        pattern: A shell pattern (`"vit_tiny*"`), or a part of the name (`"tiny"`).
        has_weights: Whether to leave out models without published weights.

    Returns:
        The names that match, smallest model first.
    """
    pattern = pattern.lower()
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    names = [
        name
        for name, (_, model) in _MODELS.items()
        if fnmatchcase(name, pattern) and (model.weights or not has_weights)
    ]
    return sorted(names, key=lambda name: (count_parameters(get_spec(name).config), name))


def list_families() -> dict[str, list[str]]:
    """Lists the names of the models by family, {family's title: names}, in the table's order."""
    return {family.title: [name for model in family.models for name in _expand(model.name)] for family in FAMILIES}


def get_family(name: str) -> Family:
    """Returns the family of a model: its title, its source and the usual licence of its weights.

    Raises:
        UnknownNameError: If no model has that name; the nearest are named.
    """
    return _MODELS[_split(name)[0]][0]


def list_weights(name: str) -> list[WeightsSource]:
    """Lists the published weights of a model, the default ones first; only one for a name with a tag.

    Raises:
        UnknownNameError: If no model has that name, or no weights that tag; the nearest are named.

    Example:

    ```python
    for source in list_weights("vit_base_patch16_224"):
        print(source.tag, source.num_classes, source.license, source.hub_id)
    ```
    """
    model, tag = _split(name)
    sources = _weights(model)
    return [sources[tag]] if "." in name else list(sources.values())


def get_spec(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_channels: int | None = None,
    **changes: Any,
) -> ModelSpec:
    """Returns what a name stands for, with some of it changed.

    Args:
        name: A name that `list_models()` has; `NAME.TAG` for the classes and the input of one of `list_weights(NAME)`.
            Default of the tag: the first one.
        num_classes: K. Default: that of the named model; 0, no head, where its weights have none.
        image_size: (H, W) in pixels or one number. Default: that of the named model.
        num_channels: 3 or 1; with 1, mean and std are those of the first channel. Default: that of the named model.
        **changes: Any other field of `ViTConfig`.

    Returns:
        The spec, under the model's name without the tag.

    Raises:
        UnknownNameError: If no model has that name, or no weights that tag; the nearest are named.
        ConfigError: If the values do not fit each other.
    """
    spec = _spec(*_split(name))
    input_changes: dict[str, Any] = {}
    if num_classes is not None:
        changes["num_classes"] = num_classes
    if image_size is not None:
        changes["image_size"] = input_changes["image_size"] = as_pair(image_size, "image_size")
    if num_channels is not None and num_channels != spec.input.num_channels:
        changes["num_channels"] = input_changes["num_channels"] = num_channels
        input_changes["mean"] = spec.input.mean[:1] * num_channels
        input_changes["std"] = spec.input.std[:1] * num_channels
    if "patch_size" in changes and "patch_strides" not in changes:
        changes["patch_strides"] = None  # follows the new size
    if "projection_dim" in changes and "mlp_dim" not in changes:
        changes["mlp_dim"] = None
    if "projection_dim" in changes and "stem_dim" not in changes:
        changes["stem_dim"] = None
    if "rope" in changes and "rope_temperature" not in changes:
        changes["rope_temperature"] = None
    return ModelSpec(name=spec.name, config=spec.config.replace(**changes), input=spec.input.replace(**input_changes))


def _stem_convolutions(config: ViTConfig) -> list[tuple[int, int, int]]:
    """Returns the channels that enter and leave each convolution of the stem, and its stride."""
    count = config.patch_size[0].bit_length() - 1
    convolutions, inputs = [], config.num_channels
    for i, depth in enumerate((0,) * (count - len(config.stem_depths)) + config.stem_depths):
        width = max(config.stem_dim >> (count - 1 - i), 1)
        convolutions += [(inputs, width, 2)] + [(width, width, 1)] * depth
        inputs = width
    return convolutions


def _patch_dim(config: ViTConfig) -> int:
    """Returns how many values of each patch are projected to a token."""
    if config.stem == "convolution":
        return config.stem_dim
    return config.patch_size[0] * config.patch_size[1] * config.num_channels * (5 if config.stem == "shifted" else 1)


def count_parameters(config: ViTConfig) -> int:
    """Returns the number of weights of a model with this architecture, without building it."""
    dim, hidden = config.projection_dim, config.mlp_dim

    def dense(inputs: int, outputs: int, use_bias: bool = True) -> int:
        return inputs * outputs + use_bias * outputs

    def norm(width: int) -> int:
        return width if config.norm == "rms" else 2 * width

    def mlp(width: int, use_bias: bool, inner_norm: int) -> int:
        return norm(dim) + dense(dim, width, use_bias) + inner_norm + dense(hidden, dim, use_bias)

    embedding = dense(_patch_dim(config), dim, config.use_patch_bias) + config.num_prefix_tokens * dim
    if config.position == "learned":
        embedding += (config.num_prefix_positions + config.num_patches) * dim
    if config.stem == "convolution":
        embedding += sum(9 * a * b + 2 * b for a, b, _ in _stem_convolutions(config))
    elif config.stem == "shifted":
        embedding += 2 * _patch_dim(config)

    attention = norm(dim) + dense(dim, 3 * dim, False) + dense(dim, dim, config.use_projection_bias)
    attention += config.use_qkv_bias * (3 if config.use_key_bias else 2) * dim
    attention += config.use_qk_norm * 2 * norm(dim // config.num_heads) + config.use_attention_norm * norm(dim)
    attention += config.use_local_attention * config.num_heads  # a temperature for each head
    gates = 2 if config.mlp == "swiglu" else 1
    block = attention + mlp(gates * hidden, config.use_mlp_bias, config.use_mlp_norm * norm(hidden))
    block += 2 * dim * bool(config.layer_scale)

    norms = config.use_pre_norm * norm(dim)
    if config.final_norm != "none":
        norms += norm(config.features_dim if config.final_norm == "pooled" else dim)
    pooling = 0
    if config.pooling == "map":  # a query, what it reads, and a dense MLP
        pooling = dim + dense(dim, dim) + dense(dim, 2 * dim) + dense(dim, dim) + mlp(hidden, True, 0)
    heads = 0
    if config.num_classes:
        heads = (1 + config.use_distillation_head) * dense(config.features_dim, config.num_classes)
    return embedding + config.num_blocks * config.num_parallel * block + norms + pooling + heads


def count_macs(config: ViTConfig) -> int:
    """Returns the multiply-accumulate operations of the matrix products for one image, without building the model."""
    dim, hidden, tokens, patches = config.projection_dim, config.mlp_dim, config.num_tokens, config.num_patches
    embedding = patches * _patch_dim(config) * dim
    if config.stem == "convolution":
        sizes = list(config.image_size)
        for inputs, outputs, stride in _stem_convolutions(config):
            sizes = [-(-pixels // stride) for pixels in sizes]
            embedding += sizes[0] * sizes[1] * 9 * inputs * outputs
    block = tokens * (4 * dim * dim + (3 if config.mlp == "swiglu" else 2) * dim * hidden) + 2 * tokens * tokens * dim
    pooling = 0
    if config.pooling == "map":  # the patches are read
        pooling = patches * (2 * dim * dim + 2 * dim) + 2 * dim * dim + 2 * dim * hidden
    heads = (1 + config.use_distillation_head) * config.features_dim * config.num_classes
    return embedding + config.num_blocks * config.num_parallel * block + pooling + heads
