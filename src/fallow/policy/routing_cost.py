"""What routing knows of a model and of the nodes that carry it, and what a chain of them costs a token. Pure.

Rules
- Most answers run ahead of their gateway (docs/adr/0010): the last device of a chain tells the first one the next
  token. What each token pays is therefore the *ring*: compute and a fixed overhead for every hop, half a round trip
  between hops, and half a round trip from the last device back to the first. A chain of one device pays no network.
- The way from the gateway and back to it is paid by a few tokens alone: `RoutingRules.gateway_share` of them.
- Half a round trip is what either device measured; what nobody measured counts as `rtt_unknown_s`.

It knows nothing of waits and promises (`routing_weights.py`), and chooses nothing (`routing.py`, `routing_choice.py`).
"""

import math
from collections.abc import Sequence

import msgspec

from fallow.domain.fleet import Outlook, Speed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy.speed import layer_s

RTT_MAX_S = 60.0


class RoutingRules(msgspec.Struct, frozen=True, kw_only=True):
    """Assumptions where nothing was measured, and bounds of the search."""

    hop_overhead_s: float = 0.001
    rtt_unknown_s: float = 0.002
    layer_unknown_s: float = 0.001
    gateway_share: float = 0.05
    """Of an answer's tokens, those that pay the way from the gateway and back. Opening a chain and its prompt take
    about four such ways (`OPEN_TRIPS` of `simulator/fast_load.py`, fitted, and the first token's own), 2 % of
    `session_tokens`; answers that do not run ahead (penalties, logit bias) pay it for all of theirs: 3 % of answers
    here, which nobody measured. Were it 0, a chain far from its gateway would be as good as one next door."""
    carriers_per_piece_max: int = 8
    labels_max: int = 2_000
    """Search steps after which carriers used so far are no longer told apart: bounded time before the last per cent."""
    pushes_max: int = 10_000
    """Ways to go on that were noted, after which the same holds: a step notes as many as carriers have runs."""
    refresh_s: float = 3.0
    """How often the weights of a cell are worked out anew."""
    exact_carriers_max: int = 8
    """With so few carriers every chain is looked at; with more, chains are drawn by their weights."""
    chains_drawn: int = 4
    session_s: float = 120.0
    """How long a session stays, about: what a device's outlook is asked for."""
    session_tokens: int = 200
    """Tokens over which a repair's cost is spread."""
    rebuild_limits_s: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0, 11.0, 16.0, 23.0, 32.0)
    """How long a newcomer of a repaired chain may compute before the next token: the first limit that can be kept."""
    repaired_tokens: int = 50
    """Tokens that come after a repair, about: over so many a newcomer's rebuild is set against its speed."""
    repair_s: float = 1.0
    """What a repair costs its session."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What routing must know of a model."""

    layer_count: int
    kv_bytes_per_token_layer: int
    head_layers: float = 0.0
    """What the head costs, counted in layers."""
    send_row_s: float = 0.0
    """What a row takes on a home line."""


class Carrier(msgspec.Struct, frozen=True, kw_only=True):
    """A node and the pieces of the model in question that are ready on it."""

    address: PeerAddress
    stage: StageSpec
    speed: Speed | None = None
    sessions: int = 0
    kv_free_bytes: int = 0
    link_rtt_s: dict[NodeId, float] = {}
    tokens_per_s: float = 0.0
    """Rows computed a second, as its heartbeat says; 0: not told."""
    outlook: Outlook | None = None
    busy_share: float = 0.0
    """Of its time, what it computes already."""
    rebuild_wait_s: float = 0.0
    """How long it will be at rebuilds that were promised on it."""
    region: str = ""

    @property
    def node(self) -> NodeId:
        return self.address.node


def compute_s(carrier: Carrier, span: Span, shape: ModelShape, rules: RoutingRules) -> float:
    """Seconds that a span takes on a carrier as loaded as it is."""
    layers = span.layer_count + (shape.head_layers if span.last == shape.layer_count else 0.0)
    return layers * max(layer_s(carrier.speed, carrier.sessions + 1, rules.layer_unknown_s), 0.0)


def rtt_s(one: Carrier, other: Carrier, rules: RoutingRules) -> float:
    """The round trip between two carriers as either of them measured it; none between a carrier and itself."""
    if one.node == other.node:
        return 0.0
    there_s = one.link_rtt_s.get(other.address.node, math.inf)
    back_s = other.link_rtt_s.get(one.address.node, math.inf)
    return _believed_s(there_s if there_s < back_s else back_s, rules)


def gateway_s(carrier: Carrier, origin: NodeId | None, rules: RoutingRules) -> float:
    """What the way between a gateway and an end of a chain costs a token: half a round trip, for a few tokens."""
    seen_s = math.inf if origin is None else carrier.link_rtt_s.get(origin, math.inf)
    return rules.gateway_share * _believed_s(seen_s, rules) / 2


def _believed_s(seen_s: float, rules: RoutingRules) -> float:
    return seen_s if 0 <= seen_s <= RTT_MAX_S else rules.rtt_unknown_s


def hop_s(
    path: Sequence[tuple[Carrier, Span]], carrier: Carrier, span: Span, shape: ModelShape, origin: NodeId | None,
    rules: RoutingRules,
) -> float:  # fmt: skip
    """What adding a hop to a path costs a token: its compute and the way to it; after the last one, the way from there
    to the first, which closes the ring, and the gateway's share."""
    cost = rules.hop_overhead_s + compute_s(carrier, span, shape, rules)
    cost += rtt_s(path[-1][0], carrier, rules) / 2 if path else gateway_s(carrier, origin, rules)
    if span.last < shape.layer_count:
        return cost
    first = path[0][0] if path else carrier
    return cost + rtt_s(carrier, first, rules) / 2 + gateway_s(carrier, origin, rules)


def kv_bytes(span: Span, tokens: int, shape: ModelShape) -> int:
    """KV room that a session of so many tokens takes on a span."""
    return span.layer_count * shape.kv_bytes_per_token_layer * tokens


def runs_from(stage: StageSpec, start: int) -> list[Span]:
    """Every run of adjacent pieces that starts at `start`, shortest first."""
    runs: list[Span] = []
    edge = start
    for piece in stage.pieces:
        if piece.first == edge:
            edge = piece.last
            runs.append(Span(start, edge))
    return runs
