"""Messages that cannot be true are dropped, counted by kind, and named in the log, a kind at most once in
`LOG_PERIOD_S`."""

import logging
from collections import Counter
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError, FallowError
from fallow.domain.fleet import RouteReply
from fallow.fabric.contract import BusHandler

LOG_PERIOD_S: Final = 10.0

log = logging.getLogger(__name__)


class Guard:
    """Stands before the coordinator's handlers. `dropped` counts by kind of message."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logged_s: dict[str, float] = {}
        self.dropped: Counter[str] = Counter()

    def before(self, kind: str, handler: BusHandler) -> BusHandler:
        """The handler, for messages that it believes; who asked for a route is told why there is none."""

        async def handle(subject: str, message: bytes) -> bytes | None:
            try:
                return await handler(subject, message)
            except BusMessageError as error:
                self.drop(kind, error)
                return msgspec.json.encode(RouteReply(error=error.message)) if kind == "route" else None

        return handle

    def drop(self, kind: str, error: FallowError) -> None:
        """Count a message that was not believed."""
        self.dropped[kind] += 1
        now_s = self._clock.monotonic_s()
        if now_s - self._logged_s.get(kind, -LOG_PERIOD_S) >= LOG_PERIOD_S:
            self._logged_s[kind] = now_s
            log.warning("%s: dropped a %s message (%d so far): %s", error.code, kind, self.dropped[kind], error)
