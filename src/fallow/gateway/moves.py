"""Moves conversations off devices that are about to leave, while these still answer: make before break.

Rules
- A move is a second session on another chain, without the leaving devices, that computes all that was said so far; the
  conversation changes over between two tokens, and the old session is freed everywhere.
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
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError, KvExhausted
from fallow.domain.ids import NodeId, SessionId
from fallow.gateway.chain import Chain
from fallow.gateway.contract import NOT_NOW
from fallow.gateway.flows import describe
from fallow.policy.recovery import supersedes

ROUNDS: Final = 2
"""First everything that was said, then what was said meanwhile; what is missing then comes with the next token."""
MOVE_RETRY_S: Final = 0.5
"""How soon a move is tried again. A repair, for which a client waits, is more eager."""
MOVE_TRIES_S: Final = 30.0
"""For how long. A leaving device is gone by then, or has stayed after all."""

log = logging.getLogger(__name__)

Work = asyncio.Task[None]


class _Move(msgspec.Struct):
    to: Chain
    leavers: set[NodeId]
    work: Work


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

    def _move(self, chain: Chain, leaver: NodeId) -> None:
        move = self._moves.get(chain.session)
        if move is None:
            to = self._make(chain)
            move = _Move(to, set(), self._start(chain, self._prepare(chain, to)))
            self._moves[chain.session] = move
        move.leavers.add(leaver)
        move.to.avoid(leaver, MOVE_TRIES_S)

    def newest(self, chain: Chain) -> Chain:
        """The chain to go on with between two tokens: the other one as soon as it is ready."""
        move = self._moves.get(chain.session)
        if move is None:
            self._move_after_all(chain)
            return chain
        if not _succeeded(move.work):
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

    def superseded(self, chain: Chain) -> bool:
        """For a chain in trouble: whether its move is worth waiting for (`awaited`). Ends it, where it is not."""
        move = self._moves.get(chain.session)
        if move is None:
            return False
        ready = None if _failed(move.work) else move.to.rows_ready()
        rows = len(chain.tokens)
        if ready is not None and supersedes(rows - ready, rows, *chain.layers_lost(move.leavers)):
            return True
        self._stop(chain)
        return False

    async def awaited(self, chain: Chain) -> Chain:
        """For a chain that is superseded: the chain to go on with, once its move is ready. The same one when that
        failed."""
        move = self._moves.get(chain.session)
        if move is None:
            return chain
        await asyncio.wait((move.work,))
        if _succeeded(move.work) and not move.to.broken:
            return self._change_over(chain, move)
        self._stop(chain)
        return chain

    def end(self, chain: Chain) -> bool:
        """The conversation has ended, or goes on with another chain. Whether a move was under way."""
        self._leaving.pop(chain.session, None)
        return self._stop(chain)

    def _stop(self, chain: Chain) -> bool:
        move = self._moves.pop(chain.session, None)
        if move is None:
            return False
        move.work.cancel()
        self._drop(move.to)
        return True

    async def close(self) -> None:
        """End all."""
        moves, self._moves = list(self._moves.values()), {}
        self._leaving.clear()
        for move in moves:
            move.work.cancel()
            self._drop(move.to)
        await asyncio.gather(*(move.work for move in moves), return_exceptions=True)

    def _change_over(self, chain: Chain, move: _Move) -> Chain:
        self._moves.pop(chain.session, None)
        move.to.append(*chain.since(len(move.to.tokens)))
        move.to.repairs += chain.repairs + 1
        self._on_event(f"session {chain.session[:8]}: moved to {move.to.session[:8]} over {describe(move.to.hops)}")
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
            self._stop(chain)
            self._on_event(f"session {chain.session[:8]}: it could not be moved: {error}")
        if not isinstance(error, FallowError):
            log.error("a move failed inside", exc_info=error)


async def _catch_up(chain: Chain, to: Chain) -> None:
    for _ in range(ROUNDS):
        to.append(*chain.since(len(to.tokens)))
        await to.settle()


def _succeeded(work: Work) -> bool:
    return work.done() and not work.cancelled() and work.exception() is None


def _failed(work: Work) -> bool:
    return work.done() and not work.cancelled() and work.exception() is not None
