"""The benchmarks run, in miniature."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments):
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_train_gpu_in_miniature(tmp_path):
    out = tmp_path / "table.md"
    arguments = ("--miniature", "--contenders", "ours jax bfloat16", "--out", out)
    (row,) = run(FOLDER / "train_gpu.py", *arguments)["rows"]
    assert row["images_per_second"] > 0
    assert 0 < row["mfu"] < 1
    assert "| ours jax bfloat16 |" in out.read_text()


def test_cifar_in_miniature(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = (level + rng.integers(0, 40, (32, 32, 3))).astype("uint8")
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    out = tmp_path / "table.md"
    arguments = ("--minutes", 0.05, "--per-class", 10, "--miniature", "--contenders", "ours", "--backend", "jax")
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
