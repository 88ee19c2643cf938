"""One coordinator process under the heartbeats of 1,000, 5,000 and 20,000 devices: processor, memory, delay, losses.

    python benchmarks/heartbeats.py [--devices 1000 5000 20000] [--cells 1] [--routes 20] [--seconds 12]

Three processes: a real nats-server, the real coordinator (as `fallow serve coordinator` builds it, one `Coordinator`
for each cell), and a load that publishes the heartbeats of all devices through a few connections at the rate that an
interval of 10 s gives. A heartbeat is of realistic size (about 1.7 KB): outlook, cached layers, a hosted stage with its
speed, round trips to 8 others; it differs from the last one. Unless `--routes 0`, a store announces a model of 32
layers, the coordinator places it, and the devices host what they are told, at once.

Method: devices join within a few seconds and orders are obeyed until they cease; that is not measured. Then, for
`--seconds`, the processor time of coordinator and server is read with psutil, one in 16 heartbeats carries the time at
which it was sent, and `--routes` a second are asked for. Memory for each device is what the coordinator's resident set
grew by since it was empty. A heartbeat is lost when it was published and not folded into the registry.

Results: a table, and JSON in `benchmarks/results/heartbeats.json`.
"""

import argparse
import asyncio
import gc
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.errors import FabricError
from fallow.domain.fleet import (
    Accepted,
    Heartbeat,
    HostedStage,
    ModelEntry,
    NodeCommand,
    Outlook,
    PlaceStage,
    RouteReply,
    RouteRequest,
    Speed,
    StageStatus,
    StoreAnnounced,
    Subjects,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import Family, ModelConfig, Quantisation, Span, StageSpec, cut_points
from fallow.fabric.broker import Broker
from fallow.fabric.disconnects import NatsPresence
from fallow.fabric.nats_bus import NatsBus
from fallow.policy.membership import MembershipRules
from fallow.system_clock import SystemClock
from fallow.trust.open_doors import open_coordinator

RESULTS = Path(__file__).parent / "results" / "heartbeats.json"
INTERVAL_S = 10.0
JOIN_HZ = 4000
"""Heartbeats a second while devices join."""
TICK_S = 0.01
CONNECTIONS = 4
LINKS = 8
LAYERS = 32
LAYER_BYTES = 118 << 20
STAMPED_EVERY = 16
SETTLE_S = 6.0
SETTLE_MAX_S = 40.0
"""How long orders may go on before the load is measured all the same."""
ANSWER_MAX_S = 10.0
LINE_MAX_BYTES = 1 << 24
CPU_SHARE_GOAL = 0.5
MODEL = Digest("c0" * 32)


# --- the coordinator's process ----------------------------------------------------------------------


async def coordinate(url: str, system_url: str, cells: int) -> None:
    """Real coordinators, and a subject that tells what they heard."""
    heard = 0
    delays_s: list[float] = []
    bus = await NatsBus.connect(url, "coordinator")
    membership = MembershipRules(heartbeat_interval_s=INTERVAL_S)
    coordinators = [
        Coordinator(
            CoordinatorConfig(cell=f"cell-{index}", membership=membership),
            bus,
            SystemClock(),
            NatsPresence(system_url) if index == 0 else None,
            trust=open_coordinator(),
        )
        for index in range(cells)
    ]
    for coordinator in coordinators:
        fold = coordinator.fleet.hear

        def hear(beat: Heartbeat, *rest: float, fold: object = fold) -> object:
            nonlocal heard
            assert callable(fold)
            folded = fold(beat, *rest)
            heard += folded is not None
            if beat.version.startswith("sent"):
                delays_s.append(time.monotonic() - float(beat.version[5:]))
            return folded

        coordinator.fleet.hear = hear  # type: ignore[method-assign, assignment]
        await coordinator.start()

    async def figures(_: str, __: bytes) -> bytes:
        present = sum(len(coordinator.fleet.present()) for coordinator in coordinators)
        told = {"heard": heard, "present": present, "delays_s": delays_s[-20_000:]}
        delays_s.clear()
        return json.dumps(told).encode()

    await bus.subscribe("bench.figures", figures)
    await asyncio.Event().wait()


# --- the load's process -----------------------------------------------------------------------------


def model_entry() -> ModelEntry:
    """An 8-billion-parameter model in 4 bits."""
    return ModelEntry(
        name=ModelName("bench-8b"),
        model=MODEL,
        manifest_bytes=10_000,
        config=ModelConfig(
            family=Family.LLAMA,
            layer_count=LAYERS,
            hidden_size=4096,
            head_count=32,
            kv_head_count=8,
            head_dim=128,
            intermediate_size=14336,
            vocab_size=128_256,
            context_length=8192,
            norm_epsilon=1e-5,
            rope_theta=5e5,
        ),
        quantisation=Quantisation.Q4,
        weights_bytes=(525 << 20, 525 << 20, (LAYER_BYTES,) * LAYERS),
        created_unix_s=0,
    )


def heartbeats(devices: int) -> Iterator[Heartbeat]:
    """One for each device: partial spans on the model's grid, everything that a heartbeat may tell."""
    draw = random.Random(1)
    ids = [NodeId(draw.randbytes(32).hex()) for _ in range(devices)]
    edges = (0, *cut_points(LAYERS), LAYERS)
    for index, node in enumerate(ids):
        first = index % (len(edges) - 1)
        pieces = tuple(Span(edges[at], edges[at + 1]) for at in range(first, min(first + 2, len(edges) - 1)))
        yield Heartbeat(
            node=node,
            name=f"device {index}",
            sequence=0,
            boot=draw.randbytes(8).hex(),
            address=PeerAddress(node=node, endpoints=(f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}:7000",)),
            memory_bytes=16 << 30,
            kv_budget_bytes=4 << 30,
            kv_free_bytes=draw.randrange(1 << 30, 4 << 30),
            hosted=(
                HostedStage(
                    stage=StageSpec(model=MODEL, pieces=pieces),
                    status=StageStatus.READY,
                    weights_bytes=sum(piece.layer_count for piece in pieces) * LAYER_BYTES,
                    progress=1.0,
                ),
            ),
            session_count=draw.randrange(4),
            tokens_per_s=draw.random() * 50,
            link_rtt_s={peer: draw.random() / 20 for peer in draw.sample(ids, min(LINKS, devices))},
            region="eu-west",
            disk_free_bytes=200 << 30,
            cached={MODEL: pieces},
            outlook=Outlook(survival=(0.99, 0.97, 0.94, 0.8, 0.5), expected_s=25_000.0),
        )


class Device:
    """A device: its heartbeats, and obedience at once."""

    def __init__(self, beat: Heartbeat, cell: str) -> None:
        self.node = beat.node
        self.subject = Subjects(cell).heartbeat(beat.node)
        self._beat = beat

    def beat(self, stamped: bool) -> bytes:
        sequence = self._beat.sequence + 1
        # Measured anew, so that every heartbeat differs in what it hosts.
        speed = Speed(layer_s_1=0.004 + sequence % 1000 * 1e-7, layer_s_4=0.0051, layer_s_8=0.0072)
        hosted = tuple(msgspec.structs.replace(item, speed=speed) for item in self._beat.hosted)
        version = f"sent {time.monotonic():.6f}" if stamped else "1.0.0"
        self._beat = msgspec.structs.replace(self._beat, sequence=sequence, hosted=hosted, version=version)
        return msgspec.json.encode(self._beat)

    def obey(self, command: NodeCommand) -> None:
        """Host what was ordered: it is ready in the next heartbeat."""
        hosted: tuple[HostedStage, ...] = ()
        if isinstance(command, PlaceStage):
            held_bytes = command.stage.layer_count * LAYER_BYTES
            hosted = (
                HostedStage(stage=command.stage, status=StageStatus.READY, weights_bytes=held_bytes, progress=1.0),
            )
        self._beat = msgspec.structs.replace(self._beat, hosted=hosted)


class Load:
    """Publishes heartbeats of all devices in turn at a rate, behind schedule if it must, never ahead."""

    def __init__(self, buses: list[NatsBus], devices: list[Device]) -> None:
        self._buses = buses
        self._devices = devices
        self._next = 0
        self.sent = 0
        self.ordered = 0
        self._by_subject = {device.subject.rsplit(".", 1)[0]: device for device in devices}

    async def listen(self) -> None:
        """Obey orders."""

        async def on_order(subject: str, message: bytes) -> bytes:
            self.ordered += 1
            device = self._by_subject[subject.rsplit(".", 1)[0]]
            device.obey(msgspec.json.decode(message, type=NodeCommand))
            await self._send(device, stamped=False)  # as devices do at once when something changes
            return msgspec.json.encode(Accepted(ok=True))

        await self._buses[0].subscribe("fallow.*.node.*.command", on_order)

    async def run(self, rate_hz: float, duration_s: float) -> None:
        start_s, done = time.monotonic(), 0
        while done < round(rate_hz * duration_s):
            due = min(rate_hz * (time.monotonic() - start_s), rate_hz * duration_s)
            while done < due:
                device = self._devices[self._next]
                await self._send(device, stamped=done % STAMPED_EVERY == 0)
                self._next = (self._next + 1) % len(self._devices)
                done += 1
            await asyncio.sleep(TICK_S)

    async def _send(self, device: Device, *, stamped: bool) -> None:
        # A device has one connection: its heartbeats stay in order.
        line = self._buses[int(device.node[-2:], 16) % len(self._buses)]
        message = device.beat(stamped)
        self.sent += 1
        await line.publish(device.subject, message)


async def ask_routes(bus: NatsBus, cells: int, routes_hz: float, duration_s: float) -> list[float]:
    """Routes at a rate; the seconds that each took, answered or refused."""
    took_s: list[float] = []
    draw = random.Random(2)
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        request = RouteRequest(model=MODEL, session=SessionId(draw.randbytes(16).hex()), reserve_tokens=500)
        subject = Subjects(f"cell-{draw.randrange(cells)}").route("load")
        asked_s = time.monotonic()
        try:
            answer = await bus.request(subject, msgspec.json.encode(request), ANSWER_MAX_S)
            reply = msgspec.json.decode(answer, type=RouteReply)
            assert reply.hops or reply.code == "kv_exhausted", reply.error
        except FabricError as error:
            print(f"a route was not answered: {error}", file=sys.stderr)
        took_s.append(time.monotonic() - asked_s)
        await asyncio.sleep(1 / routes_hz)
    return took_s


async def load(url: str, devices: int, cells: int, seconds: float, routes_hz: float) -> None:
    """Joins, a word on stdout when they are through, the measured load, and what came of it."""
    gc.disable()  # its pauses would count as the coordinator's
    buses = [await NatsBus.connect(url, f"load-{index}") for index in range(CONNECTIONS)]
    fleet = [Device(beat, f"cell-{index % cells}") for index, beat in enumerate(heartbeats(devices))]
    if routes_hz:
        store = NodeId("5" * 64)
        announced = StoreAnnounced(address=PeerAddress(node=store, endpoints=()), models=(model_entry(),))
        for index in range(cells):
            await buses[0].publish(Subjects(f"cell-{index}").store(store), msgspec.json.encode(announced))
    work = Load(buses, fleet)
    await work.listen()
    await work.run(JOIN_HZ, devices / JOIN_HZ)
    settle_until_s = time.monotonic() + SETTLE_MAX_S
    ordered = -1
    while ordered != work.ordered and time.monotonic() < settle_until_s:
        ordered = work.ordered
        await work.run(devices / INTERVAL_S, SETTLE_S)
    print(json.dumps({"message_bytes": len(fleet[0].beat(True)), "ordered": ordered}), flush=True)
    routes = ask_routes(buses[0], cells, routes_hz, seconds) if routes_hz else asyncio.sleep(0, [])
    _, took_s = await asyncio.gather(work.run(devices / INTERVAL_S, seconds), routes)
    print(json.dumps({"sent": work.sent, "routes_s": took_s}), flush=True)


# --- measuring --------------------------------------------------------------------------------------


async def start(role: str, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--role",
        role,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_MAX_BYTES,
    )


async def told(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line, "a process of the benchmark died"
    return dict(json.loads(line))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(devices: int, cells: int, seconds: float, routes_hz: float) -> dict[str, float]:
    """One point of the curve."""
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        broker = Broker(Path(folder))
        await broker.start()
        url = broker.urls[0]
        coordinator = await start("coordinator", "--url", url, "--system-url", broker.system_url, "--cells", cells)
        bus = await NatsBus.connect(url, "bench")
        processes = [coordinator]
        try:
            while True:
                try:
                    await bus.request("bench.figures", b"", 2.0)
                    break
                except Exception:
                    await asyncio.sleep(0.1)
            watched, server = psutil.Process(coordinator.pid), psutil.Process(broker.pid)
            empty_bytes = watched.memory_info().rss
            sizes = ("--devices", devices, "--cells", cells, "--seconds", seconds, "--routes", routes_hz)
            generator = await start("load", "--url", url, *sizes)
            processes.append(generator)
            ready = await told(generator)
            await bus.request("bench.figures", b"", ANSWER_MAX_S)
            before = (cpu_s(watched), cpu_s(server), time.monotonic())
            done = await told(generator)
            after = (cpu_s(watched), cpu_s(server), time.monotonic())
            await asyncio.sleep(0.5)
            figures = json.loads(await bus.request("bench.figures", b"", ANSWER_MAX_S))
            grown_bytes = watched.memory_info().rss - empty_bytes
        finally:
            await bus.close()
            for process in processes:
                if process.returncode is None:
                    process.terminate()
                await process.wait()
            await broker.close()
    wall_s = after[2] - before[2]
    delays_ms = [1000 * delay_s for delay_s in figures["delays_s"]]
    routes_ms = [1000 * took_s for took_s in done["routes_s"]]
    return {
        "devices": devices,
        "cells": cells,
        "present": figures["present"],
        "heartbeats_per_s": devices / INTERVAL_S,
        "message_bytes": ready["message_bytes"],
        "ordered": ready["ordered"],
        "coordinator_cpu": (after[0] - before[0]) / wall_s,
        "server_cpu": (after[1] - before[1]) / wall_s,
        "cpu_us_per_heartbeat": 1e6 * (after[0] - before[0]) / wall_s / (devices / INTERVAL_S),
        "memory_bytes_per_device": grown_bytes / devices,
        "delay_ms_p50": statistics.median(delays_ms),
        "delay_ms_p99": quantile(delays_ms, 0.99),
        "route_ms_p50": statistics.median(routes_ms) if routes_ms else 0.0,
        "route_ms_p99": quantile(routes_ms, 0.99) if routes_ms else 0.0,
        "sent": done["sent"],
        "lost": done["sent"] - figures["heard"],
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def report(rows: list[dict[str, float]]) -> None:
    titles = "devices|cells|coordinator|a heartbeat|server|memory a device|delay p50, p99|route p50, p99|lost"
    table = Table(*titles.split("|"))
    for row in rows:
        table.add_row(
            f"{row['devices']:,}",
            f"{row['cells']}",
            f"{row['coordinator_cpu']:.1%} of a core",
            f"{row['cpu_us_per_heartbeat']:.0f} µs",
            f"{row['server_cpu']:.1%}",
            f"{row['memory_bytes_per_device'] / 1024:.1f} KiB",
            f"{row['delay_ms_p50']:.1f}, {row['delay_ms_p99']:.1f} ms",
            f"{row['route_ms_p50']:.1f}, {row['route_ms_p99']:.1f} ms",
            f"{row['lost']} of {row['sent']}",
        )
    Console().print(table)
    last = rows[-1]
    met = "met" if last["coordinator_cpu"] < CPU_SHARE_GOAL else "MISSED"
    print(f"{last['devices']:,} devices: {last['coordinator_cpu']:.2f} of a core, goal < {CPU_SHARE_GOAL}: {met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0, help="measured at each point")
    parser.add_argument("--routes", type=float, default=20.0, help="a second; 0: no model and no placement")
    for hidden in ("--role", "--url", "--system-url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if chosen.role == "coordinator":
        asyncio.run(coordinate(chosen.url, chosen.system_url, chosen.cells))
    elif chosen.role == "load":
        asyncio.run(load(chosen.url, chosen.devices[0], chosen.cells, chosen.seconds, chosen.routes))
    else:
        rows = [
            asyncio.run(measure(devices, chosen.cells, chosen.seconds, chosen.routes)) for devices in chosen.devices
        ]
        report(rows)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
