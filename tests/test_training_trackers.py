import json
import os
import sys
import time
from types import ModuleType

import numpy as np
import pytest

import vitreous
from vitreous.data import load_dataset
from vitreous.errors import MissingDependencyError, UnknownNameError
from vitreous.training.progress import Reporter
from vitreous.training.trackers import Tracker, Trackers, create_tracker, flatten

TINY = {"epochs": 2, "batch_size": 64, "architecture": {"num_blocks": 1, "projection_dim": 16, "mlp_dim": 16}}


class Listener(Reporter):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


class Recorder(Tracker):
    def __init__(self, breaks_at=""):
        self.calls = []
        self.breaks_at = breaks_at

    def _take(self, name, *values):
        self.calls.append((name, *values))
        if name == self.breaks_at:
            raise ConnectionError("the server is gone\nand more")

    def start(self, path, config):
        self._take("start", path, config)

    def log(self, step, values):
        self._take("log", step, values)

    def finish(self, step, metrics, pictures):
        assert all(path.is_file() for path in pictures.values())
        self._take("finish", step, metrics, pictures)

    def fail(self):
        self._take("fail")


@pytest.fixture(scope="module")
def few_digits():
    """240 digits to train on, 60 to validate and 60 to test."""
    dataset = load_dataset("digits")
    dataset.splits.update(
        train=dataset.splits["train"].take(np.arange(240)),
        val=dataset.splits["val"].take(np.arange(60)),
        test=dataset.splits["test"].take(np.arange(60)),
    )
    return dataset


@pytest.fixture(scope="module")
def tracked(few_digits, tmp_path_factory):
    """A run that was followed by all trackers at once, offline, by one of our own, and by two that broke."""
    root = tmp_path_factory.mktemp("tracked")
    recorder, broken, late = Recorder(), Recorder("log"), Recorder("finish")
    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "exit", sys.exit)  # wandb replaces it
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DISABLE_GIT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", (root / "mlruns").as_uri())
        run = vitreous.train(
            few_digits,
            out=root / "run",
            track=["tensorboard", "mlflow", "wandb", "tensorboard", recorder, broken, late],
            reporter=listener,
            **TINY,
        )
    return root, run, recorder, broken, late, listener


def rows_of(run):
    return [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]


def test_a_tracker_of_ones_own_hears_everything_in_order(tracked):
    root, run, recorder, *_ = tracked
    assert [call[0] for call in recorder.calls] == ["start", "log", "log", "finish"]
    _, path, config = recorder.calls[0]
    assert path == root / "run"
    assert config["recipe"]["batch_size"] == 64
    rows = rows_of(run)
    assert [call[1] for call in recorder.calls[1:3]] == [row["step"] for row in rows]
    assert recorder.calls[1][2]["train/loss"] == rows[0]["train_loss"]
    assert recorder.calls[2][2]["val/accuracy"] == rows[1]["val_accuracy"]
    assert {"epoch", "seconds", "learning_rate", "images_per_second"} <= set(recorder.calls[1][2])
    _, step, metrics, pictures = recorder.calls[-1]
    assert step == rows[-1]["step"]
    assert metrics["test/accuracy"] == run.metrics["test"]["accuracy"]
    assert {"curves", "confusion", "predictions"} <= set(pictures)


def test_what_breaks_is_named_once_and_left_behind(tracked):
    _, run, _, broken, late, listener = tracked
    assert [call[0] for call in broken.calls] == ["start", "log", "fail"]
    assert [call[0] for call in late.calls] == ["start", "log", "log", "finish", "fail"]
    told = [text for text in listener.warnings if "no longer follows" in text]
    assert (
        told
        == [
            "Recorder no longer follows this run (ConnectionError: the server is gone). Training is not touched; the "
            "run folder has every number."
        ]
        * 2
    )
    assert not run.metrics["is_interrupted"]


def test_tensorboard_reads_what_was_written(tracked, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))  # its reader without TensorFlow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    root, run, *_ = tracked
    (folder,) = (root / "tensorboard").iterdir()  # named twice, it is one tracker
    assert folder.name == "run"
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = rows_of(run)
    found = events.Scalars("val/accuracy")
    assert [event.step for event in found] == [row["step"] for row in rows]
    assert [event.value for event in found] == pytest.approx([row["val_accuracy"] for row in rows])
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(run.metrics["test"]["accuracy"])
    assert events.Images("curves")[0].encoded_image_string == (run.path / "curves.png").read_bytes()
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    options = HParamsPluginData.FromString(metadata.content).session_start_info.hparams
    assert options["recipe.batch_size"].number_value == 64
    assert options["model.name"].string_value == "vit_pico_patch2_8"
    assert options["data.num_classes"].number_value == 10


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = create_tracker("tensorboard")
    tracker.start(tmp_path / "run", {"seed": 0})
    for step in (5, 10, 15, 8, 13):
        tracker.log(step, {"val/loss": step / 2})
    tracker.fail()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [5, 8, 13]


def test_a_resumed_run_tells_all_rows_and_repeated_ones_again(tmp_path):
    recorder, listener = Recorder(), Listener()
    listener.note = listener.warnings.append
    trackers = Trackers(recorder, listener)
    trackers.start(tmp_path, {})
    rows = [{"step": step, "train_loss": 1.0} for step in (2, 4, 6)]
    trackers.follow(rows)  # two of them from before the break
    trackers.follow(rows)  # nothing is new
    trackers.follow([*rows[:1], {"step": 3, "train_loss": 0.5}])  # after a return to a checkpoint at step 2
    trackers.finish({}, tmp_path)
    assert [call[1] for call in recorder.calls if call[0] == "log"] == [2, 4, 6, 3]
    assert recorder.calls[-1][:2] == ("finish", 3)
    assert listener.warnings == ["Tracked  as a new run of each tracker; the rows from before the break go into it too"]


def test_mlflow_reads_what_was_written(tracked, monkeypatch):
    from mlflow import MlflowClient

    root, run, *_ = tracked
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(root / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["recipe.batch_size"] == "64"
    assert found.data.metrics["test/accuracy"] == run.metrics["test"]["accuracy"]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(row["step"], row["train_loss"]) for row in rows_of(run)]
    artifacts = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert {"curves.png", "confusion.png"} <= artifacts


def test_wandb_has_written_everything_offline(tracked):
    from wandb.proto.wandb_internal_pb2 import Record

    root, run, *_ = tracked
    (file,) = (root / "wandb").glob("offline-run-*/run-*.wandb")
    data, place, records, pending = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB; checksum, length and kind before each part
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(pending))
            pending = b""
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [row["train_loss"] for row in rows_of(run)]
    options = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert json.loads(options["recipe.batch_size"]) == 64
    summary = {
        (item.key or "/".join(item.nested_key)): item.value_json for record in records for item in record.summary.update
    }
    assert json.loads(summary["test/accuracy"]) == run.metrics["test"]["accuracy"]
    assert len(list(file.parent.glob("files/media/images/curves_*.png"))) == 1


def test_a_run_that_breaks_off_is_marked_so(few_digits, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("vitreous.training.trainer.draw_augmentation", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vitreous.train(few_digits, out=tmp_path / "run", track=recorder, **TINY)
    assert [call[0] for call in recorder.calls] == ["start", "fail"]


def test_a_tracker_that_hangs_is_left_behind(tmp_path, monkeypatch):
    class Hanging(Tracker):
        def start(self, path, config):
            time.sleep(30)

    monkeypatch.setattr("vitreous.training.trackers._FINISH_SECONDS", 0.2)
    listener = Listener()
    trackers = Trackers(Hanging(), listener)
    start = time.monotonic()
    trackers.start(tmp_path, {})
    trackers.follow([{"step": 1, "train_loss": 2.0, "val_loss": None}])
    trackers.finish({}, tmp_path)
    assert time.monotonic() - start < 5
    assert len(listener.warnings) == 1
    assert "Hanging no longer follows this run (not done 0 seconds after training)" in listener.warnings[0]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_names_the_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'vitreous\[{name}\]'"):
        vitreous.train("digits", out=tmp_path / "run", track=name)
    assert not any(tmp_path.iterdir())


def test_an_unknown_tracker_is_named():
    with pytest.raises(UnknownNameError, match=r"tracker='tensorbord'\. Nearest: tensorboard"):
        create_tracker("tensorbord")


def test_options_are_flat():
    config = {"a": {"b": {"c": 1}, "d": None}, "class_names": ["x", "y"], "e": [1, 2], "f": "y" * 600, "g": True}
    flat = flatten(config)
    assert {key: value for key, value in flat.items() if key != "f"} == {
        "a.b.c": 1,
        "num_classes": 2,
        "e": "1, 2",
        "g": True,
    }
    assert len(flat["f"]) == 500
    assert flat["f"].endswith("…")


def test_mlflow_without_a_server_has_a_database_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    tracker = create_tracker("mlflow")
    config = {"data": {"name": "flowers"}, "seed": 3}
    tracker.start(tmp_path / "runs" / "one", config)
    tracker.log(5, {"val/loss": 0.5})
    tracker.fail()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("flowers").experiment_id])
    assert (found.info.run_name, found.info.status) == ("one", "FAILED")
    assert found.data.params == {"data.name": "flowers", "seed": "3"}
    assert found.data.metrics == {"val/loss": 0.5}
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
