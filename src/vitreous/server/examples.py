"""Images to try a model on, offered by the page."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitreous.data import DataConfig, ImageSet, load_evaluation_images, load_images
from vitreous.data.images import to_pillow
from vitreous.errors import ImageError, MissingPathError
from vitreous.training import Run

MOST = 12
"""Examples that are offered, at most."""

_LONGEST_SIDE = 512  # pixels


@dataclass(frozen=True)
class Example:
    """An image to try.

    Args:
        name: Its file, without folders.
        class_name: Its label, where it has one.
        png: The image, made smaller where it is large.
    """

    name: str
    class_name: str | None
    png: bytes


def load_examples(source: Path | None, run: Run | None, num_channels: int) -> list[Example]:
    """Loads some images.

    Args:
        source: A folder or a file. Default: what the run was measured on.
        run: The run.
        num_channels: 3 (RGB) or 1 (grey).

    Returns:
        At most `MOST`, one of each class in turn; images that cannot be read are left out.

    Raises:
        VitreousError: If there are none.
    """
    class_names: tuple[str, ...] = ()
    if source is not None:
        images = load_images([str(source)], DataConfig())
        order: Iterable[int] = range(len(images))
    elif run is None:
        return []
    else:
        record, class_names = run.config["data"], run.class_names
        images = load_evaluation_images(
            record["name"] if record["root"] == "(built in)" else record["root"],
            class_names,
            made_by=record["split"],
            trained_on=record["fingerprint"],
            trained_at=record["root"],
            is_multi_label=run.is_multi_label,
        ).images
        order = range(len(images)) if run.is_multi_label else _in_turn(images.labels)
    examples: list[Example] = []
    for index in order:
        if len(examples) == MOST:
            break
        try:
            pixels = images.load(index, num_channels)
        except (ImageError, MissingPathError):
            continue
        label = class_names[images.labels[index]] if class_names and images.labels.ndim == 1 else None
        examples.append(Example(_short_name(images, index), label, _to_png(pixels)))
    return examples


def _in_turn(labels: np.ndarray) -> list[int]:
    """Returns indices: the first of each class, then the second of each ..., as many as may be looked at."""
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        rank[mine] = np.arange(len(mine))
    return [int(i) for i in np.lexsort((labels, rank))[: 2 * MOST]]


def _short_name(images: ImageSet, index: int) -> str:
    return Path(images.names[index]).name


def _to_png(pixels: np.ndarray) -> bytes:
    image = to_pillow(pixels)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
