"""Shared by all tests: the backend is settled before anything imports Keras."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("VITREOUS_COMPILE_CACHE", "off")  # what a test compiles is its own
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch waits long where its threads share cores with other processes
# What prediction keeps, tests share; nothing of it stays.
_KEPT: str | None = None
if "VITREOUS_ENGINE_CACHE" not in os.environ:
    _KEPT = os.environ["VITREOUS_ENGINE_CACHE"] = tempfile.mkdtemp(prefix="vitreous-tests-engine-")
# Models here are tiny: compiling takes the time, not computing. So jax compiles without much optimisation, and
# compiles once what two tests have in common: the workers, and the processes that tests start, share a folder.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED: str | None = tempfile.mkdtemp(prefix="vitreous-tests-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
else:
    _COMPILED = None  # someone else's: a worker's is the main process's
# Processes that tests start find the package too, installed or not.
_SOURCE = str(Path(__file__).parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))


def pytest_collection_finish():
    """Lets the garbage collector pass over what has been imported: it would walk through it for minutes in all."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup():
    """Keeps Keras from importing TensorFlow to save a model on another backend, as the command line does: seconds."""
    if "keras" in sys.modules and os.environ["KERAS_BACKEND"] != "tensorflow":
        from vitreous.backend import keep_tensorflow_out

        keep_tensorflow_out()


def pytest_unconfigure():
    """Removes the folders that this process made."""
    for folder in filter(None, (_COMPILED, _KEPT)):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def quick_compile():
    """Has jax compile in half the time, for tests of models that are compiled once and run a few times."""
    if os.environ["KERAS_BACKEND"] != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def runs_without_pictures():
    """Leaves out what takes most of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trainer.draw_augmentation", "trainer.draw_run", "pretrainer.draw_run", "pretrainer._draw"):
            patch.setattr(f"vitreous.training.{name}", lambda *_, **__: None)
        patch.setattr("vitreous.training.results._draw_answers", lambda *_, **__: None)
        yield


@pytest.fixture
def threads_side_by_side(monkeypatch):
    """Lets the loader use as many threads for the small images of a test as it would for large ones."""
    monkeypatch.setattr("vitreous.data.pipeline._SMALL_PIXELS", 0)


@pytest.fixture
def call(capsys):
    """Calls the command line in this process; returns (exit code, standard output, standard error)."""
    from vitreous.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run
