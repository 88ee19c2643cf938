"""Asks the coordinator that leads, also while another is taking over.

Rules
- A question that is open when a coordinator begins to lead is asked again at once: the one that it went to may be gone,
  and its answer would never come. Should leaders go on changing, it is asked again every `ASK_AGAIN_S`.
- Where nobody answers, or nobody leads, it is asked again every `ASK_AGAIN_S` as well. All of it ends after
  `LEADERLESS_MAX_S`, whatever is announced meanwhile.
- It may be answered twice; only questions for which that makes no difference belong here.
"""

import asyncio
import logging
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import BusTimeout, BusUnavailable
from fallow.domain.fleet import Subjects
from fallow.fabric.contract import Bus, Subscription

ANSWER_TIMEOUT_S: Final = 2.0
ASK_AGAIN_S: Final = 0.25
LEADERLESS_MAX_S: Final = 5.0
"""Longer than a lease: another leads by then, if there is another."""

log = logging.getLogger(__name__)


class Questions:
    """What a gateway asks the coordinator. `start` before asking."""

    def __init__(self, bus: Bus, subjects: Subjects, clock: Clock) -> None:
        self._bus = bus
        self._subjects = subjects
        self._clock = clock
        self._changed = asyncio.Event()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen for changes. Raises `BusUnavailable`."""
        self._subscription = await self._bus.subscribe(self._subjects.leader, self._on_leader)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.cancel()

    async def ask(self, subject: str, message: bytes) -> bytes:
        """The answer. Raises `BusTimeout` or `BusUnavailable` when none came in `LEADERLESS_MAX_S`."""
        deadline_s = self._clock.monotonic_s() + LEADERLESS_MAX_S
        changes = 0
        while True:
            changed = self._changed
            try:
                answer = await self._ask_once(subject, message, changed)
            except (BusTimeout, BusUnavailable) as error:
                if self._clock.monotonic_s() >= deadline_s:
                    raise
                log.info("%s; asking again", error.message)
                await _wait(changed, ASK_AGAIN_S)
                continue
            if answer is not None:
                return answer
            changes += 1
            if self._clock.monotonic_s() >= deadline_s:
                raise BusTimeout(f"{changes} coordinators began to lead in {LEADERLESS_MAX_S:g} s, and none answered")
            if changes > 1:
                await self._clock.sleep(ASK_AGAIN_S)

    async def _ask_once(self, subject: str, message: bytes, changed: asyncio.Event) -> bytes | None:
        """`None` when another began to lead before the answer was there."""
        loop = asyncio.get_running_loop()
        asking = loop.create_task(self._bus.request(subject, message, ANSWER_TIMEOUT_S))
        change = loop.create_task(changed.wait())
        try:
            await asyncio.wait({asking, change}, return_when=asyncio.FIRST_COMPLETED)
            return await asking if asking.done() else None
        finally:
            change.cancel()
            asking.cancel()

    async def _on_leader(self, _: str, message: bytes) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return
