"""Liveness as a pure policy: dead peers are noticed in time, live ones are not condemned for our own pauses."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.policy.liveness import Liveness, Pulse, Verdict, excuse, heard, judge, pause_s, ping_due
from tests.unit.fabric.support import STEADY

LIVENESS = Liveness()
gaps = st.floats(0.1, 30.0)


def _noticed_after(gaps_s: list[float]) -> int | None:
    """How many looks, with these gaps between them, until a peer that went silent at 0 is lost."""
    pulse, now_s = heard(0.0), 0.0
    for looks, gap_s in enumerate(gaps_s, start=1):
        previous_s, now_s = now_s, now_s + gap_s
        pulse = excuse(pulse, pause_s(previous_s, now_s, LIVENESS), now_s)
        if judge(pulse, now_s, LIVENESS) is Verdict.LOST:
            return looks
    return None


@STEADY
@given(st.lists(st.floats(0.1, 0.24), min_size=20, max_size=20))
def test_with_a_punctual_loop_a_dead_peer_is_lost_within_two_seconds(gaps_s: list[float]) -> None:
    looks = _noticed_after(gaps_s)
    assert looks is not None
    assert LIVENESS.silence_s <= sum(gaps_s[:looks]) + 1e-9 <= LIVENESS.silence_s + 2 * LIVENESS.tick_s


@STEADY
@given(st.lists(st.floats(0.1, 0.6), min_size=20, max_size=20))
def test_ordinary_load_delays_it_by_two_looks_at_most(gaps_s: list[float]) -> None:
    looks = _noticed_after(gaps_s)
    assert looks is not None
    assert sum(gaps_s[:looks]) <= LIVENESS.silence_s + max(gaps_s[:looks])


@STEADY
@given(st.lists(gaps, min_size=40, max_size=40))
def test_a_dead_peer_is_noticed_however_the_loop_is_starved(gaps_s: list[float]) -> None:
    assert _noticed_after(gaps_s) is not None


@STEADY
@given(st.floats(0, 1.4), st.floats(0.7, 1e6))
def test_after_a_pause_of_ours_a_peer_gets_a_fresh_period(silent_s: float, paused_for_s: float) -> None:
    now_s = silent_s + paused_for_s
    paused_s = pause_s(silent_s, now_s, LIVENESS)
    assert paused_s > 0
    pulse = excuse(heard(0.0), paused_s, now_s)
    assert judge(pulse, now_s + LIVENESS.silence_s * 0.99, LIVENESS) is Verdict.ALIVE
    assert judge(pulse, now_s + LIVENESS.silence_s * 1.01, LIVENESS) is Verdict.LOST


@STEADY
@given(st.floats(0, 100), st.booleans(), st.floats(0, 100), st.floats(0, 100))
def test_a_pulse_never_moves_back_nor_into_the_future(
    heard_s: float, excused: bool, paused_s: float, later: float
) -> None:
    now_s = heard_s + later
    pulse = excuse(Pulse(heard_s, excused), paused_s, now_s)
    assert heard_s <= pulse.heard_s <= now_s


def test_no_pause_is_seen_in_a_loop_that_is_a_little_late() -> None:
    assert pause_s(1.0, 1.0 + LIVENESS.tick_s + LIVENESS.stall_s, LIVENESS) == 0.0


@STEADY
@given(st.floats(0, 10), st.floats(0, 10))
def test_pings_are_due_when_we_were_silent_or_the_round_trip_is_stale(sent_ago_s: float, pinged_ago_s: float) -> None:
    due = ping_due(100 - sent_ago_s, 100 - pinged_ago_s, 100, LIVENESS)
    if sent_ago_s < LIVENESS.ping_interval_s - 1e-6 and pinged_ago_s < LIVENESS.rtt_interval_s - 1e-6:
        assert not due
    if sent_ago_s > LIVENESS.ping_interval_s + 1e-6 or pinged_ago_s > LIVENESS.rtt_interval_s + 1e-6:
        assert due
