"""How decode calls are shared out between the stages of a chain: groups, and waiting for rows that belong together."""

import gc
import weakref

import pytest
from engine_world import Driver, family, name_of, step_of
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span
from fallow.policy.batching import GATHER_S, decode_groups, decode_limit


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


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def decoding(count: int) -> tuple[Driver, list[str], Time]:
    """The first half of a model, with sessions that have their prompts behind them."""
    model, time = family("llama", Quantisation.Q8), Time()
    driver = Driver(model.hosted(Span(0, 2), clock=time))
    sessions = [name_of(number) for number in range(count)]
    for session in sessions:
        driver.core.open(session, model.digest, Span(0, 2), 50)
        driver.run(step_of(session, 0, [1, 2, 3]))
    return driver, sessions, time


def next_row(driver: Driver, session: str, position: int) -> int:
    return int(driver.submit(step_of(session, position, [4], Phase.DECODE)))


def turn(driver: Driver) -> list[int]:
    """Compute one call; whose tickets were answered."""
    driver.core.turn()
    return [ticket for ticket, _ in driver.core.outcomes()]


def test_half_a_model_computes_one_team_a_call() -> None:
    driver, sessions, _ = decoding(4)
    tickets = [next_row(driver, session, 3) for session in sessions]
    done = []
    while driver.core.has_work:
        assert driver.core.gather_s() == 0.0
        done.append(turn(driver))
    assert done == [[tickets[0], tickets[2]], [tickets[1], tickets[3]]]


def test_a_team_waits_for_who_is_missing_and_not_for_ever() -> None:
    driver, sessions, time = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    early = next_row(driver, sessions[0], 4)
    patience = driver.core.gather_s()
    assert patience >= GATHER_S
    time.now_s += patience / 2
    assert driver.core.gather_s() == pytest.approx(patience / 2)
    late = next_row(driver, sessions[2], 4)
    assert driver.core.gather_s() == 0.0
    assert turn(driver) == [early, late]

    alone = next_row(driver, sessions[0], 5)
    assert driver.core.gather_s() == pytest.approx(patience), "each token has its own time"
    time.now_s += 2 * patience
    assert driver.core.gather_s() == 0.0
    assert turn(driver) == [alone]
    next_row(driver, sessions[0], 6)
    assert driver.core.gather_s() == 0.0, "the other was waited for in vain"


def test_whoever_is_idle_holds_up_nobody_though_others_are_always_there() -> None:
    """The partner of the first has a finished conversation; the other team is whole again at every call."""
    driver, sessions, _ = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    waits = next_row(driver, sessions[0], 4)
    for position in (4, 5):
        for session in (sessions[1], sessions[3]):
            next_row(driver, session, position)
        assert driver.core.gather_s() == 0.0
        done = turn(driver)
    assert done == [waits]


def test_nobody_is_waited_for_while_a_prompt_can_be_computed_and_nobody_leaves_its_team_for_that() -> None:
    driver, sessions, time = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    early = next_row(driver, sessions[0], 4)
    patience = driver.core.gather_s()
    driver.submit(step_of(sessions[1], 4, [1, 2, 3]))
    assert driver.core.gather_s() == 0.0
    assert len(turn(driver)) == 1, "the prompt is computed, since rows were computed before it"
    time.now_s += 2 * patience
    assert turn(driver) == [early]

    early = next_row(driver, sessions[0], 5)
    assert driver.core.gather_s() == pytest.approx(patience), "its team is as it was"
    late = next_row(driver, sessions[2], 4)
    assert driver.core.gather_s() == 0.0
    assert turn(driver) == [early, late]


def test_a_model_that_is_unloaded_while_a_row_waits_gives_its_memory_back() -> None:
    driver, sessions, _ = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    next_row(driver, sessions[0], 4)
    assert driver.core.gather_s() > 0.0
    [(digest, hosted)] = driver.core._models.items()
    gone = weakref.ref(hosted)
    del hosted
    driver.core.unload(digest)
    gc.collect()
    assert gone() is None
