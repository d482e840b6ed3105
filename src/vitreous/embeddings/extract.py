"""From images to vectors, batch by batch: in memory, or to a file while memory stays flat."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from vitreous import __version__
from vitreous.data import DataConfig, Dataset, ImageSet, Loader, load_images
from vitreous.data.sources import change_config, make_dataset, read_source, source_path
from vitreous.data.sources.built_in import is_built_in
from vitreous.data.sources.contents import Contents, join_images
from vitreous.embeddings.backbone import Backbone, Pooling, load_backbone
from vitreous.embeddings.files import FORMAT, Embeddings, Label, check_suffix, open_writer
from vitreous.errors import DataError, ImageError, WeightsError
from vitreous.spec import check
from vitreous.training import Run

FloatType: TypeAlias = Literal["float32", "float16"]
OnProgress: TypeAlias = Callable[[int, int], None]
OnError: TypeAlias = Callable[[str, str], None]
_BATCH = 64
OPTIONAL_COLUMNS = {"split_column", "group_column"}
"""What data may lack of the columns that were named when a run was trained on other data."""


@dataclass(frozen=True, eq=False)
class Source:
    """Images to embed, and what is known of each.

    Args:
        images: The images, all splits one after another.
        labels: Class of each image (several: a tuple); None where labels are not known.
        splits: Split of each image: train, val or test; all where the data has none.
        record: How to find the images again: what `data` was, and how it was read.
        broken: Images that cannot be read, as far as their headers show it, and why.
        notes: Facts worth printing, a line each.
    """

    images: ImageSet
    labels: list[Label] | None
    splits: list[str]
    record: dict[str, Any]
    broken: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Labelled:
    """A labelled source as it was read.

    Args:
        contents: What it holds.
        config: Columns and splits.
        seed: Decides the splits that it does not give.
        of_run: The data set with the splits of a run's training, where it is what that run was trained on.
        notes: Facts worth printing, a line each.
    """

    contents: Contents
    config: DataConfig
    seed: int
    of_run: Dataset | None = None
    notes: tuple[str, ...] = ()

    def get_dataset(self, data: str | Path) -> Dataset:
        """Returns the data set in splits, those of the run's training where there are some."""
        return self.of_run or make_dataset(data, self.contents, self.config, seed=self.seed)


def read_labelled(
    data: str | Path, run: Run | None, *, seed: int | None, changes: Mapping[str, Any], min_classes: int
) -> Labelled:
    """Reads a labelled source; if a run was trained on it, with the columns and the splits of that training.

    Args:
        data: As for `load_dataset`.
        run: The run that the backbone comes from.
        seed: Decides the splits that the data does not give. Default: the run's for its own data, else 0.
        changes: Fields of `DataConfig` that were asked for.
        min_classes: As for `read_source`.

    Raises:
        DataError: If the source cannot be used.
        MissingPathError: If there is none.
    """
    changes = {name: value for name, value in changes.items() if value is not None}

    def read(options: Mapping[str, Any], default_seed: int) -> Labelled:
        config = change_config(None, {**options, **changes})
        contents = read_source(data, config, min_classes=min_classes, may_lack=OPTIONAL_COLUMNS - set(changes))
        return Labelled(contents, config, default_seed if seed is None else seed)

    if run is None:
        return read({}, 0)
    record = run.config["data"]
    options = dict(record["split"])
    run_seed = options.pop("seed", 0)
    is_there = run.is_trained_on(data)
    try:
        found = read(options, run_seed)
        dataset = make_dataset(data, found.contents, found.config, seed=found.seed)
    except DataError:
        if is_there:
            raise
        return read({}, 0)  # other data, without the columns of the run's
    if dataset.fingerprint == record["fingerprint"] or (is_there and not run.class_names):
        note = "splits are those of the run's training: it has not seen the test images"
        return Labelled(found.contents, found.config, found.seed, dataset, (note,))
    if not is_there:
        return read({}, 0)
    note = (
        "WARNING: the data, or how it is split, has changed since the run was trained on it: the run may have seen "
        "test images"
    )
    return Labelled(found.contents, found.config, found.seed, notes=(note,))


def find_images(data: Any, run: Run | None, changes: Mapping[str, Any]) -> Source:
    """Finds images to embed, with labels and splits where they are known.

    Args:
        data: A source as for `load_dataset` or `load_images`; a list of them (without labels); or a `Dataset`.
        run: The run that the backbone comes from.
        changes: Fields of `DataConfig`.

    Raises:
        MissingPathError: If a path does not exist.
        DataError: If there are no images; if columns were named that the data has not.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    record: dict[str, Any]
    if isinstance(data, Dataset):
        root = None if data.root is None else str(source_path(data.root))
        record = {"data": root or data.name, "root": root, "is_labelled": True}
        return _labelled_source(data.splits, data.class_names, record, data.broken)
    config = change_config(None, changes)
    record = {"options": {k: v for k, v in config.to_dict().items() if v is not None}}
    if isinstance(data, str | Path):
        where = str(data) if is_built_in(data) else str(source_path(data))
        record |= {"data": where, "root": where, "is_labelled": True}
        try:
            found = read_labelled(data, run, seed=None, changes=changes, min_classes=1)
        except DataError as error:
            if changes:
                raise
            reason = str(error)
        else:
            record["options"] = {k: v for k, v in found.config.to_dict().items() if v is not None}
            splits = found.contents.splits if found.of_run is None else found.of_run.splits
            contents = found.contents
            return _labelled_source(splits, contents.class_names, record, contents.broken, found.notes)
        note = f"without labels; as a labelled set: {reason}"
        data = [data]
    else:
        note = ""
    paths = [Path(each).absolute() if os.path.exists(each) else each for each in data]
    images = load_images(paths, config)
    record |= {"data": [str(path) for path in paths], "root": None, "is_labelled": False}
    return Source(images, None, ["all"] * len(images), record, notes=(note,) if note else ())


def _labelled_source(
    splits: Mapping[str, ImageSet],
    class_names: Sequence[str],
    record: dict[str, Any],
    broken: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> Source:
    images = join_images(list(splits.values()))
    labels: list[Label]
    if images.is_multi_label:
        labels = [tuple(class_names[k] for k in np.flatnonzero(row).tolist()) for row in images.labels]
    else:
        labels = [class_names[label] for label in images.labels]
    where = [split for split, part in splits.items() for _ in range(len(part))]
    return Source(images, labels, where, record, broken, notes)


def iterate_features(
    backbone: Backbone,
    images: ImageSet,
    *,
    block: int | None = None,
    pooling: Pooling = "head",
    batch_size: int = _BATCH,
    on_progress: OnProgress | None = None,
    on_error: OnError | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields, batch by batch and in order, the features of the images that can be read.

    Args:
        backbone: The model.
        images: What to read.
        block: As for `Backbone.create_feature_function`.
        pooling: As for `Backbone.create_feature_function`.
        batch_size: B, images computed at once.
        on_progress: Called with the images done and the images in all.
        on_error: Called with the name of an image that cannot be read, and why; it is left out. Default: it ends it.

    Yields:
        Positions int64 (b,) in `images`, features float32 (b, D) or (b, N, D), and the pixels uint8 (b, H, W, C) that
        they are of; all valid until the next batch.

    Raises:
        ImageError: If an image cannot be read, without `on_error`.
        WeightsError: If the model computes numbers that are not finite.
    """
    compute = backbone.create_feature_function(block=block, pooling=pooling)
    loader = Loader(images, backbone.input_spec, batch_size=min(batch_size, len(images)), cache_bytes=0)
    num_told = num_done = 0
    for batch in loader.epoch(0):
        for name, reason in list(loader.broken.items())[num_told:]:
            num_told += 1
            if on_error is None:
                raise ImageError(name, reason)
            on_error(name, reason)
        if batch.mask.any():
            features = compute(batch.images)[batch.mask]
            indices = batch.indices[batch.mask]
            is_finite = np.isfinite(features).reshape(len(features), -1).all(axis=1)
            if not is_finite.all():
                raise WeightsError(
                    f"Cannot embed with {backbone.source}. Expected finite features. Received: NaN or infinity for "
                    f"{images.names[indices[is_finite.argmin()]]}. The weights are damaged: get or train them again."
                )
            yield indices, features, batch.images[batch.mask]
        num_done = min(num_done + loader.batch_size, len(images))
        if on_progress:
            on_progress(num_done, len(images))


def embed(
    backbone: str | Path | Run | Backbone,
    data: str | Path | Dataset | Iterable[str | Path],
    *,
    block: int | None = None,
    pooling: Pooling = "head",
    dtype: FloatType = "float32",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = _BATCH,
    on_progress: OnProgress | None = None,
    on_error: OnError | None = None,
    on_note: Callable[[str], None] | None = None,
    **changes: Any,
) -> Embeddings:
    """Computes a vector for each image (or for each of its patches), in memory.

    Args:
        backbone: As for `load_backbone`.
        data: Images, labelled or not: a source as for `load_dataset` or `load_images`, several of them, or a `Dataset`.
        block: Index of the block to read, negative from the end. Default: the last one.
        pooling: `"head"` (what the head reads), `"class"`, `"mean"` or `"patches"` (a vector for each patch).
        dtype: `"float32"` or `"float16"`.
        image_size: (H, W) in pixels, or one number, that the model is adapted to. Default: the backbone's.
        batch_size: B, images computed at once, at least 1.
        on_progress: Called with the images done and the images in all.
        on_error: Called with the name of an image that cannot be read, and why; it is left out. Default: it ends it.
        on_note: Called with each line worth telling.
        **changes: Fields of `DataConfig` (`label_column="species"`).

    Returns:
        `Embeddings`, in the order of the data.

    Raises:
        MissingPathError: If a path does not exist.
        DataError: If there are no images, none can be read, or a feature is too large for float16.
        ImageError: If an image cannot be read, without `on_error`.
        ConfigError: If an option cannot work.
        WeightsError: If the model computes numbers that are not finite.

    Example:

    ```python
    embeddings = vitreous.embed("runs/photos-1", "photos/")
    embeddings.vectors.shape  # (N, D)
    ```
    """
    names: list[str] = []
    labels: list[Label] = []
    splits: list[str] = []
    vectors: list[np.ndarray] = []
    work = _start(backbone, data, block, pooling, dtype, image_size, batch_size, on_note, changes)
    for some_names, some_labels, some_splits, some_vectors in work.run(on_progress, on_error):
        names += some_names
        labels += some_labels or []
        splits += some_splits
        vectors.append(some_vectors)
    has_labels = work.source.labels is not None
    return Embeddings(names, np.concatenate(vectors), labels if has_labels else None, splits, work.metadata)


def embed_to_file(
    backbone: str | Path | Run | Backbone,
    data: str | Path | Dataset | Iterable[str | Path],
    out: str | Path,
    *,
    block: int | None = None,
    pooling: Pooling = "head",
    dtype: FloatType = "float32",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = _BATCH,
    on_progress: OnProgress | None = None,
    on_error: OnError | None = None,
    on_note: Callable[[str], None] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Computes a vector for each image (or for each of its patches) and writes them as they come: memory stays flat.

    Args:
        backbone: As for `load_backbone`.
        data: As for `embed`.
        out: File to write: .parquet (columns image, label, split, embedding; in row groups) or .npz. It appears whole.
        block: As for `embed`.
        pooling: As for `embed`.
        dtype: As for `embed`.
        image_size: As for `embed`.
        batch_size: As for `embed`.
        on_progress: As for `embed`.
        on_error: As for `embed`.
        on_note: As for `embed`.
        **changes: As for `embed`.

    Returns:
        What `Embeddings.metadata` of the file is, and `num_images`, how many were written.

    Raises:
        ConfigError: If the suffix of `out` is another one.
        MissingDependencyError: If pyarrow is needed and not installed.
        VitreousError: As for `embed`.
    """
    check_suffix(out)
    work = _start(backbone, data, block, pooling, dtype, image_size, batch_size, on_note, changes)
    count = 0
    with open_writer(out, work.metadata, has_labels=work.source.labels is not None) as write:
        for part in work.run(on_progress, on_error):
            write(*part)
            count += len(part[0])
    return {**work.metadata, "num_images": count}


@dataclass(frozen=True, eq=False)
class _Work:
    """An embedding that is ready to run."""

    backbone: Backbone
    source: Source
    block: int | None
    pooling: Pooling
    dtype: FloatType
    batch_size: int
    metadata: dict[str, Any]

    def run(
        self, on_progress: OnProgress | None, on_error: OnError | None
    ) -> Iterator[tuple[list[str], list[Label] | None, list[str], np.ndarray]]:
        """Yields names, labels, splits and vectors of some images at a time."""
        source = self.source
        for name, reason in source.broken.items():
            if on_error is None:
                raise ImageError(name, reason)
            on_error(name, reason)
        has_any = False
        for indices, features, _ in iterate_features(
            self.backbone,
            source.images,
            block=self.block,
            pooling=self.pooling,
            batch_size=self.batch_size,
            on_progress=on_progress,
            on_error=on_error,
        ):
            if self.dtype == "float16" and (largest := float(np.abs(features).max())) > np.finfo("float16").max:
                raise DataError(
                    "Cannot write the embeddings as float16. Expected features up to 65504. "
                    f"Received: {largest:.6g}. Pass dtype float32."
                )
            labels = None if source.labels is None else [source.labels[i] for i in indices]
            has_any = True
            yield (
                [source.images.names[i] for i in indices],
                labels,
                [source.splits[i] for i in indices],
                features.astype(self.dtype, copy=False),
            )
        if not has_any:
            raise DataError(
                "Cannot embed. Expected at least one image that can be read. "
                f"Received: {len(source.images)} that cannot. Look at them: vitreous inspect DATA."
            )


def _start(
    source: str | Path | Run | Backbone,
    data: Any,
    block: int | None,
    pooling: Pooling,
    dtype: FloatType,
    image_size: int | tuple[int, int] | None,
    batch_size: int,
    on_note: Callable[[str], None] | None,
    changes: Mapping[str, Any],
) -> _Work:
    check(batch_size >= 1, "Cannot use batch_size.", "1 or more", f"batch_size={batch_size}", "Pass 1 or more.")
    check(
        dtype in ("float32", "float16"),
        "Cannot use dtype.",
        "'float32' or 'float16'",
        f"dtype={dtype!r}",
        "Pass one of them.",
    )
    backbone = load_backbone(source, image_size=image_size)
    found = find_images(data, backbone.run, changes)
    for note in (*backbone.notes, *found.notes):
        if on_note:
            on_note(note)
    path = Path(backbone.source)
    metadata = {
        "format": FORMAT,
        "vitreous": __version__,
        "backbone": str(path.resolve()) if path.exists() else backbone.source,
        "model": backbone.model.name,
        "has_random_weights": backbone.is_random,
        "fingerprint": backbone.fingerprint,
        "input": backbone.input_spec.to_dict(),
        "block": block,
        "pooling": pooling,
        "shape": list(backbone.get_feature_shape(pooling)),
        "grid_size": list(backbone.model.config.grid_size),
        "dtype": dtype,
        "is_multi_label": found.images.is_multi_label,
        "source": found.record,
    }
    return _Work(backbone, found, block, pooling, dtype, batch_size, metadata)
