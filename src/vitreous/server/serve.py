"""`serve`: from a run or an export to a process that answers until it is told to stop."""

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from vitreous.errors import ConfigError, MissingDependencyError
from vitreous.server.logs import log, start_logs
from vitreous.server.settings import ServerConfig, is_loopback


def serve(
    path: str | Path,
    config: ServerConfig | None = None,
    *,
    backend: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a model until SIGTERM or SIGINT, which let requests in flight finish. SIGHUP loads the model anew, and
    reads the certificate again.

    Logs go to standard error, a line of JSON for each event.

    Args:
        path: A run, or an `.onnx`, OpenVINO `.xml` or `.tflite` export.
        config: Addresses, limits, timeouts. Default: `ServerConfig()`.
        backend: Keras backend to run a run on, and to explain with. Default: as for `Engine`.
        on_ready: Called with the address once requests are answered.

    Raises:
        VitreousError: If the model cannot be loaded, or the configuration cannot work.
        MissingDependencyError: If the extra `serve` is not installed.
    """
    config = config or ServerConfig()
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(str(error.name), "serve", "The server") from error
    from vitreous.server.tls import create_context

    token, tls = config.read_token(), create_context(config)
    listener = listen(config)  # before the model is loaded: a port that is taken should not cost that time
    try:
        start_logs()
        from vitreous.server.process import Process
        from vitreous.server.service import Service

        if tls is None and not is_loopback(config.host):
            log(
                "no TLS",
                level=logging.WARNING,
                reason=f"on {config.host}, token and images travel in the clear: pass --tls-cert and --tls-key, or put "
                "a proxy that speaks HTTPS in front",
            )
        start = time.perf_counter()
        service = Service(Path(path), config, backend=backend)
        host, port = listener.getsockname()[:2]
        address = f"http{'s' * (tls is not None)}://{f'[{host}]' if ':' in host else host}:{port}"

        def on_started() -> None:
            log(
                "ready",
                address=address,
                model=service.current.model.name,
                seconds=round(time.perf_counter() - start, 2),
            )
            if on_ready:
                on_ready(address)

        Process(service, token=token, tls=tls, on_started=on_started).run(sockets=[listener])
        service.close()
        log("stopped")
    finally:
        listener.close()


def listen(config: ServerConfig) -> socket.socket:
    """Returns a socket that is bound to the address, not listening yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            "Cannot listen. Expected a free port of an address of this machine. "
            f"Received: host={config.host!r}, port={config.port}: {error.strerror or error}. Pass another --port."
        ) from error
    return listener
