"""Children are kept alive within bounds, and ended within bounds. The children are real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from fallow.processes import supervisor
from fallow.processes.supervisor import Child

LIMIT_S = 20.0
OBEDIENT = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
KEEPS = """
import asyncio, sys, pathlib
from fallow.processes.supervisor import Child
async def main():
    child = Child("worker", [sys.executable, "-c", sys.argv[1]], {}, pathlib.Path(sys.argv[2]), print)
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def child(tmp_path: Path, code: str, told: list[str], rest_s: float = 0.0) -> Child:
    return Child("worker", [sys.executable, "-c", code], {"MARK": "1"}, tmp_path / "worker.output", told.append, rest_s)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


def test_a_child_that_is_killed_comes_back(tmp_path: Path) -> None:
    told: list[str] = []

    async def work() -> None:
        worker = child(tmp_path, OBEDIENT, told)
        await worker.start()
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: worker.pid not in (None, first))
        await worker.stop(2.0)
        assert worker.pid is None

    run(work)
    assert len(told) == 1
    assert "signal 9" in told[0]


def test_a_child_that_is_to_rest_stays_away_for_so_long(tmp_path: Path) -> None:
    told: list[str] = []

    async def work() -> None:
        worker = child(tmp_path, OBEDIENT, told, rest_s=0.5)
        await worker.start()
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: bool(told))
        told_s = asyncio.get_running_loop().time()
        await until(lambda: worker.pid not in (None, first))
        assert asyncio.get_running_loop().time() - told_s > 0.4
        await worker.stop(2.0)

    run(work)


def test_a_child_that_cannot_live_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 2)
    monkeypatch.setattr(supervisor, "RESTART_WAIT_S", 0.01)
    told: list[str] = []

    async def work() -> None:
        worker = child(tmp_path, "import sys; sys.exit('no luck today')", told)
        await worker.start()
        await until(lambda: worker.given_up)
        await worker.stop(1.0)

    run(work)
    assert len(told) == 3
    assert "no luck today" in told[0]
    assert "given up" in told[-1]


@pytest.mark.parametrize("code", [OBEDIENT, STUBBORN])
def test_stopping_is_bounded(tmp_path: Path, code: str) -> None:
    told: list[str] = []

    async def work() -> None:
        worker = child(tmp_path, code, told)
        await worker.start()
        await until(lambda: b"up" in (tmp_path / "worker.output").read_bytes())
        pid = worker.pid
        began_s = asyncio.get_running_loop().time()
        await worker.stop(1.0)
        assert asyncio.get_running_loop().time() - began_s < 5.0
        assert pid is not None
        assert not psutil.pid_exists(pid)
        await worker.stop(1.0)

    run(work)
    assert told == []


def test_a_child_leads_a_session_of_its_own(tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to a whole process group; only the supervisor may act on it."""

    async def work() -> None:
        worker = child(tmp_path, OBEDIENT, [])
        await worker.start()
        assert worker.pid is not None
        await until(lambda: os.getsid(worker.pid or 0) == worker.pid)
        await worker.stop(2.0)

    run(work)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, children look after that themselves")
def test_a_child_that_listens_to_nobody_ends_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "worker.output"
    command = [sys.executable, "-c", KEEPS, STUBBORN, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        orphan = psutil.Process(int(keeper.stdout.readline()))
        deadline_s = time.monotonic() + LIMIT_S
        while b"up" not in log.read_bytes() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        keeper.kill()
        keeper.wait(LIMIT_S)
        orphan.wait(LIMIT_S)


def test_a_start_that_fails_counts_as_a_death_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor or no memory is left at that moment, or the disk with the log is full."""
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 3)
    monkeypatch.setattr(supervisor, "RESTART_WAIT_S", 0.01)
    told: list[str] = []

    async def work() -> None:
        worker = child(tmp_path, "import time; print('up', flush=True); time.sleep(60)", told)
        await worker.start()
        first = worker.pid
        assert first is not None
        log = tmp_path / "worker.output"
        log.unlink()
        log.mkdir()  # nothing can be written there
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(told) == 2)
        assert "could not be started" in told[1] and not worker.given_up
        log.rmdir()
        await until(lambda: worker.pid not in (None, first))
        second = worker.pid
        assert second is not None
        log.unlink()
        log.mkdir()
        os.kill(second, signal.SIGKILL)
        await until(lambda: worker.given_up)
        await worker.stop(1.0)

    run(work)
    assert "given up" in told[-1]
