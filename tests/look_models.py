"""Small models with all their weights random, and what `look` collects of them: for its tests, and the page's."""

import functools

import keras
import numpy as np
from layer_harness import to_numpy

from vitreous.explanation import Explainer
from vitreous.look import look
from vitreous.model import VisionTransformer
from vitreous.spec import InputSpec, ViTConfig

NAMES = ("</script><img src=x onerror=alert(1)>", "dog & cat", "constructor", "owl", "bird", "a" * 60)


@functools.cache
def make_explainer(name="class"):
    """A small model whose weights are all random."""
    keras.utils.set_random_seed(0)
    options = {"image_size": (16, 24), "patch_size": 8, "projection_dim": 32, "num_blocks": 2, "num_heads": 2}
    config = ViTConfig(**{**options, "mlp_dim": 32, "num_classes": 6, **ZOO[name]})
    model = VisionTransformer(config, name="tiny")
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) and "seed" not in weight.path:
            weight.assign(to_numpy(weight.value) + generator.normal(0, 0.2, weight.shape))
    half = (0.5,) * config.num_channels
    spec = InputSpec(image_size=config.image_size, num_channels=config.num_channels, mean=half, std=half)
    names = NAMES if config.num_classes else ()
    return Explainer(model, input_spec=spec, class_names=names, temperature=2.0, is_multi_label=name == "map")


ZOO = {
    "class": {"num_registers": 1, "image_size": (32, 32)},
    "map": {
        "num_blocks": 1,
        "use_class_token": False,
        "pooling": "map",
        "rope": "eva",
        "position": "none",
        "num_channels": 1,
    },
    "bare": {
        "num_blocks": 1,
        "num_classes": 0,
        "pooling": "mean",
        "use_pre_norm": True,
        "num_parallel": 2,
        "position": "sincos",
    },
}


def make_image(height=40, width=60):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype="uint8")


@functools.cache
def look_once(name="class"):
    return look(make_explainer(name), make_image(), threshold=0.5)
