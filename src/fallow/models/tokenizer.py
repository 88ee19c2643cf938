"""Load a model's tokenizer. It comes from a stranger: its size is bounded and its parser is the `tokenizers` library.

Truncation and padding that a file may ask for are switched off: the gateway decides about lengths, not a model.
"""

from pathlib import Path

from tokenizers import Tokenizer

from fallow.domain.errors import ModelError

MAX_TOKENIZER_BYTES = 64 << 20


def load_tokenizer(source: bytes | Path) -> Tokenizer:
    """A tokenizer from `tokenizers` JSON. Raises `ModelError` for anything that is not one."""
    content = _read(source) if isinstance(source, Path) else source
    if len(content) > MAX_TOKENIZER_BYTES:
        raise ModelError(f"tokenizer: expected at most {MAX_TOKENIZER_BYTES} bytes, got {len(content)}")
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare `Exception`
        raise ModelError(f"tokenizer: not a valid tokenizers JSON file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise ModelError(f"tokenizer file {path.name} cannot be read: {error.strerror}") from error
