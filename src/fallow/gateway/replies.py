"""Generated chunks as the OpenAI API's JSON, streamed or whole.

`ChatAnswer` and `CompletionAnswer` each turn `Chunk`s into events, or collect them into one reply. One is made for
each request. They do no I/O.
"""

from typing import Protocol

import msgspec

from fallow.domain.service import ServiceTier
from fallow.gateway.detokenise import TokenBytes
from fallow.gateway.generation import Chunk, FinishReason, TokenLogprob
from fallow.gateway.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionReply,
    Delta,
    TopLogprob,
    Usage,
)

_ENCODER = msgspec.json.Encoder()


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What every chunk and reply of one request repeats."""

    id: str
    created: int
    model: str
    fingerprint: str
    logprobs: bool
    usage_in_stream: bool
    tier: ServiceTier | msgspec.UnsetType
    """What the request was given of the tier that it named, if it named one."""


class Answer(Protocol):
    """One request's answer in the making."""

    def events(self, chunk: Chunk) -> list[bytes]:
        """The stream events for a chunk, encoded."""
        ...

    def usage_event(self, usage: Usage) -> bytes:
        """The event that ends a stream whose client asked for usage."""
        ...

    def collect(self, chunk: Chunk) -> None:
        """Add a chunk to the whole reply."""
        ...

    def reply(self, usage: Usage) -> bytes:
        """The whole reply, once every choice has finished."""
        ...


class _Collected:
    def __init__(self, text: str) -> None:
        self.texts = [text]
        self.logprobs: list[TokenLogprob] = []
        self.finish = FinishReason.STOP

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.logprobs.extend(chunk.logprobs)
        if chunk.finish is not None:
            self.finish = chunk.finish


class ChatAnswer:
    """`/v1/chat/completions`."""

    def __init__(self, envelope: Envelope, token_bytes: TokenBytes, choices: int) -> None:
        self._envelope = envelope
        self._bytes = token_bytes
        self._begun: set[int] = set()
        self._collected = [_Collected("") for _ in range(choices)]
        self._usage = None if envelope.usage_in_stream else msgspec.UNSET

    def events(self, chunk: Chunk) -> list[bytes]:
        events = []
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            events.append(self._event(ChatChunkChoice(index=chunk.index, delta=Delta(role="assistant", content=""))))
        if chunk.text or chunk.logprobs:
            logprobs = self._logprobs(chunk.logprobs)
            events.append(
                self._event(ChatChunkChoice(index=chunk.index, delta=Delta(content=chunk.text), logprobs=logprobs))
            )
        if chunk.finish is not None:
            events.append(self._event(ChatChunkChoice(index=chunk.index, delta=Delta(), finish_reason=chunk.finish)))
        return events

    def usage_event(self, usage: Usage) -> bytes:
        return _ENCODER.encode(self._chunk([], usage))

    def collect(self, chunk: Chunk) -> None:
        self._collected[chunk.index].add(chunk)

    def reply(self, usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content="".join(collected.texts)),
                logprobs=self._logprobs(collected.logprobs),
                finish_reason=collected.finish,
            )
            for index, collected in enumerate(self._collected)
        ]
        envelope = self._envelope
        reply = ChatReply(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            choices=choices,
            usage=usage,
            system_fingerprint=envelope.fingerprint,
            service_tier=envelope.tier,
        )
        return _ENCODER.encode(reply)

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return _ENCODER.encode(self._chunk([choice], self._usage))

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | msgspec.UnsetType | None) -> ChatChunk:
        envelope = self._envelope
        return ChatChunk(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            usage=usage,
            service_tier=envelope.tier,
        )

    def _logprobs(self, tokens: list[TokenLogprob]) -> ChatLogprobs | None:
        if not self._envelope.logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(each) for each in tokens])

    def _token_logprob(self, each: TokenLogprob) -> ChatTokenLogprob:
        top = [
            TopLogprob(token=self._bytes.label(token), logprob=logprob, bytes=list(self._bytes.of(token)))
            for token, logprob in each.top
        ]
        label, encoded = self._bytes.label(each.token), list(self._bytes.of(each.token))
        return ChatTokenLogprob(token=label, logprob=each.logprob, bytes=encoded, top_logprobs=top)


class CompletionAnswer:
    """`/v1/completions`. `echoes` holds what each choice's text begins with: its prompt, or nothing."""

    def __init__(self, envelope: Envelope, token_bytes: TokenBytes, echoes: list[str]) -> None:
        self._envelope = envelope
        self._bytes = token_bytes
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]
        self._begun: set[int] = set()
        self._collected = [_Collected(echo) for echo in echoes]
        self._usage = None if envelope.usage_in_stream else msgspec.UNSET

    def events(self, chunk: Chunk) -> list[bytes]:
        text = chunk.text
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            text = self._echoes[chunk.index] + text
        logprobs = self._logprobs(chunk.index, chunk.logprobs)
        choice = CompletionChoice(index=chunk.index, text=text, logprobs=logprobs, finish_reason=chunk.finish)
        return [_ENCODER.encode(self._chunk([choice], self._usage))]

    def usage_event(self, usage: Usage) -> bytes:
        return _ENCODER.encode(self._chunk([], usage))

    def collect(self, chunk: Chunk) -> None:
        self._collected[chunk.index].add(chunk)

    def reply(self, usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index=index,
                text="".join(collected.texts),
                logprobs=self._logprobs(index, collected.logprobs),
                finish_reason=collected.finish,
            )
            for index, collected in enumerate(self._collected)
        ]
        envelope = self._envelope
        reply = CompletionReply(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            choices=choices,
            usage=usage,
            system_fingerprint=envelope.fingerprint,
            service_tier=envelope.tier,
        )
        return _ENCODER.encode(reply)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> CompletionChunk:
        envelope = self._envelope
        return CompletionChunk(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.fingerprint,
            choices=choices,
            usage=usage,
            service_tier=envelope.tier,
        )

    def _logprobs(self, index: int, tokens: list[TokenLogprob]) -> CompletionLogprobs | None:
        if not self._envelope.logprobs:
            return None
        labels = [self._bytes.label(each.token) for each in tokens]
        offsets = []
        for each in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._bytes.of(each.token).decode("utf-8", "replace"))
        top = [
            {self._bytes.label(token): logprob for token, logprob in [*each.top, (each.token, each.logprob)]}
            for each in tokens
        ]
        logprobs = [each.logprob for each in tokens]
        return CompletionLogprobs(tokens=labels, token_logprobs=logprobs, top_logprobs=top, text_offset=offsets)
