"""`WorkerEngine`: the `StageEngine` of an agent, computed by a worker process at the other end of a socket pair.

Rules
- A request is a frame and a future; no task per step. What one call of the worker brings arrives in one read.
- The worker's death, hang or nonsense is one event: every waiting call gets `EngineLost`, `lost` is set, the process is
  killed, and `start` begins anew. Nothing else of it reaches the agent.
- A worker hangs when it owes answers, has been silent for `hang_timeout_s`, and has neither used processor time nor
  waited for a processor since; or when it has been silent for `silence_timeout_s`. A worker that is merely starved by
  the device's owner is left alone.
- Rows on their way are bounded by `OUTSTANDING_BYTES_MAX`; a step beyond that waits.

POSIX only, for now: the pair's descriptor is inherited.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import msgspec
import psutil

from fallow.domain.errors import (
    EngineError,
    EngineLost,
    FallowError,
    FrameError,
    KvExhausted,
    ModelError,
    NumericFault,
    PositionMismatch,
    UnknownSession,
)
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine import protocol
from fallow.engine.contract import EngineLoad, Loaded, Step, Stepped
from fallow.engine.settings import EngineSettings

OUTSTANDING_BYTES_MAX = 64 << 20
CHECK_INTERVAL_S = 0.5
START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
SOCKET_BUFFER_BYTES = 4 << 20
RATE_WINDOW_S = 5.0
HUGE_PAGES = "glibc.malloc.hugetlb=1"

_ERRORS: dict[str, type[FallowError]] = {
    error.code: error
    for error in (EngineError, EngineLost, KvExhausted, ModelError, NumericFault, PositionMismatch, UnknownSession)
}

log = logging.getLogger(__name__)


class WorkerEngine:
    """See `StageEngine`. Not started until `start`; bound to the running loop from then on."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._lost = asyncio.Event()
        self._worker: _Worker | None = None
        self._rate = _Rate()

    @property
    def lost(self) -> asyncio.Event:
        return self._lost

    @property
    def load_now(self) -> EngineLoad:
        worker = self._worker
        if worker is None or worker.gone:
            return EngineLoad(sessions=0, kv_free_bytes=0, rows_per_s=0.0)
        rate = self._rate.per_s(time.monotonic())
        return EngineLoad(sessions=worker.sessions, kv_free_bytes=worker.kv_free_bytes, rows_per_s=rate)

    @property
    def process_id(self) -> int | None:
        """The worker's, for limits and for tests that kill it."""
        return None if self._worker is None else self._worker.process.pid

    async def start(self) -> None:
        """Raises `EngineLost` when the worker does not come up."""
        await self.close()
        self._lost.clear()
        self._worker = await _Worker.spawn(self._settings, self._lost.set)

    async def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        paths = {digest: str(path) for digest, path in files.items()}
        done = await self._ask(lambda ticket: protocol.Load(ticket, stage, manifest, paths))
        assert isinstance(done, protocol.Done) and done.loaded is not None
        return done.loaded

    async def unload(self, model: Digest) -> None:
        await self._ask(lambda ticket: protocol.Unload(ticket, model))

    async def open(self, session: SessionId, model: Digest, span: Span, reserve_tokens: int) -> None:
        await self._ask(lambda ticket: protocol.Open(ticket, session, model, span, reserve_tokens))

    async def reserve(self, session: SessionId, reserve_tokens: int) -> None:
        await self._ask(lambda ticket: protocol.Reserve(ticket, session, reserve_tokens))

    async def step(self, step: Step) -> Stepped:
        answer = await self._ask(lambda ticket: protocol.run_request(ticket, step), step.payload)
        assert isinstance(answer, Stepped)
        self._rate.add(step.count, time.monotonic())
        return answer

    async def rewind(self, session: SessionId, position: int) -> None:
        await self._ask(lambda ticket: protocol.Rewind(ticket, session, position))

    async def free(self, session: SessionId) -> None:
        await self._ask(lambda ticket: protocol.Free(ticket, session))

    async def close(self) -> None:
        """End the worker. Calls that wait get `EngineLost`; `lost` is set only by a death that nobody asked for."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()

    async def _ask(
        self, request: Callable[[int], protocol.AnyRequest], payload: protocol.Payload = b""
    ) -> "protocol.Done | Stepped":
        if self._worker is None:
            raise EngineLost("the engine is not running")
        return await self._worker.ask(request, payload)


def worker_environment() -> dict[str, str]:
    """This process's, and huge pages for the weights where glibc can: 3 % more tokens a second. KV maps opt out."""
    tunables = [HUGE_PAGES, *filter(None, [os.environ.get("GLIBC_TUNABLES")])]
    return {**os.environ, "GLIBC_TUNABLES": ":".join(tunables)}


class _Worker(asyncio.Protocol):
    """One life of the process."""

    def __init__(self, process: subprocess.Popen[bytes], settings: EngineSettings, on_loss: Callable[[], None]) -> None:
        self.process = process
        self.sessions = 0
        self.kv_free_bytes = 0
        self.gone = False
        self._settings = settings
        self._on_loss = on_loss
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._frames = protocol.Frames(protocol.REPLIES)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, tuple[asyncio.Future[protocol.Done | Stepped], int]] = {}
        self._room: deque[asyncio.Future[None]] = deque()
        self._outstanding_bytes = 0
        self._ticket = 0
        self._watch = _Watch(process.pid, settings)
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def spawn(cls, settings: EngineSettings, on_loss: Callable[[], None]) -> "_Worker":
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        ours.setblocking(False)
        arguments = [str(theirs.fileno()), msgspec.json.encode(settings).decode()]
        command = [sys.executable, "-m", "fallow.engine.worker", *arguments]
        with theirs:
            # From this thread: the worker dies with the thread that started it.
            process = subprocess.Popen(  # noqa: ASYNC220 - it returns in a few milliseconds
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=worker_environment()
            )
        worker = cls(process, settings, on_loss)
        await worker._loop.create_connection(lambda: worker, sock=ours)
        try:
            await asyncio.wait_for(asyncio.shield(worker._ready), START_TIMEOUT_S)
        except (TimeoutError, EngineLost) as error:
            await worker.close()
            raise EngineLost("the engine's worker process did not start; its own messages say why") from error
        return worker

    async def ask(
        self, request: Callable[[int], protocol.AnyRequest], payload: protocol.Payload
    ) -> protocol.Done | Stepped:
        size = len(payload)
        while self._outstanding_bytes and self._outstanding_bytes + size > OUTSTANDING_BYTES_MAX and not self.gone:
            turn = self._loop.create_future()
            self._room.append(turn)
            await turn
        if self.gone or self._transport is None:
            raise EngineLost("the engine's worker process is gone")
        self._ticket += 1
        ticket = self._ticket
        prefix, body = protocol.encode(request(ticket), payload)
        answer: asyncio.Future[protocol.Done | Stepped] = self._loop.create_future()
        if not self._waiting:
            self._watch.begin(self._loop.time())
        self._waiting[ticket] = (answer, size)
        self._outstanding_bytes += size
        self._transport.write(prefix + body if size else prefix)
        if self._timer is None:
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        return await answer

    async def close(self) -> None:
        """Kill the process and wait for its end."""
        self._end("the engine was closed", expected=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await self._loop.run_in_executor(None, self.process.wait, CLOSE_TIMEOUT_S)

    # --- what the transport calls ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._watch.begin(self._loop.time())
        try:
            for reply, payload in self._frames.feed(data):
                self._take(reply, payload)
        except FrameError as error:
            self._end(f"the engine's worker process talks nonsense: {error.message}", expected=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the engine's worker process died", expected=False)

    def _take(self, reply: protocol.AnyReply, payload: memoryview) -> None:
        match reply:
            case protocol.Computed():
                self._settle(reply.ticket, protocol.stepped_of(reply, payload))
            case protocol.Done():
                self.sessions, self.kv_free_bytes = reply.sessions, reply.kv_free_bytes
                self._settle(reply.ticket, reply)
            case protocol.Failed():
                self._settle(reply.ticket, _ERRORS.get(reply.code, EngineError)(reply.message))
            case protocol.Ready():
                self.kv_free_bytes = reply.kv_free_bytes
                if not self._ready.done():
                    self._ready.set_result(None)
            case protocol.Beat():
                pass

    def _settle(self, ticket: int, result: protocol.Done | Stepped | FallowError) -> None:
        answer, size = self._waiting.pop(ticket)
        self._outstanding_bytes -= size
        while self._room and self._outstanding_bytes < OUTSTANDING_BYTES_MAX:
            _wake(self._room.popleft())
            break
        if answer.done():  # its caller was cancelled
            return
        if isinstance(result, FallowError):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    # --- the end --------------------------------------------------------------------------------

    def _check(self) -> None:
        """Look for a hang while answers are owed."""
        self._timer = None
        if self.gone or not self._waiting:
            return
        reason = self._watch.verdict(self._loop.time())
        if reason is not None:
            self._end(reason, expected=False)
        else:
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)

    def _end(self, reason: str, *, expected: bool) -> None:
        if self.gone:
            return
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self.process.poll() is None:
            self.process.kill()
        if self._transport is not None:
            self._transport.abort()
        if not self._ready.done():
            self._ready.set_exception(EngineLost(reason))
            self._ready.exception()
        waiting, self._waiting = self._waiting, {}
        for answer, _ in waiting.values():
            if not answer.done():
                answer.set_exception(EngineLost(reason))
        for turn in self._room:
            _wake(turn)
        if not expected:
            log.warning("%s (exit code %s, %d calls waiting)", reason, self.process.poll(), len(waiting))
            self._on_loss()


class _Watch:
    """Tells a worker that hangs from one that computes or waits for a processor."""

    def __init__(self, process_id: int, settings: EngineSettings) -> None:
        self._settings = settings
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(process_id)
        self._heard_s = 0.0
        self._active_s = 0.0
        self._processor_s = -1.0

    def begin(self, now_s: float) -> None:
        """Something was heard, or an answer is owed from now on."""
        self._heard_s = self._active_s = now_s

    def verdict(self, now_s: float) -> str | None:
        """Why the worker must be given up, or `None`."""
        silent_s = now_s - self._heard_s
        if silent_s >= self._settings.silence_timeout_s:
            return f"the engine's worker process gave no answer for {silent_s:.0f} s"
        if silent_s < CHECK_INTERVAL_S:
            return None
        if self._is_active():
            self._active_s = now_s
        idle_s = now_s - self._active_s
        return f"the engine's worker process hangs: idle for {idle_s:.1f} s" if self._gives_up(idle_s) else None

    def _gives_up(self, idle_s: float) -> bool:
        return idle_s >= self._settings.hang_timeout_s

    def _is_active(self) -> bool:
        if self._process is None:
            return False
        try:
            with self._process.oneshot():
                times, status = self._process.cpu_times(), self._process.status()
        except psutil.Error:
            return False
        used_s = times.user + times.system
        advanced, self._processor_s = used_s > self._processor_s, used_s
        return advanced or status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class _Rate:
    """Rows per second over the last `RATE_WINDOW_S`, in two halves."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._now = 0
        self._before = 0

    def add(self, rows: int, now_s: float) -> None:
        self._roll(now_s)
        self._now += rows

    def per_s(self, now_s: float) -> float:
        self._roll(now_s)
        return (self._before + self._now) / (RATE_WINDOW_S + now_s - self._started_s)

    def _roll(self, now_s: float) -> None:
        elapsed_s = now_s - self._started_s
        if elapsed_s >= RATE_WINDOW_S:
            self._before = self._now if elapsed_s < 2 * RATE_WINDOW_S else 0
            self._now = 0
            self._started_s = now_s


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
