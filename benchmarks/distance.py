"""What distance costs: one stream over real links of a given round trip, with and without running ahead.

    python benchmarks/distance.py [--rounds 2] [--tokens 48] [--rtt 20 60 120]

The network is `distance_network.py`'s: the gateways' machine and every device are hosts of their own, and a frame from
any of them to any other takes half a round trip. Two services live there, with encrypted links over UDP (iroh) and no
others, and one engine thread a device:

- one device, which holds the whole default model at 8 bits;
- a chain of three devices, none of which can hold more than 0.4 of its work.

Each service has two gateways on the gateways' machine, one that lets chains run ahead and one that does not, so that
both ask the very same devices. Whoever is not asked is idle.

Method: in every round the round trip is 0 first, then each one of `--rtt`, and is measured each time. There every
contender answers a few tokens unmeasured, because connections have to learn of the new distance; then each answers once
greedily and once by draw (temperature 0.8, a fixed seed), with and without running ahead in turns. The client is on the
gateways' machine. Speed is counted from the first token to the last, wall clock; figures are medians of the rounds.
Each run has a key of its own, so that no kept cache helps. All answers of one service to one question must be the same,
at every distance, with and without; and gateways must not have had to repair a chain. Both are said under the table.

The bounds, a token: `work` is what the same contender takes at round trip 0, and one way is half of what the round trip
is longer than there, as it was measured.

- without: work + (devices + 1) ways, the ring from the gateway through all devices and back;
- with: work + devices x one way, the ring without the gateway; one device waits for nobody, so work alone. A gateway
  confirms a token one round trip after it was computed, and no chain is more than `AHEAD_ROWS` beyond that.

Limits: no losses, no jitter, no limited rates. The switch takes processor time on a machine that computes as well, and
wakes up some tenths of a millisecond late; the measured round trip has that in it. One conversation at a time: with
several, a chain is busy with others while one waits for the way.

Results: a table, and JSON in `benchmarks/results/distance.json`. Needs Linux and root; elsewhere it says so and ends.
SIGTERM ends it as Ctrl-C does: services, namespaces and files go first.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from distance_network import DistantNetwork
from event_stream import Streamed, ask
from namespaces import why_not
from rich.console import Console
from rich.table import Table

from fallow.domain.credentials import Role
from fallow.domain.frames import AHEAD_ROWS
from fallow.gateway.keys import new_key
from fallow.models.default import DEFAULT_MODEL, ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService

RESULTS = Path(__file__).parent / "results" / "distance.json"
PROMPT = "Write a long story about a lighthouse keeper, his dog and the sea."
QUESTIONS: dict[str, dict[str, float]] = {"greedy": {"temperature": 0}, "drawn": {"temperature": 0.8, "seed": 7}}
SHARES = {1: 1.0, 3: 0.4}
"""`placement.max_share` of the services, by how many devices they have."""
HUB = 0
"""The host of the gateways, the bus, the registrar and the client."""
PATHS = ((HUB, 2), (2, 3))
"""Between which hosts the round trip is measured: the hub and a device, and two devices of a chain."""
WARM_UP_TOKENS = 8
SECOND_PORT = 8500
READY_LIMIT_S = 90.0
LINKS = '[links]\nlocal_sockets = false\nrelay = "never"\n'
DEVICE = f'{LINKS}[node]\nmemory_bytes = "1GiB"\nthreads = 1\n'
REPAIRS = re.compile(r"repaired in|ran ahead with another token|misled")


class Contender(NamedTuple):
    """Who answers."""

    devices: int
    ahead: bool


class Fleet:
    """A service of some devices, each on a host of its own, and its two gateways."""

    def __init__(self, network: DistantNetwork, folder: Path, store: Path, devices: int, hosts: range, runs: int):
        self.urls: dict[bool, str] = {}
        """By whether chains run ahead there."""
        self._network = network
        self._folder = folder
        self._store = store
        self._devices = devices
        self._hosts = hosts
        pairs = [new_key() for _ in range(runs)]
        self.keys = [secret for secret, _ in pairs]
        self._settings = "\n".join(
            [
                LINKS,
                f'[bus]\nhost = "{network.address(HUB)}"',
                "[coordinator]\nstandbys = 0",
                f"[placement]\nmax_share = {SHARES[devices]}\nreplicas = 1",
                *(f'[[gateway.keys]]\nid = "bench-{at}"\nsha256 = "{digest}"' for at, (_, digest) in enumerate(pairs)),
            ]
        )

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        with contextlib.ExitStack() as ending:
            service = LocalService(self._folder, store=self._store, settings=self._settings)
            ending.callback(self._network.inside, HUB, service.stop)
            self._network.inside(HUB, service.start)
            device_file = self._folder / "device.toml"
            device_file.write_text(DEVICE)
            for host in self._hosts:
                self._network.inside(host, partial(service.join, f"device-{host}", "--config", str(device_file)))
            second = self._network.inside(HUB, lambda: self._second_gateway(service))
            ending.callback(_end, second)
            self.urls = {True: service.api_url, False: f"http://127.0.0.1:{SECOND_PORT + self._devices}"}
            status = self._network.inside(HUB, lambda: service.wait_until_servable(limit_s=READY_LIMIT_S))
            spans = [span for beat in status.nodes for hosted in beat.hosted for span in hosted.stage.spans()]
            if len(spans) != self._devices:
                raise RuntimeError(f"a chain of {self._devices} was wanted, and the model lies in {spans}")
            yield

    def _second_gateway(self, service: LocalService) -> "subprocess.Popen[bytes]":
        folder = self._folder / "second"
        shutil.copytree(self._store, folder / "models", copy_function=os.link)
        leave = {
            "FALLOW_BUS_URL": service.bus_url,
            "FALLOW_TRUST_INVITATION": service.invite(Role.GATEWAY, "second"),
            "FALLOW_GATEWAY_RUN_AHEAD": "false",
            "FALLOW_GATEWAY_PORT": str(SECOND_PORT + self._devices),
        }
        words = ["--state-dir", str(folder), "--config", str(self._folder / "fallow.toml")]
        words += ["--parent", str(os.getpid()), "--verbose"]
        with (self._folder / "second.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fallow", "serve", "gateway", *words],
                env=os.environ | leave, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_for_gateways(self) -> None:
        """Until both know the model."""
        deadline_s = time.monotonic() + READY_LIMIT_S
        for url in self.urls.values():
            while time.monotonic() < deadline_s:
                with contextlib.suppress(OSError, RuntimeError):
                    self._network.inside(HUB, partial(answer, url, self.keys[0], 1, "greedy"))
                    break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"the gateway at {url} does not answer")

    def repairs(self) -> list[str]:
        """What the gateways' logs say of repairs, and of chains that ran ahead with another token than was chosen."""
        files = [self._folder / "second.log", self._folder / "state" / "logs" / "gateway.log"]
        lines = [line for file in files for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        return [line for line in lines if REPAIRS.search(line)]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answer(api_url: str, key: str, tokens: int, question: str) -> Streamed:
    """Of the default model. Raises as `ask` does."""
    return ask(api_url, key, DEFAULT_MODEL, PROMPT, tokens, QUESTIONS[question])


class Figures:
    """What was measured, by distance in milliseconds as it was asked for, contender and question."""

    def __init__(self) -> None:
        self.runs: dict[tuple[float, Contender, str], list[Streamed]] = {}
        self.round_trips_s: dict[float, list[float]] = {}

    def note(self, distance_ms: float, contender: Contender, question: str, run: Streamed) -> None:
        self.runs.setdefault((distance_ms, contender, question), []).append(run)

    def round_trip_s(self, distance_ms: float) -> float:
        return statistics.median(self.round_trips_s[distance_ms])

    def speeds(self, distance_ms: float, contender: Contender, question: str) -> list[float]:
        """Tokens a second, by round."""
        return [1 / run.token_s for run in self.runs[distance_ms, contender, question]]

    def bound(self, distance_ms: float, contender: Contender, question: str) -> float:
        """Tokens a second at most, from what the same contender took where there was no distance."""
        work_s = statistics.median(run.token_s for run in self.runs[0.0, contender, question])
        return 1 / bound_s(contender, work_s, self.round_trip_s(distance_ms) - self.round_trip_s(0.0))

    def texts(self, devices: int, question: str) -> set[str]:
        done = [
            runs for (_, contender, name), runs in self.runs.items() if (contender.devices, name) == (devices, question)
        ]
        return {run.text for runs in done for run in runs}


def measure(
    network: DistantNetwork, fleets: dict[int, Fleet], distances_ms: list[float], rounds: int, tokens: int
) -> Figures:
    """Every contender's answers to every question, at every distance, and all of it in every round."""

    def run(contender: Contender, question: str, count: int) -> Streamed:
        fleet = fleets[contender.devices]
        return network.inside(HUB, partial(answer, fleet.urls[contender.ahead], fleet.keys.pop(), count, question))

    figures = Figures()
    contenders = [Contender(devices, ahead) for devices in fleets for ahead in (False, True)]
    for number in range(rounds):
        for distance_ms in distances_ms:
            network.set_round_trip(distance_ms / 1000)
            measured_s = [network.round_trip_s(here, there) for here, there in PATHS]
            figures.round_trips_s.setdefault(distance_ms, []).extend(measured_s)
            for contender in contenders:
                run(contender, "greedy", WARM_UP_TOKENS)
            for question in QUESTIONS:
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    figures.note(distance_ms, contender, question, run(contender, question, tokens))
            words = ", ".join(f"{round_trip_s * 1000:.1f}" for round_trip_s in measured_s)
            print(f"round {number + 1}, round trip {distance_ms:.0f} ms (measured: {words})", flush=True)
    return figures


def bound_s(contender: Contender, work_s: float, round_trip_s: float) -> float:
    """What a token takes at least, at this distance, for who takes `work_s` without one."""
    one_way_s = round_trip_s / 2
    if not contender.ahead:
        return work_s + (contender.devices + 1) * one_way_s
    ring_s = work_s if contender.devices == 1 else work_s + contender.devices * one_way_s
    return max(ring_s, (work_s + round_trip_s) / AHEAD_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtt", type=float, nargs="*", default=[20, 60, 120], help="round trips in milliseconds")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reason = why_not(lambda: DistantNetwork(1))
    if reason is not None:
        print(f"Skipped: {reason}.")
        return
    distances_ms = [0.0, *sorted(set(options.rtt) - {0.0})]
    runs = 1 + options.rounds * len(distances_ms) * 2 * (1 + len(QUESTIONS))
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder, contextlib.ExitStack() as running:
        root = Path(folder)
        ensure_default_model(Store(root / "store"))
        network = running.enter_context(DistantNetwork(1 + sum(SHARES)))
        fleets, host = {}, HUB + 1
        for devices in SHARES:
            hosts = range(host, host + devices)
            host += devices
            fleets[devices] = Fleet(network, root / f"of-{devices}", root / "store", devices, hosts, runs)
            running.enter_context(fleets[devices].run())
        for fleet in fleets.values():
            fleet.wait_for_gateways()
        figures = measure(network, fleets, distances_ms, options.rounds, options.tokens)
        repairs = [line for fleet in fleets.values() for line in fleet.repairs()]
    report(figures, repairs)


def report(figures: Figures, repairs: list[str]) -> None:
    table = Table(
        "round trip", "devices", "answer", "without", "bound", "with", "bound", "gain", "bound",
        title="tokens/s without and with running ahead",
    )  # fmt: skip
    rows = []
    for distance_ms, devices, question in itertools.product(figures.round_trips_s, SHARES, QUESTIONS):
        without, ahead = Contender(devices, False), Contender(devices, True)
        speeds = {each.ahead: figures.speeds(distance_ms, each, question) for each in (without, ahead)}
        bounds = {each.ahead: figures.bound(distance_ms, each, question) for each in (without, ahead)}
        gain = statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True))
        measured_ms = figures.round_trip_s(distance_ms) * 1000
        rows.append(
            {
                "round_trip_ms": distance_ms,
                "measured_round_trip_ms": measured_ms,
                "devices": devices,
                "question": question,
                "without_tokens_per_s": speeds[False],
                "without_bound": bounds[False],
                "with_tokens_per_s": speeds[True],
                "with_bound": bounds[True],
                "gain": gain,
                "gain_bound": bounds[True] / bounds[False],
            }
        )
        told = ["", "", ""]  # of no distance, the bounds are the measurement itself
        if distance_ms > 0:
            told = [f"{bounds[False]:.1f}", f"{bounds[True]:.1f}", f"{bounds[True] / bounds[False]:.2f}"]
        cells = [f"{statistics.median(speeds[False]):.1f}", told[0], f"{statistics.median(speeds[True]):.1f}", told[1]]
        table.add_row(f"{measured_ms:.1f} ms", str(devices), question, *cells, f"{gain:.2f}", told[2])
    Console().print(table)
    texts = {(devices, question): figures.texts(devices, question) for devices in SHARES for question in QUESTIONS}
    for (devices, question), said in texts.items():
        same = "the same text everywhere" if len(said) == 1 else f"{len(said)} DIFFERENT TEXTS"
        print(f"{devices} device{'s' if devices > 1 else ''}, {question}: {same}")
    print(f"repairs in the gateways' logs: {len(repairs)}", *repairs, sep="\n")
    RESULTS.parent.mkdir(exist_ok=True)
    different = [sorted(said) for said in texts.values() if len(said) > 1]
    RESULTS.write_text(json.dumps({"rows": rows, "different_texts": different, "repairs": repairs}, indent=2))


if __name__ == "__main__":
    main()
