"""Training on a Ray cluster: Ray starts the processes, watches them, and starts all of them again when one dies.

A process that dies takes nothing along: what it computed since the last checkpoint is computed again, and the run ends
as if it had not died. So what is needed of Ray is to start processes and to end them; the state lies where it always
does, beside the run.
"""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vitreous.errors import (
    ClusterError,
    ConfigError,
    MissingDependencyError,
    RunError,
    TrainingError,
    VitreousError,
)
from vitreous.training.devices import DistributionConfig
from vitreous.training.distribute import join_processes
from vitreous.training.progress import LineReporter, Reporter
from vitreous.training.resume import describe_call
from vitreous.training.run import Run, RunWriter, load_run

_NAME = "vitreous"
_REFUSED = "refused-"


def train_on_ray(
    task: Literal["train", "pretrain"],
    data: str | Path,
    config: DistributionConfig,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **arguments: Any,
) -> Run:
    """Trains in the workers of a Ray cluster; an unfinished run at `out` goes on.

    Args:
        task: `"train"` or `"pretrain"`.
        data: The data, as every worker finds them.
        config: Address of the cluster; how many workers, with how many GPUs, and how often they may begin again.
        out: Where the run goes: a path that the first worker writes and this process reads, on one machine or a shared
            file system.
        overwrite: Whether a run at `out` may be replaced.
        reporter: Where it is said what Ray does; the workers' own lines come through Ray.
        **arguments: The other arguments of `train` or `pretrain`.

    Returns:
        The run.

    Raises:
        ConfigError: If `out` is missing, or the cluster cannot be reached or has not so many resources.
        RunExistsError: As for `train`.
        TrainingError: If training failed more often than `config.max_failures`, or was refused.
        MissingDependencyError: If Ray is not installed.
    """
    try:
        import ray
        from ray import train as ray_train
        from ray.train.v2.jax import JaxTrainer
    except ImportError as error:
        raise MissingDependencyError("ray[train]", "ray", "Training on Ray") from error
    if out is None:
        raise ConfigError(
            "Cannot train on Ray. Expected the path of the run, where workers that begin again find their checkpoints. "
            "Received: out=None. Pass --out, on a file system that all machines share."
        )
    reporter = reporter or Reporter()
    num_workers, num_gpus = config.num_workers or 1, config.gpus_per_worker or 0
    place = Path(out).absolute()
    storage = place.with_name(f".{place.name}.ray")
    RunWriter(place, overwrite=overwrite, report=reporter.warn).keep()  # what it refuses is refused here
    call = describe_call(task, {"data": data, "overwrite": overwrite, **arguments})
    _start(ray, config)
    try:
        _check_resources(ray.cluster_resources(), num_workers, num_gpus)
        reporter.note(f"Ray      {num_workers} workers at {ray.get_runtime_context().gcs_address}")
        resources: dict[str, float] = {"CPU": 1, **({"GPU": num_gpus} if num_gpus else {})}
        trainer = JaxTrainer(
            _work,
            train_loop_config={"call": json.dumps(call), "out": str(place), "storage": str(storage)},
            scaling_config=ray_train.ScalingConfig(
                num_workers=num_workers, use_gpu=num_gpus > 0, resources_per_worker=resources
            ),
            run_config=ray_train.RunConfig(
                name=_NAME,
                storage_path=str(storage),
                failure_config=ray_train.FailureConfig(
                    max_failures=3 if config.max_failures is None else config.max_failures
                ),
            ),
        )
        for stale in storage.glob(f"{_REFUSED}*"):
            stale.unlink()
        trainer.fit()
        _raise_refusal(storage)
    except ray_train.TrainingFailedError as error:
        raise TrainingError(
            f"Cannot go on training on Ray. Expected the workers to end. Received: {_last_line(error)} "
            "Mend that, and give the same command again: it goes on from the last checkpoint."
        ) from error
    finally:
        ray.shutdown()
        shutil.rmtree(storage, ignore_errors=True)
    return load_run(place)


def _start(ray: Any, config: DistributionConfig) -> None:
    """Joins the cluster, or starts one on this machine. Errors as for `train_on_ray`."""
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "XLA_FLAGS") if name in os.environ}
    environment |= {"KERAS_BACKEND": "jax", "RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    options: dict[str, Any] = {
        "address": config.ray,
        "runtime_env": {"env_vars": environment},
        "log_to_driver": True,
    }
    if config.ray == "local":
        # A worker needs a core of Ray's counting; that there may be more of them than cores is the caller's affair.
        options |= {"num_cpus": max((config.num_workers or 1) + 1, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "Cannot train on Ray. Expected a cluster at the address. "
            f"Received: ray={config.ray!r}: {_last_line(error)} Start one with `ray start --head`, or pass --ray local."
        ) from error


def _check_resources(found: Mapping[str, float], num_workers: int, num_gpus: int) -> None:
    """Raises `ConfigError` where Ray would wait without end."""
    for kind, needed in (("CPU", num_workers), ("GPU", num_workers * num_gpus)):
        if found.get(kind, 0) < needed:
            raise ConfigError(
                f"Cannot start {num_workers} workers. Expected a cluster with {needed} {kind}s. "
                f"Received: {found.get(kind, 0):g}. Pass fewer --num-workers, or add machines."
            )


def _raise_refusal(storage: Path) -> None:
    """Raises `TrainingError` with what a worker was refused for; the cause before what others say of it."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(storage.glob(f"{_REFUSED}*"))]
    if told:
        raise TrainingError(min(told, key=lambda each: bool(each["is_hearsay"]))["error"])


def _work(settings: dict[str, Any]) -> None:
    """What each worker does; where all are refused, each ends quietly: beginning again would not help."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    path = Path(settings["storage"], f"{_REFUSED}{rank:06d}.json")
    path.unlink(missing_ok=True)  # of an attempt before
    try:
        _train_in_worker(settings)
    except (RunError, ClusterError):
        raise  # a lock of a worker that is still dying, a disk that is full for now
    except VitreousError as error:
        if not error.is_of_all:
            raise  # the others wait for this one, and end with it
        told = {"error": str(error), "is_hearsay": isinstance(error, TrainingError)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told), encoding="utf-8")


def _train_in_worker(settings: dict[str, Any]) -> None:
    """Joins the other workers, and trains."""
    import ray.train
    import ray.train.collective

    context = ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    address = ray.train.collective.broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    if count > 1:
        import jax

        if not jax.distributed.is_initialized():  # with GPUs, Ray has done it
            join_processes(str(address), num_processes=count, process_id=rank)
    from vitreous.backend import keep_tensorflow_out
    from vitreous.training.pretrainer import pretrain
    from vitreous.training.recipe import MaskedConfig
    from vitreous.training.trainer import train

    keep_tensorflow_out()
    call = json.loads(settings["call"])
    if call.pop("task") == "pretrain":
        call["masked"] = MaskedConfig.from_dict(call.get("masked") or {})
        pretrain(**call, out=settings["out"], reporter=LineReporter())
    else:
        train(**call, out=settings["out"], reporter=LineReporter())


def _free_address() -> str:
    """Returns an address of this machine that others reach, with a port that nobody uses."""
    import ray.util

    host = ray.util.get_node_ip_address()
    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{host}:{listener.getsockname()[1]}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
