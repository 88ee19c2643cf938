"""When what a worker hosts is checked again: canaries in turns, and the weights' files chunk by chunk.

Rules
- A new piece and a new head are examined before they are hosted: their canary's answer must be the reference's.
- All canaries come round once in `canary_interval_s`. One that is due waits until there is nothing to compute, but
  not longer than another interval; it never takes more than `CANARY_SHARE` of the time.
- Hashing takes `rehash_share` of the time, and rests for `rehash_rest_s` after everything was hashed once.
- A check is one call, between two turns of the engine. What it finds is a reason to distrust the whole process.

The worker asks `wait_s` how long it may sleep, and calls `work` whenever it is awake.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from fallow.domain.ids import Digest
from fallow.domain.model import Manifest, Span
from fallow.engine.canary import Floats, canary_rows, check_answer, fingerprint, reference_logits, reference_rows
from fallow.engine.rehash import Chunk, file_chunks
from fallow.engine.settings import EngineSettings

if TYPE_CHECKING:
    from fallow.engine.hosted import HostedModel, Prepared
    from fallow.engine.piece import Head, Piece

CANARY_SHARE = 0.01

Answers = dict[Span | None, bytes]
"""What each piece of a model answered when it was loaded; the head's under `None`."""


class _Model(msgspec.Struct):
    hosted: "HostedModel"
    answers: Answers


class Guard:
    """Of one engine. `clock` gives seconds that never go back."""

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = settings.canary_interval_s
        self._share = settings.rehash_share
        self._rest_s = settings.rehash_rest_s
        self._clock = clock
        self._models: dict[Digest, _Model] = {}
        self._canaries: Iterator[tuple[_Model, Span | None]] = iter(())
        self._chunks: Iterator[Chunk] = iter(())
        self._canary_at_s = self._rehash_at_s = clock()
        self.canaries_done = self.chunks_done = 0

    # --- loading --------------------------------------------------------------------------------

    def examine(self, hosted: "HostedModel", prepared: "Prepared", files: Mapping[Digest, Path]) -> Answers:
        """Ask what is new, and compare with the reference. Raises `EngineError` for an answer that is not its own."""
        known = next((model.answers for model in self._models.values() if model.hosted is hosted), {})
        rows, answers = canary_rows(hosted.config), Answers()
        for piece in prepared.pieces:
            answers[piece.span] = known.get(piece.span) or _examine_piece(hosted, piece, files, rows)
        if prepared.head is not None:
            answers[None] = known.get(None) or _examine_head(hosted.manifest, prepared.head, files, rows)
        return answers

    def adopt(self, name: Digest, hosted: "HostedModel", answers: Answers) -> None:
        """From now on this is what is hosted of a model."""
        self._models[name] = _Model(hosted, answers)
        self._begin_again()

    def forget(self, name: Digest) -> None:
        """A model is not hosted any more."""
        self._models.pop(name, None)
        self._begin_again()

    def _begin_again(self) -> None:
        now_s = self._clock()
        self._canaries, self._chunks = iter(()), iter(())
        self._canary_at_s, self._rehash_at_s = now_s + self._gap_s(), now_s
        if not self._share or not self._models:
            self._rehash_at_s = float("inf")

    # --- checking -------------------------------------------------------------------------------

    def wait_s(self, *, busy: bool) -> float | None:
        """How long `work` has nothing to do; `None` for ever."""
        due_s = min(self._ask_at_s(busy=busy), self._rehash_at_s)
        return None if due_s == float("inf") else max(0.0, due_s - self._clock())

    def work(self, *, busy: bool) -> str | None:
        """Do one check if one is due. Why this process is not to be trusted any more, or `None`."""
        now_s = self._clock()
        if now_s >= self._ask_at_s(busy=busy):
            return self._ask_next()
        if now_s >= self._rehash_at_s:
            return self._hash_next()
        return None

    def _ask_at_s(self, *, busy: bool) -> float:
        return self._canary_at_s + (self._interval_s if busy else 0.0)

    def check_all(self) -> str | None:
        """Every canary and every chunk, now. As `work`."""
        canaries = (_ask(model, target) for model, target in self._all_canaries())
        hashes = (None if chunk.intact() else _changed(chunk) for chunk in self._all_chunks())
        return next((reason for reason in itertools.chain(canaries, hashes) if reason is not None), None)

    def _ask_next(self) -> str | None:
        chosen = next(self._canaries, None)
        if chosen is None:
            self._canaries = self._all_canaries()
            chosen = next(self._canaries, None)
        started_s = self._clock()
        reason = None if chosen is None else _ask(*chosen)
        self.canaries_done += 1
        ended_s = self._clock()
        self._canary_at_s = ended_s + max(self._gap_s(), (ended_s - started_s) / CANARY_SHARE)
        return reason

    def _hash_next(self) -> str | None:
        started_s = self._clock()
        chunk = next(self._chunks, None)
        if chunk is None:
            rest_s = self._rest_s if self.chunks_done else 0.0
            self._chunks, self._rehash_at_s = self._all_chunks(), started_s + rest_s
            return None
        intact = chunk.intact()
        self.chunks_done += 1
        ended_s = self._clock()
        self._rehash_at_s = ended_s + (ended_s - started_s) / self._share
        return None if intact else _changed(chunk)

    def _gap_s(self) -> float:
        targets = sum(len(model.answers) for model in self._models.values())
        return self._interval_s / targets if targets and self._interval_s else float("inf")

    def _all_canaries(self) -> Iterator[tuple[_Model, Span | None]]:
        return iter([(model, target) for model in self._models.values() for target in model.answers])

    def _all_chunks(self) -> Iterator[Chunk]:
        for model in list(self._models.values()):
            hosted = model.hosted
            parts = [piece.weights for piece in hosted.pieces]
            parts += [hosted.head.weights] if hosted.head is not None else []
            mapped = [entry for weights in parts for entry in weights.mapped]
            mapped += hosted.embedding.mapped if hosted.embedding is not None else []
            yield from file_chunks(hosted.manifest, mapped)


def _examine_piece(hosted: "HostedModel", piece: "Piece", files: Mapping[Digest, Path], rows: Floats) -> bytes:
    leaving, answer = hosted.ask(piece, rows)
    reference = reference_rows(files, hosted.manifest, piece.span, rows)
    check_answer(f"piece {piece.span} of {hosted.manifest.name}", leaving.astype(np.float32), reference, rows)
    return answer


def _examine_head(manifest: Manifest, head: "Head", files: Mapping[Digest, Path], rows: Floats) -> bytes:
    logits = head.logits(list(rows))
    check_answer(f"the head of {manifest.name}", logits, reference_logits(files, manifest, rows))
    return fingerprint(logits)


def _ask(model: _Model, target: Span | None) -> str | None:
    hosted, rows = model.hosted, canary_rows(model.hosted.config)
    if target is None:
        assert hosted.head is not None
        answer, what = fingerprint(hosted.head.logits(list(rows))), "the head"
    else:
        [piece] = hosted.pieces_of(target)
        answer, what = hosted.ask(piece, rows)[1], f"piece {target}"
    if answer == model.answers[target]:
        return None
    return f"{what} of {hosted.manifest.name} answers otherwise than when it was loaded (canary)"


def _changed(chunk: Chunk) -> str:
    return f"{chunk.what} has changed in memory or on the disk (re-hash)"
