"""What a device does for whom: sessions with and without grants, budgets, ends, renewals, and a halt in the middle."""

import asyncio
from pathlib import Path

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.credentials import Role
from fallow.domain.fleet import DropStage, Heartbeat
from fallow.domain.frames import CloseSession, Refused, RenewGrant, Result, StageState
from fallow.domain.grants import GRANT_LIFE_S, RECOMPUTED_MAX
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.grants import SealedOrders
from tests.unit.node.rights_world import BUDGET, SESSION, SUBJECTS, World, codes, flow, rows, run
from tests.unit.trust.grant_world import NODE, OTHER_NODE, author, reader


def test_a_session_needs_its_grant(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        for grant in (b"", b"forged", world.grant(gateway=OTHER_NODE), world.grant(node=OTHER_NODE)):
            assert codes(await gateway.say(world.opening(grant))) == ["grant_refused"]
        assert codes(await gateway.say(world.opening(world.grant(), tokens=BUDGET + 1))) == ["grant_refused"]
        assert world.agent.relay.session_count == 0 and world.engine.rows_computed == 0
        (state,) = await gateway.say(world.opening(world.grant()))
        assert isinstance(state, StageState)
        (result,) = await gateway.say(flow(), rows(0, BUDGET))
        assert isinstance(result, Result)

    run(tmp_path, script)


def test_only_gateways_open_sessions(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        device = await world.party(OTHER_NODE, Role.NODE)
        heard = await device.say(world.opening(world.grant(gateway=OTHER_NODE)))
        assert codes(heard) == ["grant_refused"]

    run(tmp_path, script)


def test_rows_beyond_the_budget_end_the_session(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, BUDGET - 1))
        computed = world.engine.rows_computed
        assert codes(await gateway.say(rows(BUDGET - 1, 2))) == ["grant_refused"]
        assert world.engine.rows_computed == computed and world.agent.relay.session_count == 0

    run(tmp_path, script)


def test_computing_again_is_bounded_also_over_closing_and_opening(tmp_path: Path) -> None:
    """A gateway that rewinds for ever, or opens its session anew with the same grant, gets a few budgets in all."""

    async def script(world: World) -> None:
        gateway = await world.party()
        grant = world.grant()
        for epoch in range(1, 2 * RECOMPUTED_MAX):
            if epoch % 2:
                await gateway.say(CloseSession(session=SESSION))
            await gateway.say(world.opening(grant, epoch), flow(epoch, rewind_to=0), rows(0, BUDGET, epoch))
        assert world.engine.rows_computed == RECOMPUTED_MAX * BUDGET
        heard = await gateway.say(world.opening(world.grant(), 99), flow(99, rewind_to=0), rows(0, BUDGET, 99))
        assert codes(heard) == [], "another grant, another count"

    run(tmp_path, script)


def test_a_session_ends_with_its_grant_unless_it_is_renewed(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 1))
        position = 1
        for _ in range(int(2 * GRANT_LIFE_S / 200)):
            await asyncio.sleep(200)
            assert codes(await gateway.say(RenewGrant(session=SESSION, grant=world.grant()), rows(position, 1))) == []
            position += 1
        stale = world.grant(gateway=OTHER_NODE)
        assert codes(await gateway.say(RenewGrant(session=SESSION, grant=stale))) == ["grant_refused"]
        assert world.agent.relay.session_count == 1, "a bad renewal takes nothing away"
        gateway.heard.clear()
        said: list[str] = []
        for _ in range(5):
            await asyncio.sleep(150)
            said += codes([frame.header for frame in gateway.heard])
            said += codes(await gateway.say(rows(position, 1)))
            position += 1
            gateway.heard.clear()
        assert said[0] == "grant_refused", "it was used all the time, and ended with its grant"
        assert world.agent.relay.session_count == 0

    run(tmp_path, script)


def test_a_halt_ends_sessions_closes_the_engine_and_refuses_everything_until_it_is_over(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 4))
        world.lease.turn(Standing.HALTED)
        await asyncio.sleep(0.01)
        assert world.engine.lost.is_set(), "the engine is closed at once"
        assert codes([frame.header for frame in gateway.heard]) == ["halted"]
        assert world.agent.heartbeat().standing == "halted" and world.agent.hosting.hosted()[0].status != "ready"
        computed = world.engine.rows_computed
        heard = await gateway.say(world.opening(world.grant(), 2), flow(2), rows(0, 4, 2))
        assert codes(heard)[0] == "halted"
        refused = await world.order(world.place())
        assert not refused.ok and "halted" in refused.message
        await asyncio.sleep(60)
        assert world.engine.rows_computed == computed and world.agent.relay.session_count == 0
        world.lease.turn(Standing.WORKING)
        assert await world.hosts(), "what was there is loaded again"
        assert codes(await gateway.say(world.opening(world.grant(), 3), flow(3), rows(0, 4, 3))) == []
        assert world.engine.rows_computed == computed + 4

    run(tmp_path, script)


def test_a_device_without_a_lease_starts_and_works_when_it_has_one(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        world.lease.turn(Standing.NO_LEASE)
        await world.agent.start()
        assert not (await world.order(world.place())).ok
        assert world.agent.heartbeat().standing == "no_lease"
        world.lease.turn(Standing.WORKING)
        await asyncio.sleep(0.1)
        assert (await world.order(world.place())).ok and await world.hosts()
        await world.agent.close()

    run_virtual(main())


def test_orders_are_a_coordinators_and_for_models_that_the_council_allows(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        command = DropStage(model=world.entry.model, epoch=1)
        forger = SealedOrders(author(world.clock, OTHER_NODE, Role.NODE), reader(world.clock))
        forged = forger.seal(command, NODE.node, world.agent.heartbeat().boot)
        for message in (msgspec.json.encode(command), forged, world.place(OTHER_NODE), b""):
            assert not (await world.order(message)).ok
        order = world.seal(command)
        assert (await world.order(order)).ok
        assert not (await world.order(order)).ok, "the same order again"
        await asyncio.sleep(1)
        assert world.agent.hosting.hosted() == ()
        world.allow()
        refused = await world.order(world.place())
        assert not refused.ok and "does not allow" in refused.message

    run(tmp_path, script)


def test_a_model_that_is_allowed_no_longer_is_dropped_with_its_sessions(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 4))
        world.allow(Digest("0" * 64))
        await asyncio.sleep(2)
        assert codes([frame.header for frame in gateway.heard]) == ["grant_refused"]
        assert world.agent.hosting.hosted() == () and world.agent.relay.session_count == 0

    run(tmp_path, script)


def test_the_passport_is_told_at_first_when_asked_and_when_it_changes(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        told: list[str] = []

        async def on_heartbeat(_: str, message: bytes) -> None:
            told.append(msgspec.json.decode(message, type=Heartbeat).passport)

        await world.bus.subscribe(SUBJECTS.heartbeat(NodeId(NODE.node)), on_heartbeat)
        await asyncio.sleep(5)
        assert told and not any(told[:5])
        told.clear()
        await world.bus.publish(SUBJECTS.hello, b"")
        await asyncio.sleep(0.5)
        assert any(told), "a coordinator that asks who is there learns who it is"
        told.clear()
        await asyncio.sleep(40)
        assert 1 <= sum(map(bool, told)) <= 3, "and now and then, in case that one was lost"

    run(tmp_path, script)


def test_a_device_that_leaves_keeps_what_it_holds_and_refuses_everything_else(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        other = SessionId("0123456789abcdef" * 2)
        await gateway.say(world.opening(world.grant()), flow())
        world.agent.relay.drain()
        assert codes(await gateway.say(rows(0, 1))) == ["leaving"]
        refused = await gateway.say(msgspec.structs.replace(world.opening(world.grant()), session=other))
        assert [type(header) for header in refused] == [Refused] and codes(refused) == ["leaving"]
        (state,) = await gateway.say(world.opening(world.grant(), 2))
        assert isinstance(state, StageState) and state.position == 1, "a repair of what it holds goes on"
        await gateway.say(CloseSession(session=SESSION))
        assert codes(await gateway.say(world.opening(world.grant(), 3))) == ["leaving"]
        assert world.agent.relay.session_count == 0

    run(tmp_path, script)
