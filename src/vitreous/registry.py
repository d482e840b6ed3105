"""The table of models: names, as timm writes them, and what they stand for.

A name reads size, patch, image: `vit_tiny_patch16_224` is the size `tiny`, cut into 16-pixel patches, made for
224-pixel images. The sizes `pico`, `nano` and `micro` are vitreous's own, for images of 8 to 64 pixels and for
training from scratch on a CPU; they pool by the mean over patches and use the tanh form of GELU, which is cheaper.
"""

from fnmatch import fnmatchcase
from typing import Any

from vitreous.errors import UnknownNameError
from vitreous.patches import as_pair
from vitreous.spec import InputSpec, ModelSpec, ViTConfig

# size: (projection_dim, num_blocks, num_heads)
# Source of tiny: Touvron et al. 2021, https://arxiv.org/abs/2012.12877, table 1; small: the same, as timm has it;
# base, large, huge: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, table 1.
_SIZES = {
    "pico": (64, 6, 4),
    "nano": (96, 6, 3),
    "micro": (128, 8, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

# (size, patch, image): the models there are
_MODELS = [
    ("pico", 1, 8),
    ("pico", 2, 8),
    ("nano", 2, 8),
    ("pico", 4, 28),
    ("nano", 4, 28),
    *((size, 4, 32) for size in ("pico", "nano", "micro", "tiny", "small")),
    ("nano", 8, 64),
    ("micro", 8, 64),
    ("tiny", 8, 64),
    ("micro", 16, 224),
    *((size, 16, image) for size in ("tiny", "small", "base", "large") for image in (224, 384)),
    *((size, 32, image) for size in ("small", "base", "large") for image in (224, 384)),
    ("small", 8, 224),
    ("base", 8, 224),
    ("large", 14, 224),
    ("huge", 14, 224),
]


def _spec(size: str, patch: int, image: int) -> ModelSpec:
    projection_dim, num_blocks, num_heads = _SIZES[size]
    is_own = size in ("pico", "nano", "micro")
    crop_fraction = 0.9 if image == 224 else 1.0  # as timm evaluates its `vit_*` weights
    return ModelSpec(
        name=f"vit_{size}_patch{patch}_{image}",
        config=ViTConfig(
            image_size=(image, image),
            patch_size=(patch, patch),
            projection_dim=projection_dim,
            num_blocks=num_blocks,
            num_heads=num_heads,
            use_class_token=not is_own,
            pooling="mean" if is_own else "class",
            activation="gelu_tanh" if is_own else "gelu",
        ),
        input=InputSpec(image_size=(image, image), crop_fraction=crop_fraction),
    )


_SPECS = {spec.name: spec for spec in (_spec(*row) for row in _MODELS)}


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names of the models.

    Args:
        pattern: A shell pattern (`"vit_tiny*"`), or a part of the name (`"tiny"`).

    Returns:
        The names that match, smallest model first.
    """
    pattern = pattern.lower()
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    names = [name for name in _SPECS if fnmatchcase(name, pattern)]
    return sorted(names, key=lambda name: (count_parameters(_SPECS[name].config), name))


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
        name: A name that `list_models()` has.
        num_classes: K. Default: that of the named model.
        image_size: (H, W) in pixels or one number. Default: that of the named model.
        num_channels: 3 or 1; with 1, mean and std are those of the first channel. Default: that of the named model.
        **changes: Any other field of `ViTConfig`.

    Raises:
        UnknownNameError: If no model has that name; the nearest are named.
        ConfigError: If the values do not fit each other.
    """
    if name not in _SPECS:
        raise UnknownNameError("model", name, _SPECS, "List them all with: vitreous models")
    spec = _SPECS[name]
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
    return ModelSpec(name=name, config=spec.config.replace(**changes), input=spec.input.replace(**input_changes))


def count_parameters(config: ViTConfig) -> int:
    """Returns the number of weights of a model with this architecture, without building it."""
    dim, hidden = config.projection_dim, config.mlp_dim
    patch_dim = config.patch_size[0] * config.patch_size[1] * config.num_channels
    block = 4 * dim + (dim * 3 * dim + 3 * dim) + (dim * dim + dim) + (dim * hidden + hidden) + (hidden * dim + dim)
    encoder = (patch_dim * dim + dim) + config.num_tokens * dim + int(config.use_class_token) * dim
    head = (dim + 1) * config.num_classes
    return encoder + config.num_blocks * block + 2 * dim + head


def count_macs(config: ViTConfig) -> int:
    """Returns the multiply-accumulate operations of the matrix products for one image, without building the model."""
    dim, hidden, tokens = config.projection_dim, config.mlp_dim, config.num_tokens
    patch_dim = config.patch_size[0] * config.patch_size[1] * config.num_channels
    block = tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim
    return config.num_patches * patch_dim * dim + config.num_blocks * block + dim * config.num_classes
