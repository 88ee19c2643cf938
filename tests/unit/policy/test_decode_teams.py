"""Sessions that decode together stay together: even teams, no calls for single rows that were left behind, and no row
that waits for ever."""

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.ids import SessionId
from fallow.policy.batching import CALL_COST, GATHER_S, ROW_COST, decode_limit, patience_s
from fallow.policy.decode_teams import DecodeTeams

PATIENCE_S = 0.005


def names(count: int) -> list[SessionId]:
    return [SessionId(f"{number:032x}") for number in range(count)]


class Teams:
    """`DecodeTeams` with a clock that stands until it is set."""

    def __init__(self, teams: int) -> None:
        self.known = DecodeTeams()
        self.teams = teams
        self.now_s = 0.0

    def wait_s(self, *ready: SessionId) -> float:
        return self.known.wait_s(ready, self.teams, self.now_s, PATIENCE_S)

    def choose(self, *ready: SessionId) -> list[SessionId]:
        return self.known.choose(ready, self.teams, self.now_s, PATIENCE_S)


@given(st.integers(1, 24), st.integers(1, 4))
def test_everybody_is_served_once_a_round_in_teams_that_are_even_and_stay(count: int, teams: int) -> None:
    """Lockstep: a team leaves, comes back together, and is the same one again."""
    known, everybody = Teams(teams), names(count)
    rounds = []
    for _ in range(3):
        ready, served = list(everybody), []
        while ready:
            team = known.choose(*ready)
            served.append(team)
            ready = [session for session in ready if session not in team]
        assert sorted(session for team in served for session in team) == everybody
        rounds.append(served)
    sizes = [len(team) for team in rounds[0]]
    assert len(sizes) == min(count, teams)
    assert max(sizes) - min(sizes) <= 1
    assert rounds[0] == rounds[1] == rounds[2]


def test_a_row_that_missed_its_team_waits_for_it_and_comes_along() -> None:
    known, (a, b, c, d) = Teams(2), names(4)
    assert known.choose(a, b, c, d) == [a, c]
    assert known.choose(b, d) == [b, d]
    assert known.wait_s(c) == PATIENCE_S  # a is late
    assert known.wait_s(c, b, d) == 0.0
    assert known.choose(c, b, d) == [b, d]  # others go on meanwhile
    known.now_s = 2 * PATIENCE_S
    assert known.wait_s(c) == pytest.approx(PATIENCE_S)  # that was no waiting
    assert known.wait_s(c, a) == 0.0
    assert known.choose(c, a) == [c, a]


def test_who_was_waited_for_in_vain_is_not_waited_for_again_until_it_comes() -> None:
    known, (a, b, c, d) = Teams(2), names(4)
    assert known.choose(a, b, c, d) == [a, c]
    assert known.wait_s(c) == PATIENCE_S
    known.now_s = PATIENCE_S
    assert known.wait_s(c) == 0.0
    assert known.choose(c) == [c]
    assert known.wait_s(c) == 0.0
    assert known.choose(c) == [c]
    assert known.choose(a, c) == [a, c]  # the smaller team takes it back


def test_who_was_not_waited_for_stays_in_its_team() -> None:
    known, (a, b, c, d) = Teams(2), names(4)
    assert known.choose(a, b, c, d) == [a, c]
    assert known.choose(c) == [c]  # there was something else to compute
    assert known.wait_s(c) == PATIENCE_S
    known.known.wait_again()  # a chunk of a prompt took longer than anybody waits
    known.now_s = 2 * PATIENCE_S
    assert known.choose(c) == [c]
    assert known.wait_s(c) == pytest.approx(PATIENCE_S)


def test_who_missed_a_round_of_all_other_teams_has_no_team_either() -> None:
    """A finished conversation, or a slow client: its partner must not wait for ever, nor again at every token."""
    known, (a, idle, c, d) = Teams(2), names(4)
    assert known.choose(a, c, idle, d) == [a, idle]
    for _ in range(2):
        assert known.choose(c, d) == [c, d]
    assert known.choose(a, c, d) == [c, d]
    assert known.choose(a, c, d) == [a]
    assert known.choose(c, d, a) == [c, d]
    assert known.choose(a, c, d) == [a], "it is its whole team by now"


def test_the_ended_are_not_waited_for_and_rows_change_over_to_smaller_teams() -> None:
    known, (a, b, c, d) = Teams(2), names(4)
    known.choose(a, b, c, d)
    for ended in (a, c):
        known.known.forget(ended)
    assert known.choose(b, d) == [b]
    assert known.choose(d) == [d]


def test_fewer_teams_than_before_take_everybody() -> None:
    known, everybody = Teams(3), names(6)
    known.choose(*everybody)
    known.teams = 1
    assert sorted(known.choose(*everybody)) == everybody


SESSIONS = names(6)
EVENTS = st.tuples(
    st.sets(st.sampled_from(SESSIONS)),  # who comes
    st.one_of(st.none(), st.sampled_from(SESSIONS)),  # who ends
    st.sampled_from([0.0, PATIENCE_S / 2, 2 * PATIENCE_S]),  # how long is waited for rows, where somebody waits
    st.booleans(),  # whether a chunk of a prompt comes between
)


def calls_max(older: int, teams: int) -> int:
    """The bound that `decode_teams.py` names: calls until a row is computed that came when so many were there."""
    return (older + 1) * teams


@given(st.lists(EVENTS, max_size=10), st.integers(1, 3), st.sets(st.sampled_from(SESSIONS)))
def test_whatever_happens_every_row_is_computed_within_so_many_calls(
    events: list[tuple[set[SessionId], SessionId | None, float, bool]], teams: int, eager: set[SessionId]
) -> None:
    """`eager`: whoever comes again as soon as it was computed. In the end nobody else does."""
    known, now_s = DecodeTeams(), 0.0
    left: dict[SessionId, int] = {}
    for arriving, ended, waited_s, prompt in [*events, *[(set[SessionId](), None, 0.0, False)] * 24]:
        for session in sorted(arriving - left.keys()):
            left[session] = calls_max(len(left), teams)
        if ended is not None:
            known.forget(ended)
            left.pop(ended, None)
        if not left:
            continue
        if prompt:
            known.wait_again()
        elif waited_s:
            now_s += min(waited_s, known.wait_s(list(left), teams, now_s, PATIENCE_S))
        chosen = known.choose(list(left), teams, now_s, PATIENCE_S)
        assert chosen
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= left.keys()
        left = {session: calls - 1 for session, calls in left.items() if session not in chosen}
        assert all(left.values()), "a row that is still there may not have used up its calls"
        for session in sorted(eager.intersection(chosen)):
            left[session] = calls_max(len(left), teams)


@given(st.floats(0, 10))
def test_patience_costs_no_more_than_the_call_that_it_may_save(row_s: float) -> None:
    assert GATHER_S <= patience_s(row_s) <= max(GATHER_S, CALL_COST * row_s)


# --- a chain of two devices, closed by a gateway ---------------------------------------------------------------------

ROW_S = 0.007
"""One row in one half of the default model."""
TOKEN_S = 0.0012
"""The gateway, from a result to the next token."""
JITTER = 0.1
"""Of what everybody takes, in the mean."""
HOP_S = 0.0004
STREAMS = 8


class TwoDevices:
    """Streams that decode over two halves of a model: who is computed when, and in calls of how many rows."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._teams = DecodeTeams()
        self._now_s = 0.0
        self._noted = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ready: tuple[list[SessionId], list[SessionId]] = ([], [])
        self._busy = [False, False]
        self._gathers_s: float | None = None
        self._gateway_s = 0.0
        self.calls: tuple[list[int], list[int]] = ([], [])
        for session in names(STREAMS):
            self._later(self._random.uniform(0, 0.5), self._arrive(0, session))

    def run(self, until_s: float) -> None:
        while self._now_s < until_s:
            self._now_s, _, event = heapq.heappop(self._events)
            event()
            for device in (0, 1):
                self._begin(device)

    def _later(self, after_s: float, event: Callable[[], None]) -> None:
        self._noted += 1
        heapq.heappush(self._events, (self._now_s + after_s, self._noted, event))

    def _about(self, time_s: float) -> float:
        return time_s * (1 + self._random.expovariate(1 / JITTER))

    def _arrive(self, device: int, session: SessionId) -> Callable[[], None]:
        return lambda: self._ready[device].append(session)

    def _begin(self, device: int) -> None:
        ready = self._ready[device]
        if self._busy[device] or not ready:
            return
        chosen = self._first() if device == 0 else self._second()
        if not chosen:
            return
        self._busy[device] = True
        self.calls[device].append(len(chosen))
        for session in chosen:
            ready.remove(session)
        took_s = ROW_S * (CALL_COST + len(chosen) * ROW_COST)
        self._later(self._about(took_s), lambda: self._done(device, chosen))

    def _first(self) -> list[SessionId]:
        ready, patience = self._ready[0], patience_s(ROW_S)
        wait_s = self._teams.wait_s(ready, 2, self._now_s, patience)
        if wait_s:
            self._later(wait_s, lambda: None)
            return []
        return self._teams.choose(ready, 2, self._now_s, patience)

    def _second(self) -> list[SessionId]:
        ready, limit = self._ready[1], decode_limit(STREAMS, 2)
        if len(ready) < limit and self._gathers_s is None:
            self._gathers_s = self._now_s + GATHER_S
            self._later(GATHER_S, lambda: None)
        if len(ready) < limit and self._gathers_s is not None and self._now_s < self._gathers_s:
            return []
        self._gathers_s = None
        return list(ready[:limit])

    def _done(self, device: int, chosen: list[SessionId]) -> None:
        self._busy[device] = False
        for session in chosen:
            way_s = self._about(HOP_S)
            if device == 0:
                self._later(way_s, self._arrive(1, session))
            else:
                self._gateway_s = max(self._gateway_s, self._now_s) + self._about(TOKEN_S)
                self._later(self._gateway_s - self._now_s + way_s, self._arrive(0, session))


@pytest.mark.parametrize("seed", range(3))
def test_eight_streams_over_two_devices_run_in_full_calls(seed: int) -> None:
    """Goal: what a team saves is not lost to waiting too little or to rows that are scattered. Method: 8 streams come
    one after the other and decode for 10 s on modelled devices; the first 2 s do not count."""
    devices = TwoDevices(seed)
    devices.run(2.0)
    for calls in devices.calls:
        calls.clear()
    devices.run(10.0)
    for calls in devices.calls:
        assert calls.count(STREAMS // 2) / len(calls) >= 0.94
