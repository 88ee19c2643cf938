"""Whether the machine itself stood still: nobody is to be blamed for what its host did.

A virtual machine's processors are taken from it for a second and more at times. Whoever runs on one of them is silent
meanwhile, and given up by those who run on another.
"""

import os
import threading
import time
from types import TracebackType
from typing import Final, Self

from fallow.policy.liveness import Liveness

STEP_S: Final = 0.05
COUNTS_S: Final = Liveness().silence_s / 2
"""Held up for so long, with what it had not said before, a process may be taken to be lost."""


class Stalls:
    """One thread on each processor that sleeps in short steps and notes how late it wakes."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {None}
        self._threads = [threading.Thread(target=self._watch, args=(each,)) for each in processors]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def counted(self) -> bool:
        """Whether one was long enough to cost a link."""
        return self.longest_s >= COUNTS_S

    def _watch(self, processor: int | None) -> None:
        if processor is not None:
            os.sched_setaffinity(threading.get_native_id(), {processor})
        due_s = time.monotonic() + STEP_S
        while not self._ended.wait(max(0.0, due_s - time.monotonic())):
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - due_s)
            due_s = now_s + STEP_S
