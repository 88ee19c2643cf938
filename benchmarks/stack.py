"""The whole stack against the bare engine: what processes, links and HTTP cost, and what a second device gains.

    python benchmarks/stack.py [--rounds 5] [--tokens 96]

Contenders, all with the default model at 8 bits and one engine thread a device:

- bare: `EngineCore` in this process, one stream, greedy, choice of token included;
- bare x8: the same with eight streams in one batch;
- one node: `fallow up` with one device process, one stream through the HTTP API;
- two nodes: `fallow up` with two device processes that share the model, one stream;
- two nodes x8: the same with eight streams at once.

Method: all services run throughout and idle between turns. A round runs every contender once, in an order drawn from a
seed; a ratio is the median of the rounds' ratios, and above 1 means that the stack is faster than the bare engine.
Decode speed is counted from the first token to the last, wall clock, so a busy machine blurs single rounds. Each API
run has a key of its own, so that no kept cache helps. This process has the workers' environment, and reads events with
`http.client`: the streams' client shares the cores with what is measured.

After the rounds, eight streams once more: the processor time that each process takes for a token, prompts included.

Results: tables, and JSON in `benchmarks/results/stack.json`.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.client import HUGE_PAGES, worker_environment
from fallow.engine.contract import Step, Stepped
from fallow.engine.core import EngineCore
from fallow.engine.settings import EngineSettings
from fallow.gateway.keys import new_key
from fallow.models.default import ensure_default_model
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store
from fallow.models.tokenizer import load_tokenizer
from fallow.processes.local_service import LocalService

RESULTS = Path(__file__).parent / "results" / "stack.json"
PROMPT = "Write a long story about a lighthouse keeper, his dog and the sea."
STREAMS = 8
SEED = 1
ONE_THREAD = "[node]\nthreads = 1\n\n"
HALVES = "[placement]\nmax_share = 0.7\nreplicas = 1\n\n"
"""Each of two devices holds one half of the model's work, and no spare pieces."""
TARGETS = {"one node": ("bare", 0.95), "two nodes": ("bare", 0.85), "two nodes x8": ("bare x8", 1.5)}


class Bare:
    """The engine in this process, without any of the rest."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.model: Digest = manifest_digest(manifest)
        self.whole = Span(0, manifest.config.layer_count)
        stage = StageSpec(model=self.model, pieces=(self.whole,))
        files = {ref.digest: store.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
        self.core = EngineCore(EngineSettings())
        self.core.load(stage, manifest, {digest: path for digest, path in files.items() if path is not None})
        tokenizer = load_tokenizer(store.blob_path(manifest.tokenizer.digest) or Path())
        self.prompt = tokenizer.encode(PROMPT).ids

    def run(self, streams: int, tokens: int) -> float:
        """Tokens a second of all streams together, from the first token to the last."""
        names = [SessionId(f"{index:032x}") for index in range(streams)]
        for name in names:
            self.core.open(name, self.model, self.whole, len(self.prompt) + tokens + 2)
            self._submit(name, 0, self.prompt, Phase.PREFILL)
        nexts = self._results(streams)
        began_s = time.perf_counter()
        for index in range(tokens):
            for number, name in enumerate(names):
                self._submit(name, len(self.prompt) + index, [nexts[number]], Phase.DECODE)
            nexts = self._results(streams)
        elapsed_s = time.perf_counter() - began_s
        for name in names:
            self.core.free(name)
        self.core.outcomes()
        return streams * tokens / elapsed_s

    def _submit(self, name: SessionId, position: int, tokens: list[int], phase: Phase) -> None:
        step = Step(
            session=name,
            position=position,
            count=len(tokens),
            phase=phase,
            logits_from=position + len(tokens) - 1,
            top_k=1,
            payload=np.asarray(tokens, np.int32).tobytes(),
        )
        self.core.step(int(name, 16), step)

    def _results(self, streams: int) -> list[int]:
        tokens: dict[int, int] = {}
        while len(tokens) < streams:
            self.core.turn()
            for ticket, outcome in self.core.outcomes():
                assert isinstance(outcome, Stepped), outcome
                tokens[ticket] = int(np.frombuffer(outcome.payload, np.int32, 1)[0])
        return [tokens[index] for index in range(streams)]


class Stack:
    """A service, asked through HTTP."""

    def __init__(self, service: LocalService, keys: list[str], model: str) -> None:
        self._service = service
        self._keys = keys
        self._model = model

    def run(self, streams: int, tokens: int) -> float:
        """As `Bare.run`. Streams start together; each counts its own span of time."""
        spans: list[tuple[float, float, int]] = []

        def ask(key: str) -> None:
            spans.append(self._stream(key, tokens))

        threads = [threading.Thread(target=ask, args=(self._keys.pop(),)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(spans) != streams:
            raise RuntimeError("a stream failed")
        return sum(count / (last - first) for first, last, count in spans)

    def _stream(self, key: str, tokens: int) -> tuple[float, float, int]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "max_tokens": tokens + 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        at_s: list[float] = []
        count = 0
        connection = http.client.HTTPConnection(urlsplit(self._service.api_url).netloc, timeout=300)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with contextlib.closing(connection), connection.getresponse() as reply:
            if reply.status != http.client.OK:
                raise RuntimeError(reply.read().decode())
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    at_s.append(time.perf_counter())
                elif event.get("usage"):
                    count = event["usage"]["completion_tokens"]
        return at_s[0], at_s[-1], count - 1


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
            bare = Bare(store, manifest)
            one_node = Stack(one, secrets[:runs], manifest.name)
            two_nodes = Stack(two, secrets[runs:], manifest.name)
            figures = measure(
                {
                    "bare": lambda: bare.run(1, options.tokens),
                    "one node": lambda: one_node.run(1, options.tokens),
                    "two nodes": lambda: two_nodes.run(1, options.tokens),
                    "bare x8": lambda: bare.run(STREAMS, options.tokens),
                    "two nodes x8": lambda: two_nodes.run(STREAMS, options.tokens),
                },
                options.rounds,
            )
            used_ms = processor_ms(two, two_nodes.run, options.tokens)
            holders = {
                beat.name: [str(span) for hosted in beat.hosted for span in hosted.stage.spans()]
                for beat in two.status().nodes
            }
    report(figures, holders, used_ms)


def report(figures: dict[str, list[float]], holders: dict[str, list[str]], used_ms: dict[str, float]) -> None:
    table = Table("contender", "tokens/s, median", "against", "ratio, median", "target")
    ratios = {}
    for name, speeds in figures.items():
        base, target = TARGETS.get(name, ("", 0.0))
        if base:
            ratios[name] = statistics.median(a / b for a, b in zip(speeds, figures[base], strict=True))
        ratio = f"{ratios[name]:.2f}" if base else ""
        table.add_row(name, f"{statistics.median(speeds):.1f}", base, ratio, f"{target:.2f}" if base else "")
    Console().print(table)
    costs = Table("eight streams through two devices", "processor time a token, ms")
    for kind, cost_ms in used_ms.items():
        costs.add_row(kind, f"{cost_ms:.2f}")
    Console().print(costs)
    RESULTS.parent.mkdir(exist_ok=True)
    results = {"tokens_per_s": figures, "ratios": ratios, "two_nodes_hold": holders, "processor_ms": used_ms}
    RESULTS.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
