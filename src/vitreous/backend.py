"""Which Keras backend and precision to compute with: looked up without importing any of them."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Literal

from vitreous.errors import ConfigError, MissingDependencyError

BACKENDS = ("jax", "torch", "tensorflow")
Precision = Literal["auto", "float32", "bfloat16"]

_default: tuple[str, str] | None = None  # what `select_backend()` chose by itself, and why


def count_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_available_bytes() -> int | None:
    """Returns the memory that programs may still take, within the limit of this container; None where Linux's files do
    not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a limit of "max" is none
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text())
        found.append(max(limit - int((folder / "memory.current").read_text()), 0))
    return min(found, default=None)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that programs can open."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def uses_gpu(backend: str) -> bool:
    """Whether there is a GPU and the installed backend is built for it."""
    if not has_gpu() or not is_installed(backend):
        return False
    if backend == "jax":
        return any(is_installed(f"jax_cuda{version}_plugin") for version in (12, 13))
    return backend == "tensorflow" or "+cpu" not in importlib.metadata.version(backend)


def has_fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware (x86: AVX-512 BF16 or AMX; Arm: bf16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().replace("\t", " ").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def is_installed(backend: str) -> bool:
    """Whether the backend's package can be imported."""
    return importlib.util.find_spec(backend) is not None


def select_backend(requested: str | None = None) -> tuple[str, str]:
    """Settles the Keras backend of this process; call it before anything imports Keras.

    Args:
        requested: `"jax"`, `"torch"` or `"tensorflow"`. Default: the environment variable `KERAS_BACKEND`, and
            without it the fastest installed one for this machine's hardware.

    Returns:
        The backend and, in a few words, why.

    Raises:
        ConfigError: If the name is no backend, or Keras already runs on another one.
        MissingDependencyError: If the backend is not installed.
    """
    backend, reason = _choose(requested)
    if backend not in BACKENDS:
        raise ConfigError(
            f"Cannot use the backend. Expected one of {BACKENDS}. Received: backend={backend!r}. Pass one of them."
        )
    if not is_installed(backend):
        raise MissingDependencyError(backend, None if backend == "jax" else backend, f"The {backend} backend")
    if "keras" in sys.modules and (running := sys.modules["keras"].backend.backend()) != backend:
        raise ConfigError(
            f"Cannot change the backend. Expected {running!r}, which Keras already runs on. "
            f"Received: backend={backend!r}. Set KERAS_BACKEND before Python starts."
        )
    global _default
    if not requested and "KERAS_BACKEND" not in os.environ:
        _default = (backend, reason)
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up notes are not ours to print
    return backend, reason


def use_compile_cache() -> Path | None:
    """Lets jax keep what it compiles on disk, so that the next start of the same training need not compile again.

    The environment variable `VITREOUS_COMPILE_CACHE` names another folder, or is `off`. A folder that jax has been
    told of already stays. Files are written when something is compiled, not before; nothing is ever deleted.

    Returns:
        The folder, `~/.cache/vitreous/jax` (below `XDG_CACHE_HOME` where that is set); None if it is off.
    """
    import jax

    if current := jax.config.jax_compilation_cache_dir:
        return Path(current)
    chosen = os.environ.get("VITREOUS_COMPILE_CACHE", "")
    if chosen.lower() == "off":
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else caches / "vitreous" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def keep_tensorflow_out() -> None:
    """Tells Keras that there is no TensorFlow, which it else imports to save a model on any backend: log lines, and
    seconds.
    """
    from keras.src.utils import module_utils

    if "tensorflow" not in sys.modules and hasattr(module_utils, "tensorflow"):
        module_utils.tensorflow._available = False


def _choose(requested: str | None) -> tuple[str, str]:
    if requested:
        return requested, "asked for"
    if _default and os.environ.get("KERAS_BACKEND") == _default[0]:
        return _default
    if "keras" in sys.modules:
        return sys.modules["keras"].backend.backend(), "Keras already runs on it"
    if from_environment := os.environ.get("KERAS_BACKEND"):
        return from_environment, "KERAS_BACKEND"
    for backend in ("jax", "torch"):
        if uses_gpu(backend):
            return backend, f"a GPU, and {backend} is built for it"
    if is_installed("torch"):
        return "torch", "the fastest one installed for this CPU"
    if is_installed("jax"):
        return "jax", "the one installed"
    return "tensorflow", "the one installed"


def select_precision(precision: Precision, backend: str) -> str:
    """Returns the Keras dtype policy for training.

    Args:
        precision: `"float32"`, `"bfloat16"` (weights stay float32, products are bfloat16), or `"auto"`: bfloat16 where
            it is faster, that is on a GPU, and on a CPU with bfloat16 instructions under torch or tensorflow.
        backend: The Keras backend.

    Raises:
        ConfigError: If the precision is unknown.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ConfigError(
            "Cannot use the precision. Expected 'auto', 'float32' or 'bfloat16'. "
            f"Received: precision={precision!r}. Pass one of them."
        )
    if precision == "auto":
        is_fast = uses_gpu(backend) or (backend in ("torch", "tensorflow") and has_fast_bfloat16())
        precision = "bfloat16" if is_fast else "float32"
    return "mixed_bfloat16" if precision == "bfloat16" else "float32"
