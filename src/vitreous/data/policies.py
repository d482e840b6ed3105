"""Changes of an image's colours and geometry by the policies of the field: TrivialAugment, RandAugment, 3-Augment.

They work on Pillow images of mode L or RGB, of any size, and return new ones of the same mode and size.
"""

from typing import TYPE_CHECKING

import numpy as np

from vitreous.spec import AugmentConfig

if TYPE_CHECKING:
    from PIL import Image

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

RAND_AUGMENT = {
    "Identity": 0.0,
    "AutoContrast": 0.0,
    "Equalize": 0.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 0.45,
    "TranslateY": 0.45,
    "Rotate": 30.0,
    "Posterize": 4.0,
    "Solarize": 255.0,
}
"""RandAugment's operations, each with its strength at magnitude 10 (0: it has none); translations: shares of a side."""

_TRIVIAL_NAMES, _RAND_NAMES = tuple(TRIVIAL_AUGMENT), tuple(RAND_AUGMENT)
_ENHANCERS = ("Brightness", "Contrast", "Color")


def apply_policy(image: "Image.Image", config: AugmentConfig, generator: np.random.Generator) -> "Image.Image":
    """Applies the policy that `config` names. The result may be `image` itself."""
    match config.policy:
        case "trivial":
            return trivial_augment(image, generator)
        case "rand":
            return rand_augment(
                image,
                generator,
                num_ops=config.rand_num_ops,
                magnitude=config.rand_magnitude,
                magnitude_std=config.rand_magnitude_std,
            )
        case "three":
            return three_augment(image, generator)
    return image


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


def rand_augment(
    image: "Image.Image",
    generator: np.random.Generator,
    *,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.0,
) -> "Image.Image":
    """Applies some operations one after the other, each drawn uniformly, at one strength, in a random direction.

    Args:
        image: Mode L or RGB.
        generator: Where the random numbers come from.
        num_ops: How many operations; the same one may come twice.
        magnitude: Strength in [0, 10].
        magnitude_std: Standard deviation of the strength around `magnitude`; what falls outside [0, 10] is clipped.

    Source: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719; ranges, grey fill and nearest-pixel geometry from the
    authors' code. Differences: magnitude 0 changes nothing and every operation grows with it, as in torchvision and in
    timm's "increasing" variant (the authors' posterise and enhancements do not); translation is a share of the side,
    0.45 at most, and `magnitude_std` exists, as in timm.
    """
    choices = generator.integers(0, len(_RAND_NAMES), num_ops).tolist()
    signs = generator.integers(0, 2, num_ops).tolist()
    noise = generator.standard_normal(num_ops).tolist() if magnitude_std else [0.0] * num_ops
    for choice, sign, error in zip(choices, signs, noise, strict=True):
        name = _RAND_NAMES[choice]
        strength = RAND_AUGMENT[name] * min(max(magnitude + magnitude_std * error, 0.0), 10.0) / 10
        if name == "TranslateX":
            strength *= image.width
        elif name == "TranslateY":
            strength *= image.height
        image = apply_operation(image, name, strength, -strength if sign else strength, fill=128)
    return image


def three_augment(image: "Image.Image", generator: np.random.Generator) -> "Image.Image":
    """Makes an image grey, solarises it at 128, or blurs it (Gaussian, radius 0.1 to 2 pixels), each with chance 1/3.

    Source: 3-Augment, Touvron et al. 2022 (DeiT III), https://arxiv.org/abs/2204.07118, section 3.2 and its code. The
    colour jitter that belongs to it is `jitter_colours`.
    """
    from PIL import ImageFilter, ImageOps

    choice, radius = int(generator.integers(0, 3)), 0.1 + 1.9 * generator.random()
    if choice == 0:
        return image.convert("L").convert(image.mode)
    if choice == 1:
        return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(radius))


def jitter_colours(image: "Image.Image", strength: float, generator: np.random.Generator) -> "Image.Image":
    """Multiplies brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order."""
    factors = (1 + strength * (2 * generator.random(3) - 1)).tolist()
    for choice in generator.permutation(3).tolist():
        image = _enhance(image, _ENHANCERS[choice], factors[choice])
    return image


def _enhance(image: "Image.Image", name: str, factor: float) -> "Image.Image":
    from PIL import ImageEnhance

    return getattr(ImageEnhance, name)(image).enhance(factor)


def apply_operation(image: "Image.Image", name: str, strength: float, signed: float, *, fill: int = 0) -> "Image.Image":
    """Applies one operation of the tables above.

    Args:
        image: Mode L or RGB.
        name: Which.
        strength: Bits to drop (Posterize) or levels below 255 from which to invert (Solarize).
        signed: Strength with its direction, for the others: degrees (Rotate), pixels (Translate), pixels a pixel
            (Shear), or what is added to the factor 1 (Brightness, Color, Contrast, Sharpness).
        fill: Level, in [0, 255], of what comes in from outside the image.
    """
    from PIL import Image, ImageOps

    colour = fill if image.mode == "L" else (fill, fill, fill)
    match name:
        case "Identity":
            return image
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Rotate":
            return image.rotate(signed, fillcolor=colour)
        case "Posterize":
            return ImageOps.posterize(image, 8 - round(strength))
        case "Solarize":
            return ImageOps.solarize(image, round(255 - strength))
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY":
            x_shear, y_shear, x_move, y_move = (
                signed if name == other else 0.0 for other in ("ShearX", "ShearY", "TranslateX", "TranslateY")
            )
            matrix = (1.0, x_shear, round(x_move), y_shear, 1.0, round(y_move))
            return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=colour)
        case _:
            return _enhance(image, name, 1 + signed)
