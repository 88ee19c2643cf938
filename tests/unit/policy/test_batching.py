"""Decode windows are the cheapest that cover, and turns starve nobody."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.batching import (
    CALL_COST,
    GAP_PADS_MAX,
    ROW_COST,
    SWAP_COST_PER_TOKEN,
    Swap,
    Turn,
    Window,
    chunk_rows,
    decode_windows,
    next_turn,
    plan_swap,
    waste,
)

SLOTS = st.sets(st.integers(0, 30), min_size=1, max_size=12).map(sorted)


def cost(windows):
    return sum(CALL_COST + ROW_COST * window.count for window in windows)


def cheapest(slots, rows_max):
    """Every way to break the slots into runs, tried."""
    best = {len(slots): 0.0}
    for start in reversed(range(len(slots))):
        ends = [end for end in range(start + 1, len(slots) + 1) if slots[end - 1] - slots[start] < rows_max]
        best[start] = min(CALL_COST + ROW_COST * (slots[end - 1] - slots[start] + 1) + best[end] for end in ends)
    return best[0]


@given(SLOTS)
def test_windows_cover_the_slots_in_order_without_overlap(slots):
    windows = decode_windows(slots, 64)
    covered = [slot for window in windows for slot in range(window.first, window.first + window.count)]
    assert covered == sorted(set(covered))
    assert set(slots) <= set(covered)
    assert all(window.first in slots and window.first + window.count - 1 in slots for window in windows)


@given(SLOTS)
def test_no_other_windows_are_cheaper(slots):
    assert cost(decode_windows(slots, 64)) <= cheapest(slots, 64) + 1e-9


@given(SLOTS, st.integers(1, 8))
def test_windows_are_never_larger_than_the_call(slots, rows_max):
    windows = decode_windows(slots, rows_max)
    assert all(window.count <= rows_max for window in windows)
    assert set(slots) <= {slot for window in windows for slot in range(window.first, window.first + window.count)}


def test_neighbours_share_a_call_and_strangers_do_not():
    assert decode_windows([2, 3, 4], 64) == (Window(2, 3),)
    assert decode_windows([2, 3 + GAP_PADS_MAX, 4 + 2 * GAP_PADS_MAX + 2], 64) == (
        Window(2, 2 + GAP_PADS_MAX),
        Window(6 + 2 * GAP_PADS_MAX, 1),
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_whoever_waits_is_served_within_two_turns(queues):
    """Whatever arrives: a decode step waits for one prefill chunk at most, a prefill for one decode call."""
    turn, waited = Turn.WAIT, {Turn.DECODE: 0, Turn.PREFILL: 0}
    for decoding, prefilling in queues:
        turn = next_turn(turn, decoding, prefilling)
        for kind, waiting in ((Turn.DECODE, decoding), (Turn.PREFILL, prefilling)):
            waited[kind] = 0 if turn is kind or not waiting else waited[kind] + 1
            assert waited[kind] <= 1
        assert (turn is Turn.WAIT) == (decoding == 0 and prefilling == 0)


@given(st.integers(1, 1000), st.integers(0, 9), st.integers(1, 128))
def test_chunks_are_bounded_and_smaller_in_company(remaining, decoding, rows_max):
    rows = chunk_rows(remaining, decoding, rows_max)
    assert 1 <= rows <= min(remaining, rows_max)
    assert rows <= chunk_rows(remaining, 0, rows_max)


@given(SLOTS, st.lists(st.integers(0, 400), min_size=31, max_size=31))
def test_swaps_end_with_neighbours_and_are_paid_for(slots, lengths):
    """With enough waste behind it, one swap after the other brings the sessions together and no swap is in vain."""
    slots, lengths, moves = list(slots), list(lengths), 0
    while (swap := plan_swap(slots, lengths, 1e9)) is not None:
        assert swap.one in slots
        assert swap.other not in slots
        assert swap.cost == (lengths[swap.one] + lengths[swap.other]) * SWAP_COST_PER_TOKEN
        assert plan_swap(slots, lengths, swap.cost * 0.99) is None or swap.cost == 0.0
        lengths[swap.one], lengths[swap.other] = lengths[swap.other], lengths[swap.one]
        slots = sorted({*slots} - {swap.one} | {swap.other})
        moves += 1
        assert moves < len(slots)
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    assert waste(slots, decode_windows(slots, 64)) == 0.0


@given(SLOTS)
def test_waste_is_what_neighbours_would_have_spared(slots):
    windows = decode_windows(slots, 64)
    assert abs(waste(slots, windows) - (cost(windows) - CALL_COST - ROW_COST * len(slots))) < 1e-9


def test_no_swap_before_as_much_is_lost_as_it_costs():
    cost_of_move = 200 * SWAP_COST_PER_TOKEN
    assert plan_swap([0, 2], [100, 100, 100], cost_of_move * 0.99) is None
    assert plan_swap([0, 2], [100, 100, 100], cost_of_move) == Swap(2, 1, cost_of_move)
    assert plan_swap([0, 1], [100, 100], 9.0) is None
    assert plan_swap([5], [100] * 6, 9.0) is None
