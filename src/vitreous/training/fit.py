"""The training loop: batches in, a trained average of weights and a history out; from the start, or from a checkpoint.

Between two steps, everything that the rest of training depends on lies in three places: Keras variables (`Step`), the
position in the data (`BatchStream`), and `_State`. A checkpoint is these three.
"""

import copy
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from vitreous.backend import count_cores
from vitreous.data import Batch, Loader
from vitreous.data.resampling import resize_batch
from vitreous.errors import RunError, TrainingError
from vitreous.spec import InputSpec
from vitreous.training.checkpoint import Checkpoint, Checkpoints
from vitreous.training.distribute import Layout
from vitreous.training.optimizer import Optimizer
from vitreous.training.progress import Reporter, Status, format_seconds
from vitreous.training.recipe import Interval, OnNan, OptimizerConfig
from vitreous.training.schedules import average_decay, learning_rates
from vitreous.training.sharded import load_checkpoint, read_arrays
from vitreous.training.step import Step, create_step

_EVALUATIONS = 50  # at most so many while training, and one at the end
_REFRESH_SECONDS = 0.5  # between two readings of the loss
_MAX_RECOVERIES = 3  # returns to a checkpoint after a loss that was no longer finite
_TERMINATED = 128 + 15  # exit code of a process that SIGTERM ended, as shells and schedulers have it


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
        recoveries: Each return to a checkpoint after a loss that was no longer finite: the `step` it was seen at, the
            step gone `back_to`, and the `learning_rate_factor` from there on.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    num_images: int = 0
    seconds: float = 0.0
    is_interrupted: bool = False
    is_stopped: bool = False
    best_row: int | None = None
    best_weights: list[np.ndarray] | None = None
    recoveries: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation while training found.

    Args:
        score: The larger, the better.
        values: Numbers for the history, by name without `val_`.
    """

    score: tuple[float, ...]
    values: dict[str, float]


class Terminated(SystemExit):
    """SIGTERM has ended training; the code of the process is 143."""

    def __init__(self) -> None:
        super().__init__(_TERMINATED)


class Interrupt:
    """Turns the first Ctrl-C into a flag, so that no step and no file is torn; the second is a KeyboardInterrupt.

    SIGTERM, as a scheduler sends it, raises `Terminated`, or is a flag as well while `is_busy`.

    Attributes:
        is_set: Whether Ctrl-C was pressed.
        is_terminated: Whether SIGTERM came.
        is_busy: Whether SIGTERM only sets the flag, for whoever looks at it soon.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.is_terminated = False
        self.is_busy = False

    def __enter__(self) -> "Interrupt":
        self.is_main = threading.current_thread() is threading.main_thread()
        if self.is_main:
            self.previous = signal.signal(signal.SIGINT, self._handle), signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _handle(self, *_: Any) -> None:
        self.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _terminate(self, *_: Any) -> None:
        has_raised = self.is_terminated and not self.is_busy
        self.is_terminated = True
        if not self.is_busy and not has_raised:
            raise Terminated

    def __exit__(self, *_: Any) -> None:
        if self.is_main:
            signal.signal(signal.SIGINT, self.previous[0])
            signal.signal(signal.SIGTERM, self.previous[1])


class _DivergedError(TrainingError):
    """The loss is no longer finite."""


@dataclass
class _State:
    """Where training stands, beside variables and data: plain values, fit for JSON.

    Sums are scalars on the device while training goes on, and are read only when shown or saved. Times are seconds
    since training began; time between a checkpoint and its return does not count.
    """

    num_steps: int = 0
    num_images: int = 0
    epoch: int = 0  # begun, from 1
    seconds: float = 0.0
    schedule_start: float = 0.0  # of a time budget: what steps that compile have taken
    is_whole: bool = False  # a step has been done on images of the model's own size
    evaluation_seconds: float = 0.0  # of the last one: a time budget leaves room for the final one
    rate: float = 0.0
    loss_sum: Any = 0.0  # from here on: since the last row
    correct_sum: Any = 0.0
    row_steps: int = 0
    row_images: int = 0
    row_start: float = 0.0
    row_progress: float = 0.0  # at the last row
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_score: tuple[float, ...] | None = None
    best_epoch: int = 0
    best_row: int | None = None
    is_stopped: bool = False
    recoveries: list[dict[str, Any]] = field(default_factory=list)


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
    small_size: tuple[int, int] | None = None,
    small_fraction: float = 0.0,
    patience_epochs: int | None = None,
    has_answers: bool = True,
    reporter: Reporter | None = None,
    interrupt: Interrupt | None = None,
    on_row: Callable[[list[dict[str, Any]]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    on_nan: OnNan = "stop",
    layout: Layout | None = None,
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
        small_size: Size (H, W) to which images are brought at first; `model` must take it.
        small_fraction: Share of training that this lasts.
        patience_epochs: Training ends once so many epochs have brought no better score, counted from the first one on
            images of the model's size. Default: never.
        has_answers: Whether `loss` counts right answers, so that there is an accuracy to show.
        reporter: Where progress is shown.
        interrupt: Ends training after the step at hand once it is set. Default: nothing does.
        on_row: Called with all rows so far after each new one.
        checkpoints: Where the state is saved now and then and at the end, and where training goes on if there is a
            state already. Default: nowhere.
        on_nan: What a loss that is no longer finite leads to: `"stop"`; or `"back"` to the last checkpoint, with half
            the learning rate, at most 3 times.
        layout: Which devices and processes train together; `train` then makes this process's rows, and `evaluate` is
            called in all. Default: one device.

    Returns:
        The history. Resumed from a checkpoint, weights and history are bit for bit those of training without a break,
        but for times; with a time budget, the schedule follows the clock, and they are not.

    Raises:
        TrainingError: If the loss is no longer finite.
        Terminated: If SIGTERM came; the state has been saved.
        RunError: If the state that was saved does not fit.
    """
    layout = layout or Layout()
    step = create_step(model, average, optimizer, input_spec=input_spec, loss=loss, num_parts=num_parts, layout=layout)
    loop = _Loop(
        step,
        train,
        config=config,
        evaluate=evaluate,
        total_steps=(num_epochs or 0) * train.num_batches,
        budget_seconds=budget_seconds,
        small_spec=None if small_size is None else input_spec.replace(image_size=small_size),
        small_fraction=small_fraction,
        patience_epochs=patience_epochs,
        has_answers=has_answers,
        reporter=reporter or Reporter(),
        interrupt=interrupt or Interrupt(),
        on_row=on_row,
        checkpoints=checkpoints,
        on_nan=on_nan,
        layout=layout,
    )
    return loop.run()


@dataclass(eq=False)
class _Loop:
    """What `fit` works with."""

    step: Step
    train: Loader
    _: dataclasses.KW_ONLY
    config: OptimizerConfig
    evaluate: Callable[[], Evaluation | None] | None
    total_steps: int
    budget_seconds: float | None
    patience_epochs: int | None
    has_answers: bool
    reporter: Reporter
    interrupt: Interrupt
    on_row: Callable[[list[dict[str, Any]]], None] | None
    checkpoints: Checkpoints | None
    on_nan: OnNan
    layout: Layout
    small_spec: InputSpec | None = None
    small_fraction: float = 0.0

    def __post_init__(self) -> None:
        self.state = _State()
        self.stream = self.train.stream()
        self.is_sharded = self.checkpoints is not None and self.checkpoints.is_sharded
        self.best_weights: list[Any] | None = None  # arrays of NumPy; as they lie on devices where checkpoints do
        self.is_interrupted = False  # in any process
        self.pool = None if self.small_spec is None else ThreadPoolExecutor(count_cores())
        self.start = time.monotonic()
        # A step's rate is that of its middle, never 0.
        self.half_step = 0.5 / self.total_steps if self.total_steps else 0.5e-3
        self.show_from_here()

    def run(self) -> History:
        """Trains to the end."""
        state_of_disk = self.load()
        self.interrupt.is_busy = True
        try:
            if state_of_disk is not None:
                self.restore(state_of_disk)
                self.start = time.monotonic() - self.state.seconds
                self.reporter.note(
                    f"Resumed  at step {self.state.num_steps:,}, epoch {self.state.epoch}, after "
                    f"{format_seconds(self.state.seconds)} of training, from {state_of_disk.path}"
                )
            elif self.on_nan == "back":
                self.save()  # there is always something to go back to
            while self.advance():
                pass
            self.step.finish()
        except Terminated:
            self.save(is_last=True)
            self.reporter.note(f"Stopped  by SIGTERM after step {self.state.num_steps:,}")
            raise
        finally:
            self.stream.close()
            if self.pool is not None:
                self.pool.shutdown()
            self.interrupt.is_busy = False
        state = self.state
        if not self.is_interrupted:
            self.save(is_periodic=True)  # so that measuring and drawing alone are done again if they are cut short
        if self.checkpoints is not None and self.layout.num_processes > 1:
            self.checkpoints.finish()
        broken = self.gather_broken()  # before one process leaves the others
        if self.small_spec is not None and not state.is_whole:
            height, width = self.small_spec.image_size
            self.reporter.warn(
                f"Training has ended while images were still small ({height}x{width} pixels): answers will be better "
                "after its whole length, or with --small-fraction 0."
            )
        best_weights = None
        if self.best_weights is not None and state.best_row not in (None, len(state.rows) - 1):
            gather = self.layout.gather if self.is_sharded else np.asarray
            best_weights = [gather(weight) for weight in self.best_weights]
        if self.interrupt.is_terminated:
            raise Terminated
        self.train.broken.update(broken["broken"])
        self.train.num_replaced = broken["num_replaced"]
        return History(
            rows=state.rows,
            num_steps=state.num_steps,
            num_images=state.num_images,
            seconds=self.get_seconds(),
            is_interrupted=self.is_interrupted,
            is_stopped=state.is_stopped,
            best_row=state.best_row,
            best_weights=best_weights,
            recoveries=state.recoveries,
        )

    def advance(self) -> bool:
        """Does what is due between two steps, and then one step; returns whether there may be more."""
        try:
            is_terminated, is_set, is_save_due = self.layout.agree(
                self.interrupt.is_terminated,
                self.interrupt.is_set,
                # Only the first process writes any, and so knows when it did.
                self.checkpoints is not None and self.layout.is_first and self.checkpoints.is_due(self.state.num_steps),
            )
            if is_terminated:
                raise Terminated
            if self.checkpoints is not None:
                self.checkpoints.proceed()
            if is_set and not self.is_interrupted:
                self.is_interrupted = True
                self.save(is_periodic=True)  # without the row that Ctrl-C adds: what is resumed knows of no break
            if self.state.row_steps and (self.is_done() or self.is_row_due()):
                self.add_row()
                return True
            if self.is_done():
                return False
            if is_save_due:
                self.save()
            self.train_batch()
        except _DivergedError as error:
            self.go_back(error)
        return True

    def get_seconds(self) -> float:
        """Returns the time of training so far, in all processes."""
        return time.monotonic() - self.start

    def get_progress(self) -> float:
        """Returns the share of training that is done; from 1 on, it is over."""
        if self.budget_seconds:
            if not self.state.num_steps:
                return 0.0
            reserve = min(self.state.evaluation_seconds, self.budget_seconds / 4)
            left = self.budget_seconds - reserve - self.state.schedule_start
            return (self.get_seconds() - self.state.schedule_start) / max(left, 1e-9)
        return self.state.num_steps / self.total_steps

    def is_done(self) -> bool:
        """Whether training is over."""
        return self.is_interrupted or self.state.is_stopped or self.get_progress() >= 1

    def is_row_due(self) -> bool:
        """Whether an epoch has ended, and the last row is old enough."""
        has_ended = self.stream.state()["batch"] == self.train.num_batches
        return has_ended and self.get_progress() - self.state.row_progress >= 1 / _EVALUATIONS

    def train_batch(self) -> None:
        """Does one step."""
        state, batch = self.state, next(self.stream)
        is_small = self.small_spec is not None and self.get_progress() < self.small_fraction
        if self.small_spec is not None and is_small:
            batch = dataclasses.replace(batch, images=resize_batch(batch.images, self.small_spec, self.pool))
        elif self.pool is not None:
            self.pool.shutdown()
            self.pool = None
        step_start = self.get_seconds()
        state.epoch = self.stream.state()["epoch"] + 1
        factor = 0.5 ** len(state.recoveries)
        rates = learning_rates(min(self.get_progress() + self.half_step, 1.0), self.config)
        state.rate, body_rate = (factor * rate for rate in rates)
        state.num_steps += 1
        decay = average_decay(state.num_steps, self.get_progress(), horizon_fraction=self.config.average_fraction)
        loss, correct = self.step(batch, learning_rate=state.rate, body_rate=body_rate, decay=decay)
        if state.num_steps == 1 or not (is_small or state.is_whole):  # the first of its size compiles
            self.check_finite(loss)
            state.schedule_start += self.get_seconds() - (step_start if state.num_steps > 1 else 0.0)
        state.is_whole = not is_small
        state.loss_sum, state.correct_sum = state.loss_sum + loss, state.correct_sum + correct
        state.row_steps += 1
        state.row_images += (num_images := self.count_images(batch))
        state.num_images += num_images
        if time.monotonic() - self.shown_time > _REFRESH_SECONDS:
            self.show()

    def count_images(self, batch: Batch) -> int:
        """Returns how many images a batch has, in all processes; padding is none."""
        if self.layout.num_processes == 1:
            return int(batch.mask.sum())
        before = (self.stream.state()["batch"] - 1) * self.train.batch_size
        return min(self.train.batch_size, len(self.train.images) - before)

    def show_from_here(self) -> None:
        """Begins what the live display averages over."""
        self.shown_time, self.shown_images = time.monotonic(), self.state.num_images
        self.shown_sums = (0.0, 0.0, 0, 0)

    def show(self) -> None:
        """Shows where training stands."""
        state, now = self.state, time.monotonic()
        if self.layout.num_processes == 1:  # several look at it after the same step, which no clock says
            self.check_finite(state.loss_sum)
        sums = (float(state.loss_sum), float(state.correct_sum), state.row_steps, state.row_images)
        recent = [new - old for new, old in zip(sums, self.shown_sums, strict=True)]
        progress = min(self.get_progress(), 1.0)
        self.reporter.step(
            Status(
                progress=progress,
                epoch=state.epoch,
                loss=recent[0] / max(recent[2], 1),
                accuracy=recent[1] / max(recent[3], 1) if self.has_answers else None,
                images_per_second=(state.num_images - self.shown_images) / (now - self.shown_time),
                seconds_left=self.get_seconds() * (1 - progress) / max(progress, 1e-6),
            )
        )
        self.shown_time, self.shown_images, self.shown_sums = now, state.num_images, sums

    def add_row(self) -> None:
        """Evaluates, and adds a row to the history."""
        state = self.state
        self.check_finite(state.loss_sum)
        row: dict[str, Any] = {
            "epoch": state.epoch,
            "step": state.num_steps,
            "seconds": 0.0,
            "learning_rate": state.rate,
            "train_loss": float(state.loss_sum) / state.row_steps,
        }
        if self.has_answers:
            row["train_accuracy"] = float(state.correct_sum) / max(state.row_images, 1)
        row["images_per_second"] = state.row_images / (self.get_seconds() - state.row_start)
        if self.evaluate is not None:
            evaluation_start = time.monotonic()
            self.step.synchronize()
            found = self.measure(self.evaluate)
            if found is not None:
                is_whole = self.small_spec is None or self.state.is_whole
                row |= {f"val_{name}": value for name, value in found.values.items()}
                if is_whole and (state.best_score is None or found.score > state.best_score):
                    state.best_score, state.best_epoch, state.best_row = found.score, state.epoch, len(state.rows)
                    self.best_weights = self.step.copy_average() if self.is_sharded else self.step.get_average()
            state.evaluation_seconds = time.monotonic() - evaluation_start
        row["seconds"] = self.get_seconds()
        state.rows.append(row)
        has_waited = self.patience_epochs is not None and state.epoch - state.best_epoch >= self.patience_epochs
        state.is_stopped = has_waited and state.best_score is not None
        self.reporter.row(row)
        if self.on_row:
            self.on_row(state.rows)
        state.row_progress = self.get_progress()
        state.row_start, state.row_steps, state.row_images = self.get_seconds(), 0, 0
        state.loss_sum, state.correct_sum = 0.0, 0.0
        self.show_from_here()

    def measure(self, evaluate: Callable[[], Evaluation | None]) -> Evaluation | None:
        """Returns what `evaluate` finds, the same in all processes."""
        if self.layout.num_processes > 1:  # none may leave the others alone
            found = evaluate()
            told = self.layout.share(None if found is None else dataclasses.asdict(found))
            return None if told is None else Evaluation(tuple(told["score"]), told["values"])
        self.interrupt.is_busy = False  # it may take long: SIGTERM ends it at once, and it is done again
        found = None if self.interrupt.is_terminated else evaluate()
        self.interrupt.is_busy = True
        if self.interrupt.is_terminated:
            raise Terminated
        return found

    def save(self, *, is_periodic: bool = False, is_last: bool = False) -> None:
        """Begins to write a checkpoint, unless there are to be no periodic ones; the last one is waited for."""
        if self.checkpoints is None or (is_periodic and self.checkpoints.interval == Interval()):
            return
        self.check_finite(self.state.loss_sum)
        self.state.seconds = self.get_seconds()
        values = vars(self.state) | {name: float(getattr(self.state, name)) for name in ("loss_sum", "correct_sum")}
        loader = self.gather_broken()
        arrays = self.step.snapshot_parts() if self.is_sharded else self.step.snapshot()
        arrays |= {f"best/{place:04d}": weight for place, weight in enumerate(self.best_weights or [])}
        if self.is_sharded and not self.step.is_finite(arrays):  # as `Checkpoints` has it: the last one stays the last
            self.checkpoints.finish()
            self.checkpoints.start(self.state.num_steps)
            return
        if not self.is_sharded and not self.layout.is_first:
            return
        self.checkpoints.save(
            # Rows and the like grow while the checkpoint is written.
            {"loop": copy.deepcopy(values), "stream": self.stream.state(), "loader": loader},
            arrays,
            num_steps=self.state.num_steps,
        )
        if is_last:
            self.checkpoints.finish()
            self.checkpoints.wait()

    def gather_broken(self) -> dict[str, Any]:
        """Returns which images no process could read, and how often another took the place of one."""
        told = self.layout.gather_values([dict(self.train.broken), self.train.num_replaced])
        return {
            "broken": {name: reason for broken, _ in told for name, reason in broken.items()},
            "num_replaced": sum(count for _, count in told),
        }

    def load(self) -> Checkpoint | None:
        """Returns the newest whole checkpoint, in all processes."""
        return load_checkpoint(self.checkpoints, self.layout) if self.checkpoints is not None else None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes to where a checkpoint was taken."""
        saved = checkpoint.state
        try:
            state = _State(**saved["loop"])
            stream, loader = saved["stream"], saved["loader"]
            broken, num_replaced = loader["broken"], loader["num_replaced"]
        except (KeyError, TypeError) as error:
            raise RunError(
                f"Cannot resume from {checkpoint.path}. Expected the state of this vitreous. Received: {error}. "
                "Resume with the version that wrote it, or start anew with --no-resume."
            ) from error
        if state.best_score is not None:
            state.best_score = tuple(state.best_score)
        best = sorted(name for name in checkpoint.shapes or checkpoint.arrays if name.startswith("best/"))
        arrays = checkpoint.arrays
        if checkpoint.shapes is not None:
            self.step.check_shapes({name: shape for name, shape in checkpoint.shapes.items() if name not in best})
            self.step.check_best([checkpoint.shapes[name] for name in best])
            arrays = read_arrays(checkpoint, self.step.get_places(len(best)), self.layout)
        self.step.restore({name: array for name, array in arrays.items() if name not in best})
        self.best_weights = [arrays[name] for name in best] or None
        if self.best_weights and self.is_sharded != (checkpoint.shapes is not None):
            gather = self.layout.gather
            self.best_weights = (
                self.step.place_average(self.best_weights) if self.is_sharded else [*map(gather, self.best_weights)]
            )
        self.stream.restore(stream)
        self.train.broken.update(broken)
        self.train.num_replaced = num_replaced if self.layout.is_first else 0
        self.state = state
        if self.checkpoints:
            self.checkpoints.start(state.num_steps)
        self.show_from_here()

    def check_finite(self, loss: Any) -> None:
        """Raises if the loss is no number any more."""
        if math.isfinite(value := float(loss)):
            return
        step, rate = self.state.num_steps, self.config.learning_rate * 0.5 ** len(self.state.recoveries)
        raise _DivergedError(
            f"Cannot go on training. Expected a finite loss. Received: loss={value} at or shortly before step {step}. "
            f"Lower the learning rate (now {rate:g}), train with --precision float32, or let training go back by "
            "itself with --on-nan back."
        )

    def go_back(self, error: _DivergedError) -> None:
        """Returns to the last checkpoint with half the learning rate; the clock goes on."""
        recoveries, step = self.state.recoveries, self.state.num_steps
        if self.checkpoints is not None:  # all processes are here
            self.checkpoints.finish()
        if self.on_nan != "back" or self.checkpoints is None or len(recoveries) == _MAX_RECOVERIES:
            raise error
        self.checkpoints.wait()
        checkpoint = self.load()
        if checkpoint is None:
            raise error
        self.restore(checkpoint)
        factor = 0.5 ** (len(recoveries) + 1)
        self.state.recoveries = [
            *recoveries,
            {"step": step, "back_to": self.state.num_steps, "learning_rate_factor": factor},
        ]
        self.reporter.warn(
            f"The loss was no longer finite at or shortly before step {step:,}: back to step "
            f"{self.state.num_steps:,}, with {factor:g} of the learning rate ({len(self.state.recoveries)} of at most "
            f"{_MAX_RECOVERIES} times)."
        )
