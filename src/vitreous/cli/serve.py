"""The command that serves a model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vitreous.cli.options import Backend, ServerOptions, given


def serve(
    run: Path,
    /,
    *,
    backend: Backend | None = None,
    options: Annotated[ServerOptions | None, Parameter(name="*")] = None,
) -> int:
    """Serve a model: predictions, explanations, and a page to look at them.

    A page to try images on lies at the address that is printed, and what programs can ask at /docs. SIGTERM and Ctrl-C
    let requests in flight finish; SIGHUP loads the model anew, and reads the certificate again. Logs go to standard
    error: a line of JSON an event.

    Args:
        run: Folder of the run, or a file that `vitreous export` wrote (.onnx, .xml, .tflite), which cannot be
            explained.
        backend: Keras backend, to run a run on it, and to explain with. Default: OpenVINO on a CPU where it is
            installed, else KERAS_BACKEND, else the fastest backend installed for this hardware.
        options: Addresses, limits, timeouts.
    """
    from vitreous.server import ServerConfig
    from vitreous.server import serve as serve_model

    config = ServerConfig(**given(options))

    def on_ready(address: str) -> None:
        print(f"Serving  {run} at {address} (Ctrl-C stops)", flush=True)

    serve_model(run, config, backend=backend, on_ready=on_ready)
    return 0
