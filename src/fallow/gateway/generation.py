"""One choice of one answer: conversation, sampler, detokeniser and stop strings in a loop.

`generate` opens a conversation and hands every piece of text to `emit` as soon as it is certain, while the devices
compute the next token. It closes the conversation in every case: kept for a follow-up turn when the first choice ended
by itself, freed when anything else happened, the client's hanging up (a cancellation) included. It knows no HTTP and
no JSON. Times go to an `Observer`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Protocol

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.errors import FallowError
from fallow.domain.service import ServiceTier
from fallow.gateway.contract import Conversation, TokenSource
from fallow.gateway.detokenise import Detokeniser
from fallow.gateway.sampling import HEAD_TOP_K, Sampler, SamplingParams, adjusts, needs_full_vocabulary, top_logprobs
from fallow.gateway.stopping import StopScanner
from fallow.gateway.text import TextModel

_LOG = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""How long an answer waits for its conversation to be closed."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model ended its answer, or a stop string came up."""
    LENGTH = "length"
    """The limit of new tokens was reached."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """A generated token, the model's log-probability for it, and the most probable ones with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Chunk(msgspec.Struct, frozen=True):
    """Text that is certain, and the tokens since the last chunk when log-probabilities are asked for."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish: FinishReason | None = None


class ChoiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate."""

    index: int
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    stops: tuple[str, ...]
    top_logprobs: int | None
    owner: str
    keep: bool
    """Whether a follow-up turn may continue from this choice's cache."""
    tier: ServiceTier = ServiceTier.DEFAULT


class Tally:
    """What one choice has used so far; right also when it fails half-way."""

    def __init__(self) -> None:
        self.completion_tokens = 0
        self.cached_tokens = 0


class Observer(Protocol):
    """Whoever measures."""

    def first_token(self, elapsed_s: float) -> None: ...
    def next_token(self, elapsed_s: float) -> None: ...


Emit = Callable[[Chunk], Awaitable[None]]


async def generate(
    source: TokenSource,
    model: TextModel,
    spec: ChoiceSpec,
    tally: Tally,
    emit: Emit,
    clock: Clock,
    observer: Observer,
) -> None:
    """Generate one choice. Raises what `TokenSource.open` and the conversation raise."""
    started_s = clock.monotonic_s()
    top_k = None if needs_full_vocabulary(spec.sampling) else HEAD_TOP_K
    sampler = Sampler(spec.sampling, spec.seed, spec.index)
    recipe = None if adjusts(spec.sampling) else sampler.recipe
    conversation = await source.open(
        model.digest, spec.prompt, spec.max_new_tokens, top_k, spec.owner, recipe, spec.tier
    )
    keep = False
    try:
        await _run(conversation, model, spec, sampler, tally, emit, clock, observer, started_s)
        keep = spec.keep
    finally:
        await _close(conversation, keep=keep)


async def _close(conversation: Conversation, *, keep: bool) -> None:
    """A fleet that does not answer must neither hold up nor spoil an answer that is complete."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await conversation.close(keep=keep)
    except (FallowError, TimeoutError) as error:
        _LOG.warning("a conversation could not be closed: %r", error)


async def _run(
    conversation: Conversation,
    model: TextModel,
    spec: ChoiceSpec,
    sampler: Sampler,
    tally: Tally,
    emit: Emit,
    clock: Clock,
    observer: Observer,
    started_s: float,
) -> None:
    detokeniser = Detokeniser(model.token_bytes)
    scanner = StopScanner(spec.stops)
    logprobs: list[TokenLogprob] = []
    candidates = await conversation.prefill()
    tally.cached_tokens = conversation.cached_tokens
    last_s = clock.monotonic_s()
    observer.first_token(last_s - started_s)
    while True:
        choice = sampler.choose(candidates)
        tally.completion_tokens += 1
        if choice.token in model.eos_ids:
            text, finish = _end(detokeniser, scanner), FinishReason.STOP
            break
        if spec.top_logprobs is not None:
            top = top_logprobs(candidates, spec.top_logprobs)
            logprobs.append(TokenLogprob(choice.token, choice.logprob, top))
        text = scanner.feed(detokeniser.feed(choice.token))
        if scanner.stopped:
            finish = FinishReason.STOP
            break
        if tally.completion_tokens >= spec.max_new_tokens:
            text, finish = text + _end(detokeniser, scanner), FinishReason.LENGTH
            break
        meanwhile = None
        if text:
            # Writing to the client takes as long as a device's part in a token: the devices need not wait for it.
            meanwhile = partial(emit, Chunk(spec.index, text, logprobs))
            logprobs = []
        candidates = await conversation.decode(choice.token, meanwhile)
        now_s = clock.monotonic_s()
        observer.next_token(now_s - last_s)
        last_s = now_s
    await emit(Chunk(spec.index, text, logprobs, finish))


def _end(detokeniser: Detokeniser, scanner: StopScanner) -> str:
    """What the end of the tokens makes certain; a stop string can still be completed by an unfinished character."""
    text = scanner.feed(detokeniser.finish())
    return text if scanner.stopped else text + scanner.finish()


async def generate_all(choices: Sequence[Awaitable[None]]) -> None:
    """Run the choices of one answer together; the first failure ends the others and is raised."""
    if len(choices) == 1:
        await choices[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(_awaited(choice))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _awaited(choice: Awaitable[None]) -> None:
    await choice
