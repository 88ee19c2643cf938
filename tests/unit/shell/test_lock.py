"""A state folder belongs to one device at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from fallow.domain.errors import ConfigError
from fallow.processes.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from fallow.processes.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_device_is_told_until_the_first_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="--state-dir"), hold(tmp_path):
            pytest.fail("two processes held one folder")
        first.kill()
    with hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Nothing can be kept in .*file/device"), hold(tmp_path / "file" / "device"):
        pytest.fail("it is held")


def test_a_folder_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(tmp_path):
            pass
