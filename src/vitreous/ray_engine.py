"""RayEngine: the same engine on many machines, as a map of Ray Data over all images.

Each worker is an actor with an `Engine` of its own. What it is given are names, and where they lie; it reads the images
itself, from storage that all machines see. An image is one row all the way, a broken one too, and rows come back in the
order of the images, whichever machine answered, and however often one of them died meanwhile.
"""

import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import vitreous.errors
from vitreous import __version__
from vitreous.backend import count_cores
from vitreous.data import DataConfig, ImageSet, load_images
from vitreous.data.stores import Store
from vitreous.engine import Engine, Prediction, check_choices, check_prediction, name_of
from vitreous.errors import ClusterError, DataError, ImageError, MissingDependencyError, VitreousError
from vitreous.export.record import ExportPrecision, find_format, read_record
from vitreous.spec import check_minimum
from vitreous.training import Run, load_run

_MAX_CORES = 8  # of a worker: more, and decoding and computing no longer keep all of them busy
_MAX_PART = 256  # images that a worker answers for at a time
_MAX_DEATHS = 3  # of workers over the same images, before these are given up
_CONNECT_SECONDS = 10.0  # for a named machine to answer at all
_ADDRESS = re.compile(r"(?:ray://)?([^/]+):(\d{1,5})")
_PAUSES_SECONDS = (5.0, 20.0)  # before storage that does not answer is asked for the same images again


class RayEngine:
    """Classifies images on the machines of a Ray cluster; a context manager, which leaves the cluster at its end.

    The model is sent to the workers. Images are not: a folder must lie under the same path on each machine, or be a
    URL. Every machine needs this version of vitreous, with what its engine runs on (`vitreous[openvino]`, or a backend
    built for its GPU), and the same versions of Python and Ray.

    Args:
        path: As for `Engine`.
        address: `"local"` for a Ray of its own on this machine, which is slower there than `Engine`; `"auto"` for one
            that runs here, as it does on a cluster's machines; `HOST:PORT` or `ray://HOST:10001` for one elsewhere. A
            Ray that this program has joined before is used, and left joined, whatever the address.
        precision: As for `Engine`.
        backend: As for `Engine`.
        max_workers: Workers at most, to leave room for others. Default: as many as the cluster has cores for, 8 or
            fewer to a worker; for a run on a cluster with GPUs, one for each GPU.
        on_message: Called with a line that says what computes.

    Attributes:
        class_names: As of `Engine`; `is_multi_label` and `precision` too.
        description: What computes, in words.
        num_workers: Workers at most.

    Raises:
        MissingDependencyError: If Ray is not installed.
        ClusterError: If no Ray answers at the address, or it has no cores.
        VitreousError: As `Engine` does, if the path is no model or the choices do not fit it.

    Example:

    ```python
    with RayEngine("runs/photos-1", address="auto") as engine:
        for prediction in engine.predict("s3://bucket/photos"):
            print(prediction.path, prediction.classes[0])
    ```
    """

    def __init__(
        self,
        path: str | Path | Run,
        *,
        address: str = "auto",
        precision: ExportPrecision | None = None,
        backend: str | None = None,
        max_workers: int | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        check_minimum(1, max_workers=1 if max_workers is None else max_workers)
        ray = _import_ray()
        check_choices(path, precision, backend)
        file = path.path if isinstance(path, Run) else Path(path)
        self._is_export = bool(find_format(file))
        if self._is_export:
            record = read_record(file)
            self.class_names, self.is_multi_label = record.class_names, record.is_multi_label
            self.precision: str = record.precision
            names = [file.name, f"{file.stem}.bin"] if record.format == "openvino" else [file.name, f"{file.stem}.json"]
        else:
            run = path if isinstance(path, Run) else load_run(file)
            run.check_has_classes()
            self.class_names, self.is_multi_label = run.class_names, run.is_multi_label
            self.precision = precision or "fp32"
            names = ["model.keras", "config.toml", "metrics.json"]
        folder = file.parent if self._is_export else file
        self._is_joined = not ray.is_initialized()  # else the program's own, which is left as it is
        if self._is_joined:
            _join(ray, address)
        try:
            self.num_workers, self._num_cores, self._num_gpus = plan_workers(
                ray.nodes(), max_workers=max_workers, use_gpus=not self._is_export
            )
            files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
            self._model = ray.put((file.name, files))
        except BaseException:
            self.close()
            raise
        self._choices = {"precision": precision, "backend": backend, "num_threads": self._num_cores}
        each = "a GPU" if self._num_gpus else f"{self._num_cores} core{'s' * (self._num_cores > 1)}"
        self.description = f"Ray {ray.__version__}, up to {self.num_workers} workers with {each} each, {self.precision}"
        if on_message:
            on_message(f"Engine   {self.description}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the cluster; one of its own ends."""
        if self._is_joined:
            self._is_joined = False
            _import_ray().shutdown()

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
        """Classifies images, in order, wherever they are computed.

        Args:
            images: Image files, folders and other sources as for `load_dataset`, one or a list; or an `ImageSet`.
            top_k: As for `Engine.predict`; so are `threshold`, `image_column`, `skip`, `on_progress` and `on_error`.

        Returns:
            An iterator over one `Prediction` for each image: the one that `Engine.predict` gives.

        Raises:
            ClusterError: If a machine does not see the images, has another version of vitreous, or if workers die over
                the same images again and again.
            VitreousError: As `Engine.predict` does.
        """
        check_prediction(top_k, threshold)
        found = images if isinstance(images, ImageSet) else load_images(images, DataConfig(image_column=image_column))
        places = np.arange(len(found))
        if skip:
            left = Counter(dict(skip))
            keep = [_take(left, str(name_of(found, i))) for i in range(len(found))]
            places = places[np.asarray(keep, bool)]
        return self._predict(
            found, places, {"top_k": top_k, "threshold": threshold, "version": __version__}, on_progress, on_error
        )

    def _predict(
        self,
        images: ImageSet,
        places: np.ndarray,
        options: dict[str, Any],
        on_progress: Callable[[int, int | None], None] | None,
        on_error: Callable[[str, str], None] | None,
    ) -> Iterator[Prediction]:
        rows = self._map(images, places, options) if len(places) else iter(())
        for done, place in enumerate(places, 1):
            index, text = next(rows, (None, ""))
            if index != place:
                raise ClusterError(
                    f"Cannot predict on Ray. Expected one row for each of {len(places)} images, in order. "
                    f"Received: {'none' if index is None else f'that of image {index}'} in place of image {place}. "
                    "Report this as a bug; --resume goes on with what was written."
                )
            answer = json.loads(text)
            name = name_of(images, int(place))
            if "predictions" in answer:
                pairs = answer["predictions"]
                classes, shares = ([pair[key] for pair in pairs] for key in ("class", "probability"))
                labels = tuple(answer["labels"]) if "labels" in answer else None
                yield Prediction(name, tuple(classes), tuple(shares), labels, answer.get("is_sure"))
            elif "kind" in answer:
                kind = getattr(vitreous.errors, answer["kind"])
                raise kind.__new__(kind, answer["error"])  # the message is whole: nothing is put around it again
            else:
                own = images.path(int(place))
                if answer["is_missing"] and own is not None and own.exists():
                    raise ClusterError(
                        f"Cannot predict on Ray. Expected images that every machine sees. Received: {name}, which is "
                        f"there on {socket.gethostname()} and not on {answer['host']}. Put the images on a file system "
                        "that all machines mount, or pass a URL such as s3://."
                    )
                if on_error is None:
                    raise ImageError(str(name), answer["error"])
                on_error(str(name), answer["error"])
            if on_progress:
                on_progress(done, len(places))

    def _map(self, images: ImageSet, places: np.ndarray, options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Yields (index, answer as JSON) of each image."""
        ray = _import_ray()
        import pyarrow

        size = min(_MAX_PART, max(16, -(-len(places) // (4 * self.num_workers))))
        tables = []
        for part in np.split(places, range(size, len(places), size)):
            names = [os.fsencode(images.names[i]) for i in part]  # bytes: not every name is text
            tables.append(pyarrow.table({"index": part, "name": names, "row": images.rows[part]}))
        data = ray.data.from_arrow(tables).map_batches(
            Worker,
            fn_constructor_args=(self._model, ray.put(images.store), os.getcwd(), self._choices, options),
            batch_size=size,  # a part at a time
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.num_workers),
            num_cpus=self._num_cores,
            num_gpus=self._num_gpus,
            ray_remote_args_fn=lambda: {"max_task_retries": _MAX_DEATHS},
        )
        data.context.enable_progress_bars = False  # there is one already
        data.context.execution_options.preserve_order = True
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from zip(batch["index"].to_pylist(), batch["answer"].to_pylist(), strict=True)
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(
                f"Cannot go on predicting on Ray. Expected workers that live. Received: {type(error).__name__}: "
                f"{lines[-1] if lines else 'no message'}. See Ray's logs; --resume goes on with what was written."
            ) from error


class Worker:
    """An engine in an actor of Ray: from a table of names to a table of answers.

    What no other machine could do better, such as a model that cannot be loaded, is an answer too: to raise it would
    have Ray try it again.

    Args:
        model: (name of the run or export, {file name: bytes}), or Ray's reference to them.
        store: Where the images lie, or Ray's reference to it.
        folder: That relative paths count from.
        choices: Options of `Engine`.
        options: Options of `Engine.predict`, and the `version` of vitreous that asks.
    """

    def __init__(self, model: Any, store: Any, folder: str, choices: Mapping[str, Any], options: Mapping[str, Any]):
        self.options = dict(options)
        self.error: VitreousError | None = None
        name, files = _resolve(model)
        self.store: Store = _resolve(store)
        if os.path.isdir(folder):  # this process does nothing else
            os.chdir(folder)
        self._folder = tempfile.TemporaryDirectory(prefix="vitreous-", ignore_cleanup_errors=True)
        path = place = Path(self._folder.name, name)
        if find_format(path):
            place = path.parent
            os.environ["VITREOUS_ENGINE_CACHE"] = "off"  # nobody would find again what is compiled from here
        place.mkdir(exist_ok=True)
        for file, data in files.items():
            (place / file).write_bytes(data)
        try:
            if (asked := self.options.pop("version")) != __version__:
                raise ClusterError(
                    f"Cannot predict on Ray. Expected vitreous {asked} on every machine. Received: vitreous "
                    f"{__version__} on {socket.gethostname()}. Install the same version on all."
                )
            self.engine = Engine(path, **choices)
        except VitreousError as error:
            self.error = error

    def __call__(self, table: Any) -> dict[str, Any]:
        """Returns the columns `index` and `answer`."""
        indices = table["index"].to_pylist()
        names = [os.fsdecode(name) for name in table["name"].to_pylist()]
        if self.error is not None:
            answers = [_refusal(self.error)] * len(indices)
        else:
            answers = self._answer(names, table["row"].to_pylist())
        return {"index": np.asarray(indices, "int64"), "answer": [json.dumps(answer) for answer in answers]}

    def _answer(self, names: list[str], rows: list[int]) -> list[dict[str, Any]]:
        """Returns an answer for each image, asking once more where storage does not answer."""
        for pause in _PAUSES_SECONDS:
            try:
                return self._predict(names, rows)
            except DataError:  # no fault of the images: those are named in their answers
                time.sleep(pause)
            except VitreousError as error:
                return [_refusal(error)] * len(names)
        try:
            return self._predict(names, rows)
        except VitreousError as error:
            return [_refusal(error)] * len(names)

    def _predict(self, names: list[str], rows: list[int]) -> list[dict[str, Any]]:
        broken: dict[str, str] = {}
        part = ImageSet([str(i) for i in range(len(names))], store=_Part(self.store, names, rows))
        answered = {
            str(prediction.path): prediction.to_dict()
            for prediction in self.engine.predict(part, on_error=broken.__setitem__, **self.options)
        }
        answers = []
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            answer = answered.get(str(i))
            if answer is None:
                path = self.store.path(row, name)
                is_missing = path is not None and not path.exists()
                answer = {"error": broken[str(i)], "is_missing": is_missing, "host": socket.gethostname()}
            answers.append(answer)
        return answers


class _Part:
    """Some images of a store, which are named by their places: names may be there twice."""

    def __init__(self, store: Store, names: list[str], rows: list[int]):
        self.store, self.names, self.rows = store, names, rows

    def read(self, row: int, name: str) -> Path | bytes | np.ndarray:
        """Returns the image as its store has it."""
        return self.store.read(self.rows[row], self.names[row])

    def path(self, row: int, name: str) -> None:
        """Returns None: its name is not that of its file."""
        return None

    def check(self, row: int, name: str) -> str | None:
        """Returns what its store says."""
        return self.store.check(self.rows[row], self.names[row])


def plan_workers(
    nodes: list[dict[str, Any]], *, max_workers: int | None = None, use_gpus: bool = True
) -> tuple[int, int, int]:
    """Returns how many workers a cluster has room for, and the cores and GPUs of each.

    Args:
        nodes: As `ray.nodes()` lists them.
        max_workers: Limit.
        use_gpus: Whether the model runs on a GPU at all.

    Raises:
        ClusterError: If there are no cores.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not machines:
        raise ClusterError(
            f"Cannot predict on Ray. Expected machines with a core to compute on. Received: {len(nodes)} machines "
            "without one. Start Ray on others, or give these cores (ray start --num-cpus)."
        )
    with_gpu = [machine for machine in machines if machine.get("GPU", 0) >= 1] if use_gpus else []
    if with_gpu:
        count = sum(int(machine["GPU"]) for machine in with_gpu)
        num_cores = int(max(1, min(_MAX_CORES, *(machine["CPU"] // machine["GPU"] for machine in with_gpu))))
    else:
        num_cores = int(min(_MAX_CORES, *(machine["CPU"] for machine in machines)))
        count = sum(int(machine["CPU"] // num_cores) for machine in machines)
    return min(count, max_workers or count), num_cores, int(bool(with_gpu))


def _import_ray() -> Any:
    """Returns the package ray with ray.data, quiet."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of the cluster
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of each pool of actors; errors are raised
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("ray[data]", "ray", "Prediction on many machines") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own account of each step
    return ray


def _join(ray: Any, address: str) -> None:
    """Joins the cluster at an address, or starts one on this machine."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers stand behind all else on this machine
        options |= {"num_cpus": count_cores(), "include_dashboard": False}
    try:
        if named := _ADDRESS.fullmatch(address):  # Ray itself would try for minutes
            socket.create_connection((named[1].strip("[]"), int(named[2])), timeout=_CONNECT_SECONDS).close()
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:  # among them ConnectionError and TimeoutError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(
            f"Cannot reach Ray. Expected a cluster that answers. Received: address={address!r}: {reason.rstrip('.')}. "
            "Pass the address of its head (HOST:6379, or ray://HOST:10001 from outside), 'auto' on one of its "
            "machines, or 'local'."
        ) from error


def _take(left: Counter[str], name: str) -> bool:
    """Returns whether an image is to be answered, and counts it off if it is not."""
    if left[name] > 0:
        left[name] -= 1
        return False
    return True


def _resolve(value: Any) -> Any:
    """Returns what a reference of Ray refers to; anything else as it is."""
    ray = sys.modules.get("ray")  # in an actor it is there
    return ray.get(value) if ray and isinstance(value, ray.ObjectRef) else value


def _refusal(error: VitreousError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "error": str(error)}
