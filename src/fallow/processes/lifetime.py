"""How a process of ours ends: by signal, politely first, and never later than its supervisor.

Rules
- The first SIGTERM or SIGINT asks to leave politely, the second to stop at once.
- A process that was told its parent's id does not outlive it: it leaves politely, for `PARTING_S` at most. Nobody is
  left working for a fleet that has been stopped. (Children of `fallow up` are ended by the kernel, where it can.)
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
from collections.abc import Awaitable
from typing import Any, Final

PARENT_CHECK_S: Final = 0.5
PARTING_S: Final = 3.0
"""How long a process without its parent may take to leave politely."""


class Stop:
    """What the signals have asked for so far. Make one inside the running loop."""

    def __init__(self) -> None:
        self.polite = asyncio.Event()
        self.at_once = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    def listen(self, parent_pid: int | None = None) -> None:
        """Take the signals; with `parent_pid`, stop as well when that parent is gone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1)  # writes every thread's stack to stderr: for a process that hangs
        if parent_pid is not None:
            self._watch = loop.create_task(self._watch_parent(parent_pid))

    def ask(self) -> None:
        """One signal."""
        (self.at_once if self.polite.is_set() else self.polite).set()

    async def unless_at_once(self, work: Awaitable[Any], limit_s: float) -> bool:
        """Do `work`, but give it up after `limit_s`, or at once when that is asked. Whether it was finished."""
        task = asyncio.ensure_future(work)
        hurry = asyncio.ensure_future(self.at_once.wait())
        try:
            await asyncio.wait({task, hurry}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            return task.done() and not task.cancelled() and task.exception() is None
        finally:
            hurry.cancel()
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _watch_parent(self, parent_pid: int) -> None:
        while os.getppid() == parent_pid:  # noqa: ASYNC110 (no event tells of it everywhere)
            await asyncio.sleep(PARENT_CHECK_S)
        self.polite.set()
        await asyncio.sleep(PARTING_S)
        self.at_once.set()
