"""Trackers: a training run followed by TensorBoard, MLflow or Weights & Biases, behind one interface.

`Tracker` is the interface; a subclass of your own can be passed to `train(track=...)`. Each tracker works on a thread
of its own: a service that is slow or gone holds up no step, and one that fails is named once and left behind. The run
folder has every number anyway (`history.csv`, `history.jsonl`, `metrics.json`).
"""

import contextlib
import importlib.util
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitreous.errors import MissingDependencyError, UnknownNameError
from vitreous.training.progress import Reporter

_PICTURES = ("curves", "confusion", "labels", "predictions", "augmented", "patches", "reconstruction")
_FINISH_SECONDS = 60.0  # to wait for a tracker after training
_MOST_TEXT = 500  # characters of a parameter; the least that a tracker takes


class Tracker:
    """Follows one training run; this one does nothing. All methods are called on one thread, in this order.

    What a method raises ends the tracker, and is told once; it never ends training.
    """

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Begins a run.

        Args:
            path: Where the run folder will be; its name is the run's name. Files of the tracker go beside it.
            config: What `config.toml` holds.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes one row of the history.

        Args:
            step: Steps of training done; after a return to a checkpoint, smaller than in the call before.
            values: Numbers by name, such as `train/loss` and `val/accuracy`.
        """

    def finish(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Ends a run that is whole.

        Args:
            step: Steps of training done.
            metrics: What was measured on the trained model, by name, such as `test/accuracy`.
            pictures: PNG files by name, such as `curves`.
        """

    def fail(self) -> None:
        """Ends a run that broke off."""


class TensorBoardTracker(Tracker):
    """Event files for TensorBoard, in `tensorboard/RUN` beside the run; options stand under its HPARAMS tab.

    Only the package `tensorboard` is needed. Its summary writers import TensorFlow where that is installed, for the
    file alone; so its records go to a file opened here.
    """

    def __init__(self) -> None:
        _check_installed("tensorboard", "tensorboard", "--track tensorboard")

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Opens the event file, and writes the options."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._session, self._last_step = Event, Summary, SessionLog, -1
        folder, number = path.parent / "tensorboard" / path.name, 1
        while folder.exists():  # events of two runs in one folder would be drawn as one
            number += 1
            folder = folder.with_name(f"{path.name}-{number}")
        folder.mkdir(parents=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        info = SessionStartInfo(start_time_secs=time.time())
        for key, value in flatten(config).items():
            kind = "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "string"
            setattr(info.hparams[key], f"{kind}_value", value if kind != "string" else _as_text(value))
        plugin = SummaryMetadata.PluginData(
            plugin_name="hparams",
            content=HParamsPluginData(version=0, session_start_info=info).SerializeToString(),
        )
        tag = "_hparams_/session_start_info"
        self._add(0, [Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()

    def _add(self, step: int, values: list[Any]) -> None:
        self._write(step=step, summary=self._summary(value=values))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars; where steps are done again, readers forget those of before."""
        if step < self._last_step:
            self._write(step=step, session_log=self._session(status=self._session.START))
        self._last_step = step
        self._add(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def finish(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Writes final scalars and images, and closes the file."""
        from PIL import Image

        self.log(step, metrics)
        for name, path in pictures.items():
            with Image.open(path) as image:
                width, height = image.size
            shown = self._summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
            )
            self._add(step, [self._summary.Value(tag=name, image=shown)])
        self._writer.close()

    def fail(self) -> None:
        """Closes the file."""
        self._writer.close()


class MLflowTracker(Tracker):
    """A run in MLflow, in an experiment named after the data.

    It goes where `MLFLOW_TRACKING_URI` says; without it, into the database `mlflow.db` beside the run, artifacts into
    `mlartifacts` (look at it with `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`, of the package `mlflow`).
    """

    def __init__(self) -> None:
        _check_installed("mlflow", "mlflow", "--track mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            for package in ("sqlalchemy", "alembic"):
                _check_installed(package, "mlflow", "The database of --track mlflow")

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Begins the run and logs its options as parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what the user trains is told to nobody unasked
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        place = os.environ.get("MLFLOW_TRACKING_URI")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=place or f"sqlite:///{path.parent}/mlflow.db")
        name = str(config["data"]["name"])
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = None if place else (path.parent / "mlartifacts").as_uri()
            identity = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            identity = experiment.experiment_id
        self._run_id = self._client.create_run(identity, run_name=path.name).info.run_id
        params = [Param(key, _as_text(value)) for key, value in flatten(config).items()]
        for start in range(0, len(params), 100):  # as many as a request takes
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def finish(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Logs final metrics, and pictures as artifacts."""
        self.log(step, metrics)
        for path in pictures.values():
            self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, status="FINISHED")

    def fail(self) -> None:
        """Marks the run as failed."""
        self._client.set_terminated(self._run_id, status="FAILED")


class WandbTracker(Tracker):
    """A run in Weights & Biases, in the project `vitreous` or that of `WANDB_PROJECT`.

    `WANDB_MODE=offline` writes into `wandb` beside the run and needs no account; `wandb sync` sends it later.
    """

    def __init__(self) -> None:
        _check_installed("wandb", "wandb", "--track wandb")

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Begins the run."""
        import wandb

        path.parent.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vitreous"),
            name=path.name,
            dir=str(path.parent),
            config=flatten(config),
            reinit="create_new",  # folds: one run after the other in this process
            settings=wandb.Settings(console="off", silent=True),
        )
        # The step as a number like others: W&B's own drops rows whose steps are done again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a row."""
        self._run.log({"step": step, **values})

    def finish(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Puts final metrics into the summary, logs pictures, and waits until all is written."""
        import wandb

        self._run.log({"step": step, **{name: wandb.Image(str(path)) for name, path in pictures.items()}})
        self._run.summary.update(dict(metrics))
        self._run.finish()

    def fail(self) -> None:
        """Marks the run as failed."""
        self._run.finish(exit_code=1)


_TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}


def _check_installed(package: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(package, extra, purpose)


def create_tracker(name: str) -> Tracker:
    """Creates a tracker.

    Args:
        name: `"tensorboard"`, `"mlflow"` or `"wandb"`.

    Raises:
        UnknownNameError: If there is no such tracker.
        MissingDependencyError: If its package is not installed.
    """
    if name not in _TRACKERS:
        raise UnknownNameError("tracker", name, _TRACKERS, f"Trackers: {', '.join(_TRACKERS)}.")
    return _TRACKERS[name]()


class Trackers:
    """All trackers of a run.

    Args:
        chosen: Names as for `create_tracker`, or trackers.
        reporter: Told of each tracker that fails, once.

    Raises:
        UnknownNameError: If a name is none.
        MissingDependencyError: If a package is not installed.
    """

    def __init__(self, chosen: "str | Tracker | Sequence[str | Tracker]", reporter: Reporter):
        given = [chosen] if isinstance(chosen, str | Tracker) else chosen
        unique = list(dict.fromkeys(given))  # twice the same name is one tracker
        self._followers = [_Follower(create_tracker(each) if isinstance(each, str) else each) for each in unique]
        self._reporter = reporter
        self._step = 0
        self._num_rows = 0
        self._last_row: Mapping[str, Any] | None = None
        self._is_started = False

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Begins the run; arguments as for `Tracker.start`."""
        self._is_started = True
        self._call(lambda tracker: tracker.start(path, config))

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the history so far, as `fit` makes it; the rows that are new in it go to the trackers.

        In a run that was resumed, the first call brings the rows from before the break too. After a return to a
        checkpoint there are no more rows than before, and the last one is new.
        """
        if not rows or rows[-1] is self._last_row:
            return
        if self._last_row is None and len(rows) > 1 and self._followers:
            self._reporter.note("Tracked  as a new run of each tracker; the rows from before the break go into it too")
        for row in rows[min(self._num_rows, len(rows) - 1) :]:
            self._log(row)
        self._num_rows, self._last_row = len(rows), rows[-1]

    def _log(self, row: Mapping[str, Any]) -> None:
        self._step = int(row["step"])
        values = {
            f"{split}/{rest}" if split in ("train", "val") and rest else name: float(value)
            for name, value in row.items()
            if value is not None and name != "step"
            for split, _, rest in [name.partition("_")]
        }
        step = self._step
        self._call(lambda tracker: tracker.log(step, values))

    def finish(self, metrics: Mapping[str, Any], folder: Path) -> None:
        """Ends a run that is whole, and waits for the trackers.

        Args:
            metrics: What `metrics.json` holds.
            folder: Where the pictures are now.
        """
        test = metrics.get("test", {})
        numbers = {f"test/{name}": float(value) for name, value in test.items() if _is_number(value)}
        numbers |= {name: float(value) for name, value in metrics.items() if _is_number(value)}
        paths = {name: folder / f"{name}.png" for name in _PICTURES}
        pictures = {name: path for name, path in paths.items() if path.is_file()}
        self._call(lambda tracker: tracker.finish(self._step, numbers, pictures))
        self._close()

    def fail(self) -> None:
        """Ends a run that broke off."""
        if self._is_started:
            self._call(lambda tracker: tracker.fail())
            self._close()

    def _call(self, call: Callable[[Tracker], None]) -> None:
        for follower in self._followers:
            follower.put(call)
        self._tell()

    def _close(self) -> None:
        limit = time.monotonic() + _FINISH_SECONDS
        for follower in self._followers:
            follower.close(max(limit - time.monotonic(), 0))
        self._tell()

    def _tell(self) -> None:
        """Names each tracker that has failed since."""
        for follower in [each for each in self._followers if each.problem]:
            self._followers.remove(follower)
            self._reporter.warn(
                f"{type(follower.tracker).__name__} no longer follows this run ({follower.problem}). Training is not "
                "touched; the run folder has every number."
            )


def follow_rows(
    write: Callable[[list[dict[str, Any]]], None], trackers: Trackers
) -> Callable[[list[dict[str, Any]]], None]:
    """Returns what `fit` calls after each row: all rows to the run's files, by `write`, new ones to the trackers."""

    def on_row(rows: list[dict[str, Any]]) -> None:
        write(rows)
        trackers.follow(rows)

    return on_row


class _Follower:
    """A tracker on a thread of its own."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.problem: str | None = None
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[Tracker], None]) -> None:
        """Has a method of the tracker called, after those before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name=type(self.tracker).__name__)
            self._thread.start()
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call(self.tracker)
            except Exception as error:  # whatever a foreign package raises: it must not reach training
                lines = str(error).strip().splitlines()
                self.problem = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
                with contextlib.suppress(Exception):  # so that it leaves no half-open run where it can help it
                    self.tracker.fail()
                return

    def close(self, seconds: float) -> None:
        """Waits until all calls are done, for so long at most."""
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.problem = f"not done {_FINISH_SECONDS:.0f} seconds after training"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Returns the values of nested tables by their path (`recipe.optimizer.learning_rate`); lists become text.

    Long lists of names say nothing beside numbers: of `class_names` only their number is kept.
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif key == "class_names":
            found[f"{prefix}num_classes"] = len(value)
        elif isinstance(value, bool | int | float):
            found[f"{prefix}{key}"] = value
        elif value is not None and value != []:
            found[f"{prefix}{key}"] = _as_text(value)
    return found


def _as_text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
