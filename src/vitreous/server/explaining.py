"""`Explanations`: what the model looks at, by the run's Keras model, which is loaded when it is first asked for."""

import io
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.backend import select_backend
from vitreous.errors import RequestError
from vitreous.server.logs import log
from vitreous.server.settings import ServerConfig
from vitreous.server.uploads import Upload, read_image
from vitreous.training import Run

if TYPE_CHECKING:
    from vitreous.explanation import Explainer, Explanation


class Explanations:
    """Explains answers. One call at a time: each uses all cores.

    Args:
        run: The run; None for an export, which cannot be explained.
        config: Limits, and whether explanations are wanted.
        backend: Keras backend. Default: the fastest one installed.
    """

    def __init__(self, run: Run | None, config: ServerConfig, *, backend: str | None = None):
        self.run = run
        self.config = config
        self.backend = backend
        self._explainer: Explainer | None = None
        self._lock = threading.Lock()

    def why_not(self) -> str | None:
        """Returns why nothing can be explained, or None if it can."""
        if not self.config.use_explain:
            return "explanations are switched off. Start the server without --no-use-explain."
        if self.run is None:
            return "an export, which holds no layers to look into. Start the server with the run that was exported."
        return None

    def check(self) -> Run:
        """Returns the run, or raises `RequestError` 501 if nothing can be explained."""
        reason = self.why_not()
        if reason or self.run is None:
            raise RequestError(501, f"Cannot explain. Expected a run, with its Keras model. Received: {reason}")
        return self.run

    def explain(
        self, upload: Upload, method: str, target: str | None, block: int | None, head: int | None
    ) -> "Explanation":
        """Explains the answer to one image.

        Args:
            upload: The image.
            method: A method that gives a value for each patch.
            target: Class, by name or index. Default: the one that the model answers.
            block: Which block, for methods that look at one. Default: the last.
            head: Which attention head. Default: the mean of all.

        Raises:
            RequestError: If the image cannot be read.
            ConfigError: If there is no such class, block or head.
        """
        with self._lock:
            explainer = self._load()
            image = read_image(upload, explainer.input_spec.num_channels, self.config)
            return explainer.explain(image, methods=[method], target=target, block=block, head=head)[0]

    def look(self, upload: Upload, classes: list[str]) -> dict[str, Any]:
        """Returns all that the page shows of one image; see `vitreous.look.look`."""
        from vitreous.look import look

        with self._lock:
            explainer = self._load()
            image = read_image(upload, explainer.input_spec.num_channels, self.config)
            limits = self.config
            return look(explainer, image, classes=classes or None, top_k=limits.top_k, threshold=limits.threshold)

    def _load(self) -> "Explainer":
        if self._explainer is None:
            run = self.check()
            backend, reason = select_backend(self.backend)
            log("load for explanations", backend=backend, reason=reason)
            from vitreous.explanation import load_explainer

            self._explainer = load_explainer(run)
        return self._explainer


def draw_overlay(explanation: "Explanation") -> bytes:
    """Returns a map laid over its image, as PNG."""
    from PIL import Image

    from vitreous.explanation.perturbation import find_edges
    from vitreous.figures.explanation import lay_over

    image = explanation.image
    values = explanation.values().reshape(explanation.grid_size)
    edges = find_edges(explanation.grid, (image.shape[0], image.shape[1]))
    pixels, _ = lay_over(image, values, edges, is_signed=explanation.is_signed)
    file = io.BytesIO()
    Image.fromarray(np.round(255 * pixels).astype("uint8")).save(file, "png")
    return file.getvalue()
