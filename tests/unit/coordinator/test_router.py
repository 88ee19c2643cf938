"""The coordinator's router: promises are kept, refusals are cheap and right, equal histories give equal chains."""

import msgspec
import pytest
from hypothesis import given, settings

from fallow.coordinator.router import REFUSAL_VALID_S, Router
from fallow.domain.errors import KvExhausted, NoRoute
from fallow.domain.fleet import RouteReply
from fallow.domain.ids import NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy import routing
from fallow.policy.routing import Carrier, ModelShape, RoutingRules, kv_bytes
from fallow.policy.spares import BUSY_MAX_SHARE
from tests.unit.policy.routing_world import MODEL, SHAPE, carrier, cells, check_lawful, node_id, request


def router(carriers: dict[NodeId, Carrier]) -> Router:
    made = Router(RoutingRules(), 1.0)
    made.refresh({MODEL: (SHAPE, carriers)})
    return made


def cell(kv_free: int) -> dict[NodeId, Carrier]:
    return {node_id(i): carrier(i, *((0, 3) if i % 2 else (3, 6)), kv_free=kv_free) for i in range(12)}


@settings(max_examples=30, deadline=None)
@given(carriers=cells())
def test_equal_histories_give_equal_lawful_chains_and_no_room_is_promised_twice(
    carriers: dict[NodeId, Carrier],
) -> None:
    one, other = router(carriers), router(carriers)
    promised: dict[NodeId, int] = {}
    for session in range(20):
        asked = request(session)
        reply = one.route(asked, SHAPE, carriers, 0.1 * session)
        assert reply == other.route(asked, SHAPE, carriers, 0.1 * session)
        if reply.hops:
            check_lawful(reply, carriers, asked)
        for hop in reply.hops:
            node = hop.address.node
            promised[node] = promised.get(node, 0) + kv_bytes(hop.span, asked.reserve_tokens, SHAPE)
    assert all(room <= carriers[node].kv_free_bytes for node, room in promised.items())


def test_a_full_cell_says_so_until_a_heartbeat_shows_room() -> None:
    carriers = cell(kv_free=60)
    made = router(carriers)
    replies = [made.route(request(session), SHAPE, carriers, 0.0) for session in range(7)]
    assert [bool(reply.hops) for reply in replies] == [True] * 6 + [False]
    assert replies[-1].code == KvExhausted.code
    for node in carriers:
        made.settle(node, 2.0)
    assert made.route(request(9), SHAPE, carriers, 2.0).hops


def test_a_refusal_stands_for_a_moment_but_not_for_smaller_sessions() -> None:
    carriers = cell(kv_free=60)
    made = router(carriers)
    assert made.route(request(0, tokens=40), SHAPE, carriers, 0.0).error is not None
    refused = made.route(request(1, tokens=50), SHAPE, carriers, REFUSAL_VALID_S / 2)
    assert refused.code == KvExhausted.code
    assert made.route(request(2, tokens=10), SHAPE, carriers, REFUSAL_VALID_S / 2).hops


def test_a_repair_keeps_hops_in_a_weighed_cell() -> None:
    carriers = cell(kv_free=10**6)
    made = router(carriers)
    first = made.route(request(), SHAPE, carriers, 0.0)
    kept, lost = first.hops
    asked = request(exclude=(lost.address.node,))
    asked = type(asked)(**{name: getattr(asked, name) for name in asked.__struct_fields__} | {"keep": (kept,)})
    repaired = made.route(asked, SHAPE, carriers, 1.0)
    assert repaired.hops[0] == kept
    assert repaired.hops[1].address.node != lost.address.node


def test_a_cell_that_cannot_serve_says_which_layers_nobody_holds() -> None:
    carriers = {node_id(index): carrier(index, 0, 3) for index in range(12)}
    reply: RouteReply = router(carriers).route(request(), SHAPE, carriers, 0.0)
    assert reply.error is not None and "6-11 of 12" in reply.error
    assert reply.code == NoRoute.code


@pytest.mark.parametrize("count", [2, 12])
def test_a_chain_that_stands_by_gets_idle_devices_with_twice_the_room_or_none(count: int) -> None:
    """A small cell is searched exactly; in a large one chains are drawn."""

    def reply(kv_free: int, tokens_per_s: float) -> RouteReply:
        carriers = {
            node_id(i): carrier(i, *((0, 3) if i % 2 else (3, 6)), kv_free=kv_free, tokens_per_s=tokens_per_s)
            for i in range(count)
        }
        asked = msgspec.structs.replace(request(tokens=10), spare=True)
        return router(carriers).route(asked, SHAPE, carriers, 0.0)

    most_rows_per_s = BUSY_MAX_SHARE / (6 * 0.001)
    piece_room = 10 * 2
    assert reply(6 * piece_room, 0.9 * most_rows_per_s).hops
    assert not reply(2 * piece_room - 1, 0.9 * most_rows_per_s).hops, "half of it is not for spare copies"
    assert not reply(10**6, 1.1 * most_rows_per_s).hops


def test_a_chain_that_stands_by_is_in_another_region_where_that_can_be() -> None:
    def regions(names: str) -> set[str]:
        carriers = {
            node_id(i): msgspec.structs.replace(carrier(i, *((0, 3) if i % 2 else (3, 6))), region=name)
            for i, name in enumerate(names)
        }
        asked = msgspec.structs.replace(request(exclude=(node_id(0), node_id(1))), spare=True)
        reply = router(carriers).route(asked, SHAPE, carriers, 0.0)
        return {carriers[hop.address.node].region for hop in reply.hops}

    assert regions("aaaabb") == {"b"}
    assert regions("ababbbaa") in ({"a"}, {"b"}), "the first chain is in both"
    assert regions("aaaaba") == {"a"}, "b has half of the model only"


def test_a_gone_node_is_forgotten_with_its_promises() -> None:
    carriers = cell(kv_free=60)
    made = router(carriers)
    hop = made.route(request(0), SHAPE, carriers, 0.0).hops[0]
    made.forget(hop.address.node)
    replies = [made.route(request(session), SHAPE, carriers, 0.0) for session in range(1, 7)]
    assert sum(hop.address.node in {other.address.node for other in reply.hops} for reply in replies) == 1


def test_visits_of_nodes_that_are_gone_are_forgotten_in_a_small_cell_too() -> None:
    carriers = {node_id(index): carrier(index, 0, 6) for index in range(3)}
    made = router(carriers)
    for session in range(6):
        made.route(request(session), SHAPE, carriers, 0.0)
    assert len(made._visits[MODEL]) > 1
    left = {node_id(0): carriers[node_id(0)]}
    made.refresh({MODEL: (SHAPE, left)})
    assert set(made._visits[MODEL]) <= set(left)


def test_the_exact_search_is_bounded_by_what_it_notes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight carriers with a piece for each layer: thousands of ways to go on, in few steps."""
    layers = 24
    shape = ModelShape(layer_count=layers, kv_bytes_per_token_layer=1)
    pieces = tuple(Span(at, at + 1) for at in range(layers))
    carriers = {
        node: msgspec.structs.replace(
            carrier(index, 0, 6, seconds=0.001 + 0.0001 * index, kv_free=30),
            stage=StageSpec(model=MODEL, pieces=pieces),
        )
        for index, node in enumerate(map(node_id, range(8)))
    }
    noted = 0
    hop_s = routing.hop_s

    def counted(*arguments: object) -> float:
        nonlocal noted
        noted += 1
        return hop_s(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(routing, "hop_s", counted)
    rules = RoutingRules(labels_max=10**9, pushes_max=2_000)
    reply = routing.route(request(), shape, list(carriers.values()), rules)
    assert [layer for hop in reply.hops for layer in range(hop.span.first, hop.span.last)] == list(range(layers))
    assert noted <= 2 * rules.pushes_max, "without the bound more than ten times as many"


def test_a_renewal_brings_nobody_a_prompt() -> None:
    carriers = {node_id(index): carrier(index, 0, 6) for index in range(3)}
    made = router(carriers)
    [hop] = made.route(request(0), SHAPE, carriers, 0.0).hops

    def waits() -> dict[NodeId, float]:
        return {each.node: each.rebuild_wait_s for each in made._rebuilds.loaded(carriers.values(), {}, 0.0)}

    promised = waits()
    assert promised[hop.address.node] > 0.0
    renewed = made.route(msgspec.structs.replace(request(0), keep=(hop,)), SHAPE, carriers, 0.0)
    assert renewed.hops == (hop,)
    assert waits() == promised
