import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.data import Dataset, ImageSet, load_dataset
from vitreous.errors import (
    ConfigError,
    DataError,
    ImageError,
    MissingPathError,
    RunError,
    RunExistsError,
    TrainingError,
    UnknownNameError,
)
from vitreous.evaluation import compute_metrics, get_headline, summarize_metrics
from vitreous.figures import draw_curves
from vitreous.registry import get_spec
from vitreous.training.progress import LineReporter, format_seconds
from vitreous.training.recipe import Recipe, choose_recipe, list_recipes, load_recipe, parse_seconds
from vitreous.training.run import RunWriter, load_model, load_run
from vitreous.training.schedules import average_decay, learning_rate

FILES = {
    "model.keras",
    "config.toml",
    "history.csv",
    "history.jsonl",
    "metrics.json",
    "curves.png",
    "confusion.png",
    "predictions.png",
    "reliability.png",
    "patches.png",
    "augmented.png",
    "README.md",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12 plain-coloured 16-pixel images, without splits."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 60, (16, 16, 3)).astype("uint8")
            pixels[:, :, k] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


ONE_BLOCK = {"num_blocks": 1, "projection_dim": 48, "mlp_dim": 96}
SMALL = {"model": "vit_pico_patch4_32", "image_size": (16, 16), "batch_size": 8, "architecture": ONE_BLOCK}


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out what takes most of the time of a tiny run."""
    for name in ("trainer.draw_augmentation", "trainer.draw_run", "results._draw_answers", "results.draw_reliability"):
        monkeypatch.setattr(f"vitreous.training.{name}", lambda *_, **__: None)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return vitreous.train(folder, out=tmp_path_factory.mktemp("runs") / "first", epochs=6, **SMALL)


def test_run_folder_explains_itself(run, folder):
    assert {path.name for path in run.path.iterdir()} - {"best.keras"} == FILES  # there if the last were not the best
    config = tomllib.loads((run.path / "config.toml").read_text())
    assert config["data"]["class_names"] == ["blue", "green", "red"]
    assert config["data"]["fingerprint"] == load_dataset(folder).fingerprint
    assert config["recipe"]["epochs"] == 6
    assert config["recipe"]["optimizer"]["learning_rate"] > 0
    assert set(config["versions"]) >= {"vitreous", "keras", "backend", "python"}
    assert Recipe.from_dict(config["recipe"]).epochs == 6
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["train_seconds"] > 0
    assert metrics["num_images_seen"] == 6 * len(load_dataset(folder).splits["train"])
    assert metrics["test"]["accuracy"] >= 0.6
    assert metrics["broken_files"] == {}
    with (run.path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"], abs=1e-6)
    assert f"{metrics['test']['accuracy']:.2%}" in (run.path / "README.md").read_text()


def test_the_same_seed_gives_the_same_weights(no_pictures, run, folder, tmp_path):
    again = vitreous.train(folder, out=tmp_path / "again", epochs=6, **SMALL)
    for a, b in zip(run.load_model().get_weights(), again.load_model().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    other = vitreous.train(folder, out=tmp_path / "other", epochs=1, seed=1, **SMALL)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(run.load_model().get_weights(), other.load_model().get_weights(), strict=True)
    )


def test_evaluate_measures_what_training_measured(run, folder, tmp_path):
    """On the folder it was trained on, only held-out images count; on another one, all do."""
    metrics = vitreous.evaluate(run.path)
    assert metrics["split"] == "test"
    assert metrics["accuracy"] == run.metrics["test"]["accuracy"]
    assert metrics["confusion_matrix"] == run.metrics["test"]["confusion_matrix"]
    assert vitreous.evaluate(run, folder)["num_examples"] == run.metrics["test"]["num_examples"]
    only_red = tmp_path / "held"
    (only_red / "red").mkdir(parents=True)
    (only_red / "red" / "a.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (only_red / "red" / "b.png").write_bytes(b"no image")
    metrics = vitreous.evaluate(run, only_red)
    assert (metrics["split"], metrics["num_examples"]) == ("all", 1)
    assert list(metrics["recall"]) == ["red"]
    assert list(metrics["broken_files"]) == ["red/b.png"]
    (only_red / "violet").mkdir()
    (only_red / "violet" / "a.png").write_bytes((folder / "red" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"Expected classes among the model's: .* Received: unknown classes .*violet"):
        vitreous.evaluate(run, only_red)


def test_predict(run, folder, tmp_path):
    paths = [folder / "red" / "0.png", folder / "blue" / "1.png"]
    first, second = vitreous.predict(run, paths, top_k=2)
    assert (first.path, second.path) == tuple(paths)
    assert len(first.classes) == 2
    assert first.probabilities[0] >= first.probabilities[1]
    assert sum(vitreous.predict(run, paths[0])[0].probabilities) == pytest.approx(1, abs=1e-5)
    seen = []
    everything = vitreous.predict(run, folder, on_progress=lambda done, total: seen.append((done, total)))
    assert len(everything) == 36
    assert seen[-1] == (36, 36)
    by_path = {p.path: p for p in everything}
    np.testing.assert_allclose(by_path[paths[0]].probabilities[:2], first.probabilities, atol=1e-5)
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "red" / "0.png").read_bytes()[:60])
    with pytest.raises(vitreous.VitreousError, match=r"broken\.png"):
        vitreous.predict(run, [*paths, broken])
    with pytest.raises(ConfigError, match=r"Received: top_k=0"):
        vitreous.predict(run, paths, top_k=0)


def test_broken_files_are_left_out_and_named(no_pictures, folder, tmp_path):
    root = tmp_path / "data"
    for name in ("red", "blue"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            (root / name / f"{i}.png").write_bytes((folder / name / f"{i}.png").read_bytes())
    whole = (root / "red" / "0.png").read_bytes()
    (root / "red" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "red" / "text.png").write_text("no image")
    said = []

    class Listener(LineReporter):
        def warn(self, text):
            said.append(text)

    run = vitreous.train(root, out=tmp_path / "run", epochs=1, reporter=Listener(), max_bad=0.1, **SMALL)
    assert set(run.metrics["broken_files"]) == {"red/truncated.png", "red/text.png"}
    assert any("2 broken images were left out" in text for text in said)
    assert run.metrics["num_replaced"] == sum("another image takes its place" in text for text in said)


def test_too_many_broken_training_images_stop_the_run(no_pictures, folder, tmp_path):
    root = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(folder, root / split)
    names = load_dataset(root).splits["train"].names[:4]
    whole = {name: (root / name).read_bytes() for name in names}
    for name in names:
        (root / name).write_bytes(whole[name][: len(whole[name]) // 2])
    with pytest.raises(DataError, match=r"Expected at most 0\.0\d+ of \d+ images .* Received: 4: .*truncated"):
        vitreous.train(root, out=tmp_path / "run", epochs=9, val_fraction=0.1, **SMALL)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))
    said = []

    class Listener(LineReporter):
        def warn(self, text):
            said.append(text)

    for other in names[1:]:
        (root / other).write_bytes(whole[other])
    name = names[0]  # up to three are never too many
    run = vitreous.train(root, out=tmp_path / "run", epochs=2, reporter=Listener(), **SMALL)
    assert run.metrics["num_replaced"] in (1, 2) and list(run.metrics["broken_files"]) == [name]
    assert sum("another image takes its place" in text for text in said) == 1


def test_time_budget_ends_on_time_with_the_schedule_done(no_pictures, folder, tmp_path):
    run = vitreous.train(folder, out=tmp_path / "run", time="2s", **SMALL)
    with (run.path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 1.5 <= run.metrics["train_seconds"] < 10  # compiling the evaluation is not foreseen
    peak = tomllib.loads((run.path / "config.toml").read_text())["recipe"]["optimizer"]["learning_rate"]
    assert float(rows[-1]["learning_rate"]) < 0.1 * peak


def test_an_existing_run_is_kept_unless_asked(no_pictures, run, folder, tmp_path):
    out = tmp_path / "run"
    vitreous.train(folder, out=out, epochs=1, **SMALL)
    before = (out / "config.toml").read_text()
    with pytest.raises(RunExistsError, match=r"Received: out=.*where a run lies\. Pass another --out, or --overwrite"):
        vitreous.train(folder, out=out, epochs=1, **SMALL)
    assert (out / "config.toml").read_text() == before
    wild = {"learning_rate": 10.0, "clip_norm": 0.0, "warmup_fraction": 0.0, "weight_decay": 10.0}
    with pytest.raises(TrainingError, match=r"Expected a finite loss\. Received: loss="):
        vitreous.train(folder, out=out, time="20s", overwrite=True, **SMALL, optimizer=wild)
    assert (out / "config.toml").read_text() == before
    vitreous.train(folder, out=out, epochs=2, overwrite=True, **SMALL)
    assert load_run(out).config["recipe"]["epochs"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing partial, nothing old
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    (tmp_path / "notes" / "config.toml").write_text("title = 'a web site'")
    with pytest.raises(RunExistsError, match=r"Received: a folder that is no run"):
        RunWriter(tmp_path / "notes", overwrite=True)


def test_what_comes_to_lie_there_meanwhile_is_kept(run, tmp_path):
    writer = RunWriter(tmp_path / "run")
    shutil.copytree(run.path, writer.partial, dirs_exist_ok=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    assert writer.finish().name == "run-2"
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "mine.txt", "run-2", *FILES}


def test_evaluate_refuses_data_that_has_changed(no_pictures, folder, tmp_path):
    """Nobody can tell then which images the model has seen."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    run = vitreous.train(root, out=tmp_path / "run", epochs=1, **SMALL)
    assert vitreous.evaluate(run)["num_examples"] == run.metrics["test"]["num_examples"]
    shutil.copy(root / "red" / "0.png", root / "red" / "new.png")
    for arguments in ((), (root,), (root, "test")):
        with pytest.raises(DataError, match=r"Cannot tell which images of .* Pass --split all"):
            vitreous.evaluate(run, *arguments[:1], split=arguments[1] if len(arguments) > 1 else None)
    assert vitreous.evaluate(run, root, split="all")["num_examples"] == 37


def test_held_out_images_that_cannot_be_read(folder, tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val", "test"):
        shutil.copytree(folder, root / split)
    for split in ("val", "test"):
        for path in (root / split).rglob("*.png"):
            path.write_bytes(path.read_bytes()[:200])
    run = vitreous.train(root, out=tmp_path / "run", epochs=1, **SMALL)
    assert "test" not in run.metrics
    assert len(run.metrics["broken_files"]) == 72
    with pytest.raises(DataError, match=r"Expected at least one labelled image that can be read"):
        vitreous.evaluate(run)


def test_a_folder_named_like_a_recipe_gets_the_recipe_of_its_images(no_pictures, folder, tmp_path):
    root = tmp_path / "digits"
    shutil.copytree(folder, root)
    run = vitreous.train(root, out=tmp_path / "run", epochs=1, batch_size=14, architecture={"num_blocks": 1})
    assert run.config["recipe_name"] == "few32"


def test_what_was_learnt_survives_a_failure_after_training(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitreous.training.results.draw_curves", fail)
    with pytest.raises(KeyboardInterrupt):
        vitreous.train(folder, out=tmp_path / "run", epochs=1, **SMALL)
    assert load_model(tmp_path / ".run.partial" / "run" / "model.keras").config.num_classes == 3


def test_prepare_gives_what_the_model_takes(run, folder):
    images = run.prepare([folder / "red" / "0.png", np.zeros((40, 30), "uint8")])
    assert images.shape == (2, 16, 16, 3)
    logits = np.asarray(run.load_model()(images))
    assert run.class_names[logits[0].argmax()] == vitreous.predict(run, folder / "red" / "0.png")[0].classes[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "vit_pico_patch4_23"}, UnknownNameError, r"Unknown model\. .* Nearest: vit_pico_patch4_"),
        ({"image_size": (18, 18)}, ConfigError, r"image height divisible by the patch size"),
        ({"recipe": "cifar"}, UnknownNameError, r"Unknown recipe\. Received: recipe='cifar'"),
        ({"epochs": 0}, ConfigError, r"Cannot use epochs\. Expected at least 1\. Received: epochs=0"),
        ({"epochs": 3, "time": "5s"}, ConfigError, r"Cannot train for epochs and for a time\. Expected one of the two"),
        ({"architecture": {"stm": "none"}}, UnknownNameError, r"Unknown architecture key\. .* Nearest: stem"),
        ({"time": "soon"}, ConfigError, r"Cannot read the time\. .* time='soon'"),
        ({"optimizer": {"learning_rat": 1e-3}}, UnknownNameError, r"Nearest: learning_rate"),
        ({"batchsize": 8}, UnknownNameError, r"Unknown key of Recipe\. .* Nearest: batch_size"),
        ({"small_fraction": 1.5}, ConfigError, r"Cannot use small_fraction"),
        ({"small_scale": 0}, ConfigError, r"Cannot use small_scale\. Expected a share above 0, at most 1"),
        ({"precision": "int8"}, ConfigError, r"Expected 'auto', 'float32' or 'bfloat16'"),
    ],
)
def test_wrong_options_leave_nothing(folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        vitreous.train(folder, out=tmp_path / "run", **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_load_run_errors(run, tmp_path):
    with pytest.raises(MissingPathError, match=r"Cannot load the run .*nowhere\. .* which does not exist"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(
        RunError, match=r"Received: missing model\.keras, config\.toml, metrics\.json\. Pass a run folder"
    ):
        load_run(tmp_path)
    for path in run.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.toml").write_text("format = 99\n[versions]\nvitreous = '9.9'\n")
    with pytest.raises(RunError, match=r"Received: format=99, written by vitreous 9\.9\. Install that version"):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_text("format = 1")
    with pytest.raises(RunError, match=r"Received: config\.toml without seed, input, data\."):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_text("format = [")
    with pytest.raises(RunError, match=r"Received: a damaged file"):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_bytes((run.path / "config.toml").read_bytes())
    (tmp_path / "model.keras").write_bytes((run.path / "model.keras").read_bytes()[:1000])
    with pytest.raises(RunError, match=r"Expected a whole \.keras file of a VisionTransformer"):
        load_run(tmp_path).load_model()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_saves_what_has_been_learnt(folder, tmp_path):
    out = tmp_path / "run"
    words = "--time 60s --model vit_pico_patch4_32 --image-size 16 --batch-size 8 --architecture.num-blocks 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "vitreous", "train", str(folder), "--out", str(out), *words.split()],
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    watch = time.monotonic()
    while not (tmp_path / ".run.partial/run/history.csv").exists() and time.monotonic() - watch < 120:
        time.sleep(0.05)  # until there is a row, or no more time
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Interrupted after" in output
    run = load_run(out)
    assert run.metrics["is_interrupted"]
    assert run.metrics["num_images_seen"] > 0
    # The command line adds a report; the best weights are there if the last were not the best.
    assert {path.name for path in out.iterdir()} - {"best.keras"} == {*FILES, "report.html"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_recipe_trains_two_tiny_steps(no_pictures, folder, tmp_path):
    """Recipes that differ in their model and their numbers alone stand for each other."""
    kinds = {}
    for name in list_recipes():
        recipe = load_recipe(name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        augment = recipe.augment
        size = 8 if recipe.model.endswith("_8") else 32
        stem = get_spec(recipe.model).config.stem
        kinds.setdefault((size, stem, recipe.optimizer.name, augment.policy, augment.cutmix_alpha > 0), (name, size))
    assert len(kinds) > 2
    for name, size in kinds.values():
        run = vitreous.train(
            folder,
            out=tmp_path / name,
            recipe=name,
            epochs=1,
            batch_size=14,
            image_size=(size, size),
            small_fraction=0.0,
            architecture={"num_blocks": 1, "projection_dim": 32, "mlp_dim": 32, "num_heads": 2},
        )
        assert run.metrics["num_steps"] == 2


def test_recipe_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "vit_pico_patch2_8"\n[augment]\ncrop_scale = [0.5, 1.0]\n')
    assert load_recipe(path).augment.crop_scale == (0.5, 1.0)
    path.write_text('modle = "vit_pico_patch2_8"')
    with pytest.raises(UnknownNameError, match=r"Unknown key of Recipe\. .* Nearest: model"):
        load_recipe(path)
    path.write_text("model =")
    with pytest.raises(ConfigError, match=r"Cannot load a recipe\. Expected TOML"):
        load_recipe(path)
    with pytest.raises(MissingPathError, match=r"which does not exist"):
        load_recipe(tmp_path / "none.toml")
    assert choose_recipe("digits", 500, 10) == "digits"
    names = [choose_recipe("x", side, 50_000) for side in (8, 32, 64, 500)]
    assert names == ["small32", "small32", "small64", "photos"]
    assert [choose_recipe("x", side, 600) for side in (32, 64)] == ["few32", "few64"]


def test_epochs_and_time_replace_each_other():
    recipe = Recipe(time="10m")
    assert recipe.budget_seconds == 600
    assert recipe.merge({"epochs": 3}).time is None
    assert Recipe(epochs=3).merge({"time": "5s"}).epochs is None
    assert [parse_seconds(text) for text in ("90s", "1.5h", "2m", "45")] == [90, 5400, 120, 45]
    assert recipe.merge({"optimizer": {"clip_norm": 2.0}}).optimizer.clip_norm == 2.0


def test_sizes_at_the_start_of_training():
    for image_size, changes, scale, expected in (
        (32, {}, 0.75, (24, 24)),
        ((32, 48), {}, 0.6, (16, 28)),
        (32, {}, 0.01, (4, 4)),
        (32, {}, 1.0, (32, 32)),
        (32, {"patch_size": 8, "patch_strides": 4}, 0.3, (8, 8)),
        (32, {"patch_size": 8, "patch_strides": 4}, 0.6, (16, 16)),
        (28, {"patch_size": 16, "patch_padding": "same"}, 0.95, (16, 16)),
        (10, {"patch_size": 16, "patch_padding": "same"}, 0.75, (10, 10)),
    ):
        config = get_spec("vit_pico_patch4_32", image_size=image_size, **changes).config
        assert Recipe(small_fraction=0.5, small_scale=scale).get_small_size(config) == expected
        assert Recipe(small_scale=scale).get_small_size(config) == config.image_size


def test_schedules():
    settings = {"peak": 2.0, "warmup_fraction": 0.1, "final_fraction": 0.05}
    assert learning_rate(0.0, **settings) == 0
    assert learning_rate(0.05, **settings) == pytest.approx(1.0)
    assert learning_rate(0.1, **settings) == pytest.approx(2.0)
    assert learning_rate(0.55, **settings) == pytest.approx(2 * (0.05 + 0.95 / 2))
    assert learning_rate(1.0, **settings) == learning_rate(1.5, **settings) == pytest.approx(0.1)
    assert average_decay(1, 0.001, horizon_fraction=0.05) == pytest.approx(1 / 11)
    assert average_decay(500, 0.5, horizon_fraction=0.05) == pytest.approx(1 - 1 / 50)
    assert average_decay(500, 0.5, horizon_fraction=0.0) == 0


def test_metrics_equal_scikit_learn():
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((200, 7)), rng.integers(0, 7, 200)
    metrics = compute_metrics(logits, labels, "abcdefg")
    answers = logits.argmax(axis=1)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics["accuracy"] == accuracy_score(labels, answers)
    assert metrics["loss"] == pytest.approx(log_loss(labels, shares))
    assert metrics["confusion_matrix"] == confusion_matrix(labels, answers).tolist()
    assert list(metrics["recall"].values()) == pytest.approx(recall_score(labels, answers, average=None).tolist())
    assert metrics["macro_recall"] == pytest.approx(recall_score(labels, answers, average="macro"))
    assert metrics["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    # Wilson's interval for 8 of 10, from the formula in Wilson 1927
    low, high = compute_metrics(np.eye(2)[[0] * 8 + [1] * 2], np.zeros(10, int), "ab")["accuracy_interval"]
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert not math.isnan(metrics["loss"])


def test_metrics_of_several_labels_equal_scikit_learn():
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_recall_fscore_support

    rng = np.random.default_rng(0)
    labels = rng.random((200, 5)) < (0.5, 0.1, 0.3, 0.9, 0)
    logits = rng.standard_normal((200, 5)) + labels
    answers, there = logits > 0, slice(0, 4)  # no image has the last label
    metrics = compute_metrics(logits, labels, "abcde")
    precisions = average_precision_score(labels[:, there], logits[:, there], average=None)
    assert list(metrics["average_precision"].values()) == pytest.approx(precisions.tolist())
    assert list(metrics["average_precision"]) == list("abcd")
    assert metrics["mean_average_precision"] == pytest.approx(precisions.mean())
    assert metrics["micro_f1"] == pytest.approx(f1_score(labels, answers, average="micro"))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels[:, there], answers[:, there], average="macro"))
    precision, recall, _, support = precision_recall_fscore_support(labels[:, there], answers[:, there])
    for name, values in {"precision": precision, "recall": recall, "support": support}.items():
        assert list(metrics[name].values()) == pytest.approx(values.tolist())
    assert metrics["exact_match"] == accuracy_score(labels, answers)
    assert metrics["label_accuracy"] == (labels == answers).mean()
    shares = 1 / (1 + np.exp(-logits))
    expected = -np.where(labels, np.log(shares), np.log(1 - shares)).mean()
    assert metrics["loss"] == pytest.approx(expected)
    assert get_headline(metrics) == ("mean_average_precision", metrics["mean_average_precision"])
    text = summarize_metrics(metrics)
    assert text.startswith(f"mean average precision {precisions.mean():.2%} on 200 images; F1 ")


def make_multi_label(count=240):
    """Red in the top half, green in the bottom half, both, or neither."""
    rng = np.random.default_rng(0)
    labels = rng.random((count, 2)) < 0.5
    images = rng.integers(0, 80, (count, 8, 8, 3)).astype("uint8")
    images[:, :4, :, 0] += (150 * labels[:, 0, None, None]).astype("uint8")
    images[:, 4:, :, 1] += (150 * labels[:, 1, None, None]).astype("uint8")
    whole = ImageSet([f"{i}" for i in range(count)], labels, arrays=images)
    parts = {"train": range(160), "val": range(160, 200), "test": range(200, count)}
    return Dataset(
        name="lights",
        root=None,
        class_names=("red", "green"),
        splits={name: whole.take(places) for name, places in parts.items()},
    )


def test_training_ends_early_and_keeps_the_best(no_pictures, tmp_path, capsys):
    """Labels are drawn by lot, so that validation soon stops improving."""
    rng = np.random.default_rng(0)
    images = ImageSet(
        [f"{i}" for i in range(120)], rng.integers(0, 2, 120), arrays=rng.integers(0, 255, (120, 8, 8, 3), "uint8")
    )
    splits = {"train": images.take(range(60)), "val": images.take(range(60, 120))}
    dataset = Dataset(name="noise", root=None, class_names=("heads", "tails"), splits=splits)
    options = {"model": "vit_pico_patch2_8", "epochs": 200, "architecture": {"num_blocks": 1}}
    run = vitreous.train(dataset, out=tmp_path / "run", patience_epochs=10, reporter=LineReporter(), **options)
    rows = list(csv.DictReader((run.path / "history.csv").open()))
    assert int(rows[-1]["epoch"]) < 100
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert float(best["val_accuracy"]) == pytest.approx(run.metrics["val"]["accuracy"])
    assert int(rows[-1]["epoch"]) - int(best["epoch"]) >= 10
    last = load_model(run.path / "last.keras")
    assert not np.array_equal(last.get_weights()[0], run.load_model().get_weights()[0])
    assert f"Best     validation at epoch {best['epoch']}, accuracy " in capsys.readouterr().out
    assert "- `last.keras`: the last averaged weights" in (run.path / "README.md").read_text()
    without = Dataset(name="noise", root=None, class_names=("heads", "tails"), splits={"train": splits["train"]})
    with pytest.raises(ConfigError, match=r"Received: patience_epochs=2, and no val split\. Pass a val_fraction"):
        vitreous.train(without, out=tmp_path / "other", patience_epochs=2, **options)


def test_three_bad_images_never_stop_training():
    assert Recipe(max_bad=0.01).get_bad_fraction(48) == 3 / 48
    assert Recipe(max_bad=0.01).get_bad_fraction(1000) == 0.01
    assert Recipe(max_bad=0.01).get_bad_fraction(2) == 0.99
    assert Recipe(max_bad=0.0).get_bad_fraction(48) == 0


def test_several_labels_an_image(tmp_path):
    run = vitreous.train(
        make_multi_label(),
        out=tmp_path / "run",
        model="vit_pico_patch2_8",
        epochs=12,
        batch_size=16,
        balance="weights",
        optimizer={"learning_rate": 3e-3},
        augment={"horizontal_flip_rate": 0.5, "crop_scale": (1.0, 1.0)},
        architecture={"num_blocks": 2},
    )
    assert run.is_multi_label and run.metrics["test"]["mean_average_precision"] > 0.95
    assert "test mean average precision **" in (run.path / "README.md").read_text()
    assert {"labels.png", "predictions.png"} <= {path.name for path in run.path.iterdir()}
    assert not (run.path / "confusion.png").exists()
    rows = list(csv.DictReader((run.path / "history.csv").open()))
    row = rows[-1]
    assert float(row["val_mean_average_precision"]) == pytest.approx(
        run.metrics["val"]["mean_average_precision"], abs=1e-6
    )
    both = np.zeros((8, 8, 3), "uint8")
    both[:4, :, 0] = both[4:, :, 1] = 200
    Image.fromarray(both).save(tmp_path / "both.png")
    (prediction,) = vitreous.predict(run, tmp_path / "both.png")
    assert min(prediction.probabilities) > 0.5
    assert set(prediction.labels) == {"red", "green"} and prediction.to_dict()["labels"] == list(prediction.labels)
    curves = draw_curves({key: [float(row[key])] for key in row if row[key]}, tmp_path / "curves.svg").read_text()
    assert "mean average precision" in curves


def test_predict_leaves_out_what_cannot_be_read(run, tmp_path):
    (tmp_path / "folder").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), "uint8")
    Image.fromarray(noise).save(tmp_path / "folder" / "a.png")
    whole = (tmp_path / "folder" / "a.png").read_bytes()
    (tmp_path / "folder" / "b.png").write_bytes(whole[: len(whole) // 2])
    failed = []
    found = vitreous.predict(run, tmp_path / "folder", on_error=lambda name, reason: failed.append((name, reason)))
    assert [Path(each.path).name for each in found] == ["a.png"]
    ((name, reason),) = failed
    assert name.endswith("b.png") and reason.startswith("a truncated image")
    with pytest.raises(ImageError, match=r"b\.png"):
        vitreous.predict(run, tmp_path / "folder")


def test_format_seconds():
    assert [format_seconds(s) for s in (0.4, 59, 185, 7620)] == ["0s", "59s", "3m05s", "2h07m"]


def test_pretrained_weights_are_the_start(no_pictures, folder, run, tmp_path):
    """With no learning to speak of, the backbone that comes out is the one that went in; the head is fresh."""
    model = run.load_model()
    tiny = {"learning_rate": 1e-12, "weight_decay": 0.0}
    tuned = vitreous.train(folder, out=tmp_path / "run", pretrained=run.path, epochs=1, optimizer=tiny)
    assert tuned.config["recipe_name"] == "finetune"
    for before, after in zip(model.weights, tuned.load_model().weights, strict=True):
        if "head" not in before.path:
            np.testing.assert_allclose(np.asarray(after), np.asarray(before), atol=1e-6)
