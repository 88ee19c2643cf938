"""Tokenizers rebuilt from GGUF metadata tokenise as llama.cpp does (`tests/fixtures/tokenizers/golden.json`)."""

import json
from pathlib import Path

import pytest

from fallow.domain.errors import ModelError
from fallow.models.default import default_gguf
from fallow.models.gguf_file import open_gguf
from fallow.models.gguf_tokenizer import end_of_generation_ids, special_token_texts, tokenizer_json_from_gguf
from fallow.models.tokenizer import MAX_TOKENIZER_BYTES, load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "fixtures" / "tokenizers" / "golden.json").read_text("utf-8"))
SPM = GOLDEN["sentencepiece"]
BARE = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}


@pytest.fixture(scope="module")
def default_metadata():
    return open_gguf(default_gguf()).metadata


def rebuilt(metadata):
    return load_tokenizer(tokenizer_json_from_gguf(metadata))


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_bpe_tokenises_as_llama_cpp(default_metadata, pre):
    tokenizer = rebuilt(default_metadata | {"tokenizer.ggml.pre": pre})
    assert len(GOLDEN["cases"][pre]) >= 15
    for text, ids in GOLDEN["cases"][pre]:
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_qwen2_composes_characters_as_its_own_tokenizer_does(default_metadata):
    tokenizer = rebuilt(default_metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode("a\u0301").ids == tokenizer.encode("á").ids


@pytest.mark.parametrize(("name", "changes"), [("spm", {}), ("spm-bare", BARE)])
def test_sentencepiece_bpe_tokenises_as_llama_cpp(name, changes):
    tokenizer = rebuilt(SPM | changes)
    for text, ids in GOLDEN["cases"][name]:
        assert tokenizer.encode(text).ids == ids, text
        if "<|im" not in text:  # a space before a special token is the template's business
            assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_token_and_can_be_left_out(default_metadata):
    tokenizer = rebuilt(default_metadata)
    encoded = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
    assert tokenizer.decode(encoded.ids) == "user\nHi"
    assert end_of_generation_ids(default_metadata) == (2, 0)
    assert special_token_texts(default_metadata) == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
    }  # fmt: skip


def test_bos_is_added_where_the_file_says_so(default_metadata):
    tokenizer = rebuilt(default_metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("x").ids[0] == 1
    assert tokenizer.encode("x", add_special_tokens=False).ids == tokenizer.encode("x").ids[1:]
    silent = {key: value for key, value in default_metadata.items() if key != "tokenizer.ggml.add_bos_token"}
    assert rebuilt(silent).encode("x").ids[0] != 1
    assert rebuilt(silent | {"tokenizer.ggml.pre": "llama-bpe"}).encode("x").ids[0] == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer kind 'bert' is not served"),
        ({"tokenizer.ggml.model": None}, "tokenizer kind 'None'"),
        ({"tokenizer.ggml.tokens": None}, "expected a list of tokens"),
        ({"tokenizer.ggml.tokens": []}, "expected a list of tokens"),
        ({"tokenizer.ggml.tokens": ["x" * 5000]}, "at most 4096 characters"),
        ({"tokenizer.ggml.scores": [1.0]}, "one score per token"),
        ({"tokenizer.ggml.scores": None}, "one score per token"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused(changes, complaint):
    with pytest.raises(ModelError, match=complaint):
        tokenizer_json_from_gguf(SPM | changes)


def test_ids_outside_the_vocabulary_are_not_special():
    metadata = SPM | {"tokenizer.ggml.eos_token_id": 10**6, "tokenizer.ggml.bos_token_id": -3}
    assert end_of_generation_ids(metadata) == (2, len(SPM["tokenizer.ggml.tokens"]) - 1)
    assert special_token_texts(metadata) == {"unk_token": "<unk>"}
    assert rebuilt(metadata).encode("the").ids


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    for content in (b"", b"{}", b"\x80\x04pickle", b"[" * 100_000):
        with pytest.raises(ModelError, match="not a valid tokenizers JSON file"):
            load_tokenizer(content)
    with pytest.raises(ModelError, match="at most"):
        load_tokenizer(bytes(MAX_TOKENIZER_BYTES + 1))
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent")


def test_truncation_that_a_file_asks_for_is_switched_off():
    content = json.loads(tokenizer_json_from_gguf(SPM))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(json.dumps(content).encode())
    assert len(tokenizer.encode("the user and the world and all the lines").ids) > 3
