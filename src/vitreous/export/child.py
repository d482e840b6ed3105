"""Formats that only a certain Keras backend writes, in a process of their own under that backend.

`python -m vitreous.export.child JOB.json` writes a run in these formats, loads each file again in the library that it
is for, and answers with what it gave for some images.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.errors import ExportError, MissingDependencyError
from vitreous.export.graph import INPUT, LOGITS, PROBABILITIES
from vitreous.spec import InputSpec

BACKENDS = {"litert": "tensorflow", "saved_model": "tensorflow", "torch": "torch"}


def check_packages(format: str) -> None:
    """Raises `MissingDependencyError` unless all that writes and checks a format is installed."""
    backend = BACKENDS[format]
    purpose = f"An export to {format}"
    if importlib.util.find_spec(backend) is None:
        raise MissingDependencyError(backend, "litert" if format == "litert" else backend, purpose)
    if format == "litert" and importlib.util.find_spec("ai_edge_litert") is None:
        raise MissingDependencyError("ai-edge-litert", "litert", purpose)


def run_child(
    run: Path,
    outputs: dict[str, Path],
    images: np.ndarray,
    folder: Path,
    *,
    precision: str,
    temperature: float,
    is_multi_label: bool,
    batch_size: int | None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes a run in formats of one backend, in a process under that backend.

    Args:
        run: Folder of the run.
        outputs: {format: where to write it}; all of one backend.
        images: uint8 (N, H, W, C), to run through what was written.
        folder: For files that pass between the processes.
        precision: Of the files.
        temperature: Of the probabilities.
        is_multi_label: Whether they are a sigmoid's.
        batch_size: B. Default: any.

    Returns:
        {format: logits and probabilities (N, K)} of the formats that this process cannot load itself without the
        backend; LiteRT's is left to its own runtime.

    Raises:
        ExportError: If the process fails; its last line is the reason.
    """
    (backend,) = {BACKENDS[format] for format in outputs}
    np.save(folder / "images.npy", images)
    job = {
        "run": str(run),
        "outputs": {format: str(path) for format, path in outputs.items()},
        "folder": str(folder),
        "precision": precision,
        "temperature": temperature,
        "is_multi_label": is_multi_label,
        "batch_size": batch_size,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    source = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "vitreous.export.child", str(folder / "job.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ExportError(
            f"Cannot export to {', '.join(outputs)}. Expected the process under {backend} to finish. "
            f"Received: exit code {result.returncode}, {lines[-1].strip() if lines else 'no message'}. "
            "Export to onnx or openvino, or report this as a bug."
        )
    answers = {}
    for format in outputs:
        if (path := folder / f"{format}.npz").is_file():
            with np.load(path) as arrays:
                answers[format] = (arrays[LOGITS], arrays[PROBABILITIES])
    return answers


def write_with_tensorflow(model: Any, spec: InputSpec, job: dict[str, Any], images: np.ndarray) -> None:
    """Writes a SavedModel, a `.tflite`, or both."""
    import tensorflow as tf

    from vitreous.model import normalize_images

    signature = [tf.TensorSpec((job["batch_size"], *images.shape[1:]), tf.uint8, name=INPUT)]

    def answer(logits: Any) -> dict[str, Any]:
        scaled = logits / job["temperature"]
        shares = tf.sigmoid(scaled) if job["is_multi_label"] else tf.nn.softmax(scaled)
        return {LOGITS: logits, PROBABILITIES: shares}

    def trace(compute: Any, **attributes: Any) -> tuple[Any, Any]:
        module = tf.Module()
        for name, value in attributes.items():
            setattr(module, name, value)
        module.compute = tf.function(
            lambda images: answer(compute(normalize_images(images, spec))), input_signature=signature
        )
        return module, module.compute.get_concrete_function()

    outputs = job["outputs"]
    if path := outputs.get("saved_model"):
        module, function = trace(lambda images: model(images, training=False), model=model)
        tf.saved_model.save(module, path, signatures=function)
        loaded = tf.saved_model.load(path).signatures["serving_default"]
        _write_answers("saved_model", job, images, lambda batch: loaded(**{INPUT: tf.constant(batch)}))
    if path := outputs.get("litert"):
        # Weights as constants: the converter makes of variables what LiteRT then finds empty, and answers NaN.
        weights = [tf.constant(v.numpy()) for v in model.trainable_variables]
        other = [tf.constant(v.numpy()) for v in model.non_trainable_variables]
        module, function = trace(lambda images: model.stateless_call(weights, other, images, training=False)[0])
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
        if job["precision"] == "fp16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        Path(path).write_bytes(converter.convert())


def write_with_torch(model: Any, spec: InputSpec, job: dict[str, Any], images: np.ndarray) -> None:
    """Writes a `.pt2`: an `ExportedProgram`, which torch alone loads."""
    import torch

    from vitreous.model import normalize_images

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> dict[str, Any]:
            logits = self.model(normalize_images(images, spec), training=False).float()
            scaled = logits / job["temperature"]
            shares = torch.sigmoid(scaled) if job["is_multi_label"] else torch.softmax(scaled, dim=-1)
            return {LOGITS: logits, PROBABILITIES: shares}

    size = job["batch_size"]
    example = torch.zeros((size or 2, *images.shape[1:]), dtype=torch.uint8)
    shapes = None if size else {INPUT: {0: torch.export.Dim("batch", min=1)}}
    path = job["outputs"]["torch"]
    with torch.no_grad():
        torch.export.save(torch.export.export(Module().eval(), (example,), dynamic_shapes=shapes), path)
        loaded = torch.export.load(path).module()
        _write_answers("torch", job, images, lambda batch: loaded(torch.from_numpy(batch)))


def _write_answers(format: str, job: dict[str, Any], images: np.ndarray, infer: Any) -> None:
    size = job["batch_size"] or 16
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = batch
        if job["batch_size"] and len(batch) < size:
            padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), "uint8")])
        outputs = infer(padded)
        parts.append({name: outputs[name].numpy()[: len(batch)] for name in (LOGITS, PROBABILITIES)})
    logits, probabilities = (np.concatenate([part[name] for part in parts]) for name in (LOGITS, PROBABILITIES))
    np.savez(Path(job["folder"]) / f"{format}.npz", logits=logits, probabilities=probabilities)


def main(job_path: str) -> None:
    """Does the work that `run_child` wrote down."""
    from vitreous.training import load_run

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    images = np.load(Path(job["folder"]) / "images.npy")
    run = load_run(job["run"])
    write = write_with_torch if "torch" in job["outputs"] else write_with_tensorflow
    write(run.load_model(), run.input_spec, job, images)


if __name__ == "__main__":
    main(sys.argv[1])
