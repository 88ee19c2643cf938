"""Devices that this gateway could not reach a moment ago: what one session found out, the others need not.

Rules
- Only what this gateway saw itself counts: a link that ended, a dial that nobody answered. What a device says about
  another one concerns the session in which it says so, and no other.
- It is a hint, and ends after `LOST_S` or with a new link. A session that finds no chain without these devices tries
  them.
- At most `LOST_MAX` devices; the oldest are forgotten first.
"""

import logging
from collections.abc import Sequence
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import KvExhausted, NoRoute
from fallow.domain.fleet import Hop
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.fabric.peers import Peers
from fallow.gateway.contract import Router

LOST_S: Final = 8.0
"""Longer than the coordinator takes to notice, so that a lost device is not dialled again meanwhile."""
LOST_MAX: Final = 256

log = logging.getLogger(__name__)


class Avoided:
    """Devices that one session leaves out for a while, each for its own reason."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[NodeId, float] = {}

    def note(self, node: NodeId, for_s: float) -> None:
        """Leave it out for so long from now on."""
        self._until_s[node] = self._clock.monotonic_s() + for_s

    def now(self) -> frozenset[NodeId]:
        """Those that are left out now."""
        now_s = self._clock.monotonic_s()
        self._until_s = {node: until_s for node, until_s in self._until_s.items() if until_s > now_s}
        return frozenset(self._until_s)


class LostDevices:
    """Shared by all chains of a gateway."""

    def __init__(self, peers: Peers, clock: Clock) -> None:
        self._peers = peers
        self._clock = clock
        self._until_s: dict[NodeId, float] = {}

    def note(self, node: NodeId) -> None:
        """It was not reached, or its link is gone."""
        self._until_s.pop(node, None)
        self._until_s[node] = self._clock.monotonic_s() + LOST_S
        if len(self._until_s) > LOST_MAX:
            del self._until_s[next(iter(self._until_s))]

    def now(self) -> frozenset[NodeId]:
        """Those that count as lost now."""
        if not self._until_s:
            return frozenset()
        now_s = self._clock.monotonic_s()
        here = self._peers.connected()
        self._until_s = {n: until_s for n, until_s in self._until_s.items() if until_s > now_s and n not in here}
        return frozenset(self._until_s)


class CarefulRouter:
    """`Router` that leaves lost devices out where it can."""

    def __init__(self, router: Router, lost: LostDevices) -> None:
        self._router = router
        self._lost = lost

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        lost = self._lost.now()
        if not lost <= exclude:
            apart = [hop for hop in keep if hop.address.node not in lost]
            without = exclude | lost
            try:
                return await self._router.route(model, session, reserve_tokens, without, apart, rebuild_tokens, spare)
            except (NoRoute, KvExhausted) as error:
                log.debug("no chain without the %d devices that were lost: %s", len(lost), error.message)
        return await self._router.route(model, session, reserve_tokens, exclude, keep, rebuild_tokens, spare)
