"""One graph with its weights, its KV cache and its bindings: rows of neighbouring slots in, rows out.

Rules
- All inputs and outputs are bound once per window to fixed memory (`Workspace`), so that a decode call binds nothing.
- The keys and values that a call appends go straight into the cache: past and present are bound to the same address.
- A batch has one row a session, or one session has two rows or more; the kernel refuses the rest.

It knows slots and positions, not sessions, and checks nothing: its caller has.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fallow.domain.errors import EngineError
from fallow.domain.model import Manifest, ModelConfig, Quantisation, Span
from fallow.engine.contract import PREFILL_CHUNK_ROWS
from fallow.engine.graph import Graph, head_graph, piece_graph, wire_dtype
from fallow.engine.kv import LayerCache
from fallow.engine.replay import IMAGES, Room
from fallow.engine.rescore import Rescorer
from fallow.engine.weights import Files, Weights, head_weights

os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] = "1"
"""The runtime's blockwise attention computes rows in plain C++; without it they go through its matrix kernels, which
take half the time (`docs/adr/0004-attention-kernel.md`). It reads this when a session is made."""

BINDINGS_MAX = 128
"""Windows whose bindings a piece keeps; making one costs about 40 µs a layer."""
HEAD_ROWS_MAX = 16
"""Rows of one call of the head: bounds the memory of logits over large vocabularies."""

Array = NDArray[Any]


class Workspace:
    """The memory that all calls of a model's pieces share. Sizes: `rows` rows or slots, whichever is more."""

    def __init__(self, config: ModelConfig, quantisation: Quantisation, slots: int) -> None:
        hidden = config.hidden_size
        rows = max(PREFILL_CHUNK_ROWS, slots)
        self.x: Array = np.zeros((rows, hidden), wire_dtype(quantisation))
        self.y: Array = np.zeros_like(self.x)
        self.final = np.zeros((rows, hidden), np.float32)
        self.positions = np.zeros(rows, np.int64)
        self.lengths = np.zeros(rows, np.int32)
        self.longest = np.zeros(1, np.int32)

    def decode_at(self, positions: NDArray[np.int64]) -> None:
        """Set the inputs for one row a slot, at these positions `[B]`."""
        count = len(positions)
        self.positions[:count] = positions
        self.lengths[:count] = positions
        self.longest[0] = positions.max() + 2

    def prefill_at(self, position: int, rows: int) -> None:
        """Set the inputs for `rows` rows of one slot from `position` on."""
        self.positions[:rows] = np.arange(position, position + rows)
        self.lengths[0] = position + rows - 1
        self.longest[0] = position + rows + 1


class PieceShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the pieces of a model have in common."""

    config: ModelConfig
    quantisation: Quantisation
    slots: int
    max_len: int
    threads: int


class Piece:
    """Layers of a model, ready to run."""

    def __init__(self, shape: "PieceShape", span: Span, weights: Weights, workspace: Workspace) -> None:
        """Raises `EngineError` when the runtime cannot build it."""
        config = shape.config
        self.span = span
        self.sizes_bytes = weights.sizes_bytes
        graph = piece_graph(config, shape.quantisation, span, shape.max_len)
        self.is_last = span.last == config.layer_count
        self._workspace = workspace
        self._session = _session(graph, weights, shape.threads)
        self.weights = weights
        self._caches = {
            layer: LayerCache(shape.slots, config.kv_head_count, shape.max_len, config.head_dim)
            for layer in range(span.first, span.last)
        }
        self._bindings: OrderedDict[tuple[int, int, int], ort.IOBinding] = OrderedDict()
        self._room: Room | None = None

    @property
    def output(self) -> Array:
        """Where `run` leaves its rows `[rows, H]`: wire type, or float32 after the last layer."""
        return self._workspace.final if self.is_last else self._workspace.y

    def run(self, first_slot: int, batch: int, rows: int) -> None:
        """Compute `workspace.x[:batch * rows]`: `rows` rows for each of `batch` neighbouring slots."""
        key = (first_slot, batch, rows)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._bind(self._windows(first_slot, batch), batch, rows)
            if len(self._bindings) > BINDINGS_MAX:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        self._session.run_with_iobinding(binding)

    def replay(self, slot: int, length: int, x: Array) -> Array:
        """Decode rows `x [N, H]` of one session from position `length` on, `IMAGES` a call (`replay.py`).

        Returns what leaves the piece, `[N, H]`. Raises `EngineError`.
        """
        end = length + len(x)
        room = self._replay_room(end)
        space, leaving = self._workspace, np.empty((len(x), x.shape[1]), self.output.dtype)
        room.load(slot, length)
        for start in range(0, len(x), IMAGES):
            rows = x[start : start + IMAGES]
            count = len(rows)
            space.x[:count] = rows
            space.decode_at(np.arange(length + start, length + start + count))
            windows = {name: images[:count] for name, images in room.images.items()}
            self._session.run_with_iobinding(self._bind(windows, count, 1))
            leaving[start : start + count] = self.output[:count]
        room.keep(slot, length, end)
        return leaving

    def _replay_room(self, tokens: int) -> Room:
        """The room of the rebuild that is under way; a larger one when it has grown out of it."""
        if self._room is None or self._room.capacity < tokens:
            self.end_replay()
            self._room = Room(self._arrays(), tokens)
        return self._room

    def end_replay(self) -> None:
        """Give back what `replay` needed. Idempotent."""
        if self._room is not None:
            self._room.close()
            self._room = None

    def kept(self, slot: int, tokens: int) -> Iterator[NDArray[np.float32]]:
        """What the first tokens of a slot left in the cache, layer after layer."""
        return (array[slot, :, :tokens] for array in self._arrays().values())

    def release(self, slot: int) -> None:
        """Give back the memory of a slot that holds nothing any more."""
        for cache in self._caches.values():
            cache.release(slot)

    def swap(self, one: int, one_length: int, other: int, other_length: int) -> None:
        for cache in self._caches.values():
            cache.swap(one, one_length, other, other_length)

    def _arrays(self) -> dict[str, NDArray[np.float32]]:
        """The cache of all slots, by input name."""
        return {
            f"{kind}{layer}": array
            for layer, cache in self._caches.items()
            for kind, array in zip("kv", cache.arrays(), strict=True)
        }

    def _windows(self, first_slot: int, batch: int) -> dict[str, Array]:
        """The cache of neighbouring slots, by input name."""
        return {name: array[first_slot : first_slot + batch] for name, array in self._arrays().items()}

    def _bind(self, windows: dict[str, Array], batch: int, rows: int) -> ort.IOBinding:
        space, count = self._workspace, batch * rows
        hidden = space.x.shape[1]
        binding = self._session.io_binding()
        _bind_input(binding, "x", space.x[:count].reshape(batch, rows, hidden))
        _bind_input(binding, "positions", space.positions[:count].reshape(batch, rows))
        _bind_input(binding, "lengths", space.lengths[:batch])
        _bind_input(binding, "longest", space.longest)
        _bind_output(binding, "y", self.output[:count].reshape(batch, rows, hidden))
        for name, window in windows.items():
            _bind_input(binding, name, window)
            _bind_output(binding, f"{name}_out", window)
        return binding


class Head:
    """Final norm and output matrix, a session of its own, so that rows without logits never pay for it."""

    def __init__(self, manifest: Manifest, files: Files, threads: int) -> None:
        weights = head_weights(files, manifest)
        self.sizes_bytes = weights.sizes_bytes
        self._session = _session(head_graph(manifest.config, manifest.quantisation), weights, threads)
        self.weights = weights
        self._rows = np.zeros((HEAD_ROWS_MAX, manifest.config.hidden_size), np.float32)
        self._normed = np.zeros_like(self._rows)
        self._logits = np.zeros((HEAD_ROWS_MAX, manifest.config.vocab_size), np.float32)
        codes = weights.arrays.get("head.q")
        self._rescorer = None if codes is None else Rescorer(codes, weights.arrays["head.scales"])
        self._bindings = [self._bind(count) for count in range(1, HEAD_ROWS_MAX + 1)]

    def logits(self, final: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Logits `[R, V]` of at most `HEAD_ROWS_MAX` rows `[H]`; the caller's to overwrite until the next call."""
        count = len(final)
        for index, row in enumerate(final):
            self._rows[index] = row
        self._session.run_with_iobinding(self._bindings[count - 1])
        logits = self._logits[:count]
        if self._rescorer is not None:
            for row, normed in zip(logits, self._normed, strict=False):
                self._rescorer.rescore(row, normed)
        return logits

    def _bind(self, count: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        _bind_input(binding, "x", self._rows[:count])
        _bind_output(binding, "logits", self._logits[:count])
        _bind_output(binding, "normed", self._normed[:count])
        return binding


def _session(graph: Graph, weights: Weights, threads: int) -> ort.InferenceSession:
    """A session over mapped weights. Raises `EngineError` with the runtime's reason."""
    names = list(graph.initialisers)
    for name, (dtype, shape) in graph.initialisers.items():
        array = weights.arrays[name]
        if array.dtype != dtype or array.shape != shape:
            raise EngineError(f"tensor {name}: expected {dtype} {shape}, got {array.dtype} {array.shape}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_external_initializers(names, [ort.OrtValue.ortvalue_from_numpy(weights.arrays[name]) for name in names])
    try:
        session = ort.InferenceSession(graph.serialised(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base
        raise EngineError(f"ONNX Runtime cannot build the stage: {error}") from error
    weights.release_pages()
    return session


def _bind_input(binding: ort.IOBinding, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
