"""Runs that are killed end as if they had not been."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from run_folder import write_noise

import vitreous
from vitreous.data import Batch, Dataset, ImageSet
from vitreous.errors import ConfigError, DataError, MissingPathError, RunError, RunExistsError, TrainingError
from vitreous.spec import InputSpec
from vitreous.training import fit as fit_module
from vitreous.training import resume as resume_module
from vitreous.training.distillation import DistillationLoss, Teacher
from vitreous.training.distribute import Layout
from vitreous.training.fit import Interrupt
from vitreous.training.planning import free_path
from vitreous.training.progress import LineReporter, Reporter
from vitreous.training.recipe import MaskedConfig, OptimizerConfig
from vitreous.training.run import RunWriter
from vitreous.training.trackers import Tracker

pytestmark = pytest.mark.usefixtures("runs_without_pictures")
OPTIONS = {
    "model": "vit_pico_patch2_8",
    "image_size": (8, 8),
    "batch_size": 8,
    "epochs": 5,
    "architecture": {"num_blocks": 1, "projection_dim": 32, "mlp_dim": 64, "stochastic_depth_rate": 0.2},
    "checkpoint_every": "2 steps",
    "small_fraction": 0.0,
}
WORDS = """--model vit_pico_patch2_8 --image-size 8 --batch-size 8 --epochs 5 --checkpoint-every "2 steps"
--architecture.num-blocks 1 --architecture.projection-dim 32 --architecture.mlp-dim 64
--architecture.stochastic-depth-rate 0.2 --small-fraction 0"""


class Said(LineReporter):
    """Keeps what is said; ends the process's training as a crash would, or by a signal, after some rows."""

    def __init__(self, crash_at=None, number=None):
        super().__init__()
        self.lines, self.rows, self.crash_at, self.number = [], 0, crash_at, number

    def note(self, text):
        self.lines.append(text)

    warn = note

    def row(self, row):
        self.rows += 1
        if self.rows == self.crash_at:
            if self.number is None:
                raise RuntimeError("crash")
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), 30)


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    return vitreous.train(folder, out=tmp_path_factory.mktemp("runs") / "unbroken", **OPTIONS)


def assert_same(run, other):
    for a, b in zip(run.load_model().get_weights(), other.load_model().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    tables = []
    for each in (run, other):
        with (each.path / "history.csv").open() as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows])
    assert tables[0] == tables[1] and tables[0]
    metrics = [{k: v for k, v in each.metrics.items() if k != "train_seconds"} for each in (run, other)]
    assert metrics[0] == metrics[1]
    assert {path.name for path in run.path.iterdir()} == {path.name for path in other.path.iterdir()}


def crash(folder, out, **options):
    with pytest.raises(RuntimeError, match="crash"):
        vitreous.train(folder, out=out, reporter=Said(crash_at=3), **{**OPTIONS, **options})


def test_smaller_images_at_first(folder, tmp_path, monkeypatch):
    """The first 0.6 of training at 6x6 pixels, bit-equal after a break; the model keeps its own size."""
    made, resize = [], fit_module.resize_batch

    def watched(*args):
        made.append(resize(*args))
        return made[-1]

    monkeypatch.setattr(fit_module, "resize_batch", watched)
    options, reporter = {"small_fraction": 0.6}, Said()
    run = vitreous.train(folder, out=tmp_path / "run", reporter=reporter, **{**OPTIONS, **options})
    num_steps = run.metrics["num_steps"]
    assert {images.shape for images in made} == {(8, 6, 6, 3)} and len(made) == math.ceil(0.6 * num_steps)
    assert "         6x6 pixels in the first 60% of training" in reporter.lines
    assert run.config["model"]["image_size"] == [8, 8] and not run.config["model"]["has_dynamic_size"]
    assert run.load_model()(np.zeros((1, 8, 8, 3), "float32")).shape == (1, 2)
    crash(folder, tmp_path / "again", **options)
    assert_same(run, vitreous.train(folder, out=tmp_path / "again", **{**OPTIONS, **options}))


class FakeStep:
    """Counts images by size; the first step on whole ones takes long, as a compilation does."""

    def __init__(self, seconds=0.0, compile_seconds=0.0):
        self.sizes, self.seconds, self.compile_seconds = [], seconds, compile_seconds

    def __call__(self, batch, **_):
        size = batch.images.shape[1]
        time.sleep(self.compile_seconds if size == 8 and 8 not in self.sizes else self.seconds)
        self.sizes.append(size)
        return 0.5, 1.0

    def synchronize(self):
        pass

    finish = get_average = synchronize


class FakeStream:
    """Epochs of four batches."""

    def __init__(self):
        self.count = 0

    def __next__(self):
        self.count += 1
        return Batch(*(np.zeros(shape, "uint8") for shape in ((2, 8, 8, 3), 2, 2, 2)))

    def state(self):
        return {"epoch": max(self.count - 1, 0) // 4, "batch": (self.count - 1) % 4 + 1}

    def close(self):
        pass


def loop_with_small_images(step, evaluate, **options):
    train = SimpleNamespace(stream=FakeStream, num_batches=4, broken={}, num_replaced=0)
    nothing = dict.fromkeys(("on_row", "checkpoints", "budget_seconds"))
    return fit_module._Loop(
        step,
        train,
        config=OptimizerConfig(),
        evaluate=evaluate,
        patience_epochs=1,
        has_answers=True,
        interrupt=Interrupt(),
        on_nan="stop",
        layout=Layout(),
        small_spec=InputSpec(image_size=6),
        small_fraction=0.5,
        **{**nothing, "total_steps": 40, "reporter": Reporter(), **options},
    )


def test_early_stopping_waits_for_whole_images():
    scores = iter(range(100, 0, -1))  # worse from epoch to epoch
    step = FakeStep()
    history = loop_with_small_images(step, lambda: fit_module.Evaluation((next(scores),), {})).run()
    assert step.sizes == [6] * 20 + [8] * 8
    assert (history.best_row, len(history.rows), history.is_stopped) == (5, 7, True)


def test_a_run_that_ends_on_small_images_says_so():
    said, step = Said(), FakeStep()
    loop = loop_with_small_images(step, None, reporter=said)
    loop.on_row = lambda rows: setattr(loop.interrupt, "is_set", len(rows) == 2)
    assert loop.run().is_interrupted and step.sizes == [6] * 8
    assert any("ended while images were still small (6x6 pixels)" in line for line in said.lines)


def test_the_compilation_of_whole_images_is_no_training_time():
    step = FakeStep(seconds=0.01, compile_seconds=0.6)
    loop = loop_with_small_images(step, None, budget_seconds=1.6, total_steps=0)
    loop.run()
    assert loop.state.schedule_start > 0.6
    assert step.sizes.count(6) >= 10 and step.sizes.count(8) >= 10


def test_runs_older_than_an_option_go_on(unbroken, tmp_path):
    recipe = {name: value for name, value in unbroken.config["recipe"].items() if not name.startswith("small_")}
    older, said = {**unbroken.config, "recipe": recipe}, Said()
    resume_module._check_same(tmp_path, older, unbroken.config, said)
    assert said.lines == []
    newer = {**unbroken.config, "recipe": {**unbroken.config["recipe"], "small_fraction": 0.5}}
    with pytest.raises(ConfigError, match=r"it began with: small_fraction=0\.0\. Received: small_fraction=0\.5\."):
        resume_module._check_same(tmp_path, older, newer, said)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_twice_and_terminated(folder, unbroken, tmp_path):
    """SIGKILL inside a save, SIGKILL between saves, SIGTERM, and a run that ends as the one without a break."""
    out, partial = tmp_path / "run", tmp_path / ".run.partial"
    words = WORDS.replace('"2 steps"', "2steps").split()
    command = [sys.executable, "-m", "vitreous", "train", str(folder), "--out", str(out), *words]

    def newest():
        return max([int(path.name) for path in (partial / "checkpoints").glob("[0-9]*")], default=0)

    def start(condition):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watch = time.monotonic()
        while process.poll() is None and not condition() and time.monotonic() - watch < 120:
            time.sleep(0.0002)
        return process

    def stop(process, number):
        process.send_signal(number)
        return process.communicate()[0]

    process = start(lambda: newest() >= 1 and list((partial / "checkpoints").glob(".*.tmp")))
    stop(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    reached = newest()
    assert reached >= 1
    process = start(lambda: newest() > reached)
    assert "Resumed  at step" in stop(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    said = Said()
    assert_same(vitreous.resume(out, reporter=said), unbroken)
    assert any(line.startswith("Resumed  at step") for line in said.lines)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sigterm_saves_and_ends_with_143(folder, unbroken, tmp_path):
    """It comes with the second row; between two checkpoints, since there are no others."""
    said = Said(crash_at=2, number=signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        vitreous.train(folder, out=tmp_path / "run", reporter=said, **{**OPTIONS, "checkpoint_every": "none"})
    assert stop.value.code == 143
    assert "Stopped  by SIGTERM after step 12" in said.lines
    assert said.lines[-1] == f"The run was not finished; continue it with --resume {tmp_path / 'run'}."
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same(vitreous.train(folder, out=tmp_path / "run", **OPTIONS), unbroken)


def test_sigterm_while_validating_is_no_wait(folder, unbroken, tmp_path, monkeypatch):
    def evaluate(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("SIGTERM did not end the evaluation")

    with monkeypatch.context() as patch:
        patch.setattr("vitreous.training.distribute.Layout.collect", evaluate)
        with pytest.raises(SystemExit):
            vitreous.train(folder, out=tmp_path / "run", **OPTIONS)
    said = Said()
    assert_same(vitreous.resume(tmp_path / "run", reporter=said), unbroken)
    assert any("Resumed  at step 6, epoch 1," in line for line in said.lines)


def test_the_command_line_resumes(folder, unbroken, tmp_path, call, monkeypatch):
    out = tmp_path / "run"
    crash(folder, out)
    monkeypatch.chdir(tmp_path)
    code, _, error = call("train", "--resume", "run", "--optimizer.learning-rate", "0.5")
    assert code == 2
    assert "Expected the options that it began with: optimizer.learning_rate=" in error
    assert "Received: optimizer.learning_rate=0.5. Give the same ones, or start anew with --no-resume" in error
    code, _, error = call("train", "--resume", "run", "--out", "other")
    assert code == 2 and "Expected no --out beside --resume" in error
    code, _, error = call("pretrain", "--resume", "run")
    assert code == 2 and "Resume it with: vitreous train --resume run" in error
    code, output, _ = call("train", "--resume", "run", "--checkpoint-every", "1h", "--no-report")
    assert code == 0 and "Resumed  at step" in output
    assert_same(vitreous.load_run(out), unbroken)
    code, _, error = call("train", "--resume", "run")
    assert code == 2 and "Received: a finished one. There is nothing left to do." in error
    code, _, error = call("train", "--resume", "nowhere")
    assert code == 2 and "Expected an unfinished run. Received: nothing at" in error
    code, _, error = call("train")
    assert code == 2 and "Name it, or continue an unfinished run: --resume RUN." in error


def test_other_options_and_other_data(folder, tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, root)
    crash(root, out)
    said = Said()
    with pytest.raises(ConfigError, match=r"it began with: epochs=5, batch_size=8\. Received: epochs=2, batch"):
        vitreous.train(root, out=out, reporter=said, **{**OPTIONS, "batch_size": 4, "epochs": 2})
    assert said.lines[-1].endswith(f"continue it with --resume {out}.")
    with pytest.raises(ConfigError, match=r"Expected the options that it began with: seed=0"):
        vitreous.train(root, out=out, seed=1, **OPTIONS)
    shutil.copy(root / "a" / "0.png", root / "a" / "new.png")
    with pytest.raises(DataError, match=r"Expected the data that it began with, fingerprint=\w{12}\. Received: finger"):
        vitreous.train(root, out=out, **OPTIONS)
    with pytest.raises(DataError, match=r"Restore them, or start anew with --no-resume"):
        vitreous.resume(out)
    said = Said()
    run = vitreous.train(root, out=out, overwrite=True, reporter=said, **{**OPTIONS, "epochs": 1})
    assert run.config["recipe"]["epochs"] == 1
    assert any("It may be overwritten: the unfinished run is removed" in line for line in said.lines)
    assert not any(line.startswith("Resumed") for line in said.lines)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run"}


def test_begun_anew(folder, tmp_path):
    crash(folder, tmp_path / "run")
    said = Said()
    run = vitreous.train(folder, out=tmp_path / "run", resume="never", reporter=said, **{**OPTIONS, "epochs": 1})
    assert run.metrics["num_steps"] == 6 and not any(line.startswith("Resumed") for line in said.lines)
    with pytest.raises(RunExistsError, match=r"where a run lies"):
        vitreous.train(folder, out=tmp_path / "run", **OPTIONS)


def test_damaged_checkpoints(folder, unbroken, tmp_path):
    out = tmp_path / "run"
    crash(folder, out)
    places = sorted((tmp_path / ".run.partial" / "checkpoints").iterdir())
    os.truncate(places[-1] / "arrays.safetensors", 99)
    said = Said()
    run = vitreous.train(folder, out=out, reporter=said, **OPTIONS)
    assert sum("arrays.safetensors of 99 bytes" in line for line in said.lines) == 1
    assert any(line.endswith(f"from {places[-2]}") for line in said.lines)
    assert_same(run, unbroken)
    crash(folder, tmp_path / "other")
    for path in (tmp_path / ".other.partial" / "checkpoints").iterdir():
        (path / "checkpoint.json").write_text("{}")
    with pytest.raises(RunError, match=r"Expected a whole checkpoint in .* all damaged\. Start anew with --no-resume"):
        vitreous.train(folder, out=tmp_path / "other", **OPTIONS)


def test_a_run_that_cannot_be_written_keeps_its_checkpoint(folder, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr("vitreous.training.trainer._save_model", fail)
        message = rf"Received: No space left on device\. Make room, then continue it with --resume {out}\."
        with pytest.raises(RunError, match=message):
            vitreous.train(folder, out=out, **OPTIONS)
        patch.undo()
        patch.setattr("vitreous.training.run.write_text", fail)  # not even what the run is can be written
        with pytest.raises(RunError, match=message):
            vitreous.train(folder, out=out, **OPTIONS)
    assert not out.exists()
    said = Said()
    assert_same(vitreous.resume(out, reporter=said), unbroken)
    assert any("Resumed  at step 30, epoch 5" in line for line in said.lines)  # only what was missing is done again
    assert said.rows == 0


def test_a_history_that_cannot_be_written_ends_nothing(folder, unbroken, tmp_path, monkeypatch):
    real, said = RunWriter.write_history, Said()

    def fail(self, rows):
        if len(rows) < 5:
            raise OSError(28, "No space left on device")
        real(self, rows)

    monkeypatch.setattr(RunWriter, "write_history", fail)
    assert_same(vitreous.train(folder, out=tmp_path / "run", reporter=said, **OPTIONS), unbroken)
    assert sum("Cannot write the history in" in line for line in said.lines) == 1


def test_unreadable_images_are_counted_once(folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    for name in ("a/3.png", "b/4.png", "b/5.png"):
        path = root / name
        path.write_bytes(path.read_bytes()[:-40])
    runs = []
    for crashes in (False, True):
        out = tmp_path / f"run-{crashes}"
        if crashes:
            crash(root, out)
        runs.append(vitreous.train(root, out=out, **OPTIONS))
    assert runs[0].metrics["num_replaced"] > 0
    assert_same(*runs)


def test_a_time_budget_goes_on_with_what_is_left(folder, tmp_path):
    crash(folder, tmp_path / "run", epochs=None, time="60s")
    run = vitreous.resume(tmp_path / "run", reporter=Said(crash_at=2, number=signal.SIGINT))
    assert run.metrics["is_interrupted"]
    rows = list(csv.DictReader((run.path / "history.csv").open()))
    seconds = [float(row["seconds"]) for row in rows]
    assert len(rows) >= 4 and seconds == sorted(seconds) and seconds[-1] <= run.metrics["train_seconds"] < 60


def test_early_stopping_and_the_best_so_far(folder, tmp_path):
    options = {**OPTIONS, "epochs": 40, "patience_epochs": 2}
    runs = [vitreous.train(folder, out=tmp_path / "whole", **options)]
    crash(folder, tmp_path / "killed", epochs=40, patience_epochs=2)
    runs.append(vitreous.train(folder, out=tmp_path / "killed", **options))
    assert runs[0].metrics["num_steps"] < 240
    assert_same(*runs)


def test_pretraining_resumes(folder, tmp_path):
    options = {**OPTIONS, "masked": MaskedConfig(decoder_dim=64, num_decoder_blocks=1), "epochs": 3}
    options["architecture"] = {"num_blocks": 1, "projection_dim": 32, "mlp_dim": 64}
    del options["small_fraction"]
    whole = vitreous.pretrain(folder, out=tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="crash"):
        vitreous.pretrain(folder, out=tmp_path / "killed", reporter=Said(crash_at=2), **options)
    assert_same(vitreous.resume(tmp_path / "killed"), whole)


def test_data_from_python_must_be_given_again(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 8, 8, 3), "uint8")
    images = ImageSet([f"{i}" for i in range(40)], rng.integers(0, 2, 40), arrays=pixels)
    splits = {"train": images.take(range(32)), "val": images.take(range(32, 40))}
    dataset = Dataset(name="noise", root=None, class_names=("a", "b"), splits=splits)
    crash(dataset, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"Expected the data, which came from Python\. Received: data=None\."):
        vitreous.resume(tmp_path / "run")
    assert vitreous.resume(tmp_path / "run", data=dataset).metrics["num_steps"] == 20


class Recorder(Tracker):
    """Keeps the steps that it was told."""

    def __init__(self):
        self.steps, self.last = [], None

    def log(self, step, values):
        self.steps.append(step)

    def finish(self, step, metrics, pictures):
        self.last = step


def test_a_student_with_low_rank_updates_resumes_from_anywhere(folder, unbroken, tmp_path, monkeypatch):
    """What the call names by a relative path, from another folder; a batch that was found; trackers hear all rows."""
    chosen = []
    monkeypatch.setattr("vitreous.training.trainer.find_batch_size", lambda *_, loss, **__: chosen.append(loss) or 8)
    for name, target in (("data", folder), ("start", unbroken.path)):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "elsewhere").mkdir()
    options = {"batch_size": "auto", "epochs": 3, "checkpoint_every": "2 steps", "recipe": "few32", "cache": "none"}
    options |= {"optimizer": {"trained": "lora", "lora_rank": 2, "head_first_fraction": 0.3}}
    options |= {"pretrained": "start", "teacher": "start", "distillation": {"temperature": 3.0}}
    monkeypatch.chdir(tmp_path)
    whole = vitreous.train("data", out="whole", **options)
    with pytest.raises(RuntimeError, match="crash"):
        vitreous.train("data", out="killed", reporter=Said(crash_at=2), **options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "fingerprint", "0" * 64)
        with pytest.raises(
            ConfigError,
            match=r"Expected the teacher that it began with, teacher_fingerprint=\w{12}\. Received: "
            r"teacher_fingerprint=000000000000: other weights lie at .*\. Restore them, or start anew with --no-resume",
        ):
            vitreous.resume("../killed")
    recorder, said = Recorder(), Said()
    run = vitreous.resume("../killed", track=recorder, reporter=said)
    assert_same(run, whole)
    assert len(chosen) == 2 and all(isinstance(loss, DistillationLoss) for loss in chosen)  # with the teacher's memory
    assert recorder.steps == [6, 12, 18] and recorder.last == 18
    assert sum(line.startswith("Tracked  as a new run of each tracker") for line in said.lines) == 1
    assert sum(line.startswith("Resumed") for line in said.lines) == 1


def test_unfinished_runs_are_named_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = RunWriter("runs/photos-1")
    said = Said()
    assert free_path("photos", said) == Path("runs/photos-2")
    assert said.lines == ["Note     runs/photos-1 is not finished; continue it with --resume runs/photos-1"]
    writer.discard()
    assert free_path("photos", Reporter()) == Path("runs/photos-1")
    with pytest.raises(MissingPathError, match=r"Expected an unfinished run\. Received: nothing at"):
        vitreous.resume("runs/photos-1")


class Diverging:
    """A step whose loss is no number at one step, so many times."""

    def __init__(self, step, at, times):
        self.step, self.at, self.times = step, at, times
        self.rates, self.count = [], 0

    def __getattr__(self, name):
        return getattr(self.step, name)

    def restore(self, arrays):
        self.step.restore(arrays)

    def __call__(self, batch, *, learning_rate, **rates):
        loss, correct = self.step(batch, learning_rate=learning_rate, **rates)
        self.rates.append(learning_rate)
        if int(np.asarray(self.step.snapshot()["slots/0000/step"])) == self.at and self.count < self.times:
            self.count += 1
            return loss * float("nan"), correct
        return loss, correct


def diverge(monkeypatch, at, times):
    made = []
    real = fit_module.create_step

    def create(*args, **kwargs):
        made.append(Diverging(real(*args, **kwargs), at, times))
        return made[-1]

    monkeypatch.setattr(fit_module, "create_step", create)
    return made


def test_on_nan_back(folder, tmp_path, monkeypatch):
    made, said = diverge(monkeypatch, at=9, times=2), Said()
    recorder = Recorder()
    run = vitreous.train(folder, out=tmp_path / "run", on_nan="back", reporter=said, track=recorder, **OPTIONS)
    assert recorder.steps == [6, 12, 18, 24, 30] and recorder.last == 30
    assert not any(line.startswith("Tracked") for line in said.lines)
    recoveries = run.metrics["recoveries"]
    assert [each["learning_rate_factor"] for each in recoveries] == [0.5, 0.25]
    assert all(6 <= each["back_to"] < 9 <= each["step"] <= 12 for each in recoveries)
    told = [line for line in said.lines if line.startswith("The loss was no longer finite at or shortly before step")]
    assert "with 0.5 of the learning rate (1 of at most 3 times)" in told[0] and len(told) == 2
    rows = list(csv.DictReader((run.path / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == [6, 12, 18, 24, 30]
    assert made[0].rates[-1] == pytest.approx(float(rows[-1]["learning_rate"]))
    assert json.loads((run.path / "metrics.json").read_text())["num_steps"] == 30


def test_on_nan_gives_up_and_stops(folder, tmp_path, monkeypatch):
    made = diverge(monkeypatch, at=4, times=9)
    said = Said()
    with pytest.raises(TrainingError, match=r"Received: loss=nan at or shortly before step \d+\. Lower the"):
        vitreous.train(folder, out=tmp_path / "run", on_nan="back", reporter=said, **OPTIONS)
    assert made[0].count == 4
    assert sum("no longer finite" in line for line in said.lines) == 3
    with pytest.raises(TrainingError, match=r"or let training go back by itself with --on-nan back"):
        vitreous.train(folder, out=tmp_path / "run", resume="never", **OPTIONS)


def test_ctrl_c_saves_once_without_the_row_that_it_adds(monkeypatch):
    """If measuring is cut short as well, what is resumed knows of no break."""
    interrupt, saved = Interrupt(), []
    loop = fit_module._Loop(
        SimpleNamespace(),
        SimpleNamespace(stream=lambda: None),
        config=None,
        evaluate=None,
        total_steps=100,
        budget_seconds=None,
        patience_epochs=None,
        has_answers=True,
        reporter=Reporter(),
        interrupt=interrupt,
        on_row=None,
        checkpoints=None,
        on_nan="stop",
        layout=Layout(),
    )

    def add_row():
        loop.state.rows.append({})
        loop.state.row_steps = 0

    monkeypatch.setattr(loop, "add_row", add_row)
    monkeypatch.setattr(loop, "save", lambda **_: saved.append(len(loop.state.rows)))
    loop.state.num_steps = loop.state.row_steps = 3
    interrupt.is_set = True
    while loop.advance():
        pass
    assert saved == [0] and len(loop.state.rows) == 1 and loop.is_interrupted


def test_a_second_sigterm_changes_nothing():
    with Interrupt() as interrupt:
        interrupt.is_busy = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.is_terminated and not interrupt.is_set
        interrupt.is_busy = False
        signal.raise_signal(signal.SIGTERM)  # it has been heard
