"""Sessions on a node: rows in, engine step, rows out to the next stage.

Rules
- A stage obeys the gateway that opened the session, takes rows only from the predecessor that the gateway named, and
  decides nothing. What goes wrong it reports as a `Fault`; the gateway repairs the chain (`policy/recovery.py`).
- One pump task a session: its steps run one after another; sessions run side by side, and the engine batches them.
- Positions make rows idempotent and epochs fence them, as `domain/frames.py` says. Output rows are logged before they
  are sent, so a send that fails loses nothing.
- Every queue is bounded: what waits for a session in `stage_session.py`, and all logs together stay under the log
  budget by giving up their oldest rows.
- Nothing is held for ever: a session whose gateway stays away, or that nobody uses, goes by itself, and its gateway is
  told. It can always be opened again, from position 0.

It does not route, place, fetch files or talk to the bus.
"""

import asyncio
import logging
from collections.abc import Coroutine

from fallow.domain.clock import Clock
from fallow.domain.errors import EngineLost, FabricError, FallowError, LinkClosed
from fallow.domain.frames import (
    CloseSession,
    Fault,
    Flow,
    Frame,
    OpenStage,
    PeerAddress,
    Refused,
    Result,
    Rows,
    StageState,
)
from fallow.domain.ids import NodeId, SessionId
from fallow.engine.contract import StageEngine, Step, Stepped
from fallow.fabric.peers import Peers
from fallow.node.activation_log import Buffer, LoggedRows
from fallow.node.stage_session import Held, RowBudget, Session, Waiting

SESSIONS_MAX = 4_096
TAKE_MAX_S = 30.0
"""How long a gateway may leave a full window of answers unread before it loses the session."""
SWEEP_S = 1.0
"""How often sessions are looked over for those that are to go by themselves."""

log = logging.getLogger(__name__)


class StageRelay:
    """All sessions of one node."""

    def __init__(self, engine: StageEngine, peers: Peers, clock: Clock, log_budget_bytes: int) -> None:
        self._engine = engine
        self._peers = peers
        self._clock = clock
        self._log_budget_bytes = log_budget_bytes
        self._log_bytes = 0
        self._sessions: dict[SessionId, Session] = {}
        self._rows_budget = RowBudget()
        self._sweeper: asyncio.Task[None] | None = None
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
            session = Session(peer, opening, self._rows_budget, self._clock.monotonic_s())
            self._sessions[opening.session] = session
            self._keep_sweeping()
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
        session.used_at_s = self._clock.monotonic_s()
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
        held = session.hold(Waiting(peer, rows, payload))
        if held is Held.TOO_MANY:
            self._fault(session, "position_mismatch", "More rows wait here than a device holds.", suspect=peer)
        if held is not Held.WAITS:
            return
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
                session.orphaned_at_s = self._clock.monotonic_s()
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
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    def _keep_sweeping(self) -> None:
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="session sweeper")

    async def _sweep(self) -> None:
        """While there are sessions: end those whose gateway is gone for good, and those that nobody uses."""
        while self._sessions:
            await self._clock.sleep(SWEEP_S)
            now_s = self._clock.monotonic_s()
            for session in list(self._sessions.values()):
                expiry = session.expiry(now_s)
                if expiry is not None:
                    self._fault(session, "expired", f"This device freed the session: {expiry}.")
                    self._end(session)

    # --- the pump -----------------------------------------------------------------------------

    async def _pump(self, session: Session) -> None:
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
                    session.rests = True
                    await session.wake.wait()
                    session.rests = False
        except EngineLost as error:
            self._fault(session, error.code, error.message)
            self._end(session)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session %s: its pump failed", session.id[:8])
            self._fault(session, "internal", "The stage failed inside; its operator's log says how.")
            self._end(session)

    async def _answer_opening(self, session: Session, opening: OpenStage) -> None:
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

    async def _start_flow(self, session: Session, flow: Flow) -> None:
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

    async def _compute(self, session: Session, item: Waiting) -> None:
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
        session.used_at_s = self._clock.monotonic_s()
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

    async def _answer(self, session: Session, flow: Flow, step: Step, stepped: Stepped) -> None:
        result = Result(
            session=session.id,
            epoch=flow.epoch,
            position=step.position,
            count=step.count,
            logit_count=stepped.logit_count,
            k=stepped.k,
        )
        await self._send_to_gateway(session, Frame(result, stepped.payload))

    async def _forward(self, session: Session, flow: Flow, rows: LoggedRows) -> None:
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

    async def _send_to_gateway(self, session: Session, frame: Frame) -> None:
        """Gateways dial us, so there is no address to dial back: without its link the gateway must return first."""
        if self._peers.post(session.gateway, frame) or session.gateway not in self._peers.connected():
            return
        try:
            async with asyncio.timeout(TAKE_MAX_S):
                await self._peers.send(PeerAddress(session.gateway, ()), frame)
        except TimeoutError:
            log.info("session %s: its gateway takes no answers, freed", session.id[:8])
            self._end(session)
        except FabricError as error:
            log.debug("session %s: %s", session.id[:8], error)

    def _refuse(self, peer: NodeId, opening: OpenStage, code: str, message: str) -> None:
        self._peers.post(peer, Frame(Refused(session=opening.session, epoch=opening.epoch, code=code, message=message)))

    def _fault(self, session: Session, code: str, message: str, suspect: NodeId | None = None) -> None:
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

    def _end(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is None:
            return
        session.end()
        self._log_bytes -= session.log.size_bytes
        self._later(self._free(session))

    async def _free(self, session: Session) -> None:
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
