"""A model's pieces on this device, and calls through runs of them. It knows slots and positions, not sessions.

Rules
- A slot is the same in every piece. `lengths[slot]` is how many tokens of it are valid.
- A decode call runs piece by piece, in windows of neighbouring slots; sessions enter and leave at piece edges. A pad
  writes at its own slot's next position, never below its length, so it cannot hurt the session that owns the slot.
- A row that is not finite is that row's fault alone.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import EngineError
from fallow.domain.fleet import Speed
from fallow.domain.model import Manifest, Quantisation, Span, StageSpec, cut_points, held_bytes
from fallow.engine.canary import fingerprint
from fallow.engine.graph import wire_dtype
from fallow.engine.kv import Slots, slot_length
from fallow.engine.piece import Head, Piece, PieceShape, Workspace
from fallow.engine.replay import can_map
from fallow.engine.settings import EngineSettings
from fallow.engine.weights import Embedding, Files, kv_bytes_per_token, piece_weights
from fallow.policy.batching import Swap, Window, decode_windows, plan_swap, waste
from fallow.policy.decode_teams import DecodeTeams

SPEED_BATCHES = (1, 4, 8)
SPEED_POSITION = 128
"""Context at which the speed is measured."""
SPEED_CALLS = 2
"""Timed calls per batch size; the fastest counts, since others use the processor too."""

Array = NDArray[Any]


class DecodeRow(msgspec.Struct):
    """One row of a session in a decode call: `x [H]` in the wire type goes in."""

    slot: int
    span: Span
    x: Array


class HostedModel:
    """The pieces of one model, its embedding and its head."""

    def __init__(self, manifest: Manifest, settings: EngineSettings, *, replays: bool) -> None:
        self.manifest = manifest
        self.config = manifest.config
        self.wire = wire_dtype(manifest.quantisation)
        self.pieces: tuple[Piece, ...] = ()
        self.embedding: Embedding | None = None
        self.head: Head | None = None
        self.max_len = slot_length(self.config.context_length, settings.max_session_tokens)
        self.max_tokens = min(self.config.context_length, settings.max_session_tokens)
        self.slots = Slots(settings.slots_max)
        self.teams = DecodeTeams()
        self.lengths = np.zeros(settings.slots_max, np.int64)
        self.replays = replays and can_map(self.config.kv_head_count, self.config.head_dim, settings.threads)
        """Whether `replay` can be used; decode rows of one session are computed one by one otherwise."""
        self._settings = settings
        self._shape = PieceShape(
            config=self.config,
            quantisation=manifest.quantisation,
            slots=settings.slots_max + 1,  # the last one is `ask`'s
            max_len=self.max_len,
            threads=settings.threads,
        )
        self._workspace = Workspace(self.config, manifest.quantisation, settings.slots_max)
        self._rows = np.zeros((settings.slots_max, self.config.hidden_size), self.wire)
        self._final = np.zeros((settings.slots_max, self.config.hidden_size), np.float32)
        self._layers = 1
        self._wasted = 0.0
        """What decode calls have cost too much since the last swap, in calls of one row over all hosted layers."""
        self._piece_speed: dict[Span, tuple[float, ...]] = {}
        self.speed = Speed(layer_s_1=0.0, layer_s_4=0.0, layer_s_8=0.0)
        """Seconds a layer for calls of 1, 4 and 8 decode rows, over all pieces. The head is not counted."""

    # --- what is hosted -------------------------------------------------------------------------

    @property
    def stage_pieces(self) -> tuple[Span, ...]:
        return tuple(piece.span for piece in self.pieces)

    @property
    def weights_bytes(self) -> int:
        """What the weights take in memory; an embedding's file is only mapped, and few of its rows are ever touched."""
        kind = self.manifest.quantisation
        layers = sum(size for piece in self.pieces for size in piece.sizes_bytes.values())
        head = sum(self.head.sizes_bytes.values()) if self.head is not None else 0
        head_kind = Quantisation.Q8 if kind is Quantisation.Q4 else kind
        return held_bytes(layers, kind) + held_bytes(head, head_kind)

    def kv_bytes_per_token(self, span: Span) -> int:
        return kv_bytes_per_token(self.config, span.layer_count)

    def prepare(self, stage: StageSpec, files: Files) -> "Prepared":
        """Build what is missing of a stage, leaving what is hosted untouched. Raises `ModelError`, `EngineError`."""
        check_pieces(stage, self.config.layer_count)
        kept = {piece.span: piece for piece in self.pieces}
        pieces = [kept.get(span) or self._build(span, files) for span in stage.pieces]
        takes_tokens, has_head = stage.pieces[0].first == 0, stage.pieces[-1].last == self.config.layer_count
        head = (self.head or Head(self.manifest, files, self._settings.threads)) if has_head else None
        embedding = (self.embedding or Embedding(files, self.manifest)) if takes_tokens else None
        return Prepared(pieces=tuple(pieces), head=head, embedding=embedding)

    def commit(self, prepared: "Prepared") -> None:
        """Host what was prepared; whatever is not part of it goes."""
        self.end_replay()
        self.pieces, self.head, self.embedding = prepared.pieces, prepared.head, prepared.embedding
        hosted = set(self.stage_pieces)
        self._layers = sum(span.layer_count for span in hosted)
        self._piece_speed = {span: times for span, times in self._piece_speed.items() if span in hosted}
        layers = self._layers or 1
        one, four, eight = (sum(times[i] for times in self._piece_speed.values()) / layers for i in range(3))
        self.speed = Speed(layer_s_1=one, layer_s_4=four, layer_s_8=eight)

    def pieces_of(self, span: Span) -> tuple[Piece, ...]:
        """The hosted pieces that make up `span`; empty when they do not."""
        chosen = tuple(piece for piece in self.pieces if span.covers(piece.span))
        contiguous = all(one.span.last == other.span.first for one, other in pairwise(chosen))
        fits = chosen and contiguous and chosen[0].span.first == span.first and chosen[-1].span.last == span.last
        return chosen if fits else ()

    def _build(self, span: Span, files: Files) -> Piece:
        piece = Piece(self._shape, span, piece_weights(files, self.manifest, span, self.max_len), self._workspace)
        self._piece_speed[span] = self._measure(piece)
        return piece

    def _measure(self, piece: Piece) -> tuple[float, ...]:
        """Time a new piece. Its cache is empty, so writing anywhere in it is harmless; the memory is given back."""
        position = min(SPEED_POSITION, self.max_len // 2)
        times = []
        for batch in SPEED_BATCHES:
            rows = min(batch, self._settings.slots_max)
            self._workspace.decode_at(np.full(rows, position, np.int64))
            piece.run(0, rows, 1)
            times.append(min(_timed(piece, rows) for _ in range(SPEED_CALLS)))
        for slot in range(min(SPEED_BATCHES[-1], self._settings.slots_max)):
            piece.release(slot)
        return tuple(times)

    # --- slots ----------------------------------------------------------------------------------

    def take_slot(self) -> int:
        """Raises `KvExhausted`."""
        slot = self.slots.take()
        self.lengths[slot] = 0
        return slot

    def give_slot(self, slot: int) -> None:
        self.lengths[slot] = 0
        self.slots.give(slot)
        self._release(slot)

    def _release(self, slot: int) -> None:
        for piece in self.pieces:
            piece.release(slot)

    # --- calls ----------------------------------------------------------------------------------

    def decode(self, rows: Sequence[DecodeRow]) -> list[Array | None]:
        """One row for each of these sessions, each at its slot's length. Returns what leaves each span: `[H]` in the
        wire type, float32 after the last layer, or `None` for a row that is not finite. Lengths are not changed.
        """
        hidden = self._rows
        for row in rows:
            hidden[row.slot] = row.x
        for piece in self.pieces:
            slots = sorted(row.slot for row in rows if row.span.covers(piece.span))
            if slots:
                windows = decode_windows(slots, len(self.lengths))
                if len(windows) > 1 or windows[0].count > len(slots):
                    self._wasted += waste(slots, windows) * piece.span.layer_count / self._layers
                for window in windows:
                    self._decode_window(piece, window, slots)
        return self._leaving(rows)

    def compact(self, slots: Sequence[int]) -> Swap | None:
        """Move one of the sessions in `slots`, which decode together, next to the others, if that pays by now.

        The caller has to exchange the slots of the sessions that were in them.
        """
        swap = plan_swap(sorted(slots), self.lengths.tolist(), self._wasted) if self._wasted else None
        if swap is None:
            return None
        one, other = swap.one, swap.other
        for piece in self.pieces:
            piece.swap(one, int(self.lengths[one]), other, int(self.lengths[other]))
        self.lengths[[one, other]] = self.lengths[[other, one]]
        self.slots.exchange(one, other)
        self._wasted = 0.0
        for slot in (one, other):
            if self.lengths[slot] == 0:
                self._release(slot)
        return swap

    def _decode_window(self, piece: Piece, window: Window, slots: Sequence[int]) -> None:
        first, count, space = window.first, window.count, self._workspace
        end = first + count
        space.x[:count] = self._rows[first:end]
        space.decode_at(self.lengths[first:end])
        piece.run(first, count, 1)
        target = self._final if piece.is_last else self._rows
        inside = [slot for slot in slots if first <= slot < end]
        if len(inside) == count:
            target[first:end] = piece.output[:count]
        else:  # a pad's slot may belong to a session that only enters at a later piece
            for slot in inside:
                target[slot] = piece.output[slot - first]

    def _leaving(self, rows: Sequence[DecodeRow]) -> list[Array | None]:
        final = [row.span.last == self.config.layer_count for row in rows]
        if len(set(final)) == 1:  # mostly they leave together, and are looked at together
            leaving = (self._final if final[0] else self._rows)[[row.slot for row in rows]]
            if finite_rows(leaving):
                return list(leaving)
        taken = [(self._final if last else self._rows)[row.slot].copy() for row, last in zip(rows, final, strict=True)]
        return [row if finite_rows(row) else None for row in taken]

    def prefill(self, slot: int, span: Span, x: Array) -> Array | None:
        """Rows `[N, H]` of one session from its slot's length on; a lone row is computed like one among others.

        Returns `[N, H]` as `decode` does, valid until the next call, or `None` when a row is not finite.
        """
        space, count = self._workspace, len(x)
        rows = max(count, 2)
        space.x[:count] = x
        space.x[count:rows] = 0
        space.prefill_at(int(self.lengths[slot]), rows)
        output = space.y
        for piece in self.pieces_of(span):
            if output is not space.y or piece.span.first != span.first:
                space.x[:rows] = output[:rows]
            piece.run(slot, 1, rows)
            output = piece.output
        leaving = output[:count]
        return leaving if finite_rows(leaving) else None

    def replay(self, slot: int, span: Span, x: Array) -> Array | None:
        """Decode rows `[N, H]` of one session, together (`replay.py`). Results as of `prefill`."""
        leaving = x
        for piece in self.pieces_of(span):
            leaving = piece.replay(slot, int(self.lengths[slot]), leaving)
        return leaving if finite_rows(leaving) else None

    def ask(self, piece: Piece, rows: NDArray[np.float32]) -> tuple[Array, bytes]:
        """Rows `[N, H]` through one piece, from position 0 of a slot that no session has: what leaves, and the
        fingerprint of it and of the cache. The piece need not be hosted yet."""
        slot, count, space = len(self.lengths), len(rows), self._workspace
        space.x[:count] = rows
        space.prefill_at(0, count)
        piece.run(slot, 1, count)
        leaving = piece.output[:count].copy()
        return leaving, fingerprint(leaving, piece.kept(slot, count))

    def end_replay(self) -> None:
        """No rebuild is under way any more, or other work comes between: give back what it needed. Idempotent."""
        for piece in self.pieces:
            piece.end_replay()


class Prepared(msgspec.Struct, frozen=True):
    """A stage that is built but not hosted yet."""

    pieces: tuple[Piece, ...]
    head: Head | None
    embedding: Embedding | None


def check_pieces(stage: StageSpec, layer_count: int) -> None:
    """Raise `EngineError` unless the pieces are ascending, inside the model, and end at its cut points."""
    if not stage.pieces:
        raise EngineError("a stage needs at least one piece")
    edges = {0, layer_count, *cut_points(layer_count)}
    end = 0
    for piece in stage.pieces:
        if not (end <= piece.first < piece.last <= layer_count):
            raise EngineError(f"piece {piece} is empty, overlaps another or is not inside {layer_count} layers")
        if piece.first not in edges or piece.last not in edges:
            raise EngineError(f"piece {piece} does not end at cut points: {', '.join(map(str, sorted(edges)))}")
        end = piece.last


def finite_rows(rows: Array) -> bool:
    """Whether every value is a number."""
    if rows.dtype == np.float16:  # numpy has no fast path for float16: look at the exponents
        return int((rows.view(np.uint16) & 0x7C00).max()) != 0x7C00
    return bool(np.isfinite(rows).all())


def _timed(piece: Piece, rows: int) -> float:
    started_s = time.perf_counter()
    piece.run(0, rows, 1)
    return time.perf_counter() - started_s
