"""The loop of one choice: what it emits, what it counts, and how it leaves its conversation in every case."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import EngineError, KvExhausted, NoRoute
from fallow.gateway.generation import ChoiceSpec, Chunk, FinishReason, Tally, generate, generate_all
from fallow.gateway.memory import Faults, MemoryTokenSource, scripted_predictor
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.sampling import SamplingParams
from fallow.gateway.text import TextModel
from fallow.models.manifest import manifest_digest
from fallow.system_clock import SystemClock
from tests.unit.gateway.gateway_world import VOCABULARY, manifest, run, tokenizer, tokenizer_json

PROMPT = [5, 6, 7]
MODEL = TextModel(manifest(), manifest_digest(manifest()), tokenizer_json(), datetime.now)


def source_of(script: Sequence[int], **options: Any) -> MemoryTokenSource:
    predictor = scripted_predictor(VOCABULARY, len(PROMPT), [*script, 1])
    return MemoryTokenSource([manifest()], predictor, SystemClock(), **options)


def spec(**changes: Any) -> ChoiceSpec:
    fields: dict[str, Any] = {
        "index": 0,
        "prompt": PROMPT,
        "max_new_tokens": 100,
        "sampling": SamplingParams(temperature=0),
        "seed": 0,
        "stops": (),
        "top_logprobs": None,
        "owner": "me",
        "keep": True,
    }
    return ChoiceSpec(**(fields | changes))


async def generated(source: MemoryTokenSource, choice: ChoiceSpec) -> tuple[list[Chunk], Tally]:
    chunks: list[Chunk] = []
    tally = Tally()

    async def emit(chunk: Chunk) -> None:
        chunks.append(chunk)

    await generate(source, MODEL, choice, tally, emit, SystemClock(), GatewayMetrics())
    return chunks, tally


@given(st.text("aé🦊 日", max_size=20), st.integers(1, 40), st.sampled_from([(), ("🦊",), ("é日", "aa")]))
@settings(max_examples=60, deadline=None)
def test_chunks_add_up_and_the_tally_is_right(text: str, limit: int, stops: tuple[str, ...]) -> None:
    script = tokenizer().encode(text).ids
    source = source_of(script)
    chunks, tally = run(generated(source, spec(max_new_tokens=limit, stops=stops)))
    shown = "".join(chunk.text for chunk in chunks)
    whole = tokenizer().decode(script[:limit])
    assert whole.startswith(shown) or "\ufffd" in whole
    assert not any(stop in shown for stop in stops)
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    if chunks[-1].finish is FinishReason.LENGTH:
        assert tally.completion_tokens == limit
    else:
        assert tally.completion_tokens <= min(limit, len(script) + 1)
    assert [each.kept for each in source.closed] == [True]


def test_a_choice_that_is_not_to_be_kept_is_freed() -> None:
    source = source_of([9])
    run(generated(source, spec(keep=False)))
    assert [each.kept for each in source.closed] == [False]


@pytest.mark.parametrize("after_tokens", [0, 2])
def test_a_failure_frees_the_conversation(after_tokens: int) -> None:
    source = source_of([9] * 10, faults=Faults(after_tokens=after_tokens, error=EngineError("gone")))
    with pytest.raises(EngineError, match="gone"):
        run(generated(source, spec()))
    assert (source.open_count, [each.kept for each in source.closed]) == (0, [False])


def test_a_refusal_leaves_nothing_open() -> None:
    with pytest.raises(NoRoute):
        run(generated(source_of([9], faults=Faults(on_open=NoRoute("nobody"))), spec()))
    with pytest.raises(KvExhausted):
        run(generated(source_of([9], capacity=0), spec()))


def test_a_client_that_cannot_be_written_to_frees_the_conversation() -> None:
    source = source_of([9] * 10)

    async def emit(_: Chunk) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        run(generate(source, MODEL, spec(), Tally(), emit, SystemClock(), GatewayMetrics()))
    assert [each.kept for each in source.closed] == [False]


def test_cancelling_frees_the_conversation_and_keeps_the_tally() -> None:
    async def scenario() -> None:
        source = source_of([9] * 200, decode_s=0.001)
        tally, third = Tally(), asyncio.Event()

        async def emit(_: Chunk) -> None:
            if tally.completion_tokens == 3:
                third.set()

        work = generate(source, MODEL, spec(), tally, emit, SystemClock(), GatewayMetrics())
        task = asyncio.create_task(work)
        await third.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tally.completion_tokens >= 3
        assert (source.open_count, [each.kept for each in source.closed]) == (0, [False])

    run(scenario())


def test_a_fleet_that_cannot_close_does_not_spoil_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Unwilling(MemoryTokenSource):
        def ended(self, owner: str, tokens: Sequence[int], keep: bool) -> None:
            raise EngineError("cannot close")

    source = Unwilling([manifest()], scripted_predictor(VOCABULARY, len(PROMPT), [9, 1]), SystemClock())
    chunks, _ = run(generated(source, spec()))
    assert chunks[-1].finish is FinishReason.STOP
    assert "cannot close" in caplog.text


def test_logprobs_cover_every_token_but_the_end_of_the_turn() -> None:
    script = tokenizer().encode("🦊 日").ids
    chunks, _ = run(generated(source_of(script), spec(top_logprobs=2)))
    tokens = [each for chunk in chunks for each in chunk.logprobs]
    assert [each.token for each in tokens] == script
    assert all(each.top[0] == (each.token, each.logprob) and len(each.top) == 2 for each in tokens)


def test_the_first_failure_of_several_choices_is_raised_and_the_others_end() -> None:
    async def scenario() -> list[str]:
        ended = []

        async def waits() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("waits")

        async def fails() -> None:
            raise NoRoute("nobody")

        with pytest.raises(NoRoute):
            await generate_all([waits(), fails()])
        return ended

    assert run(scenario()) == ["waits"]
