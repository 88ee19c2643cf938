"""Devices' lives: when each of a scenario's devices is free for us, and what it knows of itself at each time.

Rules
- `draw_lives` is the one generator of both modes. A device's life depends on the seed, its population and its number
  in it, and on the start: a smaller fleet has the first devices of a larger one, a shorter run the beginning of a
  longer one.
- A life is a list of edges, the times at which the device comes and goes in turn, in flat arrays over all devices.
  Edges are whole tenths of a second, so that the last bit of a logarithm does not change a run.
- Free means: switched on, not used by its owner; a vehicle is free while it is parked and plugged in.
- Scripted events are not in here: the worlds lay `forced_away` over it.

It knows no message, no placement and no policy.
"""

from collections.abc import Iterator, Sequence
from typing import Final
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from fallow.simulator.habits import Block, draw_block
from fallow.simulator.scenario import HOURS_A_WEEK, Event, EventKind, Habit, Population

BLOCK: Final = 1024
"""Devices that are drawn together, whether a scenario has so many or not."""
DAY_S: Final = 24 * 3600.0
WEEK_S: Final = HOURS_A_WEEK * 3600.0
RESOLUTION_S: Final = 0.1

Flags = npt.NDArray[np.bool_]
Times = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Knowledge(msgspec.Struct, frozen=True, kw_only=True):
    """What each of some devices knows of itself at one moment, [devices]. `inf`: its owner said nothing, or not now."""

    hour_of_week: float
    age_s: Times
    """Since it came, counted from the start of the draw if it was there then; for an absent one, since it went."""
    plugged_in: Flags
    window_left_s: Times
    """Until the end of the declared window that it is in; 0 outside of all windows that its owner declared."""
    departs_in_s: Times
    """Until the departure that was declared; negative once that is past."""


class Lives(msgspec.Struct, frozen=True, kw_only=True):
    """The lives of all devices from `begin_s` to `end_s`, in the order of the populations."""

    begin_s: float
    """Seconds since the scenario's start; negative with a history."""
    end_s: float
    start_hour_of_week: float
    population: npt.NDArray[np.int32]
    """[devices]: index of its population."""
    habits: tuple[Habit, ...]
    """Of each population."""
    initially: Flags
    """[devices]: free at `begin_s`."""
    offsets: Indices
    """[devices + 1]: where each device's edges are."""
    edges_s: Times
    """[edges]: ascending for each device, each after `begin_s` and before `end_s`."""
    leaves_s: npt.NDArray[np.float32]
    """[edges]: seconds after the edge of the departure that the owner declared when the device came, else `inf`."""
    declares: Flags
    """[devices]: whether the owner declares windows (computers) or departures (vehicles)."""
    busy_h: npt.NDArray[np.float32]
    """[devices, 2 (workday, weekend), 2 (from, until)]: hours of the day outside the declared windows; `inf`: none."""
    driven_share: npt.NDArray[np.float32]
    """[devices]: share of the time on the road; a vehicle is parked in the rest of it."""

    @property
    def devices(self) -> int:
        return len(self.initially)

    def intervals(self, device: int) -> list[tuple[float, float]]:
        """When one device is free, as (from, until), cut at `begin_s` and `end_s`."""
        edges = self.edges_s[self.offsets[device] : self.offsets[device + 1]].tolist()
        marks = ([self.begin_s] if self.initially[device] else []) + edges
        marks += [self.end_s] if len(marks) % 2 else []
        return list(zip(marks[::2], marks[1::2], strict=True))

    def at(self, at_s: float) -> tuple[Flags, Times]:
        """[devices] whether each is free, and since when it has been so (or not)."""
        steps = self.walk(at_s, self.end_s + 1.0)
        step = next(steps)
        return step.available, step.since_s

    def walk(self, from_s: float, step_s: float) -> "Iterator[Step]":
        """The state at `from_s`, `from_s` + `step_s`, … up to `end_s`; costs what changes in each step.

        The arrays of a step are updated in place by the next one.
        """
        device = np.repeat(np.arange(self.devices, dtype=np.int32), np.diff(self.offsets))
        order = np.argsort(self.edges_s, kind="stable")
        times = self.edges_s[order]
        device, edge = device[order], order
        available, since_s = self.initially.copy(), np.full(self.devices, self.begin_s)
        leaves_at_s = np.full(self.devices, np.inf)
        done = 0
        for index in range(max(0, int((self.end_s - from_s) // step_s)) + 1):
            at_s = from_s + index * step_s
            until = int(np.searchsorted(times, at_s, side="right"))
            changed, at = device[done:until], edge[done:until]
            # A device may change more than once: its last edge decides, and an odd number of them turns it.
            turned = np.flatnonzero(np.bincount(changed, minlength=self.devices) % 2)
            available[turned] ^= True
            since_s[changed] = times[done:until]
            leaves_at_s[changed] = times[done:until] + self.leaves_s[at]
            done = until
            yield Step(
                at_s=at_s, available=available, since_s=since_s, leaves_at_s=leaves_at_s, turned=turned, changed=changed
            )

    def knowledge(self, at_s: float, since_s: Times, leaves_at_s: Times, devices: Indices | None = None) -> Knowledge:
        """What `devices` (default: all) know at `at_s`, from a step's `since_s` and `leaves_at_s` (all devices')."""
        chosen = np.arange(self.devices) if devices is None else devices
        hour = (self.start_hour_of_week + at_s / 3600) % HOURS_A_WEEK
        return Knowledge(
            hour_of_week=hour,
            age_s=at_s - since_s[chosen],
            plugged_in=np.ones(len(chosen), dtype=bool),
            window_left_s=window_left_s(self.busy_h[chosen], hour),
            departs_in_s=leaves_at_s[chosen] - at_s,
        )


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """All devices at one moment."""

    at_s: float
    available: Flags
    since_s: Times
    """[devices]: when each came (or went)."""
    leaves_at_s: Times
    """[devices]: the departure that was declared when it came, or `inf`."""
    turned: Indices
    """Devices whose state differs from the step before."""
    changed: npt.NDArray[np.int32]
    """Devices that came or went since the step before, once for each time."""


def draw_lives(
    populations: Sequence[Population], seed: int, start_hour_of_week: float, until_s: float, history_s: float = DAY_S
) -> Lives:
    """All devices' lives from `-history_s` to `until_s`. A vehicle or a computer is on the plug whenever it is free.

    About 10 µs for a device and a day.
    """
    begin_h, end_h = start_hour_of_week - history_s / 3600, start_hour_of_week + until_s / 3600
    parts: list[_Part] = []
    for population in populations:
        for block in range(-(-population.count // BLOCK)):
            rng = np.random.default_rng([seed, crc32(population.name.encode()), block])
            drawn = draw_block(population, BLOCK, rng, begin_h, end_h)
            kept = min(BLOCK, population.count - block * BLOCK)
            parts.append(_part(drawn, kept, begin_h, end_h))
    counts = np.concatenate([part.counts for part in parts])
    edges_h = np.concatenate([part.edges_h for part in parts])
    return Lives(
        begin_s=-history_s,
        end_s=until_s,
        start_hour_of_week=start_hour_of_week,
        population=np.repeat(np.arange(len(populations), dtype=np.int32), [p.count for p in populations]),
        habits=tuple(population.habit for population in populations),
        initially=np.concatenate([part.initially for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        edges_s=np.round((edges_h - start_hour_of_week) * (3600 / RESOLUTION_S)) * RESOLUTION_S + 0.0,
        leaves_s=np.concatenate([part.leaves_h for part in parts]).astype(np.float32) * np.float32(3600),
        declares=np.concatenate([part.declares for part in parts]),
        busy_h=np.concatenate([part.busy_h for part in parts]).astype(np.float32),
        driven_share=np.concatenate([part.driven for part in parts]).astype(np.float32),
    )


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A block, cut to the devices and the time that are wanted."""

    initially: Flags
    counts: Indices
    edges_h: Times
    leaves_h: Times
    """After the edge."""
    declares: Flags
    busy_h: Times
    driven: Times


def _part(block: Block, kept: int, begin_h: float, end_h: float) -> _Part:
    """Lay switches and uses over each other: free is where it is on and not used."""
    switches = block.switches[:kept]
    signs = np.where((np.arange(switches.shape[1])[None, :] % 2 == 0) ^ block.on[:kept, None], 1, -1).astype(np.int8)
    times = np.concatenate([switches, block.used_from[:kept], block.used_until[:kept]], axis=1)
    uses = block.used_from.shape[1]
    used = np.concatenate([np.full((kept, uses), -1, np.int8), np.full((kept, uses), 1, np.int8)], axis=1)
    order = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, order, 1)
    steps = np.take_along_axis(np.concatenate([signs, used], axis=1), order, 1)
    level = np.cumsum(steps, axis=1, dtype=np.int16) + block.on[:kept, None]
    free = level == 1
    before = np.concatenate([block.on[:kept, None], free[:, :-1]], axis=1)
    initially = np.where(
        (times <= begin_h).any(axis=1),
        free[np.arange(kept), np.maximum((times <= begin_h).sum(axis=1) - 1, 0)],
        block.on[:kept],
    )
    # Two edges within the resolution would be one: the later must differ from the earlier by more.
    edge = (free != before) & (times > begin_h) & (times < end_h)
    leaves = np.full(times.shape, np.inf)
    if np.isfinite(block.leaves_at).any():
        leaves = np.concatenate([block.leaves_at[:kept], np.full((kept, 2 * uses), np.inf)], axis=1)
        leaves = np.take_along_axis(leaves, order, 1)
    return _Part(
        initially=initially,
        counts=edge.sum(axis=1),
        edges_h=times[edge],
        leaves_h=leaves[edge] - times[edge],
        declares=block.declares[:kept],
        busy_h=np.stack([block.window_workday[:kept], block.window_weekend[:kept]], axis=1),
        driven=block.driven_hours[:kept] / (end_h - begin_h),
    )


# --- what owners declared -------------------------------------------------------------------------


def window_left_s(busy_h: npt.NDArray[np.float32], hour_of_week: float) -> Times:
    """[devices] seconds until the declared window ends, 0 outside of one, `inf` where no windows are declared.

    `busy_h` is [devices, 2, 2] as in `Lives`. A window without an end within the week counts as a week.
    """
    day, hour = divmod(hour_of_week, 24)
    left_h = np.full(len(busy_h), float(HOURS_A_WEEK))
    for ahead in range(8):
        today = busy_h[:, 1 if (day + ahead) % 7 >= 5 else 0]
        start, end = today[:, 0].astype(float), today[:, 1].astype(float)
        next_h = np.maximum(24 * ahead + start - hour, 0.0)
        coming = (end > start) & (24 * ahead + end > hour)
        left_h = np.where(coming, np.minimum(left_h, next_h), left_h)
    return np.where(np.isfinite(busy_h[:, 0, 0]), left_h * 3600, np.inf)


def declared_windows(busy_h: npt.NDArray[np.float32]) -> tuple[tuple[float, float], ...]:
    """One device's declared windows ([2, 2] as in `Lives`) as (from, until) in hours since Monday 00:00."""
    if not np.isfinite(busy_h[0, 0]):
        return ()
    windows: list[tuple[float, float]] = []
    free_from = 0.0
    for day in range(7):
        start, end = (float(hour) for hour in busy_h[1 if day >= 5 else 0])
        if end > start:
            if 24 * day + start > free_from:
                windows.append((free_from, 24 * day + start))
            free_from = 24 * day + end
    if free_from < HOURS_A_WEEK:
        windows.append((free_from, float(HOURS_A_WEEK)))
    return tuple(windows)


# --- scripted events ------------------------------------------------------------------------------


class Away(msgspec.Struct, frozen=True, kw_only=True):
    """Times in which devices are not free whatever their lives say, in flat arrays."""

    device: Indices
    from_s: Times
    until_s: Times


RESTART_S: Final = 60.0
"""How long a device is gone for a rolling update."""


def forced_away(populations: Sequence[Population], events: Sequence[Event], seed: int) -> Away:
    """What outages, reclaims and rolling updates take away, device by device.

    An outage takes everyone at once; a reclaim a share of them, at random times within its duration, each for its
    `hold_s` (to a fifth); a rolling update everyone once, spread evenly.
    """
    counts = [population.count for population in populations]
    owner = np.repeat(np.arange(len(populations)), counts)
    device: list[Indices] = [np.zeros(0, dtype=np.int64)]
    start: list[Times] = [np.zeros(0)]
    end: list[Times] = [np.zeros(0)]
    for number, event in enumerate(events):
        rng = np.random.default_rng([seed, crc32(b"events"), number])
        meant = [
            event.region in (None, population.region) and event.population in (None, population.name)
            for population in populations
        ]
        chosen = np.flatnonzero(np.array(meant)[owner])
        match event.kind:
            case EventKind.OUTAGE:
                start_s = np.full(len(chosen), event.at_s)
                end_s = start_s + event.duration_s
            case EventKind.RECLAIM:
                chosen = chosen[rng.random(len(chosen)) < event.share]
                start_s = event.at_s + event.duration_s * rng.random(len(chosen))
                end_s = start_s + event.hold_s * np.exp(0.2 * rng.standard_normal(len(chosen)))
            case EventKind.ROLLING_UPDATE:
                start_s = event.at_s + event.duration_s * rng.permutation(len(chosen)) / max(1, len(chosen))
                end_s = start_s + RESTART_S
            case _:
                continue
        device.append(chosen)
        start.append(start_s)
        end.append(end_s)
    from_s = np.round(np.concatenate(start) / RESOLUTION_S) * RESOLUTION_S
    until_s = np.round(np.concatenate(end) / RESOLUTION_S) * RESOLUTION_S
    return Away(device=np.concatenate(device), from_s=from_s, until_s=until_s)


def scaled(populations: Sequence[Population], devices: int) -> tuple[Population, ...]:
    """The populations with `devices` devices together, in proportion (largest remainder), each with at least one
    where there are enough."""
    total = sum(population.count for population in populations)
    exact = [population.count * devices / total for population in populations]
    counts = [max(1 if devices >= len(populations) else 0, int(share)) for share in exact]
    by_need = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_need[: max(0, devices - sum(counts))]:
        counts[index] += 1
    while sum(counts) > devices:
        counts[max(range(len(counts)), key=lambda i: (counts[i] > 1, counts[i] - exact[i], -i))] -= 1
    return tuple(
        msgspec.structs.replace(population, count=count)
        for population, count in zip(populations, counts, strict=True)
        if count
    )
