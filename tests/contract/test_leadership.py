"""The `LeaseKey` contract: in memory, and on JetStream with a real server, by password and by passport."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fallow.domain.errors import BusTimeout, BusUnavailable, LeaseUnsupported
from fallow.fabric.broker import Broker, find_server
from fallow.fabric.contract import LeaseEntry, LeaseKey
from fallow.fabric.disconnects import NatsPresence
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.memory_lease import MemoryLeases
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.nats_client import CONNECT_TIMEOUT_S, settle
from fallow.fabric.nats_lease import NatsLease
from tests.contract.networks import TestNetwork, bus_server, person
from tests.unit.fabric.support import eventually

ADAPTERS = ["memory", "nats", "trusted"]
TTL_S = 1.0
LATE_MAX_S = 3.0
"""How long after its time a value may still be there: the server sweeps at intervals."""


class Rig:
    """One bus server, and what a test may do to it."""

    def __init__(self, fabric: MemoryFabric | None, broker: Broker | None, network: TestNetwork | None) -> None:
        self.fabric, self.broker, self.network = fabric, broker, network
        self._leases = None if fabric is None else MemoryLeases(fabric.hub, TTL_S)
        self._clients: list[NatsBus] = []

    async def key(self, name: str = "leader") -> LeaseKey:
        """A client's view of a key, over a connection of its own."""
        if self.broker is None:
            assert self.fabric is not None and self._leases is not None
            return self._leases.key(self.fabric.bus("someone"), name)
        self._clients.append(await self.connect("someone"))
        return await NatsLease.open(self._clients[-1], "fallow_test", name, TTL_S)

    async def connect(self, name: str) -> NatsBus:
        assert self.broker is not None
        held = None if self.network is None else self.network.anything(name)
        return await NatsBus.connect(self.broker.urls, name, held)

    def presence(self) -> NatsPresence:
        assert self.broker is not None
        if self.network is None:
            assert self.broker.system_url is not None
            return NatsPresence(self.broker.system_url)
        return NatsPresence(self.broker.urls[0], self.network.presence(), self.network.account_name)

    def crash_server(self) -> None:
        """The server dies and comes back."""
        if self.broker is not None:
            assert self.broker.pid is not None
            os.kill(self.broker.pid, signal.SIGKILL)
        else:
            assert self.fabric is not None
            self.fabric.hub.stop()
            asyncio.get_running_loop().call_later(0.1, self.fabric.hub.start)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


@asynccontextmanager
async def rig(adapter: str, state: Path, network: TestNetwork | None = None) -> AsyncIterator[Rig]:
    if adapter == "trusted" and network is None:
        network = TestNetwork()
    async with bus_server(adapter, state, network) as broker:
        made = Rig(MemoryFabric() if broker is None else None, broker, network)
        try:
            yield made
        finally:
            await made.close()


async def insist(key: LeaseKey, value: bytes, after: int) -> int | None:
    """Write once the bus is there again."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await key.write(value, after)
            except (BusUnavailable, BusTimeout):
                await asyncio.sleep(0.02)


pytestmark = pytest.mark.parametrize("adapter", ADAPTERS)


def test_one_of_many_writers_wins_and_only_its_successor_follows(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            keys = [await r.key() for _ in range(3)]
            assert await keys[0].read() is None
            taken = await asyncio.gather(*(key.write(b"%d" % i, 0) for i, key in enumerate(keys)))
            (won,) = [revision for revision in taken if revision is not None]
            winner = taken.index(won)
            for key in keys:
                assert await key.read() == LeaseEntry(won, b"%d" % winner)
            assert await keys[winner - 1].write(b"thief", 0) is None
            assert await keys[winner - 1].write(b"thief", won + 1) is None
            renewed = await keys[winner].write(b"again", won)
            assert renewed is not None and renewed > won
            assert await keys[winner].write(b"late", won) is None
            replaced = await keys[winner - 1].write(b"heir", renewed)
            assert replaced is not None and replaced > renewed
            assert await keys[0].read() == LeaseEntry(replaced, b"heir")

    asyncio.run(main())


def test_a_lease_that_was_given_up_can_be_taken_at_once(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.key(), await r.key()
            held = await a.write(b"a", 0)
            assert held is not None
            given_up = await a.write(b"", held)
            assert given_up is not None
            entry = await b.read()
            assert entry == LeaseEntry(given_up, b"")
            assert await b.write(b"b", 0) is None, "something stands there"
            taken = await b.write(b"b", given_up)
            assert taken is not None and taken > given_up

    asyncio.run(main())


def test_what_is_not_renewed_vanishes_and_what_is_renewed_stays(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            kept, dropped, other = await r.key("kept"), await r.key("dropped"), await r.key("kept")
            loop = asyncio.get_running_loop()
            dropped_s = loop.time()
            assert await dropped.write(b"x", 0) is not None
            revision = await kept.write(b"x", 0)
            vanished_s: float | None = None
            while loop.time() - dropped_s < TTL_S + LATE_MAX_S and vanished_s is None:
                assert revision is not None
                revision = await kept.write(b"x", revision)
                await asyncio.sleep(TTL_S / 10)
                if await dropped.read() is None:
                    vanished_s = loop.time() - dropped_s
            assert vanished_s is not None and vanished_s >= TTL_S
            entry = await other.read()
            assert entry is not None and entry.revision == revision
            again = await dropped.write(b"y", 0)
            assert again is not None and revision is not None and again > revision

    asyncio.run(main())


def test_a_watcher_hears_of_writes_until_it_is_cancelled(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.key(), await r.key()
            heard: list[None] = []
            watch = await b.watch(lambda: heard.append(None))
            revision = await a.write(b"1", 0)
            await eventually(lambda: len(heard) >= 1)
            assert revision is not None
            await a.write(b"", revision)
            await eventually(lambda: len(heard) >= 2)
            await watch.cancel()
            await watch.cancel()
            count = len(heard)
            assert await a.write(b"2", (await a.read()).revision) is not None  # type: ignore[union-attr]
            assert await b.read() is not None
            assert len(heard) == count

    asyncio.run(main())


def test_a_restart_of_the_server_keeps_revisions_rising_and_counts_as_a_break(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.key(), await r.key()
            before = a.connection
            assert before is not None
            held = await a.write(b"a", 0)
            assert held is not None
            heard: list[None] = []
            await b.watch(lambda: heard.append(None))
            r.crash_server()
            await eventually(lambda: a.connection is None)
            with pytest.raises((BusUnavailable, BusTimeout)):
                await a.write(b"a", held)
            await eventually(lambda: a.connection is not None and b.connection is not None, within_s=20)
            assert a.connection != before
            entry = await b.read()
            revision = await insist(b, b"b", entry.revision if entry is not None else 0)
            assert revision is not None and revision > held
            await eventually(lambda: bool(heard))

    asyncio.run(main())


def test_a_server_that_lost_its_store_still_gives_higher_revisions(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":
        return

    network = TestNetwork() if adapter == "trusted" else None

    async def main() -> None:
        state = tmp_path / "broker"
        async with rig(adapter, tmp_path, network) as r:
            key = await r.key()
            held = await key.write(b"a", 0)
            assert held is not None
            for _ in range(20):
                renewed = await key.write(b"a", held)
                assert renewed is not None
                held = renewed
        shutil.rmtree(state / "jetstream")
        async with rig(adapter, tmp_path, network) as r:
            key = await r.key()
            assert await key.read() is None
            taken = await key.write(b"b", 0)
            assert taken is not None and taken > held

    asyncio.run(main())


def test_a_bucket_that_is_removed_under_its_users_is_made_again(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":
        return

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            key = await r.key()
            held = await key.write(b"a", 0)
            assert held is not None
            await r._clients[0].client.jetstream().delete_stream("KV_fallow_test")
            assert await key.read() is None
            assert await key.write(b"a", held) is None, "nothing stands there any more"
            taken = await key.write(b"a", 0)
            assert taken is not None and taken > held

    asyncio.run(main())


def test_a_server_without_jetstream_is_named(adapter: str, tmp_path: Path) -> None:
    if adapter != "nats":
        return

    async def main() -> None:
        binary = await find_server()
        server = await asyncio.create_subprocess_exec(
            str(binary.path), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(tmp_path),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await eventually(lambda: bool(list(tmp_path.glob("*.ports"))))
            ports = tmp_path.glob("*.ports")
            await eventually(lambda: next(iter(tmp_path.glob("*.ports"))).stat().st_size > 0)
            text = next(iter(ports)).read_text()
            url = text[text.index("nats://") : text.index('"', text.index("nats://"))]
            bus = await NatsBus.connect(url, "someone")
            with pytest.raises(LeaseUnsupported, match="JetStream"):
                await NatsLease.open(bus, "fallow_test", "leader", TTL_S)
            await bus.close()
        finally:
            server.terminate()
            await server.wait()

    asyncio.run(main())


def test_a_loss_is_told_also_after_the_server_was_restarted(adapter: str, tmp_path: Path) -> None:
    """A restarted server numbers its clients anew: what was known of the old numbers must not hide a loss."""
    if adapter == "memory":
        return

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            assert r.broker is not None
            gone: list[str] = []
            names = [f"client-{index}" for index in range(4)]
            buses = [await r.connect(name) for name in names]
            ids = names if r.network is None else [person(name).node for name in names]
            presence = r.presence()
            await presence.start(lambda name, _: gone.append(name))
            r.crash_server()
            await eventually(lambda: not any(bus.connected for bus in buses))
            await eventually(lambda: all(bus.connected for bus in buses), within_s=20)
            watching = presence._client  # who goes while it is away is left to heartbeats
            assert watching is not None
            await eventually(lambda: watching.is_connected, within_s=20)
            await settle(watching, CONNECT_TIMEOUT_S)
            late = await r.connect("late")
            for index in (3, 0, 2, 1):
                await buses[index].close()
                await eventually(lambda index=index: gone[-1:] == [ids[index]])  # type: ignore[misc]
            assert len(gone) == 4
            await late.close()
            await presence.close()

    asyncio.run(main())
