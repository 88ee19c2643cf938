"""A whole cell on virtual time: the real coordinator and agents, a store peer, toy engines, the in-memory fabric.

Files are real ones in temporary folders: the toy model's layers are random bytes of a few chunks each.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.errors import NoRoute
from fallow.domain.fleet import (
    FleetStatus,
    Hop,
    ModelEntry,
    NodeGone,
    RouteReply,
    RouteRequest,
    StoreAnnounced,
    Subjects,
)
from fallow.domain.frames import FetchChunk, Frame
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import BLOB_CHUNK_BYTES, Manifest, Quantisation, Span
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.memory_bus import MemoryBus
from fallow.fabric.peers import Peers
from fallow.gateway.chain import Chain
from fallow.models.manifest import encode_manifest
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.node.fetch import ChunkServer
from fallow.policy.placement_board import PlacementRules
from fallow.simulator.virtual_time import LoopClock
from fallow.trust.open_doors import OpenAdmission, open_coordinator, open_node
from tests.simulation.toy import toy_config

CELL = "test"
SUBJECTS = Subjects(CELL)
LAYERS = 6
LAYER_BYTES = BLOB_CHUNK_BYTES * 2 + 1000
MEMORY_BYTES = 256 << 20
KV_BYTES = 64 << 20


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def toy_model(store: Store, name: str = "toy", seed: int = 1) -> ModelEntry:
    """Put a model of random bytes into a store."""
    draw = random.Random(seed)
    config = toy_config(LAYERS)
    layers = tuple(store.add_bytes(draw.randbytes(LAYER_BYTES)) for _ in range(LAYERS))
    embedding, head, tokenizer = (store.add_bytes(draw.randbytes(5000)) for _ in range(3))
    manifest = Manifest(
        format=1,
        name=ModelName(name),
        config=config,
        quantisation=Quantisation.Q8,
        embedding=embedding,
        layers=layers,
        head=head,
        tokenizer=tokenizer,
        chat_template=None,
        bos_token_id=None,
        eos_token_ids=(0,),
    )
    return ModelEntry(
        name=manifest.name,
        model=store.put_manifest(manifest),
        manifest_bytes=len(encode_manifest(manifest)),
        config=config,
        quantisation=manifest.quantisation,
        weights_bytes=(embedding.size_bytes, head.size_bytes, tuple(ref.size_bytes for ref in layers)),
        created_unix_s=0,
    )


class StorePeer:
    """The operator's store, as a peer of nodes."""

    def __init__(self, cell: "Cell", folder: Path) -> None:
        self.node = node_id(0xAAAA)
        self.store = Store(folder)
        self.entries = (toy_model(self.store),)
        self.chunks_served = 0
        self._cell = cell
        self._endpoint = cell.fabric.endpoint(self.node)
        self._peers = Peers(
            self._endpoint,
            cell.clock,
            role="store",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=lambda *_: None,
        )
        self._server = ChunkServer(self.store, self._peers)
        self._bus = cell.fabric.bus(self.node)

    async def start(self) -> None:
        await self._peers.start()

        async def on_hello(_: str, __: bytes) -> None:
            await self.announce()

        await self._bus.subscribe(SUBJECTS.hello, on_hello)
        await self.announce()

    async def announce(self) -> None:
        announced = StoreAnnounced(address=self._endpoint.address, models=self.entries)
        await self._bus.publish(SUBJECTS.store(self.node), msgspec.json.encode(announced))

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        if isinstance(frame.header, FetchChunk):
            self.chunks_served += 1
            self._server.handle(peer, frame.header)


class Device:
    """A node and what its machine gives it."""

    def __init__(self, cell: "Cell", index: int, memory_bytes: int = MEMORY_BYTES, region: str = "") -> None:
        self.id = node_id(index)
        self.cell = cell
        self.store = Store(cell.folder / f"node-{index}")
        self.engine = MemoryEngine(kv_budget_bytes=KV_BYTES)
        self.bus: MemoryBus = cell.fabric.bus(self.id)
        self.endpoint = cell.fabric.endpoint(self.id)
        config = AgentConfig(
            cell=CELL, name=f"device {index}", memory_bytes=memory_bytes, kv_budget_bytes=KV_BYTES, region=region
        )
        self.agent = Agent(
            config, self.id, self.bus, self.endpoint, self.engine, self.store, cell.clock, trust=open_node()
        )

    def kill(self) -> None:
        """kill -9."""
        self.engine.crash()
        self.cell.fabric.crash(self.id)

    def ready(self) -> tuple[Span, ...]:
        heartbeat = self.agent.heartbeat()
        return tuple(piece for item in heartbeat.hosted if item.status == "ready" for piece in item.stage.pieces)


class Gateway:
    """Chains whose routes come from the coordinator over the bus."""

    def __init__(self, cell: "Cell") -> None:
        self.id = node_id(0xBBBB)
        self._cell = cell
        self._chains: list[Chain] = []
        self.peers = Peers(
            cell.fabric.endpoint(self.id),
            cell.clock,
            role="gateway",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        for chain in self._chains:
            if getattr(frame.header, "session", None) in {name for _, name in chain.stages()}:
                chain.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        for chain in self._chains:
            if peer in chain.nodes():
                chain.in_trouble(reason, peer)

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        request = RouteRequest(
            model=model, session=session, reserve_tokens=reserve_tokens, exclude=tuple(exclude), keep=tuple(keep)
        )
        reply = await self._cell.ask(request)
        if reply.error is not None:
            raise NoRoute(reply.error)
        return reply.hops

    def chain(self, index: int) -> Chain:
        model = self._cell.store.entries[0].model
        chain = Chain(SessionId(f"{index:032x}"), model, 500, 4, self.peers, self, self._cell.clock, lambda _: None)
        self._chains.append(chain)
        return chain


class Cell:
    """Everything. `orders` and `gone` record what the coordinator said."""

    def __init__(self, folder: Path, rules: PlacementRules | None = None, latency_s: float = 0.001) -> None:
        self.folder = folder
        self.clock = LoopClock()
        self.fabric = MemoryFabric(latency_s)
        self.rules = rules or PlacementRules(max_share=0.7)
        self.coordinator = self._coordinator()
        self.store = StorePeer(self, folder / "store")
        self.devices: list[Device] = []
        self.gone: list[NodeGone] = []
        self.orders: list[bytes] = []
        self._observer = self.fabric.bus("observer")

    def _coordinator(self) -> Coordinator:
        config = CoordinatorConfig(cell=CELL, placement=self.rules)
        return Coordinator(
            config,
            self.fabric.bus("coordinator"),
            self.clock,
            self.fabric.presence(),
            trust=open_coordinator(),
        )

    async def start(self, device_count: int) -> None:
        async def on_gone(_: str, message: bytes) -> None:
            self.gone.append(msgspec.json.decode(message, type=NodeGone))

        async def on_order(_: str, message: bytes) -> None:
            self.orders.append(message)

        await self._observer.subscribe(SUBJECTS.gone, on_gone)
        await self._observer.subscribe(SUBJECTS.command(NodeId("*")), on_order)
        await self.coordinator.start()
        await self.store.start()
        for _ in range(device_count):
            await self.join()

    async def join(self, region: str = "") -> Device:
        device = Device(self, len(self.devices), region=region)
        self.devices.append(device)
        await device.agent.start()
        return device

    async def restart_coordinator(self) -> None:
        await self.coordinator.close()
        self.fabric.hub.drop("coordinator", "killed")
        self.coordinator = self._coordinator()
        await self.coordinator.start()

    async def until(self, holds: "object", within_s: float) -> float:
        """Wait until `holds()`; the seconds that it took. Fails after `within_s`."""
        assert callable(holds)
        started_s = self.clock.monotonic_s()
        while not holds():
            waited_s = self.clock.monotonic_s() - started_s
            assert waited_s <= within_s, f"not within {within_s} s: {self.status()}"
            await self.clock.sleep(0.01)
        return self.clock.monotonic_s() - started_s

    def status(self) -> FleetStatus:
        return self.coordinator.status()

    def holders(self, model: Digest | None = None) -> dict[int, int]:
        """For each layer, how many live devices are ready with it."""
        counts = dict.fromkeys(range(LAYERS), 0)
        for heartbeat in self.coordinator.fleet.present().values():
            for item in heartbeat.hosted:
                if item.status == "ready" and model in (None, item.stage.model):
                    for piece in item.stage.pieces:
                        for layer in range(piece.first, piece.last):
                            counts[layer] += 1
        return counts

    async def gateway(self) -> Gateway:
        gateway = Gateway(self)
        await gateway.peers.start()
        return gateway

    async def route(self, session: int = 0) -> RouteReply:
        model = self.store.entries[0].model
        return await self.ask(RouteRequest(model=model, session=SessionId(f"{session:032x}"), reserve_tokens=100))

    async def ask(self, request: RouteRequest) -> RouteReply:
        reply = await self._observer.request(SUBJECTS.route("observer"), msgspec.json.encode(request), 1.0)
        return msgspec.json.decode(reply, type=RouteReply)

    async def say(self, subject: str, message: bytes) -> None:
        await self._observer.publish(subject, message)
