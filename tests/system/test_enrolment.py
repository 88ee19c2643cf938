"""Enrolment end to end: the registrar as a process of its own, a real bus in operator mode, the real commands.

What is shown: who is invited gets in and nobody else; who is revoked or leaves is cut off within `EFFECT_LIMIT_S`
everywhere; halts and publications are told and recorded; all of it outlives a `kill -9` of the registrar, and that it
comes back elsewhere.
"""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from fallow.cli.app import app
from fallow.config import Config
from fallow.domain.charter import FleetPolicy
from fallow.domain.credentials import Role
from fallow.domain.errors import FallowError, PassportRefused, RequestRefused
from fallow.domain.fleet import Subjects
from fallow.fabric.broker import Broker
from fallow.fabric.nats_bus import NatsBus
from fallow.processes.founding import ensure_network
from fallow.processes.registrar import answering, settle
from fallow.system_clock import SystemClock
from fallow.trust import membership
from fallow.trust.council.ceremonies import Wanted, proposal, publication_of, sign
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.files import CouncilPaths, member_of, read_base, signing_keys
from fallow.trust.council.halts import read_halt, seal_halt
from fallow.trust.keys import load_or_create
from fallow.trust.membership import Membership, enrolment_of
from fallow.trust.membership_views import SystemCredentials
from fallow.trust.passports import Held, PassportReader
from fallow.trust.registrar.consent import sign_consent
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.invitations import from_text
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import RegistrarState
from fallow.trust.registrar.word import RegistrarWord
from fallow.trust.registrar_client import RegistrarClient, meet, met
from fallow.trust.revocation_watch import RevocationWatch
from fallow.wiring import charter_source

EFFECT_LIMIT_S = 5.0
START_LIMIT_S = 60.0
SUBJECTS = Subjects("home")


class Outcome(NamedTuple):
    """What a command gave."""

    returncode: int
    stdout: str
    stderr: str


class Network:
    """A founded network: its bus in this process, its registrar in another."""

    def __init__(self, config: Config, state: RegistrarState, broker: Broker) -> None:
        self.config = config
        self.state = state
        self.broker = broker
        self.process: subprocess.Popen[bytes] | None = None
        self.registrar = Registrar(state, open_database(state.paths.database), SystemClock())
        self.log = config.state_dir / "registrar.log"

    async def start_registrar(self) -> None:
        command = [sys.executable, "-m", "fallow", "serve", "registrar", "--state-dir", str(self.config.state_dir)]
        environment = os.environ | {"FALLOW_BUS_URL": self.broker.urls[0]}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, "--verbose"], env=environment, stdout=log, stderr=log)
        await answering(self.config, START_LIMIT_S)

    def stop_registrar(self, signal_number: int = 15) -> None:
        assert self.process is not None
        self.process.send_signal(signal_number)
        self.process.wait(START_LIMIT_S)

    def move_registrar(self) -> None:
        """To another port, at its next start."""
        self.state.paths.port.unlink()
        settle(self.config, self.broker.urls[0])

    async def command(self, *arguments: str, folder: Path | None = None) -> "Outcome":
        """One of the commands, in this process: a new one takes seconds to import everything."""
        full = [*arguments, "--state-dir", str(folder or self.config.state_dir)]
        done = await asyncio.to_thread(CliRunner().invoke, app, full)
        refusal = done.exception.message if isinstance(done.exception, FallowError) else ""
        assert done.exception is None or refusal or isinstance(done.exception, SystemExit), done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr + refusal)

    def in_a_process(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The same, as a person gives it."""
        return subprocess.run(
            [sys.executable, "-m", "fallow", *arguments, "--state-dir", str(folder or self.config.state_dir)],
            capture_output=True, text=True, check=False, timeout=START_LIMIT_S, input="",
        )  # fmt: skip

    async def invited(self, *arguments: str) -> str:
        """The text of `fallow invite`."""
        done = await self.command("invite", "--no-qr", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    async def member(self, folder: Path, *arguments: str) -> Membership:
        """Somebody who came with an invitation of that command."""
        invitation = from_text(await self.invited(*arguments))
        who = load_or_create(folder / "identity")
        known = await meet(invitation)
        words = "I lend this device."
        signed = sign_consent(who, known.digest, invitation.role, words) if invitation.role is Role.NODE else None
        asked = enrolment_of(invitation, folder.name, signed)
        return await membership.enrol(folder, who, known, invitation, asked, SystemClock())

    async def bus_of(self, member: Membership) -> NatsBus:
        return await NatsBus.connect(member.places.bus_urls, member.who.node, member)

    async def kinds(self) -> list[str]:
        done = await self.command("audit", "export")
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["kind"] for line in done.stdout.splitlines()[1:]]


@asynccontextmanager
async def network(folder: Path) -> AsyncIterator[Network]:
    config = Config(state_dir=folder)
    state = ensure_network(config, lambda sentence: None)
    database = open_database(state.paths.database)
    broker = Broker(folder / "bus", trust=RegistrarWord(state, database, SystemClock()).bus_trust())
    await broker.start()
    running = Network(config, state, broker)
    try:
        settle(config, broker.urls[0])
        await running.start_registrar()
        yield running
    except Exception as error:
        error.add_note(running.log.read_text(errors="replace")[-4000:] if running.log.exists() else "")
        raise
    finally:
        if running.process is not None and running.process.poll() is None:
            running.stop_registrar()
        await broker.close()
        database.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 170.0))


async def heard(bus: NatsBus, subject: str) -> "asyncio.Queue[bytes]":
    messages: asyncio.Queue[bytes] = asyncio.Queue()

    async def keep(_: str, message: bytes) -> None:
        messages.put_nowait(message)

    await bus.subscribe(subject, keep)
    return messages


async def until(condition: Any, limit_s: float) -> float:
    """Seconds until a condition holds."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "it did not come in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - began_s


def test_an_invited_device_speaks_on_the_bus_under_its_own_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device", "--name", "kitchen")
            coordinator = await home.member(tmp_path / "coordinator", "--role", "coordinator")
            assert coordinator.system_passport
            assert PassportReader(device.network, SystemClock()).read(device.passport).name == "kitchen"
            ears, mouth = await home.bus_of(coordinator), await home.bus_of(device)
            heartbeats = await heard(ears, SUBJECTS.heartbeat())
            await mouth.publish(SUBJECTS.heartbeat(device.who.node), b"here")
            assert await asyncio.wait_for(heartbeats.get(), 5.0) == b"here"
            used = await asyncio.to_thread(
                home.in_a_process, "join", "--yes", await home.invited("--role", "reader"), folder=tmp_path / "console"
            )
            assert used.returncode == 0, used.stderr
            for each in (ears, mouth, device, coordinator):
                await each.close()

    run(scenario())


def test_a_revoked_device_is_cut_off_everywhere_and_stays_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device", "--name", "old laptop")
            other = await home.member(tmp_path / "other", "--role", "gateway")
            device_bus, other_bus = await home.bus_of(device), await home.bus_of(other)
            passports = PassportReader(other.network, SystemClock())
            lists = await heard(other_bus, SUBJECTS.revocations)

            async def learnt() -> float:
                while not passports.revoked(device.who.node):
                    passports.learn(await lists.get())
                return time.time()

            async def cut_off() -> float:
                await until(lambda: not device_bus.connected, START_LIMIT_S)
                return time.time()

            told, cut = asyncio.create_task(learnt()), asyncio.create_task(cut_off())
            done = await home.command("revoke", "old laptop", "--why", "sold")
            assert done.returncode == 1
            assert device_bus.connected, "without a confirmation nothing happens"
            done = await home.command("revoke", "old laptop", "--why", "sold", "--yes")
            assert done.returncode == 0, done.stderr
            revoked_unix_s = home.registrar.named(device.who.node)[0].revoked_unix_s or 0.0
            cut_s, told_s = await cut - revoked_unix_s, await told - revoked_unix_s
            print(f"revoked: cut from the bus after {cut_s:.2f} s, others told after {told_s:.2f} s")
            assert max(cut_s, told_s) < EFFECT_LIMIT_S
            with pytest.raises(FallowError):
                passports.read(device.passport)
            again = membership.load(tmp_path / "device", device.who, SystemClock())
            with pytest.raises(RequestRefused, match="revoked: sold"):
                await again.start()
            with pytest.raises(FallowError):
                await home.bus_of(device)
            assert other_bus.connected
            assert "revoked" in await home.kinds()
            for each in (device_bus, other_bus, device, other, again):
                await each.close()

    run(scenario())


def test_who_leaves_is_cut_off_everywhere_and_may_come_back(tmp_path: Path) -> None:
    """A coordinator that is revoked at the same time loses its connection to the bus's system account as well."""

    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            owner = tmp_path / "owner"
            device = await home.member(owner / "device")
            coordinator = await home.member(tmp_path / "coordinator", "--role", "coordinator")
            other = await home.member(tmp_path / "other", "--role", "gateway")
            device_bus, other_bus = await home.bus_of(device), await home.bus_of(other)
            watching = await NatsBus.connect(home.broker.urls, "presence", SystemCredentials(coordinator))
            passports = PassportReader(other.network, SystemClock())
            lists, first = await heard(other_bus, SUBJECTS.revocations), device.passport

            async def known(revoked: bool) -> None:
                while passports.revoked(device.who.node) is not revoked:
                    passports.learn(await asyncio.wait_for(lists.get(), EFFECT_LIMIT_S))

            home.registrar.revoke(coordinator.who.node, "dismissed")
            began_s = time.monotonic()
            done = await home.command("leave", "--yes", folder=owner)
            assert done.returncode == 0, done.stderr
            await until(lambda: not device_bus.connected and not watching.connected, EFFECT_LIMIT_S)
            await known(revoked=True)
            print(f"left: cut from the bus, and others told, after {time.monotonic() - began_s:.2f} s")
            void = Held(first, device.who, device.authority_pem)
            with pytest.raises(FallowError):
                passports.read(first)
            with pytest.raises(PassportRefused):
                await NatsBus.connect(home.broker.urls, "void", void)
            again = await home.command("leave", "--yes", folder=owner)
            assert (again.returncode, "no member" in again.stderr) == (1, True)
            back = await home.member(owner / "device")
            assert back.who == device.who
            await known(revoked=False)
            assert passports.read(back.passport).node == back.who.node
            back_bus = await home.bus_of(back)
            with pytest.raises(PassportRefused):
                await NatsBus.connect(home.broker.urls, "void", void)
            for each in (device_bus, other_bus, watching, back_bus, device, coordinator, other, back):
                await each.close()

    run(scenario())


def test_a_revocation_holds_over_a_restart_of_bus_and_registrar_which_comes_back_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device")
            stays = await home.member(tmp_path / "stays")
            stays_bus, passports = await home.bus_of(stays), PassportReader(stays.network, SystemClock())
            watch = RevocationWatch(
                stays, passports, tmp_path / "stays", SystemClock(), lease_s=lambda: 600.0, look=lambda: None
            )
            await watch.start(stays_bus, SUBJECTS)
            charters, before = charter_source(stays, tmp_path / "charter"), stays.places
            home.stop_registrar(9)
            home.move_registrar()
            done = await home.command("revoke", device.who.node, "--why", "sold", "--yes")
            assert done.returncode == 0, done.stderr
            device_bus = await home.bus_of(device)  # nobody has told the bus: until somebody does, or the hour ends
            await home.start_registrar()
            await until(lambda: not device_bus.connected, EFFECT_LIMIT_S)
            await until(lambda: stays.places != before, EFFECT_LIMIT_S)  # by the bus: the old address is dead
            await stays.reach()
            await asyncio.to_thread(charters.check, time.time())
            await watch.close()
            await stays_bus.close()
            await home.broker.close()
            await home.broker.start()
            with pytest.raises(FallowError):
                await home.bus_of(device)
            welcome = await home.bus_of(stays)
            again = membership.load(tmp_path / "stays", stays.who, SystemClock())
            await again.start()
            assert again.passport != stays.passport
            for each in (device_bus, welcome, device, stays, again):
                await each.close()

    run(scenario())


def test_a_halt_is_told_at_once_recorded_and_ends_the_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device")
            bus = await home.bus_of(device)
            halts = await heard(bus, SUBJECTS.halt)
            council = member_of(CouncilPaths(home.config.state_dir))
            repository = CouncilPaths(home.config.state_dir).open_repository(home.state.digest)
            async with RegistrarClient(met(home.state.network_json), device.places.registrar_urls) as client:
                began_s = time.monotonic()
                epoch = repository.policy().epoch
                await client.post_halt(seal_halt(council, home.state.digest, epoch, "a rat", time.time()))
                envelope = await asyncio.wait_for(halts.get(), 2.0)
                print(f"halt: told after {time.monotonic() - began_s:.3f} s")
            halt, signer = read_halt(envelope, home.state.digest)
            assert (halt.why, signer) == ("a rat", council.node)
            expires_s = repository.timestamp_expires_unix_s()
            await asyncio.to_thread(home.stop_registrar, 9)
            await home.start_registrar()
            assert await asyncio.wait_for(halts.get(), EFFECT_LIMIT_S) == envelope
            while "halted" not in await home.kinds():
                await asyncio.sleep(0.05)
            assert repository.timestamp_expires_unix_s() == expires_s
            assert (await home.kinds()).count("halted") == 1
            await bus.close()
            await device.close()

    run(scenario())


def test_a_publication_is_told_and_recorded_with_who_signed_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device")
            bus = await home.bus_of(device)
            news = await heard(bus, SUBJECTS.charter)
            paths = CouncilPaths(home.config.state_dir)
            base = read_base(FolderFetcher(paths.repository))
            changed, _ = sign(proposal(base, Wanted(policy=FleetPolicy(epoch=2)), time.time()), signing_keys(paths))
            repository = paths.open_repository(home.state.digest)
            repository.publish(publication_of(changed), time.time())
            assert await asyncio.wait_for(news.get(), EFFECT_LIMIT_S) == b""
            exported = await home.command("audit", "export")
            entries = [json.loads(line) for line in exported.stdout.splitlines()[1:]]
            policies = [json.loads(entry["body"]) for entry in entries if entry["kind"] == "policy_published"]
            assert [policy["epoch"] for policy in policies] == [1, 2]
            assert policies[1]["signed_by"] == [member_of(paths).node]
            await bus.close()
            await device.close()

    run(scenario())


def test_the_journal_is_verified_exported_and_found_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            device = await home.member(tmp_path / "device")
            head = (tmp_path / "device" / membership.HEAD_FILE).read_text()
            await device.close()
            home.stop_registrar()
            good = await home.command("audit", "verify", "--head", head)
            assert good.returncode == 0, good.stderr
            assert "The journal holds" in good.stdout
            assert "It goes on from 1 noted heads" in good.stdout
            exported = await home.command("audit", "export", "--out", str(tmp_path / "journal.jsonl"))
            assert exported.returncode == 0, exported.stderr
            first, *entries = (tmp_path / "journal.jsonl").read_text().splitlines()
            assert json.loads(first)["verified"] is True
            consents = [json.loads(line) for line in entries if '"consent_given"' in line]
            assert len(consents) == 1
            nobody = await home.command("audit", "export", "--since", "2999-01-01")
            assert len(nobody.stdout.splitlines()) == 1
            members = await home.command("audit", "members", "--json")
            assert [who["node"] for who in json.loads(members.stdout)] == [device.who.node]
            with sqlite3.connect(str(home.state.paths.database)) as database:
                database.execute("UPDATE journal SET who = 'somebody else' WHERE kind = 'consent_given'")
            bad = await home.command("audit", "verify")
            assert (bad.returncode, "was changed" in bad.stderr) == (1, True)
            evidence = await home.command("audit", "export")
            assert evidence.returncode == 1
            assert json.loads(evidence.stdout.splitlines()[0])["verified"] is False
            with sqlite3.connect(str(home.state.paths.database)) as database:
                database.execute(
                    "DELETE FROM journal WHERE seq >= (SELECT seq FROM journal WHERE kind = 'consent_given')"
                )
            cut = await home.command("audit", "verify")
            assert cut.returncode == 0, "a cut shows only against a head that was noted"
            found = await home.command("audit", "verify", "--head", head)
            assert (found.returncode, "it was cut" in found.stderr) == (1, True)

    run(scenario())


def test_an_operator_elsewhere_invites_revokes_and_audits_by_its_own_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path / "operator") as home:
            console = tmp_path / "away"
            operator = await home.member(console / "console", "--role", "operator")
            await operator.close()
            made = await home.command("invite", "--no-qr", folder=console)
            assert made.returncode == 0, made.stderr
            assert from_text(made.stdout).role is Role.NODE
            refused = await home.command("invite", "--role", "operator", folder=console)
            assert (refused.returncode, "machine only" in refused.stderr) == (1, True)
            device = await home.member(tmp_path / "device")
            away = await home.command("revoke", device.who.node, "--why", "lost", "--yes", folder=console)
            assert away.returncode == 0, away.stderr
            verified = await home.command("audit", "verify", folder=console)
            assert verified.returncode == 0, verified.stderr
            assert "It goes on from 1 noted heads" in verified.stdout
            await device.close()

    run(scenario())


def test_commands_explain_what_is_missing(tmp_path: Path) -> None:
    for arguments in (("invite",), ("audit", "verify"), ("revoke", "x", "--why", "y", "--yes")):
        done = asyncio.run(Network.command(object.__new__(Network), *arguments, folder=tmp_path))
        assert done.returncode == 1
        assert "No network is known" in done.stderr
