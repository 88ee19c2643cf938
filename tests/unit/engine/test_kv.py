"""The cache's room: reservations, slots, and memory that is taken late and given back."""

import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import KvExhausted
from fallow.engine.kv import KvBudget, LayerCache, Slots, slot_length


@given(st.integers(0, 1000), st.lists(st.integers(0, 400), max_size=20))
def test_the_budget_is_never_exceeded_and_refusals_change_nothing(total, wishes):
    budget, granted = KvBudget(total), []
    for wish in wishes:
        before = budget.free_bytes
        try:
            budget.reserve(wish)
            granted.append(wish)
        except KvExhausted:
            assert wish > before == budget.free_bytes
        assert budget.free_bytes == total - sum(granted) >= 0
    for wish in granted:
        budget.release(wish)
    assert budget.free_bytes == total


@given(st.integers(1, 100_000), st.integers(1, 10_000))
def test_slots_have_room_for_the_longest_session_and_a_pad(context, limit):
    length = slot_length(context, limit)
    assert min(context, limit) + 2 <= length <= min(context, limit) + 128
    assert length % 64 == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 7)), max_size=40))
def test_slots_are_given_once_and_follow_exchanges(operations):
    slots, taken = Slots(8), set()
    for give, one, other in operations:
        if give and one in taken:
            slots.give(one)
            taken.remove(one)
        elif one != other and not give:
            slots.exchange(one, other)
            moved = {one: other, other: one}
            taken = {moved.get(slot, slot) for slot in taken}
        elif len(taken) < 8:
            slot = slots.take()
            assert slot == min(set(range(8)) - taken)
            taken.add(slot)


def test_a_released_slot_gives_its_memory_back_and_neighbours_keep_theirs():
    cache = LayerCache(slots=3, kv_heads=2, max_len=128, head_dim=16)
    assert cache.keys[0].nbytes % mmap.PAGESIZE == 0
    for array in cache.arrays():
        array[:] = 1.0
    cache.release(1)
    for array in cache.arrays():
        assert np.all(array[[0, 2]] == 1.0)
        assert np.all(array[1] == 0.0)


def test_a_swap_exchanges_what_is_valid():
    cache = LayerCache(slots=3, kv_heads=2, max_len=64, head_dim=4)
    for number, array in enumerate(cache.arrays()):
        array[:] = np.arange(array.size, dtype=np.float32).reshape(array.shape) + number
    kept = [array.copy() for array in cache.arrays()]
    cache.swap(0, 10, 2, 30)
    for array, before in zip(cache.arrays(), kept, strict=True):
        assert np.array_equal(array[0, :, :30], before[2, :, :30])
        assert np.array_equal(array[2, :, :10], before[0, :, :10])
        assert np.array_equal(array[1], before[1])


def test_slots_run_out():
    slots = Slots(1)
    slots.take()
    with pytest.raises(KvExhausted, match="1 session slots"):
        slots.take()
