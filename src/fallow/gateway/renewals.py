"""Renews the grants of conversations that outlast them.

Rules
- A chain's grants are renewed `RENEW_BEFORE_S` before they end: the coordinator is asked for the same chain again, and
  what it gives goes to the devices as `RenewGrant`. Nothing stops meanwhile.
- Where the coordinator gives another chain, or none, it is asked again a while later. A chain that is not renewed in
  time ends at its devices, and is repaired like any other.
- One renewal of a chain at a time.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError
from fallow.domain.fleet import Hop
from fallow.domain.frames import Frame, RenewGrant
from fallow.domain.grants import GRANT_LIFE_S
from fallow.domain.ids import NodeId, SessionId
from fallow.domain.model import Span
from fallow.fabric.peers import Peers
from fallow.gateway.chain import Chain
from fallow.gateway.contract import Router
from fallow.policy.rights import RENEW_BEFORE_S

RETRY_S: Final = 10.0

log = logging.getLogger(__name__)


class Renewals:
    """All renewals of a gateway."""

    def __init__(self, router: Router, peers: Peers, clock: Clock) -> None:
        self._router = router
        self._peers = peers
        self._clock = clock
        self._under_way: dict[SessionId, asyncio.Task[None]] = {}
        self._tried_s: dict[SessionId, float] = {}

    def look(self, chains: Iterable[Chain]) -> None:
        """Begin what is due. To be called every second or so."""
        now_s = self._clock.monotonic_s()
        self._tried_s = {session: at_s for session, at_s in self._tried_s.items() if now_s - at_s < RETRY_S}
        for chain in chains:
            due = now_s - chain.granted_s >= GRANT_LIFE_S - RENEW_BEFORE_S
            if due and not chain.broken and chain.hops and all(hop.grant for hop in chain.hops):
                self._begin(chain, now_s)

    def _begin(self, chain: Chain, now_s: float) -> None:
        if chain.session in self._tried_s or chain.session in self._under_way:
            return
        self._tried_s[chain.session] = now_s
        task = asyncio.get_running_loop().create_task(self._renew(chain), name=f"renewal {chain.session[:8]}")
        self._under_way[chain.session] = task
        task.add_done_callback(lambda _: self._under_way.pop(chain.session, None))

    async def _renew(self, chain: Chain) -> None:
        before = chain.hops
        try:
            after = await self._router.route(
                chain.model, chain.session, chain.reserve_tokens, frozenset(), before, rebuild_tokens=0
            )
        except FallowError as error:
            log.info("session %s: its grants could not be renewed yet: %s", chain.session[:8], error)
            return
        same = [_stage(hop) for hop in before] == [_stage(hop) for hop in after]
        if not same or chain.hops is not before:
            return
        chain.hops = after
        for hop, (node, session) in zip(after, chain.stages(), strict=True):
            self._peers.post(node, Frame(RenewGrant(session=session, grant=hop.grant)))
        chain.granted_s = self._clock.monotonic_s()

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stage(hop: Hop) -> tuple[NodeId, int, Span]:
    return hop.address.node, hop.visit, hop.span
