"""How does the time for an image grow with its size, the tokens, depth, width, batch and number of images?

One thing varies at a time around a small model; each point is the median of interleaved training steps. Beside the time
stands what the arithmetic says: multiply-accumulates of the matrix products against the first point's. The last part
trains on more and more images and reads the peak memory after each.

    KERAS_BACKEND=torch python benchmarks/growth.py --out benchmarks/results/DATE-cpu-growth.png
"""

import argparse
import json
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

BASE = {"image_size": 32, "patch_size": 4, "projection_dim": 96, "num_blocks": 4, "num_heads": 3, "batch_size": 16}
VARIED = {
    "image_size": (16, 32, 64, 96),
    "patch_size": (16, 8, 4, 2),  # tokens at the same image size
    "num_blocks": (1, 2, 4, 8),
    "projection_dim": (48, 96, 192, 384),
    "batch_size": (4, 16, 64, 128),
}
NUM_IMAGES = (128, 512, 2048, 8192)


def create_step(values: dict[str, int]) -> tuple[Any, int]:
    """Returns a function that trains on one batch, and the multiply-accumulates of one image."""
    from vitreous.data import Batch
    from vitreous.model import VisionTransformer
    from vitreous.registry import count_macs
    from vitreous.spec import InputSpec, ViTConfig
    from vitreous.training.losses import Loss
    from vitreous.training.optimizer import create_optimizer
    from vitreous.training.recipe import OptimizerConfig
    from vitreous.training.step import create_step

    values = dict(values)
    size, batch_size = values["image_size"], values.pop("batch_size")
    config = ViTConfig(num_classes=10, mlp_dim=4 * values["projection_dim"], **values)
    model, average = (VisionTransformer(config) for _ in range(2))
    optimizer = create_optimizer(model, OptimizerConfig())
    step = create_step(model, average, optimizer, input_spec=InputSpec(image_size=size), loss=Loss(num_classes=10))
    rng = np.random.default_rng(0)

    def run() -> None:
        images = rng.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, batch_size).astype("int32")
        batch = Batch(images, labels, np.ones(batch_size, bool), np.arange(batch_size))
        float(step(batch, learning_rate=1e-3, decay=0.99)[0])

    return run, count_macs(config)


def measure(name: str, points: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each value of one argument."""
    steps = [create_step({**BASE, name: value}) for value in points]
    seconds: list[list[float]] = [[] for _ in points]
    for i in range(repeats + 1):  # the first round compiles
        for times, (run, _) in zip(seconds, steps, strict=True):
            start = time.perf_counter()
            run()
            if i:
                times.append(time.perf_counter() - start)
    rows = []
    for value, times, (_, macs) in zip(points, seconds, steps, strict=True):
        batch = value if name == "batch_size" else BASE["batch_size"]
        rows.append(
            {"varied": name, "value": value, "ms_per_image": statistics.median(times) / batch * 1e3, "macs": macs}
        )
    return rows


def measure_memory(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns a row for each number of images trained on: milliseconds an image, and the peak memory so far."""
    run, macs = create_step(BASE)
    run()
    rows, done = [], 0
    for count in counts:
        start, before = time.perf_counter(), done
        while done < count:
            run()
            done += BASE["batch_size"]
        seconds = (time.perf_counter() - start) / (done - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(
            {"varied": "num_images", "value": count, "ms_per_image": seconds * 1e3, "macs": macs, "peak_mib": peak}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| varied | value | ms an image | times the first | arithmetic says | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        start = first.setdefault(row["varied"], row)
        lines.append(
            f"| {row['varied']} | {row['value']} | {row['ms_per_image']:.3f} "
            f"| {row['ms_per_image'] / start['ms_per_image']:.2f} | {row['macs'] / start['macs']:.2f} "
            f"| {round(row['peak_mib']) if 'peak_mib' in row else ''} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time an image against each thing varied, both axes logarithmic, with the arithmetic's line."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["varied"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        part = [row for row in rows if row["varied"] == name]
        values, times = [row["value"] for row in part], [row["ms_per_image"] for row in part]
        scale = times[-1] / part[-1]["macs"]
        axes.loglog(values, times, "o-", label="measured")
        axes.loglog(values, [row["macs"] * scale for row in part], "--", color="gray", label="arithmetic")
        axes.set(xlabel=name.replace("_", " "), ylabel="ms an image")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--varied", nargs="*", default=list(VARIED), choices=list(VARIED))
    parser.add_argument("--num-images", nargs="*", type=int, default=NUM_IMAGES)
    parser.add_argument("--points", type=int, default=4, help="of each thing varied, from the first")
    parser.add_argument("--out", type=Path, help="a .png; the table goes beside it as .md")
    options = parser.parse_args()
    import keras

    rows = measure_memory(tuple(options.num_images))
    for name in options.varied:
        rows += measure(name, VARIED[name][: options.points], options.repeats)
    print(table(rows))
    if options.out:
        draw(rows, options.out)
        head = f"# Growth of the time for an image\n\n{date.today()}, Keras on {keras.backend.backend()}, float32, "
        head += f"training steps around {BASE}.\n\n"
        options.out.with_suffix(".md").write_text(head + f"![growth]({options.out.name})\n\n" + table(rows) + "\n")
    print(json.dumps({"benchmark": "growth", "backend": keras.backend.backend(), "rows": rows}))


if __name__ == "__main__":
    main()
