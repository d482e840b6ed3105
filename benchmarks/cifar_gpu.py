"""How accurate is a model of fewer than 7 million weights after ten minutes of training from scratch on one GPU?

Everything is in the ten minutes: reading the images, compilation, training, testing. The images lie in the GPU's memory
and are changed there (`device_augment.py`); model, step, Muon, schedule and averaged weights are vitreous's own, and
training ends with its schedule when the time does. The model has 256 tokens, as CCT-7/3x1 has for 32 pixels: one
convolution of stride 2 and three residual ones make them, five blocks of width 256 read them.

    python benchmarks/cifar_gpu.py CIFAR10 --minutes 10 --out benchmarks/results/DATE-gpu-cifar10.md
    python benchmarks/cifar_gpu.py CIFAR100 --minutes 10 --out benchmarks/results/DATE-gpu-cifar100.md
    python benchmarks/cifar_gpu.py CIFAR10 --miniature     # the same on a CPU, a tiny model for two epochs

CIFAR10 is a folder, or whatever else vitreous reads, with training and test images (train/CLASS and test/CLASS), or an
.npz with x_train, y_train, x_test and y_test. KERAS_BACKEND says which backend computes; default: jax, which compiles
the step. MFU is 6 FLOPs for a multiply-accumulate of the matrix products, over the peak that `--peak-tflops` names
(dense bfloat16; 989 for an H200 or H100). Ends with a table, then one JSON line.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

BEGAN = time.monotonic()
os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

TEST_SECONDS = 30.0  # kept for compiling the test and running it
TEST_BATCH = 1000
SPLITS = ("train", "test")


def read_images(data: str, size: int) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """Returns images (N, size, size, 3) uint8 and labels (N,) of each split, and the number of classes."""
    from vitreous.data import load_dataset, resize_image
    from vitreous.spec import InputSpec

    if data.endswith(".npz"):
        found = {}
        with np.load(data) as arrays:
            for split in SPLITS:
                if not {f"x_{split}", f"y_{split}"} <= set(arrays.files):
                    raise SystemExit(f"{data}: expected x_{split} and y_{split} among {arrays.files}")
                found[split] = arrays[f"x_{split}"], arrays[f"y_{split}"].reshape(-1).astype("int32")
                shape, dtype = found[split][0].shape, found[split][0].dtype
                if dtype != np.uint8 or shape[1:] != (size, size, 3):
                    raise SystemExit(f"{data}: expected uint8 (N, {size}, {size}, 3), received {dtype} {shape}")
        return found, int(found["train"][1].max()) + 1
    dataset = load_dataset(data, val_fraction=0.0)
    spec = InputSpec(image_size=size)
    return {
        split: (np.stack([resize_image(images.load(i), spec) for i in range(len(images))]), images.labels)
        for split, images in ((split, dataset.splits[split]) for split in SPLITS)
    }, len(dataset.class_names)


def describe_model(options: argparse.Namespace, num_classes: int) -> Any:
    from vitreous.spec import ViTConfig

    width = options.width
    return ViTConfig(
        image_size=options.size,
        patch_size=options.patch_size,
        projection_dim=width,
        num_blocks=options.blocks,
        num_heads=max(width // 64, 1),
        mlp_dim=options.mlp_ratio * width,
        num_classes=num_classes,
        use_class_token=False,
        pooling="mean",
        activation="gelu_tanh",
        stem="convolution",
        stem_dim=width,
        stem_depths=tuple(options.stem_depths),
        stochastic_depth_rate=options.stochastic_depth,
    )


def peak_mib() -> float:
    """Returns the most memory that was taken: the GPU's, or without one this process's."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"] / 2**20
    elif keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_loader(loader: Any, seconds: float) -> float:
    """Returns how many images a second the loader makes by itself."""
    from keras import ops

    stream = loader.stream()
    ops.convert_to_numpy(next(stream).images)  # compiles
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        batches = [next(stream) for _ in range(5)]
        ops.convert_to_numpy(batches[-1].images)  # waits
        count += sum(len(batch.mask) for batch in batches)
    return count / (time.monotonic() - start)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import keras
    from device_augment import DeviceLoader

    from vitreous.backend import select_precision
    from vitreous.model import VisionTransformer, create_predict_function
    from vitreous.registry import count_macs, count_parameters
    from vitreous.spec import AugmentConfig, InputSpec
    from vitreous.training.fit import fit
    from vitreous.training.losses import Loss
    from vitreous.training.optimizer import create_optimizer
    from vitreous.training.progress import LineReporter
    from vitreous.training.recipe import OptimizerConfig

    reporter = LineReporter()
    splits, num_classes = read_images(options.data, options.size)
    (images, labels), (test_images, test_labels) = splits["train"], splits["test"]
    reporter.note(f"{len(images):,} + {len(test_images):,} images, {num_classes} classes")
    config = describe_model(options, num_classes)
    policy = select_precision("auto", keras.backend.backend())
    num_parameters, macs = count_parameters(config), count_macs(config)
    reporter.note(f"{num_parameters:,} weights, {macs / 1e6:,.0f}M multiply-accumulates an image, {policy}")
    random.seed(options.seed)  # Keras draws the seeds of its layers here
    model, average = (VisionTransformer(config, name=name, dtype=policy) for name in ("model", "average"))
    settings = OptimizerConfig(
        name="muon",
        learning_rate=options.rate,
        weight_decay=options.weight_decay,
        final_fraction=0.0,
        label_smoothing=0.1,
    )
    loader = DeviceLoader(
        images,
        labels,
        batch_size=options.batch_size,
        config=AugmentConfig(
            crop_scale=(1.0, 1.0),
            shift_pixels=4,
            policy="trivial",
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            mix_rate=options.mix_rate,
        ),
        num_classes=num_classes,
        seed=options.seed,
    )
    loader_speed = measure_loader(loader, 0.1 if options.miniature else 3.0)
    reporter.note(f"images changed on the device: {loader_speed:,.0f} a second")
    spec = InputSpec(image_size=options.size)
    spent = time.monotonic() - BEGAN
    seconds = 60 * options.minutes - spent - TEST_SECONDS
    if not options.miniature and seconds <= 0:
        raise SystemExit(f"{spent:.0f} s went by before training: pass more --minutes")
    history = fit(
        model,
        average,
        loader,
        optimizer=create_optimizer(model, settings, seed=options.seed),
        input_spec=spec,
        config=settings,
        loss=Loss(num_classes, label_smoothing=settings.label_smoothing),
        evaluate=None,
        **({"num_epochs": 2} if options.miniature else {"budget_seconds": seconds}),
        reporter=reporter,
    )
    speed = statistics.median(row["images_per_second"] for row in history.rows)
    final = VisionTransformer(config, name="final", dtype="float32")  # as a run is saved and measured
    final.set_weights(average.get_weights())
    predict = create_predict_function(final, spec)
    parts = range(0, len(test_images), TEST_BATCH)
    answers = np.concatenate([predict(test_images[first : first + TEST_BATCH]).argmax(axis=1) for first in parts])
    return {
        "accuracy": float((answers == test_labels).mean()),
        "seconds": time.monotonic() - BEGAN,
        "train_seconds": history.seconds,
        "num_images_seen": history.num_images,
        "epochs": history.num_images / len(images),
        "images_per_second": speed,
        "loader_images_per_second": loader_speed,
        "mfu": 6 * macs * speed / (options.peak_tflops * 1e12),
        "peak_mib": peak_mib(),
        "num_parameters": num_parameters,
        "num_classes": num_classes,
        "train_loss": history.rows[-1]["train_loss"],
        "backend": keras.backend.backend(),
        "policy": policy,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side that images are brought to")
    parser.add_argument("--width", type=int, default=256, help="of the tokens, a multiple of 64")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--mlp-ratio", type=int, default=2)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--stem-depths", type=int, nargs="+", default=[3])
    parser.add_argument("--stochastic-depth", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--mix-rate", type=float, default=0.7, help="share of the images that are mixed")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--miniature", action="store_true", help="a tiny model for two epochs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.miniature:
        options.size, options.width, options.blocks, options.batch_size = 16, 32, 1, 16
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    found = measure(options)
    rows = (
        ("test accuracy", f"{found['accuracy']:.2%}"),
        ("weights", f"{found['num_parameters']:,}"),
        ("seconds, everything", f"{found['seconds']:.0f}"),
        ("images seen", f"{found['num_images_seen']:,} ({found['epochs']:.0f} epochs)"),
        ("images/s, training", f"{found['images_per_second']:,.0f}"),
        ("images/s, changed on the device", f"{found['loader_images_per_second']:,.0f}"),
        ("MFU", f"{found['mfu']:.1%}"),
        ("memory, MiB", f"{found['peak_mib']:,.0f}"),
    )
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    print(f"\n{table}")
    if options.out:
        command = f"python benchmarks/cifar_gpu.py {' '.join(sys.argv[1:])}"
        options.out.write_text(f"# From scratch on one GPU\n\n{date.today()}, `{command}`\n\n{table}\n")
    print(json.dumps({"benchmark": "cifar_gpu", "data": options.data, "miniature": options.miniature, **found}))


if __name__ == "__main__":
    main()
