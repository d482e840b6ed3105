"""What an explanation is, and which methods there are."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitreous.errors import ConfigError
from vitreous.patches import PatchGrid


@dataclass(frozen=True)
class Method:
    """A way to look inside a model.

    Args:
        name: As `explain` takes it.
        title: In words.
        description: What it shows, in a sentence.
        has_map: Whether it gives a value for each patch.
        needs_class: Whether it explains one class, so that the model must have a head.
        has_block: Whether it looks at one block, by `block`.
        is_of_model: Whether it shows the model alone, the same for every image.
        is_signed: Whether values below 0 speak against the class; else all are 0 or more.
    """

    name: str
    title: str
    description: str
    has_map: bool = False
    needs_class: bool = False
    has_block: bool = False
    is_of_model: bool = False
    is_signed: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("patches", "patches", "The image as the model takes it, cut into its patches."),
        Method(
            "positions",
            "position similarity",
            "How similar the position of each patch is to that of every other.",
            is_of_model=True,
        ),
        Method(
            "filters",
            "filters",
            "What the patch projection looks for: its principal components, and its strongest filters.",
            is_of_model=True,
        ),
        Method(
            "attention",
            "attention",
            "How much the tokens that the head reads attend to each patch, in each block and head.",
            has_map=True,
            has_block=True,
        ),
        Method(
            "rollout",
            "attention rollout",
            "Attention of all blocks multiplied, skips included: how much of each patch could reach the head.",
            has_map=True,
        ),
        Method(
            "relevance",
            "relevance",
            "Attention of all blocks, weighted by what it does for the class: which patches speak for it.",
            has_map=True,
            needs_class=True,
        ),
        Method(
            "attention-gradient",
            "attention × gradient",
            "The same of one block, not followed back to the image.",
            has_map=True,
            needs_class=True,
            has_block=True,
        ),
        Method(
            "grad-cam",
            "Grad-CAM",
            "Tokens that enter a block, weighted by the class's gradient.",
            has_map=True,
            needs_class=True,
            has_block=True,
        ),
        Method(
            "integrated-gradients",
            "integrated gradients",
            "What each pixel adds to the class's logit, against an image of one colour or a blurred one.",
            has_map=True,
            needs_class=True,
            is_signed=True,
        ),
        Method(
            "occlusion",
            "occlusion",
            "How far the class's logit falls when a part of the image is taken out.",
            has_map=True,
            needs_class=True,
            is_signed=True,
        ),
        Method(
            "pca",
            "features",
            "Principal components of the patches' features, as colours: equal colours, equal features.",
            has_block=True,
        ),
    )
}


def list_methods() -> list[Method]:
    """Lists the methods of `explain`, in the order in which they are shown."""
    return list(METHODS.values())


@dataclass(frozen=True)
class Explanation:
    """What one method shows of one image.

    Args:
        method: Name of the method.
        image: uint8 (H, W, C), as the model takes it, before it is normalised.
        grid: How the model cuts it into patches.
        map: (rows, columns) float32, a value for each patch; None where the method has none.
        is_signed: Whether the map's values below 0 speak against the class; else all are 0 or more.
        unit: What the map's values are.
        note: How it was computed, in a few words: block, head, steps.
        arrays: What else the method gives, by name (docs/explain.md).
        logits: (K,) float32, the model's answer by its ordinary pass; empty for a model without a head.
        class_index: The class that is explained; None without a head.
        class_name: Its name; None without a head.
        probability: Its probability, in [0, 1]; None without a head.
        is_answer: Whether this class is the most probable one.
    """

    method: str
    image: np.ndarray
    grid: PatchGrid
    map: np.ndarray | None
    is_signed: bool
    unit: str
    note: str
    arrays: dict[str, np.ndarray] = field(repr=False)
    logits: np.ndarray
    class_index: int | None
    class_name: str | None
    probability: float | None
    is_answer: bool

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.grid.grid_size((self.image.shape[0], self.image.shape[1]))

    def values(self) -> np.ndarray:
        """Returns the map as a vector (patches,), row by row.

        Raises:
            ConfigError: If the method gives no map.
        """
        if self.map is None:
            raise ConfigError(
                f"Cannot read the map of {self.method}. Expected a method that gives a value for each patch. "
                "Received: map=None. See which do with list_methods()."
            )
        return self.map.ravel()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON: all but the image and the arrays."""
        return {
            "method": self.method,
            "class": self.class_name,
            "class_index": self.class_index,
            "probability": self.probability,
            "is_answer": self.is_answer,
            "image_size": list(self.image.shape[:2]),
            "patch_size": list(self.grid.size),
            "grid_size": list(self.grid_size),
            "map": None if self.map is None else self.map.tolist(),
            "is_signed": self.is_signed,
            "unit": self.unit,
            "note": self.note,
            "arrays": {name: list(array.shape) for name, array in self.arrays.items()},
        }
