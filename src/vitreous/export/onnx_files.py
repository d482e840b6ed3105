"""Exports to ONNX."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.errors import MissingDependencyError
from vitreous.export.graph import INPUT, import_onnx
from vitreous.export.parity import CheckImages
from vitreous.export.record import KEY, ExportRecord


def save_onnx(model: Any, path: Path, record: ExportRecord) -> None:
    """Writes an ONNX model with its metadata inside."""
    onnx = import_onnx()
    onnx.helper.set_model_props(model, {KEY: record.to_json()})
    onnx.save(model, path)


def quantize_onnx(model: Any, images: CheckImages) -> Any:
    """Returns the model with its dense layers in 8 bits, calibrated on images.

    Weights are quantised channel by channel, activations over their range on the images; the products of attention,
    norms and activations stay in float32.

    Args:
        model: An `onnx.ModelProto`.
        images: What to calibrate on.

    Source: onnxruntime's static quantiser (QDQ), https://onnxruntime.ai/docs/performance/model-optimizations/.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "onnx", "An export to ONNX in int8") from error
    onnx = import_onnx()

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = images.batches()

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model), source)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps advice to preprocess the model, which it needs not, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
