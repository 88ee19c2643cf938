"""Text in and out of one model: its tokenizer, its chat template and its token bytes, loaded once.

`TextModels` keeps the models that were used lately. Loading and long encodings run in a thread, because they take
tens of milliseconds; short ones are faster where they are. No sampling and no HTTP here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from fallow.domain.errors import BadRequest, FallowError, ModelError, UnknownModel
from fallow.domain.ids import Digest
from fallow.domain.model import Manifest
from fallow.gateway.detokenise import TokenBytes
from fallow.gateway.templates import ChatTemplate
from fallow.models.manifest import manifest_digest
from fallow.models.tokenizer import load_tokenizer

MAX_LOADED_MODELS = 16
MAX_INLINE_CHARS = 2048
"""Longer texts are tokenised in a thread; this many take 1 to 2 ms."""

TokenizerFile = Callable[[Manifest], Awaitable[bytes]]
"""Reads a model's `tokenizers` JSON from wherever its files are."""


class TextModel:
    """A model as the API sees it."""

    def __init__(self, manifest: Manifest, digest: Digest, file: bytes, local_time: Callable[[], datetime]) -> None:
        """Raises `ModelError` for a tokenizer or template that is broken."""
        self.manifest = manifest
        self.digest = digest
        self.eos_ids = frozenset(manifest.eos_token_ids)
        self._tokenizer = load_tokenizer(file)
        self.token_bytes = TokenBytes(self._tokenizer, file)
        source = manifest.chat_template
        self.template = None if source is None else ChatTemplate(source, manifest.special_tokens, local_time)

    async def encode_chat(self, prompt: str) -> list[int]:
        """Tokens of a rendered template, which brings its own special tokens."""
        return await self._encode(prompt, self._encode_bare)

    async def encode_completion(self, prompt: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the tokenizer puts around a text."""
        return await self._encode(prompt, self._encode_framed)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of whole prompts, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens)))

    def _encode_bare(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_framed(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    async def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        tokens = encode(text) if len(text) <= MAX_INLINE_CHARS else await asyncio.to_thread(encode, text)
        vocab_size = self.manifest.config.vocab_size
        if max(tokens, default=0) >= vocab_size:
            # Honest tokenizers, too, have added tokens for which the model has no row.
            raise BadRequest(f"The text has token {max(tokens)}, and this model's vocabulary ends at {vocab_size - 1}.")
        return tokens


class TextModels:
    """Finds models by name among those that can be asked for now."""

    def __init__(
        self,
        available: Callable[[], Sequence[Manifest]],
        tokenizer_file: TokenizerFile,
        local_time: Callable[[], datetime],
    ) -> None:
        self._available = available
        self._tokenizer_file = tokenizer_file
        self._local_time = local_time
        self._loaded: OrderedDict[str, TextModel] = OrderedDict()
        self._loading: dict[str, asyncio.Task[TextModel]] = {}

    async def get(self, name: str) -> TextModel:
        """Raises `UnknownModel`, or `ModelError` when its files are broken."""
        manifest = next((each for each in self._available() if each.name == name), None)
        if manifest is None:
            raise UnknownModel(f"The model {name[:100]!r} does not exist here; GET /v1/models lists those that do.")
        loaded = self._loaded.get(name)
        # A catalogue that is sent again holds an equal manifest; a model that was imported anew does not.
        if loaded is not None and (loaded.manifest is manifest or loaded.manifest == manifest):
            self._loaded.move_to_end(name)
            return loaded
        # Requests that come while it loads share one load, and none of them can cancel it for the others.
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(manifest))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        return await asyncio.shield(task)

    async def _load(self, manifest: Manifest) -> TextModel:
        file = await self._tokenizer_file(manifest)
        digest = manifest_digest(manifest)
        try:
            model = await asyncio.to_thread(TextModel, manifest, digest, file, self._local_time)
        except FallowError:
            raise
        except Exception as error:
            raise ModelError(f"The text side of {manifest.name!r} cannot be loaded: {error}.") from error
        self._loaded[manifest.name] = model
        self._loaded.move_to_end(manifest.name)
        while len(self._loaded) > MAX_LOADED_MODELS:
            self._loaded.popitem(last=False)
        return model
