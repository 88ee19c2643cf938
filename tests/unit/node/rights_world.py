"""A real agent that hosts a toy model, asked by parties with real passports; a coordinator's key that gives grants and
orders; a lease to switch. On virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.fleet import Accepted, Hop, NodeCommand, PlaceStage, RouteRequest, StageStatus, Subjects
from fallow.domain.frames import (
    Fault,
    Flow,
    Frame,
    OpenStage,
    PeerAddress,
    Phase,
    Refused,
    Rows,
)
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.memory_bus import MemoryHub
from fallow.fabric.peers import Peers
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.admission import Doorkeeper
from fallow.trust.contract import NodeTrust
from fallow.trust.grants import Book, Issuer, SealedOrders
from fallow.trust.keys import Identity
from tests.simulation.control import LAYERS, toy_model
from tests.unit.trust.grant_world import (
    CELL,
    COORDINATOR,
    GATEWAY,
    NODE,
    SetClock,
    SwitchedLease,
    author,
    passport,
    reader,
)

SESSION = SessionId("1" * 32)
SUBJECTS = Subjects(CELL)
WHOLE = Span(0, LAYERS)
BUDGET = 20


class Clock(SetClock):
    """Both clocks run."""

    def unix_s(self) -> float:
        return self.now_s + asyncio.get_running_loop().time()


class Party:
    """The other end of a device's links: a gateway, or who would like to be one."""

    def __init__(self, world: "World", who: Identity, role: Role) -> None:
        self.world = world
        self.heard: list[Frame] = []
        door = Doorkeeper(lambda: passport(who, role), reader(world.clock), world.clock.unix_s)
        self.peers = Peers(
            world.fabric.endpoint(who.node), world.clock, role="gateway", admission=door,
            on_frame=lambda _, frame: self.heard.append(frame), on_lost=lambda *_: None,
        )  # fmt: skip

    async def tell(self, header: object, payload: bytes = b"") -> None:
        """Send a frame."""
        await self.peers.send(self.world.address, Frame(header, payload))  # type: ignore[arg-type]

    async def say(self, *headers: object) -> list[object]:
        """Send frames; what came back within a moment."""
        self.heard.clear()
        for header in headers:
            await self.tell(header, b"\0" * 4 * header.count if isinstance(header, Rows) else b"")
        await asyncio.sleep(0.2)
        return [frame.header for frame in self.heard]


class World:
    """A real agent that hosts a model, with a switched lease, and a coordinator's keys."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.fabric = MemoryFabric(latency_s=0.001)
        self.hub = MemoryHub()
        self.lease = SwitchedLease()
        self.store = Store(folder)
        self.entry = toy_model(self.store)
        self.allow(self.entry.model)
        self.passports = reader(self.clock)
        self.bus = self.hub.connect("coordinator")
        self.orders = SealedOrders(author(self.clock, text=passport_of_coordinator()), self.passports)
        self._run()

    def _run(self) -> None:
        passports = self.passports
        self.engine = MemoryEngine(kv_budget_bytes=1 << 30)
        own = author(self.clock, NODE, Role.NODE, text=passport(NODE, Role.NODE))
        self.endpoint = self.fabric.endpoint(NODE.node)
        self.agent = Agent(
            AgentConfig(cell=CELL, name="device", memory_bytes=1 << 28, kv_budget_bytes=1 << 26),
            NODE.node, self.hub.connect(NODE.node), self.endpoint, self.engine, self.store, self.clock,
            trust=NodeTrust(
                Doorkeeper(own.passport, passports, self.clock.unix_s),
                Book(NODE.node, CELL, passports, self.lease, self.clock.unix_s),
                SealedOrders(own, passports),
                self.lease,
            ),
        )  # fmt: skip

    async def start_anew(self) -> None:
        """End the device's run, without a goodbye, and begin another one, which knows what lies in its store."""
        await self.agent.close()
        await self.endpoint.close()
        self._run()
        await self.agent.start()

    def allow(self, *models: Digest) -> None:
        assert self.lease.charter is not None
        self.lease.charter = msgspec.structs.replace(self.lease.charter, models=frozenset(models))

    @property
    def address(self) -> PeerAddress:
        return self.endpoint.address

    async def order(self, message: bytes) -> Accepted:
        reply = await self.bus.request(SUBJECTS.command(NODE.node), message, 1.0)
        return msgspec.json.decode(reply, type=Accepted)

    def place(self, node: Identity = NODE) -> bytes:
        stage = StageSpec(model=self.entry.model, pieces=(WHOLE,))
        command = PlaceStage(stage=stage, manifest_bytes=self.entry.manifest_bytes, sources=(), epoch=1)
        return self.seal(command, node)

    def seal(self, command: NodeCommand, node: Identity = NODE) -> bytes:
        """A coordinator's order to the present run of the device."""
        return self.orders.seal(command, node.node, self.agent.heartbeat().boot)

    async def hosts(self) -> bool:
        for _ in range(100):
            await asyncio.sleep(0.05)
            if any(item.status is StageStatus.READY for item in self.agent.hosting.hosted()):
                return True
        return False

    def grant(self, gateway: Identity = GATEWAY, budget: int = BUDGET, node: Identity = NODE) -> bytes:
        lease = SwitchedLease()
        assert lease.charter is not None
        lease.charter = msgspec.structs.replace(lease.charter, models=frozenset({self.entry.model}))
        request = RouteRequest(model=self.entry.model, session=SESSION, reserve_tokens=budget)
        hops = (Hop(address=PeerAddress(node.node, ()), span=WHOLE),)
        return Issuer(author(self.clock, text=passport_of_coordinator()), lease).issue(request, gateway.node, hops)[0]

    def opening(self, grant: bytes, epoch: int = 1, tokens: int = BUDGET) -> OpenStage:
        return OpenStage(
            session=SESSION, epoch=epoch, model=self.entry.model, span=WHOLE, reserve_tokens=tokens, grant=grant
        )

    async def party(self, who: Identity = GATEWAY, role: Role = Role.GATEWAY) -> Party:
        party = Party(self, who, role)
        await party.peers.start()
        return party


def passport_of_coordinator() -> str:
    return passport(COORDINATOR, Role.COORDINATOR)


def flow(epoch: int = 1, rewind_to: int | None = None) -> Flow:
    return Flow(
        session=SESSION, epoch=epoch, previous=None, next=None, forward_from=0, results_from=0, rewind_to=rewind_to
    )


def rows(position: int, count: int, epoch: int = 1) -> Rows:
    return Rows(
        session=SESSION, epoch=epoch, position=position, count=count, phase=Phase.PREFILL, logits_from=0, top_k=1
    )


def run(folder: Path, script: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(folder)
        await world.agent.start()
        assert (await world.order(world.place())).ok and await world.hosts()
        try:
            await script(world)
        finally:
            await world.agent.close()

    run_virtual(main())


def codes(headers: list[object]) -> list[str]:
    return [header.code for header in headers if isinstance(header, Refused | Fault)]
