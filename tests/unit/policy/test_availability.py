"""Outlooks: what must hold for any history, and what a history of a known kind must teach."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import OUTLOOK_HORIZONS_S
from fallow.policy.availability import (
    AGE_EDGES_H,
    AGES,
    HOURS,
    Counts,
    Present,
    Rates,
    Stays,
    age_class,
    counted,
    departure_seen,
    faded,
    fit,
    no_history,
    outlook,
    prior_by_age,
    rates_of,
    survival,
)
from fallow.policy.availability_table import looked_up, pooled, tabulate

INF = float("inf")


def stays(*rows: tuple[float, float, float, bool], on_battery: bool = False) -> Stays:
    """Of one device: (hour of week, age, lasted, ended)."""
    columns = list(zip(*rows, strict=True))
    return Stays(
        device=np.zeros(len(rows), dtype=np.int64),
        hour_of_week=np.array(columns[0], dtype=float),
        age_h=np.array(columns[1], dtype=float),
        lasted_h=np.array(columns[2], dtype=float),
        ended=np.array(columns[3], dtype=bool),
        on_battery=np.full(len(rows), on_battery),
    )


def present(hour: float, age_h: float = 1.0, departs_in_h: float = INF, *, on_battery: bool = False) -> Present:
    return Present(
        hour_of_week=np.array([hour]),
        age_h=np.array([age_h]),
        departs_in_h=np.array([departs_in_h]),
        on_battery=np.array([on_battery]),
    )


def survives(rates: Rates, now: Present) -> list[float]:
    return list(outlook(rates, now).survival)


def random_counts(seed: int, devices: int) -> Counts:
    rng = np.random.default_rng(seed)
    exposed = rng.exponential(1.0, (devices, HOURS, AGES)) * (rng.random((devices, HOURS, AGES)) < 0.3)
    ends = rng.poisson(exposed * rng.exponential(0.5, (devices, HOURS, 1))).astype(float)
    return Counts(
        exposed_h=exposed,
        ends=ends,
        unplugged=rng.exponential(3.0, (devices, 2)),
        departures=rng.poisson(2.0, (devices, 2)).astype(float),
    )


# --- whatever the history ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    hour=st.floats(0.0, 167.999),
    age_h=st.floats(0.0, 2000.0),
    departs_in_h=st.one_of(st.just(INF), st.floats(-100.0, 200.0)),
    on_battery=st.booleans(),
    windows=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_an_outlook_is_a_falling_probability(
    seed: int, hour: float, age_h: float, departs_in_h: float, on_battery: bool, windows: float | None
) -> None:
    shares = None if windows is None else np.full((1, HOURS), windows)
    found = outlook(fit(random_counts(seed, 1), shares), present(hour, age_h, departs_in_h, on_battery=on_battery))
    assert len(found.survival) == len(OUTLOOK_HORIZONS_S)
    assert all(0.0 <= share <= 1.0 for share in found.survival)
    assert list(found.survival) == sorted(found.survival, reverse=True)
    assert 0.0 <= found.expected_s <= OUTLOOK_HORIZONS_S[-1] * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(2, 5))
def test_a_batch_gives_what_each_alone_gives(seed: int, devices: int) -> None:
    counts = random_counts(seed, devices)
    rng = np.random.default_rng(seed)
    now = Present(
        hour_of_week=rng.uniform(0, 168, devices),
        age_h=rng.exponential(5.0, devices),
        departs_in_h=np.where(rng.random(devices) < 0.5, rng.uniform(-1, 12, devices), INF),
        on_battery=rng.random(devices) < 0.5,
    )
    together, stays_h = survival(fit(counts), now)
    for row in range(devices):
        one = Counts(
            exposed_h=counts.exposed_h[row : row + 1],
            ends=counts.ends[row : row + 1],
            unplugged=counts.unplugged[row : row + 1],
            departures=counts.departures[row : row + 1],
        )
        alone, alone_h = survival(
            fit(one),
            Present(
                hour_of_week=now.hour_of_week[row : row + 1],
                age_h=now.age_h[row : row + 1],
                departs_in_h=now.departs_in_h[row : row + 1],
                on_battery=now.on_battery[row : row + 1],
            ),
        )
        assert np.allclose(together[row], alone[0])
        assert np.isclose(stays_h[row], alone_h[0])


@settings(max_examples=60, deadline=None)
@given(
    hour=st.floats(0.0, 500.0), age_h=st.floats(0.0, 100.0), lasted_h=st.floats(0.0, 400.0), ended=st.booleans(),
    cut=st.floats(0.0, 1.0),
)  # fmt: skip
def test_counting_loses_no_time_and_does_not_mind_how_it_is_cut(
    hour: float, age_h: float, lasted_h: float, ended: bool, cut: float
) -> None:
    whole = counted(no_history(1), stays((hour, age_h, lasted_h, ended)))
    first = lasted_h * cut
    parts = counted(no_history(1), stays((hour, age_h, first, False)))
    parts = counted(parts, stays((hour + first, age_h + first, lasted_h - first, ended)))
    assert whole.exposed_h.sum() == pytest.approx(lasted_h, abs=1e-6)
    assert whole.ends.sum() == ended
    assert np.allclose(whole.exposed_h, parts.exposed_h, atol=1e-6)
    assert parts.ends.sum() == ended


def test_time_is_counted_by_hour_of_the_week_and_age() -> None:
    counts = counted(no_history(1), stays((167.5, 0.9, 1.0, True)))
    assert counts.exposed_h[0, 167, 2] == pytest.approx(0.1)
    assert counts.exposed_h[0, 167, 3] == pytest.approx(0.4)
    assert counts.exposed_h[0, 0, 3] == pytest.approx(0.5)
    assert counts.ends[0, 0, 3] == 1.0


def test_ages_have_classes() -> None:
    assert age_class(np.array([-1.0, 0.0, *AGE_EDGES_H, 1e6])).tolist() == [0, 0, *range(AGES), AGES - 1]


def test_what_is_old_fades() -> None:
    counts = faded(random_counts(1, 2), 4.0)
    assert np.allclose(counts.exposed_h, random_counts(1, 2).exposed_h / 2)
    assert np.allclose(faded(counts, -3.0).ends, counts.ends)


# --- what it learns ---------------------------------------------------------------------------------


def test_without_history_it_believes_the_prior_and_age_is_a_good_sign() -> None:
    rates = fit(no_history(1))
    young, old = survives(rates, present(12.0, 0.05)), survives(rates, present(12.0, 40.0))
    assert all(a < b for a, b in zip(young, old, strict=True))
    rate_per_h = prior_by_age()[age_class(np.array([3.0]))[0]]
    assert survives(rates, present(12.0, 2.2))[0] == pytest.approx(np.exp(-rate_per_h / 6), abs=1e-3)


def office_weeks(weeks: int) -> Counts:
    """Free from 18:00 to 08:30 on workdays, and over the weekend."""
    counts = no_history(1)
    for week in range(weeks):
        monday = 168.0 * week
        for day in range(5):
            evening = monday + 24 * day + 18
            counts = counted(counts, stays((evening, 0.0, 14.5 if day < 4 else 62.5, True)))
    return counts


def test_it_learns_the_office_hours() -> None:
    rates = fit(office_weeks(2))
    tuesday = 24.0
    at_2 = survives(rates, present(tuesday + 2, 8.0))
    at_8 = survives(rates, present(tuesday + 8, 14.0))
    assert at_2[3] > 0.8, "four hours from 02:00 are safe"
    assert at_2[4] < 0.3, "twelve are not: they begin to work at 08:30"
    assert at_8[2] < 0.35, "nor is one from 08:00"
    assert survives(rates, present(5 * 24 + 8.0, 14.0))[2] > 0.8, "at the weekend it is"


def test_more_weeks_make_it_surer() -> None:
    late = [survives(fit(office_weeks(weeks)), present(24.0 + 8, 14.0))[2] for weeks in (0, 1, 4)]
    assert late[0] > late[1] > late[2]


def test_a_declared_window_is_evidence_before_there_is_history() -> None:
    shares = np.ones((1, HOURS))
    for day in range(5):
        shares[0, 24 * day + 8 : 24 * day + 18] = 0.0
    told, silent = fit(no_history(1), shares), fit(no_history(1))
    before = present(24.0 + 7.9, 13.0)
    assert survives(told, before)[2] < 0.85 * survives(silent, before)[2]
    night = present(24.0 + 1.0, 6.0)
    assert survives(told, night)[3] >= survives(silent, night)[3]
    nothing = np.full((1, HOURS), np.nan)
    assert survives(fit(no_history(1), nothing), before) == survives(silent, before)


def test_history_overrules_a_declared_window() -> None:
    # Declared busy by day, and for eight weeks never gone but on Sunday night.
    shares = np.ones((1, HOURS))
    for day in range(5):
        shares[0, 24 * day + 8 : 24 * day + 18] = 0.0
    counts = no_history(1)
    for week in range(8):
        counts = counted(counts, stays((168.0 * week, 0.0, 167.0, True)))
    assert survives(fit(counts, shares), present(24.0 + 7.9, 32.0))[2] > 0.75


def test_a_declared_departure_is_a_near_certain_end() -> None:
    rates = fit(no_history(1))
    usual, told = survives(rates, present(24.0, 2.0)), survives(rates, present(24.0, 2.0, 2.0))
    assert told[2] >= usual[2], "before it, it stays"
    assert told[3] < 0.15, "after it, it is gone"


def test_a_departure_that_has_passed_is_no_longer_believed() -> None:
    rates = fit(no_history(1))
    assert survives(rates, present(24.0, 2.0, -3.0)) == pytest.approx(survives(rates, present(24.0, 2.0)), abs=0.01)


@pytest.mark.parametrize("departs_in_h", [-30.0, -2.0, 13.0, 20.0, 160.0])
def test_a_departure_long_past_or_far_ahead_changes_nothing(departs_in_h: float) -> None:
    rates, now = fit(no_history(1)), present(24.0, 40.0, departs_in_h)
    usual, usual_h = survival(rates, present(24.0, 40.0))
    found, stays_h = survival(rates, now)
    assert np.allclose(found, usual, atol=1e-3)
    assert np.allclose(stays_h, usual_h, rtol=1e-3)
    table, group = tabulate(rates), np.zeros(1, dtype=np.int64)
    looked, looked_h = looked_up(table, group, 24.0, now.age_h, now.departs_in_h)
    assert np.allclose(looked, looked_up(table, group, 24.0, now.age_h, np.array([INF]))[0], atol=1e-3)
    assert np.allclose(looked_h, stays_h, rtol=0.05)


def test_neither_rates_nor_table_jump_while_a_departure_comes_and_passes() -> None:
    departs = np.arange(16.0, -6.0, -1 / 60)
    rates, group = fit(no_history(1)), np.zeros(len(departs), dtype=np.int64)
    age_h = np.full(len(departs), 20.0)
    now = Present(
        hour_of_week=np.full(len(departs), 30.0),
        age_h=age_h,
        departs_in_h=departs,
        on_battery=np.zeros(len(departs), dtype=bool),
    )
    exact, table = survival(rates_of(rates, group), now), looked_up(tabulate(rates), group, 30.0, age_h, departs)
    for alive, stays_h in (exact, table):
        assert np.abs(np.diff(alive, axis=0)).max() < 0.06, "in a minute"
        assert np.abs(np.diff(stays_h)).max() < 0.4
    assert np.abs(exact[1] - table[1]).max() < 0.7


def test_several_departures_end_a_stay_at_the_first_that_is_kept() -> None:
    rates = fit(no_history(1))
    now = present(24.0, 30.0)
    both = survival(rates, msgspec.structs.replace(now, departs_in_h=np.array([[3.0, -0.5, 30.0]])))[0][0]
    first = survival(rates, present(24.0, 30.0, -0.5))[0][0]
    second = survival(rates, present(24.0, 30.0, 3.0))[0][0]
    assert both[3] < min(first[3], second[3])
    assert both[0] < second[0], "the overdue one may be about to come true"
    none = survival(rates, msgspec.structs.replace(now, departs_in_h=np.zeros((1, 0))))[0]
    assert np.array_equal(none, survival(rates, now)[0])


def test_a_departure_before_the_stay_began_says_nothing() -> None:
    rates = fit(no_history(1))
    assert survives(rates, present(24.0, 0.1, -0.2)) == survives(rates, present(24.0, 0.1))


def test_an_owner_who_breaks_his_word_is_believed_less() -> None:
    counts = no_history(1)
    for _ in range(20):
        counts = departure_seen(counts, 0, -5.0)
    broken = survives(fit(counts), present(24.0, 2.0, 2.0))
    assert broken[3] > survives(fit(no_history(1)), present(24.0, 2.0, 2.0))[3] + 0.2


def test_on_battery_it_leaves_sooner_unless_its_history_says_otherwise() -> None:
    fresh = fit(no_history(1))
    mains, battery = survives(fresh, present(9.0)), survives(fresh, present(9.0, on_battery=True))
    assert all(b < m for m, b in zip(mains, battery, strict=True))
    # A hundred hours on battery without leaving.
    steady = counted(no_history(1), stays((0.0, 0.0, 100.0, False), on_battery=True))
    assert fit(steady).unplugged[0] < fresh.unplugged[0]


def test_a_memoryless_device_is_found_to_be_memoryless() -> None:
    rng = np.random.default_rng(3)
    now, counts = 0.0, no_history(1)
    for lasted_h in rng.exponential(3.0, 200):
        counts = counted(counts, stays((now, 0.0, lasted_h, True)))
        now += lasted_h + 1.0
    rates = fit(counts)
    for age_h in (0.3, 3.0, 9.0):
        found = survives(rates, present(30.0, age_h))
        assert found[2] == pytest.approx(np.exp(-1 / 3), abs=0.08)
        assert found[3] == pytest.approx(np.exp(-4 / 3), abs=0.1)


# --- tables -----------------------------------------------------------------------------------------


def test_a_table_says_what_the_rates_say() -> None:
    rates = fit(random_counts(5, 3))
    table = tabulate(rates)
    group = np.array([0, 1, 2, 1])
    hour, age_h = 40.25, np.array([0.05, 0.72, 11.5, 23.0])
    departs = np.array([INF, INF, INF, 3.0])
    alive, stays_h = looked_up(table, group, hour, age_h, departs)
    exact, exact_h = survival(
        rates_of(rates, group),
        Present(hour_of_week=np.full(4, hour), age_h=age_h, departs_in_h=departs, on_battery=np.zeros(4, bool)),
    )
    assert np.allclose(alive, exact, atol=1e-5)
    assert np.allclose(stays_h[:3], exact_h[:3], rtol=1e-4)
    assert abs(stays_h[3] - exact_h[3]) < 1.0


def test_pooled_histories_are_sums() -> None:
    counts = random_counts(6, 4)
    summed = pooled(counts, np.array([0, 1, 0, 1]), 2)
    assert np.allclose(summed.exposed_h[0], counts.exposed_h[0] + counts.exposed_h[2])
    assert np.allclose(summed.departures[1], counts.departures[1] + counts.departures[3])
