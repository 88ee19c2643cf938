"""The in-memory control bus, the twin of `nats_bus.py`.

Rules: one task per subscription runs its handler on one message after the other; a queue beyond
`PENDING_MESSAGES_MAX` loses the newest, as NATS does with a slow consumer. `stop` and `start` on the hub play a server
that restarts; `drop` plays a client process that dies. Messages arrive at once, unless a subclass overrides `delay_s`.
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


class Message(msgspec.Struct, frozen=True):
    """What was published, by whom, and who waits for the answer."""

    subject: str
    message: bytes
    sender: "MemoryBus"
    reply: "asyncio.Future[bytes] | None"


class MemoryHub:
    """What a NATS server is to its clients."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, list[MemorySubscription]] = {}
        """By subject, so that a message costs the same among thousands of subscriptions."""
        self._patterns: list[MemorySubscription] = []
        """Those whose subject has a `*`."""
        self._clients: dict[int, MemoryBus] = {}
        self._by_name: dict[str, list[MemoryBus]] = {}
        self._watchers: list[Callable[[str, str], None]] = []
        self._ids = itertools.count()
        self._turn = itertools.count()
        self.running = True
        self.starts = 0
        """How often the server was started again: tells one connection from the next."""

    def connect(self, name: str) -> "MemoryBus":
        bus = MemoryBus(self, next(self._ids), name)
        self._clients[bus.client_id] = bus
        self._by_name.setdefault(name, []).append(bus)
        return bus

    def stop(self) -> None:
        """The server is away: what is published is lost, requests fail."""
        self.running = False

    def start(self) -> None:
        self.running = True
        self.starts += 1

    def drop(self, name: str, reason: str) -> None:
        """The processes of that name die. They may connect again under it."""
        for bus in list(self._by_name.get(name, ())):
            self.leave(bus, reason)

    def delay_s(self, sender: str, receiver: str) -> float | None:
        """How long a message is under way; `None`: it does not arrive. The simulator overrides it."""
        return 0.0

    def arrived(self, receiver: str, message: Message) -> None:
        """A message reaches a client's handler. For simulators to note."""

    def waiting_for(self, name: str) -> int:
        """Messages that have arrived for a client's handlers and were not taken yet."""
        buses = self._by_name.get(name, ())
        return sum(subscription.pending for bus in buses for subscription in bus.subscriptions)

    # --- for buses ---

    def leave(self, bus: "MemoryBus", reason: str) -> None:
        if self._clients.pop(bus.client_id, None) is None:
            return
        bus.sever()
        for subscription in list(bus.subscriptions):
            subscription.end()
        self._by_name[bus.name].remove(bus)
        if not self._by_name[bus.name]:
            del self._by_name[bus.name]
            for watcher in list(self._watchers):
                asyncio.get_running_loop().call_soon(watcher, bus.name, reason)

    def add(self, subscription: "MemorySubscription") -> None:
        self._siblings(subscription).append(subscription)

    def remove(self, subscription: "MemorySubscription") -> None:
        siblings = self._siblings(subscription)
        if subscription in siblings:
            siblings.remove(subscription)
        if not siblings:
            self._subscriptions.pop(subscription.subject, None)

    def _siblings(self, subscription: "MemorySubscription") -> "list[MemorySubscription]":
        if "*" in subscription.subject.split("."):
            return self._patterns
        return self._subscriptions.setdefault(subscription.subject, [])

    def watch(self, watcher: Callable[[str, str], None]) -> None:
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[str, str], None]) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def deliver(self, message: Message) -> bool:
        """Send a message to every matching subscription, and to one of each queue group. False when there is none."""
        if not self.running:
            return False
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        found = False
        exact = self._subscriptions.get(message.subject, ())
        for subscription in [*exact, *(s for s in self._patterns if matches(s.subject, message.subject))]:
            found = True
            if subscription.queue is None:
                self._pass_on(message, subscription)
            else:
                groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
        for members in groups.values():
            self._pass_on(message, members[next(self._turn) % len(members)])
        return found

    def _pass_on(self, message: Message, subscription: "MemorySubscription") -> None:
        delay_s = self.delay_s(message.sender.name, subscription.bus.name)
        if delay_s == 0.0:
            subscription.offer(message)
        elif delay_s is not None:
            loop = asyncio.get_running_loop()
            # Messages of one client to one subscription stay in order, whatever their delays.
            due_s = max(loop.time() + delay_s, subscription.due_s.get(message.sender.client_id, 0.0))
            subscription.due_s[message.sender.client_id] = due_s
            loop.call_at(due_s, subscription.offer, message)

    def answer(self, message: Message, answerer: "MemoryBus", answer: bytes) -> None:
        """Send the answer to a request."""
        delay_s = self.delay_s(answerer.name, message.sender.name)
        if delay_s == 0.0:
            _settle(message, answer)
        elif delay_s is not None:
            asyncio.get_running_loop().call_later(delay_s, _settle, message, answer)


def _settle(message: Message, answer: bytes) -> None:
    if message.reply is not None and not message.reply.done():
        message.reply.set_result(answer)


class MemoryBus:
    """One client's connection to the hub."""

    def __init__(self, hub: MemoryHub, client_id: int, name: str) -> None:
        self._hub = hub
        self.client_id = client_id
        self.name = name
        self.subscriptions: list[MemorySubscription] = []
        self._open = True

    async def publish(self, subject: str, message: bytes) -> None:
        self._check(message)
        self._hub.deliver(Message(subject, bytes(message), self, None))

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        self._check(message)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not self._hub.running:
            raise BusUnavailable("the control bus is not connected; it is being retried")
        if not self._hub.deliver(Message(subject, bytes(message), self, reply)):
            raise BusUnavailable(f"nobody answers {subject} at present")
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` loses a cancellation that comes with the answer
                return await reply
        except TimeoutError:
            raise BusTimeout(f"no answer on {subject} within {timeout_s} s") from None

    async def subscribe(
        self, subject: str, handler: BusHandler, queue: str | None = None, at_once: int = 1
    ) -> "MemorySubscription":
        self._check(b"")
        subscription = MemorySubscription(self._hub, self, subject, handler, queue, at_once)
        self.subscriptions.append(subscription)
        self._hub.add(subscription)
        return subscription

    async def close(self) -> None:
        self._hub.leave(self, "Client Closed")

    @property
    def is_open(self) -> bool:
        return self._open

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

    def __init__(
        self, hub: MemoryHub, bus: MemoryBus, subject: str, handler: BusHandler, queue: str | None, at_once: int = 1
    ) -> None:
        self._hub = hub
        self.bus = bus
        self.subject = subject
        self.queue = queue
        self.due_s: dict[int, float] = {}
        """When the newest message of each client arrives that is still under way, or was."""
        self._handler = handler
        self._pending: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._room = asyncio.Semaphore(at_once) if at_once > 1 else None
        self._handling: set[asyncio.Task[None]] = set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pending(self) -> int:
        """Messages that wait for the handler."""
        return len(self._pending)

    async def cancel(self) -> None:
        self.end()

    def end(self) -> None:
        self._hub.remove(self)
        if self in self.bus.subscriptions:
            self.bus.subscriptions.remove(self)
        self._pending.clear()
        self._ended = True
        for task in (self._task, *self._handling):
            if task is not asyncio.current_task():  # a handler that cancels its own subscription still finishes
                task.cancel()

    def offer(self, message: Message) -> None:
        if self._ended:
            return
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
            self._hub.arrived(self.bus.name, message)
            if self._room is None:
                await self._handle(message)
                continue
            await self._room.acquire()
            task = asyncio.get_running_loop().create_task(self._handle(message))
            self._handling.add(task)
            task.add_done_callback(self._handled)

    def _handled(self, task: asyncio.Task[None]) -> None:
        assert self._room is not None
        self._handling.discard(task)
        self._room.release()

    async def _handle(self, message: Message) -> None:
        try:
            answer = await self._handler(message.subject, message.message)
        except Exception:
            log.exception("handling a message on %s failed", message.subject)
            return
        if answer is not None and message.reply is not None:
            self._hub.answer(message, self.bus, answer)


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
