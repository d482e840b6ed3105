import csv
import json
import math
import tomllib

import numpy as np
import pytest

import vitreous
from vitreous.data import Dataset, load_dataset
from vitreous.errors import ConfigError, MissingDependencyError, RunError, TrainingError
from vitreous.figures import draw_rate_search, draw_trials
from vitreous.model import VisionTransformer
from vitreous.training import batch_search
from vitreous.training.batch_search import find_batch_size, is_out_of_memory, scale_learning_rate
from vitreous.training.losses import Loss
from vitreous.training.progress import Reporter
from vitreous.training.rate_search import suggest
from vitreous.training.recipe import Recipe, load_header, load_recipe
from vitreous.training.search_space import read_values, search_space, to_changes

pytestmark = pytest.mark.usefixtures("runs_without_pictures")
TINY = {"num_blocks": 1, "projection_dim": 16, "num_heads": 2, "mlp_dim": 16}


class Listener(Reporter):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    warn = note


@pytest.fixture(scope="module")
def few_digits():
    """128 digits to train on, 60 to validate, none to test."""
    splits = load_dataset("digits").splits
    splits = {"train": splits["train"].take(np.arange(128)), "val": splits["val"].take(np.arange(60))}
    return Dataset(name="digits", root=None, class_names=tuple("0123456789"), splits=splits)


# ----- batch


def try_sizes(monkeypatch, rates, *, free=None, is_gpu=False, recipe=None, num_images=100_000):
    """Finds a batch where `rates` says how many images a second a batch brings; one that is not there does not fit."""
    tried = []

    def measure(created, size, num_parts, input_spec, loss, num_targets):
        tried.append(size)
        if size not in rates:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1099511627776 bytes.")
        return batch_search._Trial(size, rates[size], None if free is None else size * 1000)

    monkeypatch.setattr(batch_search, "_measure", measure)
    monkeypatch.setattr(batch_search, "_free_memory", lambda: None)
    monkeypatch.setattr(batch_search, "uses_gpu", lambda _: is_gpu)
    monkeypatch.setattr(batch_search, "get_available_bytes", lambda: free)
    listener = Listener()
    size = find_batch_size(
        lambda: (None, None, None),
        recipe=recipe or Recipe(batch_size=64),
        input_spec=vitreous.InputSpec(),
        loss=None,
        num_targets=None,
        num_images=num_images,
        reporter=listener,
    )
    return size, tried, listener.lines


def test_batch_on_a_gpu_grows_until_memory_is_used_up(monkeypatch):
    size, tried, lines = try_sizes(monkeypatch, {64: 100.0, 128: 90.0, 256: 101.0}, is_gpu=True)
    assert (size, tried) == (256, [64, 128, 256, 512])
    assert lines[0] == "Batch    the largest is looked for, from 64 images on; the recipe has 64"
    assert lines[-2] == "         512: does not fit into memory"
    assert lines[-1].startswith("         256 chosen: 512 does not fit; ")


def test_batch_on_a_cpu_grows_while_that_is_faster(monkeypatch):
    size, tried, lines = try_sizes(monkeypatch, {64: 100.0, 128: 110.0, 256: 113.0})
    assert (size, tried) == (128, [64, 128, 256])
    assert "128 chosen: 256 is no faster (+2.7% an image; 3% is asked); " in lines[-1]


def test_batch_on_a_cpu_leaves_half_of_the_free_memory(monkeypatch):
    size, tried, lines = try_sizes(monkeypatch, {64: 100.0, 128: 200.0, 256: 400.0}, free=400_000)
    assert (size, tried) == (128, [64, 128])
    assert "256 would take more than half of the free memory" in lines[-1]


def test_batch_leaves_an_epoch_its_steps(monkeypatch):
    size, tried, lines = try_sizes(monkeypatch, {64: 100.0, 128: 200.0, 256: 400.0}, num_images=3000)
    assert (size, tried) == (128, [64, 128])
    assert "3,000 training images allow no more (16 steps an epoch)" in lines[-1]


def test_batch_shrinks_where_the_recipes_does_not_fit(monkeypatch):
    recipe = Recipe(batch_size=96, num_parts=3)
    size, tried, _ = try_sizes(monkeypatch, {24: 100.0}, is_gpu=True, recipe=recipe)
    assert (size, tried) == (24, [96, 48, 24])
    with pytest.raises(ConfigError, match=r"Expected 8 images to fit\. Received: out of memory at 8 of 224x224 pixels"):
        try_sizes(monkeypatch, {}, recipe=Recipe(batch_size=16))


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(ValueError("shapes differ"))
    monkeypatch.setattr(batch_search, "_measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch_search._try((None, None, None), 8, 1, vitreous.InputSpec(), None, None)


def test_rate_goes_with_the_root_of_the_batch():
    listener = Listener()
    scaled = scale_learning_rate(Recipe(batch_size=64), 256, listener)
    assert (scaled.batch_size, scaled.optimizer.learning_rate) == (256, 0.002)
    assert listener.lines == ["         learning rate 0.002: 0.001 of the recipe times sqrt(256 / 64)"]
    assert scale_learning_rate(Recipe(batch_size=64), 64, listener).optimizer.learning_rate == 1e-3
    assert len(listener.lines) == 1


def test_training_with_the_batch_that_was_found(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_search, "_LEAST_STEPS", 2)
    monkeypatch.setattr(batch_search, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(batch_search, "_LEAST_GAIN", 0.0)  # any speed will do
    listener = Listener()
    run = vitreous.train(
        few_digits,
        out=tmp_path / "run",
        recipe=Recipe(model="vit_pico_patch2_8", num_channels=1, batch_size=32),
        architecture=TINY,
        batch_size="auto",
        epochs=1,
        reporter=listener,
    )
    assert run.config["recipe"]["batch_size"] == 64
    assert run.config["recipe"]["optimizer"]["learning_rate"] == 0.00141
    assert run.metrics["num_steps"] == 2
    trials = [line for line in listener.lines if "images/s, " in line]
    assert [line.split(":")[0].strip() for line in trials] == ["32", "64"]
    assert all("GiB" in line for line in trials)


@pytest.mark.parametrize(("is_given", "rate"), [(True, 1e-3), (False, 2e-3)])
def test_a_rate_that_was_given_stays(few_digits, monkeypatch, is_given, rate):
    from vitreous.training import trainer

    monkeypatch.setattr(trainer, "find_batch_size", lambda *_, recipe, **__: 4 * recipe.batch_size)
    recipe = Recipe(model="vit_pico_patch2_8", batch_size=32)
    spec = vitreous.get_spec("vit_pico_patch2_8")
    settled = trainer._settle_batch(recipe, spec, few_digits, Loss(10), "float32", Reporter(), is_rate_given=is_given)
    assert (settled.batch_size, settled.optimizer.learning_rate) == (128, rate)
    changes = {"batch_size": "auto", "optimizer": {"learning_rate": 1e-3} if is_given else {"beta_2": 0.9}}
    assert trainer.is_rate_given(changes) == is_given
    assert trainer.take_auto_batch(changes) == (True, {"optimizer": changes["optimizer"]})


# ----- learning rate


def test_suggestion_lies_between_the_two_readings():
    rates = np.geomspace(1e-5, 1, 101).tolist()  # a valley: steepest at 1e-3, lowest at 1e-2
    logs = np.log10(rates)
    smoothed = np.where(logs < -2, 2 - np.tanh(2 * (logs + 3)), 2 - np.tanh(2) + logs + 2).tolist()
    suggestion, tenth, steepest = suggest(rates, smoothed)
    assert tenth == pytest.approx(1e-3, rel=0.06)
    assert steepest == pytest.approx(1e-3, rel=0.06)
    assert suggestion == pytest.approx(math.sqrt(tenth * steepest), rel=0.05)
    with pytest.raises(TrainingError, match=r"Expected a loss that falls before it grows"):
        suggest(rates, sorted(smoothed))


def test_search_for_a_learning_rate(few_digits, tmp_path):
    recipe = load_recipe("digits")
    options = {"num_steps": 30, "highest_rate": 10.0, "batch_size": 32, "architecture": TINY}
    found = vitreous.find_learning_rate(few_digits, out=tmp_path / "rates.png", lowest_rate=1e-4, **options)
    assert json.loads((tmp_path / "rates.json").read_text())["suggestion"] == found.suggestion
    assert (tmp_path / "rates.png").stat().st_size > 5000
    assert len(found.rates) == len(found.losses) == len(found.smoothed) <= 30
    assert found.has_diverged  # at a rate of 10, if not before
    assert min(found.tenth, found.steepest) <= found.suggestion <= max(found.tenth, found.steepest)
    assert found.rates[0] < found.suggestion < 1
    assert (found.recipe_name, found.recipe_rate, found.batch_size) == ("digits", recipe.optimizer.learning_rate, 32)


def test_search_for_a_learning_rate_from_weights(few_digits, tmp_path):
    """With Muon, and with updates of low rank; the seed decides all."""
    vit = vitreous.get_spec("vit_pico_patch2_8", num_channels=1, num_classes=10, **TINY)
    VisionTransformer(vit.config, name=vit.name).save(tmp_path / "start.keras")
    options = {"pretrained": tmp_path / "start.keras", "num_steps": 20, "lowest_rate": 1e-3, "batch_size": 32}
    low_rank = {"trained": "lora", "lora_rank": 2}
    muon, first, again = (
        vitreous.find_learning_rate(few_digits, optimizer=optimizer, **options)
        for optimizer in ({"name": "muon"}, low_rank, low_rank)
    )
    assert first.losses == again.losses != muon.losses
    for found in (muon, first):
        assert found.recipe_name == "finetune" and 1e-4 < found.suggestion < 1
    del options["pretrained"]
    with pytest.raises(ConfigError, match=r"Expected weights to start from: .* Received: trained='lora', pretrained=N"):
        vitreous.find_learning_rate(few_digits, optimizer={"trained": "lora"}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest_rate": 1.0, "highest_rate": 0.1}, r"Expected 0 < lowest_rate < highest_rate <= 10\."),
        ({"num_steps": 5}, r"Expected at least 20 steps\. Received: num_steps=5\."),
        ({"batch_size": "auto"}, r"Received: batch_size='auto'\. Pass the number"),
    ],
)
def test_search_for_a_learning_rate_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        vitreous.find_learning_rate("digits", **options)


# ----- tuning


@pytest.fixture(scope="module")
def tuning(few_digits, tmp_path_factory):
    listener = Listener()
    found = vitreous.tune(
        few_digits,
        out=tmp_path_factory.mktemp("tuned") / "a",
        num_trials=3,
        reporter=listener,
        epochs=1,
        batch_size=32,
        architecture=TINY,
        optimizer={"label_smoothing": 0.05},
    )
    return found, listener.lines


def test_tuning_leaves_a_recipe_a_table_and_a_picture(tuning):
    found, lines = tuning
    assert {path.name for path in found.path.iterdir()} == {
        "best.toml",
        "journal.log",
        "trials.csv",
        "trials.png",
        "tuning.json",
    }
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert {trial.state for trial in found.trials} == {"complete"}
    assert found.best.score == max(trial.score for trial in found.trials)
    rows = list(csv.DictReader((found.path / "trials.csv").open()))
    assert [float(row["val_accuracy"]) for row in rows] == [trial.score for trial in found.trials]
    base = load_recipe("digits")
    assert float(rows[0]["optimizer.learning_rate"]) == base.optimizer.learning_rate
    assert "optimizer.label_smoothing" not in rows[0]  # given, so not searched
    assert load_recipe(found.path / "best.toml") == found.recipe
    assert found.recipe.optimizer.label_smoothing == 0.05
    assert (found.recipe.epochs, found.recipe.batch_size) == (
        base.epochs,
        32,
    )  # the trials' epochs are not the recipe's
    header = load_header(found.path / "best.toml")
    assert header.accuracy.startswith(f"{found.best.score:.2%} (accuracy on 60 validation images that chose it")
    assert f"trial {found.best.number} of 3 (0 given up early) of 1 epochs each, seed 0" in header.source
    assert "Trial 0  val accuracy" in next(line for line in lines if line.startswith("Trial"))
    assert lines.count("         the recipe as it is") == 1
    first, second = found.trials[:2]
    assert first.params["optimizer.learning_rate"] == base.optimizer.learning_rate
    assert 0.1 <= second.params["optimizer.learning_rate"] / base.optimizer.learning_rate <= 10
    assert first.params != second.params


def test_tuning_goes_on_and_refuses_another(tuning, few_digits):
    found, _ = tuning
    options = {"epochs": 1, "batch_size": 32, "architecture": TINY, "optimizer": {"label_smoothing": 0.05}}
    again = vitreous.tune(few_digits, out=found.path, num_trials=3, **options)
    assert again.trials == found.trials
    with pytest.raises(ConfigError, match=r"Received: another seed, trial\. Pass another --out"):
        vitreous.tune(few_digits, out=found.path, num_trials=4, seed=1, **{**options, "epochs": 2})


def test_a_trial_that_was_cut_short_is_tried_again(few_digits, tmp_path, monkeypatch):
    import vitreous.training.tuning as module

    seen, found_every = [], load_recipe("digits").checkpoint_every

    def killed(dataset, *, recipe, resume, **_):
        assert (resume, recipe.checkpoint_every) == ("never", "none")
        seen.append(recipe.merge({"checkpoint_every": found_every}))
        raise KeyboardInterrupt

    options = {"out": tmp_path / "t", "num_trials": 1, "epochs": 1, "batch_size": 32, "architecture": TINY}
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            vitreous.tune(few_digits, **options)

    def finished(dataset, *, recipe, **_):
        seen.append(recipe.merge({"checkpoint_every": found_every}))
        return type("Run", (), {"metrics": {"is_interrupted": False, "val": {"accuracy": 0.5}}})

    monkeypatch.setattr(module, "train", finished)
    found = vitreous.tune(few_digits, **options)
    assert [trial.number for trial in found.trials] == [1]
    assert seen[0] == seen[1] == found.recipe.merge({"epochs": 1})
    assert found.trials[0].score == 0.5


def test_bad_trials_are_given_up_and_time_ends_it(few_digits, tmp_path, monkeypatch):
    """A stand-in for training: each trial is worse than the one before, from its first evaluation on."""
    import vitreous.training.tuning as module

    calls = []

    def fake_train(dataset, *, reporter, recipe, **_):
        calls.append(recipe)
        if len(calls) == 2:
            raise TrainingError("Cannot go on training. Expected a finite loss.")
        if len(calls) == 9:
            clock.seconds_passed = 100.0
            reporter.step(module.Status(progress=0.5, epoch=1, loss=1, accuracy=1, images_per_second=1, seconds_left=1))
        for epoch in range(1, 21):
            reporter.row({"epoch": epoch, "seconds": 1.0 * epoch, "val_accuracy": 0.9 - 0.05 * len(calls)})
        return type("Run", (), {"metrics": {"is_interrupted": False, "val": {"accuracy": 0.9 - 0.05 * len(calls)}}})

    class Clock:
        seconds_passed = 0.0

        @property
        def left(self):
            return 60 - self.seconds_passed

    clock = Clock()
    monkeypatch.setattr(module, "train", fake_train)
    monkeypatch.setattr(module, "_Clock", lambda _: clock)
    monkeypatch.setattr(module, "draw_trials", lambda *_, **__: None)
    listener = Listener()
    found = vitreous.tune(few_digits, out=tmp_path / "t", time="60s", epochs=20, reporter=listener)  # 60 of its clock
    states = [trial.state for trial in found.trials]
    assert states[:2] == ["complete", "failed"]
    assert "pruned" in states[4:]
    assert all(state == "complete" for state in states[2:4])
    assert found.best.number == 0
    assert found.recipe == load_recipe("digits")
    assert any("Expected a finite loss" in line for line in listener.lines)
    assert len(calls) == 9
    assert len(found.trials) == 8  # the ninth was cut short
    assert any(line.endswith("cut short: the time is up. A later session begins with it.") for line in listener.lines)


def test_space_holds_the_recipe_and_leaves_out_what_is_given():
    base = Recipe().merge({"optimizer": {"weight_decay": 0.0}, "augment": {"mixup_alpha": 2.0}})
    space = {each.key: each for each in search_space(base, {"optimizer": {"name": "adamw"}})}
    assert "optimizer.name" not in space
    assert (space["optimizer.weight_decay"].low, space["optimizer.weight_decay"].is_log) == (0.0, False)
    assert space["augment.mixup_alpha"].high == 2.0
    assert (space["optimizer.learning_rate"].low, space["optimizer.learning_rate"].high) == (1e-4, 1e-2)
    assert "augment.shift_pixels" not in space
    shifting = Recipe().merge({"augment": {"crop_scale": (1.0, 1.0), "shift_pixels": 4}})
    keys = {each.key: each for each in search_space(shifting)}
    assert (keys["augment.shift_pixels"].high, "augment.crop_scale" in keys) == (8, False)
    asymmetric = Recipe().merge({"loss": "asymmetric"})
    keys = {each.key for each in search_space(asymmetric)}
    assert "optimizer.label_smoothing" not in keys  # it would be refused beside this loss
    for recipe in (base, shifting, asymmetric):
        everything = search_space(recipe)
        assert recipe.merge(to_changes(read_values(recipe, everything))).augment == recipe.augment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Expected a time or a number of trials\. Received: time=None, num_trials=None\."),
        ({"num_trials": 2}, r"Expected a length of each trial\."),
        ({"num_trials": 2, "epochs": 1, "trial_time": "9s"}, r"Expected epochs or trial_time\."),
        ({"time": "10s", "trial_time": "1m"}, r"Expected a trial that is no longer than the whole\."),
        (
            {"time": "10s", "val_fraction": 0.0},
            r"Cannot tune without validation images\..* Received: splits train, test",
        ),
        ({"time": "10s", "batch_size": "auto"}, r"Received: batch_size='auto'"),
    ],
)
def test_tuning_refuses(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        vitreous.tune("digits", out=tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_tuning_keeps_its_hands_off_other_folders(tmp_path, monkeypatch):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"Expected a new folder, or one of an earlier tuning\. Received: other files"):
        vitreous.tune("digits", out=tmp_path, time="10s")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vitreous\[tune\]'"):
        vitreous.tune("digits", out=tmp_path / "t", time="10s")


def test_figures_of_searches_refuse_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected one with a score\. Received: 1 without"):
        draw_trials([{"number": 0, "state": "failed", "score": None, "params": {}}], tmp_path / "a.png")
    empty = {"rates": [], "losses": [], "smoothed": []}
    with pytest.raises(ConfigError, match=r"Expected at least one step\. Received: none"):
        draw_rate_search(empty, tmp_path / "a.png")


def test_best_recipe_is_toml_that_train_reads(tuning, tmp_path):
    found, _ = tuning
    values = tomllib.loads((found.path / "best.toml").read_text())
    assert values["architecture"]["num_blocks"] == 1
    assert "time" not in values
