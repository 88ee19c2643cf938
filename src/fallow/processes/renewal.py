"""Keeps what ends by itself renewed: certificates, and a council of one's documents, long before their ends.

Rules
- Whatever goes wrong at a renewal (a full disk, a locked database) ends that attempt and no other: it is told, and
  tried again after `RETRY_S` until it succeeds. What is renewed lives for weeks beyond `RENEWED_EVERY_S`.
- Each thing has a loop of its own, so that one that fails holds up no other.

What is renewed, and how, is its owner's.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError
from fallow.processes.supervisor import Tell

RENEWED_EVERY_S: Final = 7 * 24 * 3600.0
RETRY_S: Final = 3600.0

log = logging.getLogger(__name__)


async def keep_renewed(what: str, renew: Callable[[], Awaitable[None]], clock: Clock, tell: Tell) -> None:
    """Renew once in `RENEWED_EVERY_S`, until cancelled. `what`: for the sentence that is told of a failure."""
    wait_s = RENEWED_EVERY_S
    while True:
        await clock.sleep(wait_s)
        try:
            await renew()
        except Exception as error:  # nobody watches this task: whatever it is, the next attempt must be made
            log.debug("%s could not be renewed", what, exc_info=True)
            why = error.message if isinstance(error, FallowError) else f"{type(error).__name__}: {error}"
            tell(f"{what} could not be renewed, and is tried again in {RETRY_S / 60:g} minutes: {why}")
            wait_s = RETRY_S
        else:
            wait_s = RENEWED_EVERY_S
