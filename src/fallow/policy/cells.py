"""How devices form cells, and what cells do for each other. Pure.

Forming
- A device measures its round trip to the coordinators that it knows and joins the nearest cell that has room. It moves
  later only for a clear gain (`move_gain_s` and `move_gain_share` both), so that jitter cannot make it wander, or when
  its cell says that it dissolves. A cell that dissolves takes nobody new.
- A cell that outgrows `devices_max` splits in two by latency: two-means (Lloyd 1982) on the devices' round trips to the
  landmarks that they measured (distributed binning: Ratnasamy et al. 2002), neither part below `split_share_min` of it.
- A cell below `devices_min` dissolves into the nearest one within `rtt_max_s` that stays below `merge_fill_max` of its
  room with it. Of two small neighbours the smaller dissolves, never both into each other. What was split does not
  merge again, because its parts are larger than `devices_min`; what was merged does not split, as it is not full.

Helping
- Coordinators tell each other a digest of what they serve. A coordinator that has no chain, or whose cell is loaded
  beyond `load_max`, asks neighbours for one: those that can serve the model, have room and capacity to spare, the
  least delay first. Delay is the round trip, stretched as load rises: 1 / (1 - load / load_max), as in a queue.
- Sessions that were sent to a neighbour lately count as load, so that it is not overrun before its digest tells.

What changes a cell only after a while, and when, is `cell_changes.py`'s. It measures nothing and moves nobody: that is
for devices and coordinators.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from fallow.domain.cells import CellDigest, ModelDigest
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span
from fallow.policy.routing import Carrier, ModelShape, kv_bytes
from fallow.policy.spans import spans_where
from fallow.policy.speed import layers_per_s

LLOYD_ROUNDS_MAX = 32
RTT_UNKNOWN_S = 0.1
"""Of a neighbour whose round trip was not measured yet."""
LAYER_UNKNOWN_S = 0.001
LANDMARKS_MAX = 4
LANDMARK_SHARE_MIN = 0.5
MISSING_TOLD_MAX = 32
TOKENS_PER_S_TOLD_MAX = 1e9
LOAD_TOLD_MAX = 100.0
SESSIONS_TOLD_MAX = 1_000_000
SESSION_TOKENS = 2048
"""A session that a digest counts room for."""
SESSION_TOKENS_PER_S = 5.0
"""What a session that was sent to a neighbour is thought to load it with until its next digest."""

_T = TypeVar("_T")


class CellRules(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes, distances and periods of cells."""

    devices_max: int = 400
    devices_min: int = 40
    rtt_max_s: float = 0.040
    """Cells further apart than this do not merge. Devices without a nearer cell join it all the same."""
    move_gain_s: float = 0.005
    move_gain_share: float = 0.25
    split_share_min: float = 0.25
    merge_fill_max: float = 0.7
    load_max: float = 0.9
    """Share of its capacity beyond which a cell sends new sessions elsewhere, and a neighbour is sent none."""
    neighbours_asked_max: int = 2
    digest_interval_s: float = 3.0
    digest_silence_max_s: float = 10.0
    sent_counts_s: float = 10.0
    """How long a session that was sent to a neighbour counts beside what its digest tells."""
    look_interval_s: float = 600.0
    """Between two looks of a running device at the cells around it, drawn from half to one and a half times this."""
    looks_agreeing: int = 3
    """Looks in a row that must find another cell clearly nearer before a running device moves."""
    stay_min_s: float = 3600.0
    """A device that came to a cell, or was refused another, stays so long; registrars move it no more often."""
    small_for_s: float = 1800.0
    """A cell must have been too small for so long before it dissolves."""
    hold_slack: float = 1.2
    """A cell that dissolves goes on as long as round trip and room are within so many times the bounds to begin."""


class CellOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A cell as a device sees it."""

    cell: str
    rtt_s: float
    devices: int
    devices_max: int
    dissolves_into: str | None = None
    """The cell that it sends its devices to, where it dissolves."""


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A cell as another cell's coordinator sees it."""

    digest: CellDigest
    rtt_s: float | None = None
    """Between the coordinators; `None`: not measured yet."""
    sent: Mapping[Digest, int] = {}
    """Sessions of each model that were sent there within `sent_counts_s`."""


# --- forming --------------------------------------------------------------------------------------


def choose_cell(home: str | None, offers: Sequence[CellOffer], rules: CellRules) -> str | None:
    """Where a device should be: the nearest cell with room, or home when nothing is clearly nearer.

    Where home dissolves into a cell with room, that one stands for home. `None` when there is no cell with room and no
    home among the offers: then it founds one or waits.
    """
    at_home = next((offer for offer in offers if offer.cell == home), None)
    open_ = [offer for offer in offers if offer.devices < offer.devices_max and offer.dissolves_into is None]
    if at_home is not None:
        heir = next((offer for offer in open_ if offer.cell == at_home.dissolves_into), None)
        at_home = heir or at_home
    nearest = min(open_, key=lambda offer: (offer.rtt_s, offer.cell), default=None)
    if nearest is None or at_home is None:
        chosen = nearest or at_home
        return None if chosen is None else chosen.cell
    gain_s = at_home.rtt_s - nearest.rtt_s
    clear = gain_s >= rules.move_gain_s and gain_s >= rules.move_gain_share * at_home.rtt_s
    return nearest.cell if clear else at_home.cell


def split(
    positions: Mapping[NodeId, tuple[float, ...]], rules: CellRules
) -> tuple[tuple[NodeId, ...], tuple[NodeId, ...]] | None:
    """The two parts of a cell that has outgrown `devices_max`, each sorted; `None` while it has not.

    `positions`: for each device the round trips in seconds to the same landmarks. Deterministic, whatever the order.
    """
    nodes = sorted(positions)
    if len(nodes) <= rules.devices_max:
        return None
    least = max(int(rules.split_share_min * len(nodes)), 1)
    one, other = _far_apart(nodes, positions)
    left: list[NodeId] = []
    for _ in range(LLOYD_ROUNDS_MAX):
        pull = {
            node: _distance(positions[node], one) - _distance(positions[node], other) for node in nodes
        }  # below 0: nearer to the first centre
        ranked = sorted(nodes, key=lambda node: (pull[node], node))
        size = min(max(sum(pull[node] < 0 for node in nodes), least), len(nodes) - least)
        if ranked[:size] == left:
            break
        left = ranked[:size]
        one, other = _centre(left, positions), _centre(ranked[size:], positions)
    chosen = set(left)
    return tuple(sorted(left)), tuple(node for node in nodes if node not in chosen)


def positions(rtts_s: Mapping[NodeId, Mapping[NodeId, float]]) -> dict[NodeId, tuple[float, ...]]:
    """For each device the round trips in seconds to the same landmarks, for `split`, by what each measured to whom.

    Landmarks are the `LANDMARKS_MAX` peers that most devices measured, each at least a share `LANDMARK_SHARE_MIN` of
    them; who did not measure one is put where the others are on average. Empty where there is no landmark.
    """
    measured: dict[NodeId, list[float]] = {}
    for told in rtts_s.values():
        for peer, rtt_s in told.items():
            measured.setdefault(peer, []).append(rtt_s)
    known = [peer for peer, told in measured.items() if len(told) >= LANDMARK_SHARE_MIN * len(rtts_s)]
    landmarks = sorted(known, key=lambda peer: (-len(measured[peer]), peer))[:LANDMARKS_MAX]
    means_s = {peer: sum(measured[peer]) / len(measured[peer]) for peer in landmarks}
    if not landmarks:
        return {}
    return {node: tuple(told.get(peer, means_s[peer]) for peer in landmarks) for node, told in rtts_s.items()}


def dissolve_into(cell: str, devices: Mapping[str, int], rtt_s: Mapping[str, float], rules: CellRules) -> str | None:
    """The cell that a small cell's devices should join, or `None` when it should stay.

    `devices`: of every known cell, this one included; `rtt_s`: from this one's coordinator to the others'.
    """
    mine = devices[cell]
    if mine >= rules.devices_min:
        return None
    fits = [
        other
        for other, size in devices.items()
        if other != cell
        and rtt_s.get(other, float("inf")) <= rules.rtt_max_s
        and mine + size <= rules.merge_fill_max * rules.devices_max
        and (size, other) > (mine, cell)
    ]
    return min(fits, key=lambda other: (rtt_s[other], other), default=None)


def _far_apart(
    nodes: Sequence[NodeId], positions: Mapping[NodeId, tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two positions far from each other: the farthest from the middle, and the farthest from that."""
    middle = _centre(nodes, positions)
    one = max(nodes, key=lambda node: (_distance(positions[node], middle), node))
    other = max(nodes, key=lambda node: (_distance(positions[node], positions[one]), node))
    return positions[one], positions[other]


def _centre(nodes: Sequence[NodeId], positions: Mapping[NodeId, tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(axis) / len(nodes) for axis in zip(*(positions[node] for node in nodes), strict=True))


def _distance(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Squared."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


# --- helping --------------------------------------------------------------------------------------


def digest_of(
    model: Digest,
    shape: ModelShape,
    carriers: Sequence[Carrier],
    holders: Sequence[int],
    tokens_per_s_max: float | None,
) -> ModelDigest:
    """A model as its cell serves it. `holders`: carriers of each layer; `tokens_per_s_max`: by the router's max-flow,
    or `None` to bound it here: no layer's holders serve more than their rate, all together no more than Σ rate / work.

    The load cannot exceed what the holders of any one layer compute, because every token passes every layer.
    """
    layers = shape.layer_count
    missing = tuple(spans_where([count == 0 for count in holders]))[:MISSING_TOLD_MAX]
    if missing:
        return ModelDigest(model=model, servable=False, copies_min=0, missing=missing)
    alike: dict[tuple[Span, ...], list[Carrier]] = {}
    for carrier in carriers:
        alike.setdefault(carrier.stage.pieces, []).append(carrier)
    rate = [0.0] * layers
    rows = [0.0] * layers
    room = [0.0] * layers
    total = 0.0
    for pieces, group in alike.items():
        speed = sum(layers_per_s(carrier.speed, LAYER_UNKNOWN_S) for carrier in group)
        computed = sum(carrier.tokens_per_s for carrier in group)
        session_bytes = max(sum(kv_bytes(piece, SESSION_TOKENS, shape) for piece in pieces), 1)
        fits = sum(max(carrier.kv_free_bytes, 0) for carrier in group) / session_bytes
        total += speed
        for layer in (layer for piece in pieces for layer in range(piece.first, piece.last)):
            rate[layer] += speed
            rows[layer] += computed
            room[layer] += fits
    bound = min(*rate, total / (layers + shape.head_layers))
    capacity = bound if tokens_per_s_max is None else tokens_per_s_max
    return ModelDigest(
        model=model,
        servable=True,
        tokens_per_s_max=min(capacity, TOKENS_PER_S_TOLD_MAX),
        load=min(min(rows) / capacity, LOAD_TOLD_MAX) if capacity > 0 else 1.0,
        copies_min=min(holders),
        kv_free_sessions=int(min(*room, SESSIONS_TOLD_MAX)),
    )


def of_model(digest: CellDigest, model: Digest) -> ModelDigest | None:
    """What a cell tells of a model."""
    return next((item for item in digest.models if item.model == model), None)


def load_with(told: ModelDigest, sent: int) -> float:
    """A model's load with sessions that its digest does not count yet."""
    return told.load + (SESSION_TOKENS_PER_S * sent / told.tokens_per_s_max if told.tokens_per_s_max > 0 else 1.0)


def overloaded(told: ModelDigest, rules: CellRules) -> bool:
    """Whether new sessions of a model should rather go to another cell."""
    return told.servable and told.load > rules.load_max


def overflow_order(model: Digest, neighbours: Sequence[Neighbour], rules: CellRules) -> tuple[str, ...]:
    """The cells to ask for a chain, best first, at most `neighbours_asked_max`."""
    found: list[tuple[float, str]] = []
    for neighbour in neighbours:
        told = of_model(neighbour.digest, model)
        if told is None or not told.servable:
            continue
        sent = neighbour.sent.get(model, 0)
        load = load_with(told, sent)
        if load < rules.load_max and sent < told.kv_free_sessions:
            rtt_s = RTT_UNKNOWN_S if neighbour.rtt_s is None else neighbour.rtt_s
            found.append((rtt_s / (1.0 - load / rules.load_max), neighbour.digest.cell))
    return tuple(cell for _, cell in sorted(found)[: rules.neighbours_asked_max])


def lenders(told: ModelDigest, neighbours: Sequence[Neighbour], rules: CellRules) -> tuple[str, ...]:
    """The cells to ask for the files of layers that nobody here holds: those that hold some of them, nearest first."""
    missing = {layer for span in told.missing for layer in range(span.first, span.last)}
    found: list[tuple[float, str]] = []
    for neighbour in neighbours if missing else ():
        theirs = of_model(neighbour.digest, told.model)
        if theirs is None:
            continue
        without = {layer for span in theirs.missing for layer in range(span.first, span.last)}
        if missing - without:
            rtt_s = RTT_UNKNOWN_S if neighbour.rtt_s is None else neighbour.rtt_s
            found.append((rtt_s, neighbour.digest.cell))
    return tuple(cell for _, cell in sorted(found)[: rules.neighbours_asked_max])
