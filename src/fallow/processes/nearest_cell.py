"""Which cells there are for a device, how far away, and which is the nearest with room, by its own measurements.

Rules
- It listens to what cells tell of themselves for one and a half of their intervals, then measures the round trip to
  each coordinator a few times and takes the shortest: a longer one says something of load, not of distance.
- Digests that cannot be true, or that no coordinator of their cell signed, are not believed; the newest of each cell
  counts. At most `CELLS_MAX` cells are looked at, and the device's own always.
- Where nothing was heard or nobody answers, the cell of the settings it is.

A device that runs looks again, and moves: `cell_watch.py`. What is near is decided in `policy/cells.py`.
"""

import asyncio
import logging

from fallow.coordinator import checks
from fallow.domain.cells import CellDigest, digests, told_when
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
    offers = await cells_around(bus, clock, home, words, rules)
    for offer in offers:
        log.info("cell %s is %.0f ms away and has %d devices", offer.cell, offer.rtt_s * 1000, offer.devices)
    return choose_cell(home, offers, rules) or home


async def cells_around(bus: Bus, clock: Clock, home: str, words: CellWords, rules: CellRules) -> list[CellOffer]:
    """The cells whose coordinators were heard and answered. Raises `BusUnavailable`."""
    heard = await _listen(bus, clock, home, words, 1.5 * rules.digest_interval_s)
    offers = await asyncio.gather(*(_offer(bus, clock, digest) for digest in heard.values()))
    return [offer for offer in offers if offer is not None]


async def _listen(bus: Bus, clock: Clock, home: str, words: CellWords, duration_s: float) -> dict[str, CellDigest]:
    heard: dict[str, CellDigest] = {}

    async def on_digest(subject: str, message: bytes) -> None:
        try:
            digest = checks.cell_digest(subject, message, words.told)
        except (BusMessageError, TrustError) as error:
            log.warning("%s: a cell's digest is not believed: %s", error.code, error)
            return
        before = heard.get(digest.cell)
        if before is None:
            if digest.cell == home or len(heard) < CELLS_MAX:
                heard[digest.cell] = digest
        elif told_when(digest) > told_when(before):
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
        cell=digest.cell,
        rtt_s=min(rtts_s),
        devices=digest.devices,
        devices_max=max(digest.devices_max, 1),
        dissolves_into=digest.dissolves_into,
    )
