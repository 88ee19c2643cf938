"""Serves an ASGI app over HTTP inside a running event loop, with bounds on slow clients.

uvicorn speaks HTTP; what it lacks is added by a subclass of its protocol: a time in which a request's headers must
arrive, a cap on connections that answers instead of queueing, and a time after which a client that does not read
its answer is dropped. (The time for a body is the app's business: `wire.read_body`.) No signal handlers are installed
and no logging is configured: both belong to the process.
"""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, Final

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fallow.domain.errors import ConfigError
from fallow.gateway.problems import Problem, http_problem, overloaded
from fallow.policy.subscribers import subscriber_of

REFUSED_AT_ONCE_MAX: Final = 128
"""Connections of busy addresses that are closed before the event loop does something else."""


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on connections."""

    max_connections: int = 1024
    max_connections_per_address: int | None = None
    """Of one IPv4 address, or one /64 of IPv6; more are closed before anything is read, TLS included."""
    max_header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0
    """From connecting, or from a header's first byte on a kept connection, to its last byte."""
    keep_alive_s: int = 75
    read_stall_s: float = 60.0
    """How long a client may leave a full send buffer unread."""
    shutdown_s: int = 5
    """How long `close` waits for running answers before it ends them."""
    farewell_s: float = 0.5
    """How long `close` waits for a client that has all of its answers to close its side: with TLS it has to, and one
    that reads nothing between two requests does not."""
    backlog: int = 512


class HttpServer:
    """A server that is accepting connections."""

    def __init__(self, server: "_Server", task: asyncio.Task[None], host: str, port: int) -> None:
        self._server = server
        self._task = task
        self._scheme = "https" if server.config.is_ssl else "http"
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._scheme}://{host}:{self.port}"

    async def close(self) -> None:
        """Stop accepting, let running answers end for `shutdown_s`, then end them. Idempotent."""
        self._server.should_exit = True
        await asyncio.wait([self._task])


async def serve(
    app: ASGIApp, host: str, port: int, limits: ServerLimits | None = None, tls: ssl.SSLContext | None = None
) -> HttpServer:
    """Listen on `host` and `port` (0: any free one) and return once connections are accepted; with `tls`, HTTPS.

    Raises `ConfigError` when the address cannot be used.
    """
    limits = limits or ServerLimits()
    listener = _listen(host, port, limits)
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=limits.shutdown_s,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        backlog=limits.backlog,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if task.done():
        listener.close()
        await task
        raise ConfigError(f"The HTTP server on {host} port {port} ended while starting.")
    return HttpServer(server, task, host, listener.getsockname()[1])


class _Counted(socket.socket):
    """A connection that is counted until it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()
        super().close()


class _Listener(socket.socket):
    """A listening socket that closes at once what goes beyond `limit` connections of one address.

    The event loop accepts by calling `accept`, and makes a protocol only after TLS: counting there would leave
    handshakes that nobody ends uncounted.
    """

    limit: int | None = None

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self._counts: Counter[str] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        if self.limit is None:
            return super().accept()
        for _ in range(REFUSED_AT_ONCE_MAX):
            accepted, address = super().accept()
            whose = subscriber_of(str(address[0]))
            if self._counts[whose] < self.limit:
                self._counts[whose] += 1
                counted = _Counted(fileno=accepted.detach())
                counted.on_close = functools.partial(self._let_go, whose)
                return counted, address
            accepted.close()
        raise BlockingIOError  # the loop comes again

    def _let_go(self, whose: str) -> None:
        self._counts[whose] -= 1
        if self._counts[whose] <= 0:
            del self._counts[whose]


def _listen(host: str, port: int, limits: ServerLimits) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = _Listener(family, kind, protocol)
        listener.limit = limits.max_connections_per_address
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host!r}: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(limits.backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"Cannot listen on {host!r} port {port}: {error}. Choose another port.") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server without signal handlers, and with an event instead of a flag."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _protocol(limits: ServerLimits) -> type[H11Protocol]:
    """uvicorn's h11 protocol with `limits`."""
    busy = _canned(overloaded("The gateway has as many connections as it may. Try again in a moment."))
    late = _canned(http_problem(408, f"The request's headers did not arrive within {limits.header_timeout_s:g} s."))

    class BoundedProtocol(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None
        _reading_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._refuse(busy)
                return
            self._headers_due = self.loop.call_later(limits.header_timeout_s, self._refuse, late)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._headers_due)
            self._headers_due = None
            _stop(self._reading_due)
            self._reading_due = None
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_headers()

        def shutdown(self) -> None:
            if not self.transport.is_closing():  # asyncio's TLS loses sight of a connection that is closed twice
                super().shutdown()
            if self.transport.is_closing() and not self.transport.get_write_buffer_size():
                self.loop.call_later(limits.farewell_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading_due = self.loop.call_later(limits.read_stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            _stop(self._reading_due)
            self._reading_due = None
            super().resume_writing()

        def _watch_headers(self) -> None:
            """Keep the timer running exactly while a part of a header has arrived."""
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                if self._headers_due is None:
                    self._headers_due = self.loop.call_later(limits.header_timeout_s, self._refuse, late)
            elif self.conn.their_state is not h11.IDLE:
                _stop(self._headers_due)
                self._headers_due = None

        def _refuse(self, reply: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(reply)
                self.transport.close()

    return BoundedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _canned(problem: Problem) -> bytes:
    """A whole HTTP reply, for connections that have no request yet."""
    body = problem.encoded()
    reason: Any = {408: "Request Timeout", 503: "Service Unavailable"}[problem.status]
    headers = [(name, value) for name, value in problem.headers() if name != b"connection"]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return f"HTTP/1.1 {problem.status} {reason}\r\n".encode() + lines + b"\r\n" + body
