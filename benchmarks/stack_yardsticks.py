"""What the whole stack is measured against: the engine in one process, and in two that hold one half each.

- `Bare`: the engine in this process, without any of the rest.
- `BareChain`: two processes in a ring with this one, joined by pipes. Nothing is gathered, checked, sealed, logged,
  counted or sent over a network: what a chain of two processes costs on this machine, whoever builds it.
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import Step, Stepped
from fallow.engine.core import EngineCore
from fallow.engine.head import top_log_probabilities
from fallow.engine.hosted import DecodeRow, HostedModel
from fallow.engine.settings import EngineSettings
from fallow.models.manifest import layer_files, manifest_digest
from fallow.models.store import Store
from fallow.models.tokenizer import load_tokenizer

TEAMS = 2
"""Teams of streams that a chain takes in turn, so that one is at each half."""
END_TIMEOUT_S = 10.0


class Bare:
    """The whole engine in this process."""

    def __init__(self, store: Store, manifest: Manifest, prompt: str) -> None:
        self.model: Digest = manifest_digest(manifest)
        self.whole = Span(0, manifest.config.layer_count)
        self.core = EngineCore(EngineSettings())
        self.core.load(StageSpec(model=self.model, pieces=(self.whole,)), manifest, _files(store, manifest, self.whole))
        self.prompt = _tokens(store, manifest, prompt)

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


class BareChain:
    """Two processes that hold one half each; `bare_chain` starts and ends them."""

    def __init__(self, prompt: list[int], out: Connection, back: Connection) -> None:
        self._prompt = prompt
        self._out = out
        self._back = back

    def run(self, streams: int, tokens: int) -> float:
        """As `Bare.run`."""
        for stream in range(streams):
            self._out.send(_Rows(Phase.PREFILL, [stream], np.asarray(self._prompt, np.int32).tobytes()))
        firsts = [self._back.recv() for _ in range(streams)]
        size = -(-streams // TEAMS)
        teams = [list(range(start, min(start + size, streams))) for start in range(0, streams, size)]
        began_s = time.perf_counter()
        for team in teams:
            payload = b"".join(firsts[stream].payload for stream in team)
            self._out.send(_Rows(Phase.DECODE, team, payload))
        for index in range(tokens):
            for _ in teams:
                came = self._back.recv()
                if index < tokens - 1:
                    self._out.send(came)
        elapsed_s = time.perf_counter() - began_s
        self._out.send(None)
        assert self._back.recv() is None
        return streams * tokens / elapsed_s


@contextmanager
def bare_chain(store: Store, manifest: Manifest, prompt: str, cut: int) -> Iterator[BareChain]:
    """Two processes that hold the layers before `cut` and from it on. They end with the block."""
    context = multiprocessing.get_context("spawn")
    (first_in, out), (second_in, first_out), (back, second_out) = (context.Pipe(duplex=False) for _ in range(3))
    halves = (
        (Span(0, cut), first_in, first_out),
        (Span(cut, manifest.config.layer_count), second_in, second_out),
    )
    processes = [context.Process(target=_serve, args=(store.root, manifest, *half), daemon=True) for half in halves]
    for process in processes:
        process.start()
    for _, arrivals, departures in halves:
        arrivals.close()
        departures.close()
    try:
        yield BareChain(_tokens(store, manifest, prompt), out, back)
    finally:
        out.close()
        for process in processes:
            process.join(END_TIMEOUT_S)
            process.kill()


class _Rows(NamedTuple):
    """Rows for some streams: a prompt of one, or one row each."""

    phase: Phase
    streams: Sequence[int]
    payload: bytes


class _Half:
    """Layers of the model, without the engine's queues. A stream's slot is its number."""

    def __init__(self, store: Store, manifest: Manifest, span: Span) -> None:
        self._span = span
        self._hosted = HostedModel(manifest, EngineSettings(), replays=False)
        stage = StageSpec(model=manifest_digest(manifest), pieces=(span,))
        self._hosted.commit(self._hosted.prepare(stage, _files(store, manifest, span)))

    def compute(self, rows: _Rows) -> _Rows:
        hosted, x = self._hosted, self._entering(rows.payload)
        slots = list(rows.streams)
        if rows.phase is Phase.PREFILL:
            leaving = hosted.prefill(slots[0], self._span, x)
            assert leaving is not None
            hosted.lengths[slots] += len(x)
            return rows._replace(payload=self._leaving(leaving, last=1))
        done = hosted.decode([DecodeRow(slot, self._span, row) for slot, row in zip(slots, x, strict=True)])
        hosted.lengths[slots] += 1
        return rows._replace(payload=self._leaving(np.stack([row for row in done if row is not None]), len(slots)))

    def forget(self) -> None:
        self._hosted.lengths[:] = 0

    def _entering(self, payload: bytes) -> np.ndarray:
        hosted = self._hosted
        if hosted.embedding is None:
            return np.frombuffer(payload, hosted.wire).reshape(-1, hosted.config.hidden_size)
        return hosted.embedding.rows(np.frombuffer(payload, np.int32))

    def _leaving(self, rows: np.ndarray, last: int) -> bytes:
        """All rows; from the end of the model the likeliest tokens after the `last` ones."""
        if self._hosted.head is None:
            return rows.tobytes()
        logits = self._hosted.head.logits(list(rows[-last:]))
        return b"".join(top_log_probabilities(row, 1)[0].tobytes() for row in logits)


def _serve(root: Path, manifest: Manifest, span: Span, arrivals: Connection, departures: Connection) -> None:
    """One half's process: until the pipe to it closes."""
    half = _Half(Store(root), manifest, span)
    while True:
        try:
            rows: _Rows | None = arrivals.recv()
        except EOFError:
            return
        if rows is None:
            half.forget()
        departures.send(None if rows is None else half.compute(rows))


def _files(store: Store, manifest: Manifest, span: Span) -> dict[Digest, Path]:
    stage = StageSpec(model=manifest_digest(manifest), pieces=(span,))
    paths = {ref.digest: store.blob_path(ref.digest) for ref in layer_files(manifest, stage)}
    return {digest: path for digest, path in paths.items() if path is not None}


def _tokens(store: Store, manifest: Manifest, prompt: str) -> list[int]:
    ids: list[int] = load_tokenizer(store.blob_path(manifest.tokenizer.digest) or Path()).encode(prompt).ids
    return ids
