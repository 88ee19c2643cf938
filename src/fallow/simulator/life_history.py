"""What simulated devices have learned of themselves: the histories that their lives would have left on their disks.

It joins `lives.py` (what happened) to `policy/availability.py` (what is learned from it), for the benchmark, for agents
that begin with a past, and for the fast mode's tables.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.policy.availability import (
    DEPARTURE_TOLERANCE_H,
    HOURS,
    Array,
    Counts,
    Stays,
    counted,
    fit,
    no_history,
)
from fallow.policy.availability_table import OutlookTable, pooled, tabulate
from fallow.simulator.lives import WEEK_S, Lives, declared_windows, draw_lives
from fallow.simulator.scenario import Population

SAMPLE_MAX: Final = 128
"""Devices of a population that its group's table is learned from."""
PAST_S: Final = 2 * WEEK_S


class Spells(msgspec.Struct, frozen=True, kw_only=True):
    """The times in which devices were free, in flat arrays; cut at the ends of the draw."""

    device: npt.NDArray[np.int64]
    from_s: Array
    until_s: Array
    cut: npt.NDArray[np.bool_]
    """[spells]: still here when the draw ended."""
    leaves_at_s: Array
    """[spells]: the departure that was declared, or `inf`."""


def spells(lives: Lives) -> Spells:
    """All of them, by device and time."""
    counts = np.diff(lives.offsets)
    owner = np.repeat(np.arange(lives.devices), counts)
    place = np.arange(len(owner)) - lives.offsets[owner]
    comes = (place % 2 == 0) ^ lives.initially[owner]
    there = np.flatnonzero(lives.initially)
    staying = np.flatnonzero(lives.initially ^ (counts % 2 == 1))
    device = np.concatenate([there, owner[comes]])
    from_s = np.concatenate([np.full(len(there), lives.begin_s), lives.edges_s[comes]])
    leaves = np.concatenate([np.full(len(there), np.inf), lives.edges_s[comes] + lives.leaves_s[comes]])
    left = np.concatenate([owner[~comes], staying])
    until_s = np.concatenate([lives.edges_s[~comes], np.full(len(staying), lives.end_s)])
    cut = np.concatenate([np.zeros(int((~comes).sum()), bool), np.ones(len(staying), bool)])
    start, end = np.lexsort((from_s, device)), np.lexsort((until_s, left))
    return Spells(
        device=device[start], from_s=from_s[start], until_s=until_s[end], cut=cut[end], leaves_at_s=leaves[start]
    )


def learned(lives: Lives, from_s: float, until_s: float) -> Counts:
    """What each device has counted of itself between two times."""
    all_spells = spells(lives)
    inside = (all_spells.until_s > from_s) & (all_spells.from_s < until_s)
    device, came, went = all_spells.device[inside], all_spells.from_s[inside], all_spells.until_s[inside]
    first, last = np.maximum(came, from_s), np.minimum(went, until_s)
    ended = (went <= until_s) & ~all_spells.cut[inside]
    counts = counted(
        no_history(lives.devices),
        Stays(
            device=device,
            # Weeks before the first Monday count as well as those after it.
            hour_of_week=lives.start_hour_of_week + first / 3600 + HOURS * 1000,
            age_h=(first - came) / 3600,
            lasted_h=(last - first) / 3600,
            ended=ended,
            on_battery=np.zeros(len(device), dtype=bool),
        ),
    )
    late_h = (all_spells.leaves_at_s[inside] - went) / 3600
    told = ended & np.isfinite(late_h)
    kept = np.abs(late_h) <= DEPARTURE_TOLERANCE_H
    word = [np.bincount(device[told & which], minlength=lives.devices) for which in (kept, ~kept)]
    return msgspec.structs.replace(counts, departures=counts.departures + np.stack(word, axis=1))


def window_shares(lives: Lives) -> Array:
    """[devices, HOURS] the share of each hour of the week that owners declared free; NaN where they did not."""
    shares = np.full((lives.devices, HOURS), np.nan)
    hours = np.arange(HOURS)
    for device in np.flatnonzero(np.isfinite(lives.busy_h[:, 0, 0])):
        shares[device] = 0.0
        for start, end in declared_windows(lives.busy_h[device]):
            shares[device] += np.clip(np.minimum(end, hours + 1) - np.maximum(start, hours), 0.0, 1.0)
    return shares


def population_tables(populations: Sequence[Population], seed: int, start_hour_of_week: float) -> OutlookTable:
    """One group for each population, learned from what a sample of its devices did in the two weeks before. Devices of
    one group are taken as equal, so that these outlooks are blunter than the devices' own."""
    sample = [msgspec.structs.replace(item, count=min(item.count, SAMPLE_MAX)) for item in populations]
    lives = draw_lives(sample, seed, start_hour_of_week, 0.0, history_s=PAST_S)
    counts = learned(lives, -PAST_S, 0.0)
    return tabulate(fit(pooled(counts, lives.population.astype(np.int64), len(populations))))
