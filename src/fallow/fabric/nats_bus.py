"""The control bus over NATS.

Rules
- One connection per process. nats-py reconnects by itself, for ever; what is published meanwhile waits in a bounded
  buffer and is lost beyond it, as the contract says.
- One subscription's messages are handled one after the other, in order, unless it asked for several at once. A
  handler that fails is logged.
- nats-py's errors do not leave this module: `BusUnavailable` and `BusTimeout` do.
- Credentials travel inside the url and never reach a log.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fallow.domain.errors import BusMessageError, BusTimeout, BusUnavailable
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES, BusHandler

CONNECT_TIMEOUT_S: Final = 5
RECONNECT_WAIT_S: Final = 0.2
FIRST_ATTEMPTS: Final = 2
PING_INTERVAL_S: Final = 1
MAX_OUTSTANDING_PINGS: Final = 2
UNSENT_BYTES_MAX: Final = 4 << 20
"""Published while disconnected; more than that is lost."""
PENDING_MESSAGES_MAX: Final = 65_536
PENDING_BYTES_MAX: Final = 64 << 20
"""Waiting for one subscription's handler; more than that is lost."""
CLOSE_FLUSH_S: Final = 1

log = logging.getLogger(__name__)


class NatsBus:
    """A `Bus` on a NATS server. Make one with `connect`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    async def connect(cls, urls: str | Sequence[str], name: str) -> "NatsBus":
        """Join the bus as `name` (a node's id), with the credentials in the url. Raises `BusUnavailable`."""
        return cls(await open_client(urls, name))

    @property
    def client(self) -> Client:
        """For the other adapters on the same connection."""
        return self._client

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    async def publish(self, subject: str, message: bytes) -> None:
        _check_size(message)
        try:
            await self._client.publish(subject, message)
        except nats.errors.OutboundBufferLimitError:
            log.debug("a message on %s was lost: the bus is disconnected", subject)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish on {subject}: {error}") from None

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        _check_size(message)
        if not self._client.is_connected:
            raise BusUnavailable("the control bus is not connected; it is being retried")
        try:
            reply = await self._client.request(subject, message, timeout=timeout_s)
        except nats.errors.NoRespondersError:
            raise BusUnavailable(f"nobody answers {subject} at present") from None
        except (nats.errors.TimeoutError, TimeoutError):
            raise BusTimeout(f"no answer on {subject} within {timeout_s} s") from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot ask on {subject}: {error}") from None
        except asyncio.CancelledError:
            # nats-py cancels open requests when the connection is closed under them.
            task = asyncio.current_task()
            if self._client.is_closed and task is not None and not task.cancelling():
                raise BusUnavailable("the control bus was closed during a request") from None
            raise
        return bytes(reply.data)

    async def subscribe(
        self, subject: str, handler: BusHandler, queue: str | None = None, at_once: int = 1
    ) -> "NatsSubscription":
        """Active on the server when this returns, if the bus is connected."""
        room = asyncio.Semaphore(at_once)
        handling: set[asyncio.Task[None]] = set()

        async def handle(message: Msg) -> None:
            try:
                answer = await handler(message.subject, message.data)
                if answer is not None and message.reply:
                    await message.respond(answer)
            except Exception:
                log.exception("handling a message on %s failed", message.subject)

        async def begin(message: Msg) -> None:
            await room.acquire()
            task = asyncio.get_running_loop().create_task(handle(message))
            handling.add(task)
            task.add_done_callback(end)

        def end(task: asyncio.Task[None]) -> None:
            handling.discard(task)
            room.release()

        try:
            subscription = await self._client.subscribe(
                subject,
                queue=queue or "",
                cb=handle if at_once == 1 else begin,
                pending_msgs_limit=PENDING_MESSAGES_MAX,
                pending_bytes_limit=PENDING_BYTES_MAX,
            )
            if self._client.is_connected:
                with contextlib.suppress(nats.errors.TimeoutError):
                    await settle(self._client, CONNECT_TIMEOUT_S)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe to {subject}: {error}") from None
        return NatsSubscription(subscription)

    async def close(self) -> None:
        if self._client.is_closed:
            return
        if self._client.is_connected:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await settle(self._client, CLOSE_FLUSH_S)
        await self._client.close()


class NatsSubscription:
    """A live subscription."""

    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def cancel(self) -> None:
        # Gone already when the connection is, or when cancelled before.
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()


class _PatientClient(Client):
    """A client that takes messages for a sign of life.

    nats-py counts a connection as dead when answers to its pings are late, and they are when they wait behind messages
    that we have not read yet: a coordinator that thousands of devices report to at once would leave when needed most.
    The server makes the same allowance. Should nats-py rename what is overridden here, its own rule applies again.
    """

    _messages_seen = 0

    async def _send_ping(self, *args: Any, **kwargs: Any) -> None:
        messages = self.stats["in_msgs"]
        if messages != self._messages_seen:
            self._messages_seen = messages
            self._pings_outstanding = min(self._pings_outstanding, 1)
        await super()._send_ping(*args, **kwargs)


async def open_client(urls: str | Sequence[str], name: str) -> Client:
    """A nats-py client that heals by itself and logs through us. Raises `BusUnavailable`."""

    async def on_error(error: Exception) -> None:
        # What fails before the first connection is in what `connect` raises.
        level = logging.WARNING if client.is_connected or client.is_reconnecting else logging.DEBUG
        log.log(level, "bus: %s: %s", type(error).__name__, error)

    async def on_disconnected() -> None:
        # nats-py calls this for our own close as well.
        if not client.is_closed:
            log.warning("bus: disconnected, trying again")

    async def on_reconnected() -> None:
        log.info("bus: connected again")

    servers = [urls] if isinstance(urls, str) else list(urls)
    client = _PatientClient()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.connect(
                servers,
                name=name,
                error_cb=on_error,
                disconnected_cb=on_disconnected,
                reconnected_cb=on_reconnected,
                connect_timeout=CONNECT_TIMEOUT_S,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # floats are fine
                max_reconnect_attempts=FIRST_ATTEMPTS,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                pending_size=UNSENT_BYTES_MAX,
            )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        with contextlib.suppress(Exception):
            await client.close()
        raise BusUnavailable(
            f"cannot reach the control bus ({type(error).__name__}): is `fallow up` running, and are address and "
            "credentials right?"
        ) from None
    # A first connection that fails is told; one that was there once is tried again for ever.
    client.options["max_reconnect_attempts"] = -1
    return client


async def settle(client: Client, timeout_s: int) -> None:
    """Wait until the server has seen everything sent so far. Raises nats-py's errors.

    nats-py's `flush` writes its ping past the commands that wait for its flusher task, so that one round trip proves
    nothing; by the end of the first, they have gone out, and the second is behind them.
    """
    await client.flush(timeout=timeout_s)
    await client.flush(timeout=timeout_s)


def _check_size(message: bytes) -> None:
    if len(message) > MAX_BUS_MESSAGE_BYTES:
        raise BusMessageError(f"bus message too large: at most {MAX_BUS_MESSAGE_BYTES} bytes, got {len(message)}")
