"""Files that only their owner may read, written whole: keys, credentials, ledgers, and what must survive a crash.

It knows nothing of what they hold.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
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
    with _beside(path, data, owner) as temporary:
        temporary.replace(path)
    if sync is Sync.NAME:
        _sync_folder(path.parent)


def write_first(path: Path, data: bytes) -> None:
    """Make a file that was not there, whole or not at all; of several processes that try, one does.

    Raises `FileExistsError`.
    """
    with _beside(path, data, None) as temporary, _alone_in(path.parent):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.rename(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def _beside(path: Path, data: bytes, owner: Owner | None) -> Iterator[Path]:
    """The data in a file beside `path`, which the caller renames; gone when that fails."""
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
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Nobody else is in the same place of this module with that folder. (A hard link would be simpler to make first,
    but phones refuse those.)"""
    try:
        import fcntl
    except ImportError:  # Windows, where renaming replaces nothing
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
