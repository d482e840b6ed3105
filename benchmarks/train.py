"""How many images a second do we train on, beside timm, transformers, KerasHub and plain Keras layers?

One full training step each: uint8 images normalised, forward, smoothed cross-entropy, backward, gradients clipped,
AdamW, averaged weights. Every contender runs in its own process; all are started first, then take turns, a few steps
each, so that a noisy machine is noisy for all. The median of all steps counts.

    python benchmarks/train.py --peers-python /path/to/python --out benchmarks/results/DATE-cpu-train.md

`--peers-python` is an interpreter with timm, transformers or keras-hub in it; contenders that cannot be imported there
are named and left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).parents[1] / "src"
sys.path.insert(0, str(SOURCE))

CLASSES = 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, DECAY, SMOOTHING, CLIP, AVERAGE = 1e-3, 0.05, 0.1, 1.0, 0.999

# name: (title, image size, patch size, width, blocks, heads, batch size)
WORKLOADS = {
    "tiny": ("vit_tiny_patch16_224, batch 32", 224, 16, 192, 12, 3, 32),
    "small": ("32 pixels, patch 4, width 192, 12 blocks, batch 128", 32, 4, 192, 12, 3, 128),
    "gpu_small": ("vit_small_patch16_224, batch 256", 224, 16, 384, 12, 6, 256),
    "gpu_base": ("vit_base_patch16_224, batch 256", 224, 16, 768, 12, 12, 256),
    "miniature": ("16 pixels, patch 8, width 16, 2 blocks, batch 8", 16, 8, 16, 2, 2, 8),
}
# name: (library, Keras backend or None, precision, compiled, runs in the peers' interpreter)
CONTENDERS = {
    "ours jax float32": ("ours", "jax", "float32", True, False),
    "ours jax bfloat16": ("ours", "jax", "bfloat16", True, False),
    "ours torch float32": ("ours", "torch", "float32", False, False),
    "ours torch bfloat16": ("ours", "torch", "bfloat16", False, False),
    "ours tensorflow float32": ("ours", "tensorflow", "float32", True, False),
    "ours tensorflow bfloat16": ("ours", "tensorflow", "bfloat16", True, False),
    "plain Keras jax float32": ("keras", "jax", "float32", True, False),
    "KerasHub jax float32": ("keras_hub", "jax", "float32", True, True),
    "timm eager float32": ("timm", None, "float32", False, True),
    "timm eager bfloat16": ("timm", None, "bfloat16", False, True),
    "timm compile float32": ("timm", None, "float32", True, True),
    "timm compile bfloat16": ("timm", None, "bfloat16", True, True),
    "transformers eager float32": ("transformers", None, "float32", False, True),
    "transformers eager bfloat16": ("transformers", None, "bfloat16", False, True),
}

DEFAULT = [name for name in CONTENDERS if name != "ours jax bfloat16"]  # on a CPU, jax gains nothing from it


def create_batch(workload: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (B, H, W, 3) uint8 and labels (B,) int32."""
    _, size, *_, batch = WORKLOADS[workload]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, batch).astype("int32")


def create_ours(workload: str, precision: str) -> Any:
    from vitreous.data import Batch
    from vitreous.model import VisionTransformer
    from vitreous.spec import InputSpec, ViTConfig
    from vitreous.training.losses import Loss
    from vitreous.training.optimizer import create_optimizer
    from vitreous.training.recipe import OptimizerConfig
    from vitreous.training.step import create_step

    _, size, patch, dim, blocks, heads, batch_size = WORKLOADS[workload]
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        projection_dim=dim,
        num_blocks=blocks,
        num_heads=heads,
        mlp_dim=4 * dim,
        num_classes=CLASSES,
    )
    policy = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    model, average = (VisionTransformer(config, dtype=policy) for _ in range(2))
    optimizer = OptimizerConfig(
        learning_rate=RATE, weight_decay=DECAY, beta_2=0.999, clip_norm=CLIP, label_smoothing=SMOOTHING
    )
    step = create_step(
        model,
        average,
        create_optimizer(model, optimizer),
        input_spec=InputSpec(image_size=size, mean=MEAN, std=STD),
        loss=Loss(num_classes=CLASSES, label_smoothing=SMOOTHING),
    )
    images, labels = create_batch(workload)
    batch = Batch(images, labels, np.ones(batch_size, bool), np.arange(batch_size))
    return lambda: float(step(batch, learning_rate=RATE, decay=AVERAGE)[0])


def train_keras(model: Any, workload: str) -> Any:
    """Returns one step of a Keras model as `fit` does it."""
    import keras

    optimizer = keras.optimizers.AdamW(
        RATE, weight_decay=DECAY, global_clipnorm=CLIP, use_ema=True, ema_momentum=AVERAGE
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)
    model.compile(optimizer, loss)
    images, labels = create_batch(workload)
    scale, targets = np.array(STD, "float32") * 255, np.eye(CLASSES, dtype="float32")[labels]
    shift = np.array(MEAN, "float32") * 255
    return lambda: float(model.train_on_batch((images - shift) / scale, targets))


def create_keras(workload: str, precision: str) -> Any:
    """A ViT out of Keras's own layers, as its examples compose one."""
    import keras
    from keras import layers, ops

    _, size, patch, dim, blocks, heads, _ = WORKLOADS[workload]
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(dim, patch, patch)(inputs)
    x = layers.Reshape(((size // patch) ** 2, dim))(x)
    tokens = (size // patch) ** 2 + 1
    x = layers.ZeroPadding1D((1, 0))(x)
    x = x + layers.Embedding(tokens, dim)(ops.arange(tokens))
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(heads, dim // heads)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.Dense(dim)(layers.Dense(4 * dim, activation="gelu")(y))
    outputs = layers.Dense(CLASSES)(layers.LayerNormalization(epsilon=1e-6)(x)[:, 0])
    return train_keras(keras.Model(inputs, outputs), workload)


def create_keras_hub(workload: str, precision: str) -> Any:
    import keras
    import keras_hub

    _, size, patch, dim, blocks, heads, _ = WORKLOADS[workload]
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(size, size, 3),
        patch_size=(patch, patch),
        num_layers=blocks,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=4 * dim,
    )
    outputs = keras.layers.Dense(CLASSES)(backbone.output[:, 0])
    return train_keras(keras.Model(backbone.input, outputs), workload)


def train_torch(model: Any, workload: str, precision: str) -> Any:
    """Returns one step of a PyTorch model that returns logits: autocast, fused AdamW, averaged weights."""
    import torch

    images, labels = create_batch(workload)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    images, labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] * 255 for x in (MEAN, STD))
    weights = list(model.parameters())
    averages = [w.detach().clone() for w in weights]
    decayed = [w for w in weights if w.ndim == 2 or w.ndim == 4]
    groups = [{"params": decayed}, {"params": [w for w in weights if w.ndim not in (2, 4)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, fused=True)

    def step() -> float:
        x = (images.permute(0, 3, 1, 2).float() - mean) / std
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - AVERAGE)
        return float(loss.detach())

    return step


def create_timm(workload: str, precision: str, is_compiled: bool) -> Any:
    import timm
    import torch

    _, size, patch, dim, blocks, heads, _ = WORKLOADS[workload]
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=dim, depth=blocks, num_heads=heads, num_classes=CLASSES
    ).train()
    return train_torch(torch.compile(model) if is_compiled else model, workload, precision)


def create_transformers(workload: str, precision: str) -> Any:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    _, size, patch, dim, blocks, heads, _ = WORKLOADS[workload]
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=dim,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTForImageClassification(config)

        def forward(self, x: Any) -> Any:
            return self.model(pixel_values=x).logits

    return train_torch(Logits().train(), workload, precision)


def measure_ceiling(backend: str, precision: str, repeats: int = 8, size: int = 2048) -> float:
    """Returns the best GFLOP/s of a matrix product of `size` in this process."""
    if backend == "torch":
        import torch

        a = torch.randn(size, size).to(getattr(torch, precision))
        run = lambda: a @ a  # noqa: E731
    elif backend == "jax":
        import jax

        a = jax.numpy.ones((size, size), precision)
        product = jax.jit(lambda a: a @ a)
        run = lambda: product(a).block_until_ready()  # noqa: E731
    else:
        import tensorflow as tf

        a = tf.cast(tf.random.normal((size, size)), precision)
        run = lambda: (a @ a)[0, 0].numpy()  # noqa: E731
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def work(name: str, workload: str) -> None:
    """A contender's process: reads how many steps to do, answers with their seconds, line by line."""
    library, backend, precision, is_compiled, _ = CONTENDERS[name]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    start = time.perf_counter()
    try:
        if library == "timm":
            step = create_timm(workload, precision, is_compiled)
        else:
            step = globals()[f"create_{library}"](workload, precision)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    step()
    first = time.perf_counter() - start
    answer: dict[str, Any] = {"first_step_seconds": first}
    step()
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        request = sys.stdin.readline().split()
        if not request:
            return
        if request[0] == "ceiling":
            answer = {"gflops": measure_ceiling(backend or "torch", precision)}
            continue
        seconds = []
        for _ in range(int(request[0])):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        answer = {"seconds": seconds, "loss": loss}
        answer["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Contender:
    """A contender's process, seen from outside."""

    def __init__(self, name: str, workload: str, python: str):
        environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3")
        if CONTENDERS[name][1]:
            environment["KERAS_BACKEND"] = CONTENDERS[name][1]
        self.name, self.seconds = name, []
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, "--workload", workload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("VERBOSE") else None,
            text=True,
            env=environment,
        )
        self.start = self.read()

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            error = self.process.communicate()[1] or ""
            return {"missing": (error.strip().splitlines() or ["it ended"])[-1]}
        return json.loads(line)

    def ask(self, request: str) -> dict[str, Any]:
        print(request, file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def count(workload: str) -> int:
    """Returns the multiply-accumulates of one image's forward pass."""
    from vitreous.registry import count_macs
    from vitreous.spec import ViTConfig

    _, size, patch, dim, blocks, heads, _ = WORKLOADS[workload]
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        projection_dim=dim,
        num_blocks=blocks,
        num_heads=heads,
        mlp_dim=4 * dim,
        num_classes=CLASSES,
    )
    return count_macs(config)


def measure(workload: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row for each contender that runs."""
    _, *_, batch = WORKLOADS[workload]
    contenders = []
    for name in options.contenders:
        python = options.peers_python if CONTENDERS[name][4] else sys.executable
        contender = Contender(name, workload, python)
        if "missing" in contender.start:
            print(f"  without {name}: {contender.start['missing']}", flush=True)
            contender.process.wait()
        else:
            print(f"  {name}: first step after {contender.start['first_step_seconds']:.1f} s", flush=True)
            contenders.append(contender)
    ceilings: dict[str, float] = {}
    for contender in contenders:
        precision = CONTENDERS[contender.name][2]
        ceilings[precision] = max(ceilings.get(precision, 0.0), contender.ask("ceiling")["gflops"])
    for _ in range(options.rounds):
        for contender in contenders:
            contender.answer = contender.ask(str(options.steps))
            contender.seconds += contender.answer["seconds"]
    macs = count(workload)
    rows = []
    for contender in contenders:
        contender.close()
        speed = batch / statistics.median(contender.seconds)
        precision = CONTENDERS[contender.name][2]
        rows.append(
            {
                "workload": workload,
                "contender": contender.name,
                "images_per_second": round(speed, 2),
                "best_images_per_second": round(batch / min(contender.seconds), 2),
                "share_of_ceiling": round(speed * 6 * macs / (ceilings[precision] * 1e9), 3),
                "ceiling_gflops": round(ceilings[precision]),
                "peak_mib": round(contender.answer["peak_mib"]),
                "first_step_seconds": round(contender.start["first_step_seconds"], 1),
            }
        )
    return sorted(rows, key=lambda row: -row["images_per_second"])


def table(rows: list[dict[str, Any]], title: str) -> str:
    lines = [
        f"**{title}**",
        "",
        "| | images/s | best | share of the GEMM ceiling | peak memory, MiB | first step after, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['contender']}**" if row["contender"].startswith("ours") else row["contender"]
        lines.append(
            f"| {name} | {row['images_per_second']:.1f} | {row['best_images_per_second']:.1f} "
            f"| {row['share_of_ceiling']:.0%} of {row['ceiling_gflops']} GFLOP/s | {row['peak_mib']:,} "
            f"| {row['first_step_seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["tiny", "small"], choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of each contender in a round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.workload)
        return
    results, tables = [], []
    for workload in options.workloads:
        title = WORKLOADS[workload][0]
        print(f"{title}:", flush=True)
        rows = measure(workload, options)
        tables.append(table(rows, title))
        print("\n" + tables[-1] + "\n", flush=True)
        results += rows
    if options.out:
        cores = os.cpu_count()
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("keras", "jax", "torch") if has(name)
        )
        head = (
            f"# Training speed beside peers\n\n{date.today()}, {device()}, {cores} cores. {versions}. A full step: "
            f"normalise, forward, backward, clip, AdamW, averaged weights. Medians of {options.rounds * options.steps} "
            f"steps, contenders taking turns ({options.steps} steps each time).\n\n"
            "`python benchmarks/train.py --peers-python PATH`\n\n"
        )
        options.out.write_text(head + "\n\n".join(tables) + "\n")
    print(json.dumps({"benchmark": "train", "device": device(), "rows": results}))


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def device() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
