"""Which devices and processes train one model together: what a user says of it."""

from dataclasses import dataclass
from typing import Any, Literal

from vitreous.spec import Record, check

Parallel = Literal["data", "fsdp", "tensor"]
Devices = int | Literal["all"]
CheckpointKind = Literal["whole", "sharded"]


@dataclass(frozen=True, kw_only=True)
class DistributionConfig(Record):
    """Which devices and processes train one model together; only on the jax backend.

    Args:
        devices: How many devices of this machine to train on, or all. Default: one; all, where there are several
            processes.
        parallel: What the devices share. data: the rows of a batch (default). fsdp: also weights and optimiser, for
            models that one device does not hold. tensor: within a process the matrices of each block, among processes
            the rows.
        checkpoints: How the state of training is saved. whole: gathered and written by the first process (default).
            sharded: each process writes the parts that it holds, and nothing is gathered; needs the extra orbax. Either
            goes on on other devices, and as the other.
        coordinator: Address of the first of several processes, HOST:PORT, the same in all; or auto: what Slurm,
            Kubernetes or Open MPI say.
        num_processes: How many processes train together, with --coordinator HOST:PORT.
        process_id: Which of them this is, from 0, with --coordinator HOST:PORT. The first one writes the run.
        ray: Address of the Ray cluster that this machine belongs to: auto, or HOST:PORT; or local, which starts one
            here.
        num_workers: Processes that Ray starts and watches, with --ray; all begin again from the last checkpoint when
            one dies. Default: 1.
        gpus_per_worker: GPUs for each of them, with --ray. Default: none.
        max_failures: How often they begin again, with --ray. Default: 3.
    """

    devices: Devices | None = None
    parallel: Parallel | None = None
    checkpoints: CheckpointKind | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    ray: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None
    max_failures: int | None = None

    def __post_init__(self) -> None:
        counts = {"num_workers": 1, "gpus_per_worker": 0, "max_failures": 0}
        given = {name: value for name in counts if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            least = counts[name]
            check(value >= least, f"Cannot use {name}.", f"{least} or more", f"{name}={value}", "Pass such a number.")
        check(
            self.ray is not None or not given,
            "Cannot start workers.",
            "the address of a Ray cluster beside them",
            ", ".join(f"{name}={value}" for name, value in given.items()),
            "Pass --ray auto, or --ray local.",
        )
        check(
            self.ray is None or (self.coordinator, self.num_processes, self.process_id) == (None, None, None),
            "Cannot train on Ray.",
            "no addresses of processes beside --ray: Ray starts them, and they find each other",
            f"coordinator={self.coordinator!r}, num_processes={self.num_processes}, process_id={self.process_id}",
            "Leave them out.",
        )

    @property
    def is_several(self) -> bool:
        """Whether anything is asked for that one device alone does not have."""
        alone = (("devices", 1), ("checkpoints", "whole"))
        return any(value is not None for name, value in self.to_dict().items() if (name, value) not in alone)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of `train` and `pretrain` among the fields."""
        return {"devices": self.devices, "parallel": self.parallel, "checkpoints": self.checkpoints}
