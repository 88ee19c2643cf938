"""A `tokenizers` tokenizer from GGUF metadata.

Two kinds are rebuilt: byte-level BPE (`tokenizer.ggml.model` = `gpt2`) behind one of the pre-tokenisers below, and
SentencePiece BPE with byte fallback (`llama`), converted as transformers converts a Llama tokenizer. Another kind
raises `ModelError` with its name: a wrong split would change answers silently.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fallow.domain.errors import ModelError

MAX_TOKENS = 4 << 20
MAX_TOKEN_CHARS = 4096
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

GPT2_KINDS = frozenset({"default", "gpt-2", "gpt2"})
SMOLLM_KINDS = frozenset({"smollm"})
LLAMA3_KINDS = frozenset({"llama-bpe", "llama3", "llama-v3"})
QWEN2_KINDS = frozenset({"qwen2"})

END_OF_GENERATION = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"}
)
"""Control tokens that end a generation wherever they occur, after llama.cpp's list."""


def tokenizer_json_from_gguf(metadata: dict[str, Any]) -> bytes:
    """The tokenizer as a `tokenizers` JSON file."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens)
    else:
        raise ModelError(f"tokenizer kind {str(kind)[:40]!r} is not served; expected 'gpt2' or 'llama'")
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_bos(tokenizer, metadata, tokens)
    return tokenizer.to_str().encode("utf-8")


def end_of_generation_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The declared end tokens, then control tokens that are known to end a turn."""
    tokens, types = _tokens(metadata), _types(metadata)
    declared = [token_id(metadata, name) for name in ("eos", "eot", "eom")]
    ids = [token for token in declared if token is not None]
    known = [
        index
        for index, text in enumerate(tokens)
        if text in END_OF_GENERATION and types[index] in (CONTROL, USER_DEFINED)
    ]
    return tuple(dict.fromkeys(ids + known))


def special_token_texts(metadata: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as declared."""
    tokens = _tokens(metadata)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(metadata, key) for name, key in names.items()}
    return {name: tokens[token] for name, token in ids.items() if token is not None}


def token_id(metadata: dict[str, Any], name: str) -> int | None:
    """The id of `bos`, `eos`, `unknown` …, or `None` when the file gives none or one outside the vocabulary."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if type(value) is int and 0 <= value < len(_tokens(metadata)):
        return value
    return None


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise ModelError("tokenizer.ggml.merges: expected a list of merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError("tokenizer.ggml.merges: expected two tokens in every merge")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    vocabulary = {text: index for index, text in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(vocab=vocabulary, merges=pairs, ignore_merges=pre in LLAMA3_KINDS))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre in QWEN2_KINDS:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str) -> Any:
    """How text is cut before merging; `pre` is llama.cpp's name for it."""
    if pre in GPT2_KINDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in SMOLLM_KINDS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    for kinds, pattern in ((LLAMA3_KINDS, LLAMA3_SPLIT), (QWEN2_KINDS, QWEN2_SPLIT)):
        if pre in kinds:
            split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ModelError(
        f"pre-tokeniser {pre[:40]!r} is not served; expected one of "
        f"{', '.join(sorted(GPT2_KINDS | SMOLLM_KINDS | LLAMA3_KINDS | QWEN2_KINDS))}"
    )


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError("tokenizer.ggml.scores: expected one score per token")
    vocabulary = {text: index for index, text in enumerate(tokens)}
    unknown = token_id(metadata, "unknown")
    unknown_text = None if unknown is None else tokens[unknown]
    merges = _merges_by_score(vocabulary, [float(score) for score in scores])
    model = _bpe(vocab=vocabulary, merges=merges, unk_token=unknown_text, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best score first; as transformers' `generate_merges`."""
    merges: list[tuple[float, int, int, str, str]] = []
    for text, index in vocabulary.items():
        splits = [(text[:at], text[at:]) for at in range(1, len(text))]
        local = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        local.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges.extend((scores[index], len(left), len(right), left, right) for left, right in local)
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _bpe(**settings: Any) -> Any:
    try:
        return models.BPE(**settings)
    except Exception as error:  # the library raises bare `Exception` for merges of unknown tokens
        raise ModelError(f"the tokenizer's merges do not fit its tokens: {error}") from error


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    types = _types(metadata)
    control = [text for text, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    user = [text for text, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in user])
    if tokenizer.get_vocab_size() != len(tokens):
        raise ModelError("the tokenizer's special tokens are not among its tokens")


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Put the first token in front of every text, where the file says so or, as llama.cpp, where its kind does."""
    by_kind = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_KINDS
    bos = token_id(metadata, "bos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", by_kind) is True:
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, bos)]
        )


def _tokens(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_TOKENS:
        raise ModelError("tokenizer.ggml.tokens: expected a list of tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelError("tokenizer.ggml.tokens: a token occurs twice")
    if max(map(len, tokens)) > MAX_TOKEN_CHARS:
        raise ModelError(f"tokenizer.ggml.tokens: expected tokens of at most {MAX_TOKEN_CHARS} characters")
    return tokens


def _types(metadata: dict[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type: expected {len(tokens)} types, got {len(types)}")
    return [int(kind) for kind in types]
