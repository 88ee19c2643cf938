"""One conversation's chain of devices: feed tokens, await log-probabilities, repair what breaks.

Rules
- The gateway holds the conversation's tokens, so it can rebuild anything. It asks the coordinator for a chain, opens
  every stage, and lets rows flow by the plan of `policy/recovery.py`. Opening, repairing and rewinding are one thing.
- Trouble (a fault, a lost link, a hang) is noted by frame handlers and handled by the one task that awaits the next
  token; an idle conversation that meets trouble is simply dropped by its owner.
- A repair that finds no chain waits for one, `REPAIR_TIMEOUT_S` at most, so that a device that appears is used; then
  the client gets `NoRoute`.
- A device that says that it leaves still serves for a while: the chain's owner may move the conversation meanwhile
  (`moves.py`); otherwise it is repaired at once. Before every repair the owner is asked whether it has a better chain.
- A chain that gets nowhere is asked where it stands, then does without whoever holds it up, and ends (`progress.py`).
- Flows go to the last stage first: whoever is told to send finds that its rows are expected.
- What lives keeps its caches, so a repair may come to a device again, for what another lost (`flows.py`).
- A chain may run ahead of what it is fed (`running_ahead.py`); every token is fed to it all the same.
- Prompt rows in flight are bounded: `WINDOW_ROWS` beyond the last result.

It does not sample, render text or speak HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence, Set

from fallow.domain.clock import Clock
from fallow.domain.errors import EngineLost, GrantRefused, KvExhausted, NoRoute, PassportRefused, StageRefused
from fallow.domain.fleet import Hop
from fallow.domain.frames import (
    LEAVING,
    MISLED,
    CloseSession,
    Fault,
    Frame,
    PeerAddress,
    Phase,
    Refused,
    Result,
    StageState,
)
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.fabric.peers import Peers
from fallow.gateway.contract import NOT_NOW, Candidates, Meanwhile, Router
from fallow.gateway.feeding import WINDOW_ROWS, rows_to_feed
from fallow.gateway.flows import describe, flows, layers_anew, layers_on, left_behind, openings, positions, stage_of
from fallow.gateway.lost_devices import Avoided
from fallow.gateway.marks import Marks
from fallow.gateway.opening import AVOID_ENGINE_S, AVOID_S, OPEN_TIMEOUT_S, Answers, GrantsRefused
from fallow.gateway.ownership import Owner, Room, Superseded
from fallow.gateway.progress import AVOID_STALLED_S, STALLS_MAX, STALLS_OF_ALL, STALLS_OF_SOMEBODY, Progress
from fallow.gateway.results import ReadResult, last_candidates
from fallow.gateway.running_ahead import MISSED, Leave, RunningAhead
from fallow.gateway.sending import Unreached, reach, send
from fallow.gateway.waker import Waker
from fallow.policy.recovery import first_behind, plan_recovery

REPAIR_TIMEOUT_S = 30.0
REPAIR_RETRY_S = 0.1

log = logging.getLogger(__name__)


class Chain:
    """A session on some chain of stages. One task drives it; frames are delivered from the link readers."""

    def __init__(
        self, session: SessionId, model: Digest, reserve_tokens: int, top_k: int | None, peers: Peers, router: Router,
        clock: Clock, on_event: Callable[[str], None], owner: Owner | None = None, read: ReadResult = last_candidates,
    ) -> None:  # fmt: skip
        self.session = session
        self.model = model
        self.top_k = top_k
        self.reserve_tokens = reserve_tokens
        self.tokens: list[int] = []
        self._phases: list[Phase] = []
        """How each token's row was computed first, and must be computed again when it is lost."""
        self.hops: tuple[Hop, ...] = ()
        self.granted_s = 0.0
        """When its hops' grants came."""
        self.repairs = 0
        self.broken = False
        self.stands_by_for: frozenset[NodeId] = frozenset()
        """The devices of the chain in whose place it stands by, and whose losses it must outlive; none: it is used."""
        self._peers = peers
        self._router = router
        self._clock = clock
        self._on_event = on_event
        self._owner = owner or Owner()
        self._read = read
        self._flows = False
        """Its stages are open, and have their flows."""
        self._epoch = 0
        self._marks = Marks()
        self.ahead = RunningAhead()
        self._candidates: Candidates | None = None
        self._trouble: str | None = None
        self.avoided = Avoided(clock)
        self._grants_refused = GrantsRefused()
        self.waker = Waker()
        self._answers = Answers(0, ())
        self.progress = Progress(clock)
        self._behind: NodeId | None = None
        """Who held the chain up when it was asked last."""
        self._room = Room(clock)

    # --- what its owner asks -------------------------------------------------------------------

    async def establish(self, keep_tokens: int = 0, leave: Leave | None = None) -> None:
        """Open the chain, keeping the first `keep_tokens` tokens of an earlier turn. With `leave`, it runs ahead.

        Raises what is in `NOT_NOW`, when it cannot be opened at once.
        """
        self.tokens = self.tokens[:keep_tokens]
        self._phases = self._phases[:keep_tokens]
        self.ahead = RunningAhead(leave)
        self.progress.starts_anew()
        self._candidates = None
        self._trouble = None
        self.broken = False
        self._marks.cut(self._epoch + 1, keep_tokens)
        await self._connect(keep=self.hops if keep_tokens else ())

    async def advance(self, tokens: Sequence[int], phase: Phase, meanwhile: Meanwhile | None = None) -> Candidates:
        """Append tokens, all to be computed in one phase; the distribution after the last one. `meanwhile` is done
        once they are on their way.

        Raises as `outcome`, and what `meanwhile` raises.
        """
        self.append(tokens, [phase] * len(tokens))
        if meanwhile is not None:
            await self._feed()
            await asyncio.sleep(0)  # links write at the end of a pass
            await meanwhile()
        return await self.outcome()

    async def outcome(self) -> Candidates:
        """The distribution after the last token. Repairs the chain as often as it must.

        Raises `NoRoute` when no chain was found within `REPAIR_TIMEOUT_S`, or none that computes; `NotWorking` when
        this gateway may not work; `Superseded` when its owner goes on with another chain.
        """
        await self.settle()
        assert self._candidates is not None, "results are complete, so the last one came with its logits"
        return self._candidates

    def append(self, tokens: Sequence[int], phases: Sequence[Phase]) -> None:
        """Add tokens, each with the phase that it is computed in; `settle` computes them."""
        for token in tokens:
            if self.ahead.differs(len(self.tokens), token):
                self._take_back(len(self.tokens), MISSED)
            self.tokens.append(token)
        self._phases.extend(phases)
        if tokens:
            self._candidates = None
        self.progress.begins()
        if (early := self.ahead.early(len(self.tokens))) is not None:
            self._on_result(*early)

    def since(self, position: int) -> tuple[list[int], list[Phase]]:
        """The conversation from a position on, as `append` takes it."""
        return self.tokens[position:], self._phases[position:]

    async def settle(self) -> None:
        """Have everything computed, and fed, even where results came early. Raises as `outcome`."""
        await self._feed()
        while self._marks.received < len(self.tokens):
            if self._trouble is not None:
                await self._repair()
            elif self._owner.overtaken(self):
                raise Superseded
            await self._feed()
            if self._trouble is None and self._marks.received < len(self.tokens):
                await self.waker.sleep()

    def ask_for_room(self) -> None:
        """Have the owner free what this chain needs."""
        self._room.ask(self._owner, self.reserve_tokens)

    def close(self) -> None:
        """Free the session everywhere. Idempotent."""
        for node, session in self.stages():
            self._peers.post(node, Frame(CloseSession(session=session)))
        self.hops = ()

    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(hop.address.node for hop in self.hops)

    def stages(self) -> tuple[tuple[NodeId, SessionId], ...]:
        """Its devices in order, each with the session's name there."""
        return tuple(stage_of(self.session, hop) for hop in self.hops)

    def rows_ready(self) -> int | None:
        """How many leading rows of its conversation are computed; `None` while it is not open, or broken."""
        return self._marks.received if self._flows and not self.broken else None

    def layers_lost(self, leaving: Set[NodeId]) -> tuple[int, int]:
        """Its layers on devices that are avoided, or leave; and all."""
        return layers_on(leaving | self.avoided.now(), self.hops)

    # --- what arrives --------------------------------------------------------------------------

    def on_frame(self, peer: NodeId, frame: Frame) -> None:
        """A frame about this session. Only stages of the present chain are believed."""
        header = frame.header
        if isinstance(header, Result):
            if (peer, header.session) in self.stages()[-1:] and header.epoch == self._epoch != self._marks.void_epoch:
                self._on_result(header, frame.payload)
        elif isinstance(header, StageState | Refused):
            if self._answers.take(peer, header):
                self.waker.wake()
        elif isinstance(header, Fault) and peer in self.nodes():
            self._on_fault(peer, header)

    def _on_fault(self, peer: NodeId, fault: Fault) -> None:
        if fault.code == LEAVING and not self.broken and self._owner.leaving(self, peer):
            return
        if fault.code == MISLED and fault.void_from is not None and (peer, fault.session) == self.stages()[0]:
            self._take_back(fault.void_from, f"{fault.code}: {fault.message}")
        elif fault.epoch != self._epoch and fault.code not in (LEAVING, EngineLost.code):
            return
        # `leaving` and its like are about the sender; otherwise the sender says whom it suspects.
        suspect: NodeId | None = peer if fault.suspect is None else fault.suspect
        if fault.code == GrantRefused.code:
            suspect = None if self.broken else self._grants_refused.blame(peer)
        avoid_s = AVOID_ENGINE_S if fault.code == EngineLost.code else AVOID_S
        self.in_trouble(f"{fault.code}: {fault.message}", suspect, avoid_s)

    def in_trouble(self, reason: str, suspect: NodeId | None, avoid_s: float = AVOID_S) -> None:
        """Note that the chain needs repair, and whom to avoid."""
        if suspect is not None:
            self.avoid(suspect, avoid_s)
        self._trouble = self._trouble or reason
        self.broken = True
        self.waker.wake()

    def _take_back(self, position: int, reason: str) -> None:
        """The chain went on with another token than the one at `position`: what it computed from there on is void."""
        self._marks.take_back(self._epoch, position)
        self._candidates = None
        self.ahead.missed()
        self.in_trouble(reason, None)

    def avoid(self, node: NodeId, avoid_s: float = AVOID_S) -> None:
        """Open nothing on a device for a while."""
        self.avoided.note(node, avoid_s)

    def check_stall(self) -> None:
        """Called at an interval: without progress on live links, ask the chain where it stands."""
        patience_s = self.progress.patience_s
        if self._marks.received < len(self.tokens) and not self.broken and self.progress.stalled():
            suspect = self._behind if self.progress.stalls >= STALLS_OF_SOMEBODY else None
            self.in_trouble(f"no progress for {patience_s:.0f} s", suspect, AVOID_STALLED_S)

    def _on_result(self, header: Result, payload: bytes | bytearray | memoryview) -> None:
        end = header.position + header.count
        if end <= self._marks.received:
            return
        self.ahead.note(header, payload, len(self.tokens))
        if end > len(self.tokens):
            return
        if end < len(self.tokens) and self.ahead.differs(end, self.tokens[end]):
            self._take_back(end, MISSED)
            return
        if end == len(self.tokens):
            candidates = self._read(header, payload) if header.logit_count else None
            if candidates is None:
                self.in_trouble("a result that cannot be read", self.hops[-1].address.node)
                return
            self._candidates = candidates
        self._marks.received = end
        self.progress.came(self._phases[end - 1])
        self._grants_refused.forget()
        self.waker.wake()

    # --- feeding -------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while self._marks.fed < len(self.tokens) and self._marks.fed - self._marks.received < WINDOW_ROWS:
            if self._trouble is not None:
                return
            name = self.stages()[0][1]
            rows, payload = rows_to_feed(name, self._epoch, self.tokens, self._phases, self._marks, self.top_k)
            self._marks.feed(rows.count)
            self._sent(await send(self._peers, self.hops[0].address, Frame(rows, payload)))

    def _sent(self, unreached: Unreached | None) -> None:
        """A frame was sent; note whom it did not get to."""
        if unreached is not None:
            self._owner.unreached(unreached.node)
            self.in_trouble(unreached.reason, unreached.node, unreached.avoid_s)

    # --- opening and repairing -----------------------------------------------------------------

    async def _repair(self) -> None:
        """Find a chain again and let it flow. Raises as `outcome`."""
        started_s = self._clock.monotonic_s()
        reason = self._trouble
        self._require_use()
        self._on_event(f"session {self.session[:8]}: repairing after {reason}")
        while True:
            self._trouble = None
            try:
                anew = await self._connect(self._hops_to_keep())
                break
            except NOT_NOW as error:
                waited_s = self._clock.monotonic_s() - started_s
                if waited_s > REPAIR_TIMEOUT_S:
                    message = f"The chain broke ({reason}) and none was found in {waited_s:.0f} s: {error.message}"
                    raise NoRoute(message) from error
                if isinstance(error, KvExhausted):
                    self.ask_for_room()
                if error.message != reason:
                    reason = error.message
                    self._on_event(f"session {self.session[:8]}: no chain yet: {reason}")
                await self._clock.sleep(REPAIR_RETRY_S)
                self._require_use()
        self.repairs += 1
        self.broken = False
        self.progress.begins()
        how = f"in {1000 * (self._clock.monotonic_s() - started_s):.0f} ms over {describe(self.hops)}"
        self._on_event(f"session {self.session[:8]}: repaired {how}, {anew} layers anew")

    def _require_use(self) -> None:
        """Raises when to repair this chain is of no use."""
        if self._owner.superseded(self):
            raise Superseded
        self._owner.require_working()
        if self.progress.stalls >= STALLS_MAX:
            raise NoRoute(f"Devices answered and computed nothing, {self.progress.stalls} times in a row.")

    def _hops_to_keep(self) -> Sequence[Hop]:
        """Those that live; none of a chain that got nowhere again and again."""
        if self.progress.stalls >= STALLS_OF_ALL:
            return ()
        avoided = self.avoided.now()
        return [hop for hop in self.hops if hop.address.node not in avoided]

    async def _connect(self, keep: Sequence[Hop]) -> int:
        """Route, open every stage, plan, and let rows flow. How many layers have rows to compute anew."""
        self._marks.cut(self._epoch + 1, self._marks.fed_once)  # also for who is away now and comes back later
        avoided, spare = self.avoided.now() | self.stands_by_for, bool(self.stands_by_for)
        hops = await self._router.route(
            self.model, self.session, self.reserve_tokens, avoided, keep, len(self.tokens), spare
        )
        if self.avoided.now().isdisjoint(hop.address.node for hop in hops):
            self._trouble = None  # what broke meanwhile is not part of the new chain
        for node, session in left_behind(self.session, self.hops, hops):
            self._peers.post(node, Frame(CloseSession(session=session)))
        self.hops = hops
        self.granted_s = self._clock.monotonic_s()
        self._epoch += 1
        self._flows = False
        self.ahead.forget()
        states = await self._open_stages(hops)
        self._behind = hops[first_behind(self._marks.fed, [state.position for state in states])].address.node
        self._marks.confirm(self._epoch, states[0].confirmed)
        stages = positions(states, self._marks.fed_once, self._marks.rewinds)
        plan = plan_recovery(self._marks.received, stages)
        told = flows(self.session, self._epoch, hops, plan, self._marks.received, self.ahead.told(self.session, hops))
        for hop, flow in reversed(list(zip(hops, told, strict=True))):
            self._sent(await send(self._peers, hop.address, Frame(flow)))
        self._flows = True
        self._marks.fed = plan.feed_from
        self.progress.rebuilds(len(self.tokens) - min(plan.feed_from, *(s.forward_from for s in plan.stages)))
        self._marks.rebuilt_to = len(self.tokens)
        return layers_anew(hops, stages, self._marks.received)

    async def _open_stages(self, hops: Sequence[Hop]) -> list[StageState]:
        """Every stage's state at this epoch. Raises `KvExhausted` or `StageRefused`, having noted whom to avoid."""
        answers = self._answers = Answers(self._epoch, self.stages())
        opening = openings(self.session, self._epoch, hops, self.model, self.reserve_tokens)
        await asyncio.gather(*(self._open(hop.address, Frame(o)) for hop, o in zip(hops, opening, strict=True)))
        deadline_s = self._clock.monotonic_s() + OPEN_TIMEOUT_S
        while not answers.complete and self._trouble is None and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            await self.waker.sleep(left_s)
        for node, _ in (opened := answers.opened()):
            self._require_device(node)
        refusal = answers.refused() or (answers.silent() if self._trouble is None else None)
        if refusal is not None:
            suspect = self._grants_refused.blame(refusal.node) if refusal.code == GrantRefused.code else refusal.node
            self.in_trouble(refusal.message, suspect, refusal.avoid_s)
            raise refusal.error()
        if self._trouble is not None:
            raise StageRefused(f"The chain broke while it was opened: {self._trouble}", reason="link_closed")
        return [state for _, state in opened]

    async def _open(self, address: PeerAddress, frame: Frame) -> None:
        self._sent(await reach(self._peers, address, frame))

    def _require_device(self, node: NodeId) -> None:
        """Raises `StageRefused` for a hop that is no device: a coordinator could name itself to read the rows."""
        if not self._peers.computes(node):
            self.in_trouble(f"{node[:8]} is no device", node)
            raise StageRefused(f"{node[:8]} is no device, and gets no rows.", reason=PassportRefused.code)
