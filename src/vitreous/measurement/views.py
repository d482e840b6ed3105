"""Test-time augmentation: several views of an image, one answer."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from vitreous.errors import ConfigError
from vitreous.evaluation import sigmoid, softmax

Predict = Callable[[np.ndarray], np.ndarray]

View = tuple[int, int, bool]
"""How far an image is shifted down and to the right, in 16ths of its side, and whether it is mirrored."""

_VIEWS: tuple[View, ...] = tuple(
    (down, right, is_mirrored)
    for is_mirrored in (False, True)
    for down, right in ((0, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))
)


def create_views(tta: Literal["flip"] | int | None) -> tuple[View, ...]:
    """Returns the views of an image that `evaluate` averages.

    Args:
        tta: `"flip"`, a number from 2 to 10, or None for the image alone.

    Raises:
        ConfigError: If it is something else.
    """
    if tta is None:
        return _VIEWS[:1]
    if tta == "flip":
        return ((0, 0, False), (0, 0, True))
    if isinstance(tta, int) and 2 <= tta <= len(_VIEWS):
        return _VIEWS[:tta]
    raise ConfigError(
        f"Cannot augment test images. Expected flip, or 2 to {len(_VIEWS)} views. Received: tta={tta!r}. "
        "Pass flip, 5 (shifts) or 10 (shifts and their mirror images)."
    )


def describe_view(view: View) -> str:
    """Returns a view in words."""
    down, right, is_mirrored = view
    words = [("down" if down > 0 else "up") if down else "", ("right" if right > 0 else "left") if right else ""]
    shift = " ".join(filter(None, words))
    return ", ".join(filter(None, [shift or "as it is", "mirrored" if is_mirrored else ""]))


def make_view(images: np.ndarray, view: View) -> np.ndarray:
    """Returns a view of uint8 images (B, H, W, C): shifted, the edge as a mirror, then mirrored left to right."""
    down, right, is_mirrored = view
    height, width = images.shape[1:3]
    for axis, (part, side) in enumerate(((down, height), (right, width)), 1):
        shift = part * max(1, round(side / 16))
        if part and side > 1:
            places = np.arange(side) - shift
            places = np.abs(np.where(places >= side, 2 * (side - 1) - places, places))
            images = np.take(images, places, axis)
    return images[:, :, ::-1] if is_mirrored else images


def average_views(
    predict: Predict, views: Sequence[View], *, is_multi_label: bool = False, temperature: float = 1.0
) -> Predict:
    """Returns a predict function that answers with the mean of the probabilities of several views.

    Args:
        predict: uint8 images (B, H, W, C) to logits (B, K).
        views: See `create_views`.
        is_multi_label: Whether probabilities are a sigmoid's.
        temperature: Logits are divided by it to become probabilities.

    Returns:
        A predict function. Its logits, divided by `temperature`, give that mean.
    """

    def averaged(images: np.ndarray) -> np.ndarray:
        total: np.ndarray | float = 0.0
        for view in views:
            logits = np.asarray(predict(np.ascontiguousarray(make_view(images, view))), "float64") / temperature
            total = total + (sigmoid(logits) if is_multi_label else softmax(logits))
        mean = np.clip(np.asarray(total) / len(views), 1e-30, 1)
        logits = np.log(mean) - (np.log(np.maximum(1 - mean, 1e-30)) if is_multi_label else 0)
        return (temperature * logits).astype("float32")

    return averaged
