"""`fallow serve coordinator`: membership, placement and routing. Killing it interrupts no running answer.

Of several in a cell, one leads by a lease on the bus; the others take over when it is lost.
"""

import logging
import secrets
import socket

from fallow import wiring
from fallow.config import Config
from fallow.coordinator.leadership import Authority, Leadership, SoleAuthority
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.errors import LeaseUnsupported
from fallow.fabric.contract import Bus
from fallow.policy.leadership import LeaseRules
from fallow.policy.placement_board import PlacementRules
from fallow.processes.lifetime import Stop

log = logging.getLogger(__name__)


async def run(config: Config, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `BusTimeout`, `BusUnavailable`, `ConfigError`."""
    stop = Stop()
    stop.listen(parent_pid)
    me = f"coordinator-{secrets.token_hex(8)}"
    name = config.coordinator.name or socket.gethostname() or "coordinator"
    bus = await wiring.open_bus(config, me)
    rules = PlacementRules(
        max_share=config.placement.max_share,
        replicas=config.placement.replicas,
        context_tokens=config.placement.context_tokens,
        regions=frozenset(config.placement.regions),
    )
    try:
        authority = await _authority(config, bus, me, name)
        coordinator = Coordinator(
            CoordinatorConfig(cell=config.cell, placement=rules),
            bus,
            wiring.clock(),
            wiring.presence_watcher(config),
            authority,
            id=me,
            name=name,
        )
        try:
            await coordinator.start()
            await stop.polite.wait()
        finally:
            await coordinator.close()
    finally:
        await bus.close()


async def _authority(config: Config, bus: Bus, me: str, name: str) -> Authority:
    rules = LeaseRules()
    try:
        key = await wiring.open_lease(config, bus, rules.ttl_s)
    except LeaseUnsupported as error:
        log.warning("%s; this coordinator leads without a lease, so let it be the only one", error.message)
        return SoleAuthority()
    return Leadership(key, me, name, wiring.lease_clock(), rules)
