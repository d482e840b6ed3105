"""A tiny run, images to send, and servers to send them to."""

import contextlib
import io
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import tomli_w
from PIL import Image

from vitreous.model import VisionTransformer
from vitreous.server.process import Process
from vitreous.server.serve import listen
from vitreous.server.settings import ServerConfig
from vitreous.spec import InputSpec, ViTConfig
from vitreous.training import load_run
from vitreous.training.run import RunWriter

CLASSES = ("ant", "bee", "cat")


def make_run(path):
    """Leaves a run of a model with random weights, for colour images of 16 × 16 pixels."""
    config = ViTConfig(
        image_size=16, patch_size=4, projection_dim=32, num_blocks=2, num_heads=2, use_class_token=True, num_classes=3
    )
    state = random.getstate()
    random.seed(0)
    model = VisionTransformer(config, name="tiny")
    random.setstate(state)
    model.head.kernel.assign(np.random.default_rng(0).normal(0, 1, model.head.kernel.shape))
    spec = InputSpec(image_size=16, num_channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=0.8)
    data = {"name": "insects", "root": "gone", "fingerprint": "", "class_names": list(CLASSES), "split": {"seed": 0}}
    writer = RunWriter(path)
    record = {"format": 1, "seed": 0, "input": spec.to_dict(), "data": data}
    writer.write_text("config.toml", tomli_w.dumps({**record, "model": {"name": "tiny", **config.to_dict()}}))
    writer.write_text("metrics.json", "{}")
    model.save(writer.partial / "model.keras")
    return load_run(writer.finish())


def encode(format="png", size=(20, 24), seed=0):
    """Returns the bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@contextlib.contextmanager
def running(service, *, token=None):
    """Runs a server in a thread; yields its address."""
    listener = listen(ServerConfig(port=0))
    process = Process(service, token=token)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: process.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        process.should_exit = True
        thread.join(20)


def wait_until(condition, seconds=20.0):
    """Returns as soon as a condition holds; fails if it does not come to."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class ServerProcess:
    """`vitreous serve` in a process of its own, with its log in a file."""

    def __init__(self, path, log, *options):
        self.log = log
        command = [sys.executable, "-m", "vitreous", "serve", str(path), "--port", "0", *map(str, options)]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, env={**os.environ}
            )
        line = self.process.stdout.readline()
        assert line.startswith(f"Serving  {path} at http"), line + log.read_text()
        self.address = line.split(" at ")[1].split()[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
