"""The gateway's door: requests wait here for their turn, and leave when their client does.

What is decided is in `policy/admission.py`; here is the waiting. Measurements come from the generations themselves
(`Observer`), so nothing runs when nobody asks. A request waits at most `wait_max_s`, whatever was predicted.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Final, NoReturn

import msgspec

from fallow.domain.clock import Clock
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.problems import overloaded, rate_limited
from fallow.policy.admission import (
    AdmissionRules,
    FairQueue,
    Places,
    Refusal,
    Request,
    Why,
    Window,
    adapted,
    places_first,
)

SAMPLES_MAX: Final = 4096
"""Gaps that are kept of a window; a window with more is judged by its first ones."""


class Place:
    """An admitted request, until the block ends. `tokens` is what it generated so far."""

    def __init__(self) -> None:
        self.tokens = 0


class Admission:
    """Who may generate now. Also the `Observer` of the generations."""

    def __init__(self, rules: AdmissionRules, clock: Clock, metrics: GatewayMetrics) -> None:
        self._rules = rules
        self._clock = clock
        self._metrics = metrics
        self._queue = FairQueue(rules)
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._gaps_s: list[float] = []
        self._window_since_s = clock.monotonic_s()
        self._running_most = 0
        self.places: Places = places_first(rules)
        self._tell()

    @property
    def waiting(self) -> int:
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Places that are taken."""
        return self._queue.running

    @asynccontextmanager
    async def place(self, owner: str, count: int, prompt_tokens: int) -> AsyncIterator[Place]:
        """Wait for the turn of a request with `count` answers. Raises a 429 or 503 `Problem` that says when to try
        again; a cancellation leaves the queue at once."""
        request = await self._wait(owner, count, prompt_tokens)
        began_s = self._clock.monotonic_s()
        place = Place()
        try:
            yield place
        finally:
            now_s = self._clock.monotonic_s()
            self._queue.end(request, place.tokens, now_s - began_s, now_s)
            self._begin()

    async def _wait(self, owner: str, count: int, prompt_tokens: int) -> Request:
        arrived_s = self._clock.monotonic_s()
        decision = self._queue.arrive(owner, count, prompt_tokens, self.places.whole, arrived_s)
        if isinstance(decision, Refusal):
            self._refuse(decision)
        turn = self._turns[decision.number] = asyncio.get_running_loop().create_future()
        try:
            self._begin()
            if not turn.done():
                async with asyncio.timeout(self._rules.wait_max_s):
                    await turn
        except BaseException as error:
            late = isinstance(error, TimeoutError)
            begun = turn.done() and not turn.cancelled()
            if not (late and begun):  # its turn came in the very moment in which its time was over
                self._forget(decision)
                if late:
                    self._refuse(Refusal(Why.TOO_LONG, self._rules.wait_max_s / 2))
                raise
        finally:
            del self._turns[decision.number]
        self._metrics.waited(self._clock.monotonic_s() - arrived_s)
        return decision

    def _forget(self, request: Request) -> None:
        """It does not want its turn any more, whether it has come or not."""
        now_s = self._clock.monotonic_s()
        self._queue.give_up(request)
        self._queue.end(request, 0, 0.0, now_s)
        self._begin()

    def _refuse(self, refusal: Refusal) -> NoReturn:
        shown_s = f"{refusal.retry_after_s:.0f} s"
        match refusal.why:
            case Why.KEY_FULL:
                message = f"As many requests of this key are waiting as may. Try again in {shown_s}."
                raise rate_limited(message, "requests", refusal.retry_after_s)
            case Why.QUEUE_FULL | Why.TOO_LONG:
                message = f"More is being asked than these devices can answer now. Try again in {shown_s}."
                raise overloaded(message, refusal.retry_after_s)

    def _begin(self) -> None:
        """Wake whose turn it is."""
        now_s = self._clock.monotonic_s()
        while begun := self._queue.begin(self.places.whole, now_s):
            for request in begun:
                turn = self._turns[request.number]
                if turn.cancelled():  # its client has hung up; it will be forgotten when it runs next
                    self._queue.end(request, 0, 0.0, now_s)
                else:
                    turn.set_result(None)
        self._running_most = max(self._running_most, self._queue.running)
        self._tell()

    def _tell(self) -> None:
        self._metrics.door(self._queue.waiting, self.places.whole)

    # --- what the fleet shows -------------------------------------------------------------------

    def first_token(self, elapsed_s: float) -> None:
        self._metrics.first_token(elapsed_s)

    def next_token(self, elapsed_s: float) -> None:
        self._metrics.next_token(elapsed_s)
        if len(self._gaps_s) < SAMPLES_MAX:
            self._gaps_s.append(elapsed_s)
        rules = self._rules
        window_s = rules.window_s if self.places.was_full else rules.window_first_s
        lasted_s = self._clock.monotonic_s() - self._window_since_s
        if lasted_s >= (window_s if len(self._gaps_s) >= rules.samples_min else rules.window_max_s):
            self._adapt(self._window())

    def no_room(self, places: int = 1) -> None:
        """Devices had no room for a request that was admitted and has `places` now. Where nobody else has any, it says
        nothing of how many may run, and the window goes on."""
        others = self._queue.running - places
        if others > 0:
            self._adapt(msgspec.structs.replace(self._window(), no_room=True, running_then=others))

    def _window(self) -> Window:
        enough = len(self._gaps_s) >= self._rules.samples_min
        return Window(gap_s=median(self._gaps_s) if enough else None, running_most=self._running_most)

    def _adapt(self, window: Window) -> None:
        self.places = adapted(self.places, window, self._rules)
        self._window_since_s = self._clock.monotonic_s()
        self._gaps_s.clear()
        self._running_most = self._queue.running
        self._begin()
