"""`Guard`: what every request passes before and after the routes: host, token, size, body, logs, security headers."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from vitreous.errors import RequestError
from vitreous.server.logs import log
from vitreous.server.metrics import Metrics
from vitreous.server.settings import ServerConfig, is_loopback

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LINGER_SECONDS = 1.0
"""How long a refused body is read and dropped, so that the client comes to read the answer."""

_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # probes carry no token
_SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499  # never sent: the client has gone


@dataclass
class Exchange:
    """A request and its answer, as they are logged.

    Args:
        request_id: The client's, or one made here.
        body: The request's body, once it is read.
        is_read: Whether that is so.
        status: Of the answer; 0 before it begins.
        is_sent: Whether the answer is whole.
        route: Path of the route, with its parameters' names.
        details: What else the log should say.
    """

    request_id: str
    body: bytes = field(default=b"", repr=False)
    is_read: bool = False
    status: int = 0
    is_sent: bool = False
    route: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Guard:
    """The outermost layer: every request passes it, and every answer.

    In this order: the Host and Origin headers, the token, the length of the body, the body itself under a timeout. The
    routes follow: a slot, decoding, the model. A client that leaves ends the work for it.

    Args:
        app: The routes.
        config: Limits.
        metrics: Where requests are counted.
        token: What clients must show; None for nothing.
        is_ready: Whether the server wants more requests; else connections end with their answer.
    """

    def __init__(
        self, app: App, config: ServerConfig, metrics: Metrics, token: bytes | None, is_ready: Callable[[], bool]
    ):
        self.app = app
        self.config = config
        self.metrics = metrics
        self.token = token
        self.is_ready = is_ready
        self.num_buffered_bytes = 0
        self.hosts: set[str] | None = None
        if config.allowed_hosts:
            self.hosts = {host.lower() for host in config.allowed_hosts}
        elif is_loopback(config.host):
            self.hosts = {"localhost", "127.0.0.1", "::1", config.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = read_headers(scope)
        given_id = headers.get("x-request-id", "")
        exchange = Exchange(given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex)
        scope.setdefault("state", {})["exchange"] = exchange
        start = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                more = [pair for pair in _SECURITY_HEADERS if pair[0] not in names]
                if b"cache-control" not in names:
                    more.append((b"cache-control", b"no-store"))
                if not self.is_ready() and b"connection" not in names:
                    more.append((b"connection", b"close"))
                more.append((b"x-request-id", exchange.request_id.encode()))
                message = {**message, "headers": [*message["headers"], *more]}
            elif not message.get("more_body", False):
                exchange.is_sent = True
            await send(message)

        failure: BaseException | None = None
        self.metrics.in_flight.inc()
        try:
            self._check_host(scope, headers)
            self._check_token(scope, headers)
            if scope["method"] == "POST":
                await self._answer_with_body(exchange, headers, scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except RequestError as error:
            await _refuse(error, exchange, receive, answer)
        except _ClientLeft:
            exchange.status = _CLIENT_LEFT
        except Exception as bug:  # the client is told that much, the log the rest
            failure = bug
            if not exchange.status:
                told = RequestError(500, f"The server failed. The log says why, at {exchange.request_id}.")
                await _refuse(told, exchange, receive, answer)
        finally:
            self._record(exchange, scope, time.perf_counter() - start, failure)

    # ----- before the body

    def _check_host(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuses names that are not ours (DNS rebinding), and pages of other origins (cross-site requests)."""
        host = headers.get("host", "")
        name = _host_name(host)
        if self.hosts is not None and name not in self.hosts:
            raise RequestError(
                421,
                f"Wrong host. Expected one of {', '.join(sorted(self.hosts))}. Received: Host={host[:100]!r}. "
                "Use such a name, or start the server with --allowed-hosts.",
            )
        origin = headers.get("origin")
        is_foreign = headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site")
        is_navigation = headers.get("sec-fetch-mode") == "navigate" and scope["method"] in ("GET", "HEAD")
        if (is_foreign and not is_navigation) or (origin is not None and _address(origin) != host.lower()):
            raise RequestError(
                403,
                "Refused to a page of another site. Expected a request from the server's own page, or from a program. "
                f"Received: Origin={(origin or '')[:100]!r}. Ask from a program, or put both behind one address.",
            )

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuses who does not show the token. It is compared in a time that does not tell how much of it was right."""
        if self.token is None or scope["path"] in _OPEN_PATHS:
            return
        scheme, _, value = headers.get("authorization", "").partition(" ")
        shown = value.strip().encode("latin-1", errors="replace")
        if scheme.lower() == "basic":
            try:
                shown = base64.b64decode(shown, validate=True).partition(b":")[2]
            except binascii.Error:
                shown = b""
        elif scheme.lower() != "bearer":
            shown = b""
        if not hmac.compare_digest(shown, self.token):
            received = "none" if not scheme else "another one"
            raise RequestError(
                401,
                f"Not allowed. Expected the server's token. Received: {received}. Send the header "
                "Authorization: Bearer TOKEN, or give it as the password.",
                {"WWW-Authenticate": 'Basic realm="vitreous", charset="UTF-8"'},
            )

    def _check_length(self, headers: dict[str, str]) -> int:
        """Returns the length of the body, unless it is not said or too large."""
        if encoding := headers.get("content-encoding"):
            raise RequestError(
                415,
                f"Cannot read a compressed body. Expected it as it is. Received: Content-Encoding={encoding[:40]!r}. "
                "Send it without that.",
            )
        text = headers.get("content-length", "")
        if not text.isdecimal():
            raise RequestError(
                411,
                "Cannot read a body of unknown length. Expected a Content-Length header. Received: none. Send the body "
                "in one piece, not chunked.",
            )
        length = int(text[:20])
        if length > self.config.max_bytes:
            raise RequestError(
                413,
                f"Too large. Expected a body of at most {self.config.max_megabytes:g} MB. "
                f"Received: {length / 1e6:.1f} MB. Send fewer or smaller images, or raise --max-megabytes.",
            )
        return length

    # ----- the body, and the work on it

    async def _answer_with_body(
        self, exchange: Exchange, headers: dict[str, str], scope: Scope, receive: Receive, answer: Send
    ) -> None:
        length = self._check_length(headers)
        exchange.details["bytes"] = length
        parts: list[bytes] = []
        num_read = 0
        try:
            try:
                async with asyncio.timeout(self.config.body_seconds):
                    await self._read_body(parts, receive)
            except TimeoutError as error:
                raise RequestError(
                    408,
                    f"Too slow. Expected the body within {self.config.body_seconds:g} s. Received: "
                    f"{sum(map(len, parts)):,} of {length:,} bytes. Try again.",
                ) from error
            exchange.body = b"".join(parts)
            num_read = len(exchange.body)
            parts.clear()  # it is in memory once
            exchange.is_read = True
            await self._answer_unless_left(exchange, scope, receive, answer)
        finally:
            exchange.body = b""
            self._hold(-num_read - sum(map(len, parts)))

    async def _read_body(self, parts: list[bytes], receive: Receive) -> None:
        """Appends the pieces of the body as they come."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            parts.append(message.get("body", b""))
            self._hold(len(parts[-1]))
            if not message.get("more_body", False):
                return

    def _hold(self, num_bytes: int) -> None:
        """Counts bytes of bodies that are held in memory."""
        self.num_buffered_bytes += num_bytes
        self.metrics.buffered_bytes.set(self.num_buffered_bytes)
        if num_bytes > 0 and self.num_buffered_bytes > self.config.max_buffered_megabytes * 1e6:
            raise RequestError(
                503,
                f"Too busy. Expected at most {self.config.max_buffered_megabytes:g} MB of bodies at a time. Received: "
                "more. Try again in a second.",
                {"Retry-After": "1"},
            )

    async def _answer_unless_left(self, exchange: Exchange, scope: Scope, receive: Receive, answer: Send) -> None:
        """Runs the routes; a client that leaves cancels them."""
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return {"type": "http.disconnect"}
            is_read = True
            return {"type": "http.request", "body": exchange.body, "more_body": False}

        work = asyncio.ensure_future(self.app(scope, replay, answer))
        leaving = asyncio.ensure_future(receive())  # after the body, a client can only leave
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.is_sent:
                raise _ClientLeft
            await work
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    # ----- afterwards

    def _record(self, exchange: Exchange, scope: Scope, seconds: float, failure: BaseException | None) -> None:
        """Counts and logs one request."""
        route = scope.get("route")
        exchange.route = exchange.route or getattr(route, "path", "") or "none"
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(exchange.route, str(exchange.status)).inc()
        self.metrics.seconds.labels(exchange.route).observe(seconds)
        if exchange.route in _OPEN_PATHS and exchange.status == 200:
            return  # probes come every few seconds
        client = scope.get("client")
        log(
            "request",
            level=40 if failure else 20,
            exc_info=failure,
            request_id=exchange.request_id,
            method=scope["method"],
            route=exchange.route,
            status=exchange.status,
            ms=round(1000 * seconds, 2),
            client=client[0] if client else None,
            **exchange.details,
        )


class _ClientLeft(Exception):
    """The client has closed the connection."""


def read_headers(scope: Scope) -> dict[str, str]:
    """Returns the headers by their names in lower case; of equal names the last one."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _address(origin: str) -> str:
    """Returns host and port of an Origin header; nothing of one that has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    """Returns the name in a Host header, without the port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


async def _refuse(error: RequestError, exchange: Exchange, receive: Receive, answer: Send) -> None:
    """Answers with an error. What is left of the body is dropped for a while, so that the client reads the answer."""
    body = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers.append((b"connection", b"close"))
    await answer({"type": "http.response.start", "status": error.status, "headers": headers})
    await answer({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while not exchange.is_read:
                message = await receive()
                exchange.is_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
    await answer({"type": "http.response.body", "body": b"", "more_body": False})
