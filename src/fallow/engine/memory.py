"""A `StageEngine` without a model: hashes for layers, the event loop's time for speed.

Rules
- It honours the whole contract, and its "logits" depend on everything that the real ones do: every earlier token of the
  session, every layer in order, and each row's `Phase`. A lost, doubled, reordered or misrouted row changes the answer.
- A call takes `call_s(rows, layers)` of the loop's time and takes what is ready, as the real engine does.
- Tests and the simulator can kill it (`crash`) and hang it (`hang`).

Not here: accuracy, memory use, or the real scheduler's order of prefill and decode.
"""

import asyncio
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np

from fallow.domain.errors import EngineError, EngineLost, KvExhausted, PositionMismatch, UnknownSession
from fallow.domain.fleet import Speed
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.engine.contract import EngineLoad, Loaded, Step, Stepped

ROW_BYTES: Final = 8
SESSIONS_MAX: Final = 1024


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=ROW_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


class _Session:
    def __init__(self, model: Digest, span: Span, reserve_tokens: int) -> None:
        self.model = model
        self.span = span
        self.reserve_tokens = reserve_tokens
        self.prefixes: list[list[bytes]] = []
        """The cache: for each position, each layer's digest of everything up to it."""


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
        self.lost = asyncio.Event()

    # --- life ---

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
        if step.position != len(held.prefixes):
            raise PositionMismatch(f"rows at {step.position} for a session at {len(held.prefixes)}")
        if step.position + step.count > held.reserve_tokens:
            raise PositionMismatch(f"{step.position + step.count} tokens exceed the reserved {held.reserve_tokens}")
        waiter: asyncio.Future[Stepped] = asyncio.get_running_loop().create_future()
        self._ready.append((step, waiter))
        self._wake.set()
        return await waiter

    async def rewind(self, session: SessionId, position: int) -> None:
        self._alive()
        del self._held(session).prefixes[position:]

    async def free(self, session: SessionId) -> None:
        self._sessions.pop(session, None)

    # --- computing ---

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                await self._running.wait()
                taken, self._ready = self._ready, []
                rows = sum(step.count for step, _ in taken)
                spans = (self._held(step.session).span for step, _ in taken if self._holds(step))
                layers = max((span.layer_count for span in spans), default=0)
                await asyncio.sleep(self._call_s(rows, layers))
                for step, waiter in taken:
                    if not waiter.done():
                        self._finish(step, waiter)

    def _finish(self, step: Step, waiter: "asyncio.Future[Stepped]") -> None:
        if not self._holds(step):
            waiter.set_exception(UnknownSession("the session was freed"))
            return
        waiter.set_result(self._compute(self._held(step.session), step))

    def _compute(self, held: _Session, step: Step) -> Stepped:
        _, manifest = self._hosted[held.model]
        size = 4 if held.span.first == 0 else ROW_BYTES
        payload = bytes(step.payload)
        out: list[bytes] = []
        for index in range(step.count):
            row = payload[index * size : (index + 1) * size]
            before = held.prefixes[-1] if held.prefixes else [b""] * held.span.layer_count
            prefix: list[bytes] = []
            for layer in range(held.span.first, held.span.last):
                prefix.append(_hash(before[layer - held.span.first], row, step.phase.encode()))
                row = _hash(layer.to_bytes(2, "little"), row, prefix[-1])
            held.prefixes.append(prefix)
            out.append(row)
        self.rows_computed += step.count
        if held.span.last < manifest.config.layer_count:
            return Stepped(payload=b"".join(out), logit_count=0, k=None, compute_s=0.0)
        return self._logits(out, step)

    def _logits(self, rows: list[bytes], step: Step) -> Stepped:
        wanted = rows[max(0, step.logits_from - step.position) :]
        if step.top_k is None:
            full = [
                np.frombuffer(_hash(row) * (self._vocab_size // 8 + 1), np.uint8)[: self._vocab_size] for row in wanted
            ]
            logits = np.stack(full).astype(np.float32) if full else np.zeros((0, self._vocab_size), np.float32)
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            return Stepped(payload=logprobs.tobytes(), logit_count=len(wanted), k=None, compute_s=0.0)
        k = min(step.top_k, self._vocab_size)
        first = np.array([int.from_bytes(row, "little") % self._vocab_size for row in wanted], np.int32).reshape(-1, 1)
        ids = (first + np.arange(k, dtype=np.int32)) % self._vocab_size
        logprobs = np.broadcast_to(-0.5 - np.arange(k, dtype=np.float32), ids.shape)
        payload = ids.astype(np.int32).tobytes() + logprobs.tobytes()
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
