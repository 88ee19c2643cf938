"""Whether this cell has too few devices or too many, what it says of that, and to whom.

Rules
- A cell that is too small for long names the neighbour into which it dissolves, in its digest: signed as that is, and
  heard by its devices and by the other cells. Its devices go by themselves, each at its own next look, if their owners
  let them choose their cell (`processes/cell_watch.py`). Nobody is sent away: who stays is served as before.
- A cell with more than `devices_max` takes nobody new, because those who choose their cell see that it is full. It says
  so to its operator, in the log and in the status, and names the devices that belong together in another cell. It
  splits nothing: that takes a second coordinator, and only an operator can start one.
- Who would go is worked out once a `SPLIT_LOOK_S`, for up to `SPLIT_DEVICES_MAX` devices, by round trips that most of
  them have measured; where they have not, nobody is named.
- What was found is forgotten with the term: the next leader begins to count anew.

Decisions are in `policy/cell_changes.py` and `policy/cells.py`.
"""

import logging
from collections.abc import Sequence

from fallow.coordinator.registry import Fleet
from fallow.domain.cells import CellDigest, CellSize
from fallow.domain.clock import Clock
from fallow.domain.ids import NodeId
from fallow.policy import cell_changes, cells
from fallow.policy.cell_changes import Smallness
from fallow.policy.cells import CellRules, Neighbour

SPLIT_LOOK_S = 300.0
SPLIT_DEVICES_MAX = 1000
"""Of more devices, nobody is named: a tenth of a second is what naming these takes."""

log = logging.getLogger(__name__)


class SizeWatch:
    """The size of one cell. `look` at every digest, `forget` when this coordinator stops leading."""

    def __init__(self, cell: str, clock: Clock, rules: CellRules, fleet: Fleet) -> None:
        self._cell = cell
        self._clock = clock
        self._rules = rules
        self._fleet = fleet
        self._small = Smallness()
        self._outgrown = False
        self._should_go: tuple[NodeId, ...] = ()
        self._looked_s: float | None = None

    def look(self, own: CellDigest, others: Sequence[Neighbour]) -> str | None:
        """The cell that this one dissolves into from now on, if it does. `own` is what it is about to tell."""
        before = self._small.into
        self._small = cell_changes.dissolving(self._small, own, others, self._clock.monotonic_s(), self._rules)
        into = self._small.into
        if into is not None and before is None:
            log.warning(
                "cell %s has %d devices, fewer than %d for long: those that may choose their cell are told to join %s",
                self._cell, own.devices, self._rules.devices_min, into,
            )  # fmt: skip
        elif before is not None and into is None:
            log.warning("cell %s does not dissolve into %s after all", self._cell, before)
        self._look_for_too_many(own.devices)
        return into

    def forget(self) -> None:
        """Begin anew."""
        self._small = Smallness()
        self._outgrown, self._should_go, self._looked_s = False, (), None

    def told(self) -> CellSize:
        """For `fallow status`."""
        return CellSize(
            devices_min=self._rules.devices_min,
            devices_max=self._rules.devices_max,
            dissolves_into=self._small.into,
            outgrown=self._outgrown,
            should_go=self._should_go,
        )

    def _look_for_too_many(self, devices: int) -> None:
        self._outgrown = devices > self._rules.devices_max
        if not self._outgrown:
            self._should_go, self._looked_s = (), None
            return
        now_s = self._clock.monotonic_s()
        if self._looked_s is not None and now_s - self._looked_s < SPLIT_LOOK_S:
            return
        self._looked_s = now_s
        self._should_go = self._who_should_go() if devices <= SPLIT_DEVICES_MAX else ()
        log.warning(
            "cell %s has outgrown itself: %d devices, and no more than %d should be in one; start another cell%s",
            self._cell, devices, self._rules.devices_max,
            f" for the {len(self._should_go)} that `fallow status` names" if self._should_go else "",
        )  # fmt: skip

    def _who_should_go(self) -> tuple[NodeId, ...]:
        positions = cells.positions({node: beat.link_rtt_s for node, beat in self._fleet.present().items()})
        parts = cells.split(positions, self._rules)
        return () if parts is None else min(parts, key=len)
