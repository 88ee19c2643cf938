"""When a token is overdue: by the waits of its own chain, and by nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.frames import Phase
from fallow.gateway.progress import OVERDUE_S, OVERDUE_WAITS, Progress
from tests.unit.gateway.test_keys import HandClock

WAITS_S = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60)


class Chain:
    """A chain's progress, and the clock that it goes by."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.progress = Progress(self.clock)

    def give(self, wait_s: float, phase: Phase = Phase.DECODE) -> None:
        """A result that its client waited so long for."""
        self.progress.begins()
        self.clock.now_s += wait_s
        self.progress.came(phase)
        self.progress.begins()

    def overdue_after(self, wait_s: float) -> bool:
        self.clock.now_s += wait_s
        late = self.progress.overdue()
        self.clock.now_s -= wait_s
        return late


@given(WAITS_S, st.floats(0.0, 20.0))
def test_none_is_overdue_that_takes_no_longer_than_others_of_late(waits_s: list[float], wait_s: float) -> None:
    chain = Chain()
    for each_s in waits_s:
        chain.give(each_s)
    at_once = chain.overdue_after(0.99 * OVERDUE_S)
    in_the_end = chain.overdue_after(1.01 * OVERDUE_S + OVERDUE_WAITS * max(waits_s))
    assert (at_once, in_the_end) == (False, True)
    if chain.overdue_after(wait_s):
        assert wait_s > OVERDUE_WAITS * waits_s[-1] * 0.999
        assert chain.overdue_after(2 * wait_s)


def test_a_long_wait_is_forgotten_in_time() -> None:
    chain = Chain()
    chain.give(2.0)
    for _ in range(10):
        chain.give(0.1)
    assert not chain.overdue_after(1.5 * OVERDUE_S)
    for _ in range(50):
        chain.give(0.1)
    assert chain.overdue_after(1.5 * OVERDUE_S)


def test_a_prompt_is_never_overdue_and_tells_nothing_about_tokens() -> None:
    chain = Chain()
    assert not chain.overdue_after(100.0)
    chain.give(9.0, Phase.PREFILL)
    assert not chain.overdue_after(100.0)
    chain.give(0.1)
    assert chain.overdue_after(1.5 * OVERDUE_S)
    chain.progress.starts_anew()
    assert not chain.overdue_after(100.0)


def test_what_was_computed_anew_tells_nothing_about_tokens() -> None:
    chain = Chain()
    chain.give(0.1)
    chain.progress.rebuilds(3000)
    chain.give(10.0)
    assert chain.overdue_after(1.5 * OVERDUE_S)


@given(WAITS_S, st.floats(0.0, 20.0))
def test_what_is_overdue_was_late_before(waits_s: list[float], wait_s: float) -> None:
    chain = Chain()
    for each_s in waits_s:
        chain.give(each_s)
    chain.clock.now_s += wait_s
    assert chain.progress.late() or not chain.progress.overdue()
