"""Images of colours, and a tiny backbone, for the tests of embeddings."""

import random

import numpy as np
from PIL import Image

from vitreous.model import VisionTransformer
from vitreous.spec import ViTConfig


def make_colours(root, *, count=20, seed=0):
    """Writes `count` images of noise around each of three colours, in folders without splits."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 90, (10, 12, 3), dtype="uint8")
            pixels[..., channel] += np.uint8(120)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def make_backbone(path, *, seed=0):
    """Saves a model with random weights of 32 features, a class token and a register."""
    config = ViTConfig(
        image_size=16, patch_size=8, projection_dim=32, num_blocks=2, num_heads=2, num_registers=1, num_classes=0
    )
    state = random.getstate()
    random.seed(seed)
    model = VisionTransformer(config, name="tiny")
    random.setstate(state)
    model.save(path)
    return path
