"""One conversation's chain of devices: feed tokens, await log-probabilities, repair what breaks.

Rules
- The gateway holds the conversation's tokens, so it can rebuild anything. It asks the coordinator for a chain, opens
  every stage, and lets rows flow by the plan of `policy/recovery.py`. Opening, repairing and rewinding are one thing.
- Trouble (a fault, a lost link, a hang) is noted by frame handlers and handled by the one task that awaits the next
  token; an idle conversation that meets trouble is simply dropped by its owner.
- A repair that finds no chain waits for one, `REPAIR_TIMEOUT_S` at most, so that a device that appears is used; then
  the client gets `NoRoute`.
- A device that says that it leaves still serves for a while: the chain's owner may move the conversation meanwhile
  (`moves.py`); otherwise it is repaired at once.
- What lives keeps its caches, so a repair may come to a device again, for what another lost (`flows.py`).
- Prompt rows in flight are bounded: `WINDOW_ROWS` beyond the last result.

It does not sample, render text or speak HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import (
    BusTimeout,
    BusUnavailable,
    FallowError,
    GrantRefused,
    KvExhausted,
    NoRoute,
    PassportRefused,
    StageRefused,
)
from fallow.domain.fleet import Hop
from fallow.domain.frames import (
    CloseSession,
    Fault,
    Frame,
    OpenStage,
    PeerAddress,
    Phase,
    Refused,
    Result,
    Rows,
    StageState,
)
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.fabric.peers import Peers
from fallow.gateway.contract import Candidates, Meanwhile, Router
from fallow.gateway.feeding import WINDOW_ROWS, rows_to_feed
from fallow.gateway.flows import flows, layers_anew, left_behind, positions, stage_of
from fallow.gateway.lost_devices import Avoided
from fallow.gateway.results import ReadResult, last_candidates
from fallow.gateway.waker import Waker
from fallow.policy.recovery import Rewind, plan_recovery, with_rewind

OPEN_TIMEOUT_S = 3.0
"""How long a stage may take to answer `OpenStage`; it first finishes what it computes."""
DIAL_PATIENCE_S = 1.0
"""How long a chain waits for a link to a device that it needs. The dial itself goes on: another chain may use it."""
REPAIR_TIMEOUT_S = 30.0
REPAIR_RETRY_S = 0.1
AVOID_S = 8.0
"""How long a session avoids a device that it lost; longer than the coordinator takes to notice, so that it is not
dialled again meanwhile."""
AVOID_ENGINE_S = 1.0
"""The same for a device that lives and refuses, or whose worker died: it may be the only one, and serve again soon."""
AVOID_FULL_S = 0.2
"""The same for a device that had no room: it may have some once a kept conversation has made way."""
STALL_TIMEOUT_S = 15.0
"""Without any progress for so long, the chain is asked where it stands even though every link lives. That voids the
rows under way, so one that is being rebuilt has `REBUILD_ROW_S` more for each of them."""
REBUILD_ROW_S = 0.02

_REFUSES_LONG: Final = frozenset({"link_closed", GrantRefused.code, *Standing})
"""Codes of refusals that last: nobody answers, the device's clock is wrong, or it may not work."""

log = logging.getLogger(__name__)


class Chain:
    """A session on some chain of stages. One task drives it; frames are delivered from the link readers."""

    def __init__(
        self,
        session: SessionId,
        model: Digest,
        reserve_tokens: int,
        top_k: int | None,
        peers: Peers,
        router: Router,
        clock: Clock,
        on_event: Callable[[str], None],
        on_unreached: Callable[[NodeId], None] = lambda _: None,
        on_leaving: Callable[["Chain", NodeId], bool] = lambda *_: False,
        read: ReadResult = last_candidates,
    ) -> None:
        """`on_leaving` hears of a device of the chain that is about to go, and says whether its owner sees to that."""
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
        self._peers = peers
        self._router = router
        self._clock = clock
        self._on_event = on_event
        self._on_unreached = on_unreached
        self._on_leaving = on_leaving
        self._read = read
        self._epoch = 0
        self._fed = 0
        self._fed_once = 0
        """The most that was ever fed since the last rewind: a rebuilt chain is fed again from below."""
        self._rewinds: tuple[Rewind, ...] = ()
        self._received = 0
        self._candidates: Candidates | None = None
        self._trouble: str | None = None
        self._avoided = Avoided(clock)
        self._refused: set[NodeId] = set()
        """Devices that did not take a grant; one that takes none again is avoided."""
        self._waker = Waker()
        self._states: dict[tuple[NodeId, SessionId], StageState | Refused] = {}
        self._progress_at_s = clock.monotonic_s()
        self._patience_s = STALL_TIMEOUT_S
        self._rebuilt_to = 0
        """So many tokens were there when it was opened last."""

    # --- what its owner asks -------------------------------------------------------------------

    async def establish(self, keep_tokens: int = 0) -> None:
        """Open the chain, keeping the first `keep_tokens` tokens of an earlier turn.

        Raises `NoRoute`, `KvExhausted`, or a bus error, when it cannot be opened at once.
        """
        self.tokens = self.tokens[:keep_tokens]
        self._phases = self._phases[:keep_tokens]
        self._fed = self._fed_once = self._received = keep_tokens
        self._candidates = None
        self._trouble = None
        self.broken = False
        self._rewinds = with_rewind(self._rewinds, Rewind(self._epoch + 1, keep_tokens))
        await self._connect(keep=self.hops if keep_tokens else ())

    async def advance(self, tokens: Sequence[int], phase: Phase, meanwhile: Meanwhile | None = None) -> Candidates:
        """Append tokens, all to be computed in one phase; the distribution after the last one. `meanwhile` is done
        once they are on their way. Repairs the chain as often as it must.

        Raises `NoRoute` when no chain was found within `REPAIR_TIMEOUT_S`, and what `meanwhile` raises.
        """
        self.append(tokens, [phase] * len(tokens))
        if meanwhile is not None:
            await self._feed()
            await asyncio.sleep(0)  # links write at the end of a pass
            await meanwhile()
        await self.settle()
        assert self._candidates is not None, "results are complete, so the last one came with its logits"
        return self._candidates

    def append(self, tokens: Sequence[int], phases: Sequence[Phase]) -> None:
        """Add tokens, each with the phase that it is computed in; `settle` computes them."""
        self.tokens.extend(tokens)
        self._phases.extend(phases)
        self._candidates = None
        self._progress_at_s = self._clock.monotonic_s()

    def since(self, position: int) -> tuple[list[int], list[Phase]]:
        """The conversation from a position on, as `append` takes it."""
        return self.tokens[position:], self._phases[position:]

    async def settle(self) -> None:
        """Have everything computed. Raises as `advance`."""
        while self._received < len(self.tokens):
            if self._trouble is not None:
                await self._repair()
            await self._feed()
            if self._trouble is None and self._received < len(self.tokens):
                await self._waker.sleep()

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

    # --- what arrives --------------------------------------------------------------------------

    def on_frame(self, peer: NodeId, frame: Frame) -> None:
        """A frame about this session. Only stages of the present chain are believed."""
        header = frame.header
        if isinstance(header, Result):
            if (peer, header.session) in self.stages()[-1:] and header.epoch == self._epoch:
                self._on_result(header, frame.payload)
        elif isinstance(header, StageState | Refused):
            if header.epoch == self._epoch and (peer, header.session) in self.stages():
                self._states[peer, header.session] = header
                self._waker.wake()
        elif isinstance(header, Fault) and peer in self.nodes():
            if header.code == "leaving" and not self.broken and self._on_leaving(self, peer):
                self.avoid(peer)
                return
            # `leaving` and its like are about the sender; otherwise the sender says whom it suspects.
            suspect: NodeId | None = peer if header.suspect is None else header.suspect
            if header.code == GrantRefused.code:
                suspect = None  # another grant will do
            if header.epoch == self._epoch or header.code in ("leaving", "engine_lost"):
                avoid_s = AVOID_ENGINE_S if header.code == "engine_lost" else AVOID_S
                self.in_trouble(f"{header.code}: {header.message}", suspect, avoid_s)

    def in_trouble(self, reason: str, suspect: NodeId | None, avoid_s: float = AVOID_S) -> None:
        """Note that the chain needs repair, and whom to avoid."""
        if suspect is not None:
            self.avoid(suspect, avoid_s)
        self._trouble = self._trouble or reason
        self.broken = True
        self._waker.wake()

    def avoid(self, node: NodeId, avoid_s: float = AVOID_S) -> None:
        """Open nothing on a device for a while."""
        self._avoided.note(node, avoid_s)

    def check_stall(self) -> None:
        """Called at an interval: without progress on live links, ask the chain where it stands."""
        waiting = self._received < len(self.tokens)
        if waiting and self._clock.monotonic_s() - self._progress_at_s > self._patience_s:
            self._progress_at_s = self._clock.monotonic_s()
            self.in_trouble(f"no progress for {self._patience_s:.0f} s", None)

    def _on_result(self, header: Result, payload: bytes | bytearray | memoryview) -> None:
        end = header.position + header.count
        if end <= self._received or end > len(self.tokens):
            return
        self._progress_at_s = self._clock.monotonic_s()
        if end == len(self.tokens):
            if header.logit_count == 0:
                self.in_trouble("a result without the logits that were asked for", self.hops[-1].address.node)
                return
            candidates = self._read(header, payload)
            if candidates is None:
                self.in_trouble("a result that cannot be read", self.hops[-1].address.node)
                return
            self._candidates = candidates
        self._received = end
        self._waker.wake()

    # --- feeding -------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while self._fed < len(self.tokens) and self._fed - self._received < WINDOW_ROWS:
            if self._trouble is not None:
                return
            count = rows_to_feed(self._phases, self._fed, self._rebuilt_to)
            rows = Rows(
                session=self.stages()[0][1], epoch=self._epoch, position=self._fed, count=count,
                phase=self._phases[self._fed], logits_from=len(self.tokens) - 1, top_k=self.top_k,
            )  # fmt: skip
            payload = np.asarray(self.tokens[self._fed : self._fed + count], np.int32).tobytes()
            self._fed += count
            self._fed_once = max(self._fed_once, self._fed)
            await self._send(self.hops[0].address, Frame(rows, payload))

    async def _send(self, address: PeerAddress, frame: Frame) -> None:
        if self._peers.post(address.node, frame):
            return
        try:
            await self._peers.send(address, frame)
        except FallowError as error:
            self._on_unreached(address.node)
            self.in_trouble(f"{error.code}: {error.message}", address.node)

    async def _reach(self, address: PeerAddress, frame: Frame) -> None:
        """Send to a device that may have to be dialled first."""
        if self._peers.post(address.node, frame):
            return
        try:
            async with asyncio.timeout(DIAL_PATIENCE_S):
                await self._send(address, frame)
        except TimeoutError:
            self._on_unreached(address.node)
            reason = f"{address.node[:8]} was not reached in {DIAL_PATIENCE_S:g} s"
            self.in_trouble(reason, address.node, AVOID_ENGINE_S)

    # --- opening and repairing -----------------------------------------------------------------

    async def _repair(self) -> None:
        """Find a chain again and let it flow. Raises `NoRoute` after `REPAIR_TIMEOUT_S`."""
        started_s = self._clock.monotonic_s()
        reason = self._trouble
        self._on_event(f"session {self.session[:8]}: repairing after {reason}")
        while True:
            self._trouble = None
            try:
                avoided = self._avoided.now()
                anew = await self._connect(keep=[hop for hop in self.hops if hop.address.node not in avoided])
                break
            except (NoRoute, KvExhausted, StageRefused, BusTimeout, BusUnavailable) as error:
                waited_s = self._clock.monotonic_s() - started_s
                if waited_s > REPAIR_TIMEOUT_S:
                    message = f"The chain broke ({reason}) and none was found in {waited_s:.0f} s: {error.message}"
                    raise NoRoute(message) from error
                if error.message != reason:
                    reason = error.message
                    self._on_event(f"session {self.session[:8]}: no chain yet: {reason}")
                await self._clock.sleep(REPAIR_RETRY_S)
        self.repairs += 1
        self.broken = False
        self._progress_at_s = self._clock.monotonic_s()
        took_ms = 1000 * (self._progress_at_s - started_s)
        how = f"repaired in {took_ms:.0f} ms over {self.describe()}, {anew} layers anew"
        self._on_event(f"session {self.session[:8]}: {how}")

    def describe(self) -> str:
        return " > ".join(f"{hop.address.node[:8]}{hop.span}" for hop in self.hops)

    async def _connect(self, keep: Sequence[Hop]) -> int:
        """Route, open every stage, plan, and let rows flow. How many layers have rows to compute anew."""
        avoided = self._avoided.now()
        hops = await self._router.route(self.model, self.session, self.reserve_tokens, avoided, keep, len(self.tokens))
        if self._avoided.now().isdisjoint(hop.address.node for hop in hops):
            self._trouble = None  # what broke meanwhile is not part of the new chain
        for node, session in left_behind(self.session, self.hops, hops):
            self._peers.post(node, Frame(CloseSession(session=session)))
        self.hops = hops
        self.granted_s = self._clock.monotonic_s()
        self._epoch += 1
        self._states = {}
        states = await self._open_stages(hops)
        stages = positions(states, self._fed_once, self._rewinds)
        plan = plan_recovery(self._received, stages)
        for hop, flow in zip(hops, flows(self.session, self._epoch, hops, plan, self._received), strict=True):
            await self._send(hop.address, Frame(flow))
        self._fed = plan.feed_from
        rebuilt = len(self.tokens) - min(plan.feed_from, *(stage.forward_from for stage in plan.stages))
        self._patience_s = STALL_TIMEOUT_S + REBUILD_ROW_S * rebuilt
        self._rebuilt_to = len(self.tokens)
        return layers_anew(hops, stages, self._received)

    async def _open_stages(self, hops: Sequence[Hop]) -> list[StageState]:
        """Every stage's state at this epoch. Raises `KvExhausted` or `StageRefused`, having noted whom to avoid."""
        opening = [
            OpenStage(
                session=name, epoch=self._epoch, model=self.model, span=hop.span, grant=hop.grant,
                reserve_tokens=self.reserve_tokens) for hop, (_, name) in zip(hops, self.stages(), strict=True)
        ]  # fmt: skip
        await asyncio.gather(*(self._reach(hop.address, Frame(o)) for hop, o in zip(hops, opening, strict=True)))
        deadline_s = self._clock.monotonic_s() + OPEN_TIMEOUT_S
        while len(self._states) < len(hops) and self._trouble is None:
            remaining_s = deadline_s - self._clock.monotonic_s()
            if remaining_s <= 0:
                break
            await self._waker.sleep(remaining_s)
        states: list[StageState] = []
        for hop in hops:
            node = hop.address.node
            answer = self._states.get(stage_of(self.session, hop))
            if isinstance(answer, StageState):
                self._require_device(node)
                states.append(answer)
                continue
            if answer is None and self._trouble is not None:
                continue
            code = answer.code if answer is not None else "link_closed"
            message = answer.message if answer is not None else f"{node[:8]} did not answer in {OPEN_TIMEOUT_S} s."
            if code == KvExhausted.code:
                self.in_trouble(message, node, AVOID_FULL_S)
                raise KvExhausted(message)
            if code == GrantRefused.code and node not in self._refused:
                self._refused.add(node)
                self.in_trouble(message, None)
            else:
                self.in_trouble(message, node, AVOID_S if code in _REFUSES_LONG else AVOID_ENGINE_S)
            raise StageRefused(f"{node[:8]} refused: {message}", reason=code)
        if self._trouble is not None:
            raise StageRefused(f"The chain broke while it was opened: {self._trouble}", reason="link_closed")
        return states

    def _require_device(self, node: NodeId) -> None:
        """Raises `StageRefused` for a hop that is no device: a coordinator could name itself to read the rows."""
        if not self._peers.computes(node):
            self.in_trouble(f"{node[:8]} is no device", node)
            raise StageRefused(f"{node[:8]} is no device, and gets no rows.", reason=PassportRefused.code)
