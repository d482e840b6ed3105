"""WebDataset shards: tars in which files of one name, but for what follows its first dot, are one example.

Source: https://github.com/webdataset/webdataset, "The WebDataset Format". Difference: members are read at random, by
their offset; nothing is streamed.
"""

import glob
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreous.data.images import IMAGE_SUFFIXES
from vitreous.data.sources.archives import TarIndex, index_tar
from vitreous.data.sources.columns import Rows, hint_groups
from vitreous.data.sources.contents import SPLIT_NAMES, shorten, source_error
from vitreous.data.stores import SpanStore, read_span
from vitreous.errors import MissingPathError
from vitreous.spec import DataConfig

_TEXTS = ("cls", "cls2", "class", "label", "labels", "index", "inx", "id", "txt", "text")
_MOST_BYTES = 1 << 16  # of a file that is a column
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]+)\}")


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern of the shell stands for.

    Example:
        >>> expand_braces("s-{08..10}.tar"), expand_braces("{a,b}.tar")
        (['s-08.tar', 's-09.tar', 's-10.tar'], ['a.tar', 'b.tar'])
    """
    if match := _RANGE.search(pattern):
        first, last = match.groups()
        width = len(first) if first.startswith("0") else 0
        items = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    elif match := _LIST.search(pattern):
        items = match[1].split(",")
    else:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for item in items for name in expand_braces(f"{before}{item}{after}")]


def is_pattern(data: str | Path) -> bool:
    """Whether the name of a source stands for several files."""
    text = str(data)
    signs = "*" if "://" in text else "*?"  # in a URL, the question mark begins a query
    return bool(_RANGE.search(text) or _LIST.search(text) or set(signs) & set(text)) and not os.path.exists(text)


def match_files(pattern: str) -> list[Path]:
    """Returns the files that a pattern stands for, in order.

    Raises:
        MissingPathError: If there are none, or one of those that braces name is missing.
    """
    names = list(itertools.chain.from_iterable(_glob(name) for name in expand_braces(pattern)))
    missing = [name for name in names if not os.path.isfile(name)]
    if missing or not names:
        received = f"{len(missing)} of {len(names)} missing: {shorten(missing, 3)}" if names else "none"
        raise MissingPathError(
            f"Cannot load the shards {pattern}. Expected files that exist. Received: {received}. Check the pattern."
        )
    return [Path(name) for name in names]


def _glob(name: str) -> list[str]:
    return sorted(glob.glob(name)) if set("*?") & set(name) else [name]


def shards_in(folder: Path) -> list[Path]:
    """Returns the tars that a folder consists of, if it does: in itself, or in each of its folders."""
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    tars = [Path(entry.path) for entry in shown if entry.name.endswith(".tar") and entry.is_file()]
    folders = [entry.path for entry in shown if entry.is_dir()]
    if tars or not folders:
        return tars if not folders else []
    for inner in folders:
        with os.scandir(inner) as entries:
            found = sorted(Path(entry.path) for entry in entries if entry.name.endswith(".tar") and entry.is_file())
        if not found:
            return []
        tars += found
    return tars


def is_shard(index: TarIndex) -> bool:
    """Whether a tar is a shard, and not an archive of class folders: its images have labels beside them."""
    members = [_parts(name) for name in index.names]
    images = {key for key, kind in members if f".{kind}" in IMAGE_SUFFIXES}
    if any(kind == "cls" and key in images for key, kind in members):
        return True
    has_texts = any(kind in (*_TEXTS, "json") and key in images for key, kind in members)
    return has_texts and len({key.rpartition("/")[0] for key in images}) < 2


def _parts(name: str) -> tuple[str, str]:
    """Returns the key of a member, and its kind: what follows the first dot of its name."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def split_of_shard(path: str | Path) -> str | None:
    """Returns the split that the name of a shard, or of its folder, begins with.

    Example:
        >>> split_of_shard("data/train-000.tar"), split_of_shard("Val/0.tar"), split_of_shard("trains/0.tar")
        ('train', 'val', None)
    """
    for part in reversed(Path(path).parts[-2:]):
        word = re.split(r"[-_.\d]", part.lower())[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def read_shards(
    paths: Sequence[Path], config: DataConfig, *, name: str, source: str, indices: Sequence[TarIndex] | None = None
) -> Rows:
    """Reads the examples in shards.

    Args:
        paths: The tars.
        config: Which member is what: `image_column` and `label_column` name kinds of members (jpg, cls, txt) or keys in
            their JSON.
        name: What to call the data set.
        source: What to call the shards in errors.
        indices: What is in the tars, if that is known.

    Raises:
        DataError: If a file is no tar, there are no images, or nobody can tell which image of an example is meant.
    """
    what = f"the shards {source}"
    texts = {*_TEXTS, *([config.label_column] if config.label_column else [])}
    names: list[str] = []
    files: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    examples: list[dict[str, Any]] = []
    notes: list[str] = []
    tars: list[Path] = []
    num_others = 0
    for number, path in enumerate(paths):
        index = indices[number] if indices is not None else index_tar(path)
        notes += index.notes
        notes += [f"{count} files of {path.name} passed over: {why}" for why, count in index.passed_over.items()]
        tars.append(index.path)
        grouped: dict[str, dict[str, int]] = {}
        for row, member in enumerate(index.names):
            if not member.rpartition("/")[2].startswith("."):
                key, kind = _parts(member)
                grouped.setdefault(key, {})[kind] = row
        for key, members in grouped.items():
            kinds = [kind for kind in members if _is_image(kind, config.image_column)]
            if len(kinds) > 1:
                raise source_error(
                    what,
                    "to know which image of an example is meant",
                    f"{key} with {', '.join(kinds)}",
                    "Name it with image_column (--image-column).",
                )
            if not kinds:
                num_others += 1
                continue
            row = members[kinds[0]]
            names.append(f"{key}.{kinds[0]}")
            files.append(number)
            offsets.append(index.offsets[row])
            sizes.append(index.sizes[row])
            examples.append(_columns(index, members, texts))
    if not names:
        raise source_error(what, "images", f"{num_others} examples without one", "Name shards of images.")
    if num_others:
        notes.append(f"{num_others} examples without an image are left out")
    if len(set(names)) < len(names):
        names = [f"{paths[number].stem}/{name}" for number, name in zip(files, names, strict=True)]
    columns = {
        column: [each.get(column) for each in examples] for column in dict.fromkeys(c for e in examples for c in e)
    }
    splits = [split_of_shard(path) for path in paths]
    has_splits = None not in splits and "train" in splits
    return Rows(
        what=what,
        name=name,
        names=names,
        store=SpanStore(tars, files, offsets, sizes),
        columns=columns,
        file_sizes=sizes,
        splits=[str(splits[number]) for number in files] if has_splits else None,
        splits_given_by="the names of the shards",
        notes=notes + hint_groups(columns, config),
    )


def _is_image(kind: str, wanted: str | None) -> bool:
    return kind == wanted.lower() if wanted is not None else f".{kind}" in IMAGE_SUFFIXES


def _columns(index: TarIndex, members: dict[str, int], texts: set[str]) -> dict[str, Any]:
    """Returns what is said of one example: its small text members, and the keys of its JSON."""
    columns: dict[str, Any] = {}
    for kind, row in members.items():
        if (kind == "json" or kind in texts) and index.sizes[row] <= _MOST_BYTES:
            data = read_span(index.path, index.offsets[row], index.sizes[row], index.names[row])
            if kind != "json":
                columns[kind] = data.decode("utf-8", "replace").strip()
                continue
            try:
                values = json.loads(data)
            except ValueError as error:
                raise source_error(
                    f"the shard {index.path}", "JSON", f"{index.names[row]}: {error}", "Mend it."
                ) from error
            if isinstance(values, dict):
                columns = {**values, **columns}
    return columns
