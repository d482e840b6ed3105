"""The training loop: batches in, a trained average of weights and a history out."""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from vitreous.data import Loader
from vitreous.errors import TrainingError
from vitreous.spec import InputSpec
from vitreous.training.optimizer import Optimizer
from vitreous.training.progress import Reporter, Status
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.schedules import average_decay, learning_rates
from vitreous.training.step import create_step

_EVALUATIONS = 50  # at most so many while training, and one at the end
_REFRESH_SECONDS = 0.5  # between two readings of the loss


@dataclass
class History:
    """What training leaves besides weights.

    Args:
        rows: One dict for each evaluation: epoch, step, seconds, learning_rate, train_loss, train_accuracy, what
            `evaluate` returned under names with `val_` before them (None where nothing was evaluated), and
            images_per_second. With several labels an image, accuracy is the share of right answers over all images and
            labels.
        num_steps: Steps done.
        num_images: Images trained on, with repetition.
        seconds: Wall-clock time of training, with compilation and evaluation.
        is_interrupted: Whether the user ended it early.
        is_stopped: Whether it ended because validation no longer improved.
        best_row: Index of the row with the best validation score; None without validation.
        best_weights: The averaged weights of that row, as `average.get_weights()` has them; None if they are the last.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    num_images: int = 0
    seconds: float = 0.0
    is_interrupted: bool = False
    is_stopped: bool = False
    best_row: int | None = None
    best_weights: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation while training found.

    Args:
        score: The larger, the better.
        values: Numbers for the history, by name without `val_`.
    """

    score: tuple[float, ...]
    values: dict[str, float]


class Interrupt:
    """Turns the first Ctrl-C into a flag, so that no step and no file is torn; the second is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> "Interrupt":
        self.is_main = threading.current_thread() is threading.main_thread()
        if self.is_main:
            self.previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, *_: Any) -> None:
        self.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: Any) -> None:
        if self.is_main:
            signal.signal(signal.SIGINT, self.previous)


def fit(
    model: keras.Model,
    average: keras.Model,
    train: Loader,
    *,
    optimizer: Optimizer,
    input_spec: InputSpec,
    config: OptimizerConfig,
    loss: Callable[..., Any],
    evaluate: Callable[[], Evaluation | None] | None = None,
    num_epochs: int | None = None,
    budget_seconds: float | None = None,
    num_parts: int = 1,
    patience_epochs: int | None = None,
    has_answers: bool = True,
    reporter: Reporter | None = None,
    interrupt: Interrupt | None = None,
    on_row: Callable[[list[dict[str, Any]]], None] | None = None,
) -> History:
    """Trains `model`, and leaves the average of its weights in `average`.

    Args:
        model: A built model.
        average: A second one of the same architecture.
        train: Training batches, shuffled.
        optimizer: Of `model`'s weights.
        input_spec: How images are normalised.
        config: Schedule of the learning rate and the average.
        loss: What to make small, as `Loss`.
        evaluate: Measures `average` on validation images; None where there is nothing to measure.
        num_epochs: Passes over the training data; or:
        budget_seconds: Wall-clock time to train for; the schedule follows the clock and ends with it.
        num_parts: Parts that a batch is worked off in.
        patience_epochs: Training ends once so many epochs have brought no better score. Default: never.
        has_answers: Whether `loss` counts right answers, so that there is an accuracy to show.
        reporter: Where progress is shown.
        interrupt: Ends training after the step at hand once it is set. Default: nothing does.
        on_row: Called with all rows so far after each new one.

    Returns:
        The history.

    Raises:
        TrainingError: If the loss is no longer finite.
    """
    reporter = reporter or Reporter()
    interrupt = interrupt or Interrupt()
    history = History()
    step = create_step(model, average, optimizer, input_spec=input_spec, loss=loss, num_parts=num_parts)
    total_steps = (num_epochs or 0) * train.num_batches
    start = schedule_start = time.monotonic()
    half_step = 0.5 / total_steps if total_steps else 0.5e-3  # a step's rate is that of its middle, never 0

    evaluation_seconds = 0.0  # of the last evaluation: a time budget leaves room for the final one

    def get_progress() -> float:
        if budget_seconds:  # the clock of the schedule starts after the first step, which compiles
            left = start + budget_seconds - min(evaluation_seconds, budget_seconds / 4) - schedule_start
            return (time.monotonic() - schedule_start) / max(left, 1e-9) if history.num_steps else 0.0
        return history.num_steps / total_steps

    def is_done() -> bool:
        return interrupt.is_set or history.is_stopped or get_progress() >= 1

    progress, last_row_progress, epoch = 0.0, 0.0, 0
    best_score: tuple[float, ...] | None = None
    best_epoch, best_weights = 0, None
    row_start, row_steps, row_images = start, 0, 0
    loss_sum, correct_sum = 0.0, 0.0  # become scalars on the device; read only when shown
    shown_time, shown_images, shown_sums = start, 0, (0.0, 0.0, 0, 0)
    while not is_done():
        batches = train.epoch(epoch)
        epoch += 1
        for batch in batches:
            rate, body_rate = learning_rates(min(get_progress() + half_step, 1.0), config)
            history.num_steps += 1
            decay = average_decay(history.num_steps, get_progress(), horizon_fraction=config.average_fraction)
            batch_loss, correct = step(batch, learning_rate=rate, body_rate=body_rate, decay=decay)
            if history.num_steps == 1:
                _check_finite(float(batch_loss), 1, config)
                schedule_start = time.monotonic()
            loss_sum, correct_sum = loss_sum + batch_loss, correct_sum + correct
            row_steps += 1
            row_images += (num_images := int(batch.mask.sum()))
            history.num_images += num_images
            now = time.monotonic()
            if now - shown_time > _REFRESH_SECONDS:
                sums = (float(loss_sum), float(correct_sum), row_steps, row_images)
                _check_finite(sums[0], history.num_steps, config)
                recent = [new - old for new, old in zip(sums, shown_sums, strict=True)]
                progress = min(get_progress(), 1.0)
                reporter.step(
                    Status(
                        progress=progress,
                        epoch=epoch,
                        loss=recent[0] / max(recent[2], 1),
                        accuracy=recent[1] / max(recent[3], 1) if has_answers else None,
                        images_per_second=(history.num_images - shown_images) / (now - shown_time),
                        seconds_left=(now - start) * (1 - progress) / max(progress, 1e-6),
                    )
                )
                shown_time, shown_images, shown_sums = now, history.num_images, sums
            if is_done():
                batches.close()
                break
        if row_steps and (is_done() or get_progress() - last_row_progress >= 1 / _EVALUATIONS):
            seconds = time.monotonic() - row_start
            _check_finite(float(loss_sum), history.num_steps, config)
            row = {
                "epoch": epoch,
                "step": history.num_steps,
                "seconds": 0.0,
                "learning_rate": rate,
                "train_loss": float(loss_sum) / row_steps,
                **({"train_accuracy": float(correct_sum) / max(row_images, 1)} if has_answers else {}),
                "images_per_second": row_images / seconds,
            }
            if evaluate is not None:
                evaluation_start = time.monotonic()
                step.synchronize()
                if (found := evaluate()) is not None:
                    row |= {f"val_{name}": value for name, value in found.values.items()}
                    if best_score is None or found.score > best_score:
                        best_score, best_epoch, history.best_row = found.score, epoch, len(history.rows)
                        best_weights = average.get_weights()
                evaluation_seconds = time.monotonic() - evaluation_start
            row["seconds"] = time.monotonic() - start
            history.rows.append(row)
            has_waited = patience_epochs is not None and epoch - best_epoch >= patience_epochs
            history.is_stopped = has_waited and best_score is not None
            reporter.row(row)
            if on_row:
                on_row(history.rows)
            last_row_progress = get_progress()
            row_start, row_steps, row_images = time.monotonic(), 0, 0
            loss_sum, correct_sum, shown_sums = 0.0, 0.0, (0.0, 0.0, 0, 0)
    step.synchronize()
    if history.best_row not in (None, len(history.rows) - 1):
        history.best_weights = best_weights
    history.is_interrupted = interrupt.is_set
    history.seconds = time.monotonic() - start
    return history


def _check_finite(loss: float, step: int, config: OptimizerConfig) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"Cannot go on training. Expected a finite loss. Received: loss={loss} at or shortly before step {step}. "
            f"Lower the learning rate (now {config.learning_rate:g}), or train with --precision float32."
        )
