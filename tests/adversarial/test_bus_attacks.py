"""Attacks on the control bus: on who may join, on who is believed, and on what a member may do to others.

A real nats-server in trusted mode. Each test states the attack, the refusal that is expected, and what stayed unharmed.
What each role may say and hear, subject by subject: `tests/contract/test_bus_rights.py`.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import nkeys
import pytest

from fallow.domain.credentials import Role
from fallow.domain.errors import BusUnavailable, PassportRefused, TrustError
from fallow.domain.fleet import Subjects
from fallow.domain.network import BUS_NAME
from fallow.fabric.accounts import push_account
from fallow.fabric.broker import Broker
from fallow.fabric.nats_bus import NatsBus
from fallow.policy.bus_rights import inbox
from fallow.trust.certificates import client_context, server_certificate, server_context, write_private
from fallow.trust.envelope import Kind, pre_authentication
from fallow.trust.passports import Held
from tests.contract.networks import CELL, TestNetwork, TrustedRig, person, trusted_rig
from tests.unit.fabric.support import eventually

ALICE, BOB, CAROL, MALLORY = (person(name) for name in ("alice", "bob", "carol", "mallory"))
SUBJECTS = Subjects(CELL)


async def refused(rig: TrustedRig, held: Held, match: str) -> None:
    """Somebody does not get in; who is welcome still does."""
    with pytest.raises(PassportRefused, match=match):
        await rig.join(held)
    assert (await rig.join(rig.network.member(ALICE))).connected


def stranger(network: TestNetwork, **keys: object) -> TestNetwork:
    """Another network that shows our server's certificate authority."""
    return TestNetwork(authority=network.authority, **keys)  # type: ignore[arg-type]


# --- who may join ---------------------------------------------------------------------------------


def test_a_stolen_passport_without_its_key(tmp_path: Path) -> None:
    """
    Attack: Mallory shows Alice's passport, which every peer of Alice has seen.
    Expected: `PassportRefused`: the server's nonce is not signed by Alice's key.
    Unharmed: Alice joins with the same passport.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            await refused(r, r.network.held(MALLORY, r.network.passport(ALICE.node)), "not of this key")

    asyncio.run(main())


def test_a_passport_by_another_account_of_the_same_operator(tmp_path: Path) -> None:
    """
    Attack: Mallory has an account key that our operator never admitted to this server.
    Expected: `PassportRefused`, and soon.
    Unharmed: Alice joins.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            other = stranger(r.network, operator=r.network.operator, system=r.network.system)
            began_s = time.monotonic()
            await refused(r, other.member(MALLORY), "another network")
            assert time.monotonic() - began_s < 4.0

    asyncio.run(main())


def test_a_passport_that_a_device_signed_for_itself(tmp_path: Path) -> None:
    """
    Attack: Mallory signs a coordinator's passport with her own key.
    Expected: `PassportRefused`: it is another network's.
    Unharmed: Alice joins.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            await refused(r, stranger(r.network, account=MALLORY).member(MALLORY, Role.COORDINATOR), "another network")

    asyncio.run(main())


def test_an_altered_passport(tmp_path: Path) -> None:
    """
    Attack: Mallory widens her own passport: a coordinator's claims under the signature of a node's.
    Expected: `PassportRefused`.
    Unharmed: Alice joins.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            mine = r.network.passport(MALLORY.node)
            wider = r.network.passport(MALLORY.node, Role.COORDINATOR)
            head, body = wider.split(".")[:2]
            await refused(r, r.network.held(MALLORY, f"{head}.{body}.{mine.split('.')[2]}"), "refused our passport")

    asyncio.run(main())


def test_an_expired_passport(tmp_path: Path) -> None:
    """
    Attack: Mallory was a member until a minute ago.
    Expected: `PassportRefused`: her passport has expired.
    Unharmed: Alice joins.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            old = r.network.passport(MALLORY.node, issued_unix_s=time.time() - 100, life_s=50)
            await refused(r, r.network.held(MALLORY, old), "expired")

    asyncio.run(main())


@pytest.mark.parametrize("user", [{}, {"user": "fallow", "password": "x"}, {"token": "x"}])
def test_no_passport_at_all(user: dict[str, str], tmp_path: Path) -> None:
    """
    Attack: Mallory comes without a name, with a password, or with a token.
    Expected: the server knows no such users, and ends the connection.
    Unharmed: nothing was said to her but a greeting.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            with pytest.raises((nats.errors.Error, OSError)):
                await nats.connect(
                    r.broker.urls[0],
                    tls=client_context(r.network.authority.certificate_pem),
                    tls_hostname=BUS_NAME,
                    tls_handshake_first=True,
                    allow_reconnect=False,
                    **user,
                )

    asyncio.run(main())


def test_a_client_without_tls(tmp_path: Path) -> None:
    """
    Attack: Mallory talks in the clear, to have others' words in the clear.
    Expected: the server does not say a word before TLS.
    Unharmed: whatever passes on the bus.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            port = int(r.broker.urls[0].rsplit(":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"CONNECT {}\r\nPING\r\n")
            async with asyncio.timeout(10):
                assert b"INFO" not in await reader.read(4096)
            writer.close()

    asyncio.run(main())


# --- who is believed ------------------------------------------------------------------------------


def test_a_server_with_everything_of_ours_but_the_certificate(tmp_path: Path) -> None:
    """
    Attack: Mallory answers at the bus's address with our operator's and account's words, and her own authority.
    Expected: `TrustError` in the client, before it says anything.
    Unharmed: Alice's passport, which was not shown to her.
    """

    async def main() -> None:
        network = TestNetwork()
        thief = TestNetwork(network.operator, network.account, network.system, network.registrar)
        async with trusted_rig(tmp_path, network, thief.bus_trust()) as r:
            with pytest.raises(TrustError, match="not this network's server"):
                await r.join(network.member(ALICE))

    asyncio.run(main())


def test_a_server_that_talks_a_client_out_of_tls(tmp_path: Path) -> None:
    """
    Attack: Mallory answers in the clear, as a server of the development mode does.
    Expected: `TrustError`: the client says nothing in the clear.
    Unharmed: Alice's passport, which was not shown; a server that is not there is still told apart.
    """

    async def main() -> None:
        broker = Broker(tmp_path)
        await broker.start()
        with pytest.raises(TrustError, match="TLS"):
            await NatsBus.connect(broker.urls, "n", TestNetwork().member(ALICE))
        await broker.close()
        with pytest.raises(BusUnavailable):
            await NatsBus.connect(broker.urls, "n", TestNetwork().member(ALICE))

    asyncio.run(main())


@asynccontextmanager
async def captured_server(folder: Path, network: TestNetwork, nonce: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server with the bus's own certificate and key that asks for a signature of its choice."""
    certificate = server_certificate(network.authority, BUS_NAME, time.time())
    write_private(folder / "c.pem", certificate.certificate_pem)
    write_private(folder / "k.pem", certificate.key_pem)
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "max_payload": 1 << 20, "auth_required": True, "nonce": nonce, "headers": True}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        said.append(await reader.read(65_536))
        writer.close()

    context = server_context(folder / "c.pem", folder / "k.pem")
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"tls://127.0.0.1:{server.sockets[0].getsockname()[1]}", said
    finally:
        server.close()


@pytest.mark.parametrize(
    "nonce",
    [
        pre_authentication(Kind.HALT, b'{"network":"x","epoch":1,"why":"y","issued_unix_s":1}').decode(),
        pre_authentication(Kind.GRANT, b"{}").decode(),
        "eyJhbGciOiJlZDI1NTE5LW5rZXkifQ.e30",
        "short",
        "a" * 65,
        "0123456789abcde\n",
        "",
    ],
)
def test_a_captured_server_that_asks_for_a_signature_of_its_choice(nonce: str, tmp_path: Path) -> None:
    """
    Attack: A captured server hands out a halt, a grant or a passport as its nonce, to have a device's key sign it.
    Expected: `TrustError`: what is no nonce is not signed.
    Unharmed: the device's key signed nothing, and still signs the nonce of a real server.
    """
    signed: list[bytes] = []

    class Watched(Held, frozen=True):
        def sign(self, nonce: bytes) -> bytes:
            signed.append(nonce)
            return super().sign(nonce)

    async def main() -> None:
        network = TestNetwork()
        held = network.member(ALICE)
        async with captured_server(tmp_path, network, nonce) as (url, said):
            with pytest.raises(TrustError, match="no right to"):
                await NatsBus.connect(url, "n", Watched(held.passport, held.identity, held.authority_pem))
        assert signed == [] and not any(b"CONNECT" in words for words in said)
        async with trusted_rig(tmp_path, network) as r:
            alice = await NatsBus.connect(r.broker.urls, "n", Watched(held.passport, held.identity, held.authority_pem))
            assert len(signed) == 1, "a real server's nonce is one"
            await alice.close()

    asyncio.run(main())


def test_a_captured_server_holds_no_key_that_signs(tmp_path: Path) -> None:
    """
    Attack: Mallory copies everything that the server has on its disk.
    Expected: she finds the key of its certificate and no other.
    Unharmed: the keys by which somebody is let in or given rights, and the authority's.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            network = r.network
            await (await r.join(network.member(ALICE))).publish(SUBJECTS.heartbeat(ALICE.node), b"")
            loot = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
            assert b"PRIVATE KEY" in loot, "its own"
            assert network.authority.key_pem.encode() not in loot
            for owner in (network.operator, network.account, network.system, network.registrar, ALICE):
                assert owner.seed not in loot and owner.seed.hex().encode() not in loot
                for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER):
                    assert nkeys.encode_seed(owner.seed, prefix) not in loot

    asyncio.run(main())


# --- what a member may do to others ---------------------------------------------------------------


def test_a_node_that_speaks_in_anothers_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """
    Attack: Mallory, a member, sends Bob's heartbeats, goodbyes and sealed frames, and answers to Bob's questions.
    Expected: the server drops all four, and says so to her.
    Unharmed: her own heartbeats arrive, and nothing else does.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            _, heard = await r.listen()
            mallory = await r.join(r.network.member(MALLORY))
            for subject in (
                SUBJECTS.heartbeat(BOB.node),
                SUBJECTS.leaving(BOB.node),
                SUBJECTS.relay(ALICE.node, BOB.node),
                f"{inbox(BOB.node)}.x",
            ):
                await mallory.publish(subject, b"forged")
            await mallory.publish(SUBJECTS.heartbeat(MALLORY.node), b"mine")
            await eventually(lambda: bool(heard))
            assert heard == [(SUBJECTS.heartbeat(MALLORY.node), b"mine")]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.text.count("permissions violation for publish") == 4


def test_a_node_that_gives_orders_and_declares_others_gone(tmp_path: Path) -> None:
    """
    Attack: Mallory places stages, says that she leads, that Bob is gone, that all must halt, and who is revoked.
    Expected: nobody hears it: these are the coordinators', the council's and the registrar's subjects.
    Unharmed: everybody else; her own heartbeats arrive.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            _, heard = await r.listen()
            mallory = await r.join(r.network.member(MALLORY))
            for subject in (
                SUBJECTS.command(BOB.node), SUBJECTS.leader, SUBJECTS.gone, SUBJECTS.halt, SUBJECTS.revocations,
            ):  # fmt: skip
                await mallory.publish(subject, b"forged")
            await mallory.publish(SUBJECTS.heartbeat(MALLORY.node), b"mine")
            await eventually(lambda: bool(heard))
            assert [message for _, message in heard] == [b"mine"]

    asyncio.run(main())


def test_a_node_that_listens_to_everything(tmp_path: Path) -> None:
    """
    Attack: Mallory subscribes to the whole bus, and to Bob's orders, relay and inbox.
    Expected: `PassportRefused`, for each by name.
    Unharmed: what is said to Bob, of which she hears nothing; she hears what is for all.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            mallory = await r.join(r.network.member(MALLORY))
            heard: list[str] = []

            async def hear(subject: str, _: bytes) -> None:
                heard.append(subject)

            own = (SUBJECTS.command(BOB.node), SUBJECTS.relay(BOB.node), f"{inbox(BOB.node)}.>")
            for subject in (">", "fallow.>", "*.*.*.*.*", "_INBOX.>", *own):
                with pytest.raises(PassportRefused, match="does not allow to listen"):
                    await mallory.subscribe(subject, hear)
            bob = await r.join(r.network.anything("bob"))
            for subject in own:
                await bob.publish(subject.replace("*", "x").replace(">", "x"), b"secret")
            await mallory.subscribe(SUBJECTS.hello, hear)
            await bob.publish(SUBJECTS.hello, b"")
            await eventually(lambda: bool(heard))
            assert heard == [SUBJECTS.hello]

    asyncio.run(main())


def test_a_gateway_that_has_the_coordinator_speak_for_it(tmp_path: Path) -> None:
    """
    Attack: A captured gateway asks for a route and names Alice's orders as the place for the answer.
    Expected: the coordinator answers into inboxes only.
    Unharmed: Alice gets no order; honest questions are answered.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            _, heard = await r.listen()
            gateway = await r.join(r.network.member(MALLORY, Role.GATEWAY))
            coordinator = await r.join(r.network.member(CAROL, Role.COORDINATOR))
            asked: list[bytes] = []

            async def answer(_: str, message: bytes) -> bytes:
                asked.append(message)
                return b"answer"

            await coordinator.subscribe(SUBJECTS.route(), answer)
            question = SUBJECTS.route(MALLORY.node)
            await gateway.client.publish(question, b"1", reply=SUBJECTS.command(ALICE.node))
            await gateway.client.publish(question, b"2", reply="_INBOX.x.y")
            await eventually(lambda: ("_INBOX.x.y", b"answer") in heard and asked == [b"1", b"2"])
            assert SUBJECTS.command(ALICE.node) not in {subject for subject, _ in heard}

    asyncio.run(main())


def test_a_node_that_takes_the_lease(tmp_path: Path) -> None:
    """
    Attack: Mallory writes the key by which a coordinator leads, and removes its bucket.
    Expected: the server drops both.
    Unharmed: the lease; her own heartbeats arrive.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            ear, heard = await r.listen()

            async def hear(subject: str, message: bytes) -> None:
                heard.append((subject, message))

            await ear.subscribe("$KV.>", hear)
            await ear.subscribe("$JS.>", hear)
            mallory = await r.join(r.network.member(MALLORY))
            for subject in ("$KV.fallow_home.leader", "$JS.API.STREAM.DELETE.KV_fallow_home", "$JS.API.INFO"):
                await mallory.publish(subject, b"")
            await mallory.publish(SUBJECTS.heartbeat(MALLORY.node), b"mine")
            await eventually(lambda: bool(heard))
            assert [message for _, message in heard] == [b"mine"]

    asyncio.run(main())


def test_a_revoked_device_that_comes_back(tmp_path: Path) -> None:
    """
    Attack: Mallory's key is revoked while she is connected, and she comes back.
    Expected: cut within 5 s, and `PassportRefused` with the passport that she has.
    Unharmed: Alice joins.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            passport = r.network.passport(MALLORY.node)
            mallory = await r.join(r.network.held(MALLORY, passport))
            began_s = time.monotonic()
            await r.revoke(MALLORY.node)
            await eventually(lambda: not mallory.connected)
            assert time.monotonic() - began_s < 5.0
            await refused(r, r.network.held(MALLORY, passport), "revoked")

    asyncio.run(main())


def test_a_revoked_coordinator_goes_on_watching_who_comes_and_goes(tmp_path: Path) -> None:
    """
    Attack: a coordinator's key is revoked, and goes on with its credential for the system account, an hour's.
    Expected: cut there too, and `PassportRefused` when it comes back with that credential.
    Unharmed: the registrar's own connection to that account, and Alice.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            watching = r.network.presence()
            watcher = await r.join(watching)
            await r.revoke(watching.identity.node)
            await eventually(lambda: not watcher.connected)
            await refused(r, watching, "revoked")
            assert r.buses[1].connected, "it brought the news"

    asyncio.run(main())


def test_a_device_that_undoes_a_revocation(tmp_path: Path) -> None:
    """
    Attack: Mallory has friends bring the server the account as it was before her revocation: the text is known.
    Expected: refused: only the registrar's credential may speak there, not a member's and not a watcher's.
    Unharmed: the revocation, and Alice.
    """

    async def main() -> None:
        async with trusted_rig(tmp_path) as r:
            before, passport = r.network.account_jwt(), r.network.passport(MALLORY.node)
            friend = await r.join(r.network.anything("friend"))
            watcher = await r.join(r.network.presence())
            await r.revoke(MALLORY.node)
            for who in (friend, watcher):
                with pytest.raises((PassportRefused, BusUnavailable)):
                    await push_account(who, r.network.account_name, before)
            await refused(r, r.network.held(MALLORY, passport), "revoked")

    asyncio.run(main())
