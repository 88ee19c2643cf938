"""How decode calls are shared out between the stages of a chain: groups, and waiting for rows that belong together."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.batching import decode_groups, decode_limit


def test_a_whole_model_takes_everybody_at_once() -> None:
    assert decode_groups(1.0) == decode_groups(0.7) == 1
    assert decode_limit(8, 1) == 8


def test_halves_take_turns_in_halves_and_thirds_in_thirds() -> None:
    assert (decode_groups(0.5), decode_groups(0.4)) == (2, 2)
    assert decode_groups(0.33) == 3
    assert decode_limit(8, 2) == 4
    assert decode_limit(1, 3) == 1


@given(st.integers(1, 64), st.floats(0.01, 1.0))
def test_as_many_calls_as_groups_serve_everybody(active: int, share: float) -> None:
    groups = decode_groups(share)
    limit = decode_limit(active, groups)
    assert 1 <= limit <= active
    assert limit * groups >= active
