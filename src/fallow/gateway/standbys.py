"""For which conversations another chain is to stand by, and when one may be sought.

Rules
- After one was sought, or given up, the next is sought `STANDBY_RETRY_S` later: who was given room has it by then.
- Where no idle devices were found for so many tokens of a model, nobody seeks them for as many or more for as long.
- Devices with which one came to nothing, or that kept an answer waiting, are left out of the next ones for a while.

Bookkeeping only; what stands by is `moves.py`'s. Bounded by the conversations that go on, the models that are served,
and the devices of a few seconds.
"""

from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.gateway.chain import Chain
from fallow.gateway.lost_devices import Avoided
from fallow.gateway.progress import AVOID_STALLED_S

STANDBY_ROWS: Final = 8
"""So many tokens behind, a chain that stands by is brought up to date: a row among eight costs the devices a third of
a row by itself, and eight are computed within the time that it takes to notice a loss."""
STANDBY_RETRY_S: Final = 5.0


class _NoneIdle(msgspec.Struct, frozen=True):
    tokens: int
    until_s: float


class Standbys:
    """Of one gateway."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due_s: dict[SessionId, float] = {}
        self._none_idle: dict[Digest, _NoneIdle] = {}
        self._shunned = Avoided(clock)

    def __len__(self) -> int:
        return len(self._due_s)

    def want(self, session: SessionId) -> None:
        """One is to stand by from now on until `forget`."""
        self._due_s[session] = self._clock.monotonic_s()

    def forget(self, session: SessionId) -> None:
        """None is wanted any more, if one was."""
        self._due_s.pop(session, None)

    def clear(self) -> None:
        """None is wanted by anybody."""
        self._due_s.clear()

    def hand_on(self, session: SessionId, to: SessionId) -> None:
        """The conversation goes on with this chain. What took a device of the other may have broken more, which are
        repaired first."""
        if session in self._due_s:
            self.want(to)
            self.sought(to)

    def due(self, chain: Chain) -> bool:
        """Whether one is to be sought now."""
        now_s, none_idle = self._clock.monotonic_s(), self._none_idle.get(chain.model)
        if now_s < self._due_s.get(chain.session, now_s + 1):
            return False
        return none_idle is None or now_s >= none_idle.until_s or chain.reserve_tokens < none_idle.tokens

    def shunned(self) -> frozenset[NodeId]:
        """Devices to leave out."""
        return self._shunned.now()

    def sought(self, session: SessionId) -> None:
        """One is being made, or was given up."""
        if session in self._due_s:
            self._due_s[session] = self._clock.monotonic_s() + STANDBY_RETRY_S

    def shun(self, chain: Chain) -> None:
        """This one broke, could not be opened, or was late."""
        for node in chain.avoided.now() or chain.nodes():
            self._shunned.note(node, AVOID_STALLED_S)

    def none_idle(self, chain: Chain) -> None:
        """There were no idle devices for one."""
        until_s = self._clock.monotonic_s() + STANDBY_RETRY_S
        self._none_idle[chain.model] = _NoneIdle(chain.reserve_tokens, until_s)
