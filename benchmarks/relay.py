"""The price of the sealed relay, against direct links: round trip of a decode frame, throughput of prefill frames.

    python benchmarks/relay.py [--rounds 5] [--pings 300] [--megabytes 48]

Method: one echo process per way; rounds alternate between the ways, so that load on the machine hits all alike.
`local` is a Unix socket, `iroh` direct QUIC over loopback, `relay` the sealed relay over a real nats-server, and
`unsealed` the same with the seal left out (in this benchmark only), so that bus and cryptography are told apart.
A decode frame is one row of 576 float16, 1,152 bytes; a prefill frame has 256 such rows. Throughput is one way until
the last frame was answered. Then, in one process: what sealing, opening and shaking hands take by themselves.
Results: a table of medians and ratios, and JSON in `benchmarks/results/relay.json`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fallow.domain.frames import Frame, PeerAddress, Phase, Rows
from fallow.domain.ids import SessionId
from fallow.fabric.broker import Broker
from fallow.fabric.codec import encode
from fallow.fabric.contract import LinkEndpoint, PushLink
from fallow.fabric.iroh_link import IrohEndpoint
from fallow.fabric.local_handshake import Identity
from fallow.fabric.local_link import LocalEndpoint
from fallow.fabric.nats_bus import NatsBus
from fallow.fabric.sealed_endpoint import RelayEndpoint
from fallow.fabric.sealing import _RECORD_HEAD, VERSION, Dialler, Kind, Listener, Opener, Sealer

DECODE = bytes(1152)
PREFILL = bytes(256 * 1152)
STEP_TIMEOUT_S = 60
SERVER_SEED, CLIENT_SEED = b"\x11" * 32, b"\x22" * 32
WAYS = ["local", "iroh", "relay", "unsealed"]
SEAL_TARGET_US = 50.0


def frame(position: int, payload: bytes) -> Frame:
    header = Rows(
        session=SessionId("ab" * 16), epoch=1, position=position, count=1, phase=Phase.DECODE, logits_from=0, top_k=64
    )
    return Frame(header, payload)


def leave_out_the_seal() -> None:
    """The yardstick: records travel as they are."""

    def seal(self: Sealer, plain: bytes) -> bytes:
        head = _RECORD_HEAD.pack(VERSION, Kind.RECORD, self._link_id, self._count)
        self._count += 1
        return head + plain

    Sealer.seal = seal  # type: ignore[assignment,method-assign]
    Opener.open = lambda self, message: bytes(message)[_RECORD_HEAD.size :]  # type: ignore[method-assign]


async def make_endpoint(way: str, seed: bytes, folder: str, urls: list[str]) -> LinkEndpoint:
    if way == "local":
        return await LocalEndpoint.open(seed, Path(folder) / "s")
    if way == "iroh":
        return await IrohEndpoint.bind(seed)
    bus = await NatsBus.connect(urls, Identity.from_seed(seed).node)
    return await RelayEndpoint.open(bus, way, seed)


async def serve(way: str, folder: str, urls: str) -> None:
    """Answer decode frames, and the prefill frame at position 0."""
    if way == "unsealed":
        leave_out_the_seal()
    endpoint = await make_endpoint(way, SERVER_SEED, folder, json.loads(urls))
    print(json.dumps(endpoint.address.endpoints), flush=True)
    opened = await anext(endpoint.accept())
    link: PushLink = opened  # type: ignore[assignment]

    def on_frame(came: Frame) -> None:
        assert isinstance(came.header, Rows)
        if came.header.position == 0:
            link.post(frame(0, DECODE))

    link.set_receiver(on_frame, lambda _: None)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Client:
    """The measuring end of one way, in a process of its own: the unsealed one must not share it with the sealed."""

    def __init__(self, link: PushLink) -> None:
        self.link = link
        self._answer: asyncio.Future[None] | None = None
        link.set_receiver(self._on_frame, lambda _: None)

    def _on_frame(self, _: Frame) -> None:
        assert self._answer is not None
        self._answer.set_result(None)

    async def exchange(self, payload: bytes) -> None:
        self._answer = asyncio.get_running_loop().create_future()
        await self.link.send(frame(0, payload))
        await self._answer

    async def pings(self, count: int) -> list[float]:
        took_s = []
        for _ in range(count):
            began_s = time.perf_counter()
            await self.exchange(DECODE)
            took_s.append(time.perf_counter() - began_s)
        return took_s

    async def bulk(self, megabytes: int) -> float:
        count = megabytes * (1 << 20) // len(PREFILL)
        began_s = time.perf_counter()
        for _ in range(count - 1):
            await self.link.send(frame(1, PREFILL))
        await self.exchange(PREFILL)
        return count * len(PREFILL) / 1e6 / (time.perf_counter() - began_s)


async def measure_here(way: str, folder: str, urls: str, endpoints: str) -> None:
    """Wait for orders on stdin, one JSON line each; answer each with one."""
    if way == "unsealed":
        leave_out_the_seal()
    endpoint = await make_endpoint(way, CLIENT_SEED, folder, json.loads(urls))
    address = PeerAddress(Identity.from_seed(SERVER_SEED).node, tuple(json.loads(endpoints)))
    client = Client(await endpoint.connect(address))  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        kind, amount = json.loads(line)
        began_cpu_s = time.process_time()
        found = await client.pings(amount) if kind == "pings" else [await client.bulk(amount)]
        print(json.dumps({"found": found, "cpu_s": time.process_time() - began_cpu_s}), flush=True)


# --- the conductor --------------------------------------------------------------------------------


class Process:
    """A child that is told by lines and answers by lines, and ends when its stdin closes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, *arguments: str) -> "Process":
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, __file__, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        )

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(STEP_TIMEOUT_S):
            return (await self._process.stdout.readline()).decode()

    async def ask(self, kind: str, amount: int) -> tuple[list[float], float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, amount]).encode() + b"\n")
        answer = json.loads(await self.line())
        return answer["found"], answer["cpu_s"]

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 3)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def running(names: list[str]) -> AsyncIterator[dict[str, Process]]:
    """The measuring process of each way, with its echo and the bus behind it."""
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        broker = Broker(Path(folder) / "broker")
        await broker.start()
        urls = json.dumps(list(broker.urls))
        children: list[Process] = []
        clients: dict[str, Process] = {}
        try:
            for name in names:
                echo = await Process.start("--serve", name, folder, urls)
                children.append(echo)
                endpoints = (await echo.line()).strip()
                clients[name] = await Process.start("--measure", name, folder, urls, endpoints)
                children.append(clients[name])
                assert (await clients[name].line()).strip() == "ready", f"{name} did not start"
            yield clients
        finally:
            for child in reversed(children):
                await child.close()
            await broker.close()


async def measure(names: list[str], rounds: int, pings: int, megabytes: int) -> dict[str, dict[str, float]]:
    round_trips_s: dict[str, list[float]] = {name: [] for name in names}
    cpu_s = dict.fromkeys(names, 0.0)
    throughput: dict[str, list[float]] = {name: [] for name in names}
    async with running(names) as clients:
        for client in clients.values():
            await client.ask("pings", 50)
        for _ in range(rounds):
            for name, client in clients.items():
                found, used_s = await client.ask("pings", pings)
                round_trips_s[name] += found
                cpu_s[name] += used_s
            for name, client in clients.items():
                throughput[name] += (await client.ask("bulk", megabytes))[0]
    return {
        name: {
            "rtt_p50_us": statistics.median(round_trips_s[name]) * 1e6,
            "rtt_p99_us": sorted(round_trips_s[name])[len(round_trips_s[name]) * 99 // 100] * 1e6,
            "cpu_per_round_trip_us": cpu_s[name] / len(round_trips_s[name]) * 1e6,
            "throughput_mb_per_s": statistics.median(throughput[name]),
        }
        for name in names
    }


def timed_us(work: Callable[[], object], count: int, rounds: int = 7) -> float:
    found = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        for _ in range(count):
            work()
        found.append((time.perf_counter() - began_s) / count)
    return statistics.median(found) * 1e6


def seal_costs() -> dict[str, float]:
    """What the seal itself takes, in microseconds."""
    dialler_id, listener_id = Identity.from_seed(CLIENT_SEED), Identity.from_seed(SERVER_SEED)

    def shake() -> tuple[Sealer, Opener]:
        dialler = Dialler(dialler_id, listener_id.node, "bench")
        listener = Listener(listener_id, "bench", dialler_id.node, dialler.dial)
        confirm, near = dialler.answered(listener.answer)
        return near.sealer, listener.confirmed(confirm).opener

    sealer, opener = shake()
    costs = {"handshake_both_sides_us": timed_us(shake, 20)}
    for name, payload, count in (("decode", DECODE, 5000), ("prefill", bytes(64 * 1024), 200)):
        plain = encode(frame(1, payload))
        sealed: list[bytes] = []
        costs[f"seal_{name}_us"] = timed_us(lambda plain=plain, sealed=sealed: sealed.append(sealer.seal(plain)), count)  # type: ignore[misc]
        messages = iter(sealed)
        costs[f"open_{name}_us"] = timed_us(lambda messages=messages: opener.open(next(messages)), count)  # type: ignore[misc]
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pings", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(*arguments.serve))
        return
    if arguments.measure:
        asyncio.run(measure_here(*arguments.measure))
        return
    results = asyncio.run(measure(arguments.only, arguments.rounds, arguments.pings, arguments.megabytes))
    print(f"{'':10}{'RTT p50':>10}{'p99':>10}{'CPU':>9}{'MB/s':>8}")
    for name, row in results.items():
        print(
            f"{name:10}{row['rtt_p50_us']:>8.0f}us{row['rtt_p99_us']:>8.0f}us{row['cpu_per_round_trip_us']:>7.0f}us"
            f"{row['throughput_mb_per_s']:>8.0f}"
        )
    ratios = {
        f"relay_over_{name}": {
            "rtt": results["relay"]["rtt_p50_us"] / results[name]["rtt_p50_us"],
            "throughput": results["relay"]["throughput_mb_per_s"] / results[name]["throughput_mb_per_s"],
        }
        for name in results
        if name != "relay" and "relay" in results
    }
    for name, ratio in ratios.items():
        print(f"{name.replace('_', ' '):22} round trip {ratio['rtt']:.2f} x, throughput {ratio['throughput']:.2f} x")
    costs = seal_costs()
    for name, cost_us in costs.items():
        print(f"{name:26}{cost_us:>9.1f}")
    per_frame_us = max(costs["seal_decode_us"], costs["open_decode_us"])
    print(f"sealing or opening a decode frame: {per_frame_us:.1f} us (target < {SEAL_TARGET_US:.0f} us)")
    target = Path(__file__).parent / "results" / "relay.json"
    target.parent.mkdir(exist_ok=True)
    machine = {"cpu_count": os.cpu_count(), "python": sys.version.split()[0], "load_1m": os.getloadavg()[0]}
    found = {
        "machine": machine, "decode_bytes": len(DECODE), "prefill_bytes": len(PREFILL),
        "results": results, "ratios": ratios, "seal": costs,
    }  # fmt: skip
    target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
