"""A backbone: a model whose features are of interest, from whatever names one, and the function that computes them."""

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import keras
import numpy as np

from vitreous.errors import ConfigError, MissingPathError, UnknownNameError
from vitreous.model import VisionTransformer, create_predict_function
from vitreous.patches import as_pair
from vitreous.registry import get_spec, list_models
from vitreous.spec import InputSpec, check
from vitreous.training import Run
from vitreous.training.run import find_run
from vitreous.weights import import_weights

Pooling: TypeAlias = Literal["head", "class", "mean", "patches"]
POOLINGS = ("head", "class", "mean", "patches")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model whose features are of interest.

    Args:
        source: What named it: a run folder, a file, a model of the hub, or a model's name.
        model: The model.
        input_spec: What images must go through before they enter it.
        run: The run that it comes from; None where it comes from none.
        is_random: Whether its weights are random: it has learnt nothing.
        notes: What was done or assumed in loading it, in words.
    """

    source: str
    model: VisionTransformer
    input_spec: InputSpec
    run: Run | None = None
    is_random: bool = False
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 in hex over the architecture and every weight."""
        digest = hashlib.sha256(repr(sorted(self.model.config.to_dict().items())).encode())
        for variable in self.model.weights:
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value)).tobytes())
        return digest.hexdigest()

    def get_feature_shape(self, pooling: Pooling = "head") -> tuple[int, ...]:
        """Returns the shape of one image's features: (D,), or (N, D) for `"patches"`."""
        config = self.model.config
        if pooling == "patches":
            return config.num_patches, config.projection_dim
        return (config.features_dim if pooling == "head" else config.projection_dim,)

    def create_feature_function(
        self, *, block: int | None = None, pooling: Pooling = "head"
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Returns a function from uint8 images to features, compiled where the backend compiles.

        Args:
            block: Index of the block to read, negative from the end. Default: the last one. The final norm is always
                applied.
            pooling: `"head"` (what the head reads), `"class"` (the class token), `"mean"` (the mean over patches), or
                `"patches"` (each patch on its own).

        Returns:
            A function of images (B, H, W, C) uint8 that returns float32 (B, D), or (B, N, D) for `"patches"`, both in
            NumPy.

        Raises:
            ConfigError: If there is no such block or token.
        """
        check(
            pooling in POOLINGS,
            "Cannot pool features.",
            f"one of {', '.join(map(repr, POOLINGS))}",
            f"pooling={pooling!r}",
            "Pass one of them.",
        )
        self.model.check_features(block, "class" if pooling == "class" else None)  # before anything is computed
        return create_predict_function(_Reader(self.model, block, pooling), self.input_spec)


class _Reader(keras.Model):
    """A model whose answer is another model's features."""

    def __init__(self, model: VisionTransformer, block: int | None, pooling: Pooling):
        super().__init__()
        self.model = model
        self.block = block
        self.pooling = pooling
        self.built = True

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Returns the features (B, D), or (B, N, D), of normalised images."""
        model, block = self.model, self.block
        if self.pooling != "patches":
            return model.features(images, block, pooling=None if self.pooling == "head" else self.pooling)
        tokens = model.tokens(images, block)
        return (tokens if block is None else model.leave(tokens))[:, model.config.num_prefix_tokens :]


def load_backbone(
    source: str | Path | Run | Backbone, *, image_size: int | tuple[int, int] | None = None, seed: int = 0
) -> Backbone:
    """Loads a backbone.

    Args:
        source: A run, or its folder (of `pretrain` too); weights as for `import_weights` (a .keras file, timm/NAME.TAG,
            hf:OWNER/NAME, a local file or folder); or the bare name of a model, whose weights are then random.
        image_size: (H, W) in pixels, or one number; learned positions are resized to it. Default: the backbone's.
        seed: Decides random weights.

    Returns:
        A `Backbone`, in float32.

    Raises:
        MissingPathError: If `source` is neither a path that exists nor the name of a model.
        ConfigError: If `source` is the name of published weights without `timm/` before it, or a backbone of another
            image size than `image_size`.
        RunError, WeightsError: If it cannot be read.

    Example:

    ```python
    backbone = load_backbone("runs/photos-1")
    features = backbone.create_feature_function()(images)  # (B, H, W, C) uint8 -> (B, D)
    ```
    """
    if isinstance(source, Backbone):
        check(
            image_size is None or as_pair(image_size, "image_size") == source.input_spec.image_size,
            f"Cannot change the image size of {source.source}.",
            f"that of the loaded backbone, {source.input_spec.image_size}",
            f"image_size={image_size}",
            "Pass it to load_backbone.",
        )
        return source
    run = source if isinstance(source, Run) else find_run(source)
    if run is not None:
        return _load_run(run, image_size)
    text = str(source)
    if not Path(text).exists() and not text.startswith(("hf:", "timm/")):
        return _create(text, image_size, seed)
    report = import_weights(text, image_size=image_size, dtype="float32")
    return Backbone(text, report.model, report.input_spec, notes=tuple(report.notes))


def _load_run(run: Run, image_size: int | tuple[int, int] | None) -> Backbone:
    if image_size is None:
        return Backbone(str(run.path), run.load_model(), run.input_spec, run)
    report = import_weights(run.path / "model.keras", image_size=image_size, dtype="float32")
    spec = run.input_spec.replace(image_size=report.input_spec.image_size)
    return Backbone(str(run.path), report.model, spec, run, notes=tuple(report.notes))


def _create(name: str, image_size: int | tuple[int, int] | None, seed: int) -> Backbone:
    """Creates the model of a name, with random weights."""
    model, _, tag = name.partition(".")
    if model not in (known := list_models()):
        nearest = UnknownNameError("model", name, known).nearest
        raise MissingPathError(
            "Cannot load a backbone. Expected a run folder, a file or folder of weights, timm/NAME.TAG, hf:OWNER/NAME, "
            f"or the name of a model. Received: {name!r}, which does not exist. "
            + (f"Nearest models: {', '.join(nearest)}." if nearest else "Check the path.")
        )
    if tag:
        get_spec(name)  # an unknown tag says which there are
        raise ConfigError(
            f"Cannot load a backbone. Expected timm/ before the name of published weights. Received: {name!r}. "
            f"Pass timm/{name}, or {model} for random weights."
        )
    spec = get_spec(name, num_classes=0, image_size=image_size)
    state = random.getstate()
    random.seed(seed)  # Keras's layers draw their seeds from there
    try:
        built = VisionTransformer(spec.config, name=name, dtype="float32")
    finally:
        random.setstate(state)
    note = f"{name} is a bare name: its weights are random, it has learnt nothing"
    return Backbone(name, built, spec.input, is_random=True, notes=(note,))
