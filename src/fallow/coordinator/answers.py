"""Answers that must fit a bus message: what is too long is cut, and the answer says by how much. Pure.

Of a status, links go first, then the chains of gateways, neighbours, devices, models and gateways: the less an operator
loses with it, the earlier. Of the catalogue, the models of the last stores go. What remains is the beginning of each
row, so that an answer does not flicker between two that are asked for in a row.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from fallow.coordinator import registry
from fallow.coordinator.registry import Fleet
from fallow.domain.fleet import Catalogue, FleetStatus
from fallow.domain.ids import NodeId
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES

STATUS_NODES_MAX: Final = 500
"""Devices that a status names, at most; more would not fit a bus message in any case."""
KEPT_S: Final = 0.5
SILENCE_BYTES: Final = 100
"""A device's entry in `silent_s`: its id and a number."""


class KeptAnswer:
    """An answer that is given again for `KEPT_S`. Thousands of devices take a while to tell of, and who asks without
    end must not keep a coordinator from its work."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._answer: bytes | None = None

    def give(self, now_s: float, make: Callable[[], bytes]) -> bytes:
        """The last answer, or a new one."""
        if self._answer is None or now_s - self._at_s >= KEPT_S:
            self._at_s, self._answer = now_s, make()
        return self._answer


def encode_status(status: FleetStatus, bytes_max: int = MAX_BUS_MESSAGE_BYTES) -> bytes:
    """The status as JSON of up to `bytes_max` bytes."""
    encoded = msgspec.json.encode(status)
    for cut in (_without_links, _without_chains, _without_neighbours):
        if len(encoded) > bytes_max:
            status = cut(status)
            encoded = msgspec.json.encode(status)
    if len(encoded) > bytes_max:
        # The rest is what no fleet in order sends: each row gets what is left by those before.
        bare = msgspec.structs.replace(status, nodes=(), silent_s={}, models=(), gateways=(), unplaceable={})
        bare = msgspec.structs.replace(
            bare,
            nodes_left_out=status.nodes_left_out + len(status.nodes),
            models_left_out=len(status.models),
            gateways_left_out=len(status.gateways),
        )
        encoded = msgspec.json.encode(_filled(bare, status, bytes_max))
    return encoded


def _without_links(status: FleetStatus) -> FleetStatus:
    nodes = tuple(msgspec.structs.replace(node, link_rtt_s={}) for node in status.nodes)
    return msgspec.structs.replace(status, nodes=nodes)


def _without_chains(status: FleetStatus) -> FleetStatus:
    gateways = tuple(msgspec.structs.replace(gateway, chains=()) for gateway in status.gateways)
    return msgspec.structs.replace(
        status, gateways=gateways, chains_left_out=sum(len(gateway.chains) for gateway in status.gateways)
    )


def _without_neighbours(status: FleetStatus) -> FleetStatus:
    return msgspec.structs.replace(status, neighbours=(), neighbours_left_out=len(status.neighbours))


def _filled(bare: FleetStatus, status: FleetStatus, bytes_max: int) -> FleetStatus:
    """Gateways, models and why they cannot be served, each at most a quarter of the room; devices, the rest."""
    room = bytes_max - len(msgspec.json.encode(bare))
    gateways = status.gateways[: _fitting(status.gateways, room // 4)]
    models = status.models[: _fitting(status.models, room // 4)]
    reasons = tuple(status.unplaceable.items())
    unplaceable = dict(reasons[: _fitting(reasons, room // 4)])
    bare = msgspec.structs.replace(
        bare,
        gateways=gateways,
        models=models,
        unplaceable=unplaceable,
        gateways_left_out=len(status.gateways) - len(gateways),
        models_left_out=len(status.models) - len(models),
    )
    nodes = status.nodes[: _fitting(status.nodes, bytes_max - len(msgspec.json.encode(bare)), SILENCE_BYTES)]
    here: set[NodeId] = {node.node for node in nodes}
    return msgspec.structs.replace(
        bare,
        nodes=nodes,
        silent_s={node: silent_s for node, silent_s in status.silent_s.items() if node in here},
        nodes_left_out=status.nodes_left_out + len(status.nodes) - len(nodes),
    )


def catalogue_answer(fleet: Fleet, quarantined: int) -> Catalogue:
    """What is served now."""
    models = tuple(
        msgspec.structs.replace(entry, servable=registry.servable(fleet, entry)) for entry in fleet.entries().values()
    )
    stores = tuple(heard.announced.address for heard in fleet.stores.values())
    return Catalogue(models=models, stores=stores, quarantined=quarantined)


def encode_catalogue(catalogue: Catalogue, bytes_max: int = MAX_BUS_MESSAGE_BYTES) -> bytes:
    """The catalogue as JSON of up to `bytes_max` bytes."""
    encoded = msgspec.json.encode(catalogue)
    if len(encoded) <= bytes_max:
        return encoded
    bare = msgspec.structs.replace(catalogue, models=(), models_left_out=len(catalogue.models))
    models = catalogue.models[: _fitting(catalogue.models, bytes_max - len(msgspec.json.encode(bare)))]
    left_out = len(catalogue.models) - len(models)
    return msgspec.json.encode(msgspec.structs.replace(catalogue, models=models, models_left_out=left_out))


def _fitting(row: Sequence[object], room_bytes: int, extra_bytes: int = 0) -> int:
    """How many of a row, from its beginning, fit into so many bytes with `extra_bytes` for each."""
    for index, item in enumerate(row):
        room_bytes -= len(msgspec.json.encode(item)) + 1 + extra_bytes
        if room_bytes < 0:
            return index
    return len(row)
