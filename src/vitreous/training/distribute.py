"""Training on several devices, in one process or several: where the state of training and the rows of a batch lie.

The step stays that of one device (`vitreous.training.step`): jax compiles it for all of them from where its arrays lie,
and puts the exchanges between devices in. So only places are decided here:

    data    every device holds the whole state, and computes its rows of each batch
    fsdp    each matrix of weights, optimiser and average is cut over all devices, and put together while it is used
    tensor  the devices of one process share the matrices of each block, and its rows; processes share the batch

`jax.sharding` is used as it is, without `keras.distribution`: that places Keras variables when they are created, while
the state of a step lies beside them, with slots of an optimiser that Keras does not know.

Several processes run the same program on the same data. What only one of them knows, a checkpoint that it has read, a
signal, its clock, is told to all (`share`) or agreed on (`agree`), so that they never go different ways.
"""

import atexit
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.errors import ConfigError, TrainingError, VitreousError
from vitreous.spec import InputSpec, check
from vitreous.training.devices import Devices, DistributionConfig, Parallel

if TYPE_CHECKING:
    from vitreous.data import Loader

_HEARTBEAT_SECONDS = 60  # without a sign of life from a process, the others end
_SHUTDOWN_SECONDS = 24 * 3600  # at the end, the others wait while the first measures and draws
# In a block, what one product makes and the next one takes: the first is cut by columns, the second by rows.
_BY_COLUMNS = re.compile(r"(attention/qkv|mlp/hidden)/(kernel|bias)$")
_BY_ROWS = re.compile(r"(attention/projection|mlp/output)/kernel$")


class Layout:
    """Where arrays lie.

    Args:
        parallel: What devices share.
        devices: jax's devices; None for the one device of any backend, in this process alone.

    Attributes:
        is_spread: Whether there are several devices, or processes.
        num_devices: How many, in all processes.
        process_index: Which process this is.
        num_processes: How many there are.
        unit: What divides the rows that are computed at once: groups of devices that share no row.
    """

    def __init__(self, parallel: Parallel = "data", devices: list[Any] | None = None):
        self.parallel = parallel
        self.is_spread = devices is not None
        self.process_index, self.num_processes, self.unit, self.num_devices = 0, 1, 1, 1
        self._pending: Any = None
        self._pending_all: Any = None
        self._has_met = self._has_begun = False
        if devices is None:
            return
        import jax
        from jax.sharding import Mesh

        self.process_index, self.num_processes = jax.process_index(), jax.process_count()
        self.num_devices = len(devices)
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        groups = self.num_processes if parallel == "tensor" else len(ordered)
        self.mesh = Mesh(np.array(ordered).reshape(groups, -1), ("data", "model"))
        self.unit = groups
        self._rows_of_devices = Mesh(np.array(ordered), ("device",))
        self._most = jax.jit(
            lambda flags: flags.max(axis=0), out_shardings=_sharding(self._rows_of_devices)
        )  # over all processes

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run, and speaks."""
        return self.process_index == 0

    def describe(self) -> str:
        """Returns the layout in words."""
        processes = f" in {self.num_processes} processes" if self.num_processes > 1 else ""
        shared = {
            "data": "each computes its rows of a batch",
            "fsdp": "each computes its rows of a batch, and holds its part of weights and optimiser",
            "tensor": "those of a process share the matrices of each block",
        }[self.parallel]
        return f"{self.num_devices} devices{processes}: {shared}"

    def to_dict(self) -> dict[str, Any]:
        """Returns what a run says of it: nothing of one device."""
        if not self.is_spread:
            return {}
        record = {"parallel": self.parallel, "num_devices": self.num_devices, "num_processes": self.num_processes}
        return {"distribution": record}

    def check_batch(self, batch_size: int, num_parts: int) -> None:
        """Raises `ConfigError` if devices would not have equally many rows of each part of a batch."""
        check(
            batch_size % (self.unit * num_parts) == 0,
            f"Cannot share a batch among {self.num_devices} devices.",
            f"a multiple of {self.unit * num_parts}" + (f" ({num_parts} parts)" if num_parts > 1 else ""),
            f"batch_size={batch_size}",
            f"Pass --batch-size {max(batch_size // (self.unit * num_parts), 1) * self.unit * num_parts}, or another "
            "number of devices.",
        )

    # Where arrays lie.

    def spec(self, path: str, shape: tuple[int, ...]) -> Any:
        """Returns which axes of a weight are cut: a `jax.sharding.PartitionSpec`.

        Args:
            path: Path of the weight.
            shape: Its shape.

        Raises:
            ConfigError: If devices cannot share a matrix of a block equally.
        """
        from jax.sharding import PartitionSpec

        if self.parallel == "fsdp" and len(shape) > 1:
            sizes = {axis: size for axis, size in enumerate(shape) if size % self.num_devices == 0}
            if sizes:
                chosen = max(sizes, key=lambda axis: sizes[axis])
                return PartitionSpec(*("data" if axis == chosen else None for axis in range(len(shape))))
        if self.parallel == "tensor":
            axis = len(shape) - 1 if _BY_COLUMNS.search(path) else 0 if _BY_ROWS.search(path) else None
            if axis is not None:
                count = self.mesh.shape["model"]
                check(
                    shape[axis] % count == 0,
                    f"Cannot share {path} among {count} devices.",
                    f"a width that {count} divides",
                    f"shape={shape}",
                    "Pass --parallel fsdp or data, or fewer devices.",
                )
                return PartitionSpec(*("model" if each == axis else None for each in range(len(shape))))
        return PartitionSpec()

    def sharding(self, spec: Any) -> Any:
        """Returns the sharding of a spec over this layout's devices."""
        from jax.sharding import NamedSharding

        return NamedSharding(self.mesh, spec)

    def place(self, value: Any, spec: Any) -> Any:
        """Returns a whole array, which every process has, as one that lies as `spec` says."""
        import jax

        array = np.array(value)  # a copy: its memory may become that of a buffer which a step writes into
        return jax.make_array_from_callback(array.shape, self.sharding(spec), lambda index: array[index])

    def place_rows(self, rows: np.ndarray, axis: int = 0) -> Any:
        """Returns this process's rows of a batch as part of one array over all devices.

        Args:
            rows: Of this process, along `axis`.
            axis: Which one is rows.
        """
        import jax
        from jax.sharding import PartitionSpec

        spec = PartitionSpec(*(None,) * axis, "data")
        return jax.make_array_from_process_local_data(self.sharding(spec), rows)

    def gather(self, array: Any) -> np.ndarray:
        """Returns a copy of a whole array from where it lies; all processes must ask for it."""
        if not self.is_spread or array.is_fully_addressable or array.is_fully_replicated:
            return np.array(array)
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(array, tiled=True))

    def create_predict(self, model: Any, input_spec: InputSpec) -> Callable[[np.ndarray], np.ndarray]:
        """Returns `create_predict_function(model, input_spec)` that computes rows on all devices.

        In several processes it takes this process's images and returns their logits; all must call it equally often.
        """
        from vitreous.model import create_predict_function, normalize_images

        if not self.is_spread:
            return create_predict_function(model, input_spec)
        import jax
        from jax.experimental.multihost_utils import global_array_to_host_local_array
        from jax.sharding import PartitionSpec

        def infer(weights: Any, other: Any, images: Any) -> Any:
            return model.stateless_call(weights, other, normalize_images(images, input_spec), training=False)[0]

        spec = PartitionSpec("data")
        compiled = jax.jit(infer, out_shardings=self.sharding(spec))
        local_unit = self.unit // self.num_processes

        def predict(images: np.ndarray) -> np.ndarray:
            padding = [(0, -len(images) % local_unit), *[(0, 0)] * 3]
            rows = self.place_rows(np.pad(images, padding))
            variables = (model.trainable_variables, model.non_trainable_variables)
            logits = compiled(*([variable.value for variable in part] for part in variables), rows)
            if self.num_processes > 1:
                logits = global_array_to_host_local_array(logits, self.mesh, spec)
            return np.asarray(logits)[: len(images)]

        return predict

    def collect(self, predict: Callable[[np.ndarray], np.ndarray], loader: "Loader") -> tuple[np.ndarray, ...]:
        """Returns `collect_logits(predict, loader.epoch(0))` of all processes, in the order of one."""
        from vitreous.evaluation import collect_logits

        if self.num_processes == 1:
            return collect_logits(predict, loader.epoch(0))
        from jax.experimental.multihost_utils import process_allgather

        batches = [
            (predict(batch.images), batch.labels, batch.indices.astype("int32"), batch.mask)
            for batch in loader.epoch(0)
        ]
        stacked = tuple(np.stack(parts) for parts in zip(*batches, strict=True))  # (batches, rows, ...)
        gathered = process_allgather(stacked)  # (processes, batches, rows, ...)
        *found, mask = (np.swapaxes(part, 0, 1).reshape(-1, *part.shape[3:]) for part in map(np.asarray, gathered))
        return tuple(part[mask] for part in found)

    # What processes tell each other.

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Returns which flags are set in any process.

        In several processes, the answer is that of the call before: reading it does not wait for the step that is
        being computed. An answer with a flag set is given once.
        """
        if self.num_processes == 1:
            return flags
        before, self._pending = self._pending, self._ask(flags)
        answer = tuple(bool(flag) for flag in np.asarray(before)) if before is not None else (False,) * len(flags)
        if any(answer):
            self._pending = None
        return answer

    def agree_all(self, flag: bool) -> bool:
        """Returns whether the flag was set in every process at the call before, as `agree` does."""
        if self.num_processes == 1:
            return flag
        before, self._pending_all = self._pending_all, self._ask((not flag,))
        answer = before is not None and not np.asarray(before).any()
        if answer:
            self._pending_all = None
        return answer

    def forget_all(self) -> None:
        """Drops what `agree_all` has asked, when the question is another from here on."""
        self._pending_all = None

    def _ask(self, flags: tuple[bool, ...]) -> Any:
        """Returns which flags are set in any process, still to be computed."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        rows = np.tile(np.array(flags, "int32"), (self.num_devices // self.num_processes, 1))
        sharding = NamedSharding(self._rows_of_devices, PartitionSpec("device"))
        return self._most(jax.make_array_from_process_local_data(sharding, rows))

    def share(self, value: Any) -> Any:
        """Returns the first process's value, fit for JSON, in all of them."""
        if self.num_processes == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        (size,) = _broadcast(np.array([len(text)], "uint32"))
        return json.loads(self._share_bytes(text, int(size)))

    def share_arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the first process's arrays, bit for bit, in all of them."""
        if self.num_processes == 1:
            return dict(arrays)
        header = self.share({name: [list(array.shape), array.dtype.str] for name, array in arrays.items()})
        shared = {}
        for name, (shape, kind) in header.items():
            dtype = np.dtype(kind)
            size = dtype.itemsize * int(np.prod(shape))
            content = np.ascontiguousarray(arrays[name]).tobytes() if self.is_first else b""
            shared[name] = np.frombuffer(self._share_bytes(content, size), dtype).reshape(shape)
        return shared

    def gather_values(self, value: Any) -> list[Any]:
        """Returns the values of all processes, fit for JSON, in their order."""
        if self.num_processes == 1:
            return [value]
        from jax.experimental.multihost_utils import process_allgather

        text = np.frombuffer(json.dumps(value).encode(), "uint8")
        sizes = np.asarray(process_allgather(np.array(len(text), "int32"))).ravel()
        texts = np.asarray(process_allgather(np.pad(text, (0, int(sizes.max()) - len(text)))))
        return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leaves its block by an error in all processes where it does in one, up to `meet`.

        Later an error is of one process alone, which at its exit does not wait for the others: they end when they no
        longer hear of it.

        Raises:
            TrainingError: If another process cannot train.
        """
        self._has_met = self._has_begun = False
        try:
            yield
        except BaseException as error:
            if isinstance(error, VitreousError):
                error.is_of_all = self.num_processes == 1 or not self._has_begun
            if self.num_processes > 1 and not self._has_met:
                self._has_met = True
                code = {"exit": error.code} if isinstance(error, SystemExit) else {}
                self.gather_values({"error": str(error) or type(error).__name__, **code})
            elif self._has_begun and not isinstance(error, SystemExit):  # SIGTERM is one for all
                atexit.register(_leave)
            raise

    def meet(self, identity: Mapping[str, Any]) -> None:
        """Waits until all processes are about to train.

        Args:
            identity: What must be the same in all: else they would go different ways without a word.

        Raises:
            TrainingError: If another process cannot train.
            SystemExit: If it ends by SIGTERM.
            ConfigError: If another one has other data, options or versions.
        """
        if self.num_processes == 1:
            return
        self._has_met = True
        told = self.gather_values({"identity": dict(identity)})
        for index, other in enumerate(told):
            if "exit" in other:
                raise SystemExit(other["exit"])
            if "error" in other:
                raise TrainingError(
                    f"Cannot train in {self.num_processes} processes. Expected all of them to start. "
                    f"Received: process {index} says: {other['error']} Mend that, and start all anew."
                )
        for index, other in enumerate(told):
            differing = [name for name, value in told[0]["identity"].items() if other["identity"].get(name) != value]
            if differing:
                raise ConfigError(
                    f"Cannot train in {self.num_processes} processes. Expected the same data, options and versions in "
                    f"all. Received: process {index} differs from process 0 in {', '.join(differing)}. "
                    "Start all with the same command on the same data."
                )
        self._has_begun = True

    def _share_bytes(self, content: bytes, size: int) -> bytes:
        words = np.frombuffer(content.ljust(-(-size // 4) * 4, b"\0"), "uint32")
        return _broadcast(words).tobytes()[:size]


def _leave() -> None:
    """Ends this process without jax's farewell, which waits for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _sharding(mesh: Any) -> Any:
    """Returns the sharding of an array that lies whole on every device."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def _broadcast(words: np.ndarray) -> np.ndarray:
    """Returns the uint32 numbers of the first process in all: a sum with zeros, which keeps their bits."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(words))


def create_layout(devices: Devices | None = None, parallel: Parallel | None = None) -> Layout:
    """Returns where to train.

    Args:
        devices: How many devices of this machine, or `"all"`. Default: one; where `join_processes` was called, all.
        parallel: What they share: `"data"`, `"fsdp"` or `"tensor"`. Default: `"data"`.

    Raises:
        ConfigError: If there are not so many devices, or the backend trains on one alone.
    """
    import keras

    DistributionConfig(devices=devices, parallel=parallel)  # says what is neither
    backend = keras.backend.backend()
    if backend != "jax":
        if devices in (None, 1) and parallel is None:
            return Layout()
        raise ConfigError(
            f"Cannot train on several devices with the {backend} backend. Expected jax, the only one of these that "
            f"Keras spreads over devices. Received: backend={backend!r}, devices={devices!r}, parallel={parallel!r}. "
            "Pass --backend jax."
        )
    import jax

    found, num_processes = jax.devices(), jax.process_count()
    if num_processes > 1:
        check(
            devices in (None, "all", len(jax.local_devices())),
            f"Cannot choose devices in {num_processes} processes.",
            f"all of each process, {len(jax.local_devices())} in this one",
            f"devices={devices!r}",
            "Leave --devices out; CUDA_VISIBLE_DEVICES hides devices.",
        )
        return Layout(parallel or "data", found)
    count = len(found) if devices == "all" else 1 if devices is None else devices
    hint = "with XLA_FLAGS=--xla_force_host_platform_device_count=N a CPU passes for N devices"
    check(
        1 <= count <= len(found),
        f"Cannot train on {count} devices.",
        f"from 1 to {len(found)}, which jax sees ({found[0].platform})",
        f"devices={devices!r}",
        f"Pass fewer; {hint}." if found[0].platform == "cpu" else "Pass fewer.",
    )
    check(
        count > 1 or parallel is None or (devices is not None and parallel == "data"),
        f"Cannot train with parallel={parallel!r}.",
        "several devices to share the work",
        f"devices={devices!r}, {len(found)} seen by jax",
        "Pass --devices all." if len(found) > 1 else f"Leave --parallel out; {hint}.",
    )
    return Layout(parallel or "data", found[:count]) if count > 1 else Layout()


def join_processes(
    coordinator: str | None = None, *, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several that train together; call it before anything computes on jax.

    Each calls `train` with the same arguments on the same data; the first one writes the run, the others return it
    without metrics.

    Args:
        coordinator: `"HOST:PORT"` of the first process; or `"auto"`: all three as Slurm, Kubernetes or Open MPI say.
        num_processes: How many there are.
        process_id: Which one this is, from 0.

    Raises:
        ConfigError: If one is missing, or the processes do not find each other.
    """
    import os

    from vitreous.backend import select_backend

    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    received = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if coordinator == "auto":
        is_complete, expected = num_processes is None and process_id is None, "no other address beside 'auto'"
    else:
        is_complete = None not in given.values() and re.fullmatch(r"\S+:\d+", str(coordinator)) is not None
        is_complete = is_complete and 0 <= (process_id or 0) < (num_processes or 0)
        expected = "HOST:PORT of the first process, how many there are, and which one this is, from 0"
    check(
        is_complete,
        "Cannot train in several processes.",
        expected,
        received,
        "Pass --coordinator HOST:PORT --num-processes N --process-id I, or --coordinator auto.",
    )
    if (backend := select_backend("jax" if "KERAS_BACKEND" not in os.environ else None)[0]) != "jax":
        raise ConfigError(
            f"Cannot train in several processes with the {backend} backend. Expected jax, the only one of these that "
            f"Keras spreads over devices. Received: backend={backend!r}. Pass --backend jax."
        )
    import jax

    # jax would take SIGTERM for a wish to be asked about, and go on: from here until training hears it itself.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    address: dict[str, Any] = {}
    if coordinator != "auto":  # a process then has all devices that it sees, also where a scheduler numbers processes
        address = {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **address,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"Cannot train in several processes. Expected them to find each other. Received: {received}: {reason} "
            "Start all within 5 minutes of each other; from Python, before anything computes on jax."
        ) from error
