"""`make test` itself: it ends when one of its workers dies, and says which test hung, and where."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from hypothesis import Phase, settings

ROOT = Path(__file__).parent.parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
LIMIT_S = 60.0

DONE = "def test_one(): pass\ndef test_two(): pass\n"
HANGS = "import threading\ndef test_that_hangs(): threading.Event().wait()\ndef test_after(): pass\n"


def variable(name: str) -> str:
    found = re.search(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_worker_that_dies_ends_the_run_and_leaves_a_trace(tmp_path: Path) -> None:
    (tmp_path / "test_a_done.py").write_text(DONE)
    (tmp_path / "test_b_hangs.py").write_text(HANGS)
    limits = ("-o", "faulthandler_timeout=0.5", "-o", "timeout=1")
    command = (*variable("SPREAD").split(), "-n", "1", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the two that matter; all of them take seconds to import
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *command, *limits, "-p", "xdist", "-p", "pytest_timeout", str(tmp_path)],
        capture_output=True, text=True, timeout=LIMIT_S, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(r"crashed while running '.*test_b_hangs\.py::test_that_hangs'", run.stdout)
    assert re.search(r'test_b_hangs\.py", line 2 in test_that_hangs', run.stderr)


def test_a_hang_is_shown_before_the_process_is_ended() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert 0 < configured["faulthandler_timeout"] < configured["timeout"]


def test_what_hypothesis_finds_is_said_before_the_time_is_up() -> None:
    profile = settings.get_profile(variable("SAME").removeprefix("--hypothesis-profile="))
    assert profile.derandomize
    assert Phase.shrink not in profile.phases
