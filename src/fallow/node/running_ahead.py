"""How a chain goes on without waiting for its gateway: what its last stage says, and what its first one makes of it.

Rules
- The last stage chooses by the gateway's recipe (`policy/sampling.py`), from the distribution that it is about to send,
  and tells the first stage and, with its result, the gateway. It chooses nothing after a token that ends the answer.
- The first stage computes such a token as it would the gateway's, while it is `AHEAD_ROWS` beyond these at most; one
  that comes too soon waits, and there is never more than one.
- The gateway's tokens come as they always did. For a row that is computed already they are the proof: a token that
  differs is noted, for the gateway to hear from whom it came.

A chain that nobody confirms therefore stops by itself. Values only; frames and sessions are the pump's.
"""

from collections import deque
from typing import Generic, TypeVar

from fallow.domain.frames import AHEAD_ROWS, Ahead, Phase, Rows
from fallow.engine.contract import Drawn, Step, Stepped
from fallow.engine.drawing import drawn_token
from fallow.node.activation_log import Buffer

_T = TypeVar("_T")


def next_rows(ahead: Ahead, epoch: int, step: Step, stepped: Stepped) -> tuple[Rows, bytes] | None:
    """What the first stage is told after a step of the last one: header and payload of one token. `None` for a step
    after which nothing is known, or nothing is to come."""
    position = step.position + step.count
    if not ahead.drawn_from <= position < ahead.until:
        return None
    token = drawn_token(stepped, Drawn(recipe=ahead.recipe, nth=position - ahead.drawn_from, ends=ahead.ends))
    if token is None:
        return None
    rows = Rows(
        session=ahead.first_session, epoch=epoch, position=position, count=1, phase=Phase.DECODE,
        logits_from=position, top_k=step.top_k,
    )  # fmt: skip
    return rows, token


class Told(Generic[_T]):
    """What a first stage was told by the last, until the gateway says the same. `_T`: a frame that waits."""

    def __init__(self, confirmed: int = 0) -> None:
        """`confirmed`: so many rows are the gateway's own."""
        self._confirmed = confirmed
        self._tokens: deque[tuple[int, bytes]] = deque()
        self._early: tuple[int, _T] | None = None

    def may_compute(self, rows: Rows, payload: Buffer, position: int, item: _T) -> bool:
        """Whether the last stage's rows are the next to be computed, by a stage at `position`. What is too early is
        kept for `due`; what is of no use is forgotten."""
        if rows.count != 1 or rows.phase is not Phase.DECODE or rows.position != position:
            return False
        if self.beyond(position) >= AHEAD_ROWS:
            self._early = position, item
            return False
        self._tokens.append((position, bytes(payload)))
        return True

    def beyond(self, position: int) -> int:
        """How many rows a stage at `position` is beyond the gateway's."""
        return position - self._confirmed

    def confirm(self, rows: Rows, payload: Buffer) -> bool:
        """The gateway's tokens from `rows.position` on. Whether they are what was computed, where that was before."""
        end = rows.position + rows.count
        self._confirmed = max(self._confirmed, end)
        same = True
        while self._tokens and self._tokens[0][0] < end:
            position, token = self._tokens.popleft()
            at = 4 * (position - rows.position)
            same = same and (at < 0 or token == bytes(payload[at : at + 4]))
        return same

    def due(self) -> _T | None:
        """What waited and need not any more."""
        if self._early is None or self.beyond(self._early[0]) >= AHEAD_ROWS:
            return None
        (_, item), self._early = self._early, None
        return item
