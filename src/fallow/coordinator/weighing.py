"""Weighs routes again and again, in a thread, and less often where it takes long: heartbeats and routes go on."""

import asyncio
import logging
from typing import Final

from fallow.coordinator import registry
from fallow.coordinator.registry import Fleet
from fallow.coordinator.router import Router
from fallow.domain.clock import Clock

REST_FACTOR: Final = 9.0
"""A weighing is followed by so many times as long a rest."""

log = logging.getLogger(__name__)


async def weigh_for_ever(router: Router, fleet: Fleet, clock: Clock, refresh_s: float) -> None:
    """Weigh every `refresh_s` or so, until cancelled."""
    while True:
        began_s = clock.monotonic_s()
        models = {m: (registry.shape_of(e), dict(fleet.carriers(m))) for m, e in fleet.entries().items()}
        try:
            await asyncio.to_thread(router.refresh, models)
        except Exception:
            log.exception("weighing routes failed; the weights of before stay in use")
        took_s = clock.monotonic_s() - began_s
        await clock.sleep(max(refresh_s, REST_FACTOR * took_s))
