"""`fallow serve coordinator`: membership, placement and routing. Killing it interrupts no running answer.

Of several in a cell, one leads by a lease on the bus; the others take over when it is lost.
"""

import logging
import re
import socket
from pathlib import Path
from typing import Final

from fallow import wiring
from fallow.config import Config
from fallow.coordinator.leadership import Authority, Leadership, SoleAuthority
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.credentials import Role
from fallow.domain.errors import LeaseUnsupported
from fallow.policy.leadership import LeaseRules
from fallow.policy.placement_board import PlacementRules
from fallow.processes.lifetime import Stop
from fallow.processes.party import Newcomer, Party, take_part

NAME_MAX_CHARS: Final = 64

log = logging.getLogger(__name__)


async def run(config: Config, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `BusTimeout`, `BusUnavailable`, `ConfigError`."""
    stop = Stop()
    stop.listen(parent_pid)
    name = config.coordinator.name or socket.gethostname() or "coordinator"
    party = await take_part(config, folder_of(config, name), Newcomer(role=Role.COORDINATOR, name=name), log.info)
    me = party.who.node
    rules = PlacementRules(
        max_share=config.placement.max_share,
        replicas=config.placement.replicas,
        context_tokens=config.placement.context_tokens,
        regions=frozenset(config.placement.regions),
    )
    try:
        authority = await _authority(party, name)
        coordinator = Coordinator(
            CoordinatorConfig(cell=party.cell, placement=rules),
            party.bus,
            wiring.clock(),
            party.presence,
            authority,
            id=me,
            name=name,
            trust=party.coordinator,
        )
        try:
            await coordinator.start()
            await stop.polite.wait()
        finally:
            await coordinator.close()
    finally:
        await party.close()


def folder_of(config: Config, name: str) -> Path:
    """Where a coordinator of that name keeps its key and its membership."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:NAME_MAX_CHARS].strip(".") or "coordinator"
    return config.state_dir / "coordinators" / word


async def _authority(party: Party, name: str) -> Authority:
    rules = LeaseRules()
    try:
        key = await wiring.open_lease(party.bus, party.cell, rules.ttl_s)
    except LeaseUnsupported as error:
        log.warning("%s; this coordinator leads without a lease, so let it be the only one", error.message)
        return SoleAuthority()
    return Leadership(key, party.who.node, name, wiring.lease_clock(), rules)
