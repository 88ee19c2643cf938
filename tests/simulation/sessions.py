"""A small fleet of real session code on virtual time: one gateway, nodes with toy engines, a router on a table.

The coordinator is left out on purpose: here a test says who hosts what, and what breaks when.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fallow.domain.errors import GrantRefused, NoRoute, StageRefused
from fallow.domain.fleet import Hop
from fallow.domain.frames import Frame, Phase
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import BlobRef, Manifest, Quantisation, Span, StageSpec
from fallow.domain.sampling import Recipe
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.peers import Peers
from fallow.gateway.chain import Chain
from fallow.gateway.running_ahead import Leave
from fallow.gateway.sessions import OPEN_ATTEMPTS_MAX, FleetTokenSource
from fallow.node.stage_session import Session
from fallow.node.stages import StageRelay
from fallow.simulator.virtual_time import LoopClock
from fallow.trust.open_doors import OpenAdmission, OpenGrants, OpenLease
from tests.simulation.toy import toy_config

LAYERS = 6
MODEL = Digest("ab" * 32)
LOG_BUDGET_BYTES = 1 << 20


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def toy_manifest() -> Manifest:
    def blob(number: int) -> BlobRef:
        digest = Digest(f"{number:064x}")
        return BlobRef(digest=digest, size_bytes=1000, chunk_digests=(digest,))

    config = toy_config(LAYERS)
    return Manifest(
        format=1,
        name=ModelName("toy"),
        config=config,
        quantisation=Quantisation.Q8,
        embedding=blob(100),
        layers=tuple(blob(layer) for layer in range(LAYERS)),
        head=blob(101),
        tokenizer=blob(102),
        chat_template=None,
        bos_token_id=None,
        eos_token_ids=(0,),
    )


class Node:
    """A device: real links and relay, toy engine."""

    def __init__(self, fleet: "Fleet", index: int, *pieces: Span, log_budget_bytes: int = LOG_BUDGET_BYTES) -> None:
        self.id = node_id(index)
        self.pieces = pieces
        self.fleet = fleet
        self.engine = MemoryEngine(kv_budget_bytes=fleet.kv_budget_bytes)
        self.endpoint = fleet.fabric.endpoint(self.id)
        self.peers = Peers(
            self.endpoint,
            fleet.clock,
            role="node",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )
        self.relay = StageRelay(self.engine, self.peers, fleet.clock, log_budget_bytes, OpenGrants(), OpenLease())
        self.alive = True

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        self.relay.handle(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.relay.peer_lost(peer, reason)

    async def start(self) -> None:
        await self.engine.start()
        await self.engine.load(StageSpec(model=self.fleet.model, pieces=self.pieces), toy_manifest(), {})
        await self.peers.start()

    def kill(self) -> None:
        """kill -9: nobody is told by the node; the peers' kernels see the links break."""
        self.alive = False
        self.engine.crash()
        self.fleet.fabric.crash(self.id)

    def freeze(self) -> None:
        """SIGSTOP: links stay open and silent."""
        self.alive = False
        self.engine.hang()
        others = [node.id for node in self.fleet.nodes if node is not self]
        for other in [self.fleet.gateway, *others]:
            self.fleet.fabric.cut(self.id, other)

    def compute_nothing(self) -> None:
        """It answers pings and openings as before, and drops the rows that come."""

        async def drop(*_: object) -> None:
            return

        self.relay._pump._compute = drop  # type: ignore[method-assign]

    def take_longer(self, later_s: float, times: int = 1 << 30) -> None:
        """From now on, it computes so much later what comes, so many times."""
        compute, left = self.relay._pump._compute, times

        async def late(*rows: Any) -> None:
            nonlocal left
            if left > 0:
                left -= 1
                await asyncio.sleep(later_s)
            await compute(*rows)

        self.relay._pump._compute = late  # type: ignore[method-assign]

    def refuse_rows(self) -> None:
        """It takes every grant, and says of the first rows that they are beyond it."""
        home = self.relay

        def refuse(session: Session, end: int, count: int) -> bool:
            home.fault(session, GrantRefused.code, "The grant does not allow so much.")
            home.end(session)
            return False

        self.relay._pump._may = refuse  # type: ignore[method-assign]

    def thaw(self) -> None:
        """SIGCONT: it goes on with what it knew."""
        self.alive = True
        self.engine.resume()
        others = [node.id for node in self.fleet.nodes if node is not self]
        for other in [self.fleet.gateway, *others]:
            self.fleet.fabric.heal(self.id, other)


class Fleet:
    """The medium, the nodes, one gateway; `route` is a greedy table look-up that honours exclude and keep."""

    def __init__(self, latency_s: float = 0.001, model: Digest = MODEL, kv_budget_bytes: int = 1 << 30) -> None:
        self.model = model
        self.kv_budget_bytes = kv_budget_bytes
        self.clock = LoopClock()
        self.fabric = MemoryFabric(latency_s)
        self.gateway = node_id(0xFFFF)
        self.nodes: list[Node] = []
        self.chains: list[Chain] = []
        self.script: list[list[tuple[int, Span]]] = []
        """Routes to give out first: node and span of each hop."""
        self.replies: list[bytes] = []
        """What the coordinator's table on the bus answers first, in `test_token_source.with_fleet`."""
        self.kept_spans: list[tuple[Span, ...]] = []
        """Of every route asked for: what was to be kept."""
        self.listeners: list[FleetTokenSource] = []
        self.events: list[str] = []
        self.peers = Peers(
            self.fabric.endpoint(self.gateway),
            self.clock,
            role="gateway",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )

    async def start(self, *hosted: Sequence[Span], log_budget_bytes: int = LOG_BUDGET_BYTES) -> None:
        self.nodes = [
            Node(self, index, *pieces, log_budget_bytes=log_budget_bytes) for index, pieces in enumerate(hosted)
        ]
        for node in self.nodes:
            await node.start()
        await self.peers.start()

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        for chain in self.chains:
            if getattr(frame.header, "session", None) in {name for _, name in chain.stages()}:
                chain.on_frame(peer, frame)
        for listener in self.listeners:
            listener.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        for chain in self.chains:
            if peer in chain.nodes():
                chain.in_trouble(f"{peer[-4:]} is gone ({reason})", peer)
        for listener in self.listeners:
            listener.on_lost(peer, reason)

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        self.kept_spans.append(tuple(hop.span for hop in keep))
        if self.script:
            return tuple(Hop(address=self.nodes[i].endpoint.address, span=span) for i, span in self.script.pop(0))
        hops: list[Hop] = []
        position = 0
        while position < LAYERS:
            kept = [hop for hop in keep if hop.span.first == position]
            found = kept or [
                Hop(address=node.endpoint.address, span=piece)
                for node in self.nodes
                for piece in node.pieces
                if piece.first == position
                and node.alive
                and node.id not in exclude
                and all(hop.address.node != node.id for hop in [*hops, *keep])
            ]
            if not found:
                raise NoRoute(f"nobody holds layer {position}")
            hops.append(found[0])
            position = found[0].span.last
        return tuple(hops)

    def chain(self, index: int = 0, reserve_tokens: int = 2000, top_k: int | None = 4) -> Chain:
        session = SessionId(f"{index:032x}")
        chain = Chain(session, self.model, reserve_tokens, top_k, self.peers, self, self.clock, self.events.append)
        self.chains.append(chain)
        return chain


def greedy(prompt: Sequence[int], count: int, ends: tuple[int, ...] = ()) -> Leave:
    """What a chain may run ahead with, for the most probable tokens."""
    return Leave(recipe=Recipe(), drawn_from=len(prompt), until=len(prompt) + count - 1, ends=ends)


async def generate(chain: Chain, prompt: Sequence[int], count: int, *, ahead: bool = True) -> list[int]:
    """Greedy tokens from a fresh chain, opened as `FleetTokenSource` does: again, when a stage fails meanwhile."""
    for attempt in range(OPEN_ATTEMPTS_MAX):
        try:
            await chain.establish(leave=greedy(prompt, count) if ahead else None)
            break
        except StageRefused:
            if attempt == OPEN_ATTEMPTS_MAX - 1:
                raise
    candidates = await chain.advance(prompt, Phase.PREFILL)
    tokens = [int(candidates.ids[0])]
    while len(tokens) < count:
        candidates = await chain.advance((tokens[-1],), Phase.DECODE)
        tokens.append(int(candidates.ids[0]))
    return tokens
