"""What a cell's coordinator works out every few seconds so that a chain can then be chosen quickly. Pure.

From a snapshot of the carriers of one model it derives

- *shares*: which hops carry the present load with the fewest hops (`routing_flow.py`), by kind of carrier, and among
  the carriers of a kind in proportion to their rate, their chance to stay and their KV room;
- *times*: for every carrier, what a hop would take with 1, 2, 3, … sessions on it: a wait for the call that runs, and
  seconds a layer at the batch that builds up;
- *prices*: what a layer of a scarce carrier's work is worth to sessions that cannot do without it (the flow's dual);
- *risks*: the chance that a carrier is gone before a session ends, times what a repair costs, spread over its tokens.

Times come from the closed loop that decoding is: each of s sessions is away for Z seconds (at other hops and on the
wire), then waits for a call and takes part in it. Arrivals are X = s / (Z + R) a second, a call that takes T(r) seconds
serves r = X * T(r) rows, at least 1, and the time at the carrier is R = T * (1 + busy / 2). With calls full (`ROWS_MAX`
rows) whoever finds no room waits for further calls: R = s * T / rows - Z.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.fleet import OUTLOOK_HORIZONS_S, Outlook
from fallow.domain.ids import NodeId
from fallow.domain.model import Span
from fallow.policy.flow import throughput_of_sets, throughput_of_spans
from fallow.policy.routing_cost import Carrier, ModelShape, RoutingRules, kv_bytes
from fallow.policy.routing_flow import HopFlow, Kind, fewest_hops
from fallow.policy.speed import ROWS_MAX, layer_s, layers_per_s

SESSIONS_TOLD_MAX = 48
"""Sessions on a carrier up to which times are worked out; beyond, the last two are drawn out."""
LOOP_ROUNDS = 12
ACTIVE_MIN = 0.1
"""At least this share of the open sessions is thought to compute."""
ROUND_ROUNDS = 4
LOAD_UNKNOWN = 0.85
LOAD_MIN = 0.8
"""Planned for at least this: a plan for less gives everything to the few devices with the longest spans, and a load
that grows finds them full."""
LOAD_MAX = 0.98
CALLS_WAITING = 1.8
"""Sessions on a carrier, in full calls, from which on more are asked for than it computes."""
HEADROOM_SHARE = 0.4
"""Of what a kind has left when all kinds are equally used, the share that stays free."""
RTTS_SAMPLED_MAX = 8
KV_SESSIONS_AMPLE = 4
"""A carrier with room for so many sessions is not spared for its room."""
PARTS_EXACT_MAX = 12

Floats = NDArray[np.float64]


class Draw(msgspec.Struct, frozen=True):
    """What may follow at an edge: `spans[i]` on some carrier of `kinds[i]`, by cumulative weight."""

    cumulative: tuple[float, ...]
    kinds: tuple[int, ...]
    spans: tuple[Span, ...]


class Members(msgspec.Struct, frozen=True):
    """The carriers of a kind, by cumulative weight."""

    cumulative: tuple[float, ...]
    nodes: tuple[NodeId, ...]
    pieces: tuple[Span, ...]


class Times(msgspec.Struct, frozen=True):
    """What a hop on a carrier takes, by the number of sessions on it, the new one included (index 0: one)."""

    wait_s: tuple[float, ...]
    layer_s: tuple[float, ...]
    full_s: float
    """What each session more adds once calls are full."""
    away_s: float
    risk_s: float
    price_s: float
    """What a layer of its work is worth to the others, in seconds: the flow's price, a hop taken for what it takes."""

    def hop_s(self, sessions: int, layers: float) -> float:
        """What a session that joins `sessions` others costs a token, for `layers` layers of work: seconds, and the
        price of the work."""
        index = min(sessions, len(self.wait_s) - 1)
        layers_s = layers * self.layer_s[index]
        own_s = layers_s + layers * self.price_s + self.risk_s
        if sessions == index:
            return self.wait_s[index] + own_s
        return max(self.wait_s[index], sessions * self.full_s - self.away_s - layers_s) + own_s


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, for one model."""

    draws: dict[int, Draw]
    """By the layer at which a hop starts."""
    kinds: tuple[Members, ...]
    times: dict[NodeId, Times]
    rows_per_s_max: float
    """What the carriers can serve at most."""
    load: float
    """The share of it that was thought to be asked for."""
    hops_mean: float
    flow: HopFlow


def survival(outlook: Outlook | None, ahead_s: float) -> float:
    """The chance that a device is here after `ahead_s`: its outlook, with a constant hazard between the horizons."""
    if outlook is None or not outlook.survival:
        return 1.0
    before_s, before = 0.0, 1.0
    for horizon_s, chance in zip(OUTLOOK_HORIZONS_S, outlook.survival, strict=False):
        held = min(max(chance, 0.0), before)
        if ahead_s <= horizon_s:
            return float(before * (held / before) ** ((ahead_s - before_s) / (horizon_s - before_s))) if before else 0.0
        before_s, before = horizon_s, held
    return before


def risk_s(carrier: Carrier, rules: RoutingRules) -> float:
    """What the chance of a loss costs a token."""
    return (1.0 - survival(carrier.outlook, rules.session_s)) * rules.repair_s / rules.session_tokens


def weigh(
    shape: ModelShape,
    carriers: Sequence[Carrier],
    rules: RoutingRules,
    visits_lately: Mapping[NodeId, float] | None = None,
) -> Weights | None:
    """Weights for the carriers as they are; `None` when they cannot serve the model at all.

    `visits_lately`: layers of work of a session's visit to a carrier, where that is known.
    """
    ordered = sorted(carriers, key=lambda carrier: carrier.node)
    groups: dict[tuple[Span, ...], list[Carrier]] = {}
    for carrier in ordered:
        groups.setdefault(carrier.stage.pieces, []).append(carrier)
    rates = [sum(_rate(carrier, rules) for carrier in group) for group in groups.values()]
    work = [1.0] * shape.layer_count
    work[-1] += shape.head_layers
    most = _rows_per_s(tuple(groups), rates, work)
    if most <= 0:
        return None
    lately = {node: layers for node, layers in (visits_lately or {}).items() if layers > 0}
    visits = _mean_visit(tuple(groups), groups, None, work) | lately
    load = _load(ordered, visits, most, sum(work), rules)
    cap_share = load + (1.0 - load) * (1.0 - HEADROOM_SHARE)
    kinds = [Kind(pieces, rate * cap_share) for pieces, rate in zip(groups, rates, strict=True)]
    flow = fewest_hops(kinds, work, most * load)
    if not len(flow.share):
        return None
    visits = _mean_visit(tuple(groups), groups, flow, work) | lately
    members = tuple(_members(pieces, group, shape, rules) for pieces, group in groups.items())
    return Weights(
        draws=_draws(flow),
        kinds=members,
        times=_times(ordered, visits, _shares(members, flow), _prices(members, flow), _whole(flow), rules),
        rows_per_s_max=most,
        load=load,
        hops_mean=flow.hops_mean,
        flow=flow,
    )


def _rate(carrier: Carrier, rules: RoutingRules) -> float:
    return layers_per_s(carrier.speed, rules.layer_unknown_s)


def _rows_per_s(pieces: Sequence[tuple[Span, ...]], rates: Sequence[float], work: Sequence[float]) -> float:
    """The most rows a second. For many parts and carriers with gaps, as if each held all between its ends: a bound."""
    edges = sorted({0, len(work), *(edge for held in pieces for span in held for edge in (span.first, span.last))})
    edges = [edge for edge in edges if edge <= len(work)]
    at = {edge: index for index, edge in enumerate(edges)}
    known = [[span for span in held if span.last in at] for held in pieces]
    parts = np.add.reduceat(np.array(work), edges[:-1])
    if len(parts) > PARTS_EXACT_MAX:
        ends = [(at[held[0].first], at[held[-1].last]) if held else (0, 0) for held in known]
        first, last = np.array(ends).T
        return float(throughput_of_spans(first, last, rates, parts).rows_per_s)
    holds = np.zeros((len(pieces), len(parts)), np.bool_)
    for row, held in zip(holds, known, strict=True):
        for span in held:
            row[at[span.first] : at[span.last]] = True
    return float(throughput_of_sets(holds, rates, parts).rows_per_s)


def _mean_visit(
    kinds: Sequence[tuple[Span, ...]],
    groups: Mapping[tuple[Span, ...], Sequence[Carrier]],
    flow: HopFlow | None,
    work: Sequence[float],
) -> dict[NodeId, float]:
    """Layers of work of a session's visit, by carrier: as the flow has it, or all that the carrier holds."""
    done = np.concatenate(([0.0], np.cumsum(work)))
    found: dict[NodeId, float] = {}
    for index, pieces in enumerate(kinds):
        layers = float(sum(done[min(p.last, len(work))] - done[min(p.first, len(work))] for p in pieces))
        if flow is not None and (mine := flow.kind == index).any():
            edges = np.array(flow.edges)
            visits = done[edges[flow.end[mine]]] - done[edges[flow.start[mine]]]
            layers = float((visits * flow.share[mine]).sum() / flow.share[mine].sum())
        found |= dict.fromkeys((carrier.node for carrier in groups[pieces]), layers)
    return found


def _load(
    carriers: Sequence[Carrier], visits: Mapping[NodeId, float], rows_per_s: float, layers: float, rules: RoutingRules
) -> float:
    """The share of `rows_per_s` that is asked for: by the rows that the carriers say they compute, or, if that is more,
    by the sessions that are open: when every carrier has `CALLS_WAITING` full calls of them, besides those on the wire,
    no more can be served, whatever is computed now."""
    told = sum(carrier.tokens_per_s * visits[carrier.node] for carrier in carriers) / layers
    sessions = sum(carrier.sessions * visits[carrier.node] for carrier in carriers) / layers
    if told <= 0:
        return LOAD_UNKNOWN
    hops = layers * len(carriers) / sum(visits.values())
    on_wire = rows_per_s * hops * (rules.hop_overhead_s + _rtt_mean_s(carriers, rules) / 2)
    load = max(told / rows_per_s, sessions / (CALLS_WAITING * ROWS_MAX * len(carriers) + on_wire))
    return min(max(load, LOAD_MIN), LOAD_MAX)


def _draws(flow: HopFlow) -> dict[int, Draw]:
    found: dict[int, Draw] = {}
    for start in sorted(set(flow.start.tolist())):
        mine = np.flatnonzero(flow.start == start)
        found[flow.edges[start]] = Draw(
            tuple(accumulate(flow.share[mine].tolist())),
            tuple(flow.kind[mine].tolist()),
            tuple(Span(flow.edges[start], flow.edges[end]) for end in flow.end[mine].tolist()),
        )
    return found


def _members(pieces: tuple[Span, ...], group: Sequence[Carrier], shape: ModelShape, rules: RoutingRules) -> Members:
    layers = Span(0, sum(piece.layer_count for piece in pieces))
    ample = max(kv_bytes(layers, rules.session_tokens, shape) * KV_SESSIONS_AMPLE, 1)
    weights = [
        _rate(carrier, rules)
        * max(survival(carrier.outlook, rules.session_s), 1e-3)
        * min(max(carrier.kv_free_bytes / ample, 1e-3), 1.0)
        for carrier in group
    ]
    return Members(tuple(accumulate(weights)), tuple(carrier.node for carrier in group), pieces)


def _shares(kinds: Sequence[Members], flow: HopFlow) -> dict[NodeId, float]:
    """Which share of the sessions the flow sends over each carrier."""
    of_kind = np.bincount(flow.kind, weights=flow.share, minlength=len(kinds)).tolist()
    found: dict[NodeId, float] = {}
    for members, share in zip(kinds, of_kind, strict=True):
        before = 0.0
        for node, cumulative in zip(members.nodes, members.cumulative, strict=True):
            found[node] = share * (cumulative - before) / members.cumulative[-1]
            before = cumulative
    return found


def _prices(kinds: Sequence[Members], flow: HopFlow) -> dict[NodeId, float]:
    """The flow's price of a layer of work, by carrier."""
    prices = flow.price.tolist()
    return {node: price for members, price in zip(kinds, prices, strict=True) for node in members.nodes}


def _whole(flow: HopFlow) -> float:
    """Which share of the sessions the flow sends to one device that is the whole chain."""
    return float(flow.share[(flow.start == 0) & (flow.end == len(flow.edges) - 1)].sum())


# --- times ----------------------------------------------------------------------------------------


def _times(
    carriers: Sequence[Carrier],
    visits: Mapping[NodeId, float],
    shares: Mapping[NodeId, float],
    prices: Mapping[NodeId, float],
    whole: float,
    rules: RoutingRules,
) -> dict[NodeId, Times]:
    points = np.array(
        [[layer_s(carrier.speed, rows, rules.layer_unknown_s) for rows in (1, 4, 8, ROWS_MAX)] for carrier in carriers]
    )
    visit = np.array([visits[carrier.node] for carrier in carriers])
    now = np.array([carrier.sessions for carrier in carriers], np.float64)
    share = np.array([shares.get(carrier.node, 0.0) for carrier in carriers])
    away_s, active, hop_s = _round(carriers, points, visit, now, share, whole, rules)
    told = np.arange(min(max(int(now.max(initial=0.0)) + 2, 8), SESSIONS_TOLD_MAX), dtype=np.float64)
    stay_s, batch_layer_s = _at_hop(points, visit, 1.0 + active * told[None, :], away_s[:, None])
    wait_s = np.maximum(stay_s - batch_layer_s * visit[:, None], 0.0)
    full_s = active * points[:, 3] * visit / ROWS_MAX
    return {
        carrier.node: Times(
            tuple(wait_s[index].tolist()),
            tuple(batch_layer_s[index].tolist()),
            float(full_s[index]),
            float(away_s[index]),
            risk_s(carrier, rules),
            prices[carrier.node] * hop_s,
        )
        for index, carrier in enumerate(carriers)
    }


def _round(
    carriers: Sequence[Carrier], points: Floats, visit: Floats, now: Floats, share: Floats, whole: float,
    rules: RoutingRules,
) -> tuple[Floats, float, float]:  # fmt: skip
    """Z of every carrier, which share of the open sessions compute, and what a hop takes beside its compute.

    A token's round is its hops' wire and stay, averaged as the flow uses the carriers: a ring has as many ways as hops,
    but for a chain of one device, which has none. Where fewer rows are computed than the sessions would ask for, the
    others are conversations that rest between two questions.
    """
    ways = 1.0 - min(whole / max(float(share.sum()), 1e-9), 1.0)
    wire_s = rules.hop_overhead_s + ways * _rtt_mean_s(carriers, rules) / 2
    stay_s = points[:, 0] * visit
    told = sum(carrier.tokens_per_s for carrier in carriers)
    active = 1.0
    away_s, per_layer_s = stay_s, points[:, 0]
    for _ in range(ROUND_ROUNDS):
        round_s = float((share * (wire_s + stay_s)).sum())
        away_s = np.maximum(round_s - stay_s, wire_s)
        found_s, found_layer_s = _at_hop(points, visit, np.maximum(active * now, 1.0)[:, None], away_s[:, None])
        stay_s, per_layer_s = 0.5 * stay_s + 0.5 * found_s[:, 0], found_layer_s[:, 0]
        asked = float((now / (away_s + stay_s)).sum())
        active = min(max(told / asked, ACTIVE_MIN), 1.0) if told > 0 and asked > 0 else 1.0
    call_s = visit * per_layer_s
    wait_s = float((share * np.maximum(stay_s - call_s, 0.0)).sum() / max(float(share.sum()), 1e-9))
    return away_s, active, wire_s + wait_s


def _at_hop(points: Floats, visit: Floats, sessions: Floats, away_s: Floats) -> tuple[Floats, Floats]:
    """Seconds at a carrier and seconds a layer of its calls: the closed loop of the module's docstring.

    `points` [n, 4]: seconds a layer at 1, 4, 8 and `ROWS_MAX` rows; `sessions`, `away_s` broadcast to [n, k].
    """
    layers = visit[:, None]
    stay_s = layers * points[:, :1] + 0.0 * sessions
    rows = np.ones_like(stay_s)
    per_layer_s = stay_s / layers
    for _ in range(LOOP_ROUNDS):
        arrivals = sessions / (away_s + stay_s)
        wanted = arrivals * layers * per_layer_s
        rows = 0.5 * rows + 0.5 * np.clip(wanted, 1.0, ROWS_MAX)
        per_layer_s = _between(points, rows)
        call_s = layers * per_layer_s
        busy = np.minimum(arrivals * call_s / rows, 1.0)
        stay_s = 0.5 * stay_s + 0.5 * np.maximum(call_s * (1.0 + busy / 2), sessions * call_s / ROWS_MAX - away_s)
    return stay_s, per_layer_s


def _between(points: Floats, rows: Floats) -> Floats:
    one, four, eight, most = (points[:, index : index + 1] for index in range(4))
    return np.asarray(
        one
        + (four - one) * (np.clip(rows, 1, 4) - 1) / 3
        + (eight - four) * (np.clip(rows, 4, 8) - 4) / 4
        + (most - eight) * (np.clip(rows, 8, ROWS_MAX) - 8) / (ROWS_MAX - 8),
        np.float64,
    )


def _rtt_mean_s(carriers: Sequence[Carrier], rules: RoutingRules) -> float:
    seen = [rtt for carrier in carriers for rtt in list(carrier.link_rtt_s.values())[:RTTS_SAMPLED_MAX]]
    return float(np.mean(seen)) if seen else rules.rtt_unknown_s
