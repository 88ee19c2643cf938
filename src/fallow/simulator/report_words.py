"""Numbers and times as a person reads them. Pure.

Rules
- A figure is never rounded to a better one: 99.996 % is not 100 %, and 0.002 % is not 0 %.
- Times of the day come from hours since Monday 00:00; any float is accepted, since files are not trusted.
"""

import math
from typing import Final

from fallow.simulator.scenario import HOURS_A_WEEK

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
NOTHING: Final = "not modelled"
"""For what a mode does not model."""

_MAGNITUDES: Final = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"))
_BYTES: Final = ((1e18, "EB"), (1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FRACTIONS: Final = (
    (1 / 10, "a tenth"),
    (1 / 5, "a fifth"),
    (1 / 4, "a quarter"),
    (1 / 3, "a third"),
    (2 / 5, "two fifths"),
    (1 / 2, "half"),
    (3 / 5, "three fifths"),
    (2 / 3, "two thirds"),
    (3 / 4, "three quarters"),
    (4 / 5, "four fifths"),
    (9 / 10, "nine tenths"),
)
FRACTION_TOLERANCE: Final = 0.025


def _three(value: float) -> str:
    """Three significant digits, without an exponent for what fits a line."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """1,234 and 12.3 million."""
    for size, name in _MAGNITUDES:
        if abs(value) >= size:
            return _three(value / size) + name
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else _three(value)


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, name in _BYTES:
        if abs(value) >= unit:
            return f"{_three(value / unit)} {name}"
    return f"{value:,.0f} bytes"


def span_of(seconds: float) -> str:
    """A length of time: 180 ms, 2.4 s, 3 min 20 s, 1 h 40 min."""
    if abs(seconds) < 1:
        return f"{_three(seconds * 1000)} ms"
    if abs(seconds) < 100:
        return f"{_three(seconds)} s"
    if abs(seconds) >= 1e9:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(whole / 60)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def share(value: float) -> str:
    """A share as per cent, with as many digits as it takes to tell it from none and from all."""
    if value in (0, 1) or not math.isfinite(value):
        return f"{value * 100:g} %"
    edge = min(abs(value), abs(1 - value)) * 100
    digits = 0 if edge >= 10 else 1 if edge >= 1 else min(8, -math.floor(math.log10(edge)))
    return f"{value * 100:.{digits}f} %"


def fraction(value: float) -> str:
    """`two thirds` where that is close enough, else `58 %`."""
    near, name = min(_FRACTIONS, key=lambda item: abs(item[0] - value))
    if abs(near - value) > FRACTION_TOLERANCE:
        return share(value)
    return name if abs(near - value) < FRACTION_TOLERANCE / 3 else f"about {name}"


def clock(hour_of_week: float) -> str:
    """The time of day, `18:00`."""
    if not math.isfinite(hour_of_week):
        return "?"
    minutes = round(math.fmod(hour_of_week, 24) * 60) % 1440
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def day(hour_of_week: float) -> str:
    """The day, `Mon`."""
    if not math.isfinite(hour_of_week):
        return "?"
    return DAYS[math.floor(math.fmod(hour_of_week + 1 / 120, HOURS_A_WEEK) / 24) % 7]


def optional_span(seconds: float | None) -> str:
    """A length of time, or that it is not known."""
    return NOTHING if seconds is None else span_of(seconds)


def counted(count: int, noun: str) -> str:
    """`1 cell`, `3,333 cells`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
