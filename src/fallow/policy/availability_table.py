"""Outlooks of very many devices at once: `availability.survival`, worked out ahead for groups of devices.

A group shares its rates, for example all office computers of a region; what a device knows beyond them (the age of its
stay, a declared departure) is its own. For the simulator's fast mode.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.domain.fleet import OUTLOOK_HORIZONS_S
from fallow.policy.availability import (
    AGES,
    DEPARTURE_SPREAD_H,
    DEPARTURE_TOLERANCE_H,
    HOURS,
    LOG_AGE,
    Array,
    Counts,
    Present,
    Rates,
    age_class,
    rates_of,
    survival,
    with_departure,
)


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
    told = np.flatnonzero(np.isfinite(departs_in_h))
    if len(told):
        horizons_h = np.array(OUTLOOK_HORIZONS_S) / 3600
        kept = table.departure_kept[group[told]].astype(np.float64)
        departs = departs_in_h[told]
        alive[told] = with_departure(alive[told].astype(np.float64), kept, departs, horizons_h)
        believed = np.where(departs > -DEPARTURE_TOLERANCE_H, kept, 0.0)
        ends_h = np.clip(departs, DEPARTURE_SPREAD_H / 2, OUTLOOK_HORIZONS_S[-1] / 3600)
        stays_h[told] = believed * ends_h + (1 - believed) * stays_h[told]
    return alive, stays_h


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
