"""GGUF files: every type and family gives the logits of its dequantised weights; files that lie are refused by name."""

import struct

import numpy as np
import pytest
from checkpoints import (
    FIXTURES,
    RoundTripWeights,
    gguf_metadata,
    permute,
    reference,
    relative_error,
    tokenizer_metadata,
    write_gguf,
    write_raw_gguf,
)
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import ModelError
from fallow.domain.model import Family, Llama3RopeScaling, ModelConfig, Quantisation
from fallow.models.gguf_reader import GgufSource, half_split_order
from fallow.models.huggingface_reader import HuggingFaceSource
from fallow.models.importer import import_model, import_source
from fallow.models.reference import ReferenceModel, SourceWeights, StoredWeights
from fallow.models.rope_factors import llama3_factors, recover_llama3_scaling
from fallow.models.store import Store

G = GGMLQuantizationType


def logits_of(weights, family):
    return ReferenceModel(weights).logits(reference(family)["tokens"])


@pytest.mark.parametrize("family", ["llama", "llama_rope", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [G.F32, G.F16, G.BF16, G.Q8_0, G.Q4_0, G.Q4_1])
def test_a_gguf_file_gives_the_logits_of_its_values(tmp_path, family, kind):
    source = GgufSource(write_gguf(tmp_path / "model.gguf", family, kind))
    expected = logits_of(RoundTripWeights(HuggingFaceSource(FIXTURES / family), kind), family)
    assert relative_error(logits_of(SourceWeights(source), family), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama_rope", "mistral", "qwen2", "qwen3"])
def test_32_bit_files_give_the_logits_of_transformers(tmp_path, family):
    source = GgufSource(write_gguf(tmp_path / "model.gguf", family))
    assert relative_error(logits_of(SourceWeights(source), family), reference(family)["logits"]) < 1e-4


@pytest.mark.parametrize(
    ("kind", "quantisation"), [(G.Q8_0, Quantisation.Q8), (G.Q4_0, Quantisation.Q4), (G.Q4_0, Quantisation.Q8)]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_carries_over_is_exact(tmp_path, family, kind, quantisation):
    store, path = Store(tmp_path / "store"), write_gguf(tmp_path / "model.gguf", family, kind)
    report = import_model(path, store, quantisation)
    assert set(report.loss.values()) == {0.0}
    stored = StoredWeights(report.manifest, store)
    np.testing.assert_array_equal(logits_of(stored, family), logits_of(SourceWeights(GgufSource(path)), family))


def test_q4_1_is_nearly_lossless_in_eight_bits(tmp_path):
    store = Store(tmp_path / "store")
    report = import_model(write_gguf(tmp_path / "model.gguf", "llama", G.Q4_1), store)
    assert max(report.loss.values()) < 4e-3


def test_its_metadata_becomes_the_manifest(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama_rope")
    manifest = import_model(path, Store(tmp_path / "store")).manifest
    expected = HuggingFaceSource(FIXTURES / "llama_rope").config
    assert manifest.config.rope_scaling == expected.rope_scaling
    assert manifest.config.tied_head
    assert manifest.config.norm_epsilon == pytest.approx(expected.norm_epsilon)
    assert (manifest.name, manifest.licence) == ("tiny-model", "apache-2.0")
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (0, (1,))
    assert manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert manifest.source.startswith("model.gguf sha256:")


def test_a_sliding_window_limits_the_context(tmp_path):
    def edit(tensors, metadata):
        metadata["llama.attention.sliding_window"] = 100

    report = import_model(write_gguf(tmp_path / "model.gguf", "mistral", edit=edit), Store(tmp_path / "store"))
    assert report.manifest.config.context_length == 100
    assert report.notes == ("context limited from 256 to its sliding window of 100 tokens",)


def test_half_split_order_undoes_the_converter():
    rows = np.arange(4 * 16 * 3).reshape(64, 3)
    np.testing.assert_array_equal(permute(rows, 4)[half_split_order(4, 16)], rows)


# --- K-quants -----------------------------------------------------------------------------------

K_CONFIG = ModelConfig(
    family=Family.LLAMA, layer_count=1, hidden_size=256, head_count=4, kv_head_count=2, head_dim=64,
    intermediate_size=256, vocab_size=288, context_length=64, norm_epsilon=1e-5, rope_theta=1e4, tied_head=True,
)  # fmt: skip
HALF_SCALES = {G.Q2_K: (80, 82), G.Q3_K: (108,), G.Q4_K: (0, 2), G.Q5_K: (0, 2), G.Q6_K: (208,)}
"""Where a block has its float16 scales; every other byte may be anything."""


def random_blocks(kind, rows: int, generator):
    block_bytes = GGML_QUANT_SIZES[kind][1]
    raw = generator.integers(0, 256, (rows, block_bytes), dtype=np.uint8)
    for at in HALF_SCALES[kind]:
        raw[:, at : at + 2] = generator.uniform(1e-4, 2e-4, (rows, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", list(HALF_SCALES))
def test_k_quants_go_through_the_dequantiser(tmp_path, kind):
    generator = np.random.default_rng(kind)
    shapes = {
        "attn_q": 256,
        "attn_k": 128,
        "attn_v": 128,
        "attn_output": 256,
        "ffn_gate": 256,
        "ffn_up": 256,
        "ffn_down": 256,
    }
    raw = {f"blk.0.{name}.weight": random_blocks(kind, rows, generator) for name, rows in shapes.items()}
    tensors = {name: (blocks, kind) for name, blocks in raw.items()}
    tensors["token_embd.weight"] = generator.standard_normal((288, 256), dtype=np.float32)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        tensors[name] = np.ones(256, dtype=np.float32)
    metadata = gguf_metadata(K_CONFIG, "llama") | tokenizer_metadata(FIXTURES / "llama")
    source = GgufSource(write_raw_gguf(tmp_path / "model.gguf", "llama", tensors, metadata, G.F32))
    layer = SourceWeights(source).layer(0)
    np.testing.assert_array_equal(layer["down"], dequantize(raw["blk.0.ffn_down.weight"], kind))
    np.testing.assert_array_equal(permute(layer["qkv"][:256], 4), dequantize(raw["blk.0.attn_q.weight"], kind))
    report = import_source(source, Store(tmp_path / "store"), Quantisation.Q8, "k")
    assert 0 < report.loss["down"] < 0.02


# --- rope factors -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    factor=st.sampled_from([2.0, 8.0, 32.0]), context=st.sampled_from([512, 1000, 8192]),
    low=st.sampled_from([1.0, 2.0]), ratio=st.sampled_from([4.0, 6.0]), head_dim=st.sampled_from([64, 128]),
    theta=st.sampled_from([1e4, 5e5]),
)  # fmt: skip
def test_llama3_scaling_is_recovered_from_its_factors(factor, context, low, ratio, head_dim, theta):
    scaling = Llama3RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=low * ratio, original_context_length=context
    )
    factors = llama3_factors(scaling, head_dim, theta)
    found = recover_llama3_scaling(factors.astype(np.float32), theta)
    np.testing.assert_allclose(llama3_factors(found, head_dim, theta), factors, rtol=2e-5)


def test_published_scaling_comes_back_as_it_is_written():
    scaling = Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
    )  # Llama 3.2
    factors = llama3_factors(scaling, 64, 500000.0).astype(np.float32)
    assert recover_llama3_scaling(factors, 500000.0) == scaling


def test_factors_of_something_else_are_refused():
    assert recover_llama3_scaling(np.ones(32, dtype=np.float32), 1e4) is None
    with pytest.raises(ModelError, match="not those of llama3"):
        recover_llama3_scaling(np.linspace(1, 4, 32, dtype=np.float32), 1e4)
    for bad in (0.0, -1.0):
        with pytest.raises(ModelError, match="not those of llama3"):
            recover_llama3_scaling(np.full(32, bad, dtype=np.float32), 1e4)


# --- files that lie -----------------------------------------------------------------------------


def refused(path, complaint):
    with pytest.raises(ModelError, match=complaint):
        import_model(path, Store(path.parent / "store"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "llama", G.Q8_0).read_bytes()


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (b"", "expected a GGUF file, got 0 bytes"),
        (b"GGML" + bytes(40), "does not start with 'GGUF'"),
        (b"PK\x03\x04" + bytes(40), "does not start with 'GGUF'"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0) + bytes(40), "version 2 or 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(40), "version 2 or 3"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), "claims 1152921504606846976 metadata keys"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 50), "bytes in a string"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1000), "ends inside its header"),
        (struct.pack("<4sIQQQ2sI", b"GGUF", 3, 0, 1, 2, b"\xff\xff", 4), "not UTF-8"),
        (struct.pack("<4sIQQQ1sIB", b"GGUF", 3, 0, 1, 1, b"k", 99, 0), "unknown metadata type 99"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 1 << 40), "array items"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1), "unknown metadata type 9"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 7, 1), "'k' occurs twice"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 9), "claims 9 dimensions"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, head, complaint):
    path = tmp_path / "model.gguf"
    path.write_bytes(head)
    refused(path, complaint)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, good, share):
    path = tmp_path / "model.gguf"
    path.write_bytes(good[: int(len(good) * share)])
    refused(path, "is it truncated")


def tensor_info(good: bytes, name: bytes) -> int:
    """Where a tensor's entry has its dimensions."""
    return good.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def test_tensors_that_lie_about_place_size_or_name_are_refused(tmp_path, good):
    path, at = tmp_path / "model.gguf", tensor_info(good, b"blk.1.ffn_down.weight")
    # count (4), two dimensions (8 + 8), type (4), offset (8)
    for offset, layout, value, complaint in [
        (24, "<Q", 1 << 40, "ends at byte .* but the file has"),
        (24, "<Q", 0, "overlap"),
        (12, "<Q", 1 << 40, "but the file has"),
        (4, "<Q", 33, "Q8_0 cannot have the shape"),
        (12, "<Q", 0, "cannot have the shape"),
        (12, "<Q", 32, r"expected shape \[64, 32\], got \[32, 32\]"),
        (20, "<I", 777, "unknown type 777"),
        (20, "<I", int(G.IQ2_XXS), "stored as IQ2_XXS, which Fallow does not read"),
    ]:
        content = bytearray(good)
        struct.pack_into(layout, content, at + offset, value)
        path.write_bytes(content)
        refused(path, complaint)
    path.write_bytes(good.replace(b"blk.1.ffn_down.weight", b"blk.2.ffn_down.weight"))
    refused(path, "'blk.2.ffn_down.weight' occurs twice")
    path.write_bytes(good.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_evil.weight"))
    refused(path, "'blk.1.ffn_evil.weight' is not part of a llama model")


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def put(key, value):
    return lambda tensors, metadata: metadata.update({key: value})


def spoil(name, value):
    def edit(tensors, metadata):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (drop("blk.3.attn_v.weight"), "expected a tensor 'blk.3.attn_v.weight'"),
        (drop("token_embd.weight"), "expected a matrix 'token_embd.weight'"),
        (spoil("blk.2.ffn_up.weight", np.nan), "'blk.2.ffn_up.weight': expected finite"),
        (spoil("blk.2.attn_norm.weight", np.inf), "'blk.2.attn_norm.weight': expected finite"),
        (
            put("general.architecture", "mamba"),
            "architecture 'mamba' is not served; expected one of llama, qwen2, qwen3",
        ),
        (put("llama.block_count", 5000), "layer_count: expected 1 to 1024, got 5000"),
        (put("llama.block_count", "four"), "'llama.block_count': expected one number"),
        (put("llama.attention.head_count", 0), "head_count: expected 1"),
        (put("llama.embedding_length", 96), "expected shape"),
        (put("llama.expert_count", 8), "mixture-of-experts"),
        (put("llama.rope.scaling.type", "yarn"), "rope scaling 'yarn' is not served"),
        (put("llama.rope.dimension_count", 8), "expected 16 rotated dimensions"),
        (put("llama.attention.layer_norm_rms_epsilon", float("nan")), "norm_epsilon"),
        (put("general.alignment", 33), "power of two"),
        (put("tokenizer.ggml.model", "rwkv"), "tokenizer kind 'rwkv' is not served"),
        (put("tokenizer.ggml.pre", "tekken"), "pre-tokeniser 'tekken' is not served"),
        (put("tokenizer.ggml.tokens", ["a", "a"]), "a token occurs twice"),
        (put("tokenizer.ggml.token_type", [1, 2]), "expected 288 types, got 2"),
        (put("tokenizer.ggml.merges", ["a b c"]), "two tokens in every merge"),
        (put("tokenizer.ggml.merges", ["zz yy"]), "do not fit its tokens"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(tmp_path, edit, complaint):
    refused(write_gguf(tmp_path / "model.gguf", "llama", edit=edit), complaint)


def test_nan_in_quantised_scales_is_refused(tmp_path, good):
    path = write_gguf(tmp_path / "model.gguf", "llama", G.Q8_0)
    entry = GgufSource(path)._file.tensors["blk.0.attn_q.weight"]
    content = bytearray(good)
    content[entry.start : entry.start + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    refused(path, "'blk.0.attn_q.weight': expected finite")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_mutated_header_reads_or_raises_a_named_error(tmp_path_factory, good, data):
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    content = bytearray(good)
    header_bytes = good.index(b"output_norm.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_bytes))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = GgufSource(path)
        source.details()
        SourceWeights(source).layer(0)
    except ModelError:
        pass
