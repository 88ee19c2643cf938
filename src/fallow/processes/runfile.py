"""How other commands on this machine find a running service: `up.json` in its state folder.

Only its owner may read it: in the development mode, the bus's url holds a password. It goes when the service stops; one
that a crash left behind is recognised by its dead process.
"""

import os
from pathlib import Path
from typing import Final

import msgspec

from fallow.private_file import write_durably

RUN_FILE: Final = "up.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A running service."""

    pid: int
    bus_url: str
    api_url: str
    cell: str
    insecure: bool = False
    """It runs in the insecure development mode."""


def running(state_dir: Path) -> Running | None:
    """The service whose state lies there, if one runs."""
    try:
        found = msgspec.json.decode((state_dir / RUN_FILE).read_bytes(), type=Running)
        os.kill(found.pid, 0)
    except (OSError, msgspec.MsgspecError):
        return None
    return found


def write(state_dir: Path, found: Running) -> None:
    """Say that it runs."""
    write_durably(state_dir / RUN_FILE, msgspec.json.encode(found))


def remove(state_dir: Path) -> None:
    """Say that it runs no longer. Idempotent."""
    (state_dir / RUN_FILE).unlink(missing_ok=True)
