"""Sources on other machines, through fsspec: s3://, https://, gs:// and whatever else it knows."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitreous.data.images import check_image_header
from vitreous.data.sources.cache import cache_folder
from vitreous.data.sources.contents import source_error
from vitreous.data.sources.folders import ListedTree
from vitreous.errors import DataError, MissingDependencyError, MissingPathError
from vitreous.files import replacing

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PAUSES_SECONDS = (0.5, 2.0)  # before an image is asked for again


def is_remote(data: str | Path) -> bool:
    """Whether a source is a URL.

    Example:
        >>> is_remote("s3://bucket/photos"), is_remote("photos")
        (True, False)
    """
    return isinstance(data, str) and bool(_URL.match(data))


def open_file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path on it.

    Raises:
        MissingDependencyError: If fsspec, or the package that it needs for this kind of URL, is not installed.
        DataError: If there is no such kind of URL, or its package is none of those that `vitreous[remote]` installs.
    """
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError("fsspec", "remote", f"The source {url}") from error
    try:
        file_system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        for package in ("s3fs", "aiohttp"):
            if package in str(error):
                raise MissingDependencyError(package, "remote", f"The source {url}") from error
        raise source_error(url, "the package for this kind of URL", str(error), "Install it with pip.") from error
    except ValueError as error:
        raise source_error(url, "a URL such as s3://, gs:// or https://", str(error), "Check the URL.") from error
    return file_system, path


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raises what goes wrong with a URL as an error of vitreous.

    Raises:
        MissingPathError: If there is nothing.
        DataError: If access is refused, or no answer comes.
    """
    try:
        yield
    except (DataError, MissingPathError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and re.search("Connect|Timeout", type(cause).__name__):
            raise _no_answer(url, cause) from error  # fsspec says "not found" of a server that it cannot reach
        raise MissingPathError(
            f"Cannot read {url}. Expected a file, or a folder with files, that exists. Received: {_reason(error)}. "
            "Check the URL, beginning with its bucket or host."
        ) from error
    except Exception as error:  # each kind of file system has its own errors
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise DataError(
                f"Cannot read {url}. Expected access to it. Received: {_reason(error)}. Give credentials where the "
                "tools of this service look for them (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile), "
                "or set FSSPEC_S3_ANON=true for a public bucket."
            ) from error
        raise _no_answer(url, error) from error


def _no_answer(url: str, error: Exception) -> DataError:
    return DataError(
        f"Cannot read {url}. Expected an answer. Received: {_reason(error)}. Check the URL and the network."
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fetch(url: str) -> Path:
    """Returns a copy of a remote file on this machine, in its present state; it is fetched once.

    The copy keeps the file's name and that of its folder.

    Raises:
        MissingPathError: If there is no such file.
        DataError: If it cannot be fetched.
    """
    file_system, path = open_file_system(url)
    with translated(url):
        file_system.invalidate_cache()
        state = json.dumps([url, file_system.info(path)], sort_keys=True, default=str)
        key = hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        parent, name = (["", *re.sub(r"[?#].*", "", url).rstrip("/").split("/")])[-2:]
        copy = cache_folder() / "remote" / key / (parent or "root") / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                with replacing(copy) as temporary:
                    file_system.get_file(path, str(temporary))
            except BaseException:
                if not copy.exists():
                    shutil.rmtree(cache_folder() / "remote" / key, ignore_errors=True)
                raise
    return copy


def list_files(url: str) -> dict[str, int]:
    """Lists all files below a URL: path relative to it to bytes (0 where the server does not say).

    Raises:
        MissingPathError: If there are none.
        DataError: If they cannot be listed.
    """
    if url.startswith("http") and not url.endswith("/"):
        url += "/"
    file_system, root = open_file_system(url)
    with translated(url):
        file_system.invalidate_cache()
        found = file_system.find(root, detail=True)
        root = root.rstrip("/") + "/"
        files = {path[len(root) :]: int(info.get("size") or 0) for path, info in found.items() if path.startswith(root)}
        if not files:
            raise FileNotFoundError("no files")
    return files


def match_urls(pattern: str) -> list[str]:
    """Returns the URLs that a pattern with * stands for, in order.

    Raises:
        MissingPathError: If there are none.
    """
    if "*" not in pattern:
        return [pattern]
    file_system, path = open_file_system(pattern)
    with translated(pattern):
        file_system.invalidate_cache()
        found = sorted(file_system.glob(path))
        if not found:
            raise FileNotFoundError("no files of this pattern")
    return [file_system.unstrip_protocol(each) for each in found]


def tree_of_url(url: str, files: dict[str, int]) -> ListedTree:
    """Returns the files below a URL as a tree."""
    note = f"images at {url} are fetched in training; a broken one is found when it is read"
    return ListedTree(
        f"the folder {url}", url, list(files), list(files.values()), RemoteStore(url), notes=[note], keeps_root=True
    )


class RemoteStore:
    """Files below a URL, or named by URLs of their own; each is fetched when it is read.

    Args:
        root: URL, or folder on this machine, that names count from.
    """

    def __init__(self, root: str | Path = ""):
        self.root = str(root).rstrip("/")

    def _locate(self, name: str) -> str:
        return (
            name
            if is_remote(name)
            else f"{self.root}/{name}"
            if is_remote(self.root)
            else os.path.join(self.root, name)
        )

    def path(self, row: int, name: str) -> Path | None:
        """Returns the file of an image on this machine, or None if it is remote."""
        place = self._locate(name)
        return None if is_remote(place) else Path(place)

    def check(self, row: int, name: str) -> str | None:
        """Returns what is wrong with the header of a file on this machine; None for remote ones: none is fetched."""
        path = self.path(row, name)
        return None if path is None else check_image_header(path)

    def read(self, row: int, name: str) -> Path | bytes:
        """Returns a file, or the bytes of a remote one. A server that does not answer is asked three times.

        Raises:
            MissingPathError: If it is not there.
            DataError: If it cannot be fetched. This is no fault of the image, so that training stops.
        """
        url = self._locate(name)
        if not is_remote(url):
            return Path(url)
        file_system, path = open_file_system(url)
        for pause in _PAUSES_SECONDS:
            try:
                return file_system.cat_file(path)
            except (FileNotFoundError, PermissionError):
                break
            except Exception:  # each kind of file system has its own errors; the last try's is passed on
                time.sleep(pause)
        with translated(url):
            return file_system.cat_file(path)
