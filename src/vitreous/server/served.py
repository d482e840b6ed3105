"""`ServedModel`: the model that answers, and what is known of it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.backend import has_gpu
from vitreous.calibration import get_confidence
from vitreous.engine import Engine, KerasRuntime
from vitreous.errors import ConfigError, VitreousError
from vitreous.export.record import find_format, read_record
from vitreous.export.runtimes import Outputs
from vitreous.registry import count_parameters
from vitreous.server.batching import Batcher
from vitreous.server.examples import Example, load_examples
from vitreous.server.logs import log
from vitreous.server.settings import ServerConfig, is_loopback
from vitreous.server.uploads import Upload, read_image
from vitreous.spec import ViTConfig
from vitreous.training import Run, load_run

_BATCH = 16  # images computed together on a GPU, at most


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Args:
        name: What the client calls the image.
        predictions: (class, probability), the most probable first.
        labels: Where an image may have several classes: those with a probability of 1/2 or more. None where it has one.
        confidence: The probability of the most probable class; with several labels, that of its least sure label being
            as it says.
        decode_seconds: Time that reading and resizing took.
        infer_seconds: Time that the model took.
    """

    name: str
    predictions: list[tuple[str, float]]
    labels: list[str] | None
    confidence: float
    decode_seconds: float
    infer_seconds: float


class ServedModel:
    """A loaded model, computed once so that the first request does not wait for it.

    Args:
        path: A run, or an export.
        config: Limits.
        backend: Keras backend to run a run on. Default: as for `Engine`.

    Attributes:
        name: Of the model, in answers and addresses.
        run: The run; None for an export.
        engine: What computes.

    Raises:
        VitreousError: If it cannot be loaded.
    """

    def __init__(self, path: Path, config: ServerConfig, *, backend: str | None = None):
        self.config = config
        self.run: Run | None = None if find_format(path) else load_run(path)
        self.engine = Engine(
            path if self.run is None else self.run,
            precision=config.precision,  # type: ignore[arg-type]  # the engine checks it
            backend=backend,
            num_threads=config.num_threads,
            on_message=lambda text: log("engine", message=" ".join(text.split()[1:])),
        )
        self.name = config.name or _find_name(path)
        self._batcher: Batcher | None = None
        compute: Callable[[np.ndarray], np.ndarray] = self._compute
        if isinstance(self.engine.runtime, KerasRuntime) and has_gpu():
            self._batcher = compute = Batcher(self._compute, _BATCH)
        self._infer = compute
        spec = self.engine.input_spec
        size = 1 if self._batcher is None else _BATCH
        self._compute(np.zeros((size, *spec.image_size, spec.num_channels), "uint8"))
        self.created = time.time()

    def close(self) -> None:
        """Ends what computes batches, once nobody waits for any."""
        if self._batcher is not None:
            self._batcher.close()

    def _compute(self, images: np.ndarray) -> np.ndarray:
        """Returns logits and probabilities (B, 2, K)."""
        return np.stack(self.engine.compute(images), axis=1)

    def infer(self, image: np.ndarray) -> Outputs:
        """Computes logits (K,) and probabilities (K,) of one image, uint8 (H, W, C) of the model's size."""
        logits, probabilities = self._infer(image[None])[0]
        return logits, probabilities

    def predict(self, upload: Upload) -> Answer:
        """Reads and classifies one image.

        Raises:
            RequestError: If it cannot be read, or is beyond the limits.
        """
        start = time.perf_counter()
        spec = self.engine.input_spec
        image = self.engine.resize(read_image(upload, spec.num_channels, self.config))
        decoded = time.perf_counter()
        _, shares = self.infer(image)
        names = self.engine.class_names
        order = np.argsort(-shares, kind="stable")
        is_multi_label = self.engine.is_multi_label
        return Answer(
            name=upload.name,
            predictions=[(names[k], float(shares[k])) for k in order[: self.config.top_k]],
            labels=[names[k] for k in order if shares[k] >= 0.5] if is_multi_label else None,
            confidence=float(get_confidence(shares, is_multi_label=is_multi_label)),
            decode_seconds=decoded - start,
            infer_seconds=time.perf_counter() - decoded,
        )

    def is_sure(self, answer: Answer) -> bool | None:
        """Whether an answer reaches the threshold; None without one."""
        return None if self.config.threshold is None else answer.confidence >= self.config.threshold

    @property
    def architecture(self) -> ViTConfig | None:
        """The architecture, where it is known: that of a run."""
        if self.run is None:
            return None
        record = {name: value for name, value in self.run.config.get("model", {}).items() if name != "name"}
        try:
            return ViTConfig.from_dict(record) if record else None
        except ConfigError:  # of a run written elsewhere, which serves all the same
            return None

    def describe(self) -> dict[str, Any]:
        """Returns what is known of the model, fit for JSON."""
        engine, architecture = self.engine, self.architecture
        inside = None
        if architecture is not None:
            prefix = ["class"] * architecture.use_class_token + ["distillation"] * architecture.use_distillation_token
            inside = {
                "name": self.run.config["model"].get("name", self.name) if self.run else self.name,
                "num_blocks": architecture.num_blocks,
                "num_heads": architecture.num_heads * architecture.num_parallel,
                "projection_dim": architecture.projection_dim,
                "patch_size": list(architecture.patch_size),
                "grid_size": list(architecture.grid_size),
                "num_tokens": architecture.num_tokens,
                "prefix_tokens": prefix + ["register"] * architecture.num_registers,
                "num_parameters": count_parameters(architecture),
            }
        return {
            "name": self.name,
            "classes": list(engine.class_names),
            "input": engine.input_spec.to_dict(),
            "temperature": engine.temperature,
            "is_multi_label": engine.is_multi_label,
            "threshold": self.config.threshold,
            "engine": engine.description,
            "architecture": inside,
        }

    def load_examples(self) -> list[Example]:
        """Returns images to offer: those of `--examples`, or some that the run was measured on."""
        config = self.config
        if config.examples is None and (config.token_file is not None or not is_loopback(config.host)):
            return []  # a run's own images may be private
        try:
            return load_examples(config.examples, self.run, self.engine.input_spec.num_channels)
        except (VitreousError, OSError) as error:
            log("no examples", level=30, reason=str(error))
            return []


def _find_name(path: Path) -> str:
    """Returns a name that fits into an address: of the run that was exported, or of the folder."""
    name = path.resolve().name
    if find_format(path):
        name = read_record(path).run or path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"
