"""Attacks on sessions that come to a device twice: each stage has a name, and rows go from name to name.

A real agent on virtual time, real passports and signatures.
"""

from pathlib import Path

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.frames import Ahead, Fault, OpenStage, PeerAddress, Refused, Result, Rows
from fallow.domain.ids import SessionId, at_visit
from fallow.domain.sampling import Recipe
from fallow.trust.grants import Issuer
from fallow.trust.keys import Identity
from tests.unit.node.rights_world import BUDGET, SESSION, WHOLE, World, flow, passport_of_coordinator, rows, run
from tests.unit.trust.grant_world import GATEWAY, NODE, STRANGER, SwitchedLease, author

FOREIGN = SessionId("2" + "3" * 31)
"""A session of the attacker's own, by a name that no visit of the other has."""


def opening(world: World, gateway: Identity, session: SessionId, visit: int = 0) -> OpenStage:
    """With a grant that a coordinator gave to that gateway for a session of that name."""
    lease = SwitchedLease()
    assert lease.charter is not None
    lease.charter = msgspec.structs.replace(lease.charter, models=frozenset({world.entry.model}))
    asked = RouteRequest(model=world.entry.model, session=session, reserve_tokens=BUDGET)
    hop = Hop(address=PeerAddress(NODE.node, ()), span=WHOLE, visit=visit)
    (grant,) = Issuer(author(world.clock, text=passport_of_coordinator()), lease).issue(asked, gateway.node, (hop,))
    return msgspec.structs.replace(world.opening(grant), session=at_visit(session, visit))


def test_a_gateway_opens_a_further_visit_of_another_gateways_session(tmp_path: Path) -> None:
    """
    Attack: a gateway that learnt the name of another's session gets a grant for a visit of it, to feed it from here.
    Expected: refused: whoever holds one visit of a session on a device is the only one to open others.
    Unharmed: the session goes on, and its own gateway opens that visit.
    """

    async def script(world: World) -> None:
        owner = await world.party()
        await owner.say(opening(world, GATEWAY, SESSION), flow())
        attacker = await world.party(STRANGER, Role.GATEWAY)
        for visit in (1, 15):
            (refused,) = await attacker.say(opening(world, STRANGER, SESSION, visit))
            assert isinstance(refused, Refused) and refused.code == "unknown_session"
        (result,) = await owner.say(rows(0, BUDGET))
        assert isinstance(result, Result)
        assert not any(isinstance(header, Refused) for header in await owner.say(opening(world, GATEWAY, SESSION, 1)))
        assert world.agent.relay.session_count == 2

    run(tmp_path, script)


def test_a_gateway_has_a_device_feed_rows_to_another_gateways_session(tmp_path: Path) -> None:
    """
    Attack: a gateway names another's session as its own's next stage, or as the first one of a chain that runs ahead,
    so that rows come to it from a trusted device.
    Expected: told that rows go on in their own session alone; none is computed and none leaves.
    Unharmed: the other session's rows are computed from its own feed, as if nothing had happened.
    """

    async def script(world: World) -> None:
        owner = await world.party()
        # The worst case for the owner: its stage here is fed by this very device.
        await owner.say(opening(world, GATEWAY, SESSION), msgspec.structs.replace(flow(), previous=NODE.node))
        attacker = await world.party(STRANGER, Role.GATEWAY)
        onward = msgspec.structs.replace(flow(), session=FOREIGN, next=world.address, next_session=SESSION)
        fed: Rows = msgspec.structs.replace(rows(0, 3), session=FOREIGN)
        (fault,) = [
            header
            for header in await attacker.say(opening(world, STRANGER, FOREIGN), onward, fed)
            if isinstance(header, Fault)
        ]
        assert (fault.session, fault.code) == (FOREIGN, "unknown_session")
        ahead = Ahead(first=world.address, first_session=SESSION, recipe=Recipe(), drawn_from=0, until=BUDGET, ends=())
        (fault,) = [
            header
            for header in await attacker.say(msgspec.structs.replace(flow(), session=FOREIGN, ahead=ahead), fed)
            if isinstance(header, Fault)
        ]
        assert (fault.session, fault.code) == (FOREIGN, "unknown_session"), "nor may it be told what comes next"
        assert world.engine.rows_computed == 0
        await owner.say(opening(world, GATEWAY, SESSION), msgspec.structs.replace(flow(), epoch=1))
        (result,) = await owner.say(rows(0, BUDGET))
        assert isinstance(result, Result) and result.position == 0

    run(tmp_path, script)
