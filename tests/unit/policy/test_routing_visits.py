"""Repairs that come to a device again: whatever lives is kept where that is possible at all, and nothing is promised
twice."""

from collections.abc import Iterator, Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.coordinator.recent import RecentRoutes
from fallow.domain.fleet import Hop
from fallow.domain.ids import VISITS_MAX, NodeId, SessionId
from fallow.domain.model import Span
from fallow.policy.routing import Carrier, kv_bytes, route, rtt_s
from tests.unit.policy.test_routing import RULES, SHAPE, A, B, C, carrier, carriers_drawn, hop, node_id, request

BC = Span(2, 6)


def fillings(
    carriers: Sequence[Carrier], keep: Sequence[Hop], tokens: int, edge: int = 0
) -> Iterator[tuple[NodeId, ...]]:
    """The newcomers of every chain that has the hops to keep as they are, each of them once."""
    if edge == SHAPE.layer_count:
        yield ()
        return
    kept = next((step for step in keep if step.span.first == edge), None)
    if kept is not None:
        yield from fillings(carriers, keep, tokens, kept.span.last)
        return
    wall = min((step.span.first for step in keep if step.span.first > edge), default=SHAPE.layer_count)
    for item in carriers:
        for last in range(edge + 1, wall + 1):
            span = Span(edge, last)
            if item.stage.pieces_of(span) and kv_bytes(span, tokens, SHAPE) <= item.kv_free_bytes:
                for others in fillings(carriers, keep, tokens, last):
                    if item.node not in others:
                        yield (item.node, *others)


@settings(max_examples=100, deadline=None)
@given(
    carriers=carriers_drawn(), dead=st.sets(st.integers(0, 3), min_size=1, max_size=2), tokens=st.sampled_from([0, 90])
)
def test_no_cache_is_given_up_that_could_be_kept(carriers: list[Carrier], dead: set[int], tokens: int) -> None:
    first = route(request(), SHAPE, carriers, RULES)
    keep = tuple(step for step in first.hops if step.address.node not in {node_id(index) for index in dead})
    asked = msgspec.structs.replace(request(*keep, exclude=sorted(dead)), rebuild_tokens=tokens)
    living = [item for item in carriers if item.node not in asked.exclude]
    hops = route(asked, SHAPE, carriers, RULES).hops
    ways = list(fillings(living, keep, asked.reserve_tokens)) if keep else []
    if ways and not tokens:
        assert set(keep) <= set(hops)
    if not set(keep) <= set(hops):
        return
    newcomers = [step for step in hops if step not in keep]
    kept_nodes = {step.address.node for step in keep}
    again = [step for step in newcomers if step.address.node in kept_nodes]
    assert all(step.visit > 0 for step in again)
    assert all(step.visit == 0 for step in newcomers if step not in again)
    if not tokens and any(kept_nodes.isdisjoint(way) for way in ways):
        assert not again, "other devices first"


def test_a_lost_middle_is_taken_by_a_neighbour_that_keeps_its_own() -> None:
    first, middle, last = carrier(0, A, B), carrier(1, B), carrier(2, C)
    asked = request(hop(first, A), hop(last, C), exclude=[1])
    hops = route(asked, SHAPE, [first, middle, last], RULES).hops
    assert hops == (hop(first, A), msgspec.structs.replace(hop(first, B), visit=1), hop(last, C))


def test_a_device_comes_a_third_time_under_a_third_name() -> None:
    """And what is named for a visit stays so, whatever the order in the chain."""
    whole, other = carrier(0, A, B, C), carrier(1, B)
    again = msgspec.structs.replace(hop(whole, A), visit=1)
    hops = route(request(again, hop(whole, C), exclude=[1]), SHAPE, [whole, other], RULES).hops
    assert hops == (again, msgspec.structs.replace(hop(whole, B), visit=2), hop(whole, C))


def test_a_gateway_that_keeps_more_stages_than_a_device_may_have_gets_a_fresh_chain() -> None:
    shape = msgspec.structs.replace(SHAPE, layer_count=VISITS_MAX + 1)
    layers = [Span(first, first + 1) for first in range(VISITS_MAX + 1)]
    item = carrier(0, *layers)
    keep = [msgspec.structs.replace(hop(item, layers[at]), visit=at) for at in range(VISITS_MAX)]
    hops = route(request(*keep), shape, [item], RULES).hops
    assert hops == (hop(item, Span(0, VISITS_MAX + 1)),)


def test_there_is_no_way_from_a_device_to_itself() -> None:
    item, other = carrier(0, A), carrier(1, B)
    assert rtt_s(item, item, RULES) == 0.0 < rtt_s(item, other, RULES)


def test_room_for_a_further_stage_is_promised_beside_the_first() -> None:
    item, other = carrier(0, A, B, C), carrier(1, B, C)
    recent = RecentRoutes(1.0)
    asked, stranger = request(tokens=10), SessionId("f" * 32)
    recent.add(asked, (hop(item, A), hop(other, BC)), SHAPE, 0.0)
    again = msgspec.structs.replace(hop(item, BC), visit=1)
    recent.add(request(hop(item, A), tokens=10), (hop(item, A), again), SHAPE, 0.1)
    assert recent.promised(stranger)(item.node).kv_bytes == kv_bytes(A, 10, SHAPE) + kv_bytes(BC, 10, SHAPE)
    assert recent.promised(asked.session)(item.node).kv_bytes == 0
    recent.settle(item.node, 1.2)
    assert recent.promised(stranger)(item.node).kv_bytes == 0
