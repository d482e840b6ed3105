"""The benchmarks run, in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitreous.backend import is_installed
from vitreous.data import Dataset, ImageSet
from vitreous.training import Run

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments, **environment):
    command, env = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_train_gpu_in_miniature(tmp_path):
    out = tmp_path / "table.md"
    arguments = ("--miniature", "--contenders", "ours jax bfloat16", "--out", out)
    (row,) = run(FOLDER / "train_gpu.py", *arguments)["rows"]
    assert row["images_per_second"] > 0
    assert 0 < row["mfu"] < 1
    assert "| ours jax bfloat16 |" in out.read_text()


def write_images(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = (level + rng.integers(0, 40, (32, 32, 3))).astype("uint8")
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_cifar_in_miniature(tmp_path):
    write_images(tmp_path / "data")
    out = tmp_path / "table.md"
    backend = "torch" if is_installed("torch") else "jax"
    arguments = ("--minutes", 0.05, "--per-class", 10, "--miniature", "--contenders", "ours", "--backend", backend)
    (row,) = run(FOLDER / "cifar.py", tmp_path / "data", *arguments, "--out", out)["rows"]
    assert row["num_images"] > 0
    assert row["seconds"] < 60
    assert "| ours |" in out.read_text()


def test_parity_in_miniature(tmp_path):
    out = tmp_path / "table.md"
    arguments = ("--miniature", "--kinds", "registers", "--formats", "onnx", "--out", out)
    rows = run(FOLDER / "parity.py", *arguments)["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "fp16", "int8"]
    assert rows[0]["max_logit_difference"] < 1e-4 < rows[1]["max_logit_difference"]
    assert out.read_text().count("| onnx ") == 3


def test_adapt_in_miniature(tmp_path):
    write_images(tmp_path)
    arguments = ("pretrain", "--data", tmp_path, "--per-class", 4, "--seeds", 1, "--miniature")
    # Three short trainings: torch does not compile them.
    found = run(FOLDER / "adapt.py", *arguments, **{"KERAS_BACKEND": "torch"} if is_installed("torch") else {})
    assert [row["name"] for row in found["rows"]] == ["from the pretrained encoder", "from scratch"]
    assert [row["num_images_seen"] for row in found["rows"]] == [8, 8]  # 4 of each class
    assert all(0 <= row["accuracy"] <= 1 for row in found["rows"])


def test_one_class_against_the_rest(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import adapt

    labels = np.repeat(np.arange(3), 8)
    images = ImageSet([f"{i:02d}" for i in range(24)], labels, arrays=np.zeros((24, 4, 4, 3), "uint8"))
    data = Dataset(name="x", root=None, class_names=("a", "b", "c"), splits={"train": images, "test": images})
    others = adapt.without_class(data, 1)
    assert others.class_names == ("a", "c")
    assert others.splits["train"].labels.tolist() == [0] * 8 + [1] * 8
    assert others.splits["test"].names == [f"{i:02d}" for i in (*range(8), *range(16, 24))]
    task = adapt.class_against_rest(data, 1, 5)
    assert task.class_names == ("others", "b")
    assert task.splits["train"].names == ["00", "01", "02", "16", "17", "08", "09", "10", "11", "12"]
    assert task.splits["train"].labels.tolist() == [0] * 5 + [1] * 5
    halves = [task.splits[split] for split in ("val", "test")]
    assert [len(half) for half in halves] == [8, 8] and [int(half.labels.sum()) for half in halves] == [4, 4]
    assert not set(halves[0].names) & set(halves[1].names)


def test_images_until_an_accuracy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import adapt

    rows = [{"epoch": epoch, "val_accuracy": value} for epoch, value in ((2, 0.5), (4, 0.8), (6, 0.7), (8, 0.9))]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = Run(path=tmp_path, config={"data": {"num_images": {"train": 100}}}, metrics={})
    assert [adapt.count_images(trained, accuracy) for accuracy in (0.4, 0.75, 0.9, 0.95)] == [200, 400, 800, None]
