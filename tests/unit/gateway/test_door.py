"""The waiting at the gateway's door, on virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fallow.gateway.admission import Admission
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.problems import Problem
from fallow.policy.admission import AdmissionRules, Places
from fallow.simulator.virtual_time import LoopClock, run_virtual


def door(**rules: Any) -> Admission:
    return Admission(AdmissionRules(places_first=2, places_max=2, **rules), LoopClock(), GatewayMetrics())


async def answer(here: Admission, owner: str, lasts_s: float, tokens: int = 50) -> float:
    """Ask once; the time that was waited."""
    came_s = LoopClock().monotonic_s()
    async with here.place(owner, 1, 10) as place:
        waited_s = LoopClock().monotonic_s() - came_s
        await asyncio.sleep(lasts_s)
        place.tokens = tokens
    return waited_s


def spawn(work: Coroutine[Any, Any, float]) -> "asyncio.Task[float]":
    return asyncio.get_running_loop().create_task(work)


def test_requests_wait_for_their_turn() -> None:
    async def scenario() -> list[float]:
        here = door()
        return await asyncio.gather(*(answer(here, "a", 3.0) for _ in range(6)))

    assert run_virtual(scenario()) == [0.0, 0.0, 3.0, 3.0, 6.0, 6.0]


def test_a_client_that_hangs_up_leaves_the_queue_at_once() -> None:
    async def scenario() -> tuple[int, int, float]:
        here = door()
        running = [spawn(answer(here, "a", 5.0)) for _ in range(2)]
        waiting = spawn(answer(here, "b", 5.0))
        behind = spawn(answer(here, "b", 5.0))
        await asyncio.sleep(1.0)
        before = here.waiting
        waiting.cancel()
        await asyncio.wait([waiting])
        after = here.waiting
        await asyncio.wait([*running, behind])
        assert here.running == here.waiting == 0
        return before, after, behind.result()

    before, after, waited_s = run_virtual(scenario())
    assert (before, after) == (2, 1)
    assert waited_s == 5.0


def test_a_client_that_hangs_up_as_its_turn_comes_gives_it_to_the_next() -> None:
    async def scenario() -> list[float]:
        here = door()
        first = [spawn(answer(here, "a", 1.0)) for _ in range(2)]
        quitters = [spawn(answer(here, "a", 1.0)) for _ in range(2)]
        last = [spawn(answer(here, "a", 1.0)) for _ in range(2)]
        await asyncio.sleep(0)

        def hang_up(_: object) -> None:
            for task in quitters:
                task.cancel()

        first[0].add_done_callback(hang_up)
        await asyncio.wait([*first, *quitters, *last])
        assert all(task.cancelled() for task in quitters)
        assert here.running == here.waiting == 0
        return [task.result() for task in last]

    assert run_virtual(scenario()) == [1.0, 1.0]


def test_nobody_waits_longer_than_allowed() -> None:
    async def scenario() -> tuple[float, Problem]:
        here = door(wait_max_s=4.0)
        running = [spawn(answer(here, "a", 60.0)) for _ in range(2)]
        await asyncio.sleep(0)
        began_s = LoopClock().monotonic_s()
        with pytest.raises(Problem) as caught:
            await answer(here, "b", 1.0)
        assert here.waiting == 0
        waited_s = LoopClock().monotonic_s() - began_s
        await asyncio.wait(running)
        return waited_s, caught.value

    waited_s, problem = run_virtual(scenario())
    assert waited_s == pytest.approx(4.0)
    assert problem.status == 503
    assert problem.body.code == "overloaded"
    assert problem.retry_after_s == pytest.approx(2.0)


def test_who_would_wait_too_long_is_told_at_once() -> None:
    async def scenario() -> tuple[list[float], float]:
        here = door(wait_max_s=4.0)
        await answer(here, "a", 3.0)  # how long answers take
        tasks = [spawn(answer(here, "a", 3.0)) for _ in range(8)]
        began_s = LoopClock().monotonic_s()
        await asyncio.sleep(0.001)
        refused = [task for task in tasks if task.done()]
        assert all(isinstance(task.exception(), Problem) for task in refused)
        await asyncio.wait(tasks)
        return [task.result() for task in tasks if task not in refused], LoopClock().monotonic_s() - began_s

    waits_s, took_s = run_virtual(scenario())
    assert waits_s == [0.0, 0.0, 3.0, 3.0]
    assert took_s == pytest.approx(6.0)


def test_one_key_with_too_many_waiting_is_refused_with_429() -> None:
    async def scenario() -> Problem:
        here = door(waiting_key_max=1)
        tasks = [spawn(answer(here, "a", 1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as caught:
            await answer(here, "a", 1.0)
        await asyncio.wait(tasks)
        return caught.value

    problem = run_virtual(scenario())
    assert (problem.status, problem.body.code) == (429, "rate_limit_exceeded")
    assert problem.retry_after_s is not None


def test_slow_tokens_take_places_away_and_quick_ones_give_them_back() -> None:
    async def scenario() -> list[int]:
        rules = AdmissionRules(places_first=8, places_max=8)
        here = Admission(rules, LoopClock(), GatewayMetrics())
        seen = []
        running = [spawn(answer(here, "a", 1000.0)) for _ in range(8)]
        for gap_s in (0.02, 0.5, 0.02):
            for _ in range(20):
                await asyncio.sleep(rules.window_s)
                for _ in range(rules.samples_min + 1):
                    here.next_token(gap_s)
            seen.append(here.places.whole)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        return seen

    quick, slow, again = run_virtual(scenario())
    assert quick == 8
    assert slow == 7, "a little less than runs; as answers do not end, it goes no lower"
    assert again == 8


def test_lack_of_room_bounds_the_places_until_they_grow_again() -> None:
    async def scenario() -> tuple[int, int]:
        here = door()
        tasks = [spawn(answer(here, "a", 1.0)) for _ in range(2)]
        await asyncio.sleep(0)
        here.no_room()
        bounded = here.places.whole
        await asyncio.wait(tasks)
        return bounded, here.running

    assert run_virtual(scenario()) == (1, 0)


@pytest.mark.parametrize("count", [1, 8])
def test_a_request_that_is_too_large_for_an_idle_fleet_takes_no_places_away(count: int) -> None:
    async def scenario() -> tuple[Places, Places, int]:
        here = Admission(AdmissionRules(places_first=30), LoopClock(), GatewayMetrics())
        before = here.places
        async with here.place("large", count, 10):
            here.no_room(count)
        alone = here.places
        other = spawn(answer(here, "small", 1.0))
        await asyncio.sleep(0)
        async with here.place("large", count, 10):
            here.no_room(count)
        bounded = here.places.whole
        await other
        return before, alone, bounded

    before, alone, bounded = run_virtual(scenario())
    assert alone == before
    assert bounded == 1, "what ran beside it"


def test_waiting_and_places_are_measured() -> None:
    async def scenario() -> str:
        metrics = GatewayMetrics()
        here = Admission(AdmissionRules(places_first=1, places_max=1), LoopClock(), metrics)
        tasks = [spawn(answer(here, "a", 1.0)) for _ in range(3)]
        await asyncio.sleep(0.5)
        shown = metrics.exposition().decode()
        await asyncio.wait(tasks)
        return shown

    shown = run_virtual(scenario())
    assert "fallow_waiting_requests 2.0" in shown
    assert "fallow_places 1.0" in shown
    assert "fallow_waited_seconds_count 1.0" in shown
