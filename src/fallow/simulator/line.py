"""A home line's uplink, shared by the links over it. A fluid model: no packets.

Rules
- Each link is a flow. Frames of one flow go out in order; the flows that have something to send share the line alike,
  as connections with a congestion window each do. A frame waits for no other link's frames: only its rate is less.
  (Generalised processor sharing by virtual time: Parekh and Gallager 1993.)
- A frame of `SMALL_BYTES` at most that finds nobody at work goes out at once, without a timer of its own.
- A flow that ends takes back what had not gone out.

Not here: the delay of the way, and what the line's buffers add to it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from typing import Final, Generic, TypeVar

F = TypeVar("F", bound=Hashable)
P = TypeVar("P")

SMALL_BYTES: Final = 16 * 1024
"""A row or two, or control: one initial window of a connection."""
AT_ONCE_MAX_S: Final = 0.02
"""How much small frames may have ahead of them and still go out one after the other."""


class Uplink(Generic[F, P]):
    """`on_left(flow, piece)` is called when a piece that had to wait has gone out."""

    def __init__(self, rate_bytes_per_s: Callable[[float], float], on_left: Callable[[F, P], None]) -> None:
        """`rate_bytes_per_s`: by the loop's time; looked at whenever something begins or ends."""
        self._rate = rate_bytes_per_s
        self._on_left = on_left
        self._flows: dict[F, deque[tuple[P, int]]] = {}
        """Flows at work, and what they have to send; the first piece is going out."""
        self._ends: list[tuple[float, int, F]] = []
        """For each flow at work, where in `_served` its first piece has gone out. Also of flows that ended."""
        self._numbers: dict[F, int] = {}
        """By which entry of `_ends` counts for a flow."""
        self._count = 0
        self._served = 0.0
        """Bytes that a flow at work throughout has been served."""
        self._seen_s = 0.0
        self._free_s = 0.0
        """When the small frames that went out at once are gone."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def flow_count(self) -> int:
        """Flows that have something to send."""
        return len(self._flows)

    def at_once(self, size_bytes: int, now_s: float) -> float | None:
        """When a piece of that size has gone out, if it may go at once; else it must `enter`."""
        if self._flows or size_bytes > SMALL_BYTES or self._free_s - now_s > AT_ONCE_MAX_S:
            return None
        self._free_s = max(self._free_s, now_s) + size_bytes / self._rate(now_s)
        return self._free_s

    def enter(self, flow: F, piece: P, size_bytes: int) -> None:
        """Send a piece after the others of its flow, beside the other flows."""
        self._serve()
        waiting = self._flows.get(flow)
        if waiting is not None:
            waiting.append((piece, size_bytes))
            return
        self._flows[flow] = deque([(piece, size_bytes)])
        self._begin(flow, self._served + size_bytes)
        self._arm()

    def leave(self, flow: F) -> None:
        """The flow has ended: what it had to send is not sent."""
        if flow in self._flows:
            self._serve()
            del self._flows[flow], self._numbers[flow]
            self._arm()

    def _begin(self, flow: F, end: float) -> None:
        self._count += 1
        self._numbers[flow] = self._count
        heappush(self._ends, (end, self._count, flow))

    def _serve(self) -> None:
        """Count what was served since the last look."""
        now_s = asyncio.get_running_loop().time()
        if self._flows:
            self._served += (now_s - self._seen_s) * self._rate(now_s) / len(self._flows)
        else:
            self._served = 0.0
            self._ends.clear()
        self._seen_s = now_s

    def _first(self) -> tuple[float, F] | None:
        while self._ends:
            end, number, flow = self._ends[0]
            if self._numbers.get(flow) == number:
                return end, flow
            heappop(self._ends)
        return None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = self._first()
        if first is not None:
            left = max(0.0, first[0] - self._served) * len(self._flows)
            self._timer = asyncio.get_running_loop().call_later(left / self._rate(self._seen_s), self._gone, *first)

    def _gone(self, end: float, flow: F) -> None:
        """The first piece of `flow` has gone out."""
        self._timer = None
        self._serve()
        self._served = end  # not a rounding error more or less
        heappop(self._ends)
        waiting = self._flows[flow]
        piece, _ = waiting.popleft()
        if waiting:
            self._begin(flow, end + waiting[0][1])
        else:
            del self._flows[flow], self._numbers[flow]
        self._arm()
        self._on_left(flow, piece)
