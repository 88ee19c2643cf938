"""Devices that compute all the time, on a real bus, under a real council: for tests of what stops them.

Each station is a real agent with a toy engine, its passport, its lease kept from a real repository, and a gateway of
its own that feeds its sessions by grants of a real coordinator's key. The council, its repository and the bus's server
are the real ones. Run as a program, it is one station that says what it does, a line of JSON each `TELL_S`.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from fallow.domain.charter import Charter, FleetPolicy
from fallow.domain.credentials import PASSPORT_LIFE_S, Role
from fallow.domain.errors import BusUnavailable, CharterUnavailable, FallowError
from fallow.domain.fleet import Accepted, Heartbeat, Hop, PlaceStage, RouteRequest, Subjects, Tier
from fallow.domain.frames import Fault, Flow, Frame, OpenStage, Phase, Refused, Result, Rows
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import Manifest, Quantisation, Span, StageSpec
from fallow.domain.network import Network
from fallow.engine.memory import MemoryEngine
from fallow.fabric.contract import Bus, BusHandler, Subscription
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.peers import Peers
from fallow.models.manifest import encode_manifest
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.system_clock import WakingClock
from fallow.trust import passports
from fallow.trust.admission import Doorkeeper
from fallow.trust.contract import NodeTrust
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.files import CouncilPaths, found_council_of_one, member_of
from fallow.trust.council.halts import seal_halt
from fallow.trust.council.publisher import publish_model
from fallow.trust.grants import Author, Book, Issuer, SealedOrders
from fallow.trust.keys import Identity, identity_of
from fallow.trust.lease_keeper import LeaseKeeper
from fallow.trust.open_doors import OpenLease
from fallow.trust.passports import Held, PassportReader
from tests.contract.networks import CELL, TestNetwork, TrustedRig, person, trusted_rig
from tests.simulation.toy import toy_config

SUBJECTS = Subjects(CELL)
NETWORK = "c0" * 32
LAYERS = 4
WHOLE = Span(0, LAYERS)
BUDGET = 1 << 20
PACE_S = 0.1
REFUSED_PAUSE_S = 0.5
"""Who is refused asks again after that: fifty that start on two cores need them for something else."""
TELL_S = 0.1
COORDINATOR = person("coordinator")


class Council:
    """A council of one and its repository, whose timestamp is renewed as a registrar does."""

    def __init__(self, state: Path, lease_s: float) -> None:
        self.state = state
        self.lease_s = lease_s
        self.first_root = found_council_of_one(state, "founder", time.time(), FleetPolicy(epoch=1, lease_s=lease_s))
        self.repository = CouncilPaths(state).open_repository(NETWORK)
        self._renewing: asyncio.Task[None] | None = None

    def sign(self, manifest: Manifest) -> None:
        publish_model(self.state, encode_manifest(manifest), time.time())

    def halt(self, why: str) -> bytes:
        """One member's word. Told to nobody yet, the repository included."""
        return seal_halt(member_of(CouncilPaths(self.state)), NETWORK, 1, why, time.time())

    async def renew(self) -> None:
        while True:
            await asyncio.to_thread(self.repository.renew_timestamp, time.time())
            await asyncio.sleep(self.lease_s / 10)


class Line:
    """A station's ways to the world: the bus and the repository. `cut` ends both, and tells nobody."""

    def __init__(self, bus: Bus, source: CharterClient) -> None:
        self.cut = False
        self._bus = bus
        self._source = source

    def check(self, reference_unix_s: float) -> tuple[Charter, tuple[bytes, ...]]:
        if self.cut:
            raise CharterUnavailable("the line is cut")
        return self._source.check(reference_unix_s)

    async def publish(self, subject: str, message: bytes) -> None:
        if self.cut:
            raise BusUnavailable("the line is cut")
        await self._bus.publish(subject, message)

    async def request(self, subject: str, message: bytes, timeout_s: float) -> bytes:
        if self.cut:
            raise BusUnavailable("the line is cut")
        return await self._bus.request(subject, message, timeout_s)

    async def subscribe(
        self, subject: str, handler: BusHandler, queue: str | None = None, at_once: int = 1
    ) -> Subscription:
        async def handle(subject: str, message: bytes) -> bytes | None:
            return None if self.cut else await handler(subject, message)

        return await self._bus.subscribe(subject, handle, queue, at_once)

    async def close(self) -> None:
        await self._bus.close()


class StationConfig(msgspec.Struct, frozen=True):
    """What a station needs to know, also in another process."""

    name: str
    folder: str
    urls: tuple[str, ...]
    authority_pem: str
    account_seed: bytes
    """The tests' account: stations write passports themselves."""
    registrar_seed: bytes
    first_root: str
    repository: str
    model: Digest
    manifest_bytes: int


class Station:
    """One device, and the gateway that keeps it busy."""

    def __init__(self, config: StationConfig) -> None:
        self.config = config
        self.who = person(config.name)
        self.gateway = person(f"gateway of {config.name}")
        self.engine = MemoryEngine(kv_budget_bytes=1 << 40)
        self.refusals: set[str] = set()
        self.results = 0
        self._clock = WakingClock()
        coordinators = self.passport(COORDINATOR, Role.COORDINATOR)
        self._issuer = Issuer(Author(COORDINATOR, lambda: coordinators, CELL, time.time), OpenLease())
        self._wake = asyncio.Event()
        self._answer: object = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def network(self) -> Network:
        return TestNetwork(
            account=identity_of(self.config.account_seed), registrar=identity_of(self.config.registrar_seed)
        ).network()

    def passport(self, who: Identity, role: Role) -> str:
        return passports.issue(
            identity_of(self.config.account_seed), node=who.node, role=role, tier=Tier.KEYED, cell=CELL, name=str(role),
            issued_unix_s=time.time(), life_s=PASSPORT_LIFE_S,
        )  # fmt: skip

    async def start(self) -> None:
        folder = Path(self.config.folder)
        own = self.passport(self.who, Role.NODE)
        bus = await NatsBus.connect(self.config.urls, self.who.node, Held(own, self.who, self.config.authority_pem))
        client = CharterClient(
            self.config.first_root, NETWORK, folder / "charter", FolderFetcher(Path(self.config.repository))
        )
        self.line = Line(bus, client)
        reader = PassportReader(self.network, self._clock)
        self.keeper = LeaseKeeper(
            self.line, folder, self._clock, network=NETWORK, release="1.0", revoked=lambda: False, draw=random.random
        )
        await self.keeper.start(self.line, SUBJECTS)
        fabric = MemoryFabric()
        self._endpoint = fabric.endpoint(self.who.node)
        author = Author(self.who, lambda: own, CELL, self.keeper.unix_s)
        self.agent = Agent(
            AgentConfig(cell=CELL, name=self.config.name, memory_bytes=1 << 30, kv_budget_bytes=1 << 29),
            self.who.node, self.line, self._endpoint, self.engine, Store(folder), self._clock,
            trust=NodeTrust(
                Doorkeeper(lambda: own, reader, self.keeper.unix_s),
                Book(self.who.node, CELL, reader, self.keeper, self.keeper.unix_s),
                SealedOrders(author, reader),
                self.keeper,
            ),
        )  # fmt: skip
        await self.agent.start()
        shown = self.passport(self.gateway, Role.GATEWAY)
        self._peers = Peers(
            fabric.endpoint(self.gateway.node), self._clock, role="gateway",
            admission=Doorkeeper(lambda: shown, PassportReader(self.network, self._clock), self._clock.unix_s),
            on_frame=lambda _, frame: self._heard(frame), on_lost=lambda *_: None,
        )  # fmt: skip
        await self._peers.start()
        self._tasks.append(asyncio.get_running_loop().create_task(self._drive()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._peers.close()
        await self.agent.close()
        await self.keeper.close()
        await self.line.close()

    # --- the gateway ----------------------------------------------------------------------------

    def _heard(self, frame: Frame) -> None:
        if isinstance(frame.header, Refused | Fault):
            self.refusals.add(frame.header.code)
        if isinstance(frame.header, Result):
            self.results += 1
        self._answer = frame.header
        self._wake.set()

    async def _ask(self, *headers: OpenStage | Flow | Rows) -> object:
        self._wake.clear()
        for header in headers:
            payload = b"\1\0\0\0" * header.count if isinstance(header, Rows) else b""
            await self._peers.send(self._endpoint.address, Frame(header, payload))
        async with asyncio.timeout(1.0):
            await self._wake.wait()
        return self._answer

    def _grant(self, session: SessionId) -> bytes:
        """As a coordinator would give it who has not heard of any halt."""
        request = RouteRequest(model=self.config.model, session=session, reserve_tokens=BUDGET)
        return self._issuer.issue(request, self.gateway.node, (Hop(address=self._endpoint.address, span=WHOLE),))[0]

    async def _drive(self) -> None:
        """Sessions without end: a row each `PACE_S`, and another session when one ends."""
        number = 0
        while True:
            number += 1
            with contextlib.suppress(TimeoutError, FallowError):
                await self._session(SessionId(f"{number:032x}"))
            await asyncio.sleep(PACE_S)

    async def _session(self, session: SessionId) -> None:
        opening = OpenStage(
            session=session, epoch=1, model=self.config.model, span=WHOLE, reserve_tokens=BUDGET,
            grant=self._grant(session),
        )  # fmt: skip
        if isinstance(await self._ask(opening), Refused):
            await asyncio.sleep(REFUSED_PAUSE_S)
            return
        flow = Flow(session=session, epoch=1, previous=None, next=None, forward_from=0, results_from=0)
        for position in range(BUDGET):
            rows = Rows(
                session=session, epoch=1, position=position, count=1, phase=Phase.DECODE, logits_from=0, top_k=1
            )
            answer = await self._ask(*([flow] if position == 0 else []), rows)
            if not isinstance(answer, Result):
                return
            await asyncio.sleep(PACE_S)


class HaltWorld:
    """A bus, a council, a coordinator's key, and stations."""

    def __init__(self, folder: Path, rig: TrustedRig, council: Council, manifest: Manifest, model: Digest) -> None:
        self.folder = folder
        self.rig = rig
        self.council = council
        self.manifest = manifest
        self.model = model
        self.stations: list[Station] = []

    def config(self, name: str) -> StationConfig:
        """Of a station whose folder has the model's files."""
        folder = self.folder / name
        _model(Store(folder))
        network = self.rig.network
        return StationConfig(
            name=name,
            folder=str(folder),
            urls=self.rig.broker.urls,
            authority_pem=network.authority.certificate_pem,
            account_seed=network.account.seed,
            registrar_seed=network.registrar.seed,
            first_root=self.council.first_root,
            repository=str(CouncilPaths(self.council.state).repository),
            model=self.model,
            manifest_bytes=len(encode_manifest(self.manifest)),
        )

    async def station(self, name: str) -> Station:
        station = Station(self.config(name))
        await station.start()
        self.stations.append(station)
        return station

    async def coordinate(self) -> "Placing":
        held = self.rig.network.member(COORDINATOR, Role.COORDINATOR)
        bus = await self.rig.join(held)
        reader = PassportReader(self.rig.network.network(), WakingClock())
        return Placing(self, bus, SealedOrders(Author(COORDINATOR, lambda: held.passport, CELL, time.time), reader))

    async def publish(self, envelope: bytes) -> None:
        """A halt, by the registrar's connection, on the bus alone."""
        network = self.rig.network
        bus = await self.rig.join(network.member(network.registrar, Role.REGISTRAR))
        await bus.publish(SUBJECTS.halt, envelope)


class Placing:
    """The part of a coordinator that orders."""

    def __init__(self, world: HaltWorld, bus: NatsBus, orders: SealedOrders) -> None:
        self._world = world
        self._bus = bus
        self._orders = orders

    async def place(self, name: str) -> Accepted:
        """Order a station to host the model."""
        node = person(name).node
        command = PlaceStage(
            stage=StageSpec(model=self._world.model, pieces=(WHOLE,)), sources=(), epoch=1,
            manifest_bytes=len(encode_manifest(self._world.manifest)),
        )  # fmt: skip
        order = self._orders.seal(command, node, await self._boot(node))
        return msgspec.json.decode(await self._bus.request(SUBJECTS.command(node), order, 5.0), type=Accepted)

    async def _boot(self, node: NodeId) -> str:
        """Of a station's present run, as its heartbeats tell."""
        told: asyncio.Queue[str] = asyncio.Queue()

        async def hear(_: str, message: bytes) -> None:
            told.put_nowait(msgspec.json.decode(message, type=Heartbeat).boot)

        subscription = await self._bus.subscribe(SUBJECTS.heartbeat(node), hear)
        async with asyncio.timeout(5.0):
            boot = await told.get()
        await subscription.cancel()
        return boot


def _model(store: Store) -> tuple[Manifest, Digest]:
    files = [store.add_bytes(bytes([number]) * 1000) for number in range(LAYERS + 3)]
    manifest = Manifest(
        format=1, name=ModelName("toy"), config=toy_config(LAYERS), quantisation=Quantisation.Q8, embedding=files[0],
        layers=tuple(files[1 : LAYERS + 1]), head=files[LAYERS + 1], tokenizer=files[LAYERS + 2], chat_template=None,
        bos_token_id=None, eos_token_ids=(0,),
    )  # fmt: skip
    return manifest, store.put_manifest(manifest)


@contextlib.asynccontextmanager
async def halt_world(folder: Path, lease_s: float) -> AsyncIterator[HaltWorld]:
    """Everything but the stations."""
    manifest, model = _model(Store(folder / "operator"))
    council = Council(folder / "council", lease_s)
    council.sign(manifest)
    renewing = asyncio.get_running_loop().create_task(council.renew())
    async with trusted_rig(folder) as rig:
        world = HaltWorld(folder, rig, council, manifest, model)
        try:
            yield world
        finally:
            for station in world.stations:
                await station.close()
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)


class Told(msgspec.Struct, frozen=True):
    """What a station in a process of its own says of itself."""

    standing: str
    rows: int
    refusals: tuple[str, ...]


async def _tell(config: StationConfig) -> None:
    station = Station(config)
    await station.start()
    while True:
        told = Told(station.keeper.standing, station.engine.rows_computed, tuple(sorted(station.refusals)))
        sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
        sys.stdout.flush()
        await asyncio.sleep(TELL_S)


if __name__ == "__main__":
    asyncio.run(_tell(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=StationConfig)))
