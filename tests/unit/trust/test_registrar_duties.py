"""The registrar's loop on the in-memory bus, with a real database and repository: what it tells, in spite of what."""

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import BusTimeout
from fallow.domain.fleet import Subjects
from fallow.fabric.memory_bus import MemoryBus, MemoryHub
from fallow.system_clock import SystemClock
from fallow.trust.council.ceremonies import Wanted, proposal, publication_of, sign
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.files import CouncilPaths, member_of, read_base, signing_keys
from fallow.trust.council.halts import seal_halt
from fallow.trust.council.records import changes, record, seen
from fallow.trust.jwt import account_nkey
from fallow.trust.keys import new_identity, user_nkey
from fallow.trust.passports import PassportReader
from fallow.trust.registrar.database import setting
from fallow.trust.registrar.duties import RegistrarDuties
from fallow.trust.registrar.journal import Kind, verify
from tests.unit.trust.registrar_world import World, cut_by

SUBJECTS = Subjects("home")
LIMIT_S = 20.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, SystemClock())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60.0))


class Ears:
    """What was said on the bus, and what the server was brought."""

    def __init__(self, world: World) -> None:
        self.hub = MemoryHub()
        self.messages: dict[str, list[bytes]] = {}
        self.pushed: list[str] = []
        self.pushed_to_system: list[str] = []
        self.push_fails = False
        self.pushes_failed = 0
        self.world = world
        self.duties = RegistrarDuties(world.registrar, world.word, world.repository, world.database, world.clock)

    async def begin(self) -> MemoryBus:
        own, other = self.hub.connect("registrar"), self.hub.connect("ears")
        for subject in (SUBJECTS.revocations, SUBJECTS.halt, SUBJECTS.charter):
            await other.subscribe(subject, self._keep)
        await self.duties.attach(own, self._push)
        self.duties.start()
        return other

    async def _keep(self, subject: str, message: bytes) -> None:
        self.messages.setdefault(subject, []).append(message)

    async def _push(self, account: str, account_jwt: str) -> None:
        if self.push_fails:
            self.pushes_failed += 1
            raise BusTimeout("the server does not answer")
        if account == self.world.state.network.account:
            self.pushed.append(account_jwt)
        else:
            assert account == account_nkey(self.world.state.system.node)
            self.pushed_to_system.append(account_jwt)

    def count(self, subject: str) -> int:
        return len(self.messages.get(subject, []))


async def until(condition: Any) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come in time"
        await asyncio.sleep(0.01)


def publish_policy(world: World, epoch: int) -> None:
    paths = CouncilPaths(world.state.paths.folder.parent)
    base = read_base(FolderFetcher(paths.repository))
    changed, _ = sign(proposal(base, Wanted(policy=FleetPolicy(epoch=epoch)), time.time()), signing_keys(paths))
    world.repository.publish(publication_of(changed), time.time())


def test_a_revocation_by_another_process_is_pushed_and_told_without_being_woken(world: World) -> None:
    async def scenario() -> None:
        ears, device = Ears(world), world.member()
        await ears.begin()
        await until(lambda: ears.pushed and ears.count(SUBJECTS.revocations))
        pushed = len(ears.pushed)
        World(world.state.paths.folder.parent, world.clock).registrar.revoke(device.node, "elsewhere")
        await until(lambda: len(ears.pushed) > pushed)
        await until(lambda: len(ears.pushed_to_system) == len(ears.pushed))
        passports = PassportReader(world.state.network, world.clock)

        def heard_of_it() -> bool:
            for each in ears.messages[SUBJECTS.revocations]:
                passports.learn(each)
            return passports.revoked(device.node)

        await until(heard_of_it)
        await ears.duties.close()

    run(scenario())


def test_a_server_that_is_away_is_tried_again_and_nothing_is_written_meanwhile(world: World) -> None:
    async def scenario() -> None:
        ears, device = Ears(world), world.member()
        ears.push_fails = True
        await ears.begin()
        await until(lambda: ears.pushes_failed)
        made, failed = issued(world), ears.pushes_failed
        for attempt in range(1, 4):
            ears.duties.wake()
            await until(lambda enough=failed + attempt: ears.pushes_failed >= enough)
        assert issued(world) == made
        world.registrar.revoke(device.node, "lost")
        ears.duties.wake()
        await until(lambda: issued(world) != made)
        ears.push_fails = False
        await until(lambda: ears.pushed)
        assert set(cut_by(ears.pushed[0])) == {user_nkey(device.node)}, "what is brought at last is the newest"
        await ears.duties.close()

    def issued(world: World) -> str | None:
        with world.database.reading() as connection:
            return setting(connection, "account_issued")

    run(scenario())


def test_the_list_is_told_before_the_server_is_brought_it(world: World) -> None:
    async def scenario() -> None:
        ears, device = Ears(world), world.member()
        await ears.begin()
        await until(lambda: ears.pushed and ears.count(SUBJECTS.revocations))
        order: list[str] = []

        async def pushed(_: str, __: str) -> None:
            order.append("pushed")

        async def told(_: str, __: bytes) -> None:
            order.append("told")

        ears.duties._push = pushed
        await ears.hub.connect("late").subscribe(SUBJECTS.revocations, told)
        world.registrar.revoke(device.node, "lost")
        ears.duties.wake()
        await until(lambda: "pushed" in order)
        assert order[0] == "told"
        await ears.duties.close()

    run(scenario())


def test_a_hello_is_answered_with_all_that_holds(world: World) -> None:
    async def scenario() -> None:
        ears = Ears(world)
        other = await ears.begin()
        council = member_of(CouncilPaths(world.state.paths.folder.parent))
        world.repository.add_halt(seal_halt(council, world.state.digest, 1, "a rat", time.time()))
        await until(lambda: ears.count(SUBJECTS.halt))
        before = (ears.count(SUBJECTS.halt), ears.count(SUBJECTS.revocations))
        await other.publish(SUBJECTS.hello, b"")
        await until(lambda: ears.count(SUBJECTS.halt) > before[0] and ears.count(SUBJECTS.revocations) > before[1])
        await ears.duties.close()

    run(scenario())


def test_a_halt_that_came_by_the_bus_is_kept_and_a_forged_one_is_not(world: World) -> None:
    async def scenario() -> None:
        ears = Ears(world)
        other = await ears.begin()
        council = member_of(CouncilPaths(world.state.paths.folder.parent))
        forged = seal_halt(new_identity(), world.state.digest, 1, "mischief", time.time())
        for envelope in (b"nonsense", b"x" * 100_000, forged):
            await other.publish(SUBJECTS.halt, envelope)
        await other.publish(SUBJECTS.halt, seal_halt(council, world.state.digest, 1, "a rat", time.time()))
        await until(world.repository.halts)
        assert [halt.why for _, halt in world.repository.halts()] == ["a rat"]
        await until(lambda: "halted" in world.kinds())
        await ears.duties.close()

    run(scenario())


def test_the_lease_is_renewed_while_the_bus_is_broken_and_not_while_halted(world: World) -> None:
    async def scenario() -> None:
        ears = Ears(world)
        ears.push_fails = True
        before = world.repository.timestamp_expires_unix_s()
        await asyncio.sleep(1.1)  # TUF counts whole seconds
        await ears.begin()
        await until(lambda: world.repository.timestamp_expires_unix_s() > before)
        ears.push_fails = False
        await until(lambda: ears.pushed)
        await ears.duties.close()
        council = member_of(CouncilPaths(world.state.paths.folder.parent))
        world.repository.add_halt(seal_halt(council, world.state.digest, 1, "a rat", time.time()))
        halted = world.repository.timestamp_expires_unix_s()
        again = Ears(world)
        await again.begin()
        await until(lambda: again.count(SUBJECTS.halt) and again.pushed)
        assert world.repository.timestamp_expires_unix_s() == halted
        await again.duties.close()

    run(scenario())


def test_what_the_council_decided_is_recorded_once_by_however_many(world: World) -> None:
    first = seen(world.repository.in_force(), world.repository.halts())
    assert [kind for kind, _, _ in record(world.database, first, 1.0)] == [
        Kind.COUNCIL_PUBLISHED,
        Kind.POLICY_PUBLISHED,
    ]
    assert record(world.another(), first, 1.0) == []
    council = member_of(CouncilPaths(world.state.paths.folder.parent))
    world.repository.add_halt(seal_halt(council, world.state.digest, 1, "a rat", time.time()))
    halted = seen(world.repository.in_force(), world.repository.halts())
    assert [(kind, who) for kind, who, _ in record(world.database, halted, 2.0)] == [(Kind.HALTED, council.node)]
    publish_policy(world, 2)
    resumed = seen(world.repository.in_force(), world.repository.halts())
    ((kind, _, body),) = record(world.database, resumed, 3.0)
    assert (kind, body["epoch"], body["signed_by"]) == (Kind.POLICY_PUBLISHED, 2, (council.node,))
    assert body["ends_halts"] == [council.node]
    assert changes(resumed, resumed) == []
    verify(iter(world.journal()))


def test_a_published_model_is_recorded_by_name(world: World) -> None:
    from fallow.trust.council.records import Listed, Seen

    before = seen(world.repository.in_force(), ())
    names = tuple(f"models/{index:064x}.json" for index in range(60))
    after = Seen(**{field: getattr(before, field) for field in before.__struct_fields__} | {
        "lists": before.lists | {"models": Listed(2, names)}
    })  # fmt: skip
    ((kind, who, body),) = changes(before, after)
    assert (kind, who, body["added_count"], len(body["added"])) == (Kind.MODEL_PUBLISHED, "publishers", 60, 50)
    ((_, _, taken),) = changes(after, before)
    assert (taken["removed_count"], taken["added_count"], taken["publisher_removed"]) == (60, 0, True)
    empty = msgspec.structs.replace(before, lists={"models-dora": Listed(1, ())})
    ((_, who, gone),) = changes(empty, msgspec.structs.replace(empty, lists={}))
    assert (who, gone) == ("council", {"list": "models-dora", "publisher_removed": True})
