"""The records that describe a model and its input: frozen, plain, without Keras.

Everything that two parts of vitreous must agree on stands here once: what the network is (`ViTConfig`), what an
image must look like before it enters (`InputSpec`), how training varies it (`AugmentConfig`), how data are read and
split (`DataConfig`), and what a model's name stands for (`ModelSpec`).

Letters in shapes: B batch, H/W image pixels, C channels, P patch, N tokens, D width, A heads, K classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from vitreous.errors import ConfigError, UnknownNameError
from vitreous.patches import PatchGrid, as_pair

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["crop", "squash", "pad"]
CacheKind = Literal["auto", "memory", "disk", "none"]
Policy = Literal["none", "trivial", "rand", "three"]


class Record:
    """What the frozen dataclasses of vitreous share: checked types, to a plain dict and back, copies with changes.

    A value that does not fit its field's annotation is a `ConfigError`, however the record is made. A field whose
    default is None takes None too; an integer is good for a float, and for a pair of integers.
    """

    def __new__(cls, **values: Any) -> Self:
        """Checks the types of the values before `__post_init__` computes with them."""
        has_none = {name for name, value in values.items() if value is None and getattr(cls, name, 0) is None}
        check_types(cls, {name: value for name, value in values.items() if name not in has_none})
        return super().__new__(cls)

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
            ConfigError: If a value is of another type than its field, or out of range.
        """
        hints = _hints(cls)
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


def check_minimum(minimum: int, **values: float) -> None:
    """Raises `ConfigError` for a value below `minimum`, which is 0 or 1."""
    for name, value in values.items():
        expected, remedy = ("at least 1", "a positive number") if minimum else ("0 (none) or more", "0 or more")
        check(value >= minimum, f"Cannot use {name}.", expected, f"{name}={value}", f"Pass {remedy}.")


def check_rates(**values: float) -> None:
    """Raises `ConfigError` for a value outside [0, 1)."""
    for name, value in values.items():
        check(0 <= value < 1, f"Cannot use {name}.", "a value in [0, 1)", f"{name}={value}", "Pass a share below 1.")


def check_stem_depths(depths: tuple[int, ...], count: int) -> None:
    """Raises `ConfigError` unless `depths` fit a stem with `count` convolutions of stride 2."""
    check(
        len(depths) <= count and min(depths, default=0) >= 0,
        "Cannot build the convolutional stem.",
        f"stem_depths of up to {count} numbers, 0 or more: as many as convolutions of stride 2",
        f"stem_depths={depths}",
        "Pass fewer numbers, or none.",
    )


_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def check_types(annotated: type | Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a value that does not fit its annotation.

    Args:
        annotated: A class or a function whose annotations say what fits.
        values: Values by name; names without an annotation are not checked.
    """
    for name, hint in _hints(annotated).items():
        if name not in values or _fits(value := values[name], hint):
            continue
        remedy = "Pass one of them." if get_origin(hint) is Literal else "Pass such a value."
        if isinstance(value, str) and _fits(1, hint):
            remedy = "Pass it without quotes."
        raise ConfigError(f"Cannot use {name}. Expected {_describe(hint)}. Received: {name}={value!r}. {remedy}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, tuple(map(type, arguments))) and value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        if arguments == (int, int) and _fits(value, int):
            return True  # one number for both
        if not isinstance(value, tuple | list):
            return False
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(items) and all(map(_fits, value, items))
    if origin is dict:
        return isinstance(value, Mapping)
    if hint in (int, float):  # True is an int to Python, but no count
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """Returns an annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        *names, last = map(repr, arguments)
        return f"{', '.join(names)} or {last}" if names else last
    if origin in (Union, UnionType):
        return ", or ".join(map(_describe, arguments))
    if origin is tuple:
        if arguments == (int, int):
            return "an integer, or two (vertical, horizontal)"
        return (
            f"a list of {'text' if arguments[0] is str else 'numbers'}"
            if arguments[-1] is Ellipsis
            else f"a list of {len(arguments)} numbers"
        )
    if origin is dict:
        return "a table of names and values"
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text", NoneType: "None"}
    return words.get(hint) or f"a record {hint.__name__} (in TOML, a table of its fields)"


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Record):
    """The architecture of a Vision Transformer.

    Defaults are those of the ViT paper's base model.

    Args:
        image_size: (H, W) in pixels, or one number for a square.
        has_dynamic_size: Whether a call may bring images of another size: learned positions are resized to it.
        patch_size: (P_h, P_w) in pixels, or one number.
        patch_strides: Distance in pixels between patches, (vertical, horizontal) or one number. Default: `patch_size`,
            so that patches touch and do not overlap.
        patch_padding: `"valid"` (only whole patches) or `"same"` (zeros around the image), as in TensorFlow.
        num_channels: Channels of the image: 3 for colour, 1 for grey.
        stem: What stands before the projection: `"none"`; `"convolution"` (3x3 convolutions of stride 2 down to the
            patch grid, Xiao et al. 2021, https://arxiv.org/abs/2106.14881); `"shifted"` (the image beside four copies
            shifted diagonally by half a patch, Lee et al. 2021, https://arxiv.org/abs/2112.13492).
        stem_dim: Channels after the last convolution of the stem; each one of stride 2 before has half of those of the
            next. Default: `projection_dim`.
        stem_depths: Residual 3x3 convolutions of stride 1 after the last ones of stride 2: (2, 1) puts two of them
            after the last but one, at twice the patch grid's resolution, and one after the last. Default: none.
        use_patch_bias: Whether the patch projection has a bias.
        projection_dim: D, the width of every token.
        num_blocks: Number of transformer blocks.
        num_heads: A, attention heads; must divide `projection_dim`.
        mlp_dim: Hidden units of each MLP. Default: 4 * `projection_dim`.
        num_classes: K, outputs of the head; 0 builds no head, and the model returns its pooled features.
        use_class_token: Whether a trainable class token stands first.
        use_distillation_token: Whether a trainable distillation token follows it (DeiT).
        use_distillation_head: Whether the distillation token has a head of its own; logits are the mean of both.
        num_registers: R, trainable register tokens before the patches (Darcet et al. 2024,
            https://arxiv.org/abs/2309.16588).
        position: `"learned"`, `"sincos"` (fixed, 2-D, Chen et al. 2021, https://arxiv.org/abs/2104.02057) or `"none"`.
        position_tokens: Which tokens have a position of their own: `"all"`; `"class"` (all but registers);
            `"patches"`. Fixed positions are always of patches only.
        rope: Rotary positions in each attention: `"none"`; `"eva"` (axial, as in EVA-02,
            https://arxiv.org/abs/2303.11331); `"dinov3"` (axial over coordinates in [-1, 1], as in DINOv3,
            https://arxiv.org/abs/2508.10104).
        rope_temperature: Base of the rotary frequencies. Default: 10000 for `"eva"`, 100 for `"dinov3"`.
        rope_reference_grid: (rows, columns) that positions of another grid are scaled to, for `"eva"`; (0, 0) for none.
        use_pre_norm: Whether the tokens are normalised before the first block (CLIP).
        norm: `"layer"` (LayerNorm) or `"rms"` (RMSNorm).
        norm_position: Where a block normalises: `"pre"` (x + f(norm(x))) or `"post"` (x + norm(f(x)), as in Swin V2).
        final_norm: What is normalised last: `"tokens"`, or `"pooled"` (after pooling), or `"none"`.
        epsilon: Added to the variance in every normalisation.
        use_qk_norm: Whether queries and keys of each head are normalised (Dehghani et al. 2023,
            https://arxiv.org/abs/2302.05442).
        use_attention_norm: Whether the heads' output is normalised before its projection (EVA-02).
        use_qkv_bias: Whether queries, keys and values have a bias.
        use_key_bias: Whether keys have one too; False in EVA and DINOv3.
        use_projection_bias: Whether attention's projection has a bias.
        use_local_attention: Locality self-attention: a learned temperature, and no token attends to itself (Lee et al.
            2021, https://arxiv.org/abs/2112.13492).
        num_parallel: Attentions, and MLPs, side by side in each block (Touvron et al. 2022,
            https://arxiv.org/abs/2203.09795).
        mlp: `"dense"` (two layers) or `"swiglu"` (a gated one, Shazeer 2020, https://arxiv.org/abs/2002.05202).
        activation: Inside the MLP: `"gelu"` (exact), `"gelu_tanh"`, `"quick_gelu"` (x * sigmoid(1.702 x)) or `"silu"`.
        use_mlp_norm: Whether the MLP's hidden units are normalised (EVA-02).
        use_mlp_bias: Whether the MLP's layers have biases.
        layer_scale: First value of a trainable scale on each branch (Touvron et al. 2021,
            https://arxiv.org/abs/2103.17239); 0 builds none.
        pooling: What the head reads: `"class"` (the class token), `"mean"` (the mean over patch tokens only), `"map"`
            (attention pooling, Zhai et al. 2022, https://arxiv.org/abs/2106.04560) or `"class_mean"` (class token and
            mean beside each other, DINOv2).
        dropout_rate: Share of MLP and projection outputs dropped in training, in [0, 1).
        attention_dropout_rate: Share of attention weights dropped in training, in [0, 1).
        patch_dropout_rate: Share of patch tokens dropped in training, in [0, 1) (Li et al. 2023,
            https://arxiv.org/abs/2212.00794).
        stochastic_depth_rate: Probability, in [0, 1), that the last block is skipped for an example in training; it
            grows linearly from 0 at the first block (Huang et al. 2016, https://arxiv.org/abs/1603.09382).

    Raises:
        ConfigError: If a value is out of range, or two do not fit each other.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3 and table 1; the rest as named above.
    """

    image_size: tuple[int, int] = (224, 224)
    has_dynamic_size: bool = False
    patch_size: tuple[int, int] = (16, 16)
    patch_strides: tuple[int, int] = None  # type: ignore[assignment]  # settled below, like mlp_dim
    patch_padding: Literal["valid", "same"] = "valid"
    num_channels: int = 3
    stem: Literal["none", "convolution", "shifted"] = "none"
    stem_dim: int = None  # type: ignore[assignment]
    stem_depths: tuple[int, ...] = ()
    use_patch_bias: bool = True
    projection_dim: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    mlp_dim: int = None  # type: ignore[assignment]
    num_classes: int = 1000
    use_class_token: bool = True
    use_distillation_token: bool = False
    use_distillation_head: bool = False
    num_registers: int = 0
    position: Literal["learned", "sincos", "none"] = "learned"
    position_tokens: Literal["all", "class", "patches"] = "all"
    rope: Literal["none", "eva", "dinov3"] = "none"
    rope_temperature: float = None  # type: ignore[assignment]
    rope_reference_grid: tuple[int, int] = (0, 0)
    use_pre_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    epsilon: float = 1e-6
    use_qk_norm: bool = False
    use_attention_norm: bool = False
    use_qkv_bias: bool = True
    use_key_bias: bool = True
    use_projection_bias: bool = True
    use_local_attention: bool = False
    num_parallel: int = 1
    mlp: Literal["dense", "swiglu"] = "dense"
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    use_mlp_norm: bool = False
    use_mlp_bias: bool = True
    layer_scale: float = 0.0
    pooling: Literal["class", "mean", "map", "class_mean"] = "class"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    patch_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("image_size", as_pair(self.image_size, "image_size"))
        settle("patch_size", as_pair(self.patch_size, "patch_size"))
        settle("patch_strides", as_pair(self.patch_strides or self.patch_size, "patch_strides"))
        settle("stem_dim", self.stem_dim or self.projection_dim)
        settle("stem_depths", tuple(self.stem_depths))
        settle("mlp_dim", self.mlp_dim or 4 * self.projection_dim)
        settle("rope_temperature", self.rope_temperature or (100.0 if self.rope == "dinov3" else 10000.0))
        grid: Any = self.rope_reference_grid
        settle("rope_reference_grid", tuple(grid) if isinstance(grid, tuple | list) else (grid, grid))

        def named(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names}

        check_minimum(
            1,
            **named("num_channels", "stem_dim", "projection_dim", "num_blocks", "num_heads", "mlp_dim", "num_parallel"),
        )
        check_minimum(0, **named("num_classes", "num_registers", "layer_scale"))
        check_rates(**named("dropout_rate", "attention_dropout_rate", "patch_dropout_rate", "stochastic_depth_rate"))
        check(
            self.projection_dim % self.num_heads == 0,
            "Cannot split the width into attention heads.",
            "projection_dim divisible by num_heads",
            f"projection_dim={self.projection_dim}, num_heads={self.num_heads}",
            "Change one of the two.",
        )
        check(
            self.use_class_token or self.pooling not in ("class", "class_mean"),
            "Cannot pool the class token.",
            f"use_class_token=True with pooling={self.pooling!r}",
            "use_class_token=False",
            "Pass pooling='mean', or keep the class token.",
        )
        check(
            self.use_class_token or not self.use_distillation_token,
            "Cannot place the distillation token.",
            "use_class_token=True with use_distillation_token=True",
            "use_class_token=False",
            "Keep the class token.",
        )
        check(
            not self.use_distillation_head or (self.use_distillation_token and self.pooling == "class"),
            "Cannot build the distillation head.",
            "use_distillation_token=True and pooling='class'",
            f"use_distillation_token={self.use_distillation_token}, pooling={self.pooling!r}",
            "Pass these, or use_distillation_head=False.",
        )
        check(
            self.rope == "none" or (self.projection_dim // self.num_heads) % 4 == 0,
            "Cannot rotate the heads.",
            "a width of each head divisible by 4 with rope",
            f"projection_dim={self.projection_dim}, num_heads={self.num_heads}",
            "Change one of the two, or pass rope='none'.",
        )
        check(
            self.position != "sincos" or self.projection_dim % 4 == 0,
            "Cannot build fixed positions.",
            "projection_dim divisible by 4 with position='sincos'",
            f"projection_dim={self.projection_dim}",
            "Change the width, or learn the positions.",
        )
        self._check_patches()

    def _check_patches(self) -> None:
        if self.stem == "convolution":
            exponent = self.patch_size[0].bit_length() - 1
            check(
                self.patch_size == (2**exponent, 2**exponent) == self.patch_strides and self.patch_size[0] > 1,
                "Cannot build the convolutional stem.",
                "a square patch of 2, 4, 8, 16 ... pixels without overlap",
                f"patch_size={self.patch_size}, patch_strides={self.patch_strides}",
                "Pass such a patch size, or stem='none'.",
            )
            check_stem_depths(self.stem_depths, exponent)
        else:
            check(
                not self.stem_depths,
                "Cannot build residual convolutions.",
                "stem='convolution' with stem_depths",
                f"stem={self.stem!r}, stem_depths={self.stem_depths}",
                "Pass that stem, or no stem_depths.",
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
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return int(self.use_class_token) + int(self.use_distillation_token) + self.num_registers

    @property
    def num_tokens(self) -> int:
        """N, tokens that each block sees: the prefix and the patches."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_prefix_positions(self) -> int:
        """Learned positions before those of the patches."""
        if self.position != "learned" or self.position_tokens == "patches":
            return 0
        return self.num_prefix_tokens - (self.num_registers if self.position_tokens == "class" else 0)

    @property
    def features_dim(self) -> int:
        """Width of the pooled features."""
        return self.projection_dim * (2 if self.pooling == "class_mean" else 1)


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
        resize_mode: `"crop"` resizes so that the image covers `image_size / crop_fraction`; `"squash"` resizes to
            that size without regard to the aspect; `"pad"` fits the whole image into it. Then the centre is cut out,
            and with `"pad"` what is left is filled with the mean colour.
        crop_fraction: Share of the resized image's side that the centre crop keeps, in (0, 1].

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


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Record):
    """How training images are changed at random: first each image, in the order of these fields, then pairs of images.

    Args:
        crop_scale: Share of the image's area that a random crop keeps, (smallest, largest) in (0, 1]; the crop is then
            resized to the model's input. (1, 1) turns it off: the image is brought to size as in evaluation.
        crop_ratio: Width over height of the random crop, (smallest, largest).
        shift_pixels: Largest shift, in pixels of the model's input, up, down, left and right; what comes in at the
            edge is the image's reflection. 0 turns it off.
        horizontal_flip_rate: Probability of swapping left and right, in [0, 1].
        policy: Operations on colours and geometry: none; trivial (TrivialAugment: one of 14 at a random strength); rand
            (RandAugment: rand_num_ops of 14 at rand_magnitude); three (3-Augment: grey, solarised or blurred; its
            authors add colour_jitter 0.3).
        rand_num_ops: Operations that RandAugment applies to an image, at least 1.
        rand_magnitude: Strength of RandAugment's operations, in [0, 10].
        rand_magnitude_std: Standard deviation of a normal distribution around rand_magnitude, in [0, 10], from which
            each operation draws its strength. 0: always the same.
        colour_jitter: Strength in [0, 1]: brightness, contrast and saturation are each multiplied by a factor between
            1 - strength and 1 + strength, in random order. 0 turns it off.
        erasing_rate: Probability, in [0, 1], that a rectangle of the image becomes noise.
        mixup_alpha: Two images are laid over each other, in shares drawn from Beta(alpha, alpha), and so are their
            labels. 0 turns it off; at most 100.
        cutmix_alpha: Two images swap a rectangle, whose share of the area is drawn from Beta(alpha, alpha), and labels
            are mixed in these shares. 0 turns it off; at most 100.
        mix_rate: Probability, in [0, 1], that a batch is mixed at all, where mixup or cutmix is on.
        mix_switch_rate: Probability, in [0, 1], that a mixed batch takes cutmix, where both are on.
        num_repeats: How many differently changed copies of an image stand in a batch, at least 1. An epoch stays as
            long, so it shows 1 image in num_repeats.

    Raises:
        ConfigError: If a value is out of range.

    Source: random resized crop: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6; mixup: Zhang et al.
    2018, https://arxiv.org/abs/1710.09412; cutmix: Yun et al. 2019, https://arxiv.org/abs/1905.04899; repeats: Hoffer
    et al. 2020, https://arxiv.org/abs/1901.09335; the rest: vitreous.data.policies and `erase` in
    vitreous.data.transforms.
    """

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift_pixels: int = 0
    horizontal_flip_rate: float = 0.5
    policy: Policy = "none"
    rand_num_ops: int = 2
    rand_magnitude: float = 9.0
    rand_magnitude_std: float = 0.0
    colour_jitter: float = 0.0
    erasing_rate: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_rate: float = 1.0
    mix_switch_rate: float = 0.5
    num_repeats: int = 1

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
        for name, largest in (
            ("horizontal_flip_rate", 1),
            ("rand_magnitude", 10),
            ("rand_magnitude_std", 10),
            ("colour_jitter", 1),
            ("erasing_rate", 1),
            ("mixup_alpha", 100),
            ("cutmix_alpha", 100),
            ("mix_rate", 1),
            ("mix_switch_rate", 1),
        ):
            value = getattr(self, name)
            check(
                0 <= value <= largest,
                f"Cannot use {name}.",
                f"a value in [0, {largest}]",
                f"{name}={value}",
                "Pass 0 to turn it off.",
            )
        check(
            self.shift_pixels >= 0,
            "Cannot use shift_pixels.",
            "0 or more pixels",
            f"shift_pixels={self.shift_pixels}",
            "Pass 0 to turn it off.",
        )
        check_minimum(1, rand_num_ops=self.rand_num_ops, num_repeats=self.num_repeats)

    @property
    def has_crop(self) -> bool:
        """Whether images are cropped at random."""
        return self.crop_scale != (1.0, 1.0)

    @property
    def has_mixing(self) -> bool:
        """Whether images are mixed with each other, so that labels are shares of classes."""
        return self.mix_rate > 0 and max(self.mixup_alpha, self.cutmix_alpha) > 0


@dataclass(frozen=True, kw_only=True)
class DataConfig(Record):
    """How a data set is read and split: which column is what, and what is kept for validation and test.

    Args:
        val_fraction: Share of the images kept for validation where the data has no validation split, in [0, 1).
        test_fraction: Share of all images kept for the test where the data has no split at all, in [0, 1).
        image_column: Column of a table that holds the images: paths, URLs or bytes. Default: found by its name.
        label_column: Column of a table that holds the labels. Default: found by its name.
        label_separator: What parts several labels in one text, such as ",". Default: a text is one label.
        split_column: Column of a table that says train, val or test. Default: found by its name, if there is one.
        group_column: Column of a table whose equal values (one patient, one camera) stay on one side of every split.
        num_folds: Parts for cross-validation, at least 2; each is the test set once.
        fold: Which part is the test set, from 1 to num_folds.

    Raises:
        ConfigError: If a value is out of range.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    image_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    num_folds: int | None = None
    fold: int | None = None

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            check(
                0 <= value < 1, f"Cannot use {name}.", "a share in [0, 1)", f"{name}={value}", "Pass one such as 0.1."
            )
        check(
            self.val_fraction + self.test_fraction < 1,
            "Cannot split the images.",
            "val_fraction + test_fraction below 1",
            f"val_fraction={self.val_fraction}, test_fraction={self.test_fraction}",
            "Pass smaller shares.",
        )
        check(
            self.label_separator != "",
            "Cannot use label_separator.",
            "at least one character",
            "label_separator=''",
            "Pass one such as ','.",
        )
        if self.num_folds is None:
            received = f"fold={self.fold}, num_folds=None"
            check(self.fold is None, "Cannot use fold.", "num_folds beside it", received, "Pass both, or neither.")
            return
        check(
            self.num_folds >= 2, "Cannot use num_folds.", "at least 2", f"num_folds={self.num_folds}", "Pass 5 or 10."
        )
        check(
            self.fold is None or 1 <= self.fold <= self.num_folds,
            "Cannot use fold.",
            f"a fold from 1 to {self.num_folds}",
            f"fold={self.fold}",
            "Count folds from 1.",
        )


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


@dataclass(frozen=True, kw_only=True)
class WeightsSource(Record):
    """Published weights of a named model: where they are, and what they were trained for.

    Args:
        model: Name of the model, as in `vitreous models`.
        tag: What tells these weights from others of the same model: how they were trained, on what.
        hub_id: Owner and name of their repository on huggingface.co.
        license: Licence of the weights, as their publisher names it; empty where none is stated.
        num_classes: K, outputs of their head; 0 if they have none.
        input: What images must look like.
    """

    model: str
    tag: str
    hub_id: str
    license: str
    num_classes: int
    input: InputSpec

    @property
    def name(self) -> str:
        """The model's name and the tag: what `get_spec` and timm take."""
        return f"{self.model}.{self.tag}"
