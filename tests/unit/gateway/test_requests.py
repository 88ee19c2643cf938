"""Requests at the edge: whatever arrives is either a plan or a `BadRequest`."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import BadRequest
from fallow.gateway.requests import (
    MAX_MESSAGES,
    decode_request,
    plan_chat,
    plan_completion,
    prompts_of,
    template_messages,
)
from fallow.gateway.schema import ChatRequest, CompletionRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def bodies(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the right names and any values, so that every check is reached."""
    names = [field.name for field in msgspec.structs.fields(kind)]
    good = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "temperature": 0.5, "n": 2}
    return st.dictionaries(st.sampled_from(names), JSON, max_size=6).map(lambda odd: good | odd)


@given(bodies(ChatRequest))
@settings(max_examples=150)
def test_any_chat_body_is_a_plan_or_a_bad_request(body: dict[str, Any]) -> None:
    try:
        request = decode_request(json.dumps(body).encode(), ChatRequest)
        plan = plan_chat(request)
        messages = template_messages(request.messages)
    except BadRequest as refusal:
        assert refusal.message
        return
    assert 1 <= plan.choices <= 16
    assert 0.0 <= plan.sampling.temperature <= 2.0
    assert all(isinstance(message["content"], str) for message in messages)


@given(bodies(CompletionRequest))
@settings(max_examples=150)
def test_any_completion_body_is_a_plan_or_a_bad_request(body: dict[str, Any]) -> None:
    try:
        request = decode_request(json.dumps(body).encode(), CompletionRequest)
        plan = plan_completion(request)
        prompts = prompts_of(request)
    except BadRequest as refusal:
        assert refusal.message
        return
    assert prompts
    assert plan.max_new_tokens is not None
    assert plan.max_new_tokens >= 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_request(body, ChatRequest)


def chat(**fields: Any) -> ChatRequest:
    base: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    return decode_request(json.dumps(base | fields).encode(), ChatRequest)


def test_defaults_are_openai_s() -> None:
    plan = plan_chat(chat())
    assert (plan.sampling.temperature, plan.sampling.top_p, plan.sampling.top_k) == (1.0, 1.0, None)
    assert (plan.choices, plan.max_new_tokens, plan.top_logprobs, plan.streamed) == (1, None, None, False)


def test_newer_name_of_the_limit_wins_and_top_k_can_be_off() -> None:
    assert plan_chat(chat(max_tokens=5, max_completion_tokens=7)).max_new_tokens == 7
    assert plan_chat(chat(top_k=0)).sampling.top_k is None
    assert plan_chat(chat(top_k=-1)).sampling.top_k is None
    assert plan_chat(chat(top_k=3)).sampling.top_k == 3


def test_tools_may_be_named_when_they_must_not_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert plan_chat(chat(tools=tools, tool_choice="none"))
    assert plan_chat(chat(tools=[]))
    with pytest.raises(BadRequest):
        plan_chat(chat(tools=tools, tool_choice="auto"))


def test_calls_of_tools_reach_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    broken = {"function": {"name": "f", "arguments": "{"}}
    request = chat(
        messages=[
            {"role": "assistant", "tool_calls": [call, broken]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
        ]
    )
    assistant, tool = template_messages(request.messages)
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    assert assistant["tool_calls"][1]["function"]["arguments"] == "{"
    assert tool == {"role": "tool", "content": "ok", "tool_call_id": "1"}


def test_number_of_messages_is_bounded() -> None:
    with pytest.raises(BadRequest, match="messages"):
        plan_chat(chat(messages=[{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)))
