"""Getting in, staying in, and getting others out: attacks on enrolment, membership and the journal.

The real registrar on a real database, over real HTTPS where the line is attacked. What the bus does with credentials is
in tests/adversarial/test_bus_attacks.py and tests/system/test_enrolment.py.
"""

import asyncio
import hashlib
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sql

from fallow.domain.credentials import PASSPORT_LIFE_S, Departure, RevocationList, Role
from fallow.domain.errors import (
    CharterInvalid,
    FallowError,
    InvitationRefused,
    JournalBroken,
    PassportRefused,
    RegistrarUnavailable,
    RequestRefused,
    SignatureInvalid,
)
from fallow.domain.fleet import LeaderChanged, Tier
from fallow.domain.ids import NodeId
from fallow.domain.network import BUS_NAME, REGISTRAR_NAME, Places
from fallow.gateway.server import ServerLimits, serve
from fallow.policy.enrolment import INVITATIONS_OPEN_AFAR_MAX
from fallow.system_clock import SystemClock
from fallow.trust.certificates import client_context, server_certificate, server_context, write_private
from fallow.trust.envelope import Envelope, seal, unseal
from fallow.trust.envelope import Kind as Kinds
from fallow.trust.grants import Author, signed_by_coordinator
from fallow.trust.jwt import MESSAGE_BYTES_MAX
from fallow.trust.keys import Identity, new_identity, user_nkey
from fallow.trust.membership import enrol, enrolment_of, load
from fallow.trust.passports import PassportReader
from fallow.trust.registrar import database as db
from fallow.trust.registrar.api import RegistrarApi
from fallow.trust.registrar.consent import sign_consent
from fallow.trust.registrar.invitations import from_text
from fallow.trust.registrar.journal import Head, Kind, verify
from fallow.trust.registrar.journal_db import append, read_all
from fallow.trust.registrar.requests import Enrol, Invite, Leave, Renew, Revoke, Withdraw
from fallow.trust.registrar_client import RegistrarClient, meet, met
from fallow.trust.revocation_watch import CHECKS
from tests.unit.trust.registrar_world import HandClock, World, cut_by, served
from tests.unit.trust.test_revocation_watch import SUBJECTS, Process, joined, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


def unharmed(world: World, *expected: str) -> None:
    """Exactly those are members, and the journal holds."""
    assert {who.node for who in world.registrar.members()} == set(expected)
    verify(world.journal())


def test_an_invitation_is_used_twice(world: World) -> None:
    """
    Attack: a second device comes with an invitation that a first one has used.
    Expected: `InvitationRefused`, and an entry in the journal.
    Unharmed: the first stays the only member.
    """
    invitation, first, second = world.invitation(), new_identity(), new_identity()
    world.ask(first, world.enrolment(first, invitation))
    with pytest.raises(InvitationRefused, match="used already"):
        world.ask(second, world.enrolment(second, invitation))
    assert "invitation_refused" in world.kinds()
    unharmed(world, first.node)


def test_an_invitation_is_used_by_many_at_once(world: World) -> None:
    """
    Attack: eight devices race for one invitation.
    Expected: one is admitted, seven are refused.
    Unharmed: there is one enrolment, and one entry of it.
    """
    invitation = world.invitation()
    racers = [new_identity() for _ in range(8)]
    requests = [world.signed(racer, world.enrolment(racer, invitation)) for racer in racers]
    codes: list[str] = []
    gate = threading.Barrier(len(racers))

    def race(request: bytes) -> None:
        gate.wait()
        try:
            world.registrar.answer(request)
            codes.append("admitted")
        except FallowError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=race, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == ["admitted", *["invitation_refused"] * 7]
    assert world.kinds().count("enrolled") == 1


def test_an_invitation_for_a_device_is_turned_into_one_for_an_operator(world: World) -> None:
    """
    Attack: a newcomer changes role and tier in its copy of the invitation, and asks for the role of an operator.
    Expected: `InvitationRefused`: the registrar goes by its own record.
    Unharmed: nobody was admitted.
    """
    device = new_identity()
    widened = msgspec.structs.replace(world.invitation(), role=Role.OPERATOR)
    with pytest.raises(InvitationRefused, match="for a node"):
        world.ask(device, world.enrolment(device, widened))
    unharmed(world)


def test_an_invitation_leads_to_somebody_elses_registrar(world: World, tmp_path: Path) -> None:
    """
    Attack: the address in the invitation is taken over by another network's registrar.
    Expected: `InvitationRefused` by the newcomer: what answers has not the pinned digest.
    Unharmed: the secret was never sent; the invitation still works at the right place.
    """
    thief, device, invitation = World(tmp_path / "thief"), new_identity(), world.invitation()

    async def scenario() -> None:
        async with served(thief) as server:
            with pytest.raises(InvitationRefused, match="not the registrar"):
                await meet(msgspec.structs.replace(invitation, registrar_urls=(server.url,)))

    run(scenario())
    world.ask(device, world.enrolment(device, invitation))
    unharmed(world, device.node)


def test_a_copied_description_without_the_certificate(world: World, tmp_path: Path) -> None:
    """
    Attack: somebody serves the network's public description, with a certificate of the bus, whose key was stolen.
    Expected: `RegistrarUnavailable`: the certificate is not for the registrar.
    Unharmed: the invitation was not used.
    """
    stolen = server_certificate(world.state.authority, BUS_NAME, world.clock.unix_s())
    write_private(tmp_path / "tls.pem", stolen.certificate_pem)
    write_private(tmp_path / "tls.key", stolen.key_pem)
    tls = server_context(tmp_path / "tls.pem", tmp_path / "tls.key")

    async def scenario() -> None:
        api = RegistrarApi(world.registrar, world.word, world.repository, world.clock)
        server = await serve(api.app(), "127.0.0.1", 0, tls=tls)
        invitation, device = world.invitation(), new_identity()
        invitation = msgspec.structs.replace(invitation, registrar_urls=(server.url,))
        known = await meet(invitation)
        with pytest.raises(RegistrarUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await enrol(
                tmp_path / "device", device, known, invitation, world.enrolment(device, invitation), SystemClock()
            )
        await server.close()

    run(scenario())
    unharmed(world)


def test_a_request_is_recorded_and_played_again(world: World) -> None:
    """
    Attack: an operator's signed request to invite is recorded, and sent a second time.
    Expected: `RequestRefused`: a challenge is good for one request.
    Unharmed: there is one invitation, not two.
    """
    operator = world.member(Role.OPERATOR)
    request = world.signed(operator, Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0))
    before = world.kinds().count("invitation_made")
    world.registrar.answer(request)
    with pytest.raises(RequestRefused, match="made before"):
        world.registrar.answer(request)
    assert world.kinds().count("invitation_made") == before + 1


def test_a_signed_request_is_put_under_another_name(world: World) -> None:
    """
    Attack: a device signs a revocation itself, and writes the operator's key beside it.
    Expected: `SignatureInvalid`.
    Unharmed: nobody is revoked.
    """
    operator, device, victim = world.member(Role.OPERATOR), world.member(), world.member()
    own = msgspec.msgpack.decode(world.signed(device, Revoke(node=victim.node, why="envy")), type=Envelope)
    forged = msgspec.msgpack.encode(msgspec.structs.replace(own, signer=operator.node))
    with pytest.raises(SignatureInvalid):
        world.registrar.answer(forged)
    assert world.word.sequence() == 0
    unharmed(world, operator.node, device.node, victim.node)


def test_an_operators_request_is_carried_to_another_network(world: World, tmp_path: Path) -> None:
    """
    Attack: a hostile registrar hands out our challenge as its own, and carries what its operator signs to us.
    Expected: `RequestRefused`: what is signed names the network.
    Unharmed: our network has no new invitation.
    """
    hostile = World(tmp_path / "hostile")
    operator = world.member(Role.OPERATOR)
    carried = world.signed(operator, Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0), network=hostile.state.digest)
    before = world.kinds().count("invitation_made")
    with pytest.raises(RequestRefused, match="another network"):
        world.registrar.answer(carried)
    assert world.kinds().count("invitation_made") == before


def test_a_reader_revokes_the_coordinator(world: World) -> None:
    """
    Attack: a member with the smallest role asks for the most destructive action.
    Expected: `RequestRefused`, and an entry in the journal that names who tried.
    Unharmed: the coordinator renews as before.
    """
    reader, coordinator = world.member(Role.READER), world.member(Role.COORDINATOR)
    with pytest.raises(RequestRefused, match="A reader may not revoke"):
        world.ask(reader, Revoke(node=coordinator.node, why="coup"))
    refused = world.journal()[-1]
    assert (refused.kind, refused.who) == ("request_refused", reader.node)
    assert world.renewed(coordinator).passport


def test_a_stolen_operators_key_makes_itself_helpers_that_sign(world: World) -> None:
    """
    Attack: with an operator's key, but not the registrar's machine, somebody invites coordinators and operators.
    Expected: `RequestRefused` for each.
    Unharmed: what the thief can do ends with the revocation of that one key.
    """
    stolen = world.member(Role.OPERATOR)
    for role in (Role.COORDINATOR, Role.OPERATOR, Role.REGISTRAR):
        with pytest.raises(RequestRefused):
            world.ask(stolen, Invite(role=role, tier=Tier.KEYED, life_s=60.0))
    world.registrar.revoke(stolen.node, "stolen")
    with pytest.raises(RequestRefused, match="revoked"):
        world.ask(stolen, Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0))


def test_a_revoked_device_comes_back_by_every_door(world: World) -> None:
    """
    Attack: a revoked device renews, shows its old passport, and enrols again with a fresh invitation.
    Expected: `RequestRefused`, `PassportRefused`, `InvitationRefused`.
    Unharmed: the fresh invitation still works for another device.
    """
    device, invitation = world.member(), world.invitation()
    passport = world.renewed(device).passport
    world.registrar.revoke(device.node, "sold")
    reader = PassportReader(world.state.network, world.clock)
    reader.learn(world.word.revocations())
    with pytest.raises(RequestRefused):
        world.renewed(device)
    with pytest.raises(PassportRefused):
        reader.read(passport, holder=device.node)
    with pytest.raises(InvitationRefused):
        world.ask(device, world.enrolment(device, invitation))
    other = new_identity()
    world.ask(other, world.enrolment(other, invitation))
    unharmed(world, device.node, other.node)


def test_a_device_that_left_goes_on_with_what_it_was_given(world: World) -> None:
    """
    Attack: a coordinator leaves, comes back as a reader within the second, and shows its coordinator's passport.
    Expected: `PassportRefused`, before it comes back and after; the invitation that it came with first admits nobody.
    Unharmed: its new membership: the reader's passport is believed, and the key is welcome.
    """
    who, first = new_identity(), world.invitation(Role.COORDINATOR)
    world.ask(who, world.enrolment(who, first))
    passport = world.renewed(who).passport
    reader = PassportReader(world.state.network, world.clock)
    world.ask(who, Leave())
    assert reader.learn(world.word.revocations()) is not None
    assert reader.revoked(who.node)
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(passport, holder=who.node)
    with pytest.raises(InvitationRefused, match="left since"):
        world.ask(who, world.enrolment(who, first))
    world.ask(who, world.enrolment(who, world.invitation(Role.READER)))
    assert reader.learn(world.word.revocations()) is not None
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(passport, holder=who.node)
    assert reader.read(world.renewed(who).passport, holder=who.node).role is Role.READER
    assert not reader.revoked(who.node)
    unharmed(world, who.node)


def test_a_captured_bus_says_that_the_registrar_is_elsewhere(world: World, tmp_path: Path) -> None:
    """
    Attack: the bus tells a device of another registrar, in its own words; then it plays the true word of where the
    registrar was once, and there somebody answers with the bus's certificate.
    Expected: the forged word is not believed; of the true one's place, the certificate is not (`RegistrarUnavailable`).
    Unharmed: the device finds its registrar where it was, and believes its next word as before.
    """
    stolen = server_certificate(world.state.authority, BUS_NAME, world.clock.unix_s())
    write_private(tmp_path / "tls.pem", stolen.certificate_pem)
    write_private(tmp_path / "tls.key", stolen.key_pem)
    tls = server_context(tmp_path / "tls.pem", tmp_path / "tls.key")

    async def scenario() -> None:
        impostor = RegistrarApi(world.registrar, world.word, world.repository, world.clock)
        there = await serve(impostor.app(), "127.0.0.1", 0, ServerLimits(shutdown_s=0.05), tls=tls)
        world.places((there.url,))
        world.word.tell_places()
        once = world.word.revocations()  # signed when the registrar was where the impostor is now
        async with served(world, connections=ServerLimits(shutdown_s=0.05)) as server:
            world.word.tell_places()
            member, victim = await joined(world, tmp_path / "device"), world.member()
            process, here = Process(member, tmp_path / "device"), member.places
            await process.start()
            bus, false = process.hub.connect("captured"), Places(registrar_urls=(there.url,), bus_urls=())
            forged = RevocationList(
                sequence=1 << 50, issued_unix_s=time.time(), cell="home", revocations=(), places=false
            )
            await bus.publish(SUBJECTS.revocations, seal(Kinds.REVOCATIONS, forged, new_identity()))
            await bus.publish(SUBJECTS.revocations, once)
            world.registrar.revoke(victim.node, "lost")
            await bus.publish(SUBJECTS.revocations, world.word.revocations())
            await until(lambda: process.passports.revoked(victim.node))
            assert member.places == here, "nobody else's word, and no old one after a newer"
            member.moved(false, world.word.sequence() + 1)  # as who hears the old word first, and no other
            async with RegistrarClient(member.known, [there.url]) as lost:
                with pytest.raises(RegistrarUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                    await lost.places()
            await member._renew()
            assert (member.places, member.registrar_urls) == (here, (server.url, there.url))
            await process.close()
        await there.close()

    run(scenario())


def test_an_old_list_leads_a_device_away_from_where_the_registrar_answered(world: World, tmp_path: Path) -> None:
    """
    Attack: the bus keeps the registrar's lists from a device, until the registrar has moved and the device has its
    passport from there; then it plays the last list from before the move, which the device never heard.
    Expected: the device looks on where the registrar answered it, and after a restart too.
    Unharmed: the revocations in that list are believed; the next move that it hears of is followed.
    """

    async def scenario() -> None:
        folder, victim = tmp_path / "device", world.member()
        world.word.tell_places()
        world.registrar.revoke(victim.node, "lost")
        once = world.word.revocations()
        async with served(world, connections=ServerLimits(shutdown_s=0.05)):
            world.word.tell_places()
            first = await joined(world, folder)
            here = first.places
            await first.close()
            process = Process(load(folder, first.who, SystemClock()), folder)
            await process.watch._on_list("", once)
            assert process.passports.revoked(victim.node)
            assert process.member.places == here
            world.places(("https://127.0.0.1:2",))
            world.word.tell_places()
            await process.watch._on_list("", world.word.revocations())
            assert process.member.places.registrar_urls == ("https://127.0.0.1:2",)
            await process.close()

    run(scenario())


def test_a_revoked_device_writes_its_name_in_capitals(world: World) -> None:
    """
    Attack: a revoked device signs as before, but spells its key in capitals, under which no list knows it.
    Expected: `SignatureInvalid`: a key has one name.
    Unharmed: nobody was admitted, and the invitation is as good as before.
    """
    device, invitation = world.member(), world.invitation()
    world.registrar.revoke(device.node, "sold")
    other = Identity(device.seed, NodeId(device.node.upper()))
    consent = sign_consent(other, world.state.digest, Role.NODE, "I lend this device.")
    with pytest.raises(SignatureInvalid, match="lower-case"):
        world.ask(other, enrolment_of(invitation, "the same", consent))
    newcomer = new_identity()
    world.ask(newcomer, world.enrolment(newcomer, invitation))
    unharmed(world, device.node, newcomer.node)


def test_an_old_list_of_revocations_is_played_again(world: World) -> None:
    """
    Attack: a revoked device's friend publishes the list from before the revocation.
    Expected: it is not newer, and changes nothing.
    Unharmed: the device stays revoked.
    """
    device = world.member()
    old = world.word.revocations()
    world.registrar.revoke(device.node, "sold")
    reader = PassportReader(world.state.network, world.clock)
    assert reader.learn(world.word.revocations()) is not None
    assert reader.learn(old) is None
    assert reader.revoked(device.node)


def test_an_old_list_keeps_a_device_out_that_came_back(world: World) -> None:
    """
    Attack: the bus plays the list from when a device left to a process that has heard none yet: an hour after it came
    back, and a month later.
    Expected: of an hour ago, until the newest list comes, which frees the device whether it names it or not; of a
    month ago, not at all.
    Unharmed: the device's new passport is believed.
    """
    assert isinstance(world.clock, HandClock)
    device, other = world.member(), world.member()
    world.ask(device, Leave())
    old = world.word.revocations()
    world.clock.now_s += 60.0
    world.ask(device, world.enrolment(device, world.invitation()))
    world.clock.now_s += 3600.0
    reader = PassportReader(world.state.network, world.clock)
    assert reader.learn(old) is not None and reader.learn(world.word.revocations()) is not None
    assert not reader.revoked(device.node)
    world.clock.now_s += 30 * 86_400.0
    reader = PassportReader(world.state.network, world.clock)
    assert reader.learn(old) is None and not reader.revoked(device.node)
    world.registrar.revoke(other.node, "lost")
    assert reader.learn(world.word.revocations()) is not None
    reader.read(world.renewed(device).passport, holder=device.node)


def test_a_captured_bus_plays_an_old_list_before_the_registrar_is_asked(world: World, tmp_path: Path) -> None:
    """
    Attack: the bus plays the list from when a device left, as soon as a process listens, which knows of none.
    Expected: the process has asked the registrar before it listens, and the list is not newer.
    Unharmed: the device that came back is welcome from the first moment on.
    """
    assert isinstance(world.clock, HandClock)
    device = world.member()
    world.ask(device, Leave())
    old = world.word.revocations()
    world.ask(device, world.enrolment(device, world.invitation()))

    async def scenario() -> None:
        async with served(world):
            process = Process(await joined(world, tmp_path / "device"), tmp_path / "device")
            honest, said = process.hub.connect("process"), []

            class Replaying:
                async def subscribe(self, subject: str, handler: Callable[[str, bytes], Awaitable[None]]) -> object:
                    await handler(subject, old)
                    said.append(process.passports.revoked(device.node))
                    return await honest.subscribe(subject, handler)

            await process.watch.start(Replaying(), SUBJECTS)  # type: ignore[arg-type]
            assert said == [False]
            await process.close()

    run(scenario())


@pytest.mark.parametrize("ahead_s", [1000.0, 0.0])
def test_a_coordinator_that_came_back_is_revoked_and_goes_on(world: World, ahead_s: float) -> None:
    """
    Attack: a coordinator leaves and comes back, after the registrar's clock was ahead, or within a second, so that its
    new passport is of later than now; its key is stolen and revoked at once, and the thief goes on with that passport.
    Expected: the revocation reaches it: `PassportRefused` for the passport and for what the key signs, and the bus cuts
    it, whatever the clock says afterwards.
    Unharmed: another coordinator's words are believed.
    """
    assert isinstance(world.clock, HandClock)
    world.clock.now_s = math.floor(world.clock.now_s) + 0.1 + ahead_s
    who, honest = world.member(Role.COORDINATOR), world.member(Role.COORDINATOR)
    world.renewed(who)
    world.clock.now_s -= ahead_s
    world.ask(who, Leave())
    world.clock.now_s += 0.1
    world.ask(who, world.enrolment(who, world.invitation(Role.COORDINATOR)))
    stolen = world.renewed(who)
    assert stolen.issued_unix_s > world.clock.now_s
    world.clock.now_s += 0.1
    reader = PassportReader(world.state.network, world.clock)
    world.registrar.revoke(who.node, "stolen")
    reader.learn(world.word.revocations())
    world.clock.now_s += ahead_s + 1.0
    with pytest.raises(PassportRefused, match="revoked"):
        reader.read(stolen.passport, holder=who.node)
    for account_jwt in world.word.accounts().values():
        assert cut_by(account_jwt)[user_nkey(who.node)] >= int(stolen.issued_unix_s)
    said = LeaderChanged(epoch=1, name="a coordinator")
    for each, passport in ((who, stolen.passport), (honest, world.renewed(honest).passport)):
        signed = Author(each, lambda shown=passport: shown, "home", world.clock.unix_s).signed(Kinds.LEADER, said)
        if each is honest:
            signed_by_coordinator(Kinds.LEADER, LeaderChanged, signed, "home", reader)
        else:
            with pytest.raises(PassportRefused, match="revoked"):
                signed_by_coordinator(Kinds.LEADER, LeaderChanged, signed, "home", reader)


def test_a_revoked_coordinator_signs_with_a_passport_that_its_revocation_does_not_reach(world: World) -> None:
    """
    Attack: a revoked coordinator holds a passport of later than its revocation, as a restored database makes them.
    Expected: `PassportRefused` for what it signs: the key itself is out.
    Unharmed: the passport alone, which is within its time, is read as before.
    """
    assert isinstance(world.clock, HandClock)
    who = world.member(Role.COORDINATOR)
    reader = PassportReader(world.state.network, world.clock)
    world.registrar.revoke(who.node, "stolen")
    reader.learn(world.word.revocations())
    with world.database.writing() as connection:
        connection.execute(sql.update(db.enrolments).values(revoked_unix_s=None))
    world.clock.now_s += 2.0
    later = world.renewed(who).passport
    reader.read(later, holder=who.node)
    said = LeaderChanged(epoch=1, name="a coordinator")
    signed = Author(who, lambda: later, "home", world.clock.unix_s).signed(Kinds.LEADER, said)
    with pytest.raises(PassportRefused, match="revoked"):
        signed_by_coordinator(Kinds.LEADER, LeaderChanged, signed, "home", reader)


def test_leavers_crowd_a_revocation_out_of_what_the_bus_is_told(world: World) -> None:
    """
    Attack: 12,000 devices of one owner leave, so that the accounts' JWTs pass the bus's limit and no revocation is
    brought to the server any more; after them a thief is revoked.
    Expected: the JWTs stay below that limit, and name the thief, and so does everybody's list.
    Unharmed: a device that came back is named to everybody as one that did, before all leavers.
    """
    thief, back = world.member(), world.member()
    world.ask(back, Leave())
    world.ask(back, world.enrolment(back, world.invitation()))
    with world.database.writing() as connection:
        row = connection.execute(sql.select(db.enrolments).where(db.enrolments.c.node == back.node)).one()._asdict()
        left_s = world.clock.unix_s() + 1.0
        leavers = [
            row | {"node": hashlib.sha256(b"%d" % index).hexdigest(), "left_unix_s": left_s} for index in range(12_000)
        ]
        connection.execute(sql.insert(db.enrolments), leavers)
    world.registrar.revoke(thief.node, "stolen")
    for account_jwt in world.word.accounts().values():
        assert len(account_jwt) < 0.9 * MESSAGE_BYTES_MAX
        assert user_nkey(thief.node) in cut_by(account_jwt)
    told, _ = unseal(Kinds.REVOCATIONS, RevocationList, world.word.revocations())
    assert [(each.node, each.departure) for each in told.revocations[:2]] == [
        (thief.node, Departure.REVOKED),
        (back.node, Departure.RETURNED),
    ]


def test_the_clock_of_a_registrar_is_set_back_to_keep_a_passport_alive(world: World) -> None:
    """
    Attack: the registrar's clock is set back by a day before a device is revoked.
    Expected: the revocation counts from the newest passport that the device was given.
    Unharmed: once the clock is right again, that passport is void.
    """
    assert isinstance(world.clock, HandClock)
    device = world.member()
    passport = world.renewed(device).passport
    world.clock.now_s -= 86_400
    world.registrar.revoke(device.node, "sold")
    world.clock.now_s += 86_400
    reader = PassportReader(world.state.network, world.clock)
    reader.learn(world.word.revocations())
    with pytest.raises(PassportRefused):
        reader.read(passport)


def test_a_passport_is_used_after_its_hour(world: World) -> None:
    """
    Attack: a device that was cut off from the registrar goes on with its passport.
    Expected: `PassportRefused` an hour (and the grace for clocks) later, by everybody, with no list of revocations.
    Unharmed: a renewal brings it back.
    """
    assert isinstance(world.clock, HandClock)
    device = world.member()
    passport = world.renewed(device).passport
    reader = PassportReader(world.state.network, world.clock)
    world.clock.now_s += PASSPORT_LIFE_S + 61
    with pytest.raises(PassportRefused, match="expired"):
        reader.read(passport)
    assert reader.read(world.renewed(device).passport).node == device.node


def test_an_enrolment_is_taken_over_with_its_used_invitation(world: World) -> None:
    """
    Attack: somebody who saw a device's invitation sends the device's own enrolment again, signed with another key.
    Expected: `InvitationRefused`.
    Unharmed: the device's role, name and key are as they were.
    """
    device, thief, invitation = new_identity(), new_identity(), world.invitation()
    asked = world.enrolment(device, invitation)
    world.ask(device, asked)
    before = world.registrar.members()
    assert isinstance(asked, Enrol)
    with pytest.raises(InvitationRefused):
        world.ask(thief, asked)
    assert world.registrar.members() == before


def test_the_journal_is_rewritten_by_who_stole_the_database(world: World) -> None:
    """
    Attack: whoever holds the database removes a consent and what follows, and chains new entries properly.
    Expected: `JournalBroken` against the head that the member was given with its passport.
    Unharmed: the member's head, which is on another device.
    """
    device = world.member()
    seq, _, digest = world.renewed(device).journal_head.partition(":")
    kept = Head(int(seq), digest)
    with world.database.writing() as connection:
        first = next(entry.seq for entry in read_all(connection) if entry.kind == "consent_given")
        connection.execute(sql.delete(db.journal).where(db.journal.c.seq >= first))
        for _ in range(5):
            append(connection, world.clock.unix_s(), Kind.ENROLLED, device.node, {"name": "nobody"})
    verify(world.journal())
    with pytest.raises(JournalBroken, match="written anew"):
        verify(world.journal(), (kept,))


def test_strangers_flood_the_registrar_to_fill_its_disk(world: World) -> None:
    """
    Attack: well signed requests of keys that nobody knows, and guesses at an invitation's secret.
    Expected: each is refused by name; of the guesses, a bounded number is recorded.
    Unharmed: the journal has not grown with the flood, and the invitation works.
    """
    invitation = world.invitation()
    before = len(world.kinds())
    for _ in range(20):
        stranger = new_identity()
        with pytest.raises(RequestRefused):
            world.ask(stranger, Renew())
        guess = msgspec.structs.replace(invitation, secret=new_identity().seed)
        with pytest.raises(InvitationRefused):
            world.ask(stranger, world.enrolment(stranger, guess))
    assert len(world.kinds()) - before <= 3
    device = new_identity()
    world.ask(device, world.enrolment(device, invitation))
    unharmed(world, device.node)


def test_a_revoked_operator_left_invitations_behind(world: World) -> None:
    """
    Attack: a thief of an operator's key makes invitations, and uses one after the operator was revoked.
    Expected: `InvitationRefused`.
    Unharmed: who was admitted before stays a member, and may repeat a lost answer; another operator's work is good.
    """
    operator, other, before, after, third = world.member(Role.OPERATOR), world.member(Role.OPERATOR), *new_identities(3)
    asked = Invite(role=Role.NODE, tier=Tier.KEYED, life_s=600.0)
    first, second, others = (from_text(world.ask(who, asked).text) for who in (operator, operator, other))  # type: ignore[union-attr]
    world.ask(before, world.enrolment(before, first))
    world.registrar.revoke(operator.node, "its key was stolen")
    with pytest.raises(InvitationRefused, match="invite no more"):
        world.ask(after, world.enrolment(after, second))
    world.ask(before, world.enrolment(before, first))
    world.ask(third, world.enrolment(third, others))
    unharmed(world, operator.node, other.node, before.node, third.node)


def test_an_operators_key_fills_the_table_of_invitations(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Attack: an operator's stolen key makes invitations without end, so that nobody else can be invited.
    Expected: `RequestRefused` after its own share.
    Unharmed: the machine and another operator go on inviting, and one command withdraws all of it.
    """
    assert INVITATIONS_OPEN_AFAR_MAX <= 200
    monkeypatch.setattr("fallow.policy.enrolment.INVITATIONS_OPEN_AFAR_MAX", 3)
    thief, other = world.member(Role.OPERATOR), world.member(Role.OPERATOR)
    asked = Invite(role=Role.NODE, tier=Tier.KEYED, life_s=600.0, name="mischief")
    for _ in range(3):
        world.ask(thief, asked)
    with pytest.raises(RequestRefused, match="open invitations already"):
        world.ask(thief, asked)
    world.ask(other, msgspec.structs.replace(asked, name="good"))
    world.invitation()
    assert len(world.ask(other, Withdraw(which="mischief")).invitations) == 3  # type: ignore[union-attr]
    unharmed(world, thief.node, other.node)


def test_a_device_moves_between_cells_to_fill_the_journal(world: World) -> None:
    """
    Attack: a device asks for another cell with every renewal, existing ones and invented ones.
    Expected: `RequestRefused`, but for one move an hour to a cell that there is.
    Unharmed: the journal has one entry of it, and the registrar tells no invented cell anything.
    """
    device, coordinator = world.member(), new_identity()
    invited = from_text(world.registrar.invite(Role.COORDINATOR, cell="harbour").text)
    world.ask(coordinator, world.enrolment(coordinator, invited))
    moved = 0
    for cell in ("harbour", "home", "harbour", "a", "b", "c", "home"):
        try:
            world.ask(device, Renew(cell=cell))
            moved += world.kinds().count("cell_changed") > moved
        except RequestRefused:
            pass
    assert moved == world.kinds().count("cell_changed") == 1
    assert world.word.cells() == ("home", "harbour")
    unharmed(world, device.node, coordinator.node)


def test_a_restored_database_has_forgotten_a_revocation(world: World) -> None:
    """
    Attack: the registrar's database is put back to a copy from before a revocation, by a thief or after a crash.
    Expected: who heard of the revocation still refuses the key's passport, whatever newer lists leave out.
    Unharmed: what is revoked afterwards counts as newer, and is believed.
    """
    clock, device, second = world.clock, world.member(), world.member()
    assert isinstance(clock, HandClock)
    passport, its = world.renewed(device).passport, world.renewed(second).passport
    reader = PassportReader(world.state.network, clock)
    world.registrar.revoke(device.node, "stolen")
    reader.learn(world.word.revocations())
    with world.database.writing() as connection:
        connection.execute(sql.update(db.enrolments).values(revoked_unix_s=None))
        db.set_setting(connection, "revocations", "0")
    clock.now_s += 1.0
    world.registrar.revoke(second.node, "lost")
    assert reader.learn(world.word.revocations()) is not None
    for who, text in ((device, passport), (second, its)):
        with pytest.raises(PassportRefused, match="revoked"):
            reader.read(text, holder=who.node)


def test_one_host_takes_every_connection_of_the_registrar(world: World) -> None:
    """
    Attack: one host opens connections without end and says nothing on them, not even of TLS.
    Expected: beyond its share they are closed at once.
    Unharmed: when it lets go of one, an honest member behind the same address gets in.
    """
    share = 4

    async def scenario() -> None:
        async with served(world, connections=ServerLimits(max_connections_per_address=share)) as server:
            held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(share)]
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            assert await reader.read() == b"", "closed"
            writer.close()
            assert not any(each.at_eof() for each, _ in held)
            for _, each in held:
                each.close()
                await each.wait_closed()
            device, invitation = new_identity(), world.invitation()
            while True:  # the server hears of the closing in its own time
                try:
                    await meet(invitation)
                    break
                except RegistrarUnavailable:
                    await asyncio.sleep(0.02)
            unharmed(world)
            world.ask(device, world.enrolment(device, invitation))

    run(scenario())


def test_slow_publications_keep_everybody_waiting(world: World) -> None:
    """
    Attack: one host begins as many publications as it can, and never ends them.
    Expected: beyond two of them it is told to come again.
    Unharmed: the charter, the list of revocations and signed requests are answered meanwhile.
    """

    async def scenario() -> None:
        async with served(world) as server:
            tls = client_context(world.state.network.authority_pem)
            begun = b"POST /council/publish HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx"
            held = []
            for _ in range(2):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", server.port, ssl=tls, server_hostname=REGISTRAR_NAME
                )
                writer.write(begun)
                await writer.drain()
                held.append((reader, writer))
            known = met(world.state.network_json)
            async with RegistrarClient(known, [server.url]) as client:
                while True:  # until both have arrived
                    try:
                        await client.post_publication(b"nonsense")
                    except RegistrarUnavailable:
                        break
                    except CharterInvalid:
                        continue
                assert await client.revocations()
                assert (await client.places()).registrar_urls
                device = new_identity()
                await client.admission(device, world.enrolment(device, world.invitation()))
            for _, writer in held:
                writer.transport.abort()
            unharmed(world, device.node)

    run(scenario())


def new_identities(count: int) -> list[Identity]:
    return [new_identity() for _ in range(count)]


def test_a_captured_bus_swallows_the_list_of_revocations(world: World, tmp_path: Path) -> None:
    """
    Attack: the bus's server, captured, passes no list of revocations on, and the thief goes on with a good passport.
    Expected: processes ask the registrar by HTTPS in each quarter of a lease, and refuse the passport.
    Unharmed: another member's passport is still believed.
    """

    async def scenario() -> None:
        async with served(world):
            thief, honest = world.member(), world.member()
            stolen, good = world.renewed(thief).passport, world.renewed(honest).passport
            process = Process(await joined(world, tmp_path / "device"), tmp_path / "device", lease_s=0.1 * CHECKS)
            await process.start()
            process.passports.read(stolen, holder=thief.node)
            world.registrar.revoke(thief.node, "stolen")
            while not process.passports.revoked(thief.node):
                await asyncio.sleep(0.01)
            with pytest.raises(PassportRefused, match="revoked"):
                process.passports.read(stolen, holder=thief.node)
            process.passports.read(good, holder=honest.node)
            await process.close()

    run(scenario())


def test_a_process_is_restarted_while_the_registrar_is_kept_away(world: World, tmp_path: Path) -> None:
    """
    Attack: the registrar is kept from a process, which is then made to restart, so that it forgets who was revoked.
    Expected: it reads the last list from its own disk, and refuses the revoked key's passport.
    Unharmed: it starts, and believes the others.
    """

    async def scenario() -> None:
        folder = tmp_path / "device"
        async with served(world):
            thief, honest = world.member(), world.member()
            stolen, good = world.renewed(thief).passport, world.renewed(honest).passport
            world.registrar.revoke(thief.node, "stolen")
            process = Process(await joined(world, folder), folder)
            await process.start()
            await process.close()
        again = Process(load(folder, process.member.who, SystemClock()), folder)
        await again.start()
        with pytest.raises(PassportRefused, match="revoked"):
            again.passports.read(stolen, holder=thief.node)
        again.passports.read(good, holder=honest.node)
        await again.close()

    run(scenario())
