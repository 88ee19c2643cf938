"""Everything can be stopped: by one member's word within two seconds, by silence within a lease, and for good until the
quorum says otherwise. Real agents, a real bus with passports, a real council's repository; toy engines."""

import asyncio
import sys
import time
from pathlib import Path

import msgspec

from fallow.domain.charter import Standing
from tests.system.halting import HaltWorld, Station, Told, halt_world

DEVICES = 50
HALT_MAX_S = 2.0
LEASE_SHORT_S = 5.0
QUIET_S = 1.0


async def computing(world: HaltWorld, *stations: Station) -> None:
    """Until every one of them computes."""
    placing = await world.coordinate()
    for accepted in await asyncio.gather(*(placing.place(station.config.name) for station in stations)):
        assert accepted.ok, accepted.message
    async with asyncio.timeout(60):
        while not all(station.results > 1 for station in stations):
            await asyncio.sleep(0.05)


async def last_computed_s(stations: list[Station], until_s: float) -> list[float]:
    """When each of them computed its last row, looking until that time."""
    rows = [station.engine.rows_computed for station in stations]
    last_s = [time.monotonic()] * len(stations)
    while time.monotonic() < until_s:
        for index, station in enumerate(stations):
            if station.engine.rows_computed != rows[index]:
                rows[index], last_s[index] = station.engine.rows_computed, time.monotonic()
        await asyncio.sleep(0.01)
    return last_s


def test_one_members_halt_stops_fifty_devices_within_two_seconds(tmp_path: Path) -> None:
    async def main() -> None:
        async with halt_world(tmp_path, lease_s=600.0) as world:
            stations = [await world.station(f"device {index}") for index in range(DEVICES)]
            await computing(world, *stations)
            envelope = world.council.halt("somebody poisons the weights")
            published_s = time.monotonic()
            await world.publish(envelope)
            last_s = await last_computed_s(stations, published_s + HALT_MAX_S + QUIET_S)
            took_s = max(last_s) - published_s
            assert took_s <= HALT_MAX_S, f"the last row was computed {took_s:.2f} s after the halt"
            for station in stations:
                assert station.keeper.standing is Standing.HALTED and "poisons" in station.keeper.why
                assert station.engine.lost.is_set(), "the engine is closed"
                assert station.agent.relay.session_count == 0 and "halted" in station.refusals
            refused = await (await world.coordinate()).place(stations[0].config.name)
            assert not refused.ok and "poisons" in refused.message

    asyncio.run(main())


def test_a_device_that_is_cut_off_from_everything_stops_by_the_end_of_its_lease(tmp_path: Path) -> None:
    async def main() -> None:
        async with halt_world(tmp_path, lease_s=LEASE_SHORT_S) as world:
            alone, other = [await world.station(name) for name in ("alone", "other")]
            await computing(world, alone, other)
            alone.line.cut = True
            cut_s = time.monotonic()
            last_s = await last_computed_s([alone, other], cut_s + LEASE_SHORT_S + QUIET_S)
            assert last_s[0] - cut_s <= LEASE_SHORT_S
            assert alone.keeper.standing is Standing.NO_LEASE and "the line is cut" in alone.keeper.why
            assert alone.engine.lost.is_set() and "no_lease" in alone.refusals
            assert other.keeper.standing is Standing.WORKING, "who is not cut off works on"
            assert last_s[1] >= cut_s + LEASE_SHORT_S
            alone.line.cut = False
            results = alone.results
            async with asyncio.timeout(30):
                while alone.results == results:
                    await asyncio.sleep(0.05)

    asyncio.run(main())


class Outside:
    """A station in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, world: HaltWorld, name: str) -> "Outside":
        config = world.folder / f"{name}.json"
        config.write_bytes(msgspec.json.encode(world.config(name)))
        config.chmod(0o600)
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.system.halting", str(config), stdout=asyncio.subprocess.PIPE
            )
        )

    async def tell(self) -> Told:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return msgspec.json.decode(await self.process.stdout.readline(), type=Told)

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def test_an_agent_that_is_killed_and_started_again_under_a_halt_does_no_work(tmp_path: Path) -> None:
    """The repository is not told of the halt, and goes on renewing: what the device remembers alone keeps it still."""

    async def main() -> None:
        async with halt_world(tmp_path, lease_s=600.0) as world:
            first = await Outside.start(world, "device")
            second: Outside | None = None
            try:
                while (await first.tell()).standing != Standing.WORKING:
                    pass
                assert (await (await world.coordinate()).place("device")).ok
                while (await first.tell()).rows == 0:
                    pass
                await world.publish(world.council.halt("drill"))
                while (await first.tell()).standing != Standing.HALTED:
                    pass
                await first.kill()
                second = await Outside.start(world, "device")
                for _ in range(30):
                    told = await second.tell()
                    assert told.standing == Standing.HALTED and told.rows == 0
                refused = await (await world.coordinate()).place("device")
                assert not refused.ok and "drill" in refused.message
                assert (await second.tell()).refusals == ("halted",), "it was asked to work all the time"
            finally:
                for station in (first, second):
                    if station is not None:
                        await station.kill()

    asyncio.run(main())
