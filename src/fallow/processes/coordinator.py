"""`fallow serve coordinator`: membership, placement and routing. Killing it interrupts no running answer."""

from fallow import wiring
from fallow.config import Config
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.policy.placement_board import PlacementRules
from fallow.processes.lifetime import Stop

BUS_NAME = "coordinator"


async def run(config: Config, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `BusUnavailable`, `ConfigError`."""
    stop = Stop()
    stop.listen(parent_pid)
    bus = await wiring.open_bus(config, BUS_NAME)
    rules = PlacementRules(
        max_share=config.placement.max_share,
        replicas=config.placement.replicas,
        context_tokens=config.placement.context_tokens,
    )
    coordinator = Coordinator(
        CoordinatorConfig(cell=config.cell, placement=rules), bus, wiring.clock(), wiring.presence_watcher(config)
    )
    try:
        await coordinator.start()
        await stop.polite.wait()
    finally:
        await coordinator.close()
        await bus.close()
