"""Batches of uint8 images for training and evaluation, made ahead of time by threads.

Order and pixels depend on the seed, the epoch and the index of an example, never on the threads: a run that is resumed
at batch n sees what an unbroken run would have seen.
"""

import contextlib
import math
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vitreous.backend import count_cores
from vitreous.data.decode_cache import MEMORY_BYTES, DecodeCache
from vitreous.data.image_set import ImageSet
from vitreous.data.images import resize_image
from vitreous.data.mixing import Mix, draw_mix, mix_pairs
from vitreous.data.sampling import count_earlier, draw_balanced, group_by_class, repeat_in_batches
from vitreous.data.sources.contents import reason_of
from vitreous.data.stores import ArrayStore
from vitreous.data.stream import BatchStream
from vitreous.data.transforms import MIXING, REPLACING, augment_image, example_generator
from vitreous.errors import DataError, ImageError, MissingPathError
from vitreous.spec import AugmentConfig, CacheKind, InputSpec, check, check_rates, check_types

_MAX_WORKERS = 8
_MIN_CHUNK = 8  # images; less, and handing work to a thread costs as much as the work
_SMALL_PIXELS = 64 * 64  # up to here an image is made so fast that threads only fight over the interpreter's lock
_SMALL_FILE_BYTES = 16_384
_MAX_BUFFERS = 16  # batches whose memory is used again
_MAX_NAMED = 20  # unreadable images that an error lists


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images, always as many as the batch size (of this process).

    Args:
        images: uint8, (B, H, W, C); zeros where `mask` is False.
        labels: int32, (B,); 0 for padding. Or float32, (B, K): shares of the classes, where images may be mixed; 1 for
            each class that applies, where an image may have several; zeros for padding.
        mask: bool, (B,). False for padding in the last batch, and for images that cannot be decoded.
        indices: int64, (B,). Position of each image in its `ImageSet`; -1 for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    indices: np.ndarray


class Loader:
    """Makes batches out of an `ImageSet`.

    Args:
        images: The images.
        input_spec: Size, channels and filter of what the model takes. Pixels stay uint8: the model normalises them.
        batch_size: B, images in a batch.
        augment: Random changes, for training. Default: none; each image is resized as in evaluation.
        num_classes: K; needed where `augment` mixes images of one label each.
        shuffle: Whether each epoch has its own order.
        class_balanced: Whether an epoch shows each class equally often: an image of a small class several times, each
            time changed anew, and of a large class only some images. With several labels an image, classes are drawn
            equally often, and with each draw an image to which the class applies; "none of them" counts as a class.
        drop_last: Whether to leave out a last batch that is not full; else it is padded.
        seed: Decides order and changes.
        num_workers: Threads that work ahead; 0 makes each batch when it is asked for. Default: one for each core, up to
            8. Small images are made by one thread at most: several would only fight over the interpreter's lock.
        cache: Where decoded images are kept, so that only the first epoch decodes them: `"memory"`, `"disk"` (a
            memory-mapped file, removed at the end), `"none"`, or `"auto"`: in memory if all fit, else on disk if there
            is four times the room, else as many as fit in memory. They are kept as they are decoded (before anything
            random; resized, where nothing random follows), so that a cache changes no pixel.
        cache_bytes: Size of the cache; the first images to fit are kept. Default: 1 GiB of memory, half of the free
            disk.
        cache_folder: Where the file of the cache lies. Default: the system's folder for temporary files.
        max_bad_fraction: Share of images that may be unreadable, in [0, 1). Another image, drawn by (seed, epoch,
            index), then takes the place of each, with its label and its index. Default: any share, and nothing takes
            their place: their mask is False, as evaluation needs it.
        report: Called with a line of text for each image that turns out to be unreadable, and if the disk of the cache
            is full; on the thread that asks for batches.
        process_index: Which part of each batch to make, in a run of several processes, from 0.
        num_processes: How many processes share a batch. Each makes `batch_size / num_processes` rows of it; their
            parts, one after the other, are the batch that a single process makes.

    Attributes:
        num_batches: Batches in an epoch.
        local_batch_size: Rows of a batch that this process makes.
        has_targets: Whether labels are float32 (B, K).
        broken: Name of each image that turned out to be unreadable, and why. It grows as images are read.
        num_replaced: How often another image took the place of an unreadable one, in the batches given out.

    Raises:
        ConfigError: If a number is out of range, or `drop_last` leaves no batch.
        DataError: From the batches: if more than `max_bad_fraction` of the images are unreadable; they are named.

    Example:
        >>> import numpy as np
        >>> images = ImageSet(["a", "b", "c"], [0, 1, 0], arrays=np.zeros((3, 8, 8, 3), "uint8"))
        >>> loader = Loader(images, InputSpec(image_size=(16, 16)), batch_size=2)
        >>> [batch.mask.tolist() for batch in loader.epoch(0)]
        [[True, True], [True, False]]
    """

    def __init__(
        self,
        images: ImageSet,
        input_spec: InputSpec,
        *,
        batch_size: int,
        augment: AugmentConfig | None = None,
        num_classes: int | None = None,
        shuffle: bool = False,
        class_balanced: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int | None = None,
        cache: CacheKind = "auto",
        cache_bytes: int | None = None,
        cache_folder: str | Path | None = None,
        max_bad_fraction: float | None = None,
        report: Callable[[str], None] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        check_types(Loader.__init__, {"cache": cache})
        check_rates(max_bad_fraction=max_bad_fraction or 0.0)
        numbers = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "cache_bytes": (cache_bytes, 0)}
        for name, (value, least) in numbers.items():
            if value is None:
                continue
            expected = f"{least} or more"
            check(value >= least, f"Cannot use {name}.", expected, f"{name}={value}", f"Pass {expected}.")
        check(
            len(images) >= (batch_size if drop_last else 1),
            "Cannot make batches.",
            "at least one full batch of images" if drop_last else "at least one image",
            f"{len(images)} images, batch_size={batch_size}, drop_last={drop_last}",
            "Pass a smaller batch_size, or drop_last=False." if len(images) else "Pass an ImageSet with images.",
        )
        check(
            shuffle or not class_balanced,
            "Cannot balance classes.",
            "shuffle=True with class_balanced=True",
            f"shuffle={shuffle}",
            "Pass shuffle=True, or class_balanced=False.",
        )
        check(
            num_processes >= 1 and 0 <= process_index < num_processes,
            "Cannot use process_index.",
            "a number from 0 to num_processes - 1",
            f"process_index={process_index}, num_processes={num_processes}",
            "Pass the rank of this process, and how many there are.",
        )
        has_mixing = augment is not None and augment.has_mixing
        unit = num_processes * (2 if has_mixing and num_processes > 1 else 1)
        check(
            batch_size % unit == 0,
            "Cannot share a batch among processes.",
            f"a multiple of {unit}" + (", so that no pair of mixed images is parted" if unit > num_processes else ""),
            f"batch_size={batch_size}, num_processes={num_processes}",
            "Pass another batch_size.",
        )
        if images.is_multi_label:
            num_classes = images.labels.shape[1]
        elif has_mixing:
            least = int(images.labels.max()) + 1
            check(
                num_classes is not None and num_classes >= least,
                "Cannot mix images.",
                f"num_classes of {least} or more",
                f"num_classes={num_classes}",
                "Pass the number of classes.",
            )
            check(
                int(images.labels.min()) >= 0,
                "Cannot mix images.",
                "a label for each image",
                f"{int((images.labels < 0).sum())} images without one",
                "Leave them out, or turn mixup_alpha and cutmix_alpha off.",
            )
        self.images = images
        self.input_spec = input_spec
        self.batch_size = batch_size
        self.augment = augment
        self.num_classes = num_classes
        self.has_mixing = has_mixing
        self.has_targets = has_mixing or images.is_multi_label
        self._label_type = "float32" if self.has_targets else "int32"
        self.shuffle = shuffle
        self.class_balanced = class_balanced
        self.process_index = process_index
        self.num_processes = num_processes
        self.local_batch_size = batch_size // num_processes
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = self._choose_num_workers(num_workers)
        self.cache = cache
        self.cache_bytes = cache_bytes
        self.cache_folder = cache_folder
        self.max_bad_fraction = max_bad_fraction
        self.report = report
        self.num_batches = len(images) // batch_size if drop_last else -(-len(images) // batch_size)
        self.broken: dict[str, str] = {}
        self.num_replaced = 0
        self._min_size = None if augment is None else _smallest_side(input_spec, augment)
        self._cache: DecodeCache | None = None
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._num_told = 0
        self._buffers: list[np.ndarray] = []

    def _choose_num_workers(self, num_workers: int | None) -> int:
        height, width = self.input_spec.image_size
        is_small = height * width <= _SMALL_PIXELS and self.images.file_sizes.mean() <= _SMALL_FILE_BYTES
        most = min(count_cores(), _MAX_WORKERS) if num_workers is None else num_workers
        return min(most, 1) if is_small else most

    def order(self, epoch: int) -> np.ndarray:
        """Returns the order of the images in an epoch: int64, (len(images),). It depends on (seed, epoch) alone.

        With `class_balanced`, or `num_repeats` of the augmentation, some images stand in it several times and some not
        at all.
        """
        generator = np.random.default_rng((self.seed % 2**64, epoch))
        if self.class_balanced:
            order = draw_balanced(group_by_class(self.images), len(self.images), generator)
        elif self.shuffle:
            order = generator.permutation(len(self.images))
        else:
            order = np.arange(len(self.images))
        num_repeats = 1 if self.augment is None else self.augment.num_repeats
        return order if num_repeats == 1 else repeat_in_batches(order, self.batch_size, num_repeats)

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches of one epoch.

        Closing the generator, or leaving it by an exception, stops its threads.

        Args:
            epoch: Which epoch, from 0.
            start_batch: First batch to yield, to resume in the middle of an epoch.

        Raises:
            ConfigError: If either is out of range.
        """
        check(epoch >= 0, "Cannot start an epoch.", "0 or more", f"epoch={epoch}", "Count epochs from 0.")
        check(
            0 <= start_batch <= self.num_batches,
            "Cannot start in the middle of an epoch.",
            f"a batch from 0 to {self.num_batches}",
            f"start_batch={start_batch}",
            "Resume with the batch size and the data that the run began with.",
        )
        return self._batches(epoch, start_batch)

    def stream(self, state: Mapping[str, int] | None = None) -> BatchStream:
        """Returns batches epoch after epoch, from a place that `BatchStream.state` remembers."""
        return BatchStream(self, state)

    def close(self) -> None:
        """Forgets decoded images, and removes their file. The next epoch decodes anew."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _create_cache(self) -> DecodeCache:
        sample = self._sample() if self.cache == "auto" else {}
        kind = self._choose_cache(sample) if self.cache == "auto" else self.cache
        try:
            cache = DecodeCache(kind, max_bytes=self.cache_bytes, folder=self.cache_folder)
        except OSError as error:
            raise DataError(
                "Cannot keep decoded images on disk. Expected a folder that can be written. "
                f"Received: cache_folder={str(self.cache_folder)!r}, {error.strerror or error}. "
                "Pass another folder, or cache='memory'."
            ) from error
        for index, image in sample.items():
            cache.put(index, image)
        return cache

    def _sample(self) -> dict[int, np.ndarray]:
        """Returns some decoded images by index, where their size decides about the cache."""
        if self.augment is None or self.cache_bytes is not None or isinstance(self.images.store, ArrayStore):
            return {}
        sample = {}
        for index in np.unique(np.linspace(0, len(self.images) - 1, 8).astype(int)).tolist():
            with contextlib.suppress(ImageError, MissingPathError):  # reading an epoch names them
                sample[index] = self.images.load(index, self.input_spec.num_channels, min_size=self._min_size)
        return sample

    def _choose_cache(self, sample: dict[int, np.ndarray]) -> Literal["memory", "disk"]:
        needed = sum(image.nbytes for image in sample.values()) // max(len(sample), 1) * len(self.images)
        if needed <= MEMORY_BYTES:
            return "memory"
        free = shutil.disk_usage(self.cache_folder or tempfile.gettempdir()).free
        return "disk" if free >= 4 * needed else "memory"

    def _batches(self, epoch: int, start_batch: int) -> Generator[Batch, None, None]:
        plan, stop = self._plan(epoch), threading.Event()
        if self._cache is None:
            self._cache = self._create_cache()
        numbers = range(start_batch, self.num_batches)
        if not self.num_workers:
            for number in numbers:
                work = self._start(plan, number)
                self._fill(work, range(self.local_batch_size), stop)
                yield self._finish(work, [])
            return
        size = max(_MIN_CHUNK, -(-self.local_batch_size // self.num_workers))
        size += size % 2  # pairs of mixed images stay together
        chunks = [
            range(start, min(start + size, self.local_batch_size)) for start in range(0, self.local_batch_size, size)
        ]
        num_ahead = max(2, -(-2 * self.num_workers // len(chunks)))
        pending: deque[tuple[_Work, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="vitreous-loader")
        try:
            for number in numbers:
                work = self._start(plan, number)
                pending.append((work, [pool.submit(self._fill, work, rows, stop) for rows in chunks]))
                if len(pending) > num_ahead:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, work: "_Work", futures: "list[Future[None]]") -> Batch:
        for future in futures:
            future.result()
        self.num_replaced += len(work.replaced)
        self._tell()
        return work.batch

    def _tell(self) -> None:
        """Reports what is new since the last batch."""
        if self.report is None:
            return
        for name, reason in list(self.broken.items())[self._num_told :]:
            self._num_told += 1
            instead = "left out" if self.max_bad_fraction is None else "another image takes its place"
            self.report(f"Cannot read {name}: {reason}; {instead}.")
        if self._cache is not None and self._cache.problem and not self._cache.is_told:
            self._cache.is_told = True
            self.report(
                f"The disk of the decode cache is full ({self._cache.problem}); {len(self._cache)} of "
                f"{len(self.images)} images are kept, the others are decoded each time."
            )

    def _plan(self, epoch: int) -> "_Plan":
        order = self.order(epoch)
        can_repeat = self.class_balanced or (self.augment is not None and self.augment.num_repeats > 1)
        return _Plan(epoch, order, count_earlier(order) if can_repeat else np.zeros(len(order), "int64"))

    def _start(self, plan: "_Plan", number: int) -> "_Work":
        """Returns a batch of this process's rows, whose images are still to be made."""
        size = self.local_batch_size
        start = number * self.batch_size + self.process_index * size
        stop = min(start + size, (number + 1) * self.batch_size)
        chosen = plan.order[start:stop]
        indices = np.full(size, -1, "int64")
        indices[: len(chosen)] = chosen
        draws = np.zeros(size, "int64")
        draws[: len(chosen)] = plan.draws[start:stop]
        labels = np.zeros((size, self.num_classes or 0) if self.has_targets else size, self._label_type)
        mix = None
        if self.has_mixing and self.augment is not None:
            generator = example_generator(self.seed, plan.epoch, number, MIXING)
            mix = draw_mix(self.augment, self.input_spec.image_size, generator)
        batch = Batch(self._take_buffer(), labels, np.zeros(size, bool), indices)
        for row, index in enumerate(chosen.tolist()):
            self._set_label(batch, row, index)
        return _Work(batch, plan.epoch, draws, mix)

    def _take_buffer(self) -> np.ndarray:
        """Returns an array for the images of a batch: one that nobody uses any more, since new memory costs more time
        than a copy (its pages are made one by one). Whoever still sees the pixels of a batch holds a reference to it.
        """
        for place in range(len(self._buffers)):
            if _count_references(self._buffers, place) <= _UNUSED:
                return self._buffers[place]
        shape = (self.local_batch_size, *self.input_spec.image_size, self.input_spec.num_channels)
        buffer = np.empty(shape, "uint8")
        if len(self._buffers) < _MAX_BUFFERS and _CAN_COUNT:
            self._buffers.append(buffer)
        return buffer

    def _set_label(self, batch: Batch, row: int, index: int) -> None:
        label = self.images.labels[index]
        if self.has_targets and not self.images.is_multi_label:
            batch.labels[row] = 0
            batch.labels[row, label] = 1
        else:
            batch.labels[row] = label

    def _fill(self, work: "_Work", rows: range, stop: threading.Event) -> None:
        batch = work.batch
        for row in rows:
            index = int(batch.indices[row])
            if index < 0 or stop.is_set():
                break
            image = self._read(index)
            if image is None and self.max_bad_fraction is not None:
                image = self._replace(work, row, index)
            if image is None:
                continue
            if self.augment is not None:
                generator = example_generator(self.seed, work.epoch, index, int(work.draws[row]))
                image = augment_image(image, self.input_spec, self.augment, generator)
            batch.images[row] = image
            batch.mask[row] = True
        part = slice(rows.start, rows.stop)
        batch.images[part][~batch.mask[part]] = 0
        if work.mix is not None:
            mix_pairs(batch.images[part], batch.labels[part], batch.mask[part], work.mix)

    def _replace(self, work: "_Work", row: int, index: int) -> np.ndarray:
        """Puts another image, with its label, into the place of an unreadable one."""
        generator = example_generator(self.seed, work.epoch, index, REPLACING + int(work.draws[row]))
        image = None
        while image is None:
            self._check_share()
            other = int(generator.integers(len(self.images)))
            image = self._read(other)
        work.batch.indices[row] = other
        self._set_label(work.batch, row, other)
        work.replaced.append(row)
        return image

    def _check_share(self) -> None:
        share = self.max_bad_fraction or 0.0
        if len(self.broken) <= share * len(self.images):
            return
        with self._lock:
            named = [f"{name} ({reason})" for name, reason in self.broken.items()]
        more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        raise DataError(
            f"Cannot go on reading images. Expected at most {share:.4g} of {len(self.images)} images to be unreadable. "
            f"Received: {len(named)}: {', '.join(named[:_MAX_NAMED])}{more}. "
            "Mend or remove them, or allow a larger share (max_bad_fraction, --max-bad)."
        )

    def _read(self, index: int) -> np.ndarray | None:
        """Returns a decoded image (resized, if nothing random follows), or None if it is broken."""
        cache = self._cache
        image = None if cache is None else cache.get(index)
        if image is not None:
            return image
        name = self.images.names[index]
        if name in self.broken:
            return None
        try:
            # What is neither kept nor given away may lie in this thread's own memory until the next image.
            is_brief = self.augment is not None and (cache is None or cache.is_full)
            image = self.images.load(
                index,
                self.input_spec.num_channels,
                min_size=self._min_size,
                scratch=self._get_scratch() if is_brief else None,
            )
        except (ImageError, MissingPathError) as error:
            with self._lock:
                self.broken[name] = reason_of(error)
            return None
        if self.augment is None:
            image = resize_image(image, self.input_spec)
        if cache is not None and not is_brief:
            cache.put(index, image)
        return image

    def _get_scratch(self) -> bytearray:
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = bytearray()
        return self._of_thread.scratch


def _count_references(arrays: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(arrays[place])


_UNUSED = _count_references([np.empty(0)], 0)  # references to an array that only the list knows
_CAN_COUNT = getattr(sys, "_is_gil_enabled", lambda: True)()  # without the lock, counts lag behind


@dataclass(frozen=True, eq=False)
class _Plan:
    """An epoch: which image stands at each place, and how often it has stood in the epoch before."""

    epoch: int
    order: np.ndarray
    draws: np.ndarray


@dataclass(frozen=True, eq=False)
class _Work:
    """A batch in the making."""

    batch: Batch
    epoch: int
    draws: np.ndarray
    mix: Mix | None
    replaced: list[int] = field(default_factory=list)  # rows whose image is another one


def _smallest_side(input_spec: InputSpec, augment: AugmentConfig) -> int:
    """Returns the pixels that the shorter side of an image must keep, so that a smaller decode costs no sharpness."""
    largest = max(input_spec.image_size)
    if not augment.has_crop:
        return math.ceil(2 * largest / input_spec.crop_fraction)
    narrow, wide = augment.crop_ratio
    return math.ceil(largest / math.sqrt(augment.crop_scale[0] * min(narrow, 1 / wide)))
