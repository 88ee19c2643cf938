"""Sessions that decode together stay together: even teams, and no calls for single rows that were left behind."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.ids import SessionId
from fallow.policy.batching import CALL_COST, GATHER_S, patience_s
from fallow.policy.decode_teams import DecodeTeams


def names(count):
    return [SessionId(f"{number:032x}") for number in range(count)]


@given(st.integers(1, 24), st.integers(1, 4))
def test_everybody_is_served_once_a_round_in_teams_that_are_even_and_stay(count, teams):
    """Lockstep: a team leaves, comes back together, and is the same one again."""
    known, everybody = DecodeTeams(), names(count)
    rounds = []
    for _ in range(3):
        ready, served = list(everybody), []
        while ready:
            team = known.whole(ready, teams)
            served.append(team)
            ready = [session for session in ready if session not in team]
        assert sorted(session for team in served for session in team) == everybody
        rounds.append(served)
    sizes = [len(team) for team in rounds[0]]
    assert len(sizes) == min(count, teams)
    assert max(sizes) - min(sizes) <= 1
    assert rounds[0] == rounds[1] == rounds[2]


def test_a_row_that_missed_its_team_waits_for_it_and_comes_along():
    known, (a, b, c, d) = DecodeTeams(), names(4)
    first = known.whole([a, b, c, d], 2)
    assert first == [a, c]
    assert known.whole([b, d], 2) == [b, d]
    assert known.whole([c], 2) == []  # a is late
    assert known.whole([c, b, d], 2) == [b, d]  # others go on meanwhile
    assert known.whole([c, a], 2) == [c, a]


def test_who_was_waited_for_in_vain_is_not_waited_for_again_until_it_comes():
    known, (a, b, c, d) = DecodeTeams(), names(4)
    assert known.whole([a, b, c, d], 2) == [a, c]
    assert known.part([c], 2) == [c]
    assert known.whole([c], 2) == [c]
    assert known.whole([a, c], 2) == [a, c]  # the smaller team takes it back


def test_the_ended_are_not_waited_for_and_rows_change_over_to_smaller_teams():
    known, (a, b, c, d) = DecodeTeams(), names(4)
    known.whole([a, b, c, d], 2)
    for ended in (a, c):
        known.forget(ended)
    assert known.whole([b, d], 2) == [b]
    assert known.whole([d], 2) == [d]


def test_fewer_teams_than_before_take_everybody():
    known, everybody = DecodeTeams(), names(6)
    known.whole(everybody, 3)
    assert sorted(known.whole(everybody, 1)) == everybody


ARRIVALS = st.tuples(st.sets(st.integers(0, 5)), st.integers(1, 3), st.one_of(st.none(), st.integers(0, 5)))
"""Who comes, how many teams there are to be, and who ends."""


@given(st.lists(ARRIVALS, max_size=12))
def test_whatever_happens_a_call_has_rows_that_are_here_and_somebody_goes_on(events):
    known, everybody = DecodeTeams(), names(6)
    ready = []
    for arriving, teams, ended in events:
        ready += [everybody[index] for index in arriving if everybody[index] not in ready]
        if ended is not None:
            known.forget(everybody[ended])
        if not ready:
            continue
        team = known.whole(ready, teams) or known.part(ready, teams)
        assert team
        assert len(set(team)) == len(team)
        assert set(team) <= set(ready)
        ready = [session for session in ready if session not in team]


@given(st.floats(0, 10))
def test_patience_costs_no_more_than_the_call_that_it_may_save(row_s):
    assert GATHER_S <= patience_s(row_s) <= max(GATHER_S, CALL_COST * row_s)
