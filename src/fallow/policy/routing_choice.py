"""Which of a few drawn chains a session gets: fast, because all that can be known before is in `Weights`. Pure.

Rules
- Chains are drawn hop by hop by the cell's weights. A carrier that is gone, excluded, changed or without KV room for
  the whole reservation is drawn again, `REDRAWS_MAX` times; a chain that finds none ends there.
- All hops of all drawn chains together make a small graph; its cheapest chain is chosen: the ring of half round trips
  from hop to hop and back to the first (`routing_cost.py`), every hop's wait and compute with the sessions that are on
  it and promised to it, its risk, and a fixed overhead, so that of two chains that are nearly as good the one with
  fewer hops wins. Better than the best drawn chain, and as quick.
- What closes the ring depends on where it begins, so the graph is gone through once for every first carrier: few are
  drawn, and a way that costs more than the best chain so far is not followed.
- A carrier comes at most once in a chain.
- Equal inputs and draws give equal chains.

None of the drawn chains reaching the end does not mean that there is none: `choose_widely` then looks at more of them.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import msgspec

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.ids import NodeId
from fallow.domain.model import Span
from fallow.policy.routing_cost import Carrier, ModelShape, RoutingRules, gateway_s, kv_bytes, rtt_s, runs_from
from fallow.policy.routing_weights import Weights

REDRAWS_MAX = 3
HOPS_MAX = 64


class Promised(msgspec.Struct, frozen=True):
    """What was promised on a carrier and does not show in its heartbeat yet."""

    sessions: int = 0
    kv_bytes: int = 0


NOTHING_PROMISED = Promised()


class _Label:
    """The cheapest way found to a hop."""

    __slots__ = ("before", "carrier", "cost_s", "span")

    def __init__(self, cost_s: float, carrier: Carrier, span: Span, before: "_Label | None") -> None:
        self.cost_s = cost_s
        self.carrier = carrier
        self.span = span
        self.before = before

    def uses(self, carrier: Carrier) -> bool:
        label: _Label | None = self
        while label is not None:
            if label.carrier is carrier:
                return True
            label = label.before
        return False


def choose(
    request: RouteRequest,
    shape: ModelShape,
    carriers: Mapping[NodeId, Carrier],
    promised: Callable[[NodeId], Promised],
    weights: Weights,
    draw: Callable[[], float],
    rules: RoutingRules,
) -> tuple[Hop, ...] | None:
    """A chain for a new session, or `None` when none of the drawn ones can be had. `draw` gives numbers in [0, 1)."""
    drawn = _Drawn(request, shape, carriers, promised, weights, rules)
    for _ in range(rules.chains_drawn):
        drawn.draw_chain(draw)
    return _hops_to(drawn.cheapest())


def choose_widely(
    request: RouteRequest,
    shape: ModelShape,
    carriers: Mapping[NodeId, Carrier],
    promised: Callable[[NodeId], Promised],
    weights: Weights,
    rules: RoutingRules,
) -> tuple[Hop, ...] | None:
    """A chain through the `carriers_per_piece_max` best carriers with room at every edge, for when no drawn chain can
    be had: milliseconds for hundreds of carriers. `None` does not mean that there is none, but that few are left."""
    graph = _Drawn(request, shape, carriers, promised, weights, rules)
    offers: dict[int, list[tuple[float, NodeId, list[Span]]]] = {}
    for node, carrier in carriers.items():
        found = graph.look_at(node, carrier.stage.pieces)
        if found is None or node not in weights.times:
            continue
        _, sessions, kv_free_bytes = found
        for start in {piece.first for piece in carrier.stage.pieces}:
            runs = runs_from(carrier.stage, start)
            runs = [run for run in runs if kv_bytes(run, request.reserve_tokens, shape) <= kv_free_bytes]
            if runs:
                layers = float(runs[-1].layer_count)
                price_s = (weights.times[node].hop_s(sessions, layers) + rules.hop_overhead_s) / layers
                offers.setdefault(start, []).append((price_s, node, runs))
    for found_here in offers.values():
        for _, node, runs in sorted(found_here, key=lambda offer: offer[:2])[: rules.carriers_per_piece_max]:
            for run in runs:
                graph.enter(node, carriers[node].stage.pieces, run)
    return _hops_to(graph.cheapest())


def _hops_to(label: _Label | None) -> tuple[Hop, ...] | None:
    hops: list[Hop] = []
    while label is not None:
        hops.append(Hop(address=label.carrier.address, span=label.span))
        label = label.before
    return tuple(reversed(hops)) or None


class _Drawn:
    """The graph of drawn hops."""

    def __init__(
        self,
        request: RouteRequest,
        shape: ModelShape,
        carriers: Mapping[NodeId, Carrier],
        promised: Callable[[NodeId], Promised],
        weights: Weights,
        rules: RoutingRules,
    ) -> None:
        self._request = request
        self._shape = shape
        self._carriers = carriers
        self._promised = promised
        self._weights = weights
        self._rules = rules
        self._excluded = frozenset(request.exclude)
        self._hops: dict[int, dict[tuple[NodeId, int], tuple[Carrier, Span, float]]] = {}
        """By start layer, then by carrier and end layer: what to enter, and what it costs there."""
        self._loads: dict[NodeId, tuple[Carrier, int, int] | None] = {}
        """Carriers looked at: sessions and KV room with what was promised; `None` for one that cannot be used."""

    def draw_chain(self, draw: Callable[[], float]) -> None:
        """Add the hops of one drawn chain, as far as it gets."""
        edge = 0
        for _ in range(HOPS_MAX):
            if edge == self._shape.layer_count:
                return
            span = self._draw_hop(edge, draw)
            if span is None:
                return
            edge = span.last

    def _draw_hop(self, edge: int, draw: Callable[[], float]) -> Span | None:
        what = self._weights.draws.get(edge)
        if what is None:
            return None
        for _ in range(REDRAWS_MAX):
            chosen = bisect_right(what.cumulative, draw() * what.cumulative[-1], 0, len(what.spans) - 1)
            members = self._weights.kinds[what.kinds[chosen]]
            place = bisect_right(members.cumulative, draw() * members.cumulative[-1], 0, len(members.nodes) - 1)
            span = what.spans[chosen]
            if self.enter(members.nodes[place], members.pieces, span):
                return span
        return None

    def enter(self, node: NodeId, pieces: tuple[Span, ...], span: Span) -> bool:
        """Take a hop into the graph, unless it cannot be used now."""
        mine = self._hops.setdefault(span.first, {})
        if (node, span.last) in mine:
            return True
        if node not in self._loads:
            self._loads[node] = self.look_at(node, pieces)
        found = self._loads[node]
        if found is None:
            return False
        carrier, sessions, kv_free_bytes = found
        if kv_bytes(span, self._request.reserve_tokens, self._shape) > kv_free_bytes:
            return False
        layers = float(span.last - span.first)
        cost_s = self._rules.hop_overhead_s
        if span.last == self._shape.layer_count:
            layers += self._shape.head_layers
            cost_s += gateway_s(carrier, self._request.origin, self._rules)
        cost_s += self._weights.times[node].hop_s(sessions, layers)
        mine[node, span.last] = (carrier, span, cost_s)
        return True

    def look_at(self, node: NodeId, pieces: tuple[Span, ...]) -> tuple[Carrier, int, int] | None:
        """A carrier as it is now: its sessions and KV room with what was promised; `None` when it cannot be used."""
        carrier = self._carriers.get(node)
        if carrier is None or node in self._excluded or carrier.stage.pieces != pieces:
            return None
        promised = self._promised(node)
        return carrier, carrier.sessions + promised.sessions, carrier.kv_free_bytes - promised.kv_bytes

    def cheapest(self) -> _Label | None:
        """The last hop of the cheapest chain through the drawn hops."""
        begun: dict[NodeId, list[_Label]] = {}
        for carrier, span, cost_s in self._hops.get(0, {}).values():
            label = _Label(cost_s + gateway_s(carrier, self._request.origin, self._rules), carrier, span, None)
            begun.setdefault(carrier.node, []).append(label)
        best: _Label | None = None
        for labels in begun.values():
            best = self._cheapest_from(labels, best)
        return best

    def _cheapest_from(self, begun: Sequence[_Label], best: _Label | None) -> _Label | None:
        """The cheapest chain that begins with one of these hops of one carrier, or `best` where none is cheaper."""
        first, layer_count = begun[0].carrier, self._shape.layer_count
        least_s = math.inf if best is None else best.cost_s
        arrived: dict[int, list[_Label]] = {}
        for start in begun:
            arrived.setdefault(start.span.last, []).append(start)
        for edge in sorted(self._hops):
            before = arrived.get(edge)
            if before is None:
                continue
            for carrier, span, cost_s in self._hops[edge].values():
                closing_s = rtt_s(carrier, first, self._rules) / 2 if span.last == layer_count else 0.0
                label = self._extended(before, carrier, span, cost_s + closing_s, least_s)
                if label is not None:
                    arrived.setdefault(span.last, []).append(label)
        for end in arrived.get(layer_count, ()):
            if end.cost_s < least_s:
                best, least_s = end, end.cost_s
        return best

    def _extended(
        self, before: Sequence[_Label], carrier: Carrier, span: Span, cost_s: float, least_s: float
    ) -> _Label | None:
        """The cheapest way over one of the hops before to this one, if it costs less than `least_s` there."""
        best: _Label | None = None
        best_s = least_s - cost_s
        for label in before:
            if label.cost_s >= best_s:
                continue
            arrived_s = label.cost_s + rtt_s(label.carrier, carrier, self._rules) / 2
            if arrived_s < best_s and not label.uses(carrier):
                best, best_s = label, arrived_s
        return None if best is None else _Label(best_s + cost_s, carrier, span, best)
