"""What a gateway does with more than its fleet can answer.

    python benchmarks/overload.py [--seconds 60] [--loads 0.5 1 2 4] [--http]

Method: everything is real but the engines: the API, the gateway's sessions, a coordinator and devices with their
agents, in one process on the in-memory fabric. It runs on virtual time, so that a busy machine changes nothing; clients
then speak ASGI to the API. With `--http` it runs in real time and clients come over HTTP and the loopback. Engines take
time instead of computing: a call of a device's stage costs `CALL_S` for one row and what was measured on the real
engine for several (`batch_cost`), so that latency grows with the rows in a call as it does on devices.

Capacity, 1x, is the best goodput of gateways whose places are fixed by hand, at more load than any of them can serve.
Then two keys ask as a Poisson process, whoever waits: `heavy` makes up the offered load, `light` asks once every few
seconds. At every load two gateways are measured: this one, and the same without admission (every request begins at
once, as it comes).

An answer is useful when its first token comes within `FIRST_TOKEN_S` and the others at most `GAP_STRETCH` times as far
apart as for a client that is alone: goodput counts the tokens of useful answers. Refused clients do not come again.

Results: a table, and JSON in `benchmarks/results/overload.json`. Goals: goodput at 2x at least 0.9 of the peak, and the
light key's latency at 2x and 4x close to what it has at 0.5x.
"""

import argparse
import asyncio
import json
import logging
import math
import random
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.table import Table
from starlette.types import ASGIApp, Message, Scope
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.fleet import Subjects
from fallow.domain.frames import Frame
from fallow.domain.ids import ModelName, NodeId
from fallow.domain.model import Family, Manifest, ModelConfig, Quantisation
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.peers import Peers
from fallow.gateway.api import create_app
from fallow.gateway.keys import ApiKey, hash_key
from fallow.gateway.server import serve
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.policy.admission import AdmissionRules
from fallow.policy.placement_board import PlacementRules
from fallow.processes.store_server import StoreServer
from fallow.simulator.engine_model import batch_cost
from fallow.simulator.virtual_time import LoopClock, run_virtual
from fallow.trust.open_doors import OpenAdmission, OpenLease, OpenRoutes, open_coordinator, open_node

RESULTS = Path(__file__).parent / "results" / "overload.json"
CELL = "overload"
LAYERS = 4
VOCABULARY = 400
DEVICES = 3
CALL_S = 0.020
PREFILL_SHARE = 0.25
"""Of a decode row, what a row of a prompt costs."""
KV_BYTES = 64 << 20
ANSWER_TOKENS = 24
PROMPT = "a b c d e"
LIGHT_EVERY_S = 4.0
FIRST_TOKEN_S = 15.0
"""The longest wait that is allowed, and the time to compute a prompt on a full fleet."""
GAP_STRETCH = 8.0
PLACES_TRIED = (16, 32, 48, 64, 96)
TOO_MANY_PER_S = 12.0
"""Answers that are asked for to find capacity."""
KEYS = ("heavy", "light")
NO_ADMISSION = AdmissionRules(places_first=100_000, places_min=100_000, places_max=100_000, waiting_max=100_000)


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def tokenizer() -> bytes:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(["idle devices answer questions while a device dies"] * 50, trainer)
    return bytes(built.to_str(), "utf-8")


def put_model(store: Store) -> Manifest:
    """A model of random bytes whose text is real."""
    draw = random.Random(1)
    layers = tuple(store.add_bytes(draw.randbytes(2 << 20)) for _ in range(LAYERS))
    embedding, head = (store.add_bytes(draw.randbytes(5000)) for _ in range(2))
    config = ModelConfig(
        family=Family.LLAMA, layer_count=LAYERS, hidden_size=32, head_count=2, kv_head_count=1, head_dim=16,
        intermediate_size=64, vocab_size=VOCABULARY, context_length=512, norm_epsilon=1e-5, rope_theta=1e4,
    )  # fmt: skip
    manifest = Manifest(
        format=1, name=ModelName("toy"), config=config, quantisation=Quantisation.Q8, embedding=embedding,
        layers=layers, head=head, tokenizer=store.add_bytes(tokenizer()), chat_template=None, bos_token_id=None,
        eos_token_ids=(),
    )  # fmt: skip
    store.put_manifest(manifest)
    return manifest


Figures = dict[str, float | int | None]


class How(StrEnum):
    """How clients come and time passes."""

    VIRTUAL = "virtual"
    HTTP = "http"


class Fleet:
    """A cell in this process."""

    def __init__(self, folder: Path) -> None:
        self.clock = LoopClock()
        self.fabric = MemoryFabric(0.001)
        self.subjects = Subjects(CELL)
        self.store = Store(folder / "store")
        self.manifest = put_model(self.store)
        self._folder = folder
        who = node_id(0xCC)
        endpoint = self.fabric.endpoint(who)
        self._peers = Peers(
            endpoint,
            self.clock,
            role="gateway",
            admission=OpenAdmission(),
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )
        bus = self.fabric.bus(who)
        self._files = StoreServer(self.store, bus, self._peers, self.clock, self.subjects, endpoint.address)
        self.source = FleetTokenSource(
            bus, self._peers, self.store, self.clock, self.subjects, who, lease=OpenLease(), routes=OpenRoutes()
        )
        config = CoordinatorConfig(cell=CELL, placement=PlacementRules(max_share=0.7))
        self._coordinator = Coordinator(
            config, self.fabric.bus("coordinator"), self.clock, self.fabric.presence(), trust=open_coordinator()
        )
        self._agents = [self._agent(index) for index in range(1, DEVICES + 1)]

    def _agent(self, index: int) -> Agent:
        def call_s(rows: int, _: int) -> float:
            return CALL_S * batch_cost(rows)

        engine = TimedEngine(kv_budget_bytes=KV_BYTES, vocab_size=VOCABULARY, call_s=call_s)
        config = AgentConfig(cell=CELL, name=f"device {index}", memory_bytes=256 << 20, kv_budget_bytes=KV_BYTES)
        node = node_id(index)
        store = Store(self._folder / f"device-{index}")
        return Agent(
            config,
            node,
            self.fabric.bus(node),
            self.fabric.endpoint(node),
            engine,
            store,
            self.clock,
            trust=open_node(),
        )

    def _on_frame(self, peer: NodeId, frame: Frame) -> None:
        if not self._files.on_frame(peer, frame):
            self.source.on_frame(peer, frame)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.source.on_lost(peer, reason)

    async def start(self) -> None:
        await self._coordinator.start()
        await self._peers.start()
        await self._files.start()
        await self.source.start()
        for agent in self._agents:
            await agent.start()
        async with asyncio.timeout(60):
            while not any(model.servable for model in self._coordinator.status().models):
                await asyncio.sleep(0.1)
            await asyncio.sleep(5.0)  # the copies of the pieces as well

    async def tokenizer_file(self, manifest: Manifest) -> bytes:
        path = self.store.blob_path(manifest.tokenizer.digest)
        assert path is not None
        return path.read_bytes()

    @asynccontextmanager
    async def clients(self, rules: AdmissionRules, how: How) -> AsyncIterator["Clients"]:
        """Clients of a fresh gateway."""
        keys = [ApiKey(id=key, sha256=hash_key(key)) for key in KEYS]
        app = create_app(self.source, self.tokenizer_file, self.clock, keys, admission=rules)
        if how is How.VIRTUAL:
            yield AsgiClients(app)
            return
        server = await serve(app, "127.0.0.1", 0)
        limits = httpx.Limits(max_connections=1000)
        try:
            async with httpx.AsyncClient(timeout=300, trust_env=False, limits=limits) as http:
                yield HttpClients(server.url, http)
        finally:
            await server.close()

    async def close(self) -> None:
        await self.source.close()
        for agent in self._agents:
            await agent.close()
        await self._files.close()
        await self._peers.close()
        await self._coordinator.close()


class TimedEngine(MemoryEngine):
    """Takes time by the rows of a call; a prompt's rows cost less than an answer's."""

    def _duration_s(self, steps: list) -> float:  # type: ignore[type-arg]
        rows = sum(step.count if step.count == 1 else max(1.0, step.count * PREFILL_SHARE) for step in steps)
        return self._call_s(round(rows), LAYERS)


class Answer(msgspec.Struct):
    """What a client saw."""

    key: str
    asked_s: float
    status: int = 0
    tokens: int = 0
    first_s: float | None = None
    """From asking to the first token."""
    ended_s: float = 0.0
    retry_after_s: float | None = None

    @property
    def gap_s(self) -> float:
        """The mean time between two tokens."""
        if self.status != 200 or self.first_s is None or self.tokens < 2:
            return math.inf
        return (self.ended_s - self.asked_s - self.first_s) / (self.tokens - 1)

    def useful(self, gap_max_s: float) -> bool:
        return self.gap_s <= gap_max_s and self.first_s is not None and self.first_s <= FIRST_TOKEN_S


class Clients:
    """Who asks. `ask` fills an answer in."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def answer(self, key: str) -> Answer:
        answer = Answer(key, asyncio.get_running_loop().time())
        self.answers.append(answer)
        return answer

    async def ask(self, key: str) -> None:
        raise NotImplementedError


def body() -> bytes:
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "stream": True, "temperature": 0}
    return json.dumps(asked).encode()


def heard(answer: Answer, line: str) -> None:
    if line.startswith("data: {") and answer.first_s is None:
        answer.first_s = asyncio.get_running_loop().time() - answer.asked_s
    if line == "data: [DONE]":
        # Not every token is an event: some make no whole character. The toy never ends by itself.
        answer.tokens = ANSWER_TOKENS


class HttpClients(Clients):
    """Over sockets."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        super().__init__()
        self._url = f"{url}/v1/completions"
        self._http = http

    async def ask(self, key: str) -> None:
        answer = self.answer(key)
        headers = {"authorization": f"Bearer {key}"}
        async with self._http.stream("POST", self._url, content=body(), headers=headers) as reply:
            answer.status = reply.status_code
            if reply.status_code != 200:
                answer.retry_after_s = float(reply.headers.get("retry-after", "nan"))
            async for line in reply.aiter_lines():
                heard(answer, line)
        answer.ended_s = asyncio.get_running_loop().time()


class AsgiClients(Clients):
    """Straight to the app."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def ask(self, key: str) -> None:
        answer = self.answer(key)
        messages: list[Message] = [{"type": "http.request", "body": body()}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError("nobody hangs up")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                retry = dict(message["headers"]).get(b"retry-after")
                answer.retry_after_s = None if retry is None else float(retry)
            else:
                for line in message["body"].decode().splitlines():
                    heard(answer, line)

        headers = [(b"authorization", f"Bearer {key}".encode()), (b"host", b"localhost")]
        scope: Scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "", "query_string": b"",
            "headers": headers, "client": ("127.0.0.1", 1), "scheme": "http", "http_version": "1.1",
        }  # fmt: skip
        await self._app(scope, receive, send)
        answer.ended_s = asyncio.get_running_loop().time()


async def open_loop(clients: Clients, per_s: float, seconds: float, seed: int) -> None:
    """Both keys ask whoever waits, for so long; returns when the last answer has ended."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + seconds

    async def asks(key: str, rate_per_s: float, draw: random.Random, group: asyncio.TaskGroup) -> None:
        next_s = loop.time() + draw.expovariate(rate_per_s)
        while next_s < until_s:
            await asyncio.sleep(next_s - loop.time())
            group.create_task(clients.ask(key))
            next_s += draw.expovariate(rate_per_s)

    async with asyncio.TaskGroup() as group:
        group.create_task(asks("heavy", per_s, random.Random(seed), group))
        # The light key asks at the same times in every run.
        group.create_task(asks("light", 1 / LIGHT_EVERY_S, random.Random(0), group))


def percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def figures(answers: list[Answer], seconds: float, began_s: float, gap_max_s: float) -> Figures:
    """Of one run. Goodput counts useful tokens by when their answer ended, without the first quarter."""
    warm_s = began_s + seconds / 4
    ended = [each for each in answers if warm_s <= each.ended_s <= began_s + seconds]
    found: Figures = {
        "goodput_tokens_per_s": sum(each.tokens for each in ended if each.useful(gap_max_s)) / (seconds * 3 / 4),
        "throughput_tokens_per_s": sum(each.tokens for each in ended) / (seconds * 3 / 4),
        "gap_p50_s": percentile([each.gap_s for each in ended if each.status == 200], 0.5),
        "asked": len(answers),
        "answered": sum(each.status == 200 for each in answers),
        "refused": sum(each.status in (429, 503) for each in answers),
        "other": sum(each.status not in (200, 429, 503) for each in answers),
        "retry_after_s": percentile([each.retry_after_s for each in answers if each.retry_after_s], 0.5),
    }
    for key in KEYS:
        own = [each for each in answers if each.key == key]
        firsts = [each.first_s for each in own if each.first_s is not None]
        lasts = [each.ended_s - each.asked_s for each in own if each.status == 200]
        found[f"{key}_first_p50_s"] = percentile(firsts, 0.5)
        found[f"{key}_first_p95_s"] = percentile(firsts, 0.95)
        found[f"{key}_whole_p50_s"] = percentile(lasts, 0.5)
        found[f"{key}_refused"] = sum(each.status in (429, 503) for each in own)
    return found


async def measure(seconds: float, loads: list[float], how: How) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder))
        await fleet.start()
        async with fleet.clients(NO_ADMISSION, how) as clients:
            for _ in range(3):
                await clients.ask("heavy")
            gap_max_s = GAP_STRETCH * statistics.median(answer.gap_s for answer in clients.answers)
        fixed: dict[str, Figures] = {}
        for count in PLACES_TRIED:
            rules = AdmissionRules(places_first=count, places_min=count, places_max=count)
            async with fleet.clients(rules, how) as clients:
                began_s = loop.time()
                await open_loop(clients, TOO_MANY_PER_S, seconds, seed=count)
            fixed[f"{count} places"] = figures(clients.answers, seconds, began_s, gap_max_s)
        capacity = max(run["goodput_tokens_per_s"] or 0.0 for run in fixed.values())
        runs: dict[str, Figures] = {}
        for name, rules in (("admission", AdmissionRules()), ("none", NO_ADMISSION)):
            for load in loads:
                async with fleet.clients(rules, how) as clients:
                    began_s = loop.time()
                    await open_loop(clients, capacity * load / ANSWER_TOKENS, seconds, seed=int(load * 10))
                    runs[f"{name} {load:g}x"] = figures(clients.answers, seconds, began_s, gap_max_s)
        await fleet.close()
    return {"gap_max_s": gap_max_s, "capacity_tokens_per_s": capacity, "fixed": fixed, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of asking at each load")
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--http", action="store_true", help="real time, over sockets")
    arguments = parser.parse_args()
    logging.getLogger("fallow").setLevel(logging.ERROR)
    how = How.HTTP if arguments.http else How.VIRTUAL
    work = measure(arguments.seconds, arguments.loads, how)
    found = asyncio.run(work) if how is How.HTTP else run_virtual(work)
    fixed, runs = found["fixed"], found["runs"]
    assert isinstance(fixed, dict)
    assert isinstance(runs, dict)
    best = max(run["goodput_tokens_per_s"] for run in (*fixed.values(), *runs.values()))
    print(f"a useful gap is at most {found['gap_max_s']:.3f} s; the peak, of all runs, is {best:.0f} useful tokens/s")
    table = Table(title="Offered load, and what became of it")
    for column in (
        "gateway",
        "useful tok/s",
        "of the peak",
        "all tok/s",
        "gap s",
        "asked",
        "refused",
        "light",
        "heavy",
    ):
        table.add_column(column)
    for label, run in (fixed | runs).items():
        run["of_peak"] = run["goodput_tokens_per_s"] / best
        firsts = [
            " / ".join(f"{run[f'{key}_first_{share}_s'] or math.nan:.2f}" for share in ("p50", "p95")) for key in KEYS
        ]
        table.add_row(
            label, f"{run['goodput_tokens_per_s']:.0f}", f"{run['of_peak']:.2f}",
            f"{run['throughput_tokens_per_s']:.0f}", f"{run['gap_p50_s'] or math.nan:.3f}", str(run["asked"]),
            str(run["refused"]), *reversed(firsts),
        )  # fmt: skip
    Console().print(table)
    print("light, heavy: seconds to the first token, p50 / p95")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"seconds": arguments.seconds, "time": how, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
