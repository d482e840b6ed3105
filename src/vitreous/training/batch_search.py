"""`--batch-size auto`: the largest batch that fits, found by real training steps of growing size."""

import dataclasses
import gc
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vitreous.backend import get_available_bytes, uses_gpu
from vitreous.data import Batch
from vitreous.errors import ConfigError
from vitreous.spec import InputSpec
from vitreous.training.optimizer import Optimizer
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Recipe
from vitreous.training.step import create_step

_UNIT = 8  # batches are 8, 16, 32 ...
_LEAST_STEPS = 16  # that an epoch keeps
_LEAST_GAIN = 1.03  # in images a second, on a CPU
_LEAST_SECONDS, _LEAST_TIMED = 1.5, 3  # of a trial; the fastest step counts, since other programs only slow steps
_GIB = 2**30

Created = tuple[Any, Any, Optimizer]  # model, average, optimizer


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What one batch size gave."""

    batch_size: int
    images_per_second: float
    used_bytes: int | None

    def describe(self) -> str:
        used = "" if self.used_bytes is None else f", {self.used_bytes / _GIB:.2f} GiB"
        return f"{self.batch_size}: {self.images_per_second:,.0f} images/s{used}"


def find_batch_size(
    create: Callable[[], Created],
    *,
    recipe: Recipe,
    input_spec: InputSpec,
    loss: Callable[..., Any],
    num_targets: int | None,
    num_images: int,
    reporter: Reporter,
) -> int:
    """Finds the largest batch that is worth its memory, and says what was tried.

    Batches are 8, 16, 32 ... images (times what `num_parts` asks for), from the recipe's batch on. On a GPU: until one
    no longer fits into its memory. On a CPU: until a larger one is no more than 3% faster an image, or would take more
    than half of the memory that is free. Never so many images that an epoch would have fewer than 16 steps, unless the
    recipe itself has. Where not even the recipe's batch fits, the largest smaller one that does.

    The steps are real: model, average, optimiser, loss and precision of the training to come, on images of noise. All
    they allocate is given back.

    Args:
        create: Makes the model, a second one for the average, and the optimiser.
        recipe: The recipe, with the batch that it names.
        input_spec: Size and channels of the images.
        loss: As for `Step`.
        num_targets: K where labels are shares of K classes, or several an image; None where they are integers.
        num_images: Training images.
        reporter: Told each trial, and the choice.

    Raises:
        ConfigError: If not even the smallest batch fits.
    """
    unit = math.lcm(_UNIT, recipe.num_parts)
    most = max(num_images // _LEAST_STEPS, min(recipe.batch_size, num_images), unit)
    size = unit
    while size * 2 <= min(recipe.batch_size, most):
        size *= 2
    is_gpu = uses_gpu(keras.backend.backend())
    free = get_available_bytes()
    created = create()
    best: _Trial | None = None
    ending = ""
    reporter.note(f"Batch    the largest is looked for, from {size} images on; the recipe has {recipe.batch_size}")
    start = time.monotonic()
    while True:
        trial = _try(created, size, recipe.num_parts, input_spec, loss, num_targets)
        if trial is None:
            reporter.note(f"         {size}: does not fit into memory")
            ending = f"{size} does not fit"
            if best is not None:
                break
            if size == unit:
                raise ConfigError(
                    f"Cannot find a batch that fits into memory. Expected {unit} images to fit. Received: out of "
                    f"memory at {unit} of {input_spec.image_size[0]}x{input_spec.image_size[1]} pixels. "
                    "Pass a smaller model or image size, or --precision bfloat16."
                )
            most, size = size - 1, size // 2
            continue
        reporter.note(f"         {trial.describe()}")
        if not is_gpu and best is not None and trial.images_per_second < _LEAST_GAIN * best.images_per_second:
            gain = trial.images_per_second / best.images_per_second - 1
            ending = f"{size} is no faster ({gain:+.1%} an image; {_LEAST_GAIN - 1:.0%} is asked)"
            break
        best = trial
        if size * 2 > most:
            ending = ending or f"{num_images:,} training images allow no more ({_LEAST_STEPS} steps an epoch)"
            break
        if not is_gpu and free is not None and trial.used_bytes is not None and 2 * trial.used_bytes > free / 2:
            ending = f"{2 * size} would take more than half of the free memory ({free / _GIB:.1f} GiB)"
            break
        size *= 2
    seconds = time.monotonic() - start
    reporter.note(f"         {best.batch_size} chosen: {ending}; {seconds:.0f} s of trying")
    del created
    _free_memory()
    return best.batch_size


def scale_learning_rate(recipe: Recipe, batch_size: int, reporter: Reporter) -> Recipe:
    """Returns the recipe with another batch size, and with the learning rate that goes with it.

    The rate grows with the square root of the batch.

    Args:
        recipe: The recipe, with the batch and the rate that belong together.
        batch_size: The batch to train with.
        reporter: Told the new rate.

    Source: Malladi et al. 2022, https://arxiv.org/abs/2205.10343, for Adam. Differences: its decays and epsilon stay,
    which the paper scales too.
    """
    factor = math.sqrt(batch_size / recipe.batch_size)
    old = recipe.optimizer.learning_rate
    new = float(f"{min(old * factor, 10.0):.3g}")  # 10 is the most that OptimizerConfig takes
    if new != old:
        reporter.note(
            f"         learning rate {new:g}: {old:g} of the recipe times sqrt({batch_size} / {recipe.batch_size})"
        )
    return dataclasses.replace(recipe, batch_size=batch_size, optimizer=recipe.optimizer.replace(learning_rate=new))


def _try(
    created: Created,
    batch_size: int,
    num_parts: int,
    input_spec: InputSpec,
    loss: Callable[..., Any],
    num_targets: int | None,
) -> _Trial | None:
    """Returns what steps of so many images take; None if they do not fit into memory."""
    trial: _Trial | None = None
    try:
        trial = _measure(created, batch_size, num_parts, input_spec, loss, num_targets)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    _free_memory()  # after the except block: the error's traceback holds what the step had allocated
    return trial


def _measure(
    created: Created,
    batch_size: int,
    num_parts: int,
    input_spec: InputSpec,
    loss: Callable[..., Any],
    num_targets: int | None,
) -> _Trial:
    model, average, optimizer = created
    generator = np.random.default_rng(0)
    shape = (batch_size, *input_spec.image_size, input_spec.num_channels)
    if num_targets is None:
        labels: np.ndarray = np.zeros(batch_size, "int32")
    else:
        labels = np.full((batch_size, num_targets), 1 / num_targets, "float32")
    batch = Batch(generator.integers(0, 256, shape, "uint8"), labels, np.ones(batch_size, bool), np.arange(batch_size))
    before = _resident_bytes()
    with _PeakMemory() as peak:
        step = create_step(model, average, optimizer, input_spec=input_spec, loss=loss, num_parts=num_parts)
        best, start, count = math.inf, 0.0, 0
        while count <= _LEAST_TIMED or time.monotonic() - start < _LEAST_SECONDS:
            begin = time.monotonic()
            float(step(batch, learning_rate=0.0, decay=0.0)[0])  # a rate of 0 leaves the weights alone; reading waits
            count += 1
            if count == 1:  # it compiles
                start = time.monotonic()
            else:
                best = min(best, time.monotonic() - begin)
    used = None if before is None or peak.bytes is None else max(peak.bytes - before, 0)
    is_gpu = uses_gpu(keras.backend.backend())
    return _Trial(batch_size, batch_size / best, None if is_gpu else used)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any backend says that memory is used up."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ in ("OutOfMemoryError", "ResourceExhaustedError")
        or any(sign in text for sign in ("resource_exhausted", "out of memory", "can't allocate memory"))
    )


def _free_memory() -> None:
    """Gives back what nobody refers to any more; torch keeps it for itself until told."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and keras.backend.backend() == "torch" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _resident_bytes() -> int | None:
    """Returns the memory that this process holds; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize()


class _PeakMemory:
    """Watches the memory of this process, and keeps the most it has held."""

    def __init__(self) -> None:
        self.bytes: int | None = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            if (now := _resident_bytes()) is not None:
                self.bytes = max(self.bytes or 0, now)

    def __enter__(self) -> "_PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
