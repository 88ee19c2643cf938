"""A whole cell with trust on, on virtual time: real coordinator, agents, store and token source, real passports and
grants. Only the lease is a switch, and the engines are toys."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.credentials import PASSPORT_LIFE_S, Role
from fallow.domain.fleet import Subjects, Tier
from fallow.domain.frames import Frame
from fallow.domain.ids import NodeId
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.memory_bus import MemoryHub
from fallow.fabric.peers import Peers
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.policy.placement_board import PlacementRules
from fallow.processes.store_server import StoreServer
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.admission import Doorkeeper
from fallow.trust.cell_words import SignedCellWords
from fallow.trust.contract import CoordinatorTrust, NodeTrust
from fallow.trust.grants import Author, Book, Issuer, SealedOrders, SignedRoutes
from fallow.trust.keys import Identity, identity_of
from tests.simulation.control import toy_model
from tests.unit.trust.grant_world import CELL, COORDINATOR, GATEWAY, SetClock, SwitchedLease, passport, reader

SUBJECTS = Subjects(CELL)


class RunningClock(SetClock):
    """Both clocks run; the wall clock of one party can be set apart."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        super().__init__()
        self.now_s += ahead_s

    def unix_s(self) -> float:
        return self.now_s + asyncio.get_running_loop().time()


class Member:
    """What every party has: a key, a passport that is renewed at half its life, a lease, and a clock."""

    def __init__(self, cell: "TrustedCell", who: Identity, role: Role, tier: Tier = Tier.KEYED) -> None:
        self.who = who
        self.role = role
        self.tier = tier
        self.clock = RunningClock()
        self.lease = cell.lease
        self.passports = reader(self.clock)
        self._text = ""
        self._written_s = 0.0
        self.door = Doorkeeper(self.passport, self.passports, self.clock.unix_s)
        self.author = Author(who, self.passport, CELL, self.clock.unix_s)
        self.orders = SealedOrders(self.author, self.passports)

    def passport(self) -> str:
        now_s = RunningClock().unix_s()
        if not self._text or now_s - self._written_s > PASSPORT_LIFE_S / 2:
            self._text = passport(self.who, self.role, tier=self.tier, at_s=now_s)
            self._written_s = now_s
        return self._text


class TrustedDevice(Member):
    """A device of the cell."""

    def __init__(self, cell: "TrustedCell", index: int, tier: Tier = Tier.KEYED) -> None:
        super().__init__(cell, identity_of(bytes([100 + index]) * 32), Role.NODE, tier)
        self.engine = MemoryEngine(kv_budget_bytes=64 << 20)
        self.book = Book(self.who.node, CELL, self.passports, self.lease, self.clock.unix_s)
        self.agent = Agent(
            AgentConfig(cell=CELL, name=f"device {index}", memory_bytes=256 << 20, kv_budget_bytes=64 << 20),
            self.who.node, cell.hub.connect(self.who.node), cell.fabric.endpoint(self.who.node), self.engine,
            Store(cell.folder / f"device-{index}"), self.clock,
            trust=NodeTrust(self.door, self.book, self.orders, self.lease),
        )  # fmt: skip


class TrustedCell:
    """Everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fabric = MemoryFabric(latency_s=0.001)
        self.hub = MemoryHub()
        self.lease = SwitchedLease()
        self.store = Store(folder / "store")
        self.entry = toy_model(self.store)
        self.lease.sign(self.entry)
        leader = Member(self, COORDINATOR, Role.COORDINATOR)
        self.coordinator = Coordinator(
            CoordinatorConfig(cell=CELL, placement=PlacementRules(max_share=0.7)),
            self.hub.connect(COORDINATOR.node),
            leader.clock,
            id=COORDINATOR.node,
            trust=CoordinatorTrust(
                leader.passports,
                Issuer(leader.author, self.lease),
                leader.orders,
                SignedCellWords(leader.author, leader.passports),
                self.lease,
            ),
        )
        gate = self.gate = Member(self, GATEWAY, Role.GATEWAY)
        bus, endpoint = self.hub.connect(GATEWAY.node), self.fabric.endpoint(GATEWAY.node)
        self.peers = Peers(
            endpoint, gate.clock, role="gateway", admission=gate.door, on_frame=self._on_frame, on_lost=self._on_lost
        )
        self.files = StoreServer(self.store, bus, self.peers, gate.clock, SUBJECTS, endpoint.address)
        self.source = FleetTokenSource(
            bus,
            self.peers,
            self.store,
            gate.clock,
            SUBJECTS,
            GATEWAY.node,
            lease=self.lease,
            routes=SignedRoutes(GATEWAY.node, gate.passports),
        )
        self.devices: list[TrustedDevice] = []

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        if not self.files.on_frame(peer, frame):
            self.source.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.source.on_lost(peer, reason)

    async def start(self, devices: int) -> None:
        await self.coordinator.start()
        await self.peers.start()
        await self.files.start()
        await self.source.start()
        for index in range(devices):
            await self.join(index)

    async def join(self, index: int, tier: Tier = Tier.KEYED) -> TrustedDevice:
        device = TrustedDevice(self, index, tier)
        self.devices.append(device)
        await device.agent.start()
        return device

    async def servable(self, within_s: float = 60.0) -> None:
        await self.until(lambda: any(model.servable for model in self.coordinator.status().models), within_s)
        await self.until(lambda: bool(self.source.models()), within_s)

    async def until(self, holds: Callable[[], bool], within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.source.close()
        await self.files.close()
        for device in self.devices:
            await device.agent.close()
        await self.coordinator.close()
        await self.peers.close()


def run(folder: Path, devices: int, script: Callable[[TrustedCell], Awaitable[None]]) -> None:
    """With a cell that is up."""

    async def main() -> None:
        cell = TrustedCell(folder)
        await cell.start(devices)
        try:
            await script(cell)
        finally:
            await cell.close()

    run_virtual(main())
