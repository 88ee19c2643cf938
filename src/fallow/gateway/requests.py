"""From a request's body to a plan, or a `BadRequest` that names the field.

Parses once, strictly; everything after this trusts the types. Ranges are OpenAI's; `top_k` (0 and -1: no cut) and
`min_p` follow vLLM and llama.cpp. What is known but not served (tools, JSON mode, images, `suffix`, prompt
log-probabilities) is refused by name rather than ignored. Knows no model: what depends on one is checked in `api.py`.
"""

import json
import math
import re
from typing import Any, TypeVar

import msgspec

from fallow.domain.errors import BadRequest
from fallow.domain.service import ServiceTier
from fallow.gateway.sampling import SamplingParams
from fallow.gateway.schema import ChatMessage, ChatRequest, CommonRequest, CompletionRequest, ContentPart

MAX_STOPS = 4
MAX_CHOICES = 16
"""`n` times prompts; each is a session on the fleet."""
MAX_MESSAGES = 4096
MAX_LOGIT_BIASES = 1024
MAX_CHAT_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions endpoint does without `max_tokens`."""

Request = TypeVar("Request", ChatRequest, CompletionRequest)

_PATH = re.compile(r" - at `\$\.?(.*)`$")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to answer, apart from the prompt."""

    model: str
    sampling: SamplingParams
    stops: tuple[str, ...]
    max_new_tokens: int | None
    """`None`: as the server's configuration has it."""
    choices: int
    top_logprobs: int | None
    """`None`: no log-probabilities; 0: the chosen token's only."""
    streamed: bool
    usage_in_stream: bool
    tier: ServiceTier | None
    """`None`: it named none."""


def decode_request(body: bytes, kind: type[Request]) -> Request:
    """Raises `BadRequest` with the field's name where there is one."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        path = _PATH.search(message)
        raise BadRequest(
            f"The request is not valid: {message}.", (path[1] or None) if path else _missing(message)
        ) from error
    except RecursionError as error:
        raise BadRequest("The request is nested too deeply.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        param = _non_finite_field(body)
        if param is not None:
            raise BadRequest(f"{param!r} must be a finite number; NaN and Infinity are not JSON.", param) from error
        raise BadRequest(f"The request's body is not valid JSON: {error}.") from error


def plan_chat(request: ChatRequest) -> Plan:
    """Check a chat request. Raises `BadRequest`."""
    _refuse_unserved_chat(request)
    if not request.messages:
        raise BadRequest("'messages' must have at least one message.", "messages")
    if len(request.messages) > MAX_MESSAGES:
        raise BadRequest(f"'messages' has {len(request.messages)} messages; at most {MAX_MESSAGES}.", "messages")
    top_logprobs = _chat_logprobs(request)
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    name = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
    return _plan(request, _in_range(name, limit, 1, None), top_logprobs)


def plan_completion(request: CompletionRequest) -> Plan:
    """Check a completion request. Raises `BadRequest`."""
    if request.suffix:
        raise BadRequest("'suffix' is not supported.", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise BadRequest("'best_of' is only supported when it equals 'n'.", "best_of")
    if request.echo and request.logprobs is not None:
        raise BadRequest("'echo' with 'logprobs' is not supported: prompt tokens get no log-probabilities.", "echo")
    top_logprobs = _in_range("logprobs", request.logprobs, 0, MAX_COMPLETION_LOGPROBS)
    limit = _in_range("max_tokens", request.max_tokens, 1, None)
    return _plan(request, DEFAULT_COMPLETION_TOKENS if limit is None else limit, top_logprobs)


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain dicts with text content. Raises `BadRequest`.

    `developer` is what newer OpenAI clients call `system`; templates know the older name.
    """
    rendered = []
    for index, message in enumerate(messages):
        fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        fields["content"] = _text(message, f"messages[{index}].content")
        if message.name is not None:
            fields["name"] = message.name
        if message.tool_calls is not None:
            fields["tool_calls"] = [_parsed_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            fields["tool_call_id"] = message.tool_call_id
        rendered.append(fields)
    return rendered


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """One or more prompts, each text or token ids. Raises `BadRequest`."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("'prompt' must not be empty.", "prompt")
    if all(isinstance(part, int) for part in prompt):
        return [[part for part in prompt if isinstance(part, int)]]
    texts: list[str | list[int]] = [part for part in prompt if not isinstance(part, int)]
    if len(texts) != len(prompt) or len({type(part) for part in texts}) != 1:
        raise BadRequest("'prompt' must be text, a list of texts, a list of tokens or a list of such lists.", "prompt")
    return texts


def _plan(request: CommonRequest, max_new_tokens: int | None, top_logprobs: int | None) -> Plan:
    options = request.stream_options
    if options is not None and not request.stream:
        raise BadRequest("'stream_options' is only allowed with 'stream'.", "stream_options")
    return Plan(
        model=request.model,
        sampling=_sampling(request),
        stops=_stops(request.stop),
        max_new_tokens=max_new_tokens,
        choices=_in_range("n", request.n, 1, MAX_CHOICES) or 1,
        top_logprobs=top_logprobs,
        streamed=bool(request.stream),
        usage_in_stream=bool(options and options.include_usage),
        tier=_tier(request.service_tier),
    )


def _tier(named: str | None) -> ServiceTier | None:
    """`fast` is OpenAI's other name for `priority`; its other tiers are no different from the default one here."""
    if named is None:
        return None
    return ServiceTier.PRIORITY if named in ("priority", "fast") else ServiceTier.DEFAULT


def _sampling(request: CommonRequest) -> SamplingParams:
    temperature = _number_in_range("temperature", request.temperature, 0.0, 2.0)
    top_p = _number_in_range("top_p", request.top_p, 0.0, 1.0)
    top_k = _in_range("top_k", request.top_k, -1, None)
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k if top_k is not None and top_k > 0 else None,
        min_p=_number_in_range("min_p", request.min_p, 0.0, 1.0) or 0.0,
        presence_penalty=_number_in_range("presence_penalty", request.presence_penalty, -2.0, 2.0) or 0.0,
        frequency_penalty=_number_in_range("frequency_penalty", request.frequency_penalty, -2.0, 2.0) or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=_in_range("seed", request.seed, -(1 << 63), (1 << 64) - 1),
    )


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise BadRequest(f"'logit_bias' has {len(biases)} entries; at most {MAX_LOGIT_BIASES}.", "logit_bias")
    parsed = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise BadRequest(f"'logit_bias' has the key {token[:40]!r}, which is not a token id.", "logit_bias")
        _number_in_range("logit_bias", bias, -100.0, 100.0)
        parsed[int(token)] = bias
    return parsed


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"'stop' has {len(stops)} strings; at most {MAX_STOPS}.", "stop")
    if "" in stops:
        raise BadRequest("'stop' must not have an empty string.", "stop")
    return stops


def _chat_logprobs(request: ChatRequest) -> int | None:
    count = _in_range("top_logprobs", request.top_logprobs, 0, MAX_CHAT_TOP_LOGPROBS)
    if not request.logprobs:
        if count:
            raise BadRequest("'top_logprobs' is only allowed with 'logprobs'.", "top_logprobs")
        return None
    return count or 0


def _refuse_unserved_chat(request: ChatRequest) -> None:
    if request.response_format is not None and request.response_format.type != "text":
        raise BadRequest(
            f"'response_format' {request.response_format.type!r} is not supported; only 'text' is.", "response_format"
        )
    if request.tools and request.tool_choice != "none":
        raise BadRequest("'tools' are not supported: answers are not parsed into tool calls.", "tools")
    if request.functions:
        raise BadRequest("'functions' are not supported.", "functions")


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates expect the object, as in transformers and vLLM."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _text(message: ChatMessage, param: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise BadRequest(f"A {message.role} message needs content.", param)
    return "\n".join(_part_text(part, param) for part in content)


def _part_text(part: ContentPart, param: str) -> str:
    if part.type != "text":
        raise BadRequest(f"Content of type {part.type!r} is not supported; only 'text' is.", param)
    if part.text is None:
        raise BadRequest("A content part of type 'text' needs 'text'.", param)
    return part.text


def _in_range(param: str, value: int | None, low: int, high: int | None) -> int | None:
    if value is not None and (value < low or (high is not None and value > high)):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadRequest(f"{param!r} must be {bound}, not {str(value)[:40]}.", param)
    return value


def _number_in_range(param: str, value: float | None, low: float, high: float) -> float | None:
    # A comparison with NaN is false, so the range check refuses it as well.
    if value is not None and not low <= value <= high:
        raise BadRequest(f"{param!r} must be between {low:g} and {high:g}, not {value}.", param)
    return value


def _missing(message: str) -> str | None:
    """The field that msgspec says is missing from the top level."""
    match = re.search(r"missing required field `([^`]*)`", message)
    return match[1] if match else None


def _non_finite_field(body: bytes) -> str | None:
    """The field that holds `NaN` or `Infinity`, which Python clients send and JSON does not have."""
    if b"NaN" not in body and b"Infinity" not in body:
        return None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return next((name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)), None)
