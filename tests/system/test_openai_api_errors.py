"""Bad input and bad luck at the API: OpenAI's error shape, the right status, and no conversation left open."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from fallow.domain.errors import EngineError, NoRoute
from fallow.gateway.api import ApiLimits
from fallow.gateway.keys import ApiKey, new_key
from fallow.gateway.memory import Faults
from fallow.policy.rate_limit import KeyLimits
from tests.unit.gateway.gateway_world import (
    CHATML,
    CONTEXT,
    MODEL,
    SPECIAL,
    app_of,
    manifest,
    run,
    saying,
    until,
    world,
)

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": MODEL, "messages": HELLO}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


def post(path: str, body: Any, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
    """One request to the app itself; what needs a socket has a real server below."""

    async def scenario() -> httpx.Response:
        source, app = app_of(**options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            reply = await http.post(path, content=content, headers=headers)
            assert source.open_count == 0
            return reply

    return run(scenario())


def error_of(reply: httpx.Response) -> dict[str, Any]:
    body = reply.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"seed": 1 << 70}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"service_tier": "first class"}, "service_tier"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": "Hello"}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=[json.dumps(fields)[:50] for fields, _ in BAD_FIELDS])
def test_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    reply = post("/v1/chat/completions", CHAT | fields)
    assert reply.status_code == 400
    error = error_of(reply)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 6}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
    ],
)
def test_bad_completion_field_is_named(fields: dict[str, Any], param: str) -> None:
    reply = post("/v1/completions", {"model": MODEL, "prompt": "a"} | fields)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_not_finite_is_named(number: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {number}}}'
    reply = post("/v1/chat/completions", body.encode())
    assert (reply.status_code, error_of(reply)["param"]) == (400, "temperature")


MALFORMED = (
    *(b"", b"{", b"null", b"[]", b'"x"', b"not json", b'{"model": 5}'),
    *(b"\xff\xfe", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b'{"a":' * 50_000, b"[" * 100_000),
)


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:20]))
def test_malformed_body(body: bytes) -> None:
    reply = post("/v1/chat/completions", body)
    assert reply.status_code == 400
    error_of(reply)


def test_missing_field_is_named() -> None:
    assert error_of(post("/v1/chat/completions", {"model": MODEL}))["param"] == "messages"
    assert error_of(post("/v1/completions", {"model": MODEL}))["param"] == "prompt"


def test_unknown_fields_and_nulls_are_ignored() -> None:
    nothing = dict.fromkeys(
        ["temperature", "top_p", "stop", "seed", "n", "max_tokens", "logit_bias", "tools", "stream"]
    )
    body = CHAT | nothing | {"user": "me", "metadata": {"a": 1}, "max_completion_tokens": 2, "x": [[[{}]]]}
    assert post("/v1/chat/completions", body).status_code == 200


def test_unknown_model() -> None:
    for reply in (
        post("/v1/chat/completions", CHAT | {"model": "gpt-9"}),
        post("/v1/completions", {"model": "", "prompt": "a"}),
    ):
        assert (reply.status_code, error_of(reply)["code"]) == (404, "model_not_found")


def test_prompt_longer_than_the_context() -> None:
    long = [{"role": "user", "content": "a b c d e " * CONTEXT}]
    for body in (CHAT | {"messages": long}, CHAT | {"max_tokens": CONTEXT}):
        reply = post("/v1/chat/completions", body)
        assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")


def test_template_that_refuses_the_messages() -> None:
    body = CHAT | {"messages": [{"role": "system", "content": "x"}, *HELLO]}
    reply = post("/v1/chat/completions", body, manifests=[manifest(chat_template=NO_SYSTEM)])
    assert (reply.status_code, error_of(reply)["param"]) == (400, "messages")
    assert "no system here" in error_of(reply)["message"]


def test_hostile_or_broken_model_files_are_an_error_of_the_model() -> None:
    endless = manifest(chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")

    async def garbage(_: Any) -> bytes:
        return b"not a tokenizer"

    for options in ({"manifests": [endless]}, {"tokenizer_file": garbage}):
        reply = post("/v1/chat/completions", CHAT, **options)
        assert (reply.status_code, error_of(reply)["code"]) == (500, "bad_model")


def test_model_without_chat_template() -> None:
    reply = post("/v1/chat/completions", CHAT, manifests=[manifest(chat_template=None)])
    assert (reply.status_code, error_of(reply)["param"]) == (400, "model")


def test_body_that_is_too_large_declared_or_chunked() -> None:
    async def scenario() -> list[httpx.Response]:
        async def chunks() -> Any:
            for _ in range(40):
                yield b" " * 1000

        async with world(limits=ApiLimits(max_body_bytes=10_000)) as here, httpx.AsyncClient() as http:
            url = f"{here.base_url}/chat/completions"
            return [await http.post(url, content=b" " * 20_000), await http.post(url, content=chunks())]

    for reply in run(scenario()):
        assert reply.status_code == 413
        error_of(reply)


def test_paths_and_methods() -> None:
    async def scenario() -> list[httpx.Response]:
        async with world() as here, httpx.AsyncClient() as http:
            return [
                await http.get(f"{here.base_url}/nothing"),
                await http.get(f"{here.base_url}/chat/completions"),
                await http.get(f"{here.base_url}/models/none/such"),
                await http.options(f"{here.base_url}/models", headers={"origin": "https://example.org"}),
            ]

    replies = run(scenario())
    assert [reply.status_code for reply in replies] == [404, 405, 404, 405]
    for reply in replies:
        error_of(reply)
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_no_capacity_says_when_to_try_again() -> None:
    no_route = Faults(on_open=NoRoute("No devices can serve layers 4 to 8 at present."))
    for options in ({"faults": no_route}, {"capacity": 0}):
        for stream in (False, True):
            reply = post("/v1/chat/completions", CHAT | {"stream": stream}, **options)
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            error_of(reply)


def test_failure_of_one_choice_ends_the_others() -> None:
    reply = post("/v1/chat/completions", CHAT | {"n": 3}, capacity=2)
    assert (reply.status_code, error_of(reply)["code"]) == (503, "kv_exhausted")


def test_failure_in_mid_stream_is_an_event_and_frees_the_conversation() -> None:
    async def scenario() -> tuple[str, list[bool]]:
        faults = Faults(after_tokens=3, error=EngineError("the last device is gone"))
        async with world(saying("a b c d e"), faults=faults) as here, httpx.AsyncClient() as http:
            reply = await http.post(f"{here.base_url}/chat/completions", json=CHAT | {"stream": True, "temperature": 0})
            return reply.text, [each.kept for each in here.source.closed]

    text, kept = run(scenario())
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "the last device is gone" in json.loads(events[-2])["error"]["message"]
    assert json.loads(events[-3])["choices"][0]["delta"]["content"]
    assert kept == [False]


def test_failure_without_a_name_tells_nothing_but_its_request_id() -> None:
    def broken(tokens: Any) -> Any:
        raise ValueError("secret detail")

    reply = post("/v1/chat/completions", CHAT, predictor=broken)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"] in error_of(reply)["message"]


def test_keys_are_asked_for_and_checked() -> None:
    secret, sha256 = new_key()
    keys = [ApiKey(id="app", sha256=sha256)]

    async def scenario() -> list[int]:
        async with world(keys=keys) as here, httpx.AsyncClient() as http:
            statuses = []
            for given in (None, "Bearer wrong", f"Basic {secret}", "Bearer", f"Bearer {secret}x", f"Bearer {secret}"):
                headers = {} if given is None else {"authorization": given}
                chat = await http.post(f"{here.base_url}/chat/completions", json=CHAT, headers=headers)
                models = await http.get(f"{here.base_url}/models", headers=headers)
                assert chat.status_code == models.status_code
                if chat.status_code == 401:
                    assert error_of(chat)["code"] == "invalid_api_key"
                statuses.append(chat.status_code)
            assert (await http.get(f"{here.server.url}/health")).status_code == 200
            return statuses

    assert run(scenario()) == [401, 401, 401, 401, 401, 200]


def test_without_keys_only_this_machine_is_served() -> None:
    foreign = [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"origin": "https://evil.example"}]
    foreign += [{"origin": "null"}, {"origin": "http://localhost.evil.example"}]
    for headers in foreign:
        reply = post("/v1/chat/completions", CHAT, headers)
        assert (reply.status_code, error_of(reply)["code"]) == (403, "foreign_host")
    for headers in (
        {"host": "LOCALHOST:80"},
        {"host": "[::1]:1"},
        {"host": "127.0.0.1", "origin": "http://localhost:3000"},
    ):
        assert post("/v1/chat/completions", CHAT, headers).status_code == 200
    secret, sha256 = new_key()
    headers = {"host": "api.example", "authorization": f"Bearer {secret}"}
    assert post("/v1/chat/completions", CHAT, headers, keys=[ApiKey(id="a", sha256=sha256)]).status_code == 200


def test_limits_of_a_key_do_not_touch_its_neighbour() -> None:
    (secret, sha256), (other, other_sha256) = new_key(), new_key()
    limits = KeyLimits(requests_per_minute=2)
    keys = [ApiKey(id="app", sha256=sha256, limits=limits), ApiKey(id="other", sha256=other_sha256, limits=limits)]

    async def scenario() -> list[httpx.Response]:
        async with world(keys=keys) as here, httpx.AsyncClient() as http:
            url = f"{here.base_url}/chat/completions"
            return [
                await http.post(url, json=CHAT, headers={"authorization": f"Bearer {key}"})
                for key in (secret, secret, secret, other)
            ]

    replies = run(scenario())
    assert [reply.status_code for reply in replies] == [200, 200, 429, 200]
    error = error_of(replies[2])
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(replies[2].headers["retry-after"]) <= 60


def test_tokens_and_concurrency_of_a_key() -> None:
    (few, few_sha256), (one, one_sha256) = new_key(), new_key()
    keys = [
        ApiKey(id="few", sha256=few_sha256, limits=KeyLimits(tokens_per_minute=10)),
        ApiKey(id="one", sha256=one_sha256, limits=KeyLimits(concurrent_requests=1)),
    ]

    async def scenario() -> None:
        async with world(keys=keys, decode_s=0.01) as here, httpx.AsyncClient() as http:
            url = f"{here.base_url}/chat/completions"

            async def ask(key: str, tokens: int) -> httpx.Response:
                body = CHAT | {"max_tokens": tokens, "seed": 1}
                return await http.post(url, json=body, headers={"authorization": f"Bearer {key}"})

            assert (await ask(few, 5)).status_code == 200
            refused = await ask(few, 5)
            assert (refused.status_code, error_of(refused)["type"]) == (429, "tokens")
            running = asyncio.create_task(ask(one, 50))
            await until(lambda: here.source.open_count == 1)
            assert (await ask(one, 1)).status_code == 429
            assert (await running).status_code == 200
            assert (await ask(one, 1)).status_code == 200

    run(scenario())


def test_special_tokens_do_not_show() -> None:
    async def scenario() -> str:
        async with world(saying(f"a{SPECIAL[0]}b")) as here, httpx.AsyncClient() as http:
            reply = await http.post(f"{here.base_url}/chat/completions", json=CHAT | {"temperature": 0})
            return str(reply.json()["choices"][0]["message"]["content"])

    assert run(scenario()) == "ab"
