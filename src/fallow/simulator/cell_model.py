"""A small event-driven model of one cell that decodes: sessions, hops, calls, heartbeats. For benchmarks of routing.

Rules
- A session decodes token by token. A token's row visits the hops of its session's chain in order; between two devices
  it is on the wire for half their round trip. Chains run ahead (docs/adr/0010): from the last device the token goes to
  the first one, which begins the next row at once, and to the gateway, which counts it. Nothing goes wrong with that
  here, and no gateway is so far that a chain would have to wait for it (`AHEAD_ROWS`).
- A device computes one call at a time: one part (a piece has a graph of its own), and up to `ROWS_MAX` of the rows that
  wait for it, first come, first served. Parts take turns in their order, so that rows which go through several are
  carried along; a part for which a full call waits goes before those for which none does.
- What the router knows are carriers as heartbeats told them, an interval old at most, and what it remembers itself.
- A device that fails takes its queue with it. Its sessions ask for a repair after `DETECT_S`, stand still for
  `REBUILD_S` while caches are rebuilt, and repeat the token that was under way.

Prompts are not modelled: every row is a decode row. Time is the model's own; nothing here reads a clock or draws.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId, SessionId
from fallow.domain.model import StageSpec
from fallow.policy.routing import Carrier, ModelShape, kv_bytes
from fallow.policy.speed import ROWS_MAX, layer_s
from fallow.simulator.cell_values import MODEL, Asked, Machine, Route, Seen

DETECT_S = 0.5
REBUILD_S = 0.5
RETRY_S = 1.0

__all__ = ["MODEL", "Asked", "CellModel", "Machine", "Route", "Seen"]

Floats = NDArray[np.float64]


class _Session:
    __slots__ = ("ahead", "began_s", "chain", "gateway", "hops", "left", "name", "ticket", "token_at_s", "tokens")

    def __init__(self, name: SessionId, asked: Asked, now_s: float) -> None:
        self.name = name
        self.gateway = asked.gateway
        self.tokens = self.left = self.ahead = asked.tokens
        """All of the answer's; those that the gateway still waits for; those that the chain has still to compute."""
        self.chain: tuple[tuple[int, int, int], ...] = ()
        """Device, first part, last part of every hop."""
        self.hops: tuple[Hop, ...] = ()
        self.began_s = self.token_at_s = now_s
        self.ticket = 0
        """Counts up with every repair: rows of before are stale."""


_Row = tuple[_Session, int, int]
"""A session, the place in its chain, and its ticket."""


class _Device:
    __slots__ = (
        "alive",
        "busy",
        "busy_s",
        "computed",
        "curve",
        "kv_free",
        "open",
        "part",
        "told_rows",
        "told_s",
        "waiting",
        "worked",
    )

    def __init__(self, machine: Machine) -> None:
        self.alive = True
        self.busy = False
        self.waiting: dict[int, deque[_Row]] = {}
        """By the part that they wait for; no part without rows."""
        self.part = -1
        self.curve = [0.0, *(layer_s(machine.speed, rows, 0.0) for rows in range(1, ROWS_MAX + 1))]
        self.kv_free = machine.kv_bytes
        self.open: set[_Session] = set()
        self.computed = self.told_rows = 0
        self.busy_s = self.worked = 0.0
        """Seconds of calls, and layers of work times rows, since it came."""
        self.told_s = 0.0


class CellModel:
    """One cell. `offer` or `keep_running` brings sessions, `run` moves time on, `seen` tells what happened."""

    def __init__(
        self,
        machines: Sequence[Machine],
        rtt_s: Floats,
        shape: ModelShape,
        route: Route,
        reserve_tokens: int,
        heartbeat_s: float = 10.0,
        gateways: int = 1,
    ) -> None:
        """`rtt_s` [devices + gateways, devices + gateways], the gateways last."""
        self.now_s = 0.0
        self.shape = shape
        self.machines = list(machines)
        self.carriers: dict[NodeId, Carrier] = {}
        self.names = [NodeId(f"{index:064x}") for index in range(len(rtt_s))]
        self._index = {name: index for index, name in enumerate(self.names)}
        self._half_s: list[list[float]] = (rtt_s / 2).tolist()
        self._links = [
            {self.names[other]: float(rtt_s[index, other]) for other in range(len(rtt_s)) if other != index}
            for index in range(len(machines))
        ]
        self._first_gateway = len(rtt_s) - gateways
        self._route = route
        self._reserve_tokens = reserve_tokens
        self._heartbeat_s = heartbeat_s
        edges = sorted({0, shape.layer_count, *(e for m in machines for p in m.pieces for e in (p.first, p.last))})
        self._edges = {edge: part for part, edge in enumerate(edges)}
        self._work = [float(after - before) for before, after in pairwise(edges)]
        self._work[-1] += shape.head_layers
        self._devices = [_Device(machine) for machine in machines]
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()
        self._sessions_named = count()
        self._replace: Callable[[], Asked] | None = None
        self.running = 0
        self.seen = Seen(from_s=0.0)
        for index in range(len(machines)):
            self._tell(index)
            self._at(heartbeat_s * (index + 1) / len(machines), self._beat, index)

    # --- time -----------------------------------------------------------------------------------

    def _at(self, at_s: float, action: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), action, arguments))

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        """Do something at a moment of the model's time."""
        self._at(at_s, action)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, action, arguments = heapq.heappop(events)
            action(*arguments)
        self.now_s = until_s
        self.seen.until_s = until_s

    def reset(self) -> None:
        """Forget what was seen so far."""
        self.seen = Seen(from_s=self.now_s, until_s=self.now_s, token_s=[], session_token_s=[], stalls_s=[])

    # --- sessions -------------------------------------------------------------------------------

    def offer(self, at_s: float, asked: Asked) -> None:
        """A client asks at that moment; without a chain it is refused."""
        self._at(at_s, self._begin, asked)

    def keep_running(self, sessions: int, ask: Callable[[], Asked]) -> None:
        """So many sessions at once from now on: one that ends is followed by another at once."""
        self._replace = ask
        for _ in range(sessions):
            self._begin(ask())

    def _begin(self, asked: Asked) -> None:
        session = _Session(SessionId(f"{next(self._sessions_named):032x}"), asked, self.now_s)
        if not self._open(session, (), ()):
            self.seen.refused += 1
            if self._replace is not None:
                self._at(self.now_s + RETRY_S, self._begin, self._replace())
            return
        self.running += 1
        self.seen.started += 1
        self._feed(session)

    def _open(self, session: _Session, keep: tuple[Hop, ...], exclude: tuple[NodeId, ...]) -> bool:
        request = RouteRequest(
            model=MODEL,
            session=session.name,
            reserve_tokens=self._reserve_tokens,
            keep=keep,
            exclude=exclude,
            origin=self.names[self._first_gateway + session.gateway],
        )
        reply = self._route(request, self.carriers, self.now_s)
        taken: list[tuple[_Device, int]] = []
        for hop in reply.hops:
            device = self._devices[self._index[hop.address.node]]
            room = 0 if hop in keep else kv_bytes(hop.span, self._reserve_tokens, self.shape)
            if not device.alive or device.kv_free < room:
                return False
            taken.append((device, room))
        for device, room in taken:
            device.kv_free -= room
            device.open.add(session)
        session.hops = reply.hops
        session.chain = tuple(
            (self._index[hop.address.node], self._edges[hop.span.first], self._edges[hop.span.last])
            for hop in reply.hops
        )
        return bool(reply.hops)

    def _leave(self, session: _Session, kept: tuple[Hop, ...]) -> None:
        left = [(self._devices[self._index[hop.address.node]], hop) for hop in session.hops if hop not in kept]
        left = [(device, hop) for device, hop in left if session in device.open]
        for device, hop in left:
            device.kv_free += kv_bytes(hop.span, self._reserve_tokens, self.shape)
            if all(hop.address.node != other.address.node for other in kept):
                device.open.discard(session)

    def _feed(self, session: _Session) -> None:
        """The gateway sends the next token to the first hop, which has none of those that it still waits for."""
        first = session.chain[0][0]
        session.ahead = session.left
        delay_s = self._half_s[self._first_gateway + session.gateway][first]
        self._at(self.now_s + delay_s, self._arrive, first, (session, 0, session.ticket))

    def _token(self, session: _Session, ticket: int) -> None:
        """A token has come back to the gateway."""
        if ticket != session.ticket:
            return
        seen = self.seen
        seen.tokens += 1
        seen.hops += len(session.chain)
        seen.token_s.append(self.now_s - session.token_at_s)
        session.token_at_s = self.now_s
        session.left -= 1
        if session.left:
            return
        seen.finished += 1
        seen.session_token_s.append((self.now_s - session.began_s) / session.tokens)
        self._leave(session, ())
        self.running -= 1
        if self._replace is not None:
            self._begin(self._replace())

    # --- devices --------------------------------------------------------------------------------

    def _arrive(self, index: int, row: _Row) -> None:
        device = self._devices[index]
        session, place, ticket = row
        if not device.alive or ticket != session.ticket:
            return
        self._wait(device, session.chain[place][1], row)
        if not device.busy:
            self._call(index)

    def _wait(self, device: "_Device", part: int, row: _Row) -> None:
        device.waiting.setdefault(part, deque()).append(row)

    def _call(self, index: int) -> None:
        """Start a call with rows that wait for the part whose turn it is."""
        device = self._devices[index]
        waiting = device.waiting
        device.busy = bool(waiting)
        if not waiting:
            return
        parts = sorted(waiting)
        full = [part for part in parts if len(waiting[part]) >= ROWS_MAX]
        turn = full or parts
        part = next((part for part in turn if part > device.part), turn[0])
        queue = waiting[part]
        rows = [queue.popleft() for _ in range(min(len(queue), ROWS_MAX))]
        if not queue:
            del waiting[part]
        device.part = part
        call_s = self._work[part] * device.curve[len(rows)]
        device.busy_s += call_s
        device.worked += self._work[part] * len(rows)
        self._at(self.now_s + call_s, self._called, index, part, rows)

    def _called(self, index: int, part: int, rows: list[_Row]) -> None:
        """A call has ended: its rows go on."""
        device = self._devices[index]
        if not device.alive:
            return
        half_s = self._half_s[index]
        for row in rows:
            session, place, ticket = row
            if ticket != session.ticket:
                continue
            if part + 1 < session.chain[place][2]:
                self._wait(device, part + 1, row)
                continue
            device.computed += 1
            following = place + 1
            if following == len(session.chain):
                back_s = half_s[self._first_gateway + session.gateway]
                self._at(self.now_s + back_s, self._token, session, ticket)
                session.ahead -= 1
                following = 0
                if not session.ahead:
                    continue
            other = session.chain[following][0]
            self._at(self.now_s + half_s[other], self._arrive, other, (session, following, ticket))
        self._call(index)

    # --- what the router is told ----------------------------------------------------------------

    def _beat(self, index: int) -> None:
        if self._devices[index].alive:
            self._tell(index)
        self._at(self.now_s + self._heartbeat_s, self._beat, index)

    def _tell(self, index: int) -> None:
        device, machine = self._devices[index], self.machines[index]
        elapsed_s = max(self.now_s - device.told_s, 1e-9)
        rate = (device.computed - device.told_rows) / elapsed_s if device.told_s else 0.0
        device.told_s, device.told_rows = self.now_s, device.computed
        if not machine.pieces:
            self.carriers.pop(self.names[index], None)
            return
        self.carriers[self.names[index]] = Carrier(
            address=PeerAddress(self.names[index], ()),
            stage=StageSpec(model=MODEL, pieces=machine.pieces),
            speed=machine.speed,
            sessions=len(device.open),
            kv_free_bytes=device.kv_free,
            link_rtt_s=self._links[index],
            tokens_per_s=rate,
            outlook=machine.outlook,
        )

    # --- comings and goings ---------------------------------------------------------------------

    def fail(self, index: int) -> None:
        """A device is gone; those who stream through it notice, and repair."""
        device = self._devices[index]
        device.alive = device.busy = False
        device.waiting.clear()
        self.carriers.pop(self.names[index], None)
        for session in sorted(device.open, key=lambda session: session.name):
            session.ticket += 1
            self._at(self.now_s + DETECT_S, self._repair, session, session.ticket, self.now_s)
        device.open.clear()

    def _repair(self, session: _Session, ticket: int, since_s: float) -> None:
        if ticket != session.ticket:
            return
        dead = tuple(hop.address.node for hop in session.hops if not self._devices[self._index[hop.address.node]].alive)
        keep = tuple(hop for hop in session.hops if session in self._devices[self._index[hop.address.node]].open)
        before = session.hops
        self._leave(session, keep)
        if not self._open(session, keep, dead):
            session.hops = before
            self._at(self.now_s + RETRY_S, self._repair, session, ticket, since_s)
            return
        for hop in keep:
            if hop not in session.hops:
                device = self._devices[self._index[hop.address.node]]
                device.kv_free += kv_bytes(hop.span, self._reserve_tokens, self.shape)
                if hop.address.node not in {other.address.node for other in session.hops}:
                    device.open.discard(session)
        self.seen.repairs += 1
        self.seen.stalls_s.append(self.now_s + REBUILD_S - since_s)
        self._at(self.now_s + REBUILD_S, self._resume, session, ticket)

    def _resume(self, session: _Session, ticket: int) -> None:
        if ticket == session.ticket:
            self._feed(session)

    def change(self, index: int, machine: Machine) -> None:
        """A device is back, or hosts other pieces from now on (only while nobody uses what it drops)."""
        device = self._devices[index]
        if not device.alive:
            self._devices[index] = _Device(machine)
            self._devices[index].told_s = self.now_s
        self.machines[index] = machine
        self._tell(index)

    def use_of(self, index: int) -> int:
        """Sessions that are open on a device."""
        return len(self._devices[index].open)

    def kv_free(self) -> dict[NodeId, int]:
        """The KV room that devices have now, not as told."""
        return {self.names[index]: device.kv_free for index, device in enumerate(self._devices)}
