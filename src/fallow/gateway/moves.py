"""Moves conversations off devices that are about to leave, while these still answer: make before break.

Rules
- A move is a second session on another chain, without the leaving device, that computes all that was said so far; the
  conversation changes over between two tokens, and the old session is freed everywhere.
- At most one move for a conversation at a time. One that fails, for lack of room or of other devices, ends in a repair
  of the old chain, which costs a pause; so does a device that goes before its sessions have moved.
- A conversation that ends meanwhile ends its move, and keeps no cache on a chain that is about to break.
"""

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from fallow.domain.errors import FallowError
from fallow.domain.ids import NodeId, SessionId
from fallow.gateway.chain import Chain

ROUNDS: Final = 2
"""First everything that was said, then what was said meanwhile; what is missing then comes with the next token."""


class _Move(NamedTuple):
    leaver: NodeId
    to: Chain
    work: "asyncio.Task[None]"


class Moves:
    """All moves of a gateway, by the session that is left. `make` makes a chain, `drop` frees one."""

    def __init__(
        self, make: Callable[[Chain], Chain], drop: Callable[[Chain], None], on_event: Callable[[str], None]
    ) -> None:
        self._make = make
        self._drop = drop
        self._on_event = on_event
        self._moves: dict[SessionId, _Move] = {}

    def begin(self, chain: Chain, leaver: NodeId) -> bool:
        """Begin to move away from a device that leaves. False when the chain is on the move already."""
        if chain.session in self._moves:
            return False
        to = self._make(chain)
        to.avoid(leaver)
        work = asyncio.get_running_loop().create_task(self._prepare(chain, to), name=f"move {chain.session[:8]}")
        self._moves[chain.session] = _Move(leaver, to, work)
        work.add_done_callback(lambda _: self._prepared(chain))
        return True

    def newest(self, chain: Chain) -> Chain:
        """The chain to go on with: the other one as soon as it is ready."""
        move = self._moves.get(chain.session)
        if move is None:
            return chain
        if chain.repairs and move.leaver not in chain.nodes():
            self.end(chain)  # the chain was repaired meanwhile
            return chain
        if not move.work.done():
            return chain
        del self._moves[chain.session]
        move.to.append(*chain.since(len(move.to.tokens)))
        move.to.repairs += chain.repairs + 1
        self._on_event(f"session {chain.session[:8]}: moved to {move.to.session[:8]} over {move.to.describe()}")
        self._drop(chain)
        return move.to

    def end(self, chain: Chain) -> bool:
        """The conversation has ended or was repaired. Whether a move was under way."""
        move = self._moves.pop(chain.session, None)
        if move is None:
            return False
        move.work.cancel()
        self._drop(move.to)
        return True

    async def _prepare(self, chain: Chain, to: Chain) -> None:
        await to.establish()
        for _ in range(ROUNDS):
            to.append(*chain.since(len(to.tokens)))
            await to.settle()

    def _prepared(self, chain: Chain) -> None:
        move = self._moves.get(chain.session)
        if move is None or move.work.cancelled():
            return
        error = move.work.exception()
        if error is None:
            return
        self.end(chain)
        chain.in_trouble(f"leaving, and it could not be moved: {error}", move.leaver)
        if not isinstance(error, FallowError):
            raise error
