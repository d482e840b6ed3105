"""What a masked autoencoder makes of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitreous.errors import ConfigError
from vitreous.figures.canvas import INK, checked_path, create_figure, load_image, save, show, write

_CELL, _GAP, _LEFT = 132, 8, 100  # pixels


def draw_reconstruction(
    images: Sequence[np.ndarray], seen: Sequence[np.ndarray], filled: Sequence[np.ndarray], out: str | Path
) -> Path:
    """Draws images in a row; under each, what the model saw of it, and what it made of that.

    Args:
        images: uint8, (H, W, C) each.
        seen: The same with the hidden patches painted over.
        filled: The same with the hidden patches as the model fills them in.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.

    Returns:
        The path written.

    Raises:
        ConfigError: If there are no images, the lengths differ, or the suffix of `out` is unknown.
    """
    path = checked_path(out)
    if not len(images) == len(seen) == len(filled) or not len(images):
        raise ConfigError(
            "Cannot draw a reconstruction. Expected as many seen and filled images as images, and at least one. "
            f"Received: {len(images)} images, {len(seen)} seen, {len(filled)} filled. Pass lists of the same images."
        )
    width = _LEFT + len(images) * (_CELL + _GAP) + _GAP
    height = 3 * (_CELL + _GAP) + _GAP
    figure = create_figure(width, height)
    rows = (("image", images), ("what the\nmodel sees", seen), ("what it\nmakes of it", filled))
    for row, (title, pictures) in enumerate(rows):
        y = _GAP + row * (_CELL + _GAP)
        write(figure, (_LEFT - 8) / width, 1 - (y + _CELL / 2) / height, title, color=INK, size=9, ha="right")
        for column, picture in enumerate(pictures):
            x = _LEFT + column * (_CELL + _GAP)
            axis = figure.add_axes((x / width, 1 - (y + _CELL) / height, _CELL / width, _CELL / height))
            show(axis, load_image(picture, None)[0])
    return save(figure, path)
