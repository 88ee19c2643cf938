"""When this device came and went, kept on its own disk, and the outlook that follows from it.

Rules
- What is kept is a summary of fixed size (`policy/availability.Counts`), never a log of times. It stays on the device;
  only the outlook leaves it.
- The file is replaced atomically, every `SAVE_INTERVAL_S` and at a polite end. A device that was killed finds in it
  when it was last seen, and counts that as the end of its stay; it loses at most one interval. One that comes back
  within `RESTART_S` of that never left.
- A file that cannot be read or believed is put aside, and the history starts anew, with a line in the log.
- A clock that jumps (more than an interval between two looks, or backwards) counts nothing for that time.

It learns and foretells through `policy/availability.py`; what the owner declared is parsed by `timetable.py`.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import psutil

from fallow.domain.clock import Clock
from fallow.domain.fleet import Outlook
from fallow.node.timetable import Window, departures_in_h, window_shares
from fallow.policy.availability import (
    AGES,
    DEPARTURE_TOLERANCE_H,
    HOURS,
    Counts,
    Present,
    Rates,
    Stays,
    counted,
    departure_seen,
    faded,
    fit,
    no_history,
    outlook,
)

VERSION: Final = 1
SAVE_INTERVAL_S: Final = 300.0
OUTLOOK_INTERVAL_S: Final = 60.0
"""An outlook is worked out anew so often."""
RESTART_S: Final = 120.0
JUMP_S: Final = 2 * SAVE_INTERVAL_S
FILE_MAX_BYTES: Final = 1 << 20
FADE_STEP_WEEKS: Final = 1 / 7

log = logging.getLogger(__name__)


class Declared(msgspec.Struct, frozen=True):
    """What the owner said of the week."""

    windows: tuple[Window, ...] = ()
    departures: tuple[float, ...] = ()
    """Hours since Monday 00:00."""


class _Stay(msgspec.Struct, frozen=True, kw_only=True):
    """The stay under way, as far as it is counted."""

    began_unix_s: float
    seen_unix_s: float


class _Saved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file. Cells that are zero are left out."""

    version: int
    exposed_h: dict[int, float]
    ends: dict[int, float]
    unplugged: tuple[float, float]
    departures: tuple[float, float]
    faded_unix_s: float
    stay: _Stay | None


def local_hour_of_week(unix_s: float) -> float:
    """Hours since Monday 00:00 in this machine's time zone."""
    now = datetime.fromtimestamp(unix_s).astimezone()
    return now.weekday() * 24 + now.hour + now.minute / 60 + now.second / 3600


def on_battery() -> bool:
    """Whether this machine runs on battery; one without a battery does not."""
    sensors = getattr(psutil, "sensors_battery", None)
    battery = None if sensors is None else sensors()
    return battery is not None and battery.power_plugged is False


class StayHistory:
    """One device's history. `begin` once, then `look` at an interval and `save` when it says so, `end` at a polite end.

    `path` `None` keeps it in memory. `counts` is a past to begin with, where the file has none.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Clock,
        declared: Declared = Declared(),  # noqa: B008 (frozen)
        *,
        counts: Counts | None = None,
        hour_of_week: Callable[[float], float] = local_hour_of_week,
        battery: Callable[[], bool] = on_battery,
    ) -> None:
        self._path = path
        self._clock = clock
        self._declared = declared
        self._shares = window_shares(declared.windows)
        self._hour_of_week = hour_of_week
        self._battery = battery
        self.counts = no_history(1) if counts is None else counts
        self._faded_unix_s = clock.unix_s()
        self._stay: _Stay | None = None
        self._saved_unix_s = -np.inf
        self._rates: Rates | None = None
        self._outlook: tuple[float, Outlook] | None = None

    # --- the stay -------------------------------------------------------------------------------

    def begin(self) -> None:
        """The device is here: read what was kept, settle how the last stay ended, begin or go on with a stay."""
        now_s = self._clock.unix_s()
        saved = None if self._path is None else _read(self._path)
        if saved is not None:
            self.counts = _counts_of(saved)
            self._faded_unix_s = min(saved.faded_unix_s, now_s)
            self._stay = saved.stay
        if self._stay is not None and not 0.0 <= now_s - self._stay.seen_unix_s <= SAVE_INTERVAL_S + RESTART_S:
            self._end_at(self._stay.seen_unix_s)
        if self._stay is None:
            self._stay = _Stay(began_unix_s=now_s, seen_unix_s=now_s)
        self._fade(now_s)
        self._save(now_s)

    def look(self) -> bool:
        """Count the time since the last look; whether it is time to `save`. Call at least once a `SAVE_INTERVAL_S`."""
        now_s = self._clock.unix_s()
        if self._stay is None:
            return False
        if not 0.0 <= now_s - self._stay.seen_unix_s <= JUMP_S:
            log.info("the clock jumped by %.0f s; that time is not counted", now_s - self._stay.seen_unix_s)
            self._stay = _Stay(began_unix_s=now_s - self._age_s(), seen_unix_s=now_s)
        self._count(now_s, ended=False)
        self._fade(now_s)
        return not 0.0 <= now_s - self._saved_unix_s < SAVE_INTERVAL_S

    async def save(self) -> None:
        """Keep what was counted; the disk is waited for in a thread."""
        content = self._content(self._clock.unix_s())
        if self._path is not None:
            await asyncio.to_thread(self._try_write, self._path, content)

    def end(self) -> None:
        """The device leaves now. Idempotent."""
        if self._stay is None:
            return
        self.look()
        self._end_at(self._clock.unix_s())
        self._save(self._clock.unix_s())

    def outlook(self) -> Outlook:
        """What it expects now; worked out at most once an `OUTLOOK_INTERVAL_S`."""
        now_s = self._clock.unix_s()
        if self._outlook is None or not 0.0 <= now_s - self._outlook[0] < OUTLOOK_INTERVAL_S:
            if self._rates is None:
                self._rates = fit(self.counts, self._shares)
            hour = self._hour_of_week(now_s)
            age_h = 0.0 if self._stay is None else max(0.0, now_s - self._stay.began_unix_s) / 3600
            present = Present(
                hour_of_week=np.array([hour]),
                age_h=np.array([age_h]),
                departs_in_h=np.array([departures_in_h(self._declared.departures, hour)]),
                on_battery=np.array([self._battery()]),
            )
            self._outlook = now_s, outlook(self._rates, present)
        return self._outlook[1]

    # --- counting -------------------------------------------------------------------------------

    def _age_s(self) -> float:
        assert self._stay is not None
        return max(0.0, self._stay.seen_unix_s - self._stay.began_unix_s)

    def _count(self, now_s: float, *, ended: bool) -> None:
        assert self._stay is not None
        since_s = self._stay.seen_unix_s
        hour = self._hour_of_week(since_s)
        lasted_h = max(0.0, now_s - since_s) / 3600
        piece = Stays(
            device=np.zeros(1, dtype=np.int64),
            hour_of_week=np.array([hour]),
            age_h=np.array([self._age_s() / 3600]),
            lasted_h=np.array([lasted_h]),
            ended=np.array([ended]),
            on_battery=np.array([self._battery()]),
        )
        self.counts = counted(self.counts, piece)
        if not ended:
            self._count_overdue(hour, now_s)
        self._stay = _Stay(began_unix_s=self._stay.began_unix_s, seen_unix_s=now_s)

    def _count_overdue(self, hour: float, now_s: float) -> None:
        """Still here though it should have left: the word was not kept. Counted once, when the tolerance runs out."""
        assert self._stay is not None
        if now_s - self._stay.began_unix_s < DEPARTURE_TOLERANCE_H * 3600:
            return
        for departure in self._declared.departures:
            last = departure + DEPARTURE_TOLERANCE_H
            if (self._hour_of_week(now_s) - last) % HOURS < (hour - last) % HOURS:
                self.counts = departure_seen(self.counts, 0, -2 * DEPARTURE_TOLERANCE_H)

    def _end_at(self, at_s: float) -> None:
        self._count(at_s, ended=True)
        hour = self._hour_of_week(at_s)
        for departure in self._declared.departures:
            ahead_h = (departure - hour + HOURS / 2) % HOURS - HOURS / 2
            if abs(ahead_h) <= DEPARTURE_TOLERANCE_H:
                self.counts = departure_seen(self.counts, 0, ahead_h)
                break
        self._stay = None
        self._rates = self._outlook = None

    def _fade(self, now_s: float) -> None:
        weeks = (now_s - self._faded_unix_s) / (7 * 24 * 3600)
        if weeks >= FADE_STEP_WEEKS:
            self.counts = faded(self.counts, weeks)
        if weeks >= FADE_STEP_WEEKS or weeks < 0:
            self._faded_unix_s = now_s

    # --- the file -------------------------------------------------------------------------------

    def _save(self, now_s: float) -> None:
        content = self._content(now_s)
        if self._path is not None:
            self._try_write(self._path, content)

    def _content(self, now_s: float) -> bytes:
        self._saved_unix_s = now_s
        self._rates = None  # what was counted since is learned from
        return msgspec.json.encode(_saved(self.counts, self._faded_unix_s, self._stay))

    def _try_write(self, path: Path, content: bytes) -> None:
        try:
            _write(path, content)
        except OSError as error:
            log.warning("the history of stays could not be saved: %s", error)


def _saved(counts: Counts, faded_unix_s: float, stay: _Stay | None) -> _Saved:
    return _Saved(
        version=VERSION,
        exposed_h=_sparse(counts.exposed_h),
        ends=_sparse(counts.ends),
        unplugged=(float(counts.unplugged[0, 0]), float(counts.unplugged[0, 1])),
        departures=(float(counts.departures[0, 0]), float(counts.departures[0, 1])),
        faded_unix_s=faded_unix_s,
        stay=stay,
    )


def _sparse(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> dict[int, float]:
    flat = values.ravel()
    return {int(cell): round(float(flat[cell]), 5) for cell in np.flatnonzero(flat)}


def _counts_of(saved: _Saved) -> Counts:
    cells = []
    for sparse in (saved.exposed_h, saved.ends):
        flat = np.zeros(HOURS * AGES)
        flat[list(sparse)] = list(sparse.values())
        cells.append(flat.reshape(1, HOURS, AGES))
    return Counts(
        exposed_h=cells[0],
        ends=cells[1],
        unplugged=np.array([saved.unplugged]),
        departures=np.array([saved.departures]),
    )


def _read(path: Path) -> _Saved | None:
    """What was kept; `None`, with the file put aside, when it cannot be believed."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_MAX_BYTES + 1)
        if len(content) > FILE_MAX_BYTES:
            raise ValueError(f"it has more than {FILE_MAX_BYTES} bytes")
        saved = msgspec.json.decode(content, type=_Saved)
        _check(saved)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("the history of stays in %s cannot be used and starts anew: %s", path.name, error)
        try:
            path.replace(path.with_name(path.name + ".unreadable"))
        except OSError:
            log.info("it could not be put aside")
        return None
    return saved


def _check(saved: _Saved) -> None:
    """Raise `ValueError` for what this version did not write."""
    if saved.version != VERSION:
        raise ValueError(f"expected version {VERSION}, got {saved.version}")
    cells = [*saved.exposed_h, *saved.ends]
    if cells and not 0 <= min(cells) <= max(cells) < HOURS * AGES:
        raise ValueError(f"expected cells from 0 to {HOURS * AGES - 1}")
    values = [*saved.exposed_h.values(), *saved.ends.values(), *saved.unplugged, *saved.departures]
    times = [saved.faded_unix_s, *((saved.stay.began_unix_s, saved.stay.seen_unix_s) if saved.stay else ())]
    if not all(0.0 <= value < 1e12 for value in values + times):
        raise ValueError("expected counts and times that are not negative")


def _write(path: Path, content: bytes) -> None:
    """All of it or none, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
