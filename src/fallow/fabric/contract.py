"""The two fabrics' contracts: `Bus` for control, `Link` for data.

`tests/contract/` runs one suite on every adapter. What the suite holds:

Bus
- Subjects are dotted words; a subscription may use `*` for one word. Delivery is at most once, in order per
  publisher and subscription; one message is handled after the other, unless `at_once` allows several. A handler's
  exception is logged and never breaks the subscription.
- `request` waits for one reply: `BusTimeout` when none came, `BusUnavailable` when nobody can be asked.
- A broken connection heals by itself; what was published meanwhile may be lost. Messages are at most
  `MAX_BUS_MESSAGE_BYTES`.

Link
- Frames arrive whole, once, in the order sent. `send` waits while `LINK_WINDOW_BYTES` are unsent: back-pressure, not
  a buffer. Sends from several tasks do not interleave within a frame.
- `receive` raises `LinkClosed` when the peer closed (at once) or cannot be reached any more, and `FrameError` when the
  peer sent garbage, after which the link is closed. Cancelling a `receive` loses nothing.
- `close` is idempotent, flushes what was sent, and wakes every waiter on both sides. Its code and message reach the
  peer (as a `Goodbye`, which links handle themselves) in the words of its `LinkClosed`.
- The peer's id is authenticated by the transport; nobody can claim another's.

LeaseKey
- A write names the revision that it follows and succeeds for one writer only. Revisions rise with every write, also
  over a restart of the server, and over the loss of what it stored.
- What nobody writes again vanishes after a while, not before its time to live by the server's clock. That clock may
  jump: who decides whether a holder is gone counts by its own.
- `connection` is another number after every break, so that a holder knows that others may have been told of its end.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import msgspec

from fallow.domain.credentials import Passport
from fallow.domain.errors import FabricError
from fallow.domain.frames import Frame, PeerAddress
from fallow.domain.ids import NodeId

MAX_BUS_MESSAGE_BYTES = 1 << 20
LINK_WINDOW_BYTES = 8 << 20
DIAL_TIMEOUT_S = 5.0

BusHandler = Callable[[str, bytes], Awaitable[bytes | None]]
"""Takes subject and message; what it returns answers a request (`None`: no answer)."""


class Subscription(Protocol):
    """A live subscription."""

    async def cancel(self) -> None:
        """Stop delivery. Idempotent."""
        ...


class Bus(Protocol):
    """Publish, subscribe and request among the processes of a cell."""

    async def publish(self, subject: str, message: bytes) -> None: ...

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        """The first reply. Raises `BusTimeout` or `BusUnavailable`."""
        ...

    async def subscribe(
        self, subject: str, handler: BusHandler, queue: str | None = None, at_once: int = 1
    ) -> Subscription:
        """Deliver matching messages to `handler`; with `queue`, to one member of that group.

        `at_once`: messages that are begun in order, each while up to `at_once - 1` earlier ones are still waiting.
        """
        ...

    async def close(self) -> None: ...


class BusCredentials(Protocol):
    """What opens the bus: a passport that others renew, the key behind it, and whom to trust as the server."""

    @property
    def passport(self) -> str:
        """The newest. Asked at every connection, also after a break."""
        ...

    def sign(self, nonce: bytes) -> bytes:
        """With the passport's key."""
        ...

    def refused(self) -> None:
        """The server did not take the newest passport. Called at every attempt; must not block."""
        ...

    @property
    def authority_pem(self) -> str:
        """The certificate authority of the bus's server."""
        ...


class Admission(Protocol):
    """Who may hold a link with us."""

    @property
    def passport(self) -> str:
        """Ours, for `Hello`; the newest."""
        ...

    def admit(self, peer: NodeId, passport: str) -> Passport:
        """What a peer is, by the document that it showed. Raises `PassportRefused`."""
        ...

    def computes(self, passport: Passport) -> bool:
        """Whether its holder is a device, which may be sent rows. Nobody else is, whoever names it in a chain."""
        ...

    def life_left_s(self, passport: Passport) -> float:
        """For how long it is good from now on."""
        ...

    def revoked(self, peer: NodeId) -> bool:
        """Whether a peer that was admitted is welcome no longer. Asked often: costs no signature."""
        ...


class PresenceWatcher(Protocol):
    """Tells when a process loses its connection to the bus: the fastest sign of a crash.

    A client that connected again under the same name before the event of its old connection came is not reported.
    """

    async def start(self, on_disconnect: Callable[[str, str], None]) -> None:
        """Call `on_disconnect(client_name, reason)` for each loss, until `close`. Raises `BusUnavailable`."""
        ...

    async def close(self) -> None: ...


class LeaseEntry(msgspec.Struct, frozen=True):
    """What stands at a lease key."""

    revision: int
    value: bytes
    """Empty: its holder gave it up."""


class LeaseKey(Protocol):
    """One short value on the bus, written by compare-and-set, that vanishes unless it is written again."""

    @property
    def connection(self) -> int | None:
        """Counts this process's connections to the bus; `None` while there is none."""
        ...

    async def read(self) -> LeaseEntry | None:
        """What stands there now. Raises `BusTimeout` or `BusUnavailable`."""
        ...

    async def write(self, value: bytes, after: int) -> int | None:
        """Write if `after` is still the revision, 0 meaning that nothing stands there. The new revision; `None` when
        another write came first. Raises `BusTimeout` or `BusUnavailable`, after which it may have been written."""
        ...

    async def watch(self, on_write: Callable[[], None]) -> Subscription:
        """Call `on_write` soon after every write, and perhaps for writes that failed: a hint to read. One that came
        while the connection was broken is not told, and neither is that the value vanished."""
        ...


class Link(Protocol):
    """An ordered, framed, bounded, encrypted conversation with one authenticated peer."""

    @property
    def peer(self) -> NodeId: ...

    @property
    def rtt_s(self) -> float | None:
        """The transport's estimate of the round trip, when it has one."""
        ...

    async def send(self, frame: Frame) -> None:
        """Queue a frame; waits under back-pressure. Raises `LinkClosed`."""
        ...

    async def receive(self) -> Frame:
        """The next frame. Raises `LinkClosed` or `FrameError`."""
        ...

    async def close(self, code: str = "done", message: str = "") -> None: ...


class PushLink(Link, Protocol):
    """A `Link` that can also push: no task and no wake-up per frame. Every adapter here is one; `Peers` needs it.

    A link is either pulled with `receive` or pushed with `set_receiver`, not both.
    """

    @property
    def bytes_received(self) -> int:
        """Bytes that arrived so far, whole frames or not: a peer in the middle of a big frame is not silent."""
        ...

    @property
    def frames_sent(self) -> int:
        """Frames that were accepted for sending so far."""
        ...

    def post(self, frame: Frame) -> bool:
        """Queue a frame without waiting; false when the link is closed or its window is full."""
        ...

    def set_receiver(self, on_frame: Callable[[Frame], None], on_end: Callable[[FabricError], None]) -> None:
        """From now on call `on_frame` for every frame in order, and `on_end` once, last, with why the link ended.

        Frames that already came are delivered before this returns. An exception from `on_frame` closes the link.
        """
        ...

    def abort(self, message: str) -> None:
        """Close at once without flushing; for a peer that is believed dead."""
        ...


class LinkEndpoint(Protocol):
    """A device's presence on the data fabric: it dials and is dialled."""

    @property
    def address(self) -> PeerAddress: ...

    async def connect(self, address: PeerAddress) -> Link:
        """Dial a peer. Raises `LinkClosed` after `DIAL_TIMEOUT_S` at most."""
        ...

    def accept(self) -> AsyncIterator[Link]:
        """Links that peers open, until `close`."""
        ...

    async def close(self) -> None: ...
