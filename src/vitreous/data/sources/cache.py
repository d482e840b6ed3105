"""Files that are made once from a source that cannot be read at random, and found again."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from vitreous.files import replacing


def cache_folder() -> Path:
    """Returns their folder: `VITREOUS_CACHE`, else `vitreous` in `XDG_CACHE_HOME`, else ~/.cache/vitreous."""
    if folder := os.environ.get("VITREOUS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitreous"


def cached_file(source: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """Returns the file made from `source` in its present state; makes it where there is none.

    Args:
        source: The file that it is made from.
        suffix: How its name ends.
        write: Writes it at a path. What it raises is passed on, and leaves nothing behind.
    """
    status = source.stat()
    state = f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    name = hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    path = cache_folder() / "files" / f"{source.name.split('.')[0]}-{name}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write(temporary)
    return path
