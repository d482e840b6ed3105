"""What do weights to start from bring on small data: masked pretraining, other classes, a teacher, low-rank updates?

`pretrain`: an encoder learns to fill in hidden patches of images whose labels it is not told; from it, and from random
weights, training goes on with the first 60 images a class (by name) of the same set, which were not among them. Tested
on all test images.
`classes`: a classifier of all classes but one; from it, and from random weights, training goes on with 60 images of the
class left out against 60 of all others. Tested on half of the test images of that class and as many others; the other
half says after how many images it was how good. Seed s leaves out class 3 s (mod the number of classes).
`start`: a model that was trained on scikit-learn's digits learns to read them turned by 90 degrees, from 10 images a
class (0 to 8: a turned 9 is a turned 6), tested on all test images.
`teacher`: a small model learns the digits alone, and from a larger one that was trained on the same images.

    python benchmarks/adapt.py pretrain --data CIFAR10 --time 6m --examples 60000 --seeds 2     # 15 minutes on 2 cores
    python benchmarks/adapt.py pretrain --data CIFAR10 --time 30s --images 5000 --examples 6000 --seeds 1     # short
    python benchmarks/adapt.py classes --data CIFAR10 --time 2m --examples 30000 --seeds 3     # 15 minutes
    python benchmarks/adapt.py classes --data CIFAR10 --time 30s --examples 6000 --seeds 1     # short
    python benchmarks/adapt.py start --seeds 2
    python benchmarks/adapt.py teacher --seeds 3

CIFAR10 holds train/CLASS and test/CLASS. Without --examples each training on few images has the length that its recipe
says, and where these differ, one more from scratch is as long as that which did not start there. Ends with a table,
then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
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
        runs = [
            keep(folder / f"{len(rows)}-{seed}", train, new, seed=seed, **options) for seed in range(arguments.seeds)
        ]
        rows.append(summarize(name, runs))
    return rows


def load_images(arguments: argparse.Namespace) -> Any:
    from vitreous.data import load_dataset

    if arguments.data is None:
        raise SystemExit(f"{arguments.part} needs --data: a folder with train/CLASS and test/CLASS")
    return load_dataset(arguments.data, val_fraction=0.0)


def pick(labels: np.ndarray, classes: Any, count: int) -> np.ndarray:
    """Returns where `count` images of some classes lie, of each class as many as of the others, the first by name."""
    found = [np.flatnonzero(labels == label) for label in classes]
    return np.concatenate([places[: count // len(found) + (k < count % len(found))] for k, places in enumerate(found)])


def lengths(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options that say how long the first training takes, and how long those on few images."""
    if arguments.miniature:
        return {"epochs": 1}, {"epochs": 1}
    long = {"time": arguments.time} if arguments.epochs is None else {"epochs": arguments.epochs}
    return long, {} if arguments.examples is None else {"num_examples_seen": arguments.examples}


def keep(path: Path, make: Any, *data: Any, **options: Any) -> Any:
    """Returns the run at `path`: the one that is there from before (`--keep`), or made now by `make`."""
    from vitreous.training import load_run

    return load_run(path) if path.exists() else make(*data, out=path, **options)


def measure_pretraining(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.data import Dataset
    from vitreous.training import pretrain, train

    data = load_images(arguments)
    images = data.splits["train"]
    few = pick(images.labels, range(len(data.class_names)), arguments.per_class * len(data.class_names))
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(images)), few))[: arguments.images]
    long, short = lengths(arguments)
    unlabelled = Dataset(name="unlabelled", root=None, class_names=(), splits={"train": images.take(np.sort(rest))})
    base = keep(folder / "base", pretrain, unlabelled, **long)
    names = ("num_images_seen", "val_loss", "train_seconds")
    print(json.dumps({"pretrained_on": len(rest), **{name: base.metrics[name] for name in names}}), flush=True)
    splits = {"train": images.take(few), "test": data.splits["test"]}
    labelled = Dataset(name="few", root=None, class_names=data.class_names, splits=splits)

    def measure(name: str, **options: Any) -> dict[str, Any]:
        place = name.replace(",", "").replace(" ", "-")
        runs = [keep(folder / f"{place}-{s}", train, labelled, seed=s, **options) for s in range(arguments.seeds)]
        return summarize(name, runs, epochs=runs[0].config["recipe"]["epochs"])

    rows = [measure("from the pretrained encoder", pretrained=base.path, **short), measure("from scratch", **short)]
    if rows[0]["epochs"] != rows[1]["epochs"]:
        rows.append(measure("from scratch, as many images seen", epochs=rows[0]["epochs"]))
    best = max(row["accuracy"] for row in rows[1:])
    print(f"\npretraining brings {100 * (rows[0]['accuracy'] - best):+.1f} points over the best from scratch")
    return rows


def measure_classes(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from vitreous.training import train

    data = load_images(arguments)
    long, short = lengths(arguments)
    found: dict[str, list[Any]] = {}
    reached: dict[str, list[int | None]] = {}
    for seed in range(arguments.seeds):
        left_out = 3 * seed % len(data.class_names)
        base = keep(folder / f"base-{seed}", train, without_class(data, left_out), seed=seed, **long)
        task = class_against_rest(data, left_out, arguments.per_class)
        print(f"all but {task.name}: {base.metrics['test']['accuracy']:.1%} of their own test images", flush=True)
        adapted = keep(folder / f"adapted-{seed}", train, task, seed=seed, pretrained=base.path, **short)
        runs = {"from the other classes": adapted}
        runs["from scratch"] = scratch = keep(folder / f"scratch-{seed}", train, task, seed=seed, **short)
        epochs = adapted.config["recipe"]["epochs"]
        if epochs != scratch.config["recipe"]["epochs"]:
            equal = keep(folder / f"equal-{seed}", train, task, seed=seed, epochs=epochs)
            runs["from scratch, as many images seen"] = equal
        goal = max(read_history(run)[-1]["val_accuracy"] for run in list(runs.values())[1:])
        for name, run in runs.items():
            found.setdefault(name, []).append(run)
            reached.setdefault(name, []).append(count_images(run, goal))
    rows = []
    for name, runs in found.items():
        areas = [run.metrics["test"]["macro_roc_auc"] for run in runs]
        rows.append(summarize(name, runs, roc_auc=statistics.fmean(areas), images_to_goal=reached[name]))
    print("\nimages_to_goal: seen until the best final accuracy from scratch, on images kept for that; null: never")
    return rows


def without_class(data: Any, left_out: int) -> Any:
    """Returns a data set without the images of one class."""
    from vitreous.data import Dataset

    splits = {}
    for split, images in data.splits.items():
        chosen = images.take(np.flatnonzero(images.labels != left_out))
        splits[split] = chosen.with_labels(chosen.labels - (chosen.labels > left_out))
    names = tuple(name for label, name in enumerate(data.class_names) if label != left_out)
    return Dataset(name="others", root=None, class_names=names, splits=splits)


def class_against_rest(data: Any, label: int, count: int) -> Any:
    """Returns one class against as many of all others: `count` of each to train on, all of the class to test on."""
    from vitreous.data import Dataset

    others = [other for other in range(len(data.class_names)) if other != label]

    def choose(images: Any, count: int) -> Any:
        chosen = images.take(np.concatenate([pick(images.labels, classes, count) for classes in (others, [label])]))
        return chosen.with_labels(chosen.labels == label)

    test = data.splits["test"]
    test = choose(test, int((test.labels == label).sum()))
    splits = {"train": choose(data.splits["train"], count)}
    splits |= {"val": test.take(range(0, len(test), 2)), "test": test.take(range(1, len(test), 2))}
    name = data.class_names[label]
    return Dataset(name=name, root=None, class_names=("others", name), splits=splits)


def read_history(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]


def count_images(run: Any, accuracy: float) -> int | None:
    """Returns after how many images a run first had an accuracy in validation; None if never."""
    num_images = run.config["data"]["num_images"]["train"]
    return next((row["epoch"] * num_images for row in read_history(run) if row["val_accuracy"] >= accuracy), None)


def train_larger(data: Any, arguments: argparse.Namespace, folder: Path) -> Path:
    """Returns the run that all start from, or learn from: as it was given, or made now by the recipe for digits."""
    from vitreous.training import train

    if arguments.larger is not None:
        return arguments.larger
    return keep(folder / "larger", train, data, **({"epochs": 1} if arguments.miniature else {})).path


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


def summarize(name: str, runs: list[Any], **more: Any) -> dict[str, Any]:
    accuracies = [run.metrics["test"]["accuracy"] for run in runs]
    row = {
        "name": name,
        "accuracy": statistics.fmean(accuracies),
        "accuracies": accuracies,
        "num_trained": runs[0].metrics["num_trained"],
        "num_images_seen": runs[0].metrics["num_images_seen"],
        "seconds": statistics.fmean(run.metrics["train_seconds"] for run in runs),
        **more,
    }
    print(json.dumps(row), flush=True)
    return row


PARTS = {
    "pretrain": measure_pretraining,
    "classes": measure_classes,
    "start": measure_starts,
    "teacher": measure_lessons,
}


def check_kept(arguments: argparse.Namespace) -> None:
    """Ends if the runs that are kept are those of other arguments; more seeds may be asked for."""
    told = {name: str(value) for name, value in vars(arguments).items() if name not in ("seeds", "keep")}
    file = arguments.keep / "arguments.json"
    if file.exists() and (before := json.loads(file.read_text())) != told:
        raise SystemExit(f"{arguments.keep} holds the runs of other arguments: {before}")
    arguments.keep.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="of pretrain and classes: a folder with train/CLASS and test/CLASS")
    parser.add_argument("--time", default="5m", help="of the training that the others start from, such as 90s or 5m")
    parser.add_argument("--epochs", type=int, help="of that training, in place of --time: the same on any machine")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; those that are there are not trained again")
    parser.add_argument("--images", type=int, help="of pretrain: how many to pretrain on; default: all that are left")
    parser.add_argument("--examples", type=int, help="images seen in each training on few; default: the recipes'")
    parser.add_argument("--per-class", type=int, default=60, help="labelled images of each class")
    parser.add_argument("--larger", type=Path, help="a run of digits, seed 0, to start or learn from; default: make it")
    parser.add_argument("--miniature", action="store_true", help="one epoch each, to see that it runs")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.keep is not None:
        check_kept(arguments)
    with tempfile.TemporaryDirectory() if arguments.keep is None else nullcontext(arguments.keep) as folder:
        rows = PARTS[arguments.part](arguments, Path(folder))
    print("\n| | test accuracy, mean | seeds | images seen | weights trained |\n|---|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{accuracy:.1%}" for accuracy in row["accuracies"])
        print(
            f"| {row['name']} | {row['accuracy']:.1%} | {each} | {row['num_images_seen']:,} | {row['num_trained']:,} |"
        )
    print(json.dumps({"part": arguments.part, "rows": rows, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
