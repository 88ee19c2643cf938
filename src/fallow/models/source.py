"""What an importer needs of a checkpoint, whatever its format: `WeightSource`, and tensors that are read row by row.

Readers (`gguf_reader.py`, `huggingface_reader.py`) answer for names, layouts and metadata; this module for turning
stored bytes into values. Data stays memory-mapped, so that a checkpoint larger than memory can be read.
"""

import math
from typing import Any, Protocol

import msgspec
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.model import ModelConfig
from fallow.models.tensors import check_finite

READABLE_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in (
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    )
)  # fmt: skip

QUERY_KEY_VALUE = ("q", "k", "v")
"""Roles of the projections that are stored as one `qkv`, in this order."""


class SourceTensor:
    """A tensor of a checkpoint: rows of bytes in a ggml type, possibly to be read in another order.

    `shape` is `[out, in]` or `[n]`; `raw` is uint8 `[out, bytes per row]`, usually memory-mapped.
    """

    def __init__(
        self,
        name: str,
        kind: GGMLQuantizationType,
        shape: tuple[int, ...],
        raw: NDArray[np.uint8],
        row_order: NDArray[np.intp] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.shape = shape
        self._raw = raw
        self._row_order = row_order

    def reordered(self, row_order: NDArray[np.intp]) -> "SourceTensor":
        """The same tensor with its rows read in this order."""
        return SourceTensor(self.name, self.kind, self.shape, self._raw, row_order)

    def raw_rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """Stored bytes of rows, `[last - first, bytes per row]`."""
        if self._row_order is None:
            return np.ascontiguousarray(self._raw[first:last])
        return np.ascontiguousarray(self._raw[self._row_order[first:last]])

    def values(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows as float32 `[last - first, in]`. Raises `ModelError` for NaN and infinity."""
        raw = self.raw_rows(first, last)
        if self.kind is GGMLQuantizationType.F32:
            values = raw.view("<f4")
        elif self.kind is GGMLQuantizationType.F16:
            values = raw.view("<f2").astype(np.float32)
        elif self.kind is GGMLQuantizationType.BF16:
            values = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            with np.errstate(all="ignore"):  # hostile scales overflow; the check below names the tensor
                values = dequantize(raw, self.kind)
        result: NDArray[np.float32] = np.asarray(values, dtype=np.float32).reshape(last - first, -1)
        check_finite(f"tensor {self.name!r}", result)
        return result

    def vector(self) -> NDArray[np.float32]:
        """All of a one-dimensional tensor, float32 `[n]`."""
        one_row = SourceTensor(self.name, self.kind, self.shape, self._raw.reshape(1, -1))
        flat: NDArray[np.float32] = one_row.values(0, 1)[0]
        return flat if self._row_order is None else flat[self._row_order]


def tensor_from_bytes(
    name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], raw: NDArray[np.uint8]
) -> SourceTensor:
    """Wrap flat bytes whose length the reader has checked with `stored_bytes`."""
    rows = shape[0] if len(shape) > 1 else 1
    return SourceTensor(name, kind, shape, raw.reshape(rows, -1))


def stored_bytes(name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes. Raises `ModelError` for a type that is not read here, or rows of broken blocks."""
    if kind not in READABLE_TYPES:
        raise ModelError(f"tensor {name[:120]!r} is stored as {kind.name}, which Fallow does not read")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not 1 <= len(shape) <= 2 or min(shape) < 1 or shape[-1] % block:
        raise ModelError(f"tensor {name[:120]!r}: {kind.name} cannot have the shape {list(shape)}")
    return math.prod(shape) // block * int(block_bytes)


class SourceDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a checkpoint that is not a weight; fields as in `Manifest`."""

    name: str
    tokenizer_json: bytes
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    licence: str | None
    source: str
    notes: tuple[str, ...] = ()
    """What a person should know about what was changed or limited on import."""


class WeightSource(Protocol):
    """An open checkpoint."""

    @property
    def config(self) -> ModelConfig: ...

    def details(self) -> SourceDetails:
        """Metadata; may take a while, because it hashes the files."""
        ...

    def tensor(self, role: str, layer: int | None = None) -> SourceTensor:
        """The tensor of a role, in Fallow's layout and with the shape that the config implies.

        Roles: `embedding`, `final_norm`, `head`, and with a layer `attention_norm`, `q`, `k`, `v`, `q_bias`, `k_bias`,
        `v_bias`, `q_norm`, `k_norm`, `attention_out`, `mlp_norm`, `gate`, `up`, `down`. Raises `ModelError`.
        """
        ...


def role_shape(config: ModelConfig, role: str) -> tuple[int, ...]:
    """The shape that a role's tensor must have."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab_size, hidden), "head": (config.vocab_size, hidden), "final_norm": (hidden,),
        "attention_norm": (hidden,), "mlp_norm": (hidden,), "q": (query, hidden), "k": (key_value, hidden),
        "v": (key_value, hidden), "q_bias": (query,), "k_bias": (key_value,), "v_bias": (key_value,),
        "q_norm": (config.head_dim,), "k_norm": (config.head_dim,), "attention_out": (hidden, query),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    return shapes[role]


def layer_roles(config: ModelConfig) -> tuple[str, ...]:
    """The roles of one layer."""
    biases = tuple(f"{role}_bias" for role in QUERY_KEY_VALUE) if config.qkv_bias else ()
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    return (
        "attention_norm", *QUERY_KEY_VALUE, *biases, *norms, "attention_out", "mlp_norm", "gate", "up", "down",
    )  # fmt: skip


def check_shape(config: ModelConfig, role: str, tensor: SourceTensor) -> SourceTensor:
    """Raise `ModelError` when a tensor's shape is not what the config implies."""
    expected = role_shape(config, role)
    if tensor.shape != expected:
        raise ModelError(f"tensor {tensor.name!r}: expected shape {list(expected)}, got {list(tensor.shape)}")
    return tensor


def text_or_none(value: Any) -> str | None:
    """A string that says something, or `None`."""
    return value if isinstance(value, str) and value.strip() else None
