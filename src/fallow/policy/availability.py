"""How long will a device stay? From its own history to a survival probability.

The model: a device that is here leaves at a rate (departures an hour) that is the product of a factor for the hour of
the week and a factor for the age of the stay. Both are occurrence/exposure rates: departures counted, divided by the
hours that the device was at risk. Little is known of one device, so each factor is shrunk towards what is known
better: the hour of the week towards the hour of a workday or weekend day, that towards the device's mean, that towards
a prior; the age's towards a Weibull of decreasing hazard. How much is decided by the counts themselves: the
Gamma-Poisson estimate of how much the true rates differ, beyond what chance explains (empirical Bayes after Clayton
and Kaldor, 1987; the alternating fit is iterative proportional fitting).

Rules
- Declared windows are prior evidence on the hours: leaving inside of one is rare, after its end likely. A device's
  history overrules them as it grows.
- A declared departure is believed as often as this device's departures came true: then it ends the stay at about that
  time, and little else does in the hours before. One that has passed is believed less and less; one that is further
  ahead than the last horizon says nothing; nothing jumps in between.
- Everything works on arrays, one row for each device; an agent is a batch of one, and the simulator's fast mode runs
  the same functions. The history has a fixed size whatever its length, and forgets half of itself in four weeks.

Pure: the time is an argument. It keeps no history, asks no clock and probes no power supply.
"""

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.domain.fleet import OUTLOOK_HORIZONS_S, Outlook

HOURS: Final = 168
AGE_EDGES_H: Final = (0.0, 1 / 6, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Where the classes of age begin; the last has no end."""
AGES: Final = len(AGE_EDGES_H)
HALF_LIFE_WEEKS: Final = 4.0

PRIOR_SHAPE, PRIOR_SCALE_H = 0.6, 12.0
"""The Weibull that a device without history is believed to follow: between the home and office computers of the
measurement studies."""
PRIOR_ENDS: Final = 1.0
"""How many departures of its own weigh as much as the prior rate."""
SPREAD_PRIOR: Final = 8.0
"""Variance of an hour's factor that is believed before any departure was seen, and the weight of that belief."""
WEEK_SPREAD_PRIOR: Final = 0.1
"""The same, of an hour of the week among the equal hours of other days."""
SPREAD_WEIGHT: Final = 2.0
AGE_SPREAD_PRIOR: Final = 0.05
SHAPE_SPREAD: Final = 0.3
"""Standard deviation of the Weibull's shape over devices, before anything was seen."""
SLOPE_RANGE: Final = (-0.95, 1.0)
NEWTON_STEPS: Final = 3
ROUNDS: Final = 4

WINDOW_RATE_PER_H: Final = 0.7
"""Departures an hour just outside of a declared window."""
WINDOW_FACTOR: Final = 0.7
"""Of the rate inside of one."""
WINDOW_HOURS: Final = 4.0
"""Hours of observation that a declared window weighs as much as, in each hour of a workday or weekend day."""
DEPARTURE_SPREAD_H: Final = 0.2
"""About how exactly a declared departure is kept (standard deviation)."""
DEPARTURE_WORD: Final = (8.0, 1.0)
"""Kept and broken departures that count as seen before the first one."""
DEPARTURE_TOLERANCE_H: Final = 0.5
"""A departure that comes true this closely was kept."""
OVERDUE_H: Final = 2.0
"""After so long, hardly anything is left of the belief in a departure that has passed."""
UNPLANNED: Final = 0.1
"""Of the usual rate, before a declared departure."""
LAST_H: Final = OUTLOOK_HORIZONS_S[-1] / 3600
UNPLANNED_H: Final = (LAST_H / 2, LAST_H)
"""How far ahead a departure may be for that rate to apply fully, and from where on the usual rate does: who says when
he leaves on Monday does not say that he stays all week."""
UNPLUGGED_FACTOR: Final = 3.0
"""How much faster a device leaves on battery, until its history says; worth as many departures as the next figure."""
UNPLUGGED_ENDS: Final = 2.0

LOG_AGE: Final = np.log([0.05, 0.3, 0.72, 1.45, 2.9, 5.8, 11.5, 23.0, 46.0])
"""Of a middle of each class of age."""
_STEPS_H: Final = np.array([1 / 6] * 6 + [0.5] * 22)
_ENDS_H: Final = np.cumsum(_STEPS_H)
_MIDDLES_H: Final = _ENDS_H - _STEPS_H / 2
_HORIZONS: Final = np.array([int(np.argmin(np.abs(_ENDS_H * 3600 - horizon_s))) for horizon_s in OUTLOOK_HORIZONS_S])
_DAY_HOUR: Final = np.where(np.arange(HOURS) < 120, np.arange(HOURS) % 24, 24 + np.arange(HOURS) % 24)
"""For each hour of the week: the hour of a workday (0 to 23) or of a weekend day (24 to 47)."""

Array = npt.NDArray[np.float64]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The histories of some devices."""

    exposed_h: Array
    """[devices, HOURS, AGES]: hours that it was here, by hour of the week and age of the stay."""
    ends: Array
    """[devices, HOURS, AGES]: departures."""
    unplugged: Array
    """[devices, 2]: hours here on battery, and departures from there."""
    departures: Array
    """[devices, 2]: declared departures that came true, and that did not."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What the histories say."""

    by_hour: Array
    """[devices, HOURS]: departures an hour."""
    by_age: Array
    """[devices, AGES]: factor."""
    unplugged: Array
    """[devices]: factor on battery."""
    departure_kept: Array
    """[devices]: probability that a declared departure comes true."""


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """Some devices now."""

    hour_of_week: Array
    """[devices]: hours since Monday 00:00 in their own time, 0 to 168."""
    age_h: Array
    """[devices]: how long it has been here."""
    departs_in_h: Array
    """[devices] or [devices, departures]: until its declared departures, negative when they have passed; `inf`: none.
    Those that passed before its stay began are over."""
    on_battery: npt.NDArray[np.bool_]


class Stays(msgspec.Struct, frozen=True, kw_only=True):
    """Pieces of stays to be counted, one row each."""

    device: npt.NDArray[np.int64]
    """[pieces]: its row in the counts."""
    hour_of_week: Array
    """[pieces]: when the piece began; any number of hours since a Monday 00:00."""
    age_h: Array
    """[pieces]: how old the stay was then."""
    lasted_h: Array
    ended: npt.NDArray[np.bool_]
    """[pieces]: whether the device left at the piece's end."""
    on_battery: npt.NDArray[np.bool_]


# --- counting ---------------------------------------------------------------------------------------


def no_history(devices: int) -> Counts:
    """Of devices that have just begun."""
    return Counts(
        exposed_h=np.zeros((devices, HOURS, AGES)),
        ends=np.zeros((devices, HOURS, AGES)),
        unplugged=np.zeros((devices, 2)),
        departures=np.zeros((devices, 2)),
    )


def counted(counts: Counts, stays: Stays) -> Counts:
    """The counts with more pieces of stays. Pieces of no length count only if the device left."""
    shape = counts.exposed_h.shape
    begin, end = stays.hour_of_week, stays.hour_of_week + stays.lasted_h
    touched = np.maximum(np.ceil(end) - np.floor(begin), 1).astype(np.int64)
    piece = np.repeat(np.arange(len(begin)), touched)
    hour = np.floor(begin)[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(touched) - touched, touched)
    # Ages at which the hour is entered and left.
    birth = begin - stays.age_h
    enters = np.maximum(hour, begin[piece]) - birth[piece]
    leaves = np.minimum(hour + 1, end[piece]) - birth[piece]
    edges = np.array(AGE_EDGES_H)
    above = np.append(edges[1:], np.inf)
    spent = np.clip(np.minimum(leaves[:, None], above) - np.maximum(enters[:, None], edges), 0.0, None)
    row = stays.device[piece] * HOURS + (hour % HOURS).astype(np.int64)
    cells = (row[:, None] * AGES + np.arange(AGES)).ravel()
    exposed_h = counts.exposed_h + np.bincount(cells, spent.ravel(), minlength=counts.exposed_h.size).reshape(shape)
    last = stays.device * HOURS + (np.floor(end) % HOURS).astype(np.int64)
    last = last * AGES + age_class(stays.age_h + stays.lasted_h)
    ends = counts.ends + np.bincount(last[stays.ended], minlength=counts.ends.size).reshape(shape)
    devices = shape[0]
    unplugged = np.stack(
        [
            np.bincount(stays.device, stays.lasted_h * stays.on_battery, minlength=devices),
            np.bincount(stays.device, stays.ended & stays.on_battery, minlength=devices),
        ],
        axis=1,
    )
    return msgspec.structs.replace(counts, exposed_h=exposed_h, ends=ends, unplugged=counts.unplugged + unplugged)


def departure_seen(counts: Counts, device: int, declared_in_h: float) -> Counts:
    """A device left (or stayed on beyond the tolerance) `declared_in_h` before its declared departure."""
    departures = counts.departures.copy()
    departures[device, 0 if abs(declared_in_h) <= DEPARTURE_TOLERANCE_H else 1] += 1.0
    return msgspec.structs.replace(counts, departures=departures)


def faded(counts: Counts, weeks: float) -> Counts:
    """The counts after `weeks` have passed: habits change, so what is old weighs less."""
    kept = 0.5 ** (max(0.0, weeks) / HALF_LIFE_WEEKS)
    return Counts(
        exposed_h=counts.exposed_h * kept,
        ends=counts.ends * kept,
        unplugged=counts.unplugged * kept,
        departures=counts.departures * kept,
    )


def age_class(age_h: Array) -> npt.NDArray[np.int64]:
    """The class of `AGE_EDGES_H` that an age is in."""
    return np.searchsorted(np.array(AGE_EDGES_H), np.maximum(age_h, 0.0), side="right") - 1


# --- learning ---------------------------------------------------------------------------------------


def prior_by_age() -> Array:
    """[AGES] departures an hour of a device of which nothing is known."""
    edges = np.array([*AGE_EDGES_H, 2 * AGE_EDGES_H[-1]])
    cumulated = (edges / PRIOR_SCALE_H) ** PRIOR_SHAPE
    return np.asarray(np.diff(cumulated) / np.diff(edges))


def fit(counts: Counts, windows: Array | None = None) -> Rates:
    """Learn the rates. `windows` [devices, HOURS] is the share of each hour of the week that the owner declared free,
    a row of NaN where nothing was declared."""
    exposed, ends = counts.exposed_h, counts.ends
    devices = len(exposed)
    prior = prior_by_age()
    hour_ends, age_ends = ends.sum(axis=2), ends.sum(axis=1)
    by_age = np.tile(prior, (devices, 1))
    by_hour = np.ones((devices, HOURS))
    extra_ends, extra_h = _declared(windows, devices)
    for _ in range(ROUNDS):
        expected = np.einsum("dha,da->dh", exposed, by_age)
        by_hour = _hours(hour_ends, expected, extra_ends, extra_h * by_age[:, 4:5])
        by_age = _ages(age_ends, np.einsum("dha,dh->da", exposed, by_hour))
    rate = _mean_rate(counts, prior)
    factor = (counts.unplugged[:, 1] + UNPLUGGED_FACTOR * UNPLUGGED_ENDS) / (
        counts.unplugged[:, 0] * rate + UNPLUGGED_ENDS
    )
    kept = counts.departures + np.array(DEPARTURE_WORD)
    # The level goes to the hours, so that they are departures an hour at a middle age.
    middle = by_age[:, 4:5]
    return Rates(
        by_hour=by_hour * middle,
        by_age=by_age / middle,
        unplugged=np.maximum(factor, 1.0),
        departure_kept=kept[:, 0] / kept.sum(axis=1),
    )


def _hours(ends: Array, expected: Array, extra_ends: Array, extra: Array) -> Array:
    """[devices, HOURS] factors of the hours of the week: the device's level, then hours of a day, then of the week."""
    level = (ends.sum(axis=1) + PRIOR_ENDS) / (expected.sum(axis=1) + PRIOR_ENDS)
    day_ends, day_expected = _by_day(ends) + extra_ends, _by_day(expected) + extra
    of_day = _shrunk(day_ends, day_expected, np.broadcast_to(level[:, None], day_ends.shape), SPREAD_PRIOR)
    return _shrunk(ends, expected, of_day[:, _DAY_HOUR], WEEK_SPREAD_PRIOR)


def _ages(ends: Array, exposed: Array) -> Array:
    """[devices, AGES] factors of the age: a Weibull hazard whose shape is fitted (Newton's method on the likelihood
    with a normal prior; the level is conditioned out), then each class's own deviation from it, shrunk."""
    slope = np.full(len(ends), PRIOR_SHAPE - 1.0)
    for _ in range(NEWTON_STEPS):
        share = exposed * np.exp(slope[:, None] * LOG_AGE)
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-12)
        mean = share @ LOG_AGE
        variance = share @ LOG_AGE**2 - mean**2
        seen = ends.sum(axis=1)
        score = ends @ LOG_AGE - seen * mean - (slope - PRIOR_SHAPE + 1.0) / SHAPE_SPREAD**2
        slope = np.clip(slope + score / (seen * variance + 1 / SHAPE_SPREAD**2), *SLOPE_RANGE)
    weibull = np.exp(slope[:, None] * (LOG_AGE - LOG_AGE[4])) * prior_by_age()[4]
    expected = exposed * weibull
    level = (ends.sum(axis=1) + PRIOR_ENDS) / (expected.sum(axis=1) + PRIOR_ENDS)
    return np.asarray(weibull * _shrunk(ends, expected * level[:, None], np.ones(ends.shape), AGE_SPREAD_PRIOR))


def _by_day(values: Array) -> Array:
    """[devices, 48] sums over the workdays and over the weekend."""
    workdays, weekend = values[:, :120], values[:, 120:]
    sums = workdays.reshape(-1, 5, 24).sum(axis=1), weekend.reshape(-1, 2, 24).sum(axis=1)
    return np.asarray(np.concatenate(sums, axis=1))


def _shrunk(ends: Array, expected: Array, towards: Array, spread_prior: float) -> Array:
    """Factors whose mean is `towards`: (ends + a) / (expected + a / towards), where 1/a is the variance of the true
    factors among each device's cells, by moments, beginning from `spread_prior`."""
    fair = expected * towards
    weight = SPREAD_WEIGHT
    surplus = np.sum((ends - fair) ** 2 - ends, axis=1)
    spread = (np.maximum(surplus, 0.0) + weight * spread_prior) / (np.sum(fair**2, axis=1) + weight)
    strength = 1.0 / np.clip(spread, 1e-2, 20.0)[:, None]
    return np.asarray(towards * (ends + strength) / (fair + strength))


def _declared(windows: Array | None, devices: int) -> tuple[Array, Array]:
    """[devices, 48] departures and hours of observation that declared windows are worth."""
    if windows is None:
        return np.zeros((devices, 48)), np.zeros((devices, 48))
    told = np.isfinite(windows[:, :1])
    inside = _by_day(np.where(told, windows, 0.0)) / np.array([5.0] * 24 + [2.0] * 24)
    rate = WINDOW_RATE_PER_H * (1 - inside) + inside * WINDOW_FACTOR / PRIOR_SCALE_H
    weight = np.where(told, WINDOW_HOURS, 0.0) * np.ones(48)
    return rate * weight, weight


def _mean_rate(counts: Counts, prior: Array) -> Array:
    """[devices] departures an hour, whenever."""
    exposed, ends = counts.exposed_h.sum(axis=(1, 2)), counts.ends.sum(axis=(1, 2))
    return np.asarray((ends + PRIOR_ENDS) / (exposed + PRIOR_ENDS / prior[4]))


# --- foretelling ------------------------------------------------------------------------------------


def survival(rates: Rates, present: Present) -> tuple[Array, Array]:
    """[devices, horizons] the probability of being here still at each of `OUTLOOK_HORIZONS_S`, and [devices] the mean
    hours to stay, up to the last horizon. Needs about 2 µs for a device."""
    rows = np.arange(len(present.age_h))[:, None]
    hour = (present.hour_of_week[:, None] + _MIDDLES_H).astype(np.int64) % HOURS
    age = age_class(present.age_h[:, None] + _MIDDLES_H)
    rate = rates.by_hour[rows, hour] * rates.by_age[rows, age]
    rate *= np.where(present.on_battery, rates.unplugged, 1.0)[:, None]
    cumulated = np.cumsum(rate * _STEPS_H, axis=1)
    alive = np.exp(-cumulated)
    # The latest first: what is left if an earlier one is not kept.
    declared = present.departs_in_h if present.departs_in_h.ndim == 2 else present.departs_in_h[:, None]
    for departs in -np.sort(-declared, axis=1).T:
        alive = with_departure(alive, rates.departure_kept, ahead_h(departs, present.age_h), _ENDS_H)
    before = np.concatenate([np.ones((len(alive), 1)), alive[:, :-1]], axis=1)
    return alive[:, _HORIZONS], ((before + alive) / 2) @ _STEPS_H


def with_departure(alive: Array, kept: Array, departs_in_h: Array, at_h: Array) -> Array:
    """[devices, times] survival at `at_h`, with what owners declared: with probability `kept` the stay ends at about
    the departure and hardly before, else as usual. A departure that is overdue is believed less and less, and one
    beyond the last horizon changes nothing."""
    told = np.isfinite(departs_in_h)
    departs = np.where(told, departs_in_h, 0.0)
    here = np.maximum(_still_here(departs, 0.0), 1e-12)[:, None]
    planned = alive ** unplanned(departs)[:, None] * _still_here(departs[:, None], at_h) / here
    share = believed(kept, departs)[:, None]
    return np.where(told[:, None], share * np.minimum(planned, 1.0) + (1 - share) * alive, alive)


def ahead_h(departs_in_h: Array, age_h: Array) -> Array:
    """[devices] `departs_in_h` without the departures that passed before the stay began."""
    return np.where(departs_in_h < -age_h, np.inf, departs_in_h)


def believed(kept: Array, departs_in_h: Array) -> Array:
    """[devices] the probability that a departure is still to come, of a device that is here (Bayes)."""
    here = _still_here(departs_in_h, 0.0)
    return np.asarray(kept * here / (kept * here + 1 - kept))


def unplanned(departs_in_h: Array) -> Array:
    """[devices] the share of the usual rate at which a device leaves before a departure that it keeps."""
    begin, end = UNPLANNED_H
    far = np.clip((departs_in_h - begin) / (end - begin), 0.0, 1.0)
    return np.asarray(UNPLANNED + (1 - UNPLANNED) * far)


def _still_here(departs_in_h: Array, at_h: Array | float) -> Array:
    """The probability that a departure about then is still to come: a logistic curve, near to the normal one."""
    late = np.clip((at_h - departs_in_h) * (1.702 / DEPARTURE_SPREAD_H), -50.0, 50.0)
    return np.asarray(1.0 / (1.0 + np.exp(late)))


def outlook(rates: Rates, present: Present) -> Outlook:
    """What one device expects (batches of one)."""
    alive, stays_h = survival(rates, present)
    falling = np.minimum.accumulate(np.clip(alive[0], 0.0, 1.0))
    return Outlook(
        survival=tuple(round(float(share), 4) for share in falling),
        expected_s=round(float(stays_h[0]) * 3600, 1),
    )


def rates_of(rates: Rates, rows: npt.NDArray[np.int64]) -> Rates:
    """The rates of some devices."""
    return Rates(
        by_hour=rates.by_hour[rows],
        by_age=rates.by_age[rows],
        unplugged=rates.unplugged[rows],
        departure_kept=rates.departure_kept[rows],
    )
