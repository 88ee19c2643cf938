"""Which of two chains is ready first, and which stage holds the others up."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.recovery import first_behind, supersedes

ROWS = st.integers(1, 4096)
LAYERS = st.integers(1, 80)


@given(rows=ROWS, layers=LAYERS, data=st.data())
def test_a_second_chain_wins_when_it_has_no_more_left_to_compute_than_a_repair(
    rows: int, layers: int, data: st.DataObject
) -> None:
    missing, lost = data.draw(st.integers(0, rows)), data.draw(st.integers(0, layers))
    assert supersedes(missing, rows, lost, layers) == (missing / rows <= lost / layers)
    assert supersedes(0, rows, lost, layers), "one that is ready always does"
    assert supersedes(missing, rows, layers, layers), "nothing is left of the first"
    assert not supersedes(max(missing, 1), rows, 0, layers), "nothing of the first was lost"


def test_who_holds_a_chain_up() -> None:
    assert first_behind(100, (100, 100, 99)) == 2
    assert first_behind(100, (100, 60, 60)) == 1
    assert first_behind(100, (99, 99, 99)) == 0, "the gateway fed it"
    assert first_behind(100, (100, 100, 100)) == 2, "results come from the last one"
    assert first_behind(0, (0,)) == 0


@given(fed=ROWS, positions=st.lists(ROWS, min_size=1, max_size=8))
def test_nobody_is_blamed_who_is_as_far_as_the_one_before(fed: int, positions: list[int]) -> None:
    index = first_behind(fed, positions)
    before = [fed, *positions]
    assert all(positions[i] >= before[i] for i in range(index))
    assert positions[index] < before[index] or index == len(positions) - 1
