"""Devices' lives: the published figures come out, both forms agree, and a life does not depend on the fleet's size."""

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fallow.simulator.habits import HOME_DOWN, HOME_UP, mean_hours
from fallow.simulator.life_history import learned, spells, window_shares
from fallow.simulator.lives import (
    DAY_S,
    WEEK_S,
    Lives,
    declared_windows,
    draw_lives,
    forced_away,
    scaled,
    window_left_s,
)
from fallow.simulator.scenario import Event, EventKind, Habit, Population

NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)
"""Each example draws whole lives: shrinking one would take minutes, and its seed says enough."""


def population(habit: Habit, count: int = 400, **fields: object) -> Population:
    return msgspec.convert({"name": habit.value, "habit": habit, "count": count, **fields}, Population)


def all_habits(count: int) -> tuple[Population, ...]:
    return tuple(population(habit, count) for habit in Habit)


def free_share(lives: Lives) -> float:
    total_s = sum(until - start for device in range(lives.devices) for start, until in lives.intervals(device))
    return float(total_s / lives.devices / (lives.end_s - lives.begin_s))


@pytest.mark.parametrize(
    ("habit", "low", "high"),
    [
        (Habit.ALWAYS, 0.995, 1.0),
        (Habit.HOME, 0.35, 0.56),  # on for 53 % of the time, and used for a part of that
        (Habit.OFFICE, 0.5, 0.7),
        (Habit.CAMPUS, 0.84, 0.92),
        (Habit.VEHICLE, 0.14, 0.21),  # plugged in 14 to 21 % of the time
        (Habit.MEMORYLESS, 0.63, 0.70),
    ],
)
def test_devices_are_free_for_the_published_share_of_the_time(habit: Habit, low: float, high: float) -> None:
    lives = draw_lives([population(habit)], 11, 0.0, 4 * WEEK_S, 0.0)
    assert low <= free_share(lives) <= high


def test_cars_are_parked_95_percent_of_the_time_and_much_less_plugged_in() -> None:
    lives = draw_lives([population(Habit.VEHICLE)], 12, 0.0, 4 * WEEK_S, 0.0)
    assert 0.93 <= 1 - lives.driven_share.mean() <= 0.97
    assert free_share(lives) < 0.25


def test_campus_absences_follow_the_weibull_of_the_study() -> None:
    lives = draw_lives([population(Habit.CAMPUS, 600)], 13, 0.0, 4 * WEEK_S, 0.0)
    found = spells(lives)
    inner = (found.from_s > 0) & ~found.cut
    hours = (found.until_s - found.from_s)[inner] / 3600
    # The median of Weibull(0.45, 4.16) is 1.84 h; the clock's daily rhythm moves it a little.
    assert 1.3 <= np.median(hours) <= 2.4


def test_offices_are_free_at_night_and_homes_are_not_free_in_the_evening() -> None:
    lives = draw_lives([population(Habit.OFFICE), population(Habit.HOME)], 14, 0.0, 2 * WEEK_S, 0.0)
    at = {step.at_s / 3600: step.available.copy() for step in lives.walk(0.0, 3600.0)}
    office, home = np.arange(400), np.arange(400, 800)
    assert at[24 + 3][office].mean() > 2 * at[24 + 11][office].mean()
    assert at[24 + 3][home].mean() > 1.7 * at[24 + 21][home].mean()
    assert at[5 * 24 + 11][office].mean() > 2 * at[24 + 11][office].mean()


@settings(max_examples=10, deadline=None, phases=NO_SHRINK)
@given(seed=st.integers(0, 2**32), at_h=st.floats(-20.0, 47.0), step_s=st.floats(3600.0, 40_000.0))
def test_walking_and_intervals_agree(seed: int, at_h: float, step_s: float) -> None:
    lives = draw_lives(all_habits(4), seed, 30.0, 2 * DAY_S)
    intervals = [lives.intervals(device) for device in range(lives.devices)]
    edges = [lives.edges_s[lives.offsets[device] : lives.offsets[device + 1]] for device in range(lives.devices)]
    for step in lives.walk(at_h * 3600, step_s):
        if step.at_s in lives.edges_s or step.at_s >= lives.end_s:
            continue
        here = [any(start <= step.at_s < until for start, until in spans) for spans in intervals]
        assert here == step.available.tolist()
        since = [max([lives.begin_s, *own[own <= step.at_s]]) for own in edges]
        assert np.allclose(step.since_s, since)


def test_intervals_are_ascending_and_inside_the_draw() -> None:
    lives = draw_lives(all_habits(200), 5, 12.0, 3 * DAY_S)
    for device in range(lives.devices):
        edges = [edge for span in lives.intervals(device) for edge in span]
        assert edges == sorted(edges)
        assert not edges or (lives.begin_s <= edges[0] and edges[-1] <= lives.end_s)


@settings(max_examples=10, deadline=None, phases=NO_SHRINK)
@given(seed=st.integers(0, 2**32), few=st.integers(1, 20), days=st.integers(1, 3))
def test_a_life_is_the_same_in_a_larger_fleet_and_a_longer_run(seed: int, few: int, days: int) -> None:
    small = draw_lives(all_habits(few), seed, 0.0, days * DAY_S)
    large = draw_lives(all_habits(25), seed, 0.0, 4 * DAY_S)
    for group in range(len(small.habits)):
        for index in range(few):
            cut = [
                (start, min(until, small.end_s))
                for start, until in large.intervals(group * 25 + index)
                if start < small.end_s
            ]
            assert small.intervals(group * few + index) == cut


def test_another_seed_is_another_life() -> None:
    one, other = (draw_lives([population(Habit.HOME, 5)], seed, 0.0, DAY_S) for seed in (1, 2))
    assert [one.intervals(i) for i in range(5)] != [other.intervals(i) for i in range(5)]


def test_owners_who_declare_keep_their_windows_mostly() -> None:
    lives = draw_lives([population(Habit.OFFICE, 300, declares=1.0)], 3, 0.0, 2 * WEEK_S, 0.0)
    quiet = draw_lives([population(Habit.OFFICE, 300, declares=0.0)], 3, 0.0, 2 * WEEK_S, 0.0)
    assert not np.isfinite(quiet.busy_h).any()
    ends_inside = 0
    found = spells(lives)
    for device, until_s, cut in zip(found.device, found.until_s, found.cut, strict=True):
        hour = (until_s / 3600) % 168
        windows = declared_windows(lives.busy_h[device])
        ends_inside += not cut and any(start < hour < end for start, end in windows)
    # What remains are machines switched off, and one workday in twenty.
    assert ends_inside / len(found.device) < 0.5


def test_a_vehicles_declared_departure_comes_true_mostly() -> None:
    lives = draw_lives([population(Habit.VEHICLE, 400, declares=1.0)], 4, 0.0, 2 * WEEK_S, 0.0)
    found = spells(lives)
    told = np.isfinite(found.leaves_at_s) & ~found.cut
    late_h = np.abs(found.leaves_at_s - found.until_s)[told] / 3600
    assert 0.9 < (late_h < 0.6).mean() < 0.99
    assert np.all(learned(lives, 0.0, 2 * WEEK_S).departures.sum(axis=1) >= 0)


def test_the_time_left_in_a_window() -> None:
    busy = np.array([[[8.0, 18.0], [0.0, 0.0]], [[18.5, 23.0], [13.0, 23.0]], [[np.inf] * 2] * 2], dtype=np.float32)
    hour = 4 * 24 + 20.0  # Friday 20:00
    left_h = window_left_s(busy, hour) / 3600
    assert left_h[0] == pytest.approx(4 + 48 + 8)
    assert left_h[1] == 0.0
    assert np.isinf(left_h[2])
    assert declared_windows(busy[2]) == ()
    assert declared_windows(busy[0])[-1] == (4 * 24 + 18.0, 168.0)


def test_window_shares_are_the_declared_windows() -> None:
    lives = draw_lives([population(Habit.HOME, 50, declares=0.5)], 9, 0.0, DAY_S)
    shares = window_shares(lives)
    for device in range(50):
        hours = sum(end - start for start, end in declared_windows(lives.busy_h[device]))
        assert np.isnan(shares[device]).all() if not lives.declares[device] else shares[device].sum() == hours


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 100_000), min_size=1, max_size=8), devices=st.integers(1, 500))
def test_a_smaller_fleet_has_as_many_devices_as_asked(counts: list[int], devices: int) -> None:
    fleet = [
        msgspec.convert({"name": f"p-{i}", "habit": "home", "count": count}, Population)
        for i, count in enumerate(counts)
    ]
    smaller = scaled(fleet, devices)
    assert sum(item.count for item in smaller) == devices
    assert len(smaller) == min(len(fleet), devices) or devices < len(fleet)


def test_what_events_take_away() -> None:
    fleet = [population(Habit.HOME, 1000, region="here"), population(Habit.OFFICE, 500, region="there")]
    events = [
        Event(kind=EventKind.OUTAGE, at_s=100.0, duration_s=50.0, region="there"),
        Event(kind=EventKind.RECLAIM, at_s=1000.0, duration_s=600.0, hold_s=7200.0, population="home", share=0.5),
        Event(kind=EventKind.ROLLING_UPDATE, at_s=0.0, duration_s=900.0, population="office"),
        Event(kind=EventKind.FLASH_CROWD, at_s=0.0, duration_s=900.0, factor=3.0),
    ]
    away = forced_away(fleet, events, 1)
    outage = away.from_s == 100.0
    assert set(range(1000, 1500)) <= set(away.device[outage].tolist())
    reclaimed = away.device < 1000
    assert 420 <= reclaimed.sum() <= 580
    assert (away.from_s[reclaimed] >= 1000).all()
    assert (away.from_s[reclaimed] <= 1600).all()
    assert len(away.device) == 500 + reclaimed.sum() + 500
    assert (away.until_s > away.from_s).all()


def test_the_means_of_the_weibulls() -> None:
    assert mean_hours(HOME_UP) == pytest.approx(15.16, abs=0.05)
    assert mean_hours(HOME_DOWN) == pytest.approx(13.42, abs=0.05)
