"""Cells on one bus: real coordinators, and devices that only report and note what they are ordered."""

import msgspec

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.clock import Clock
from fallow.domain.fleet import (
    Accepted,
    Heartbeat,
    HostedStage,
    ModelEntry,
    NodeCommand,
    RouteReply,
    RouteRequest,
    Speed,
    StageStatus,
    StoreAnnounced,
    Subjects,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.fabric.contract import Bus
from fallow.policy.cells import CellRules
from fallow.policy.membership import MembershipRules
from fallow.trust.contract import CellWords
from fallow.trust.open_doors import OpenCellWords, open_coordinator
from tests.simulation.toy import toy_config

LAYERS = 6
MODEL = Digest("c0" * 32)
LAYER_S = 0.01
KV_BYTES = 1 << 30
FRONT, BACK = Span(0, 3), Span(3, LAYERS)
WHOLE = Span(0, LAYERS)


def entry() -> ModelEntry:
    config = toy_config(LAYERS)
    return ModelEntry(
        name=ModelName("toy"),
        model=MODEL,
        manifest_bytes=1000,
        config=config,
        quantisation=Quantisation.Q8,
        weights_bytes=(1 << 20, 1 << 20, (1 << 20,) * LAYERS),
        created_unix_s=0,
    )


class Reporter:
    """A device that hosts what it was given and says so."""

    def __init__(self, cell: "ToyCell", index: int, *pieces: Span) -> None:
        self.cell = cell
        self.id = NodeId(f"{cell.name.encode().hex()}{index:04x}".rjust(64, "0"))
        self.rows_per_s = 0.0
        self.orders: list[NodeCommand] = []
        self._pieces = pieces
        self._sequence = 0

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(node=self.id, endpoints=())

    async def start(self) -> None:
        await self.cell.bus.subscribe(Subjects(self.cell.name).command(self.id), self._on_order)
        await self.beat()

    async def _on_order(self, _: str, message: bytes) -> bytes:
        self.orders.append(msgspec.json.decode(message, type=NodeCommand))
        return msgspec.json.encode(Accepted(ok=True))

    async def beat(self) -> None:
        self._sequence += 1
        speed = Speed(layer_s_1=LAYER_S, layer_s_4=LAYER_S, layer_s_8=LAYER_S)
        stage = HostedStage(stage=StageSpec(model=MODEL, pieces=self._pieces), status=StageStatus.READY, speed=speed)
        heartbeat = Heartbeat(
            node=self.id,
            name=f"{self.cell.name} {self._sequence}",
            sequence=self._sequence,
            address=self.address,
            memory_bytes=2 * KV_BYTES,
            kv_budget_bytes=KV_BYTES,
            kv_free_bytes=KV_BYTES,
            hosted=(stage,) if self._pieces else (),
            tokens_per_s=self.rows_per_s,
        )
        await self.cell.bus.publish(Subjects(self.cell.name).heartbeat(self.id), msgspec.json.encode(heartbeat))


class ToyCell:
    """A cell: its coordinator, on `coordinator_bus`, and devices, gateway and store, on `bus`."""

    def __init__(
        self, name: str, coordinator_bus: Bus, bus: Bus, clock: Clock, rules: CellRules, interval_s: float = 1.0,
        words: CellWords | None = None,
    ) -> None:  # fmt: skip
        """`words`: what its coordinator says to other cells, and believes of them; without them, whatever is said."""
        self.name = name
        self.bus = bus
        self.clock = clock
        self.devices: list[Reporter] = []
        config = CoordinatorConfig(
            cell=name, cells=rules, membership=MembershipRules(heartbeat_interval_s=interval_s, missed_max=1000)
        )
        trust = open_coordinator()._replace(cells=words or OpenCellWords())
        self.coordinator = Coordinator(config, coordinator_bus, clock, trust=trust)

    async def start(self, *held: tuple[Span, ...]) -> None:
        await self.coordinator.start()
        await self.announce()
        for pieces in held:
            await self.join(*pieces)

    async def join(self, *pieces: Span) -> Reporter:
        device = Reporter(self, len(self.devices), *pieces)
        self.devices.append(device)
        await device.start()
        return device

    async def announce(self) -> None:
        store = PeerAddress(node=NodeId("5" * 64), endpoints=())
        announced = StoreAnnounced(address=store, models=(entry(),))
        await self.bus.publish(Subjects(self.name).store(store.node), msgspec.json.encode(announced))

    async def work(self, rows_per_s: float) -> None:
        """Every device reports that it computes so many rows a second."""
        for device in self.devices:
            device.rows_per_s = rows_per_s
            await device.beat()

    async def route(self, session: int, timeout_s: float = 2.0, **fields: object) -> RouteReply:
        """As a gateway asks."""
        request = RouteRequest(model=MODEL, session=SessionId(f"{session:032x}"), reserve_tokens=100)
        request = msgspec.structs.replace(request, **fields)
        reply = await self.bus.request(Subjects(self.name).route("gateway"), msgspec.json.encode(request), timeout_s)
        return msgspec.json.decode(reply, type=RouteReply)

    def serves(self, reply: RouteReply) -> bool:
        """Whether a reply is a chain of this cell's devices over the whole model."""
        mine = {device.id for device in self.devices}
        layers = [layer for hop in reply.hops for layer in range(hop.span.first, hop.span.last)]
        return layers == list(range(LAYERS)) and {hop.address.node for hop in reply.hops} <= mine

    def knows(self, *cells: str) -> bool:
        """Whether the coordinator knows just these neighbours, and how far away they are."""
        known = self.coordinator.status().neighbours
        return {each.digest.cell for each in known} == set(cells) and all(each.rtt_s is not None for each in known)
