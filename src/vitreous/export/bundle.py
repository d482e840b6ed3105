"""A bundle: an export with all that somebody needs who has never heard of vitreous."""

import inspect
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitreous.export import reference
from vitreous.export.record import ExportRecord
from vitreous.files import replacing

_PACKAGES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "litert": "ai-edge-litert",
    "saved_model": "tensorflow",
    "torch": "torch",
}
_RUN = {
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession({name!r})


def infer(images):
    return session.run(["logits", "probabilities"], {{"images": images}})
""",
    "openvino": """\
import openvino
options = {{"INFERENCE_PRECISION_HINT": {hint!r}}}  # without it, OpenVINO chooses by the processor
model = openvino.compile_model({name!r}, "CPU", options)


def infer(images):
    outputs = model(images)
    return outputs["logits"], outputs["probabilities"]
""",
    "litert": """\
from ai_edge_litert.interpreter import Interpreter
model = Interpreter({name!r}).get_signature_runner("serving_default")


def infer(images):
    outputs = model(images=images)
    return outputs["logits"], outputs["probabilities"]
""",
    "saved_model": """\
import tensorflow
model = tensorflow.saved_model.load({name!r})


def infer(images):
    outputs = model.signatures["serving_default"](images=tensorflow.constant(images))
    return outputs["logits"].numpy(), outputs["probabilities"].numpy()
""",
    "torch": """\
import torch
model = torch.export.load({name!r}).module()


def infer(images):
    outputs = model(torch.from_numpy(images))
    return outputs["logits"].numpy(), outputs["probabilities"].numpy()
""",
}
_HEAD = '''\
"""Classifies example.png, or the images named on the command line. Needs: {packages}"""

import json
import os
import sys

import numpy as np
from PIL import Image, ImageOps

'''
_LOAD = """
paths = [os.path.abspath(path) for path in sys.argv[1:]] or ["example.png"]
os.chdir(os.path.dirname(os.path.abspath(__file__)))
metadata = json.load(open("metadata.json", encoding="utf-8"))

"""
_PRINT = """

size = metadata["batch_size"] or 16  # a number there: the model takes batches of that size and no other
for start in range(0, len(paths), size):
    batch = paths[start : start + size]
    images = np.concatenate([prepare_image(path, metadata["input"]) for path in batch])
    if metadata["batch_size"]:
        images = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), "uint8")])
    for path, row, shares in zip(batch, *infer(images)):
        answer = metadata["class_names"][int(shares.argmax())]
        print(json.dumps({"image": path, "class": answer, "probability": float(shares.max()), "logits": row.tolist()}))
"""


def write_bundle(
    files: dict[str, Path], target: Path, record: ExportRecord, example: np.ndarray, expected: dict[str, Any]
) -> None:
    """Writes the zip file.

    Args:
        files: {name in the zip: file} of the export, the model first.
        target: The zip file.
        record: The export's metadata.
        example: uint8 (H, W, C), an image.
        expected: What the export says of it: `class`, `probability`, `logits`.
    """
    name = next(iter(files)).split("/")[0]
    packages = f"numpy, pillow, {_PACKAGES[record.format]}"
    code = inspect.getsource(reference.prepare_image).replace(
        "  # type: ignore[no-untyped-def]  # read by people who need no types", ""
    )
    script = _HEAD.format(packages=packages) + "\n" + code + "\n" + _LOAD
    script += _RUN[record.format].format(name=name, hint=record.inference_precision) + _PRINT
    picture = io.BytesIO()
    Image.fromarray(example if example.shape[-1] == 3 else example[..., 0]).save(picture, "PNG")
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for place, path in files.items():
            archive.write(path, place, compress_type=zipfile.ZIP_STORED)  # weights do not shrink
        archive.writestr("metadata.json", record.to_json())
        archive.writestr("example.png", picture.getvalue())
        archive.writestr("expected.json", json.dumps(expected, indent=2, ensure_ascii=False))
        archive.writestr("run.py", script)
