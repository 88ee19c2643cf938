"""Sessions on a node: rows in, engine step, rows out to the next stage.

Rules
- A stage obeys the gateway that opened the session, takes rows only from the predecessor that the gateway named, and
  decides nothing. What goes wrong it reports as a `Fault`; the gateway repairs the chain (`policy/recovery.py`).
- One pump task a session: its steps run one after another; sessions run side by side, and the engine batches them.
- Positions make rows idempotent and epochs fence them, as `domain/frames.py` says. Output rows are logged before they
  are sent, so a send that fails loses nothing.
- Every queue is bounded: a session that has more than `HELD_ROWS_MAX` rows waiting is at fault, and all logs together
  stay under the log budget by giving up their oldest rows.

It does not route, place, fetch files or talk to the bus.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Coroutine

from fallow.domain.clock import Clock
from fallow.domain.errors import EngineLost, FallowError, LinkClosed
from fallow.domain.frames import (
    AnyHeader,
    CloseSession,
    Fault,
    Flow,
    Frame,
    OpenStage,
    Refused,
    Result,
    Rows,
    StageState,
)
from fallow.domain.ids import NodeId, SessionId
from fallow.engine.contract import StageEngine, Step, Stepped
from fallow.fabric.peers import Peers
from fallow.node.activation_log import ActivationLog, Buffer, LoggedRows

HELD_ROWS_MAX = 16_384
"""Rows that a session may have waiting, across frames."""
SESSIONS_MAX = 4_096
ORPHAN_GRACE_S = 20.0
"""How long a session outlives its gateway's link: a gateway that reconnects goes on."""

log = logging.getLogger(__name__)


class _Waiting:
    """Rows that have arrived and wait for their turn or their epoch."""

    __slots__ = ("header", "payload", "sender")

    def __init__(self, sender: NodeId, header: Rows, payload: Buffer) -> None:
        self.sender = sender
        self.header = header
        self.payload = payload


class _Session:
    """One session on this stage. Only its pump task awaits; frame handlers leave notes and wake it."""

    def __init__(self, gateway: NodeId, opening: OpenStage) -> None:
        self.gateway = gateway
        self.id: SessionId = opening.session
        self.engine_id = SessionId(secrets.token_hex(16))
        """The engine's name for it. Its own, so that a session that is closed and opened again at once (another span)
        does not meet itself while it is still being freed."""
        self.model = opening.model
        self.span = opening.span
        self.reserved_tokens = 0
        self.epoch = opening.epoch
        self.position = 0
        self.opening: OpenStage | None = opening
        self.flow_pending: Flow | None = None
        self.flow: Flow | None = None
        self.flowed_epoch = 0
        self.waiting: deque[_Waiting] = deque()
        self.waiting_rows = 0
        self.log = ActivationLog()
        self.admitted = False
        self.ended = False
        self.wake = asyncio.Event()
        self.orphaned_at_s: float | None = None
        self.pump: asyncio.Task[None] | None = None

    def fence(self, epoch: int) -> None:
        """Move to a newer epoch: rows of older ones are void, and nothing flows until a `Flow` says how."""
        self.epoch = epoch
        self.flow = None
        self.flow_pending = None
        self.waiting = deque(item for item in self.waiting if item.header.epoch >= epoch)
        self.waiting_rows = sum(item.header.count for item in self.waiting)

    def take(self) -> _Waiting | None:
        """The next rows of the present epoch, if they may flow."""
        if self.flow is None:
            return None
        while self.waiting and self.waiting[0].header.epoch <= self.epoch:
            item = self.waiting.popleft()
            self.waiting_rows -= item.header.count
            if item.header.epoch == self.epoch and item.sender == (self.flow.previous or self.gateway):
                return item
        return None


class StageRelay:
    """All sessions of one node."""

    def __init__(self, engine: StageEngine, peers: Peers, clock: Clock, log_budget_bytes: int) -> None:
        self._engine = engine
        self._peers = peers
        self._clock = clock
        self._log_budget_bytes = log_budget_bytes
        self._log_bytes = 0
        self._sessions: dict[SessionId, _Session] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    # --- what arrives -------------------------------------------------------------------------

    def handle(self, peer: NodeId, frame: Frame) -> bool:
        """Take a session frame; `False` for kinds that are not about sessions. Never waits, never raises."""
        header = frame.header
        match header:
            case Rows():
                self._on_rows(peer, header, frame.payload)
            case Flow():
                self._on_flow(peer, header)
            case OpenStage():
                self._on_open(peer, header)
            case CloseSession():
                self._on_close(peer, header)
            case Fault():
                self._on_fault(peer, header)
            case _:
                return False
        return True

    def _on_open(self, peer: NodeId, opening: OpenStage) -> None:
        session = self._sessions.get(opening.session)
        if session is None:
            if len(self._sessions) >= SESSIONS_MAX:
                self._refuse(peer, opening, "kv_exhausted", f"This device already holds {SESSIONS_MAX} sessions.")
                return
            session = self._sessions[opening.session] = _Session(peer, opening)
            session.pump = asyncio.get_running_loop().create_task(self._pump(session), name=f"session {session.id[:8]}")
            return
        if session.gateway != peer:
            self._refuse(peer, opening, "unknown_session", "That session belongs to another gateway.")
            return
        if opening.epoch < session.epoch:
            return
        if (session.model, session.span) != (opening.model, opening.span):
            # A leftover of an earlier chain, from before this device was away.
            self._end(session)
            self._on_open(peer, opening)
            return
        session.orphaned_at_s = None
        session.fence(opening.epoch)
        session.opening = opening
        session.wake.set()

    def _on_flow(self, peer: NodeId, flow: Flow) -> None:
        session = self._sessions.get(flow.session)
        if session is None or session.gateway != peer or flow.epoch < session.epoch:
            return
        if flow.epoch > session.epoch:
            session.fence(flow.epoch)
        session.flow_pending = flow
        session.wake.set()

    def _on_rows(self, peer: NodeId, rows: Rows, payload: Buffer) -> None:
        session = self._sessions.get(rows.session)
        if session is None:
            fault = Fault(
                session=rows.session, epoch=rows.epoch, code="unknown_session", message="No such session here."
            )
            self._peers.post(peer, Frame(fault))
            return
        if rows.epoch < session.epoch:
            return
        if session.waiting_rows + rows.count > HELD_ROWS_MAX:
            self._fault(session, "position_mismatch", f"More than {HELD_ROWS_MAX} rows wait here.", suspect=peer)
            return
        session.waiting.append(_Waiting(peer, rows, payload))
        session.waiting_rows += rows.count
        session.wake.set()

    def _on_close(self, peer: NodeId, close: CloseSession) -> None:
        session = self._sessions.get(close.session)
        if session is not None and session.gateway == peer:
            self._end(session)

    def _on_fault(self, peer: NodeId, fault: Fault) -> None:
        """The next stage complains to us; the gateway is the one to know."""
        session = self._sessions.get(fault.session)
        if session is not None and session.flow is not None and session.flow.next and session.flow.next.node == peer:
            self._fault(session, fault.code, fault.message, suspect=fault.suspect or peer)

    # --- what happens around ------------------------------------------------------------------

    def peer_lost(self, peer: NodeId, reason: str) -> None:
        """A link is gone: tell gateways whose chains ran over it, and let its own sessions wait for its return."""
        for session in list(self._sessions.values()):
            if session.gateway == peer:
                self._orphan(session)
            elif session.flow is not None and session.flow.next is not None and session.flow.next.node == peer:
                self._fault(session, "link_closed", f"The next stage is gone: {reason}", suspect=peer)

    def engine_lost(self, reason: str) -> None:
        """The worker died, and every cache with it."""
        for session in list(self._sessions.values()):
            self._fault(session, "engine_lost", reason)
            self._end(session)

    def drain(self) -> None:
        """Ask every gateway to move its sessions elsewhere; their caches stay until it has."""
        for session in list(self._sessions.values()):
            self._fault(session, "leaving", "This device is leaving.", suspect=None)

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            self._end(session)
        if self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    def _orphan(self, session: _Session) -> None:
        session.orphaned_at_s = self._clock.monotonic_s()
        self._later(self._end_if_still_orphaned(session, session.orphaned_at_s))

    async def _end_if_still_orphaned(self, session: _Session, since_s: float) -> None:
        await self._clock.sleep(ORPHAN_GRACE_S)
        if session.orphaned_at_s == since_s:
            log.info("session %s: its gateway did not come back, freed", session.id[:8])
            self._end(session)

    # --- the pump -----------------------------------------------------------------------------

    async def _pump(self, session: _Session) -> None:
        try:
            while not session.ended:
                session.wake.clear()
                if session.opening is not None:
                    await self._answer_opening(session, session.opening)
                elif session.flow_pending is not None:
                    await self._start_flow(session, session.flow_pending)
                elif (item := session.take()) is not None:
                    await self._compute(session, item)
                else:
                    await session.wake.wait()
        except EngineLost as error:
            self._fault(session, error.code, error.message)
            self._end(session)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session %s: its pump failed", session.id[:8])
            self._fault(session, "internal", "The stage failed inside; its operator's log says how.")
            self._end(session)

    async def _answer_opening(self, session: _Session, opening: OpenStage) -> None:
        try:
            if not session.admitted:
                await self._engine.open(session.engine_id, session.model, session.span, opening.reserve_tokens)
                session.admitted = True
                session.reserved_tokens = opening.reserve_tokens
            elif opening.reserve_tokens > session.reserved_tokens:
                await self._engine.reserve(session.engine_id, opening.reserve_tokens)
                session.reserved_tokens = opening.reserve_tokens
        except EngineLost:
            raise
        except FallowError as error:
            self._refuse(session.gateway, opening, error.code, error.message)
            if not session.admitted:
                self._end(session)
            elif session.opening is opening:
                session.opening = None
            return
        if session.opening is opening:
            session.opening = None
        # The last stage logs nothing: what it answered is with the gateway.
        log_start = session.log.start if session.log.end == session.position else session.position
        state = StageState(
            session=session.id,
            epoch=opening.epoch,
            position=session.position,
            log_start=log_start,
            flowed_epoch=session.flowed_epoch,
        )
        await self._send_to_gateway(session, Frame(state))

    async def _start_flow(self, session: _Session, flow: Flow) -> None:
        session.flow_pending = None
        if flow.rewind_to is not None and flow.rewind_to < session.position:
            await self._engine.rewind(session.engine_id, flow.rewind_to)
            session.position = flow.rewind_to
            self._log_bytes -= session.log.size_bytes
            session.log.rewind(flow.rewind_to)
            self._log_bytes += session.log.size_bytes
        session.flowed_epoch = flow.epoch
        session.flow = flow
        if flow.next is None:
            return
        for rows in session.log.replay(flow.forward_from):
            if session.flow is not flow:
                return
            await self._forward(session, flow, rows)

    async def _compute(self, session: _Session, item: _Waiting) -> None:
        flow = session.flow
        assert flow is not None
        rows, payload = item.header, item.payload
        skipped = session.position - rows.position
        if skipped >= rows.count:
            return
        if skipped < 0:
            message = f"Rows at {rows.position} came to a stage at {session.position}."
            self._fault(session, "position_mismatch", message, suspect=item.sender)
            return
        if skipped:
            payload = memoryview(payload)[skipped * (len(payload) // rows.count) :]
        count = rows.count - skipped
        step = Step(
            session=session.engine_id,
            position=session.position,
            count=count,
            phase=rows.phase,
            logits_from=rows.logits_from,
            top_k=rows.top_k,
            payload=payload,
        )
        try:
            stepped = await self._engine.step(step)
        except EngineLost:
            raise
        except FallowError as error:
            session.flow = None if session.flow is flow else session.flow
            self._fault(session, error.code, error.message)
            return
        session.position += count
        if flow.next is None:
            await self._answer(session, flow, step, stepped)
            return
        out = LoggedRows(step.position, count, rows.phase, rows.logits_from, rows.top_k, stepped.payload)
        session.log.append(out)
        self._log_bytes += len(out.payload)
        if self._log_bytes > self._log_budget_bytes:
            self._trim_logs()
        # When the epoch has moved on meanwhile, the rows stay in the log, and the new flow sends them if need be.
        if session.flow is flow and out.end > flow.forward_from:
            await self._forward(session, flow, out.above(flow.forward_from))

    async def _answer(self, session: _Session, flow: Flow, step: Step, stepped: Stepped) -> None:
        result = Result(
            session=session.id,
            epoch=flow.epoch,
            position=step.position,
            count=step.count,
            logit_count=stepped.logit_count,
            k=stepped.k,
        )
        await self._send_to_gateway(session, Frame(result, stepped.payload))

    async def _forward(self, session: _Session, flow: Flow, rows: LoggedRows) -> None:
        assert flow.next is not None
        header = Rows(
            session=session.id,
            epoch=flow.epoch,
            position=rows.position,
            count=rows.count,
            phase=rows.phase,
            logits_from=max(rows.logits_from, flow.results_from),
            top_k=rows.top_k,
        )
        frame = Frame(header, rows.payload)
        if self._peers.post(flow.next.node, frame):
            return
        try:
            await self._peers.send(flow.next, frame)
        except FallowError as error:
            session.flow = None if session.flow is flow else session.flow
            self._fault(session, error.code, f"The next stage cannot be reached: {error}", suspect=flow.next.node)

    # --- helpers ------------------------------------------------------------------------------

    async def _send_to_gateway(self, session: _Session, frame: Frame) -> None:
        """Gateways dial us, so there is no address to dial back: without its link the gateway must return first."""
        while not self._peers.post(session.gateway, frame):
            if session.gateway not in self._peers.connected():
                return
            await self._clock.sleep(0.005)

    def _refuse(self, peer: NodeId, opening: OpenStage, code: str, message: str) -> None:
        self._peers.post(peer, Frame(Refused(session=opening.session, epoch=opening.epoch, code=code, message=message)))

    def _fault(self, session: _Session, code: str, message: str, suspect: NodeId | None = None) -> None:
        log.info("session %s: %s: %s", session.id[:8], code, message)
        header = Fault(session=session.id, epoch=session.epoch, code=code, message=message, suspect=suspect)
        self._peers.post(session.gateway, Frame(header))

    def _trim_logs(self) -> None:
        """Give up the oldest rows of the longest log until the budget holds."""
        while self._log_bytes > self._log_budget_bytes:
            longest = max(self._sessions.values(), key=lambda session: session.log.size_bytes)
            freed = longest.log.drop_oldest()
            if freed == 0:
                return
            self._log_bytes -= freed

    def _end(self, session: _Session) -> None:
        if self._sessions.pop(session.id, None) is None:
            return
        session.ended = True
        self._log_bytes -= session.log.size_bytes
        self._later(self._free(session))

    async def _free(self, session: _Session) -> None:
        if session.pump is not None and session.pump is not asyncio.current_task():
            session.pump.cancel()
            await asyncio.gather(session.pump, return_exceptions=True)
        try:
            await self._engine.free(session.engine_id)
        except (FallowError, LinkClosed) as error:
            log.debug("session %s: %s", session.id[:8], error)

    def _later(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def is_session_frame(header: AnyHeader) -> bool:
    """Whether `StageRelay.handle` takes this kind."""
    return isinstance(header, Rows | Flow | OpenStage | CloseSession | Fault)
