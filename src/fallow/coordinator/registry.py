"""What the coordinator knows: nodes, stores with their models, gateways. A frozen value, and functions that fold facts
into it.

Soft state only: all of it comes back within a heartbeat interval of a restart. Nothing here does I/O or reads a clock.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from fallow.domain.fleet import GatewayReport, Heartbeat, HostedStage, ModelEntry, Speed, StageStatus, StoreAnnounced
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import StageSpec
from fallow.policy import membership
from fallow.policy.membership import Member, MembershipRules, Presence
from fallow.policy.placement_board import ModelNeed, NodeRoom
from fallow.policy.routing import Carrier, ModelShape, covered

NODES_MAX = 4096
STORES_MAX = 16
GATEWAYS_MAX = 256
GATEWAY_SILENCE_MAX_S = 10.0
STORE_SILENCE_MAX_S = 15.0
"""Its models stay in the catalogue, because devices have them; but it is no longer the first to be asked for files."""
LAYER_UNKNOWN_S = 0.001

_K = TypeVar("_K")
_V = TypeVar("_V")


class HeardGateway(msgspec.Struct, frozen=True):
    """A gateway's last report, and when it came."""

    report: GatewayReport
    heard_s: float


class HeardStore(msgspec.Struct, frozen=True):
    """A store's last announcement, and when it came."""

    announced: StoreAnnounced
    heard_s: float


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Everybody, as last heard."""

    members: dict[NodeId, Member] = {}
    stores: dict[NodeId, HeardStore] = {}
    gateways: dict[NodeId, HeardGateway] = {}

    def present(self) -> dict[NodeId, Heartbeat]:
        """The newest heartbeats of the nodes that are here, draining ones included."""
        return {node: member.heartbeat for node, member in self.members.items() if member.presence is Presence.PRESENT}

    def entries(self) -> dict[Digest, ModelEntry]:
        """The catalogue in its order. Of two models of one name, the first store's counts."""
        found: dict[Digest, ModelEntry] = {}
        names: set[str] = set()
        for store in self.stores.values():
            for entry in store.announced.models:
                if entry.name not in names:
                    names.add(entry.name)
                    found[entry.model] = entry
        return found

    # --- facts ----------------------------------------------------------------------------------

    def with_heartbeat(self, heartbeat: Heartbeat, now_s: float, rules: MembershipRules) -> "Fleet | None":
        """`None` when the heartbeat is late, or comes from a stranger and there is room for no more."""
        member = self.members.get(heartbeat.node)
        if member is None and len(self.members) >= NODES_MAX:
            return None
        after = membership.heard(member, heartbeat, now_s, rules)
        if after is None:
            return None
        return msgspec.structs.replace(self, members=_with(self.members, heartbeat.node, after))

    def with_departure(self, node: NodeId, presence: Presence, now_s: float) -> "Fleet":
        member = self.members.get(node)
        if member is None:
            return self
        after = membership.departed(member, presence, now_s)
        return msgspec.structs.replace(self, members=_with(self.members, node, after))

    def with_excuse(self, pause_s: float) -> "Fleet":
        """The coordinator itself was asleep: nobody's silence counts for that long."""
        members = {
            node: msgspec.structs.replace(member, heard_s=member.heard_s + pause_s)
            for node, member in self.members.items()
        }
        return msgspec.structs.replace(self, members=members)

    def with_store(self, announced: StoreAnnounced, now_s: float) -> "Fleet":
        if announced.address.node not in self.stores and len(self.stores) >= STORES_MAX:
            return self
        return msgspec.structs.replace(
            self, stores=_with(self.stores, announced.address.node, HeardStore(announced, now_s))
        )

    def with_gateway(self, report: GatewayReport, now_s: float) -> "Fleet":
        if report.gateway not in self.gateways and len(self.gateways) >= GATEWAYS_MAX:
            return self
        gateways = _with(self.gateways, report.gateway, HeardGateway(report, now_s))
        return msgspec.structs.replace(self, gateways=gateways)

    def without_forgotten(self, now_s: float, rules: MembershipRules) -> "Fleet":
        forgotten = set(membership.forgettable(self.members, now_s, rules))
        return msgspec.structs.replace(
            self,
            members={node: member for node, member in self.members.items() if node not in forgotten},
            gateways={
                node: heard for node, heard in self.gateways.items() if now_s - heard.heard_s <= GATEWAY_SILENCE_MAX_S
            },
        )


def _with(mapping: Mapping[_K, _V], key: _K, value: _V) -> dict[_K, _V]:
    return {**mapping, key: value}


# --- views for the policies -----------------------------------------------------------------------


def ready_stage(heartbeat: Heartbeat, model: Digest) -> HostedStage | None:
    """What a node can serve of a model now."""
    return next(
        (item for item in heartbeat.hosted if item.stage.model == model and item.status is StageStatus.READY), None
    )


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


def need_of(entry: ModelEntry) -> ModelNeed:
    """What a model takes, for placement."""
    embedding, head, layers = entry.weights_bytes
    return ModelNeed(
        model=entry.model,
        layer_bytes=layers,
        embedding_bytes=embedding,
        head_bytes=head + (embedding if entry.config.tied_head else 0),
        kv_bytes_per_token_layer=_kv_bytes_per_token_layer(entry),
    )


def shape_of(entry: ModelEntry) -> ModelShape:
    """What a model looks like, for routing."""
    embedding, head, layers = entry.weights_bytes
    head_bytes = embedding if entry.config.tied_head else head
    return ModelShape(
        layer_count=entry.config.layer_count,
        kv_bytes_per_token_layer=_kv_bytes_per_token_layer(entry),
        head_layers=head_bytes * len(layers) / max(sum(layers), 1),
    )


def _kv_bytes_per_token_layer(entry: ModelEntry) -> int:
    """Keys and values in float32, as the engine keeps them."""
    return 2 * entry.config.kv_head_count * entry.config.head_dim * 4


def room_of(
    heartbeat: Heartbeat, asked: tuple[StageSpec, ...], known: Mapping[Digest, ModelEntry], barred: frozenset[Digest]
) -> NodeRoom:
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
    )


def carriers_of(fleet: Fleet, entry: ModelEntry) -> list[Carrier]:
    """The nodes that can take sessions of a model."""
    found: list[Carrier] = []
    for heartbeat in fleet.present().values():
        ready = ready_stage(heartbeat, entry.model)
        if ready is None or heartbeat.draining or ready.stage.pieces[-1].last > entry.config.layer_count:
            continue
        found.append(
            Carrier(
                address=heartbeat.address,
                stage=ready.stage,
                speed=ready.speed,
                sessions=heartbeat.session_count,
                kv_free_bytes=heartbeat.kv_free_bytes,
                link_rtt_s=heartbeat.link_rtt_s,
            )
        )
    return found


def servable(fleet: Fleet, entry: ModelEntry) -> bool:
    """Whether every layer is ready somewhere."""
    return all(covered(entry.config.layer_count, (item.stage for item in carriers_of(fleet, entry))))


def sources_of(
    fleet: Fleet, model: Digest, for_node: NodeId, now_s: float, sources_max: int
) -> tuple[PeerAddress, ...]:
    """Who has files of a model: stores that announce it, then nodes that host some of it, then stores that have been
    silent for long."""
    stores = [
        (now_s - heard.heard_s > STORE_SILENCE_MAX_S, heard.announced.address)
        for heard in fleet.stores.values()
        if any(entry.model == model for entry in heard.announced.models)
    ]
    nodes = [
        heartbeat.address
        for heartbeat in fleet.present().values()
        if heartbeat.node != for_node and ready_stage(heartbeat, model) is not None
    ]
    fresh = [address for silent, address in stores if not silent]
    stale = [address for silent, address in stores if silent]
    return tuple(dict.fromkeys(fresh + nodes + stale))[:sources_max]
