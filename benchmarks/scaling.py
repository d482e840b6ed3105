"""What does it cost to train on several devices, and what do they hold?

Devices are simulated: XLA cuts one CPU into four, which share its cores. So the time of a step on four, against that on
one, is what sharing costs (more programs, exchanges through memory), and no gain; what each device holds is exact.

    python benchmarks/scaling.py --devices 4
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_pico_patch4_32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="timed, of each layout in turn")
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    )
    os.environ["KERAS_BACKEND"] = "jax"

    from vitreous.data import Batch
    from vitreous.model import create_model
    from vitreous.spec import InputSpec
    from vitreous.training.distribute import create_layout
    from vitreous.training.losses import Loss
    from vitreous.training.optimizer import create_optimizer
    from vitreous.training.recipe import OptimizerConfig
    from vitreous.training.step import create_step

    rng = np.random.default_rng(0)
    steps: dict[str, Any] = {}
    for name in ("one", "data", "fsdp", "tensor"):
        model, average = (create_model(arguments.model, num_classes=10) for _ in range(2))
        layout = create_layout() if name == "one" else create_layout(arguments.devices, name)
        steps[name] = create_step(
            model,
            average,
            create_optimizer(model, OptimizerConfig()),
            input_spec=InputSpec(image_size=model.config.image_size),
            loss=Loss(10),
            layout=layout,
        )
    size = (arguments.batch_size, *model.config.image_size, 3)
    ones = np.ones(arguments.batch_size, bool)
    batch = Batch(
        rng.integers(0, 256, size, "uint8"), np.arange(len(ones), dtype="int32") % 10, ones, np.arange(len(ones))
    )

    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.steps + 2):  # in turn, so that what else the machine does falls on all
        for name, step in steps.items():
            start = time.perf_counter()
            float(step(batch, learning_rate=1e-4, decay=0.9)[0])  # reading waits
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    found = {}
    print(f"{arguments.model}, batch {arguments.batch_size}, {arguments.devices} devices on {os.cpu_count()} cores\n")
    print("| | ms a step, median | fastest | fastest, of one device's | state on a device, MB |\n|---|---|---|---|---|")
    for name, step in steps.items():
        held: dict[Any, int] = {}
        for array in (array for part in step.state for array in part):
            for shard in array.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        median, fastest = 1e3 * statistics.median(times[name]), 1e3 * min(times[name])
        share, state = fastest / (1e3 * min(times["one"])), max(held.values()) / 1e6
        print(f"| {name} | {median:.1f} | {fastest:.1f} | {share:.2f} | {state:.2f} |")
        found[name] = {"median_ms": median, "fastest_ms": fastest, "of_one": share, "state_mb": state}
    print(json.dumps({**vars(arguments), "found": found}))


if __name__ == "__main__":
    main()
