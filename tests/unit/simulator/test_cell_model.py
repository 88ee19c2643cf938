"""The model of a decoding cell does the arithmetic that its docstring promises."""

from collections.abc import Mapping

import numpy as np
import pytest

from fallow.domain.fleet import Hop, RouteReply, RouteRequest, Speed
from fallow.domain.ids import NodeId
from fallow.domain.model import Span
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, kv_bytes, route
from fallow.simulator.cell_model import Asked, CellModel, Machine

SHAPE = ModelShape(layer_count=4, kv_bytes_per_token_layer=1)
SPEED = Speed(layer_s_1=0.01, layer_s_4=0.017, layer_s_8=0.026)
HALVES = (Span(0, 2), Span(2, 4))


def dijkstra(request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> RouteReply:
    return route(request, SHAPE, tuple(carriers.values()), RoutingRules())


def cell(*held: tuple[Span, ...], kv: int = 10**6, rtt_s: float = 0.1) -> CellModel:
    side = len(held) + 1
    rtt = np.full((side, side), rtt_s) * (1 - np.eye(side))
    machines = [Machine(speed=SPEED, pieces=pieces, kv_bytes=kv) for pieces in held]
    return CellModel(machines, rtt, SHAPE, dijkstra, reserve_tokens=10, heartbeat_s=1.0)


def test_one_session_takes_compute_and_wires() -> None:
    """The first token comes from the gateway and goes back to it; those after it go around the ring."""
    model = cell(HALVES[:1], HALVES[1:])
    model.offer(0.0, Asked(0, 3))
    model.run(10.0)
    assert model.seen.token_s == pytest.approx([0.04 + 0.15, 0.04 + 0.1, 0.04 + 0.1])
    assert (model.seen.finished, model.seen.hops_mean) == (1, 2.0)
    assert set(model.kv_free().values()) == {10**6}


def test_one_device_goes_on_without_a_wire() -> None:
    model = cell(HALVES)
    model.offer(0.0, Asked(0, 3))
    model.run(10.0)
    assert model.seen.token_s == pytest.approx([0.04 + 0.1, 0.04, 0.04])


def test_rows_that_wait_together_share_a_call() -> None:
    """The first row goes alone; the three that come meanwhile share the next call of that part, and so on."""
    model = cell(HALVES, rtt_s=0.0)
    for _ in range(4):
        model.offer(0.0, Asked(0, 1))
    model.run(10.0)
    three = 0.01 + 0.007 * 2 / 3
    # First part: one row, then three; second part: the first row goes on between, as parts take turns.
    assert sorted(model.seen.token_s) == pytest.approx([0.04, *[0.02 + 0.02 + 4 * three] * 3])


def test_a_device_that_comes_twice_takes_room_twice_and_gives_both_back() -> None:
    """The first dies; of the others, one goes on with its own layers and takes the lost ones besides."""
    thirds = (Span(0, 1), Span(1, 3), Span(3, 4))
    model = cell((thirds[0],), (thirds[1],), (thirds[0], thirds[2]))
    model.offer(0.0, Asked(0, 40))
    model.at(1.0, lambda: model.fail(0))
    model.at(1.1, lambda: model.change(0, Machine(speed=SPEED, pieces=(), kv_bytes=10**6)))
    model.run(3.0)
    assert model.kv_free()[model.names[2]] == 10**6 - 2 * kv_bytes(Span(0, 1), 10, SHAPE)
    model.run(100.0)
    assert (model.seen.finished, model.seen.tokens, model.seen.repairs) == (1, 40, 1)
    assert set(model.kv_free().values()) == {10**6}
    assert model.use_of(2) == 0


def test_full_calls_reach_the_rate_at_sixteen_rows() -> None:
    model = cell(HALVES, rtt_s=0.0)
    model.keep_running(64, lambda: Asked(0, 50))
    model.run(20.0)
    model.reset()
    model.run(60.0)
    assert model.seen.tokens_per_s == pytest.approx(16 / (4 * 0.044), rel=0.02)


def test_no_more_sessions_than_the_cache_has_room_for() -> None:
    model = cell(HALVES, kv=3 * kv_bytes(Span(0, 4), 10, SHAPE))
    for _ in range(5):
        model.offer(0.5, Asked(0, 2))
    model.run(0.6)
    assert (model.running, model.seen.refused) == (3, 2)
    model.run(20.0)
    assert model.seen.finished == 3


def test_a_failure_costs_a_stall_and_no_token() -> None:
    model = cell(HALVES, HALVES, HALVES)
    for _ in range(6):
        model.offer(0.0, Asked(0, 40))
    model.at(2.0, lambda: model.fail(0))
    model.at(4.0, lambda: model.fail(1))
    model.run(100.0)
    seen = model.seen
    assert (seen.started, seen.finished, seen.tokens) == (6, 6, 240)
    assert seen.repairs == len(seen.stalls_s) >= 6
    assert model.use_of(2) == 0
    assert model.kv_free()[model.names[2]] == 10**6


def test_a_device_that_comes_back_serves() -> None:
    model = cell(HALVES)
    model.fail(0)
    model.offer(1.0, Asked(0, 1))
    model.at(5.0, lambda: model.change(0, Machine(speed=SPEED, pieces=HALVES, kv_bytes=10**6)))
    model.offer(6.0, Asked(0, 1))
    model.run(10.0)
    assert (model.seen.refused, model.seen.finished) == (1, 1)


def test_a_route_over_a_device_that_is_gone_is_refused() -> None:
    stale: list[tuple[Hop, ...]] = []

    def remembers(request: RouteRequest, carriers: Mapping[NodeId, Carrier], now_s: float) -> RouteReply:
        stale.append(stale[0] if stale else dijkstra(request, carriers, now_s).hops)
        return RouteReply(hops=stale[-1])

    rtt = np.zeros((2, 2))
    machine = Machine(speed=SPEED, pieces=HALVES, kv_bytes=10**6)
    model = CellModel([machine], rtt, SHAPE, remembers, reserve_tokens=10)
    model.offer(0.0, Asked(0, 1))
    model.at(1.0, lambda: model.fail(0))
    model.offer(2.0, Asked(0, 1))
    model.run(3.0)
    assert (model.seen.finished, model.seen.refused) == (1, 1)
