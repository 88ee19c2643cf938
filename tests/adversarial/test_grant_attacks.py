"""Attacks on rights: on grants, on orders, on sessions of others, by strangers, members and captured parts.

A real agent on virtual time, real passports and signatures. Byte for byte:
`tests/unit/trust/test_grants.py` and `python -m tests.fuzz`.
"""

import asyncio
from pathlib import Path

import msgspec

from fallow.coordinator.roll import Roll
from fallow.domain.credentials import Role
from fallow.domain.fleet import DropStage, Hop, PlaceStage, RouteRequest, Tier
from fallow.domain.frames import CloseSession, Fault, OpenStage, PeerAddress, RenewGrant, Result
from fallow.domain.grants import GRANT_LIFE_S, RECOMPUTED_MAX, Grant, Signed
from fallow.domain.ids import Digest
from fallow.domain.model import Span, StageSpec
from fallow.trust.envelope import Envelope, Kind, seal
from fallow.trust.grants import Author, Issuer, SealedOrders
from fallow.trust.open_doors import OpenLease
from tests.unit.coordinator.test_registry import beat
from tests.unit.node.rights_world import (
    BUDGET,
    SESSION,
    WHOLE,
    Party,
    World,
    codes,
    flow,
    passport_of_coordinator,
    rows,
    run,
)
from tests.unit.trust.grant_world import (
    CELL,
    COORDINATOR,
    GATEWAY,
    NODE,
    OTHER_NODE,
    STRANGER,
    SetClock,
    SwitchedLease,
    author,
    passport,
    reader,
    revoke,
)


async def works(world: World, party: Party, epoch: int = 90) -> None:
    """Whoever has a grant is served as before."""
    heard = await party.say(CloseSession(session=SESSION), world.opening(world.grant(), epoch), flow(epoch))
    assert codes(heard) == []
    heard = await party.say(rows(0, BUDGET, epoch))
    assert [type(header) for header in heard] == [Result], heard


def test_a_captured_gateway_writes_its_own_grants(tmp_path: Path) -> None:
    """
    Attack: a gateway signs a grant with its own key and shows its own, true passport.
    Expected: refused, it is not a coordinator's.
    Unharmed: no row is computed; a true grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        own = Author(GATEWAY, lambda: passport(GATEWAY, Role.GATEWAY), CELL, world.clock.unix_s)
        request = RouteRequest(model=world.entry.model, session=SESSION, reserve_tokens=BUDGET)
        hops = (Hop(address=world.address, span=WHOLE),)
        (forged,) = Issuer(own, OpenLease()).issue(request, GATEWAY.node, hops)
        assert codes(await gateway.say(world.opening(forged), flow(), rows(0, 1)))[0] == "grant_refused"
        assert world.engine.rows_computed == 0
        await works(world, gateway)

    run(tmp_path, script)


def test_a_grant_widened_on_the_way(tmp_path: Path) -> None:
    """
    Attack: a gateway changes budget, end, span or gateway in a true grant, and keeps the signature.
    Expected: each is refused.
    Unharmed: the grant as it was works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        signed = msgspec.msgpack.decode(world.grant(), type=Signed)
        envelope = msgspec.msgpack.decode(signed.envelope, type=Envelope)
        grant = msgspec.json.decode(envelope.body, type=Grant)
        for changes in (
            {"token_budget": 10**6},
            {"expires_unix_s": 1e12},
            {"span": Span(0, 99)},
            {"gateway": "f" * 64},
        ):
            body = msgspec.json.encode(msgspec.structs.replace(grant, **changes))
            wide = msgspec.msgpack.encode(msgspec.structs.replace(envelope, body=body))
            forged = msgspec.msgpack.encode(Signed(wide, signed.passport))
            assert codes(await gateway.say(world.opening(forged))) == ["grant_refused"]
        assert world.agent.relay.session_count == 0
        await works(world, gateway)

    run(tmp_path, script)


def test_a_grant_with_a_coordinators_passport_and_a_strangers_signature(tmp_path: Path) -> None:
    """
    Attack: passports are public: a stranger signs a grant with its own key and attaches the coordinator's passport.
    Expected: refused, the passport is not the signer's.
    Unharmed: a true grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        true = msgspec.msgpack.decode(world.grant(), type=Signed)
        body = msgspec.json.decode(msgspec.msgpack.decode(true.envelope, type=Envelope).body, type=Grant)
        forged = msgspec.msgpack.encode(Signed(seal(Kind.GRANT, body, STRANGER), true.passport))
        assert codes(await gateway.say(world.opening(forged))) == ["grant_refused"]
        await works(world, gateway)

    run(tmp_path, script)


def test_a_grant_of_one_device_at_another(tmp_path: Path) -> None:
    """
    Attack: a gateway uses a grant that is for another device, gateway or session.
    Expected: each is refused.
    Unharmed: its own grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        for grant in (world.grant(node=OTHER_NODE), world.grant(gateway=STRANGER)):
            assert codes(await gateway.say(world.opening(grant))) == ["grant_refused"]
        other = msgspec.structs.replace(world.opening(world.grant()), session="9" * 32)
        assert codes(await gateway.say(other)) == ["grant_refused"]
        await works(world, gateway)

    run(tmp_path, script)


def test_a_grant_that_was_kept_for_later(tmp_path: Path) -> None:
    """
    Attack: a gateway uses a grant again after its end, or as a renewal of itself.
    Expected: refused.
    Unharmed: nothing is held; a new grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        kept = world.grant()
        await gateway.say(world.opening(kept), flow(), rows(0, 1))
        assert codes(await gateway.say(RenewGrant(session=SESSION, grant=kept))) == ["grant_refused"]
        await asyncio.sleep(GRANT_LIFE_S + 120)
        assert codes(await gateway.say(world.opening(kept, 2))) == ["grant_refused"]
        assert world.agent.relay.session_count == 0
        await works(world, gateway)

    run(tmp_path, script)


def test_work_without_end_on_one_grant(tmp_path: Path) -> None:
    """
    Attack: a gateway rewinds its session, closes and opens it, to have more computed than it was granted.
    Expected: refused after as many rows as repairs explain.
    Unharmed: a new grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        grant = world.grant()
        for epoch in range(1, 12):
            await gateway.say(CloseSession(session=SESSION), world.opening(grant, epoch), flow(epoch, rewind_to=0))
            await gateway.say(rows(0, BUDGET, epoch))
        assert world.engine.rows_computed <= RECOMPUTED_MAX * BUDGET
        await works(world, gateway)

    run(tmp_path, script)


def test_budgets_refilled_by_changing_grants(tmp_path: Path) -> None:
    """
    Attack: a gateway spends a grant, opens with another, spends that, and opens with the first again; it renews too.
    Expected: each grant is spent once, whatever came between.
    Unharmed: a new grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        grants = [world.grant(), world.grant()]
        for epoch in range(1, 8 * RECOMPUTED_MAX):
            await gateway.say(world.opening(grants[epoch % 2], epoch), flow(epoch, rewind_to=0), rows(0, BUDGET, epoch))
            await gateway.say(RenewGrant(session=SESSION, grant=grants[(epoch + 1) % 2]))
        assert world.engine.rows_computed <= 2 * RECOMPUTED_MAX * BUDGET
        await works(world, gateway)

    run(tmp_path, script)


def test_logs_sent_without_end(tmp_path: Path) -> None:
    """
    Attack: a gateway has a stage send its logged rows again and again, by one small frame each time.
    Expected: they count against the grant, and the session ends.
    Unharmed: a new grant works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        await world.party(OTHER_NODE, Role.NODE)
        await gateway.say(world.opening(world.grant()))
        onward = msgspec.structs.replace(flow(), next=PeerAddress(OTHER_NODE.node, ()))
        heard = await gateway.say(onward, rows(0, BUDGET))
        for epoch in range(2, 12):
            heard += await gateway.say(msgspec.structs.replace(onward, epoch=epoch))
        assert "grant_refused" in codes(heard) and world.agent.relay.session_count == 0
        await works(world, gateway)

    run(tmp_path, script)


def test_a_session_of_another_gateway(tmp_path: Path) -> None:
    """
    Attack: a second gateway, with a true grant for the same session, opens, feeds, renews, rewinds and closes it.
    Expected: refused or ignored.
    Unharmed: the first gateway goes on as if nothing had been.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 4))
        thief = await world.party(STRANGER, Role.GATEWAY)
        grant = world.grant(gateway=STRANGER)
        heard = await thief.say(
            world.opening(grant, 9), flow(9, rewind_to=0), rows(4, 4, 1), RenewGrant(session=SESSION, grant=grant),
            CloseSession(session=SESSION), Fault(session=SESSION, epoch=1, code="leaving", message=""),
        )  # fmt: skip
        assert codes(heard) == ["unknown_session"]
        (result,) = await gateway.say(rows(4, 1))
        assert isinstance(result, Result) and (result.position, result.epoch) == (4, 1)

    run(tmp_path, script)


def test_a_device_that_plays_the_gateway(tmp_path: Path) -> None:
    """
    Attack: a device opens a session on its neighbour, with a grant that a coordinator was talked into.
    Expected: refused, only gateways open sessions.
    Unharmed: a gateway is served.
    """

    async def script(world: World) -> None:
        device = await world.party(OTHER_NODE, Role.NODE)
        assert codes(await device.say(world.opening(world.grant(gateway=OTHER_NODE)))) == ["grant_refused"]
        await works(world, await world.party())

    run(tmp_path, script)


def test_a_captured_coordinator_of_another_cell(tmp_path: Path) -> None:
    """
    Attack: a coordinator grants and orders in a cell that is not its own.
    Expected: refused.
    Unharmed: what is hosted stays and works.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        there = author(world.clock, COORDINATOR, Role.COORDINATOR, cell="work")
        request = RouteRequest(model=world.entry.model, session=SESSION, reserve_tokens=BUDGET)
        for by in (there, Author(there.identity, there.passport, CELL, there.unix_s)):
            (grant,) = Issuer(by, OpenLease()).issue(request, GATEWAY.node, (Hop(address=world.address, span=WHOLE),))
            assert codes(await gateway.say(world.opening(grant))) == ["grant_refused"]
            drop = DropStage(model=world.entry.model, epoch=5)
            order = SealedOrders(by, reader(world.clock)).seal(drop, NODE.node, world.agent.heartbeat().boot)
            assert not (await world.order(order)).ok
        await works(world, gateway)

    run(tmp_path, script)


def test_a_captured_coordinator_serves_a_model_that_nobody_signed(tmp_path: Path) -> None:
    """
    Attack: a coordinator orders devices of its cell to load a poisoned model, and grants sessions on it.
    Expected: every device refuses: no publisher of the council has signed it.
    Unharmed: what they have signed is served on.
    """

    async def script(world: World) -> None:
        poisoned = Digest("6" * 64)
        stage = StageSpec(model=poisoned, pieces=(WHOLE,))
        command = PlaceStage(stage=stage, manifest_bytes=100, sources=(), epoch=2)
        refused = await world.order(world.seal(command))
        assert not refused.ok and "does not allow" in refused.message
        gateway = await world.party()
        request = RouteRequest(model=poisoned, session=SESSION, reserve_tokens=BUDGET)
        by = author(world.clock, text=passport_of_coordinator())
        (grant,) = Issuer(by, OpenLease()).issue(request, GATEWAY.node, (Hop(address=world.address, span=WHOLE),))
        opening = OpenStage(session=SESSION, epoch=1, model=poisoned, span=WHOLE, reserve_tokens=BUDGET, grant=grant)
        assert codes(await gateway.say(opening)) == ["grant_refused"]
        await works(world, gateway)

    run(tmp_path, script)


def test_an_order_said_again_by_a_captured_bus(tmp_path: Path) -> None:
    """
    Attack: the bus's server keeps an order to drop a model, and gives it again at once, to a device that was killed and
        started again meanwhile, and later.
    Expected: refused: it came before, is for a run that is over, or is of another time.
    Unharmed: the model is served.
    """

    async def script(world: World) -> None:
        drop = world.seal(DropStage(model=world.entry.model, epoch=1))
        assert (await world.order(drop)).ok
        await asyncio.sleep(1)
        assert (await world.order(world.place())).ok and await world.hosts()
        assert not (await world.order(drop)).ok
        late = world.seal(DropStage(model=world.entry.model, epoch=1))
        # As `kill -9` leaves it: nothing of what the device heard is there any more.
        boot = world.agent.heartbeat().boot
        await world.start_anew()
        assert world.agent.heartbeat().boot != boot
        assert (await world.order(world.place())).ok and await world.hosts()
        for order in (drop, late):
            refused = await world.order(order)
            assert not refused.ok and "another run" in refused.message
        drop = world.seal(DropStage(model=world.entry.model, epoch=1))
        world.clock.now_s += 200
        refused = await world.order(drop)
        assert not refused.ok and "another time" in refused.message
        world.clock.now_s -= 200
        await works(world, await world.party())

    run(tmp_path, script)


def test_an_order_that_nobody_signed(tmp_path: Path) -> None:
    """
    Attack: who captured the bus writes orders in the clear, and under the seal of every other role.
    Expected: refused, and no epoch rises.
    Unharmed: what is hosted stays and works.
    """

    async def script(world: World) -> None:
        command = DropStage(model=world.entry.model, epoch=1 << 60)
        assert not (await world.order(msgspec.json.encode(command))).ok
        for role in Role:
            if role is not Role.COORDINATOR:
                forger = SealedOrders(author(world.clock, STRANGER, role), reader(world.clock))
                assert not (await world.order(forger.seal(command, NODE.node, world.agent.heartbeat().boot))).ok
        assert world.agent._epoch == 1, "a forged order raises no epoch"
        await works(world, await world.party())

    run(tmp_path, script)


def test_a_clock_that_is_set_back_to_use_old_grants(tmp_path: Path) -> None:
    """
    Attack: a device's clock is set back while a session runs.
    Expected: the session ends when it would have: its end was counted by the monotonic clock.
    Unharmed: nothing is held.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 1))
        world.clock.now_s -= 1e6
        for position in range(1, 5):
            await asyncio.sleep(200)
            heard = await gateway.say(rows(position, 1))
        assert "unknown_session" in codes(heard) and world.agent.relay.session_count == 0

    run(tmp_path, script)


def test_a_device_that_borrows_a_better_ones_passport() -> None:
    """
    Attack: a device shows a better one's passport in its heartbeat, or one that it signed itself.
    Expected: it counts as anonymous.
    Unharmed: its own passport counts.
    """
    clock = SetClock()
    roll = Roll(CELL, reader(clock), SwitchedLease(), clock)
    for text in (passport(OTHER_NODE, Role.NODE, tier=Tier.ATTESTED), passport(NODE, Role.NODE, account=STRANGER)):
        roll.enter(msgspec.structs.replace(beat(NODE.node, 1), passport=text))
        assert roll.tier(NODE.node) is Tier.ANONYMOUS
    roll.enter(msgspec.structs.replace(beat(NODE.node, 2), passport=passport(NODE, Role.NODE)))
    assert roll.tier(NODE.node) is Tier.KEYED


def test_a_coordinator_that_was_found_out(tmp_path: Path) -> None:
    """
    Attack: who has a revoked coordinator's key goes on giving grants and orders.
    Expected: refused from when the device heard of it.
    Unharmed: sessions that were granted before go on.
    """

    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), flow(), rows(0, 1))
        revoke(world.passports, COORDINATOR.node, at_s=world.clock.unix_s())
        assert codes(await gateway.say(RenewGrant(session=SESSION, grant=world.grant()))) == ["grant_refused"]
        assert not (await world.order(world.place())).ok
        (result,) = await gateway.say(rows(1, 1))
        assert isinstance(result, Result)

    run(tmp_path, script)
