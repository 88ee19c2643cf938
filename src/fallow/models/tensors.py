"""What tensors a model's files hold, and a zero-copy reader of them.

Files come from strangers: `open_tensors` maps a file read-only and returns views only when its tensors are exactly the
expected ones, in name, type and shape, and its scales, norms and biases are finite. Bytes are not hashed here; that is
the store's task. Little-endian hosts only, like the files.
"""

from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.model import ModelConfig, Quantisation
from fallow.models.safetensors_header import TensorEntry, read_header

BLOCK = 32
"""Elements along the input axis that share a scale."""
MAX_LAYER_HEADER_BYTES = 64 << 10

Tensors = dict[str, NDArray[Any]]


class Part(StrEnum):
    """The kinds of file."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    HEAD = "head"


class TensorSpec(msgspec.Struct, frozen=True):
    """Type and shape of a stored tensor. `dtype` is `F32` or `U8`."""

    dtype: str
    shape: tuple[int, ...]


def matrix_quantisation(quantisation: Quantisation, part: Part) -> Quantisation:
    """How the matrices of a part are stored: embedding and head stay 8-bit in a 4-bit model."""
    return Quantisation.Q8 if quantisation is Quantisation.Q4 and part is not Part.LAYER else quantisation


def expected_matrices(config: ModelConfig, part: Part) -> dict[str, tuple[int, int]]:
    """The matrices `[out, in]` of a part."""
    hidden, query = config.hidden_size, config.head_count * config.head_dim
    key_value = config.kv_head_count * config.head_dim
    if part is Part.EMBEDDING:
        return {"embedding": (config.vocab_size, hidden)}
    if part is Part.HEAD:
        return {} if config.tied_head else {"head": (config.vocab_size, hidden)}
    return {
        "qkv": (query + 2 * key_value, hidden),
        "attention_out": (hidden, query),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }


def expected_vectors(config: ModelConfig, part: Part) -> dict[str, int]:
    """The norms and biases of a part, always float32."""
    if part is Part.EMBEDDING:
        return {}
    if part is Part.HEAD:
        return {"final_norm": config.hidden_size}
    vectors = {"attention_norm": config.hidden_size, "mlp_norm": config.hidden_size}
    if config.qkv_bias:
        vectors["qkv_bias"] = (config.head_count + 2 * config.kv_head_count) * config.head_dim
    if config.qk_norm:
        vectors["q_norm"] = vectors["k_norm"] = config.head_dim
    return vectors


def expected_tensors(config: ModelConfig, quantisation: Quantisation, part: Part) -> dict[str, TensorSpec]:
    """Every tensor of a part's file, in file order: matrices (each followed by its scales), then vectors."""
    specs: dict[str, TensorSpec] = {}
    stored = matrix_quantisation(quantisation, part)
    for name, (rows, columns) in expected_matrices(config, part).items():
        if stored is Quantisation.F32:
            specs[name] = TensorSpec("F32", (rows, columns))
            continue
        block_bytes = BLOCK if stored is Quantisation.Q8 else BLOCK // 2
        specs[f"{name}.{stored}"] = TensorSpec("U8", (rows, columns // BLOCK, block_bytes))
        specs[f"{name}.scales"] = TensorSpec("F32", (rows, columns // BLOCK))
    for name, size in expected_vectors(config, part).items():
        specs[name] = TensorSpec("F32", (size,))
    return specs


def open_tensors(path: Path, config: ModelConfig, quantisation: Quantisation, part: Part) -> Tensors:
    """Memory-map a part's file: read-only views, nothing copied, valid for as long as any view lives.

    The data starts 64-byte aligned and every tensor is aligned to its element. Raises `ModelError` naming the tensor,
    what was expected and what came.
    """
    entries = read_header(path, MAX_LAYER_HEADER_BYTES)
    expected = expected_tensors(config, quantisation, part)
    for name in entries.keys() - expected.keys():
        raise ModelError(f"{path.name}: tensor {name[:120]!r}: not expected in a {part} file")
    for name, spec in expected.items():
        _check_entry(path.name, name, spec, entries.get(name))
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {name: _view(mapped, entries[name]) for name in expected}
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32:
            check_finite(f"{path.name}: tensor {name!r}", tensor)
    return tensors


def check_finite(what: str, values: NDArray[np.float32]) -> None:
    """Raise `ModelError` when any value is NaN or infinite. Allocates nothing: NaN and infinity survive min and max."""
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise ModelError(f"{what}: expected finite values, got NaN or infinity")


def _check_entry(file_name: str, name: str, spec: TensorSpec, entry: TensorEntry | None) -> None:
    wanted = f"{spec.dtype} {list(spec.shape)}"
    if entry is None:
        raise ModelError(f"{file_name}: tensor {name!r}: expected {wanted}, got nothing")
    if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
        raise ModelError(f"{file_name}: tensor {name!r}: expected {wanted}, got {entry.dtype} {list(entry.shape)}")
    if spec.dtype == "F32" and entry.start % 4:
        raise ModelError(f"{file_name}: tensor {name!r}: expected float32 aligned to 4 bytes, got offset {entry.start}")


def _view(mapped: NDArray[np.uint8], entry: TensorEntry) -> NDArray[Any]:
    raw = mapped[entry.start : entry.end]
    return (raw.view("<f4") if entry.dtype == "F32" else raw).reshape(entry.shape)
