"""Moves conversations to other devices while theirs still answer: make before break.

Rules
- What is moved: conversations of which a device is about to leave.
- For some conversations another chain, of idle devices that are not in the first one, *stands by*: a move without a
  leaver, which is brought up to date every `STANDBY_ROWS` tokens and changes over when the first chain loses a device.
  It is in nobody's way: it takes idle devices or none, is not repaired but given up, and makes way where room is
  lacking. When one is sought is `standbys.py`'s.
- A move is a second session on another chain, without the leaving devices, that computes all that was said so far; the
  conversation changes over between two tokens, and the old session is freed everywhere.
- Where a token is late, the other chain computes what it lacks; where it is overdue, and the other chain has it, the
  conversation goes on there (`progress.py` says when): the first one may be hung, cut off, or busy with others. Slow
  chains have longer, and prompts are never overdue.
- At most one move for a conversation at a time: who else leaves meanwhile is left out of it. The chain that a move
  prepares does not move in turn: it is repaired, which nobody waits for.
- A move that finds no chain, or no room, is tried again for as long as a leaver may stay. It never stops a chain that
  still serves: one that fails leaves the repair to the moment when the device is gone.
- A leaver says so once. Where its move failed, or made way for a repair that kept the leaver, the next token begins
  another one, at most one in `MOVE_RETRY_S`.
- A chain in trouble waits for its move where that is ready no later than a repair (`policy/recovery.py`). Otherwise the
  move ends first, so that the repair has its room and its devices' time.
- A conversation that ends keeps the chain of a move that is ready, and ends any other with the cache that is about to
  go.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError, KvExhausted, NoRoute
from fallow.domain.frames import Phase
from fallow.domain.ids import NodeId, SessionId
from fallow.gateway.chain import Chain
from fallow.gateway.contract import NOT_NOW
from fallow.gateway.flows import describe
from fallow.gateway.ownership import Superseded
from fallow.gateway.running_ahead import RunningAhead
from fallow.gateway.standbys import STANDBY_ROWS, Standbys
from fallow.policy.recovery import supersedes

ROUNDS: Final = 2
"""First everything that was said, then what was said meanwhile; what is missing then comes with the next token."""
MOVE_RETRY_S: Final = 0.5
"""How soon a move is tried again. A repair, for which a client waits, is more eager."""
MOVE_TRIES_S: Final = 30.0
"""For how long. A leaving device is gone by then, or has stayed after all."""
LATE_LOOK_S: Final = 0.125
"""How often it is looked whether a token is late; a look that comes later than two of them is left out."""

log = logging.getLogger(__name__)

Work = asyncio.Task[None]


class _Move(msgspec.Struct):
    of: Chain
    to: Chain
    leavers: set[NodeId]
    work: Work
    overtook_at: int = 0
    """With so many tokens, the first chain owed what comes after the last one, and this one had it."""

    @property
    def stands_by(self) -> bool:
        return not self.leavers

    @property
    def overtook(self) -> bool:
        return self.overtook_at == len(self.of.tokens) and _succeeded(self.work) and not self.to.broken


class _Leaving(msgspec.Struct):
    """Who said to a conversation that it leaves."""

    nodes: set[NodeId]
    until_s: float
    """Who is still there by then has stayed after all."""
    begun_s: float
    """When the conversation was last to move."""


class Moves:
    """All moves of a gateway, by the session that is left. `make` makes a chain, `drop` frees one."""

    def __init__(
        self,
        make: Callable[[Chain], Chain],
        drop: Callable[[Chain], None],
        on_event: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._make = make
        self._drop = drop
        self._on_event = on_event
        self._clock = clock
        self._moves: dict[SessionId, _Move] = {}
        self._leaving: dict[SessionId, _Leaving] = {}
        """Of conversations that go on."""
        self._standbys = Standbys(clock)
        self.takeovers = 0
        """How often one that stood by has taken over."""
        self._watching: Work | None = None

    def begin(self, chain: Chain, leaver: NodeId) -> bool:
        """Move away from a device that leaves. False for a chain that a move prepares: it is to be repaired."""
        if any(move.to is chain for move in self._moves.values()):
            return False
        now_s = self._clock.monotonic_s()
        leaving = self._leaving.setdefault(chain.session, _Leaving(set(), now_s, now_s))
        leaving.nodes.add(leaver)
        leaving.until_s = now_s + MOVE_TRIES_S
        self._move(chain, leaver)
        return True

    def stand_by(self, chain: Chain, prompt: Sequence[int]) -> None:
        """Have another chain stand by until the conversation ends. `prompt`: what it is about to be fed."""
        tokens, phases = chain.since(0)
        self._standbys.want(chain.session)
        self._have_stand_by(chain, [*tokens, *prompt], [*phases, *[Phase.PREFILL] * len(prompt)])

    def stand_down(self, chain: Chain) -> None:
        """The conversation needs none any more. Idempotent."""
        self._standbys.forget(chain.session)
        move = self._moves.get(chain.session)
        if move is not None and move.stands_by:
            self._stop(chain.session)

    def _have_stand_by(self, chain: Chain, tokens: Sequence[int], phases: Sequence[Phase]) -> None:
        """Where that is due."""
        if chain.broken or chain.session in self._moves or not self._standbys.due(chain):
            return
        self._standbys.sought(chain.session)
        to = self._make(chain)
        to.stands_by_for = self._standbys.shunned().union(chain.nodes())
        self._moves[chain.session] = _Move(chain, to, set(), self._start(chain, _come_to(to, tokens, phases)))
        self._watch_over()

    def _watch_over(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """See, while there are moves, that no answer waits longer than it must."""
        while self._moves:
            looked_s = self._clock.monotonic_s()
            await self._clock.sleep(LATE_LOOK_S)
            if self._clock.monotonic_s() - looked_s > 2 * LATE_LOOK_S:
                continue  # we were held up ourselves: what came meanwhile is to be read first
            for move in list(self._moves.values()):
                try:
                    self._look(move)
                except Exception:
                    log.exception("session %s: its move cannot be looked at", move.of.session[:8])

    def _look(self, move: _Move) -> None:
        """Where a token is late, have the other chain compute what it lacks; where it is overdue, use that one."""
        chain, to = move.of, move.to
        if to.broken or not _succeeded(move.work) or chain.rows_ready() in (None, len(chain.tokens)):
            return
        if len(to.tokens) < len(chain.tokens):
            if chain.progress.late():
                move.work = self._start(chain, _come_to(to, *chain.since(len(to.tokens))))
        elif chain.progress.overdue():
            move.overtook_at = len(chain.tokens)
            chain.waker.wake()

    def _move(self, chain: Chain, leaver: NodeId) -> None:
        move = self._moves.get(chain.session)
        if move is None:
            to = self._make(chain)
            move = _Move(chain, to, set(), self._start(chain, self._prepare(chain, to)))
            self._moves[chain.session] = move
            self._watch_over()
        move.leavers.add(leaver)
        move.to.stands_by_for = frozenset()
        move.to.avoid(leaver, MOVE_TRIES_S)

    def newest(self, chain: Chain) -> Chain:
        """The chain to go on with between two tokens: the other one as soon as it is ready."""
        move = self._moves.get(chain.session)
        if move is None:
            self._move_after_all(chain)
            self._have_stand_by(chain, *chain.since(0))
            return chain
        ahead = len(move.to.tokens) > len(chain.tokens)  # of a prompt that the first chain was not given yet
        if ahead or not _succeeded(move.work):
            return chain
        if move.stands_by:
            self._keep_up(chain, move)
            return chain
        if move.to.broken:
            move.work = self._start(chain, _catch_up(chain, move.to))
            return chain
        return self._change_over(chain, move)

    def _move_after_all(self, chain: Chain) -> None:
        """Move away from who said that it leaves and is in the chain still."""
        leaving, now_s = self._leaving.get(chain.session), self._clock.monotonic_s()
        if leaving is None or chain.broken or not leaving.begun_s + MOVE_RETRY_S <= now_s < leaving.until_s:
            return
        leaving.begun_s = now_s
        for leaver in leaving.nodes.intersection(chain.nodes()):
            self._move(chain, leaver)

    def _keep_up(self, chain: Chain, move: _Move) -> None:
        """Bring a chain that stands by up to date; give it up where it would be lost, or is, with the first one."""
        if move.to.broken:
            self._standbys.shun(move.to)
        if move.to.broken or not set(chain.nodes()).isdisjoint(move.to.nodes()):
            self._stop(chain.session)
        elif len(chain.tokens) - len(move.to.tokens) >= STANDBY_ROWS:
            move.work = self._start(chain, _come_to(move.to, *chain.since(len(move.to.tokens))))

    def superseded(self, chain: Chain) -> bool:
        """For a chain in trouble: whether its move is worth waiting for (`awaited`). Ends it, where it is not."""
        move = self._moves.get(chain.session)
        if move is None:
            return bool(chain.stands_by_for)  # it is given up
        if move.overtook:
            return True
        lost, layers = chain.layers_lost(move.leavers)
        if move.stands_by and not lost:
            return False
        ready = None if _failed(move.work) else move.to.rows_ready()
        rows = len(chain.tokens)
        if ready is not None and supersedes(rows - ready, rows, lost, layers):
            return True
        self._stop(chain.session)
        return False

    def overtaken(self, chain: Chain) -> bool:
        """For a chain that owes a token: whether its move has it, and the token is overdue."""
        move = self._moves.get(chain.session)
        return move is not None and move.overtook

    async def awaited(self, chain: Chain) -> Chain:
        """For a chain that is superseded: the chain to go on with, once its move is ready. The same one when that
        failed."""
        move = self._moves.get(chain.session)
        if move is None:
            return chain
        await asyncio.wait((move.work,))
        if self._moves.get(chain.session) is not move:
            return chain  # it made way meanwhile
        if _succeeded(move.work) and not move.to.broken:
            return self._change_over(chain, move)
        self._stop(chain.session)
        return chain

    def make_room(self, tokens: int) -> bool:
        """Give up chains that stand by, until they had reserved so much together. Whether there were any."""
        freed_tokens = 0
        for session, move in [(session, move) for session, move in self._moves.items() if move.stands_by]:
            if freed_tokens >= tokens:
                break
            freed_tokens += move.to.reserve_tokens
            self._stop(session)
        return freed_tokens > 0

    def standing_by(self) -> int:
        """How many chains stand by, or are about to."""
        return sum(move.stands_by for move in self._moves.values())

    def end(self, chain: Chain) -> bool:
        """The conversation has ended, or goes on with another chain. Whether it was about to move."""
        self._leaving.pop(chain.session, None)
        self.stand_down(chain)
        moving = chain.session in self._moves
        self._stop(chain.session)
        return moving

    def _stop(self, session: SessionId) -> None:
        move = self._moves.pop(session, None)
        if move is not None:
            move.work.cancel()
            self._drop(move.to)
            self._standbys.sought(session)

    async def close(self) -> None:
        """End all."""
        moves, self._moves = list(self._moves.values()), {}
        self._leaving.clear()
        self._standbys.clear()
        for move in moves:
            move.work.cancel()
            self._drop(move.to)
        ending = [move.work for move in moves]
        if self._watching is not None:
            self._watching.cancel()
            ending.append(self._watching)
        await asyncio.gather(*ending, return_exceptions=True)

    def _change_over(self, chain: Chain, move: _Move) -> Chain:
        self._moves.pop(chain.session, None)
        self._standbys.hand_on(chain.session, move.to.session)
        for node in chain.avoided.now():
            move.to.avoid(node)
        self.takeovers += move.stands_by
        how = describe(move.to.hops)
        if move.overtook:
            self._standbys.shun(chain)
            how += f" after {chain.progress.waited_s():.1f} s without a token"
        move.to.stands_by_for = frozenset()
        if move.to.ahead.leave is None:
            move.to.ahead = RunningAhead(chain.ahead.leave)
        move.to.append(*chain.since(len(move.to.tokens)))
        move.to.repairs += chain.repairs + 1
        self._on_event(f"session {chain.session[:8]}: moved to {move.to.session[:8]} over {how}")
        self._drop(chain)
        return move.to

    def _start(self, chain: Chain, work: Coroutine[object, object, None]) -> Work:
        task = asyncio.get_running_loop().create_task(work, name=f"move {chain.session[:8]}")
        task.add_done_callback(partial(self._ended, chain))
        return task

    async def _prepare(self, chain: Chain, to: Chain) -> None:
        tries_end_s = self._clock.monotonic_s() + MOVE_TRIES_S
        while True:
            try:
                await to.establish(leave=chain.ahead.leave)
                break
            except NOT_NOW as error:
                if self._clock.monotonic_s() >= tries_end_s:
                    raise
                if isinstance(error, KvExhausted):
                    to.ask_for_room()
                log.info("session %s: it cannot be moved yet: %s", chain.session[:8], error.message)
                await self._clock.sleep(MOVE_RETRY_S)
        # Who said so before the stage was opened does not say it again.
        for leaver in self._moves[chain.session].leavers.intersection(to.nodes()):
            to.in_trouble(f"{leaver[:8]} leaves as well", leaver, MOVE_TRIES_S)
        await _catch_up(chain, to)

    def _ended(self, chain: Chain, work: Work) -> None:
        """Work has ended. It may be that of a move that is over, or of one that began again since."""
        if not _failed(work):
            return
        error = work.exception()
        move = self._moves.get(chain.session)
        if move is not None and move.work is work:
            if move.stands_by:
                log.info("session %s: no chain stands by: %r", chain.session[:8], error)
                if isinstance(error, NoRoute | KvExhausted):
                    self._standbys.none_idle(move.to)
                else:
                    self._standbys.shun(move.to)
            self._stop(chain.session)
            if not move.stands_by:
                self._on_event(f"session {chain.session[:8]}: it could not be moved: {error}")
        if not isinstance(error, FallowError | Superseded):
            log.error("a move failed inside", exc_info=error)


async def _catch_up(chain: Chain, to: Chain) -> None:
    for _ in range(ROUNDS):
        to.append(*chain.since(len(to.tokens)))
        await to.settle()


async def _come_to(to: Chain, tokens: Sequence[int], phases: Sequence[Phase]) -> None:
    """Have a chain that stands by compute these, too."""
    if not to.hops:
        await to.establish()
    to.append(tokens, phases)
    await to.settle()


def _succeeded(work: Work) -> bool:
    return work.done() and not work.cancelled() and work.exception() is None


def _failed(work: Work) -> bool:
    return work.done() and not work.cancelled() and work.exception() is not None
