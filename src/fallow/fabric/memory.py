"""The in-memory fabric: links and a bus between parts that share one process and one event loop.

Rules
- It keeps the contract of the real fabrics, encoding included: what passes here passes the wire.
- Time is the event loop's alone (`call_at`), so that it runs under a loop with virtual time.
- Tests and the simulator set conditions: `latency_s` per pair, `cut` and `heal` (silence, as when a cable is pulled),
  `crash` (a process dies: its peers' kernels tell them, its bus connection breaks).
- No losses and no bandwidth limits: a link is a byte stream with a delay, as TCP and QUIC offer it. The simulator adds
  both in subclasses (`simulator/network.py`): a link is made by `_make_link`, and says in `_put` when bytes are due.
"""

import asyncio
from collections import deque

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.fabric.accept_queue import AcceptQueue
from fallow.fabric.codec import Buffer
from fallow.fabric.contract import DIAL_TIMEOUT_S
from fallow.fabric.link_core import LinkCore
from fallow.fabric.memory_bus import MemoryBus, MemoryHub, MemoryPresence


class MemoryFabric:
    """The shared medium: who is there, and what lies between them."""

    def __init__(self, latency_s: float = 0.0, hub: MemoryHub | None = None) -> None:
        self.hub = MemoryHub() if hub is None else hub
        self._latency_s = latency_s
        self._pair_latency_s: dict[frozenset[NodeId], float] = {}
        self._cuts: set[frozenset[NodeId]] = set()
        self._endpoints: dict[NodeId, MemoryEndpoint] = {}
        self._links: dict[MemoryLink, None] = {}
        """Every end. A dict, because its order is the same in every run."""
        self._healed: asyncio.Event | None = None

    # --- parts ---

    def endpoint(self, node: NodeId) -> "MemoryEndpoint":
        """A presence on the data fabric; one per node at a time."""
        if node in self._endpoints:
            raise LinkClosed(f"an endpoint of {node} is open already")
        self._endpoints[node] = MemoryEndpoint(self, node)
        return self._endpoints[node]

    def bus(self, name: str) -> MemoryBus:
        return self.hub.connect(name)

    def presence(self) -> MemoryPresence:
        return MemoryPresence(self.hub)

    # --- conditions ---

    def set_latency(self, a: NodeId, b: NodeId, latency_s: float) -> None:
        """One-way delay between two nodes, both ways."""
        self._pair_latency_s[frozenset((a, b))] = latency_s

    def latency_s(self, a: NodeId, b: NodeId) -> float:
        return self._pair_latency_s.get(frozenset((a, b)), self._latency_s)

    def cut(self, a: NodeId, b: NodeId) -> None:
        """Nothing passes between the two, and nobody is told."""
        self._cuts.add(frozenset((a, b)))

    def heal(self, a: NodeId, b: NodeId) -> None:
        """What was held passes, in order."""
        self._cuts.discard(frozenset((a, b)))
        self.pump()

    def pump(self) -> None:
        """What may pass again is delivered, and dialling goes on."""
        if self._healed is not None:
            self._healed.set()
        for link in list(self._links):
            link.pump()

    def is_cut(self, a: NodeId, b: NodeId) -> bool:
        return frozenset((a, b)) in self._cuts

    def crash(self, node: NodeId) -> None:
        """The node's process dies: links break at both ends, and so does the bus connection of that name."""
        endpoint = self._endpoints.pop(node, None)
        if endpoint is not None:
            endpoint.accepted.close()
        for link in [link for link in self._links if link.here == node]:
            link.abort("this process crashed")
        self.hub.drop(node, "Client Closed")

    # --- for endpoints and links ---

    async def dial(self, here: NodeId, there: NodeId) -> "MemoryLink":
        """Raises `LinkClosed` when nobody is there, or nothing passes for `DIAL_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                while self.is_cut(here, there):
                    self._healed = self._healed or asyncio.Event()
                    self._healed.clear()
                    await self._healed.wait()
                await asyncio.sleep(2 * self.latency_s(here, there))
        except TimeoutError:
            raise LinkClosed(f"{there[:8]} did not answer within {DIAL_TIMEOUT_S} s") from None
        target = self._endpoints.get(there)
        if target is None or here not in self._endpoints:
            raise LinkClosed(f"nobody listens as {there[:8]}")
        near, far = self._make_link(here, there), self._make_link(there, here)
        near.other, far.other = far, near
        if not target.accepted.offer(far):
            raise LinkClosed(f"{there[:8]} accepts no more links at present")
        self._links |= {near: None, far: None}
        return near

    def _make_link(self, here: NodeId, there: NodeId) -> "MemoryLink":
        return MemoryLink(self, here, there)

    def forget_link(self, link: "MemoryLink") -> None:
        self._links.pop(link, None)

    def forget_endpoint(self, node: NodeId) -> None:
        self._endpoints.pop(node, None)


class MemoryEndpoint:
    """The `LinkEndpoint` of the in-memory fabric."""

    def __init__(self, fabric: MemoryFabric, node: NodeId) -> None:
        self._fabric = fabric
        self._node = node
        self.accepted = AcceptQueue()

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self._node, ())

    async def connect(self, address: PeerAddress) -> "MemoryLink":
        return await self._fabric.dial(self._node, address.node)

    def accept(self) -> AcceptQueue:
        return self.accepted

    async def close(self) -> None:
        self._fabric.forget_endpoint(self._node)
        self.accepted.close()


class Piece:
    """Bytes under way."""

    __slots__ = ("data", "due_s", "size_bytes")

    def __init__(self, due_s: float, data: bytes | None, size_bytes: int) -> None:
        self.due_s = due_s
        self.data = data
        """`None` is the end of the stream."""
        self.size_bytes = size_bytes
        """How many they count for."""


class MemoryLink(LinkCore):
    """One end of a pair. Bytes wait in the sender's pipe until they are due and the receiver takes them."""

    other: "MemoryLink"

    def __init__(self, fabric: MemoryFabric, here: NodeId, there: NodeId) -> None:
        super().__init__(there)
        self.here = here
        self._fabric = fabric
        self._pipe: deque[Piece] = deque()
        self._pipe_bytes = 0
        self._timer: asyncio.Handle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._dropped = False

    def inject(self, data: bytes) -> None:
        """Send raw bytes, for tests of hostile peers."""
        self._write(data, b"")

    def pump(self) -> None:
        """Deliver what is due and may pass; then see to the rest."""
        self._timer = None
        if self._fabric.is_cut(self.here, self._peer):
            return
        now = self._loop.time()
        while self._pipe and self._pipe[0].due_s <= now and not self.other._holding:
            piece = self._pipe.popleft()
            if piece.data is None:
                self._fabric.forget_link(self)
                self.other._eof()
            else:
                self._pipe_bytes -= piece.size_bytes
                self.other._data(piece.data)
        self._room()
        if not self._pipe and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._schedule()

    def _put(self, data: bytes | None, delay_s: float, size_bytes: int) -> None:
        """Have bytes delivered after a delay, and after all that was put before."""
        due_s = self._loop.time() + delay_s
        if self._pipe:
            due_s = max(due_s, self._pipe[-1].due_s)
        self._pipe.append(Piece(due_s, data, size_bytes))
        self._pipe_bytes += size_bytes
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None or not self._pipe or self.other._holding:
            return
        due = self._pipe[0].due_s
        soon = due <= self._loop.time()
        self._timer = self._loop.call_soon(self.pump) if soon else self._loop.call_at(due, self.pump)

    def _write(self, head: bytes, payload: Buffer) -> None:
        data = b"".join((head, payload))
        self._put(data, self._fabric.latency_s(self.here, self._peer), len(data))

    def _unsent_bytes(self) -> int:
        return self._pipe_bytes

    def _hold_reading(self) -> None:
        pass  # the other end's pump looks at `_holding`

    def _resume_reading(self) -> None:
        self.other._schedule()

    async def _finish(self) -> None:
        if self._pipe:
            self._drained = self._loop.create_future()
            await self._drained

    def _drop(self) -> None:
        if not self._dropped:
            self._dropped = True
            self._pipe.clear()
            self._pipe_bytes = 0
            self._put(None, self._fabric.latency_s(self.here, self._peer), 0)
