"""Whether a chain gets on: when results came, how long the next may take, how often in a row none came. Values only.

A stall alone says nothing of who is to blame: links live, and devices that have much to do are slow. So the first is
answered by asking the chain where it stands, the next by doing without whoever holds the others up, then by asking for
a chain that keeps nothing of this one. After `STALLS_MAX` the conversation ends, so that its client need not wait for
a fleet that computes nothing.
"""

from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.frames import Phase

STALL_TIMEOUT_S: Final = 15.0
"""Without any progress for so long, the chain is asked where it stands even though every link lives. That voids the
rows under way, so one that is being rebuilt has `REBUILD_ROW_S` more for each of them."""
REBUILD_ROW_S: Final = 0.02
AVOID_STALLED_S: Final = 20.0
"""How long a session avoids the device that holds its chain up. Longer than the next stall takes to show; shorter than
a repair waits for a chain, so that a device is asked once more when there is no other."""
STALLS_OF_SOMEBODY: Final = 2
"""From so many stalls in a row on, somebody is taken to be at fault."""
STALLS_OF_ALL: Final = 3
"""From so many on, no device of the chain is kept for its cache."""
STALLS_MAX: Final = 4
FADES: Final = 0.95
"""What is left of the longest wait with every token: of one that was long, a third after twenty tokens."""
LATE_S: Final = 0.5
LATE_WAITS: Final = 2.0
OVERDUE_S: Final = 2.0
OVERDUE_WAITS: Final = 4.0
"""A token is late, or overdue, after so long and after so many times the longest wait of late: chains that stutter have
longer. A silent link is noticed before that (1.5 s), so overdue is who hangs, or is slow, behind links that live. With
0.8 s and 3 waits, many left devices that were only busy: the longest pause of two hours of churn was 5.0 s, not 2.3."""


class Progress:
    """Of one chain."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s = clock.monotonic_s()
        self.patience_s = STALL_TIMEOUT_S
        self.stalls = 0
        """In a row, without a result in between."""
        self._longest_s: float | None = None
        """The longest wait for a token of late; `None` before the first."""

    def begins(self) -> None:
        """There is something to wait for from now on."""
        self._since_s = self._clock.monotonic_s()

    def rebuilds(self, rows: int) -> None:
        """So many rows are to be computed before the next result."""
        self.patience_s = STALL_TIMEOUT_S + REBUILD_ROW_S * rows

    def starts_anew(self) -> None:
        """A prompt comes next; how long that takes, tokens do not tell."""
        self._longest_s = None

    def came(self, phase: Phase) -> None:
        """A result that was not there before: whatever had to be rebuilt for it has been."""
        if phase is Phase.DECODE and self.patience_s == STALL_TIMEOUT_S:
            self._longest_s = max(self.waited_s(), FADES * (self._longest_s or 0.0))
        self.begins()
        self.patience_s = STALL_TIMEOUT_S
        self.stalls = 0

    def waited_s(self) -> float:
        """How long ago there began to be something to wait for, or the last result came."""
        return self._clock.monotonic_s() - self._since_s

    def late(self) -> bool:
        """Whether the next token takes longer than those before it did."""
        return self._exceeds(LATE_S, LATE_WAITS)

    def overdue(self) -> bool:
        """Whether it takes much longer."""
        return self._exceeds(OVERDUE_S, OVERDUE_WAITS)

    def stalled(self) -> bool:
        """Whether the next result is overdue. A stall is counted once."""
        if self.waited_s() <= self.patience_s:
            return False
        self.begins()
        self.stalls += 1
        return True

    def _exceeds(self, least_s: float, waits: float) -> bool:
        longest_s = self._longest_s
        return longest_s is not None and self.waited_s() > max(least_s, waits * longest_s)
