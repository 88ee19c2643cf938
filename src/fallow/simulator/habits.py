"""How devices of each habit come and go: the distributions, with their sources, drawn for a block of devices at once.

Sources
- Up and down times are Weibull (shape, scale in hours): office computers (0.55, 35.3)/(0.60, 9.34), home computers
  (0.64, 10.9)/(0.63, 9.48), idle processors of a campus (0.45, 4.16)/(0.51, 0.74), from the measurement studies that
  the design names (Nurmi, Brevik and Wolski; Javadi, Kondo and others over SETI@home, whose hosts are usable 56 to
  68 % of the time).
- Cars are parked 95 % of the time and plugged in 14 to 21 % of it.
- Everything about the hours (when owners use their computers, commutes, how regular a person is) is our assumption,
  stated in the constants below. Each device has its own timetable and its own regularity.

Rules
- Times are hours since Monday 00:00 of the first week, one row for each device; a time that does not happen is `inf`.
- The same generator gives the same draws in the same order whatever the block is asked for later, so that a longer
  run of a device starts like a shorter one.
"""

from collections.abc import Callable
from math import gamma
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.simulator.scenario import HOURS_A_WEEK, Habit, Population

Hours = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

ROUNDS_MAX: Final = 20_000
"""Of coming and going, for one device: more is a scenario that makes no sense."""

OFFICE_UP, OFFICE_DOWN = (0.55, 35.3), (0.60, 9.34)
HOME_UP, HOME_DOWN = (0.64, 10.9), (0.63, 9.48)
CAMPUS_UP, CAMPUS_DOWN = (0.45, 4.16), (0.51, 0.74)
ALWAYS_UP, ALWAYS_DOWN = (1.0, 14 * 24.0), (0.7, 0.4)

KEEPS_WORD = 0.95
"""Share of days on which an owner who declared keeps to it."""


def _week(workday: list[float], weekend: list[float]) -> Hours:
    """How fast a clock runs in each hour of the week, mean 1, from 24 hours of a workday and of a weekend day."""
    rates = np.array(workday * 5 + weekend * 2)
    return np.asarray(rates / rates.mean())


def _day(usual: float, **other: float) -> list[float]:
    """24 hours at the usual rate, and other rates as `h22_24=2.5`."""
    hours = [usual] * 24
    for name, rate in other.items():
        first, last = name[1:].split("_")
        hours[int(first) : int(last)] = [rate] * (int(last) - int(first))
    return hours


FLAT = np.ones(HOURS_A_WEEK)
HOME_GO = _week(_day(0.9, h8_17=0.6, h22_24=2.5), _day(0.9, h22_24=2.5))
HOME_COME = _week(_day(0.8, h0_6=0.2, h7_9=1.5, h17_20=2.5), _day(1.0, h0_8=0.2, h9_14=1.8))
OFFICE_GO = _week(_day(0.8, h17_19=3.0), _day(0.6))
OFFICE_COME = _week(_day(0.4, h0_6=0.2, h8_10=6.0, h10_17=1.5), _day(0.2))
CAMPUS_GO = _week(_day(0.6, h9_18=1.8), _day(0.6))
CAMPUS_COME = _week(_day(1.1, h9_18=0.8), _day(1.1))


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """The lives of some devices. A device is free while it is on and nobody uses it."""

    on: Flags
    """[devices]: whether it is on before its first switch."""
    switches: Hours
    """[devices, m]: when it is switched off or on, in turn, ascending."""
    used_from: Hours
    """[devices, u]"""
    used_until: Hours
    declares: Flags
    """[devices]: whether its owner declares windows or departures."""
    window_workday: Hours
    """[devices, 2]: free each workday but for these hours of the day; `inf` where no windows are declared."""
    window_weekend: Hours
    leaves_at: Hours
    """[devices, m]: for each switch that turns it on, the departure that the owner declares then; else `inf`."""
    driven_hours: Hours
    """[devices]: hours on the road, of the whole time. Zero but for vehicles."""


def draw_block(population: Population, size: int, rng: np.random.Generator, begin_h: float, end_h: float) -> Block:
    """`size` devices from `begin_h` to at least `end_h`, hours since Monday 00:00 (negative: the week before)."""
    declares = rng.random(size) < population.declares
    match population.habit:
        case Habit.VEHICLE:
            return _vehicles(declares, rng, begin_h, end_h)
        case Habit.HOME:
            return _used(population, declares, rng, begin_h, end_h)
        case Habit.OFFICE:
            return _used(population, declares, rng, begin_h, end_h)
        case Habit.CAMPUS:
            up, down, go, come = CAMPUS_UP, CAMPUS_DOWN, CAMPUS_GO, CAMPUS_COME
        case Habit.ALWAYS:
            up, down, go, come = ALWAYS_UP, ALWAYS_DOWN, FLAT, FLAT
        case Habit.MEMORYLESS:
            up = (1.0, population.median_up_s / 3600 / np.log(2))
            down = (1.0, population.median_down_s / 3600 / np.log(2))
            go, come = FLAT, FLAT
    on, switches = _renewals(up, down, go, come, np.zeros(size), rng, begin_h, end_h)
    return _block(on, switches, declares & False)


def _block(
    on: Flags, switches: Hours, declares: Flags, used: tuple[Hours, Hours] | None = None,
    windows: tuple[Hours, Hours] | None = None, leaves_at: Hours | None = None, driven: Hours | None = None,
) -> Block:  # fmt: skip
    size = len(on)
    none = np.full((size, 0), np.inf)
    no_window = np.full((size, 2), np.inf)
    return Block(
        on=on,
        switches=switches,
        used_from=none if used is None else used[0],
        used_until=none if used is None else used[1],
        declares=declares,
        window_workday=no_window if windows is None else windows[0],
        window_weekend=no_window if windows is None else windows[1],
        leaves_at=np.full(switches.shape, np.inf) if leaves_at is None else leaves_at,
        driven_hours=np.zeros(size) if driven is None else driven,
    )


# --- switched on and off --------------------------------------------------------------------------


def _clock(rates: Hours) -> tuple[Callable[[Hours], Hours], Callable[[Hours], Hours]]:
    """A clock that runs at a weekly rhythm, and its inverse: hours to clock hours and back."""
    marks = np.concatenate([[0.0], np.cumsum(rates)])
    hours = np.arange(HOURS_A_WEEK + 1.0)

    def forward(at: Hours) -> Hours:
        weeks = np.floor(at / HOURS_A_WEEK)
        return np.asarray(weeks * HOURS_A_WEEK + np.interp(at - weeks * HOURS_A_WEEK, hours, marks))

    def back(ticks: Hours) -> Hours:
        weeks = np.floor(ticks / HOURS_A_WEEK)
        return np.asarray(weeks * HOURS_A_WEEK + np.interp(ticks - weeks * HOURS_A_WEEK, marks, hours))

    return forward, back


def mean_hours(weibull: tuple[float, float]) -> float:
    """Of a Weibull distribution (shape, scale)."""
    return weibull[1] * gamma(1 + 1 / weibull[0])


def _renewals(
    up: tuple[float, float], down: tuple[float, float], go: Hours, come: Hours, shift_h: Hours,
    rng: np.random.Generator, begin_h: float, end_h: float,
) -> tuple[Flags, Hours]:  # fmt: skip
    """Whether each is on at the start, and its switches until `end_h`, as an alternating renewal process in
    equilibrium whose clocks run at the rhythm of the week, shifted by each device's own hours.

    In equilibrium the stay that is under way at the start is length-biased: (length/scale)^shape is Gamma(1 + 1/shape).
    """
    size = len(shift_h)
    clocks = _clock(go), _clock(come)
    on = rng.random(size) < mean_hours(up) / (mean_hours(up) + mean_hours(down))
    share = rng.random(size)
    first = [share * scale * rng.gamma(1 + 1 / shape, size=size) ** (1 / shape) for shape, scale in (up, down)]
    now, state, left = np.full(size, begin_h), on.copy(), np.where(on, first[0], first[1])
    columns: list[Hours] = []
    for _ in range(ROUNDS_MAX):
        ends = [back(forward(now - shift_h) + left) + shift_h for forward, back in clocks]
        now = np.where(state, ends[0], ends[1])
        columns.append(now)
        if now.min() > end_h:
            break
        state = ~state
        lasts = [scale * rng.standard_exponential(size) ** (1 / shape) for shape, scale in (up, down)]
        left = np.where(state, lasts[0], lasts[1])
    switches = np.stack(columns, axis=1)
    return on, np.where(switches > end_h, np.inf, switches)


# --- computers with an owner in front of them -----------------------------------------------------


def _days(begin_h: float, end_h: float) -> tuple[Hours, Flags]:
    """The midnights that matter, and which of them begin a workday."""
    days = np.arange(np.floor(begin_h / 24) - 1, np.floor(end_h / 24) + 2)
    return days * 24.0, np.mod(days, 7) < 5


def _used(population: Population, declares: Flags, rng: np.random.Generator, begin_h: float, end_h: float) -> Block:
    """A computer that its owner uses daily: in an office by day, at home in the evening and on weekend afternoons."""
    size = len(declares)
    home = population.habit is Habit.HOME
    spread = rng.standard_normal((size, 2))
    if home:
        starts, ends = 18.5 + spread[:, 0], 22.25 + 0.9 * spread[:, 1]
        weekend_starts, weekend_ends = 14.0 + spread[:, 0], 17.0 + spread[:, 0]
        likely = rng.beta(6.0, 2.0, size)
    else:
        starts, ends = 8.5 + 0.75 * spread[:, 0], 17.25 + spread[:, 1]
        weekend_starts, weekend_ends = np.full(size, 11.0), np.full(size, 14.0)
        likely = rng.beta(18.0, 2.0, size)
    irregular_h = 0.5 * np.exp(0.5 * rng.standard_normal(size))
    shift_h = spread[:, 0] if home else 0.5 * spread[:, 0]
    weekend_likely = np.where(home, 0.6, 0.03)
    windows = _windows(declares, (starts, ends), (weekend_starts, weekend_ends) if home else None, home)
    # Apart, so that a longer run draws the same life.
    uses_rng, switches_rng = rng.spawn(2)
    used = _uses(
        declares, (starts, ends), (weekend_starts, weekend_ends), likely, weekend_likely, irregular_h, windows, home,
        uses_rng, begin_h, end_h,
    )  # fmt: skip
    up, down = (HOME_UP, HOME_DOWN) if home else (OFFICE_UP, OFFICE_DOWN)
    go, come = (HOME_GO, HOME_COME) if home else (OFFICE_GO, OFFICE_COME)
    on, switches = _renewals(up, down, go, come, shift_h, switches_rng, begin_h, end_h)
    return _block(on, switches, declares, used, windows)


def _windows(
    declares: Flags, workday: tuple[Hours, Hours], weekend: tuple[Hours, Hours] | None, home: bool
) -> tuple[Hours, Hours]:
    """The hours of the day that an owner keeps for himself, to the half hour and with half an hour to spare. At home
    the weekend's are the afternoon and the evening together; an office's weekend is all free."""
    busy = np.stack([np.floor(2 * workday[0]) / 2 - 0.5, np.ceil(2 * workday[1]) / 2 + 0.5], axis=1)
    busy = np.clip(busy, 0.0, 24.0)
    free = busy.copy()
    if weekend is not None and home:
        free[:, 0] = np.clip(np.floor(2 * weekend[0]) / 2 - 0.5, 0.0, 24.0)
    else:
        free[:] = 0.0
    told = declares[:, None]
    return np.where(told, busy, np.inf), np.where(told, free, np.inf)


def _uses(
    declares: Flags, workday: tuple[Hours, Hours], weekend: tuple[Hours, Hours], likely: Hours, weekend_likely: Hours,
    irregular_h: Hours, windows: tuple[Hours, Hours], home: bool, rng: np.random.Generator, begin_h: float,
    end_h: float,
) -> tuple[Hours, Hours]:  # fmt: skip
    """When the owner is at the keyboard: day by day, up to twice a day."""
    starts: list[Hours] = []
    ends: list[Hours] = []
    size = len(declares)
    for midnight, works in zip(*_days(begin_h, end_h), strict=True):
        jitter = rng.standard_normal((size, 4)) * irregular_h[:, None]
        chance = rng.random((size, 3))
        window = windows[0] if works else windows[1]
        for turn, (times, happens) in enumerate(
            (
                (workday, (chance[:, 0] < likely) & (home or works)),
                (weekend, (chance[:, 1] < weekend_likely) & (not works)),
            )
        ):
            start, end = times[0] + jitter[:, 2 * turn], times[1] + jitter[:, 2 * turn + 1]
            kept = declares & (chance[:, 2] < KEEPS_WORD) & (window[:, 1] > window[:, 0])
            start, end = (np.where(kept, np.clip(x, window[:, 0], window[:, 1]), x) for x in (start, end))
            some = happens & (end > start)
            starts.append(np.where(some, midnight + start, np.inf))
            ends.append(np.where(some, midnight + end, np.inf))
    return np.stack(starts, axis=1), np.stack(ends, axis=1)


# --- vehicles ---------------------------------------------------------------------------------------


def _vehicles(declares: Flags, rng: np.random.Generator, begin_h: float, end_h: float) -> Block:
    """Cars: out with the commute and for errands, plugged in after some of the trips home, until the next one."""
    size = len(declares)
    person = rng.standard_normal((size, 3))
    plugs = rng.beta(0.7, 2.2, size)
    at_work = np.where(rng.random(size) < 0.12, 0.6, 0.0)
    irregular_h = 0.25 * np.exp(0.5 * rng.standard_normal(size))
    drive_h = 0.5 * np.exp(0.4 * person[:, 2])
    days: list[tuple[npt.NDArray[Any], ...]] = []
    for midnight, works in zip(*_days(begin_h, end_h + 96), strict=True):
        jitter = rng.standard_normal((size, 4)) * irregular_h[:, None]
        chance = rng.random((size, 2))
        commute = (chance[:, 0] < 0.9) & works
        back = midnight + 17.75 + person[:, 1] + jitter[:, 1]
        errand = chance[:, 1] < (0.3 if works else 0.6)
        leaves = np.where(commute, back + 1.5 + np.abs(jitter[:, 2]), midnight + 11 + person[:, 1] + 4 * jitter[:, 2])
        out = np.stack([midnight + 7.75 + 0.75 * person[:, 0] + jitter[:, 0], leaves], axis=1)
        home = np.stack([back, leaves + 1.8 + jitter[:, 3] * 0.5], axis=1)
        happens = np.stack([commute, errand], axis=1)
        works_there = np.stack([rng.random(size) < at_work, errand & False], axis=1) & happens
        plugged_in = rng.random((size, 2)) < plugs[:, None]
        slip_h = np.where(
            rng.random((size, 2, 2)) < KEEPS_WORD,
            rng.standard_normal((size, 2, 2)) / 6,
            rng.uniform(-3.0, 3.0, (size, 2, 2)),
        )
        days.append((np.where(happens, out, np.inf), np.where(happens, home, np.inf), works_there, plugged_in, slip_h))
    columns = [np.concatenate(parts, axis=1) for parts in zip(*days, strict=True)]
    return _plugged(declares, drive_h, _ordered(*columns), begin_h, end_h)


def _ordered(out: Hours, home: Hours, *others: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Trips by time, each after the one before; those that do not happen last."""
    order = np.argsort(out, axis=1, kind="stable")
    out, home = np.take_along_axis(out, order, 1), np.take_along_axis(home, order, 1)
    rows = np.arange(len(out))[:, None]
    happens = np.isfinite(out)
    before = np.full(len(out), -np.inf)
    for trip in range(out.shape[1]):
        out[:, trip] = np.maximum(out[:, trip], before + 0.2)
        home[:, trip] = np.maximum(home[:, trip], out[:, trip] + 0.3)
        before = np.where(happens[:, trip], home[:, trip], before)
    trips = [np.where(happens, out, np.inf), np.where(happens, home, np.inf)]
    return trips + [other[rows, order] for other in others]


def _plugged(declares: Flags, drive_h: Hours, trips: list[npt.NDArray[Any]], begin_h: float, end_h: float) -> Block:
    """The times on the plug: after trips home until the next one, and with some owners at work."""
    out, home, works_there, plugged_in, slip_h = trips
    size = len(out)
    happens = np.isfinite(out)
    next_out = np.concatenate([out[:, 1:], np.full((size, 1), np.inf)], axis=1)
    lasts_h = np.where(happens, home, 1.0) - np.where(happens, out, 0.0)
    drive = np.minimum(drive_h[:, None], lasts_h / 3)
    stays = plugged_in & happens & np.isfinite(next_out)
    comes = np.stack([np.where(works_there, out + drive, np.inf), np.where(stays, home + 0.05, np.inf)], axis=2)
    goes = np.stack([np.where(works_there, home - drive, np.inf), np.where(stays, next_out, np.inf)], axis=2)
    told = np.round(4 * (goes + slip_h)) / 4
    told = np.where(declares[:, None, None] & np.isfinite(goes), np.maximum(told, comes), np.inf)
    switches = np.stack([comes, goes], axis=3).reshape(size, -1)
    leaves_at = np.stack([told, np.full_like(told, np.inf)], axis=3).reshape(size, -1)
    order = np.argsort(switches, axis=1, kind="stable")
    inside = happens & (out >= begin_h) & (home <= end_h)
    return _block(
        np.zeros(size, dtype=bool),
        np.take_along_axis(switches, order, 1),
        declares,
        leaves_at=np.take_along_axis(leaves_at, order, 1),
        driven=np.where(inside, 2 * drive, 0.0).sum(axis=1),
    )
