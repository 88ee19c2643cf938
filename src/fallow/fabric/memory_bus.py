"""The in-memory control bus, the twin of `nats_bus.py`.

Rules: one task per subscription runs its handler on one message after the other; a queue beyond
`PENDING_MESSAGES_MAX` loses the newest, as NATS does with a slow consumer. `stop` and `start` on the hub play a server
that restarts; `drop` plays a client process that dies.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from fallow.domain.errors import BusMessageError, BusTimeout, BusUnavailable
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES, BusHandler

PENDING_MESSAGES_MAX: Final = 65_536
"""Messages that wait for one subscription's handler."""

log = logging.getLogger(__name__)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a subscription: word for word, `*` for any one word."""
    wanted, words = pattern.split("."), subject.split(".")
    return len(wanted) == len(words) and all(a in ("*", b) for a, b in zip(wanted, words, strict=True))


class _Message(msgspec.Struct, frozen=True):
    subject: str
    message: bytes
    reply: asyncio.Future[bytes] | None


class MemoryHub:
    """What a NATS server is to its clients."""

    def __init__(self) -> None:
        self._subscriptions: list[MemorySubscription] = []
        self._clients: dict[int, MemoryBus] = {}
        self._watchers: list[Callable[[str, str], None]] = []
        self._ids = itertools.count()
        self._turn = itertools.count()
        self.running = True

    def connect(self, name: str) -> "MemoryBus":
        bus = MemoryBus(self, next(self._ids), name)
        self._clients[bus.client_id] = bus
        return bus

    def stop(self) -> None:
        """The server is away: what is published is lost, requests fail."""
        self.running = False

    def start(self) -> None:
        self.running = True

    def drop(self, name: str, reason: str) -> None:
        """The processes of that name die. They may connect again under it."""
        for bus in [bus for bus in self._clients.values() if bus.name == name]:
            self.leave(bus, reason)

    # --- for buses ---

    def leave(self, bus: "MemoryBus", reason: str) -> None:
        if self._clients.pop(bus.client_id, None) is None:
            return
        bus.sever()
        for subscription in [s for s in self._subscriptions if s.client_id == bus.client_id]:
            subscription.end()
        if not any(other.name == bus.name for other in self._clients.values()):
            for watcher in list(self._watchers):
                asyncio.get_running_loop().call_soon(watcher, bus.name, reason)

    def add(self, subscription: "MemorySubscription") -> None:
        self._subscriptions.append(subscription)

    def remove(self, subscription: "MemorySubscription") -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def watch(self, watcher: Callable[[str, str], None]) -> None:
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[str, str], None]) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def deliver(self, message: _Message) -> bool:
        """Hand a message to every matching subscription, and to one of each queue group. False when there is none."""
        if not self.running:
            return False
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        found = False
        for subscription in [s for s in self._subscriptions if matches(s.subject, message.subject)]:
            found = True
            if subscription.queue is None:
                subscription.offer(message)
            else:
                groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
        for members in groups.values():
            members[next(self._turn) % len(members)].offer(message)
        return found


class MemoryBus:
    """One client's connection to the hub."""

    def __init__(self, hub: MemoryHub, client_id: int, name: str) -> None:
        self._hub = hub
        self.client_id = client_id
        self.name = name
        self._open = True

    async def publish(self, subject: str, message: bytes) -> None:
        self._check(message)
        self._hub.deliver(_Message(subject, bytes(message), None))

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        self._check(message)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not self._hub.running:
            raise BusUnavailable("the control bus is not connected; it is being retried")
        if not self._hub.deliver(_Message(subject, bytes(message), reply)):
            raise BusUnavailable(f"nobody answers {subject} at present")
        try:
            return await asyncio.wait_for(reply, timeout_s)
        except TimeoutError:
            raise BusTimeout(f"no answer on {subject} within {timeout_s} s") from None

    async def subscribe(self, subject: str, handler: BusHandler, queue: str | None = None) -> "MemorySubscription":
        self._check(b"")
        subscription = MemorySubscription(self._hub, self.client_id, subject, handler, queue)
        self._hub.add(subscription)
        return subscription

    async def close(self) -> None:
        self._hub.leave(self, "Client Closed")

    def sever(self) -> None:
        """The connection is gone for good."""
        self._open = False

    def _check(self, message: bytes) -> None:
        if not self._open:
            raise BusUnavailable("this connection to the control bus is closed")
        if len(message) > MAX_BUS_MESSAGE_BYTES:
            raise BusMessageError(f"bus message too large: at most {MAX_BUS_MESSAGE_BYTES} bytes, got {len(message)}")


class MemorySubscription:
    """A handler, and the messages that wait for it."""

    def __init__(self, hub: MemoryHub, client_id: int, subject: str, handler: BusHandler, queue: str | None) -> None:
        self._hub = hub
        self.client_id = client_id
        self.subject = subject
        self.queue = queue
        self._handler = handler
        self._pending: deque[_Message] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def cancel(self) -> None:
        self.end()

    def end(self) -> None:
        self._hub.remove(self)
        self._pending.clear()
        self._ended = True
        if asyncio.current_task() is self._task:
            return  # a handler that cancels its own subscription still finishes
        self._task.cancel()

    def offer(self, message: _Message) -> None:
        if len(self._pending) < PENDING_MESSAGES_MAX:
            self._pending.append(message)
            self._arrived.set()
        else:
            log.warning("the handler of %s is too slow; a message was lost", self.subject)

    async def _run(self) -> None:
        while not self._ended:
            while not self._pending:
                self._arrived.clear()
                await self._arrived.wait()
            message = self._pending.popleft()
            try:
                answer = await self._handler(message.subject, message.message)
            except Exception:
                log.exception("handling a message on %s failed", message.subject)
                continue
            if answer is not None and message.reply is not None and not message.reply.done():
                message.reply.set_result(answer)


class MemoryPresence:
    """The in-memory `PresenceWatcher`."""

    def __init__(self, hub: MemoryHub) -> None:
        self._hub = hub
        self._watcher: Callable[[str, str], None] | None = None

    async def start(self, on_disconnect: Callable[[str, str], None]) -> None:
        self._watcher = on_disconnect
        self._hub.watch(on_disconnect)

    async def close(self) -> None:
        if self._watcher is not None:
            self._hub.unwatch(self._watcher)
