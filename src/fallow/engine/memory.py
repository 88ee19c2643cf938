"""A `StageEngine` without a model: mixed numbers for layers, the event loop's time for speed.

Rules
- It honours the whole contract, and its "logits" depend on everything that the real ones do: every earlier token of the
  session, every layer in order, and each row's `Phase`. A lost, doubled, reordered or misrouted row changes the answer.
- A call computes what is ready, as the real engine does, in `call_s(rows, layers)` of the loop's time. The simulator's
  engine (`simulator/engine_model.py`) overrides both (`_take`, `_duration_s`) and computes as this one does.
- Tests and the simulator can kill it (`crash`) and hang it (`hang`).

Not here: accuracy, memory use, or the real scheduler's order of prefill and decode.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from struct import pack
from typing import Final

import msgspec
import numpy as np

from fallow.domain.errors import EngineError, EngineLost, FallowError, KvExhausted, PositionMismatch, UnknownSession
from fallow.domain.fleet import Speed
from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import Drawn, EngineLoad, Loaded, Loss, Step, Stepped
from fallow.engine.drawing import drawn_token

ROW_BYTES: Final = 8
SESSIONS_MAX: Final = 1024


_PRIME: Final = (1 << 30) - 35
"""Below 2^30, so that Python multiplies and divides in single digits."""
_PHASE: Final = {Phase.PREFILL: 104_729, Phase.DECODE: 611_953}


def next_row(prefix: list[int], first_layer: int, row: int, phase: Phase) -> int:
    """Push one row through layers. `prefix` holds a number for each layer, which stands for all rows so far.

    A polynomial hash modulo a prime along positions, squared along layers: what goes in twice, not at all, in another
    order or changed leaves another number, but for one chance in 2^30. Simulations spend much of their time here.
    """
    kind = _PHASE[phase] + first_layer
    for index, before in enumerate(prefix):
        kind += 1
        prefix[index] = mixed = (before * 715_827_883 + row * 39_916_801 + kind) % _PRIME
        row = (mixed * mixed + row + kind) % _PRIME
    return row


def choice(row: int, vocab_size: int) -> int:
    """The token that the last layer's row proposes first."""
    return row % vocab_size


class _Session:
    def __init__(self, model: Digest, span: Span, reserve_tokens: int) -> None:
        self.model = model
        self.span = span
        self.reserve_tokens = reserve_tokens
        self.prefixes: list[list[int]] = []
        """The cache: for each position, each layer's number for everything up to it."""
        self.last: asyncio.Future[Stepped] | None = None
        """Its newest step."""


def _check(held: _Session, step: Step) -> None:
    """Raises `PositionMismatch` for rows that are not the session's next, or beyond its room."""
    if step.position != len(held.prefixes):
        raise PositionMismatch(f"rows at {step.position} for a session at {len(held.prefixes)}")
    if step.position + step.count > held.reserve_tokens:
        raise PositionMismatch(f"{step.position + step.count} tokens exceed the reserved {held.reserve_tokens}")


class MemoryEngine:
    """The toy. `vocab_size` bounds the ids that it proposes."""

    def __init__(
        self,
        kv_budget_bytes: int = 1 << 30,
        vocab_size: int = 512,
        call_s: Callable[[int, int], float] = lambda rows, layers: 0.0001 * layers * (1 + 0.2 * (rows - 1)),
        load_s: float = 0.1,
    ) -> None:
        self._kv_budget_bytes = kv_budget_bytes
        self._vocab_size = vocab_size
        self._call_s = call_s
        self._load_s = load_s
        self._hosted: dict[Digest, tuple[StageSpec, Manifest]] = {}
        self._sessions: dict[SessionId, _Session] = {}
        self._ready: list[tuple[Step, asyncio.Future[Stepped]]] = []
        self._wake = asyncio.Event()
        self._running = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.rows_computed = 0
        self.damaged = False
        """What its next loss is said to be."""
        self.lost = asyncio.Event()

    # --- life ---

    @property
    def loss(self) -> Loss | None:
        return Loss("the engine crashed", self.damaged) if self.lost.is_set() else None

    @property
    def load_now(self) -> EngineLoad:
        return EngineLoad(sessions=len(self._sessions), kv_free_bytes=self._kv_free_bytes(), rows_per_s=0.0)

    async def start(self) -> None:
        self._hosted.clear()
        self._sessions.clear()
        self.lost.clear()
        self._running.set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        self.crash()

    def crash(self) -> None:
        """The worker dies: every session is gone, every caller learns it."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self.lost.set()
        for _, waiter in self._ready:
            if not waiter.done():
                waiter.set_exception(EngineLost("the engine crashed"))
        self._ready.clear()

    def hang(self) -> None:
        """Calls no longer end."""
        self._running.clear()

    def resume(self) -> None:
        """The opposite of `hang`."""
        self._running.set()

    # --- hosting ---

    async def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        self._alive()
        await asyncio.sleep(self._load_s)
        self._hosted[stage.model] = (stage, manifest)
        kept = {
            name: session
            for name, session in self._sessions.items()
            if session.model != stage.model or stage.pieces_of(session.span) is not None
        }
        self._sessions = kept
        layer = self._call_s
        return Loaded(
            weights_bytes=sum(manifest.layers[i].size_bytes for p in stage.pieces for i in range(p.first, p.last)),
            kv_bytes_per_token=self._kv_bytes_per_token(manifest, stage.layer_count),
            load_s=self._load_s,
            speed=Speed(layer_s_1=layer(1, 1), layer_s_4=layer(4, 1), layer_s_8=layer(8, 1)),
        )

    async def unload(self, model: Digest) -> None:
        self._hosted.pop(model, None)
        self._sessions = {name: session for name, session in self._sessions.items() if session.model != model}

    # --- sessions ---

    async def open(self, session: SessionId, model: Digest, span: Span, reserve_tokens: int) -> None:
        self._alive()
        stage, _ = self._hosted.get(model, (None, None))
        if stage is None or stage.pieces_of(span) is None:
            raise EngineError(f"span {span} is not hosted here")
        if len(self._sessions) >= SESSIONS_MAX:
            raise KvExhausted(f"{SESSIONS_MAX} sessions are open")
        self._admit(model, span, reserve_tokens)
        self._sessions[session] = _Session(model, span, reserve_tokens)

    async def reserve(self, session: SessionId, reserve_tokens: int) -> None:
        held = self._held(session)
        if reserve_tokens > held.reserve_tokens:
            self._admit(held.model, held.span, reserve_tokens - held.reserve_tokens)
            held.reserve_tokens = reserve_tokens

    async def step(self, step: Step) -> Stepped:
        self._alive()
        held = self._held(step.session)
        waiter: asyncio.Future[Stepped] = asyncio.get_running_loop().create_future()
        before, held.last = held.last, waiter
        token = None
        try:
            if step.drawn is not None:
                token = await self._drawn(before, step.drawn)
                step = msgspec.structs.replace(step, payload=token, drawn=None)
            _check(held, step)
        except FallowError:
            waiter.cancel()  # for those that wait to draw their rows from it
            held.last = before if held.last is waiter else held.last
            raise
        self._ready.append((step, waiter))
        self._wake.set()
        stepped = await waiter
        return stepped if token is None else msgspec.structs.replace(stepped, drawn=int.from_bytes(token, "little"))

    async def _drawn(self, before: "asyncio.Future[Stepped] | None", drawn: Drawn) -> bytes:
        """The row of a step that draws it, once the one before it is done."""
        token = None
        if before is not None:
            await asyncio.wait((before,))
            self._alive()
            done = not before.cancelled() and before.exception() is None
            token = drawn_token(before.result(), drawn) if done else None
        if token is None:
            raise EngineError("nothing follows the last step")
        return token

    async def rewind(self, session: SessionId, position: int) -> None:
        self._alive()
        held = self._held(session)
        del held.prefixes[position:]
        held.last = None

    async def free(self, session: SessionId) -> None:
        self._sessions.pop(session, None)

    # --- computing ---

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                await self._running.wait()
                taken = self._take()
                await asyncio.sleep(self._duration_s([step for step, _ in taken if self._holds(step)]))
                for step, waiter in taken:
                    if not waiter.done():
                        self._finish(step, waiter)

    def _take(self) -> list[tuple[Step, asyncio.Future[Stepped]]]:
        """What the next call computes."""
        taken, self._ready = self._ready, []
        return taken

    def _duration_s(self, steps: list[Step]) -> float:
        """How long a call takes."""
        layers = max((self._held(step.session).span.layer_count for step in steps), default=0)
        return self._call_s(sum(step.count for step in steps), layers)

    def _finish(self, step: Step, waiter: "asyncio.Future[Stepped]") -> None:
        if not self._holds(step):
            waiter.set_exception(UnknownSession("the session was freed"))
            return
        held = self._held(step.session)
        # A rewind or a second load may have come while the call took its time.
        if len(held.prefixes) != step.position:
            waiter.set_exception(PositionMismatch(f"rows at {step.position} for a session at {len(held.prefixes)}"))
            return
        waiter.set_result(self._compute(held, step))

    def _compute(self, held: _Session, step: Step) -> Stepped:
        _, manifest = self._hosted[held.model]
        row_bytes = 4 if held.span.first == 0 else ROW_BYTES
        payload = bytes(step.payload)
        rows: list[int] = []
        for at in range(0, step.count * row_bytes, row_bytes):
            row = int.from_bytes(payload[at : at + row_bytes], "little")
            prefix = list(held.prefixes[-1]) if held.prefixes else [0] * held.span.layer_count
            rows.append(next_row(prefix, held.span.first, row, step.phase))
            held.prefixes.append(prefix)
        self.rows_computed += step.count
        if held.span.last < manifest.config.layer_count:
            out = b"".join(row.to_bytes(ROW_BYTES, "little") for row in rows)
            return Stepped(payload=out, logit_count=0, k=None, compute_s=0.0)
        return self._logits(rows, step)

    def _logits(self, rows: list[int], step: Step) -> Stepped:
        wanted = rows[max(0, step.logits_from - step.position) :]
        if step.top_k is None:
            # The row's bytes again and again: a distribution that any change of the row changes.
            repeated = b"".join(
                (row.to_bytes(8, "little") * (self._vocab_size // 8 + 1))[: self._vocab_size] for row in wanted
            )
            logits = np.frombuffer(repeated, np.uint8).reshape(len(wanted), self._vocab_size).astype(np.float32) / 16
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            return Stepped(payload=logprobs.tobytes(), logit_count=len(wanted), k=None, compute_s=0.0)
        k = min(step.top_k, self._vocab_size)
        if k == 1:
            ids = [choice(row, self._vocab_size) for row in wanted]
            payload = pack(f"<{len(ids)}i{len(ids)}f", *ids, *[-0.5] * len(ids))
            return Stepped(payload=payload, logit_count=len(wanted), k=1, compute_s=0.0)
        first = np.array([choice(row, self._vocab_size) for row in wanted], np.int32).reshape(-1, 1)
        several = (first + np.arange(k, dtype=np.int32)) % self._vocab_size
        logprobs = np.broadcast_to(-0.5 - np.arange(k, dtype=np.float32), several.shape)
        payload = several.astype(np.int32).tobytes() + logprobs.tobytes()
        return Stepped(payload=payload, logit_count=len(wanted), k=k, compute_s=0.0)

    # --- bookkeeping ---

    def _alive(self) -> None:
        if self.lost.is_set() or self._task is None:
            raise EngineLost("the engine is not running")

    def _holds(self, step: Step) -> bool:
        return step.session in self._sessions

    def _held(self, session: SessionId) -> _Session:
        held = self._sessions.get(session)
        if held is None:
            raise UnknownSession(f"no session {session[:8]} here")
        return held

    def _admit(self, model: Digest, span: Span, tokens: int) -> None:
        _, manifest = self._hosted[model]
        needed = tokens * self._kv_bytes_per_token(manifest, span.layer_count)
        if needed > self._kv_free_bytes():
            raise KvExhausted(f"{needed} bytes of KV cache wanted, {self._kv_free_bytes()} free")

    def _kv_free_bytes(self) -> int:
        used = 0
        for session in self._sessions.values():
            manifest = self._hosted[session.model][1]
            used += session.reserve_tokens * self._kv_bytes_per_token(manifest, session.span.layer_count)
        return self._kv_budget_bytes - used

    @staticmethod
    def _kv_bytes_per_token(manifest: Manifest, layers: int) -> int:
        return layers * 2 * manifest.config.kv_head_count * manifest.config.head_dim * 4
