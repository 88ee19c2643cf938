"""One connection to a NATS server: how it is opened, how it heals, and what its errors are called.

Rules
- A first connection that fails is told at once, by name; one that was there once is tried again for ever.
- With credentials TLS begins before the server says a word (`handshake_first`): nobody on the way can talk a client out
  of it. The context trusts the network's authority alone, and the name in the certificate is `BUS_NAME`.
- Every connection, also after a break, shows the newest passport and signs the server's nonce with its key. Only what
  looks like a nonce is signed: a captured server could else have any device sign a text of its choice.
- Where servers are may change: with urls given as a function, every attempt to join again asks it.
- A passport that the server refuses is told to who holds it (`BusCredentials.refused`), and logged once for each break.
- What the server complains of is logged. Whether it also hangs up is its own affair: nats-py would leave for good.
"""

import asyncio
import base64
import contextlib
import logging
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from fallow.domain.errors import BusUnavailable, FallowError, PassportRefused, TrustError
from fallow.domain.network import BUS_NAME
from fallow.fabric.contract import BusCredentials
from fallow.policy.bus_rights import inbox
from fallow.trust.certificates import client_context
from fallow.trust.jwt import peek

CONNECT_TIMEOUT_S: Final = 5
RECONNECT_WAIT_S: Final = 0.2
REFUSED_WAIT_S: Final = 1.0
"""Before a passport that was refused is shown again, perhaps renewed."""
FIRST_ATTEMPTS: Final = 2
PING_INTERVAL_S: Final = 1
MAX_OUTSTANDING_PINGS: Final = 2
UNSENT_BYTES_MAX: Final = 4 << 20
"""Published while disconnected; more than that is lost."""
CLOSE_FLUSH_S: Final = 1
"""For what was sent to arrive, before we leave."""
CLOSE_TIMEOUT_S: Final = 1
"""For the server to take note that we leave."""
STREAM_BYTES_MAX: Final = 32_768
"""Read ahead of the parser."""
LINES_MAX: Final = 8
"""Of the server, between our introduction and its answer."""
DENIED_MAX: Final = 256
"""Subjects remembered as not allowed to us."""

_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{8,64}")
"""nats-server's are 11 random bytes in base64url. No document of ours could be all of these characters."""
_STALE: Final = "stale connection"
_DENIED: Final = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')
_EXPIRED: Final = "authentication expired"
_REFUSED: Final = "authorization violation"

Urls = str | Sequence[str] | Callable[[], Sequence[str]]
"""Where servers are: now and for good, or now each time that it is asked for."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class NotANonce(nats.errors.Error):
    """A server asks us to sign something that is none."""


class TlsTransport(TcpTransport):
    """A connection that is TLS from its first byte, to a server that shows to be the bus.

    It also spares nats-py three things that nats-py would stumble over: a close that waits for ever when a handshake
    failed, a ping of the server's before it has decided whether we may join, and a refusal that is lost because we go
    on talking meanwhile.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._context = context
        self._greeted = False
        self._introduction = b""

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        """Raises `OSError`, `ssl.SSLError` among them."""
        async with asyncio.timeout(connect_timeout):
            self._io_reader, self._io_writer = await asyncio.open_connection(
                uri.hostname, uri.port, limit=buffer_size, ssl=self._context, server_hostname=BUS_NAME
            )
        self._bare_io_reader, self._bare_io_writer = self._io_reader, self._io_writer

    async def connect_tls(self, *_: Any) -> None:
        """It is already."""

    def write(self, payload: bytes) -> None:
        if payload.startswith(b"CONNECT "):
            self._introduction = payload  # goes with the ping that follows, in one piece: see the class
            return
        payload, self._introduction = self._introduction + payload, b""
        super().write(payload)  # type: ignore[no-untyped-call]

    async def readline(self) -> bytes:
        """nats-py reads lines only while it joins: the server's greeting, then its answer to our introduction."""
        for _ in range(LINES_MAX):
            line: bytes = await super().readline()  # type: ignore[no-untyped-call]
            if not self._greeted or not line.startswith((b"PING", b"INFO")):
                self._greeted = True
                return line
            if line.startswith(b"PING"):
                self.write(b"PONG\r\n")
        raise nats.errors.Error("nats: expected an answer to our introduction, got other words")

    async def wait_closed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await super().wait_closed()  # type: ignore[no-untyped-call]


async def _unless_cancelled(call: Awaitable[T]) -> T:
    """What a call of nats-py's gives, unless we are cancelled meanwhile.

    It swallows that when its answer comes in the same moment (`asyncio.wait_for` before Python 3.12), and when it has
    to wait for its flusher. Who was cancelled would go on, and who waits for its end would wait for ever.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        return await call
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


class TrustingClient(Client):
    """A client that takes messages for a sign of life, the server's complaints for what they are, and a cancellation
    for an end (`_unless_cancelled`).

    nats-py counts a connection as dead when answers to its pings are late, and they are when they wait behind messages
    that we have not read yet: a coordinator that thousands of devices report to at once would leave when needed most.
    The server makes the same allowance. Should nats-py rename what is overridden here, its own rules apply again.
    """

    _messages_seen = 0

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__()
        self._tls = tls
        self._denied: set[tuple[str, str]] = set()

    def may_not_publish(self, subject: str) -> bool:
        """Whether the server refused a message of ours on it, since we last connected."""
        return ("publish", subject.lower()) in self._denied

    def may_not_hear(self, subject: str) -> bool:
        """Whether the server refused a subscription of ours to it, since we last connected."""
        return ("subscription", subject.lower()) in self._denied

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        return await _unless_cancelled(super().request(*args, **kwargs))

    async def flush(self, *args: Any, **kwargs: Any) -> None:
        await _unless_cancelled(super().flush(*args, **kwargs))

    async def close(self) -> None:
        await _unless_cancelled(super().close())

    async def _flush_pending(self, *args: Any, **kwargs: Any) -> Any:
        """All that is sent comes by here."""
        return await _unless_cancelled(super()._flush_pending(*args, **kwargs))

    async def _send_ping(self, *args: Any, **kwargs: Any) -> None:
        messages = self.stats["in_msgs"]
        if messages != self._messages_seen:
            self._messages_seen = messages
            self._pings_outstanding = min(self._pings_outstanding, 1)
        await super()._send_ping(*args, **kwargs)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # Whoever leaves has settled before. nats-py would write the rest to a connection that may be gone, and fail.
        self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)

    async def _connect_to_server(self, s: Any) -> None:
        if self._tls is None:
            await super()._connect_to_server(s)
            return
        s.last_attempt = time.monotonic()
        transport = TlsTransport(self._tls)
        await transport.connect(s.uri, STREAM_BYTES_MAX, self.options["connect_timeout"])
        self._transport = transport

    async def _process_connect_init(self) -> None:
        await super()._process_connect_init()
        self._denied.clear()

    async def _process_err(self, err_msg: str) -> None:
        if _STALE in err_msg:
            await super()._process_err(err_msg)
            return
        denied = _DENIED.search(err_msg)
        if denied is not None:
            what, subject = denied.group(1), denied.group(2)
            if (what, subject) in self._denied or len(self._denied) >= DENIED_MAX:
                return
            self._denied.add((what, subject))
        # When it is serious, the server hangs up now, and the connection heals as any broken one does.
        await self._error_cb(nats.errors.Error(err_msg.strip("'")))


class _Healing:
    """What nats-py tells of a connection, and what follows: a line in the log, a word to who holds the passport, and
    where to try next."""

    def __init__(self, urls: Urls, credentials: BusCredentials | None) -> None:
        self.client: TrustingClient | None = None
        """Once it was connected."""
        self.failures: list[Exception] = []
        """Of the first connection; the last one only."""
        self._urls = urls
        self._credentials = credentials
        self.servers = self._servers()
        self._told_refused = False

    async def on_error(self, error: Exception) -> None:
        if self.client is None:
            self.failures[:] = [error]  # `connect` raises it
            return
        if not self.client.is_connected:
            self._look_elsewhere(self.client)
        words = str(error).lower()
        if _EXPIRED in words:
            log.info("bus: our passport ended; joining again with the newest")
            return
        refused = not self.client.is_connected and _REFUSED in words
        if not (refused and self._told_refused):
            log.warning("bus: %s: %s", type(error).__name__, error)
        if refused:
            self._told_refused = True
            if self._credentials is not None:
                self._credentials.refused()
            await asyncio.sleep(REFUSED_WAIT_S)

    async def on_disconnected(self) -> None:
        # nats-py calls this for our own close as well, and when a first connection fails.
        if self.client is not None and not self.client.is_closed:
            log.warning("bus: disconnected, trying again")

    async def on_reconnected(self) -> None:
        self._told_refused = False
        log.info("bus: connected again")

    def _look_elsewhere(self, client: TrustingClient) -> None:
        try:
            now = self._servers()
            if now and now != self.servers and not client.is_closed:
                client.set_server_pool(now)
                self.servers = now
        except (nats.errors.Error, ValueError) as error:
            log.warning("bus: it is said to be where nothing can be: %s", error)

    def _servers(self) -> list[str]:
        now = self._urls() if callable(self._urls) else self._urls
        several = [now] if isinstance(now, str) else list(now)
        return several if self._credentials is None else [_without_password(url) for url in several]


async def open_client(urls: Urls, name: str, credentials: BusCredentials | None = None) -> TrustingClient:
    """A nats-py client that heals by itself and logs through us.

    Raises `BusUnavailable`; with credentials also `PassportRefused`, and `TrustError` for a server of another network.
    """
    options: dict[str, Any] = {} if credentials is None else _trusting_options(credentials)
    client, healing = TrustingClient(options.get("tls")), _Healing(urls, credentials)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.connect(
                healing.servers,
                name=name,
                error_cb=healing.on_error,
                disconnected_cb=healing.on_disconnected,
                reconnected_cb=healing.on_reconnected,
                connect_timeout=CONNECT_TIMEOUT_S,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # floats are fine
                max_reconnect_attempts=FIRST_ATTEMPTS,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                pending_size=UNSENT_BYTES_MAX,
                **options,
            )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        with contextlib.suppress(Exception):
            await client.close()
        raise _named(healing.failures[-1] if healing.failures else error, credentials) from None
    client.options["max_reconnect_attempts"] = -1
    healing.client = client
    return client


async def leave(client: Client) -> None:
    """Close a connection for good. What was sent before arrives, if there is somebody to take it; whether or not, this
    ends in little more than `CLOSE_FLUSH_S` and `CLOSE_TIMEOUT_S`. Idempotent."""
    if client.is_connected:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await settle(client, CLOSE_FLUSH_S)
    with contextlib.suppress(OSError, TimeoutError):  # the server hung up on us, or says nothing any more
        async with asyncio.timeout(CLOSE_TIMEOUT_S + RECONNECT_WAIT_S):
            await client.close()


async def settle(client: Client, timeout_s: int) -> None:
    """Wait until the server has seen everything sent so far. Raises nats-py's errors.

    nats-py's `flush` writes its ping past the commands that wait for its flusher task, so that one round trip proves
    nothing; by the end of the first, they have gone out, and the second is behind them.
    """
    await client.flush(timeout=timeout_s)
    await client.flush(timeout=timeout_s)


def _trusting_options(credentials: BusCredentials) -> dict[str, Any]:
    """How nats-py shows a passport, and whom it takes for the server. Raises `ConfigError`, `PassportRefused`."""
    read = peek(credentials.passport)
    if read is None:
        raise PassportRefused("there is no passport to join the control bus with: is this device enrolled?")

    def sign(nonce: str) -> bytes:
        if not _NONCE.fullmatch(nonce):
            raise NotANonce(f"expected a nonce to sign, got {nonce[:20]!r}")
        return base64.urlsafe_b64encode(credentials.sign(nonce.encode())).rstrip(b"=")

    return {
        "tls": client_context(credentials.authority_pem),
        "tls_hostname": BUS_NAME,
        "tls_handshake_first": True,  # said again, should nats-py ever pass our transport by
        "inbox_prefix": inbox(read[1]),
        "user_jwt_cb": lambda: credentials.passport.encode(),  # noqa: PLW0108 (the newest, each time)
        "signature_cb": sign,
    }


def _without_password(url: str) -> str:
    """A url without what a server of another network could learn from it."""
    parts = urlsplit(url if "://" in url else f"tls://{url}")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _named(error: Exception, credentials: BusCredentials | None) -> FallowError:
    """Why a first connection failed."""
    if credentials is None:
        return BusUnavailable(
            f"cannot reach the control bus ({type(error).__name__}): is `fallow up` running, and are address and "
            "credentials right?"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(
            f"what answers at the control bus's address is not this network's server ({error.verify_message}): "
            "is the address right? If it is, somebody stands in between"
        )
    if isinstance(error, ssl.SSLError):
        return TrustError(f"what answers at the control bus's address does not speak TLS as our server does ({error})")
    if isinstance(error, NotANonce):
        return TrustError(f"the control bus asks for a signature that it has no right to ({error}): is it captured?")
    if _REFUSED in str(error).lower():
        read = peek(credentials.passport)
        ends_s = (read[0].exp or 0) if read is not None else 0
        if ends_s <= time.time():
            return PassportRefused("the control bus refused our passport: it has expired and must be renewed")
        return PassportRefused(
            "the control bus refused our passport: it is revoked, of another network, or not of this key"
        )
    return BusUnavailable(f"cannot reach the control bus ({type(error).__name__}): is it running there?")
