"""What training sees: one image under several draws, and a batch with its targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitreous.data import AugmentConfig, Batch, ImageSet, Loader
from vitreous.data.images import resize_image
from vitreous.data.transforms import augment_image, example_generator
from vitreous.errors import DataError, ImageError, MissingPathError
from vitreous.figures.canvas import FAINT, INK, checked_path, create_figure, fit, save, show, write
from vitreous.spec import InputSpec

_COLUMNS, _CELL, _GAP, _TEXT, _HEAD = 8, 132, 8, 34, 34  # pixels
_NUM_DRAWS = 15


def draw_augmentation(
    images: ImageSet,
    input_spec: InputSpec,
    config: AugmentConfig,
    *,
    out: str | Path,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Draws an image as evaluation and as training see it, and a batch of training with its targets.

    The first block has one image: brought to size as in evaluation, then as 15 epochs of training would show it. The
    second has a batch of 8 images, mixed if `config` mixes, with the classes of each and their shares; it is left out
    where there is only one image.

    Args:
        images: Where the images come from; the first one that can be read is shown in the first block.
        input_spec: Size and filter of what the model takes.
        config: How images are changed.
        out: File to write: .png, .svg or .pdf. An existing one is replaced.
        class_names: K names. Default: numbers.
        seed: Decides the draws, and which images are in the batch.

    Returns:
        The path written.

    Raises:
        DataError: If not one image can be read.
        ConfigError: If the suffix of `out` is unknown, or images without labels are to be mixed.
    """
    path = checked_path(out)
    index, image = first_readable(images, input_spec.num_channels)
    shown = [resize_image(image, input_spec)]
    shown += [
        augment_image(image, input_spec, config, example_generator(seed, epoch, index)) for epoch in range(_NUM_DRAWS)
    ]
    texts = ["as in evaluation", *[""] * _NUM_DRAWS]
    blocks = [("One image, in several epochs", shown, texts)]
    if len(images) > 1:
        batch = _draw_batch(images, input_spec, config, max(len(class_names), 1), seed)
        kept = np.flatnonzero(batch.mask)
        mixed = ", mixed" if config.has_mixing else ""
        blocks.append(
            (
                f"A batch{mixed}, with its targets",
                [batch.images[row] for row in kept],
                [describe_target(batch.labels[row], class_names) for row in kept],
            )
        )
    height, width = input_spec.image_size
    cell_height = round(_CELL * min(height / width, 3))
    rows = [-(-len(pictures) // _COLUMNS) for _, pictures, _ in blocks]
    total = (_COLUMNS * (_CELL + _GAP) + _GAP, sum(_HEAD + n * (cell_height + _TEXT) for n in rows) + _GAP)
    figure = create_figure(*total)
    top = 0
    for (title, pictures, lines), num_rows in zip(blocks, rows, strict=True):
        write(figure, _GAP / total[0], 1 - (top + _HEAD / 2) / total[1], title, color=INK, size=10, ha="left")
        for place, (picture, line) in enumerate(zip(pictures, lines, strict=True)):
            left = _GAP + place % _COLUMNS * (_CELL + _GAP)
            upper = top + _HEAD + place // _COLUMNS * (cell_height + _TEXT)
            axis = figure.add_axes(
                (
                    left / total[0],
                    1 - (upper + cell_height) / total[1],
                    _CELL / total[0],
                    cell_height / total[1],
                )
            )
            show(axis, np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture)
            middle = (left + _CELL / 2) / total[0]
            for number, part in enumerate(line.split("\n")):
                y = 1 - (upper + cell_height + 9 + 13 * number) / total[1]
                write(figure, middle, y, fit(figure, part, 7.5, _CELL), color=FAINT, size=7.5)
        top += _HEAD + num_rows * (cell_height + _TEXT)
    return save(figure, path)


def describe_target(target: np.ndarray, class_names: Sequence[str], most: int = 2) -> str:
    """Returns a label as text: a class, or the largest shares, a line each.

    Args:
        target: An integer, or float (K,) with the shares of the classes.
        class_names: K names. Default: numbers.
        most: How many shares to name.
    """

    def name(label: int) -> str:
        return class_names[label] if 0 <= label < len(class_names) else str(label) if label >= 0 else ""

    if target.ndim == 0:
        return name(int(target))
    order = np.argsort(-target, kind="stable")
    kept = [int(label) for label in order if target[label] > 0]
    lines = [name(k) if target[k] == 1 else f"{name(k)} {target[k]:.2f}" for k in kept[:most]]
    if len(kept) > most:
        lines[-1] += f" +{len(kept) - most}"
    return "\n".join(lines) or "none"


def first_readable(images: ImageSet, num_channels: int = 3) -> tuple[int, np.ndarray]:
    """Returns the index and the pixels, uint8 (H, W, num_channels), of the first image that can be read."""
    for index in range(len(images)):
        try:
            return index, images.load(index, num_channels)
        except (ImageError, MissingPathError):  # the loaders name it
            continue
    raise DataError(
        f"Cannot draw augmentation. Expected at least one image that can be read. Received: {len(images)} images. "
        "Pass other data."
    )


def _draw_batch(images: ImageSet, input_spec: InputSpec, config: AugmentConfig, num_classes: int, seed: int) -> Batch:
    if not images.is_multi_label:
        num_classes = max(num_classes, int(images.labels.max()) + 1)
    loader = Loader(
        images,
        input_spec,
        batch_size=min(_COLUMNS, len(images)),
        augment=config,
        num_classes=num_classes,
        shuffle=True,
        seed=seed,
        num_workers=0,
        cache="none",
    )
    return next(loader.epoch(0))
