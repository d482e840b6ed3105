"""Batches of one epoch after the other, from a place that can be written down and returned to."""

import functools
import hashlib
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from vitreous.spec import check

if TYPE_CHECKING:
    from vitreous.data.pipeline import Batch, Loader


class BatchStream(Iterator["Batch"]):
    """Endless batches of a `Loader`, epoch after epoch, with a state.

    The state after n batches is where batch n + 1 begins, however many were made ahead of time. It is good for any
    number of workers and of processes.

    Args:
        loader: Where the batches come from.
        state: From `state()` of a stream of the same data. Default: the first batch of epoch 0.

    Raises:
        ConfigError: If the state is of other data, or of another batch size, seed or sampling.

    Example:
        >>> import numpy as np
        >>> from vitreous.data import ImageSet, Loader
        >>> from vitreous.spec import InputSpec
        >>> images = ImageSet(["a", "b", "c"], arrays=np.zeros((3, 8, 8, 3), "uint8"))
        >>> stream = Loader(images, InputSpec(image_size=8), batch_size=2, shuffle=True).stream()
        >>> _ = next(stream), next(stream), next(stream)
        >>> stream.state()["epoch"], stream.state()["batch"]
        (1, 1)
        >>> stream.close()
    """

    def __init__(self, loader: "Loader", state: Mapping[str, int] | None = None):
        self.loader = loader
        self._epoch = self._batch = 0
        self._batches: Generator[Batch, None, None] | None = None
        if state is not None:
            self.restore(state)

    def __next__(self) -> "Batch":
        if self._batch == self.loader.num_batches:
            self.close()
            self._epoch, self._batch = self._epoch + 1, 0
        if self._batches is None:
            self._batches = self.loader.epoch(self._epoch, start_batch=self._batch)
        batch = next(self._batches)
        self._batch += 1
        return batch

    def state(self) -> dict[str, int]:
        """Returns where the next batch begins, and what it must be made of: plain integers, fit for JSON."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to where a state was taken. Errors as for the class."""
        identity = self._identity()
        expected = {**identity, "epoch": 0, "batch": 0}
        received = {name: state.get(name) for name in expected}
        check(
            all(received[name] == value for name, value in identity.items())
            and all(isinstance(received[name], int) and state[name] >= 0 for name in ("epoch", "batch"))
            and state["batch"] <= self.loader.num_batches,
            "Cannot restore the state of a stream.",
            f"a state with {', '.join(f'{name}={value}' for name, value in identity.items())}",
            ", ".join(f"{name}={value}" for name, value in received.items()),
            "Resume with the data, the batch size, the seed and the sampling that the run began with.",
        )
        self.close()
        self._epoch, self._batch = state["epoch"], state["batch"]

    def close(self) -> None:
        """Stops the threads; the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _identity(self) -> dict[str, int]:
        loader = self.loader
        augment = loader.augment
        return {
            "seed": loader.seed,
            "batch_size": loader.batch_size,
            "num_images": len(loader.images),
            "num_batches": loader.num_batches,
            "shuffle": int(loader.shuffle),
            "class_balanced": int(loader.class_balanced),
            "num_repeats": 1 if augment is None else augment.num_repeats,
            "images_hash": self._images_hash,
        }

    @functools.cached_property
    def _images_hash(self) -> int:
        """48 bits over names and labels, which every reader of JSON can hold."""
        images = self.loader.images
        digest = hashlib.sha256("\0".join(images.names).encode("utf-8", "surrogateescape"))
        digest.update(images.labels.astype("<i4").tobytes())
        return int.from_bytes(digest.digest()[:6], "big")
