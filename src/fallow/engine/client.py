"""`WorkerEngine`: the `StageEngine` of an agent, computed by a worker process at the other end of a socket pair.

Rules
- The worker is confined (`sandbox.py`): no network, nothing of this process's environment or descriptors, no files but
  libraries and the folders of models that were named here. What it says besides its answers goes into our log.
- A request is a frame and a future; no task per step. What one call of the worker brings arrives in one read, and what
  is asked in one pass of the event loop goes out in one write, so that steps that came together meet in one call.
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
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

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
from fallow.engine.contract import EngineLoad, Loaded, Loss, Step, Stepped
from fallow.engine.sandbox import HUGE_PAGES
from fallow.engine.settings import Confinement, EngineSettings
from fallow.engine.spawn import Spawned, spawn
from fallow.engine.watch import CHECK_INTERVAL_S, Rate, Watch

OUTSTANDING_BYTES_MAX = 64 << 20
JOIN_BYTES = 64 << 10
"""Rows of so many bytes or less are copied into the write of their pass; more go out by themselves."""
REASON_MAX_CHARS = 400
START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0

_ERRORS: dict[str, type[FallowError]] = {
    error.code: error
    for error in (EngineError, EngineLost, KvExhausted, ModelError, NumericFault, PositionMismatch, UnknownSession)
}

log = logging.getLogger(__name__)


class WorkerEngine:
    """See `StageEngine`. Not started until `start`; bound to the running loop from then on."""

    def __init__(self, settings: EngineSettings, models: Iterable[Path]) -> None:
        """`models`: the folders that model files lie in; the worker can open no other file."""
        self._settings = settings
        self._models = tuple(models)
        self._lost = asyncio.Event()
        self._loss: Loss | None = None
        self._worker: _Worker | None = None
        self._rate = Rate()

    @property
    def lost(self) -> asyncio.Event:
        return self._lost

    @property
    def loss(self) -> Loss | None:
        return self._loss

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
        return None if self._worker is None else self._worker.process_id

    @property
    def confinement(self) -> Confinement | None:
        """What keeps the worker from the rest of the device; `None` while there is none."""
        return None if self._worker is None else self._worker.confinement

    async def start(self) -> None:
        """Raises `EngineLost` when the worker does not come up."""
        await self.close()
        self._lost.clear()
        self._loss = None
        self._worker = await _Worker.spawn(self._settings, self._models, self._on_loss)

    def _on_loss(self, loss: Loss) -> None:
        self._loss = loss
        self._lost.set()

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

    async def check(self) -> str | None:
        """Have everything that is loaded checked now, instead of by and by: what is wrong, or `None`.

        It holds up all sessions for some tenths of a second. What it finds is the caller's to act on.
        """
        done = await self._ask(protocol.Check)
        assert isinstance(done, protocol.Done)
        return done.complaint

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
    """This process's, and what a worker's has for speed: for benchmarks that compute as a worker does."""
    tunables = [HUGE_PAGES, *filter(None, [os.environ.get("GLIBC_TUNABLES")])]
    return {**os.environ, "GLIBC_TUNABLES": ":".join(tunables)}


class _Worker(asyncio.Protocol):
    """One life of the process."""

    def __init__(self, spawned: Spawned, settings: EngineSettings, on_loss: Callable[[Loss], None]) -> None:
        self.process = spawned.process
        self.process_id = spawned.process_id
        self.confinement = spawned.confinement
        self._spawned = spawned
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
        self._outbox: list[protocol.Payload] = []
        self._outstanding_bytes = 0
        self._ticket = 0
        self._watch = Watch(settings, spawned.process_id)
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def spawn(
        cls, settings: EngineSettings, models: tuple[Path, ...], on_loss: Callable[[Loss], None]
    ) -> "_Worker":
        """Raises `EngineLost`."""
        worker = cls(await spawn(settings, models), settings, on_loss)
        await worker._loop.create_connection(lambda: worker, sock=worker._spawned.channel)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(worker._ready)
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
        head, rows = protocol.encode(request(ticket), payload)
        answer: asyncio.Future[protocol.Done | Stepped] = self._loop.create_future()
        if not self._waiting:
            self._watch.begin(self._loop.time())
        self._waiting[ticket] = (answer, size)
        self._outstanding_bytes += size
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(head)
        if size <= JOIN_BYTES:
            self._outbox.append(rows)
        else:
            self._flush()
            self._transport.write(memoryview(rows).cast("B"))
        if self._timer is None:
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        return await answer

    def _flush(self) -> None:
        """One write for what was asked. Joined: from Python 3.12 on `writelines` spins on a piece without bytes."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None and not self.gone:
            self._transport.write(b"".join(outbox))

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
            case protocol.Broken():
                reason = f"the engine stopped itself: {reply.reason[:REASON_MAX_CHARS]}"
                self._end(reason, expected=False, damaged=True)

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

    def _end(self, reason: str, *, expected: bool, damaged: bool = False) -> None:
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
            self._on_loss(Loss(reason, damaged))


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
