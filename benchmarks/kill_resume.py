"""Does a run that is killed, again and again, end bit for bit as one that never was?

One run is trained without a break. Others are begun with the same command, killed with SIGKILL at random instants
(while the process starts, between two saves, inside a save, after training), and begun again with the same command
until they end. Weights, history (but for times) and metrics are compared by their sha256.

    python benchmarks/kill_resume.py --data /path/to/cifar10/train --runs 4 --kills 5

A kill counts as inside a save only if the half-written checkpoint lies there afterwards.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).parents[1] / "src"
sys.path.insert(0, str(SOURCE))

KINDS = ("training", "save", "start", "training", "save", "end")  # each run takes them in turn, from another one on
SAVE_EVERY = 15  # steps


def make_data(source: str | None, folder: Path, num_images: int) -> Path:
    """Returns a folder of a few images a class: copies from `source`, or noise."""
    from PIL import Image

    if source is None:
        rng = np.random.default_rng(0)
        for place in range(num_images):
            path = folder / f"class_{place % 3}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), "uint8")).save(path)
        return folder
    classes = sorted(path for path in Path(source).iterdir() if path.is_dir())
    for old in classes:
        (folder / old.name).mkdir(parents=True)
        for path in sorted(old.iterdir())[: num_images // len(classes)]:
            shutil.copy(path, folder / old.name)
    return folder


def hash_run(path: Path) -> dict[str, str]:
    """Returns the hashes of what a run has learnt and measured."""
    from vitreous import load_run

    run = load_run(path)
    weights = hashlib.sha256(b"".join(weight.tobytes() for weight in run.load_model().get_weights()))
    with (path / "history.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]
    metrics = {name: value for name, value in run.metrics.items() if name != "train_seconds"}
    texts = {"history": json.dumps(rows), "metrics": json.dumps(metrics, sort_keys=True)}
    found = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {"weights": weights.hexdigest(), **found}


class Trainer:
    """Starts the command, and kills it at an instant of some kind."""

    def __init__(self, command: list[str], rng: random.Random):
        self.command = command
        self.rng = rng

    def run(self, out: Path, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.command, "--out", str(out)],
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"},
            )

    def kill(self, out: Path, kind: str, log: Path, startup_seconds: float) -> str:
        """Starts the command and kills it; returns the kind that it came to be, or `"finished"`."""
        partial = out.with_name(f".{out.name}.partial")
        folder = partial / "checkpoints"
        before = newest(folder)
        process = self.run(out, log)

        def wait(condition: Callable[[], bool]) -> bool:
            while process.poll() is None:
                if condition():
                    return True
                time.sleep(0.0002)
            return False

        if kind == "start":
            time.sleep(self.rng.uniform(0, startup_seconds))
        elif kind == "end":
            wait((partial / "run" / "model.keras").exists)
            time.sleep(self.rng.uniform(0, 1))
        else:
            target = before + self.rng.randint(1, 2)
            wait(lambda: newest(folder) >= target)
            if kind == "save":
                wait(lambda: bool(list(folder.glob(".*.tmp"))))
            else:
                time.sleep(self.rng.uniform(0, 0.5))
        process.kill()
        if process.wait() == 0:
            return "finished"
        return "save" if list(folder.glob(".*.tmp")) else "training" if kind == "save" else kind


def newest(folder: Path) -> int:
    """Returns the number of the newest checkpoint."""
    names = [path.name for path in folder.glob("[0-9]*")] if folder.is_dir() else []
    return max(map(int, names), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a folder of images a class; default: noise")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=sorted(set(KINDS)))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", default="vit_pico_patch4_32")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as name:
        folder = Path(name)
        data = make_data(arguments.data, folder / "data", arguments.images)
        options = {
            "--epochs": arguments.epochs,
            "--batch-size": arguments.batch_size,
            "--model": arguments.model,
            "--image-size": arguments.image_size,
            "--backend": arguments.backend,
            "--checkpoint-every": f"{SAVE_EVERY} steps",
            "--architecture.stochastic-depth-rate": 0.1,
        }
        words = [str(word) for pair in options.items() for word in pair]
        trainer = Trainer([sys.executable, "-m", "vitreous", "train", str(data), *words], rng)
        log = folder / "log.txt"
        watch = time.monotonic()
        if trainer.run(folder / "unbroken", log).wait():
            sys.exit(log.read_text())
        seconds = time.monotonic() - watch
        os.environ["KERAS_BACKEND"] = arguments.backend
        from vitreous import load_run

        expected = hash_run(folder / "unbroken")
        metrics = load_run(folder / "unbroken").metrics
        startup = max(seconds - metrics["train_seconds"], 1.0)
        rows: list[dict[str, Any]] = []
        for number in range(arguments.runs):
            out = folder / f"killed-{number}"
            kills: list[str] = []
            while len(kills) < arguments.kills:
                wanted = arguments.kinds[(number + len(kills)) % len(arguments.kinds)]
                if (found := trainer.kill(out, wanted, log, startup)) == "finished":
                    break
                kills.append(found)
            if not out.exists() and trainer.run(out, log).wait():
                sys.exit(log.read_text())
            is_clean = not out.with_name(f".{out.name}.partial").exists()
            found_hashes = hash_run(out)
            equal = {name: found_hashes[name] == expected[name] for name in expected}
            rows.append({"run": number, "kills": kills, **equal, "leaves_nothing": is_clean})
    width = max(len(", ".join(row["kills"])) for row in rows)
    print(f"{metrics['num_steps']} steps, saved every {SAVE_EVERY}; {arguments.backend}")
    print(f"| run | {'killed in':<{width}} | weights | history | metrics |")
    print(f"|-----|{'-' * (width + 2)}|---------|---------|---------|")
    for row in rows:
        told = " | ".join(f"{'equal' if row[name] else 'DIFFERS':<7}" for name in expected)
        print(f"| {row['run']:<3} | {', '.join(row['kills']):<{width}} | {told} |")
    kills = [kill for row in rows for kill in row["kills"]]
    is_equal = all(row[name] for row in rows for name in expected)
    summary = {"num_kills": len(kills), "num_in_save": kills.count("save"), "is_equal": is_equal, "rows": rows}
    print(json.dumps({**summary, "num_steps": metrics["num_steps"], "backend": arguments.backend}))
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    main()
