"""What a process knows of revocations: by the bus, by asking, and from its disk, with a real registrar over HTTPS."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fallow.domain.errors import RegistrarUnavailable
from fallow.domain.fleet import Subjects
from fallow.fabric.memory_bus import MemoryHub
from fallow.gateway.server import ServerLimits
from fallow.system_clock import SystemClock
from fallow.trust.keys import Identity, new_identity
from fallow.trust.membership import REVOCATIONS_FILE, Membership, enrol, load
from fallow.trust.membership_views import NetworkClock
from fallow.trust.passports import PassportReader
from fallow.trust.registrar_client import meet
from fallow.trust.revocation_watch import CHECKS, RevocationWatch
from fallow.wiring import charter_source
from tests.unit.trust.registrar_world import World, served

SUBJECTS = Subjects("home")
LIMIT_S = 20.0
LEAVING = ServerLimits(shutdown_s=0.05)
"""Of a server that waits for nobody when it goes."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "operator", SystemClock())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come in time"
        await asyncio.sleep(0.01)


class Process:
    """A member that watches."""

    def __init__(self, member: Membership, folder: Path, lease_s: float = 1000.0) -> None:
        clock = NetworkClock(SystemClock(), member)
        self.member = member
        self.looks = 0
        self.passports = PassportReader(member.network, clock)
        self.hub = MemoryHub()
        self.watch = RevocationWatch(
            member, self.passports, folder, clock, lease_s=lambda: lease_s, look=self._look
        )  # fmt: skip

    def _look(self) -> None:
        self.looks += 1

    async def start(self) -> None:
        await self.watch.start(self.hub.connect("process"), SUBJECTS)

    async def close(self) -> None:
        await self.watch.close()
        await self.member.close()


async def joined(world: World, folder: Path, who: Identity | None = None) -> Membership:
    who, invitation = who or new_identity(), world.invitation()
    return await enrol(folder, who, await meet(invitation), invitation, world.enrolment(who, invitation), SystemClock())


def test_without_the_bus_a_revocation_is_known_within_a_quarter_of_a_lease(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            other = world.member()
            process = Process(await joined(world, tmp_path / "device"), tmp_path / "device", lease_s=0.1 * CHECKS)
            await process.start()
            assert not process.passports.revoked(other.node)
            world.registrar.revoke(other.node, "lost")
            await until(lambda: process.passports.revoked(other.node))
            assert process.looks >= 1
            await process.close()

    run(scenario())


def test_a_list_on_the_bus_is_used_at_once_and_kept_over_a_restart_without_registrar(
    world: World, tmp_path: Path
) -> None:
    async def scenario() -> None:
        folder = tmp_path / "device"
        async with served(world):
            other = world.member()
            process = Process(await joined(world, folder), folder)
            await process.start()
            world.registrar.revoke(other.node, "lost")
            speaker = process.hub.connect("registrar")
            await speaker.publish(SUBJECTS.revocations, b"nonsense")
            said = world.word.revocations()
            await speaker.publish(SUBJECTS.revocations, said)
            await until(lambda: process.passports.revoked(other.node))
            await until(lambda: (folder / REVOCATIONS_FILE).read_bytes() == said)
            await process.close()
        again = Process(load(folder, process.member.who, SystemClock()), folder)
        await again.start()
        assert again.passports.revoked(other.node), "the registrar is away, and the disk remembers"
        await again.close()

    run(scenario())


def test_where_the_registrar_moved_is_heard_on_the_bus_and_used_by_all_that_runs(world: World, tmp_path: Path) -> None:
    """The member's requests, the charter's and the list's: nothing is started again."""

    async def scenario() -> None:
        folder = tmp_path / "device"
        async with served(world, connections=LEAVING):
            process = Process(await joined(world, folder), folder)
            await process.start()
            source = charter_source(process.member, folder / "charter")
        with pytest.raises(RegistrarUnavailable):
            await process.member.reach()
        other = world.member()
        async with served(world, connections=LEAVING) as moved:
            world.registrar.revoke(other.node, "lost")
            world.word.tell_places()
            await process.hub.connect("registrar").publish(SUBJECTS.revocations, world.word.revocations())
            await until(lambda: process.member.places.registrar_urls == (moved.url,))
            await process.member.reach()
            await asyncio.to_thread(source.check, time.time())
            assert process.passports.revoked(other.node)
        await process.close()
        kept = load(folder, process.member.who, SystemClock()).places
        assert kept.registrar_urls == (moved.url,)

    run(scenario())


def test_a_damaged_file_is_no_reason_not_to_start(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "device"
        async with served(world):
            other = world.member()
            world.registrar.revoke(other.node, "lost")
            member = await joined(world, folder)
            (folder / REVOCATIONS_FILE).write_bytes(b"x" * 300_000)
            process = Process(member, folder)
            await process.start()
            assert process.passports.revoked(other.node)
            assert (folder / REVOCATIONS_FILE).stat().st_size < 300_000
            await process.close()

    run(scenario())


def test_a_failure_to_ask_is_logged_once(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        folder = tmp_path / "device"
        async with served(world):
            process = Process(await joined(world, folder), folder)
        for _ in range(3):
            await process.watch._ask()
        await process.close()

    run(scenario())
    assert sum("could not be asked for" in record.message for record in caplog.records) == 1


def test_a_refusal_to_renew_that_is_for_good_is_looked_at(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(world):
            who = new_identity()
            process = Process(await joined(world, tmp_path / "device", who), tmp_path / "device")
            process.member._wait_s = lambda: 0.05  # type: ignore[method-assign]
            await process.start()
            await process.member.start()
            assert not process.member.ended
            world.registrar.revoke(who.node, "lost")
            seen = process.looks
            await until(lambda: process.member.ended and process.looks > seen)
            await process.close()

    run(scenario())
