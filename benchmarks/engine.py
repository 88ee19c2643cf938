"""The bare engine against llama.cpp: one thread, one stream, the same GGUF file, decode and prefill.

    python benchmarks/engine.py [--rounds 7] [--store FOLDER]

Needs the `bench` extra (`xllamacpp`). Method: every contender in a process of its own, as a worker is, with the
worker's environment (`client.worker_environment`) and one thread; never two at the same time. A round runs every
contender once, in an order drawn from a seed. A run prefills 128 random tokens and decodes 48 greedily, head and
choice of token included, after a short warm-up run of the same contender. Time is the CPU time of the contender's
process, so that whoever else uses the machine costs all alike; what others take of the memory's bandwidth still shows.
Medians over rounds; a ratio is the median of the rounds' ratios, and above 1 means that Fallow is faster.

Results: a table, and JSON in `benchmarks/results/engine.json`.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from fallow.domain.frames import Phase
from fallow.domain.ids import ModelName, SessionId
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.engine.client import worker_environment
from fallow.engine.contract import PREFILL_CHUNK_ROWS, Step, Stepped
from fallow.engine.core import EngineCore
from fallow.engine.sandbox import HUGE_PAGES
from fallow.engine.settings import EngineSettings
from fallow.models.default import default_gguf
from fallow.models.importer import import_model
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store

PROMPT_TOKENS = 128
DECODE_TOKENS = 48
BATCHES = (2, 4, 8, 16)
SEED = 1
SESSION = SessionId("a" * 32)
CONTENDERS = ("fallow q8", "fallow q4", "llama.cpp")

Times = tuple[float, float]
"""CPU milliseconds a token: prefill, decode."""


class Fallow:
    """`EngineCore`, the whole model in one piece."""

    def __init__(self, store: Store, quantisation: Quantisation) -> None:
        report = import_model(default_gguf(), store, quantisation, ModelName(f"bench-{quantisation}"))
        self.manifest, self.digest = report.manifest, manifest_digest(report.manifest)
        self.whole = Span(0, self.manifest.config.layer_count)
        self.core = EngineCore(EngineSettings())
        stage = StageSpec(model=self.digest, pieces=(self.whole,))
        paths = {ref.digest: store.blob_path(ref.digest) for ref in layer_files(self.manifest, stage)}
        self.core.load(stage, self.manifest, {digest: path for digest, path in paths.items() if path is not None})

    def run(self, prompt: list[int], count: int) -> Times:
        core = self.core
        core.open(SESSION, self.digest, self.whole, len(prompt) + count + 1)
        started_s = time.process_time()
        token = self._step(SESSION, 0, prompt, Phase.PREFILL)
        prefilled_s = time.process_time()
        for position in range(len(prompt), len(prompt) + count):
            token = self._step(SESSION, position, [token], Phase.DECODE)
        decoded_s = time.process_time()
        core.free(SESSION)
        core.outcomes()
        return (prefilled_s - started_s) / len(prompt) * 1e3, (decoded_s - prefilled_s) / max(count, 1) * 1e3

    def batch(self, prompt: list[int], streams: int, count: int) -> float:
        """CPU milliseconds of one decode call of so many streams, head included."""
        names = [SessionId(f"{number:032x}") for number in range(streams)]
        for name in names:
            self.core.open(name, self.digest, self.whole, len(prompt) + count + 1)
            self._step(name, 0, prompt, Phase.PREFILL)
        started_s = time.process_time()
        for position in range(len(prompt), len(prompt) + count):
            for ticket, name in enumerate(names):
                self.core.step(ticket, _step(name, position, [17], Phase.DECODE))
            while self.core.has_work:
                self.core.turn()
            assert all(isinstance(outcome, Stepped) for _, outcome in self.core.outcomes())
        elapsed_s = time.process_time() - started_s
        for name in names:
            self.core.free(name)
        return elapsed_s / count * 1e3

    def _step(self, name: SessionId, position: int, tokens: list[int], phase: Phase) -> int:
        self.core.step(0, _step(name, position, tokens, phase))
        while self.core.has_work:
            self.core.turn()
        [(_, stepped)] = self.core.outcomes()
        assert isinstance(stepped, Stepped), stepped
        return int(np.frombuffer(stepped.payload, np.int32, 1)[0])


class LlamaCpp:
    """The `xllamacpp` wheel's server, asked without HTTP."""

    def __init__(self) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(default_gguf())
        parameters.n_ctx = 2048
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.cache_prompt = False
        parameters.verbosity = -1
        parameters.n_gpu_layers = 0
        self._server = xllamacpp.Server(parameters)

    def run(self, prompt: list[int], count: int) -> Times:
        """The answer is streamed, and each token's arrival looks at the clock: the first one ends the prefill."""
        at_s: list[float] = []
        asked = {"prompt": prompt, "n_predict": 1 + count, "temperature": 0, "top_k": 1, "ignore_eos": True}
        started_s = time.process_time()
        self._server.handle_completions(
            {**asked, "cache_prompt": False, "stream": True}, lambda _: at_s.append(time.process_time())
        )
        first_s, last_s = at_s[0], at_s[count]
        return (first_s - started_s) / len(prompt) * 1e3, (last_s - first_s) / max(count, 1) * 1e3


class Process:
    """A contender in a process of its own, which does what it is asked and sleeps between."""

    def __init__(self, name: str, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_contend, args=(name, store, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is ready

    def run(self, prompt: list[int], count: int) -> Times:
        times: Times = self._ask("run", prompt, count)
        return times

    def batch(self, prompt: list[int], streams: int, count: int) -> float:
        call_ms: float = self._ask("batch", prompt, streams, count)
        return call_ms

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._pipe.recv()


def _contend(name: str, store: Path, pipe: Connection) -> None:
    contender = LlamaCpp() if name == "llama.cpp" else Fallow(Store(store), Quantisation(name.removeprefix("fallow ")))
    pipe.send(None)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(contender, method)(*arguments))


def _step(name: SessionId, position: int, tokens: list[int], phase: Phase) -> Step:
    return Step(
        session=name,
        position=position,
        count=len(tokens),
        phase=phase,
        logits_from=position + len(tokens) - 1,
        top_k=1,
        payload=np.asarray(tokens, np.int32).tobytes(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", type=Path, default=platformdirs.user_cache_path("fallow") / "bench-store")
    options = parser.parse_args()
    if HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], worker_environment())  # read when a process starts
    contenders = {name: Process(name, options.store) for name in CONTENDERS}
    times = measure(contenders, options.rounds)
    calls = scaling(contenders["fallow q8"])
    for contender in contenders.values():
        contender.close()
    report(times, calls)


def measure(contenders: dict[str, Process], rounds: int) -> dict[str, list[Times]]:
    drawn = random.Random(SEED)
    times: dict[str, list[Times]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in drawn.sample(list(contenders), len(contenders)):
            prompt = [drawn.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
            contenders[name].run(prompt[:8], 4)
            times[name].append(contenders[name].run(prompt, DECODE_TOKENS))
    return times


def scaling(engine: Process) -> dict[int, float]:
    """Milliseconds of a decode call by number of streams."""
    drawn = random.Random(SEED)
    prompt = [drawn.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
    return {streams: engine.batch(prompt, streams, 12) for streams in (1, *BATCHES)}


def report(times: dict[str, list[Times]], calls: dict[int, float]) -> None:
    peer = times["llama.cpp"]
    rows = {}
    print(f"\nOne thread, CPU time; {PROMPT_TOKENS} prompt tokens in chunks of {PREFILL_CHUNK_ROWS}\n")
    print(f"{'':12}{'prefill tok/s':>15}{'decode tok/s':>15}{'prefill ratio':>15}{'decode ratio':>15}")
    for name, runs in times.items():
        prefill, decode = (1e3 / statistics.median(run[i] for run in runs) for i in (0, 1))
        ratios = [
            statistics.median(theirs[i] / ours[i] for ours, theirs in zip(runs, peer, strict=True)) for i in (0, 1)
        ]
        rows[name] = {
            "prefill_per_s": prefill,
            "decode_per_s": decode,
            "prefill_ratio": ratios[0],
            "decode_ratio": ratios[1],
        }
        print(f"{name:12}{prefill:15.1f}{decode:15.1f}{ratios[0]:15.2f}{ratios[1]:15.2f}")
    print("\nDecode calls of several streams, cost against one:")
    print("  ".join(f"{streams}: {call / calls[1]:.2f}" for streams, call in calls.items()))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    result = {"contenders": rows, "call_cost": {streams: call / calls[1] for streams, call in calls.items()}}
    (folder / "engine.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
