"""What do checkpoints cost training?

Two measures, on noise: the time for which a save holds up the loop (the copy of the state), and by how much the steps
slow down that run while a save is being written. Both for one save, as a share of the default interval.

    python benchmarks/checkpoint.py --model vit_tiny_patch16_224 --batch-size 8

On several devices, whole or sharded (a CPU passes for four with XLA_FLAGS=--xla_force_host_platform_device_count=4):

    python benchmarks/checkpoint.py --devices 4 --parallel fsdp --checkpoints sharded
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="between two saves")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--parallel", choices=("data", "fsdp", "tensor"))
    parser.add_argument("--checkpoints", choices=("whole", "sharded"), default="whole")
    parser.add_argument("--out", help="folder on the disk to measure; default: for temporary files")
    arguments = parser.parse_args()
    import keras

    from vitreous.data import Batch
    from vitreous.model import create_model
    from vitreous.spec import InputSpec
    from vitreous.training.checkpoint import Checkpoints
    from vitreous.training.distribute import create_layout
    from vitreous.training.losses import Loss
    from vitreous.training.optimizer import create_optimizer
    from vitreous.training.recipe import Interval, OptimizerConfig, Recipe, parse_interval
    from vitreous.training.sharded import ShardedCheckpoints, read_arrays
    from vitreous.training.step import create_step

    layout, is_sharded = create_layout(arguments.devices, arguments.parallel), arguments.checkpoints == "sharded"
    model, average = (create_model(arguments.model, num_classes=10) for _ in range(2))
    size, rng = model.config.image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch_size, *size, 3), "uint8")
    ones = np.ones(arguments.batch_size, bool)
    batch = Batch(images, rng.integers(0, 10, arguments.batch_size).astype("int32"), ones, np.arange(len(ones)))
    step = create_step(
        model,
        average,
        create_optimizer(model, OptimizerConfig()),
        input_spec=InputSpec(image_size=size),
        loss=Loss(10),
        layout=layout,
    )

    def take_step() -> float:
        start = time.perf_counter()
        loss, _ = step(batch, learning_rate=1e-4, decay=0.9)
        float(loss)  # waits
        return time.perf_counter() - start

    take_step(), take_step()
    plain, beside, held, written = [], [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        checkpoints: Checkpoints = Checkpoints(folder, interval=Interval())
        if is_sharded:
            checkpoints = ShardedCheckpoints(folder, interval=Interval(), layout=layout)
            step.is_finite(arrays := step.snapshot_parts())  # compiles
            checkpoints.save({}, arrays, num_steps=0)  # imports Orbax
            checkpoints.wait()
        for number in range(arguments.saves):
            plain += [take_step() for _ in range(arguments.steps)]
            start = time.perf_counter()
            arrays = step.snapshot_parts() if is_sharded else step.snapshot()
            if is_sharded:
                step.is_finite(arrays)
            checkpoints.save({}, arrays, num_steps=number)
            held.append(time.perf_counter() - start)
            while checkpoints.is_writing:
                beside.append(take_step())
            written.append(time.perf_counter() - start)
            checkpoints.wait()
        num_bytes = sum(path.stat().st_size for path in max(Path(folder).iterdir()).rglob("*") if path.is_file())
        start = time.perf_counter()
        found = checkpoints.load()
        assert found is not None
        step.restore(found.arrays if not is_sharded else read_arrays(found, step.get_places(0), layout))
        loaded = time.perf_counter() - start
    usual = statistics.median(plain)
    lost = sum(max(seconds - usual, 0) for seconds in beside) / arguments.saves
    interval = parse_interval(Recipe().checkpoint_every).seconds or 0.0
    share = (statistics.mean(held) + lost) / interval
    print(f"{arguments.model}, {keras.backend.backend()}, batch {arguments.batch_size}")
    print(
        "| a save   | step (median) | save holds up the loop | until it is on the disk | steps lose meanwhile | share |"
    )
    print(
        "|----------|---------------|------------------------|-------------------------|----------------------|-------|"
    )
    print(
        f"| {num_bytes / 1e6:5.0f} MB | {usual * 1e3:10.1f} ms | {statistics.mean(held) * 1e3:19.1f} ms | "
        f"{statistics.mean(written):21.2f} s | {lost * 1e3:17.1f} ms | {share:.2%} |"
    )
    result = {
        "model": arguments.model,
        "backend": keras.backend.backend(),
        "num_bytes": num_bytes,
        "step_seconds": usual,
        "held_seconds": statistics.mean(held),
        "written_seconds": statistics.mean(written),
        "lost_seconds": lost,
        "share_of_time": share,
        "loaded_seconds": loaded,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
