"""A device's history on its own disk: what survives a kill, a damaged file and a clock that jumps."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.fleet import OUTLOOK_HORIZONS_S
from fallow.node.history import JUMP_S, RESTART_S, SAVE_INTERVAL_S, Declared, StayHistory
from fallow.node.timetable import parse_departures

MONDAY_UNIX_S = 1_700_000_000.0
HOUR_S = 3600.0


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now_s = MONDAY_UNIX_S

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("a history does not sleep")


def hour_of_week(unix_s: float) -> float:
    return ((unix_s - MONDAY_UNIX_S) / HOUR_S) % 168


def history(path: Path | None, clock: Clock, declared: Declared = Declared()) -> StayHistory:  # noqa: B008 (frozen)
    return StayHistory(path, clock, declared, hour_of_week=hour_of_week, battery=lambda: False)


def live(kept: StayHistory, clock: Clock, hours: float) -> None:
    """Stay for some hours, looking every minute and saving when it is time."""
    until_s = clock.now_s + hours * HOUR_S
    while clock.now_s < until_s:
        clock.now_s = min(until_s, clock.now_s + 60.0)
        if kept.look():
            asyncio.run(kept.save())


def begun(path: Path | None, clock: Clock, declared: Declared = Declared()) -> StayHistory:  # noqa: B008 (frozen)
    kept = history(path, clock, declared)
    kept.begin()
    return kept


def test_a_polite_stay_is_counted_and_kept(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "stays.json"
    first = begun(path, clock)
    live(first, clock, 5.5)
    first.end()
    first.end()
    clock.now_s += 10 * HOUR_S
    second = begun(path, clock)
    assert second.counts.exposed_h.sum() == pytest.approx(5.5, abs=1e-3)
    assert second.counts.ends.sum() == 1
    assert second.counts.ends[0, 5].sum() == 1
    assert second.counts.exposed_h[0, :5].sum() == pytest.approx(5.0, abs=1e-3)


def test_a_killed_device_was_there_until_it_was_last_seen(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "stays.json"
    live(begun(path, clock), clock, 3.0)  # and is killed
    clock.now_s += 6 * HOUR_S
    after = begun(path, clock)
    assert after.counts.ends.sum() == 1
    assert 3.0 - SAVE_INTERVAL_S / HOUR_S - 0.02 <= after.counts.exposed_h.sum() <= 3.0


def test_a_device_that_is_soon_back_never_left(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "stays.json"
    live(begun(path, clock), clock, 3.0)
    clock.now_s += RESTART_S - 1
    after = begun(path, clock)
    live(after, clock, 2.0)
    assert after.counts.ends.sum() == 0
    # The stay has its old age: five hours after its beginning is in the class of 4 to 8 hours.
    assert after.counts.exposed_h[0, :, 5].sum() > 0.9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b"{}",
        b'{"version":9,"exposed_h":{},"ends":{},"unplugged":[0,0],"departures":[0,0],"faded_unix_s":0,"stay":null}',
        b'{"version":1,"exposed_h":{"99999":1},"ends":{},"unplugged":[0,0],"departures":[0,0],"faded_unix_s":0,"stay":null}',
        b'{"version":1,"exposed_h":{"5":-1},"ends":{},"unplugged":[0,0],"departures":[0,0],"faded_unix_s":0,"stay":null}',
        b'{"version":1,"exposed_h":{},"ends":{},"unplugged":[0],"departures":[0,0],"faded_unix_s":0,"stay":null}',
        b" " * (2 << 20),
    ],
)
def test_a_damaged_file_is_put_aside_and_the_history_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    clock, path = Clock(), tmp_path / "stays.json"
    path.write_bytes(content)
    with caplog.at_level("WARNING"):
        kept = begun(path, clock)
    assert "starts anew" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert kept.counts.exposed_h.sum() == 0
    assert (tmp_path / "stays.json.unreadable").read_bytes() == content
    live(kept, clock, 1.0)
    kept.end()
    assert begun(path, clock).counts.ends.sum() == 1


def whole_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        clock, path = Clock(), Path(folder) / "stays.json"
        kept = begun(path, clock)
        live(kept, clock, 2.0)
        kept.end()
        return path.read_bytes()


WHOLE = whole_file()


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, len(WHOLE)))
def test_a_torn_file_never_stops_a_device(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    clock, path = Clock(), tmp_path_factory.mktemp("torn") / "stays.json"
    path.write_bytes(WHOLE[:cut])
    assert begun(path, clock).counts.exposed_h.sum() in (0.0, pytest.approx(2.0, abs=1e-3))


def test_a_clock_that_jumps_counts_nothing(tmp_path: Path) -> None:
    clock = Clock()
    kept = begun(tmp_path / "stays.json", clock)
    live(kept, clock, 1.0)
    for jump_s in (JUMP_S + 1, -50 * HOUR_S, 3 * HOUR_S):
        clock.now_s += jump_s
        kept.look()
    assert kept.counts.exposed_h.sum() == pytest.approx(1.0, abs=1e-3)
    assert kept.counts.ends.sum() == 0


def test_a_disk_that_refuses_is_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level("WARNING"):
        kept = begun(blocked / "stays.json", clock)
    live(kept, clock, 1.0)
    assert "could not be saved" in caplog.text
    assert len(kept.outlook().survival) == len(OUTLOOK_HORIZONS_S)


def test_the_outlook_learns_from_what_was_kept(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "stays.json"
    fresh = begun(None, clock).outlook()
    for _ in range(14):  # from midnight until 02:00 every day, for two weeks
        kept = begun(path, clock)
        for _ in range(12):
            clock.now_s += HOUR_S / 6
            kept.look()
        kept.end()
        clock.now_s += 22 * HOUR_S
    kept = begun(path, clock)
    live(kept, clock, 1.5)
    learned = kept.outlook()
    assert learned.survival[0] > 0.7
    assert learned.survival[3] < 0.3 < fresh.survival[3]
    assert path.stat().st_size < 64 << 10


def test_a_declared_departure_is_in_the_outlook_and_its_keeping_is_counted() -> None:
    clock = Clock()
    declared = Declared(departures=parse_departures("node.departs", ["mon-sun 02:00"]))
    kept = begun(None, clock, declared)
    live(kept, clock, 1.0)
    outlook = kept.outlook()
    assert outlook.survival[1] > 0.8
    assert outlook.survival[3] < 0.15
    live(kept, clock, 0.9)
    kept.end()
    assert kept.counts.departures.tolist() == [[1.0, 0.0]]
    clock.now_s += 20 * HOUR_S
    kept.begin()
    live(kept, clock, 7.0)  # past the next departure
    assert kept.counts.departures[0] == pytest.approx([1.0, 1.0], abs=0.05)


def outlooks(departs: list[str], begins_h: float, hours: list[float]) -> list[list[float]]:
    """Survival and expected hours of a device without history that came at `begins_h`, at some hours of the week."""
    clock = Clock()
    clock.now_s += begins_h * HOUR_S
    kept = begun(None, clock, Declared(departures=parse_departures("node.departs", departs)))
    found = []
    for hour in hours:
        clock.now_s = MONDAY_UNIX_S + hour * HOUR_S
        found.append([*kept.outlook().survival, kept.outlook().expected_s / HOUR_S])
    return found


def test_a_device_is_not_surest_just_after_it_should_have_gone() -> None:
    before, after, late = outlooks(["daily 07:45"], 1.73, [7.73, 7.77, 9.5])
    assert after[:5] == pytest.approx(before[:5], abs=0.05)
    assert after[4] < 0.2
    assert after[5] < 3.0
    usual = outlooks([], 1.73, [9.5])[0]
    assert late == pytest.approx(usual, abs=0.01), "it has not gone: the word is over"


def test_a_departure_next_monday_says_nothing_of_this_week() -> None:
    hours = [10.0, 30.0, 80.0, 140.0, 154.0]
    for told, usual in zip(outlooks(["mon 07:45"], 9.0, hours), outlooks([], 9.0, hours), strict=True):
        assert told == pytest.approx(usual, abs=0.001)


def test_a_departure_before_the_stay_began_is_over() -> None:
    assert outlooks(["mon 07:45"], 7.8, [7.9]) == outlooks([], 7.8, [7.9])


def test_no_outlook_jumps_as_declared_departures_come_and_pass() -> None:
    hours = [20.0 + minute / 30 for minute in range(30 * 48)]
    found = np.array(outlooks(["daily 07:45", "tue 12:30"], 19.0, hours))
    share_steps = np.abs(np.diff(found[:, :5], axis=0)).max()
    assert share_steps < 0.12, "two minutes; a departure is kept to some 12"
    assert np.abs(np.diff(found[:, 5])).max() < 0.8


def test_an_outlook_is_worked_out_once_a_minute() -> None:
    clock = Clock()
    kept = begun(None, clock)
    first = kept.outlook()
    clock.now_s += 59.0
    assert kept.outlook() is first
    clock.now_s += 2.0
    assert kept.outlook() is not first


CHILD = """
import sys, asyncio
from pathlib import Path
from fallow.node.history import StayHistory
from fallow.system_clock import SystemClock
kept = StayHistory(Path(sys.argv[1]), SystemClock())
kept.begin()
print("ready", flush=True)
while True:
    kept.look()
    asyncio.run(kept.save())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_9_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "stays.json"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        before = path.stat().st_ino
        while path.stat().st_ino == before:  # until it has been replaced at least once more
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert msgspec.json.decode(path.read_bytes())["version"] == 1
    assert history(path, Clock()).counts.ends.sum() == 0
