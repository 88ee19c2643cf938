"""ASGI at its plainest: read a bounded body, send JSON, send an event stream, notice a hang-up.

A body must arrive whole within a time and a size, or the request is refused (408, 413). An event stream sends its
headers with its first event, so an error before that still gets its own status. Nothing here knows about models.
"""

import asyncio
import re
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from fallow.gateway.problems import Problem, http_problem

MAX_DISCARDED_BYTES = 64 << 20

_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises a 413 or 408 `Problem`, or `ClientGone`."""
    declared = header(scope, b"content-length")
    excess = declared is not None and declared.isdigit() and int(declared) > max_bytes
    try:
        async with asyncio.timeout(timeout_s):
            body = None if excess else await _collect(receive, max_bytes)
            if body is None:
                await _discard(receive)
    except TimeoutError:
        raise http_problem(408, f"The request's body did not arrive within {timeout_s:g} s.") from None
    if body is None:
        raise http_problem(413, f"The request's body is larger than the {max_bytes} bytes that are accepted.")
    return body


async def _collect(receive: Receive, max_bytes: int) -> bytes | None:
    """The body, or `None` as soon as it is too large."""
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        part, more = await _part(receive)
        size += len(part)
        if size > max_bytes:
            return None
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read what is left of a body that is refused: closing on unread bytes resets the connection, and the client would
    see that instead of the reason."""
    size = 0
    more = True
    while more and size < MAX_DISCARDED_BYTES:
        part, more = await _part(receive)
        size += len(part)


async def _part(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that lower-case name."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def is_local(scope: Scope) -> bool:
    """Whether a request names this machine as its host, and comes from no foreign web page.

    A browser lets any page send requests to the loopback, and after DNS rebinding also read the replies; its `Host`
    and `Origin` headers give it away.
    """
    origin = header(scope, b"origin")
    names = [header(scope, b"host")] if origin is None else [header(scope, b"host"), origin.partition("://")[2]]
    return all(name is not None and _LOOPBACK.fullmatch(name) is not None for name in names)


async def send_json(send: Send, body: bytes, status: int = 200) -> None:
    await send_reply(send, status, [(b"content-type", b"application/json")], body)


async def send_problem(send: Send, problem: Problem) -> None:
    await send_reply(send, problem.status, problem.headers(), problem.encoded())


async def send_reply(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a whole reply with its length."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """Server-sent events. Each is written at once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def event(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, whose request body has been read; cancel it and raise `ClientGone` when the client hangs up."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        await working
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait((working, watching))
        if not working.cancelled():
            # Asked for, so that asyncio does not report a failure while cleaning up as nobody's.
            working.exception()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
