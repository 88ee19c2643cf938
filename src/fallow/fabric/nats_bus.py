"""The control bus over NATS.

Rules
- One connection per process. nats-py reconnects by itself, for ever; what is published meanwhile waits in a bounded
  buffer and is lost beyond it, as the contract says.
- One subscription's messages are handled one after the other, in order, unless it asked for several at once. A
  handler that fails is logged.
- nats-py's errors do not leave this module: `BusUnavailable` and `BusTimeout` do.
- With credentials, a passport opens the bus, over TLS (`nats_client.py`); without, a password in the url may.
- The server cuts a connection when its passport ends; the client joins again with the newest. What a passport does not
  allow is logged, once for each subject and connection, and breaks nothing else.
- Answers go to inboxes only: who asks cannot have them sent where the asker may not speak.
- Passwords never reach a log.
"""

import asyncio
import contextlib
import logging
from typing import Any, Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fallow.domain.errors import BusMessageError, BusTimeout, BusUnavailable, PassportRefused
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES, BusCredentials, BusHandler
from fallow.fabric.nats_client import CONNECT_TIMEOUT_S, TrustingClient, Urls, leave, open_client, settle

PENDING_MESSAGES_MAX: Final = 65_536
PENDING_BYTES_MAX: Final = 64 << 20
"""Waiting for one subscription's handler; more than that is lost."""

_INBOX: Final = "_INBOX."

log = logging.getLogger(__name__)


class NatsBus:
    """A `Bus` on a NATS server. Make one with `connect`."""

    def __init__(self, client: TrustingClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, urls: Urls, name: str, credentials: BusCredentials | None = None) -> "NatsBus":
        """Join the bus as `name` (a node's id), by a passport, or else by the password in the url.

        Raises `BusUnavailable`, and with credentials `PassportRefused` and `TrustError` as the module says.
        """
        return cls(await open_client(urls, name, credentials))

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
            if self._client.may_not_publish(subject):
                raise PassportRefused(f"our passport does not allow to ask on {subject}") from None
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
        """Active on the server when this returns, if the bus is connected. Raises `BusUnavailable`, and
        `PassportRefused` where our passport does not allow to listen."""
        room = asyncio.Semaphore(at_once)
        handling: set[asyncio.Task[None]] = set()

        async def handle(message: Msg) -> None:
            try:
                answer = await handler(message.subject, message.data)
                if answer is not None and message.reply.startswith(_INBOX):
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
            if self._client.may_not_hear(subject):
                await subscription.unsubscribe()
                raise PassportRefused(f"our passport does not allow to listen on {subject}")
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot subscribe to {subject}: {error}") from None
        return NatsSubscription(subscription)

    async def close(self) -> None:
        await leave(self._client)


class NatsSubscription:
    """A live subscription."""

    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def cancel(self) -> None:
        # Gone already when the connection is, or when cancelled before.
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()


def _check_size(message: bytes) -> None:
    if len(message) > MAX_BUS_MESSAGE_BYTES:
        raise BusMessageError(f"bus message too large: at most {MAX_BUS_MESSAGE_BYTES} bytes, got {len(message)}")
