"""How decode calls are shared out between the stages of a chain: groups, and waiting for rows that belong together."""

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


def decoding(count: int) -> tuple[Driver, list[str]]:
    """The first half of a model, with sessions that have their prompts behind them."""
    model = family("llama", Quantisation.Q8)
    driver = Driver(model.hosted(Span(0, 2)))
    sessions = [name_of(number) for number in range(count)]
    for session in sessions:
        driver.core.open(session, model.digest, Span(0, 2), 50)
        driver.run(step_of(session, 0, [1, 2, 3]))
    return driver, sessions


def next_row(driver: Driver, session: str, position: int) -> int:
    return int(driver.submit(step_of(session, position, [4], Phase.DECODE)))


def test_half_a_model_computes_one_team_a_call() -> None:
    driver, sessions = decoding(4)
    tickets = [next_row(driver, session, 3) for session in sessions]
    done = []
    while driver.core.has_work:
        assert driver.core.gather_s(0.0) == 0.0
        driver.core.turn()
        done.append([ticket for ticket, _ in driver.core.outcomes()])
    assert done == [[tickets[0], tickets[2]], [tickets[1], tickets[3]]]


def test_a_team_waits_for_who_is_missing_and_not_for_ever() -> None:
    driver, sessions = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    early = next_row(driver, sessions[0], 4)
    patience = driver.core.gather_s(0.0)
    assert patience >= GATHER_S
    assert driver.core.gather_s(patience / 2) == patience / 2
    late = next_row(driver, sessions[2], 4)
    assert driver.core.gather_s(patience / 2) == 0.0
    driver.core.turn()
    assert [ticket for ticket, _ in driver.core.outcomes()] == [early, late]

    alone = next_row(driver, sessions[0], 5)
    assert driver.core.gather_s(2.0) == pytest.approx(patience), "each token has its own time"
    assert driver.core.gather_s(2.0 + 2 * patience) == 0.0
    driver.core.turn()
    assert [ticket for ticket, _ in driver.core.outcomes()] == [alone]
    next_row(driver, sessions[0], 6)
    assert driver.core.gather_s(3.0) == 0.0, "the other was waited for in vain"


def test_nobody_is_waited_for_while_a_prompt_can_be_computed() -> None:
    driver, sessions = decoding(4)
    for session in sessions:
        next_row(driver, session, 3)
    driver.settle()
    next_row(driver, sessions[0], 4)
    driver.submit(step_of(sessions[1], 4, [1, 2, 3]))
    assert driver.core.gather_s(0.0) == 0.0
