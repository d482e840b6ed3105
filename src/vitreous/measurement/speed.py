"""How fast a model answers on this machine, and how much memory that takes."""

import importlib.util
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.backend import count_cores, uses_gpu
from vitreous.measurement.views import Predict
from vitreous.spec import InputSpec

_SECONDS = 0.4  # of each measurement, at least


def measure_speed(predict: Predict, input_spec: InputSpec, *, batch_size: int = 64) -> dict[str, Any]:
    """Measures how fast images in memory are answered: from uint8 of the model's size to logits, no decoding.

    Args:
        predict: uint8 images (B, H, W, C) to logits (B, K).
        input_spec: What images it takes.
        batch_size: B of the throughput.

    Returns:
        A dict fit for JSON: `images_per_second` in batches of `batch_size`, `seconds_per_image` one by one, both of the
        fastest call in at least 0.4 s after a first one; `peak_bytes`, the most memory that this process has had,
        everything in it counted, or None where the system does not say.
    """
    return {
        "batch_size": batch_size,
        "images_per_second": batch_size / _time_batch(predict, input_spec, batch_size),
        "seconds_per_image": _time_batch(predict, input_spec, 1),
        "peak_bytes": get_peak_bytes(),
    }


def _time_batch(predict: Predict, input_spec: InputSpec, size: int) -> float:
    """Returns the seconds of the fastest call."""
    shape = (size, *input_spec.image_size, input_spec.num_channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype="uint8")
    predict(images)  # compiles
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        predict(images)
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now >= end:
            return fastest


def get_peak_bytes() -> int | None:
    """Returns the most memory that this process has had, or None where the system does not say."""
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_device(backend: str) -> str:
    """Returns what a backend computes on, in words."""
    if uses_gpu(backend):
        if backend == "torch":
            import torch

            return str(torch.cuda.get_device_name())
        if backend == "jax":
            import jax

            return str(jax.devices()[0].device_kind)
        return "a GPU"
    cores = count_cores()
    return f"{_name_processor()}, {cores} core{'s' * (cores != 1)}"


def _name_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
