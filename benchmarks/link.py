"""Round trip and throughput of every fabric, between two processes, against plain asyncio TCP as the bound.

    python benchmarks/link.py [--rounds 5] [--pings 400] [--megabytes 64]

Method: one echo process per transport; rounds alternate between transports, so that load on the machine hits all alike.
A ping is a `Rows` frame with 1 KB of payload through `Peers` on both sides (NATS: a request of 1 KB; TCP: 1 KB through
an asyncio protocol, no framing). One way, both sides' CPU included, is half of it. Throughput is 256 KB payloads one
way until the last was acknowledged. Results: a table, and JSON in `benchmarks/results/link.json`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fallow.domain.errors import LinkClosed
from fallow.domain.frames import Frame, PeerAddress, Phase, Rows
from fallow.domain.ids import NodeId, SessionId
from fallow.fabric.broker import Broker
from fallow.fabric.contract import LinkEndpoint
from fallow.fabric.iroh_link import IrohEndpoint
from fallow.fabric.local_handshake import Identity
from fallow.fabric.local_link import LocalEndpoint
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.peers import Peers
from fallow.trust.open_doors import OpenAdmission

PAYLOAD = bytes(1024)
BULK = bytes(256 * 1024)
STEP_TIMEOUT_S = 30
SERVER_SEED, CLIENT_SEED = b"\x11" * 32, b"\x22" * 32
TRANSPORTS = ["tcp", "memory", "local", "iroh", "nats"]


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


def frame(position: int, payload: bytes) -> Frame:
    header = Rows(
        session=SessionId("ab" * 16), epoch=1, position=position, count=1, phase=Phase.DECODE, logits_from=0, top_k=64
    )
    return Frame(header, payload)


# --- the echo side ------------------------------------------------------------------------------


class Echo:
    """Answers 1 KB frames; swallows bulk and answers its last frame."""

    def __init__(self, endpoint: LinkEndpoint) -> None:
        self.peers = Peers(
            endpoint,
            SystemClock(),
            role="node",
            admission=OpenAdmission(),
            on_frame=self.on_frame,
            on_lost=lambda *_: None,
        )

    def on_frame(self, peer: NodeId, came: Frame) -> None:
        assert isinstance(came.header, Rows)
        if len(came.payload) <= len(PAYLOAD) or came.header.position == 0:
            self.peers.post(peer, frame(came.header.position, PAYLOAD))


class TcpEcho(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.bulk = 0

    def data_received(self, data: bytes) -> None:
        if self.bulk or len(data) > len(PAYLOAD):
            self.bulk += len(data)
            if data[-1] == 1:
                self.bulk = 0
                self.transport.write(PAYLOAD)
        else:
            self.transport.write(data)


async def make_endpoint(transport: str, seed: bytes, folder: str) -> LinkEndpoint:
    if transport == "local":
        return await LocalEndpoint.open(seed, Path(folder) / "s")
    return await IrohEndpoint.bind(seed)


async def serve(transport: str, argument: str) -> None:
    if transport == "tcp":
        server = await asyncio.get_running_loop().create_server(TcpEcho, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
    elif transport == "nats":
        bus = await NatsBus.connect(argument, "echo")

        async def answer(_: str, message: bytes) -> bytes | None:
            return PAYLOAD if len(message) <= len(PAYLOAD) or message[-1] == 1 else None

        await bus.subscribe("echo", answer)
        print("ready", flush=True)
    else:
        endpoint = await make_endpoint(transport, SERVER_SEED, argument)
        await Echo(endpoint).peers.start()
        print(json.dumps(endpoint.address.endpoints), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


# --- the measuring side -------------------------------------------------------------------------

Exchange = Callable[[bytes, bool], Awaitable[None]]
"""Send a payload; when the flag is set, wait for the answer."""


async def peers_exchange(endpoint: LinkEndpoint, address: PeerAddress) -> Exchange:
    waiting: list[asyncio.Future[None]] = []

    def on_frame(_: NodeId, __: Frame) -> None:
        waiting.pop().set_result(None)

    def on_lost(_: NodeId, reason: str) -> None:
        for answer in waiting:
            answer.set_exception(LinkClosed(reason))

    peers = Peers(
        endpoint, SystemClock(), role="gateway", admission=OpenAdmission(), on_frame=on_frame, on_lost=on_lost
    )
    await peers.start()
    await peers.connect(address)
    loop = asyncio.get_running_loop()

    async def exchange(payload: bytes, wait: bool) -> None:
        if not wait:
            await peers.send(address, frame(1, payload))
            return
        answer = loop.create_future()
        waiting.append(answer)
        await peers.send(address, frame(0, payload))
        await answer

    return exchange


async def tcp_exchange(port: int) -> Exchange:
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []
    room = asyncio.Event()
    room.set()

    class Client(asyncio.Protocol):
        got = 0

        def data_received(self, data: bytes) -> None:
            self.got += len(data)
            if self.got >= len(PAYLOAD):
                self.got = 0
                waiting.pop().set_result(None)

        def pause_writing(self) -> None:
            room.clear()

        def resume_writing(self) -> None:
            room.set()

    transport, _ = await loop.create_connection(Client, "127.0.0.1", port)

    async def exchange(payload: bytes, wait: bool) -> None:
        await room.wait()
        if not wait:
            transport.write(payload)
            return
        answer = loop.create_future()
        waiting.append(answer)
        transport.write(payload if len(payload) <= len(PAYLOAD) else payload[:-1] + b"\x01")
        await answer

    return exchange


def nats_exchange(bus: NatsBus) -> Exchange:
    async def exchange(payload: bytes, wait: bool) -> None:
        if wait:
            await bus.request("echo", payload if len(payload) <= len(PAYLOAD) else payload[:-1] + b"\x01", 30)
        else:
            await bus.publish("echo", payload)

    return exchange


class Bench:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.children: list[asyncio.subprocess.Process] = []
        self.broker: Broker | None = None
        self.keep: list[object] = []

    async def child(self, transport: str, argument: str = "") -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", transport, argument,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self.children.append(process)
        assert process.stdout is not None
        return (await process.stdout.readline()).decode().strip()

    async def open(self, transport: str) -> Exchange:
        if transport == "tcp":
            return await tcp_exchange(int(await self.child("tcp")))
        if transport == "nats":
            self.broker = Broker(Path(self.folder) / "broker")
            await self.broker.start()
            await self.child("nats", self.broker.urls[0])
            return nats_exchange(await NatsBus.connect(self.broker.urls, "bench"))
        if transport == "memory":
            fabric = MemoryFabric()
            echo = Echo(fabric.endpoint(NodeId("e" * 64)))
            await echo.peers.start()
            self.keep.append(echo)
            return await peers_exchange(fabric.endpoint(NodeId("f" * 64)), PeerAddress(NodeId("e" * 64), ()))
        endpoints = json.loads(await self.child(transport, self.folder))
        mine = await make_endpoint(transport, CLIENT_SEED, self.folder)
        return await peers_exchange(mine, PeerAddress(Identity.from_seed(SERVER_SEED).node, tuple(endpoints)))

    async def close(self) -> None:
        for process in self.children:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.children:
            try:
                await asyncio.wait_for(process.wait(), 3)
            except TimeoutError:
                process.kill()
        if self.broker is not None:
            await self.broker.close()


async def measure(names: list[str], rounds: int, pings: int, megabytes: int) -> dict[str, dict[str, float]]:
    round_trips_s: dict[str, list[float]] = {name: [] for name in names}
    throughput: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        bench = Bench(folder)
        try:
            exchanges = {name: await bench.open(name) for name in names}
            for exchange in exchanges.values():
                for _ in range(50):
                    await exchange(PAYLOAD, True)
            for _ in range(rounds):
                for name, exchange in exchanges.items():
                    async with named_timeout(f"pings over {name}"):
                        for _ in range(pings):
                            began_s = time.perf_counter()
                            await exchange(PAYLOAD, True)
                            round_trips_s[name].append(time.perf_counter() - began_s)
                for name, exchange in exchanges.items():
                    async with named_timeout(f"bulk over {name}"):
                        throughput[name].append(await bulk(name, exchange, megabytes))
        finally:
            await bench.close()
    return {name: summary(round_trips_s[name], throughput[name]) for name in names}


async def bulk(name: str, exchange: Exchange, megabytes: int) -> float:
    count = megabytes * (1 << 20) // len(BULK)
    began_s = time.perf_counter()
    for index in range(1, count):
        # NATS has no back-pressure: it disconnects a reader that falls 16 MB behind.
        await exchange(BULK, name == "nats" and index % 16 == 0)
    await exchange(BULK, True)
    return count * len(BULK) / 1e6 / (time.perf_counter() - began_s)


@asynccontextmanager
async def named_timeout(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            yield
    except TimeoutError:
        raise SystemExit(f"{what} took longer than {STEP_TIMEOUT_S} s") from None


def summary(round_trips_s: list[float], megabytes_per_s: list[float]) -> dict[str, float]:
    ordered = sorted(round_trips_s)
    return {
        "rtt_p50_us": ordered[len(ordered) // 2] * 1e6,
        "rtt_p99_us": ordered[len(ordered) * 99 // 100] * 1e6,
        "throughput_mb_per_s": statistics.median(megabytes_per_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pings", type=int, default=400)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(*arguments.serve))
        return
    results = asyncio.run(
        measure(
            ["tcp", *(n for n in arguments.only if n != "tcp")], arguments.rounds, arguments.pings, arguments.megabytes
        )
    )
    bound = results["tcp"]
    print(f"{'':8}{'RTT p50':>10}{'p99':>10}{'x TCP':>8}{'MB/s':>9}{'x TCP':>8}")
    for name, row in results.items():
        print(
            f"{name:8}{row['rtt_p50_us']:>8.0f}us{row['rtt_p99_us']:>8.0f}us"
            f"{row['rtt_p50_us'] / bound['rtt_p50_us']:>8.1f}{row['throughput_mb_per_s']:>9.0f}"
            f"{row['throughput_mb_per_s'] / bound['throughput_mb_per_s']:>8.2f}"
        )
    target = Path(__file__).parent / "results" / "link.json"
    target.parent.mkdir(exist_ok=True)
    cpu = {"cpu_count": os.cpu_count(), "python": sys.version.split()[0], "load_1m": os.getloadavg()[0]}
    target.write_text(json.dumps({"machine": cpu, "payload_bytes": len(PAYLOAD), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
