"""Whether maps are faithful: what becomes of the answer when the patches that they name are taken out, or put in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.data import ImageSet
from vitreous.errors import ConfigError
from vitreous.explanation.perturbation import Fill, fill_image, find_edges, take_out

if TYPE_CHECKING:
    from vitreous.explanation.explainer import Explainer

RANDOM = "random"


@dataclass(frozen=True)
class Curves:
    """How a method's ranking of patches changes the target's probability, as a mean over images.

    Args:
        deletion: (S + 1,) mean probability with shares 0, 1 / S ... 1 of the patches taken out, those ranked first
            before the others.
        insertion: The same with these shares put in, into an image of nothing.
        deletion_area: Area below `deletion`, in [0, 1]: the smaller, the more faithful.
        insertion_area: Area below `insertion`, in [0, 1]: the larger, the more faithful.
    """

    deletion: np.ndarray
    insertion: np.ndarray
    deletion_area: float
    insertion_area: float


@dataclass(frozen=True)
class Faithfulness:
    """Curves of each method and of random rankings.

    Args:
        curves: By method; `"random"` is the mean of random rankings.
        num_images: Images measured.
        num_random: Random rankings of each image.
        fill: What stood in the place of patches taken out.
    """

    curves: dict[str, Curves]
    num_images: int
    num_random: int
    fill: Fill

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        methods = {
            name: {
                "deletion_area": curves.deletion_area,
                "insertion_area": curves.insertion_area,
                "deletion": curves.deletion.tolist(),
                "insertion": curves.insertion.tolist(),
            }
            for name, curves in self.curves.items()
        }
        return {
            "num_images": self.num_images,
            "num_random": self.num_random,
            "fill": self.fill,
            "methods": methods,
        }


def measure_faithfulness(
    explainer: "Explainer",
    images: ImageSet | Sequence[np.ndarray],
    *,
    methods: Sequence[str] | None = None,
    target: int | str | None = None,
    fill: Fill = "mean",
    num_steps: int = 16,
    num_random: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Faithfulness:
    """Measures how faithful maps are to the model, by deletion and insertion, against random rankings.

    A map ranks the patches. Deletion takes them out of the image, the highest first, and follows the target's
    probability: it falls soon where the map names what the model uses. Insertion puts them into an image of nothing.

    Args:
        explainer: Whose model and maps.
        images: uint8 (H, W), (H, W, 1) or (H, W, 3) of any sizes, at least one; or an image set, read one by one.
        methods: Default: all that give a map.
        target: Class, by name or index. Default: of each image the one that the model answers.
        fill: What stands in the place of a patch taken out: the image's mean colour, or its blur.
        num_steps: Steps from nothing to everything, at most as many as patches.
        num_random: Random rankings of each image, at least 1.
        seed: Of these rankings, and of the order of patches with equal values.
        on_progress: Called with the images done and the images in all.

    Raises:
        ConfigError: If there are no images, a number is below 1, or a method gives no map.
        ImageError: If an image of a set cannot be read.

    Source: Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, section 4.1, with patches for pixels, and one fill
    for both curves.
    """
    if not len(images) or num_steps < 1 or num_random < 1:
        raise ConfigError(
            "Cannot measure faithfulness. Expected at least one image, step and random ranking. "
            f"Received: {len(images)} images, num_steps={num_steps}, num_random={num_random}. Pass more."
        )
    names = explainer.check_methods(methods, needs_map=True)
    sums: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(seed)
    channels = explainer.input_spec.num_channels
    for done in range(len(images)):
        image = images.load(done, channels) if isinstance(images, ImageSet) else images[done]
        found = explainer.explain(image, methods=names, target=target, fill=fill)
        pixels, grid, index = found[0].image, found[0].grid, found[0].class_index
        edges = find_edges(grid, pixels.shape[:2])
        rows, columns = found[0].grid_size
        count = rows * columns
        steps = np.rint(np.linspace(0, count, min(num_steps, count) + 1)).astype("int64")
        orders = {each.method: np.lexsort((generator.permutation(count), -each.values())) for each in found}
        orders |= {f"{RANDOM} {i}": generator.permutation(count) for i in range(num_random)}
        nothing = fill_image(pixels, fill)
        for name, order in orders.items():
            is_out = np.argsort(order)[None] < steps[:, None]  # (S + 1, P): the first ones are out
            is_out = is_out.reshape(-1, rows, columns)
            variants = np.concatenate([take_out(pixels, nothing, x, edges) for x in (is_out, ~is_out)])
            curves = explainer.probabilities(explainer.predict(variants))[:, index].reshape(2, -1)
            key = name.split()[0]
            share = curves / (num_random if key == RANDOM else 1)
            sums[key] = sums.get(key, 0) + share / len(images)
        if on_progress:
            on_progress(done + 1, len(images))
    return Faithfulness(
        {
            name: Curves(*curves, *(float(np.trapezoid(curve, dx=1 / (len(curve) - 1))) for curve in curves))
            for name, curves in sums.items()
        },
        len(images),
        num_random,
        fill,
    )
