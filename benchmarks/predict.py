"""How fast a trained model answers: vitreous's Engine beside timm, transformers, onnxruntime and OpenVINO.

    python benchmarks/predict.py --photos PHOTOS --out benchmarks/results/DATE-MACHINE-predict.md

Three questions, each measured in rounds in which every way runs once, in turn; medians are shown, since ratios hold
where absolute figures drift. Ways whose package is not installed are left out, and named.

1. Tensors in: images/s of batches of uint8 images in memory.
2. Files in: from JPEGs on disk to a CSV file, beside the limits (decoding alone, inference alone) and a plain loop of
   Pillow and timm.
3. One JPEG at a time: milliseconds (median, 99th percentile), and seconds from the start of Python to the first answer.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

BATCH = 16
CLASSES = 10


def make_run(name, size, folder):
    """Leaves a run folder of a model with random weights, as training would."""
    from vitreous.model import create_model
    from vitreous.registry import get_spec
    from vitreous.training.run import RunWriter

    spec = get_spec(name, num_classes=CLASSES, image_size=size)
    model = create_model(name, num_classes=CLASSES, image_size=size)
    rng = np.random.default_rng(0)
    model.head.kernel.assign(rng.normal(0, 0.05, model.head.kernel.shape))
    import tomli_w

    data = {
        "name": "benchmark",
        "root": "(from Python)",
        "fingerprint": "",
        "class_names": [f"class {k}" for k in range(CLASSES)],
        "split": {"seed": 0},
    }
    writer = RunWriter(Path(folder) / name)
    writer.write_text(
        "config.toml", tomli_w.dumps({"format": 1, "seed": 0, "input": spec.input.to_dict(), "data": data})
    )
    writer.write_text("metrics.json", "{}")
    model.save(writer.partial / "model.keras")
    return writer.finish()


# ----- tensors in: each way is a function of a list of batches


def our_engine(path):
    from vitreous.engine import Engine

    engine = Engine(path)
    return lambda batches: list(engine.runtime.stream(batches))


def bare_openvino(path, precision, threads):
    """The same graph through OpenVINO's own queue."""
    from vitreous.export.runtimes import import_openvino

    ov = import_openvino()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": threads,
    }
    queue = ov.AsyncInferQueue(ov.compile_model(path, "CPU", options), threads + 1)

    def infer(batches):
        for batch in batches:
            queue.start_async({0: batch}, share_inputs=True)
        queue.wait_all()

    return infer


def openvino_of_torch(name, size, precision, threads):
    """OpenVINO's own conversion of timm's model, normalised images in."""
    import timm
    import torch

    from vitreous.export.runtimes import import_openvino

    ov = import_openvino()
    model = timm.create_model(name, num_classes=CLASSES, img_size=size).eval()
    converted = ov.convert_model(model, example_input=torch.zeros(BATCH, 3, size, size))
    folder = tempfile.mkdtemp()
    ov.save_model(converted, f"{folder}/timm.xml", compress_to_fp16=False)
    run = bare_openvino(f"{folder}/timm.xml", precision, threads)
    return lambda batches: run([normalize(batch) for batch in batches])


def normalize(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype("float32") / 127.5 - 1


def timm_model(name, size, is_compiled, is_bf16, threads):
    import timm
    import torch

    torch.set_num_threads(threads)
    model = timm.create_model(name, num_classes=CLASSES, img_size=size).eval()
    model = torch.compile(model) if is_compiled else model

    def infer(batches):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            for batch in batches:
                images = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
                model(images).float().numpy()

    return infer


def transformers_model(name, size, threads):
    import torch
    import transformers

    from vitreous.registry import get_spec

    config = get_spec(name).config
    torch.set_num_threads(threads)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=size,
            patch_size=config.patch_size[0],
            hidden_size=config.projection_dim,
            num_hidden_layers=config.num_blocks,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            num_labels=CLASSES,
        )
    ).eval()

    def infer(batches):
        with torch.inference_mode():
            for batch in batches:
                model(torch.from_numpy(normalize(batch))).logits.numpy()

    return infer


def onnxruntime_of_jax2onnx(run, threads):
    """The graph that jax2onnx makes of the same Keras model."""
    import jax2onnx
    import onnxruntime

    from vitreous.training import load_run

    model = load_run(run).load_model()
    height, width = model.config.image_size
    graph = jax2onnx.to_onnx(
        lambda x: model(x, training=False),
        inputs=[("B", height, width, 3)],
        model_name="vit",
        enable_double_precision=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def infer(batches):
        for batch in batches:
            session.run(None, {name: batch.astype("float32") / 127.5 - 1})

    return infer


def measure(ways, argument, count, rounds, failed):
    """Runs every way once a round; returns {name: rates}."""
    made, rates = {}, {}
    for name, make in ways.items():
        try:
            made[name] = make()
            made[name](argument)
        except ImportError as error:
            failed[name] = f"not installed: {error.name or error}"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            rates[name] = []
    for _ in range(rounds):
        for name in rates:
            start = time.perf_counter()
            made[name](argument)
            rates[name].append(count / (time.perf_counter() - start))
    return rates


def tensors(name, size, exports, run, arguments, failed):
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (BATCH, size, size, 3)).astype("uint8") for _ in range(arguments.batches)]
    threads = arguments.threads
    ways = {f"engine {kind}": (lambda path=path: our_engine(path)) for kind, path in exports.items()}
    ways |= {
        "bare OpenVINO bf16, same graph": lambda: bare_openvino(exports["openvino bf16"], "bf16", threads),
        "OpenVINO of timm, bf16": lambda: openvino_of_torch(name, size, "bf16", threads),
        "OpenVINO of timm, fp32": lambda: openvino_of_torch(name, size, "f32", threads),
        "onnxruntime of jax2onnx, fp32": lambda: onnxruntime_of_jax2onnx(run, threads),
        "timm, fp32": lambda: timm_model(name, size, False, False, threads),
        "timm, bf16": lambda: timm_model(name, size, False, True, threads),
        "transformers, fp32": lambda: transformers_model(name, size, threads),
    }
    if not arguments.miniature:
        ways["timm, torch.compile, bf16"] = lambda: timm_model(name, size, True, True, threads)
    rates = measure(ways, batches, BATCH * len(batches), arguments.rounds, failed)
    images = np.concatenate(batches)
    answers = {}
    for kind, path in exports.items():
        from vitreous.engine import Engine

        answers[kind] = Engine(path).logits(images).argmax(1)
    agreement = {kind: float((a == answers["openvino fp32"]).mean()) for kind, a in answers.items()}
    return rates, agreement


# ----- files in


def files(name, size, exports, arguments, failed):
    from vitreous.engine import Engine

    found = sorted(p for p in Path(arguments.photos).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    paths = [str(path) for path in itertools.islice(itertools.cycle(found), arguments.files)]
    engines = {kind: Engine(exports[f"openvino {kind}"]) for kind in ("bf16", "int8")}

    def to_csv(engine):
        from vitreous.answers import CsvWriter

        def run(paths):
            with (
                tempfile.TemporaryDirectory() as folder,
                CsvWriter(Path(folder) / "a.csv", num_ranks=5, has_labels=False) as writer,
            ):
                for prediction in engine.predict(list(paths)):
                    writer.write(prediction)

        return run

    def decode_alone(paths):
        from concurrent.futures import ThreadPoolExecutor

        from vitreous.data import load_images

        images = load_images(paths)
        with ThreadPoolExecutor(arguments.threads) as pool:
            for _ in pool.map(lambda i: engines["bf16"]._load(images, i), range(len(images))):
                pass

    def infer_alone(engine):
        def run(paths):
            batch = np.zeros((BATCH, size, size, 3), "uint8")
            for _ in engine.runtime.stream(batch for _ in range(-(-len(paths) // BATCH))):
                pass

        return run

    def plain_loop():
        from PIL import Image

        infer = timm_model(name, size, False, True, arguments.threads)

        def run(paths):
            for start in range(0, len(paths), BATCH):
                images = [
                    np.asarray(Image.open(p).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
                    for p in paths[start : start + BATCH]
                ]
                infer([np.stack(images)])

        return run

    ways = {
        "decoding alone": lambda: decode_alone,
        **{f"inference alone, {kind}": lambda engine=engine: infer_alone(engine) for kind, engine in engines.items()},
        **{f"engine {kind}, files to CSV": lambda engine=engine: to_csv(engine) for kind, engine in engines.items()},
        "Pillow and timm bf16, a loop": plain_loop,
    }
    return measure(ways, paths, len(paths), max(2, arguments.rounds // 2), failed)


# ----- one at a time


def latency(exports, arguments):
    from vitreous.engine import Engine

    found = sorted(p for p in Path(arguments.photos).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    data = [path.read_bytes() for path in found[:50]]
    result = {}
    for kind in ("openvino fp32", "openvino bf16", "onnx fp32"):
        engine = Engine(exports[kind], is_latency=True)
        seconds = []
        for i in range(arguments.requests):
            start = time.perf_counter()
            engine.logits(engine._decode(data[i % len(data)])[None])
            seconds.append(time.perf_counter() - start)
        result[kind] = {"p50_ms": 1e3 * np.median(seconds), "p99_ms": 1e3 * np.quantile(seconds, 0.99)}
        code = f"from vitreous.engine import Engine; next(Engine({str(exports[kind])!r}).predict([{str(found[0])!r}]))"
        starts = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            starts.append(time.perf_counter() - start)
        result[kind]["first_answer_seconds"] = float(np.median(starts))
    return {kind: {key: float(value) for key, value in row.items()} for kind, row in result.items()}


def main():
    from vitreous.backend import count_cores

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--photos", required=True)
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--miniature", action="store_true", help="small images, few rounds: to see that it works")
    arguments = parser.parse_args()
    size = 224
    if arguments.miniature:
        size, arguments.models, arguments.rounds = 32, ["vit_tiny_patch16_224"], 2
        arguments.batches, arguments.files, arguments.requests = 2, 32, 10

    from vitreous.export.parity import CheckImages, generate_images
    from vitreous.export.write import create_record, write_export
    from vitreous.training import load_run

    report = [f"# Prediction on {platform.processor() or platform.machine()}, {arguments.threads} cores", ""]
    results = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            run = load_run(make_run(name, size, folder))
            exports, failed = {}, {}
            # Labels of the Keras model itself: what int8 then costs is what it changes.
            images = generate_images(run.input_spec, 64)
            from vitreous.model import create_predict_function

            labels = create_predict_function(run.load_model(), run.input_spec)(images).argmax(1)
            check = CheckImages(images, labels, "generated images")
            for kind in ("openvino fp32", "openvino bf16", "openvino int8", "onnx fp32", "onnx int8"):
                format, precision = kind.split()
                out = Path(folder) / f"{format}-{precision}{'.xml' if format == 'openvino' else '.onnx'}"
                with contextlib.redirect_stdout(io.StringIO()):
                    record = create_record(run, format, precision)
                    exports[kind] = write_export(run, out, record, check, max_drop=100).path
            rates, agreement = tensors(name, size, exports, run.path, arguments, failed)
            rates |= files(name, size, exports, arguments, failed)
            single = latency(exports, arguments)
        medians = {way: float(np.median(values)) for way, values in rates.items()}
        results[name] = {
            "images_per_second": medians,
            "agreement_with_fp32": agreement,
            "one": single,
            "left_out": failed,
        }
        report += [f"## {name}, {size} pixels", "", "| way | images/s | lowest | highest |", "|---|---|---|---|"]
        report += [f"| {w} | {medians[w]:.1f} | {min(v):.1f} | {max(v):.1f} |" for w, v in rates.items()]
        report += [
            "",
            "| one JPEG at a time | p50 ms | p99 ms | first answer s | top-1 as fp32 |",
            "|---|---|---|---|---|",
        ]
        report += [
            f"| {kind} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['first_answer_seconds']:.2f} "
            f"| {agreement[kind]:.1%} |"
            for kind, row in single.items()
        ]
        report += [
            "",
            f"int8 answers as fp32 on {agreement['openvino int8']:.1%} (OpenVINO), "
            f"{agreement['onnx int8']:.1%} (ONNX) of the images.",
            "",
        ]
        report += [f"Left out: {way} ({why})." for way, why in failed.items()] + [""]
    text = "\n".join(report)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text)
    print(json.dumps({"benchmark": "predict", "results": results}))


if __name__ == "__main__":
    main()
