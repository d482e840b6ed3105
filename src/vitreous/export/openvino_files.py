"""Exports to OpenVINO, by way of the ONNX graph."""

import contextlib
import io
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitreous.errors import MissingDependencyError
from vitreous.export.graph import INPUT
from vitreous.export.parity import CheckImages
from vitreous.export.record import KEY, ExportRecord
from vitreous.export.runtimes import import_openvino, openvino_core

HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "bf16"}
"""What OpenVINO computes in. fp16 is how the weights are stored; in int8, bf16 is for what is not quantised."""


def convert_to_openvino(model: Any) -> Any:
    """Returns an ONNX model as an OpenVINO model."""
    converted = openvino_core().read_model(model.SerializeToString())
    converted.set_friendly_name("vitreous")
    return converted


def save_openvino(model: Any, path: Path, record: ExportRecord) -> None:
    """Writes an OpenVINO model, `.xml` and `.bin`, with its metadata inside; weights of fp16 and bf16 take 2 bytes."""
    model.set_rt_info(record.to_json(), [KEY])
    import_openvino().save_model(model, path, compress_to_fp16=record.precision in ("fp16", "bf16"))


def quantize_openvino(model: Any, images: CheckImages, batch_size: int | None = None) -> Any:
    """Returns an OpenVINO model in 8 bits, calibrated on images.

    The first product, which reads pixels, and the head stay in floats: they cost little and lose most. Activations are
    quantised over their whole range, and not smoothed: NNCF's settings for transformers answered 96.3% of the test
    images of a model with 88% on CIFAR-10 as fp32 did, these 99.5%.

    Args:
        model: The model in fp32.
        images: What to calibrate on; up to 300 are used.
        batch_size: Of the model, where that is fixed.

    Source: NNCF's post-training quantisation, https://github.com/openvinotoolkit/nncf.
    """
    os.environ.setdefault("NNCF_CI", "1")  # else it sends a note on each call to Intel
    with _quiet():
        try:
            import nncf
            from nncf.quantization import advanced_parameters, range_estimator
        except ImportError as error:
            raise MissingDependencyError("nncf", "int8", "An export to OpenVINO in int8") from error
        batches = list(itertools.islice(images.filled(batch_size or 1), -(-300 // (batch_size or 1))))
        products = [
            operation.get_friendly_name()
            for operation in model.get_ordered_ops()
            if operation.get_type_name() in ("Convolution", "MatMul")
        ]
        ends = [name for name in products if name == products[0] or name.startswith("head/")]
        return nncf.quantize(
            model,
            nncf.Dataset(batches, lambda batch: {INPUT: batch}),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=ends),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX,
                smooth_quant_alphas=advanced_parameters.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
            ),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and notes of nncf from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
