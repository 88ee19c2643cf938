"""The worker process, a loop over one end of a socket pair. `confined.py` starts it, once it has given up its rights.

Rules
- Single-threaded. It takes all requests that wait, computes one call, sends what came of it, and begins again; so a
  request waits for at most one call.
- It runs at low priority and ends with its agent: on end of file, and on Linux also by parent-death signal. Ctrl-C is
  for the agent, which then closes the pair.
- Between turns it checks itself (`guard.py`), once what was computed is sent: a check takes as long as a call. When one
  fails it says so, sends nothing else, and ends.
- It opens no file but those that a load names and speaks to nobody but its agent. An error in one request is that
  request's answer; a frame that cannot be parsed ends the process, since nothing after it could be trusted.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fallow.domain.errors import EngineError, FallowError
from fallow.engine import protocol
from fallow.engine.contract import Stepped
from fallow.engine.core import EngineCore
from fallow.engine.settings import EngineSettings

RECEIVE_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20
GATHER_WAITS_MAX = 64
CALM_S = 1.0
"""Without a step for so long, nobody is in the middle of an answer."""
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """The worker process: the inherited socket's descriptor and the settings are its arguments."""
    descriptor, settings = int(arguments[0]), msgspec.json.decode(arguments[1], type=EngineSettings)
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(settings.niceness)
    with socket.socket(fileno=descriptor) as agent:
        _Worker(agent, settings).serve()


class _Worker:
    def __init__(self, agent: socket.socket, settings: EngineSettings) -> None:
        self._agent = agent
        self._core = EngineCore(settings)
        self._frames = protocol.Frames(protocol.REQUESTS)
        self._outbox: list[protocol.Payload] = []
        self._computed_at_s = float("-inf")

    def serve(self) -> None:
        """Until the agent closes its end."""
        self._post(protocol.Ready(self._core.budget.free_bytes))
        gc.freeze()
        while self._flush() and self._check() and self._receive():
            if self._core.has_work:
                self._core.turn()
                self._computed_at_s = time.monotonic()
                self._post_outcomes()
                if not self._outbox:
                    self._post(protocol.Beat())

    def _check(self) -> bool:
        """Do what is due of the engine's own checks. `False` when they say that nothing here can be believed."""
        reason = self._core.guard.work(busy=self._core.has_work or self._calm_in_s() > 0)
        if reason is None:
            return True
        self._post(protocol.Broken(reason))
        self._flush()
        return False

    def _calm_in_s(self) -> float:
        """How long somebody may yet be in the middle of an answer."""
        return max(0.0, self._computed_at_s + CALM_S - time.monotonic())

    def _rest_s(self) -> float | None:
        """How long there is nothing to do for a worker that is asked nothing; `None` for ever."""
        calm_in_s = self._calm_in_s()
        due_s = self._core.guard.wait_s(busy=calm_in_s > 0)
        if not calm_in_s:
            return due_s
        return calm_in_s if due_s is None else min(calm_in_s, due_s)

    def _receive(self) -> bool:
        """Take what has arrived; wait for something only when there is nothing to compute. `False` at the end."""
        try:
            while True:
                waiting = self._core.has_work or bool(self._outbox)
                if not waiting and not select.select([self._agent], [], [], self._rest_s())[0]:
                    return True
                flags = socket.MSG_DONTWAIT if waiting else 0
                received = self._agent.recv(RECEIVE_BYTES, flags)
                if not received:
                    return False
                for request, payload in self._frames.feed(received):
                    self._answer(request, payload)
        except BlockingIOError:
            return self._gather()
        except ConnectionError:
            return False

    def _gather(self) -> bool:
        """Wait a moment for rows that belong into the next call: a second call costs far more. As `_receive`."""
        for _ in range(GATHER_WAITS_MAX):
            wait_s = self._core.gather_s()
            if not wait_s:
                return True
            if not self._flush():  # who was answered is not to wait for others' rows
                return False
            if not select.select([self._agent], [], [], wait_s)[0]:
                return True
            try:
                received = self._agent.recv(RECEIVE_BYTES)
            except ConnectionError:
                return False
            if not received:
                return False
            for request, payload in self._frames.feed(received):
                self._answer(request, payload)
        return True

    def _flush(self) -> bool:
        """Send everything at once: one wake-up of the agent per call. `False` when it is gone."""
        outbox, self._outbox = self._outbox, []
        try:
            if outbox:
                self._agent.sendall(b"".join(outbox))
        except ConnectionError:
            return False
        return True

    def _answer(self, request: protocol.AnyRequest, payload: memoryview) -> None:
        try:
            self._do(request, payload)
        except FallowError as error:
            self._post(protocol.Failed(request.ticket, error.code, error.message))
        except Exception as error:  # whatever the runtime or the system raises is this request's failure alone
            self._post(protocol.Failed(request.ticket, EngineError.code, f"{type(error).__name__}: {error}"))
        self._post_outcomes()

    def _do(self, request: protocol.AnyRequest, payload: memoryview) -> None:
        core = self._core
        match request:
            case protocol.Run():
                core.step(request.ticket, protocol.step_of(request, payload))
                return
            case protocol.Rewind():
                core.rewind(request.ticket, request.session, request.position)
                return
            case protocol.Open():
                core.open(request.session, request.model, request.span, request.reserve_tokens)
            case protocol.Reserve():
                core.reserve(request.session, request.reserve_tokens)
            case protocol.Free():
                core.free(request.session)
            case protocol.Unload():
                core.unload(request.model)
            case protocol.Load():
                files = {digest: Path(path) for digest, path in request.files.items()}
                loaded = core.load(request.stage, request.manifest, files)
                self._post(protocol.Done(request.ticket, core.session_count, core.budget.free_bytes, loaded))
                return
            case protocol.Check():
                found = core.guard.check_all()
                self._post(protocol.Done(request.ticket, core.session_count, core.budget.free_bytes, complaint=found))
                return
        self._post(protocol.Done(request.ticket, core.session_count, core.budget.free_bytes))

    def _post_outcomes(self) -> None:
        core = self._core
        for ticket, outcome in core.outcomes():
            if outcome is None:
                self._post(protocol.Done(ticket, core.session_count, core.budget.free_bytes))
            elif isinstance(outcome, Stepped):
                self._post(protocol.computed_of(ticket, outcome), outcome.payload)
            else:
                self._post(protocol.Failed(ticket, outcome.code, outcome.message))

    def _post(self, reply: protocol.AnyReply, payload: protocol.Payload = b"") -> None:
        self._outbox += protocol.encode(reply, payload)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, and look whether it already has."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
