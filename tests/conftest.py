"""Shared by all tests: the backend is settled before anything imports Keras."""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("VITREOUS_COMPILE_CACHE", "off")  # what a test compiles is its own
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Processes that tests start find the package too, installed or not.
_SOURCE = str(Path(__file__).parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))
