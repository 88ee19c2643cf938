"""Whose chunk a device computes next, where chunks take unequal time. Pure but for its own books; no clock.

Rules
- Who waits is served in proportion to work, not to chunks: a chunk through thirty layers takes as long as ten through
  three, and who must compute few layers anew must not wait for a long prompt after every one of them.
- Who comes, or comes back after a rest, begins where the others stand: nobody saves up turns, and nobody starves.
- Of equals, the one that is named first.

Start-time fair queueing (Goyal, Vin and Cheng 1996).
"""

from collections.abc import Iterable

from fallow.domain.ids import SessionId


class FairTurns:
    """The work that each session has had. It knows those that were served and not forgotten."""

    def __init__(self) -> None:
        self._had: dict[SessionId, float] = {}
        self._floor = 0.0
        """Where the one that was served last stood before it."""

    def next(self, waiting: Iterable[SessionId]) -> SessionId:
        """Who is served next. At least one must be waiting."""
        return min(waiting, key=self._start)

    def took(self, session: SessionId, work: float) -> None:
        """It was served."""
        self._floor = self._start(session)
        self._had[session] = self._floor + work

    def forget(self, session: SessionId) -> None:
        """It has ended."""
        self._had.pop(session, None)

    def _start(self, session: SessionId) -> float:
        return max(self._floor, self._had.get(session, 0.0))
