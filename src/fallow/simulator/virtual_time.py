"""An event loop whose clock jumps: hours of waiting pass at once, in the same order every time.

Rules
- Time moves only when nothing can run, and then to the next timer. With no timer and nothing to run, the program waits
  for ever for something that cannot come: `Deadlock`.
- Nothing outside is looked at: no file, no socket, no signal, no other thread. Real I/O must not be used under it. What
  is handed to a thread runs at once in the loop instead, so that the order of things stays the same.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heapify, heappop, heappush
from typing import Any, Final, TypeVar

T = TypeVar("T")

CANCELLED_TIMERS_MIN: Final = 512
"""So many cancelled timers, and more than half of all, are swept out at once; `asyncio` does the same."""


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop on virtual time, from 0 s.

    It replaces `asyncio`'s turn of the loop and its queues (Python 3.11 to 3.13) by some without system calls and with
    timers that compare as tuples: half of the cost of a simulated message. Timers of one moment run in the order in
    which they were set.
    """

    _stopping: bool
    """`asyncio.BaseEventLoop` has it, and its type stubs do not tell."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._turn: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0
        self._timers_cancelled = 0
        super().__init__()

    def time(self) -> float:
        return self._now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Call it now; the result is awaited like a thread's."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    # --- queues -----------------------------------------------------------------------------------

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._turn.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]
        self._timers_set += 1
        heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, _: asyncio.TimerHandle) -> None:
        """`TimerHandle.cancel` calls this while the timer is in the queue."""
        self._timers_cancelled += 1

    # --- one turn ---------------------------------------------------------------------------------

    def _run_once(self) -> None:
        turn, timers = self._turn, self._timers
        if self._timers_cancelled > CANCELLED_TIMERS_MIN and 2 * self._timers_cancelled > len(timers):
            self._sweep_timers()
        if not turn and not self._stopping:
            self._jump()
        while timers and timers[0][0] <= self._now_s:
            timer = self._pop_timer()
            if not timer._cancelled:
                turn.append(timer)
        for _ in range(len(turn)):
            handle = turn.popleft()
            if not handle._cancelled:
                handle._run()

    def _jump(self) -> None:
        """Move the clock to the next timer."""
        while self._timers and self._timers[0][2]._cancelled:
            self._pop_timer()
        if not self._timers:
            raise Deadlock("every task waits and no timer is set")
        self._now_s = max(self._now_s, self._timers[0][0])

    def _pop_timer(self) -> asyncio.TimerHandle:
        timer = heappop(self._timers)[2]
        timer._scheduled = False  # type: ignore[attr-defined]
        self._timers_cancelled -= timer._cancelled
        return timer

    def _sweep_timers(self) -> None:
        live = []
        for entry in self._timers:
            if entry[2]._cancelled:
                entry[2]._scheduled = False  # type: ignore[attr-defined]
            else:
                live.append(entry)
        heapify(live)
        self._timers[:] = live
        self._timers_cancelled = 0


class LoopClock:
    """`Clock` on the running loop's time."""

    def __init__(self, started_unix_s: float = 1_700_000_000.0) -> None:
        self._started_unix_s = started_unix_s

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return self._started_unix_s + self.monotonic_s()

    async def sleep(self, duration_s: float) -> None:
        loop = asyncio.get_running_loop()
        awake = loop.create_future()
        loop.call_later(max(0.0, duration_s), _wake, awake)
        await awake


def _wake(sleeper: "asyncio.Future[None]") -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """Run a program to its end on virtual time, cancelling what it left."""
    loop = VirtualTimeLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        leftovers = asyncio.all_tasks(loop)
        if leftovers:
            loop.run_until_complete(asyncio.gather(*leftovers, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
