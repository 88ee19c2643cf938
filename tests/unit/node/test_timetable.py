"""Declared windows and departures: what is understood, and how the rest is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.errors import ConfigError
from fallow.node.timetable import (
    DAYS,
    departures_in_h,
    parse_departures,
    parse_windows,
    window_shares,
)


def test_a_window_over_midnight_begins_on_each_of_its_days() -> None:
    windows = parse_windows("node.available", ["mon-fri 18:00-08:00"])
    assert windows[0] == (18.0, 32.0)
    assert windows[-1] == (4 * 24 + 18.0, 5 * 24 + 8.0)
    assert len(windows) == 5


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("sat,sun 00:00-24:00", 48),
        ("daily 22:30-06:00", 7 * 7.5),
        ("fri-mon 09:00-10:00", 4),
        ("SUN 20:00-04:00", 8),
        ("  mon , wed-thu   1:00 - 2:30 ", 4.5),
    ],
)
def test_hours_that_are_declared(text: str, hours: float) -> None:
    shares = window_shares(parse_windows("node.available", [text]))
    assert shares is not None
    assert shares.sum() == pytest.approx(hours)


def test_overlapping_windows_count_once() -> None:
    shares = window_shares(parse_windows("node.available", ["daily 08:00-12:00", "mon 10:00-14:30"]))
    assert shares is not None
    assert shares.max() == 1.0
    assert shares[0, :24].sum() == pytest.approx(6.5)
    assert shares[0, 14] == pytest.approx(0.5)


def test_nothing_declared_is_nothing_known() -> None:
    assert window_shares(()) is None
    assert departures_in_h((), 5.0) == []


@pytest.mark.parametrize(
    "text",
    ["", "mon", "monday 10:00-11:00", "mon 10-11", "mon 25:00-26:00", "mon 24:30-10:00", "mon 10:00-10:00",
     "mon- 10:00-11:00", "x" * 5000, "mon 10:60-11:00", "mon 10:00-11:00 tue 1:00-2:00", "-- 10:00-11:00"],
)  # fmt: skip
def test_a_window_that_makes_no_sense_names_its_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.available: expected") as caught:
        parse_windows("node.available", [text])
    assert len(str(caught.value)) < 300


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 50"):
        parse_windows("node.available", ["mon 10:00-11:00"] * 51)


def test_departures() -> None:
    departures = parse_departures("node.departs", ["mon-fri 07:45", "sun 24:00"])
    assert departures == (0.0, 7.75, 31.75, 55.75, 79.75, 103.75)
    assert departures_in_h(departures, 7.0) == [0.75]
    assert departures_in_h(departures, 8.0) == [-0.25]
    assert departures_in_h(departures, 160.0) == [8.0]
    assert departures_in_h(departures, 1.0) == [-1.0, 6.75]
    assert departures_in_h(departures, 12.0) == [], "tomorrow's says nothing of today, and this morning's is over"
    with pytest.raises(ConfigError, match=r"node\.departs"):
        parse_departures("node.departs", ["mon-fri 07:45-08:00"])


@given(
    days=st.lists(st.sampled_from(DAYS), min_size=1, max_size=7, unique=True),
    start=st.integers(0, 24 * 60 - 1),
    lasts=st.integers(1, 24 * 60 - 1),
)
def test_every_window_covers_its_minutes(days: list[str], start: int, lasts: int) -> None:
    end = (start + lasts) % (24 * 60)
    text = f"{','.join(days)} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    shares = window_shares(parse_windows("node.available", [text]))
    assert shares is not None
    assert np.all((shares >= 0) & (shares <= 1))
    first = DAYS.index(days[0]) * 24 + start // 60
    assert shares[0, first] > 0
    assert shares.sum() * 60 <= len(days) * lasts + 1e-6
