"""Questions to whoever leads: asked again when another begins to, bounded when nobody does."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from fallow.domain.errors import BusTimeout, BusUnavailable
from fallow.domain.fleet import LeaderChanged, Subjects
from fallow.fabric.memory_bus import MemoryBus, MemoryHub
from fallow.gateway.questions import ANSWER_TIMEOUT_S, ASK_AGAIN_S, LEADERLESS_MAX_S, Questions
from fallow.simulator.virtual_time import LoopClock, run_virtual

SUBJECTS = Subjects("test")
LEADS = msgspec.json.encode(LeaderChanged(epoch=7, name="other"))


def run(script: Callable[[Questions, MemoryBus], Awaitable[None]]) -> None:
    async def program() -> None:
        hub = MemoryHub()
        questions = Questions(hub.connect("gateway"), SUBJECTS, LoopClock())
        await questions.start()
        await script(questions, hub.connect("coordinator"))
        await questions.close()

    run_virtual(program())


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def silent(_: str, __: bytes) -> None:
    await asyncio.sleep(1000.0)


async def echo(_: str, message: bytes) -> bytes:
    return message


def test_an_answer_passes() -> None:
    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        await coordinator.subscribe(SUBJECTS.route(), echo)
        assert await questions.ask(SUBJECTS.route("gateway"), b"x") == b"x"
        assert now_s() < 0.01

    run(script)


def test_an_open_question_goes_to_the_one_that_begins_to_lead() -> None:
    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        gone = await coordinator.subscribe(SUBJECTS.route(), silent)
        asking = asyncio.ensure_future(questions.ask(SUBJECTS.route("gateway"), b"x"))
        await asyncio.sleep(0.3)
        await gone.cancel()
        await coordinator.subscribe(SUBJECTS.route(), echo)
        await asyncio.sleep(0.1)
        assert not asking.done()
        await coordinator.publish(SUBJECTS.leader, LEADS)
        assert await asking == b"x"
        assert now_s() < 0.41

    run(script)


def test_who_finds_nobody_waits_for_somebody() -> None:
    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        asking = asyncio.ensure_future(questions.ask(SUBJECTS.route("gateway"), b"x"))
        await asyncio.sleep(LEADERLESS_MAX_S - 1.0)
        await coordinator.subscribe(SUBJECTS.route(), echo)
        assert await asking == b"x"
        assert now_s() <= LEADERLESS_MAX_S - 1.0 + ASK_AGAIN_S + 0.01

    run(script)


def test_where_nobody_ever_answers_it_ends() -> None:
    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        with pytest.raises(BusUnavailable):
            await questions.ask(SUBJECTS.route("gateway"), b"x")
        assert LEADERLESS_MAX_S <= now_s() <= LEADERLESS_MAX_S + 2 * ASK_AGAIN_S
        began_s = now_s()
        await coordinator.subscribe(SUBJECTS.route(), silent)
        with pytest.raises(BusTimeout):
            await questions.ask(SUBJECTS.route("gateway"), b"x")
        assert now_s() - began_s <= LEADERLESS_MAX_S + ANSWER_TIMEOUT_S + ASK_AGAIN_S

    run(script)


def test_a_question_that_is_given_up_leaves_nothing_behind() -> None:
    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        await coordinator.subscribe(SUBJECTS.route(), silent)
        before = len(asyncio.all_tasks())
        asking = asyncio.ensure_future(questions.ask(SUBJECTS.route("gateway"), b"x"))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.0)
        assert len(asyncio.all_tasks()) == before

    run(script)


@pytest.mark.parametrize("announced", [LEADS, b"not an announcement"])
def test_a_flood_of_announcements_brings_no_flood_of_questions(announced: bytes) -> None:
    asked: list[float] = []

    async def never(_: str, __: bytes) -> None:
        asked.append(now_s())
        await asyncio.sleep(1000.0)

    async def script(questions: Questions, coordinator: MemoryBus) -> None:
        await coordinator.subscribe(SUBJECTS.route(), never, at_once=100)

        async def shout() -> None:
            while True:
                await coordinator.publish(SUBJECTS.leader, announced)
                await asyncio.sleep(0.005)

        shouting = asyncio.ensure_future(shout())
        with pytest.raises(BusTimeout):
            await questions.ask(SUBJECTS.route("gateway"), b"x")
        shouting.cancel()
        assert now_s() <= LEADERLESS_MAX_S + ANSWER_TIMEOUT_S + ASK_AGAIN_S
        assert len(asked) <= 2 + LEADERLESS_MAX_S / ASK_AGAIN_S

    run(script)
