"""Random augmentation of one image at a time, in NumPy and Pillow, from a generator that the caller passes in.

Augmentation layers inside a model are slow, draw one change for a whole batch, and end up in exports; these functions
do none of that. What happens to an example depends on (seed, epoch, index) alone: see `example_generator`.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from vitreous.data.images import check_array, resampling, resize_image, to_array, to_pillow
from vitreous.spec import AugmentConfig, InputSpec

if TYPE_CHECKING:
    from PIL import Image


def example_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns the random numbers of one example in one epoch.

    The same three numbers give the same stream everywhere, and no two triples share one: Philox counts blocks of
    numbers, its key is the seed, and epoch and index stand in the upper half of its counter.

    Args:
        seed: Any integer; 64 bits of it count.
        epoch: Epoch, from 0.
        index: Position of the example in its data set.

    Returns:
        A new generator.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    counter = np.array((0, 0, epoch, index), "uint64")
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=counter))


def augment_image(
    image: np.ndarray, input_spec: InputSpec, config: AugmentConfig, generator: np.random.Generator
) -> np.ndarray:
    """Changes one image at random and brings it to the size that a model takes.

    Args:
        image: uint8, (H, W, C), of any size. It is not written to.
        input_spec: Size and filter of the result.
        config: What may happen.
        generator: Where the random numbers come from.

    Returns:
        uint8, (*input_spec.image_size, C). It may be `image` itself if nothing changes.

    Raises:
        ConfigError: If `image` is not such an array.
    """
    if config.has_crop:
        check_array(image, input_spec)
        box = crop_box(image.shape[0], image.shape[1], config, generator)
        image = to_array(to_pillow(image).resize(input_spec.image_size[::-1], resampling(input_spec), box=box))
    else:
        image = resize_image(image, input_spec)
    if config.shift_pixels:
        image = _shift(image, config.shift_pixels, generator)
    if config.horizontal_flip_rate and generator.random() < config.horizontal_flip_rate:
        image = np.ascontiguousarray(image[:, ::-1])
    if config.trivial_augment or config.colour_jitter:
        pillow = to_pillow(image)
        if config.trivial_augment:
            pillow = trivial_augment(pillow, generator)
        if config.colour_jitter:
            pillow = _jitter(pillow, config.colour_jitter, generator)
        image = to_array(pillow)
    if config.erasing_rate and generator.random() < config.erasing_rate:
        image = erase(image, generator)
    return image


def crop_box(
    height: int, width: int, config: AugmentConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a random crop: ten tries for an area and a ratio that fit, then the largest centre crop that does.

    Returns:
        (left, top, right, bottom) in pixels.

    Source: https://github.com/pytorch/vision/blob/main/torchvision/transforms/transforms.py, RandomResizedCrop.
    """
    (least, most), (narrow, wide) = config.crop_scale, config.crop_ratio
    low, high = math.log(narrow), math.log(wide)
    for _ in range(10):
        u_area, u_ratio, u_top, u_left = generator.random(4).tolist()
        area = height * width * (least + (most - least) * u_area)
        ratio = math.exp(low + (high - low) * u_ratio)
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = int(u_left * (width - columns + 1)), int(u_top * (height - rows + 1))
            return left, top, left + columns, top + rows
    columns, rows = min(width, max(1, round(height * wide))), min(height, max(1, round(width / narrow)))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows


def _shift(image: np.ndarray, pixels: int, generator: np.random.Generator) -> np.ndarray:
    shifts = generator.integers(-pixels, pixels + 1, 2).tolist()
    rows, columns = (_reflect(side, shift) for side, shift in zip(image.shape[:2], shifts, strict=True))
    return image[rows[:, None], columns]


def _reflect(side: int, shift: int) -> np.ndarray:
    """Which of `side` pixels stands at each place after a shift, with the edge as a mirror that shows once."""
    period = max(1, 2 * (side - 1))
    places = np.arange(shift, shift + side) % period
    return np.minimum(places, period - places) if side > 1 else np.zeros(1, int)


_ENHANCERS = ("Brightness", "Contrast", "Color")


def _jitter(image: "Image.Image", strength: float, generator: np.random.Generator) -> "Image.Image":
    factors = (1 + strength * (2 * generator.random(3) - 1)).tolist()
    for choice in generator.permutation(3).tolist():
        image = _enhance(image, _ENHANCERS[choice], factors[choice])
    return image


def _enhance(image: "Image.Image", name: str, factor: float) -> "Image.Image":
    from PIL import ImageEnhance

    return getattr(ImageEnhance, name)(image).enhance(factor)


TRIVIAL_AUGMENT = {
    "Identity": 0.0,
    "AutoContrast": 0.0,
    "Equalize": 0.0,
    "Brightness": 0.99,
    "Color": 0.99,
    "Contrast": 0.99,
    "Sharpness": 0.99,
    "ShearX": 0.99,
    "ShearY": 0.99,
    "TranslateX": 32.0,
    "TranslateY": 32.0,
    "Rotate": 135.0,
    "Posterize": 6.0,
    "Solarize": 255.0,
}
"""TrivialAugment's operations, each with its strength at the last of 31 steps (0: it has none)."""

_TRIVIAL_NAMES = tuple(TRIVIAL_AUGMENT)


def trivial_augment(image: "Image.Image", generator: np.random.Generator) -> "Image.Image":
    """Applies one operation, drawn uniformly, at a strength drawn uniformly from 31 steps, in a random direction.

    Source: TrivialAugmentWide, Müller and Hutter 2021, https://arxiv.org/abs/2103.10158, with the nearest-pixel
    geometry and the black fill of the authors' and of torchvision's code. Translation is 32 pixels at most whatever the
    image's size, as there; so a 32-pixel image may move out of sight.
    """
    choice, step, sign = generator.integers(0, (len(_TRIVIAL_NAMES), 31, 2)).tolist()
    name = _TRIVIAL_NAMES[choice]
    strength = TRIVIAL_AUGMENT[name] * step / 30
    return apply_operation(image, name, strength, -strength if sign else strength)


def apply_operation(image: "Image.Image", name: str, strength: float, signed: float) -> "Image.Image":
    """Applies one of `TRIVIAL_AUGMENT`'s operations; `signed` is the strength with its direction."""
    from PIL import Image, ImageOps

    match name:
        case "Identity":
            return image
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Rotate":
            return image.rotate(signed)
        case "Posterize":
            return ImageOps.posterize(image, 8 - round(strength))
        case "Solarize":
            return ImageOps.solarize(image, round(255 - strength))
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY":
            x_shear, y_shear, x_move, y_move = (
                signed if name == other else 0.0 for other in ("ShearX", "ShearY", "TranslateX", "TranslateY")
            )
            matrix = (1.0, x_shear, round(x_move), y_shear, 1.0, round(y_move))
            return image.transform(image.size, Image.Transform.AFFINE, matrix)
        case _:
            return _enhance(image, name, 1 + signed)


def erase(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Replaces a random rectangle, 2% to 33% of the area, by noise.

    Returns:
        A changed copy; or `image` itself if none of ten rectangles fits.

    Source: random erasing, Zhong et al. 2017, https://arxiv.org/abs/1708.04896, algorithm 1: its hyperparameters and
    its uniform noise in every pixel. Difference: the ratio's logarithm is drawn uniformly, as timm and torchvision do.
    """
    height, width, channels = image.shape
    for _ in range(10):
        u_area, u_ratio, u_top, u_left = generator.random(4).tolist()
        area, ratio = height * width * (0.02 + 0.31 * u_area), 0.3 ** (1 - 2 * u_ratio)
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1))
            image = image.copy()
            noise = generator.integers(0, 256, (rows, columns, channels), "uint8")
            image[top : top + rows, left : left + columns] = noise
            return image
    return image
