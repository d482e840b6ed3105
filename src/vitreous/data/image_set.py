"""Images in an order, each with a name and a label, and a data set of them in splits. Pixels come when asked for."""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from vitreous.data.images import decode_image, to_pillow
from vitreous.data.stores import ArrayStore, FolderStore, Store
from vitreous.errors import DataError


@dataclass(frozen=True, eq=False)
class Example:
    """One image and its label.

    Args:
        image: uint8, (H, W, C).
        label: Class, from 0; -1 if it is not known. With several labels an image: bool, (K,).
    """

    image: np.ndarray
    label: int | np.ndarray


class ImageSet(Sequence[Example]):
    """Images in an order, each with a name and a label; the pixels are read when asked for.

    Args:
        names: A name for each image. For files, the path relative to `root`.
        labels: Class of each image, from 0; or bool (N, K), True where class k applies to image n. Default: -1, not
            known.
        root: Folder of the files.
        arrays: The images themselves, uint8 of shape (N, H, W, C), or a list of (H, W, C); `root` is then not used.
        store: Where else the images lie; then neither `root` nor `arrays` is used.
        rows: Row of the store that each image is. Default: in order.
        file_sizes: Bytes of each file, where known.
        columns: What else is known of each image, by name: N values each (a patient, a camera).

    Example:
        >>> import numpy as np
        >>> images = ImageSet(["a", "b"], [0, 1], arrays=np.zeros((2, 8, 8, 1), "uint8"))
        >>> images.load(1, num_channels=3).shape
        (8, 8, 3)
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        root: str | Path | None = None,
        arrays: Sequence[np.ndarray] | np.ndarray | None = None,
        store: Store | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        file_sizes: Sequence[int] | np.ndarray | None = None,
        columns: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    ):
        self.names = list(names)
        labels = np.asarray(np.full(len(self.names), -1) if labels is None else labels)
        self.labels = labels.astype("bool" if labels.ndim == 2 else "int32", copy=False)
        if store is None:
            store = ArrayStore(arrays) if arrays is not None else FolderStore(root or "")
        self.store = store
        self.rows = np.asarray(np.arange(len(self.names)) if rows is None else rows, "int64")
        self.file_sizes = np.asarray(np.zeros(len(self.names)) if file_sizes is None else file_sizes, "int64")
        self.columns = {name: np.asarray(values) for name, values in (columns or {}).items()}
        parts = {
            "names": self.names,
            "labels": self.labels,
            "rows": self.rows,
            "file sizes": self.file_sizes,
            **({"arrays": store.arrays} if isinstance(store, ArrayStore) and rows is None else {}),
            **self.columns,
        }
        if len({len(part) for part in parts.values()}) != 1:
            counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
            raise DataError(
                "Cannot build an ImageSet. Expected as many labels, sizes and arrays as names. "
                f"Received: {counts}. Pass one of each for every image."
            )

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageSet": ...
    def __getitem__(self, index: int | slice) -> "Example | ImageSet":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        index = range(len(self))[index]
        label = self.labels[index]
        return Example(self.load(index), label if self.is_multi_label else int(label))

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images)"

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none; `labels` is then bool (N, K)."""
        return self.labels.ndim == 2

    def path(self, index: int) -> Path | None:
        """Returns the image's own file on this machine, or None if it has none."""
        return self.store.path(int(self.rows[index]), self.names[index])

    def read(self, index: int) -> Path | bytes | np.ndarray:
        """Returns the image as its store has it: a file, the bytes of one, or pixels. Errors as for `load`."""
        return self.store.read(int(self.rows[index]), self.names[index])

    def load(
        self, index: int, num_channels: int = 3, *, min_size: int | None = None, scratch: bytearray | None = None
    ) -> np.ndarray:
        """Reads the pixels of one image.

        Args:
            index: Position, from 0.
            num_channels: 3 (RGB) or 1 (grey).
            min_size: As for `decode_image`.
            scratch: As for `decode_image`.

        Returns:
            uint8, (H, W, num_channels). An image held in memory is returned itself where its channels agree.

        Raises:
            ImageError: If the file is not a whole image.
            MissingPathError: If the file is no longer there.
        """
        source = self.read(index)
        if isinstance(source, np.ndarray):
            if source.shape[-1] == num_channels:
                return source
            if source.shape[-1] == 1:
                return np.repeat(source, num_channels, axis=-1)
            return decode_image(to_pillow(source), num_channels, name=self.names[index])
        return decode_image(source, num_channels, name=self.names[index], min_size=min_size, scratch=scratch)

    def take(self, indices: Iterable[int] | np.ndarray) -> "ImageSet":
        """Returns the images at `indices`, in that order. They share the store."""
        places = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), "int64")
        return ImageSet(
            [self.names[i] for i in places],
            self.labels[places],
            store=self.store,
            rows=self.rows[places],
            file_sizes=self.file_sizes[places],
            columns={name: values[places] for name, values in self.columns.items()},
        )

    def with_labels(self, labels: np.ndarray) -> "ImageSet":
        """Returns the same images under other labels."""
        return ImageSet(
            self.names,
            labels,
            store=self.store,
            rows=self.rows,
            file_sizes=self.file_sizes,
            columns=self.columns,
        )


@dataclass(kw_only=True)
class Dataset:
    """Images in splits, their classes, and what was found on the way.

    Args:
        name: Built-in name, or name of the folder.
        root: The folder, file or URL; None for a built-in set.
        class_names: Name of each class; label k means `class_names[k]`.
        splits: `ImageSet` under `"train"`, and under `"val"` and `"test"` where there are such images.
        broken: Files that look like images by name and are not, with the reason; they are in no split.
        num_ignored: Files that are no images by name, or that lie outside the class folders.
        notes: Facts worth printing, a line each.
    """

    name: str
    root: Path | str | None
    class_names: tuple[str, ...]
    splits: dict[str, ImageSet]
    broken: dict[str, str] = field(default_factory=dict)
    num_ignored: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.splits["train"].is_multi_label

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 in hex over classes, splits, names, labels, file sizes, and pixels held in memory; not over `root`."""
        digest = hashlib.sha256()

        def add(*texts: str) -> None:
            digest.update("\0".join((*texts, "\n")).encode("utf-8", "surrogateescape"))

        add("classes", *self.class_names)
        for split, images in sorted(self.splits.items()):
            add("split", split, str(len(images)), *images.names)
            digest.update(images.labels.astype("<i4").tobytes())
            digest.update(images.file_sizes.astype("<i8").tobytes())
            arrays = images.store.arrays if isinstance(images.store, ArrayStore) else ()
            for array in (arrays[row] for row in images.rows if len(arrays)):
                add("array", str(array.shape))
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
