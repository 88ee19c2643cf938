"""Which chain serves a session. Pure.

A *carrier* is a node with the pieces of one model that are ready on it. A chain covers the layers from the first to
the last exactly once; each hop takes a run of adjacent pieces of one carrier, and a carrier appears at most once.

Rules
- The cheapest chain wins: the sum over its hops of compute, half a round trip to the next hop, and a fixed overhead
  that makes the chain with fewer hops win when two are nearly as good.
- Compute is what a layer takes when a call carries this session's row beside those of the sessions that are on the
  carrier already. Sessions therefore spread over equal devices and fill fast ones first.
- A hop needs KV room for the session's whole reservation; nothing is overcommitted.
- For a repair, kept hops stay exactly as they are and only the gaps are filled. Where the gaps cannot be filled so, a
  fresh chain is chosen, which may use the kept hops' devices in any way.
- A repair's client waits until the newcomers have computed the conversation anew. They do so side by side, so the
  slowest of them counts: no newcomer may take longer than the least of `rebuild_limits_s` with which there is a chain.
  Sessions on a device slow it down, because a loss hits many at once, and some of them are computed anew as well.

The search is Dijkstra's over (layers covered, carrier), whose labels also hold the carriers used so far, because a
carrier with separate runs could otherwise come twice: a label is dropped only for a cheaper one that has used up no
other carrier (label dominance for elementary shortest paths: Feillet et al. 2004). It is exact as long as at most
`carriers_per_piece_max` carriers start at an edge; beyond that, the best ones are considered.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fallow.domain.errors import KvExhausted, NoRoute
from fallow.domain.fleet import Hop, Outlook, RouteReply, RouteRequest, Speed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import NodeId
from fallow.domain.model import Span, StageSpec

RTT_MAX_S = 60.0
KV_ENDLESS_BYTES = 1 << 62
ROWS_MAX = 16
"""Rows of one call up to which more of them are thought to be cheaper by the row."""
LAYER_S_MIN = 1e-6
"""Faster than any device computes a layer; what reports less is believed that much."""
BESIDE_SHARE = 0.3
"""How much longer a device takes to compute a session anew for each session that it has besides."""
UNKNOWN_ROW_SHARE = 0.2
"""What a further row costs of the first one, where nothing was measured."""


class RoutingRules(msgspec.Struct, frozen=True, kw_only=True):
    """Assumptions where nothing was measured, and bounds of the search."""

    hop_overhead_s: float = 0.001
    rtt_unknown_s: float = 0.002
    layer_unknown_s: float = 0.001
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
    rebuild_limits_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """How long a newcomer of a repaired chain may compute before the next token: the first limit that can be kept."""
    repair_s: float = 1.0
    """What a repair costs its session."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What routing must know of a model."""

    layer_count: int
    kv_bytes_per_token_layer: int
    head_layers: float = 0.0
    """What the head costs, counted in layers."""


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

    @property
    def node(self) -> NodeId:
        return self.address.node


def layer_s(speed: Speed | None, rows: int, unknown_s: float) -> float:
    """Seconds that a layer takes for a call of `rows` rows: the measured points joined by lines, the last line drawn
    out to `ROWS_MAX` rows, and proportional beyond.

    More rows never take less time, whatever a device says: noise or a lie would draw every session to it.
    """
    if speed is None:
        return unknown_s * (1 + UNKNOWN_ROW_SHARE * (rows - 1))
    one = max(speed.layer_s_1, LAYER_S_MIN)
    four = max(speed.layer_s_4, one)
    if rows <= 4:
        return one + (four - one) * (rows - 1) / 3
    if rows <= ROWS_MAX:
        return four + max(speed.layer_s_8 - four, 0.0) * (rows - 4) / 4
    return layer_s(speed, ROWS_MAX, unknown_s) * rows / ROWS_MAX


def layers_per_s(speed: Speed | None, unknown_s: float) -> float:
    """What a device computes at best: layers a second times the rows of a call, at `ROWS_MAX` rows."""
    return ROWS_MAX / max(layer_s(speed, ROWS_MAX, unknown_s), 1e-9)


def compute_s(carrier: Carrier, span: Span, shape: ModelShape, rules: RoutingRules) -> float:
    """Seconds that a span takes on a carrier as loaded as it is."""
    layers = span.layer_count + (shape.head_layers if span.last == shape.layer_count else 0.0)
    return layers * max(layer_s(carrier.speed, carrier.sessions + 1, rules.layer_unknown_s), 0.0)


def rtt_s(one: Carrier, other: Carrier, rules: RoutingRules) -> float:
    """The round trip between two carriers as either of them measured it."""
    there_s = one.link_rtt_s.get(other.address.node, math.inf)
    back_s = other.link_rtt_s.get(one.address.node, math.inf)
    seen_s = there_s if there_s < back_s else back_s
    return seen_s if 0 <= seen_s <= RTT_MAX_S else rules.rtt_unknown_s


def hop_s(
    before: Carrier | None, carrier: Carrier, span: Span, shape: ModelShape, origin: NodeId | None, rules: RoutingRules
) -> float:
    """What adding a hop costs: its compute, the way to it, and, after the last one, the way back to the gateway."""
    cost = rules.hop_overhead_s + compute_s(carrier, span, shape, rules)
    to_origin = rules.rtt_unknown_s if origin is None else carrier.link_rtt_s.get(origin, rules.rtt_unknown_s)
    cost += (to_origin if before is None else rtt_s(before, carrier, rules)) / 2
    return cost + to_origin / 2 if span.last == shape.layer_count else cost


def route(
    request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier], rules: RoutingRules | None = None
) -> RouteReply:
    """The cheapest chain for a session, or why there is none."""
    rules = rules or RoutingRules()
    usable = [carrier for carrier in carriers if carrier.node not in request.exclude]
    limits_s = (*rules.rebuild_limits_s, math.inf) if request.rebuild_tokens else (math.inf,)
    if request.keep and _consistent(request, shape):
        repaired = _search_within(limits_s, request, shape, usable, request.keep, rules)
        if repaired is not None:
            return RouteReply(hops=repaired)
    reachable = _reachable(request, shape, usable)
    hops = _search_within(limits_s, request, shape, usable, (), rules) if reachable else None
    if hops is not None:
        return RouteReply(hops=hops)
    return refusal(request, shape, carriers, rules)


def refusal(request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier], rules: RoutingRules) -> RouteReply:
    """Why there is no chain, for a request for which none was found."""
    usable = [carrier for carrier in carriers if carrier.node not in request.exclude]
    endless = [msgspec.structs.replace(carrier, kv_free_bytes=KV_ENDLESS_BYTES) for carrier in usable]
    only_full = _reachable(request, shape, endless) and (
        len(usable) > rules.exact_carriers_max or _search(request, shape, endless, (), rules) is not None
    )
    code = KvExhausted.code if only_full else NoRoute.code
    return RouteReply(error=_why_not(request, shape, usable), code=code)


def _reachable(request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier]) -> bool:
    """Whether there would be a chain if carriers might come twice: tells quickly that there is none, as a rule."""
    ends: dict[int, set[int]] = {}
    for carrier in carriers:
        for start in {piece.first for piece in carrier.stage.pieces}:
            for run in runs_from(carrier.stage, start):
                if kv_bytes(run, request.reserve_tokens, shape) <= carrier.kv_free_bytes:
                    ends.setdefault(start, set()).add(run.last)
    reached = {0}
    for start in sorted(ends):
        if start in reached:
            reached |= ends[start]
    return shape.layer_count in reached


def _consistent(request: RouteRequest, shape: ModelShape) -> bool:
    """Whether the hops to keep are in order, apart, inside the model, and none of them excluded or twice."""
    edge = 0
    for hop in request.keep:
        if hop.span.first < edge or hop.span.layer_count <= 0:
            return False
        edge = hop.span.last
    nodes = [hop.address.node for hop in request.keep]
    return edge <= shape.layer_count and len(set(nodes)) == len(nodes) and not set(nodes) & set(request.exclude)


def rebuild_s(carrier: Carrier, span: Span, tokens: int, rules: RoutingRules) -> float:
    """Seconds until a newcomer has computed so many tokens anew, beside the sessions that are on it."""
    row_s = layer_s(carrier.speed, ROWS_MAX, rules.layer_unknown_s) / ROWS_MAX
    return tokens * span.layer_count * row_s * (1 + BESIDE_SHARE * carrier.sessions)


def _search_within(
    limits_s: Sequence[float],
    request: RouteRequest,
    shape: ModelShape,
    carriers: Sequence[Carrier],
    keep: Sequence[Hop],
    rules: RoutingRules,
) -> tuple[Hop, ...] | None:
    """The cheapest chain within the first limit that leaves one."""
    for limit_s in limits_s:
        hops = _search(request, shape, carriers, keep, rules, limit_s)
        if hops is not None:
            return hops
    return None


def _search(
    request: RouteRequest,
    shape: ModelShape,
    carriers: Sequence[Carrier],
    keep: Sequence[Hop],
    rules: RoutingRules,
    rebuild_max_s: float = math.inf,
) -> tuple[Hop, ...] | None:
    kept_nodes = {hop.address.node for hop in keep}
    by_node = {carrier.node: carrier for carrier in carriers}
    forced: dict[int, tuple[Carrier, list[Span]]] = {
        hop.span.first: (by_node.get(hop.address.node, _unheard(hop, request)), [hop.span]) for hop in keep
    }
    free = _spans_by_start(
        [carrier for carrier in carriers if carrier.node not in kept_nodes], request, shape, sorted(forced), rules,
        rebuild_max_s,
    )  # fmt: skip
    if not _joined(shape.layer_count, forced, free):
        return None
    start_max = {
        carrier.node: max((span.first for span in carrier.stage.pieces), default=0) for carrier in by_node.values()
    }
    heap: list[tuple[float, int, int, int, tuple[tuple[Carrier, Span], ...]]] = [(0.0, 0, 0, 0, ())]
    settled: dict[tuple[int, NodeId | None], list[frozenset[NodeId]]] = {}
    pushed = popped = 0
    while heap:
        cost, hop_count, _, edge, path = heapq.heappop(heap)
        if edge == shape.layer_count:
            return tuple(Hop(address=carrier.address, span=span) for carrier, span in path)
        popped += 1
        last = path[-1][0] if path else None
        known = settled.setdefault((edge, last.node if last else None), [])
        late = popped > rules.labels_max or pushed > rules.pushes_max
        if known and late:
            continue
        used = frozenset(carrier.node for carrier, _ in path)
        still_matters = frozenset(node for node in used if start_max.get(node, 0) >= edge)
        if any(earlier <= still_matters for earlier in known):
            continue
        known.append(still_matters)
        options: Iterable[tuple[Carrier, list[Span]]] = [forced[edge]] if edge in forced else free.get(edge, ())
        for carrier, spans in options:
            if carrier.node in used:
                continue
            for span in spans:
                if late and (span.last, carrier.node) in settled:
                    continue
                pushed += 1
                total = cost + hop_s(last, carrier, span, shape, request.origin, rules)
                heapq.heappush(heap, (total, hop_count + 1, pushed, span.last, (*path, (carrier, span))))
    return None


def _unheard(hop: Hop, request: RouteRequest) -> Carrier:
    """A kept hop's device that has not been heard of, for example just after the coordinator started."""
    return Carrier(address=hop.address, stage=StageSpec(model=request.model, pieces=(hop.span,)))


def _spans_by_start(
    carriers: Sequence[Carrier],
    request: RouteRequest,
    shape: ModelShape,
    walls: Sequence[int],
    rules: RoutingRules,
    rebuild_max_s: float,
) -> dict[int, list[tuple[Carrier, list[Span]]]]:
    """For every edge, the carriers that can go on from there and how far; no span runs through the start of a kept
    hop, and only what the KV room allows is offered."""
    found: dict[int, list[tuple[float, NodeId, Carrier, list[Span]]]] = {}
    for carrier in carriers:
        for start in {piece.first for piece in carrier.stage.pieces}:
            wall = next((wall for wall in walls if wall > start), shape.layer_count)
            spans = [
                span
                for span in runs_from(carrier.stage, start)
                if span.last <= wall
                and kv_bytes(span, request.reserve_tokens, shape) <= carrier.kv_free_bytes
                and rebuild_s(carrier, span, request.rebuild_tokens, rules) <= rebuild_max_s
            ]
            if spans:
                price = compute_s(carrier, Span(0, 1), shape, rules) + rules.hop_overhead_s / spans[-1].layer_count
                found.setdefault(start, []).append((price, carrier.node, carrier, spans))
    return {
        start: [(carrier, spans) for _, _, carrier, spans in sorted(offers)[: rules.carriers_per_piece_max]]
        for start, offers in found.items()
    }


def _joined(
    layer_count: int,
    forced: Mapping[int, tuple[Carrier, list[Span]]],
    free: Mapping[int, Sequence[tuple[Carrier, list[Span]]]],
) -> bool:
    """Whether the offers reach from the first layer to the last: tells quickly that there is no chain."""
    reached = {0}
    for start in sorted({*forced, *free}):
        if start in reached:
            options = [forced[start]] if start in forced else free[start]
            reached.update(span.last for _, spans in options for span in spans)
    return layer_count in reached


def runs_from(stage: StageSpec, start: int) -> list[Span]:
    """Every run of adjacent pieces that starts at `start`, shortest first."""
    runs: list[Span] = []
    edge = start
    for piece in stage.pieces:
        if piece.first == edge:
            edge = piece.last
            runs.append(Span(start, edge))
    return runs


def kv_bytes(span: Span, tokens: int, shape: ModelShape) -> int:
    """KV room that a session of so many tokens takes on a span."""
    return span.layer_count * shape.kv_bytes_per_token_layer * tokens


def covered(layer_count: int, stages: Iterable[StageSpec]) -> list[bool]:
    """For each layer, whether any of the stages holds it."""
    held = [False] * layer_count
    for stage in stages:
        for piece in stage.pieces:
            for layer in range(max(piece.first, 0), min(piece.last, layer_count)):
                held[layer] = True
    return held


def spans_where(flags: Sequence[bool]) -> list[Span]:
    """The runs of layers whose flag is set."""
    runs: list[Span] = []
    for layer, flag in enumerate(flags):
        if not flag:
            continue
        if runs and runs[-1].last == layer:
            runs[-1] = Span(runs[-1].first, layer + 1)
        else:
            runs.append(Span(layer, layer + 1))
    return runs


def _why_not(request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier]) -> str:
    without = f" ({len(request.exclude)} left out after failures)" if request.exclude else ""
    missing = spans_where([not held for held in covered(shape.layer_count, (item.stage for item in carriers))])
    if missing:
        return f"no device that is ready{without} holds layers {_names(missing)} of {shape.layer_count}"
    roomy = [
        StageSpec(model=item.stage.model, pieces=tuple(
            piece
            for piece in item.stage.pieces
            if kv_bytes(piece, request.reserve_tokens, shape) <= item.kv_free_bytes
        ))
        for item in carriers
    ]  # fmt: skip
    full = spans_where([not held for held in covered(shape.layer_count, roomy)])
    if full:
        return (
            f"the devices{without} that hold layers {_names(full)} have no room for another session of "
            f"{request.reserve_tokens} tokens at present"
        )
    return (
        f"the {len(carriers)} devices that are ready{without} hold every layer, but no chain that uses each of them "
        f"once has room for {request.reserve_tokens} tokens on every hop"
    )


def _names(spans: Sequence[Span]) -> str:
    return ", ".join(f"{span.first}-{span.last - 1}" for span in spans)
