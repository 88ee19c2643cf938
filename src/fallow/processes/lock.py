"""One device per state folder: two processes with one identity would take each other's links and sessions."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fallow.domain.errors import ConfigError

PID_DIGITS_MAX: Final = 20


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder while this process lives; the kernel lets go of it, however the process ends.

    Raises `ConfigError` when another process holds it, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another device runs in {folder} already; give this one a folder of its own with --state-dir."
            ) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield
    finally:
        os.close(handle)


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"Nothing can be kept in {folder} ({error.strerror or error}): see to that, and run the same command again."
    )


def holder(folder: Path) -> int | None:
    """The process that holds a folder; `None` when nobody does, or where that cannot be told (Windows)."""
    try:
        import fcntl

        handle = os.open(folder / "lock", os.O_RDWR)
    except (ImportError, FileNotFoundError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        written = os.pread(handle, PID_DIGITS_MAX, 0)
        return int(written) if written.isdigit() else None
    else:
        return None
    finally:
        os.close(handle)
