"""Weights and drawn chains over drawn cells: lawful, deterministic, spread, and not blind to queues or goodbyes."""

import random
from collections import Counter
from collections.abc import Iterator

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import Hop, Outlook, RouteReply
from fallow.domain.ids import NodeId
from fallow.policy.routing import Carrier, RoutingRules, route, rtt_s, runs_from
from fallow.policy.routing_choice import NOTHING_PROMISED, Promised, choose, choose_widely
from fallow.policy.routing_weights import LOAD_MIN, Weights, survival, weigh
from tests.unit.policy.routing_world import SHAPE, carrier, cells, check_lawful, node_id, request

RULES = RoutingRules()


def nothing(_: NodeId) -> Promised:
    return NOTHING_PROMISED


def weighed(carriers: dict[NodeId, Carrier]) -> Weights:
    weights = weigh(SHAPE, tuple(carriers.values()), RULES)
    assert weights is not None
    return weights


def draws(weights: Weights, carriers: dict[NodeId, Carrier], count: int) -> Counter[NodeId]:
    found: Counter[NodeId] = Counter()
    for session in range(count):
        hops = choose(request(session), SHAPE, carriers, nothing, weights, random.Random(session).random, RULES)
        assert hops is not None
        found.update(hop.address.node for hop in hops)
    return found


@settings(max_examples=80, deadline=None)
@given(carriers=cells(), exclude=st.sets(st.integers(0, 8), max_size=3), seed=st.integers(0, 1000))
def test_chosen_chains_are_lawful_and_the_same_for_the_same_draws(
    carriers: dict[NodeId, Carrier], exclude: set[int], seed: int
) -> None:
    weights = weigh(SHAPE, tuple(carriers.values()), RULES)
    asked = request(exclude=tuple(map(node_id, sorted(exclude))))
    if weights is None:
        assert route(asked, SHAPE, tuple(carriers.values()), RULES).error is not None
        return
    shuffled = list(carriers.values())
    random.Random(seed).shuffle(shuffled)
    again = weigh(SHAPE, shuffled, RULES)
    assert again is not None
    chosen = [
        choose(asked, SHAPE, carriers, nothing, w, random.Random(seed).random, RULES) for w in (weights, weights, again)
    ]
    assert chosen[0] == chosen[1] == chosen[2]
    widely = choose_widely(asked, SHAPE, carriers, nothing, weights, RULES)
    for hops in (chosen[0], widely):
        if hops is not None:
            check_lawful(RouteReply(hops=hops), carriers, asked)


@settings(max_examples=40, deadline=None)
@given(carriers=cells(), promised=st.integers(0, 10**6))
def test_what_is_promised_counts_against_the_room(carriers: dict[NodeId, Carrier], promised: int) -> None:
    weights = weigh(SHAPE, tuple(carriers.values()), RULES)
    if weights is None:
        return
    taken = Promised(sessions=3, kv_bytes=promised)
    for hops in (
        choose(request(), SHAPE, carriers, lambda _: taken, weights, random.Random(1).random, RULES),
        choose_widely(request(), SHAPE, carriers, lambda _: taken, weights, RULES),
    ):
        left = {
            node: msgspec.structs.replace(item, kv_free_bytes=item.kv_free_bytes - promised)
            for node, item in carriers.items()
        }
        if hops is not None:
            check_lawful(RouteReply(hops=hops), left, request())


def halves(**change: float) -> dict[NodeId, Carrier]:
    """Six carriers of the first half and six of the second; number 0 differs."""
    found = {node_id(index): carrier(index, *((0, 3) if index < 6 else (3, 6))) for index in range(12)}
    found[node_id(0)] = carrier(0, 0, 3, **change)  # type: ignore[arg-type]
    return found


def test_sessions_spread_over_equal_carriers() -> None:
    """And by weights alone: the same state for all of them."""
    carriers = halves()
    found = draws(weighed(carriers), carriers, 600)
    assert min(found.values()) > 50
    assert max(found.values()) < 160


def test_a_crowded_carrier_gets_fewer() -> None:
    carriers = halves(sessions=40)
    assert draws(weighed(carriers), carriers, 300)[node_id(0)] < 10


def two_halves(ends_ms: tuple[int, int]) -> dict[NodeId, Carrier]:
    """Eight first halves, all as far from two last halves as those are told to be on their way back to them."""
    links = {node_id(8 + end): ms / 1e3 for end, ms in enumerate(ends_ms)}
    firsts = {
        node_id(index): msgspec.structs.replace(carrier(index, 0, 3), link_rtt_s=links | {node_id(99): 0.01})
        for index in range(8)
    }
    lasts = {node_id(index): carrier(index, 3, 6) for index in (8, 9)}
    return firsts | lasts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_way_from_the_last_device_to_the_first_counts(session: int) -> None:
    """Also where the far one stands beside the gateway, over which the token does not go."""
    carriers = two_halves((4, 60))
    beside = msgspec.structs.replace(carriers[node_id(9)], link_rtt_s={node_id(99): 0.0})
    carriers[node_id(9)] = beside
    asked = msgspec.structs.replace(request(session), origin=node_id(99))
    hops = choose_widely(asked, SHAPE, carriers, nothing, weighed(carriers), RULES)
    assert hops is not None and hops[-1].address.node == node_id(8)


def ring_s(hops: tuple[Hop, ...], carriers: dict[NodeId, Carrier], origin: NodeId, weights: Weights) -> float:
    """What a token pays on a chain, said anew."""
    chain = [carriers[hop.address.node] for hop in hops]
    total = 0.0
    for hop, item, following in zip(hops, chain, [*chain[1:], chain[0]], strict=True):
        layers = hop.span.layer_count + (SHAPE.head_layers if hop.span.last == SHAPE.layer_count else 0.0)
        total += RULES.hop_overhead_s + weights.times[item.node].hop_s(item.sessions, layers)
        total += rtt_s(item, following, RULES) / 2
    ends = (chain[0], chain[-1])
    return total + RULES.gateway_share * sum(item.link_rtt_s.get(origin, RULES.rtt_unknown_s) for item in ends) / 2


def every_chain(carriers: dict[NodeId, Carrier], hops: tuple[Hop, ...] = ()) -> Iterator[tuple[Hop, ...]]:
    edge = hops[-1].span.last if hops else 0
    if edge == SHAPE.layer_count:
        yield hops
        return
    for node, item in carriers.items():
        if all(hop.address.node != node for hop in hops):
            for span in runs_from(item.stage, edge)[-1:]:
                yield from every_chain(carriers, (*hops, Hop(address=item.address, span=span)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_chain_of_three_is_cheaper_than_the_one_chosen_widely(seed: int) -> None:
    """Against all chains of three carriers that each compute all that they hold."""
    dice = random.Random(seed)
    carriers: dict[NodeId, Carrier] = {}
    for index in range(9):
        first = 2 * (index % 3)
        item = carrier(index, first, first + 2, seconds=dice.choice([0.001, 0.002]), sessions=dice.randrange(4))
        rtts = {node_id(other): dice.choice([0.002, 0.02, 0.08]) for other in (*range(9), 99) if other != index}
        carriers[node_id(index)] = msgspec.structs.replace(item, link_rtt_s=rtts)
    weights, origin = weighed(carriers), node_id(99)
    asked = msgspec.structs.replace(request(), origin=origin)
    hops = choose_widely(asked, SHAPE, carriers, nothing, weights, RULES)
    assert hops is not None
    best = min(ring_s(other, carriers, origin, weights) for other in every_chain(carriers))
    assert ring_s(hops, carriers, origin, weights) <= best * (1 + 1e-9)


def test_sessions_promised_since_the_heartbeat_count_as_sessions() -> None:
    carriers = halves()
    weights = weighed(carriers)

    def promised(node: NodeId) -> Promised:
        return Promised(sessions=40) if node == node_id(0) else NOTHING_PROMISED

    found: Counter[NodeId] = Counter()
    for session in range(200):
        hops = choose(request(session), SHAPE, carriers, promised, weights, random.Random(session).random, RULES)
        found.update(hop.address.node for hop in hops or ())
    assert found[node_id(0)] < 10


def test_a_carrier_that_is_about_to_go_gets_fewer() -> None:
    carriers = halves()
    going = msgspec.structs.replace(carriers[node_id(0)], outlook=Outlook(survival=(0.0,) * 5, expected_s=60.0))
    carriers[node_id(0)] = going
    assert draws(weighed(carriers), carriers, 300)[node_id(0)] < 20


def test_gone_and_changed_carriers_are_not_chosen_by_old_weights() -> None:
    carriers = halves()
    weights = weighed(carriers)
    del carriers[node_id(1)]
    carriers[node_id(2)] = carrier(2, 1, 3)
    found = draws(weights, carriers, 200)
    assert not found[node_id(1)] and not found[node_id(2)]


def test_scarce_carriers_are_left_to_those_who_need_them() -> None:
    """Only number 0 holds the first part; taking more of it than that would starve everybody, long run or not."""
    scarce = carrier(0, 0, 6, seconds=0.001)
    carriers = {node_id(index): carrier(index, 1, 6, seconds=0.002) for index in range(1, 12)} | {node_id(0): scarce}
    weights = weighed(carriers)
    spans = Counter[int]()
    for session in range(200):
        hops = choose(request(session), SHAPE, carriers, nothing, weights, random.Random(session).random, RULES)
        assert hops is not None
        spans[hops[0].span.last] += 1
    assert spans[2] > 150, spans


def test_a_cell_that_is_hardly_used_is_planned_for_more() -> None:
    """A plan for what is asked now would leave those who come next to devices that are full already."""
    idle = {node: msgspec.structs.replace(item, tokens_per_s=0.1) for node, item in halves().items()}
    assert weighed(idle).load == LOAD_MIN


def test_a_device_that_is_a_whole_chain_waits_for_no_wire() -> None:
    near = {node_id(index): carrier(index, 0, 6, sessions=4) for index in range(9)}
    links = dict.fromkeys(near, 0.5)
    far = {node: msgspec.structs.replace(item, link_rtt_s=links) for node, item in near.items()}
    assert weighed(far).times == weighed(near).times
    ring = {
        node_id(index): msgspec.structs.replace(carrier(index, index % 2 * 3, index % 2 * 3 + 3), link_rtt_s=links)
        for index in range(10)
    }
    assert weighed(ring).times[node_id(0)].away_s > 0.25 > weighed(near).times[node_id(0)].away_s


def test_survival_follows_the_outlook_with_a_constant_hazard_between_horizons() -> None:
    outlook = Outlook(survival=(0.81, 0.5, 0.4, 0.2, 0.0), expected_s=3600.0)
    assert survival(None, 120.0) == 1.0
    assert abs(survival(outlook, 300.0) - 0.9) < 1e-9
    assert abs(survival(outlook, 600.0) - 0.81) < 1e-9
    assert survival(outlook, 10**6) == 0.0
    assert survival(Outlook(survival=(0.0,) * 5, expected_s=0.0), 1.0) == 0.0
