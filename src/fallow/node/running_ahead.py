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
from typing import Final, Generic, TypeVar

import msgspec

from fallow.domain.frames import AHEAD_ROWS, Ahead, Phase, Rows
from fallow.engine.contract import Drawn, Step, Stepped
from fallow.engine.drawing import drawn_token
from fallow.node.activation_log import Buffer

_T = TypeVar("_T")
TOKEN_BYTES: Final = 4


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
    """What a first stage was told by the last, until the gateway says the same. `_T`: a frame that waits.

    Of what the last stage sent, position and token count alone; the rest of the row is the gateway's.
    """

    def __init__(self, confirmed: int = 0) -> None:
        """`confirmed`: so many rows are the gateway's own."""
        self.confirmed = confirmed
        self._tokens: deque[tuple[int, bytes]] = deque()
        self._early: tuple[int, _T] | None = None
        self._top_k: int | None = None

    def next(self, rows: Rows, payload: Buffer, position: int, item: _T) -> Rows | None:
        """The row to compute for what the last stage told, by a stage at `position`; `None` when it is not the next.
        What is too early is kept for `due`; what is of no use, or the gateway has said itself, is forgotten."""
        one = rows.count == 1 and len(payload) == TOKEN_BYTES and rows.phase is Phase.DECODE
        if not one or rows.position != position or position < self.confirmed or self._top_k is None:
            return None
        if self.beyond(position) >= AHEAD_ROWS:
            self._early = position, item
            return None
        self._tokens.append((position, bytes(payload)))
        return msgspec.structs.replace(rows, logits_from=position, top_k=self._top_k)

    def beyond(self, position: int) -> int:
        """How many rows a stage at `position` is beyond the gateway's."""
        return position - self.confirmed

    def confirm(self, rows: Rows, payload: Buffer) -> int | None:
        """The gateway's tokens from `rows.position` on, which may come more than once. Where they differ from what was
        computed, the position of the first that does. After a gap they prove nothing."""
        end = rows.position + rows.count
        self._top_k = rows.top_k
        if rows.position > self.confirmed:
            return None
        while self._tokens and self._tokens[0][0] < end:
            position, token = self._tokens[0]
            at = TOKEN_BYTES * (position - rows.position)
            if token != bytes(payload[at : at + TOKEN_BYTES]):
                self.confirmed = position
                return position
            self._tokens.popleft()
        self.confirmed = max(self.confirmed, end)
        return None

    def due(self) -> _T | None:
        """What waited and need not any more."""
        if self._early is None or self.beyond(self._early[0]) >= AHEAD_ROWS:
            return None
        (_, item), self._early = self._early, None
        return item
