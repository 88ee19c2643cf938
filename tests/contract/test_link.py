"""The `Link` contract, on every adapter: in-memory, iroh, the local socket, the two together, and the sealed relay over
both buses."""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fallow.domain.errors import FabricError, FrameError, LinkClosed
from fallow.domain.frames import Chunk, Frame, PeerAddress, Rows
from fallow.fabric import iroh_fast
from fallow.fabric.broker import Broker
from fallow.fabric.contract import LINK_WINDOW_BYTES, Bus, LinkEndpoint
from fallow.fabric.endpoint import CompositeEndpoint, open_endpoint
from fallow.fabric.iroh_link import IrohEndpoint, IrohLink
from fallow.fabric.link_core import LinkCore
from fallow.fabric.local_handshake import Identity
from fallow.fabric.local_link import LocalEndpoint, LocalLink
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.sealed_endpoint import RelayEndpoint
from tests.unit.fabric.support import chunk, eventually, rows

pytestmark = pytest.mark.parametrize(
    "adapter", ["memory", "iroh", "iroh-stock", "local", "composite", "relay-memory", "relay-nats"]
)

SEEDS = [bytes([number] * 32) for number in (1, 2, 3)]
NODES = [Identity.from_seed(seed).node for seed in SEEDS]
IN_FLIGHT_BYTES_MAX = 4 * LINK_WINDOW_BYTES
"""Window, kernel or QUIC buffers, and the reader's inbox together."""


@pytest.fixture(autouse=True)
def fast_path(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`iroh-stock` is what runs where the fast path into the binding is refused."""
    assert iroh_fast.enable(), "the binding in use is one that the fast path knows"
    if adapter == "iroh-stock":
        monkeypatch.setattr(iroh_fast, "enable", lambda: False)


@asynccontextmanager
async def endpoints(adapter: str) -> AsyncIterator[tuple[LinkEndpoint, LinkEndpoint]]:
    made: list[LinkEndpoint] = []
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fl"))
        fabric = MemoryFabric()
        connect_bus = await buses(stack, adapter, Path(folder), fabric) if adapter.startswith("relay") else None
        for seed, node in zip(SEEDS[:2], NODES[:2], strict=True):
            if adapter == "memory":
                made.append(fabric.endpoint(node))
            elif adapter.startswith("iroh"):
                made.append(await IrohEndpoint.bind(seed))
            elif connect_bus is not None:
                made.append(await RelayEndpoint.open(await connect_bus(node), "test", seed))
            elif adapter == "local":
                made.append(await LocalEndpoint.open(seed, Path(folder) / "sockets"))
            else:
                made.append(await open_endpoint(seed, socket_dir=Path(folder) / "sockets"))
        try:
            yield made[0], made[1]
        finally:
            for endpoint in made:
                await endpoint.close()


async def buses(
    stack: AsyncExitStack, adapter: str, folder: Path, fabric: MemoryFabric
) -> Callable[[str], Awaitable[Bus]]:
    """How a device gets its connection to the bus."""
    broker = Broker(folder / "broker") if adapter == "relay-nats" else None
    if broker is not None:
        stack.push_async_callback(broker.close)
        await broker.start()

    async def connect(name: str) -> Bus:
        bus: Bus = fabric.bus(name) if broker is None else await NatsBus.connect(broker.urls, name)
        stack.push_async_callback(bus.close)
        return bus

    return connect


@asynccontextmanager
async def linked(adapter: str) -> AsyncIterator[tuple[LinkCore, LinkCore]]:
    """The two ends of a fresh link."""
    async with endpoints(adapter) as (a, b):
        near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
        assert isinstance(near, LinkCore) and isinstance(far, LinkCore)
        try:
            yield near, far
        finally:
            near.abort("test over")
            far.abort("test over")


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def position(frame: Frame) -> int:
    assert isinstance(frame.header, Rows)
    return frame.header.position


def test_frames_arrive_whole_once_and_in_order_both_ways(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as ends:
            source = random.Random(1)
            sent = [rows(i, source.randbytes(source.choice([0, 1, 900, 20_000, 200_000]))) for i in range(120)]

            async def talk(end: LinkCore) -> None:
                for frame in sent:
                    await end.send(frame)

            async def listen(end: LinkCore) -> None:
                for frame in sent:
                    came = await end.receive()
                    assert came.header == frame.header and bytes(came.payload) == frame.payload

            await asyncio.gather(*(work(end) for end in ends for work in (talk, listen)))

    run(main())


def test_a_slow_reader_stops_the_sender_and_nothing_is_lost(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            payload = bytes(256 * 1024)
            sent = 0

            async def talk() -> None:
                nonlocal sent
                for i in range(512):  # 128 MB, were it not for back-pressure
                    await near.send(rows(i, payload))
                    sent += 1

            talking = asyncio.create_task(talk())
            before = -1
            while before != sent or not sent:  # until the sender makes no more progress
                before = sent
                await asyncio.sleep(0.3)
            assert not talking.done()
            assert sent * len(payload) <= IN_FLIGHT_BYTES_MAX
            assert not near.post(rows(0)), "a full window refuses at once"
            in_flight = sent
            talking.cancel()
            for i in range(in_flight):
                assert position(await far.receive()) == i
            await near.send(rows(9999))
            assert position(await far.receive()) == 9999

    run(main())


def test_a_full_window_opens_again_however_it_was_emptied(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            came: list[int] = []
            far.set_receiver(lambda frame: came.append(position(frame)), lambda _: None)
            sent = 0
            for _ in range(8):
                while near.post(rows(sent, bytes(60_000))):  # all in one pass of the loop
                    sent += 1
                await near.send(rows(sent, b"waited"))
                sent += 1
            await eventually(lambda: len(came) == sent, within_s=30)
            assert came == list(range(sent))

    run(main())


def test_sends_from_several_tasks_do_not_mix(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):

            async def talk(number: int) -> None:
                for i in range(60):
                    await near.send(chunk(number * 1000 + i, bytes([number]) * (1 + 7919 * i % 100_000)))

            talking = [asyncio.create_task(talk(number)) for number in range(4)]
            seen: dict[int, list[int]] = {number: [] for number in range(4)}
            for _ in range(240):
                frame = await far.receive()
                assert isinstance(frame.header, Chunk)
                number, i = divmod(frame.header.index, 1000)
                assert bytes(frame.payload) == bytes([number]) * (1 + 7919 * i % 100_000)
                seen[number].append(i)
            assert all(order == list(range(60)) for order in seen.values())
            await asyncio.gather(*talking)

    run(main())


def test_cancelling_receives_loses_nothing(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):

            async def talk() -> None:
                for i in range(200):
                    await near.send(rows(i, bytes(1500)))
                    if i % 3 == 0:
                        await asyncio.sleep(0.001)

            talking = asyncio.create_task(talk())
            got: list[int] = []
            source = random.Random(2)
            while len(got) < 200:
                receiving = asyncio.create_task(far.receive())
                await asyncio.wait({receiving}, timeout=source.random() * 0.002)
                if not receiving.done():
                    receiving.cancel()
                    await asyncio.wait({receiving})
                if not receiving.cancelled():
                    got.append(position(receiving.result()))
            assert got == list(range(200))
            await talking

    run(main())


def test_close_flushes_and_says_why(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            for i in range(40):
                await near.send(rows(i, bytes(50_000)))
            closing = asyncio.create_task(near.close("moving", "to a better place"))
            assert [position(await far.receive()) for _ in range(40)] == list(range(40))
            for _ in range(2):
                with pytest.raises(LinkClosed, match="moving to a better place"):
                    await far.receive()
            with pytest.raises(LinkClosed):
                await far.send(rows(0))
            await closing
            await near.close()
            await far.close()

    run(main())


def test_close_wakes_every_waiter_on_both_sides_at_once(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):

            async def fill() -> None:
                while True:
                    await near.send(rows(0, bytes(1 << 20)))

            waiters = [asyncio.create_task(work) for work in (fill(), near.receive(), near.receive())]
            await eventually(lambda: not near.post(rows(0)))
            closing = asyncio.create_task(far.close("enough", ""))
            done = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), 10)
            assert all(isinstance(error, LinkClosed) for error in done), done
            await closing
            with pytest.raises(LinkClosed, match="this side closed"):
                await far.send(rows(0))

    run(main())


def test_a_peer_that_breaks_off_is_noticed_at_once(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            receiving = asyncio.create_task(near.receive())
            await asyncio.sleep(0.05)
            far.abort("gone")
            with pytest.raises(LinkClosed):
                await asyncio.wait_for(receiving, 2)
            assert not near.post(rows(0))

    run(main())


def test_a_frame_of_twenty_megabytes(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            payload = random.Random(3).randbytes(20 << 20)
            sending = asyncio.create_task(near.send(chunk(1, payload)))
            frame = await far.receive()
            assert frame.payload == payload
            await sending

    run(main())


def test_garbage_ends_its_link_and_no_other(adapter: str) -> None:
    async def main() -> None:
        async with endpoints(adapter) as (a, b):
            links = []
            for _ in range(2):
                links.append(await asyncio.gather(a.connect(b.address), anext(b.accept())))
            (bad, bad_far), (good, good_far) = links
            await bad.send(rows(1))
            assert isinstance(bad, LinkCore)
            bad._write(b"\xff" * 64, b"")
            assert position(await bad_far.receive()) == 1
            for _ in range(2):
                with pytest.raises(FrameError, match="too large"):
                    await bad_far.receive()
            with pytest.raises(LinkClosed):
                await bad_far.send(rows(0))
            with pytest.raises(LinkClosed):
                await bad.receive()
            await good.send(rows(2))
            assert position(await good_far.receive()) == 2
            for link in (good, good_far):
                await link.close()

    run(main())


def test_a_stream_that_breaks_inside_a_frame_yields_no_frame(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            near._write(b"\x00\x10\x00\x00\x40\x00\x00\x00half", b"")
            await eventually(lambda: far.bytes_received > 0)
            near.abort("cut")
            with pytest.raises(LinkClosed):
                await far.receive()

    run(main())


def test_ids_are_proved(adapter: str) -> None:
    async def main() -> None:
        async with endpoints(adapter) as (a, b):
            near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
            assert (near.peer, far.peer) == (NODES[1], NODES[0])
            assert (a.address.node, b.address.node) == (NODES[0], NODES[1])
            impostor = PeerAddress(NODES[2], b.address.endpoints)
            with pytest.raises(LinkClosed):
                await a.connect(impostor)
            await near.send(rows(1))
            assert position(await far.receive()) == 1
            await near.close()

    run(main())


def test_pushed_frames_come_in_order_and_then_the_end_once(adapter: str) -> None:
    async def main() -> None:
        async with linked(adapter) as (near, far):
            for i in range(5):
                assert near.post(rows(i))
            await eventually(lambda: len(far._inbox) == 5)
            events: list[object] = []
            ends: list[FabricError] = []
            far.set_receiver(lambda frame: events.append(position(frame)), ends.append)
            assert events == [0, 1, 2, 3, 4]
            for i in range(5, 9):
                await near.send(rows(i))
            closing = asyncio.create_task(near.close("done", "for today"))
            await eventually(lambda: bool(ends))
            await closing
            assert events == list(range(9)) and "for today" in str(ends[0])
            await asyncio.sleep(0.05)
            assert len(ends) == 1

    run(main())


def test_an_endpoint_that_closed_is_not_reachable_and_stops_accepting(adapter: str) -> None:
    async def main() -> None:
        async with endpoints(adapter) as (a, b):
            accepting = asyncio.ensure_future(anext(b.accept()))
            await asyncio.sleep(0.01)
            address = b.address
            await b.close()
            await b.close()
            with pytest.raises(StopAsyncIteration):
                await accepting
            if adapter in (
                "memory",
                "local",
                "relay-memory",
                "relay-nats",
            ):  # elsewhere it takes the dial's whole timeout
                with pytest.raises(LinkClosed):
                    await a.connect(address)

    run(main())


def test_the_composite_prefers_the_socket_and_falls_back_to_the_network(adapter: str) -> None:
    if adapter != "composite":
        return

    async def main() -> None:
        async with endpoints(adapter) as (a, b):
            assert isinstance(b, CompositeEndpoint)
            near, far = await asyncio.gather(a.connect(b.address), anext(b.accept()))
            assert isinstance(near, LocalLink) and isinstance(far, LocalLink)
            gone = PeerAddress(NODES[1], ("unix:/nowhere.sock", *b.address.endpoints[1:]))
            near2, far2 = await asyncio.gather(a.connect(gone), anext(b.accept()))
            assert isinstance(near2, IrohLink) and isinstance(far2, IrohLink)
            for link in (near, near2):
                await link.close()

    run(main())
