"""Cells on one bus whose devices may change them: real coordinators, agents, stores and token sources, and the real
life of a device (`processes/device_life.py`), over the in-memory fabric. The registrar is a word, engines are toys."""

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.errors import BusUnavailable, RequestRefused
from fallow.domain.fleet import Heartbeat, Subjects
from fallow.domain.frames import Frame
from fallow.domain.ids import NodeId
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.memory_bus import MemoryHub
from fallow.fabric.peers import Peers
from fallow.gateway.contract import Conversation
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.node.history import StayHistory
from fallow.policy.cells import CellRules
from fallow.policy.placement_board import PlacementRules
from fallow.processes.cell_watch import CellWatch
from fallow.processes.device_life import Lodging, Ways, live
from fallow.processes.lifetime import Stop
from fallow.processes.party import Party
from fallow.processes.store_server import StoreServer
from fallow.simulator.virtual_time import LoopClock
from fallow.trust.keys import identity_of
from fallow.trust.open_doors import OpenAdmission, OpenLease, OpenRoutes, open_coordinator, open_node
from tests.simulation.control import toy_model
from tests.unit.trust.grant_world import SwitchedLease

PROMPT = list(range(40))
RULES = CellRules(
    devices_max=20, devices_min=3, digest_interval_s=1.0, digest_silence_max_s=3.5, look_interval_s=5.0,
    stay_min_s=15.0, small_for_s=8.0,
)  # fmt: skip
"""As in the product, but for smaller cells and shorter times."""
KV_BYTES = 64 << 20


def leader_of(cell: str) -> str:
    """A coordinator's name on the bus."""
    return f"coordinator {cell}"


class Distances(MemoryHub):
    """How far devices and coordinators are from each other, one way; near, unless something else is said."""

    def __init__(self) -> None:
        super().__init__()
        self.far_s: dict[frozenset[str], float] = {}
        self.jitter_s: Callable[[], float] = lambda: 0.0

    def delay_s(self, sender: str, receiver: str) -> float | None:
        return self.far_s.get(frozenset((sender, receiver)), 0.002) + self.jitter_s()


class RoamingCell:
    """One cell without its devices: coordinator, store, gateway."""

    def __init__(self, world: "World", name: str, rules: CellRules) -> None:
        self.name = name
        self.subjects = Subjects(name)
        config = CoordinatorConfig(cell=name, cells=rules, placement=PlacementRules(max_share=0.7))
        fabric, clock = world.fabric, world.clock
        self.coordinator = Coordinator(
            config, fabric.bus(leader_of(name)), clock, fabric.presence(), trust=open_coordinator()
        )
        gateway = identity_of(f"gateway {name}".ljust(32).encode()).node
        bus, endpoint = fabric.bus(gateway), fabric.endpoint(gateway)
        self._peers = Peers(
            endpoint, clock, role="gateway", admission=OpenAdmission(), on_frame=self._on_frame,
            on_lost=self._on_lost,
        )  # fmt: skip
        self._files = StoreServer(world.store, bus, self._peers, clock, self.subjects, endpoint.address)
        self.source = FleetTokenSource(
            bus, self._peers, world.store, clock, self.subjects, gateway, lease=OpenLease(), routes=OpenRoutes()
        )

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        if not self._files.on_frame(peer, frame):
            self.source.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, why: str) -> None:
        self.source.on_lost(peer, why)

    async def start(self) -> None:
        await self.coordinator.start()
        await self._peers.start()
        await self._files.start()
        await self.source.start()

    async def close(self) -> None:
        await self.source.close()
        await self._files.close()
        await self.coordinator.close()
        await self._peers.close()

    def devices(self) -> set[NodeId]:
        return {beat.node for beat in self.coordinator.status().nodes}

    def beat(self, node: NodeId) -> Heartbeat:
        return next(beat for beat in self.coordinator.status().nodes if beat.node == node)

    def servable(self) -> bool:
        return bool(self.source.models()) and any(model.servable for model in self.coordinator.status().models)


class Roamer:
    """A device that lives as `fallow join` has it live. `cells` are those in which it was, in order."""

    def __init__(self, world: "World", index: int, cell: str, chooses: bool) -> None:
        self.world = world
        self.who = identity_of(bytes([100 + index]) * 32)
        self.stop = Stop()
        self.told: list[str] = []
        self.cells = [cell]
        self.refusals: list[RequestRefused] = []
        """What the registrar answers to wishes to move, before it agrees."""
        self.bus_away: list[BusUnavailable] = []
        """What happens on the way into the next cell, before that succeeds."""
        self._draws = random.Random(index)
        ways = Ways(
            join=self._join,
            lodge=self._lodge,
            watch=self._watch if chooses else lambda _: None,
            greet=lambda party: self.told.append(f"lends in {party.cell}"),
        )
        self.life = asyncio.get_running_loop().create_task(
            live(self._party(cell), ways, self.stop, world.clock, self._draws, self.told.append)
        )

    @property
    def node(self) -> NodeId:
        return self.who.node

    def live_far_from(self, cell: str, one_way_s: float) -> None:
        self.world.hub.far_s[frozenset((self.node, leader_of(cell)))] = one_way_s

    def _party(self, cell: str) -> Party:
        opened = AsyncExitStack()
        bus = self.world.fabric.bus(self.node)
        opened.push_async_callback(bus.close)
        trust = open_node()._replace(lease=self.world.lease)
        return _Asking(
            self.who, bus, Subjects(cell), cell, trust, open_coordinator(), OpenRoutes(), None, "test", None, opened,
        ).of(self)  # fmt: skip

    async def _join(self, cell: str) -> Party:
        if self.bus_away:
            raise self.bus_away.pop(0)
        self.cells.append(cell)
        return self._party(cell)

    async def _lodge(self, party: Party) -> Lodging:
        world = self.world
        endpoint = world.fabric.endpoint(self.node)
        folder = world.folder / self.node[:8]
        config = AgentConfig(
            cell=party.cell, name=self.node[:8], memory_bytes=256 << 20, kv_budget_bytes=KV_BYTES, drain_timeout_s=10.0
        )
        agent = Agent(
            config, self.node, party.bus, endpoint, MemoryEngine(kv_budget_bytes=KV_BYTES), Store(folder / "models"),
            world.clock, trust=party.node, history=StayHistory(folder / "stays.json", world.clock, battery=bool),
        )  # fmt: skip
        return Lodging(agent, endpoint)

    def _watch(self, party: Party) -> CellWatch:
        rules = self.world.rules
        return CellWatch(
            party.bus, self.world.clock, party.cell, party.coordinator.cells, party.lease, self._draws, rules
        )


class _Asking(Party):
    """A party whose registrar refuses as often as the test has it refuse."""

    def of(self, device: Roamer) -> "_Asking":
        self._device = device
        return self

    async def move(self, cell: str) -> None:
        if self._device.refusals:
            raise self._device.refusals.pop(0)


class World:
    """Everything."""

    def __init__(self, folder: Path, rules: CellRules = RULES) -> None:
        self.folder = folder
        self.rules = rules
        self.clock = LoopClock()
        self.hub = Distances()
        self.fabric = MemoryFabric(latency_s=0.001, hub=self.hub)
        self.store = Store(folder / "store")
        self.entry = toy_model(self.store)
        self.lease = SwitchedLease()
        """Of the devices."""
        self.lease.sign(self.entry)
        self.cells: dict[str, RoamingCell] = {}
        self.devices: list[Roamer] = []

    async def cell(self, name: str, devices: int) -> RoamingCell:
        """A new cell, with so many devices that choose their cell."""
        made = self.cells[name] = RoamingCell(self, name, self.rules)
        await made.start()
        for _ in range(devices):
            self.join(name)
        return made

    def join(self, cell: str, chooses: bool = True) -> Roamer:
        device = Roamer(self, len(self.devices), cell, chooses)
        self.devices.append(device)
        return device

    async def until(self, holds: Callable[[], bool], within_s: float) -> None:
        until_s = self.clock.monotonic_s() + within_s
        while not holds():
            assert self.clock.monotonic_s() < until_s, f"not within {within_s} s"
            await self.clock.sleep(0.05)

    async def close(self) -> None:
        for device in self.devices:
            device.stop.ask()
            device.stop.ask()
        await asyncio.gather(*(device.life for device in self.devices))
        for cell in self.cells.values():
            await cell.close()


async def answer(talk: Conversation, count: int, pause_s: float) -> tuple[list[int], float]:
    """Greedy tokens, one each `pause_s`, and the longest that the client waited for one after the first."""
    candidates = await talk.prefill()
    tokens, longest_s = [int(candidates.ids[0])], 0.0
    while len(tokens) < count:
        await asyncio.sleep(pause_s)
        asked_s = asyncio.get_running_loop().time()
        candidates = await talk.decode(tokens[-1])
        longest_s = max(longest_s, asyncio.get_running_loop().time() - asked_s)
        tokens.append(int(candidates.ids[0]))
    return tokens, longest_s
