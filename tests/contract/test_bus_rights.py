"""What passports allow on the bus, on a real server: everybody keeps to their own name, and who is out stays out."""

import asyncio
import logging
import ssl
import time
from pathlib import Path

import pytest

from fallow.domain.credentials import Role
from fallow.domain.errors import BusTimeout, BusUnavailable, FallowError, PassportRefused, RequestRefused
from fallow.domain.fleet import Subjects
from fallow.fabric.accounts import push_account
from fallow.fabric.disconnects import EXPIRED, NatsPresence
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.nats_lease import NatsLease
from fallow.policy.bus_rights import inbox, lease_bucket
from fallow.trust.passports import Held
from tests.contract.networks import CELL, TestNetwork, person, trusted_rig
from tests.unit.fabric.support import eventually

REVOKED_WITHIN_S = 5.0
ALICE, BOB, CAROL = (person(name) for name in ("alice", "bob", "carol"))
SUBJECTS = Subjects(CELL)


NODE_MAY_NOT = [
    SUBJECTS.heartbeat(BOB.node),
    SUBJECTS.leaving(BOB.node),
    SUBJECTS.relay(ALICE.node, BOB.node),
    SUBJECTS.command(BOB.node),
    SUBJECTS.command(ALICE.node),
    SUBJECTS.leader,
    SUBJECTS.gone,
    SUBJECTS.hello,
    SUBJECTS.revocations,
    SUBJECTS.halt,
    SUBJECTS.charter,
    SUBJECTS.coordinator(ALICE.node),
    SUBJECTS.gateway(ALICE.node),
    SUBJECTS.route(ALICE.node),
    SUBJECTS.store(ALICE.node),
    SUBJECTS.digest,
    SUBJECTS.ask,
    f"{inbox(BOB.node)}.answer",
    "$JS.API.STREAM.DELETE.KV_fallow_home",
    "$KV.fallow_home.leader",
    "$SYS.REQ.CLAIMS.UPDATE",
    "anything",
]
GATEWAY_MAY_NOT = [
    SUBJECTS.gateway(BOB.node),
    SUBJECTS.route(BOB.node),
    SUBJECTS.store(BOB.node),
    SUBJECTS.relay(BOB.node, BOB.node),
    SUBJECTS.heartbeat(ALICE.node),
    SUBJECTS.command(BOB.node),
    SUBJECTS.leader,
    SUBJECTS.gone,
    SUBJECTS.halt,
    SUBJECTS.revocations,
    "$JS.API.STREAM.INFO.KV_fallow_home",
]
COORDINATOR_MAY_NOT = [
    SUBJECTS.coordinator(BOB.node),
    SUBJECTS.heartbeat(BOB.node),
    SUBJECTS.route(BOB.node),
    SUBJECTS.halt,
    SUBJECTS.revocations,
    Subjects("other").leader,
    "$JS.API.STREAM.DELETE.KV_fallow_home",
    "$JS.API.STREAM.PURGE.KV_fallow_home",
    "$JS.API.STREAM.CREATE.OTHER",
    "$KV.fallow_other.leader",
]


@pytest.mark.parametrize(
    ("role", "forbidden"),
    [
        (Role.NODE, NODE_MAY_NOT),
        (Role.GATEWAY, GATEWAY_MAY_NOT),
        (Role.COORDINATOR, COORDINATOR_MAY_NOT),
        (Role.READER, [SUBJECTS.halt, SUBJECTS.heartbeat(ALICE.node), SUBJECTS.hello]),
        (Role.REGISTRAR, [SUBJECTS.leader, SUBJECTS.command(BOB.node), SUBJECTS.heartbeat(ALICE.node)]),
    ],
)
def test_what_a_role_may_not_say_reaches_nobody(
    role: Role, forbidden: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            ear, heard = await r.listen()
            await ear.subscribe("$SYS.>", lambda *_: _said(heard))
            alice = await r.join(r.network.member(ALICE, role))
            for subject in forbidden:
                await alice.publish(subject, b"forged")
            allowed = Subjects(CELL).status if role in {Role.READER} else _own(role)
            await alice.publish(allowed, b"honest")
            await eventually(lambda: (allowed, b"honest") in heard)
            assert [message for _, message in heard] == [b"honest"]
            assert alice.connected, "a refused message breaks nothing else"

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    for subject in forbidden:
        assert f'permissions violation for publish to "{subject.lower()}"' in caplog.text


async def _said(heard: list[tuple[str, bytes]]) -> None:
    heard.append(("$SYS", b"?"))


def _own(role: Role) -> str:
    return {
        Role.NODE: SUBJECTS.heartbeat(ALICE.node),
        Role.GATEWAY: SUBJECTS.route(ALICE.node),
        Role.COORDINATOR: SUBJECTS.command(BOB.node),
        Role.REGISTRAR: SUBJECTS.revocations,
    }[role]


@pytest.mark.parametrize(
    ("role", "forbidden"),
    [
        (
            Role.NODE,
            [
                ">", "*", "fallow.>", "_INBOX.>", "_INBOX.*.*", "$JS.>", "$KV.>", f"{inbox(BOB.node)}.>",
                SUBJECTS.command(BOB.node), SUBJECTS.command("*"), SUBJECTS.heartbeat(), SUBJECTS.heartbeat(BOB.node),
                SUBJECTS.relay(BOB.node), SUBJECTS.relay("*"), SUBJECTS.route(), SUBJECTS.status, SUBJECTS.catalogue,
            ],
        ),
        (Role.GATEWAY, [">", SUBJECTS.heartbeat(), SUBJECTS.route(), SUBJECTS.command("*"), SUBJECTS.relay("*")]),
        (Role.COORDINATOR, [">", "_INBOX.>", SUBJECTS.relay("*"), SUBJECTS.command(BOB.node), "$KV.>", "$SYS.>"]),
        (Role.OPERATOR, [">", SUBJECTS.heartbeat(), SUBJECTS.status, f"{inbox(BOB.node)}.>"]),
    ],
)  # fmt: skip
def test_what_a_role_may_not_hear_is_refused_by_name(role: Role, forbidden: list[str], tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            alice = await r.join(r.network.member(ALICE, role))
            other = await r.join(r.network.anything("someone else"))
            heard: list[tuple[str, bytes]] = []

            async def hear(subject: str, message: bytes) -> None:
                heard.append((subject, message))

            for subject in forbidden:
                with pytest.raises(PassportRefused, match="does not allow to listen"):
                    await alice.subscribe(subject, hear)
                await other.publish(subject.replace("*", BOB.node).replace(">", "x"), b"secret")
            await alice.subscribe(SUBJECTS.halt, hear)
            await other.publish(SUBJECTS.halt, b"for all")
            await eventually(lambda: bool(heard))
            assert heard == [(SUBJECTS.halt, b"for all")]

    asyncio.run(main())


def test_a_queue_group_opens_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            alice = await r.join(r.network.member(ALICE))
            with pytest.raises(PassportRefused):
                await alice.subscribe(SUBJECTS.command(BOB.node), lambda *_: _said([]), queue="q")

    asyncio.run(main())


def test_every_role_can_do_its_work(tmp_path: Path) -> None:
    """Orders and their answers, routes, status, the relay, the lease: by nothing but the roles' own rights."""

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            node, gateway = await r.join(r.network.member(ALICE)), await r.join(r.network.member(BOB, Role.GATEWAY))
            coordinator = await r.join(r.network.member(CAROL, Role.COORDINATOR))
            reader = await r.join(r.network.member(person("reader"), Role.READER))
            told: list[str] = []

            async def hear(subject: str, _: bytes) -> None:
                told.append(subject)

            async def answer(subject: str, message: bytes) -> bytes:
                told.append(subject)
                return message + b"!"

            await node.subscribe(SUBJECTS.command(ALICE.node), answer)
            await node.subscribe(SUBJECTS.relay(ALICE.node), hear)
            await node.subscribe(SUBJECTS.leader, hear)
            await gateway.subscribe(SUBJECTS.gone, hear)
            await coordinator.subscribe(SUBJECTS.heartbeat(), hear)
            await coordinator.subscribe(SUBJECTS.route(), answer, at_once=4)
            await coordinator.subscribe(SUBJECTS.status, answer, queue="coordinators")
            assert await coordinator.request(SUBJECTS.command(ALICE.node), b"place", 5) == b"place!"
            assert await gateway.request(SUBJECTS.route(BOB.node), b"chain", 5) == b"chain!"
            assert await reader.request(SUBJECTS.status, b"", 5) == b"!"
            await node.publish(SUBJECTS.heartbeat(ALICE.node), b"")
            await gateway.publish(SUBJECTS.relay(ALICE.node, BOB.node), b"")
            await coordinator.publish(SUBJECTS.leader, b"")
            await coordinator.publish(SUBJECTS.gone, b"")
            expected = {SUBJECTS.heartbeat(ALICE.node), SUBJECTS.relay(ALICE.node, BOB.node), SUBJECTS.leader}
            await eventually(lambda: expected | {SUBJECTS.gone} <= set(told))

            lease = await NatsLease.open(coordinator, lease_bucket(CELL), "leader", 1.0)
            wrote: list[None] = []
            await lease.watch(lambda: wrote.append(None))
            assert await lease.read() is None
            revision = await lease.write(b"carol", 0)
            assert revision is not None and await lease.write(b"again", revision) is not None
            await eventually(lambda: len(wrote) >= 2)
            for other in (node, gateway, reader):
                with pytest.raises((BusTimeout, BusUnavailable)):
                    await NatsLease.open(other, lease_bucket(CELL), "leader", 1.0)

    asyncio.run(main())


def test_a_question_that_one_may_not_ask_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            alice = await r.join(r.network.member(ALICE))
            with pytest.raises(PassportRefused, match="does not allow to ask"):
                await alice.request(SUBJECTS.status, b"", 0.2)

    asyncio.run(main())


# --- how it ends ----------------------------------------------------------------------------------


class Renewable:
    """Credentials whose passport changes."""

    def __init__(self, held: Held) -> None:
        self._held, self.passport, self.authority_pem = held, held.passport, held.authority_pem

    def sign(self, nonce: bytes) -> bytes:
        return self._held.sign(nonce)


def test_an_expired_passport_is_cut_and_its_successor_joins_again_without_a_loss(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            short = r.network.passport(ALICE.node, life_s=2)
            credentials = Renewable(r.network.held(ALICE, short))
            alice = await NatsBus.connect(r.broker.urls, ALICE.node, credentials)
            forgetful = await r.join(r.network.held(BOB, r.network.passport(BOB.node, life_s=2)))
            credentials.passport = r.network.passport(ALICE.node)
            told: list[tuple[str, str]] = []
            presence = NatsPresence(r.broker.urls[0], r.network.presence(), r.network.account_name)
            await presence.start(lambda who, why: told.append((who, why)))
            coordinator = await r.join(r.network.member(CAROL, Role.COORDINATOR))
            beats: list[bytes] = []

            async def hear(_: str, message: bytes) -> None:
                beats.append(message)

            await coordinator.subscribe(SUBJECTS.heartbeat(), hear)
            await eventually(lambda: not forgetful.connected, within_s=5)
            await eventually(lambda: alice.client.stats["reconnects"] == 1 and alice.connected, within_s=5)
            await alice.publish(SUBJECTS.heartbeat(ALICE.node), b"renewed")
            await eventually(lambda: beats == [b"renewed"])
            assert told == [], "both were cut because their passports ended: nobody is lost"
            with pytest.raises(PassportRefused, match="expired"):
                await r.join(r.network.held(BOB, short))
            await alice.close()
            await eventually(lambda: [who for who, _ in told] == [ALICE.node])
            assert EXPIRED not in told[0][1]
            await presence.close()

    asyncio.run(main())


def test_a_revoked_key_is_cut_at_once_and_stays_out_also_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        network = TestNetwork()
        before = network.bus_trust()
        async with trusted_rig(tmp_path, network, before) as r:
            alice, bob = await r.join(network.member(ALICE)), await r.join(network.member(BOB))
            told: list[tuple[str, str]] = []
            presence = NatsPresence(r.broker.urls[0], network.presence(), network.account_name)
            await presence.start(lambda who, why: told.append((who, why)))
            newest = network.member(ALICE)  # nobody gets another one after that
            began_s = time.monotonic()
            await r.revoke(ALICE.node)
            await eventually(lambda: not alice.connected and bool(told), within_s=REVOKED_WITHIN_S)
            assert time.monotonic() - began_s < REVOKED_WITHIN_S
            assert [who for who, _ in told] == [ALICE.node] and "Revoked" in told[0][1]
            assert bob.connected
            with pytest.raises(PassportRefused, match="revoked"):
                await r.join(newest)
            await presence.close()
        # Whoever starts the server brings the account as it was before: the newer word in the server's folder holds.
        async with trusted_rig(tmp_path, network, before) as r:
            with pytest.raises(PassportRefused, match="revoked"):
                await r.join(network.held(ALICE, network.passport(ALICE.node, issued_unix_s=time.time() - 10)))
            assert (await r.join(network.member(BOB))).connected

    asyncio.run(main())


def test_a_key_that_is_welcome_again_gets_in_with_a_new_passport(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            bus = await r.join(r.network.claims())
            revoked = {ALICE.node: time.time() - 5}
            await push_account(bus, r.network.account_name, r.network.account_jwt(revoked))
            with pytest.raises(PassportRefused):
                await r.join(r.network.held(ALICE, r.network.passport(ALICE.node, issued_unix_s=time.time() - 60)))
            assert (await r.join(r.network.member(ALICE))).connected

    asyncio.run(main())


def test_two_revocations_within_a_second_both_hold(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            alice, bob = await r.join(r.network.member(ALICE)), await r.join(r.network.member(BOB))
            await asyncio.sleep(1 - time.time() % 1)  # to the beginning of a second
            await r.revoke(ALICE.node)
            await r.revoke(ALICE.node, BOB.node)
            await eventually(lambda: not alice.connected and not bob.connected, within_s=REVOKED_WITHIN_S)

    asyncio.run(main())


def test_only_the_registrars_credential_changes_the_account_and_no_other_operators_word_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            text = r.network.account_jwt({BOB.node: time.time()})
            bob = await r.join(r.network.member(BOB))
            watcher = await r.join(r.network.presence())
            thieves = (bob, watcher, await r.join(r.network.anything("all")))
            for thief in thieves:
                with pytest.raises(FallowError):
                    await asyncio.wait_for(push_account(thief, r.network.account_name, text), 5)
            registrar = await r.join(r.network.claims())
            with pytest.raises(RequestRefused):
                await push_account(registrar, r.network.account_name, "nonsense")
            assert bob.connected and (await r.join(r.network.member(ALICE))).connected

    asyncio.run(main())


def test_a_new_certificate_is_shown_while_connections_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            alice = await r.join(r.network.member(ALICE, Role.NODE))
            before = await shown_certificate(r.broker.urls[0])
            r.broker.renew(r.network.bus_trust())
            for _ in range(100):
                if await shown_certificate(r.broker.urls[0]) != before:
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the server shows its old certificate")
            assert alice.connected and alice.client.stats["reconnects"] == 0
            (await r.join(r.network.member(BOB, Role.NODE)))

    asyncio.run(main())


async def shown_certificate(url: str) -> bytes:
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    port = int(url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anybody)
    writer.close()
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate
