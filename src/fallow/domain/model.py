"""What a model is: its shape, its files and the spans that it is cut into.

A manifest is everything that a device needs to know before it fetches a single weight: the architecture, where the
layers are, and the digest of every file and of every chunk of every file. Nothing in it is executable.
"""

from enum import StrEnum

import msgspec

from fallow.domain.ids import Digest, ModelName

MANIFEST_FORMAT = 1
BLOB_CHUNK_BYTES = 1 << 20
"""Unit of verified, resumable transfer."""


class Family(StrEnum):
    """Decoder families whose graphs the engine can build."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


class Quantisation(StrEnum):
    """How the matrices are stored. Norms and biases are always float32."""

    Q8 = "q8"
    """8-bit symmetric, blocks of 32 along the input axis, float32 scales, zero point 128."""
    Q4 = "q4"
    """4-bit symmetric, blocks of 32 along the input axis, float32 scales, zero point 8; embedding and head are q8."""
    F32 = "f32"


def held_bytes(file_bytes: int, quantisation: Quantisation) -> int:
    """What matrices take in memory once they are loaded, by the size of their file.

    The CPU kernels keep two more float32 for each block of 32 weights beside its codes and its scale. Measured on
    2.7 GB of weights (benchmarks/large.py): 1.24 of the file's size at 8 bits, 1.42 at 4 bits.
    """
    codes_bytes = {Quantisation.Q8: 32, Quantisation.Q4: 16, Quantisation.F32: None}[quantisation]
    return file_bytes if codes_bytes is None else file_bytes * (codes_bytes + 12) // (codes_bytes + 4)


class Llama3RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder. All sizes are element counts."""

    family: Family
    layer_count: int
    hidden_size: int
    head_count: int
    kv_head_count: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False


class Span(msgspec.Struct, frozen=True, order=True, gc=False):
    """Layers `first` to `last`, the last one not included (half-open, like `range`)."""

    first: int
    last: int

    @property
    def layer_count(self) -> int:
        return self.last - self.first

    def covers(self, other: "Span") -> bool:
        return self.first <= other.first and other.last <= self.last

    def __str__(self) -> str:
        return f"[{self.first},{self.last})"


CUT_GRID_PARTS = 12
"""Into how many parts, at most, a model can be cut."""


def cut_points(layer_count: int) -> tuple[int, ...]:
    """Where a model of so many layers may be cut: inner boundaries, ascending.

    The residual stream is rounded to the wire type at every one of them, wherever the cuts really are, so that how a
    model is spread over devices cannot change its answer. Rounding at every layer would cost 3 % of a decode step.
    """
    part = -(-layer_count // CUT_GRID_PARTS)
    return tuple(range(part, layer_count, part))


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the content-addressed store: whole digest, size, and one digest per `BLOB_CHUNK_BYTES`."""

    digest: Digest
    size_bytes: int
    chunk_digests: tuple[Digest, ...]


class RowBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What rows of one kind are like at a cut point (`policy/activations.py`). Float16 `[hidden]`, in base64."""

    centre: str
    spread: str
    reach: float
    energy_min: float
    energy_max: float


class CutBounds(msgspec.Struct, frozen=True, kw_only=True):
    """The kinds of rows that cross one cut point."""

    layer: int
    kinds: tuple[RowBounds, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A servable model. Encoded as canonical JSON; the digest of those bytes identifies the model.

    Tensors inside the files (safetensors; `[out, in]` row-major; q/k rows in half-split rotary order):

    - `layers[i]`: `attention_norm [H]`, `qkv [(heads+2*kv_heads)*head_dim, H]`, `qkv_bias`?, `q_norm`?, `k_norm`?,
      `attention_out [H, heads*head_dim]`, `mlp_norm [H]`, `gate_up [2*I, H]` (gate rows first), `down [H, I]`
    - `embedding`: `embedding [V, H]`
    - `head`: `final_norm [H]` and, when not tied, `head [V, H]`

    A matrix `m` of `[N, K]` is stored as `m` (float32 `[N, K]`) or as `m.q8` (uint8 `[N, K/32, 32]`) or `m.q4`
    (uint8 `[N, K/32, 16]`, low nibble first) with `m.scales` (float32 `[N, K/32]`): value = (q - zero) * scale.
    """

    format: int
    name: ModelName
    config: ModelConfig
    quantisation: Quantisation
    embedding: BlobRef
    layers: tuple[BlobRef, ...]
    head: BlobRef
    tokenizer: BlobRef
    """A `tokenizers` JSON file."""
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str] = {}
    """`bos_token`, `eos_token`, … as chat templates expect them."""
    licence: str | None = None
    source: str = ""
    """A file name and its SHA-256, for people; never a path or an address."""
    activations: tuple[CutBounds, ...] = ()
    """What hidden rows are like at each cut point, measured at import; none in manifests of earlier versions, whose
    bytes do not have the field."""


class StageSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one device hosts of a model: pieces of it, each one graph.

    A session runs through adjacent pieces, entering and leaving at their edges. The embedding belongs to layer 0 and
    the head to the last layer: a piece that starts at 0 takes tokens, one that ends at `layer_count` gives logits.
    """

    model: Digest
    pieces: tuple[Span, ...]
    """Ascending, not overlapping; adjacent ones join into one span."""

    @property
    def layer_count(self) -> int:
        return sum(piece.layer_count for piece in self.pieces)

    def spans(self) -> tuple[Span, ...]:
        """The maximal contiguous runs of pieces."""
        runs: list[Span] = []
        for piece in self.pieces:
            if runs and runs[-1].last == piece.first:
                runs[-1] = Span(runs[-1].first, piece.last)
            else:
                runs.append(piece)
        return tuple(runs)

    def pieces_of(self, span: Span) -> tuple[Span, ...] | None:
        """The pieces that make up exactly `span`, or `None` when its edges or its inside are not hosted."""
        chosen = tuple(piece for piece in self.pieces if span.covers(piece))
        joined = StageSpec(model=self.model, pieces=chosen).spans() if chosen else ()
        return chosen if joined == (span,) else None
