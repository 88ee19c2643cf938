"""The keeper of a lease against a repository that is slow, silent, lying or gone, and a bus that brings halts."""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from fallow.domain.charter import Charter, FleetPolicy, Standing
from fallow.domain.errors import CharterUnavailable
from fallow.domain.fleet import Subjects
from fallow.domain.ids import Digest
from fallow.fabric.memory_bus import MemoryBus, MemoryHub
from fallow.trust import lease_keeper
from fallow.trust.council.halts import seal_halt
from fallow.trust.keys import Identity
from fallow.trust.lease_keeper import LeaseKeeper
from tests.unit.trust.grant_world import COORDINATOR, MEMBER, MODEL, STRANGER

NETWORK = "e" * 64
SUBJECTS = Subjects("home")
LEASE_S = 2.0
AT_MOST_S = 20.0


class Clocks:
    """Real time; the wall clock as a test sets it."""

    def __init__(self) -> None:
        self.ahead_s = 1_800_000_000.0

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return self.ahead_s + self.monotonic_s()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


class Repository:
    """A `CharterSource` that says what it is told to say."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.policy = FleetPolicy(epoch=1, lease_s=LEASE_S)
        self.members = (MEMBER,)
        self.halts: tuple[bytes, ...] = ()
        self.version = 0
        self.renews = True
        self.reachable = True
        self.answers = threading.Event()
        self.answers.set()
        self.checks = 0
        self.now_s = 0.0

    def check(self, reference_unix_s: float) -> tuple[Charter, tuple[bytes, ...]]:
        self.answers.wait(AT_MOST_S)
        self.checks += 1
        if not self.reachable:
            raise CharterUnavailable("the cable was cut")
        if self.renews:
            self.version += 1
            self.now_s = reference_unix_s
        return Charter(
            policy=self.policy,
            council={member.node[:16]: member.node for member in self.members},
            root_version=1,
            timestamp_version=self.version,
            timestamp_expires_unix_s=self.now_s + LEASE_S,
            models=frozenset({MODEL}),
        ), self.halts


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clocks = Clocks()
        self.repository = Repository(self.clocks)
        self.hub = MemoryHub()
        self.bus: MemoryBus = self.hub.connect("council")
        self.revoked = False
        self.keepers: list[LeaseKeeper] = []

    async def keeper(self, release: str = "1.0", network: str = NETWORK) -> LeaseKeeper:
        made = LeaseKeeper(
            self.repository, self.folder, self.clocks, network=network, release=release,
            revoked=lambda: self.revoked, draw=lambda: 0.5,
        )  # fmt: skip
        self.keepers.append(made)
        await made.start(self.hub.connect(f"keeper {len(self.keepers)}"), SUBJECTS)
        return made

    def halt(self, why: str = "drill", epoch: int = 1, by: Identity = MEMBER) -> bytes:
        return seal_halt(by, NETWORK, epoch, why, 1_800_000_000.0)

    async def close(self) -> None:
        self.repository.answers.set()
        for keeper in self.keepers:
            await keeper.close()


def run(folder: Path, script: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(folder)
        try:
            async with asyncio.timeout(AT_MOST_S):
                await script(world)
        finally:
            await world.close()

    asyncio.run(main())


async def until(keeper: LeaseKeeper, standing: Standing) -> None:
    while (now := keeper.standing) is not standing:
        await keeper.changed(now)


def test_a_word_of_the_council_is_a_lease_and_it_is_renewed_in_time(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        assert keeper.standing is Standing.WORKING and keeper.why == ""
        assert keeper.allows(MODEL) and not keeper.allows(Digest("0" * 64))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * LEASE_S):
                await keeper.changed(Standing.WORKING)
        assert world.repository.checks >= 5

    run(tmp_path, script)


def test_cut_off_it_stops_by_the_end_of_the_lease_and_says_why(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        world.repository.reachable = False
        cut_s = world.clocks.monotonic_s()
        assert await keeper.changed(Standing.WORKING) is Standing.NO_LEASE
        assert 0.5 * LEASE_S <= world.clocks.monotonic_s() - cut_s <= LEASE_S + 1.0
        assert "the cable was cut" in keeper.why
        world.repository.reachable = True
        await until(keeper, Standing.WORKING)

    run(tmp_path, script)


def test_a_frozen_repository_extends_nothing_not_even_over_restarts(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        began_s = world.clocks.monotonic_s()
        keeper = await world.keeper()
        world.repository.renews = False
        for _ in range(8):
            # kill -9: nothing is written at the end
            for task in keeper._tasks:
                task.cancel()
            world.clocks.ahead_s -= 1000.0  # and the wall clock is set back
            keeper = await world.keeper()
        await until(keeper, Standing.NO_LEASE)
        assert world.clocks.monotonic_s() - began_s <= LEASE_S + 1.5
        world.repository.renews = True
        await until(keeper, Standing.WORKING)

    run(tmp_path, script)


def test_a_halt_over_the_bus_acts_while_the_repository_does_not_answer(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        world.repository.answers.clear()
        began_s = asyncio.get_running_loop().time()
        await world.bus.publish(SUBJECTS.halt, world.halt("poisoned weights"))
        assert await keeper.changed(Standing.WORKING) is Standing.HALTED
        assert asyncio.get_running_loop().time() - began_s < 1.0
        assert "poisoned weights" in keeper.why

    run(tmp_path, script)


def test_a_halt_is_sticky_and_ends_with_a_policy_of_a_higher_epoch(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        await world.bus.publish(SUBJECTS.halt, world.halt())
        await until(keeper, Standing.HALTED)
        while not (tmp_path / "halts").exists():
            await asyncio.sleep(0.01)
        for task in keeper._tasks:
            task.cancel()
        # The registrar says nothing of the halt and goes on renewing: it may be the one that was stolen.
        again = await world.keeper()
        assert str(again.standing) == "halted" and "drill" in again.why
        assert world.repository.checks >= 2
        world.repository.policy = FleetPolicy(epoch=2, lease_s=LEASE_S)
        await world.bus.publish(SUBJECTS.charter, b"")
        await until(again, Standing.WORKING)
        await world.bus.publish(SUBJECTS.halt, world.halt())
        await asyncio.sleep(0.1)
        assert again.standing is Standing.WORKING, "the same halt, said again, stops nothing"

    run(tmp_path, script)


def test_a_halt_by_nobody_stops_nothing(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        altered = bytearray(world.halt())
        altered[-3] ^= 1
        for envelope in (
            world.halt(by=STRANGER),
            world.halt(epoch=0),
            seal_halt(MEMBER, "f" * 64, 1, "another network", 0.0),
            bytes(altered),
            b"",
            b"\xff" * 5000,
        ):
            await world.bus.publish(SUBJECTS.halt, envelope)
        await asyncio.sleep(0.2)
        assert keeper.standing is Standing.WORKING

    run(tmp_path, script)


def test_junk_makes_nobody_ask(tmp_path: Path) -> None:
    """Who may speak on the bus says halts of strangers, and a member's halt a thousand times: a fleet that asked the
    registrar each time would be an attack on it."""

    async def script(world: World) -> None:
        world.repository.policy = FleetPolicy(epoch=1, lease_s=600.0)
        keeper = await world.keeper()
        checks = world.repository.checks
        for number in range(50):
            await world.bus.publish(SUBJECTS.halt, world.halt(by=STRANGER, why=f"number {number}"))
        await asyncio.sleep(1.0)
        assert world.repository.checks == checks and keeper.standing is Standing.WORKING
        for _ in range(50):
            await world.bus.publish(SUBJECTS.halt, world.halt())
            await asyncio.sleep(0.02)
        assert world.repository.checks <= checks + 2

    run(tmp_path, script)


def test_a_halt_that_came_before_there_was_a_charter_counts_when_there_is_one(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.repository.answers.clear()
        starting = asyncio.ensure_future(world.keeper())
        await asyncio.sleep(0.1)
        await world.bus.publish(SUBJECTS.halt, world.halt(by=STRANGER))
        await world.bus.publish(SUBJECTS.halt, world.halt())
        await asyncio.sleep(0.1)
        world.repository.answers.set()
        keeper = await starting
        assert keeper.standing is Standing.HALTED

    run(tmp_path, script)


def test_the_repositorys_halts_count_and_a_member_who_was_voted_out_halts_no_more(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.repository.halts = (world.halt(),)
        keeper = await world.keeper()
        assert keeper.standing is Standing.HALTED
        world.repository.members, world.repository.halts = (COORDINATOR,), ()
        await world.bus.publish(SUBJECTS.charter, b"")
        await until(keeper, Standing.WORKING)

    run(tmp_path, script)


def test_the_revoked_and_the_outdated_stop(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.repository.policy = FleetPolicy(epoch=1, lease_s=LEASE_S, version_min="1.2")
        keeper = await world.keeper(release="1.1.9")
        assert str(keeper.standing) == "too_old" and "1.2" in keeper.why
        world.repository.policy = FleetPolicy(epoch=2, lease_s=LEASE_S)
        await world.bus.publish(SUBJECTS.charter, b"")
        await until(keeper, Standing.WORKING)
        world.revoked = True
        keeper.look()
        await until(keeper, Standing.REVOKED)

    run(tmp_path, script)


def test_without_a_disk_there_is_no_lease(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        (tmp_path / "lease.json").mkdir()
        with pytest.raises(IsADirectoryError):
            await world.keeper()
        (tmp_path / "lease.json").rmdir()
        (tmp_path / "lease.json").write_bytes(b"not a ledger")
        assert (await world.keeper()).standing is Standing.WORKING

    run(tmp_path, script)


def test_time_does_not_fall_below_what_was_signed(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        keeper = await world.keeper()
        signed_s = msgspec.json.decode((tmp_path / "lease.json").read_bytes())["floor_unix_s"]
        world.clocks.ahead_s -= 1e6
        assert keeper.unix_s() == signed_s > world.clocks.unix_s()

    run(tmp_path, script)


def test_in_another_network_the_lease_begins_anew_and_back_in_the_same_it_does_not(tmp_path: Path) -> None:
    """A network a week old has renewed its timestamp a thousand times, and the next one four times."""

    async def script(world: World) -> None:
        world.repository.version = 1000
        assert (await world.keeper()).standing is Standing.WORKING
        await world.keepers[-1].close()
        world.repository.renews = False
        used = msgspec.json.decode((tmp_path / "lease.json").read_bytes())
        back = await world.keeper()  # left, and joined again
        assert msgspec.json.decode((tmp_path / "lease.json").read_bytes())["left_s"] < used["left_s"]
        await back.close()
        world.repository.renews, world.repository.version = True, 3
        assert (await world.keeper(network="b" * 64)).standing is Standing.WORKING

    run(tmp_path, script)


def test_a_halt_outlives_leaving_and_joining_again(tmp_path: Path) -> None:
    from fallow.trust.membership import forget

    async def script(world: World) -> None:
        world.repository.halts = (world.halt(),)
        assert (await world.keeper()).standing is Standing.HALTED
        await world.keepers[-1].close()
        forget(tmp_path)
        world.repository.halts, world.repository.reachable = (), False
        assert (await world.keeper()).standing is Standing.HALTED

    run(tmp_path, script)


def test_on_a_full_disk_there_is_no_lease_and_there_is_one_again_with_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def script(world: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(lease_keeper, "write_durably", full)
            keeper = await world.keeper()
            assert keeper.standing is Standing.NO_LEASE
            assert world.repository.checks
        await until(keeper, Standing.WORKING)

    run(tmp_path, script)
