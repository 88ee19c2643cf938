"""Detokenising token by token gives the same text as decoding the whole, and never half a character."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from fallow.domain.errors import ModelError
from fallow.gateway.detokenise import Detokeniser, TokenBytes
from tests.unit.gateway.gateway_world import SPECIAL, VOCABULARY, tokenizer

TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)


@cache
def sentencepiece() -> Tokenizer:
    """A vocabulary as Llama 2 and Mistral have it: ▁ for spaces, <0xNN> for bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁the",
        "▁",
        "fleet",
        "日本",
        "▁ü",
        ".",
    ]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    built.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def token_bytes(built: Tokenizer) -> TokenBytes:
    return TokenBytes(built, built.to_str().encode())


def text_of(built: Tokenizer, tokens: list[int]) -> str:
    detokeniser = Detokeniser(token_bytes(built))
    return "".join(detokeniser.feed(token) for token in tokens) + detokeniser.finish()


@given(TOKENS)
def test_any_tokens_give_the_text_of_a_full_decode(tokens: list[int]) -> None:
    assert text_of(tokenizer(), tokens) == tokenizer().decode(tokens)


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    tokens = tokenizer().encode(text).ids
    expected = text
    for special in SPECIAL:
        expected = expected.replace(special, "")
    assert text_of(tokenizer(), tokens) == expected


@given(st.text("日本🦊üé a", max_size=30))
def test_no_piece_ever_has_half_a_character(text: str) -> None:
    detokeniser = Detokeniser(token_bytes(tokenizer()))
    shown = ""
    for token in tokenizer().encode(text).ids:
        shown += detokeniser.feed(token)
        assert text.startswith(shown)
    assert shown == text
    assert detokeniser.finish() == ""


@given(st.lists(st.sampled_from(["▁the", "▁", "fleet", "日本", "▁ü", "."]) | st.sampled_from("éß🦊\n"), max_size=30))
def test_sentencepiece_vocabulary_gives_the_text_of_a_full_decode(parts: list[str]) -> None:
    built = sentencepiece()
    tokens: list[int] = []
    for part in parts:
        known = built.token_to_id(part)
        tokens += [known] if known is not None else [3 + byte for byte in part.encode()]
    assert text_of(built, tokens) == built.decode(tokens)


def test_unfinished_character_becomes_one_replacement() -> None:
    fox = tokenizer().encode("\U0001f98b").ids  # not in the corpus: one token a byte or few
    assert len(fox) > 1
    assert text_of(tokenizer(), fox[:-1]) == "\ufffd"
    assert text_of(tokenizer(), fox) == "\U0001f98b"


def test_ids_beyond_the_vocabulary_and_special_tokens_have_no_text() -> None:
    assert text_of(tokenizer(), [0, VOCABULARY + 5, 1]) == ""


def test_labels_name_pieces_of_characters_by_their_bytes() -> None:
    known = token_bytes(sentencepiece())
    assert known.label(3 + 0xF0) == "bytes:\\xf0"
    assert known.label(sentencepiece().token_to_id("▁the")) == " the"


def test_other_decoders_fall_back_to_single_tokens() -> None:
    built = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert text_of(built, [0, 1]) == "ab"


def test_broken_file_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError):
        TokenBytes(tokenizer(), b'{"decoder": 5}')
