"""Do exports answer as their model does? Every format and precision, over six kinds of architecture.

    python benchmarks/parity.py [RUN ...] --out benchmarks/results/DATE-cpu-parity.md

Small models with random weights, and runs, if any are named, are exported to every format in every precision that it
has. Each file is loaded in its own runtime and given the same images as the Keras model: generated ones, or the run's
validation images. What `vitreous export` would refuse is shown as refused. Formats whose package is not installed are
left out, and named.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np

CLASSES = 10
BASE = {"image_size": 96, "patch_size": 16, "projection_dim": 192, "num_blocks": 6, "num_heads": 3, "mlp_dim": 768}
MINIATURE = {"image_size": 16, "patch_size": 8, "projection_dim": 16, "num_blocks": 1, "num_heads": 2, "mlp_dim": 24}
KINDS = {
    "class token": {},
    "registers": {"num_registers": 4},
    "RoPE, SwiGLU": {"rope": "eva", "position": "none", "mlp": "swiglu", "use_mlp_norm": True},
    "MAP pooling": {"use_class_token": False, "pooling": "map"},
    "overlapping patches": {"patch_strides": 8},
    "convolutional stem": {"stem": "convolution"},
}
NUM_IMAGES = 256


def make_run(folder, name, config):
    """Leaves a run folder of a model whose every weight is random, as training would."""
    import keras
    import tomli_w

    from vitreous.model import VisionTransformer
    from vitreous.spec import InputSpec, ViTConfig
    from vitreous.training import load_run
    from vitreous.training.run import RunWriter

    keras.utils.set_random_seed(0)
    model = VisionTransformer(ViTConfig(num_classes=CLASSES, **config))
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(keras.ops.convert_to_numpy(weight) + rng.normal(0, 0.03, weight.shape))
    record = {
        "name": "random",
        "root": "(from Python)",
        "fingerprint": "",
        "class_names": [f"class {k}" for k in range(CLASSES)],
        "split": {"seed": 0},
    }
    spec = InputSpec(image_size=model.config.image_size)
    writer = RunWriter(Path(folder) / name.replace(" ", "-").replace(",", ""))
    writer.write_text("config.toml", tomli_w.dumps({"format": 1, "seed": 0, "input": spec.to_dict(), "data": record}))
    writer.write_text("metrics.json", "{}")
    model.save(writer.partial / "model.keras")
    return load_run(writer.finish())


def collect(run, num_images):
    """Returns images to compare on, under the labels that the run itself gives them."""
    from vitreous.export.parity import CheckImages, collect_images, generate_images, run_batches
    from vitreous.model import create_predict_function

    if run.config["data"]["root"] == "(from Python)":
        images = CheckImages(generate_images(run.input_spec, num_images), None, "generated images")
    else:
        images = collect_images(run)
    (logits,) = run_batches(create_predict_function(run.load_model(), run.input_spec), images)
    return CheckImages(images.images, logits.argmax(1), images.source), float(np.abs(logits).max())


def measure(run, name, format, precision, images, folder):
    """Returns a row of the table."""
    from vitreous.errors import ExportError
    from vitreous.export.record import FORMATS
    from vitreous.export.write import create_record, write_export

    target = Path(folder) / f"model-{precision}{FORMATS[format][0]}"
    row = {"model": name, "format": format, "precision": precision, "num_images": len(images.images)}
    start = time.perf_counter()
    try:
        # int8 may cost what it likes here: the labels are the model's own answers, so that its cost is its agreement.
        export = write_export(run, target, create_record(run, format, precision), images, max_drop=100)
    except ExportError as error:
        return {**row, "refused": str(error)}
    parity = export.record.parity
    kept = ("max_logit_difference", "mean_logit_difference", "tolerance", "top1_agreement")
    row |= {key: parity[key] for key in kept if key in parity}
    return {**row, "megabytes": export.num_bytes / 1e6, "seconds": time.perf_counter() - start}


def table(rows, names):
    """Returns a line for each format and precision, and a column for each model: largest difference, agreement."""
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    cells = {(row["format"], row["precision"], row["model"]): row for row in rows}
    for format, precision in dict.fromkeys((row["format"], row["precision"]) for row in rows):
        line = f"| {format} {precision} "
        for name in names:
            row = cells[format, precision, name]
            if "refused" in row:
                line += "| refused "
                continue
            line += f"| {row['max_logit_difference']:.1e}, {row['top1_agreement']:.1%} "
        lines.append(line + "|")
    return "\n".join(lines)


def find_formats(asked):
    """Returns (format, precision) of what is installed, and why the others are not."""
    from vitreous.errors import MissingDependencyError
    from vitreous.export.child import BACKENDS, check_packages
    from vitreous.export.graph import import_onnx
    from vitreous.export.record import FORMATS
    from vitreous.export.runtimes import import_openvino

    found, missing = [], {}
    for format in asked or FORMATS:
        try:
            if format in BACKENDS:
                check_packages(format)
            else:
                import_onnx()
            if format == "openvino":
                import_openvino()
        except MissingDependencyError as error:
            missing[format] = str(error)
            continue
        found += [(format, precision) for precision in FORMATS[format][1]]
    return found, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--miniature", action="store_true", help="models of one block, few images: a test")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from vitreous.training import load_run

    formats, missing = find_formats(options.formats)
    rows, names, facts = [], [], []
    base = MINIATURE if options.miniature else BASE
    with tempfile.TemporaryDirectory(prefix="vitreous-parity-") as folder:
        runs = {name: make_run(folder, name, {**base, **small(KINDS[name], base)}) for name in options.kinds}
        runs |= {path.name: load_run(path) for path in options.runs}
        for name, run in runs.items():
            images, largest = collect(run, 32 if options.miniature else NUM_IMAGES)
            names.append(name)
            facts.append(f"- {name}: {len(images.images)} {images.source}, largest logit {largest:.1f}")
            for format, precision in formats:
                row = measure(run, name, format, precision, images, folder)
                rows.append(row)
                outcome = row.get("refused") or f"{row['max_logit_difference']:.1e}, {row['top1_agreement']:.1%}"
                print(f"{name:<22} {format} {precision}: {outcome}", file=sys.stderr, flush=True)
            if options.out:  # whatever becomes of the next model
                options.out.write_text(page(rows, names, facts, missing, base))
    print(table(rows, names))
    print("\n".join(facts))
    print(json.dumps({"benchmark": "parity", "rows": rows, "missing": missing}))


def page(rows, names, facts, missing, base):
    """Returns the table, with what it is about."""
    sizes = ", ".join(f"{key}={value}" for key, value in base.items())
    left_out = [f"- left out: {format}: {why}" for format, why in missing.items()]
    return f"""# Parity of exports

{date.today()}, {platform.machine()}. Models of {sizes}
with random weights, and trained runs, if any. In each cell: the largest difference of a logit from the Keras model's in
float32 (jax), and the share of images with the same most probable class.

{table(rows, names)}

{chr(10).join([*facts, *left_out])}
"""


def small(kind, base):
    """Returns what is special of a kind, fit for the patches of a base."""
    return {**kind, **({"patch_strides": base["patch_size"] // 2} if "patch_strides" in kind else {})}


if __name__ == "__main__":
    main()
