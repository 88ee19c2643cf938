"""What drives one session on a stage: opening, flow, engine step, and rows out to the next stage.

Rules
- One task a session: its steps run one after another; sessions run side by side, and the engine batches them.
- Output rows are logged before they are sent, so a send that fails loses nothing. All logs together stay under the log
  budget by giving up their oldest rows.
- The next stage may be on this device, too, as another session (`domain.ids.at_visit`): its rows take no link.
- A last stage that may tell the first one what comes next does so before it answers (`running_ahead.py`).
- Rows that a sound predecessor cannot have sent (`row_checks.py`) are not computed: the gateway hears whom to suspect.
- Rows are counted against the session's grant before they are computed; what it does not allow ends the session.

Which sessions there are, and what arrives for them, is `stages.py`'s.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Final, Protocol

from fallow.domain.clock import Clock
from fallow.domain.errors import EngineLost, FabricError, FallowError, NumericFault, PassportRefused
from fallow.domain.frames import MISLED, Flow, Frame, OpenStage, PeerAddress, Result, Rows, StageState
from fallow.domain.ids import NodeId
from fallow.engine.contract import StageEngine, Step, Stepped
from fallow.fabric.peers import Peers
from fallow.node.activation_log import LoggedRows
from fallow.node.allowance import Allowances, code_of
from fallow.node.following import Following, step_after
from fallow.node.row_checks import RowChecks
from fallow.node.running_ahead import next_rows
from fallow.node.stage_session import Session, Waiting

TAKE_MAX_S: Final = 30.0
"""How long a gateway may leave a full window of answers unread before it loses the session."""

log = logging.getLogger(__name__)


class Home(Protocol):
    """Where sessions live."""

    def sessions(self) -> Collection[Session]: ...

    def handle(self, peer: NodeId, frame: Frame) -> bool:
        """Take a session frame. Never waits."""
        ...

    def refuse(self, peer: NodeId, opening: OpenStage, code: str, message: str) -> None:
        """Answer an opening with no."""
        ...

    def fault(
        self, session: Session, code: str, message: str, suspect: NodeId | None = None, void_from: int | None = None
    ) -> None:
        """Tell a session's gateway what is wrong."""
        ...

    def end(self, session: Session) -> None:
        """Free a session. Idempotent."""
        ...

    def later(self, work: Coroutine[object, object, None]) -> None:
        """Do this beside everything else."""
        ...


class StagePump:
    """The pumps of all sessions of one node."""

    def __init__(
        self,
        home: Home,
        engine: StageEngine,
        peers: Peers,
        clock: Clock,
        allowances: Allowances,
        log_budget_bytes: int,
        checks: RowChecks,
    ) -> None:
        self._home = home
        self._checks = checks
        self._engine = engine
        self._peers = peers
        self._clock = clock
        self._allowances = allowances
        self._log_budget_bytes = log_budget_bytes
        self.log_bytes = 0
        """What all logs together take."""

    async def run(self, session: Session) -> None:
        """Drive a session until it ends."""
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
            self._home.fault(session, error.code, error.message)
            self._home.end(session)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session %s: its pump failed", session.id[:8])
            self._home.fault(session, "internal", "The stage failed inside; its operator's log says how.")
            self._home.end(session)

    async def _answer_opening(self, session: Session, opening: OpenStage) -> None:
        try:
            await self._forget_following(session)
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
            self._home.refuse(session.gateway, opening, error.code, error.message)
            if not session.admitted:
                self._home.end(session)
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
            confirmed=session.confirmed,
        )
        await self._send_to_gateway(session, Frame(state))

    async def _start_flow(self, session: Session, flow: Flow) -> None:
        await self._forget_following(session)
        if flow.rewind_to is not None and flow.rewind_to < session.position:
            await self._engine.rewind(session.engine_id, flow.rewind_to)
            session.position = flow.rewind_to
            self.log_bytes -= session.log.size_bytes
            session.log.rewind(flow.rewind_to)
            self.log_bytes += session.log.size_bytes
        if session.flow_pending is not flow:
            return
        session.starts(flow)
        if flow.ahead is not None and flow.next is None and not session.reaching:
            session.reaching = True
            self._home.later(self._reach(session, flow.ahead.first))
        if flow.next is None:
            return
        for rows in session.log.replay(flow.forward_from):
            if session.flow is not flow or not self._may(session, rows.end, rows.end - rows.position):
                return
            await self._forward(session, flow, rows)

    async def _compute(self, session: Session, item: Waiting) -> None:
        flow = session.flow
        assert flow is not None
        rows, payload = item.header, item.payload
        suspect: NodeId | None = None
        if session.runs_ahead(item):
            told = session.told.next(rows, payload, session.position, item) if session.allows_more else None
            if told is None:
                return
            rows, suspect = told, item.sender
        elif self.misled(session, item):  # rows that came before their flow were not compared when they arrived
            return
        skipped = session.position - rows.position
        if skipped >= rows.count:
            return
        if skipped < 0:
            message = f"Rows at {rows.position} came to a stage at {session.position}."
            self._home.fault(session, "position_mismatch", message, suspect=item.sender)
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
        following = session.following if session.following is not None and session.following.answers(step) else None
        if following is None and not self._may(session, session.position + count, count):
            return
        strange = self._checks.complaint(session.model, session.span.first, payload, count)
        if strange is not None:
            session.flow = None
            self._home.fault(session, NumericFault.code, f"What came here is damaged: {strange}.", suspect=item.sender)
            return
        try:
            stepped = await self._stepped(session, flow, step, following)
        except EngineLost:
            raise
        except FallowError as error:
            session.flow = None if session.flow is flow else session.flow
            self._home.fault(session, error.code, error.message, suspect=suspect)
            return
        session.position += count
        session.used_at_s = self._clock.monotonic_s()
        if flow.next is None:
            await self._answer(session, flow, step, stepped)
            return
        out = LoggedRows(step.position, count, rows.phase, rows.logits_from, rows.top_k, stepped.payload)
        session.log.append(out)
        self.log_bytes += len(out.payload)
        if self.log_bytes > self._log_budget_bytes:
            self._trim_logs()
        # When the epoch has moved on meanwhile, the rows stay in the log, and the new flow sends them if need be.
        if session.flow is flow and out.end > flow.forward_from:
            await self._forward(session, flow, out.above(flow.forward_from))

    async def _stepped(self, session: Session, flow: Flow, step: Step, following: Following | None) -> Stepped:
        """Have a step computed that was asked for already, or is now; and the one behind it asked for, where that can
        be. Raises as the engine does."""
        if following is None:
            await self._forget_following(session)
        session.following = None
        beyond = session.told.beyond(step.position + step.count)
        after = step_after(flow, self._peers.own, session.id, step, beyond) if session.follows else None
        if after is None and following is None:
            return await self._engine.step(step)
        task = asyncio.create_task(self._engine.step(step)) if following is None else following.task
        if after is not None and self._allowances.take(session.allowance, after.position + 1, 1) is None:
            session.following = Following(after, asyncio.create_task(self._engine.step(after)))
        if following is None:
            return await task
        return await following.stepped() or await self._stepped_anew(session, step)

    async def _stepped_anew(self, session: Session, step: Step) -> Stepped:
        """A step for which the engine drew another token than this agent: once more, with the agent's. Its row was
        counted when it was asked for. Raises as the engine does."""
        log.warning("session %s: the engine did not come to its agent's token at %d", session.id[:8], step.position)
        session.follows = False
        await self._forget_following(session)
        await self._engine.rewind(session.engine_id, step.position)
        return await self._engine.step(step)

    async def _forget_following(self, session: Session) -> None:
        """The engine stands where the session does. Raises `EngineLost`."""
        following, session.following = session.following, None
        if following is not None:
            await following.undone(self._engine, session.engine_id, session.position)

    def misled(self, session: Session, item: Waiting) -> bool:
        """Whether rows of the gateway show that the last stage told something else; the gateway hears of it then."""
        flow, position = session.flow, session.differs(item)
        if flow is None or position is None:
            return False
        session.flow = None
        message = "The last stage told another token than came."
        self._home.fault(session, MISLED, message, suspect=flow.ahead_from, void_from=position)
        return True

    def _may(self, session: Session, end: int, count: int) -> bool:
        """Count rows against the session's grant; end the session when it does not allow them."""
        refused = self._allowances.take(session.allowance, end, count)
        if refused is not None:
            self._home.fault(session, code_of(refused), refused.message)
            self._home.end(session)
        return refused is None

    async def _answer(self, session: Session, flow: Flow, step: Step, stepped: Stepped) -> None:
        chosen = self._tell_first(session, flow, step, stepped) if session.flow is flow else None
        result = Result(
            session=session.id,
            epoch=flow.epoch,
            position=step.position,
            count=step.count,
            logit_count=stepped.logit_count,
            k=stepped.k,
            chosen=chosen,
        )
        await self._send_to_gateway(session, Frame(result, stepped.payload))

    def _tell_first(self, session: Session, flow: Flow, step: Step, stepped: Stepped) -> int | None:
        """Which token the first stage was told comes next, if it was."""
        told = None if flow.ahead is None else next_rows(flow.ahead, flow.epoch, step, stepped)
        if flow.ahead is None or told is None:
            return None
        if session.following is not None:
            session.following.token = told[1]
        first, frame = flow.ahead.first.node, Frame(*told)
        if first == self._peers.own:
            self._home.handle(first, frame)
        elif not (self._peers.computes(first) and self._peers.post(first, frame)):
            return None
        return int.from_bytes(told[1], "little")

    async def _reach(self, session: Session, first: PeerAddress) -> None:
        """Have a link with the first stage. Without one, it waits for its gateway."""
        try:
            if first.node != self._peers.own:
                await self._peers.connect(first)
        except FallowError as error:
            log.debug("the first stage, %s, cannot be told what comes next: %s", first.node[:8], error)
        finally:
            session.reaching = False

    async def _forward(self, session: Session, flow: Flow, rows: LoggedRows) -> None:
        assert flow.next is not None
        header = Rows(
            session=flow.next_session or session.id,
            epoch=flow.epoch,
            position=rows.position,
            count=rows.count,
            phase=rows.phase,
            logits_from=max(rows.logits_from, flow.results_from),
            top_k=rows.top_k,
        )
        frame = Frame(header, rows.payload)
        if flow.next.node == self._peers.own:
            self._home.handle(self._peers.own, frame)
            return
        if self._peers.computes(flow.next.node) and self._peers.post(flow.next.node, frame):
            return
        try:
            await self._peers.connect(flow.next)
            if not self._peers.computes(flow.next.node):
                raise PassportRefused(f"{flow.next.node[:8]} is no device, and rows are for devices only.")
            await self._peers.send(flow.next, frame)
        except FallowError as error:
            session.flow = None if session.flow is flow else session.flow
            self._home.fault(session, error.code, f"The next stage cannot be reached: {error}", suspect=flow.next.node)

    async def _send_to_gateway(self, session: Session, frame: Frame) -> None:
        """Gateways dial us, so there is no address to dial back: without its link the gateway must return first."""
        if self._peers.post(session.gateway, frame) or session.gateway not in self._peers.connected():
            return
        try:
            async with asyncio.timeout(TAKE_MAX_S):
                await self._peers.send(PeerAddress(session.gateway, ()), frame)
        except TimeoutError:
            log.info("session %s: its gateway takes no answers, freed", session.id[:8])
            self._home.end(session)
        except FabricError as error:
            log.debug("session %s: %s", session.id[:8], error)

    def _trim_logs(self) -> None:
        """Give up the oldest rows of the longest log until the budget holds."""
        while self.log_bytes > self._log_budget_bytes:
            longest = max(self._home.sessions(), key=lambda session: session.log.size_bytes)
            freed = longest.log.drop_oldest()
            if freed == 0:
                return
            self.log_bytes -= freed

    def forget(self, session: Session) -> None:
        """A session has ended: its log counts no more."""
        self.log_bytes -= session.log.size_bytes
