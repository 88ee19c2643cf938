"""Sessions that were routed a moment ago and do not show in heartbeats yet.

Without them, sessions that ask within one heartbeat interval would all be sent to the same devices, and more KV room
would be promised than there is. A promise counts until the device has sent a heartbeat that must include it.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.ids import NodeId, SessionId
from fallow.policy.routing import Carrier, ModelShape, kv_bytes
from fallow.policy.routing_choice import NOTHING_PROMISED, Promised

PROMISES_MAX = 16_384


class _Promise(msgspec.Struct, frozen=True):
    kv_bytes: int
    made_s: float


class _Node:
    """The promises on one node, with their sums."""

    __slots__ = ("by_session", "total")

    def __init__(self) -> None:
        self.by_session: dict[SessionId, _Promise] = {}
        self.total = NOTHING_PROMISED

    def promise(self, session: SessionId, promise: _Promise) -> None:
        before = self.by_session.get(session)
        self.by_session[session] = promise
        room = self.total.kv_bytes + promise.kv_bytes - (before.kv_bytes if before else 0)
        self.total = Promised(len(self.by_session), room)

    def keep(self, left: dict[SessionId, _Promise]) -> None:
        self.by_session = left
        self.total = Promised(len(left), sum(promise.kv_bytes for promise in left.values()))


class RecentRoutes:
    """Promises by node; at most `PROMISES_MAX` in all, beyond which new ones are not remembered."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._nodes: dict[NodeId, _Node] = {}
        self._count = 0

    def add(self, request: RouteRequest, hops: Iterable[Hop], shape: ModelShape, now_s: float) -> None:
        """Remember a chain that was given out. Kept hops hold the session already; a further stage on the device of one
        takes room of its own."""
        kept = {(hop.address.node, hop.visit) for hop in request.keep}
        for hop in hops:
            name = hop.address.node
            if (name, hop.visit) in kept or self._count >= PROMISES_MAX:
                continue
            node = self._nodes.setdefault(name, _Node())
            before = node.by_session.get(request.session)
            self._count += before is None
            room = kv_bytes(hop.span, request.reserve_tokens, shape)
            if hop.visit and before is not None:
                room += before.kv_bytes
            node.promise(request.session, _Promise(room, now_s))

    def settle(self, node: NodeId, now_s: float) -> None:
        """A heartbeat came: promises that are old enough are in it, or were never taken up."""
        mine = self._nodes.get(node)
        if mine is None:
            return
        left = {
            session: promise for session, promise in mine.by_session.items() if now_s - promise.made_s < self._settle_s
        }
        self._count -= len(mine.by_session) - len(left)
        mine.keep(left)
        if not left:
            del self._nodes[node]

    def forget(self, node: NodeId) -> None:
        mine = self._nodes.pop(node, None)
        self._count -= len(mine.by_session) if mine else 0

    def promised(self, asking: SessionId) -> Callable[[NodeId], Promised]:
        """What is promised on a node, but for the asking session's own."""

        def on(node: NodeId) -> Promised:
            mine = self._nodes.get(node)
            if mine is None:
                return NOTHING_PROMISED
            own = mine.by_session.get(asking)
            if own is None:
                return mine.total
            return Promised(mine.total.sessions - 1, mine.total.kv_bytes - own.kv_bytes)

        return on

    def loaded(self, carriers: Sequence[Carrier], asking: SessionId) -> list[Carrier]:
        """The carriers with what was promised added to what they reported, but for the asking session's own."""
        promised = self.promised(asking)
        return [self._loaded(carrier, promised(carrier.node)) for carrier in carriers]

    def _loaded(self, carrier: Carrier, promised: Promised) -> Carrier:
        if promised is NOTHING_PROMISED:
            return carrier
        return msgspec.structs.replace(
            carrier,
            sessions=carrier.sessions + promised.sessions,
            kv_free_bytes=carrier.kv_free_bytes - promised.kv_bytes,
        )
