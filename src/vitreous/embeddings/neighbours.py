"""The nearest images of an image, by the cosine of their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data import ImageSet, decode_image, load_images, resize_image
from vitreous.data.sources import change_config, read_source
from vitreous.embeddings.backbone import Backbone, load_backbone
from vitreous.embeddings.extract import OPTIONAL_COLUMNS
from vitreous.embeddings.files import Embeddings, Label, load_embeddings
from vitreous.errors import ConfigError, DataError, MissingPathError, VitreousError
from vitreous.spec import check


@dataclass(frozen=True)
class Neighbour:
    """An image near another one.

    Args:
        name: Its name in the embeddings.
        similarity: Cosine of the two vectors, in [-1, 1].
        label: Its class (several: a tuple); None where it is not known.
        split: train, val or test; all where the data has none.
        index: Its position in the embeddings.
    """

    name: str
    similarity: float
    label: Label | None
    split: str
    index: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        label = list(self.label) if isinstance(self.label, tuple) else self.label
        return {"image": self.name, "similarity": self.similarity, "label": label, "split": self.split}


def find_neighbours(
    embeddings: str | Path | Embeddings,
    images: Sequence[str | Path],
    *,
    k: int = 9,
    backbone: Backbone | None = None,
) -> list[list[Neighbour]]:
    """Finds the nearest images of some images.

    Args:
        embeddings: Embeddings with one vector an image, or their file.
        images: Names of images in the embeddings (an image is then not its own neighbour), or image files.
        k: Neighbours of each, at least 1; fewer where the embeddings have no more.
        backbone: The model that the embeddings come from. Default: it is loaded again, if an image needs it.

    Returns:
        A list for each image: its neighbours, the nearest first.

    Raises:
        MissingPathError: If an image is neither in the embeddings nor a file.
        ConfigError: If `k` is below 1, or the embeddings are of patches.
        DataError: If the backbone is no longer the one that made the embeddings.
        ImageError: If an image cannot be read.

    Example:

    ```python
    [neighbours] = vitreous.find_neighbours("photos.parquet", ["cat.jpg"])
    print(neighbours[0].name, neighbours[0].similarity)
    ```
    """
    check_count(k)
    bank = embeddings if isinstance(embeddings, Embeddings) else load_embeddings(embeddings)
    if bank.vectors.ndim != 2:
        raise ConfigError(
            "Cannot find neighbours. Expected one vector an image. Received: embeddings of patches. "
            "Make them with another pooling than patches."
        )
    own = locate_queries(bank, images)
    queries = np.zeros((len(images), bank.vectors.shape[1]), "float32")
    is_own = np.array([index is not None for index in own], bool)
    queries[is_own] = bank.vectors[[index for index in own if index is not None]]
    if not is_own.all():
        queries[~is_own] = _embed_files(
            [path for path, index in zip(images, own, strict=True) if index is None], bank, backbone
        )
    similarities, indices = search(bank.vectors, queries, min(k + bool(is_own.any()), len(bank)))
    found = []
    for index, row, values in zip(own, indices, similarities, strict=True):
        pairs = [(int(i), float(value)) for i, value in zip(row, values, strict=True) if i != index][:k]
        labels = bank.labels
        found.append([Neighbour(bank.names[i], s, labels[i] if labels else None, bank.splits[i], i) for i, s in pairs])
    return found


def check_count(k: int) -> None:
    """Raises `ConfigError` for a number of neighbours below 1."""
    check(k >= 1, "Cannot find neighbours.", "k of at least 1", f"k={k}", "Pass 1 or more.")


def search(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest vectors by their cosine: exactly, in pieces that bound the memory.

    Args:
        bank: (N, D), to search in.
        queries: (Q, D).
        k: How many of each, at most N.

    Returns:
        Cosines float32 (Q, k), falling, and positions int64 (Q, k) in the bank.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.astype("float32", copy=False))
    distances, places = index.kneighbors(queries.astype("float32", copy=False))
    return np.clip(1 - distances, -1, 1).astype("float32"), places


def locate_queries(bank: Embeddings, images: Sequence[str | Path]) -> list[int | None]:
    """Returns where each image stands in the embeddings, by its name or its file; None for one that does not.

    Raises:
        MissingPathError: If an image is neither there nor a file.
    """
    places = {name: place for place, name in enumerate(bank.names)}
    root = bank.metadata["source"]["root"]
    found = []
    for image in images:
        names = [str(image), str(Path(image).absolute())]
        if root and (path := Path(image).resolve()).is_relative_to(root):
            names.append(str(path.relative_to(root)))
        place = next((places[name] for name in names if name in places), None)
        if place is None and not Path(image).is_file():
            raise MissingPathError(
                f"Cannot find the neighbours of {image}. Expected an image file, or the name of an image in the "
                f"embeddings, such as {bank.names[0]!r}. Received: {str(image)!r}, which is neither. Check the path."
            )
        found.append(place)
    return found


def _embed_files(paths: Sequence[str | Path], bank: Embeddings, backbone: Backbone | None) -> np.ndarray:
    """Returns the vectors (Q, D) of image files, by the model that made the embeddings."""
    made = bank.metadata
    size = tuple(made["input"]["image_size"])
    if backbone is None:
        try:
            backbone = load_backbone(made["backbone"])
            if backbone.input_spec.image_size != size:
                backbone = load_backbone(made["backbone"], image_size=size)
        except VitreousError as error:
            raise DataError(
                f"Cannot embed {paths[0]}. Expected the backbone that made the embeddings, {made['backbone']}. "
                f"Received: {error} Name an image that is in the embeddings, or make them anew."
            ) from error
    if backbone.fingerprint != made["fingerprint"]:
        raise DataError(
            f"Cannot embed {paths[0]}. Expected the backbone that made the embeddings, weights "
            f"{made['fingerprint'][:12]}. Received: {backbone.source} with weights {backbone.fingerprint[:12]}. "
            "Make the embeddings anew: their vectors cannot be compared with this model's."
        )
    spec = backbone.input_spec
    compute = backbone.create_feature_function(block=made["block"], pooling=made["pooling"])
    vectors = [compute(resize_image(decode_image(path, spec.num_channels), spec)[None]) for path in paths]
    return np.concatenate(vectors)


def load_sources(embeddings: Embeddings, indices: Sequence[int]) -> list[np.ndarray]:
    """Returns the pixels of some images of the embeddings, from where they were embedded.

    Args:
        embeddings: The embeddings.
        indices: Positions in them.

    Returns:
        uint8 (H, W, 3) each.

    Raises:
        DataError: If the images are no longer where they were.
        ImageError: If one cannot be read.
    """
    record = embeddings.metadata["source"]
    names = [embeddings.names[index] for index in indices]
    root = Path(record["root"] or "/")
    if root.is_dir() and all((root / name).is_file() for name in names):
        return [decode_image(root / name) for name in names]
    try:
        images = _read_again(record)
        places = {name: place for place, name in enumerate(images.names)}
        return [images.load(places[name]) for name in names]
    except (MissingPathError, KeyError, DataError) as error:
        raise DataError(
            f"Cannot draw the neighbours. Expected the images where they were embedded, {record['data']}. "
            f"Received: {error}. Bring them back, or go without the picture."
        ) from error


def _read_again(record: dict[str, Any]) -> ImageSet:
    """Returns the images of a source that was embedded."""
    config = change_config(None, record.get("options", {}))
    if not record.get("is_labelled"):
        return load_images(record["data"], config)
    return read_source(record["data"], config, min_classes=1, may_lack=OPTIONAL_COLUMNS).all_images()
