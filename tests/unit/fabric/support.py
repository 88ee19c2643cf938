"""What the fabric's tests share: a real clock, ids, frames, and a loop on virtual time."""

import asyncio
import heapq
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from hypothesis import settings

from fallow.domain.frames import Chunk, Frame, Phase, Rows
from fallow.domain.ids import Digest, NodeId, SessionId

STEADY = settings(deadline=None, derandomize=True, database=None)
"""For property tests: the same examples every time, and no verdict on how busy the machine is."""
T = TypeVar("T")
SESSION = SessionId("5e" * 16)
DIGEST = Digest("d1" * 32)


def node_id(number: int) -> NodeId:
    return NodeId(f"{number:064x}")


def rows(position: int, payload: bytes = b"x" * 64) -> Frame:
    return Frame(
        Rows(session=SESSION, epoch=0, position=position, count=1, phase=Phase.DECODE, logits_from=0, top_k=None),
        payload,
    )


def chunk(index: int, payload: bytes) -> Frame:
    return Frame(Chunk(digest=DIGEST, index=index, found=True), payload)


class LoopClock:
    """A clock on the running loop's time, virtual or real."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run, and jumps to the next timer when nothing can."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(self._scheduled)._scheduled = False  # type: ignore[attr-defined]
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until something holds; fail when it does not in time."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
