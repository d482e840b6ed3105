"""The learning-rate finder: a few steps with a rate that grows, and what the loss says about each."""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vitreous.backend import select_precision
from vitreous.data import Dataset, load_dataset
from vitreous.errors import ConfigError, TrainingError
from vitreous.figures import draw_rate_search
from vitreous.figures.canvas import checked_path
from vitreous.model import VisionTransformer
from vitreous.spec import check, check_minimum
from vitreous.training.optimizer import create_optimizer
from vitreous.training.planning import (
    check_start,
    fit_to_images,
    pretrained_start,
    random_start,
    settle_recipe,
    split_options,
    training_loader,
    training_loss,
)
from vitreous.training.progress import Reporter, Status
from vitreous.training.recipe import Recipe
from vitreous.training.step import create_step

_SMOOTHING = 0.9  # weight of the past in the smoothed loss
_DIVERGED = 4.0  # times the lowest smoothed loss so far
_LEAST_STEPS = 20


@dataclass(frozen=True)
class RateSearch:
    """What the search for a learning rate found.

    Args:
        rates: Learning rate of each step done.
        losses: Loss of each step's batch, in nats.
        smoothed: Their exponential average, corrected for its start.
        suggestion: The rate to train with: the geometric mean of the next two.
        tenth: A tenth of the rate at which the smoothed loss was lowest.
        steepest: The rate at which the smoothed loss fell fastest against the logarithm of the rate.
        has_diverged: Whether the loss grew beyond four times its lowest.
        recipe_rate: The rate that the recipe has.
        recipe_name: Name of the recipe.
        batch_size: Images a step.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float
    tenth: float
    steepest: float
    has_diverged: bool
    recipe_rate: float
    recipe_name: str
    batch_size: int


def find_learning_rate(
    data: str | Path | Dataset,
    *,
    out: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    pretrained: str | Path | None = None,
    num_steps: int = 100,
    lowest_rate: float = 1e-6,
    highest_rate: float = 1.0,
    seed: int = 0,
    reporter: Reporter | None = None,
    **changes: Any,
) -> RateSearch:
    """Trains a fresh model with a learning rate that grows from step to step, and suggests one to train with.

    Model, batches, augmentation, loss and optimiser are those of `train` with the same arguments, but images have their
    whole size from the start; nothing is kept of the model. The search ends early once the loss has diverged.

    Args:
        data: Labelled images, as for `train`. The training images are used, no others.
        out: Picture to write (.png, .svg or .pdf), loss against rate; the numbers go beside it as .json. Default:
            nothing is written.
        recipe: A recipe, its name, or a TOML file. Default: chosen from the data.
        pretrained: Weights to start from, as for `train`.
        num_steps: Steps from the lowest rate to the highest, at least 20.
        lowest_rate: First learning rate, above 0.
        highest_rate: Last learning rate, above `lowest_rate`.
        seed: Decides first weights, order and augmentation.
        reporter: Where progress is shown. Default: nowhere.
        **changes: Fields of `DataConfig` and of `Recipe`, as for `train`.

    Returns:
        The curve and the suggestion.

    Raises:
        ConfigError: If an option cannot work.
        DataError: If the data cannot be used.
        TrainingError: If the loss is not finite from the start on, or never falls.

    Source: Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3 (the range test). Differences: the rate grows by a
    factor, as in Gugger 2018, https://sgugger.github.io/how-do-you-find-a-good-learning-rate.html, whose smoothing
    and end at four times the lowest loss these are too. The two usual readings of the curve, a tenth of the lowest
    point's rate and the steepest descent, lay on both sides of the best rate where that was known (docs/log.md), so
    their geometric mean is suggested.
    """
    check(
        0 < lowest_rate < highest_rate <= 10,
        "Cannot search for a learning rate.",
        "0 < lowest_rate < highest_rate <= 10",
        f"lowest_rate={lowest_rate:g}, highest_rate={highest_rate:g}",
        "Pass such a pair.",
    )
    check_minimum(1, num_steps=num_steps)
    check(
        num_steps >= _LEAST_STEPS,
        "Cannot search for a learning rate.",
        f"at least {_LEAST_STEPS} steps",
        f"num_steps={num_steps}",
        "Pass about 100.",
    )
    if changes.get("batch_size") == "auto":
        raise ConfigError(
            "Cannot search for a learning rate. Expected a number of images a step: the rate depends on it. "
            "Received: batch_size='auto'. Pass the number that `vitreous train --batch auto` chose."
        )
    if out is not None:
        checked_path(out)
    reporter = reporter or Reporter()
    split, changes = split_options(data, seed, changes)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, **split)
    name, settled = settle_recipe(recipe, dataset, changes, pretrained=pretrained)
    check_start(settled, changes, has_weights=pretrained is not None, has_teacher=False)
    num_classes, weights = len(dataset.class_names), None
    if pretrained is None:
        spec = random_start(settled, num_classes)
    else:
        spec, weights, settled = pretrained_start(pretrained, changes.get("model"), settled, dataset, reporter)
    images = dataset.splits["train"]
    settled = fit_to_images(settled, len(images))
    policy = select_precision(settled.precision, keras.backend.backend())
    state = random.getstate()
    random.seed(seed)
    model, average = (VisionTransformer(spec.config, name=spec.name, dtype=policy) for _ in range(2))
    random.setstate(state)
    if weights is not None:
        model.set_weights(weights)
    step = create_step(
        model,
        average,
        create_optimizer(model, settled.optimizer, seed=seed),
        input_spec=spec.input,
        loss=training_loss(images, settled, num_classes),
        num_parts=settled.num_parts,
    )
    reporter.note(f"Rates    {lowest_rate:g} to {highest_rate:g} in {num_steps} steps of {settled.batch_size} images")
    planned = np.geomspace(lowest_rate, highest_rate, num_steps).tolist()
    losses: list[float] = []
    smoothed: list[float] = []
    total, has_diverged = 0.0, False
    loader = training_loader(images, spec.input, settled, reporter, seed=seed, num_classes=num_classes)
    batches, start = loader.stream(), time.monotonic()
    try:
        for i, rate in enumerate(planned):
            loss = float(step(next(batches), learning_rate=rate, decay=0.0)[0])
            if not math.isfinite(loss):
                has_diverged = True
                break
            total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
            losses.append(loss)
            smoothed.append(total / (1 - _SMOOTHING ** (i + 1)))
            reporter.step(_status(i + 1, num_steps, smoothed[-1], settled.batch_size, time.monotonic() - start))
            if i >= _LEAST_STEPS // 2 and smoothed[-1] > _DIVERGED * min(smoothed):
                has_diverged = True
                break
    finally:
        reporter.close()
        batches.close()
        loader.close()
    rates = planned[: len(losses)]
    suggestion, tenth, steepest = suggest(rates, smoothed)
    found = RateSearch(
        rates=rates,
        losses=losses,
        smoothed=smoothed,
        suggestion=suggestion,
        tenth=tenth,
        steepest=steepest,
        has_diverged=has_diverged,
        recipe_rate=settled.optimizer.learning_rate,
        recipe_name=name,
        batch_size=settled.batch_size,
    )
    if out is not None:
        path = draw_rate_search(asdict(found), out)
        path.with_suffix(".json").write_text(json.dumps(asdict(found), indent=2), encoding="utf-8")
    return found


def suggest(rates: list[float], smoothed: list[float]) -> tuple[float, float, float]:
    """Reads a curve of losses.

    Args:
        rates: Rising learning rates.
        smoothed: The smoothed loss at each.

    Returns:
        The suggestion, a tenth of the rate at which the loss is lowest, and the rate at which it falls fastest.

    Raises:
        TrainingError: If the curve is too short, or the loss is nowhere below its start.
    """
    if len(rates) < _LEAST_STEPS // 2 or min(smoothed) >= smoothed[0]:
        raise TrainingError(
            "Cannot suggest a learning rate. Expected a loss that falls before it grows. Received: "
            f"{len(rates)} steps, loss from {smoothed[0] if smoothed else math.nan:.3f} to "
            f"{min(smoothed, default=math.nan):.3f}. Pass a smaller --lowest-rate, more steps, or --precision float32."
        )
    place = int(np.argmin(smoothed))
    slopes = np.gradient(np.array(smoothed[: place + 1]), np.log(rates[: place + 1])) if place else np.zeros(1)
    first = min(len(slopes) - 1, 5)  # the first averages are of a few batches: their slope is noise
    tenth, steepest = rates[place] / 10, rates[first + int(np.argmin(slopes[first:]))]
    return _round(math.sqrt(tenth * steepest)), _round(tenth), _round(steepest)


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")


def _status(step: int, num_steps: int, loss: float, batch_size: int, seconds: float) -> Status:
    return Status(
        progress=step / num_steps,
        epoch=1,
        loss=loss,
        accuracy=None,
        images_per_second=step * batch_size / seconds,
        seconds_left=seconds * (num_steps - step) / step,
    )
