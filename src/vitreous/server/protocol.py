"""Below HTTP: what a client may not do to a connection. uvicorn has no such limits of its own."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitreous.server.settings import ServerConfig

MAX_HEADER_BYTES = 32768
"""Largest request line and headers together."""

WRITE_SECONDS = 30.0
"""Time in which a client must take what is written to it."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits on headers, on slow readers, and on the number of connections.

    A connection whose headers take longer than `header_seconds`, or grow beyond `MAX_HEADER_BYTES`, is closed; so is
    one that does not read its answer, and one beyond `max_connections`.
    """

    limits = ServerConfig()  # those of a server are set on a subclass: see `create_protocol`
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _is_in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection, and waits for headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        else:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the timers."""
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what came, unless it is too much for headers."""
        if self._is_in_headers:
            self._num_header_bytes += len(data)
        super().data_received(data)
        if self._is_in_headers and self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(431, b"Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """A request begins: its headers have their time."""
        super().on_message_begin()
        self._wait_for_headers()

    def on_headers_complete(self) -> None:
        """Headers are there; the body has a time of its own, in the guard."""
        self._is_in_headers = False
        self._stop_header_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole; the next one may begin."""
        super().on_message_complete()
        self._is_in_headers = True
        self._num_header_bytes = 0

    def pause_writing(self) -> None:
        """The client reads more slowly than is written to it."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        self._stop_write_timer()
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._on_slow_headers)

    def _on_slow_headers(self) -> None:
        is_silent = self._num_header_bytes == 0
        if self.transport.is_closing():
            return
        if is_silent:
            self.transport.close()
        else:
            self._refuse(408, b"Request Timeout")

    def _refuse(self, status: int, reason: bytes) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # an earlier request is being answered
            self.transport.close()
            return
        body = b'{"error":"%b"}' % reason
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (status, reason, len(body), body)
        )
        self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def create_protocol(config: ServerConfig) -> type[GuardedProtocol]:
    """Returns the protocol with a server's limits."""
    attributes: dict[str, Any] = {"limits": config}
    return type("Protocol", (GuardedProtocol,), attributes)
