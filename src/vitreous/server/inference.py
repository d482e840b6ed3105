"""The Open Inference Protocol, version 2, as KServe and Triton clients speak it, with its binary tensors.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. Differences: one
model, one version, one input (images as the model takes them, uint8); no compression, shared memory or classification.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitreous.engine import Engine
from vitreous.errors import RequestError
from vitreous.export.graph import INPUT, LOGITS, PROBABILITIES
from vitreous.export.runtimes import Outputs
from vitreous.server.settings import ServerConfig

HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"

_MAX_JSON_BYTES = 4_000_000  # parsed, it takes twenty times as much memory
_OUTPUTS = (LOGITS, PROBABILITIES)


@dataclass(frozen=True)
class InferRequest:
    """A request for predictions on tensors.

    Args:
        id: The client's, to be sent back; None without one.
        images: uint8 (B, H, W, C).
        outputs: (name, whether as binary data), in the order wanted.
    """

    id: str | None
    images: np.ndarray
    outputs: list[tuple[str, bool]]


def describe_tensors(engine: Engine) -> dict[str, Any]:
    """Returns inputs and outputs as the protocol describes them."""
    shape = [-1, *engine.input_spec.image_size, engine.input_spec.num_channels]
    return {
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": shape}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, len(engine.class_names)]} for name in _OUTPUTS],
    }


def read_request(body: bytes, header_length: str | None, engine: Engine, config: ServerConfig) -> InferRequest:
    """Reads a request.

    Args:
        body: JSON, or JSON with binary tensors after it.
        header_length: Bytes of the JSON, where binary tensors follow.
        engine: What will compute: it says what images must look like.
        config: How many there may be.

    Raises:
        RequestError: 400 with what is wrong, 413 if it is too much.
    """
    num_bytes = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length[:20]) > len(body):
            raise _wrong(
                f"{HEADER_LENGTH} of at most {len(body)}", repr(header_length[:40]), "Pass the bytes of the JSON."
            )
        num_bytes = int(header_length)
    if num_bytes > _MAX_JSON_BYTES:
        raise RequestError(
            413,
            f"Cannot infer. Expected at most {_MAX_JSON_BYTES / 1e6:g} MB of JSON. Received: {num_bytes / 1e6:.1f} MB. "
            "Send the tensor as binary data.",
        )
    try:
        request = json.loads(body[:num_bytes])
    except (ValueError, RecursionError) as error:
        reason = "too deep a nesting" if isinstance(error, RecursionError) else str(error)[:100]
        raise _wrong("JSON", reason, "Send what the protocol says.") from error
    request = _object(request, "a request")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise _wrong(f"one input, {INPUT}", f"inputs={_brief(inputs)}", "Send that one.")
    images = _read_tensor(_object(inputs[0], "an input"), body[num_bytes:], header_length is not None, engine, config)
    return InferRequest(_read_id(request), images, _read_outputs(request))


def _read_id(request: dict[str, Any]) -> str | None:
    value = request.get("id")
    if value is not None and (not isinstance(value, str) or len(value) > 200):
        raise _wrong("an id of at most 200 characters", f"id={_brief(value)}", "Send a short text, or none.")
    return value


def _read_tensor(
    tensor: dict[str, Any], binary: bytes, has_binary: bool, engine: Engine, config: ServerConfig
) -> np.ndarray:
    size = (*engine.input_spec.image_size, engine.input_spec.num_channels)
    name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
    expected = f"an input {INPUT!r} of UINT8, shape [B, {', '.join(map(str, size))}]"
    is_shape = isinstance(shape, list) and all(type(side) is int for side in shape)
    if name != INPUT or datatype != "UINT8" or not is_shape or tuple(shape[1:]) != size or shape[0] < 1:  # type: ignore[index]
        received = f"name={_brief(name)}, datatype={_brief(datatype)}, shape={_brief(shape)}"
        raise _wrong(expected, received, "Resize the images to that; values are 0 to 255.")
    count = shape[0]  # type: ignore[index]
    if count > config.max_images:
        raise RequestError(
            413,
            f"Cannot infer. Expected at most {config.max_images} images. Received: {count}. Send fewer at a time.",
        )
    num_values = count * math.prod(size)
    parameters = _object(tensor.get("parameters", {}), "parameters")
    if "binary_data_size" in parameters:
        if not has_binary or parameters["binary_data_size"] != num_values or len(binary) != num_values:
            received = f"binary_data_size={_brief(parameters['binary_data_size'])} and {len(binary)} bytes"
            raise _wrong(
                f"{num_values} bytes after the JSON, and {HEADER_LENGTH}", received, "Send one for each value."
            )
        return np.frombuffer(binary, "uint8").reshape(count, *size)
    try:
        values = np.array(tensor.get("data"))
    except ValueError:  # rows of different lengths
        values = np.array(None)
    if values.dtype.kind not in "iu" or values.size != num_values or values.min() < 0 or values.max() > 255:
        received = f"{values.size} values of {values.dtype}"
        raise _wrong(f"{num_values} whole numbers from 0 to 255 as data", received, "Send one for each value.")
    return values.astype("uint8").reshape(count, *size)


def _read_outputs(request: dict[str, Any]) -> list[tuple[str, bool]]:
    all_binary = _object(request.get("parameters", {}), "parameters").get("binary_data_output", False)
    wanted = request.get("outputs")
    if wanted is None or wanted == []:
        return [(name, all_binary is True) for name in _OUTPUTS]
    if not isinstance(wanted, list) or len(wanted) > len(_OUTPUTS):
        raise _wrong(f"outputs among {', '.join(_OUTPUTS)}", f"outputs={_brief(wanted)}", "Ask for one or both.")
    outputs = []
    for each in wanted:
        output = _object(each, "an output")
        parameters = _object(output.get("parameters", {}), "parameters")
        if output.get("name") not in _OUTPUTS or "classification" in parameters:
            raise _wrong(f"an output among {', '.join(_OUTPUTS)}", _brief(output), "Ask for one or both.")
        outputs.append((output["name"], parameters.get("binary_data", all_binary) is True))
    return outputs


def write_answer(request: InferRequest, rows: list[Outputs], model_name: str) -> tuple[bytes, dict[str, str]]:
    """Returns the body of an answer, and its headers.

    Args:
        request: What was asked.
        rows: Logits (K,) and probabilities (K,) of each image.
        model_name: The model.
    """
    outputs, blobs = [], []
    arrays = dict(zip(_OUTPUTS, map(np.stack, zip(*rows, strict=True)), strict=True))
    for name, is_binary in request.outputs:
        values = arrays[name].astype("<f4")
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if is_binary:
            blobs.append(values.tobytes())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": VERSION, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer).encode()
    if not blobs:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{what} as a JSON object", _brief(value), "Send what the protocol says.")
    return value


def _brief(value: Any) -> str:
    """Returns a value for an error, cut short; of large ones the type alone."""
    return repr(value)[:100] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _wrong(expected: str, received: str, remedy: str) -> RequestError:
    return RequestError(400, f"Cannot infer. Expected {expected}. Received: {received}. {remedy}")
