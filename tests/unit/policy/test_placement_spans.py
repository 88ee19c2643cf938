"""Placement by spans: what must hold for any fleet, the rules about trust, disks and departures, and both sides of the
edge where placement by pieces ends. `few_nodes=0` has spans for fleets of any size."""

import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import OUTLOOK_HORIZONS_S, Outlook, Tier
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy import coverage
from fallow.policy.placement import Placement, place
from fallow.policy.placement_books import Books
from fallow.policy.placement_inputs import ModelNeed, NodeRoom, PlacementRules, once_placed

SPANS = PlacementRules(few_nodes=0, context_tokens=16)
STILL = msgspec.structs.replace(SPANS, gain_min=1e9)
"""Nothing moves for throughput."""
LEAVES_SOON = Outlook(survival=(0.6, 0.2, 0.1, 0.0, 0.0), expected_s=1200.0)
STAYS_AN_HOUR = Outlook(survival=(1.0, 1.0, 0.5, 0.0, 0.0), expected_s=3600.0)


def model(index: int = 0, layers: int = 12, layer_bytes: int = 100, embedding: int = 0, head: int = 0) -> ModelNeed:
    return ModelNeed(
        model=Digest(f"{index:064x}"),
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=embedding,
        head_bytes=head,
        kv_bytes_per_token_layer=1,
    )


def node(index: int, weights: int, layer_s: float = 0.001, **fields: object) -> NodeRoom:
    room = NodeRoom(node=NodeId(f"{index:064x}"), weights_bytes=weights, kv_bytes=1 << 30, layer_s=layer_s)
    return msgspec.structs.replace(room, **fields)


rooms_drawn = st.lists(
    st.tuples(
        st.integers(0, 1500),
        st.sampled_from([0.001, 0.002, 0.01]),
        st.sampled_from([None, None, 300, 900]),
        st.sampled_from([None, None, LEAVES_SOON, STAYS_AN_HOUR]),
        st.sampled_from(["", "eu", "us"]),
        st.sampled_from(list(Tier)),
        st.sampled_from([60, 200, 1 << 30]),
    ),
    max_size=20,
).map(
    lambda drawn: [
        node(i, weights, layer_s, disk_free_bytes=disk, outlook=outlook, region=region, tier=tier, kv_bytes=kv)
        for i, (weights, layer_s, disk, outlook, region, tier, kv) in enumerate(drawn)
    ]
)
needs_drawn = st.lists(
    st.tuples(
        st.integers(1, 30),
        st.integers(1, 60),
        st.integers(0, 200),
        st.integers(0, 200),
        st.sampled_from([frozenset[str](), frozenset(["eu"])]),
        st.sampled_from([Tier.ANONYMOUS, Tier.KEYED]),
    ),
    min_size=1,
    max_size=3,
).map(
    lambda drawn: [
        msgspec.structs.replace(model(i, layers, size, embedding, head), regions=regions, tier_min=tier)
        for i, (layers, size, embedding, head, regions, tier) in enumerate(drawn)
    ]
)
rules_drawn = st.builds(
    PlacementRules,
    max_share=st.sampled_from([1.0, 0.7]),
    replicas=st.integers(1, 3),
    context_tokens=st.just(16),
    few_nodes=st.just(0),
)


HALVES = tuple(
    StageSpec(model=model().model, pieces=tuple(Span(part, part + 1) for part in half))
    for half in (range(6), range(6, 12))
)
"""Of a model of 12 layers."""


def hosting(nodes: Sequence[NodeRoom], placed: Placement, needs: Sequence[ModelNeed] | None = None) -> list[NodeRoom]:
    by_digest = {need.model: need for need in needs or [model()]}
    return [once_placed(item, placed.stages.get(item.node, ()), by_digest) for item in nodes]


def holders(placed: Placement, need: ModelNeed) -> list[int]:
    counts = [0] * need.layer_count
    for layer in (layer for held in layers_of(placed, need).values() for layer in held):
        counts[layer] += 1
    return counts


def layers_of(placed: Placement, need: ModelNeed) -> dict[NodeId, set[int]]:
    return {
        holder: {
            layer
            for stage in stages
            if stage.model == need.model
            for piece in stage.pieces
            for layer in range(piece.first, piece.last)
        }
        for holder, stages in placed.stages.items()
    }


def throughput(nodes: Sequence[NodeRoom], placed: Placement, need: ModelNeed) -> tuple[float, float]:
    """Tokens a second of a placement, and what all the devices' speed over all the work would be."""
    books = Books([need], hosting(nodes, placed), SPANS)
    mass, _ = books.state(books.books[need.model])
    work = books.books[need.model].parts.work
    return float(coverage.bottleneck(mass, work).rows_per_s[0]), float(books.speed.sum() / work.sum())


def fleet(count: int, seed: int, need: ModelNeed) -> list[NodeRoom]:
    """Speeds over a factor of ten and more, memory for an eighth to all of the model."""
    draw = random.Random(seed)
    return [
        node(i, round(need.whole_bytes * draw.uniform(1 / 8, 1)), 0.004 / draw.lognormvariate(0, 0.7))
        for i in range(count)
    ]


# --- what must always hold -----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(needs=needs_drawn, nodes=rooms_drawn, rules=rules_drawn)
def test_every_placement_is_lawful(needs: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules) -> None:
    placed = place(needs, nodes, rules)
    by_digest = {need.model: need for need in needs}
    for item in nodes:
        pieces = [(by_digest[stage.model], piece) for stage in placed.stages[item.node] for piece in stage.pieces]
        assert sum(need.bytes_of(piece) for need, piece in pieces) <= item.weights_bytes
        assert sum(need.bytes_of(piece) for need, piece in pieces) <= (item.disk_free_bytes or 1 << 40)
        assert sum(piece.layer_count * 16 for _, piece in pieces) <= item.kv_bytes
        for stage in placed.stages[item.node]:
            need = by_digest[stage.model]
            assert len(stage.spans()) == 1
            assert sum(map(need.work, stage.pieces)) <= rules.max_share * need.work(need.whole) + 1e-6
            assert not need.regions or item.region in need.regions
            assert item.tier >= need.tier_min
    for need in needs:
        assert min(holders(placed, need)) >= 1 or (need.model in placed.unplaceable and sum(holders(placed, need)) == 0)


@settings(max_examples=20, deadline=None)
@given(needs=needs_drawn, nodes=rooms_drawn, rules=rules_drawn, seed=st.integers(0, 99))
def test_placing_a_placement_changes_nothing_and_order_does_not_matter(
    needs: list[ModelNeed], nodes: list[NodeRoom], rules: PlacementRules, seed: int
) -> None:
    placed = place(needs, nodes, rules)
    again = hosting(nodes, placed, needs)
    random.Random(seed).shuffle(again)
    assert place(needs, again, rules).stages == placed.stages


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(0, 12), min_size=1, max_size=16),
    layers=st.sampled_from([6, 12, 24, 36]),
    speeds=st.randoms(use_true_random=False),
)
def test_whatever_has_room_for_every_part_is_covered(widths: list[int], layers: int, speeds: random.Random) -> None:
    """With equal parts, room for as many as the model has is room for the model."""
    need = model(layers=layers)
    part = -(-layers // 12) * 100
    nodes = [node(i, width * part, speeds.choice([0.001, 0.01])) for i, width in enumerate(widths)]
    placed = place([need], nodes, SPANS)
    assert (need.model not in placed.unplaceable) == (sum(widths) * part >= need.whole_bytes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(13, 40))
def test_a_join_only_adds(seed: int, count: int) -> None:
    need = model(layers=32, embedding=300, head=300)
    nodes = fleet(count + 1, seed, need)
    placed = place([need], nodes[:-1], STILL)
    assume(min(holders(placed, need)) >= STILL.replicas)
    joined = place([need], [*hosting(nodes[:-1], placed), nodes[-1]], STILL)
    assert {n: joined.stages[n] for n in placed.stages} == placed.stages


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(14, 40), data=st.data())
def test_after_leaves_every_part_is_held_again(seed: int, count: int, data: st.DataObject) -> None:
    need = model(layers=32, embedding=300, head=300)
    nodes = fleet(count, seed, need)
    placed = place([need], nodes, SPANS)
    gone = data.draw(st.sets(st.integers(0, count - 1), max_size=count // 3))
    left = [item for i, item in enumerate(hosting(nodes, placed)) if i not in gone]
    again = place([need], left, SPANS)
    if not place([need], [item for i, item in enumerate(nodes) if i not in gone], SPANS).unplaceable:
        assert min(holders(again, need)) >= 1
    assert place([need], hosting(left, again), SPANS).stages == again.stages


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [25, 60, 200])
def test_throughput_is_near_the_bound(seed: int, count: int) -> None:
    need = model(layers=32, layer_bytes=1000, embedding=4000, head=4000)
    nodes = fleet(count, seed, need)
    reached, bound = throughput(nodes, place([need], nodes), need)
    assert reached >= 0.95 * bound


@pytest.mark.parametrize("seed", [0, 1, 68, 70, 109, 171, 298])
def test_few_devices_reach_the_roof_where_memory_keeps_them_from_the_bound(seed: int) -> None:
    """The last five of these fleets stay below 0.94 when moves are made one at a time only."""
    need = model(layers=32, layer_bytes=1000, embedding=4000, head=4000)
    nodes = fleet(15, seed, need)
    books = Books([need], nodes, SPANS)
    book = books.books[need.model]
    edges = np.concatenate(([0.0], np.cumsum(book.parts.work)))
    widest = (edges[books.reach(book, np.arange(15))] - edges[:-1]).max(axis=1)
    reached, _ = throughput(nodes, place([need], nodes, SPANS), need)
    assert reached >= 0.97 * coverage.roof(books.speed, widest, book.parts.work)


@pytest.mark.parametrize("seed", range(3))
def test_throughput_stays_near_the_bound_when_everybody_was_replaced_one_by_one(seed: int) -> None:
    need = model(layers=32, layer_bytes=1000, embedding=4000, head=4000)
    nodes = fleet(120, seed, need)
    draw = random.Random(seed)
    here, waiting = nodes[:40], nodes[40:]
    placed = place([need], here)
    ratios = []
    for newcomer in waiting:
        here = hosting(here, placed)
        here[draw.randrange(len(here))] = newcomer
        placed = place([need], here)
        reached, bound = throughput(here, placed, need)
        ratios.append(reached / bound)
        assert min(holders(placed, need)) >= 2
    assert np.mean(ratios) >= 0.95
    assert min(ratios) >= 0.85


# --- rules ---------------------------------------------------------------------------------------


def test_a_model_that_fits_everybody_stays_whole_on_everybody() -> None:
    need = model()
    placed = place([need], [node(i, 1200) for i in range(5)], SPANS)
    assert set(placed.stages.values()) == {(StageSpec(model=need.model, pieces=(need.whole,)),)}


def test_spare_devices_join_the_thinnest_span() -> None:
    need = model()
    nodes = [node(0, 600, 0.001), node(1, 600, 0.001), node(2, 600, 0.003), node(3, 600, 0.003)]
    placed = place([need], nodes, SPANS)
    late = place([need], [*hosting(nodes, placed)[:3], node(4, 600)], SPANS)
    assert late.stages[node(4, 0).node] == placed.stages[nodes[3].node]


def test_a_device_joins_where_its_files_are() -> None:
    """All spans being equal, one that is on the disk is worth more than one that must be fetched."""
    need = model(layer_bytes=1 << 30)
    nodes = [
        node(i, 12 << 30, hosted=place([need], [node(i, 12 << 30)], SPANS).stages[node(i, 0).node]) for i in range(4)
    ]
    for cached in (Span(0, 6), Span(4, 10), Span(6, 12)):
        late = node(9, 6 << 30, cached={need.model: (cached,)})
        assert place([need], [*nodes, late], STILL).stages[late.node][0].spans() == (cached,)


def test_a_device_that_is_about_to_go_is_nobodys_only_holder() -> None:
    need = model()
    steady = [node(i, 300) for i in range(4)]
    leaving = [node(10 + i, 300, 0.0001, outlook=LEAVES_SOON) for i in range(4)]
    layers = layers_of(place([need], leaving + steady, SPANS), need)
    assert set().union(*(layers[item.node] for item in steady)) == set(range(12))


def test_what_only_a_leaving_device_holds_moves_to_one_that_stays() -> None:
    need = model()
    halves = [(StageSpec(model=need.model, pieces=(half,)),) for half in (Span(0, 6), Span(6, 12))]
    nodes = [node(0, 600, hosted=halves[0], outlook=LEAVES_SOON)]
    nodes += [node(i, 600, hosted=halves[1]) for i in (1, 2)]
    placed = place([need], nodes, SPANS)
    layers = layers_of(placed, need)
    assert layers[nodes[1].node] | layers[nodes[2].node] == set(range(12))


def test_a_device_that_is_here_for_half_an_hour_counts_half() -> None:
    outlook = Outlook(survival=(1.0, 0.5, 0.0, 0.0, 0.0), expected_s=1800.0)
    assert OUTLOOK_HORIZONS_S[:3] == (600.0, 1800.0, 3600.0)
    # 600 s surely, then falling to one half over 1200 s, then to nothing over 1800 s.
    assert node(0, 1, outlook=outlook).hour_share == pytest.approx((600 + 1200 * 0.75 + 1800 * 0.25) / 3600)


def test_a_device_does_not_spend_its_stay_on_downloading() -> None:
    need = model(layer_bytes=1000)
    slow = node(9, 12_000, downlink_bytes_per_s=4.0)
    nodes = [node(i, 12_000) for i in range(3)]
    placed = place([need], [*nodes, slow], SPANS)
    # A quarter of two hours at 4 B/s is 7.2 layers.
    assert placed.stages[slow.node][0].layer_count == 7


def test_moves_must_be_worth_their_download() -> None:
    """Six devices crowd one half, two the other: some move when they stay for long, none when they soon go."""
    need = model(layer_bytes=1 << 20)
    crowd = [(HALVES[0],)] * 6 + [(HALVES[1],)] * 2
    patient = [node(i, 6 << 20, hosted=stages) for i, stages in enumerate(crowd)]
    hurried = [
        msgspec.structs.replace(item, outlook=STAYS_AN_HOUR, downlink_bytes_per_s=(1 << 20) / 3000) for item in patient
    ]
    moved = place([need], patient, SPANS)
    before = Placement(stages={item.node: item.hosted for item in patient}, unplaceable={})
    assert throughput(patient, moved, need)[0] > 1.4 * throughput(patient, before, need)[0]
    assert place([need], hurried, SPANS).stages == {item.node: item.hosted for item in hurried}
    assert place([need], patient, STILL).stages == {item.node: item.hosted for item in patient}


def test_residency_and_trust_bind_and_the_reason_is_told() -> None:
    need = msgspec.structs.replace(model(), regions=frozenset(["eu"]), tier_min=Tier.KEYED)
    fitting = node(0, 1200, region="eu", tier=Tier.ATTESTED)
    others = [node(1, 1200, region="us", tier=Tier.KEYED), node(2, 1200, region="eu"), node(3, 1200, tier=Tier.KEYED)]
    for rules in (SPANS, PlacementRules()):
        placed = place([need], [fitting, *others], rules)
        assert [bool(placed.stages[item.node]) for item in (fitting, *others)] == [True, False, False, False]
        reason = place([need], others, rules).unplaceable[need.model]
        assert "in eu" in reason
        assert "keyed" in reason


def test_what_a_device_may_no_longer_hold_goes() -> None:
    need = model()
    held = (StageSpec(model=need.model, pieces=(need.whole,)),)
    barred = msgspec.structs.replace(need, regions=frozenset(["eu"]))
    for rules in (SPANS, PlacementRules()):
        assert place([barred], [node(0, 1200, hosted=held, region="us")], rules).stages[node(0, 0).node] == ()


@pytest.mark.parametrize("rules", [SPANS, PlacementRules(context_tokens=16)])
def test_disks_are_not_filled_beyond_their_room(rules: PlacementRules) -> None:
    need = model()
    small = node(0, 1200, disk_free_bytes=600)
    assert place([need], [small], rules).unplaceable
    placed = place([need], [small, node(1, 1200, disk_free_bytes=600)], rules)
    assert {
        sum(piece.layer_count for stage in stages for piece in stage.pieces) for stages in placed.stages.values()
    } == {6}
    kept = msgspec.structs.replace(small, cached={need.model: (Span(0, 6),)})
    assert place([need], [kept], rules).stages[small.node][0].layer_count == 12


def test_models_are_covered_in_the_catalogues_order_before_any_is_copied() -> None:
    first, second, third = model(0), model(1), model(2)
    nodes = [node(i, 300) for i in range(9)]
    placed = place([first, second, third], nodes, SPANS)
    assert [min(holders(placed, need)) for need in (first, second)] == [1, 1]
    assert set(placed.unplaceable) == {third.model}
    assert place([second, first], nodes[:4], SPANS).unplaceable.keys() == {first.model}


def test_copies_of_one_model_give_way_to_the_first_copy_of_another() -> None:
    first, second = model(0), model(1)
    nodes = [node(i, 600) for i in range(8)]
    placed = place([first], nodes, SPANS)
    both = place([first, second], hosting(nodes, placed), SPANS)
    assert min(holders(both, first)) >= 1
    assert min(holders(both, second)) >= 1


def test_a_barred_device_keeps_what_it_has_and_gets_nothing_new() -> None:
    need = model()
    held = (StageSpec(model=need.model, pieces=(Span(0, 6),)),)
    barred = node(0, 1200, hosted=held, barred=frozenset([need.model]))
    placed = place([need], [barred, node(1, 600)], SPANS)
    assert placed.stages[barred.node] == held
    assert placed.stages[node(1, 0).node][0].spans() == (Span(6, 12),)


# --- the edge to placement by pieces -------------------------------------------------------------


def layers_moved(before: Placement, after: Placement, need: ModelNeed) -> set[NodeId]:
    """Devices of both that would have to load a layer."""
    was, is_now = layers_of(before, need), layers_of(after, need)
    return {holder for holder in was.keys() & is_now.keys() if was[holder] and is_now[holder] - was[holder]}


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_pieces_up_to_few_nodes_and_spans_beyond(share: float) -> None:
    need = model(layers=24)
    rules = PlacementRules(max_share=share)
    nodes = [node(i, 1300) for i in range(rules.few_nodes + 1)]
    few, many = place([need], nodes[:-1], rules), place([need], nodes, rules)
    assert max(len(stage.pieces) for stages in few.stages.values() for stage in stages) <= rules.max_pieces
    assert {piece.layer_count for stages in many.stages.values() for stage in stages for piece in stage.pieces} == {2}


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_fetched_anew_when_the_fleet_grows_over_the_edge(seed: int) -> None:
    need = model(layers=24, layer_bytes=1000)
    rules = PlacementRules()
    nodes = fleet(rules.few_nodes + 1, seed, need)
    few = place([need], nodes[:-1], rules)
    many = place([need], [*hosting(nodes[:-1], few), nodes[-1]], msgspec.structs.replace(rules, gain_min=1e9))
    assert layers_moved(few, many, need) == set(), "but for those that had no room for any piece of the grid"


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_fetched_anew_when_the_fleet_shrinks_over_the_edge(seed: int) -> None:
    need = model(layers=24, layer_bytes=1000)
    rules = PlacementRules()
    nodes = [node(i, item.weights_bytes + 12_000, item.layer_s) for i, item in enumerate(fleet(13, seed, need))]
    nodes = [msgspec.structs.replace(item, weights_bytes=min(item.weights_bytes, 20_000)) for item in nodes]
    many = place([need], nodes, rules)
    few = place([need], hosting(nodes[:-1], many), rules)
    assert min(holders(few, need)) >= 2
    assert layers_moved(many, few, need) == set()
