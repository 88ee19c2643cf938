"""The OpenAI API's JSON, as types. Shapes only: ranges and combinations are checked in `requests.py`.

Fields that Fallow does not know are ignored, as other OpenAI-compatible servers do. Fields that are known but not
served are declared so that asking for them is an error instead of a silent loss. `top_k`, `min_p` and
`chat_template_kwargs` are extensions that vLLM and llama.cpp share. Unset optional fields are `None`, as clients may
send null.
"""

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a streamed reply."""

    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Which form the answer should have; only `text` is served."""

    type: str


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """Only parts of type `text` are served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both generating endpoints take."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


# --- replies ------------------------------------------------------------------------------------


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of every reply that is an error."""

    error: ErrorBody


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One model in a listing."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "fallow"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that can be asked for."""

    data: list[ModelCard]
    object: str = "list"


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """How many prompt tokens came from a cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A chosen token, its log-probability and the candidates beside it."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of a plain completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of a chat's answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a chat reply that is not streamed."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    service_tier: str | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of a prompt's completions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a completion reply that is not streamed."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "text_completion"
    service_tier: str | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a streamed chat chunk adds. The role comes with the first one."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one of a chat's answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` is left out unless the client asked for it; then it is null in every chunk but the last. `service_tier`
    is left out unless the client named one."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    service_tier: str | msgspec.UnsetType = msgspec.UNSET


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed completion."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    service_tier: str | msgspec.UnsetType = msgspec.UNSET
