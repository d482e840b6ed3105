"""What do a teacher, low-rank updates and a head that learns first bring, on small data?

`start`: a model trained on CIFAR-10's first five classes learns the other five from 60 images each, tested on 300 each.
`teacher`: a small model learns scikit-learn's digits alone, and from a larger one that was trained on the same images.

    python benchmarks/adapt.py start --data CIFAR10 --seeds 3
    python benchmarks/adapt.py teacher --seeds 3

CIFAR10 is a folder with train/CLASS and test/CLASS. Ends with a table, then one JSON line.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
os.environ.setdefault("KERAS_BACKEND", "torch")

FEW, HELD_OUT = 60, 300  # images a class
# What differs from one fine-tuning to the next; all show the model 9,000 images in batches of 32.
STARTS: dict[str, dict[str, Any]] = {
    "random weights, recipe small32": {"recipe": "small32", "batch_size": 32},
    "full": {"optimizer": {"head_first_fraction": 0.0}},
    "full, head first for 10%": {"optimizer": {"head_first_fraction": 0.1}},
    "last-2": {"optimizer": {"trained": "last-2", "head_first_fraction": 0.0}},
    "lora, rank 8, rate 1e-4": {"optimizer": {"trained": "lora", "head_first_fraction": 0.0}},
    "lora, rank 8, rate 1e-3": {"optimizer": {"trained": "lora", "learning_rate": 1e-3, "head_first_fraction": 0.0}},
    "full, rate 1e-3": {"optimizer": {"learning_rate": 1e-3, "head_first_fraction": 0.0}},
    "head": {"optimizer": {"trained": "head", "learning_rate": 1e-3}},
}
SMALL = {"architecture": {"projection_dim": 24, "num_heads": 2, "mlp_dim": 48, "num_blocks": 2}, "epochs": 20}
LESSONS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "soft, temperature 2, weight 0.5": {},
    "soft, temperature 3, weight 0.9": {"temperature": 3.0, "weight": 0.9},
    "hard, weight 0.5": {"kind": "hard"},
}


def measure_starts(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.training import train

    old, new = folder / "old", folder / "new"
    names = sorted(path.name for path in (arguments.data / "train").iterdir())
    for root, chosen in ((old, names[:5]), (new, names[5:])):
        for part in ("train", "test"):
            for name in chosen:
                place = root / part / name
                place.mkdir(parents=True)
                files = sorted((arguments.data / part / name).iterdir())
                count = {"train": FEW if root == new else None, "test": HELD_OUT}[part]
                for file in files[:count]:
                    (place / file.name).symlink_to(file.resolve())
    seen = {"num_examples_seen": 9000}
    length = {"time": arguments.time} if arguments.time else {"num_examples_seen": 200_000}
    base = train(old, out=folder / "base", recipe="small32", val_fraction=0.0, **length)
    print(f"base     {base.metrics['test']['accuracy']:.1%} of the first five classes", flush=True)
    rows = []
    for name, changes in STARTS.items():
        start = {} if "recipe" in changes else {"pretrained": base.path, "recipe": "finetune"}
        augment = {"crop_scale": (1.0, 1.0), "shift_pixels": 4}  # as the base had it
        runs = [
            train(new, out=folder / f"{len(rows)}-{seed}", seed=seed, val_fraction=0.0, augment=augment,
                  **{**seen, **start, **changes})
            for seed in range(arguments.seeds)
        ]  # fmt: skip
        rows.append(summarize(name, runs))
    return rows


def measure_lessons(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.data import load_dataset
    from vitreous.training import train

    data = load_dataset("digits", seed=0)  # the same split for teacher and students of all seeds
    length = {"epochs": 1} if arguments.time else {}
    teacher = train(data, out=folder / "teacher", **length)
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
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders of images, for `start`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", help="time for the base of `start`, such as 150s; any for `teacher`: in miniature")
    arguments = parser.parse_args()
    if arguments.part == "start" and arguments.data is None:
        parser.error("start needs --data")
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
