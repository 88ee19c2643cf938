"""`Router` over the bus: asks the coordinator that leads, and puts each device's grant to its hop.

Rules
- Nothing is asked while this gateway may not work. A coordinator that may not says so, in the council's words.
- A kept hop is named without its grant: the coordinator gives new ones for the whole chain.
- Whose numbers were refused here goes with the next request (`accusations.py`).
- A route is what a coordinator signed: a hop whose grant is not for it, and for us, is not dialled. An answer that
  cannot be read, or is not signed, is no route, and ends nothing: whoever asked may ask again.
"""

from collections.abc import Sequence

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.errors import FallowError, GrantRefused, KvExhausted, NoRoute, NotWorking
from fallow.domain.fleet import Hop, RouteReply, RouteRequest, Subjects
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.gateway.accusations import Accusations
from fallow.gateway.questions import Questions
from fallow.trust.contract import Lease, Routes
from fallow.trust.grants import require_working


class BusRouter:
    """`Router` over the bus."""

    def __init__(
        self, questions: Questions, subjects: Subjects, origin: NodeId, lease: Lease, routes: Routes,
        accusations: Accusations,
    ) -> None:  # fmt: skip
        self._questions = questions
        self._subjects = subjects
        self._origin = origin
        self._lease = lease
        self._routes = routes
        self._accusations = accusations

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        """As `Router` says."""
        require_working(self._lease)
        accused = self._accusations.waiting()
        request = RouteRequest(
            model=model,
            session=session,
            reserve_tokens=reserve_tokens,
            exclude=tuple(sorted(exclude)),
            keep=tuple(msgspec.structs.replace(hop, grant=b"") for hop in keep),
            origin=self._origin,
            rebuild_tokens=rebuild_tokens,
            accused=accused,
            spare=spare,
        )
        answer = await self._questions.ask(self._subjects.route(self._origin), msgspec.json.encode(request))
        self._accusations.told(accused)
        try:
            reply = msgspec.json.decode(answer, type=RouteReply)
        except msgspec.DecodeError as error:
            raise NoRoute(f"The coordinator's answer cannot be read: {error}") from error
        if not reply.hops:
            raise _refusal(reply)
        grants = reply.grants or (b"",) * len(reply.hops)
        if len(grants) != len(reply.hops):
            raise NoRoute(f"The coordinator gave {len(grants)} grants for {len(reply.hops)} devices.")
        try:
            for hop, leave in zip(reply.hops, grants, strict=True):
                self._routes.check(request, hop, leave)
        except GrantRefused as error:
            raise NoRoute(f"What came as a chain is not what a coordinator signed: {error.message}") from error
        return tuple(msgspec.structs.replace(hop, grant=leave) for hop, leave in zip(reply.hops, grants, strict=True))


def _refusal(reply: RouteReply) -> FallowError:
    words = reply.error or "No devices that are here can serve this model."
    if reply.code == KvExhausted.code:
        return KvExhausted(words)
    if reply.code == GrantRefused.code:
        return GrantRefused(words)
    return NotWorking(words, reply.code) if reply.code in set(Standing) else NoRoute(words)
