"""Exported files in their own runtimes: uint8 images in, logits and probabilities out. None of them needs Keras."""

import functools
import hashlib
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.backend import count_cores
from vitreous.errors import ConfigError, ExportError, MissingDependencyError
from vitreous.export.graph import INPUT, LOGITS, PROBABILITIES
from vitreous.export.record import KEY, ExportRecord, find_format, parse_record, read_record
from vitreous.spec import check_minimum

Outputs = tuple[np.ndarray, np.ndarray]
_CORE_LOCK = threading.Lock()


class Runtime(ABC):
    """An exported file, loaded. Calls may come from several threads.

    Args:
        name: The runtime and its precision, in words.
    """

    num_streams = 1  # batches that are computed side by side

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def __call__(self, images: np.ndarray) -> Outputs:
        """Returns logits and probabilities (B, K) float32 of images (B, H, W, C) uint8."""

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[Outputs]:
        """Yields what a call would return for each batch, in order; later ones may be under way already."""
        for batch in batches:
            yield self(batch)


class FileRuntime(Runtime):
    """What the runtimes of files share: they know what the file takes and gives."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Returns the shape of each input and output by its name; an axis of any size is no positive integer."""


class OnnxRuntime(FileRuntime):
    """An `.onnx` file in onnxruntime, on the CPU."""

    def __init__(self, path: Path, record: ExportRecord | None, num_threads: int):
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "onnx", f"Prediction with {path.name}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3  # warnings about how it places nodes are not for the user
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise _cannot_load(path, error) from error
        self.record = record or parse_record(self.session.get_modelmeta().custom_metadata_map.get(KEY), path)
        super().__init__(f"onnxruntime {onnxruntime.__version__}, {self.record.precision}")

    def __call__(self, images: np.ndarray) -> Outputs:
        """Returns logits and probabilities."""
        logits, probabilities = self.session.run([LOGITS, PROBABILITIES], {INPUT: images})
        return logits, probabilities

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Returns the shape of each input and output."""
        return {port.name: tuple(port.shape) for port in (*self.session.get_inputs(), *self.session.get_outputs())}


class OpenVINORuntime(FileRuntime):
    """An OpenVINO `.xml` on the CPU, in the precision that it was exported for, and no other.

    Args:
        path: The file.
        record: Its metadata.
        num_threads: CPU threads.
        cache_dir: Folder for the compiled model; it then loads several times faster. None for no cache.
        is_latency: Whether one batch at a time should be quick, in place of many batches in all.
    """

    def __init__(
        self, path: Path, record: ExportRecord, num_threads: int, cache_dir: Path | None, *, is_latency: bool = False
    ):
        openvino = import_openvino()
        super().__init__(f"OpenVINO {openvino.__version__.split('-')[0]}, {record.precision}")
        self.num_streams = 1 if is_latency else num_threads
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": record.inference_precision,
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": self.num_streams,
            "PERFORMANCE_HINT": "LATENCY" if is_latency else "THROUGHPUT",
        }
        if cache_dir is not None:
            folder = cache_dir / _state_of(path, path.with_suffix(".bin"))
            folder.mkdir(parents=True, exist_ok=True)
            options["CACHE_DIR"] = str(folder)
        try:
            self.model = openvino_core().compile_model(path, "CPU", options)
        except RuntimeError as error:
            raise _cannot_load(path, error) from error
        self._of_thread = threading.local()

    def __call__(self, images: np.ndarray) -> Outputs:
        """Returns logits and probabilities; each thread has a request of its own."""
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self.model.create_infer_request()
        self._of_thread.request.infer({INPUT: images}, share_inputs=True)
        return self._outputs(self._of_thread.request)

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Returns the shape of each input and output."""
        return {
            name: tuple(axis.get_length() if axis.is_static else None for axis in port.partial_shape)
            for port in (*self.model.inputs, *self.model.outputs)
            for name in port.names
        }

    @staticmethod
    def _outputs(request: Any) -> Outputs:
        return tuple(np.array(request.get_tensor(name).data) for name in (LOGITS, PROBABILITIES))  # type: ignore[return-value]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[Outputs]:
        """Yields what a call would return for each batch, in order, with one batch more under way than are computed."""
        free = [self.model.create_infer_request() for _ in range(self.num_streams + 1)]
        running: deque[tuple[Any, np.ndarray]] = deque()
        try:
            for batch in batches:
                if not free:
                    request, _ = running.popleft()
                    request.wait()
                    free.append(request)
                    yield self._outputs(request)
                request = free.pop()
                request.start_async({INPUT: batch}, share_inputs=True)
                running.append((request, batch))  # the batch must live as long as it is read
            while running:
                request, _ = running.popleft()
                request.wait()
                yield self._outputs(request)
        finally:
            for request, _ in running:
                request.wait()


class LiteRTRuntime(FileRuntime):
    """A `.tflite` file in LiteRT, one call at a time."""

    def __init__(self, path: Path, record: ExportRecord, num_threads: int):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise MissingDependencyError("ai-edge-litert", "litert", f"Prediction with {path.name}") from error
        super().__init__(f"LiteRT, {record.precision}")
        try:
            self.interpreter = Interpreter(str(path), num_threads=num_threads)
            self.runner = self.interpreter.get_signature_runner("serving_default")
        except (ValueError, RuntimeError) as error:
            raise _cannot_load(path, error) from error
        self.lock = threading.Lock()

    def __call__(self, images: np.ndarray) -> Outputs:
        """Returns logits and probabilities."""
        with self.lock:
            outputs = self.runner(**{INPUT: images})
            return np.array(outputs[LOGITS]), np.array(outputs[PROBABILITIES])

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Returns the shape of each input and output."""
        ports = {**self.runner.get_input_details(), **self.runner.get_output_details()}
        return {name: tuple(int(size) for size in port["shape_signature"]) for name, port in ports.items()}


def _state_of(*paths: Path) -> str:
    """Returns a name that changes with any of these files.

    OpenVINO finds what it compiled by path and time of the .xml: it would answer with the weights of a .bin that has
    been replaced since. The time of the last change of a file's state cannot be set, as that of its contents can.
    """
    states = [path.stat() for path in paths if path.exists()]
    known = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    return hashlib.sha256(repr((str(paths[0].resolve()), known)).encode()).hexdigest()[:24]


def import_openvino() -> Any:
    """Returns the package openvino.

    It is imported without openvino_telemetry, which it can do without: that would tell Google Analytics of the import
    in a process forked from this one, and take as long as the rest of the import.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    is_first = "openvino_telemetry" not in sys.modules
    if is_first:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an ImportError for who asks
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("openvino", "openvino", "OpenVINO") from error
    finally:
        if is_first:
            del sys.modules["openvino_telemetry"]
    return openvino


def openvino_core() -> Any:
    """Returns the one `openvino.Core` of this process, which lives as long as it does.

    A core's CPU plugin gives the main thread a stack for signal handlers, and frees that memory with the core. Cores
    that do not end in the reverse order of their beginning leave the thread a stack that is gone: the next signal,
    Ctrl-C for one, is then a segmentation fault.
    """
    with _CORE_LOCK:  # threads that ask at the same time must not create one each
        return _create_core()


@functools.cache
def _create_core() -> Any:
    return import_openvino().Core()


def _cannot_load(path: Path, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:200]
    return ExportError(f"Cannot load {path}. Expected a whole export. Received: {reason}. Export the run again.")


def _check_fits(runtime: FileRuntime, record: ExportRecord, path: Path) -> None:
    """Raises `ExportError` unless the file takes and gives what its metadata say."""
    batch, classes = record.batch_size, len(record.class_names)
    found = runtime.shapes()
    for name, wanted in (
        (INPUT, (batch, *record.input.image_size, record.input.num_channels)),
        (LOGITS, (batch, classes)),
        (PROBABILITIES, (batch, classes)),
    ):
        shape = found.get(name)
        is_same = shape is not None and len(shape) == len(wanted)
        for size, other in zip(shape or (), wanted, strict=False):
            is_open = not isinstance(size, int) or size < 1  # converters leave axes open whose size they do not know
            is_same = is_same and (is_open or size == other)
        if not is_same:
            raise ExportError(
                f"Cannot load {path}. Expected {name} of shape {wanted}, as its metadata say. "
                f"Received: {'none' if shape is None else shape}. Export the run again."
            )


def load_runtime(
    path: str | Path,
    *,
    record: ExportRecord | None = None,
    num_threads: int | None = None,
    cache_dir: Path | None = None,
    is_latency: bool = False,
) -> tuple[Runtime, ExportRecord]:
    """Loads an export in its own runtime.

    Args:
        path: An `.onnx`, `.xml` or `.tflite` file.
        record: Its metadata, where the file itself has none yet. Default: read from it.
        num_threads: CPU threads. Default: one for each core.
        cache_dir: Where OpenVINO keeps compiled models. Default: nowhere.
        is_latency: Whether one batch at a time should be quick, in place of many batches in all (OpenVINO).

    Raises:
        MissingPathError: If the file does not exist.
        ExportError: If it is no export of vitreous, or damaged.
        ConfigError: If it is one that only its own library runs: a SavedModel, a `.pt2`.
        MissingDependencyError: If its runtime is not installed.
    """
    path = Path(path)
    threads = count_cores() if num_threads is None else num_threads
    check_minimum(1, num_threads=threads)
    runtime: FileRuntime
    if path.is_file() and find_format(path) == "onnx":  # onnxruntime reads the metadata: onnx itself is not needed
        onnx = OnnxRuntime(path, record, threads)
        runtime, record = onnx, onnx.record
    else:
        record = record or read_record(path)
        match find_format(path):
            case "openvino":
                runtime = OpenVINORuntime(path, record, threads, cache_dir, is_latency=is_latency)
            case "litert":
                runtime = LiteRTRuntime(path, record, threads)
            case _:
                raise ConfigError(
                    f"Cannot predict with {path}. Expected an .onnx, an OpenVINO .xml or a .tflite file, or a run "
                    f"folder. Received: an export to {record.format}. Load it in its own library, or export to one of "
                    "these."
                )
    _check_fits(runtime, record, path)
    return runtime, record
