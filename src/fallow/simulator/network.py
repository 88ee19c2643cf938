"""What lies between simulated processes: distance, jitter, loss, uplinks, relays, partitions. A model on the in-memory
fabric; the frames and the bus messages are the real ones.

Rules
- A pair's delay is half its round trip (its regions' figure, times a factor of the pair that never changes), plus
  jitter for each message; a lost packet costs one round trip and a half. Streams stay in order.
- A share of pairs cannot connect directly: a relay carries their links, with more delay. Operators' machines can always
  be reached.
- Bytes take time. Links share their sender's uplink alike, as QUIC connections do, and a link's frames go out in order
  (`line.py`): nothing waits for another link's rows, but a row waits for those before it on the same link. Large frames
  queue at the receiver's downlink as they arrive; small ones pass between them.
- Model files are charged at the scenario's sizes, and queue behind each other; while one passes, everything else has
  half of the line.
- Nothing passes to or from a node that is isolated, nor between a region that is cut and the rest. Bus messages are
  then lost, links keep silent; what they hold passes after the cut.
- Links between two live processes that can reach each other count as heard (`SimulatedLink.bytes_received`), so that
  pings need not be simulated one by one, and nobody looks after links while nothing is broken (`SimulatedClock`).
  Silence begins when nothing passes, and is noticed as in the product. Round trips are measured by pings, more rarely.

Not here: packets, what full buffers add to delays, the bus server's own load.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Final

import msgspec

from fallow.domain.frames import AnyHeader, Chunk, Frame, Ping, Pong, Rows
from fallow.domain.ids import NodeId
from fallow.engine.memory import ROW_BYTES
from fallow.fabric.codec import Buffer
from fallow.fabric.memory import MemoryFabric, MemoryLink, Piece
from fallow.fabric.memory_bus import MemoryHub, Message
from fallow.policy.liveness import Liveness
from fallow.simulator.disk import TRANSFER_BYTES
from fallow.simulator.line import SMALL_BYTES, Uplink
from fallow.simulator.scenario import Network
from fallow.simulator.streams import Streams, number
from fallow.simulator.virtual_time import LoopClock

PACKET_BYTES: Final = 1400
LOSSES_MAX: Final = 50
"""Packets of one message that are looked at for losses; more make no difference that matters."""
PAIR_SPREAD: Final = 0.25
"""Standard deviation of the logarithm of a pair's factor."""
BULK_PIECE_S: Final = 0.4
"""A file's bytes arrive in pieces, so that a peer that sends one is heard."""
PULSE_PER_S: Final = 10.0


WATCH_TICK_S: Final = 0.1251
"""How often links are looked after; by this number `SimulatedClock` knows whose sleep it is."""
ALERT_S: Final = 10.0
"""How long after something broke links are looked after: much longer than it takes to notice."""
REST_S: Final = 60.0
"""How often they are looked after in between."""
WATCH: Final = Liveness(tick_s=WATCH_TICK_S, rtt_interval_s=REST_S, stall_s=1e9)
"""The product's, except that virtual time is never late and that round trips are measured every minute."""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process is, and its line."""

    region: str
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    metro_rtt_s: float
    nat_blocked: float = 0.0
    """Share of its pairs that need a relay."""


class _Line:
    """A site's uplink, and when its other queues are free again."""

    __slots__ = ("bulk_down_s", "bulk_up_s", "down_s", "site", "uplink")

    def __init__(self, site: Site, on_left: "Callable[[SimulatedLink, Piece], None]") -> None:
        self.site = site
        self.uplink: Uplink[SimulatedLink, Piece] = Uplink(self._up_bytes_per_s, on_left)
        self.down_s = self.bulk_up_s = self.bulk_down_s = 0.0

    def _up_bytes_per_s(self, now_s: float) -> float:
        return self.site.uplink_bytes_per_s * (0.5 if self.bulk_up_s > now_s else 1.0)


class SimulatedHub(MemoryHub):
    """The bus server, in the operator's region."""

    network: "SimulatedNetwork"

    def __init__(self, on_deliver: Callable[[str, str, Message], None]) -> None:
        super().__init__()
        self._on_deliver = on_deliver

    def delay_s(self, sender: str, receiver: str) -> float | None:
        return self.network.bus_delay_s(sender, receiver)

    def arrived(self, receiver: str, message: Message) -> None:
        self._on_deliver(message.sender.name, receiver, message)


class SimulatedNetwork(MemoryFabric):
    """The medium of a simulated world."""

    def __init__(
        self,
        figures: Network,
        operator: Site,
        streams: Streams,
        activation_bytes_per_row: int,
        hub: SimulatedHub,
        on_frame: Callable[[NodeId, NodeId, Frame], None],
    ) -> None:
        super().__init__(hub=hub)
        hub.network = self
        self.on_frame = on_frame
        self.row_bytes = activation_bytes_per_row
        self.bytes_carried = 0
        self.file_bytes_carried = 0
        self._figures = figures
        self._operator = operator
        self._seed = streams.seed
        self._noise = streams.stream("network")
        self._lines: dict[str, _Line] = {}
        self._delays_s: dict[tuple[str, str], float] = {}
        self._broke_s = -ALERT_S
        self._resting: dict[asyncio.Future[None], None] = {}
        self._isolated: set[str] = set()
        self._cut_regions: set[str] = set()

    # --- who is where ---

    def settle(self, name: str, site: Site) -> None:
        """Put a process on the map. Processes that were not put anywhere are the operator's."""
        self._lines[name] = _Line(site, self._left)

    def _line(self, name: str) -> _Line:
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = _Line(self._operator, self._left)
        return line

    # --- what breaks ---

    def isolate(self, node: str) -> None:
        """Nothing passes to or from one process, and nobody is told."""
        self._broken()
        self._isolated.add(node)

    def rejoin(self, node: str) -> None:
        self._isolated.discard(node)
        self.pump()

    def _broken(self) -> None:
        """Something is about to break: until now everybody was heard, from now on links are looked after."""
        loop = asyncio.get_running_loop()
        self._broke_s = loop.time()
        for link in self._links:
            assert isinstance(link, SimulatedLink)
            link.beat()
        for index, resting in enumerate(self._resting):
            loop.call_later(WATCH_TICK_S * (index % 16 + 1) / 16, _wake, resting)
        self._resting.clear()

    async def rest(self) -> None:
        """Return after one tick while something has just broken; otherwise when something breaks, or after long."""
        loop = asyncio.get_running_loop()
        resting = loop.create_future()
        if loop.time() - self._broke_s < ALERT_S:
            loop.call_later(WATCH_TICK_S, _wake, resting)
        else:
            self._resting[resting] = None
            loop.call_later(REST_S, _wake, resting)
        try:
            await resting
        finally:
            self._resting.pop(resting, None)

    def cut_region(self, region: str) -> None:
        """Nothing passes between a region and the rest."""
        self._broken()
        self._cut_regions.add(region)

    def heal_region(self, region: str) -> None:
        self._cut_regions.discard(region)
        self.pump()

    def is_cut(self, a: NodeId | str, b: NodeId | str) -> bool:
        if self._isolated and (a in self._isolated or b in self._isolated):
            return True
        return bool(self._cut_regions) and self._between_regions(self._line(a).site.region, self._line(b).site.region)

    def _between_regions(self, one: str, other: str) -> bool:
        return one != other and (one in self._cut_regions or other in self._cut_regions)

    # --- how long it takes ---

    def latency_s(self, a: NodeId | str, b: NodeId | str) -> float:
        """One way, undisturbed."""
        pair = (a, b) if a < b else (b, a)
        delay_s = self._delays_s.get(pair)
        if delay_s is None:
            delay_s = self._delays_s[pair] = self._pair_delay_s(*pair)
        return delay_s

    def _pair_delay_s(self, a: str, b: str) -> float:
        here, there = self._line(a).site, self._line(b).site
        draw = Streams(number(self._seed, "pair", a, b)).stream()
        delay_s = self._regions_rtt_s(here, there) / 2 * min(3.0, draw.lognormvariate(0.0, PAIR_SPREAD))
        blocked = min(here.nat_blocked, there.nat_blocked) > 0 and draw.random() < max(
            here.nat_blocked, there.nat_blocked
        )
        return delay_s + (self._figures.relay_extra_s if blocked else 0.0)

    def _regions_rtt_s(self, here: Site, there: Site) -> float:
        if here.region == there.region:
            return (here.metro_rtt_s + there.metro_rtt_s) / 2
        known = self._figures.regions_rtt_s
        for name in (f"{here.region}/{there.region}", f"{there.region}/{here.region}"):
            if name in known:
                return known[name]
        return self._figures.continent_rtt_s

    def bus_delay_s(self, sender: str, receiver: str) -> float | None:
        """By way of the bus server; `None` when one of the two cannot reach it."""
        here, there = self._line(sender).site, self._line(receiver).site
        if sender in self._isolated or receiver in self._isolated:
            return None
        if self._cut_regions and any(self._between_regions(s.region, self._operator.region) for s in (here, there)):
            return None
        return self._disturbed_s(
            (self._regions_rtt_s(here, self._operator) + self._regions_rtt_s(there, self._operator)) / 2, 1
        )

    def _disturbed_s(self, delay_s: float, packets: int) -> float:
        """A delay with jitter and losses."""
        disturbed_s = delay_s * (1 + abs(self._noise.gauss(0.0, self._figures.jitter_share)))
        for _ in range(min(packets, LOSSES_MAX)):
            if self._noise.random() < self._figures.loss:
                disturbed_s += 3 * delay_s
        return disturbed_s

    def send(self, link: "SimulatedLink", piece: Piece) -> None:
        """Take a frame's place in its sender's uplink. Says in `piece` when it arrives, now or once it has gone out."""
        self.bytes_carried += piece.size_bytes
        uplink = self._line(link.here).uplink
        left_s = uplink.at_once(piece.size_bytes, link.now_s)
        if left_s is None:
            uplink.enter(link, piece, piece.size_bytes)
        else:
            piece.due_s = self._arrives_s(link, piece.size_bytes, left_s)

    def give_up(self, link: "SimulatedLink") -> None:
        """The link has ended: what has not gone out is not sent."""
        self._line(link.here).uplink.leave(link)

    def _left(self, link: "SimulatedLink", piece: Piece) -> None:
        piece.due_s = self._arrives_s(link, piece.size_bytes, link.now_s)
        link.left()

    def _arrives_s(self, link: "SimulatedLink", size_bytes: int, left_s: float) -> float:
        """When a frame whose last byte has gone out at `left_s` has arrived; takes its place in the downlink."""
        arrives_s = left_s + self._disturbed_s(self.latency_s(link.here, link.peer), -(-size_bytes // PACKET_BYTES))
        if size_bytes <= SMALL_BYTES:
            return arrives_s
        down = self._line(link.peer)
        passes_s = size_bytes / (down.site.downlink_bytes_per_s * (0.5 if down.bulk_down_s > link.now_s else 1.0))
        down.down_s = max(arrives_s, max(down.down_s, arrives_s - passes_s) + passes_s)
        return down.down_s

    def file_passage_s(self, here: str, there: str, size_bytes: int, now_s: float) -> float:
        """The same for a piece of a model file, in the queues of such pieces."""
        up, down = self._line(here), self._line(there)
        start_s = max(now_s, up.bulk_up_s)
        up.bulk_up_s = start_s + size_bytes / up.site.uplink_bytes_per_s
        begins_s = max(start_s, down.bulk_down_s)
        down.bulk_down_s = max(up.bulk_up_s, begins_s + size_bytes / down.site.downlink_bytes_per_s)
        self.file_bytes_carried += size_bytes
        return down.bulk_down_s - now_s + self.latency_s(here, there)

    def _make_link(self, here: NodeId, there: NodeId) -> MemoryLink:
        return SimulatedLink(self, here, there)


class SimulatedClock(LoopClock):
    """The world's time. Those who look after links sleep until there is something to see."""

    network: SimulatedNetwork

    async def sleep(self, duration_s: float) -> None:
        if duration_s == WATCH_TICK_S:
            await self.network.rest()
        else:
            await super().sleep(duration_s)


def _wake(sleeper: "asyncio.Future[None]") -> None:
    if not sleeper.done():
        sleeper.set_result(None)


class SimulatedLink(MemoryLink):
    """A link whose bytes take the time that the network says."""

    def __init__(self, network: SimulatedNetwork, here: NodeId, there: NodeId) -> None:
        self._network = network
        self._received = self._sent = 0
        self._pulse_s = 0.0
        self._posting: AnyHeader | None = None
        super().__init__(network, here, there)

    @property
    def now_s(self) -> float:
        return self._loop.time()

    def beat(self) -> None:
        """The peer is heard now, if it can be."""
        if not self._network.is_cut(self.here, self._peer):
            self._pulse_s = self._loop.time()

    @property
    def bytes_received(self) -> int:
        self.beat()
        return self._received + int(self._pulse_s * PULSE_PER_S)

    @bytes_received.setter
    def bytes_received(self, value: int) -> None:
        # Only ever counted up by what came.
        self._received = value - int(self._pulse_s * PULSE_PER_S)

    @property
    def frames_sent(self) -> int:
        return self._sent + int(self._loop.time() * PULSE_PER_S)

    @frames_sent.setter
    def frames_sent(self, _: int) -> None:
        self._sent += 1

    def post(self, frame: Frame) -> bool:
        self._posting = frame.header
        return super().post(frame)

    def _write(self, head: bytes, payload: Buffer) -> None:
        header, self._posting = self._posting, None
        data = b"".join((head, payload))
        now_s = self._loop.time()
        if type(header) is Chunk and header.found:
            self._write_file(data, self._network.file_passage_s(self.here, self._peer, TRANSFER_BYTES, now_s))
            return
        size_bytes = len(data)
        if type(header) is Rows and len(payload) == header.count * ROW_BYTES:
            size_bytes = len(head) + header.count * self._network.row_bytes
        piece = Piece(math.inf, data, size_bytes)
        self._pipe.append(piece)
        self._pipe_bytes += size_bytes
        self._network.send(self, piece)
        self._schedule()

    def _put(self, data: bytes | None, delay_s: float, size_bytes: int) -> None:
        # Pieces arrive in their order whatever they say; the one before may not know yet when it is due.
        self._pipe.append(Piece(self.now_s + delay_s, data, size_bytes))
        self._pipe_bytes += size_bytes
        self._schedule()

    def left(self) -> None:
        """A frame that waited has gone out."""
        self._schedule()

    def _schedule(self) -> None:
        # What has not gone out yet is due at no time; when it has, we are told.
        if self._pipe and self._pipe[0].due_s < math.inf:
            super()._schedule()

    def _drop(self) -> None:
        self._network.give_up(self)
        super()._drop()

    def _write_file(self, data: bytes, passage_s: float) -> None:
        pieces = min(len(data), 1 + int(passage_s / BULK_PIECE_S))
        step = -(-len(data) // pieces)
        for index, at in enumerate(range(0, len(data), step)):
            part = data[at : at + step]
            self._put(part, passage_s * (index + 1) / pieces, TRANSFER_BYTES * len(part) // len(data))

    def _deliver(self, frames: list[Frame]) -> None:
        for frame in frames:
            if type(frame.header) not in (Ping, Pong):
                self._network.on_frame(self._peer, self.here, frame)
        super()._deliver(frames)
