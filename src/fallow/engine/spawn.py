"""Starts a confined worker process, with a socket pair to talk over and a pipe for its words.

The process that is started may be the one that confines (bubblewrap), which ends with its parent and takes the worker
along; it reports which process the worker is. What a worker says in words goes to the log, up to a bound.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec

from fallow.domain.errors import EngineLost
from fallow.engine.sandbox import launch, strongest
from fallow.engine.settings import Confinement, EngineSettings

WORKER_MODULE = "fallow.engine.worker"
INFO_MAX_BYTES = 4096
SOCKET_BUFFER_BYTES = 4 << 20
WORDS_MAX_BYTES = 64 << 10
"""What is kept in our log of what one worker says on its standard output and error."""

log = logging.getLogger(__name__)


class Spawned(msgspec.Struct, frozen=True):
    """A worker that has been started."""

    process: subprocess.Popen[bytes]
    """What was started: the worker, or what confines it and ends with it."""
    process_id: int | None
    """The worker's; `None` when it did not come up."""
    channel: socket.socket
    """Our end, which does not block."""
    confinement: Confinement


async def spawn(settings: EngineSettings, models: Iterable[Path]) -> Spawned:
    """Start a worker that may read these folders. Call it on the main thread. Raises `EngineLost`."""
    loop = asyncio.get_running_loop()
    confinement = settings.confinement
    if confinement is None:
        confinement = await loop.run_in_executor(None, strongest)
    ours, theirs = _socket_pair()
    said, words = os.pipe()
    told, info = os.pipe()
    arguments = [str(theirs.fileno()), msgspec.json.encode(settings).decode()]
    started = launch(confinement, WORKER_MODULE, arguments, models, info)
    keep = [theirs.fileno(), *([info] if started.reports_process else [])]
    try:
        # From this thread: the worker dies with the thread that started it.
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns in a few milliseconds
            started.command,
            pass_fds=keep,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=started.environment,
        )
    except OSError as error:
        ours.close()
        os.close(said)
        os.close(told)
        raise EngineLost(f"the engine's worker process cannot be started: {error}") from error
    finally:
        theirs.close()
        os.close(words)
        os.close(info)
    await loop.connect_read_pipe(_Words, os.fdopen(said, "rb"))
    reported = await loop.run_in_executor(None, _reported_process, told)
    return Spawned(process, reported if started.reports_process else process.pid, ours, confinement)


class _Words(asyncio.Protocol):
    """What a worker says in words, which is for people: into the log, up to a bound."""

    def __init__(self) -> None:
        self._left_bytes = WORDS_MAX_BYTES

    def data_received(self, data: bytes) -> None:
        shown, self._left_bytes = data[: self._left_bytes], max(0, self._left_bytes - len(data))
        for line in shown.decode(errors="replace").splitlines():
            log.info("the engine's worker says: %s", "".join(filter(str.isprintable, line)))


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Our end, which does not block, and the worker's."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    ours.setblocking(False)
    return ours, theirs


def _reported_process(told: int) -> int | None:
    """Read and close bubblewrap's report; `None` when there is none."""
    with os.fdopen(told, "rb") as report:
        said = report.read(INFO_MAX_BYTES)
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(said, type=_Info).process
    return None


class _Info(msgspec.Struct, frozen=True):
    process: int = msgspec.field(name="child-pid")
