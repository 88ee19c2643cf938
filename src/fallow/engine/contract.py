"""The `StageEngine` contract: what an agent asks of whatever computes its stages.

Rules
- An engine hosts at most one `StageSpec` of each model. A session runs through adjacent pieces of it.
- Steps of one session run in the order given; steps of different sessions run together, in one call where they can.
  A long prefill delays others' decode by at most one chunk of `PREFILL_CHUNK_ROWS` rows.
- The result for a row depends on its session's earlier rows and on its `Phase`, bit for bit, and on nothing else: not
  on which other rows share its call, nor on how rows were chunked.
- A refusal (`KvExhausted`, `UnknownSession`, `PositionMismatch`) leaves the session as it was. `NumericFault` ends the
  step; the session can be rewound. `EngineLost` ends everything: every session is gone, `lost` is set, and the engine
  can be started again.
- At every possible cut the residual stream is rounded to the wire type, so that a cut never changes an answer
  (`domain.model.cut_points`).
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from fallow.domain.fleet import Speed
from fallow.domain.frames import Phase
from fallow.domain.ids import Digest, SessionId
from fallow.domain.model import Manifest, Span, StageSpec
from fallow.domain.sampling import Recipe

PREFILL_CHUNK_ROWS = 128
DEFAULT_TOP_K = 64


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that is ready."""

    weights_bytes: int
    """What the weights take in memory, which is more than their files do (`domain.model.held_bytes`)."""
    kv_bytes_per_token: int
    load_s: float
    speed: Speed


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is not known yet: the `nth` token of an answer, drawn from what the session's step before leads to."""

    recipe: Recipe
    nth: int
    ends: tuple[int, ...]
    """Tokens after which there is nothing to compute."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Rows to push through a span for one session; fields and payload as in `frames.Rows`."""

    session: SessionId
    position: int
    count: int
    phase: Phase
    logits_from: int
    top_k: int | None
    payload: bytes | bytearray | memoryview
    drawn: Drawn | None = None
    """Instead of a payload, for one row of a whole model."""


class Stepped(msgspec.Struct, frozen=True, kw_only=True):
    """What came out: hidden rows for the next stage, or the payload of `frames.Result` when the span has the head."""

    payload: bytes | bytearray | memoryview
    logit_count: int
    k: int | None
    compute_s: float
    drawn: int | None = None
    """The token of a row that the step drew itself."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the engine is, for heartbeats."""

    sessions: int
    kv_free_bytes: int
    rows_per_s: float


class Loss(msgspec.Struct, frozen=True):
    """Why an engine is gone."""

    reason: str
    damaged: bool = False
    """Its own checks found that weights or code had changed: the files that it was loaded from are to be checked too,
    and nothing that it computed lately is beyond doubt."""


class StageEngine(Protocol):
    """Computes stages for an agent."""

    @property
    def lost(self) -> asyncio.Event:
        """Set when the engine died; cleared by `start`."""
        ...

    @property
    def loss(self) -> Loss | None:
        """Why it was lost; `None` while it was not."""
        ...

    @property
    def load_now(self) -> EngineLoad: ...

    async def start(self) -> None:
        """Start, or start again after a loss. Hosts nothing afterwards."""
        ...

    async def load(self, stage: StageSpec, manifest: Manifest, files: Mapping[Digest, Path]) -> Loaded:
        """Build a stage from verified local files. Replaces what is hosted of that model: pieces that stay are kept
        with their sessions, new ones are built first, and sessions on pieces that go are freed last.

        Raises `ModelError` for tensors that do not fit the manifest, `EngineError` otherwise.
        """
        ...

    async def unload(self, model: Digest) -> None: ...

    async def open(self, session: SessionId, model: Digest, span: Span, reserve_tokens: int) -> None:
        """Admit a session at position 0. Raises `KvExhausted`, or `EngineError` for a span that is not hosted."""
        ...

    async def reserve(self, session: SessionId, reserve_tokens: int) -> None:
        """Grow a session's reservation; never shrinks it. Raises `KvExhausted`, leaving it as it was."""
        ...

    async def step(self, step: Step) -> Stepped:
        """Compute rows; the session's position becomes `position + count`.

        A step that draws its row may be asked for before the step before it is done. Raises `EngineError` when nothing
        follows that one, and leaves the session where it was.
        """
        ...

    async def rewind(self, session: SessionId, position: int) -> None:
        """Forget everything at and above `position`."""
        ...

    async def free(self, session: SessionId) -> None:
        """Free a session. Unknown sessions are fine."""
        ...

    async def close(self) -> None: ...
