"""A run folder of a model that nobody trained, in a second: for tests of what is done with runs. Images to train on."""

import json

import numpy as np
import tomli_w
from PIL import Image

from vitreous.data import load_dataset
from vitreous.model import VisionTransformer
from vitreous.spec import InputSpec
from vitreous.training import load_run
from vitreous.training.run import RunWriter


def make_run(path, config, class_names, data=None, *, seed=0):
    """Returns a run whose weights are random, and large enough that its answers differ from image to image.

    Args:
        path: Where it goes.
        config: The architecture.
        class_names: As many as the architecture has classes.
        data: Folder of class folders that it says it was trained on.
        seed: Of that training: it drew the splits.
    """
    rng = np.random.default_rng(0)
    model = VisionTransformer(config)
    for variable in (model.patch_encoder.projection.kernel, model.head.kernel):
        variable.assign(rng.normal(0, 1, variable.shape))
    channels = config.num_channels
    spec = InputSpec(image_size=config.image_size, num_channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    record = {
        "name": "test",
        "root": str(data) if data else "(from Python)",
        "fingerprint": load_dataset(data, seed=seed).fingerprint if data else "",
        "class_names": list(class_names),
        "split": {"seed": seed},
    }
    writer = RunWriter(path)
    config_text = tomli_w.dumps({"format": 1, "seed": seed, "input": spec.to_dict(), "data": record})
    writer.write_text("config.toml", config_text)
    writer.write_text("metrics.json", json.dumps({"val": {}} if data else {}))
    model.save(writer.partial / "model.keras")
    return load_run(writer.finish())


def write_noise(root, count):
    """Writes two class folders, a and b, of so many images of noise each, 8x8 pixels; returns `root`."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype("uint8")).save(root / name / f"{i}.png")
    return root
