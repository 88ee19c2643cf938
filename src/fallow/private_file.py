"""Files that only their owner may read, replaced whole: keys, credentials, ledgers, and what must survive a crash.

It knows nothing of what they hold.
"""

import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import NamedTuple


class Sync(Enum):
    """What must have reached the disk when a file was written."""

    FILE = "file"
    """Its content: a crash leaves the old or the new file, whole."""
    NAME = "name"
    """Its name, too: a crash leaves the new file."""


class Owner(NamedTuple):
    """Whose a file is, by number. Only root can give files away."""

    user: int
    group: int


def write_durably(path: Path, data: bytes, sync: Sync = Sync.NAME, owner: Owner | None = None) -> None:
    """Replace a file so that a crash leaves the old or the new one, and after this returns the new one.

    `owner`: whose the new file is; `None`: ours. It is given away by its handle, before it has its name: in a folder of
    somebody else's, a name may lead to another file by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync is Sync.NAME:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
