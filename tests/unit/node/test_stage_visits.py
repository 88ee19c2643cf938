"""Two stages of one session on one device: each under its own name and grant, and rows from the one to the other."""

from pathlib import Path

import msgspec

from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.frames import CloseSession, Fault, OpenStage, PeerAddress, StageState
from fallow.domain.ids import VISITS_MAX, SessionId, at_visit
from fallow.trust.grants import Issuer, SignedRoutes
from tests.unit.node.rights_world import BUDGET, SESSION, WHOLE, World, codes, flow, passport_of_coordinator, rows, run
from tests.unit.trust.grant_world import GATEWAY, NODE, SwitchedLease, author

AGAIN = at_visit(SESSION, 1)


def test_visits_have_names_of_their_own_that_lead_back_to_the_session() -> None:
    for session in (SESSION, SessionId("f" * 32), SessionId("0123456789abcdef" * 2)):
        names = [at_visit(session, visit) for visit in range(VISITS_MAX)]
        assert names[0] == session and len(set(names)) == VISITS_MAX
        assert [at_visit(name, visit) for visit, name in enumerate(names)] == [session] * VISITS_MAX
        assert {(len(name), name[1:]) for name in names} == {(32, session[1:])}


def grants(world: World) -> tuple[bytes, bytes]:
    """For a chain that comes to the device twice."""
    lease = SwitchedLease()
    assert lease.charter is not None
    lease.charter = msgspec.structs.replace(lease.charter, models=frozenset({world.entry.model}))
    asked = RouteRequest(model=world.entry.model, session=SESSION, reserve_tokens=BUDGET)
    hops = tuple(Hop(address=PeerAddress(NODE.node, ()), span=WHOLE, visit=visit) for visit in (0, 1))
    once, again = Issuer(author(world.clock, text=passport_of_coordinator()), lease).issue(asked, GATEWAY.node, hops)
    routes = SignedRoutes(GATEWAY.node, world.passports)
    for hop, grant in zip(hops, (once, again), strict=True):
        routes.check(asked, hop, grant)
    return once, again


def opening(world: World, session: SessionId, grant: bytes) -> OpenStage:
    return msgspec.structs.replace(world.opening(grant), session=session)


def test_each_stage_needs_a_grant_of_its_own_and_takes_its_own_room(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        once, again = grants(world)
        free_bytes = world.engine.load_now.kv_free_bytes
        (state,) = await gateway.say(opening(world, SESSION, once))
        assert isinstance(state, StageState) and state.session == SESSION
        taken_bytes = free_bytes - world.engine.load_now.kv_free_bytes
        assert codes(await gateway.say(opening(world, AGAIN, once))) == ["grant_refused"]
        (state,) = await gateway.say(opening(world, AGAIN, again))
        assert isinstance(state, StageState) and state.session == AGAIN
        assert world.agent.relay.session_count == 2
        assert free_bytes - world.engine.load_now.kv_free_bytes == 2 * taken_bytes
        await gateway.say(CloseSession(session=AGAIN))
        assert [held.id for held in world.agent.relay.sessions()] == [SESSION]

    run(tmp_path, script)


def test_rows_for_a_stage_of_this_device_that_is_gone_are_told_to_the_gateway(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        once, _ = grants(world)
        onward = msgspec.structs.replace(flow(), next=world.address, next_session=AGAIN)
        heard = await gateway.say(opening(world, SESSION, once), onward, rows(0, 3))
        (fault,) = [header for header in heard if isinstance(header, Fault)]
        assert (fault.session, fault.code, fault.suspect) == (SESSION, "unknown_session", NODE.node)

    run(tmp_path, script)
