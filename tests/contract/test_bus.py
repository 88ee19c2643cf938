"""The `Bus` contract: in memory, and on NATS with a real server, by password and by passport."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from fallow.domain.errors import BusMessageError, BusTimeout, BusUnavailable, ConfigError
from fallow.fabric import broker as broker_module
from fallow.fabric import disconnects, nats_client
from fallow.fabric.broker import Broker, ServerBinary, find_server
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES, Bus, PresenceWatcher
from fallow.fabric.disconnects import NatsPresence
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.nats_client import settle
from fallow.trust.passports import Held
from tests.contract.networks import TestNetwork, bus_server
from tests.unit.fabric.support import eventually, node_id

PILED_UP_BYTES = 2 << 20
ADAPTERS = ["memory", "nats", "trusted"]


class Rig:
    """One bus server, and what a test may do to it."""

    def __init__(self, fabric: MemoryFabric | None, broker: Broker | None, network: TestNetwork | None) -> None:
        self.fabric, self.broker, self.network = fabric, broker, network
        self.buses: list[Bus] = []
        self._names: dict[str, str] = {}

    async def connect(self, name: str = "someone") -> Bus:
        bus: Bus
        if self.broker is not None:
            bus = await NatsBus.connect(self.broker.urls, name, self.credentials(name))
        else:
            assert self.fabric is not None
            bus = self.fabric.bus(name)
        self.buses.append(bus)
        return bus

    def credentials(self, name: str) -> Held | None:
        """With passports, everybody goes by a key; the tests go by names."""
        if self.network is None:
            return None
        held = self.network.anything(name)
        self._names[held.identity.node] = name
        return held

    async def watch(self, on_disconnect: Callable[[str, str], None]) -> PresenceWatcher:
        def told(who: str, reason: str) -> None:
            on_disconnect(self._names.get(who, who), reason)

        watcher = self._watcher()
        await watcher.start(told)
        return watcher

    def _watcher(self) -> PresenceWatcher:
        if self.broker is None:
            assert self.fabric is not None
            return self.fabric.presence()
        if self.network is None:
            assert self.broker.system_url is not None
            return NatsPresence(self.broker.system_url)
        return NatsPresence(self.broker.urls[0], self.network.presence(), self.network.account_name)

    async def restart(self) -> None:
        """The server dies and comes back."""
        if self.broker is not None:
            assert self.broker.pid is not None
            os.kill(self.broker.pid, signal.SIGKILL)
        else:
            assert self.fabric is not None
            self.fabric.hub.stop()
            asyncio.get_running_loop().call_later(0.1, self.fabric.hub.start)


@asynccontextmanager
async def rig(adapter: str, state: Path) -> AsyncIterator[Rig]:
    network = TestNetwork() if adapter == "trusted" else None
    async with bus_server(adapter, state, network) as broker:
        made = Rig(MemoryFabric() if broker is None else None, broker, network)
        try:
            yield made
        finally:
            for bus in made.buses:
                await bus.close()


@asynccontextmanager
async def on_nats(adapter: str, state: Path) -> AsyncIterator[tuple[NatsBus, Broker]]:
    """A bus on a real server, and the server."""
    async with rig(adapter, state) as r:
        bus = await r.connect()
        assert isinstance(bus, NatsBus)
        assert r.broker is not None
        yield bus, r.broker


@contextmanager
def silent(broker: Broker) -> Iterator[None]:
    """The server is there, and says nothing."""
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def collect(into: list[tuple[str, bytes]]) -> Callable:  # type: ignore[type-arg]
    async def handler(subject: str, message: bytes) -> None:
        into.append((subject, message))

    return handler


pytestmark = pytest.mark.parametrize("adapter", ADAPTERS)


def test_delivery_is_in_order_and_by_subject(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.connect(), await r.connect()
            exact: list[tuple[str, bytes]] = []
            starred: list[tuple[str, bytes]] = []
            await b.subscribe("cell.one.beat", collect(exact))
            await b.subscribe("cell.*.beat", collect(starred))
            for i in range(300):
                await a.publish("cell.one.beat", b"%d" % i)
            await a.publish("cell.two.beat", b"two")
            await a.publish("cell.two.beat.deeper", b"no")
            await a.publish("cell.one", b"no")
            await eventually(lambda: len(starred) == 301 and len(exact) == 300)
            assert exact == [("cell.one.beat", b"%d" % i) for i in range(300)]
            assert starred == [*exact, ("cell.two.beat", b"two")]

    asyncio.run(main())


def test_requests_are_answered_refused_or_time_out(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.connect(), await r.connect()

            async def double(_: str, message: bytes) -> bytes:
                return message * 2

            async def silent(_: str, __: bytes) -> None:
                return None

            await b.subscribe("ask", double)
            await b.subscribe("void", silent)
            assert await asyncio.gather(*(a.request("ask", b"%d" % i, 5) for i in range(20))) == [
                b"%d%d" % (i, i) for i in range(20)
            ]
            with pytest.raises(BusTimeout, match="void"):
                await a.request("void", b"", 0.1)
            with pytest.raises(BusUnavailable, match="nobody"):
                await a.request("nowhere", b"", 5)

    asyncio.run(main())


def test_a_subscription_handles_as_many_messages_at_once_as_it_asked_for(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.connect(), await r.connect()
            begun: list[bytes] = []
            go_on = {message: asyncio.Event() for message in (b"1", b"2", b"3")}

            async def wait(_: str, message: bytes) -> bytes:
                begun.append(message)
                await go_on[message].wait()
                return message

            await b.subscribe("slow", wait, at_once=2)
            answers = {m: asyncio.create_task(a.request("slow", m, 5)) for m in go_on}
            await eventually(lambda: len(begun) == 2)
            go_on[b"2"].set()
            assert await answers[b"2"] == b"2", "the second does not wait for the first"
            await eventually(lambda: len(begun) == 3)
            assert begun == [b"1", b"2", b"3"], "the third began when there was room, in order"
            assert not answers[b"1"].done()
            go_on[b"1"].set()
            go_on[b"3"].set()
            assert [await answers[b"1"], await answers[b"3"]] == [b"1", b"3"]

    asyncio.run(main())


def test_a_failing_handler_does_not_break_its_subscription(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            bus = await r.connect()
            seen: list[bytes] = []

            async def handler(_: str, message: bytes) -> None:
                seen.append(message)
                if message == b"bad":
                    raise ValueError("boom")

            await bus.subscribe("s", handler)
            for message in (b"a", b"bad", b"b"):
                await bus.publish("s", message)
            await eventually(lambda: seen == [b"a", b"bad", b"b"])

    asyncio.run(main())


def test_a_queue_group_shares_and_a_cancelled_subscription_is_silent(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b, c = [await r.connect() for _ in range(3)]
            one: list[tuple[str, bytes]] = []
            two: list[tuple[str, bytes]] = []
            whole: list[tuple[str, bytes]] = []
            await b.subscribe("work", collect(one), queue="q")
            leaving = await c.subscribe("work", collect(two), queue="q")
            await c.subscribe("work", collect(whole))
            for i in range(100):
                await a.publish("work", b"%d" % i)
            await eventually(lambda: len(whole) == 100 and len(one) + len(two) == 100)
            assert one and two
            await leaving.cancel()
            await leaving.cancel()
            before = len(two)
            for i in range(50):
                await c.publish("work", b"%d" % i)
            await eventually(lambda: len(whole) == 150 and len(one) + before == 150)
            assert len(two) == before

    asyncio.run(main())


def test_big_messages_pass_and_oversized_ones_are_refused_by_the_sender(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            bus = await r.connect()
            seen: list[tuple[str, bytes]] = []
            await bus.subscribe("s", collect(seen))
            await bus.publish("s", bytes(MAX_BUS_MESSAGE_BYTES))
            with pytest.raises(BusMessageError, match="too large"):
                await bus.publish("s", bytes(MAX_BUS_MESSAGE_BYTES + 1))
            with pytest.raises(BusMessageError, match="too large"):
                await bus.request("s", bytes(MAX_BUS_MESSAGE_BYTES + 1), 1)
            await bus.publish("s", b"after")
            await eventually(lambda: [len(message) for _, message in seen] == [MAX_BUS_MESSAGE_BYTES, 5])

    asyncio.run(main())


def test_closing_is_idempotent_and_final(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.connect(), await r.connect()
            seen: list[tuple[str, bytes]] = []
            await b.subscribe("s", collect(seen))
            await a.publish("s", b"last words")
            await a.close()
            await a.close()
            await eventually(lambda: seen == [("s", b"last words")])
            with pytest.raises(BusUnavailable):
                await a.request("s", b"", 1)
            with pytest.raises(BusUnavailable):
                await a.publish("s", b"")

    asyncio.run(main())


def test_a_bus_that_is_gone_is_left_at_once_with_what_was_still_to_be_said(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":
        pytest.skip("it is never gone for good")

    async def main() -> None:
        async with on_nats(adapter, tmp_path) as (bus, broker):
            subscription = await bus.subscribe("s", collect([]))
            await broker.close()
            await eventually(lambda: not bus.connected)
            await bus.publish("s", b"last words")
            began_s = time.monotonic()
            await subscription.cancel()
            await bus.close()
            assert time.monotonic() - began_s < 1.0

    asyncio.run(main())


def test_a_bus_that_falls_silent_is_left_within_seconds_with_much_still_to_be_said(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapter == "memory":
        pytest.skip("its server is never silent")
    for limit in ("CLOSE_FLUSH_S", "CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(nats_client, limit, 0.2)

    async def main() -> None:
        async with on_nats(adapter, tmp_path) as (bus, broker):
            with silent(broker):
                while bus.client.pending_data_size < PILED_UP_BYTES:  # the kernels take some in
                    await bus.publish("s", bytes(MAX_BUS_MESSAGE_BYTES))
                    await asyncio.sleep(0)
                await asyncio.wait_for(bus.close(), 1.0)

    asyncio.run(main())


@pytest.mark.parametrize("call", ["request", "flush"])
def test_who_is_cancelled_as_the_answer_comes_ends(adapter: str, call: str, tmp_path: Path) -> None:
    if adapter == "memory":
        pytest.skip("it is about nats-py")

    async def main() -> None:
        async with on_nats(adapter, tmp_path) as (bus, _):
            client = bus.client
            answers = {"request": lambda: [*client._resp_map.values()], "flush": lambda: client._pongs}[call]

            async def echo(_: str, message: bytes) -> bytes:
                return message

            await bus.subscribe("echo", echo)
            work = bus.request("echo", b"", 5) if call == "request" else settle(client, 5)
            task: asyncio.Task[object] = asyncio.create_task(work)
            while not answers():
                await asyncio.sleep(0)
            answers()[-1].add_done_callback(lambda _: task.cancel())
            await asyncio.wait([task], timeout=5)
            assert task.cancelled()

    asyncio.run(main())


def test_who_is_cancelled_while_too_much_waits_to_be_sent_ends(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":
        pytest.skip("it is about nats-py")

    async def main() -> None:
        async with on_nats(adapter, tmp_path) as (bus, broker):
            with silent(broker):
                task = asyncio.create_task(_publish_for_ever(bus))
                while bus.client.pending_data_size <= nats_client.UNSENT_BYTES_MAX:
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task], timeout=1)
                assert task.cancelled()

    asyncio.run(main())


async def _publish_for_ever(bus: Bus) -> None:
    while True:
        await bus.publish("s", bytes(MAX_BUS_MESSAGE_BYTES))
        await asyncio.sleep(0)


def test_a_server_restart_heals(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            a, b = await r.connect(), await r.connect()

            async def echo(_: str, message: bytes) -> bytes:
                return message

            await b.subscribe("echo", echo)
            assert await a.request("echo", b"1", 5) == b"1"
            await r.restart()

            async def heals() -> bytes:
                while True:
                    try:
                        return await a.request("echo", b"2", 1)
                    except (BusUnavailable, BusTimeout):
                        await a.publish("lost", b"meanwhile")  # never raises for a broken connection
                        await asyncio.sleep(0.05)

            assert await asyncio.wait_for(heals(), 20) == b"2"

    asyncio.run(main())


def test_a_lost_client_is_reported_once_and_a_reconnected_one_is_not(adapter: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            early, late = node_id(1), node_id(2)
            first = await r.connect(early)
            gone: list[str] = []
            presence = await r.watch(lambda name, _: gone.append(name))
            twin = await r.connect(early)
            second = await r.connect(late)
            await first.close()  # the name is still connected through its twin
            await second.close()
            await eventually(lambda: gone == [late])
            await twin.close()
            await eventually(lambda: gone == [late, early])
            await presence.close()

    asyncio.run(main())


def test_whoever_was_connected_before_is_known_however_many_they_are(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disconnects, "CONNECTIONS_PAGE", 2)

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            for index in range(4):
                await r.connect(f"other-{index}")
            twins = [await r.connect("twin"), await r.connect("twin")]
            lost: list[str] = []
            watcher = await r.watch(lambda name, _: lost.append(name))
            await twins[0].close()
            await (await r.connect("marker")).close()
            await eventually(lambda: "marker" in lost)
            assert "twin" not in lost, "the other one is still here"
            await twins[1].close()
            await eventually(lambda: "twin" in lost)
            await watcher.close()

    asyncio.run(main())


def test_a_client_that_is_behind_with_its_messages_does_not_take_the_server_for_dead(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_client, "PING_INTERVAL_S", 0.05)

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            busy, other = await r.connect("busy"), await r.connect("other")
            lost: list[str] = []
            watcher = await r.watch(lambda name, _: lost.append(name))
            count = 0

            async def work(_: str, __: bytes) -> None:
                nonlocal count
                time.sleep(0.001)  # not a wait: what handling costs
                count += 1

            await busy.subscribe("work", work)
            for _ in range(1200):
                await other.publish("work", bytes(8000))
            await eventually(lambda: count == 1200)
            assert lost == []
            await watcher.close()

    asyncio.run(main())


def test_a_killed_process_is_reported_at_once(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":

        async def crash() -> None:
            async with rig(adapter, tmp_path) as r:
                await r.connect(node_id(7))
                gone: list[str] = []
                await r.watch(lambda name, _: gone.append(name))
                assert r.fabric is not None
                r.fabric.crash(node_id(7))
                await eventually(lambda: gone == [node_id(7)])

        asyncio.run(crash())
        return

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            assert r.broker is not None
            gone: list[str] = []
            presence = await r.watch(lambda name, _: gone.append(name))
            held = r.credentials("child")
            secrets = [] if held is None else [held.passport, held.identity.seed.hex(), held.authority_pem]
            code = (
                "import asyncio, sys\n"
                "from fallow.fabric.nats_bus import NatsBus\n"
                "from fallow.trust.keys import identity_of\n"
                "from fallow.trust.passports import Held\n"
                "async def main():\n"
                "    url, name, *held = sys.argv[1:]\n"
                "    held = Held(held[0], identity_of(bytes.fromhex(held[1])), held[2]) if held else None\n"
                "    await NatsBus.connect(url, name, held); print('ready', flush=True)\n"
                "    await asyncio.sleep(60)\n"
                "asyncio.run(main())\n"
            )
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, r.broker.urls[0], "child", *secrets, stdout=asyncio.subprocess.PIPE
            )
            assert child.stdout is not None
            assert await asyncio.wait_for(child.stdout.readline(), 20) == b"ready\n"
            child.kill()
            await eventually(lambda: gone == ["child"], within_s=2)
            await child.wait()
            await presence.close()

    asyncio.run(main())


def test_wrong_credentials_and_absent_servers_are_named(adapter: str, tmp_path: Path) -> None:
    if adapter != "nats":
        return  # of passports: test_bus_rights.py

    async def main() -> None:
        async with rig(adapter, tmp_path) as r:
            assert r.broker is not None
            url = r.broker.urls[0]
            with pytest.raises(BusUnavailable, match="credentials"):
                await NatsBus.connect(url.replace("fallow:", "fallow:x"), "n")
        with pytest.raises(BusUnavailable, match="is `fallow up` running"):
            await NatsBus.connect(url, "n")

    asyncio.run(main())


def test_the_broker_keeps_port_and_secrets_private_and_stable(adapter: str, tmp_path: Path) -> None:
    if adapter == "memory":
        return
    trust = TestNetwork().bus_trust() if adapter == "trusted" else None
    private = ["nats.conf", "broker.json"] + ["bus.key", "bus.pem", "accounts"] * (trust is not None)

    async def main() -> None:
        state = tmp_path / "state"
        broker = Broker(state, trust=trust)
        await broker.start()
        urls, pid = broker.urls, broker.pid
        assert broker.server is not None and broker.server == await find_server()
        assert [(state / path).stat().st_mode & 0o077 for path in ["", *private]] == [0] * (len(private) + 1)
        await broker.close()
        await broker.close()
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        again = Broker(state, trust=trust)
        await again.start()
        assert again.urls == urls
        rival = Broker(tmp_path / "rival", port=int(urls[0].rsplit(":", 1)[1]))
        with pytest.raises(BusUnavailable, match="address already in use"):
            await rival.start()
        await rival.close()
        await again.close()
        (state / "broker.json").write_text("{")
        with pytest.raises(ConfigError, match="damaged"):
            Broker(state)

    asyncio.run(main())


def test_a_server_that_cannot_be_restarted_is_given_up(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapter != "nats":
        return
    monkeypatch.setattr(broker_module, "RESTART_WAIT_S", 0.001)

    async def main() -> None:
        broker = Broker(tmp_path / "state")
        await broker.start()
        assert broker.pid is not None
        broker.server = ServerBinary(tmp_path / "missing", "0", "nowhere")
        os.kill(broker.pid, signal.SIGKILL)
        await eventually(lambda: broker.failure is not None)
        assert broker.failure is not None and "times in a row" in broker.failure
        await broker.close()

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_server_never_outlives_a_killed_parent(adapter: str, tmp_path: Path) -> None:
    if adapter != "nats":
        return

    async def main() -> None:
        code = (
            "import asyncio, sys, pathlib\n"
            "from fallow.fabric.broker import Broker\n"
            "async def main():\n"
            "    broker = Broker(pathlib.Path(sys.argv[1])); await broker.start(); print(broker.pid, flush=True)\n"
            "    await asyncio.sleep(60)\n"
            "asyncio.run(main())\n"
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(tmp_path / "state"), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        server = int(await asyncio.wait_for(child.stdout.readline(), 20))
        child.kill()
        await child.wait()

        def gone() -> bool:
            try:
                return Path(f"/proc/{server}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
            except (FileNotFoundError, ProcessLookupError):
                return True

        await eventually(gone)

    asyncio.run(main())
