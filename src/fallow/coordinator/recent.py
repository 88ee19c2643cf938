"""Sessions that were routed a moment ago and do not show in heartbeats yet.

Without them, sessions that ask within one heartbeat interval would all be sent to the same devices, and more KV room
would be promised than there is. A promise counts until the device has sent a heartbeat that must include it.
"""

from collections.abc import Iterable, Sequence

import msgspec

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.ids import NodeId, SessionId
from fallow.policy.routing import Carrier, ModelShape, kv_bytes

PROMISES_MAX = 16_384


class _Promise(msgspec.Struct, frozen=True):
    session: SessionId
    kv_bytes: int
    made_s: float


class RecentRoutes:
    """Promises by node; at most `PROMISES_MAX` in all, beyond which new ones are not remembered."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._promises: dict[NodeId, dict[SessionId, _Promise]] = {}
        self._count = 0

    def add(self, request: RouteRequest, hops: Iterable[Hop], shape: ModelShape, now_s: float) -> None:
        """Remember a chain that was given out. Kept hops hold the session already."""
        kept = {hop.address.node for hop in request.keep}
        for hop in hops:
            node = hop.address.node
            if node in kept or self._count >= PROMISES_MAX:
                continue
            mine = self._promises.setdefault(node, {})
            self._count += request.session not in mine
            mine[request.session] = _Promise(request.session, kv_bytes(hop.span, request.reserve_tokens, shape), now_s)

    def settle(self, node: NodeId, now_s: float) -> None:
        """A heartbeat came: promises that are old enough are in it, or were never taken up."""
        mine = self._promises.pop(node, {})
        left = {session: promise for session, promise in mine.items() if now_s - promise.made_s < self._settle_s}
        self._count -= len(mine) - len(left)
        if left:
            self._promises[node] = left

    def forget(self, node: NodeId) -> None:
        self._count -= len(self._promises.pop(node, {}))

    def loaded(self, carriers: Sequence[Carrier], asking: SessionId) -> list[Carrier]:
        """The carriers with what was promised added to what they reported, but for the asking session's own."""
        return [self._loaded(carrier, asking) for carrier in carriers]

    def _loaded(self, carrier: Carrier, asking: SessionId) -> Carrier:
        promises = [promise for session, promise in self._promises.get(carrier.node, {}).items() if session != asking]
        if not promises:
            return carrier
        return msgspec.structs.replace(
            carrier,
            sessions=carrier.sessions + len(promises),
            kv_free_bytes=carrier.kv_free_bytes - sum(promise.kv_bytes for promise in promises),
        )
