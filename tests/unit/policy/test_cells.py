"""Cells: devices settle near each other, cells neither flap nor overflow, and help is asked where it is to be had."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.cells import CellDigest, ModelDigest
from fallow.domain.fleet import Speed
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import Span, StageSpec
from fallow.policy import cells
from fallow.policy.cells import (
    CellOffer,
    CellRules,
    Neighbour,
    choose_cell,
    digest_of,
    dissolve_into,
    lenders,
    overflow_order,
    overloaded,
    split,
)
from fallow.policy.routing import Carrier, ModelShape
from fallow.policy.spans import covered

RULES = CellRules(devices_max=20, devices_min=4)
MODEL = Digest("a" * 64)


def node(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


OFFERS = st.lists(
    st.builds(
        CellOffer,
        cell=st.sampled_from("abcdef"),
        rtt_s=st.floats(0.0, 0.3),
        devices=st.integers(0, 25),
        devices_max=st.just(20),
    ),
    max_size=6,
    unique_by=lambda offer: offer.cell,
)


# --- forming --------------------------------------------------------------------------------------


@given(OFFERS, st.sampled_from([None, *"abcdefg"]))
def test_a_device_joins_the_nearest_cell_with_room_and_stays_unless_another_is_clearly_nearer(
    offers: list[CellOffer], home: str | None
) -> None:
    chosen = choose_cell(home, offers, RULES)
    by_cell = {offer.cell: offer for offer in offers}
    open_ = [offer for offer in offers if offer.devices < offer.devices_max]
    if chosen is None:
        assert home not in by_cell
        assert not open_
        return
    assert chosen == home or by_cell[chosen] in open_, "a full cell takes nobody new"
    nearest_s = min((offer.rtt_s for offer in open_), default=0.3)
    here_s = by_cell[chosen].rtt_s
    if home in by_cell:
        assert here_s - nearest_s < max(RULES.move_gain_s, RULES.move_gain_share * here_s) or here_s <= nearest_s
    else:
        assert here_s == nearest_s
    assert choose_cell(chosen, offers, RULES) == chosen, "who has chosen stays"


@given(st.integers(0, 2**32), st.floats(0.0, 0.0024))
def test_jitter_below_the_hysteresis_moves_nobody(seed: int, jitter_s: float) -> None:
    draw = random.Random(seed)
    rtts_s = {cell: draw.uniform(0.005, 0.1) for cell in "abcd"}
    home = choose_cell(None, [CellOffer(cell=c, rtt_s=r, devices=1, devices_max=20) for c, r in rtts_s.items()], RULES)
    for _ in range(20):
        shaken = [
            CellOffer(cell=c, rtt_s=r + draw.uniform(-jitter_s, jitter_s), devices=1, devices_max=20)
            for c, r in rtts_s.items()
        ]
        assert choose_cell(home, shaken, RULES) == home


def positions(draw: random.Random, metros: int, devices: int) -> tuple[dict[NodeId, tuple[float, ...]], list[int]]:
    """Devices of metros that are tens of milliseconds apart, by their round trips to three landmarks."""
    centres = [tuple(draw.uniform(0.02, 0.15) for _ in range(3)) for _ in range(metros)]
    metro = [draw.randrange(metros) for _ in range(devices)]
    found = {
        node(index): tuple(axis + draw.uniform(0, 0.004) for axis in centres[at]) for index, at in enumerate(metro)
    }
    return found, metro


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 80))
def test_a_split_is_a_partition_neither_part_too_small_and_the_same_in_any_order(
    seed: int, metros: int, devices: int
) -> None:
    draw = random.Random(seed)
    at, _ = positions(draw, metros, devices)
    parts = split(at, RULES)
    if devices <= RULES.devices_max:
        assert parts is None
        return
    assert parts is not None
    one, other = parts
    assert sorted([*one, *other]) == sorted(at)
    assert min(len(one), len(other)) >= int(RULES.split_share_min * devices)
    shuffled = list(at.items())
    draw.shuffle(shuffled)
    assert split(dict(shuffled), RULES) == parts


def test_devices_are_placed_by_the_peers_that_most_of_them_measured() -> None:
    gateway, other, rare = node(100), node(101), node(102)
    rtts_s = {
        node(0): {gateway: 0.010, other: 0.020, rare: 0.5},
        node(1): {gateway: 0.030, other: 0.040},
        node(2): {gateway: 0.020},
        node(3): {},
    }
    assert cells.positions(rtts_s) == {
        node(0): (0.010, 0.020),
        node(1): (0.030, 0.040),
        node(2): (0.020, pytest.approx(0.030)),
        node(3): (pytest.approx(0.020), pytest.approx(0.030)),
    }
    assert cells.positions({node(0): {rare: 0.1}, node(1): {}, node(2): {}}) == {}, "nobody knows where they are"
    assert cells.positions({}) == {}


@given(st.integers(0, 2**32), st.integers(8, 20), st.integers(8, 20))
def test_two_metros_are_told_apart(seed: int, first: int, second: int) -> None:
    draw = random.Random(seed)
    near = {node(index): (0.010 + draw.uniform(0, 0.003), 0.080 + draw.uniform(0, 0.003)) for index in range(first)}
    far = {node(100 + index): (0.080 + draw.uniform(0, 0.003), 0.010) for index in range(second)}
    if len(near) + len(far) > RULES.devices_max:
        assert set(split(near | far, RULES) or ()) == {tuple(sorted(near)), tuple(sorted(far))}


SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20), min_size=1)


@given(SIZES, st.integers(0, 2**32))
def test_no_two_cells_dissolve_into_each_other_and_what_merges_does_not_split(sizes: dict[str, int], seed: int) -> None:
    draw = random.Random(seed)
    rtt_s = {frozenset((a, b)): draw.uniform(0, 0.08) for a in sizes for b in sizes if a != b}
    into = {
        cell: dissolve_into(cell, sizes, {o: rtt_s[frozenset((cell, o))] for o in sizes if o != cell}, RULES)
        for cell in sizes
    }
    for cell, target in into.items():
        if target is None:
            continue
        assert sizes[cell] < RULES.devices_min
        assert rtt_s[frozenset((cell, target))] <= RULES.rtt_max_s
        assert into[target] != cell
        assert sizes[cell] + sizes[target] <= RULES.merge_fill_max * RULES.devices_max < RULES.devices_max


def test_what_was_split_is_too_large_to_dissolve() -> None:
    assert RULES.split_share_min * RULES.devices_max >= RULES.devices_min
    rules = CellRules()
    assert rules.split_share_min * rules.devices_max >= rules.devices_min


@pytest.mark.parametrize("seed", range(4))
def test_devices_of_three_metros_end_in_cells_of_one_metro_each_and_nobody_moves_any_more(seed: int) -> None:
    """All start in one cell; each round every full cell splits, then every device looks around once."""
    draw = random.Random(seed)
    metros = [(0.01, 0.09, 0.12), (0.09, 0.01, 0.10), (0.12, 0.10, 0.01)]
    metro = {node(index): index % 3 for index in range(54)}
    at = {n: tuple(axis + draw.uniform(0, 0.003) for axis in metros[m]) for n, m in metro.items()}
    home = dict.fromkeys(at, "0")
    names = iter(range(1, 100))
    moved = -1
    for _ in range(20):
        moved = 0
        for cell in sorted(set(home.values())):
            parts = split({n: at[n] for n in at if home[n] == cell}, RULES)
            if parts is not None:
                name = str(next(names))
                home |= dict.fromkeys(parts[1], name)
                moved += len(parts[1])
        # A coordinator sits in the middle of its cell's devices.
        middle = {
            cell: tuple(sum(axis) / len(axis) for axis in zip(*(at[n] for n in at if home[n] == cell), strict=True))
            for cell in set(home.values())
        }
        for n, where in at.items():
            counts = {cell: sum(home[m] == cell for m in at) for cell in middle}
            offers = [
                CellOffer(
                    cell=cell,
                    rtt_s=0.004 + sum(abs(a - b) for a, b in zip(where, centre, strict=True)) / 3,
                    devices=counts[cell],
                    devices_max=RULES.devices_max,
                )
                for cell, centre in middle.items()
            ]
            chosen = choose_cell(home[n], offers, RULES)
            assert chosen is not None
            moved += chosen != home[n]
            home[n] = chosen
        if not moved:
            break
    assert moved == 0, "it settles"
    assert all(len({metro[n] for n in at if home[n] == cell}) == 1 for cell in set(home.values()))
    assert max(sum(home[n] == cell for n in at) for cell in set(home.values())) <= RULES.devices_max


# --- helping --------------------------------------------------------------------------------------


def told(**fields: object) -> ModelDigest:
    defaults = ModelDigest(
        model=MODEL, servable=True, tokens_per_s_max=100.0, load=0.2, copies_min=2, kv_free_sessions=10
    )
    return msgspec.structs.replace(defaults, **fields)


def neighbour(cell: str, *models: ModelDigest, rtt_s: float | None = 0.02, sent: int = 0) -> Neighbour:
    digest = CellDigest(cell=cell, boot="b", sequence=1, devices=10, devices_max=400, models=models)
    return Neighbour(digest=digest, rtt_s=rtt_s, sent={MODEL: sent})


def test_the_nearer_neighbour_is_asked_first_and_the_loaded_one_later_or_not_at_all() -> None:
    near, far = neighbour("near", told()), neighbour("far", told(), rtt_s=0.05)
    assert overflow_order(MODEL, [far, near], RULES) == ("near", "far")
    busy = neighbour("near", told(load=0.8))
    assert overflow_order(MODEL, [far, busy], RULES) == ("far", "near")
    full = neighbour("near", told(load=RULES.load_max))
    assert overflow_order(MODEL, [far, full], RULES) == ("far",)


NEIGHBOURS = st.lists(
    st.builds(
        lambda cell, servable, most, load, free, rtt_s, sent: neighbour(
            cell,
            told(servable=servable, tokens_per_s_max=most, load=load, kv_free_sessions=free),
            rtt_s=rtt_s,
            sent=sent,
        ),
        st.sampled_from("abcdef"),
        st.booleans(),
        st.floats(0, 1000),
        st.floats(0, 2),
        st.integers(0, 5),
        st.none() | st.floats(0, 1),
        st.integers(0, 5),
    ),
    max_size=6,
    unique_by=lambda each: each.digest.cell,
)


@given(NEIGHBOURS)
def test_only_neighbours_with_chains_room_and_headroom_are_asked_and_few_of_them(known: list[Neighbour]) -> None:
    asked = overflow_order(MODEL, known, RULES)
    assert len(asked) <= RULES.neighbours_asked_max
    by_cell = {each.digest.cell: each for each in known}
    for cell in asked:
        (model,) = by_cell[cell].digest.models
        assert model.servable
        assert model.kv_free_sessions > by_cell[cell].sent[MODEL]
        assert cells.load_with(model, by_cell[cell].sent[MODEL]) < RULES.load_max
    assert overflow_order(Digest("b" * 64), known, RULES) == ()


def test_sessions_that_were_sent_lately_count_so_that_nobody_is_overrun() -> None:
    sent = 0
    while overflow_order(MODEL, [neighbour("a", told(tokens_per_s_max=48.0), sent=sent)], RULES):
        sent += 1
    assert sent == 7, "(0.9 - 0.2) * 48 tokens/s hold fewer than 7 more at 5 each"


def test_missing_layers_are_looked_for_where_they_are_held() -> None:
    bare = told(servable=False, missing=(Span(2, 4),))
    has_one = neighbour("one", told(servable=False, missing=(Span(3, 6),)), rtt_s=0.05)
    has_none = neighbour("none", told(servable=False, missing=(Span(0, 8),)), rtt_s=0.01)
    has_all = neighbour("all", told(), rtt_s=None)
    assert lenders(bare, [has_one, has_none, has_all], RULES) == ("one", "all")
    assert lenders(told(), [has_all], RULES) == ()


SHAPE = ModelShape(layer_count=6, kv_bytes_per_token_layer=10)


def carrier(index: int, *pieces: Span, rows: float = 0.0, kv_sessions: int = 3, layer_s: float = 0.01) -> Carrier:
    layers = sum(piece.layer_count for piece in pieces)
    return Carrier(
        address=PeerAddress(node=node(index), endpoints=()),
        stage=StageSpec(model=MODEL, pieces=pieces),
        speed=Speed(layer_s_1=layer_s, layer_s_4=layer_s, layer_s_8=layer_s),
        kv_free_bytes=kv_sessions * layers * 10 * cells.SESSION_TOKENS,
        tokens_per_s=rows,
    )


SPANS = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda at: Span(at[0], min(at[0] + at[1], 6)))


@given(st.lists(st.tuples(SPANS, st.floats(0, 100), st.integers(0, 4)), max_size=6), st.none() | st.floats(0, 1e4))
@settings(max_examples=200)
def test_a_digest_tells_no_more_than_the_devices_hold(
    held: list[tuple[Span, float, int]], capacity: float | None
) -> None:
    carriers = [carrier(index, span, rows=rows, kv_sessions=kv) for index, (span, rows, kv) in enumerate(held)]
    holders = [sum(covered(6, [each.stage])[layer] for each in carriers) for layer in range(6)]
    found = digest_of(MODEL, SHAPE, carriers, holders, capacity)
    assert found.servable == all(holders)
    assert found.servable == (not found.missing)
    assert found.copies_min == min(holders)
    assert found.kv_free_sessions <= sum(each.kv_free_bytes for each in carriers) / (6 * 10 * cells.SESSION_TOKENS) + 1
    if found.servable and capacity is None:
        total = sum(16 / 0.01 for _ in carriers)
        assert found.tokens_per_s_max <= total / 6 + 1e-6


def test_a_cell_is_overloaded_when_its_devices_are_busy_on_every_layer() -> None:
    both = (Span(0, 3), Span(3, 6))
    idle = digest_of(MODEL, SHAPE, [carrier(0, *both, rows=1.0)], [1] * 6, 100.0)
    busy = digest_of(MODEL, SHAPE, [carrier(0, *both, rows=95.0)], [1] * 6, 100.0)
    half = digest_of(MODEL, SHAPE, [carrier(0, both[0], rows=95.0), carrier(1, both[1], rows=5.0)], [1] * 6, 100.0)
    assert [overloaded(each, RULES) for each in (idle, busy, half)] == [False, True, False]
