"""What every `StageEngine` promises, on the worker process and on the in-memory toy.

The worker's tests share one process where they do not kill it. Rows are chained from what the engines themselves give,
so the same tests run on both; what only a real model shows (bits, numbers) is tested on the worker alone.
"""

import asyncio
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from engine_world import family, name_of, step_of

from fallow.domain.errors import (
    EngineError,
    EngineLost,
    FallowError,
    KvExhausted,
    ModelError,
    NumericFault,
    PositionMismatch,
    UnknownSession,
)
from fallow.domain.frames import Phase
from fallow.domain.model import Quantisation, Span
from fallow.domain.sampling import Recipe
from fallow.engine.client import WorkerEngine
from fallow.engine.contract import Drawn, StageEngine, Step
from fallow.engine.drawing import drawn_token
from fallow.engine.memory import MemoryEngine
from fallow.engine.settings import EngineSettings

KV_TOKENS = 400
SETTINGS = EngineSettings(niceness=0, slots_max=16, hang_timeout_s=0.6)


def model():
    return family("qwen2", Quantisation.Q8)


def kv_budget_bytes():
    config = model().manifest.config
    return KV_TOKENS * 2 * 4 * config.kv_head_count * config.head_dim * config.layer_count


class World:
    """An event loop and an engine in it that hosts the model, one piece a layer."""

    def __init__(self, engine: StageEngine):
        self.engine = engine
        self.model = model()
        self.pieces = tuple(Span(layer, layer + 1) for layer in range(self.model.layer_count))
        self.sessions = 0

    async def load(self, *pieces):
        stage = self.model.stage(*(pieces or self.pieces))
        return await self.engine.load(stage, self.model.manifest, self.model.files(stage))

    async def open(self, span=None, reserve_tokens=60):
        self.sessions += 1
        name = name_of(self.sessions)
        await self.engine.open(name, self.model.digest, span or self.model.whole, reserve_tokens)
        return name

    async def push(self, session, position, rows, phase=Phase.PREFILL, **asked):
        return await self.engine.step(step_of(session, position, rows, phase, **asked))

    async def payload(self, session, position, rows, phase=Phase.PREFILL, **asked):
        return bytes((await self.push(session, position, rows, phase, **asked)).payload)

    async def through(self, sessions, position, count, rows, phase=Phase.PREFILL):
        """Rows through sessions on adjacent spans, each fed what the one before gave. `rows`: token ids."""
        payload = np.asarray(rows, np.int32).tobytes()
        for session in sessions:
            step = Step(
                session=session, position=position, count=count, phase=phase, logits_from=0, top_k=None, payload=payload
            )
            payload = bytes((await self.engine.step(step)).payload)
        return payload


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as shared:
        yield shared


@pytest.fixture(scope="module", params=["worker", "memory"])
def world(request, runner):
    engine = make(request.param)
    world = World(engine)
    runner.run(started(world))
    yield world
    runner.run(engine.close())


@pytest.fixture
def each(world, runner):
    """Run a coroutine function on the shared world."""
    return lambda scenario: runner.run(asyncio.wait_for(scenario(world), 60))


@pytest.fixture(scope="module")
def worker(runner):
    world = World(make("worker"))
    runner.run(started(world))
    yield world
    runner.run(world.engine.close())


@pytest.fixture
def on_worker(worker, runner):
    return lambda scenario: runner.run(asyncio.wait_for(scenario(worker), 60))


def make(kind):
    if kind == "memory":
        return MemoryEngine(kv_budget_bytes=kv_budget_bytes(), call_s=lambda rows, layers: 1e-4, load_s=0.0)
    settings = EngineSettings(**{**as_dict(SETTINGS), "kv_budget_bytes": kv_budget_bytes()})
    return WorkerEngine(settings, [model().folder])


def as_dict(settings):
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


async def started(world):
    await world.engine.start()
    await world.load()


PROMPT = [7, 3, 250, 41, 9, 9, 120, 64, 5, 33, 280, 17]
GENERATED = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]


# --- both engines -------------------------------------------------------------------------------


def test_it_says_what_it_loaded(each):
    async def scenario(world):
        loaded = await world.load()
        config = world.model.manifest.config
        assert loaded.kv_bytes_per_token * KV_TOKENS == kv_budget_bytes()
        assert loaded.weights_bytes > 0
        assert 0 < loaded.speed.layer_s_1 <= 4 * loaded.speed.layer_s_8
        assert config.layer_count == len(world.pieces)

    each(scenario)


def test_steps_of_one_session_run_in_the_order_given(each):
    async def scenario(world):
        session, other = await world.open(), await world.open()
        one_by_one = []
        for at, token in enumerate(PROMPT):
            one_by_one.append(await world.payload(session, at, [token]))
        together = [asyncio.ensure_future(world.payload(other, at, [token])) for at, token in enumerate(PROMPT[:1])]
        assert await asyncio.gather(*together) == one_by_one[:1]
        await world.engine.free(session)
        await world.engine.free(other)

    each(scenario)


def drawn_step(session, position, nth=0, ends=(), temperature=0.0, top_k=5):
    drawn = Drawn(recipe=Recipe(temperature=temperature, seed=3), nth=nth, ends=ends)
    return Step(
        session=session, position=position, count=1, phase=Phase.DECODE, logits_from=position, top_k=top_k,
        payload=b"", drawn=drawn,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_that_draws_its_row_computes_just_that_token(each, temperature):
    """Several are asked for before the prompt is done, each behind the other."""

    async def scenario(world):
        session, other = await world.open(), await world.open()
        end = len(PROMPT)
        prompt = world.push(session, 0, PROMPT, logits_from=end - 1, top_k=5)
        asked = (drawn_step(session, end + nth, nth, temperature=temperature) for nth in range(6))
        first, *after = await asyncio.gather(prompt, *map(world.engine.step, asked))
        results = [await world.push(other, 0, PROMPT, logits_from=end - 1, top_k=5)]
        assert first.drawn is None
        for nth in range(6):
            drawn = drawn_step(session, end + nth, nth, temperature=temperature).drawn
            token = int.from_bytes(drawn_token(results[-1], drawn), "little")
            assert after[nth].drawn == token, "it says which one"
            results.append(await world.push(other, end + nth, [token], Phase.DECODE, logits_from=end + nth, top_k=5))
        assert [bytes(each.payload) for each in (first, *after)] == [bytes(each.payload) for each in results]
        await world.engine.free(session)
        await world.engine.free(other)

    each(scenario)


def test_nothing_is_drawn_after_an_end_a_rewind_or_a_whole_vocabulary_and_the_session_goes_on(each):
    async def scenario(world):
        session, end = await world.open(), len(PROMPT)
        with pytest.raises(EngineError):
            await world.engine.step(drawn_step(session, 0))
        result = await world.push(session, 0, PROMPT, logits_from=end - 1, top_k=5)
        token = int.from_bytes(drawn_token(result, drawn_step(session, end).drawn), "little")
        with pytest.raises(EngineError):
            await world.engine.step(drawn_step(session, end, ends=(token,)))
        with pytest.raises(PositionMismatch):
            await world.engine.step(drawn_step(session, end + 1))
        answer = await world.payload(session, end, [token], Phase.DECODE, top_k=5)
        await world.engine.rewind(session, end)
        with pytest.raises(EngineError):
            await world.engine.step(drawn_step(session, end))
        assert await world.payload(session, end, [token], Phase.DECODE) != answer  # the whole vocabulary
        with pytest.raises(EngineError):
            await world.engine.step(drawn_step(session, end + 1))
        await world.engine.rewind(session, end)
        assert await world.payload(session, end, [token], Phase.DECODE, top_k=5) == answer
        await world.engine.free(session)
        part = await world.open(Span(1, world.model.layer_count))
        with pytest.raises(EngineError):
            await world.engine.step(drawn_step(part, 0))
        await world.engine.free(part)

    each(scenario)


def test_a_session_runs_through_any_run_of_adjacent_pieces(each):
    async def scenario(world):
        whole = await world.open()
        answer = await world.through([whole], 0, len(PROMPT), PROMPT)
        for cuts in ([1], [2, 3], [1, 2, 3]):
            edges = [0, *cuts, world.model.layer_count]
            chain = [await world.open(Span(a, b)) for a, b in pairwise(edges)]
            assert await world.through(chain, 0, len(PROMPT), PROMPT) == answer
            for session in chain:
                await world.engine.free(session)
        await world.engine.free(whole)

    each(scenario)


def test_a_span_that_is_not_hosted_is_refused(each):
    async def scenario(world):
        with pytest.raises(EngineError):
            await world.open(Span(0, world.model.layer_count + 1))
        with pytest.raises(EngineError):
            await world.engine.open(name_of(999), "f" * 64, Span(0, 1), 10)

    each(scenario)


def test_admission_is_by_reservation_and_a_refusal_changes_nothing(each):
    async def scenario(world):
        first = await world.open(reserve_tokens=150)
        before = world.engine.load_now
        with pytest.raises(KvExhausted):
            await world.engine.open(name_of(998), world.model.digest, world.model.whole, 256)
        after = world.engine.load_now
        assert (after.sessions, after.kv_free_bytes) == (before.sessions, before.kv_free_bytes)
        second = await world.open(reserve_tokens=200)
        with pytest.raises(KvExhausted):
            await world.engine.reserve(first, 201)
        await world.engine.reserve(first, 200)
        await world.engine.reserve(first, 10)  # never shrinks
        assert world.engine.load_now.kv_free_bytes == 0
        assert world.engine.load_now.sessions == before.sessions + 1
        await world.engine.free(first)
        assert world.engine.load_now.kv_free_bytes == kv_budget_bytes() // 2
        await world.engine.free(second)

    each(scenario)


def test_positions_and_reservations_are_enforced_and_the_session_goes_on(each):
    async def scenario(world):
        session = await world.open(reserve_tokens=20)
        await world.push(session, 0, PROMPT)
        for position in (0, 11, 13):
            with pytest.raises(PositionMismatch):
                await world.push(session, position, [1])
        with pytest.raises(PositionMismatch):
            await world.push(session, 12, [1] * 9)
        await world.push(session, 12, [1] * 8)
        await world.engine.free(session)

    each(scenario)


def test_a_rewound_session_answers_as_if_it_had_never_gone_on(each):
    async def scenario(world):
        session, fresh = await world.open(), await world.open()
        await world.push(session, 0, PROMPT)
        await world.push(session, 12, [99, 98, 97])
        await world.engine.rewind(session, 10)
        await world.push(fresh, 0, PROMPT[:10])
        assert await world.payload(session, 10, [5, 6]) == await world.payload(fresh, 10, [5, 6])
        await world.engine.rewind(session, 0)
        await world.engine.free(fresh)
        await world.engine.free(session)

    each(scenario)


def test_a_freed_session_is_unknown_and_free_is_idempotent(each):
    async def scenario(world):
        session = await world.open()
        await world.push(session, 0, PROMPT)
        await world.engine.free(session)
        await world.engine.free(session)
        with pytest.raises(UnknownSession):
            await world.push(session, 12, [1])
        with pytest.raises(UnknownSession):
            await world.engine.rewind(session, 0)
        with pytest.raises(UnknownSession):
            await world.engine.reserve(session, 50)

    each(scenario)


def test_a_cache_rebuilt_from_a_log_goes_on_bit_for_bit(each):
    """Decode rows, one by one the first time and in one step the second, on another session."""

    async def scenario(world):
        first, second = await world.open(), await world.open()
        await world.push(first, 0, PROMPT)
        decoded = [await world.payload(first, 12 + i, [t], Phase.DECODE) for i, t in enumerate(GENERATED)]
        await world.push(second, 0, PROMPT)
        assert await world.payload(second, 12, GENERATED, Phase.DECODE) == b"".join(decoded)
        at = 12 + len(GENERATED)
        assert await world.payload(first, at, [8], Phase.DECODE) == await world.payload(second, at, [8], Phase.DECODE)
        await world.engine.free(first)
        await world.engine.free(second)

    each(scenario)


def test_chunks_and_company_do_not_change_a_row(each):
    async def scenario(world):
        alone = await world.open()
        prompt = await world.payload(alone, 0, PROMPT)
        decoded = [await world.payload(alone, 12 + i, [t], Phase.DECODE) for i, t in enumerate(GENERATED[:6])]
        sessions = [await world.open() for _ in range(5)]

        async def converse(number, session):
            parts, at = [], 0
            for size in [12] if number == 0 else [number, 12 - number]:
                parts.append(await world.payload(session, at, PROMPT[at : at + size]))
                at += size
            assert b"".join(parts) == prompt
            return [await world.payload(session, 12 + i, [t], Phase.DECODE) for i, t in enumerate(GENERATED[:6])]

        answers = await asyncio.gather(*(converse(number, session) for number, session in enumerate(sessions)))
        assert answers == [decoded] * 5
        for session in (alone, *sessions):
            await world.engine.free(session)

    each(scenario)


def test_pieces_that_stay_keep_their_sessions(each):
    async def scenario(world):
        stays, goes = await world.open(Span(0, 1)), await world.open(Span(2, 3))
        first = await world.payload(stays, 0, PROMPT)
        await world.load(Span(0, 1), Span(1, 2))
        with pytest.raises(UnknownSession):
            await world.through([goes], 0, 1, [0])
        await world.payload(stays, 12, [4], Phase.DECODE)
        await world.load()
        again = await world.open(Span(0, 1))
        assert await world.payload(again, 0, PROMPT) == first
        await world.engine.free(stays)
        await world.engine.free(again)

    each(scenario)


def test_an_unloaded_model_is_not_hosted(each):
    async def scenario(world):
        session = await world.open()
        await world.engine.unload(world.model.digest)
        with pytest.raises(EngineError):
            await world.open()
        with pytest.raises(UnknownSession):
            await world.push(session, 0, [1])
        await world.load()

    each(scenario)


@pytest.mark.parametrize("kind", ["worker", "memory"])
def test_a_crash_loses_every_session_and_start_begins_anew(kind):
    async def scenario():
        world = World(make(kind))
        engine = world.engine
        await started(world)
        session = await world.open(reserve_tokens=256)
        waiting = asyncio.ensure_future(world.push(session, 0, PROMPT * 20))
        await asyncio.sleep(0)
        if kind == "worker":
            os.kill(engine.process_id, signal.SIGKILL)
        else:
            engine.crash()
        with pytest.raises(EngineLost):
            await waiting
        await asyncio.wait_for(engine.lost.wait(), 5)
        with pytest.raises(EngineLost):
            await world.push(session, 0, PROMPT)
        await engine.start()
        assert not engine.lost.is_set()
        await world.load()
        with pytest.raises(UnknownSession):
            await world.push(session, 0, PROMPT)
        again = await world.open()
        await world.push(again, 0, PROMPT)
        await engine.close()

    asyncio.run(scenario())


# --- the worker alone ---------------------------------------------------------------------------


def test_a_hidden_row_that_is_not_finite_is_its_sessions_fault_alone(on_worker):
    async def scenario(world):
        span, hidden = Span(1, 3), world.model.manifest.config.hidden_size
        rows = np.random.default_rng(3).standard_normal((2, hidden)).astype(np.float16)
        broken = rows.copy()
        broken[1, 5] = np.nan
        good, bad, alone = [await world.open(span) for _ in range(3)]
        for session in (good, bad, alone):
            await world.push(session, 0, rows)
        expected = await world.payload(alone, 2, rows[:1], Phase.DECODE)
        results = await asyncio.gather(
            world.payload(good, 2, rows[:1], Phase.DECODE),
            world.payload(bad, 2, broken[1:], Phase.DECODE),
            return_exceptions=True,
        )
        assert results[0] == expected
        assert isinstance(results[1], NumericFault)
        with pytest.raises(NumericFault):
            await world.push(bad, 2, broken)
        await world.engine.rewind(bad, 2)
        assert await world.payload(bad, 2, rows[:1], Phase.DECODE) == expected
        for session in (good, bad, alone):
            await world.engine.free(session)

    on_worker(scenario)


def test_wrong_payloads_are_refused_and_a_neighbour_does_not_notice(on_worker):
    async def scenario(world):
        session, neighbour = await world.open(), await world.open()
        await world.push(neighbour, 0, PROMPT)
        good = step_of(session, 0, PROMPT)
        wrong = [
            {"payload": good.payload[:-1]},
            {"payload": b""},
            {"count": 0},
            {"count": -1},
            {"count": 257},
            {"payload": np.full(12, 1 << 30, np.int32).tobytes()},
            {"payload": np.full(12, -1, np.int32).tobytes()},
            {"top_k": 0},
            {"top_k": -5},
        ]
        for change in wrong:
            with pytest.raises(EngineError):
                await world.engine.step(Step(**{**as_dict(good), **change}))
        with pytest.raises(FallowError):
            await world.engine.step(Step(**{**as_dict(good), "position": -1}))
        with pytest.raises(EngineError):
            await world.engine.open(session, world.model.digest, world.model.whole, 10)
        for tokens in (0, -3, 1 << 40):
            with pytest.raises(EngineError):
                await world.open(reserve_tokens=tokens)
        assert await world.payload(neighbour, 12, [1], Phase.DECODE) != b""
        assert await world.payload(session, 0, PROMPT) != b""
        await world.engine.free(session)
        await world.engine.free(neighbour)

    on_worker(scenario)


def test_top_k_is_the_head_of_the_full_distribution(on_worker):
    async def scenario(world):
        session = await world.open()
        full = np.frombuffer(await world.payload(session, 0, PROMPT, logits_from=10), np.float32).reshape(2, -1)
        assert np.allclose(np.exp(full).sum(-1), 1.0, atol=1e-5)
        await world.engine.rewind(session, 0)
        stepped = await world.push(session, 0, PROMPT, logits_from=10, top_k=5)
        assert (stepped.logit_count, stepped.k) == (2, 5)
        ids = np.frombuffer(stepped.payload, np.int32, 10).reshape(2, 5)
        values = np.frombuffer(stepped.payload, np.float32, 10, 40).reshape(2, 5)
        assert np.array_equal(ids, np.argsort(-full, axis=-1, kind="stable")[:, :5])
        assert np.array_equal(values, np.take_along_axis(full, ids, -1))
        none = await world.push(session, 12, [1], Phase.DECODE, logits_from=99, top_k=5)
        assert (none.logit_count, len(none.payload)) == (0, 0)
        await world.engine.free(session)

    on_worker(scenario)


def test_a_lying_file_is_a_model_error_and_what_is_hosted_stays(on_worker, tmp_path):
    async def scenario(world):
        session = await world.open()
        stage = world.model.stage()
        files = world.model.files(stage)
        digest = world.model.manifest.layers[0].digest
        broken = tmp_path / "broken"
        broken.write_bytes(files[digest].read_bytes()[:1000])
        for path in (broken, tmp_path / "absent"):
            with pytest.raises(ModelError):
                await world.engine.load(stage, world.model.manifest, {**files, digest: path})
        with pytest.raises(ModelError):
            await world.engine.load(stage, world.model.manifest, {})
        with pytest.raises(EngineError):
            await world.load(Span(0, 2), Span(1, 3))
        await world.push(session, 0, PROMPT)
        await world.engine.free(session)

    on_worker(scenario)


def test_a_cancelled_step_harms_nobody(on_worker):
    async def scenario(world):
        session, neighbour = await world.open(), await world.open()
        step = asyncio.ensure_future(world.push(session, 0, PROMPT))
        await asyncio.sleep(0)
        step.cancel()
        await world.push(neighbour, 0, PROMPT)
        await world.push(session, 12, [1], Phase.DECODE)
        await world.engine.free(session)
        await world.engine.free(neighbour)

    on_worker(scenario)


def test_a_stopped_worker_is_lost_and_an_idle_one_is_not():
    async def scenario():
        world = World(make("worker"))
        await started(world)
        session = await world.open()
        await asyncio.sleep(2 * SETTINGS.hang_timeout_s)
        assert not world.engine.lost.is_set()
        os.kill(world.engine.process_id, signal.SIGSTOP)
        with pytest.raises(EngineLost, match="hangs"):
            await asyncio.wait_for(world.push(session, 0, PROMPT), 10)
        assert world.engine.lost.is_set()
        await world.engine.close()

    asyncio.run(scenario())


def test_the_worker_ends_with_its_agent():
    """The agent's end of the pair closes, as it does when the agent dies in whatever way."""

    async def scenario():
        world = World(make("worker"))
        await world.engine.start()
        process = world.engine._worker.process
        world.engine._worker._transport.abort()
        assert await asyncio.to_thread(process.wait, 10) in (0, -signal.SIGKILL)
        await world.engine.close()

    asyncio.run(scenario())


def test_calls_before_start_and_after_close_are_refused():
    async def scenario():
        engine = make("worker")
        with pytest.raises(EngineLost):
            await engine.free(name_of(1))
        await engine.start()
        await engine.close()
        assert not engine.lost.is_set()
        with pytest.raises(EngineLost):
            await engine.free(name_of(1))

    asyncio.run(scenario())
