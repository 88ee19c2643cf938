"""Turns by work: nobody gets more than a chunk ahead of another who waits, and a rest saves nothing up."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.ids import SessionId
from fallow.policy.fair_turns import FairTurns

NAMES = [SessionId(letter) for letter in "abcd"]


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=4), st.integers(1, 300))
def test_who_waits_throughout_gets_the_same_work_but_for_one_chunk(chunks: list[float], turns: int) -> None:
    fair = FairTurns()
    had = dict.fromkeys(NAMES[: len(chunks)], 0.0)
    size = dict(zip(had, chunks, strict=True))
    for _ in range(turns):
        name = fair.next(had)
        fair.took(name, size[name])
        had[name] += size[name]
    for one in had:
        for other in had:
            assert had[one] - had[other] <= size[one] + 1e-6


def test_who_comes_late_or_rested_begins_where_the_others_stand() -> None:
    fair = FairTurns()
    one, late, third, _ = NAMES
    for _ in range(50):
        fair.took(one, 10.0)
    turns = []
    for _ in range(20):
        turns.append(fair.next([one, late, third]))
        fair.took(turns[-1], 10.0)
    assert {turns.count(name) for name in (one, late, third)} <= {6, 7}
    fair.forget(one)
    assert fair.next([late, one]) in (late, one)
