"""The in-memory twin of `TokenSource`: deterministic next-token distributions, without a model or a fleet.

It keeps the contract: reservations are bounded, prefixes are kept per owner, and a conversation that was closed
takes no more tokens. Delays go through the `Clock`, so that the simulator runs it on virtual time; faults are raised
after a given number of decoded tokens. What was opened and how it was closed can be asked afterwards.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.clock import Clock
from fallow.domain.errors import ContextExceeded, EngineError, FallowError, KvExhausted, UnknownModel
from fallow.domain.ids import Digest
from fallow.domain.model import Manifest
from fallow.domain.sampling import Recipe
from fallow.domain.service import ServiceTier
from fallow.gateway.contract import Candidates, Meanwhile
from fallow.models.manifest import manifest_digest

MAX_KEPT_PREFIXES = 64
MAX_EVENTS = 1000
HISTORY = 1000

Predictor = Callable[[Sequence[int]], NDArray[np.float32]]
"""Tokens so far to unnormalised logits over the vocabulary."""


def hash_predictor(vocabulary: int, seed: int = 0, context: int = 3) -> Predictor:
    """Logits that depend on the last `context` tokens, and on nothing else."""

    def predict(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = ",".join(str(token) for token in (seed, *tokens[-context:]))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return (3.0 * generator.standard_normal(vocabulary)).astype(np.float32)

    return predict


def scripted_predictor(vocabulary: int, prompt_length: int, script: Sequence[int]) -> Predictor:
    """Says `script` after a prompt of `prompt_length` tokens, then repeats its last token."""

    def predict(tokens: Sequence[int]) -> NDArray[np.float32]:
        step = min(len(tokens) - prompt_length, len(script) - 1)
        logits = np.zeros(vocabulary, np.float32)
        logits[script[step]] = 20.0
        return logits

    return predict


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong."""

    on_open: FallowError | None = None
    after_tokens: int | None = None
    """Decoding fails after this many tokens, with `error`."""
    error: FallowError = EngineError("the in-memory engine was told to fail")


class ClosedConversation(msgspec.Struct, frozen=True):
    """How a conversation ended."""

    owner: str
    tokens: int
    kept: bool


class MemoryTokenSource:
    """Serves manifests from a predictor. `capacity` conversations at once; `top_k` candidates or all."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        predictor: Predictor,
        clock: Clock,
        *,
        prefill_s_per_token: float = 0.0,
        decode_s: float = 0.0,
        capacity: int = 256,
        faults: Faults | None = None,
    ) -> None:
        self._manifests = tuple(manifests)
        self._by_digest = {manifest_digest(each): each for each in manifests}
        self.predictor = predictor
        self.clock = clock
        self.prefill_s_per_token = prefill_s_per_token
        self.decode_s = decode_s
        self.capacity = capacity
        self.faults = faults or Faults()
        self.open_count = 0
        self.closed: deque[ClosedConversation] = deque(maxlen=HISTORY)
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], None] = OrderedDict()
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)

    def models(self) -> Sequence[Manifest]:
        return self._manifests

    def tier(self, wanted: ServiceTier) -> ServiceTier:
        return wanted

    async def open(
        self,
        model: Digest,
        prompt: Sequence[int],
        max_new_tokens: int,
        top_k: int | None,
        owner: str,
        recipe: Recipe | None = None,
        tier: ServiceTier = ServiceTier.DEFAULT,
    ) -> "MemoryConversation":
        manifest = self._by_digest.get(model)
        if manifest is None:
            raise UnknownModel(f"no model has the digest {model}")
        if self.faults.on_open is not None:
            raise self.faults.on_open
        if len(prompt) + max_new_tokens > manifest.config.context_length:
            raise ContextExceeded("prompt and answer do not fit the context")
        if self.open_count >= self.capacity:
            raise KvExhausted(f"all {self.capacity} places are taken")
        self.open_count += 1
        return MemoryConversation(self, list(prompt), top_k, owner, self._cached(owner, prompt))

    async def status(self) -> AsyncIterator[str]:
        """The events so far, oldest first."""
        while self._events:
            yield self._events.popleft()

    def _cached(self, owner: str, prompt: Sequence[int]) -> int:
        """The longest kept prefix; the last prompt token is always computed."""
        longest = 0
        for kept_owner, tokens in self._kept:
            if kept_owner == owner:
                pairs = zip(tokens, prompt[:-1], strict=False)
                shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(prompt) - 1))
                longest = max(longest, shared)
        return longest

    def ended(self, owner: str, tokens: Sequence[int], keep: bool) -> None:
        """A conversation was closed."""
        self.open_count -= 1
        self.closed.append(ClosedConversation(owner, len(tokens), keep))
        self._events.append(f"closed after {len(tokens)} tokens, {'kept' if keep else 'freed'}")
        if keep:
            self._kept[(owner, tuple(tokens))] = None
            while len(self._kept) > MAX_KEPT_PREFIXES:
                self._kept.popitem(last=False)


class MemoryConversation:
    """One generation. See `Conversation`."""

    def __init__(
        self, source: MemoryTokenSource, tokens: list[int], top_k: int | None, owner: str, cached_tokens: int
    ) -> None:
        self._source = source
        self._tokens = tokens
        self._top_k = top_k
        self._owner = owner
        self._cached_tokens = cached_tokens
        self._decoded = 0
        self._open = True

    @property
    def cached_tokens(self) -> int:
        return self._cached_tokens

    async def prefill(self) -> Candidates:
        fresh = len(self._tokens) - self._cached_tokens
        await self._source.clock.sleep(fresh * self._source.prefill_s_per_token)
        return self._candidates()

    async def decode(self, token: int, meanwhile: Meanwhile | None = None) -> Candidates:
        if meanwhile is not None:
            await meanwhile()
        faults = self._source.faults
        if faults.after_tokens is not None and self._decoded >= faults.after_tokens:
            raise faults.error
        await self._source.clock.sleep(self._source.decode_s)
        self._tokens.append(token)
        self._decoded += 1
        return self._candidates()

    async def close(self, *, keep: bool) -> None:
        if self._open:
            self._open = False
            self._source.ended(self._owner, self._tokens, keep)

    def _candidates(self) -> Candidates:
        assert self._open, "a closed conversation was asked for tokens"
        logits = self._source.predictor(self._tokens).astype(np.float64)
        peak = logits.max()
        logprobs = (logits - peak - np.log(np.exp(logits - peak).sum())).astype(np.float32)
        if self._top_k is None:
            return Candidates(np.arange(len(logprobs), dtype=np.int32), logprobs, True)
        order = np.argsort(-logprobs, kind="stable")[: self._top_k].astype(np.int32)
        return Candidates(order, logprobs[order], False)
