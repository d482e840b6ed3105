"""`serve`: from a run or an export to a process that answers until it is told to stop."""

import asyncio
import contextlib
import functools
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreous.errors import ConfigError, MissingDependencyError
from vitreous.server.logs import log, start_logs
from vitreous.server.settings import ServerConfig

if TYPE_CHECKING:
    from vitreous.server.service import Service


def serve(
    path: str | Path,
    config: ServerConfig | None = None,
    *,
    backend: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a model until SIGTERM or SIGINT, which let requests in flight finish. SIGHUP loads the model anew.

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
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError(str(error.name), "serve", "The server") from error
    token = config.read_token()
    listener = _listen(config)  # before the model is loaded: a port that is taken should not cost that time
    try:
        start_logs()
        from vitreous.server.app import create_app, guard
        from vitreous.server.protocol import create_protocol
        from vitreous.server.service import Service

        start = time.perf_counter()
        service = Service(Path(path), config, backend=backend)
        options: dict[str, Any] = {
            "http": create_protocol(config),
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "timeout_graceful_shutdown": _shutdown_seconds(config),
        }
        uvicorn_config = uvicorn.Config(guard(create_app(service), service, token), **options)  # type: ignore[arg-type]
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def on_started() -> None:
            service.set_ready(True)
            log(
                "ready",
                address=address,
                model=service.current.model.name,
                seconds=round(time.perf_counter() - start, 2),
            )
            if on_ready:
                on_ready(address)

        _run(uvicorn_config, service, listener, on_started)
        service.close()
        log("stopped")
    finally:
        listener.close()


def _shutdown_seconds(config: ServerConfig) -> int:
    """Returns the time that requests in flight have to finish: all that one may take."""
    most = max(config.deadline_seconds, config.explain_seconds if config.use_explain else 0)
    return int(config.body_seconds + most) + 1


def _listen(config: ServerConfig) -> socket.socket:
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


def _run(config: Any, service: "Service", listener: socket.socket, on_started: Callable[[], None]) -> None:
    """Runs uvicorn with signals of our own: it would end the process by the signal itself, not with exit code 0."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
            loop, tasks = asyncio.get_running_loop(), set()

            def start(action: Callable[[], Any]) -> None:
                task = loop.create_task(action())
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            async def stop(name: str) -> None:
                self.force_exit = not service.is_ready  # a second signal: now
                service.set_ready(False)
                log("stopping", signal=name, requests_in_flight=len(self.server_state.tasks))
                await asyncio.sleep(0 if self.force_exit else service.config.drain_seconds)
                self.should_exit = True

            actions: dict[signal.Signals, Callable[[], Any]] = {
                signal.SIGTERM: functools.partial(stop, "SIGTERM"),
                signal.SIGINT: functools.partial(stop, "SIGINT"),
                signal.SIGHUP: service.reload,
            }
            for each, action in actions.items():
                loop.add_signal_handler(each, start, action)
            try:
                yield
            finally:
                for each in actions:
                    loop.remove_signal_handler(each)
                for task in tasks:
                    task.cancel()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_started()

    Server(config).run(sockets=[listener])
