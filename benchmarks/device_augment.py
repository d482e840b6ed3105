"""Random changes of images where the model computes, a batch at a time: shifts, flips, TrivialAugment, mixup, cutmix.

A GPU trains on small images faster than CPUs can change them. So all images lie in its memory, the random numbers are
drawn on the host by NumPy, and the rest is `keras.ops`, the same on every backend. The operations are those of
`vitreous.data.policies`, which a test compares them with.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.data import Batch
from vitreous.data.policies import TRIVIAL_AUGMENT
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig

NAMES = tuple(TRIVIAL_AUGMENT)
_ENHANCERS = ("Brightness", "Contrast", "Color", "Sharpness")


@dataclasses.dataclass
class Changes:
    """What happens to each image of a batch: arrays whose first axis is the batch.

    Args:
        index: int32 (B,), which image it is.
        matrix: float32 (B, 2, 3), from a place (x, y, 1) in the result to one before the policy's geometry, in pixels.
        is_flipped: bool (B,), whether left and right change places, before the policy.
        shift: int32 (B, 2), rows and columns, before the flip.
        enhancer: int32 (B,), which of brightness, contrast, colour and sharpness is changed; -1: none.
        factor: float32 (B,), by how much.
        level: float32 (B,), size of the steps that levels are rounded down to; 1 changes nothing.
        threshold: float32 (B,), level from which on an image is inverted; 256 changes nothing.
        spread: int32 (B,), 1: channels are stretched to the whole range; 2: equalised; 0: neither.
        share: float32 (B,), what mixup keeps of an image; the rest is the one at the same place from the batch's end.
        box: int32 (B, 4), top, left, bottom, right of what that one puts in its place (cutmix).
    """

    index: np.ndarray
    matrix: np.ndarray
    is_flipped: np.ndarray
    shift: np.ndarray
    enhancer: np.ndarray
    factor: np.ndarray
    level: np.ndarray
    threshold: np.ndarray
    spread: np.ndarray
    share: np.ndarray
    box: np.ndarray

    @classmethod
    def none(cls, index: np.ndarray) -> "Changes":
        """Returns changes that leave the images at `index` as they are."""
        count = len(index)
        return cls(
            index=index.astype("int32"),
            matrix=np.tile(np.eye(2, 3, dtype="float32"), (count, 1, 1)),
            is_flipped=np.zeros(count, bool),
            shift=np.zeros((count, 2), "int32"),
            enhancer=np.full(count, -1, "int32"),
            factor=np.ones(count, "float32"),
            level=np.ones(count, "float32"),
            threshold=np.full(count, 256, "float32"),
            spread=np.zeros(count, "int32"),
            share=np.ones(count, "float32"),
            box=np.zeros((count, 4), "int32"),
        )

    def operate(self, row: int, name: str, strength: float, signed: float, image_size: tuple[int, int]) -> None:
        """Lets one image go through one operation, as `vitreous.data.policies.apply_operation` has them."""
        match name:
            case "Rotate":
                cos, sin = math.cos(math.radians(signed)), math.sin(math.radians(signed))
                y, x = (side / 2 for side in image_size)
                self.matrix[row] = [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
            case "ShearX":
                self.matrix[row, 0, 1] = signed
            case "ShearY":
                self.matrix[row, 1, 0] = signed
            case "TranslateX":
                self.matrix[row, 0, 2] = round(signed)
            case "TranslateY":
                self.matrix[row, 1, 2] = round(signed)
            case "Posterize":
                self.level[row] = 2 ** round(strength)
            case "Solarize":
                self.threshold[row] = round(255 - strength)
            case "AutoContrast" | "Equalize":
                self.spread[row] = 1 + (name == "Equalize")
            case "Brightness" | "Contrast" | "Color" | "Sharpness":
                self.enhancer[row], self.factor[row] = _ENHANCERS.index(name), 1 + signed


def draw_changes(
    index: np.ndarray, config: AugmentConfig, image_size: tuple[int, int], generator: np.random.Generator
) -> Changes:
    """Draws what happens to the images at `index`; mixup and cutmix are drawn for each image, not for the batch."""
    changes, count = Changes.none(index), len(index)
    reach = config.shift_pixels
    changes.shift = generator.integers(-reach, reach + 1, (count, 2)).astype("int32")
    changes.is_flipped = generator.random(count) < config.horizontal_flip_rate
    if config.policy == "trivial":
        for row, (choice, step, sign) in enumerate(generator.integers(0, (len(NAMES), 31, 2), (count, 3)).tolist()):
            name = NAMES[choice]
            strength = TRIVIAL_AUGMENT[name] * step / 30
            changes.operate(row, name, strength, -strength if sign else strength, image_size)
    if config.has_mixing:
        _draw_mixing(changes, config, image_size, generator)
    return changes


def _draw_mixing(
    changes: Changes, config: AugmentConfig, image_size: tuple[int, int], generator: np.random.Generator
) -> None:
    count = len(changes.index)
    is_mixed, chance, place = generator.random(count), generator.random(count), generator.random((count, 2))
    has_both = min(config.mixup_alpha, config.cutmix_alpha) > 0
    is_cut = chance < config.mix_switch_rate if has_both else np.full(count, config.cutmix_alpha > 0)
    alpha = np.where(is_cut, config.cutmix_alpha, config.mixup_alpha)
    share = np.where(is_mixed < config.mix_rate, generator.beta(alpha, alpha), 1.0)
    half = (np.sqrt(1 - share)[:, None] * image_size).astype("int32") // 2
    middle = (place * image_size).astype("int32")
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half, image_size)
    changes.box = np.where(is_cut[:, None], np.concatenate([first, last], axis=1), 0).astype("int32")
    changes.share = np.where(is_cut, 1.0, share).astype("float32")


def mix_targets(labels: np.ndarray, num_classes: int, changes: Changes, image_size: tuple[int, int]) -> np.ndarray:
    """Returns the shares of the classes (B, K) float32 in the images that `changes` leads to, from labels (B,)."""
    top, left, bottom, right = changes.box.T
    share = changes.share * (1 - (bottom - top) * (right - left) / (image_size[0] * image_size[1]))
    targets = np.eye(num_classes, dtype="float32")[labels]
    return (share[:, None] * targets + (1 - share)[:, None] * targets[::-1]).astype("float32")


def change_images(pixels: Any, changes: dict[str, Any], image_size: tuple[int, int]) -> Any:
    """Takes images out of all and changes them, on the device.

    Args:
        pixels: uint8 (N * H * W, C), all images, row by row.
        changes: The arrays of `Changes`, by name.
        image_size: (H, W).

    Returns:
        uint8 (B, H, W, C).
    """
    height, width = image_size
    ys, xs = np.mgrid[:height, :width]
    at = np.stack([xs + 0.5, ys + 0.5, np.ones(image_size)]).reshape(3, -1).astype("float32")  # (3, H * W)
    source = ops.cast(ops.floor(ops.matmul(changes["matrix"], ops.convert_to_tensor(at))), "int32")  # (B, 2, H * W)
    columns, rows = source[:, 0], source[:, 1]
    is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = ops.clip(rows, 0, height - 1), ops.clip(columns, 0, width - 1)
    columns = ops.where(changes["is_flipped"][:, None], width - 1 - columns, columns)
    rows = _reflect(rows + changes["shift"][:, :1], height)
    columns = _reflect(columns + changes["shift"][:, 1:], width)
    places = (changes["index"][:, None] * height + rows) * width + columns
    images = ops.cast(ops.take(pixels, places, axis=0), "float32") * ops.cast(is_inside[:, :, None], "float32")
    images = _spread(images, changes["spread"])
    images = ops.reshape(images, (-1, height, width, pixels.shape[-1]))
    images = _enhance(images, changes["enhancer"], changes["factor"])
    level, threshold = (changes[name][:, None, None, None] for name in ("level", "threshold"))
    images = ops.floor(images / level) * level
    images = ops.where(images >= threshold, 255 - images, images)
    others, share = ops.flip(images, axis=0), changes["share"][:, None, None, None]
    top, left, bottom, right = (changes["box"][:, k, None, None] for k in range(4))
    ys, xs = ops.convert_to_tensor(ys.astype("int32")), ops.convert_to_tensor(xs.astype("int32"))
    is_cut = (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)  # (B, H, W)
    images = ops.where(is_cut[..., None], others, share * images + (1 - share) * others)
    return ops.cast(ops.round(images), "uint8")


def _reflect(places: Any, size: int) -> Any:
    """Returns places up to `size` - 1 beyond an edge, reflected at it."""
    return size - 1 - ops.abs(size - 1 - ops.abs(places))


def _spread(images: Any, spread: Any) -> Any:
    """Stretches or equalises each channel of the images (B, H * W, C) whose `spread` says so."""
    count, channels = images.shape[1:]
    low, high = ops.min(images, axis=1, keepdims=True), ops.max(images, axis=1, keepdims=True)
    scale = 255 / ops.maximum(high - low, 1.0)
    stretched = ops.where(high > low, ops.floor(images * scale - low * scale + 1e-3), images)
    levels = ops.cast(images, "int32")
    batch = images.shape[0]
    histogram_of = ops.reshape(ops.arange(batch, dtype="int32"), (-1, 1, 1)) * channels + np.arange(
        channels, dtype="int32"
    )
    places = ops.reshape(histogram_of * 256 + levels, (-1,))
    ones = ops.ones_like(places)
    histograms = ops.reshape(ops.segment_sum(ones, places, num_segments=batch * channels * 256), (-1, 256))
    below = ops.cumsum(histograms, axis=1) - histograms  # pixels darker than each level
    last = ops.take_along_axis(histograms, ops.reshape(ops.cast(high, "int32"), (-1, 1)), axis=1)
    step = (count - last) // 255
    table = ops.where(step > 0, (step // 2 + below) // ops.maximum(step, 1), np.arange(256, dtype="int32")[None])
    equalized = ops.reshape(ops.take(ops.reshape(ops.clip(table, 0, 255), (-1,)), places, axis=0), levels.shape)
    spread = spread[:, None, None]
    images = ops.where(spread == 1, ops.clip(stretched, 0, 255), images)
    return ops.where(spread == 2, ops.cast(equalized, "float32"), images)


def _enhance(images: Any, enhancer: Any, factor: Any) -> Any:
    """Moves the images (B, H, W, C) away from, or to, what is left without their light, contrast, colours or edges."""
    enhancer, factor = enhancer[:, None, None, None], factor[:, None, None, None]
    grey = images
    if images.shape[-1] == 3:
        weights = ops.convert_to_tensor(np.array([0.299, 0.587, 0.114], "float32"))
        grey = ops.round(ops.sum(images * weights, axis=-1, keepdims=True))
    mean = ops.floor(ops.mean(grey, axis=(1, 2, 3), keepdims=True) + 0.5)
    padded = ops.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]
    total = sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) + 4 * images
    is_edge = np.ones((1, height, width, 1), bool)
    is_edge[:, 1:-1, 1:-1] = False
    smooth = ops.where(ops.convert_to_tensor(is_edge), images, ops.floor(total / 13 + 0.5))
    plain = ops.zeros_like(images)
    for number, other in enumerate((plain, mean, grey, smooth)):
        plain = ops.where(enhancer == number, other, plain)
    changed = ops.clip(ops.floor(plain + factor * (images - plain) + 1e-3), 0, 255)
    return ops.where(enhancer >= 0, changed, images)


class DeviceLoader:
    """Batches of images that lie on the device, changed there; in the place of a `vitreous.data.Loader` for `fit`.

    Args:
        images: uint8 (N, H, W, C).
        labels: Integers (N,).
        batch_size: B; what does not fill a batch at the end of an epoch is left out.
        config: How images are changed: shifts, flips, the policy none or trivial, mixup and cutmix.
        num_classes: K.
        seed: Decides order and changes.

    Raises:
        ConfigError: If `config` asks for changes that are not made here.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        config: AugmentConfig,
        num_classes: int,
        seed: int = 0,
    ):
        is_known = not config.has_crop and config.policy in ("none", "trivial") and config.num_repeats == 1
        unknown = {"colour_jitter": config.colour_jitter, "erasing_rate": config.erasing_rate}
        if not is_known or any(unknown.values()):
            raise ConfigError(
                "Cannot change images on the device. Expected shifts, flips, the policy none or trivial, and mixing. "
                f"Received: crop_scale={config.crop_scale}, policy={config.policy!r}, "
                f"num_repeats={config.num_repeats}, {unknown}. Turn these off."
            )
        self.broken: dict[str, str] = {}  # all images have been read
        self.num_replaced = 0
        self.image_size = images.shape[1:3]
        self.labels = labels
        self.batch_size = min(batch_size, len(images))
        self.num_batches = len(images) // self.batch_size
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.pixels = ops.convert_to_tensor(images.reshape(-1, images.shape[-1]))
        self.change = compile_function(lambda pixels, changes: change_images(pixels, changes, self.image_size))

    def stream(self) -> "DeviceStream":
        """Returns endless batches from the first one on."""
        return DeviceStream(self)

    def make(self, epoch: int, number: int, order: np.ndarray) -> Batch:
        """Returns batch `number` of an epoch in that order."""
        index = order[number * self.batch_size : (number + 1) * self.batch_size]
        changes = draw_changes(
            index, self.config, self.image_size, np.random.default_rng((self.seed, 1, epoch, number))
        )
        arrays = {name: ops.convert_to_tensor(array) for name, array in vars(changes).items()}
        labels = self.labels[index].astype("int32")
        if self.config.has_mixing:
            labels = mix_targets(labels, self.num_classes, changes, self.image_size)
        return Batch(self.change(self.pixels, arrays), labels, np.ones(len(index), bool), index)


class DeviceStream(Iterator[Batch]):
    """The batches of a `DeviceLoader`, epoch after epoch."""

    def __init__(self, loader: DeviceLoader):
        self.loader = loader
        self.epoch, self.batch = 0, 0
        self.order = self._draw_order()

    def _draw_order(self) -> np.ndarray:
        return np.random.default_rng((self.loader.seed, 0, self.epoch)).permutation(len(self.loader.labels))

    def __next__(self) -> Batch:
        if self.batch == self.loader.num_batches:
            self.epoch, self.batch = self.epoch + 1, 0
            self.order = self._draw_order()
        self.batch += 1
        return self.loader.make(self.epoch, self.batch - 1, self.order)

    def state(self) -> dict[str, int]:
        """Returns where the stream stands."""
        return {"epoch": self.epoch, "batch": self.batch}

    def close(self) -> None:
        """There is nothing to end."""


def compile_function(function: Any) -> Any:
    """Returns the function compiled where the backend compiles."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import torch

    return torch.no_grad()(function)
