"""The benchmarks run, in miniature."""

import json
import subprocess
import sys
from pathlib import Path

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
