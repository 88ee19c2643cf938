"""The whole stack against the bare engine: what processes, links and HTTP cost, and what a second device gains.

    python benchmarks/stack.py [--rounds 5] [--tokens 96]

Contenders, all with the default model at 8 bits and one engine thread a device:

- bare: `EngineCore` in this process, one stream, greedy, choice of token included;
- bare x8: the same with eight streams in one batch;
- bare chain, bare chain x8: two processes that hold the same halves as the two devices below, in a ring of pipes with
  this one, and nothing else: what two processes can reach on this machine, whoever wrote the rest;
- one node: `fallow up` with one device process, one stream through the HTTP API;
- two nodes: `fallow up` with two device processes that share the model, one stream;
- two nodes x8: the same with eight streams at once.

A stack is compared with the bare engine, which the aims are about, and one of two devices with the bare chain too: the
first ratio is what a user pays, the second what Fallow's own work costs.

Method: all services run throughout and idle between turns. A round runs every contender once, in an order drawn from a
seed; a ratio is the median of the rounds' ratios, and above 1 means that the stack is faster than the bare engine.
Decode speed is counted from the first token to the last, wall clock, so a busy machine blurs single rounds. Each API
run has a key of its own, so that no kept cache helps. This process has the workers' environment.

After the rounds, eight streams once more: the processor time that each process takes for a token, prompts included.

Results: tables, and JSON in `benchmarks/results/stack.json`.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
from event_stream import Streamed, ask
from rich.console import Console
from rich.table import Table
from stack_yardsticks import Bare, bare_chain

from fallow.engine.client import worker_environment
from fallow.engine.sandbox import HUGE_PAGES
from fallow.gateway.keys import new_key
from fallow.models.default import ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService

RESULTS = Path(__file__).parent / "results" / "stack.json"
PROMPT = "Write a long story about a lighthouse keeper, his dog and the sea."
STREAMS = 8
SEED = 1
ONE_THREAD = "[node]\nthreads = 1\n\n"
HALVES = "[placement]\nmax_share = 0.7\nreplicas = 1\n\n"
"""Each of two devices holds one half of the model's work, and no spare pieces."""
AIMS = {"one node": 0.95, "two nodes": 0.85, "two nodes x8": 1.5}
"""Against the bare engine."""
COMPARED = {
    "one node": ("bare",),
    "bare chain": ("bare",),
    "two nodes": ("bare", "bare chain"),
    "bare chain x8": ("bare x8",),
    "two nodes x8": ("bare x8", "bare chain x8"),
}


class Stack:
    """A service, asked through HTTP."""

    def __init__(self, service: LocalService, keys: list[str], model: str) -> None:
        self._service = service
        self._keys = keys
        self._model = model

    def run(self, streams: int, tokens: int) -> float:
        """As `Bare.run`. Streams start together; each counts its own span of time."""
        answers: list[Streamed] = []

        def one(key: str) -> None:
            answers.append(ask(self._service.api_url, key, self._model, PROMPT, tokens, {"temperature": 0}))

        threads = [threading.Thread(target=one, args=(self._keys.pop(),)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(answers) != streams:
            raise RuntimeError("a stream failed")
        return sum(1 / answer.token_s for answer in answers)


def processor_ms(service: LocalService, run: Callable[[int, int], float], tokens: int) -> dict[str, float]:
    """Processor time a token of eight streams, by kind of process. `client` is this one."""
    kinds = {os.getpid(): "client", service.child_pid("gateway"): "gateway"}
    for node in ("node-1", "node-2"):
        agent, *inside = service.device_pids(node)
        kinds |= {agent: "agents", **dict.fromkeys(inside, "workers")}
    for process in psutil.Process(service.pid).children(recursive=True):
        kinds.setdefault(process.pid, "the rest")
    before = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in kinds}
    run(STREAMS, tokens)
    used_ms: dict[str, float] = dict.fromkeys(kinds.values(), 0.0)
    for pid, kind in kinds.items():
        used_s = sum(psutil.Process(pid).cpu_times()[:2]) - before[pid]
        used_ms[kind] += 1000 * used_s / (STREAMS * tokens)
    return used_ms


def measure(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(SEED)
    for run in contenders.values():
        run()
    for number in range(rounds):
        names = list(contenders)
        order.shuffle(names)
        for name in names:
            figures[name].append(contenders[name]())
        print(f"round {number + 1}: " + ", ".join(f"{name} {figures[name][-1]:.1f}" for name in contenders), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    if HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], worker_environment())  # read when a process starts
    runs = (options.rounds + 1) * (2 + STREAMS) + STREAMS
    pairs = [new_key() for _ in range(2 * runs)]
    settings = "\n".join(
        f'[[gateway.keys]]\nid = "bench-{index}"\nsha256 = "{digest}"' for index, (_, digest) in enumerate(pairs)
    )
    secrets = [secret for secret, _ in pairs]
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        root = Path(folder)
        store = Store(root / "store")
        manifest = ensure_default_model(store)
        common = ["--memory", "2GiB"]
        with (
            contextlib.ExitStack() as running,
            LocalService(
                root / "one", ["--nodes", "1", *common], store=root / "store", settings=ONE_THREAD + settings
            ) as one,
            LocalService(
                root / "two", ["--nodes", "2", *common], store=root / "store", settings=ONE_THREAD + HALVES + settings
            ) as two,
        ):
            for service, nodes in ((one, 1), (two, 2)):
                service.wait_for(lambda status, n=nodes: len(status.nodes) == n, 60, "the devices")
                service.wait_until_servable()
            holders = {
                beat.name: [span for hosted in beat.hosted for span in hosted.stage.spans()]
                for beat in two.status().nodes
            }
            cut = min(span.last for spans in holders.values() for span in spans)
            bare = Bare(store, manifest, PROMPT)
            chain = running.enter_context(bare_chain(store, manifest, PROMPT, cut))
            one_node = Stack(one, secrets[:runs], manifest.name)
            two_nodes = Stack(two, secrets[runs:], manifest.name)
            figures = measure(
                {
                    "bare": lambda: bare.run(1, options.tokens),
                    "one node": lambda: one_node.run(1, options.tokens),
                    "bare chain": lambda: chain.run(1, options.tokens),
                    "two nodes": lambda: two_nodes.run(1, options.tokens),
                    "bare x8": lambda: bare.run(STREAMS, options.tokens),
                    "bare chain x8": lambda: chain.run(STREAMS, options.tokens),
                    "two nodes x8": lambda: two_nodes.run(STREAMS, options.tokens),
                },
                options.rounds,
            )
            used_ms = processor_ms(two, two_nodes.run, options.tokens)
    report(figures, {name: [str(span) for span in spans] for name, spans in holders.items()}, used_ms)


def report(figures: dict[str, list[float]], holders: dict[str, list[str]], used_ms: dict[str, float]) -> None:
    table = Table("contender", "tokens/s, median", "against the bare engine", "aim", "against the bare chain")
    ratios: dict[str, dict[str, float]] = {}
    for name, speeds in figures.items():
        ratios[name] = {
            base: statistics.median(a / b for a, b in zip(speeds, figures[base], strict=True))
            for base in COMPARED.get(name, ())
        }
        cells = [f"{ratio:.2f}" for ratio in ratios[name].values()] + ["", ""]
        aim = f"{AIMS[name]:.2f}" if name in AIMS else ""
        table.add_row(name, f"{statistics.median(speeds):.1f}", cells[0], aim, cells[1])
    Console().print(table)
    costs = Table("eight streams through two devices", "processor time a token, ms")
    for kind, cost_ms in used_ms.items():
        costs.add_row(kind, f"{cost_ms:.2f}")
    Console().print(costs)
    RESULTS.parent.mkdir(exist_ok=True)
    results = {
        "tokens_per_s": figures,
        "ratios": ratios,
        "two_nodes_hold": holders,
        "processor_ms": used_ms,
    }
    RESULTS.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
