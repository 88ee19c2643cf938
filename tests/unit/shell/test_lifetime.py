"""How a process is asked to stop. The signals are real, sent to a real process."""

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest

from fallow.processes.lifetime import Stop

LIMIT_S = 20.0
CHILD = """
import asyncio, os, sys
from fallow.processes.lifetime import Stop
async def main():
    stop = Stop()
    stop.listen(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    print("listening", os.getpid(), flush=True)
    await stop.polite.wait()
    print("polite", flush=True)
    finished = await stop.unless_at_once(asyncio.sleep(30), 60)
    print("finished" if finished else "cut short", flush=True)
asyncio.run(main())
"""
HASTY = "from fallow.processes import lifetime; lifetime.PARTING_S = 0.1" + CHILD
LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_polite_and_the_second_is_not(second: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert line(process).startswith("listening")
        process.send_signal(signal.SIGTERM)
        assert line(process) == "polite"
        process.send_signal(second)
        assert line(process) == "cut short"
        assert process.wait(LIMIT_S) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="processes there have no parents to follow")
def test_a_child_does_not_outlive_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, HASTY], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(line(parent).split()[1])
        orphan = psutil.Process(pid)
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.wait(LIMIT_S) == -signal.SIGKILL
        assert (line(parent), line(parent)) == ("polite", "cut short")
        orphan.wait(LIMIT_S)


def test_work_that_ends_in_time_is_finished() -> None:
    async def main() -> bool:
        return await Stop().unless_at_once(asyncio.sleep(0), LIMIT_S)

    assert asyncio.run(main())


def test_work_that_takes_too_long_is_given_up() -> None:
    async def main() -> bool:
        return await Stop().unless_at_once(asyncio.sleep(LIMIT_S), 0.01)

    assert not asyncio.run(main())


def test_work_that_fails_is_not_finished() -> None:
    async def fail() -> None:
        raise OSError

    async def main() -> bool:
        return await Stop().unless_at_once(fail(), LIMIT_S)

    assert not asyncio.run(main())
