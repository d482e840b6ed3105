"""Engine: fast prediction with an export, or with a run.

Images are read and resized in threads while the runtime computes earlier ones; what waits is bounded, so that memory
stays flat however many images there are. An export needs no Keras. A run on a CPU is exported to OpenVINO once, if that
is installed, and found again in the cache.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous import __version__
from vitreous.backend import count_cores, has_gpu, is_installed, select_backend, uses_gpu
from vitreous.calibration import check_threshold, get_confidence
from vitreous.data import DataConfig, ImageSet, decode_image, load_images, resize_image
from vitreous.data.resampling import resize_image_fast
from vitreous.data.sources.contents import reason_of
from vitreous.errors import ConfigError, ExportError, ImageError, MissingPathError
from vitreous.evaluation import sigmoid, softmax
from vitreous.export.record import ExportPrecision, find_format
from vitreous.export.runtimes import Outputs, Runtime, load_runtime
from vitreous.spec import InputSpec, check_minimum
from vitreous.training import Run, load_run

BATCH = 16

_OF_THREAD = threading.local()


@dataclass(frozen=True)
class Prediction:
    """What a run says of one image.

    Args:
        path: The image: its file, or its name in the source that it comes from.
        classes: Class names, the most probable first.
        probabilities: Of these classes, in [0, 1]; they sum to 1 over all classes unless an image may have several.
        labels: Where an image may have several classes: those with a probability of 1/2 or more, the most probable
            first. None where it has one.
        is_sure: Whether the answer reaches the threshold that was asked for. None without one.
    """

    path: Path | str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    labels: tuple[str, ...] | None = None
    is_sure: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        sure = {} if self.is_sure is None else {"is_sure": self.is_sure}
        return {
            "image": str(self.path),
            **sure,
            **labels,
            "predictions": [{"class": c, "probability": p} for c, p in pairs],
        }


class KerasRuntime(Runtime):
    """A run on the running Keras backend, compiled where that compiles."""

    def __init__(self, run: Run):
        import keras

        from vitreous.model import create_predict_function

        super().__init__(f"Keras on {keras.backend.backend()}, float32")
        self.temperature = run.temperature
        self.compute_shares = sigmoid if run.is_multi_label else softmax
        self.infer = create_predict_function(run.load_model(), run.input_spec)
        self.size = 0  # images of the largest batch so far: smaller ones are filled up, not compiled anew

    def __call__(self, images: np.ndarray) -> Outputs:
        """Returns logits and probabilities."""
        count = len(images)
        self.size = max(self.size, count)
        if count < self.size:
            images = np.concatenate([images, np.zeros((self.size - count, *images.shape[1:]), "uint8")])
        logits = self.infer(images)[:count]
        return logits, self.compute_shares(logits / self.temperature)


class Engine:
    """Classifies images with an export or a run, as fast as this machine can.

    Args:
        path: An `.onnx`, OpenVINO `.xml` or `.tflite` file that `export_model` wrote, or a run, or its folder.
        precision: For a run on a CPU with OpenVINO: `"fp32"` or `"bf16"` (faster where the processor has it; answers
            differ a little). Default: fp32. An export has its own. In fp32, files are resized to the pixel as in
            evaluation; in any other precision several times faster, where 3 values in a thousand differ by 1 of 255
            (from Pillow 13).
        backend: Keras backend (`"jax"`, `"torch"`, `"tensorflow"`) to run a run on. Default: OpenVINO on a CPU where
            it is installed, else the fastest backend installed.
        num_threads: CPU threads. Default: one for each core that this process may use.
        is_latency: Whether one call at a time should be quick, as in a server with few requests, in place of many
            images in all.
        on_message: Called with a line that says what computes, and one if a run is exported first.

    Attributes:
        class_names: In the order of the logits.
        input_spec: What images must look like for `logits`.
        temperature: Logits divided by it give calibrated probabilities.
        is_multi_label: Whether an image may have several labels.
        precision: What it was exported in; `"fp32"` for a run on Keras.
        description: What computes, in words.

    Raises:
        MissingPathError: If the path does not exist.
        ExportError, RunError: If it is neither an export nor a run.
        ConfigError: If the precision or the backend does not fit the path.
        MissingDependencyError: If the runtime of the export is not installed.

    Example:

    ```python
    engine = Engine("runs/digits-1/export/digits-1-openvino-fp32.xml")
    for prediction in engine.predict("photos/"):
        print(prediction.path, prediction.classes[0], prediction.probabilities[0])
    ```
    """

    def __init__(
        self,
        path: str | Path | Run,
        *,
        precision: ExportPrecision | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        is_latency: bool = False,
        on_message: Callable[[str], None] | None = None,
    ):
        say = on_message or (lambda text: None)
        self.num_threads = count_cores() if num_threads is None else num_threads
        check_minimum(1, num_threads=self.num_threads)
        cache = _cache_folder(say)
        compiled = None if cache is None else cache / "openvino"
        options: dict[str, Any] = {
            "num_threads": self.num_threads,
            "is_latency": is_latency,
            "cache_dir": compiled,
        }
        self.runtime: Runtime
        check_choices(path, precision, backend)
        if not isinstance(path, Run) and find_format(Path(path)):
            self.runtime, record = load_runtime(path, **options)
        else:
            run = path if isinstance(path, Run) else load_run(path)
            run.check_has_classes()
            why = _why_keras(backend)
            if why is None:
                file, self._temporary = _find_export(run, precision or "fp32", cache, say)
                try:
                    self.runtime, record = load_runtime(file, **options)
                except ExportError:  # damaged in the cache
                    file.unlink(missing_ok=True)
                    file, self._temporary = _find_export(run, precision or "fp32", cache, say)
                    self.runtime, record = load_runtime(file, **options)
            else:
                if precision == "bf16":
                    raise ConfigError(
                        f"Cannot predict with {run.path} in bf16. Expected OpenVINO on a CPU. Received: {why}. "
                        "Install it with: pip install 'vitreous[openvino]', or pass precision='fp32'."
                    )
                from vitreous.export.write import create_record

                select_backend(backend)
                self.runtime, record = KerasRuntime(run), create_record(run, "onnx", "fp32")
                self.runtime.name += f" ({why})"
        self.batch_size = record.batch_size
        self.class_names: tuple[str, ...] = record.class_names
        self.input_spec: InputSpec = record.input
        self.temperature = record.temperature
        self.precision: str = record.precision
        self.is_multi_label = record.is_multi_label
        self.description = self.runtime.name
        say(f"Engine   {self.description}")

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Brings an image to the size in `input_spec`, as `predict` does.

        Args:
            image: uint8, (H, W, C).

        Returns:
            uint8, (*input_spec.image_size, C); it may be read-only, or share the memory of `image`.

        Raises:
            ConfigError: If `image` is not such an array.
        """
        resize = resize_image if self.precision == "fp32" else resize_image_fast
        return resize(image, self.input_spec)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Computes logits; may be called from several threads.

        Args:
            images: uint8 (B, H, W, C), of the size in `input_spec`.

        Returns:
            (B, K) float32.

        Raises:
            ConfigError: If the images have another dtype or shape.
        """
        return self.compute(images)[0]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Computes calibrated probabilities (B, K) float32 in [0, 1]; otherwise as `logits`."""
        return self.compute(images)[1]

    def compute(self, images: np.ndarray) -> Outputs:
        """Computes logits and probabilities in one go; otherwise as `logits`."""
        shape = (*self.input_spec.image_size, self.input_spec.num_channels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
            raise ConfigError(
                f"Cannot compute logits. Expected uint8 images of shape (B, {', '.join(map(str, shape))}). "
                f"Received: dtype={images.dtype}, shape={images.shape}. Resize them with vitreous.data.resize_image."
            )
        size = self.batch_size
        if size is None:
            return self.runtime(images)
        parts = [self.runtime(_fill(images[i : i + size], size)) for i in range(0, len(images), size)]
        logits, probabilities = (np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True))
        return logits, probabilities

    def predict(
        self,
        images: Any,
        *,
        top_k: int = 5,
        threshold: float | None = None,
        image_column: str | None = None,
        skip: Mapping[str, int] | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
        on_error: Callable[[str, str], None] | None = None,
    ) -> Iterator[Prediction]:
        """Classifies images, in order, while it reads on.

        Args:
            images: Image files, folders and other sources as for `load_dataset`, one or a list; an `ImageSet`; arrays
                (uint8, of any size); or any iterator over files, bytes and arrays, which is read as it is needed.
            top_k: How many classes to name for each image, at most.
            threshold: Probability in [0, 1] below which an answer is not sure.
            image_column: Column of a table that holds the images. Default: found by its name.
            skip: {name: how often} of images to leave out, such as those that were answered before.
            on_progress: Called with the images done and the images in all (None where nobody knows).
            on_error: Called with the name of an image that cannot be read, and why; it is then left out. Default: it
                ends the prediction.

        Returns:
            An iterator over one `Prediction` for each image.

        Raises:
            MissingPathError: If a path does not exist.
            DataError: If a folder holds no images.
            ImageError: If an image cannot be read, without `on_error`; it is named.
        """
        check_prediction(top_k, threshold)
        items, total = self._find(images, image_column)
        if skip:
            items = _without(items, Counter(dict(skip)))
            total = None if total is None else max(total - sum(skip.values()), 0)
        return self._predict(items, total, top_k, threshold, on_progress, on_error)

    def _find(
        self, images: Any, image_column: str | None
    ) -> tuple[Iterator[tuple[Path | str, Callable[[], np.ndarray]]], int | None]:
        """Returns (name, function that reads it) of each image, and how many there are."""
        if isinstance(images, str | Path):
            images = [images]
        if isinstance(images, list | tuple) and all(isinstance(image, str | Path) for image in images):
            images = load_images(images, DataConfig(image_column=image_column))
        if isinstance(images, ImageSet):
            found = images
            return ((name_of(found, i), lambda i=i: self._load(found, i)) for i in range(len(found))), len(found)
        is_one = isinstance(images, bytes | bytearray)
        if isinstance(images, np.ndarray):  # its rows are no images
            is_one = images.ndim not in (3, 4) or (images.ndim == 3 and images.shape[2] in (1, 3))
        if is_one or not isinstance(images, Iterable):
            shape = f" of shape {images.shape}" if isinstance(images, np.ndarray) else ""
            raise ConfigError(
                "Cannot predict. Expected paths, an ImageSet, arrays, or an iterator over files, bytes and arrays. "
                f"Received: a {type(images).__name__}{shape}. Pass one of these; one image in a list."
            )
        total = len(images) if isinstance(images, Sized) else None
        return ((_item_name(item, i), lambda item=item: self._decode(item)) for i, item in enumerate(images)), total

    def _load(self, images: ImageSet, index: int) -> np.ndarray:
        """Reads and resizes one image of a set."""
        if not hasattr(_OF_THREAD, "scratch"):
            _OF_THREAD.scratch = bytearray()
        image = images.load(index, self.input_spec.num_channels, scratch=_OF_THREAD.scratch)
        resized = self.resize(image)
        return resized.copy() if np.may_share_memory(resized, image) else resized  # the next image is decoded there

    def _decode(self, item: Any) -> np.ndarray:
        """Reads and resizes a file, bytes, or an array."""
        if isinstance(item, np.ndarray):
            from PIL import Image

            squeezed = item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item
            if item.dtype != np.uint8 or squeezed.ndim not in (2, 3) or (squeezed.ndim == 3 and item.shape[2] != 3):
                raise ConfigError(
                    "Cannot predict. Expected uint8 arrays of shape (H, W), (H, W, 1) or (H, W, 3). "
                    f"Received: dtype={item.dtype}, shape={item.shape}. Pass such an array."
                )
            item = Image.fromarray(squeezed)
        return self.resize(decode_image(item, self.input_spec.num_channels))

    def _predict(
        self,
        items: Iterator[tuple[Path | str, Callable[[], np.ndarray]]],
        total: int | None,
        top_k: int,
        threshold: float | None,
        on_progress: Callable[[int, int | None], None] | None,
        on_error: Callable[[str, str], None] | None,
    ) -> Iterator[Prediction]:
        size = self.batch_size or BATCH
        named: deque[list[Path | str]] = deque()  # names of the batches under way
        broken = 0

        def read(load: Callable[[], np.ndarray]) -> np.ndarray | str:
            try:
                return load()
            except (ImageError, MissingPathError) as error:
                if on_error is None:
                    raise
                return reason_of(error)

        def batches(pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
            nonlocal broken
            pending: deque[tuple[Path | str, Future[np.ndarray | str]]] = deque()
            names: list[Path | str] = []
            pixels: list[np.ndarray] = []
            is_over = False
            while True:
                while not is_over and len(pending) < 2 * size:
                    item = next(items, None)
                    is_over = item is None
                    if item is not None:
                        pending.append((item[0], pool.submit(read, item[1])))
                if not pending:
                    break
                name, future = pending.popleft()
                result = future.result()
                if isinstance(result, str):
                    broken += 1
                    if on_error:
                        on_error(str(name), result)
                    continue
                names.append(name)
                pixels.append(result)
                if len(pixels) == size:
                    named.append(names)
                    yield np.stack(pixels)
                    names, pixels = [], []
            if pixels:
                named.append(names)
                batch = np.stack(pixels)
                yield _fill(batch, size) if self.batch_size else batch

        done = 0
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="vitreous-read")
        try:
            for _, shares in self.runtime.stream(batches(pool)):
                names = named.popleft()
                order = np.argsort(-shares, axis=1, kind="stable")
                for name, row, places in zip(names, shares, order, strict=False):  # a filled batch has more rows
                    yield self._describe(name, row, places, top_k, threshold)
                done += len(names)
                if on_progress:
                    on_progress(done + broken, total)
            if on_progress and broken:
                on_progress(done + broken, total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _describe(
        self, name: Path | str, shares: np.ndarray, order: np.ndarray, top_k: int, threshold: float | None
    ) -> Prediction:
        """Returns what the probabilities (K,) say, from their places in falling order."""
        names = self.class_names
        labels = tuple(names[i] for i in order if shares[i] >= 0.5) if self.is_multi_label else None
        best = order[:top_k]
        is_sure = None
        if threshold is not None:
            is_sure = bool(get_confidence(shares, is_multi_label=self.is_multi_label) >= threshold)
        return Prediction(name, tuple(names[i] for i in best), tuple(float(shares[i]) for i in best), labels, is_sure)


def check_choices(path: str | Path | Run, precision: str | None, backend: str | None) -> None:
    """Raises `ConfigError` if a precision or a backend does not fit an export, or a run."""
    if not isinstance(path, Run) and find_format(Path(path)):
        if precision or backend:
            received = f"precision={precision!r}" if precision else f"backend={backend!r}"
            raise ConfigError(
                f"Cannot predict with {path}. Expected no precision and no backend: an export has its own. "
                f"Received: {received}. Export the run in that precision, or pass the run."
            )
    elif precision not in (None, "fp32", "bf16"):
        name = path.path if isinstance(path, Run) else path
        raise ConfigError(
            f"Cannot predict with {name} in {precision}. Expected fp32 or bf16. "
            f"Received: precision={precision!r}. Export the run in that precision, and pass the file."
        )


def check_prediction(top_k: int, threshold: float | None) -> None:
    """Raises `ConfigError` unless so many classes can be named, and a threshold is a probability."""
    if top_k < 1:
        raise ConfigError(
            f"Cannot name classes. Expected top_k of at least 1. Received: top_k={top_k}. Pass 1 or more."
        )
    check_threshold(threshold)


def _fill(images: np.ndarray, size: int) -> np.ndarray:
    """Returns a batch with black images after its own, up to `size`."""
    missing = size - len(images)
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), "uint8")]) if missing else images


def name_of(images: ImageSet, index: int) -> Path | str:
    """Returns what to call an image: its file if that was named, else its name in the source."""
    name, path = images.names[index], images.path(index)
    return path if path is not None and str(path) == name else name


def _item_name(item: Any, index: int) -> Path | str:
    return item if isinstance(item, str | Path) else str(index)


def _without(items: Iterator[tuple[Path | str, Any]], skip: Counter[str]) -> Iterator[tuple[Path | str, Any]]:
    """Yields items, but leaves out as many of each name as `skip` counts."""
    for name, load in items:
        if skip[str(name)] > 0:
            skip[str(name)] -= 1
        else:
            yield name, load


def _why_keras(backend: str | None) -> str | None:
    """Returns why a run should be run by Keras; None if OpenVINO should run it."""
    if backend:
        return "asked for"
    if has_gpu() and any(uses_gpu(name) for name in ("jax", "torch")):
        return "a GPU, and a backend built for it"
    missing = [name for name in ("openvino", "onnx") if not is_installed(name)]
    return f"not installed: {' and '.join(missing)}, which would be faster: vitreous[openvino]" if missing else None


def _cache_folder(say: Callable[[str], None]) -> Path | None:
    """Returns the folder of what is kept from start to start; None if it is off, or cannot be written.

    The environment variable `VITREOUS_ENGINE_CACHE` names another folder than `~/.cache/vitreous` (below
    `XDG_CACHE_HOME` where that is set), or is `off`. Nothing is ever deleted.
    """
    chosen = os.environ.get("VITREOUS_ENGINE_CACHE", "")
    if chosen.lower() == "off":
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else caches / "vitreous"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"Engine   cannot keep anything in {folder}: {error.strerror or error}")
        return None
    if not os.access(folder, os.W_OK):
        say(f"Engine   cannot keep anything in {folder}: it cannot be written")
        return None
    return folder


def _find_export(
    run: Run, precision: ExportPrecision, cache: Path | None, say: Callable[[str], None]
) -> tuple[Path, "tempfile.TemporaryDirectory[str] | None"]:
    """Returns the OpenVINO export of a run in the cache, written if it is not there; or one in a temporary folder."""
    from vitreous.export.parity import CheckImages, generate_images
    from vitreous.export.write import create_record, write_export

    record = create_record(run, "openvino", precision)
    digest = hashlib.sha256(json.dumps([__version__, record.to_dict()], sort_keys=True).encode())
    with (run.path / "model.keras").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    temporary = None
    if cache is None:
        temporary = tempfile.TemporaryDirectory(prefix="vitreous-", ignore_cleanup_errors=True)
    folder = Path(temporary.name) if temporary else cache / "exports" / digest.hexdigest()[:24]  # type: ignore[operator]
    path = folder / "model.xml"
    if not path.is_file():
        say(f"Engine   exports {run.path.name} to OpenVINO in {precision}, once")
        select_backend()
        images = CheckImages(generate_images(run.input_spec), None, "generated images")
        write_export(run, path, record, images)
    return path, temporary
