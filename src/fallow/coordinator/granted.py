"""Chains with the grants to open them: what a coordinator may not sign, it does not give.

Who signs is `trust/grants.py`'s. A request whose sender is not known gets a chain without grants, which opens nothing
where grants are asked for.
"""

import msgspec

from fallow.coordinator.registry import Fleet, ready_stage
from fallow.coordinator.roll import Roll
from fallow.domain.charter import Standing
from fallow.domain.errors import GrantRefused, NotWorking
from fallow.domain.fleet import Hop, RouteReply, RouteRequest
from fallow.domain.ids import Digest
from fallow.trust.contract import GrantIssuer, Lease


def refusal(lease: Lease) -> RouteReply | None:
    """The answer to every request while this coordinator may not work; `None` while it may."""
    standing = lease.standing
    return None if standing is Standing.WORKING else RouteReply(error=lease.why, code=standing)


def without_strangers(request: RouteRequest, roll: Roll, fleet: Fleet) -> RouteRequest:
    """The request without hops to keep that it would not be given: a gateway's word makes no device count, and none
    hold what it does not report. One that was not heard of yet is believed to, if its tier is enough."""
    if not request.keep:
        return request
    keep = tuple(hop for hop in request.keep if _may_keep(hop, request.model, roll, fleet))
    return msgspec.structs.replace(request, keep=keep)


def _may_keep(hop: Hop, model: Digest, roll: Roll, fleet: Fleet) -> bool:
    heartbeat = fleet.present().get(hop.address.node)
    if not roll.counts(hop.address.node, heartbeat):
        return False
    if heartbeat is None:
        return True
    ready = ready_stage(heartbeat, model)
    return ready is not None and any(run.covers(hop.span) for run in ready.stage.spans())


def granted(reply: RouteReply, request: RouteRequest, issuer: GrantIssuer) -> RouteReply:
    """A chain of this cell's devices with a grant for each, or why there is none."""
    if not reply.hops or request.origin is None:
        return reply
    try:
        return msgspec.structs.replace(reply, grants=issuer.issue(request, request.origin, reply.hops))
    except NotWorking as error:
        return RouteReply(error=error.message, code=error.standing)
    except GrantRefused as error:
        return RouteReply(error=error.message, code=error.code)
