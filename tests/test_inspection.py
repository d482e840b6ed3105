"""`vitreous.inspect`: in Python, at the command line, with a run, and before training."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from inspection_data import make_clean, make_faulty, tree_hash

import vitreous
from vitreous.data import Dataset, ImageSet
from vitreous.data.inspection import KINDS
from vitreous.errors import ConfigError, DataError
from vitreous.inspection import label_findings
from vitreous.training.progress import Reporter


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return make_faulty(tmp_path_factory.mktemp("data") / "faulty")


class Listener(Reporter):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


FLIPPED = {"train": [3, 40, 77], "test": [5, 20]}


def lamps(class_names=("off", "on")):
    """Dark and bright images of noise; the labels of a few, in FLIPPED, are wrong."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 240), ("val", 40), ("test", 60)):
        truth = np.arange(count) % 2
        level = np.where(truth, 180, 70)[:, None, None, None]
        images = np.clip(level + generator.normal(0, 25, (count, 8, 8, 1)), 0, 255).astype("uint8")
        labels = truth.copy()
        labels[FLIPPED.get(split, [])] ^= 1
        splits[split] = ImageSet([f"{split}/{i}" for i in range(count)], labels, arrays=images)
    return Dataset(name="lamps", root=None, class_names=class_names, splits=splits)


@pytest.fixture(scope="module")
def lamps_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lamps"
    plain = {"optimizer": {"name": "adamw", "learning_rate": 2e-3}, "architecture": {"stem": "none", "stem_depths": ()}}
    # With the recipe's own stem and optimiser it learns the wrong labels by heart.
    return vitreous.train(lamps(), out=out, recipe="digits", epochs=20, batch_size=48, **plain)


def test_a_run_finds_wrong_labels(lamps_run):
    found = vitreous.inspect(lamps(), run=lamps_run)
    unseen = {ref.file for item in found["label_error"].items for ref in item.files}
    assert unseen == {"test/5", "test/20"}
    assert found["label_error"].severity == "warning"
    seen = {ref.file for item in found["label_error_seen"].items for ref in item.files}
    assert seen == {"train/3", "train/40", "train/77"}
    assert "Less reliable" in found["label_error_seen"].text.explanation
    item = next(item for item in found["label_error"].items if item.files[0].file == "test/5")
    assert item.detail.startswith("labelled off (")
    assert "rather on (" in item.detail
    assert "2 of 100 images by lamps, accuracy on them 98.0%" in found["label_error"].detail


def test_classes_in_another_order(lamps_run):
    """The data's classes are matched with the run's by name; data it was not trained on is unseen, all of it."""
    turned = lamps(("on", "off"))
    for images in turned.splits.values():
        images.labels = 1 - images.labels
    (found,) = label_findings(turned, lamps_run)
    assert found.kind == "label_error"
    assert len(found.items) == 5


def test_run_that_does_not_know_the_classes(lamps_run, tmp_path):
    with pytest.raises(DataError, match=r"unknown classes \['cat', 'dog'\]"):
        vitreous.inspect(make_clean(tmp_path / "data"), run=lamps_run)


def test_cli_prints_a_table_and_writes_three_files(call, faulty, tmp_path):
    before = tree_hash(faulty)
    page, everything, fixes = (tmp_path / name for name in ("page.html", "all.json", "fixes.csv"))
    code, out, err = call("inspect", faulty, "--html", page, "--json", everything, "--fix-list", fixes)
    assert code == 0
    assert "Backend" not in err  # no Keras without a run
    for text in (
        "The same image in more than one split",
        "train/cat/02.png",
        "Found    3 errors, 10 warnings, 13 notes",
        "error",
    ):
        assert text in out
    assert "What to do." in page.read_text()
    found = json.loads(everything.read_text())
    rows = list(csv.DictReader(fixes.open(newline="")))
    assert len(rows) == sum(finding["num_files"] for finding in found["findings"])
    assert tree_hash(faulty) == before
    assert [line for line in err.splitlines() if line.startswith("Wrote")] == [
        f"Wrote {path}" for path in (page, everything, fixes)
    ]


def test_cli_exit_codes(call, faulty, tmp_path):
    clean = make_clean(tmp_path / "clean")
    assert call("inspect", faulty, "--strict")[0] == 1
    code, out, _ = call("inspect", clean, "--strict")
    assert code == 0
    assert "no errors, no warnings, no notes" in out
    for arguments, text in (
        ((tmp_path / "nowhere",), "nowhere"),
        ((clean, "--html", tmp_path / "none" / "page.html"), "Pass another --html."),
        ((clean, "--run", tmp_path / "none"), "does not exist"),
        ((clean, "--min-similarity", "2"), "min_similarity=2.0"),
    ):
        code, out, err = call("inspect", *arguments)
        assert (code, out) == (2, "")
        assert text in err and len(err.splitlines()) == 1, err


def test_cli_with_a_run(call, lamps_run, tmp_path):
    from PIL import Image

    for split, images in lamps().splits.items():
        for i in range(len(images)):
            path = tmp_path / "lamps" / split / ("off", "on")[images.labels[i]] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.load(i, 1)[:, :, 0]).save(path)
    code, out, err = call("inspect", tmp_path / "lamps", "--run", lamps_run.path, "--json", tmp_path / "all.json")
    assert code == 0
    assert "Backend  jax" in err
    assert "Probable label errors" in out
    (found,) = [f for f in json.loads((tmp_path / "all.json").read_text())["findings"] if f["kind"] == "label_error"]
    assert {file["file"] for item in found["items"] for file in item["files"]} >= {
        "test/on/020.png",
        "test/off/005.png",
    }


def test_names_cannot_steer_the_terminal(call, tmp_path):
    root = make_clean(tmp_path / "data")
    (root / "train/cat/\x1b[31m[red]x.png").write_bytes((root / "train/cat/00.png").read_bytes())
    code, out, _ = call("inspect", root)
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[31m[red]x.png" in out


def test_training_says_what_the_quick_look_found(faulty, tmp_path):
    listener = Listener()
    vitreous.train(
        faulty, out=tmp_path / "run", recipe="digits", image_size=(8, 8), epochs=1, reporter=listener, num_channels=3
    )
    said = "\n".join(listener.warnings)
    for text in (
        "The same image in more than one split (1): 1 image in 1 group, compared by their bytes.",
        "The same image under different labels (1)",
        "Class names that differ only in form (2), such as 'Cat ' = 'cat'.",
        "dog has 13.5 times the training images",
    ):
        assert text in said
    assert said.count("cannot be read") == 1  # said once, by training itself
    assert "passed over" not in said  # a note


def test_training_on_clean_data_warns_of_nothing(tmp_path):
    listener = Listener()
    vitreous.train(lamps(), out=tmp_path / "run", recipe="digits", epochs=1, reporter=listener)
    assert [text for text in listener.warnings if "steps" not in text] == []


def test_docs_list_every_kind():
    page = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| (error|warning|note) \|", line)]
    assert rows == [f"| {k.severity} | {k.title} | `{name}` | {k.action} |" for name, k in KINDS.items()]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Two tables of the same pictures: one with groups, one without and with its classes in another column."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype("uint8")
        Image.fromarray(pixels).save(root / f"{i}.png")
        rows.append((f"{i}.png", ("red", "green")[i % 2], f"c{i // 2}"))
    (root / "grouped.csv").write_text("photo,colour,camera\n" + "\n".join(",".join(row) for row in rows))
    (root / "plain.csv").write_text("photo,colour\n" + "\n".join(",".join(row[:2]) for row in rows))
    (root / "other.csv").write_text("photo,label\n" + "\n".join(",".join(row[:2]) for row in rows))
    for name, colour, _ in rows:
        (root / "folder" / "train" / colour).mkdir(parents=True, exist_ok=True)
        (root / "folder" / "train" / colour / name).write_bytes((root / name).read_bytes())
    for colour, number in (("red", 0), ("green", 1)):
        (root / "folder" / "test" / colour).mkdir(parents=True)
        (root / "folder" / "test" / colour / "x.png").write_bytes((root / f"{number}.png").read_bytes())
    options = {"label_column": "colour", "group_column": "camera", "num_folds": 3, "fold": 2}
    run = vitreous.train(
        root / "grouped.csv",
        out=root / "run",
        recipe="digits",
        num_channels=3,
        epochs=1,
        batch_size=8,
        seed=4,
        **options,
    )
    return root, run


@pytest.mark.parametrize("name", ["grouped.csv", "plain.csv", "other.csv", "folder"])
def test_options_of_a_run_count_where_they_fit(colours, name):
    root, run = colours
    found = vitreous.inspect(root / name, run=run)
    said = " ".join(found.dataset.notes)
    assert ("fold 2 of 3" in said) == (name == "grouped.csv")
    assert "with seed 4" in said
    own = vitreous.inspect(root / name, run=run, val_fraction=0.3, seed=5)
    assert "with seed 5" in " ".join(own.dataset.notes)
    assert len(own.dataset.splits["val"]) > len(found.dataset.splits["val"])


def test_options_of_the_data_in_python(colours):
    root, _ = colours
    notes = vitreous.inspect(root / "grouped.csv", label_column="colour", group_column="camera").dataset.notes
    assert any("by whole groups of camera with seed 0" in note for note in notes)
    with pytest.raises(
        ConfigError, match=r"beside a Dataset\. Received: val_fraction, seed\. Pass them to load_dataset"
    ):
        vitreous.inspect(lamps(), val_fraction=0.2, seed=1)
    with pytest.raises(DataError, match="which column holds the labels"):
        vitreous.inspect(root / "plain.csv")
