"""What an owner declares of a device's week: windows in which it is free, and when it departs.

Rules
- A window is `DAYS HH:MM-HH:MM`, for example `mon-fri 18:00-08:00`: it begins on each of the days, and one that ends
  before it begins ends on the next day. A departure is `DAYS HH:MM`. Days are `mon` … `sun`, ranges of them
  (`fri-mon` too), several joined by commas, or `daily`.
- Anything else is a `ConfigError` that names the setting, what came and what was expected.
- Times are the device's own local time.

What is declared is evidence for forecasts. It does not stop a device from working at other times.
"""

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from fallow.domain.errors import ConfigError
from fallow.policy.availability import HOURS, LAST_H, OVERDUE_H, Array

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DECLARED_MAX: Final = 50
_TIME: Final = r"([01]?[0-9]|2[0-4]):([0-5][0-9])"
_WINDOW: Final = re.compile(rf"\s*([a-z,\-\s]+?)\s+{_TIME}\s*-\s*{_TIME}\s*")
_DEPARTURE: Final = re.compile(rf"\s*([a-z,\-\s]+?)\s+{_TIME}\s*")

Window = tuple[float, float]
"""Hours since Monday 00:00, from and until; until may lie in the next week."""


def parse_windows(setting: str, texts: Sequence[str]) -> tuple[Window, ...]:
    """The windows of a week, ascending. Raises `ConfigError`."""
    windows: list[Window] = []
    for text in _few(setting, texts):
        match = _WINDOW.fullmatch(text.lower())
        if match is None:
            raise _wrong(setting, text, "a window such as 'mon-fri 18:00-08:00' or 'sat,sun 00:00-24:00'")
        start = _hours(setting, text, match[2], match[3])
        end = _hours(setting, text, match[4], match[5])
        if start == end:
            raise _wrong(setting, text, "a window that ends at another time than it begins")
        windows += [
            (24 * day + start, 24 * day + (end if end > start else end + 24)) for day in _days(setting, text, match[1])
        ]
    return tuple(sorted(windows))


def parse_departures(setting: str, texts: Sequence[str]) -> tuple[float, ...]:
    """The departures of a week in hours since Monday 00:00, ascending. Raises `ConfigError`."""
    departures: set[float] = set()
    for text in _few(setting, texts):
        match = _DEPARTURE.fullmatch(text.lower())
        if match is None:
            raise _wrong(setting, text, "a departure such as 'mon-fri 07:45'")
        hour = _hours(setting, text, match[2], match[3])
        departures |= {(24 * day + hour) % HOURS for day in _days(setting, text, match[1])}
    return tuple(sorted(departures))


def window_shares(windows: Sequence[Window]) -> Array | None:
    """[1, HOURS] the share of each hour of the week that is declared free, or `None` where nothing is."""
    if not windows:
        return None
    minutes = np.zeros(HOURS * 60, dtype=bool)
    for start, end in windows:
        minutes[np.arange(round(start * 60), round(end * 60)) % len(minutes)] = True
    return np.asarray(minutes.reshape(1, HOURS, 60).mean(axis=2))


def departures_in_h(departures: Sequence[float], hour_of_week: float) -> list[float]:
    """Hours from `hour_of_week` to the departures that matter to an outlook: those of the last `OVERDUE_H` (negative)
    and those up to an hour beyond the last horizon, so that they come into sight gradually. Ascending."""
    ahead = ((departure - hour_of_week + OVERDUE_H) % HOURS - OVERDUE_H for departure in departures)
    return sorted(departure for departure in ahead if departure <= LAST_H + 1.0)


def _few(setting: str, texts: Sequence[str]) -> Sequence[str]:
    if len(texts) > DECLARED_MAX:
        raise ConfigError(f"{setting}: expected at most {DECLARED_MAX} entries, got {len(texts)}.")
    return texts


def _days(setting: str, text: str, days: str) -> list[int]:
    if days.strip() == "daily":
        return list(range(7))
    found: list[int] = []
    for part in days.split(","):
        first, dash, last = (name.strip() for name in part.partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            raise _wrong(setting, text, f"days out of {', '.join(DAYS)} or 'daily'")
        start = DAYS.index(first)
        found += [(start + step) % 7 for step in range((DAYS.index(last or first) - start) % 7 + 1)]
    return sorted(set(found))


def _hours(setting: str, text: str, hour: str, minute: str) -> float:
    value = int(hour) + int(minute) / 60
    if value > 24:
        raise _wrong(setting, text, "times from 00:00 to 24:00")
    return value


def _wrong(setting: str, text: str, expected: str) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}, got {text[:60]!r}.")
