"""What the coordinator knows: nodes, stores with their models, gateways.

Soft state only: all of it comes back within a heartbeat interval of a restart. Nothing here does I/O or reads a clock.

Rules
- One mutable `Fleet` for each coordinator: a heartbeat must not cost a copy of everybody. What it hands out is live;
  who keeps it across an `await` copies it first. What is inside (`Member`, `Heartbeat`, `Carrier`) are values.
- What questions need is kept up as facts come in: who carries a model that the catalogue names, and how many hold each
  of its layers. A heartbeat costs the same in a fleet of 20,000 as in one of 20, and so does a route.
- A stage of a model that no store announces is remembered in its heartbeat and nowhere else.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

import msgspec

from fallow.coordinator.stores import STORE_FORGOTTEN_S, STORES_MAX, HeardStore, catalogue_of, store_sources
from fallow.domain.charter import Charter, Standing
from fallow.domain.errors import BusMessageError
from fallow.domain.fleet import (
    GatewayReport,
    Heartbeat,
    HostedStage,
    ModelEntry,
    Speed,
    StageStatus,
    StoreAnnounced,
    Tier,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Quantisation, StageSpec, cut_points, held_bytes
from fallow.policy import membership
from fallow.policy.membership import Member, MembershipRules, Presence
from fallow.policy.placement_inputs import ModelNeed, NodeRoom
from fallow.policy.rebuild import send_row_s
from fallow.policy.routing import Carrier, ModelShape

NODES_MAX = 32_768
GATEWAYS_MAX = 256
GATEWAY_SILENCE_MAX_S = 10.0
LAYER_UNKNOWN_S = 0.001
EDGES_KEPT_MAX = 1024

_NOBODY: Mapping[NodeId, Carrier] = MappingProxyType({})


class HeardGateway(msgspec.Struct, frozen=True):
    """A gateway's last report, and when it came."""

    report: GatewayReport
    heard_s: float


class Heard(msgspec.Struct, frozen=True, gc=False):
    """What a heartbeat changed."""

    before: Member | None
    after: Member


class ModelIndex:
    """Who carries one model of the catalogue, and how many of them hold each layer."""

    def __init__(self, entry: ModelEntry) -> None:
        self.layer_count = entry.config.layer_count
        self.carriers: dict[NodeId, Carrier] = {}
        self.holders = [0] * self.layer_count
        self._bare = self.layer_count

    @property
    def servable(self) -> bool:
        """Whether every layer is ready somewhere."""
        return self._bare == 0

    def put(self, node: NodeId, carrier: Carrier | None) -> None:
        """The node carries this much of the model now; `None`: nothing."""
        before = self.carriers.get(node)
        if before is None and carrier is None:
            return
        if carrier is None:
            del self.carriers[node]
        else:
            self.carriers[node] = carrier
            if before is not None and before.stage == carrier.stage:
                return
            self._count(carrier.stage, 1)
        if before is not None:
            self._count(before.stage, -1)

    def _count(self, stage: StageSpec, change: int) -> None:
        for piece in stage.pieces:
            for layer in range(piece.first, piece.last):
                self._bare += (self.holders[layer] + change == 0) - (self.holders[layer] == 0)
                self.holders[layer] += change


class Fleet:
    """Everybody, as last heard."""

    def __init__(self) -> None:
        self.members: dict[NodeId, Member] = {}
        self.stores: dict[NodeId, HeardStore] = {}
        self.gateways: dict[NodeId, HeardGateway] = {}
        self.charter: Charter | None = None
        self.elsewhere: Mapping[Digest, tuple[PeerAddress, ...]] = {}
        """Peers of other cells that have files of models with layers that nobody here holds."""
        self._present: dict[NodeId, Heartbeat] = {}
        self._facts = 0
        """How many have come: what was worked out is fresh while it stays the same."""
        self._file_holders: dict[Digest, tuple[int, tuple[PeerAddress, ...], tuple[PeerAddress, ...]]] = {}
        self._entries: dict[Digest, ModelEntry] = {}
        self._indexes: dict[Digest, ModelIndex] = {}

    def present(self) -> Mapping[NodeId, Heartbeat]:
        """The newest heartbeats of the nodes that are here, draining ones included. Live."""
        return MappingProxyType(self._present)

    def entries(self) -> dict[Digest, ModelEntry]:
        """The catalogue in its order (`stores.py` says whose word counts in it). Replaced when it changes."""
        return self._entries

    def carriers(self, model: Digest) -> Mapping[NodeId, Carrier]:
        """The nodes that can take sessions of a model of the catalogue. Live."""
        index = self._indexes.get(model)
        return _NOBODY if index is None else index.carriers

    def heard_since(self, since_s: float) -> frozenset[NodeId]:
        """Who is present and has been heard since a time. Looks at everybody."""
        return frozenset(node for node in self._present if self.members[node].heard_s >= since_s)

    def index(self, model: Digest) -> ModelIndex | None:
        """Who holds what of a model of the catalogue. Live."""
        return self._indexes.get(model)

    def file_holders(self, model: Digest) -> tuple[tuple[PeerAddress, ...], tuple[PeerAddress, ...]]:
        """Nodes that carry some of a model, and then those that only have files of it or are leaving with some."""
        facts, carrying, others = self._file_holders.get(model, (-1, (), ()))
        if facts != self._facts:
            # Orders go out by the hundred at a time: worked out once for all of them.
            carriers = self.carriers(model)
            carrying = tuple(carrier.address for carrier in carriers.values())
            others = tuple(
                beat.address for node, beat in self._present.items() if node not in carriers and _has_files(beat, model)
            )
            self._file_holders = {model: (self._facts, carrying, others)}
        return carrying, others

    # --- facts ----------------------------------------------------------------------------------

    def hear(self, heartbeat: Heartbeat, now_s: float, rules: MembershipRules) -> Heard | None:
        """`None` when the heartbeat is late, or comes from a stranger and there is room for no more."""
        node = heartbeat.node
        before = self.members.get(node)
        if before is None and len(self.members) >= NODES_MAX:
            return None
        after = membership.heard(before, heartbeat, now_s, rules)
        if after is None:
            return None
        self._facts += 1
        self.members[node] = after
        self._present[node] = heartbeat
        for model, index in self._indexes.items():
            index.put(node, carrier_of(heartbeat, model, index.layer_count))
        return Heard(before, after)

    def depart(self, node: NodeId, presence: Presence, now_s: float) -> Member | None:
        """A node departed. What it was before, or `None` when nobody knows it."""
        before = self.members.get(node)
        if before is not None:
            self.members[node] = membership.departed(before, presence, now_s)
            self._withdraw(node)
        return before

    def excuse(self, pause_s: float) -> None:
        """The coordinator itself was asleep: nobody's silence counts for that long."""
        for node, member in self.members.items():
            self.members[node] = msgspec.structs.replace(member, heard_s=member.heard_s + pause_s)

    def announce(self, announced: StoreAnnounced, now_s: float) -> bool:
        """A store told what it serves. Whether that is other than before, or the store is new. Raises
        `BusMessageError` when it is one too many."""
        node = announced.address.node
        before = self.stores.get(node)
        if before is None and len(self.stores) >= STORES_MAX:
            oldest = min(self.stores, key=lambda each: self.stores[each].heard_s)
            if now_s - self.stores[oldest].heard_s <= STORE_FORGOTTEN_S:
                raise BusMessageError(f"expected at most {STORES_MAX} stores, got one more: {node[:8]}")
            del self.stores[oldest]
        self.stores[node] = HeardStore(announced, now_s)
        changed = before is None or before.announced.models != announced.models
        if changed:
            self._recatalogue()
        return changed

    def heed(self, charter: Charter | None) -> bool:
        """The council's newest word, which stores are believed by. Whether the catalogue is another one by that."""
        if charter is self.charter:
            return False
        self.charter, before = charter, self._entries
        self._recatalogue()
        return self._entries != before

    def part_with(self, stores: Iterable[NodeId]) -> bool:
        """Stores' words count no more. Whether the catalogue may be another one by that."""
        gone = [self.stores.pop(node) for node in list(stores) if node in self.stores]
        if gone:
            self._recatalogue()
        return bool(gone)

    def report(self, report: GatewayReport, now_s: float) -> None:
        """A gateway told its figures."""
        if report.gateway in self.gateways or len(self.gateways) < GATEWAYS_MAX:
            self.gateways[report.gateway] = HeardGateway(report, now_s)

    def forget(self, now_s: float, rules: MembershipRules) -> None:
        """Drop nodes that departed long ago and gateways that are silent."""
        for node in membership.forgettable(self.members, now_s, rules):
            del self.members[node]
        silent = [node for node, heard in self.gateways.items() if now_s - heard.heard_s > GATEWAY_SILENCE_MAX_S]
        for node in silent:
            del self.gateways[node]

    # --- indexes --------------------------------------------------------------------------------

    def _withdraw(self, node: NodeId) -> None:
        self._facts += 1
        self._present.pop(node, None)
        for index in self._indexes.values():
            index.put(node, None)

    def _recatalogue(self) -> None:
        """Work out the catalogue anew, and who carries the models that are new in it or changed."""
        self._facts += 1
        found = catalogue_of(self.stores.values(), self.charter)
        indexes: dict[Digest, ModelIndex] = {}
        for model, entry in found.items():
            index = self._indexes.get(model)
            if index is None or index.layer_count != entry.config.layer_count:
                index = ModelIndex(entry)
                for node, heartbeat in self._present.items():
                    index.put(node, carrier_of(heartbeat, model, index.layer_count))
            indexes[model] = index
        self._entries, self._indexes = found, indexes


# --- views for the policies -----------------------------------------------------------------------


def ready_stage(heartbeat: Heartbeat, model: Digest) -> HostedStage | None:
    """What a node can serve of a model now."""
    for item in heartbeat.hosted:
        if item.status is StageStatus.READY and item.stage.model == model:
            return item
    return None


def asked_stage(heartbeat: Heartbeat, model: Digest) -> StageSpec | None:
    """The newest order for a model that a node is carrying out or has carried out; a failed one does not count."""
    hosted = [item for item in heartbeat.hosted if item.stage.model == model and item.status is not StageStatus.FAILED]
    coming = [item for item in hosted if item.status is not StageStatus.READY]
    newest = coming or hosted
    return newest[0].stage if newest else None


def failed_models(heartbeat: Heartbeat) -> frozenset[Digest]:
    return frozenset(item.stage.model for item in heartbeat.hosted if item.status is StageStatus.FAILED)


def best_speed(heartbeat: Heartbeat) -> Speed | None:
    """A node's speed by its own measurement, whatever the model."""
    return next((item.speed for item in heartbeat.hosted if item.speed is not None), None)


def need_of(entry: ModelEntry, regions: frozenset[str] = frozenset(), tier_min: Tier = Tier.ANONYMOUS) -> ModelNeed:
    """What a model takes on a device, for placement: loaded layers and head, and the embedding's file."""
    embedding, head, layers = entry.weights_bytes
    head_bytes = head + (embedding if entry.config.tied_head else 0)
    head_kind = Quantisation.Q8 if entry.quantisation is Quantisation.Q4 else entry.quantisation
    return ModelNeed(
        model=entry.model,
        layer_bytes=tuple(held_bytes(size, entry.quantisation) for size in layers),
        embedding_bytes=embedding,
        head_bytes=held_bytes(head_bytes, head_kind),
        regions=regions,
        tier_min=tier_min,
        kv_bytes_per_token_layer=_kv_bytes_per_token_layer(entry),
    )


def shape_of(entry: ModelEntry) -> ModelShape:
    """What a model looks like, for routing."""
    (embedding, head, layers), config = entry.weights_bytes, entry.config
    return ModelShape(
        layer_count=config.layer_count,
        kv_bytes_per_token_layer=_kv_bytes_per_token_layer(entry),
        head_layers=(embedding if config.tied_head else head) * len(layers) / max(sum(layers), 1),
        send_row_s=send_row_s(config.hidden_size),
    )


def _kv_bytes_per_token_layer(entry: ModelEntry) -> int:
    """Keys and values in float32, as the engine keeps them."""
    return 2 * entry.config.kv_head_count * entry.config.head_dim * 4


def room_of(
    heartbeat: Heartbeat, asked: tuple[StageSpec, ...], known: Mapping[Digest, ModelEntry], barred: frozenset[Digest],
    tier: Tier = Tier.ANONYMOUS,
) -> NodeRoom:  # fmt: skip
    """What a node offers to the models of the catalogue; what others still occupy there is not on offer."""
    occupied = sum(item.weights_bytes for item in heartbeat.hosted if item.stage.model not in known)
    speed = best_speed(heartbeat)
    return NodeRoom(
        node=heartbeat.node,
        weights_bytes=heartbeat.memory_bytes - heartbeat.kv_budget_bytes - occupied,
        kv_bytes=heartbeat.kv_budget_bytes,
        layer_s=LAYER_UNKNOWN_S if speed is None else speed.layer_s_1,
        hosted=asked,
        barred=barred,
        tier=tier,
        region=heartbeat.region,
        disk_free_bytes=heartbeat.disk_free_bytes,
        cached=heartbeat.cached,
        outlook=heartbeat.outlook,
    )


def carrier_of(heartbeat: Heartbeat, model: Digest, layer_count: int) -> Carrier | None:
    """What a node can serve of a model of so many layers, as routing sees it. A stage whose pieces end elsewhere than
    at the model's cut points is none: no engine takes such, and routing's search is bounded by there being few."""
    if heartbeat.draining or heartbeat.standing != Standing.WORKING:
        return None
    ready = ready_stage(heartbeat, model)
    if ready is None:
        return None
    edges = _edges(layer_count)
    if not all(piece.first in edges and piece.last in edges for piece in ready.stage.pieces):
        return None
    return Carrier(
        address=heartbeat.address,
        stage=ready.stage,
        speed=ready.speed,
        sessions=heartbeat.session_count,
        kv_free_bytes=heartbeat.kv_free_bytes,
        link_rtt_s=heartbeat.link_rtt_s,
        tokens_per_s=heartbeat.tokens_per_s,
        outlook=heartbeat.outlook,
        region=heartbeat.region,
    )


@lru_cache(maxsize=EDGES_KEPT_MAX)
def _edges(layer_count: int) -> frozenset[int]:
    """Where pieces of a model may begin and end."""
    return frozenset((0, *cut_points(layer_count), layer_count))


def servable(fleet: Fleet, entry: ModelEntry) -> bool:
    """Whether every layer is ready somewhere."""
    index = fleet.index(entry.model)
    return index is not None and index.servable


def sources_of(
    fleet: Fleet, model: Digest, for_node: NodeId | None, now_s: float, sources_max: int
) -> tuple[PeerAddress, ...]:
    """Who has files of a model: stores that are believed to, then nodes that carry some of it, then nodes that have
    some on disk or are leaving with it, then peers of other cells, then stores that have been silent for long.

    Nodes are taken from a place in the row that depends on who asks, so that devices that load at the same time do not
    all ask the same ones.
    """
    fresh, stale = store_sources(fleet.stores.values(), model, fleet.charter, now_s)
    carrying, others = fleet.file_holders(model)
    start = int(for_node[-8:], 16) % max(len(carrying), 1) if for_node else 0
    # One more than are wanted: the one who asks may be among them.
    row = carrying[start : start + sources_max + 1]
    nodes = row + carrying[: min(start, sources_max + 1 - len(row))] + others[: sources_max + 1]
    found = dict.fromkeys([*fresh, *nodes, *fleet.elsewhere.get(model, ()), *stale])
    return tuple(address for address in found if address.node != for_node)[:sources_max]


def _has_files(heartbeat: Heartbeat, model: Digest) -> bool:
    return bool(heartbeat.cached.get(model)) or ready_stage(heartbeat, model) is not None
