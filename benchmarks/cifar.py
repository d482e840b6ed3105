"""What accuracy does training from scratch reach in the same minutes, beside the ViT of Keras's example and timm's?

Each contender trains on the same folder of images for the same time on the wall, alone on the machine, one after the
other; the time is that of training, with compilation, without reading the images. The contenders:

- `ours`: `vitreous train` with the recipe that it chooses for the data.
- `keras`: the classifier of Keras's own example "Image classification with Vision Transformer": images enlarged to 72
  pixels, patches of 6, width 64, 8 blocks of 4 heads, a head of 2,048 and 1,024, AdamW at 1e-3 with weight decay 1e-4,
  batch 256; random flip, rotation and zoom. On jax, compiled, through `fit`.
- `keras-small`: the same body without the enlargement, patches as timm's: what the example is at this image size.
- `timm`: timm's VisionTransformer in the size of our model without its stem, AdamW at 1e-3 with a cosine to 0, weight
  decay 0.05, warm-up 5%, batch 128, label smoothing 0.1, flips and shifts of an eighth of a side, bfloat16 autocast, on
  torch. Its patches are of 4 pixels; of 8 where images have more than 48, of 16 where they have more than 112.

    python benchmarks/cifar.py CIFAR --minutes 10 --peers-python PATH --out benchmarks/results/DATE-cpu-cifar.md

CIFAR holds train/CLASS and test/CLASS, images of one size. With `--per-class 60` only so many training images of each
class are used, the first by name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

CONTENDERS = ("ours", "keras", "keras-small", "timm")


def read_split(folder, per_class=None):
    """Returns images (N, 32, 32, 3) uint8 and labels (N,) of a folder of one folder a class."""
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir())[:per_class]:
            images.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return np.stack(images), np.array(labels)


def patch_of(size):
    """Returns the side of the patches that peers cut images of this side into."""
    patch = 4 if size <= 48 else 8 if size <= 112 else 16
    if size % patch:
        raise SystemExit(f"images of {size} pixels cannot be cut into patches of {patch}: resize them")
    return patch


def train_keras(train, test, seconds, seed, enlarge):
    import keras
    from keras import layers, ops

    keras.utils.set_random_seed(seed)
    (images, labels), (test_images, test_labels) = train, test
    size, patch = (72, 6) if enlarge else (images.shape[1], patch_of(images.shape[1]))
    num_classes, num_patches, width = int(labels.max()) + 1, (size // patch) ** 2, 64

    class Positions(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

        def call(self, x):
            return x + self.table

    inputs = keras.Input(images.shape[1:])
    normalization = layers.Normalization()
    normalization.adapt(images[:5000].astype("float32"))
    x = normalization(inputs)
    x = layers.Resizing(size, size)(x)
    for layer in (
        layers.RandomFlip("horizontal"),
        layers.RandomRotation(factor=0.02),
        layers.RandomZoom(height_factor=0.2, width_factor=0.2),
    ):
        x = layer(x)
    x = ops.image.extract_patches(x, patch)
    x = layers.Reshape((num_patches, patch * patch * 3))(x)
    x = Positions()(layers.Dense(width)(x))
    for _ in range(8):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([layers.MultiHeadAttention(num_heads=4, key_dim=width, dropout=0.1)(y, y), x])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        for units in (2 * width, width):
            y = layers.Dropout(0.1)(layers.Dense(units, activation="gelu")(y))
        x = layers.Add()([y, x])
    x = layers.Dropout(0.5)(layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x)))
    for units in (2048, 1024):
        x = layers.Dropout(0.5)(layers.Dense(units, activation="gelu")(x))
    model = keras.Model(inputs, layers.Dense(num_classes)(x))
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.monotonic()
    counts = {"images": 0}

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            counts["images"] += 256
            if time.monotonic() - start > seconds:
                self.model.stop_training = True  # after this batch

    model.fit(images.astype("float32"), labels, batch_size=256, epochs=100_000, verbose=0, callbacks=[Clock()])
    spent = time.monotonic() - start
    logits = model.predict(test_images.astype("float32"), batch_size=250, verbose=0)
    return float((logits.argmax(1) == test_labels).mean()), counts["images"], model.count_params(), spent


def train_timm(train, test, seconds, seed):
    import math

    import timm.models.vision_transformer as vit
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    (images, labels), (test_images, test_labels) = train, test
    size = images.shape[1]
    patch, shift = patch_of(size), size // 8
    model = vit.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=96, depth=6, num_heads=3, num_classes=int(labels.max()) + 1
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    mean, std = (value.astype("float32") for value in (images.mean((0, 1, 2)), images.std((0, 1, 2))))

    def normalize(batch):
        return torch.from_numpy((batch - mean) / std).permute(0, 3, 1, 2)

    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    start, done, order = time.monotonic(), 0, np.array([], int)
    while (progress := (time.monotonic() - start) / seconds) < 1:
        if len(order) < 128:
            order = np.concatenate([order, rng.permutation(len(images))])
        index, order = order[:128], order[128:]
        tops, lefts = rng.integers(0, 2 * shift + 1, (2, 128))
        flips = rng.random(128) < 0.5
        batch = np.stack(
            [
                padded[i, t : t + size, k : k + size][:, :: -1 if flip else 1]
                for i, t, k, flip in zip(index, tops, lefts, flips, strict=True)
            ]
        )
        rate = 1e-3 * min(progress / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalize(batch))
        loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[index]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 128
    spent = time.monotonic() - start
    model.eval()
    answers = []
    with torch.inference_mode():
        for first in range(0, len(test_images), 250):
            answers.append(model(normalize(test_images[first : first + 250])).argmax(1).numpy())
    accuracy = float((np.concatenate(answers) == test_labels).mean())
    return accuracy, done, sum(p.numel() for p in model.parameters()), spent


def run_peer(options):
    """Trains one peer in this process and prints what it reached as JSON."""
    train = read_split(options.data / "train", options.per_class)
    test = read_split(options.data / "test", options.per_class if options.miniature else None)
    seconds = options.minutes * 60
    if options.peer == "timm":
        found = train_timm(train, test, seconds, options.seed)
    else:
        found = train_keras(train, test, seconds, options.seed, options.peer == "keras")
    print(json.dumps(dict(zip(("accuracy", "num_images", "num_parameters", "seconds"), found, strict=True))))


def run_ours(options, folder):
    """Trains ours through its command line and reads what the run says."""
    data = options.data
    if options.per_class:
        data = folder / "data"
        for split in ("train", "test"):
            for name in sorted(path.name for path in (options.data / split).iterdir()):
                (data / split / name).mkdir(parents=True)
                is_whole = split == "test" and not options.miniature
                files = sorted((options.data / split / name).iterdir())
                for path in files if is_whole else files[: options.per_class]:
                    (data / split / name / path.name).symlink_to(path.resolve())
    command = [sys.executable, "-m", "vitreous", "train", str(data), "--out", str(folder / "run")]
    command += ["--time", f"{options.minutes * 60:g}s", "--seed", str(options.seed), "--val-fraction", "0"]
    if options.backend:
        command += ["--backend", options.backend]
    subprocess.run([*command, *options.arguments.split()], check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return {
        "accuracy": metrics["test"]["accuracy"],
        "num_images": metrics["num_images_seen"],
        "num_parameters": metrics["num_parameters"],
        "seconds": metrics["train_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--contenders", nargs="+", default=["ours", "keras", "timm"], choices=CONTENDERS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--per-class", type=int)
    parser.add_argument("--backend", help="Keras backend of ours")
    parser.add_argument("--arguments", default="", help="more for vitreous train, as one text")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--miniature", action="store_true", help="few test images too")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.peer:
        run_peer(options)
        return
    rows = []
    for seed in options.seeds:
        options.seed = seed
        for contender in options.contenders:
            if contender == "ours":
                with tempfile.TemporaryDirectory() as folder:
                    found = run_ours(options, Path(folder))
            else:
                command = [options.peers_python, __file__, str(options.data), "--peer", contender]
                command += ["--minutes", str(options.minutes), "--seed", str(options.seed)]
                command += ["--per-class", str(options.per_class)] if options.per_class else []
                command += ["--miniature"] if options.miniature else []
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(result.stdout.splitlines()[-1])
            rows.append({"contender": contender, "seed": options.seed, **found})
            print(rows[-1], file=sys.stderr, flush=True)
    lines = ["| | accuracy | mean | images seen | parameters |", "|---|---|---|---|---|"]
    for contender in options.contenders:
        mine = [row for row in rows if row["contender"] == contender]
        shares = [row["accuracy"] for row in mine]
        lines.append(
            f"| {contender} | {', '.join(f'{share:.2%}' for share in shares)} | {np.mean(shares):.2%} "
            f"| {np.mean([row['num_images'] for row in mine]):,.0f} | {mine[0]['num_parameters']:,} |"
        )
    table = "\n".join(lines)
    print(table)
    if options.out:
        what = f"# From scratch, {options.minutes:g} minutes each"
        if options.per_class:
            what += f", {options.per_class} training images a class"
        command = f"python benchmarks/cifar.py {' '.join(sys.argv[1:])}"
        options.out.write_text(f"{what}\n\n{date.today()}, `{command}`\n\n{table}\n")
    print(json.dumps({"benchmark": "cifar", "minutes": options.minutes, "per_class": options.per_class, "rows": rows}))


if __name__ == "__main__":
    main()
