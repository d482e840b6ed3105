"""Runs the tests of layers, model, training step, losses and weights again on each other backend that is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitreous.backend import BACKENDS, is_installed

TESTS = [
    "test_layers.py",
    "test_layers_fast.py",
    "test_model.py",
    "test_explanation.py",
    "test_look.py",
    "test_training_step.py",
    "test_training_adapt.py",
    "test_training_losses.py",
    "test_weights_references.py",
]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != os.environ["KERAS_BACKEND"]])
def test_on_backend(backend):
    if not is_installed(backend):
        pytest.skip(f"{backend} is not installed")
    folder = Path(__file__).parent
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *(str(folder / name) for name in TESTS),
        ],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
