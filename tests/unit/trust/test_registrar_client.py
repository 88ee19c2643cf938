"""Registrar and member over real HTTPS on 127.0.0.1: whom they believe, and what becomes of a membership."""

import asyncio
import random
import socket
import ssl
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fallow.domain.credentials import Role
from fallow.domain.errors import (
    ConfigError,
    InvitationRefused,
    MembershipEnded,
    RegistrarUnavailable,
    RequestRefused,
    SignatureInvalid,
)
from fallow.domain.fleet import Tier
from fallow.domain.network import BUS_NAME, REGISTRAR_NAME, Places
from fallow.gateway.server import HttpServer, ServerLimits, serve
from fallow.policy.enrolment import RETRY_MAX_S, renewal_wait_s, retry_wait_s
from fallow.policy.rate_limit import KeyLimits
from fallow.system_clock import SystemClock
from fallow.trust import membership
from fallow.trust.certificates import client_context, server_certificate, server_context, write_private
from fallow.trust.council.files import member_of
from fallow.trust.council.halts import seal_halt
from fallow.trust.keys import Identity, new_identity
from fallow.trust.membership import Membership, enrol, is_member, load
from fallow.trust.membership_views import NetworkClock
from fallow.trust.noted_heads import read_noted
from fallow.trust.passports import PassportReader
from fallow.trust.registrar.api import ADDRESSES_MAX, ApiLimits, RateBook, RegistrarApi, TooMany
from fallow.trust.registrar.invitations import Invitation, from_text
from fallow.trust.registrar.requests import Invite, Leave, Renew, Revoke
from fallow.trust.registrar_client import RegistrarClient, meet, met
from tests.unit.trust.registrar_world import HandClock, World, served


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


async def join(
    world: World, folder: Path, invitation: Invitation | None = None, who: Identity | None = None
) -> Membership:
    """A member, as `fallow join` makes one."""
    invitation = invitation or world.invitation()
    who = who or new_identity()
    known = await meet(invitation)
    return await enrol(folder, who, known, invitation, world.enrolment(who, invitation), SystemClock())


# --- whom they believe ------------------------------------------------------------------------------


def test_a_device_joins_renews_and_is_still_a_member_after_a_restart(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            who = new_identity()
            member = await join(world, tmp_path / "device", who=who)
            await member.start()
            await member.close()
            assert is_member(tmp_path / "device")
            again = load(tmp_path / "device", who, SystemClock())
            assert again.passport == member.passport
            world.clock.now_s += 5.0  # type: ignore[attr-defined]
            await again.start()
            assert again.passport != member.passport
            assert again.version == 1
            PassportReader(again.network, world.clock).read(again.passport, holder=who.node)
            assert again.places.bus_urls == ("tls://127.0.0.1:4222",)
            await again.close()

    run(scenario())
    files = {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "device").iterdir()}
    assert files == dict.fromkeys(("network.json", "places.json", "passport", "journal-head"), 0)
    (noted,) = read_noted(tmp_path / "device" / "journal-head")
    assert f"{noted.seq}:{noted.hash}" == str(world.registrar.journal_head())


def test_an_invitation_is_not_sent_to_another_networks_registrar(world: World, tmp_path: Path) -> None:
    """At the invitation's address answers somebody else: nothing but `GET /network.json` is ever sent there."""
    other = World(tmp_path / "other")

    async def scenario() -> None:
        async with served(other) as server:
            world.places((server.url,))
            with pytest.raises(InvitationRefused, match="not the registrar of the network that invited you"):
                await meet(world.invitation())

    run(scenario())


def test_the_right_registrar_is_found_behind_a_wrong_and_a_dead_address(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")

    async def scenario() -> None:
        async with served(other) as wrong, served(world) as right:
            world.places((wrong.url, f"https://127.0.0.1:{closed_port()}", right.url))
            member = await join(world, tmp_path / "device")
            await member.start()
            await member.close()

    run(scenario())


def test_a_certificate_of_another_authority_or_for_another_name_is_refused(world: World, tmp_path: Path) -> None:
    """The description is public: who copies it still has no certificate. Nor has who took the bus's."""
    other = World(tmp_path / "other")
    attempts = {
        "another authority": server_certificate(other.state.authority, REGISTRAR_NAME, world.clock.unix_s()),
        "another name": server_certificate(world.state.authority, BUS_NAME, world.clock.unix_s()),
    }

    async def scenario() -> None:
        for made in attempts.values():
            certificate, key = tmp_path / "tls.pem", tmp_path / "tls.key"
            write_private(certificate, made.certificate_pem)
            write_private(key, made.key_pem)
            api = RegistrarApi(world.registrar, world.word, world.repository, world.clock)
            server = await serve(api.app(), "127.0.0.1", 0, tls=server_context(certificate, key))
            world.places((server.url,))
            with pytest.raises(RegistrarUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await join(world, tmp_path / "device")
            await server.close()
        assert world.registrar.members() == []

    run(scenario())


def test_plain_http_is_not_spoken(world: World) -> None:
    async def scenario() -> None:
        async with served(world) as server, httpx.AsyncClient() as http:
            with pytest.raises(httpx.HTTPError):
                await http.get(server.url.replace("https", "http") + "/network.json")

    run(scenario())


def test_a_folder_of_another_network_is_not_overwritten(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")

    async def scenario() -> None:
        async with served(world), served(other):
            await (await join(world, tmp_path / "device")).close()
            with pytest.raises(ConfigError, match="another network"):
                await join(other, tmp_path / "device")
        assert other.registrar.members() == []

    run(scenario())


# --- a membership -----------------------------------------------------------------------------------


class FastClock(SystemClock):
    """Sleeps a millionth of what is asked, and counts it as passed: an hour in a few milliseconds."""

    def __init__(self, unix_s: float) -> None:
        self.passed_s = 0.0
        self.began_unix_s = unix_s
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.passed_s

    def unix_s(self) -> float:
        return self.began_unix_s + self.passed_s

    async def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.passed_s += duration_s
        await asyncio.sleep(0.001)


def asks(rate: KeyLimits) -> ApiLimits:
    """The interface's usual bounds but for how often signed requests may come."""
    return ApiLimits(requests=msgspec.structs.replace(ApiLimits().requests, rate=rate))


async def until_version(member: Membership, version: int) -> None:
    seen = member.version
    while seen < version:
        seen = await member.changed(seen)


def pauses_since_renewed(clock: FastClock) -> list[float]:
    """What was waited after the last renewal that succeeded, which waits for half an hour."""
    renewed = [index for index, pause in enumerate(clock.slept_s) if pause > 1000.0]
    return clock.slept_s[renewed[-1] + 1 :] if renewed else []


@pytest.fixture
def unbroken_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is slept in one piece, so that a test can read it from the clock."""
    monkeypatch.setattr(membership, "PIECE_S", 1e9)


@pytest.mark.usefixtures("unbroken_sleep")
def test_it_renews_at_half_life_with_jitter_whatever_the_devices_clock_says(world: World, tmp_path: Path) -> None:
    """The device believes that it is 1970, and its clock of day is never asked again after the first answer."""

    async def scenario() -> None:
        async with served(world, asks(KeyLimits())):
            clock, invitation, who = FastClock(unix_s=0.0), world.invitation(), new_identity()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            await member.start()
            await until_version(member, 6)
            await member.close()
            pauses = clock.slept_s[:5]
            assert all(1600 < pause < 2000 for pause in pauses)
            assert len(set(pauses)) == 5
            judged = PassportReader(member.network, NetworkClock(clock, member)).read(member.passport)
            assert judged.node == who.node

    run(scenario())


class SuspendedClock(FastClock):
    """In the first piece that is slept, the machine sleeps for eight hours, which `sleep` knows nothing of."""

    async def sleep(self, duration_s: float) -> None:
        await super().sleep(duration_s)
        if len(self.slept_s) == 1:
            self.passed_s += 8 * 3600.0


def test_after_a_night_asleep_it_renews_at_once(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            clock, invitation, who = SuspendedClock(world.clock.unix_s()), world.invitation(), new_identity()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            await member.start()
            await until_version(member, 2)
            assert clock.slept_s[0] <= membership.PIECE_S
            assert clock.passed_s - 8 * 3600.0 < 600.0, "and not after half an hour"
            await member.close()

    run(scenario())


class WokenClock(FastClock):
    """Passes short pauses, and sleeps for the rest of time in long ones: until somebody wakes the sleeper."""

    async def sleep(self, duration_s: float) -> None:
        if duration_s > RETRY_MAX_S:
            await asyncio.Event().wait()
        await super().sleep(duration_s)


@pytest.mark.usefixtures("unbroken_sleep")
def test_a_passport_that_the_bus_refuses_is_renewed_at_once_and_the_next_ones_ever_more_seldom(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last half-hour of pauses is a captured bus's work: it costs the registrar a question a minute."""

    async def scenario() -> None:
        async with served(world, asks(KeyLimits())):
            clock, invitation, who = WokenClock(world.clock.unix_s()), world.invitation(), new_identity()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            await member.start()
            await refused_until(member, 11)
            assert all(0.5 * min(2.0**n, 60) <= pause <= min(2.0**n, 60) for n, pause in enumerate(clock.slept_s))
            assert len(clock.slept_s) == 10
            world.registrar.revoke(who.node, "lost in a taxi")
            await refused_until(member, 12)
            assert member.ended, "a revoked device learns why, and not half an hour later"
            await member.close()

    async def refused_until(member: Membership, version: int) -> None:
        """As the bus does it: at every attempt to join."""
        while member.version < version:
            member.refused()
            await asyncio.sleep(0.001)

    run(scenario())
    assert sum("refuses our passport" in record.message for record in caplog.records) == 1


class GatedClock(FastClock):
    """Passes one pause when the gate is opened, and sleeps for the rest of time in the next."""

    def __init__(self, unix_s: float) -> None:
        super().__init__(unix_s)
        self.gate = asyncio.Event()

    async def sleep(self, duration_s: float) -> None:
        await self.gate.wait()
        self.gate.clear()
        await super().sleep(duration_s)


@pytest.mark.usefixtures("unbroken_sleep")
def test_a_member_that_looks_for_its_registrar_asks_at_once_where_it_is_said_to_be(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        clock, who = GatedClock(world.clock.unix_s()), new_identity()
        async with served(world):
            invitation = world.invitation()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            await member.start()
        clock.gate.set()
        while not member._failures:
            await asyncio.sleep(0.001)
        first = member.places.registrar_urls[0]
        async with served(world) as second:
            member.moved(Places(registrar_urls=(second.url,), bus_urls=()), world.word.sequence() + 1)
            assert member.registrar_urls == (second.url, first)
            await until_version(member, 2)
            await member.close()
        assert load(tmp_path, who, SystemClock()).places.registrar_urls == (second.url,)

    run(scenario())


@pytest.mark.usefixtures("unbroken_sleep")
def test_a_registrar_that_is_away_is_asked_again_with_growing_pauses(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        clock, who, invitation = FastClock(unix_s=world.clock.unix_s()), new_identity(), None
        async with served(world):
            invitation = world.invitation()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            await member.start()
        while len(pauses_since_renewed(clock)) < 11:
            await asyncio.sleep(0.01)
        await member.close()
        retries = pauses_since_renewed(clock)[:11]
        assert all(0.5 * min(2.0**n, 60) <= pause <= min(2.0**n, 60) for n, pause in enumerate(retries, 1))
        assert member.refusal is None

    run(scenario())


def test_without_registrar_a_start_goes_on_with_a_passport_that_is_good_and_with_no_other(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        who = new_identity()
        async with served(world):
            await (await join(world, tmp_path, who=who)).close()
        good = load(tmp_path, who, HandClock(world.clock.unix_s() + 3000))
        await good.start()
        assert good.passport
        await good.close()
        ended = load(tmp_path, who, HandClock(world.clock.unix_s() + 3700))
        with pytest.raises(RegistrarUnavailable, match="no passport that is still good"):
            await ended.start()
        await ended.close()

    run(scenario())


def test_a_revoked_member_hears_of_it_at_its_next_renewal_and_at_its_next_start(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            clock, invitation, who = FastClock(unix_s=world.clock.unix_s()), world.invitation(), new_identity()
            known = await meet(invitation)
            member = await enrol(tmp_path, who, known, invitation, world.enrolment(who, invitation), clock)
            world.registrar.revoke(who.node, "lost in a taxi")
            assert await start_and_see(member) == 2
            assert isinstance(member.refusal, RequestRefused)
            assert "lost in a taxi" in member.refusal.message
            await member.close()
            again = load(tmp_path, who, SystemClock())
            with pytest.raises(RequestRefused, match="lost in a taxi"):
                await again.start()
            await again.close()

    async def start_and_see(member: Membership) -> int:
        await member.start()
        return await member.changed(member.version)

    run(scenario())


def test_a_member_leaves_and_forgets_and_keeps_its_key(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            member = await join(world, tmp_path)
            await member.leave()
            await member.close()
            assert not is_member(tmp_path)
            assert list(tmp_path.glob("*.json")) == []
            again = await join(world, tmp_path)
            world.registrar.revoke(again.who.node, "sold")
            with pytest.raises(MembershipEnded, match="sold"):
                await again.leave()
            await again.close()
            assert not is_member(tmp_path), "what has ended is forgotten, however it ended"

    run(scenario())


def test_a_device_moves_to_another_cell_and_a_gateway_does_not(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            device = await join(world, tmp_path / "device")
            with pytest.raises(RequestRefused, match="no cell harbour"):
                await device.move("harbour")
            made = from_text(world.registrar.invite(Role.COORDINATOR, cell="harbour").text)
            coordinator = await join(world, tmp_path / "coordinator", made)
            await coordinator.close()
            await device.move("harbour")
            with pytest.raises(RequestRefused, match="once in 60 minutes"):
                await device.move("home")
            await device._renew()  # what was refused is not asked for again
            assert PassportReader(device.network, world.clock).read(device.passport).cell == "harbour"
            assert world.word.cells() == ("home", "harbour")
            gateway = await join(world, tmp_path / "gateway", world.invitation(Role.GATEWAY))
            with pytest.raises(RequestRefused, match="stays in the cell"):
                await gateway.move("harbour")
            await device.close()
            await gateway.close()
        assert world.kinds().count("cell_changed") == 1

    run(scenario())


def test_the_addresses_that_a_renewal_brings_are_kept(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        who = new_identity()
        async with served(world) as first:
            await (await join(world, tmp_path, who=who)).close()
            async with served(world) as second:
                member = load(tmp_path, who, SystemClock())
                assert member.places.registrar_urls == (first.url,)
                await member.start()
                assert member.places.registrar_urls == (second.url,)
            await member.close()
            assert load(tmp_path, who, SystemClock()).places.registrar_urls == (second.url,)

    run(scenario())


def test_a_registrar_that_stops_does_not_wait_for_members_that_keep_their_connection(world: World) -> None:
    """They read nothing between two requests, and so leave TLS's goodbye unanswered."""

    async def scenario() -> None:
        limits = ServerLimits(farewell_s=0.1)
        async with (
            served(world, connections=limits) as server,
            RegistrarClient(met(world.state.network_json), [server.url]) as client,
        ):
            await client.places()
            began_s = time.monotonic()
            await server.close()
            assert time.monotonic() - began_s < 1.0

    run(scenario())


# --- asking from afar --------------------------------------------------------------------------------


async def client_of(world: World, server: HttpServer) -> RegistrarClient:
    return RegistrarClient(met(world.state.network_json), [server.url])


def test_an_operator_invites_and_revokes_from_afar_and_a_reader_does_not(world: World, tmp_path: Path) -> None:
    operator, reader = world.member(Role.OPERATOR), world.member(Role.READER)

    async def scenario() -> None:
        async with served(world) as server, await client_of(world, server) as client:
            invited = await client.invite(operator, Invite(role=Role.NODE, tier=Tier.KEYED, life_s=60.0))
            who = new_identity()
            await (await join(world, tmp_path, from_text(invited.text), who)).close()
            with pytest.raises(RequestRefused, match="A reader may not revoke"):
                await client.farewell(reader, Revoke(node=who.node, why="envy"))
            gone = await client.farewell(operator, Revoke(node=who.node, why="stolen"))
            assert gone.node == who.node
            with pytest.raises(RequestRefused, match="revoked: stolen"):
                await client.admission(who, Renew())
            with pytest.raises(RequestRefused, match="A reader may not read journal"):
                await client.journal(reader, 0)
            page = await client.journal(operator, 0)
            assert str(world.registrar.journal_head()) == page.head
            assert [entry.seq for entry in page.entries] == list(range(1, len(page.entries) + 1))

    run(scenario())


def test_a_halt_by_https_is_kept_and_a_forged_one_is_refused(world: World, tmp_path: Path) -> None:
    member = member_of(paths_of_council(tmp_path / "operator"))

    async def scenario() -> None:
        async with served(world) as server, await client_of(world, server) as client:
            for forger, network in ((new_identity(), world.state.digest), (member, "0" * 64)):
                forged = seal_halt(forger, network, 1, "because", world.clock.unix_s())
                if network == world.state.digest:
                    await client.post_halt(forged)  # well signed, by nobody: without effect
                else:
                    with pytest.raises(SignatureInvalid):
                        await client.post_halt(forged)
                assert world.repository.halts() == ()
            await client.post_halt(seal_halt(member, world.state.digest, 1, "a rat", world.clock.unix_s()))
            assert [halt.why for _, halt in world.repository.halts()] == ["a rat"]

    run(scenario())


def paths_of_council(state: Path) -> Any:
    from fallow.trust.council.files import CouncilPaths

    return CouncilPaths(state)


# --- hostile clients ---------------------------------------------------------------------------------


async def https(world: World) -> httpx.AsyncClient:
    return httpx.AsyncClient(verify=client_context(world.state.network.authority_pem), trust_env=False)


SNI = {"sni_hostname": REGISTRAR_NAME}


@pytest.mark.parametrize(
    "path",
    [
        "/tuf/../identity",
        "/tuf/metadata/../../identity",
        "/tuf/..%2f..%2fidentity",
        "/tuf/metadata/..%2f..%2fnetwork.json",
        "/tuf/%2e%2e/account",
        "/tuf//etc/passwd",
        "/tuf/.lock",
        "/tuf/metadata/.new-abc.json",
        "/tuf/metadata",
        "/tuf/",
        "/tuf/metadata/1.root.json%00",
        "/identity",
        "/registrar.db",
    ],
)
def test_nothing_but_the_councils_files_is_served(world: World, path: str) -> None:
    async def scenario() -> None:
        async with served(world) as server, await https(world) as http:
            # httpx tidies paths up: this one is sent as it is
            raw = httpx.Request("GET", server.url + "/", extensions=SNI)
            raw.url = httpx.URL(server.url).copy_with(raw_path=path.encode())
            response = await http.send(raw)
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "not_found"
            good = await http.get(server.url + "/tuf/metadata/1.root.json", extensions=SNI)
            assert good.text == world.state.network.tuf_root

    run(scenario())


def test_bodies_are_bounded_and_every_refusal_is_named_json(world: World) -> None:
    async def scenario() -> None:
        async with served(world) as server, await https(world) as http:
            cases = [
                ("POST", "/requests", b"x" * 70_000, 413, "invalid_request"),
                ("POST", "/requests", b"", 401, "bad_signature"),
                ("POST", "/requests", b"\x94\xc1\xff\x00", 401, "bad_signature"),
                ("POST", "/halts", b"x" * 10_000, 413, "invalid_request"),
                ("POST", "/halts", b"nonsense", 401, "bad_signature"),
                ("POST", "/council/publish", b"nonsense", 422, "charter_invalid"),
                ("GET", "/requests", b"", 405, "not_found"),
                ("DELETE", "/places", b"", 405, "not_found"),
                ("GET", "/elsewhere", b"", 404, "not_found"),
            ]
            for method, path, body, status, code in cases:
                response = await http.request(method, server.url + path, content=body, extensions=SNI)
                assert (response.status_code, response.json()["error"]["code"]) == (status, code), path
            endless = await http.post(server.url + "/requests", content=forever(), extensions=SNI)
            assert endless.status_code == 413
            assert (await http.get(server.url + "/health", extensions=SNI)).status_code == 200

    async def forever() -> Any:
        for _ in range(100):
            yield b"x" * 4096

    run(scenario())


def test_an_address_that_asks_too_often_is_told_when_to_come_again(world: World) -> None:
    async def scenario() -> None:
        async with served(world, asks(KeyLimits(requests_per_minute=3))) as server, await https(world) as http:
            statuses = [(await http.get(server.url + "/challenge", extensions=SNI)).status_code for _ in range(4)]
            assert statuses == [200, 200, 200, 429]
            late = await http.get(server.url + "/challenge", extensions=SNI)
            assert 1 <= int(late.headers["retry-after"]) <= 20
            assert (await http.get(server.url + "/places", extensions=SNI)).status_code == 200

    run(scenario())


def test_addresses_are_forgotten_before_they_fill_the_memory() -> None:
    book = RateBook(KeyLimits(requests_per_minute=1))
    for index in range(ADDRESSES_MAX + 10):
        book.take(str(index), 0.0)
    book.take("0", 0.0)  # forgotten, so it may ask again
    with pytest.raises(TooMany):
        book.take(str(ADDRESSES_MAX), 0.0)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n\xff\xfe\xfd\xfc",
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 302 Found\r\nlocation: https://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
        b'HTTP/1.1 403 No\r\ncontent-length: 53\r\n\r\n{"error":{"code":"made_up","message":"go elsewhere :)"',
        b"nonsense\r\n\r\n",
        b"",
    ],
)
def test_a_registrar_that_answers_nonsense_is_a_named_failure(world: World, tmp_path: Path, reply: bytes) -> None:
    """Somebody with the registrar's certificate, and no sense."""

    async def scenario() -> None:
        made = server_certificate(world.state.authority, REGISTRAR_NAME, world.clock.unix_s())
        write_private(tmp_path / "tls.pem", made.certificate_pem)
        write_private(tmp_path / "tls.key", made.key_pem)
        context = server_context(tmp_path / "tls.pem", tmp_path / "tls.key")
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with RegistrarClient(met(world.state.network_json), [url]) as client:
            for asked in (client.places(), client.ask(new_identity(), Leave())):
                with pytest.raises(RegistrarUnavailable):
                    await asked
        server.close()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
            writer.close()
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass

    run(scenario())


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_retries_are_spread_and_bounded() -> None:
    draws = random.Random(7)
    for failures in range(50):
        assert 0 < retry_wait_s(failures, draws.random()) <= RETRY_MAX_S
    assert 0.4 < renewal_wait_s(1.0, 0.0) < renewal_wait_s(1.0, 0.999) < 0.6


def test_an_invitation_whose_url_is_no_url_is_a_named_failure(world: World) -> None:
    async def scenario() -> None:
        for url in ("https://[::1", "https://\u2028", "https://:99999999", "https://%00"):
            broken = msgspec.structs.replace(world.invitation(), registrar_urls=(url,))
            with pytest.raises(RegistrarUnavailable):
                await meet(broken, timeout_s=1.0)

    run(scenario())
