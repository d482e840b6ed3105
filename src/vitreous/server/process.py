"""`Process`: uvicorn with signals of our own: orderly end, and a model loaded anew."""

import asyncio
import contextlib
import functools
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from vitreous.errors import VitreousError
from vitreous.server.app import create_app
from vitreous.server.guard import Guard
from vitreous.server.logs import log
from vitreous.server.protocol import create_protocol
from vitreous.server.service import Service
from vitreous.server.tls import read_certificate


class Process(uvicorn.Server):
    """Answers requests until it is told to stop.

    SIGTERM and SIGINT: the server says that it is not ready, goes on for `drain_seconds`, stops listening, and finishes
    what is in flight; a second one stops it at once. SIGHUP: the certificate is read again, and the model loaded anew.
    (uvicorn's own handlers would end the process by the signal, not with exit code 0.)

    Args:
        service: What answers.
        token: What clients must show; None for nothing.
        tls: What answers TLS; None for plain HTTP.
        on_started: Called once requests are answered.
    """

    def __init__(
        self,
        service: Service,
        *,
        token: bytes | None = None,
        tls: ssl.SSLContext | None = None,
        on_started: Callable[[], None] = lambda: None,
    ):
        limits = service.config
        app = Guard(create_app(service), limits, service.metrics, token, lambda: service.is_ready)
        longest = max(limits.deadline_seconds, limits.explain_seconds if limits.use_explain else 0)
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]  # the same protocol, in types of its own
                http=create_protocol(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(limits.body_seconds + longest) + 1,
            )
        )
        self.service = service
        self.tls = tls
        self.on_started = on_started
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await self._listen(sockets or [])
        self.service.set_ready(True)
        self.on_started()

    async def _listen(self, sockets: list[socket.socket]) -> None:
        """Does what uvicorn does to listen; but a client has `header_seconds` to agree on TLS, and to take leave.

        (uvicorn leaves that to asyncio, which gives a client that says nothing a minute.)
        """

        def create_connection() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state={}
            )

        patience = self.service.config.header_seconds if self.tls else None
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                create_connection,
                sock=each,
                ssl=self.tls,
                backlog=self.config.backlog,
                ssl_handshake_timeout=patience,
                ssl_shutdown_timeout=patience,
            )
            for each in sockets
        ]
        self.started = True

    async def reload(self) -> None:
        """Loads the model anew and reads the certificate again; what cannot be read changes nothing."""
        if self.tls is not None:
            try:
                read_certificate(self.tls, self.service.config)
                log("certificate read")
            except VitreousError as error:
                log("certificate not read, the old one stays", level=40, reason=str(error))
        await self.service.reload()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs; those of a thread reach the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        actions: dict[signal.Signals, Callable[[], Any]] = {
            signal.SIGTERM: functools.partial(self.stop, "SIGTERM"),
            signal.SIGINT: functools.partial(self.stop, "SIGINT"),
            signal.SIGHUP: self.reload,
        }
        loop = asyncio.get_running_loop()
        for each, action in actions.items():
            loop.add_signal_handler(each, self._start, action)
        try:
            yield
        finally:
            for each in actions:
                loop.remove_signal_handler(each)
            for task in self._tasks:
                task.cancel()

    def _start(self, action: Callable[[], Any]) -> None:
        task = asyncio.ensure_future(action())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, reason: str) -> None:
        """Stops: in order the first time, at once the second time.

        Args:
            reason: For the log.
        """
        self.force_exit = not self.service.is_ready
        self.service.set_ready(False)
        log("stopping", reason=reason, requests_in_flight=len(self.server_state.tasks))
        await asyncio.sleep(0 if self.force_exit else self.service.config.drain_seconds)
        self.should_exit = True
