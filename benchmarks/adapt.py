"""What do a teacher, low-rank updates and a head that learns first bring, on small data?

`start`: a model that was trained on scikit-learn's digits learns to read them turned by 90 degrees, from 10 images a
class (0 to 8: a turned 9 is a turned 6), tested on all test images.
`teacher`: a small model learns the digits alone, and from a larger one that was trained on the same images.

    python benchmarks/adapt.py start --seeds 2
    python benchmarks/adapt.py teacher --seeds 3

Ends with a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
os.environ.setdefault("KERAS_BACKEND", "torch")

FEW = 10  # images a class
# What differs from one fine-tuning to the next; all see 6,000 images in batches of 32.
STARTS: dict[str, dict[str, Any]] = {
    "random weights, recipe digits": {"recipe": "digits", "optimizer": {}},
    "full, rate 1e-4": {"optimizer": {"head_first_fraction": 0.0}},
    "full, rate 1e-4, head first for 10%": {"optimizer": {"head_first_fraction": 0.1}},
    "full, rate 1e-3": {"optimizer": {"learning_rate": 1e-3, "head_first_fraction": 0.0}},
    "full, rate 1e-3, head first for 10%": {"optimizer": {"learning_rate": 1e-3, "head_first_fraction": 0.1}},
    "lora, rank 8, rate 1e-3": {"optimizer": {"trained": "lora", "learning_rate": 1e-3, "head_first_fraction": 0.0}},
    "head, rate 1e-3": {"optimizer": {"trained": "head", "learning_rate": 1e-3}},
}
SMALL = {"architecture": {"projection_dim": 24, "num_heads": 2, "mlp_dim": 48, "num_blocks": 2}, "epochs": 20}
LESSONS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "soft, temperature 2, weight 0.5": {},
    "soft, temperature 3, weight 0.9": {"temperature": 3.0, "weight": 0.9},
    "hard, weight 0.5": {"kind": "hard"},
}


def turn(images: Any, most: int) -> Any:
    """Returns the digits 0 to 8 turned by 90 degrees, the first `most` of each."""
    from vitreous.data import ImageSet

    chosen = [i for digit in range(9) for i in np.flatnonzero(images.labels == digit)[:most]]
    arrays = np.stack([np.rot90(images.load(int(i), 1)) for i in chosen])
    return ImageSet([images.names[i] for i in chosen], images.labels[chosen], arrays=arrays)


def measure_starts(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.data import Dataset, load_dataset
    from vitreous.training import train

    data = load_dataset("digits", seed=0)
    base = train_larger(data, arguments, folder)
    splits = {"train": turn(data.splits["train"], FEW), "test": turn(data.splits["test"], len(data.splits["test"]))}
    new = Dataset(name="turned", root=None, class_names=data.class_names[:9], splits=splits, notes=[])
    augment = {"crop_scale": (0.8, 1.0), "horizontal_flip_rate": 0.0}  # as the base had it
    epochs = 1 if arguments.miniature else round(6000 / len(splits["train"]))
    rows = []
    for name, changes in STARTS.items():
        start = {} if "recipe" in changes else {"pretrained": base, "recipe": "finetune"}
        options = {"batch_size": 32, "augment": augment, "epochs": epochs, **start, **changes}
        runs = [train(new, out=folder / f"{len(rows)}-{seed}", seed=seed, **options) for seed in range(arguments.seeds)]
        rows.append(summarize(name, runs))
    return rows


def train_larger(data: Any, arguments: argparse.Namespace, folder: Path) -> Path:
    """Returns the run that all start from, or learn from: as it was given, or made now by the recipe for digits."""
    from vitreous.training import train

    if arguments.larger is not None:
        return arguments.larger
    return train(data, out=folder / "larger", **({"epochs": 1} if arguments.miniature else {})).path


def measure_lessons(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.data import load_dataset
    from vitreous.training import load_run, train

    data = load_dataset("digits", seed=0)  # the same split for teacher and students of all seeds
    length = {"epochs": 1} if arguments.miniature else {}
    teacher = load_run(train_larger(data, arguments, folder))
    rows = [summarize("the teacher", [teacher])]
    for name, lesson in LESSONS.items():
        runs = []
        for seed in range(arguments.seeds):
            taught = {} if lesson is None else {"teacher": teacher.path, "distillation": lesson or None}
            runs.append(train(data, out=folder / f"{len(rows)}-{seed}", seed=seed, **{**SMALL, **length, **taught}))
        rows.append(summarize(name, runs))
    return rows


def summarize(name: str, runs: list[Any]) -> dict[str, Any]:
    accuracies = [run.metrics["test"]["accuracy"] for run in runs]
    row = {
        "name": name,
        "accuracy": statistics.fmean(accuracies),
        "accuracies": accuracies,
        "num_trained": runs[0].metrics["num_trained"],
        "seconds": statistics.fmean(run.metrics["train_seconds"] for run in runs),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("start", "teacher"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--larger", type=Path, help="a run of digits, seed 0, to start or learn from; default: make it")
    parser.add_argument("--miniature", action="store_true", help="one epoch each, to see that it runs")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = (measure_starts if arguments.part == "start" else measure_lessons)(arguments, Path(folder))
    print("\n| | test accuracy, mean | seeds | weights trained |\n|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{accuracy:.1%}" for accuracy in row["accuracies"])
        print(f"| {row['name']} | {row['accuracy']:.1%} | {each} | {row['num_trained']:,} |")
    print(json.dumps({"part": arguments.part, "rows": rows, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
