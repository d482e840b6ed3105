"""Images inside a zip or a tar, read where they lie; nothing is unpacked but a tar that is compressed as a whole."""

import bz2
import functools
import gzip
import lzma
import os
import posixpath
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vitreous.data.images import HEAD_BYTES, check_image_header, is_plain_header
from vitreous.data.sources.cache import cached_file
from vitreous.data.sources.contents import source_error
from vitreous.data.sources.folders import ListedTree
from vitreous.data.stores import SpanStore, read_span
from vitreous.errors import ImageError

_COMPRESSED = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
ARCHIVE_SUFFIXES = (".zip", ".tar", *_COMPRESSED)
"""Suffixes of the files that are archives."""

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def archive_suffix(path: str | Path) -> str | None:
    """Returns how the name of an archive ends; None if the file is none by its name.

    Example:
        >>> archive_suffix("photos.TAR.gz"), archive_suffix("photos.csv")
        ('.tar.gz', None)
    """
    return next((suffix for suffix in ARCHIVE_SUFFIXES if str(path).lower().endswith(suffix)), None)


@dataclass(frozen=True)
class TarIndex:
    """Where the files of a tar begin.

    Args:
        path: The tar.
        names: Path of each file in it.
        offsets: First byte of each.
        sizes: Bytes of each.
        notes: Facts worth printing.
        passed_over: How many files are not among them, by why not, in words.
    """

    path: Path
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    notes: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)


_OUTSIDE = "with names that lead out of the archive"


def _member_name(name: str) -> str | None:
    """Returns the path of a file in an archive from its root; None if it leads out of it.

    Example:
        >>> [_member_name(name) for name in ("./a//b.png", "/a/b.png", "../b.png", "C:/b.png")]
        ['a/b.png', 'a/b.png', None, None]
    """
    name = posixpath.normpath(name).lstrip("/")
    return None if name in ("", ".", "..") or re.match(r"\.\./|[A-Za-z]:/", name) else name


def index_tar(path: Path) -> TarIndex:
    """Lists the files of a tar, by reading the headers in it.

    A hard link is the file that it leads to. A tar that is compressed as a whole cannot be read at random; it is
    decompressed once, into `cache_folder()`.

    Raises:
        DataError: If it is no tar, or is cut short.
    """
    what = f"the archive {path}"
    notes: tuple[str, ...] = ()
    suffix = archive_suffix(path)
    try:
        if suffix in _COMPRESSED:
            path = cached_file(path, ".tar", functools.partial(_decompress, _COMPRESSED[suffix], path))
            notes = (f"the archive is compressed as a whole; decompressed, it is kept as {path}",)
        with tarfile.open(path, "r:") as file:
            places, passed_over = _place_members(file)
        end = max((offset + size for _, offset, size in places), default=0)
        if end > os.path.getsize(path):
            raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise source_error(what, "a whole tar", reason, "Pack it, or fetch it, anew.") from error
    names, offsets, sizes = zip(*places, strict=True) if places else ((), (), ())
    return TarIndex(path, list(names), list(offsets), list(sizes), notes, passed_over)


def _place_members(file: tarfile.TarFile) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Returns (name, first byte, bytes) of the files in a tar, and how many are passed over, by why."""
    places: dict[str, tuple[int, int]] = {}
    found, passed_over = [], Counter[str]()
    for member in file:
        if not (member.isreg() or member.islnk() or member.issym()):
            continue
        name = _member_name(member.name)
        target = _member_name(member.linkname) if member.islnk() else None
        if name is None:
            passed_over[_OUTSIDE] += 1
        elif member.issym():
            passed_over["symbolic links"] += 1
        elif member.islnk() and target not in places:
            passed_over["hard links to nothing"] += 1
        else:
            places[name] = places[target] if target is not None else (member.offset_data, member.size)
            found.append((name, *places[name]))
    return found, dict(passed_over)


def _decompress(opener: Any, source: Path, target: Path) -> None:
    with opener(source, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(cast(IO[bytes], packed), plain, 1 << 20)


def tree_of_tar(index: TarIndex, source: str | Path) -> ListedTree:
    """Returns the files of a tar as a tree."""
    store = SpanStore([index.path], np.zeros(len(index.names), int), index.offsets, index.sizes)
    return ListedTree(
        f"the archive {source}",
        str(source),
        index.names,
        index.sizes,
        store,
        notes=index.notes,
        passed_over=index.passed_over,
    )


def tree_of_zip(path: Path, source: str | Path) -> ListedTree:
    """Returns the files of a zip as a tree.

    Raises:
        DataError: If it is no zip, or its files are encrypted or compressed in a rare way.
    """
    what = f"the archive {source}"
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise source_error(what, "a whole zip", str(error), "Pack it, or fetch it, anew.") from error
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
            raise source_error(
                what,
                "a zip of files that are stored or deflated",
                f"{member.filename}, {kind}",
                "Unpack it, and pass the folder.",
            )
    found = [(_member_name(member.filename.replace("\\", "/")), member) for member in members]
    inside = [(name, member) for name, member in found if name is not None]
    names, sizes = [name for name, _ in inside], [member.file_size for _, member in inside]
    passed_over = {_OUTSIDE: len(found) - len(inside)} if len(inside) < len(found) else {}
    store = ZipStore(path, [member for _, member in inside])
    return ListedTree(what, str(source), names, sizes, store, passed_over=passed_over)


class ZipStore:
    """Files in a zip. Each read opens it anew, so that several threads may read at once.

    Args:
        path: The zip.
        members: Its files, stored or deflated; row n is member n.
    """

    def __init__(self, path: Path, members: list[zipfile.ZipInfo]):
        self.zip_path = path
        fields = [(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC) for m in members]
        self.members = np.array(fields, "int64").reshape(-1, 5)

    def path(self, row: int, name: str) -> None:
        """Returns None: the image has no file of its own."""
        return None

    def read(self, row: int, name: str) -> bytes:
        """Returns the bytes of a file.

        Raises:
            ImageError: If they are not those that were packed.
        """
        data = self._read(row, name)
        if zlib.crc32(data) != self.members[row, 4]:
            raise ImageError(name, f"damaged in {self.zip_path}: its checksum is another one")
        return data

    def check(self, row: int, name: str) -> str | None:
        """Returns what is wrong with the first bytes of a file, or None."""
        if is_plain_header(self._read(row, name, HEAD_BYTES)):
            return None
        return check_image_header(self.read(row, name))

    def _read(self, row: int, name: str, most: int | None = None) -> bytes:
        """Returns the bytes of a file, or about the first `most` of them."""
        start, packed_size, size, method, _ = map(int, self.members[row])
        header = _LOCAL_HEADER.unpack(read_span(self.zip_path, start, _LOCAL_HEADER.size, name))
        if header[0] != b"PK\x03\x04":
            raise ImageError(name, f"damaged in {self.zip_path}: no file begins where it should")
        start += _LOCAL_HEADER.size + header[-2] + header[-1]
        packed = read_span(self.zip_path, start, packed_size if most is None else min(packed_size, most), name)
        if method == zipfile.ZIP_STORED:
            return packed
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size if most is None else most)
        except zlib.error as error:
            raise ImageError(name, f"damaged in {self.zip_path}: {error}") from error
