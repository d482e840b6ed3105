"""How fast images come off the disk: vitreous's Loader, torch's DataLoader, tf.data, and decoding alone as the limit.

    python benchmarks/pipeline.py --photos PHOTOS --small CIFAR/train --out benchmarks/results/DATE-MACHINE-pipeline.md

Photographs go to 224 pixels by a random resized crop (area 0.08 to 1, bicubic, antialiased) and a flip; small images to
their own size by the same crop and flip. Every way is run once in each round, in turn, and the medians are shown: on a
machine that others use too, ratios hold and absolute figures do not. Ways whose package is not installed are left out.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vitreous.data import AugmentConfig, ImageSet, Loader
from vitreous.spec import InputSpec

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
AUGMENT = AugmentConfig(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), horizontal_flip_rate=0.5)
BATCH = 64


def list_images(folder, count):
    """Paths below a folder, spread evenly, each repeated until there are `count`."""
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]
    return (paths * -(-count // len(paths)))[:count]


# ----- ours, and the limit


def run_ours(paths, size, workers, epochs=1, cache="none"):
    images = ImageSet(paths, [0] * len(paths), root="/", file_sizes=[os.path.getsize(path) for path in paths])
    loader = Loader(
        images,
        InputSpec(image_size=size),
        batch_size=BATCH,
        augment=AUGMENT,
        shuffle=True,
        num_workers=workers,
        cache=cache,
    )
    for epoch in range(epochs):
        start = time.perf_counter()
        for _ in loader.epoch(epoch):
            pass
        seconds = time.perf_counter() - start
    return seconds


def run_decode(paths, size, workers):
    """Decoding alone, to the whole image: the limit of any way that decodes whole images."""
    import simplejpeg

    def work(path):
        simplejpeg.decode_jpeg(Path(path).read_bytes())

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        parts = [paths[i::workers] for i in range(workers)]
        list(pool.map(lambda part: [work(path) for path in part] and None, parts))
    return time.perf_counter() - start


# ----- peers


def crop_by_the_book(width, height):
    """The crop of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = random.randint(0, width - columns), random.randint(0, height - rows)
            return left, top, left + columns, top + rows
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


class PillowImages:
    """A torch data set: Pillow decodes, crops, resizes and flips; the batch is uint8, as ours is."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        import torch
        from PIL import Image

        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image = image.crop(crop_by_the_book(*image.size)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), 0


_TORCH = {}


def run_torch(paths, size, workers):
    """Worker processes are started, and one epoch read, before the clock runs; they stay for the next rounds."""
    from torch.utils.data import DataLoader

    key = (len(paths), size, workers)
    if key not in _TORCH:
        _TORCH[key] = DataLoader(
            PillowImages(paths, size),
            BATCH,
            shuffle=True,
            num_workers=workers,
            persistent_workers=True,
            prefetch_factor=4,
        )
        for _ in _TORCH[key]:
            pass
    start = time.perf_counter()
    for _ in _TORCH[key]:
        pass
    return time.perf_counter() - start


_TENSORFLOW = {}


def run_tensorflow(paths, size, workers):
    import tensorflow as tf

    def load(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)  # decodes the crop's rows and columns alone
        image = tf.image.resize(image, (size, size), method="bicubic", antialias=True)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), 0

    key = (len(paths), size, workers)
    if key not in _TENSORFLOW:
        options = tf.data.Options()
        options.threading.private_threadpool_size = workers
        options.threading.max_intra_op_parallelism = 1
        files = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
        _TENSORFLOW[key] = (
            files.map(load, num_parallel_calls=workers, deterministic=True)
            .batch(BATCH)
            .prefetch(2)
            .with_options(options)
        )
    start = time.perf_counter()
    for _ in _TENSORFLOW[key]:
        pass
    return time.perf_counter() - start


def cpu_seconds():
    """CPU time so far of this process and of its worker processes, which live on: what other programs cannot spoil."""
    tick, total = os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path("/proc", child, "stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def installed(*names):
    import importlib.util

    return all(importlib.util.find_spec(name) for name in names)


# ----- input beside training


TRAIN_CODE = """
import json, sys, time
import numpy as np
from vitreous.data import AugmentConfig, ImageSet, Loader
from vitreous.spec import InputSpec, ModelSpec
from vitreous.registry import get_spec
from vitreous.model import VisionTransformer
from vitreous.training.losses import Loss
from vitreous.training.optimizer import create_optimizer
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.step import create_step
paths, steps, batch = json.loads(sys.stdin.read())
spec = get_spec("vit_tiny_patch16_224", num_classes=10)
model, average = (VisionTransformer(spec.config, dtype="mixed_bfloat16") for _ in range(2))
config = OptimizerConfig()
step = create_step(model, average, create_optimizer(model, config), input_spec=spec.input, loss=Loss(10))
images = ImageSet(paths, np.arange(len(paths)) % 10, root="/", file_sizes=[100_000] * len(paths))
augment = AugmentConfig(crop_scale=(0.08, 1.0))
loader = Loader(images, spec.input, batch_size=batch, augment=augment, shuffle=True, cache="none")
waits, whole, epoch = [], [], 0
while len(waits) < steps:
    batches = loader.epoch(epoch)
    epoch += 1
    while len(waits) < steps:
        start = time.perf_counter()
        made = next(batches, None)
        if made is None:
            break
        waiting = time.perf_counter() - start
        loss, _ = step(made, learning_rate=1e-4, decay=0.9)
        float(loss)
        waits.append(waiting)
        whole.append(time.perf_counter() - start)
    batches.close()
skip = 3
print(json.dumps({"step_seconds": float(np.median(whole[skip:])), "wait_share": sum(waits[skip:]) / sum(whole[skip:])}))
"""


def measure_training(paths, steps, batch, backend):
    """Share of a training step of vit_tiny_patch16_224 that waits for its batch, in a process of its own."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", TRAIN_CODE],
        input=json.dumps([paths, steps, batch]),
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def resident_megabytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def measure_memory(paths, size, epochs):
    """Resident memory after each epoch."""
    images = ImageSet(paths, [0] * len(paths), root="/", file_sizes=[os.path.getsize(path) for path in paths])
    loader = Loader(
        images,
        InputSpec(image_size=size),
        batch_size=BATCH,
        augment=AUGMENT,
        shuffle=True,
        num_workers=2,
        cache="none",
    )
    found = []
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
        gc.collect()
        found.append(round(resident_megabytes(), 1))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", help="folder of photographs (JPEG)")
    parser.add_argument("--small", help="folder of small images (JPEG), such as CIFAR-10's")
    parser.add_argument("--num-photos", type=int, default=500)
    parser.add_argument("--num-small", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train-steps", type=int, default=20, help="steps of training to measure waiting in; 0: none")
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--train-backend", default="torch")
    parser.add_argument("--epochs", type=int, default=20, help="epochs over which memory is measured")
    parser.add_argument("--out", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args()
    ways = {"vitreous": run_ours, "decode alone": run_decode}
    missing = []
    for name, run, needs in (
        ("torch DataLoader + Pillow", run_torch, ("torch",)),
        ("tf.data", run_tensorflow, ("tensorflow",)),
    ):
        if installed(*needs):
            ways[name] = run
        else:
            missing.append(name)
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", flush=True)

    lines, results = [], {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": [], "left_out": missing}

    def say(line=""):
        print(line, flush=True)
        lines.append(line)

    memory = []
    if arguments.photos:  # first, while nothing else is loaded
        memory = measure_memory(list_images(arguments.photos, 250), 224, arguments.epochs)
    cases = [("photographs to 224", arguments.photos, arguments.num_photos, 224)]
    cases.append(("small images to 32", arguments.small, arguments.num_small, 32))
    say("Images/s, and in brackets the CPU time of an image in microseconds, which other programs disturb less.")
    say("The last two columns: ours against the best peer and against decoding, by the clock and by CPU time.\n")
    say(f"| median of {arguments.rounds} | workers | {' | '.join(ways)} | best peer | of decode |")
    say("|---|---|" + "---|" * len(ways) + "---|---|")
    for case, folder, count, size in cases:
        if not folder:
            continue
        paths = list_images(folder, count)
        for workers in (1, 2):
            seconds = {name: [] for name in ways}
            cpu = {name: [] for name in ways}
            for turn in range(arguments.rounds + 1):  # the first one warms up
                for name, run in ways.items():
                    start = cpu_seconds()
                    taken = run(paths, size, workers)
                    if turn:
                        seconds[name].append(taken)
                        cpu[name].append((cpu_seconds() - start) / count * 1e6)
            rates = {name: count / float(np.median(taken)) for name, taken in seconds.items()}
            peers = [rate for name, rate in rates.items() if name not in ("vitreous", "decode alone")]
            over_peer = rates["vitreous"] / max(peers) if peers else None
            of_limit = rates["vitreous"] / rates["decode alone"]
            costs = {name: float(np.median(taken)) for name, taken in cpu.items()}
            row = {"case": case, "workers": workers, "rates": rates, "over_best_peer": over_peer, "of_decode": of_limit}
            results["rows"].append({**row, "cpu_microseconds": costs})
            shown = " | ".join(f"{rates[name]:,.0f} ({costs[name]:,.0f})" for name in rates)
            by_cpu = min((costs[name] for name in rates if name not in ("vitreous", "decode alone")), default=math.nan)
            by_cpu, cpu_of_limit = by_cpu / costs["vitreous"], costs["decode alone"] / costs["vitreous"]
            say(
                f"| {case} | {workers} | {shown} | {over_peer or math.nan:.2f}x ({by_cpu:.2f}x) "
                f"| {of_limit:.2f}x ({cpu_of_limit:.2f}x) |"
            )
    _TORCH.clear()
    gc.collect()
    if arguments.small:
        paths = list_images(arguments.small, arguments.num_small)
        cached = [arguments.num_small / run_ours(paths, 32, 1, epochs=2, cache="memory") for _ in range(3)]
        results["cached_small"] = float(np.median(cached))
        say(
            "\nSmall images from the second epoch on (decoded once, kept in memory), 1 worker: "
            f"{np.median(cached):,.0f}/s."
        )
    if arguments.photos:
        paths = list_images(arguments.photos, arguments.num_photos)
        results["resident_megabytes"] = memory
        say(f"\nResident memory after epochs 1 to {len(memory)} of 250 photographs, MB: {', '.join(map(str, memory))}.")
        if arguments.train_steps:
            found = measure_training(paths, arguments.train_steps, arguments.train_batch, arguments.train_backend)
            results["training"] = found
            say(
                f"\nTraining vit_tiny_patch16_224 ({arguments.train_backend}, batch {arguments.train_batch}): "
                f"{found['step_seconds']:.2f} s a step, of which {found['wait_share']:.1%} waits for the batch."
            )
    if arguments.out:
        head = (
            f"# The input pipeline\n\n`python benchmarks/pipeline.py --photos PHOTOS --small CIFAR/train "
            f"--num-photos {arguments.num_photos} --num-small {arguments.num_small} --rounds {arguments.rounds}`, "
            f"{results['machine']}, load {os.getloadavg()[0]:.1f} at the end.\n\n"
        )
        arguments.out.write_text(head + "\n".join(lines) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
