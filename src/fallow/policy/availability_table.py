"""Outlooks of very many devices at once: `availability.survival`, worked out ahead for groups of devices.

A group shares its rates, for example all office computers of a region; what a device knows beyond them (the age of its
stay, a declared departure) is its own. For the simulator's fast mode.
"""

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.domain.fleet import OUTLOOK_HORIZONS_S
from fallow.policy.availability import (
    AGES,
    DEPARTURE_SPREAD_H,
    HOURS,
    LAST_H,
    LOG_AGE,
    Array,
    Counts,
    Present,
    Rates,
    age_class,
    ahead_h,
    believed,
    rates_of,
    survival,
    unplanned,
    with_departure,
)

HORIZONS_H: Final = np.array(OUTLOOK_HORIZONS_S) / 3600


class OutlookTable(msgspec.Struct, frozen=True, kw_only=True):
    """`survival` worked out ahead for groups of devices that share their rates, for the simulator's fast mode."""

    alive: npt.NDArray[np.float32]
    """[groups, half hours of the week, AGES, horizons]"""
    stays_h: npt.NDArray[np.float32]
    """[groups, half hours of the week, AGES]"""
    departure_kept: npt.NDArray[np.float32]
    """[groups]"""


def tabulate(rates: Rates) -> OutlookTable:
    """One group for each row of `rates`, on mains."""
    groups, halves = len(rates.by_hour), 2 * HOURS
    group, half, age = (index.ravel() for index in np.indices((groups, halves, AGES)))
    present = Present(
        hour_of_week=half / 2 + 0.25,
        age_h=np.exp(LOG_AGE)[age],
        departs_in_h=np.full(len(group), np.inf),
        on_battery=np.zeros(len(group), dtype=bool),
    )
    alive, stays_h = survival(rates_of(rates, group), present)
    return OutlookTable(
        alive=alive.reshape(groups, halves, AGES, -1).astype(np.float32),
        stays_h=stays_h.reshape(groups, halves, AGES).astype(np.float32),
        departure_kept=rates.departure_kept.astype(np.float32),
    )


def looked_up(
    table: OutlookTable, group: npt.NDArray[np.int64], hour_of_week: float, age_h: Array, departs_in_h: Array
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """[devices, horizons] survival and [devices] mean hours to stay; about 0.1 µs for a device."""
    half, age = int(hour_of_week * 2) % (2 * HOURS), age_class(age_h)
    alive, stays_h = table.alive[group, half, age], table.stays_h[group, half, age]
    departs_in_h = ahead_h(departs_in_h, age_h)
    told = np.flatnonzero(np.isfinite(departs_in_h))
    if len(told):
        kept, departs = table.departure_kept[group[told]].astype(np.float64), departs_in_h[told]
        usual, share = alive[told].astype(np.float64), believed(kept, departs)
        alive[told] = with_departure(usual, kept, departs, HORIZONS_H)
        stays_h[told] *= share * _planned_stay(usual, departs) + (1 - share)
    return alive, stays_h


def _planned_stay(usual: Array, departs_in_h: Array) -> Array:
    """[devices] the mean time to stay of who keeps to a departure, next to the usual one, with the rate taken as even
    between two horizons."""
    planned = _area(usual, unplanned(departs_in_h), np.clip(departs_in_h, DEPARTURE_SPREAD_H / 2, LAST_H))
    return planned / _area(usual, np.ones(len(usual)), np.full(len(usual), LAST_H))


def _area(alive: Array, power: Array, until_h: Array) -> Array:
    """[devices] the integral of `alive` [devices, horizons] to the `power`, from now on until a time."""
    begin_h = np.concatenate([[0.0], HORIZONS_H[:-1]])
    logs = np.log(np.maximum(np.concatenate([np.ones((len(alive), 1)), alive], axis=1), 1e-12)) * power[:, None]
    rate = np.maximum((logs[:, :-1] - logs[:, 1:]) / (HORIZONS_H - begin_h), 1e-9)
    lasts_h = np.clip(until_h[:, None] - begin_h, 0.0, HORIZONS_H - begin_h)
    return np.asarray((np.exp(logs[:, :-1]) * -np.expm1(-rate * lasts_h) / rate).sum(axis=1))


def pooled(counts: Counts, group: npt.NDArray[np.int64], groups: int) -> Counts:
    """The histories of each group's devices, added up."""

    def summed(values: Array) -> Array:
        sums = np.zeros((groups, *values.shape[1:]))
        np.add.at(sums, group, values)
        return sums

    return Counts(
        exposed_h=summed(counts.exposed_h),
        ends=summed(counts.ends),
        unplugged=summed(counts.unplugged),
        departures=summed(counts.departures),
    )
