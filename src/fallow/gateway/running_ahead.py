"""What a chain computes before its gateway has asked: which tokens it went on with, and results that came early.

Rules
- A chain may run ahead when all that its gateway's choices depend on can be told in advance (`Leave`).
- The gateway chooses every token itself, from the same distribution, and sends it as ever. An early result counts when
  the gateway has chosen just the token that the chain went on with; otherwise the chain is taken back to that token.
- A chain that went on with another token `MISSES_MAX` times does not run ahead any more.

What devices do is `node/running_ahead.py`'s. Values only.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from fallow.domain.fleet import Hop
from fallow.domain.frames import AHEAD_ROWS, Ahead, Result
from fallow.domain.ids import SessionId
from fallow.domain.sampling import Recipe
from fallow.gateway.flows import stage_of
from fallow.gateway.results import Payload

MISSES_MAX: Final = 2
MISSED: Final = "it ran ahead with another token"


class Leave(msgspec.Struct, frozen=True, kw_only=True):
    """What a chain is told of the answer that it may run ahead with. Fields as in `frames.Ahead`."""

    recipe: Recipe
    drawn_from: int
    until: int
    ends: tuple[int, ...]


def leave_for(recipe: Recipe, top_k: int | None, prompt: int, total: int, ends: Sequence[int]) -> Leave | None:
    """For an answer of `total - prompt` tokens at most, of which the last one is chosen and never computed. `top_k`:
    how many candidates there are; a chain does not choose from whole vocabularies."""
    if top_k is None or total - 1 <= prompt:
        return None
    if recipe.top_k is not None and recipe.top_k >= top_k:
        recipe = msgspec.structs.replace(recipe, top_k=None)
    return Leave(recipe=recipe, drawn_from=prompt, until=total - 1, ends=tuple(ends))


class RunningAhead:
    """Of one chain and one answer."""

    def __init__(self, leave: Leave | None = None) -> None:
        self._leave = leave
        self._misses = 0
        self._given = False
        """Whether the chain, as it was opened last, may run ahead."""
        self._chosen: dict[int, int] = {}
        """By position."""
        self._early: dict[int, tuple[Result, Payload]] = {}
        """By the position that the result leads up to."""

    def told(self, session: SessionId, hops: Sequence[Hop]) -> Ahead | None:
        """What the last stage of a chain is told, now that it is opened."""
        leave = self.leave
        self._given = leave is not None
        if leave is None:
            return None
        _, first_session = stage_of(session, hops[0])
        return Ahead(
            first=hops[0].address,
            first_session=first_session,
            recipe=leave.recipe,
            drawn_from=leave.drawn_from,
            until=leave.until,
            ends=leave.ends,
        )

    @property
    def leave(self) -> Leave | None:
        """What a chain may run ahead with that is opened now."""
        return None if self._misses >= MISSES_MAX else self._leave

    @property
    def untold(self) -> bool:
        """Whether the chain may run ahead, and was opened before it might."""
        return self.leave is not None and not self._given

    def note(self, result: Result, payload: Payload, tokens: int) -> None:
        """A new result came, of a conversation with so many tokens. It is kept when it is early, and not too early."""
        end = result.position + result.count
        if not self._given or self._leave is None or end < self._leave.drawn_from or end > tokens + AHEAD_ROWS:
            return
        if result.chosen is not None and result.logit_count:
            self._chosen[end] = result.chosen
        if end > tokens and result.count == result.logit_count == 1 and len(payload) == _row_bytes(result):
            self._early[end] = result, payload

    def differs(self, position: int, token: int) -> bool:
        """Whether the chain went on with another token than this, which the gateway chose."""
        return self._chosen.pop(position, token) != token

    def early(self, tokens: int) -> tuple[Result, Payload] | None:
        """The result that leads up to the last of so many tokens, when it is here. Those before it are of no use."""
        for end in [end for end in self._early if end < tokens]:
            del self._early[end]
        return self._early.pop(tokens, None)

    def missed(self) -> None:
        """The chain went on with another token, and all that came since is void."""
        self._misses += 1
        self.forget()

    def forget(self) -> None:
        """The chain is to be opened again, or to rest."""
        self._given = False
        self._chosen.clear()
        self._early.clear()


def _row_bytes(result: Result) -> int | None:
    """How large the payload of a single row is."""
    return None if result.k is None else 8 * result.k
