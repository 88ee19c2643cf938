"""The engine's model: how long calls take on a simulated device. What they compute is exactly what `MemoryEngine` does.

Figures: a layer takes `layer_s` for one row; several rows in one call cost what was measured on the real engine
(`BATCH_COST`, from the design's facts), more rows in a straight line from there. Calls take turns as the real ones do,
by the same policies (`batching.py`, `fair_turns.py`): every row that decodes, then a chunk of a prompt or of a cache
that is rebuilt, a small one while others decode. Loading reads from a disk of `DISK_BYTES_PER_S`.

It does not model caches, thermal limits (`slowdown` may be set from outside) or the cost of long contexts.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from fallow.domain.fleet import Speed
from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import PREFILL_CHUNK_ROWS, EngineLoad, Loaded, Step, Stepped
from fallow.engine.memory import MemoryEngine
from fallow.policy.batching import Turn, chunk_rows, next_turn
from fallow.policy.fair_turns import FairTurns
from fallow.simulator.scenario import SimulatedModel

BATCH_COST: Final = ((1, 1.0), (2, 1.2), (4, 1.7), (8, 2.6), (16, 4.4))
"""Rows in one call, and what they cost in calls of one row."""
DISK_BYTES_PER_S: Final = 800e6
LOAD_MIN_S: Final = 0.5
REPLAY_CHUNK_ROWS: Final = 64
"""Generated rows of a cache that is rebuilt, in one call of the real engine."""
RATE_PERIOD_S: Final = 5.0
"""Over which rows a second are averaged."""


class Chunk(NamedTuple):
    """Rows of a step that one call computes."""

    step: Step
    rows: int


def _decodes(step: Step) -> bool:
    return step.phase is Phase.DECODE and step.count == 1


def batch_cost(rows: int) -> float:
    """What a call of so many rows costs, in calls of one row."""
    (low, low_cost), *rest = BATCH_COST
    for high, high_cost in rest:
        if rows <= high or high == BATCH_COST[-1][0]:
            return low_cost + (high_cost - low_cost) * (rows - low) / (high - low)
        low, low_cost = high, high_cost
    return low_cost


def weights_bytes(stage: StageSpec, model: SimulatedModel) -> int:
    """What a stage's weights take."""
    total = stage.layer_count * model.layer_bytes
    for piece in stage.pieces:
        total += model.embedding_bytes * (piece.first == 0) + model.head_bytes * (piece.last == model.layer_count)
    return total


class SimulatedEngine(MemoryEngine):
    """One device's engine."""

    def __init__(self, model: SimulatedModel, layer_s: float, kv_budget_bytes: int, vocab_size: int) -> None:
        super().__init__(kv_budget_bytes=kv_budget_bytes, vocab_size=vocab_size)
        self.model = model
        self.layer_s = layer_s
        self.slowdown = 1.0
        self._head_layers = model.head_bytes / model.layer_bytes
        self._rate_since_s = 0.0
        self._rows_at_rate = 0
        self._rows_per_s = 0.0
        self._turn = Turn.WAIT
        self._turns = FairTurns()
        self._decoded_rows = 0
        """In the call before this one: those who decode will be back."""
        self._chunk: Chunk | None = None
        """What the next call computes of a prompt, or of a cache that is rebuilt."""
        self._filled: dict[int, int] = {}
        """Rows that were computed of steps that took several calls, by the step's identity; such steps are waiting."""

    @property
    def load_now(self) -> EngineLoad:
        load = super().load_now
        now_s = asyncio.get_running_loop().time()
        if now_s - self._rate_since_s >= RATE_PERIOD_S:
            self._rows_per_s = (self.rows_computed - self._rows_at_rate) / (now_s - self._rate_since_s)
            self._rate_since_s, self._rows_at_rate = now_s, self.rows_computed
        return EngineLoad(sessions=load.sessions, kv_free_bytes=load.kv_free_bytes, rows_per_s=self._rows_per_s)

    async def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        before = self.hosted_stage(stage.model)
        kept = 0 if before is None else weights_bytes(before, self.model)
        self._load_s = LOAD_MIN_S + max(0, weights_bytes(stage, self.model) - kept) / DISK_BYTES_PER_S
        loaded = await super().load(stage, manifest, files)
        speed = [self.layer_s * self.slowdown * batch_cost(rows) for rows in (1, 4, 8)]
        return Loaded(
            weights_bytes=weights_bytes(stage, self.model),
            kv_bytes_per_token=loaded.kv_bytes_per_token,
            load_s=loaded.load_s,
            speed=Speed(layer_s_1=speed[0], layer_s_4=speed[1], layer_s_8=speed[2]),
        )

    def hosted_stage(self, model: Digest) -> StageSpec | None:
        hosted = self._hosted.get(model)
        return None if hosted is None else hosted[0]

    def hosted_weights_bytes(self) -> int:
        return sum(weights_bytes(stage, self.model) for stage, _ in self._hosted.values())

    def kv_reserved_bytes(self) -> int:
        """What open sessions have reserved, counted anew."""
        per_layer = self.model.kv_bytes_per_token_layer
        return sum(held.reserve_tokens * held.span.layer_count * per_layer for held in self._sessions.values())

    @property
    def kv_budget_bytes(self) -> int:
        return self._kv_budget_bytes

    @property
    def waiting(self) -> int:
        """Steps that wait for a call, and that somebody waits for."""
        return sum(not waiter.done() for _, waiter in self._ready)

    # --- timing ---

    def _take(self) -> list[tuple[Step, asyncio.Future[Stepped]]]:
        """The steps that the next call ends: the rows that decode, or the last chunk of a longer step."""
        filling = [item for item in self._ready if not _decodes(item[0])]
        decoding = [item for item in self._ready if _decodes(item[0])]
        self._turn = next_turn(self._turn, len(decoding), len(filling))
        self._chunk = None
        if self._turn is not Turn.PREFILL:
            self._decoded_rows = len(decoding)
            self._ready = filling
            return decoding
        whose = self._turns.next(step.session for step, _ in filling)
        head = next(item for item in filling if item[0].session == whose)
        others = [item for item in filling if item is not head]
        step = head[0]
        rows_max = PREFILL_CHUNK_ROWS if step.phase is Phase.PREFILL else REPLAY_CHUNK_ROWS
        count = chunk_rows(step.count - self._filled.get(id(step), 0), self._decoded_rows, rows_max)
        self._decoded_rows = 0
        filled = self._filled.pop(id(step), 0) + count
        if self._holds(step):
            self._turns.took(step.session, count * self._held(step.session).span.layer_count)
            self._chunk = Chunk(step, count)
            if filled < step.count:
                self._filled[id(step)] = filled
                self._ready = [*decoding, *others, head]
                return []
        self._ready = [*decoding, *others]
        return [head]

    async def free(self, session: SessionId) -> None:
        self._turns.forget(session)
        await super().free(session)

    def _duration_s(self, steps: list[Step]) -> float:
        chunks = [Chunk(step, step.count) for step in steps] if self._chunk is None else [self._chunk]
        rows: dict[Span, int] = {}
        logits = 0
        for step, count in chunks:
            span = self._held(step.session).span
            rows[span] = rows.get(span, 0) + count
            if span.last == self.model.layer_count and step in steps:
                logits += max(0, min(step.count, step.position + step.count - step.logits_from))
        layers = sum(span.layer_count * batch_cost(count) for span, count in rows.items())
        head = self._head_layers * batch_cost(logits) if logits else 0.0
        return self.layer_s * self.slowdown * (layers + head)
