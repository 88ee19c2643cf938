"""The bare engine against llama.cpp: one thread, one stream, the same GGUF file, decode and prefill.

    python benchmarks/engine.py [--rounds 7] [--store FOLDER]

Needs the `bench` extra (`xllamacpp`). Method: both in this process, one thread each, never at the same time. A round
runs every contender once, in an order drawn from a seed. A run prefills 128 random tokens and decodes 48 greedily,
head and choice of token included, after a short warm-up run of the same contender. Time is this process's CPU time, so
that whoever else uses the machine costs both alike; medians over rounds; a ratio is the median of the rounds' ratios,
and above 1 means that Fallow is faster. llama.cpp's decode time is the difference between a run that decodes and one
that does not. The process has the worker's environment (`client.worker_environment`).

Results: a table, and JSON in `benchmarks/results/engine.json`.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs

from fallow.domain.frames import Phase
from fallow.domain.ids import ModelName, SessionId
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.engine.client import HUGE_PAGES, worker_environment
from fallow.engine.contract import PREFILL_CHUNK_ROWS, Step, Stepped
from fallow.engine.core import EngineCore
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

Times = tuple[float, float]
"""CPU milliseconds a token: prefill, decode."""


class Fallow:
    """`EngineCore` in this process, the whole model in one piece."""

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
    """The `xllamacpp` wheel's server, in process."""

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
        first_s = self._complete(prompt, 1)
        all_s = self._complete(prompt, 1 + count)
        return first_s / len(prompt) * 1e3, (all_s - first_s) / max(count, 1) * 1e3

    def _complete(self, prompt: list[int], count: int) -> float:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "ignore_eos": True}
        started_s = time.process_time()
        self._server.handle_completions({**asked, "cache_prompt": False})
        return time.process_time() - started_s


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
    store = Store(options.store)
    contenders: dict[str, Fallow | LlamaCpp] = {
        "fallow q8": Fallow(store, Quantisation.Q8),
        "fallow q4": Fallow(store, Quantisation.Q4),
        "llama.cpp": LlamaCpp(),
    }
    times = measure({name: contender.run for name, contender in contenders.items()}, options.rounds)
    eight_bit = contenders["fallow q8"]
    assert isinstance(eight_bit, Fallow)
    report(times, scaling(eight_bit))


def measure(runs: dict[str, Callable[[list[int], int], Times]], rounds: int) -> dict[str, list[Times]]:
    drawn = random.Random(SEED)
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in drawn.sample(list(runs), len(runs)):
            prompt = [drawn.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
            runs[name](prompt[:8], 4)
            times[name].append(runs[name](prompt, DECODE_TOKENS))
    return times


def scaling(engine: Fallow) -> dict[int, float]:
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
