"""How long a repair takes: the least limit that can be kept is found; what is promised or computed anyhow counts."""

import math
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.coordinator.router import Router
from fallow.domain.fleet import Hop
from fallow.domain.model import Span
from fallow.policy.rebuild import BUSY_MAX, Offer, busy_share, least_s, limits_from, newcomer_s
from fallow.policy.routing import RoutingRules, route
from tests.unit.policy.routing_world import SHAPE, carrier, node_id, request

LAYERS = 6
times = st.sampled_from([0.0, 0.5, 1.0, 3.0, 8.0])
offers_drawn = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS), times).filter(lambda o: o[0] < o[1]), max_size=9
)


def every_way(offers: Sequence[Offer], edge: int = 0) -> list[float]:
    if edge == LAYERS:
        return [0.0]
    return [max(o.takes_s, rest) for o in offers if o.first == edge for rest in every_way(offers, o.last)]


@given(offers_drawn)
def test_the_least_of_the_longest_times_is_found(drawn: list[tuple[int, int, float]]) -> None:
    offers = [Offer(*each) for each in drawn]
    assert least_s(offers, LAYERS) == min(every_way(offers), default=math.inf)


@given(times, st.lists(st.floats(0.1, 10), unique=True).map(sorted))
def test_no_limit_is_tried_that_cannot_be_kept(least: float, ladder: list[float]) -> None:
    tried = list(limits_from(least, ladder))
    assert tried == [limit for limit in ladder if limit >= least] + [math.inf]


@given(st.integers(1, 2000), st.integers(1, 32), st.floats(1e-4, 0.01), st.floats(0, 0.01), st.floats(0, 1))
def test_a_rebuild_is_never_faster_than_the_line_or_than_on_an_idle_device(
    tokens: int, layers: int, row_s: float, send_s: float, busy: float
) -> None:
    takes_s = newcomer_s(tokens, layers, row_s, send_s, sessions=2, busy=busy)
    assert takes_s >= tokens * send_s
    idle_s = newcomer_s(tokens, layers, row_s, send_s, sessions=0, busy=0.0)
    assert takes_s >= idle_s >= tokens * layers * row_s * (1 - 1e-9)
    assert 0 <= busy_share(busy * 1e4, layers, row_s) <= BUSY_MAX


def test_who_computes_much_already_gets_less_to_rebuild() -> None:
    crowd = [carrier(0, 0, 6), carrier(1, 0, 6)]
    crowd[0] = msgspec.structs.replace(crowd[0], busy_share=0.7)
    asked = msgspec.structs.replace(request(0), rebuild_tokens=2000)
    layers = {hop.address.node: hop.span.layer_count for hop in route(asked, SHAPE, crowd).hops}
    assert layers.get(node_id(0), 0) <= 4 < layers[node_id(1)]


def test_repairs_of_one_moment_are_shared_by_all() -> None:
    carriers = {node_id(index): carrier(index, 0, 6) for index in range(5)}
    router = Router(RoutingRules(), 1.0)
    layers = dict.fromkeys(carriers, 0)
    for session in range(5):
        asked = msgspec.structs.replace(request(session), rebuild_tokens=500)
        for hop in router.route(asked, SHAPE, carriers, 10.0).hops:
            layers[hop.address.node] += hop.span.layer_count
    assert max(layers.values()) <= 2 * min(layers.values())


def test_who_must_resend_for_others_already_is_given_up() -> None:
    """The first layers live on a device whose line is taken for long: computing them anew elsewhere is sooner."""
    shape = msgspec.structs.replace(SHAPE, send_row_s=0.003)
    kept = Hop(address=carrier(0, 0, 3).address, span=Span(0, 6))
    crowd = [carrier(0, 0, 3), *(carrier(index, 0, 3) for index in (1, 2)), carrier(3, 3, 6)]
    asked = msgspec.structs.replace(request(0), keep=(kept,), rebuild_tokens=500)
    assert route(asked, shape, crowd).hops[0] == kept
    crowd[0] = msgspec.structs.replace(crowd[0], rebuild_wait_s=20.0)
    assert route(asked, shape, crowd).hops[0] != kept
