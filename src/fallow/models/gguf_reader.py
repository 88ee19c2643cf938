"""A GGUF file as a `WeightSource`: metadata keys to a config, tensor names to roles, layouts to Fallow's.

What differs from Hugging Face's layout, after llama.cpp's converter:
- Arch `llama` (Llama, Mistral, SmolLM …) stores query and key rows permuted for interleaved rotary embedding; they are
  put back in half-split order. Arch `qwen2` and `qwen3` are not permuted.
- Llama 3 rope scaling is the result, one factor per frequency in `rope_freqs.weight`; `rope_factors.py` recovers it.
- A tied head is the absence of `output.weight`.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fallow.domain.errors import ModelError
from fallow.domain.model import Family, Llama3RopeScaling, ModelConfig
from fallow.models.gguf_file import GgufFile, GgufTensor, open_gguf
from fallow.models.gguf_tokenizer import end_of_generation_ids, special_token_texts, token_id, tokenizer_json_from_gguf
from fallow.models.manifest import check_config
from fallow.models.rope_factors import recover_llama3_scaling
from fallow.models.source import (
    SourceDetails,
    SourceTensor,
    check_shape,
    layer_roles,
    tensor_from_bytes,
    text_or_none,
)

FAMILIES = {"llama": Family.LLAMA, "qwen2": Family.QWEN2, "qwen3": Family.QWEN3}
ROPE_FACTORS = "rope_freqs.weight"

_MODEL_NAMES = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_LAYER_NAMES = {
    "attention_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight", "attention_out": "attn_output.weight", "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
}  # fmt: skip


class GgufSource:
    """An open GGUF file. Raises `ModelError` on construction for architectures and tensors that are not served."""

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self._notes: list[str] = []
        self._config = self._read_config()
        check_config(self._config)
        self._check_names()

    @property
    def config(self) -> ModelConfig:
        return self._config

    def details(self) -> SourceDetails:
        metadata, path = self._file.metadata, self._file.path
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SourceDetails(
            name=text_or_none(metadata.get("general.name")) or path.stem,
            tokenizer_json=tokenizer_json_from_gguf(metadata),
            chat_template=text_or_none(metadata.get("tokenizer.chat_template")),
            bos_token_id=token_id(metadata, "bos"),
            eos_token_ids=end_of_generation_ids(metadata),
            special_tokens=special_token_texts(metadata),
            licence=text_or_none(metadata.get("general.license")),
            source=f"{path.name} sha256:{digest}",
            notes=tuple(self._notes),
        )

    def tensor(self, role: str, layer: int | None = None) -> SourceTensor:
        name = _MODEL_NAMES[role] if layer is None else f"blk.{layer}.{_LAYER_NAMES[role]}"
        entry = self._file.tensors.get(name)
        if entry is None:
            raise ModelError(f"{self._file.path.name}: expected a tensor {name!r}, got none")
        tensor = check_shape(self._config, role, self._wrap(entry))
        if self._architecture == "llama" and role in ("q", "k", "q_bias", "k_bias"):
            heads = self._config.head_count if role.startswith("q") else self._config.kv_head_count
            return tensor.reordered(half_split_order(heads, self._config.head_dim))
        return tensor

    @property
    def _architecture(self) -> str:
        return str(self._file.metadata.get("general.architecture"))

    def _wrap(self, entry: GgufTensor) -> SourceTensor:
        return tensor_from_bytes(entry.name, entry.kind, entry.shape, self._file.mapped[entry.start : entry.end])

    # --- configuration --------------------------------------------------------------------------

    def _read_config(self) -> ModelConfig:
        family = FAMILIES.get(self._architecture)
        if family is None:
            raise ModelError(
                f"{self._file.path.name}: architecture {self._architecture[:60]!r} is not served; "
                f"expected one of {', '.join(FAMILIES)}"
            )
        if self._number("expert_count", int, 0):
            raise ModelError(f"{self._file.path.name}: mixture-of-experts models are not served")
        hidden, heads = self._number("embedding_length", int), self._number("attention.head_count", int)
        head_dim = self._number("attention.key_length", int, hidden // max(heads, 1))
        self._check_rope(head_dim)
        theta = self._number("rope.freq_base", float, 10000.0)
        tensors = self._file.tensors
        return ModelConfig(
            family=family,
            layer_count=self._number("block_count", int),
            hidden_size=hidden,
            head_count=heads,
            kv_head_count=self._number("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            intermediate_size=self._number("feed_forward_length", int),
            vocab_size=self._vocab_size(),
            context_length=self._context_length(),
            norm_epsilon=self._number("attention.layer_norm_rms_epsilon", float),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(head_dim, theta),
            qkv_bias="blk.0.attn_q.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            tied_head="output.weight" not in tensors,
        )

    def _number(self, key: str, kind: type[Any], default: Any = None) -> Any:
        full = f"{self._architecture}.{key}"
        value = self._file.metadata.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
            raise ModelError(f"{self._file.path.name}: metadata {full!r}: expected one number, got {str(value)[:60]!r}")
        return kind(value)

    def _vocab_size(self) -> int:
        entry = self._file.tensors.get("token_embd.weight")
        if entry is None or len(entry.shape) != 2:
            raise ModelError(f"{self._file.path.name}: expected a matrix 'token_embd.weight'")
        return entry.shape[0]

    def _context_length(self) -> int:
        length = self._number("context_length", int)
        window = self._number("attention.sliding_window", int, 0)
        if 0 < window < length:
            self._notes.append(f"context limited from {length} to its sliding window of {window} tokens")
            return int(window)
        return int(length)

    def _check_rope(self, head_dim: int) -> None:
        kind = self._file.metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        if kind != "none":
            raise ModelError(f"{self._file.path.name}: rope scaling {str(kind)[:40]!r} is not served")
        rotated = self._number("rope.dimension_count", int, head_dim)
        value_dim = self._number("attention.value_length", int, head_dim)
        if (rotated, value_dim) != (head_dim, head_dim):
            raise ModelError(
                f"{self._file.path.name}: expected {head_dim} rotated dimensions and values per head, "
                f"got {rotated} and {value_dim}"
            )

    def _rope_scaling(self, head_dim: int, theta: float) -> Llama3RopeScaling | None:
        entry = self._file.tensors.get(ROPE_FACTORS)
        if entry is None:
            return None
        factors = self._wrap(entry).vector()
        if factors.shape != (head_dim // 2,):
            raise ModelError(f"tensor {ROPE_FACTORS!r}: expected shape [{head_dim // 2}], got {list(factors.shape)}")
        return recover_llama3_scaling(factors, theta)

    def _check_names(self) -> None:
        """Refuse tensors that nobody would read: leaving one out would change the model silently."""
        known = {*_MODEL_NAMES.values(), ROPE_FACTORS}
        layer_names = {_LAYER_NAMES[role] for role in layer_roles(self._config)}
        for name in _unknown(self._file, known, layer_names, self._config.layer_count):
            raise ModelError(
                f"{self._file.path.name}: tensor {name[:120]!r} is not part of a {self._architecture} model"
            )


def half_split_order(heads: int, head_dim: int) -> "np.ndarray[Any, np.dtype[np.intp]]":
    """Where each half-split row lies among interleaved rows: the inverse of llama.cpp's `permute`."""
    order = np.arange(heads * head_dim, dtype=np.intp).reshape(heads, head_dim // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def _unknown(file: GgufFile, known: set[str], layer_names: set[str], layer_count: int) -> Iterable[str]:
    for name in file.tensors:
        match = re.fullmatch(r"blk\.(\d{1,4})\.(.+)", name)
        if name not in known and not (match and int(match[1]) < layer_count and match[2] in layer_names):
            yield name
