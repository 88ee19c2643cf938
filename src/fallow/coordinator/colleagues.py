"""The coordinators of a cell, as each tells of itself: for `fallow status`. Nobody decides anything by it."""

from typing import Final

import msgspec

from fallow.coordinator import checks
from fallow.coordinator.leadership import NAME_MAX_CHARS
from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import CoordinatorReport

COLLEAGUES_MAX: Final = 16
"""More than that are not shown."""
SILENCE_MAX_S: Final = 3.0


class Colleagues:
    """Ourselves, and the others that were heard of lately."""

    def __init__(self, me: CoordinatorReport, clock: Clock) -> None:
        self.me = me
        self._clock = clock
        self._since_s = clock.monotonic_s()
        self._heard: dict[str, tuple[CoordinatorReport, float]] = {}

    def turned(self, leading: int | None) -> None:
        """We lead from now on under that epoch, or stand by."""
        self.me = msgspec.structs.replace(self.me, epoch=leading)
        self._since_s = self._clock.monotonic_s()

    def report(self) -> CoordinatorReport:
        """Our own word."""
        return msgspec.structs.replace(self.me, since_s=self._clock.monotonic_s() - self._since_s)

    def heard(self, subject: str, message: bytes) -> None:
        """Another's word, or our own. Raises `BusMessageError`."""
        report = checks.decode(message, CoordinatorReport)
        checks.sent_by(subject, report.id)
        for text in (report.id, report.name):
            if len(text) > NAME_MAX_CHARS or not text.isprintable():
                raise BusMessageError(f"expected up to {NAME_MAX_CHARS} printable characters, got {text[:80]!r}")
        if report.id != self.me.id and (report.id in self._heard or len(self._heard) < COLLEAGUES_MAX):
            self._heard[report.id] = (report, self._clock.monotonic_s())

    def forget(self, id: str) -> None:  # noqa: A002
        """Its connection broke."""
        self._heard.pop(id, None)

    def others(self) -> tuple[CoordinatorReport, ...]:
        """Those that were heard of lately, by name."""
        oldest_s = self._clock.monotonic_s() - SILENCE_MAX_S
        self._heard = {id: heard for id, heard in self._heard.items() if heard[1] >= oldest_s}  # noqa: A001
        return tuple(sorted((report for report, _ in self._heard.values()), key=lambda report: report.name))
