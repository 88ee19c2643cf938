"""Placement over drawn fleets and catalogues: what must always hold, and the cases that people will ask about."""

from collections.abc import Sequence

import msgspec
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import RouteRequest
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.policy.placement import Placement, place
from fallow.policy.placement_board import Board, ModelNeed, NodeRoom, PlacementRules, grid_of
from fallow.policy.placement_chains import makes_chain
from fallow.policy.placement_plan import Move, NodeNow, plan
from fallow.policy.placement_worth import worth
from fallow.policy.routing import Carrier, ModelShape, route


def model(index: int = 0, layers: int = 6, layer_bytes: int = 100, embedding: int = 0, head: int = 0) -> ModelNeed:
    return ModelNeed(
        model=Digest(f"{index:064x}"),
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=embedding,
        head_bytes=head,
        kv_bytes_per_token_layer=1,
    )


def node(index: int, weights: int, layer_s: float = 0.001, hosted: tuple[StageSpec, ...] = ()) -> NodeRoom:
    return NodeRoom(
        node=NodeId(f"{index:064x}"), weights_bytes=weights, kv_bytes=1 << 30, layer_s=layer_s, hosted=hosted
    )


models_drawn = st.lists(
    st.builds(
        model,
        layers=st.integers(1, 14),
        layer_bytes=st.integers(1, 50),
        embedding=st.integers(0, 100),
        head=st.integers(0, 100),
    ),
    min_size=1,
    max_size=3,
).map(lambda needs: [msgspec.structs.replace(n, model=Digest(f"{i:064x}")) for i, n in enumerate(needs)])
nodes_drawn = st.lists(
    st.tuples(st.integers(0, 900), st.sampled_from([0.001, 0.002, 0.01])), min_size=0, max_size=6
).map(lambda drawn: [node(i, weights, layer_s) for i, (weights, layer_s) in enumerate(drawn)])
rules_drawn = st.builds(
    PlacementRules, max_share=st.sampled_from([1.0, 0.7, 0.5]), replicas=st.integers(1, 3), context_tokens=st.just(16)
)


def hosting(nodes: Sequence[NodeRoom], placed: Placement) -> list[NodeRoom]:
    return [msgspec.structs.replace(item, hosted=placed.stages[item.node]) for item in nodes]


def holders(placed: Placement, need: ModelNeed) -> list[int]:
    counts = [0] * need.layer_count
    for stages in placed.stages.values():
        for stage in stages:
            for piece in stage.pieces if stage.model == need.model else ():
                for layer in range(piece.first, piece.last):
                    counts[layer] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(models=models_drawn, nodes=nodes_drawn, rules=rules_drawn)
def test_every_placement_is_lawful(models: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules) -> None:
    placed = place(models, nodes, rules)
    needs = {need.model: need for need in models}
    for item in nodes:
        weights = 0
        for stage in placed.stages[item.node]:
            need = needs[stage.model]
            weights += sum(need.bytes_of(piece) for piece in stage.pieces)
            assert all(a.last <= b.first for a, b in zip(stage.pieces, stage.pieces[1:], strict=False))
            assert sum(map(need.work, stage.pieces)) <= rules.max_share * need.work(need.whole) + 1e-6
        assert weights <= item.weights_bytes
    for need in models:
        if need.model in placed.unplaceable:
            assert sum(holders(placed, need)) == 0
        else:
            assert min(holders(placed, need)) >= 1


@settings(max_examples=60, deadline=None)
@given(models=models_drawn, nodes=nodes_drawn, rules=rules_drawn)
@example(
    # Two models by turns: a grid that promised the first one more copies, of which the second took its room back.
    models=[model(0, 11, 19, embedding=100, head=7), model(1, 11, 50, embedding=60, head=62)],
    nodes=[node(i, weights, 0.01) for i, weights in enumerate([252, 226, 279, 184, 252])],
    rules=PlacementRules(replicas=2, context_tokens=16),
)
@example(
    # What was left of a model that cannot be covered was cut anew each time.
    models=[model(0, 10, 6, head=80), model(1, 8, 34, embedding=13, head=76), model(2, 7, 48, embedding=54)],
    nodes=[node(0, 76, 0.01), node(1, 295, 0.002), node(2, 663, 0.01)],
    rules=PlacementRules(max_share=0.7, replicas=3, context_tokens=16),
)
def test_what_is_placed_stays_while_the_fleet_stays(
    models: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules
) -> None:
    placed = place(models, nodes, rules)
    assert place(models, hosting(nodes, placed), rules).stages == placed.stages


@settings(max_examples=60, deadline=None)
@given(models=models_drawn, nodes=nodes_drawn, rules=rules_drawn, leaver=st.integers(0, 5))
def test_after_a_leave_it_settles_and_moves_only_for_lost_copies(
    models: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules, leaver: int
) -> None:
    placed = place(models, nodes, rules)
    assume(leaver < len(nodes))
    remaining = hosting([item for i, item in enumerate(nodes) if i != leaver], placed)
    again = place(models, remaining, rules)
    assert place(models, hosting(remaining, again), rules).stages == again.stages
    if not placed.stages[nodes[leaver].node]:
        assert again.stages == {item.node: item.hosted for item in remaining}


def test_planning_again_never_gives_up_more_than_it_gains() -> None:
    """A tight fleet whose devices' memory shrinks and grows again, under three models: what was worth more stays."""
    models = [model(i, 9, size) for i, size in enumerate((20, 30, 40))]
    rules = PlacementRules(replicas=2, context_tokens=16)
    rooms = [350, 280, 410, 200]
    nodes = [node(i, room) for i, room in enumerate(rooms)]
    for short in (0, 1, 2, 1):
        nodes = [node(i, room - 60 * (i == short), hosted=nodes[i].hosted) for i, room in enumerate(rooms)]
        held = worth(Board(models, nodes, rules))
        nodes = hosting(nodes, place(models, nodes, rules))
        assert worth(Board(models, nodes, rules)) >= held


def test_rules_are_applied_again_where_once_is_not_enough() -> None:
    """What the rules give first covers two of three models; applied to that, they give something else that is worth no
    more; applied to that, they cover all three."""
    models = [model(0, 14, 26, embedding=88), model(1, 13, 33, embedding=14), model(2, 9, 7, head=36)]
    nodes = [node(0, 456, 0.002), node(1, 740, 0.001)]
    assert not place(models, nodes, PlacementRules(max_share=0.7, replicas=3, context_tokens=16)).unplaceable


@settings(max_examples=50, deadline=None)
@given(
    layers=st.sampled_from([6, 12, 30]),
    nodes=st.integers(2, 6),
    share=st.sampled_from([0.5, 0.7]),
    gone=st.integers(0, 5),
)
def test_with_room_for_two_copies_any_death_leaves_every_layer_held(
    layers: int, nodes: int, share: float, gone: int
) -> None:
    need = model(layers=layers)
    fleet = [node(i, 100 * layers) for i in range(nodes)]
    placed = place([need], fleet, PlacementRules(max_share=share, context_tokens=1))
    assume(nodes >= 4 or (nodes == 3 and share == 0.7))
    dead = fleet[gone % nodes].node
    left = Placement(stages={n: s for n, s in placed.stages.items() if n != dead}, unplaceable={})
    assert min(holders(left, need)) >= 1


def test_three_equal_devices_that_fit_two_thirds_hold_every_third_twice() -> None:
    need = model(layers=30)
    placed = place([need], [node(i, 3000) for i in range(3)], PlacementRules(max_share=0.7))
    thirds = set(grid_of(need, 3))
    assert {frozenset(stage.pieces) for (stage,) in placed.stages.values()} == {
        frozenset(thirds - {third}) for third in thirds
    }


def test_a_third_device_changes_nothing_for_the_first_two() -> None:
    need = model(layers=30)
    rules = PlacementRules(max_share=0.7)
    two = [node(i, 3000) for i in range(2)]
    placed = place([need], two, rules)
    three = place([need], [*hosting(two, placed), node(2, 3000)], rules)
    assert {n: three.stages[n] for n in placed.stages} == placed.stages
    assert min(holders(three, need)) == 2


def test_a_model_that_fits_one_device_stays_on_the_fastest_and_others_replicate_it() -> None:
    need = model()
    nodes = [node(0, 600, 0.003), node(1, 600, 0.001), node(2, 600, 0.002), node(3, 300)]
    placed = place([need], nodes, PlacementRules(replicas=1))
    whole = (StageSpec(model=need.model, pieces=(Span(0, 6),)),)
    assert [placed.stages[item.node] for item in nodes] == [whole, whole, whole, ()]
    assert place([need], nodes[:2], PlacementRules(replicas=1)).stages[nodes[1].node] == whole


def test_small_devices_together_stand_by_for_the_only_one_that_fits_the_whole() -> None:
    need = model()
    nodes = [node(0, 600), node(1, 300), node(2, 300)]
    placed = place([need], nodes, PlacementRules())
    assert placed.stages[nodes[0].node][0].pieces == (Span(0, 6),)
    assert min(holders(placed, need)) == 2


def test_fast_devices_get_more_of_a_model_that_is_cut() -> None:
    need = model(layers=30)
    nodes = [node(0, 2000, 0.004), node(1, 2000, 0.001)]
    placed = place([need], nodes, PlacementRules(replicas=1))
    slow, fast = (placed.stages[item.node][0].layer_count for item in nodes)
    assert fast > slow


def test_models_are_all_covered_before_any_is_copied() -> None:
    first, second = model(0), model(1)
    placed = place([first, second], [node(0, 600), node(1, 600)], PlacementRules())
    assert min(holders(placed, first)) == 1
    assert min(holders(placed, second)) == 1


def test_too_little_memory_places_nothing_and_says_so() -> None:
    placed = place([model()], [node(0, 500)], PlacementRules())
    assert placed.stages == {node(0, 0).node: ()}
    assert "6 layers" in placed.unplaceable[model().model]


def test_kv_room_counts() -> None:
    tight = msgspec.structs.replace(node(0, 600), kv_bytes=6 * 2048 - 1)
    assert place([model()], [tight], PlacementRules()).unplaceable
    assert not place([model()], [msgspec.structs.replace(tight, kv_bytes=6 * 2048)], PlacementRules()).unplaceable


def test_a_barred_device_keeps_what_it_has_and_gets_nothing_new() -> None:
    need = model(layers=6)
    held = (StageSpec(model=need.model, pieces=(Span(0, 3),)),)
    barred = msgspec.structs.replace(node(0, 600, hosted=held), barred=frozenset([need.model]))
    placed = place([need], [barred, node(1, 300)], PlacementRules())
    assert placed.stages[barred.node] == held
    assert placed.stages[node(1, 0).node][0].pieces == (Span(3, 6),)


# --- the plan ------------------------------------------------------------------------------------


def stage(*pieces: Span) -> StageSpec:
    return StageSpec(model=model().model, pieces=pieces)


A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)


def now(index: int, *pieces: Span, asked: tuple[StageSpec, ...] | None = None) -> NodeNow:
    ready = (stage(*pieces),) if pieces else ()
    return NodeNow(node=node(index, 0).node, asked=ready if asked is None else asked, ready=ready)


def wanted(*stages: StageSpec | None) -> dict[NodeId, tuple[StageSpec, ...]]:
    return {node(i, 0).node: (item,) if item else () for i, item in enumerate(stages)}


def test_the_plan_takes_a_last_holder_away_only_when_another_is_ready() -> None:
    goal = wanted(stage(B), stage(A, C))
    first = plan([now(0, A), now(1, C)], goal)
    assert [move.node for move in first] == [node(1, 0).node], "A stays with 0 until 1 is ready with it"
    assert plan([now(0, A), now(1, C, asked=(stage(A, C),))], goal) == ()
    assert plan([now(0, A), now(1, A, C)], goal) == (Move(node=node(0, 0).node, model=model().model, stage=stage(B)),)


def test_the_plan_does_not_wait_for_ever_when_two_must_swap() -> None:
    moves = plan([now(0, A), now(1, B)], wanted(stage(B), stage(A)))
    assert len(moves) == 1


def test_two_holders_are_not_taken_away_together() -> None:
    moves = plan([now(0, A), now(1, A)], wanted(None, None))
    assert len(moves) == 1


@settings(max_examples=50, deadline=None)
@given(models=models_drawn, nodes=nodes_drawn, rules=rules_drawn, then=nodes_drawn)
def test_following_the_plan_ends_where_it_should(
    models: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules, then: list[NodeRoom]
) -> None:
    """From any lawful placement, obeyed at once, the plan reaches the goal in a bounded number of rounds."""
    start = place(models, nodes, rules)
    state = {item.node: start.stages.get(item.node, ()) for item in then}
    goal = place(models, [msgspec.structs.replace(item, hosted=state[item.node]) for item in then], rules)
    for _ in range(2 * len(then) * len(models) + 1):
        moves = plan([NodeNow(node=n, asked=s, ready=s) for n, s in state.items()], goal.stages)
        if not moves:
            break
        for move in moves:
            kept = tuple(item for item in state[move.node] if item.model != move.model)
            state[move.node] = kept + ((move.stage,) if move.stage else ())
    assert {n: set(s) for n, s in state.items()} == {n: set(s) for n, s in goal.stages.items()}


def test_a_heavy_head_counts_as_the_layers_that_it_costs() -> None:
    """30 layers and a head worth 8 of them, on two devices: halves of the work, not of the layers."""
    need = model(layers=30, head=800)
    placed = place([need], [node(i, 4000) for i in range(2)], PlacementRules(max_share=0.7, replicas=1))
    spans = sorted(stage.spans()[0] for stages in placed.stages.values() for stage in stages)
    assert spans == [Span(0, 18), Span(18, 30)]


@settings(max_examples=60, deadline=None)
@given(
    need=st.builds(model, layers=st.integers(2, 30), head=st.integers(0, 800)), count=st.integers(1, 4), data=st.data()
)
def test_what_is_placed_can_be_routed(need: ModelNeed, count: int, data: st.DataObject) -> None:
    """Every layer held is not enough: a chain uses a device once."""
    share = data.draw(st.sampled_from([1.0, 0.7, 0.6, 0.5, 0.4]))
    weights = data.draw(st.lists(st.integers(200, 5000), min_size=count, max_size=count))
    fleet = [node(i, room) for i, room in enumerate(weights)]
    placed = place([need], fleet, PlacementRules(max_share=share, context_tokens=1))
    if need.model in placed.unplaceable:
        return
    carriers = [
        Carrier(address=PeerAddress(item, ()), stage=stages[0], kv_free_bytes=1 << 40)
        for item, stages in placed.stages.items()
        if stages
    ]
    request = RouteRequest(model=need.model, session=SessionId("0" * 32), reserve_tokens=1)
    reply = route(request, ModelShape(layer_count=need.layer_count, kv_bytes_per_token_layer=1), carriers)
    assert reply.hops, reply.error


def test_two_devices_that_hold_every_other_piece_are_not_a_chain() -> None:
    grid = [Span(0, 1), Span(1, 2), Span(2, 3)]
    apart = {NodeId("a"): [grid[0], grid[2]], NodeId("b"): [grid[1]]}
    assert not makes_chain(grid, apart)
    assert makes_chain(grid, {**apart, NodeId("c"): [grid[2]]})
