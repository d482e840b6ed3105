import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.data import load_dataset
from vitreous.errors import ConfigError, DataError, RunError, RunExistsError
from vitreous.training import train_folds
from vitreous.training.folds import _Progress, spread_line, summarize_folds
from vitreous.training.progress import LineReporter
from vitreous.training.resume import describe_call
from vitreous.training.run import Run, load_run

SMALL = {"model": "vit_pico_patch4_32", "image_size": (16, 16), "batch_size": 8, "num_channels": 3, "epochs": 2}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """24 images of two colours, four of each patient."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    lines = ["photo,colour,patient"]
    for i in range(24):
        pixels = rng.integers(0, 60, (16, 16, 3)).astype("uint8")
        pixels[:, :, i % 2] += 180
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(f"{i}.png,{('red', 'green')[i % 2]},p{i // 4}")
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return root / "t.csv"


@pytest.fixture(scope="module")
def result(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "folds"
    return train_folds(table, num_folds=3, out=out, label_column="colour", group_column="patient", **SMALL)


def test_each_image_is_tested_once(result, table):
    assert [run.path.name for run in result.runs] == ["fold-1", "fold-2", "fold-3"]
    tested = []
    for fold, run in enumerate(result.runs, 1):
        split = run.config["data"]["split"]
        assert (split["num_folds"], split["fold"], split["group_column"]) == (3, fold, "patient")
        dataset = load_dataset(table, **split)
        assert dataset.fingerprint == run.config["data"]["fingerprint"]
        assert run.metrics["test"]["num_examples"] == len(dataset.splits["test"])
        tested += dataset.splits["test"].names
    assert sorted(tested) == sorted(f"{i}.png" for i in range(24))


def test_mean_and_spread(result):
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert metrics == result.metrics and metrics["num_folds"] == 3
    values = [run.metrics["test"]["accuracy"] for run in result.runs]
    assert metrics["test"]["accuracy"] == {
        "mean": pytest.approx(np.mean(values)),
        "std": pytest.approx(np.std(values, ddof=1)),
        "values": values,
    }
    assert metrics["test"]["num_examples"] == 24
    assert {"loss", "macro_recall"} <= set(metrics["test"])
    readme = (result.path / "README.md").read_text()
    assert "| [fold-2](fold-2/README.md) |" in readme
    assert f"**{np.mean(values):.4f}**" in readme


def test_evaluate_measures_the_fold(result, table):
    run = result.runs[1]
    measured = vitreous.evaluate(run)
    assert measured["split"] == "test" and measured["accuracy"] == run.metrics["test"]["accuracy"]
    assert vitreous.evaluate(run, table)["num_examples"] == run.metrics["test"]["num_examples"]
    assert vitreous.evaluate(run, split="all")["num_examples"] == 24


def test_what_cannot_be_done(result, table, tmp_path):
    with pytest.raises(
        RunExistsError, match=r"Cannot write 3 folds in .*Received: fold-1, which exists\. Pass another"
    ):
        train_folds(table, num_folds=3, out=result.path, label_column="colour", **SMALL)
    with pytest.raises(RunExistsError, match=r"Received: model\.keras, which exists\."):
        train_folds(table, num_folds=3, out=result.runs[0].path, label_column="colour", overwrite=True, **SMALL)
    with pytest.raises(ConfigError, match=r"Expected no single fold\. Received: fold=2\. Leave it out"):
        train_folds(table, num_folds=3, fold=2, out=tmp_path / "x")
    with pytest.raises(DataError, match=r"Cannot make 3 folds of digits\. Expected data that is not split\."):
        train_folds("digits", num_folds=3, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_fewer_folds_than_before(result, table, tmp_path, monkeypatch):
    """Folds of the earlier cross-validation are gone; what is no run stays."""
    root = tmp_path / "folds"
    shutil.copytree(result.path, root)
    (root / "fold-4").mkdir()
    (root / "fold-4" / "notes.txt").write_text("mine")
    for place in ("fold-1", "fold-2", "metrics.json", "README.md"):
        shutil.move(root / place, tmp_path / place)
    options = {"num_folds": 2, "out": root, "label_column": "colour"}

    def train(data, *, out, **_):
        shutil.copytree(tmp_path / out.name, out)
        return load_run(out)

    monkeypatch.setattr("vitreous.training.folds.train", train)
    with pytest.raises(RunExistsError, match=r"Received: fold-3, which exists\. Pass another --out, or --overwrite"):
        train_folds(table, **options)
    assert train_folds(table, overwrite=True, **options).metrics["num_folds"] == 2
    assert sorted(place.name for place in root.iterdir()) == ["README.md", "fold-1", "fold-2", "fold-4", "metrics.json"]


def test_options_of_the_data_beside_a_data_set(table, tmp_path):
    dataset = load_dataset(table, label_column="colour")
    with pytest.raises(ConfigError, match=r"Expected no options of the data beside a Dataset\. Received: num_folds\."):
        vitreous.train(dataset, num_folds=3, out=tmp_path / "x")


def test_summary():
    tests = [
        {"accuracy": 0.5, "n": 3, "num_examples": 4, "is_ok": True, "list": [1]},
        {"accuracy": 0.7, "num_examples": 6},
    ]
    metrics = summarize_folds(
        [Run(path, {}, {"test": test}) for path, test in zip((Path("a"), Path("b")), tests, strict=True)]
    )
    assert metrics["test"] == {
        "num_examples": 10,
        "accuracy": {"mean": pytest.approx(0.6), "std": pytest.approx(0.1 * 2**0.5), "values": [0.5, 0.7]},
    }
    assert spread_line("accuracy", metrics["test"]["accuracy"]) == "accuracy 60.00% ± 14.14%"
    assert spread_line("loss", {"mean": 0.5, "std": 0.25}) == "loss 0.500 ± 0.250"


def test_folds_go_on_after_a_kill(result, table, tmp_path):
    """Finished folds are kept, the fold at hand goes on, and the numbers are those without a break."""

    class Crash(LineReporter):
        def __init__(self):
            super().__init__()
            self.lines = []

        def note(self, text):
            self.lines.append(text)
            if crash_at and text.startswith(crash_at):
                raise RuntimeError("crash")

    out = tmp_path / "folds"
    options = {"num_folds": 3, "out": out, "label_column": "colour", "group_column": "patient", **SMALL}
    crash_at = "Fold     3 of 3"
    with pytest.raises(RuntimeError, match="crash"):
        train_folds(table, reporter=Crash(), **options)
    crash_at = None
    with pytest.raises(ConfigError) as error:
        train_folds(table, **{**options, "epochs": 3})
    assert f"with the folds in {out}. Expected the options that they began with: epochs=2. Received: epochs=3." in str(
        error.value
    )
    begun = (out / "fold-1" / "metrics.json").stat().st_mtime_ns
    reporter = Crash()
    again = train_folds(table, reporter=reporter, checkpoint_every="1 steps", **options)
    assert f"Fold     1 of 3 is finished: {out / 'fold-1'}" in reporter.lines
    assert (out / "fold-1" / "metrics.json").stat().st_mtime_ns == begun
    assert not (out / "folds.json").exists()
    for split in ("val", "test"):
        assert again.metrics[split] == result.metrics[split]
    with pytest.raises(RunExistsError, match="Expected a free path"):
        train_folds(table, **options)


def test_a_cross_validation_that_never_began_binds_nobody(tmp_path):
    """A mistake in the first command does not stand in the way of the second."""
    _Progress(tmp_path / "folds.json", {"model": "vit_typo"}).write()
    assert not _Progress(tmp_path / "folds.json", {"model": "vit_tiny"}).read(overwrite=False)
    (tmp_path / ".fold-1.partial").mkdir()
    with pytest.raises(ConfigError, match="Expected the options that they began with: model='vit_typo'"):
        _Progress(tmp_path / "folds.json", {"model": "vit_tiny"}).read(overwrite=False)


def test_an_unfinished_fold_may_not_be_overwritten_unless_it_was_said(table, tmp_path, monkeypatch):
    """Only a finished one that a kill kept from being noted is made again."""
    asked = []
    monkeypatch.setattr("vitreous.training.folds.train", lambda *_, overwrite, **__: asked.append(overwrite) or 1 / 0)
    options = {"num_folds": 3, "out": tmp_path / "folds", "label_column": "colour", **SMALL}
    for changes in ({}, {}, {"overwrite": True}):
        with pytest.raises(ZeroDivisionError):
            train_folds(table, **options, **changes)
    monkeypatch.setattr("vitreous.training.folds.is_run", lambda place: True)
    with pytest.raises(ZeroDivisionError):
        train_folds(table, **options)
    assert asked == [False, False, True, True]


def test_folds_of_other_data_do_not_go_on(result, table, tmp_path):
    out = tmp_path / "folds"
    shutil.copytree(result.path, out)
    (out / "metrics.json").unlink()
    call = {"task": "train", "data": str(table), "num_folds": 3, "seed": 0, "label_column": "red"}
    (out / "folds.json").write_text(json.dumps({"call": call, "finished": [1]}))
    (table.parent / "other.csv").write_text("\n".join(table.read_text().splitlines()[:-3]))
    options = {"num_folds": 3, "out": out, "label_column": "colour", "group_column": "patient", **SMALL}
    with pytest.raises(ConfigError, match="Expected the options that they began with"):
        train_folds(table, **options)
    (out / "folds.json").write_text("{")
    with pytest.raises(RunError, match=r"Expected folds\.json as it was written\. Received: a damaged file"):
        train_folds(table, **options)
    call = describe_call("train", {"data": table.parent / "other.csv", "seed": 0, **options})
    (out / "folds.json").write_text(json.dumps({"call": call, "finished": [1]}))
    with pytest.raises(DataError, match=r"Received: other images or labels than in fold-1\. Restore them"):
        train_folds(table.parent / "other.csv", **options)
