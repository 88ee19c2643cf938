"""A script that starts a service and is killed leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import psutil

END_LIMIT_S = 20.0
SCRIPT = """
import sys, time, pathlib
from fallow.processes.local_service import LocalService
arguments = ("--standbys", "0", "--insecure-development", "--no-default-model")
service = LocalService(pathlib.Path(sys.argv[1]), arguments)
service.start()
service.join("guest", "--memory", "64MiB")
service.wait_for(lambda fleet: fleet.nodes, 30, "a device")
print("up", flush=True)
time.sleep(60)
"""


def test_what_a_killed_script_has_started_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "service")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        said = script.stdout.readline().strip()
        started = psutil.Process(script.pid).children(recursive=True)
        script.kill()
        try:
            assert said == "up"
            assert len(started) >= 5, "the bus, a coordinator, the gateway, who looks after them, and a device"
            _, alive = psutil.wait_procs(started, END_LIMIT_S)
            assert alive == []
        finally:
            for process in started:
                if process.is_running():
                    process.kill()
