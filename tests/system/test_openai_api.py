"""The `openai` Python SDK against a real server: what an application sees when everything goes well."""

import asyncio
import re

import httpx
from openai import AsyncOpenAI

from tests.unit.gateway.gateway_world import MODEL, World, run, saying, tokenizer, until, world

ANSWER = "The fleet answers: Grüße, 日本 🦊!"
HELLO = [{"role": "user", "content": "Hello"}]


def client(here: World, key: str = "unused") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=here.base_url, api_key=key, max_retries=0, timeout=10)


def test_models_are_listed_and_found() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            listed = [model.id async for model in openai.models.list()]
            found = await openai.models.retrieve(MODEL)
        assert listed == [MODEL]
        assert (found.id, found.object, found.owned_by) == (MODEL, "model", "fallow")

    run(scenario())


def test_chat_answers_whole_with_usage() -> None:
    async def scenario() -> None:
        async with world(saying(ANSWER)) as here, client(here) as openai:
            reply = await openai.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
            closed = list(here.source.closed)
        assert reply.choices[0].message.content == ANSWER
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].finish_reason == "stop"
        prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert reply.usage.prompt_tokens == len(tokenizer().encode(prompt).ids)
        assert reply.usage.completion_tokens == len(tokenizer().encode(ANSWER).ids) + 1  # with the end of the turn
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert [each.kept for each in closed] == [True]

    run(scenario())


def test_chat_streams_the_same_text_in_whole_characters() -> None:
    async def scenario() -> None:
        async with world(saying(ANSWER)) as here, client(here) as openai:
            stream = await openai.chat.completions.create(
                model=MODEL, messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(deltas) == ANSWER
        assert all("\ufffd" not in delta for delta in deltas)
        assert len(deltas) > 5, "one event a token, not one for the answer"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(tokenizer().encode(ANSWER).ids) + 1
        assert len({chunk.id for chunk in chunks}) == 1

    run(scenario())


def test_stream_without_usage_option_has_no_usage() -> None:
    async def scenario() -> bytes:
        async with world(saying("a b")) as here, httpx.AsyncClient() as http:
            body = {"model": MODEL, "messages": HELLO, "stream": True, "temperature": 0}
            reply = await http.post(f"{here.base_url}/chat/completions", json=body)
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert re.fullmatch(r"[0-9a-f]{16}", reply.headers["x-request-id"])
            return reply.content

    content = run(scenario())
    assert content.endswith(b"data: [DONE]\n\n")
    assert b'"usage"' not in content


def test_messages_with_text_parts_and_developer_role() -> None:
    async def scenario() -> tuple[int, int]:
        async with world(saying("ok")) as here, client(here) as openai:
            parts = [
                {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
                {"role": "user", "content": "Hello"},
            ]
            plain = [{"role": "system", "content": "Be\nbrief"}, {"role": "user", "content": "Hello"}]
            replies = [
                await openai.chat.completions.create(model=MODEL, messages=messages, temperature=0)
                for messages in (parts, plain)
            ]
        return replies[0].usage.prompt_tokens, replies[1].usage.prompt_tokens

    by_parts, by_text = run(scenario())
    assert by_parts == by_text


def test_stop_string_across_tokens_ends_the_text_before_it() -> None:
    async def scenario() -> None:
        async with world(saying("Idle devices answer questions.")) as here, client(here) as openai:
            whole = await openai.chat.completions.create(
                model=MODEL, messages=HELLO, temperature=0, stop=["zzz", "ces ans"]
            )
            stream = await openai.chat.completions.create(
                model=MODEL, messages=HELLO, temperature=0, stop="ces ans", stream=True
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            closed = list(here.source.closed)
        assert whole.choices[0].message.content == streamed == "Idle devi"
        assert whole.choices[0].finish_reason == "stop"
        assert [each.kept for each in closed] == [True, True]

    run(scenario())


def test_limit_of_new_tokens() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            chat = await openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3, seed=1)
            completion = await openai.completions.create(model=MODEL, prompt="Idle", seed=1)
        assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (3, "length")
        assert (completion.usage.completion_tokens, completion.choices[0].finish_reason) == (16, "length")

    run(scenario())


def test_choices_differ_from_each_other_and_repeat_with_their_seed() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:

            async def ask(seed: int) -> list[str]:
                reply = await openai.chat.completions.create(
                    model=MODEL, messages=HELLO, n=2, seed=seed, max_tokens=12, temperature=1.5
                )
                assert [choice.index for choice in reply.choices] == [0, 1]
                assert reply.usage.completion_tokens <= 24
                return [choice.message.content for choice in reply.choices]

            first, again, other = await ask(7), await ask(7), await ask(8)
            closed = list(here.source.closed)[:2]
        assert first == again != other
        assert first[0] != first[1]
        assert sorted(each.kept for each in closed) == [False, True], "one cache is kept for a follow-up, not each"

    run(scenario())


def test_streamed_choices_are_told_apart() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            options = {"model": MODEL, "messages": HELLO, "n": 3, "seed": 5, "max_tokens": 8}
            whole = await openai.chat.completions.create(**options)
            texts = ["", "", ""]
            async for chunk in await openai.chat.completions.create(**options, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]

    run(scenario())


def test_chat_logprobs() -> None:
    async def scenario() -> None:
        async with world(saying("Grüße 🦊")) as here, client(here) as openai:
            options = {"model": MODEL, "messages": HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 3}
            whole = await openai.chat.completions.create(**options)
            stream = await openai.chat.completions.create(**options, stream=True)
            streamed = [
                token
                async for chunk in stream
                for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
            ]
        tokens = whole.choices[0].logprobs.content
        assert b"".join(bytes(token.bytes) for token in tokens).decode() == "Grüße 🦊"
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert all(token.top_logprobs[0].logprob == token.logprob <= 0 for token in tokens)
        assert [token.bytes for token in streamed] == [token.bytes for token in tokens]

    run(scenario())


def test_completion_prompts_echo_and_logprobs() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            tokens = tokenizer().encode("Idle").ids
            options = {"model": MODEL, "max_tokens": 4, "seed": 3}
            text = await openai.completions.create(prompt="Idle", **options)
            ids = await openai.completions.create(prompt=tokens, **options)
            several = await openai.completions.create(prompt=["Idle", "fleet"], **options)
            lists = await openai.completions.create(prompt=[tokens, tokens], echo=True, n=2, **options)
            logprobs = await openai.completions.create(prompt="Idle", logprobs=2, **options)
        assert text.choices[0].text == ids.choices[0].text == several.choices[0].text
        assert [choice.index for choice in several.choices] == [0, 1]
        assert len(lists.choices) == 4
        assert lists.choices[0].text == "Idle" + text.choices[0].text
        assert lists.usage.prompt_tokens == 2 * len(tokens)
        found = logprobs.choices[0].logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 4
        assert found.text_offset[0] == 0
        assert all(
            2 <= len(top) <= 3 and token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True)
        )

    run(scenario())


def test_completion_streams() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            options = {"model": MODEL, "prompt": "Idle", "max_tokens": 6, "seed": 3, "echo": True}
            whole = await openai.completions.create(**options)
            stream = await openai.completions.create(**options, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert chunks[-1].usage.completion_tokens == 6

    run(scenario())


def test_the_tier_that_was_given_is_told_to_those_who_named_one() -> None:
    async def scenario() -> None:
        async with world() as here, client(here) as openai:
            options = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
            told = {
                tier: (await openai.chat.completions.create(**options, service_tier=tier)).service_tier
                for tier in ("auto", "default", "flex", "priority", "fast")
            }
            unasked = await openai.chat.completions.create(**options)
            stream = await openai.chat.completions.create(**options, service_tier="priority", stream=True)
            chunks = [chunk async for chunk in stream]
        assert [tier for tier, given in told.items() if given == "priority"] == ["priority", "fast"]
        assert set(told.values()) == {"default", "priority"}
        assert "service_tier" not in unasked.model_fields_set
        assert {chunk.service_tier for chunk in chunks} == {"priority"}

    run(scenario())


def test_follow_up_turn_is_served_from_the_cache_of_its_own_key_only() -> None:
    async def scenario() -> None:
        async with world(saying("ok")) as here, client(here) as openai:
            first = await openai.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
            turns = [*HELLO, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "And now?"}]
            second = await openai.chat.completions.create(model=MODEL, messages=turns, temperature=0)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens

    run(scenario())


def test_greedy_bias_and_penalties_steer_the_answer() -> None:
    async def scenario() -> None:
        async with world(saying("a a a a")) as here, client(here) as openai:
            options = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 4}
            plain = await openai.chat.completions.create(**options)
            token = tokenizer().encode("a").ids[0]
            banned = await openai.chat.completions.create(**options, logit_bias={str(token): -100})
        assert plain.choices[0].message.content == "a a a a"
        assert not banned.choices[0].message.content.startswith("a")

    run(scenario())


def test_hanging_up_frees_the_conversation_streamed_or_not() -> None:
    async def scenario(streamed: bool) -> None:
        async with world(decode_s=0.02) as here, httpx.AsyncClient(timeout=5) as http:
            body = {"model": MODEL, "messages": HELLO, "stream": streamed, "max_tokens": 200, "seed": 1}
            url = f"{here.base_url}/chat/completions"
            if streamed:
                async with http.stream("POST", url, json=body) as reply:
                    async for line in reply.aiter_lines():
                        if line.startswith("data:"):
                            break
            else:
                request = asyncio.create_task(http.post(url, json=body))
                await until(lambda: here.source.open_count == 1)
                request.cancel()
                await asyncio.wait([request])
            await until(lambda: here.source.open_count == 0)
            assert [each.kept for each in here.source.closed] == [False]
            assert here.source.closed[0].tokens < 150
            assert b"fallow_client_disconnects_total 1.0" in here.metrics.exposition()
            assert b"fallow_active_choices 0.0" in here.metrics.exposition()

    run(scenario(True))
    run(scenario(False))


def test_neighbour_streams_run_side_by_side() -> None:
    async def scenario() -> None:
        async with world(saying(ANSWER), decode_s=0.001) as here, client(here) as openai:

            async def ask() -> str:
                stream = await openai.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            answers = await asyncio.gather(*(ask() for _ in range(8)))
        assert answers == [ANSWER] * 8

    run(scenario())


def test_health_and_metrics() -> None:
    async def scenario() -> None:
        async with world(saying(ANSWER)) as here, client(here) as openai, httpx.AsyncClient() as http:
            await openai.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
            health = (await http.get(f"{here.server.url}/health")).json()
            metrics = (await http.get(f"{here.server.url}/metrics")).text
        assert health == {"status": "ok", "models": 1}
        tokens = len(tokenizer().encode(ANSWER).ids)
        assert f'fallow_tokens_total{{kind="completion"}} {tokens + 1}.0' in metrics
        assert 'fallow_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in metrics
        assert "fallow_first_token_seconds_count 1.0" in metrics
        assert f"fallow_next_token_seconds_count {tokens}.0" in metrics

    run(scenario())
