"""Tokens to text, one at a time, never half a character.

`TokenBytes` knows the bytes behind every token id; `Detokeniser` strings them together with an incremental UTF-8
decoder, so the text is the same however the tokens are cut and costs the same for every token. Bytes that are not
UTF-8 become U+FFFD, as a decode of the whole does. Special tokens have no text. Two kinds of vocabulary are mapped
exactly: byte-level BPE (GPT-2's table of visible characters) and SentencePiece (`▁` for a space, `<0xNN>` for a byte);
any other falls back to what the tokenizer says for the token alone. A leading space stays, because generated text
follows a prompt.
"""

import codecs
import re

import msgspec
from tokenizers import Tokenizer

from fallow.domain.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class _Component(msgspec.Struct, frozen=True):
    type: str = ""
    decoders: tuple["_Component", ...] = ()


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The parts of a `tokenizers` JSON file that decide how tokens become text."""

    decoder: _Component | None = None
    added_tokens: tuple[_AddedToken, ...] = ()


class TokenBytes:
    """The bytes of each token id, looked up once. Bounded by the vocabulary; shared by all conversations."""

    def __init__(self, tokenizer: Tokenizer, file: bytes) -> None:
        """`file` is the JSON that `tokenizer` was built from. Raises `ModelError`."""
        try:
            parsed = msgspec.json.decode(file, type=_TokenizerFile)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"The model's tokenizer file cannot be read: {error}.") from error
        self._tokenizer = tokenizer
        self._added = {token.id: token.content.encode() for token in parsed.added_tokens}
        self.special_ids = frozenset(token.id for token in parsed.added_tokens if token.special)
        kinds = _kinds(parsed.decoder)
        self._byte_level = "ByteLevel" in kinds
        self._sentencepiece = not self._byte_level and bool(kinds & {"ByteFallback", "Metaspace"})
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """The token's bytes; empty for ids that the tokenizer does not have (padded vocabularies)."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return added
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            return _from_visible(text)
        if self._sentencepiece:
            match = _BYTE_TOKEN.fullmatch(text)
            return bytes([int(match[1], 16)]) if match else text.replace(_SPACE_MARK, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def label(self, token: int) -> str:
        """How a token is named in log-probabilities: its text, or its bytes when they are a piece of a character."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Detokeniser:
    """One choice's text."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._special = token_bytes.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token in self._special:
            return ""
        return self._decoder.decode(self._bytes.of(token))

    def finish(self) -> str:
        """U+FFFD for a character that was never finished, else nothing."""
        return self._decoder.decode(b"", final=True)


def _kinds(component: _Component | None) -> frozenset[str]:
    if component is None:
        return frozenset()
    return frozenset({component.type}).union(*(_kinds(part) for part in component.decoders))


def _visible_bytes() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_VISIBLE = _visible_bytes()


def _from_visible(text: str) -> bytes:
    """The bytes of a byte-level token; text that is not in the table stands for itself, as `tokenizers` has it."""
    try:
        return bytes(_VISIBLE[character] for character in text)
    except KeyError:
        return text.encode()
