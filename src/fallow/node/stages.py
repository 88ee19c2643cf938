"""Sessions on a node: which there are, what arrives for them, and how they end.

Rules
- A stage obeys the gateway that opened the session, takes rows only from the predecessor that the gateway named, or of
  the last stage where the gateway said so (`running_ahead.py`), and decides nothing. What goes wrong it reports as a
  `Fault`; the gateway repairs the chain (`policy/recovery.py`).
- Only gateways open sessions, each with a grant for just that (`GrantBook`). What is computed is counted against it,
  and nothing is once it ran out, or while this device may not work (`Lease`).
- Positions make rows idempotent and epochs fence them, as `domain/frames.py` says.
- Every queue is bounded: what waits for a session in `stage_session.py`, logs in `stage_pump.py`.
- A device that leaves keeps what it holds until that has moved, and refuses every other session.
- Nothing is held for ever: a session whose gateway stays away, or that nobody uses, goes by itself, and its gateway is
  told. It can always be opened again, from position 0.

What is computed, and what goes on to the next stage, is `stage_pump.py`'s. It does not route, place, fetch files or
talk to the bus.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError, GrantRefused, LinkClosed, NotWorking
from fallow.domain.frames import (
    LEAVING,
    CloseSession,
    Fault,
    Flow,
    Frame,
    OpenStage,
    Refused,
    RenewGrant,
    Rows,
)
from fallow.domain.ids import VISITS_MAX, Digest, NodeId, SessionId, at_visit, same_conversation
from fallow.engine.contract import StageEngine
from fallow.fabric.peers import Peers
from fallow.node.activation_log import Buffer
from fallow.node.allowance import Allowance, Allowances, code_of
from fallow.node.row_checks import RowChecks
from fallow.node.stage_pump import StagePump
from fallow.node.stage_session import Expiry, Held, RowBudget, Session, Waiting
from fallow.trust.contract import GrantBook, Lease

SWEEP_S = 1.0
"""How often sessions are looked over for those that are to go by themselves."""

log = logging.getLogger(__name__)


class StageRelay:
    """All sessions of one node."""

    def __init__(
        self,
        engine: StageEngine,
        peers: Peers,
        clock: Clock,
        log_budget_bytes: int,
        grants: GrantBook,
        lease: Lease,
        checks: RowChecks | None = None,
    ) -> None:
        """`checks`: of the rows that arrive, by model; without them, the engine's own are all."""
        self._engine = engine
        self._peers = peers
        self._clock = clock
        self._allowances = Allowances(grants, lease, peers, clock)
        self._pump = StagePump(self, engine, peers, clock, self._allowances, log_budget_bytes, checks or RowChecks())
        self._sessions: dict[SessionId, Session] = {}
        self._leaving = False
        self._rows_budget = RowBudget()
        self._sweeper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    @property
    def log_bytes(self) -> int:
        """What all logs together count for."""
        return self._pump.log_bytes

    def sessions(self) -> Collection[Session]:
        """All of them."""
        return self._sessions.values()

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
            case RenewGrant():
                self._on_renewal(peer, header)
            case CloseSession():
                self._on_close(peer, header)
            case Fault():
                self._on_fault(peer, header)
            case _:
                return False
        return True

    def _on_open(self, peer: NodeId, opening: OpenStage) -> None:
        session = self._sessions.get(opening.session)
        if any(held.gateway != peer for held in self._visits(opening.session)):
            self.refuse(peer, opening, "unknown_session", "That session belongs to another gateway.")
            return
        if session is not None and opening.epoch < session.epoch:
            return
        same = session is not None and (session.model, session.span) == (opening.model, opening.span)
        if self._leaving and not same:
            self.refuse(peer, opening, LEAVING, "This device is leaving.")
            return
        try:
            held = None if session is None else session.allowance
            allowance = self._allowances.open(peer, opening, held)
        except (GrantRefused, NotWorking) as error:
            self.refuse(peer, opening, code_of(error), error.message)
            return
        if session is not None and same:
            self._open_again(session, opening, allowance)
            return
        if session is not None:
            # A leftover of an earlier chain, from before this device was away.
            self.end(session)
        if len(self._sessions) >= self._allowances.sessions_max:
            message = f"This device already holds {len(self._sessions)} sessions."
            self.refuse(peer, opening, "kv_exhausted", message)
            self._allowances.ended(allowance)
            return
        session = Session(peer, opening, allowance, self._rows_budget, self._clock.monotonic_s())
        self._sessions[opening.session] = session
        self._keep_sweeping()
        session.pump = asyncio.get_running_loop().create_task(self._pump.run(session), name=f"session {session.id[:8]}")

    def _open_again(self, session: Session, opening: OpenStage, allowance: Allowance) -> None:
        session.allowance = allowance
        session.orphaned_at_s = None
        session.used_at_s = self._clock.monotonic_s()
        session.fence(opening.epoch)
        session.opening = opening
        session.wake.set()

    def _on_renewal(self, peer: NodeId, renewal: RenewGrant) -> None:
        session = self._sessions.get(renewal.session)
        if session is None or session.gateway != peer:
            return
        try:
            session.allowance = self._allowances.renew(peer, renewal, session.allowance)
        except (GrantRefused, NotWorking) as error:
            self.fault(session, code_of(error), error.message)

    def _on_flow(self, peer: NodeId, flow: Flow) -> None:
        session = self._sessions.get(flow.session)
        if session is None or session.gateway != peer or flow.epoch < session.epoch:
            return
        elsewhere = [flow.next_session, None if flow.ahead is None else flow.ahead.first_session]
        if not all(name is None or same_conversation(name, session.id) for name in elsewhere):
            self.fault(session, "unknown_session", "Rows go on in their own session alone.")
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
            if peer == self._peers.own:
                self._on_fault(peer, fault)
            else:
                self._peers.post(peer, Frame(fault))
            return
        item = Waiting(peer, rows, payload)
        if self._pump.misled(session, item):
            return
        held = session.hold(item)
        if held is Held.TOO_MANY:
            self.fault(session, "position_mismatch", "More rows wait here than a device holds.", suspect=peer)
        if held is not Held.WAITS:
            return
        session.wake.set()

    def _on_close(self, peer: NodeId, close: CloseSession) -> None:
        session = self._sessions.get(close.session)
        if session is not None and session.gateway == peer:
            self.end(session)

    def _on_fault(self, peer: NodeId, fault: Fault) -> None:
        """The next stage complains to us, in its own name for the session; the gateway is the one to know. Of whom it
        complains is its own word, which must not become ours: to the gateway we would be the ones who accuse."""
        for session in self._visits(fault.session):
            if session.flow is None or session.flow.next is None:
                continue
            told = session.flow.next_session or session.id
            if (session.flow.next.node, told) == (peer, fault.session):
                self.fault(session, fault.code, fault.message, suspect=peer)

    # --- what happens around ------------------------------------------------------------------

    def peer_lost(self, peer: NodeId, reason: str) -> None:
        """A link is gone: tell gateways whose chains ran over it, and let its own sessions wait for its return."""
        for session in list(self._sessions.values()):
            if session.gateway == peer:
                session.orphaned_at_s = self._clock.monotonic_s()
            elif session.flow is not None and session.flow.next is not None and session.flow.next.node == peer:
                self.fault(session, "link_closed", f"The next stage is gone: {reason}", suspect=peer)

    def engine_lost(self, reason: str) -> None:
        """The worker died, and every cache with it."""
        for session in list(self._sessions.values()):
            self.fault(session, "engine_lost", reason)
            self.end(session)

    def stop(self, standing: Standing, why: str) -> None:
        """This device may not work any more: every session ends now, and its gateway learns why."""
        for session in list(self._sessions.values()):
            self.fault(session, standing, why)
            self.end(session)

    def forbid(self, model: Digest) -> None:
        """This device may not compute a model any more."""
        for session in [session for session in self._sessions.values() if session.model == model]:
            self.fault(session, GrantRefused.code, f"The council does not allow the model {model[:12]}.")
            self.end(session)

    def drain(self) -> None:
        """Ask every gateway to move its sessions elsewhere; their caches stay until it has. No new ones come."""
        self._leaving = True
        for session in list(self._sessions.values()):
            self.fault(session, LEAVING, "This device is leaving.", suspect=None)

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            self.end(session)
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
                    code = GrantRefused.code if expiry is Expiry.UNGRANTED else "expired"
                    self.fault(session, code, f"This device freed the session: {expiry}.")
                    self.end(session)

    # --- helpers ------------------------------------------------------------------------------

    def _visits(self, name: SessionId) -> list[Session]:
        """The stages here of the session that is meant, whichever of them is named."""
        held = (self._sessions.get(at_visit(name, visit)) for visit in range(VISITS_MAX))
        return [session for session in held if session is not None]

    def refuse(self, peer: NodeId, opening: OpenStage, code: str, message: str) -> None:
        """Answer an opening with no."""
        self._peers.post(peer, Frame(Refused(session=opening.session, epoch=opening.epoch, code=code, message=message)))

    def fault(
        self, session: Session, code: str, message: str, suspect: NodeId | None = None, void_from: int | None = None
    ) -> None:
        """Tell a session's gateway what is wrong."""
        log.info("session %s: %s: %s", session.id[:8], code, message)
        header = Fault(
            session=session.id, epoch=session.epoch, code=code, message=message, suspect=suspect, void_from=void_from
        )
        self._peers.post(session.gateway, Frame(header))

    def end(self, session: Session) -> None:
        """Free a session. Idempotent."""
        if self._sessions.pop(session.id, None) is None:
            return
        session.end()
        self._allowances.ended(session.allowance)
        self._pump.forget(session)
        self.later(self._free(session))

    async def _free(self, session: Session) -> None:
        if session.pump is not None and session.pump is not asyncio.current_task():
            session.pump.cancel()
            await asyncio.gather(session.pump, return_exceptions=True)
        try:
            await self._engine.free(session.engine_id)
        except (FallowError, LinkClosed) as error:
            log.debug("session %s: %s", session.id[:8], error)

    def later(self, work: Coroutine[object, object, None]) -> None:
        """Do this beside everything else; whoever closes this waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
