"""Builders for the model tests: the committed family fixtures, and GGUF files as llama.cpp makes them."""

import json
from pathlib import Path

import msgspec
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from fallow.domain.model import BlobRef, Family, Llama3RopeScaling, Manifest, ModelConfig, Quantisation
from fallow.models.huggingface_reader import HuggingFaceSource
from fallow.models.reference import SourceWeights
from fallow.models.rope_factors import llama3_factors

FIXTURES = Path(__file__).parents[2] / "fixtures" / "families"
FAMILIES = ("llama", "llama_rope", "mistral", "qwen2", "qwen3")

TINY = ModelConfig(
    family=Family.LLAMA, layer_count=2, hidden_size=32, head_count=2, kv_head_count=1, head_dim=16,
    intermediate_size=64, vocab_size=40, context_length=64, norm_epsilon=1e-5, rope_theta=10000.0,
)  # fmt: skip
LLAMA31 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)

NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "attention_out": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip
VECTORS = {
    "attention_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight", "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
}  # fmt: skip


def blob(letter: str, size_bytes: int = 10) -> BlobRef:
    digest = letter * 64
    return BlobRef(digest=digest, size_bytes=size_bytes, chunk_digests=(digest,) * -(-size_bytes // (1 << 20)))


def tiny_manifest(**changes) -> Manifest:
    manifest = Manifest(
        format=1, name="tiny", config=TINY, quantisation=Quantisation.Q8, embedding=blob("a"),
        layers=(blob("b"), blob("c")), head=blob("d"), tokenizer=blob("e"), chat_template=None, bos_token_id=0,
        eos_token_ids=(1,),
    )  # fmt: skip
    return msgspec.structs.replace(manifest, **changes)


def reference(family: str):
    return np.load(FIXTURES / family / "reference.npz")


def relative_error(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def round_trip(values, kind: GGMLQuantizationType):
    """What is left of values after storing them as `kind`."""
    return dequantize(quantize(np.ascontiguousarray(values), kind), kind).astype(np.float32).reshape(values.shape)


class RoundTripWeights(SourceWeights):
    """A fixture's weights as they would be after storing every matrix as `kind`."""

    def __init__(self, source, kind: GGMLQuantizationType) -> None:
        super().__init__(source)
        self._kind = kind

    def _matrix(self, role, layer=None):
        return round_trip(super()._matrix(role, layer), self._kind)


def permute(rows, heads: int):
    """llama.cpp's converter, `LlamaModel.permute`."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, family: str, kind: GGMLQuantizationType = GGMLQuantizationType.F32, edit=None) -> Path:
    """Convert a family fixture to GGUF. `edit(tensors, metadata)` may change both before they are written."""
    source = HuggingFaceSource(FIXTURES / family)
    config = source.config
    arch = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}[config.family]
    tensors = gguf_tensors(source, permuted=arch == "llama")
    metadata = gguf_metadata(config, arch) | tokenizer_metadata(FIXTURES / family)
    if config.rope_scaling is not None:
        factors = llama3_factors(config.rope_scaling, config.head_dim, config.rope_theta)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    if edit is not None:
        edit(tensors, metadata)
    return write_raw_gguf(path, arch, tensors, metadata, kind)


def write_raw_gguf(path: Path, arch: str, tensors, metadata, kind: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = {
            str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            list: writer.add_array,
        }[type(value)]  # fmt: skip
        add(key, value)
    for name, values in tensors.items():
        if isinstance(values, tuple):  # raw bytes of another type
            raw, raw_kind = values
            writer.add_tensor(name, raw, raw_dtype=raw_kind)
        elif values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(source, *, permuted: bool):
    config = source.config
    heads = {"q": config.head_count, "k": config.kv_head_count}
    matrix = lambda role, layer=None: source.tensor(role, layer).values(0, source.tensor(role, layer).shape[0])  # noqa: E731
    tensors = {"token_embd.weight": matrix("embedding"), "output_norm.weight": source.tensor("final_norm").vector()}
    if not config.tied_head:
        tensors["output.weight"] = matrix("head")
    for layer in range(config.layer_count):
        for role, name in NAMES.items():
            values = matrix(role, layer)
            tensors[f"blk.{layer}.{name}.weight"] = (
                permute(values, heads[role]) if permuted and role in heads else values
            )
        for role, name in VECTORS.items():
            if (role.endswith("_bias") and not config.qkv_bias) or (
                role in ("q_norm", "k_norm") and not config.qk_norm
            ):
                continue
            tensors[f"blk.{layer}.{name}"] = source.tensor(role, layer).vector()
    return tensors


def gguf_metadata(config: ModelConfig, arch: str):
    return {
        "general.name": "Tiny Model", "general.license": "apache-2.0",
        f"{arch}.block_count": config.layer_count, f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.hidden_size, f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.head_count, f"{arch}.attention.head_count_kv": config.kv_head_count,
        f"{arch}.attention.key_length": config.head_dim, f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_epsilon, f"{arch}.rope.freq_base": config.rope_theta,
    }  # fmt: skip


def tokenizer_metadata(folder: Path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 2,
    }  # fmt: skip
