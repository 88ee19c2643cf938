"""Which cell a device joins: the nearest with room, by its own measurements.

Rules
- It listens to what cells tell of themselves for one and a half of their intervals, then measures the round trip to
  each coordinator a few times and takes the shortest: a longer one says something of load, not of distance.
- Digests that cannot be true, or that no coordinator of their cell signed, are not believed; at most `CELLS_MAX` cells
  are looked at.
- Where nothing was heard or nobody answers, the cell of the settings it is.

Measured once, before a device joins; moving later is not built. What is near is decided in `policy/cells.py`.
"""

import asyncio
import logging

from fallow.coordinator import checks
from fallow.domain.cells import CellDigest, digests
from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError, FabricError, TrustError
from fallow.domain.fleet import Subjects
from fallow.fabric.contract import Bus
from fallow.policy.cells import CellOffer, CellRules, choose_cell
from fallow.trust.contract import CellWords

CELLS_MAX = 64
MEASUREMENTS = 3
ANSWER_TIMEOUT_S = 0.5

log = logging.getLogger(__name__)


async def nearest_cell(bus: Bus, clock: Clock, home: str, words: CellWords, rules: CellRules | None = None) -> str:
    """The cell to join; `home` is where the device stays when nothing is clearly nearer. Raises `BusUnavailable`."""
    rules = rules or CellRules()
    heard = await _listen(bus, clock, words, 1.5 * rules.digest_interval_s)
    offers = await asyncio.gather(*(_offer(bus, clock, digest) for digest in heard.values()))
    chosen = choose_cell(home, [offer for offer in offers if offer is not None], rules) or home
    for offer in offers:
        if offer is not None:
            log.info("cell %s is %.0f ms away and has %d devices", offer.cell, offer.rtt_s * 1000, offer.devices)
    return chosen


async def _listen(bus: Bus, clock: Clock, words: CellWords, duration_s: float) -> dict[str, CellDigest]:
    heard: dict[str, CellDigest] = {}

    async def on_digest(subject: str, message: bytes) -> None:
        try:
            digest = checks.cell_digest(subject, message, words.told)
        except (BusMessageError, TrustError) as error:
            log.warning("%s: a cell's digest is not believed: %s", error.code, error)
            return
        if digest.cell in heard or len(heard) < CELLS_MAX:
            heard[digest.cell] = digest

    subscription = await bus.subscribe(digests(), on_digest)
    try:
        await clock.sleep(duration_s)
    finally:
        await subscription.cancel()
    return heard


async def _offer(bus: Bus, clock: Clock, digest: CellDigest) -> CellOffer | None:
    rtts_s: list[float] = []
    for _ in range(MEASUREMENTS):
        asked_s = clock.monotonic_s()
        try:
            await bus.request(Subjects(digest.cell).ping, b"", ANSWER_TIMEOUT_S)
        except FabricError as error:
            log.info("cell %s does not answer: %s", digest.cell, error)
            return None
        rtts_s.append(clock.monotonic_s() - asked_s)
    return CellOffer(
        cell=digest.cell, rtt_s=min(rtts_s), devices=digest.devices, devices_max=max(digest.devices_max, 1)
    )
