"""An event loop whose clock jumps: hours of waiting pass at once, in the same order every time.

Rules: time moves only when nothing can run, and then to the next timer. With no timer and nothing to run, the program
waits for ever for something that cannot come: `Deadlock`. Real I/O must not be used under it. What is handed to a
thread runs at once in the loop instead, so that the order of things stays the same.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never blocks: a wait for the next timer becomes a jump of the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise Deadlock("every task waits and no timer is set")
        if timeout > 0:
            self.now_s += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop on virtual time, from 0 s."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Call it now; the result is awaited like a thread's."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class LoopClock:
    """`Clock` on the running loop's time."""

    def __init__(self, started_unix_s: float = 1_700_000_000.0) -> None:
        self._started_unix_s = started_unix_s

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return self._started_unix_s + self.monotonic_s()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


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
