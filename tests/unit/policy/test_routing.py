"""Routing over drawn fleets: lawful chains, never worse than trying them all; and the cases that people ask about."""

import math
import random
from collections.abc import Iterator, Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import Hop, RouteReply, RouteRequest, Speed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, compute_s, kv_bytes, rebuild_s, route, rtt_s
from fallow.policy.speed import layer_s

MODEL = Digest("ab" * 32)
RULES = RoutingRules()
SHAPE = ModelShape(layer_count=6, kv_bytes_per_token_layer=1, head_layers=2.0)
PIECES = (Span(0, 1), Span(1, 3), Span(3, 4), Span(4, 6))


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def carrier(index: int, *pieces: Span, seconds: float = 0.001, sessions: int = 0, kv_free: int = 10**6) -> Carrier:
    return Carrier(
        address=PeerAddress(node_id(index), ()),
        stage=StageSpec(model=MODEL, pieces=pieces),
        speed=Speed(layer_s_1=seconds, layer_s_4=2 * seconds, layer_s_8=3 * seconds),
        sessions=sessions,
        kv_free_bytes=kv_free,
    )


def request(*keep: Hop, exclude: Sequence[int] = (), tokens: int = 10) -> RouteRequest:
    return RouteRequest(
        model=MODEL,
        session=SessionId("cd" * 16),
        reserve_tokens=tokens,
        exclude=tuple(map(node_id, exclude)),
        keep=keep,
    )


def hop(item: Carrier, span: Span) -> Hop:
    return Hop(address=item.address, span=span)


@st.composite
def carriers_drawn(draw: st.DrawFn) -> list[Carrier]:
    count = draw(st.integers(0, 4))
    rtts = st.dictionaries(st.integers(0, 3).map(node_id), st.sampled_from([0.0, 0.001, 0.05]), max_size=4)
    found: list[Carrier] = []
    for index in range(count):
        pieces = draw(st.sets(st.sampled_from(PIECES), min_size=1))
        item = carrier(
            index,
            *sorted(pieces),
            seconds=draw(st.sampled_from([0.001, 0.002, 0.02])),
            sessions=draw(st.integers(0, 12)),
            kv_free=draw(st.sampled_from([0, 25, 10**6])),
        )
        found.append(msgspec.structs.replace(item, link_rtt_s=draw(rtts)))
    return found


def every_chain(
    carriers: Sequence[Carrier], asked: RouteRequest, path: tuple[tuple[Carrier, Span], ...] = ()
) -> Iterator[tuple[tuple[Carrier, Span], ...]]:
    edge = path[-1][1].last if path else 0
    if edge == SHAPE.layer_count:
        yield path
        return
    for item in carriers:
        if item.node in asked.exclude or any(item is used for used, _ in path):
            continue
        for last in range(edge + 1, SHAPE.layer_count + 1):
            span = Span(edge, last)
            if item.stage.pieces_of(span) and kv_bytes(span, asked.reserve_tokens, SHAPE) <= item.kv_free_bytes:
                yield from every_chain(carriers, asked, (*path, (item, span)))


def cost_s(path: Sequence[tuple[Carrier, Span]], origin: NodeId | None = None) -> float:
    """What a token pays, said anew: every hop's work, the ring of half round trips, and the gateway's share."""
    total = sum(RULES.hop_overhead_s + compute_s(item, span, SHAPE, RULES) for item, span in path)
    around = zip(path, [*path[1:], path[0]], strict=True)
    total += sum(rtt_s(item, other, RULES) / 2 for (item, _), (other, _) in around)
    ends = [path[0][0], path[-1][0]]
    known = [item.link_rtt_s.get(origin, RULES.rtt_unknown_s) if origin else RULES.rtt_unknown_s for item in ends]
    return total + RULES.gateway_share * sum(known) / 2


def check_lawful(reply: RouteReply, carriers: Sequence[Carrier], asked: RouteRequest) -> None:
    by_node = {item.node: item for item in carriers}
    assert [layer for hop in reply.hops for layer in range(hop.span.first, hop.span.last)] == list(range(6))
    assert len({(hop.address.node, hop.visit) for hop in reply.hops}) == len(reply.hops)
    newcomers = [hop.address.node for hop in reply.hops if hop not in asked.keep]
    assert len(set(newcomers)) == len(newcomers), "only a kept hop's device comes twice"
    assert not {hop.address.node for hop in reply.hops} & set(asked.exclude)
    for step in reply.hops:
        item = by_node[step.address.node]
        assert item.stage.pieces_of(step.span)
        if step not in asked.keep:
            assert kv_bytes(step.span, asked.reserve_tokens, SHAPE) <= item.kv_free_bytes


@settings(max_examples=300, deadline=None)
@given(
    carriers=carriers_drawn(),
    exclude=st.sets(st.integers(0, 3), max_size=2),
    origin=st.sampled_from([None, node_id(3), node_id(9)]),
)
def test_the_chain_is_lawful_and_no_other_is_cheaper(
    carriers: list[Carrier], exclude: set[int], origin: NodeId | None
) -> None:
    asked = msgspec.structs.replace(request(exclude=sorted(exclude)), origin=origin)
    reply = route(asked, SHAPE, carriers, RULES)
    best = min((cost_s(path, origin) for path in every_chain(carriers, asked)), default=None)
    if best is None:
        assert reply.error is not None
        assert reply.hops == ()
        return
    check_lawful(reply, carriers, asked)
    by_node = {item.node: item for item in carriers}
    chosen = [(by_node[step.address.node], step.span) for step in reply.hops]
    assert math.isclose(cost_s(chosen, origin), best, rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_among_many_chains_none_is_cheaper_around_its_ring(seed: int) -> None:
    """Where there is a choice of three devices for every third, and their ways differ much."""
    dice, origin = random.Random(seed), node_id(9)
    crowd = []
    for index in range(9):
        rtts = {node_id(other): dice.choice([0.002, 0.01, 0.03, 0.06]) for other in range(10)}
        item = carrier(index, Span(index % 3 * 2, index % 3 * 2 + 2), seconds=dice.choice([0.001, 0.002]))
        crowd.append(msgspec.structs.replace(item, link_rtt_s=rtts))
    asked = msgspec.structs.replace(request(), origin=origin)
    found = [(crowd[int(step.address.node, 16)], step.span) for step in route(asked, SHAPE, crowd, RULES).hops]
    assert math.isclose(cost_s(found, origin), min(cost_s(path, origin) for path in every_chain(crowd, asked)))


@settings(max_examples=200, deadline=None)
@given(carriers=carriers_drawn(), dead=st.integers(0, 3))
def test_a_repair_keeps_what_lives_wherever_that_is_possible(carriers: list[Carrier], dead: int) -> None:
    first = route(request(), SHAPE, carriers, RULES)
    keep = tuple(step for step in first.hops if step.address.node != node_id(dead))
    asked = request(*keep, exclude=[dead])
    reply = route(asked, SHAPE, carriers, RULES)
    possible = [
        path
        for path in every_chain(carriers, request(exclude=[dead]))
        if all((step.address.node, step.span) in {(item.node, span) for item, span in path} for step in keep)
    ]
    if possible:
        assert set(keep) <= set(reply.hops)
    if reply.hops:
        check_lawful(reply, carriers, asked)


A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)


GATEWAY = node_id(99)


def linked(item: Carrier, **rtts_ms: int) -> Carrier:
    """With what it measured: to device `n7`, or to the `gateway`."""
    found = {GATEWAY if name == "gateway" else node_id(int(name[1:])): ms / 1e3 for name, ms in rtts_ms.items()}
    return msgspec.structs.replace(item, link_rtt_s=found)


def chosen(*carriers: Carrier) -> list[NodeId]:
    asked = msgspec.structs.replace(request(), origin=GATEWAY)
    return [step.address.node for step in route(asked, SHAPE, carriers, RULES).hops]


def test_one_device_pays_no_network_for_a_token() -> None:
    """Two that are nearer to their gateway, and compute faster, lose to a distant device that needs no way at all."""
    whole = linked(carrier(0, A, B, C, seconds=0.0015), gateway=100)
    near = linked(carrier(1, A, B), gateway=1, n0=20, n2=20), linked(carrier(2, C), gateway=1, n0=20)
    assert chosen(whole, *near) == [whole.node]


def test_of_two_chains_the_one_whose_last_device_is_nearer_to_its_first_wins() -> None:
    """However the gateway lies: the token goes from the last device to the first one, and not over the gateway."""
    first = linked(carrier(0, A), gateway=10, n1=10)
    middle = linked(carrier(1, B), gateway=10, n2=10, n3=10)
    near, far = linked(carrier(2, C), gateway=60, n0=4), linked(carrier(3, C), gateway=1, n0=40)
    assert chosen(first, middle, near, far) == [first.node, middle.node, near.node]


def test_the_first_device_is_chosen_by_the_way_back_to_it() -> None:
    """The cheaper way to the middle is the dearer ring: labels with different first devices must both live."""
    cheap, dear = linked(carrier(0, A), gateway=1, n2=2, n3=60), linked(carrier(1, A), gateway=1, n2=6, n3=2)
    middle, last = linked(carrier(2, B), n3=2), carrier(3, C)
    assert chosen(cheap, dear, middle, last) == [dear.node, middle.node, last.node]


def test_of_two_equal_chains_the_one_nearer_to_the_gateway_wins() -> None:
    far, near = linked(carrier(0, A, B, C), gateway=80), linked(carrier(1, A, B, C), gateway=10)
    assert chosen(far, near) == [near.node]


@given(st.sampled_from([-1.0, -1e9, math.nan, math.inf, 1e12]))
def test_a_way_to_the_gateway_that_cannot_be_is_not_believed(told_s: float) -> None:
    liar = msgspec.structs.replace(carrier(0, A, B, C, seconds=0.002), link_rtt_s={GATEWAY: told_s})
    assert chosen(liar, carrier(1, A, B, C)) == [node_id(1)]


def test_fewer_hops_win_when_the_rest_is_equal() -> None:
    reply = route(request(), SHAPE, [carrier(0, A), carrier(1, B), carrier(2, C), carrier(3, B, C)], RULES)
    assert [step.address.node for step in reply.hops] == [node_id(0), node_id(3)]


def test_a_much_faster_device_is_worth_a_hop() -> None:
    slow, fast = carrier(0, A, B, C, seconds=0.1), carrier(1, C, seconds=0.001)
    assert len(route(request(), SHAPE, [slow, fast], RULES).hops) == 2


def test_sessions_go_to_the_less_loaded_of_two_equals() -> None:
    busy, free = carrier(0, A, B, C, sessions=3), carrier(1, A, B, C, sessions=1)
    assert route(request(), SHAPE, [busy, free], RULES).hops[0].address.node == free.node


def test_a_device_with_separate_pieces_comes_once() -> None:
    """The cheapest walk would use device 0 for both ends; the chain must not."""
    both, middle, last = carrier(0, A, C), carrier(1, B), carrier(2, C, seconds=0.05)
    assert [s.address.node for s in route(request(), SHAPE, [both, middle, last], RULES).hops] == [
        both.node,
        middle.node,
        last.node,
    ]


def test_a_gap_is_filled_between_kept_hops() -> None:
    one, two, spare = carrier(0, A), carrier(1, C), carrier(2, A, B, C, seconds=0.02)
    keep = (hop(one, A), hop(two, C))
    assert route(request(*keep), SHAPE, [one, two, spare], RULES).hops == (keep[0], hop(spare, B), keep[1])


def test_a_kept_device_that_was_not_heard_of_yet_is_kept() -> None:
    spare = carrier(2, B, C)
    keep = hop(carrier(0, A), A)
    assert route(request(keep), SHAPE, [spare], RULES).hops == (keep, hop(spare, Span(2, 6)))


def test_a_gap_that_cannot_be_filled_gives_a_fresh_chain() -> None:
    one, two, three = carrier(0, A), carrier(1, C), carrier(2, Span(2, 6))
    reply = route(request(hop(one, A), hop(two, C)), SHAPE, [one, two, three], RULES)
    assert reply.hops == (hop(one, A), hop(three, Span(2, 6)))


def test_hops_to_keep_that_overlap_are_not_believed() -> None:
    whole = carrier(0, A, B, C)
    reply = route(request(hop(carrier(1, A, B), Span(0, 4)), hop(carrier(2, B), B)), SHAPE, [whole], RULES)
    assert reply.hops == (hop(whole, Span(0, 6)),)


def test_the_error_says_which_layers_nobody_holds() -> None:
    reply = route(request(exclude=[1]), SHAPE, [carrier(0, A), carrier(1, B), carrier(2, C)], RULES)
    assert reply.error is not None
    assert "2-3 of 6" in reply.error
    assert "1 left out" in reply.error


def test_the_error_says_when_there_is_no_room() -> None:
    reply = route(request(tokens=100), SHAPE, [carrier(0, A, B, C, kv_free=199)], RULES)
    assert reply.error is not None
    assert "no room" in reply.error
    assert route(request(tokens=100), SHAPE, [carrier(0, A, B, C, kv_free=600)], RULES).hops


def test_a_fleet_of_hundreds_is_searched_quickly() -> None:
    pieces = [Span(i, i + 1) for i in range(6)]
    fleet = [carrier(i, *pieces[i % 3 : i % 3 + 4], seconds=0.001 + i * 1e-6, sessions=i % 5) for i in range(300)]
    reply = route(request(), SHAPE, fleet, RULES)
    check_lawful(reply, fleet, request())


def test_the_speed_of_a_layer_goes_through_the_measured_points() -> None:
    speed = Speed(layer_s_1=1.0, layer_s_4=2.0, layer_s_8=4.0)
    assert [layer_s(speed, rows, 0.0) for rows in (1, 4, 6, 8, 16)] == [1.0, 2.0, 3.0, 4.0, 8.0]


@given(st.tuples(*[st.floats(0, 100)] * 3), st.integers(1, 100))
def test_more_rows_never_take_less_time_whatever_a_device_reports(
    figures: tuple[float, float, float], rows: int
) -> None:
    speed = Speed(layer_s_1=figures[0], layer_s_4=figures[1], layer_s_8=figures[2])
    assert 0 < layer_s(speed, rows, 0.001) <= layer_s(speed, rows + 1, 0.001) * (1 + 1e-12)


# --- repairs: the client waits while newcomers compute the conversation anew ------------------------

HALVES = (Span(0, 2), Span(2, 4), Span(4, 6))


def slow(index: int, *pieces: Span, sessions: int = 0) -> Carrier:
    """A second for 100 tokens on two layers: a sixteenth of what a call of 16 rows takes, for each row."""
    return carrier(index, *pieces, seconds=0.016, sessions=sessions)


def repaired(carriers: Sequence[Carrier], *keep: Hop, tokens: int) -> tuple[Hop, ...]:
    asked = msgspec.structs.replace(request(*keep), rebuild_tokens=tokens)
    return route(asked, SHAPE, carriers, RULES).hops


def test_a_long_conversation_is_rebuilt_by_many_and_a_short_one_by_few() -> None:
    carriers = [slow(9, *HALVES), *(slow(index, half) for index, half in enumerate(HALVES))]
    assert [hop.address.node for hop in repaired(carriers, tokens=1)] == [node_id(9)]
    assert [hop.address.node for hop in repaired(carriers, tokens=400)] == [node_id(0), node_id(1), node_id(2)]
    assert [hop.address.node for hop in repaired(carriers, tokens=100_000)] == [node_id(9)], "no limit can be kept"


def test_rebuilds_go_to_devices_that_have_none() -> None:
    rest = hop(slow(9, Span(2, 6)), Span(2, 6))
    crowd = [slow(0, Span(0, 2), sessions=3), slow(1, Span(0, 2))]
    (first, _) = repaired(crowd, rest, tokens=400)
    assert first.address.node == node_id(1)


@given(carriers_drawn(), st.integers(1, 5_000))
def test_a_limit_never_costs_the_chain(carriers: list[Carrier], tokens: int) -> None:
    found = repaired(carriers, tokens=tokens)
    anyhow = route(request(), SHAPE, carriers, RULES).hops
    assert bool(found) == bool(anyhow)
    by_node = {item.node: item for item in carriers}

    def slowest_s(hops: Sequence[Hop]) -> float:
        return max(rebuild_s(by_node[hop.address.node], hop.span, tokens, SHAPE, RULES) for hop in hops)

    if found:
        kept = [limit_s for limit_s in RULES.rebuild_limits_s if limit_s >= slowest_s(anyhow)]
        assert slowest_s(found) <= min(kept, default=math.inf)
