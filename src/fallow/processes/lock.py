"""One device per state folder: two processes with one identity would take each other's links and sessions."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fallow.domain.errors import ConfigError


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder while this process lives; the kernel lets go of it, however the process ends.

    Raises `ConfigError` when another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another device runs in {folder} already; give this one a folder of its own with --state-dir."
            ) from None
        yield
    finally:
        os.close(handle)
