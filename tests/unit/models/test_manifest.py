"""Manifests: canonical, validated at the edge, and cut into the files that a stage needs."""

import json

import msgspec
import pytest
from checkpoints import LLAMA31, TINY, blob, tiny_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import ModelError
from fallow.domain.model import Quantisation, Span, StageSpec
from fallow.models.manifest import decode_manifest, encode_manifest, layer_files, manifest_digest

GOOD = encode_manifest(tiny_manifest())


def test_it_round_trips_and_its_bytes_are_canonical():
    manifest = tiny_manifest(special_tokens={"eos_token": "</s>", "bos_token": "<s>"}, chat_template="{{ messages }}")
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded) == manifest
    assert encoded == json.dumps(json.loads(encoded), sort_keys=True, separators=(",", ":")).encode()
    assert manifest_digest(manifest) == manifest_digest(decode_manifest(encoded))


def config(**changes):
    return msgspec.structs.replace(TINY, **changes)


def scaling(**changes):
    return config(rope_scaling=msgspec.structs.replace(LLAMA31, **changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({"name": "../../etc/passwd"}, "model name"),
        ({"name": ""}, "model name"),
        ({"name": "Upper"}, "model name"),
        ({"config": config(layer_count=1025)}, "layer_count: expected 1 to 1024, got 1025"),
        ({"config": config(layer_count=3)}, "expected 3 layer files, got 2"),
        ({"config": config(vocab_size=1 << 30)}, "vocab_size"),
        ({"config": config(hidden_size=0)}, "hidden_size"),
        ({"config": config(hidden_size=40)}, "divide by 32, but hidden_size is 40"),
        ({"config": config(intermediate_size=72)}, "intermediate_size is 72"),
        ({"config": config(head_dim=15)}, "even head_dim"),
        ({"config": config(head_count=3, kv_head_count=2)}, "cannot share"),
        ({"config": config(kv_head_count=4)}, "kv_head_count"),
        ({"config": config(context_length=-1)}, "context_length"),
        ({"config": config(norm_epsilon=0.0)}, "norm_epsilon"),
        ({"config": config(rope_theta=-5.0)}, "rope_theta"),
        ({"config": config(qk_norm=True)}, "qk_norm"),
        ({"config": scaling(factor=0.0)}, "rope_scaling.factor"),
        ({"config": scaling(high_freq_factor=1.0)}, "high_freq_factor above"),
        ({"config": scaling(original_context_length=0)}, "original_context_length"),
        ({"embedding": blob("z")}, "64 lower-case hex"),
        ({"embedding": blob("a", 0)}, "size_bytes"),
        ({"head": msgspec.structs.replace(blob("d"), size_bytes=1 << 21)}, "2 chunks, but there are 1"),
        ({"layers": (blob("b"), blob("b"))}, "layers\\[1\\] and layers\\[0\\] are the same file"),
        ({"eos_token_ids": (40,)}, "token id: expected 0 to 39, got 40"),
        ({"bos_token_id": -1}, "token id"),
        ({"eos_token_ids": tuple(range(40)) * 2}, "eos_token_ids"),
        ({"source": "x" * 5000}, "source"),
        ({"chat_template": "x" * (1 << 21)}, "chat_template"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, complaint):
    with pytest.raises(ModelError, match=complaint):
        decode_manifest(encode_manifest(tiny_manifest(**changes)))


@pytest.mark.parametrize(
    ("encoded", "complaint"),
    [
        (b"", "not a valid manifest"),
        (b"[]", "not a valid manifest"),
        (b"\xff\xfe", "not a valid manifest"),
        (b"[" * 100_000, "not a valid manifest"),
        (GOOD[:-10], "not a valid manifest"),
        (GOOD.replace(b'"layer_count":2', b'"layer_count":"2"'), "layer_count"),
        (GOOD.replace(b'"family":"llama"', b'"family":"mamba"'), "mamba"),
        (GOOD.replace(b'{"bos_token_id"', b'{"a_new_field":1,"bos_token_id"'), "not canonical"),
        (GOOD.replace(b",", b", ", 1), "not canonical"),
        (b" " * (33 << 20), "at most"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(encoded, complaint):
    with pytest.raises(ModelError, match=complaint):
        decode_manifest(encoded)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_mutated_bytes_decode_to_something_sane_or_raise_a_named_error(at, byte, cut):
    for mutated in (GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], GOOD[:cut]):
        try:
            assert encode_manifest(decode_manifest(mutated)) == mutated
        except ModelError:
            assert mutated != GOOD


def test_a_32_bit_model_may_have_any_sizes():
    odd = tiny_manifest(config=config(hidden_size=40), quantisation=Quantisation.F32)
    assert decode_manifest(encode_manifest(odd)) == odd


def test_a_stage_needs_its_layers_and_what_belongs_to_its_ends():
    manifest = tiny_manifest()
    letters = lambda m, *pieces: "".join(  # noqa: E731
        ref.digest[0] for ref in layer_files(m, StageSpec(model="m", pieces=pieces))
    )
    assert letters(manifest, Span(0, 1)) == "ab"
    assert letters(manifest, Span(1, 2)) == "cd"
    assert letters(manifest, Span(0, 2)) == "abcd"
    assert letters(manifest, Span(0, 1), Span(1, 2)) == "abcd"
    tied = tiny_manifest(config=config(tied_head=True))
    assert letters(tied, Span(1, 2)) == "cda"
    assert letters(tied, Span(0, 2)) == "abcd"
    for piece in (Span(0, 3), Span(-1, 1), Span(1, 1)):
        with pytest.raises(ModelError, match="not inside"):
            letters(manifest, piece)
