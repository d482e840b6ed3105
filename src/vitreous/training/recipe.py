"""What a training run is made of: records with defaults, TOML files that fill them, and the choice for some data."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vitreous.errors import ConfigError, MissingPathError, UnknownNameError
from vitreous.spec import AugmentConfig, CacheKind, Record, ViTConfig, check, check_rates
from vitreous.training.recipe_header import RecipeHeader, parse_header

# Fields of ViTConfig that the data and other fields of a recipe decide.
NOT_ARCHITECTURE = ("image_size", "num_channels", "num_classes", "has_dynamic_size")

# Fields of `Recipe` and of `OptimizerConfig` that training without labels has no use for.
NOT_PRETRAINED = (
    *("balance", "loss", "focal_gamma", "gamma_negative", "gamma_positive", "negative_clip"),
    *("patience_epochs", "distillation", "small_fraction", "small_scale"),
)
OPTIMIZER_NOT_PRETRAINED = (
    *("label_smoothing", "trained", "lora_rank", "lora_alpha", "lora_layers"),
    *("head_first_fraction", "head_first_rate"),
)

Balance = Literal["none", "weights", "sampling", "logits"]
LossName = Literal["cross_entropy", "binary", "focal", "asymmetric"]
OnNan = Literal["stop", "back"]
MaskTarget = Literal["image", "patch"]

_FEW_IMAGES = 5_000  # below, shifts and flips alone let a model learn its images by heart
_FEW_BAD = 3  # unreadable images that are no reason to stop, however few images there are
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Record):
    """How weights move: the optimiser, its schedule, and the average of the weights.

    Args:
        name: adamw, or muon: matrices inside the blocks are moved by Muon, everything else by AdamW.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay (times the learning rate), on kernels alone.
        warmup_fraction: Share of training in which the learning rate rises from 0, in [0, 1).
        final_fraction: Learning rate at the end as a share of the peak, in [0, 1].
        beta_2: Decay of AdamW's second moment, in (0, 1).
        clip_norm: Largest norm of all gradients together; 0 clips nothing.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        layer_decay: Each block's learning rate as a share of the next one's, in (0, 1]; 1 gives all the same.
        trained: Which weights move: all, head, last-N (the last N blocks and what follows them), or lora: the head,
            and an update of low rank for each large matrix of the blocks.
        lora_rank: Rank of these updates, at least 1.
        lora_alpha: An update counts lora_alpha / lora_rank times.
        lora_layers: Which matrices have one: those of attention (queries, keys, values and the projection), or all
            (those of the MLP too).
        head_first_fraction: Share of training at its start in which the head alone learns, in [0, 1): random heads
            send gradients through pretrained weights that spoil them. The schedule of everything begins after it.
        head_first_rate: Learning rate of that part.
        average_fraction: How far the averaged weights (EMA) reach back, as a share of training; 0 turns them off.

    Source: `vitreous.training.optimizer`; Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567 (label smoothing); Hu et al. 2022, https://arxiv.org/abs/2106.09685 (LoRA); Kumar
    et al. 2022, https://arxiv.org/abs/2202.10054 (the head first).
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    beta_2: float = 0.99
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    layer_decay: float = 1.0
    trained: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_layers: Literal["attention", "all"] = "all"
    head_first_fraction: float = 0.0
    head_first_rate: float = 1e-3
    average_fraction: float = 0.05

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"all|head|lora|last-[1-9]\d*", self.trained) is not None,
            "Cannot use trained.",
            "all, head, lora, or last-N with a number of blocks",
            f"trained={self.trained!r}",
            "Pass for example last-4.",
        )
        for name, low, high in (
            ("learning_rate", 1e-12, 10),
            ("weight_decay", 0, 10),
            ("warmup_fraction", 0, 0.99),
            ("final_fraction", 0, 1),
            ("beta_2", 0.5, 0.99999),
            ("clip_norm", 0, 1e9),
            ("label_smoothing", 0, 0.99),
            ("layer_decay", 0.01, 1),
            ("average_fraction", 0, 1),
            ("lora_rank", 1, 10_000),
            ("lora_alpha", 1e-6, 1e6),
            ("head_first_fraction", 0, 0.99),
            ("head_first_rate", 1e-12, 10),
        ):
            value = getattr(self, name)
            check(
                low <= value <= high,
                f"Cannot use {name}.",
                f"a value from {low:g} to {high:g}",
                f"{name}={value}",
                "Pass one in that range.",
            )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Record):
    """How a model learns from a teacher beside the labels.

    Args:
        kind: soft: the teacher's probabilities are matched; hard: its likeliest class is a second label.
        temperature: Softens the probabilities of both where kind is soft, above 0.
        weight: Share of the teacher in the loss, in [0, 1]; the labels have the rest.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft); Touvron et al. 2021,
    https://arxiv.org/abs/2012.12877 (hard, and the distillation token's own head).
    """

    kind: Literal["soft", "hard"] = "soft"
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.01, 1000), ("weight", 0, 1)):
            value = getattr(self, name)
            check(
                low <= value <= high,
                f"Cannot use {name} of distillation.",
                f"a value from {low:g} to {high:g}",
                f"{name}={value}",
                "Pass one in that range.",
            )


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(Record):
    """How images are hidden and filled in.

    Args:
        mask_rate: Share of the patches that is hidden, in (0, 1).
        mask_size: Patches of a side of the squares that are hidden or seen as one; must divide the grid of patches.
        mask_target: What is predicted: pixels, with the mean and variance of the whole image taken out (image), or
            those of each patch (patch; for large patches: of small ones, it leaves little but noise).
        decoder_dim: Width of the decoder, a multiple of 64.
        num_decoder_blocks: Its blocks.
    """

    mask_rate: float = 0.75
    mask_size: int = 1
    mask_target: MaskTarget = "image"
    decoder_dim: int = 128
    num_decoder_blocks: int = 2


@dataclass(frozen=True, kw_only=True)
class Recipe(Record):
    """Everything that decides a training run but the data and the seed.

    Args:
        model: Name of the model, as in `vitreous models`.
        image_size: Image height and width in pixels. Default: the model's own.
        num_channels: 3 (colour) or 1 (grey).
        resize_mode: How an image is brought to its size for evaluation: crop, squash or pad.
        small_fraction: Share of training at its start in which images are smaller, in [0, 1): a step then costs less,
            and the same time shows more images (progressive resizing).
        small_scale: Share of their sides that is left, in (0, 1], rounded down to whole patches.
        epochs: Passes over the training images. Default: as many as show the model `num_examples_seen` images.
        num_examples_seen: Images shown to the model in all, when neither epochs nor time are given.
        time: Time budget such as 90s, 20m or 1.5h, instead of epochs: the schedule ends when the time does.
        patience_epochs: Training ends once so many epochs have brought no better validation score, and the best
            averaged weights are kept. Default: the schedule is followed to its end, and the last ones are kept.
        batch_size: Images per step.
        num_parts: Parts that a batch is worked off in, for batches that do not fit into memory at once; the step is
            that of the whole batch. Must divide batch_size.
        balance: What is done about classes of unequal size: nothing (none), each class weighs the same in the loss
            (weights) or is drawn equally often (sampling), or frequencies are added to the logits in training (logits).
        loss: What training makes small: cross_entropy; binary (each class a yes-or-no question, also with one label an
            image); focal (answers that are right already count less); asymmetric (several labels an image: the many
            that do not apply count less). With several labels, cross_entropy is binary.
        focal_gamma: How much less, for focal: a power of what is missing to 1, 0 or more.
        gamma_negative: The same for asymmetric, where a label does not apply; at least gamma_positive.
        gamma_positive: And where it does.
        negative_clip: For asymmetric: a label that does not apply costs nothing below this probability, in [0, 1).
        cache: Where decoded training images are kept, so that only the first epoch decodes them: memory, disk (a file
            that is removed at the end), none, or auto (memory if all fit, else disk if it has four times the room).
        max_bad: Share of the training images that may be unreadable, in [0, 1): others take their place. Beyond it,
            training stops and names them. Above 0, three of them never stop it.
        precision: float32, bfloat16 (weights stay float32), or auto: the faster one on this hardware.
        checkpoint_every: How often the state of training is saved, to resume from: a time such as 5m or 90s, a number
            of steps such as "200 steps", or none: only when training is stopped by SIGTERM.
        keep_checkpoints: Saved states that are kept, at least 1; with 2 there is one to fall back on.
        on_nan: What a loss that is no longer finite leads to: stop, or back (to the last saved state, with half the
            learning rate; at most 3 times).
        optimizer: How weights move.
        distillation: How the model learns from a teacher, where there is one.
        augment: How training images are varied.
        architecture: Fields of `ViTConfig` in which the model differs from its name's.
    """

    model: str = "vit_tiny_patch16_224"
    image_size: tuple[int, int] | None = None
    num_channels: int = 3
    resize_mode: Literal["crop", "squash", "pad"] = "crop"
    small_fraction: float = 0.0
    small_scale: float = 0.75
    epochs: int | None = None
    num_examples_seen: int = 300_000
    time: str | None = None
    patience_epochs: int | None = None
    batch_size: int = 64
    num_parts: int = 1
    balance: Balance = "none"
    loss: LossName = "cross_entropy"
    focal_gamma: float = 2.0
    gamma_negative: float = 4.0
    gamma_positive: float = 0.0
    negative_clip: float = 0.05
    cache: CacheKind = "auto"
    max_bad: float = 0.01
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: str = "5m"
    keep_checkpoints: int = 2
    on_nan: OnNan = "stop"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    architecture: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("epochs", "num_examples_seen", "patience_epochs", "batch_size", "num_parts", "keep_checkpoints")
        for name in counts:
            value = getattr(self, name)
            check(
                value is None or value >= 1,
                f"Cannot use {name}.",
                "at least 1",
                f"{name}={value}",
                "Pass a positive number.",
            )
        check(
            self.batch_size % self.num_parts == 0,
            "Cannot split batches.",
            "num_parts that divides batch_size",
            f"batch_size={self.batch_size}, num_parts={self.num_parts}",
            "Pass another of the two.",
        )
        check_rates(max_bad=self.max_bad, negative_clip=self.negative_clip, small_fraction=self.small_fraction)
        check(
            0 < self.small_scale <= 1,
            "Cannot use small_scale.",
            "a share above 0, at most 1",
            f"small_scale={self.small_scale:g}",
            "Pass for example 0.75.",
        )
        self._check_loss()
        interval = parse_interval(self.checkpoint_every)
        check(
            self.on_nan == "stop" or interval != Interval(),
            "Cannot go back to a saved state.",
            "checkpoint_every other than none with on_nan='back'",
            f"checkpoint_every={self.checkpoint_every!r}",
            "Pass for example 5m.",
        )
        if self.time is not None:
            parse_seconds(self.time)
        fields = [each.name for each in dataclasses.fields(ViTConfig) if each.name not in NOT_ARCHITECTURE]
        for key in self.architecture:
            if key not in fields:
                raise UnknownNameError("architecture key", key, fields, f"Keys: {', '.join(fields)}.")

    def _check_loss(self) -> None:
        for name in ("focal_gamma", "gamma_positive"):
            value = getattr(self, name)
            check(0 <= value <= 100, f"Cannot use {name}.", "0 to 100", f"{name}={value}", "Pass for example 2.")
        check(
            self.gamma_positive <= self.gamma_negative <= 100,
            "Cannot use gamma_negative.",
            "gamma_positive or more (to 100): the labels that do not apply are to count less",
            f"gamma_negative={self.gamma_negative:g}, gamma_positive={self.gamma_positive:g}",
            "Pass for example 4 and 0.",
        )
        smoothing = self.optimizer.label_smoothing
        check(
            self.loss != "asymmetric" or not smoothing,
            "Cannot smooth the labels of the asymmetric loss.",
            "label_smoothing=0: it leaves alone what smoothing would raise to a small probability",
            f"loss='asymmetric', label_smoothing={smoothing:g}",
            "Pass optimizer.label_smoothing=0, or another loss.",
        )

    def get_bad_fraction(self, num_images: int) -> float:
        """Returns the share of `num_images` that may be unreadable; see `max_bad`."""
        return min(max(self.max_bad, _FEW_BAD / num_images), 0.99) if self.max_bad else 0.0

    def get_small_size(self, config: ViTConfig) -> tuple[int, int]:
        """Returns the size (H, W) of the images at the start of training: that of the model, or a smaller one."""
        if not self.small_fraction or self.small_scale == 1:
            return config.image_size
        height, width = (
            min(side, max(int(side * self.small_scale) // stride * stride, size))
            for side, stride, size in zip(config.image_size, config.patch_strides, config.patch_size, strict=True)
        )
        return height, width

    @property
    def budget_seconds(self) -> float | None:
        """The time budget in seconds, or None."""
        return None if self.time is None else parse_seconds(self.time)

    def merge(self, changes: dict[str, Any]) -> "Recipe":
        """Returns a copy with some values changed; `changes` may nest (`{"optimizer": {"learning_rate": 1e-4}}`).

        An explicit number of epochs takes the place of a time budget, and the reverse; changing to the asymmetric loss
        turns label smoothing off.
        """
        if changes.get("epochs") is not None and changes.get("time") is not None:
            raise ConfigError(
                "Cannot train for epochs and for a time. Expected one of the two. "
                f"Received: epochs={changes['epochs']}, time={changes['time']!r}. Leave one out."
            )
        values = self.to_dict()
        if changes.get("epochs") is not None and changes.get("time") is None:
            values["time"] = None
        if changes.get("time") is not None and changes.get("epochs") is None:
            values["epochs"] = None
        if changes.get("loss") == "asymmetric":
            values["optimizer"]["label_smoothing"] = 0.0
        for key, value in changes.items():
            nests = isinstance(values.get(key), dict) and isinstance(value, dict)
            values[key] = {**values[key], **value} if nests else value
        return Recipe.from_dict(values)


def parse_seconds(text: str) -> float:
    """Returns the seconds in a time such as `"90s"`, `"20m"`, `"1.5h"` or `"45"` (seconds).

    Raises:
        ConfigError: If the text is no time, or not a positive one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip().lower())
    if not match or float(match[1]) <= 0:
        raise ConfigError(
            f"Cannot read the time. Expected a number and a unit. Received: time={text!r}. "
            "Pass seconds, minutes or hours, such as 90s, 20m or 1.5h."
        )
    return float(match[1]) * _UNITS[match[2] or "s"]


@dataclass(frozen=True)
class Interval:
    """How often something happens: after a time, after a number of steps, or, with neither, never."""

    seconds: float | None = None
    steps: int | None = None


def parse_interval(text: str) -> Interval:
    """Returns the interval in a text: a time such as `"5m"`, a number of steps such as `"200 steps"`, or `"none"`.

    Raises:
        ConfigError: If it is none of these.
    """
    words = text.strip().lower()
    if words == "none":
        return Interval()
    if (match := re.fullmatch(r"(\d+)\s*steps?", words)) and int(match[1]) > 0:
        return Interval(steps=int(match[1]))
    if re.fullmatch(r"(\d+(?:\.\d+)?)\s*[smh]", words) and float(words[:-1]) > 0:
        return Interval(seconds=parse_seconds(words))
    raise ConfigError(
        "Cannot read the interval. Expected a time, a number of steps, or none. "
        f"Received: checkpoint_every={text!r}. Pass for example 5m, 90s, '200 steps' or none."
    )


def list_recipes() -> list[str]:
    """Lists the names of the recipes that vitreous carries."""
    folder = resources.files("vitreous").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str | Path) -> Recipe:
    """Loads a recipe by name, or from a TOML file.

    Args:
        name: A name that `list_recipes()` has, or the path of a `.toml` file.

    Raises:
        UnknownNameError: If there is no such recipe, or the file has an unknown key; the nearest are named.
        MissingPathError: If the file does not exist.
        ConfigError: If the file is not TOML, or a value is out of range.
    """
    try:
        values = tomllib.loads(_read(name))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"Cannot load a recipe. Expected TOML. Received: recipe={str(name)!r}, {error}. Mend the file."
        ) from error
    return Recipe.from_dict(values)


def _read(name: str | Path) -> str:
    """Returns the text of a recipe file."""
    if str(name).endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise MissingPathError(
                f"Cannot load a recipe. Expected a TOML file. Received: recipe={str(name)!r}, which does not exist. "
                "Check the path."
            )
        return path.read_bytes().decode(errors="replace")
    if name not in list_recipes():
        raise UnknownNameError("recipe", str(name), list_recipes(), f"Recipes: {', '.join(list_recipes())}.")
    return resources.files("vitreous").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")


def choose_recipe(name: str, image_side: float, num_images: int) -> str:
    """Chooses the recipe for some data.

    Args:
        name: Name of the data set.
        image_side: Median of the images' shorter sides, in pixels.
        num_images: Images to train on.

    Returns:
        A name that `list_recipes()` has.
    """
    if name in list_recipes():
        return name
    if image_side <= 48:
        return "few32" if num_images < _FEW_IMAGES else "small32"
    if image_side <= 112:
        return "few64" if num_images < _FEW_IMAGES else "small64"
    return "photos"


def load_header(name: str | Path) -> RecipeHeader:
    """Loads what a recipe says of itself; `name` and errors as for `load_recipe`."""
    return parse_header(_read(name))
