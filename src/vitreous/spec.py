"""The records that describe a model and its input: frozen, plain, without Keras.

Everything that two parts of vitreous must agree on stands here once: what the network is (`ViTConfig`), what an
image must look like before it enters (`InputSpec`), how training varies it (`AugmentConfig`), and what a model's name
stands for (`ModelSpec`).

Letters in shapes: B batch, H/W image pixels, C channels, P patch, N tokens, D width, A heads, K classes.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_type_hints

from vitreous.errors import ConfigError, UnknownNameError
from vitreous.patches import PatchGrid, as_pair

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["crop", "squash", "pad"]


class Record:
    """What the frozen dataclasses of vitreous share: to a plain dict and back, and copies with changes."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, fit for JSON and TOML: tuples become lists, records become dicts."""

        def plain(value: Any) -> Any:
            return value.to_dict() if isinstance(value, Record) else list(value) if isinstance(value, tuple) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the record from `to_dict()`'s result; keys that are absent take their defaults.

        Raises:
            UnknownNameError: If a key is not a field of this record; the nearest are named.
        """
        hints = get_type_hints(cls)
        arguments = {}
        for key, value in values.items():
            if key not in hints:
                raise UnknownNameError(f"key of {cls.__name__}", key, hints, f"Keys: {', '.join(hints)}.")
            if isinstance(value, Mapping) and isinstance(hints[key], type) and issubclass(hints[key], Record):
                value = hints[key].from_dict(value)
            arguments[key] = tuple(value) if isinstance(value, list) else value
        return cls(**arguments)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed; the copy is checked like a new record."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def check(condition: bool, what: str, expected: str, received: str, remedy: str) -> None:
    """Raises `ConfigError` with the four parts of a message unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{what} Expected {expected}. Received: {received}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Record):
    """The architecture of a Vision Transformer.

    Defaults are those of the ViT paper's base model without its head.

    Args:
        image_size: (H, W) in pixels, or one number for a square.
        patch_size: (P_h, P_w) in pixels, or one number.
        patch_strides: Distance in pixels between patches, (vertical, horizontal) or one number. Default: `patch_size`,
            so that patches touch and do not overlap.
        patch_padding: `"valid"` (only whole patches) or `"same"` (zeros around the image), as in TensorFlow.
        num_channels: Channels of the image: 3 for colour, 1 for grey.
        projection_dim: D, the width of every token.
        num_blocks: Number of transformer blocks.
        num_heads: A, attention heads; must divide `projection_dim`.
        mlp_dim: Hidden units of each MLP. Default: 4 * `projection_dim`.
        num_classes: K, outputs of the head; 0 builds no head, and the model returns its pooled features.
        use_class_token: Whether a trainable class token stands before the patch tokens.
        pooling: What the head reads: `"class"` (the class token) or `"mean"` (the mean over patch tokens only).
        activation: Activation inside the MLP: `"gelu"` (exact) or `"gelu_tanh"` (its tanh approximation).
        epsilon: Added to the variance in every layer normalisation.
        dropout_rate: Share of MLP and projection outputs dropped in training, in [0, 1).
        attention_dropout_rate: Share of attention weights dropped in training, in [0, 1).
        stochastic_depth_rate: Probability, in [0, 1), that the last block is skipped for an example in training; it
            grows linearly from 0 at the first block (Huang et al. 2016, https://arxiv.org/abs/1603.09382).

    Raises:
        ConfigError: If a value is out of range, or the patches do not fit the image.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3 and table 1.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    patch_strides: tuple[int, int] = None  # type: ignore[assignment]  # settled below, like mlp_dim
    patch_padding: Literal["valid", "same"] = "valid"
    num_channels: int = 3
    projection_dim: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    mlp_dim: int = None  # type: ignore[assignment]
    num_classes: int = 1000
    use_class_token: bool = True
    pooling: Literal["class", "mean"] = "class"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    epsilon: float = 1e-6
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("image_size", as_pair(self.image_size, "image_size"))
        settle("patch_size", as_pair(self.patch_size, "patch_size"))
        settle("patch_strides", as_pair(self.patch_strides or self.patch_size, "patch_strides"))
        settle("mlp_dim", self.mlp_dim or 4 * self.projection_dim)
        for name in ("num_channels", "projection_dim", "num_blocks", "num_heads", "mlp_dim"):
            value = getattr(self, name)
            check(value >= 1, f"Cannot use {name}.", "at least 1", f"{name}={value}", "Pass a positive number.")
        check(
            self.num_classes >= 0,
            "Cannot use num_classes.",
            "0 (no head) or more",
            f"num_classes={self.num_classes}",
            "Pass the number of classes.",
        )
        for name in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
            value = getattr(self, name)
            check(
                0 <= value < 1, f"Cannot use {name}.", "a value in [0, 1)", f"{name}={value}", "Pass a smaller share."
            )
        check(
            self.projection_dim % self.num_heads == 0,
            "Cannot split the width into attention heads.",
            "projection_dim divisible by num_heads",
            f"projection_dim={self.projection_dim}, num_heads={self.num_heads}",
            "Change one of the two.",
        )
        for name, known in (
            ("pooling", ("class", "mean")),
            ("activation", ("gelu", "gelu_tanh")),
            ("patch_padding", ("valid", "same")),
        ):
            value = getattr(self, name)
            check(value in known, f"Cannot use {name}.", f"one of {known}", f"{name}={value!r}", "Pass one of them.")
        check(
            self.use_class_token or self.pooling != "class",
            "Cannot pool the class token.",
            "use_class_token=True with pooling='class'",
            "use_class_token=False",
            "Pass pooling='mean', or keep the class token.",
        )
        if self.patch_padding == "valid" and self.patch_strides == self.patch_size:
            for axis, pixels, patch in zip(("height", "width"), self.image_size, self.patch_size, strict=True):
                check(
                    pixels % patch == 0,
                    "Cannot cut the image into patches.",
                    f"an image {axis} divisible by the patch size",
                    f"image_size={self.image_size}, patch_size={self.patch_size}",
                    f"Pass {pixels // patch * patch or patch} or {(pixels // patch + 1) * patch} pixels, "
                    "another patch size, or patch_padding='same'.",
                )
        _ = self.grid_size  # PatchGrid says so if no patch fits

    @property
    def patch_grid(self) -> PatchGrid:
        """Where the patches lie in the image."""
        return PatchGrid(size=self.patch_size, strides=self.patch_strides, padding=self.patch_padding)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.patch_grid.grid_size(self.image_size)

    @property
    def num_patches(self) -> int:
        """Patches in one image."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """N, tokens that each block sees: patches, and the class token where there is one."""
        return self.num_patches + int(self.use_class_token)


@dataclass(frozen=True, kw_only=True)
class InputSpec(Record):
    """What an image must go through before it enters a model. Data, export and the server all read this record.

    An image is decoded to uint8, brought to `image_size` (by `resize_mode`), and normalised as
    `(image / 255 - mean) / std`.

    Args:
        image_size: (H, W) in pixels that the model takes.
        num_channels: 3 (RGB) or 1 (grey).
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
        interpolation: Filter of the antialiased resize.
        resize_mode: `"crop"` resizes so that the image covers `image_size / crop_fraction`, and cuts the centre;
            `"squash"` resizes to `image_size` without regard to the aspect; `"pad"` fits the whole image in and
            fills the rest with the mean colour.
        crop_fraction: Share of the resized image's side that the centre crop keeps, in (0, 1]; for `"crop"` only.

    Raises:
        ConfigError: If a value is out of range or the channels do not agree.
    """

    image_size: tuple[int, int] = (224, 224)
    num_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "crop"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_pair(self.image_size, "image_size"))
        check(
            self.num_channels in (1, 3),
            "Cannot use num_channels.",
            "1 (grey) or 3 (RGB)",
            f"num_channels={self.num_channels}",
            "Pass one of them.",
        )
        for name in ("mean", "std"):
            value = tuple(float(x) for x in getattr(self, name))
            object.__setattr__(self, name, value)
            check(
                len(value) == self.num_channels,
                f"Cannot use {name}.",
                f"one value for each of the {self.num_channels} channels",
                f"{name}={value}",
                "Pass as many values as channels.",
            )
        check(min(self.std) > 0, "Cannot use std.", "positive values", f"std={self.std}", "Pass positive values.")
        check(
            0 < self.crop_fraction <= 1,
            "Cannot use crop_fraction.",
            "a value in (0, 1]",
            f"crop_fraction={self.crop_fraction}",
            "Pass 1.0 to keep the whole centre.",
        )
        for name, known in (
            ("interpolation", ("nearest", "bilinear", "bicubic", "lanczos")),
            ("resize_mode", ("crop", "squash", "pad")),
        ):
            value = getattr(self, name)
            check(value in known, f"Cannot use {name}.", f"one of {known}", f"{name}={value!r}", "Pass one of them.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Record):
    """How training images are changed at random, in the order of these fields: crop, shift, flip, colours, erasing.

    Args:
        crop_scale: Share of the image's area that a random crop keeps, (smallest, largest) in (0, 1]; the crop is then
            resized to the model's input. (1, 1) turns it off: the image is brought to size as in evaluation.
        crop_ratio: Width over height of the random crop, (smallest, largest).
        shift_pixels: Largest shift, in pixels of the model's input, up, down, left and right; what comes in at the
            edge is the image's reflection. 0 turns it off.
        horizontal_flip_rate: Probability of swapping left and right, in [0, 1].
        trivial_augment: Whether one operation out of TrivialAugment's 14, at a random strength, changes each image.
        colour_jitter: Strength in [0, 1]: brightness, contrast and saturation are each multiplied by a factor between
            1 - strength and 1 + strength, in random order. 0 turns it off.
        erasing_rate: Probability, in [0, 1], that a rectangle of the image becomes noise.

    Raises:
        ConfigError: If a value is out of range.

    Source: random resized crop: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6; the rest:
    `trivial_augment` and `erase` in vitreous.data.transforms.
    """

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift_pixels: int = 0
    horizontal_flip_rate: float = 0.5
    trivial_augment: bool = False
    colour_jitter: float = 0.0
    erasing_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, highest in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            value = getattr(self, name)
            is_pair = isinstance(value, tuple | list) and len(value) == 2
            check(
                is_pair and 0 < value[0] <= value[1] <= highest,
                f"Cannot use {name}.",
                "two rising numbers (smallest, largest), above 0" + (" and up to 1" if highest == 1 else ""),
                f"{name}={value}",
                "Pass a pair such as (0.35, 1.0)." if highest == 1 else "Pass a pair such as (0.75, 1.33).",
            )
            object.__setattr__(self, name, (float(value[0]), float(value[1])))
        for name in ("horizontal_flip_rate", "colour_jitter", "erasing_rate"):
            value = getattr(self, name)
            check(
                0 <= value <= 1, f"Cannot use {name}.", "a value in [0, 1]", f"{name}={value}", "Pass 0 to turn it off."
            )
        check(
            self.shift_pixels >= 0,
            "Cannot use shift_pixels.",
            "0 or more pixels",
            f"shift_pixels={self.shift_pixels}",
            "Pass 0 to turn it off.",
        )

    @property
    def has_crop(self) -> bool:
        """Whether images are cropped at random."""
        return self.crop_scale != (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Record):
    """A named model: its architecture and the input it was made for.

    Args:
        name: Name of the model, as in `vitreous models`.
        config: Its architecture.
        input: What images must look like.
    """

    name: str
    config: ViTConfig
    input: InputSpec

    def __post_init__(self) -> None:
        check(
            (self.config.image_size, self.config.num_channels) == (self.input.image_size, self.input.num_channels),
            f"Cannot describe {self.name}.",
            "the same image size and channels in the architecture and in the input",
            f"config.image_size={self.config.image_size}, input.image_size={self.input.image_size}, "
            f"config.num_channels={self.config.num_channels}, input.num_channels={self.input.num_channels}",
            "Change both together.",
        )
