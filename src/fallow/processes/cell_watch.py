"""When a device that runs should be in another cell: it looks at the cells around it, seldom, and says which.

Rules
- It looks every `look_interval_s` or so, drawn anew each time, so that the devices of a cell do not all move at once.
  A look is what a device does before it joins (`nearest_cell.py`): signed digests, and round trips of its own.
- It looks only while the device may work: who is halted or without a lease stays where it is, and so does who hears
  nothing.
- What it asks of others is a subscription for some seconds and a few empty messages.

Whether a look leads to a move is decided in `policy/cell_changes.py`. It moves nobody: `device_life.py` does.
"""

import logging
import random

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError, TrustError
from fallow.fabric.contract import Bus
from fallow.policy import cell_changes
from fallow.policy.cell_changes import Settled
from fallow.policy.cells import CellRules
from fallow.processes.nearest_cell import cells_around
from fallow.trust.contract import CellWords, Lease

log = logging.getLogger(__name__)


class CellWatch:
    """One device's look-out from the cell that it is in. Make it when the device has come there."""

    def __init__(
        self, bus: Bus, clock: Clock, home: str, words: CellWords, lease: Lease, draws: random.Random,
        rules: CellRules | None = None,
    ) -> None:  # fmt: skip
        self._bus = bus
        self._clock = clock
        self._words = words
        self._lease = lease
        self._draws = draws
        self._rules = rules or CellRules()
        self._settled = Settled(home=home, since_s=clock.monotonic_s())

    async def better_cell(self) -> str:
        """Wait until the device should move, and give the cell to move to."""
        while True:
            await self._clock.sleep(self._rules.look_interval_s * (0.5 + self._draws.random()))
            if self._lease.standing is not Standing.WORKING:
                continue
            try:
                cell = await self._look()
            except (FabricError, TrustError) as error:
                log.info("the cells around could not be looked at: %s", error)
            except Exception:
                log.exception("looking at the cells around failed; the next look is in a while")
            else:
                if cell is not None:
                    return cell

    def refused(self) -> None:
        """The device may not move now: it stays as long as one that has just come."""
        self._settled = Settled(home=self._settled.home, since_s=self._clock.monotonic_s())

    async def _look(self) -> str | None:
        home = self._settled.home
        offers = await cells_around(self._bus, self._clock, home, self._words, self._rules)
        self._settled, cell = cell_changes.look(self._settled, offers, self._clock.monotonic_s(), self._rules)
        if self._settled.away:
            log.info("cell %s is not the one to be in, by %d looks in a row", home, self._settled.away)
        return cell
