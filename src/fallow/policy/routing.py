"""Which chain serves a session. Pure.

A *carrier* is a node with the pieces of one model that are ready on it. A chain covers the layers from the first to
the last exactly once; each hop takes a run of adjacent pieces of one carrier, and a carrier appears at most once, but
for repairs.

Rules
- The cheapest chain wins, by what a token of an answer that runs ahead pays (`routing_cost.py`): compute, the ring of
  half round trips that the last hop closes with the first, and for every hop a fixed overhead that makes the chain with
  fewer hops win when two are nearly as good.
- Compute is what a layer takes when a call carries this session's row beside those of the sessions that are on the
  carrier already. Sessions therefore spread over equal devices and fill fast ones first.
- A hop needs KV room for the session's whole reservation; nothing is overcommitted.
- For a repair, kept hops stay exactly as they are and only the gaps are filled: by other devices, else also by those of
  kept hops, which then come again, with KV room for both. A chain that gives up no cache is worth another hop: what is
  computed anew is what was lost, and not the whole conversation on every device. Where the gaps cannot be filled so, a
  fresh chain is chosen, which may use the kept hops' devices in any way.
- A repair's client waits until the newcomers have computed the conversation anew. They do so side by side, so the
  slowest of them counts: no newcomer may take longer than the least of `rebuild_limits_s` with which there is a chain
  (`rebuild.py`). What was promised to others a moment ago comes first: a loss breaks many sessions at once. Hops that
  live are given up where the others would otherwise wait `FRESH_GAIN` times as long, for the line of who must resend.

The search is Dijkstra's over (layers covered, carrier, first carrier): the last hop's way back to the first one makes
two ways to the same carrier worth different things later. Labels also hold the carriers used so far, because a carrier
with separate runs could otherwise come twice: a label is dropped only for a cheaper one that has used up no other
carrier (label dominance for elementary shortest paths: Feillet et al. 2004). It is exact as long as at most
`carriers_per_piece_max` carriers start at an edge; beyond that, the best ones are considered. Past `labels_max` steps
or `pushes_max` ways to go on, neither the first carrier nor those used are told apart any more.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fallow.domain.errors import KvExhausted, NoRoute
from fallow.domain.fleet import Hop, RouteReply, RouteRequest
from fallow.domain.ids import VISITS_MAX, NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy.rebuild import FRESH_GAIN, Offer, least_s, limits_from, newcomer_s
from fallow.policy.routing_cost import (
    Carrier,
    ModelShape,
    RoutingRules,
    compute_s,
    hop_s,
    kv_bytes,
    rtt_s,
    runs_from,
)
from fallow.policy.spans import covered, spans_where
from fallow.policy.speed import ROWS_MAX, layer_s

KV_ENDLESS_BYTES = 1 << 62

__all__ = [
    "Carrier", "ModelShape", "RoutingRules", "compute_s", "hop_s", "kv_bytes", "rebuild_s", "refusal", "route", "rtt_s",
    "runs_from",
]  # fmt: skip


def route(
    request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier], rules: RoutingRules | None = None
) -> RouteReply:
    """The cheapest chain for a session, or why there is none."""
    rules = rules or RoutingRules()
    usable = [carrier for carrier in carriers if carrier.node not in request.exclude]
    keep = request.keep if _consistent(request, shape) else ()
    kept_least_s = _least_s(request, shape, usable, keep, rules) if keep else math.inf
    fresh_least_s = _least_s(request, shape, usable, (), rules)
    ways = [(keep, kept_least_s)] if keep else []
    ways.insert(FRESH_GAIN * fresh_least_s >= kept_least_s, ((), fresh_least_s))
    for hops, least in ways:
        found = _search_within(request, shape, usable, hops, rules, least)
        if found is not None:
            return RouteReply(hops=found)
    return refusal(request, shape, carriers, rules)


def refusal(request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier], rules: RoutingRules) -> RouteReply:
    """Why there is no chain, for a request for which none was found."""
    usable = [carrier for carrier in carriers if carrier.node not in request.exclude]
    endless = [msgspec.structs.replace(carrier, kv_free_bytes=KV_ENDLESS_BYTES) for carrier in usable]
    only_full = _reachable(request, shape, endless) and (
        len(usable) > rules.exact_carriers_max or _search(request, shape, endless, endless, (), rules) is not None
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
    """Whether the hops to keep are in order, apart, inside the model, and none of them excluded or the same stage."""
    edge = 0
    for hop in request.keep:
        if hop.span.first < edge or hop.span.layer_count <= 0:
            return False
        edge = hop.span.last
    stages = {(hop.address.node, hop.visit) for hop in request.keep}
    apart = len(stages) == len(request.keep) and not {node for node, _ in stages} & set(request.exclude)
    return apart and edge <= shape.layer_count


def rebuild_s(carrier: Carrier, span: Span, tokens: int, shape: ModelShape, rules: RoutingRules) -> float:
    """Seconds until a newcomer has computed so many tokens anew, after what was promised before; 0 for none."""
    if not tokens:
        return 0.0
    row_s = layer_s(carrier.speed, ROWS_MAX, rules.layer_unknown_s) / ROWS_MAX
    send_s = shape.send_row_s if span.last < shape.layer_count else 0.0
    takes_s = newcomer_s(tokens, span.layer_count, row_s, send_s, carrier.sessions, carrier.busy_share)
    return carrier.rebuild_wait_s + takes_s


def _least_s(
    request: RouteRequest, shape: ModelShape, carriers: Sequence[Carrier], keep: Sequence[Hop], rules: RoutingRules
) -> float:
    """In how little time a repair could be done that keeps these hops. Who stands before newcomers sends its log."""
    tokens = request.rebuild_tokens
    if not tokens:
        return 0.0
    by_node = {carrier.node: carrier for carrier in carriers}
    starts = {hop.span.first for hop in keep}
    held = {layer for hop in keep for layer in range(hop.span.first, hop.span.last)}
    offers: list[Offer] = []
    for hop in keep:
        sends = hop.span.last not in starts and hop.span.last < shape.layer_count
        wait_s = by_node.get(hop.address.node, _unheard(hop, request)).rebuild_wait_s
        offers.append(Offer(hop.span.first, hop.span.last, wait_s + tokens * shape.send_row_s if sends else 0.0))
    for carrier in carriers:
        for start in {piece.first for piece in carrier.stage.pieces}:
            for span in runs_from(carrier.stage, start):
                room = kv_bytes(span, request.reserve_tokens, shape) <= carrier.kv_free_bytes
                if room and held.isdisjoint(range(span.first, span.last)):
                    offers.append(Offer(span.first, span.last, rebuild_s(carrier, span, tokens, shape, rules)))
    return least_s(offers, shape.layer_count)


def _search_within(
    request: RouteRequest, shape: ModelShape, usable: Sequence[Carrier], keep: Sequence[Hop], rules: RoutingRules,
    least: float,
) -> tuple[Hop, ...] | None:  # fmt: skip
    """The cheapest chain within the first limit that leaves one; with the kept hops' devices only where it must be."""
    kept = {hop.address.node for hop in keep}
    others = [carrier for carrier in usable if carrier.node not in kept]
    for limit_s in limits_from(least, rules.rebuild_limits_s) if request.rebuild_tokens else (math.inf,):
        for newcomers in (others, usable) if kept else (usable,):
            hops = _search(request, shape, usable, newcomers, keep, rules, limit_s)
            if hops is not None:
                return hops
    return None


def _search(
    request: RouteRequest,
    shape: ModelShape,
    carriers: Sequence[Carrier],
    newcomers: Sequence[Carrier],
    keep: Sequence[Hop],
    rules: RoutingRules,
    rebuild_max_s: float = math.inf,
) -> tuple[Hop, ...] | None:
    """The cheapest chain of the hops to keep and of `newcomers`, each of which comes once as such."""
    by_node = {carrier.node: carrier for carrier in carriers}
    forced: dict[int, tuple[Carrier, list[Span]]] = {
        hop.span.first: (by_node.get(hop.address.node, _unheard(hop, request)), [hop.span]) for hop in keep
    }
    free = _spans_by_start(newcomers, request, shape, sorted(forced), rules, rebuild_max_s)
    if not _joined(shape.layer_count, forced, free):
        return None
    start_max = {
        carrier.node: max((span.first for span in carrier.stage.pieces), default=0) for carrier in by_node.values()
    }
    heap: list[tuple[float, int, int, int, tuple[tuple[Carrier, Span], ...]]] = [(0.0, 0, 0, 0, ())]
    settled: dict[tuple[int, NodeId | None, NodeId | None], list[frozenset[NodeId]]] = {}
    reached: set[tuple[int, NodeId | None]] = set()
    pushed = popped = 0
    while heap:
        cost, hop_count, _, edge, path = heapq.heappop(heap)
        if edge == shape.layer_count:
            return _hops(path, keep)
        popped += 1
        first, last = (path[0][0].node, path[-1][0].node) if path else (None, None)
        late = popped > rules.labels_max or pushed > rules.pushes_max
        if late and (edge, last) in reached:
            continue
        reached.add((edge, last))
        known = settled.setdefault((edge, last, first), [])
        used = frozenset(carrier.node for carrier, span in path if span.first not in forced)
        still_matters = frozenset(node for node in used if start_max.get(node, 0) >= edge)
        if any(earlier <= still_matters for earlier in known):
            continue
        known.append(still_matters)
        options: Iterable[tuple[Carrier, list[Span]]] = [forced[edge]] if edge in forced else free.get(edge, ())
        for carrier, spans in options:
            if edge not in forced and carrier.node in used:
                continue
            for span in spans:
                if late and (span.last, carrier.node) in reached:
                    continue
                pushed += 1
                total = cost + hop_s(path, carrier, span, shape, request.origin, rules)
                if edge not in forced:
                    again_s = rebuild_s(carrier, span, request.rebuild_tokens, shape, rules)
                    total += again_s / rules.repaired_tokens
                heapq.heappush(heap, (total, hop_count + 1, pushed, span.last, (*path, (carrier, span))))
    return None


def _hops(path: Sequence[tuple[Carrier, Span]], keep: Sequence[Hop]) -> tuple[Hop, ...] | None:
    """The chain that was found, newcomers under the first visit that their devices have free; `None` if there is none,
    which takes a gateway that keeps more stages on a device than repairs leave there."""
    kept = {hop.span.first: hop.visit for hop in keep}
    taken = {(hop.address.node, hop.visit) for hop in keep}
    hops: list[Hop] = []
    for carrier, span in path:
        free = (visit for visit in range(VISITS_MAX) if (carrier.node, visit) not in taken)
        visit = kept.get(span.first, next(free, None))
        if visit is None:
            return None
        hops.append(Hop(address=carrier.address, span=span, visit=visit))
    return tuple(hops)


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
                and rebuild_s(carrier, span, request.rebuild_tokens, shape, rules) <= rebuild_max_s
            ]
            if spans:
                price = compute_s(carrier, Span(0, 1), shape, rules) + rules.hop_overhead_s / spans[-1].layer_count
                price += rebuild_s(carrier, spans[0], request.rebuild_tokens, shape, rules) / rules.repaired_tokens
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
