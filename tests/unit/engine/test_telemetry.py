"""The runtime tells nobody what is computed, in a worker or outside of one."""

import os
import subprocess
import sys
from pathlib import Path

USE = "import time, fallow.engine.piece; time.sleep(0.5)"
"""An id would be written at once; the rest is for slow machines."""


def test_no_id_of_this_machine_is_made(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    subprocess.run([sys.executable, "-c", USE], env={**environment, "HOME": str(tmp_path)}, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
