"""Mixup and cutmix: pairs of images of a finished batch, mixed with each other, and their labels with them.

Row 0 is mixed with row 1, row 2 with row 3, and so on: the order of an epoch is random already, and so a part of a
batch with whole pairs (a thread's, a process's) can be mixed without the others.
"""

import math
from dataclasses import dataclass

import numpy as np

from vitreous.spec import AugmentConfig


@dataclass(frozen=True)
class Mix:
    """How the pairs of one batch are mixed.

    Args:
        share: What a row keeps of itself, in [0, 1].
        box: (left, top, right, bottom) in pixels of what the two images of a pair swap (cutmix); None: they are laid
            over each other (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(config: AugmentConfig, image_size: tuple[int, int], generator: np.random.Generator) -> Mix | None:
    """Draws how a batch is mixed: one share, and one rectangle, for all its pairs.

    Args:
        config: `mixup_alpha`, `cutmix_alpha`, `mix_rate` and `mix_switch_rate` count.
        image_size: (H, W) of the images.
        generator: Where the random numbers come from.

    Returns:
        None if this batch is left as it is. A mixup's share is a multiple of 1/256; a cutmix's is exactly that of the
        area, also where the rectangle is cut off at the edge.

    Source: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019, https://arxiv.org/abs/1905.04899,
    algorithm 1; the switch between them: timm's `Mixup`.
    """
    u_mix, u_switch, u_row, u_column = generator.random(4).tolist()
    if not config.has_mixing or u_mix >= config.mix_rate:
        return None
    has_box = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or u_switch < config.mix_switch_rate)
    alpha = config.cutmix_alpha if has_box else config.mixup_alpha
    share = float(generator.beta(alpha, alpha))
    if not has_box:
        return Mix(round(256 * share) / 256)
    sides, spans = [side * math.sqrt(1 - share) for side in image_size], []
    for place, side, full in zip((u_row, u_column), sides, image_size, strict=True):
        middle, half = int(place * full), int(side) // 2
        spans.append((max(middle - half, 0), min(middle + half, full)))
    (top, bottom), (left, right) = spans
    area = (bottom - top) * (right - left)
    return Mix(1 - area / (image_size[0] * image_size[1]), (left, top, right, bottom)) if area else None


def mix_pairs(images: np.ndarray, targets: np.ndarray, mask: np.ndarray, mix: Mix) -> None:
    """Mixes rows 0 and 1, rows 2 and 3, and so on, in place, where the mask keeps both of a pair.

    Args:
        images: uint8, (B, H, W, C). What mixup makes is rounded to whole levels.
        targets: float32, (B, K).
        mask: bool, (B,).
        mix: How.
    """
    for row in range(0, len(images) - 1, 2):
        if not (mask[row] and mask[row + 1]):
            continue
        one, other = images[row], images[row + 1]
        if mix.box is not None:
            left, top, right, bottom = mix.box
            kept = one[top:bottom, left:right].copy()
            one[top:bottom, left:right] = other[top:bottom, left:right]
            other[top:bottom, left:right] = kept
        else:
            weight = round(256 * mix.share)
            wide, other_wide = one.astype("uint16"), other.astype("uint16")
            one[:] = (wide * weight + other_wide * (256 - weight) + 128) >> 8
            other[:] = (other_wide * weight + wide * (256 - weight) + 128) >> 8
        pair = targets[row : row + 2]
        pair[:] = mix.share * pair + (1 - mix.share) * pair[::-1]
