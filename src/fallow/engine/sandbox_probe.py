"""Tries, from inside a confined process, what a worker must not be able to do, and reports what happened.

`fallow doctor` and the tests start it exactly as a worker is started (`sandbox.launch`). Its argument says what to try;
its answer, one JSON object on standard output, holds for each attempt what came of it: `None` when it *succeeded*, and
the error's name otherwise. It carries no payload and changes nothing where it succeeds but a file of its own making.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from fallow.engine.sandbox import launch
from fallow.engine.settings import Confinement

TIMEOUT_S = 30.0
FORKS_MAX = 64
_F_SETOWN = 8
_FILE_NAME = "fallow-sandbox-probe"


class Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """What to try."""

    secrets: tuple[str, ...] = ()
    """Files and folders that must not be readable."""
    models: str = ""
    """A folder that must be readable, and not writable."""
    model_file: str = ""
    """A file in it."""
    address: tuple[str, int] = ("127.0.0.1", 9)
    """Where somebody listens."""
    neighbour: int = 1
    """A process that must not be touched: its id outside."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `None` means that it worked."""

    connects: str | None
    resolves: str | None
    unix_socket: str | None
    reads_secrets: dict[str, str | None]
    writes_models: str | None
    writes_temporary: str | None
    reads_models: str | None
    signals_neighbour: str | None
    traces_neighbour: str | None
    starts_program: str | None
    forks: int
    """How many processes it could make, up to `FORKS_MAX`."""
    threads: str | None
    """Starting a thread, which it must be able to."""
    environment: tuple[str, ...]
    """Names of the variables that it found."""
    descriptors: tuple[int, ...]
    """Open descriptors beyond the three standard ones."""

    @property
    def escapes(self) -> tuple[str, ...]:
        """What it could do and must not, in words. Empty is good."""
        found = {
            "connect to an address": self.connects is None,
            "look up a name": self.resolves is None,
            "make a Unix socket": self.unix_socket is None,
            "write to the model files": self.writes_models is None,
            "write temporary files": self.writes_temporary is None,
            "signal the agent": self.signals_neighbour is None,
            "trace the agent": self.traces_neighbour is None,
            "start a program": self.starts_program is None,
            "start processes": self.forks > 0,
        }
        read = [f"read {path}" for path, error in self.reads_secrets.items() if error is None]
        return (*(what for what, happened in found.items() if happened), *read)


def probe(confinement: Confinement, attempts: Attempts) -> Findings:
    """Run all attempts in a confined process. Raises `OSError` or `subprocess.SubprocessError` when it does not run."""
    text = msgspec.json.encode(attempts).decode()
    started = launch(confinement, __name__, [text], [Path(attempts.models)] if attempts.models else [])
    done = subprocess.run(
        started.command, env=started.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise OSError(f"the confined process ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
    return msgspec.json.decode(done.stdout, type=Findings)


def main(arguments: Sequence[str]) -> None:
    """Inside: try, and say what happened."""
    attempts = msgspec.json.decode(arguments[0], type=Attempts)
    sys.stdout.buffer.write(msgspec.json.encode(_try_all(attempts)))
    sys.stdout.flush()


def _try_all(attempts: Attempts) -> Findings:
    models = Path(attempts.models)
    return Findings(
        connects=_outcome(lambda: socket.create_connection(attempts.address, timeout=2.0).close()),
        resolves=_outcome(lambda: socket.getaddrinfo("example.org", 80)),
        unix_socket=_outcome(socket.socketpair),
        reads_secrets={path: _outcome(partial(_read, Path(path))) for path in attempts.secrets},
        writes_models=_outcome(lambda: _write(models / _FILE_NAME)),
        writes_temporary=_outcome(lambda: _write(Path("/tmp") / _FILE_NAME)),  # noqa: S108
        reads_models=_outcome(lambda: _read(Path(attempts.model_file))),
        signals_neighbour=_outcome(lambda: _signal(attempts.neighbour)),
        traces_neighbour=_outcome(lambda: Path(f"/proc/{attempts.neighbour}/mem").open("rb").close()),
        starts_program=_outcome(lambda: subprocess.run([sys.executable, "-c", ""], check=True)),
        forks=_forks(),
        threads=_outcome(_thread),
        environment=tuple(sorted(os.environ)),
        descriptors=tuple(filter(_is_open, range(3, 256))),
    )


def _outcome(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except Exception as error:  # whatever refuses is a refusal
        return type(error).__name__
    return None


def _read(path: Path) -> None:
    if path.is_dir():
        next(iter(path.iterdir()))
        return
    with path.open("rb") as file:
        file.read(1)


def _write(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"x")
    path.unlink()


def _signal(process: int) -> None:
    if process == os.getpid():  # another process namespace: the number is our own
        raise ProcessLookupError
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w"):
        fcntl.fcntl(reader, _F_SETOWN, process)  # would have the kernel signal it when the pipe can be read


def _thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def _forks() -> int:
    """Children that do nothing but end when they are told; all are ended before this returns."""
    children: list[int] = []
    release, hold = os.pipe()
    with contextlib.suppress(OSError):
        while len(children) < FORKS_MAX:
            child = os.fork()
            if child == 0:
                os.close(hold)
                os.read(release, 1)
                os._exit(0)
            children.append(child)
    os.close(hold)
    os.close(release)
    for child in children:
        os.waitpid(child, 0)
    return len(children)


def _is_open(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return True
    return False
