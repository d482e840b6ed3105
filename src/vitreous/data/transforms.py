"""Random augmentation of one image at a time, in NumPy and Pillow, from a generator that the caller passes in.

Augmentation layers inside a model are slow, draw one change for a whole batch, and end up in exports; these functions
do none of that. What happens to an example depends on (seed, epoch, index) alone: see `example_generator`.
"""

import math

import numpy as np

from vitreous.data.images import check_array, resize_image, to_array, to_pillow
from vitreous.data.policies import apply_policy, jitter_colours
from vitreous.data.resampling import flip_columns, resize_box
from vitreous.spec import AugmentConfig, InputSpec

MIXING, REPLACING = 2**63, 2**62
"""Streams of `example_generator` beside those of examples: for a batch to mix, for an example to replace."""


def example_generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """Returns the random numbers of one example in one epoch.

    The same four numbers give the same stream everywhere, and no two quadruples share one: Philox counts blocks of
    numbers, its key is the seed, and the others stand in the upper three quarters of its counter.

    Args:
        seed: Any integer; 64 bits of it count.
        epoch: Epoch, from 0.
        index: Position of the example in its data set.
        stream: Which of several: how often the epoch has shown the example before.

    Returns:
        A new generator.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    counter = np.array((0, stream, epoch, index), "uint64")
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
        uint8, (*input_spec.image_size, C). It may be `image` itself if nothing changes, and read-only.

    Raises:
        ConfigError: If `image` is not such an array.
    """
    if config.has_crop:
        check_array(image, input_spec)
        box = crop_box(image.shape[0], image.shape[1], config, generator)
        image = resize_box(image, box, input_spec)
    else:
        image = resize_image(image, input_spec)
    if config.shift_pixels:
        image = _shift(image, config.shift_pixels, generator)
    if config.horizontal_flip_rate and generator.random() < config.horizontal_flip_rate:
        image = flip_columns(image)
    if config.policy != "none" or config.colour_jitter:
        pillow = apply_policy(to_pillow(image), config, generator)
        if config.colour_jitter:
            pillow = jitter_colours(pillow, config.colour_jitter, generator)
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
