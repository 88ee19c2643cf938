"""A simulated device: when its owner lets it work, how it comes and goes, and the real agent while it is there.

Rules
- A device's schedule is drawn beforehand; it is there or not there, and every departure is one of three kinds: polite
  (the agent drains), killed (the process dies, and kernels tell its peers at once), silent (power or network is gone,
  and nobody tells anybody).
- Its disk outlives its process; its keys are its own; everything else begins anew.
"""

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.ids import NodeId
from fallow.engine.memory import ROW_BYTES
from fallow.node.agent import Agent, AgentConfig
from fallow.policy.liveness import Liveness
from fallow.simulator.disk import SimulatedDisk
from fallow.simulator.engine_model import SimulatedEngine
from fallow.simulator.model import VOCABULARY
from fallow.simulator.network import SimulatedNetwork
from fallow.simulator.scenario import SimulatedModel
from fallow.trust.open_doors import open_node

LOG_BUDGET_BYTES: Final = 64 << 20
"""For activations of the real size; the simulated rows are smaller, and so is the simulated budget."""
KV_SHARE: Final = 0.25
DRAIN_TIMEOUT_S: Final = 10.0

log = logging.getLogger(__name__)


class Departure(StrEnum):
    """How a device goes."""

    POLITE = "polite"
    KILLED = "killed"
    SILENT = "silent"


class Stay(msgspec.Struct, frozen=True):
    """A time in which a device is there, in seconds of the scenario, and how it ends."""

    from_s: float
    until_s: float
    departure: Departure


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was drawn for one device."""

    node: NodeId
    name: str
    population: str
    region: str
    cell: str
    layer_s: float
    memory_bytes: int
    stays: tuple[Stay, ...]


class SimulatedDevice:
    """One device through all of a run."""

    def __init__(
        self, figures: DeviceFigures, network: SimulatedNetwork, model: SimulatedModel, disk: SimulatedDisk,
        clock: Clock, heartbeat_interval_s: float, liveness: Liveness,
        on_change: Callable[["SimulatedDevice", str], None],
    ) -> None:  # fmt: skip
        self.figures = figures
        self.id = figures.node
        self.disk = disk
        self.slowdown = 1.0
        self.agent: Agent | None = None
        self.engine: SimulatedEngine | None = None
        self.leaving = False
        """From the beginning of a departure until the next arrival."""
        self.gone_s: float | None = None
        """Since when nothing may be computed here."""
        self.rows_when_gone = 0
        self._network = network
        self._model = model
        self._clock = clock
        self._heartbeat_interval_s = heartbeat_interval_s
        self._liveness = liveness
        self._on_change = on_change

    @property
    def kv_budget_bytes(self) -> int:
        return int(self.figures.memory_bytes * KV_SHARE)

    @property
    def log_budget_bytes(self) -> int:
        return LOG_BUDGET_BYTES * ROW_BYTES // self._model.activation_bytes_per_row

    @property
    def is_here(self) -> bool:
        return self.agent is not None and not self.leaving

    def slow_down(self, factor: float) -> None:
        """From now on it takes `factor` times as long as when it was new."""
        self.slowdown = factor
        if self.engine is not None:
            self.engine.slowdown = factor

    async def live(self, now_s: Callable[[], float]) -> None:
        """Come and go as drawn. `now_s` tells the scenario's time."""
        for stay in self.figures.stays:
            if stay.until_s <= now_s():
                continue
            await self._clock.sleep(stay.from_s - now_s())
            await self.arrive()
            await self._clock.sleep(stay.until_s - now_s())
            await self.depart(stay.departure)

    async def arrive(self) -> None:
        """Start the agent's process."""
        self._network.crash(self.id)  # what a silent departure left behind
        self._network.rejoin(self.id)
        self.engine = SimulatedEngine(self._model, self.figures.layer_s, self.kv_budget_bytes, VOCABULARY)
        self.engine.slowdown = self.slowdown
        config = AgentConfig(
            cell=self.figures.cell,
            name=self.figures.name,
            memory_bytes=self.figures.memory_bytes,
            kv_budget_bytes=self.kv_budget_bytes,
            log_budget_bytes=self.log_budget_bytes,
            heartbeat_interval_s=self._heartbeat_interval_s,
            drain_timeout_s=DRAIN_TIMEOUT_S,
            region=self.figures.region,
        )
        bus, endpoint = self._network.bus(self.id), self._network.endpoint(self.id)
        self.agent = Agent(
            config,
            self.id,
            bus,
            endpoint,
            self.engine,
            self.disk,
            self._clock,
            trust=open_node(),
            liveness=self._liveness,
        )
        self.leaving = False
        self.gone_s = None
        self._on_change(self, "arrives")
        await self.agent.start()

    async def depart(self, departure: Departure) -> None:
        """End the agent's process in one of the three ways."""
        agent, engine = self.agent, self.engine
        assert agent is not None and engine is not None, "only who is here can go"
        self.leaving = True
        self._on_change(self, f"goes, {departure}")
        if departure is Departure.POLITE:
            await agent.drain()
        elif departure is Departure.KILLED:
            self._network.crash(self.id)
        else:
            self._network.isolate(self.id)
        engine.crash()
        self.gone_s = self._clock.monotonic_s()
        self.rows_when_gone = engine.rows_computed
        await agent.close()
        if departure is not Departure.SILENT:
            # After a polite leave: the process ends, and with it its connection to the bus and its endpoint.
            self._network.crash(self.id)
        self.agent = None
