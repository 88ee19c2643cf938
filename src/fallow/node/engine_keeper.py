"""Keeps the engine as it must be: running while the device may work, its process gone while it may not.

Rules
- When the lease ends or the council halts, `on_stop` is called at once, and the engine is closed, which kills its
  process. It is started again when the device may work again.
- When the engine is lost, `on_lost` is called, and it is started again after a pause that grows with each loss in a
  row.
- `on_running` is called after every start: nothing is hosted then.

Two tasks, so that an engine that takes long to start does not hold up a stop.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError
from fallow.engine.contract import StageEngine
from fallow.trust.contract import Lease

RESTART_PAUSE_S: Final = 0.1
RESTART_PAUSE_MAX_S: Final = 30.0
STABLE_S: Final = 30.0
"""An engine that ran for so long starts with a clean slate."""

log = logging.getLogger(__name__)


class EngineKeeper:
    """One engine's. Whoever made it runs both tasks."""

    def __init__(
        self,
        engine: StageEngine,
        lease: Lease,
        clock: Clock,
        *,
        on_stop: Callable[[Standing, str], None],
        on_lost: Callable[[], None],
        on_running: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change`: the device's standing is another one."""
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._on_stop = on_stop
        self._on_lost = on_lost
        self._on_running = on_running
        self._on_change = on_change

    async def watch_standing(self) -> None:
        """Stop at once what may not go on, for ever."""
        standing = self._lease.standing
        while True:
            if standing is not Standing.WORKING:
                log.warning("this device stops working (%s): %s", standing, self._lease.why)
                self._on_stop(standing, self._lease.why)
            self._on_change()
            standing = await self._lease.changed(standing)

    async def watch_engine(self, *, runs: bool) -> None:
        """Have the engine run, or not, for ever. `runs`: whether it was started already."""
        losses = 0
        while True:
            since_s = self._clock.monotonic_s()
            if runs and await self._lost():
                losses = 1 if self._clock.monotonic_s() - since_s > STABLE_S else losses + 1
                log.warning("the engine was lost, %d in a row; starting it again", losses)
                self._on_lost()
            else:
                losses = 0
                await self._engine.close()
                while (standing := self._lease.standing) is not Standing.WORKING:
                    await self._lease.changed(standing)
            runs = await self._start(losses)
            if runs:
                self._on_running()

    def _may_work(self) -> bool:
        return self._lease.standing is Standing.WORKING

    async def _lost(self) -> bool:
        """Wait until the engine is lost: true. Or until the device may not work: false."""
        loop = asyncio.get_running_loop()
        lost = loop.create_task(self._engine.lost.wait())
        stopped = loop.create_task(self._lease.changed(Standing.WORKING))
        try:
            await asyncio.wait({lost, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return self._may_work()
        finally:
            lost.cancel()
            stopped.cancel()

    async def _start(self, losses: int) -> bool:
        """Whether it runs, which it does in the end unless the device may not work meanwhile."""
        while True:
            if losses:
                await self._clock.sleep(min(RESTART_PAUSE_S * 2 ** (min(losses, 16) - 1), RESTART_PAUSE_MAX_S))
            if not self._may_work():
                return False
            try:
                await self._engine.start()
                return self._may_work()
            except (FallowError, OSError) as error:
                losses += 1
                log.warning("the engine did not start: %s", error)
