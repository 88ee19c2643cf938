"""Goal: a running answer survives the loss of any stage, unchanged.

Method: the real relay, links, chain and recovery plan on the in-memory fabric and virtual time; the toy engine's answer
depends on every row, layer and phase, so a row that is lost, doubled or computed otherwise shows. No randomness: each
case is enumerated; the Hypothesis test below draws fault times and keeps its failing examples.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import NoRoute
from fallow.domain.fleet import Hop
from fallow.domain.frames import Phase
from fallow.domain.model import Span
from fallow.gateway.chain import REPAIR_TIMEOUT_S
from fallow.simulator.virtual_time import run_virtual
from tests.simulation.sessions import Fleet, generate

A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)
THREE_AND_SPARES: tuple[Sequence[Span], ...] = ((A,), (B,), (C,), (A,), (B,), (C,))
PROMPT = list(range(300))
COUNT = 40


def undisturbed(prompt: Sequence[int] = PROMPT, count: int = COUNT) -> list[int]:
    async def program() -> list[int]:
        fleet = Fleet()
        await fleet.start((A,), (B,), (C,))
        return await generate(fleet.chain(), prompt, count)

    return run_virtual(program())


def test_any_split_gives_the_same_answer() -> None:
    async def program(*hosted: Sequence[Span]) -> list[int]:
        fleet = Fleet()
        await fleet.start(*hosted)
        return await generate(fleet.chain(), PROMPT, COUNT)

    whole = run_virtual(program((Span(0, 6),)))
    assert whole == undisturbed()
    assert whole == run_virtual(program(*((Span(i, i + 1),) for i in range(6))))


@pytest.mark.parametrize("fault", ["kill", "freeze", "crash_engine", "leave"])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_lost_stage_is_rebuilt_and_the_answer_is_the_same(position: int, phase: Phase, fault: str) -> None:
    async def program() -> tuple[list[int], float, int]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES)
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < (1 if phase is Phase.PREFILL else len(PROMPT) + COUNT // 2):
            await asyncio.sleep(0.001)
        if phase is Phase.PREFILL:
            await asyncio.sleep(0.02)
        victim = fleet.nodes[position]
        started_s = fleet.clock.monotonic_s()
        if fault == "kill":
            victim.kill()
        elif fault == "freeze":
            victim.freeze()
        elif fault == "leave":
            victim.relay.drain()
        else:
            victim.engine.crash()
            victim.relay.engine_lost("the worker was killed")
            victim.alive = False
        while chain.repairs == 0 and not task.done():
            await asyncio.sleep(0.001)
        repaired_s = fleet.clock.monotonic_s() - started_s
        return await task, repaired_s, chain.repairs

    tokens, repaired_s, repairs = run_virtual(program())
    assert tokens == undisturbed()
    assert repairs == 1
    assert repaired_s < (2.5 if fault == "freeze" else 0.2), "noticed and repaired in time"


def test_two_neighbours_lost_at_once() -> None:
    async def program() -> list[int]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES)
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        fleet.nodes[0].kill()
        fleet.nodes[1].kill()
        return await task

    assert run_virtual(program()) == undisturbed()


def test_a_log_that_did_not_fit_its_budget_is_no_loss() -> None:
    async def program() -> tuple[list[int], int]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES, log_budget_bytes=8 * 50)
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        fleet.nodes[1].kill()
        return await task, chain.repairs

    assert run_virtual(program()) == (undisturbed(), 1)


def test_nobody_left_is_a_named_error_in_bounded_time() -> None:
    async def program() -> float:
        fleet = Fleet()
        await fleet.start((A,), (B,), (C,))
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        fleet.nodes[1].kill()
        started_s = fleet.clock.monotonic_s()
        with pytest.raises(NoRoute, match="nobody holds layer 2"):
            await task
        return fleet.clock.monotonic_s() - started_s

    assert REPAIR_TIMEOUT_S <= run_virtual(program()) < REPAIR_TIMEOUT_S + 2


def test_the_session_resumes_when_a_device_appears_in_time() -> None:
    async def program() -> list[int]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES)
        fleet.nodes[4].alive = False
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        fleet.nodes[1].kill()
        await asyncio.sleep(10)
        assert not task.done()
        fleet.nodes[4].alive = True
        return await task

    assert run_virtual(program()) == undisturbed()


def test_a_follow_up_turn_recomputes_only_what_is_new() -> None:
    async def program() -> tuple[list[int], list[int], int]:
        fleet = Fleet()
        await fleet.start((A,), (B,), (C,))
        chain = fleet.chain()
        await generate(chain, PROMPT, 10)
        kept = 200
        await chain.establish(keep_tokens=kept)
        rows_before = fleet.nodes[1].engine.rows_computed
        follow_up = [*PROMPT[:kept], 7, 8, 9]
        candidates = await chain.advance(follow_up[kept:], Phase.PREFILL)
        rows = fleet.nodes[1].engine.rows_computed - rows_before
        fresh = await generate(fleet.chain(1), follow_up, 1)
        return [int(candidates.ids[0])], fresh, rows

    reused, fresh, rows = run_virtual(program())
    assert reused == fresh
    assert rows == 3


@settings(max_examples=40, deadline=None)
@given(
    faults=st.lists(
        st.tuples(st.integers(0, 5), st.floats(0, 0.3), st.sampled_from(["kill", "freeze"])),
        max_size=3,
        unique_by=lambda f: f[0] % 3,
    ),
    sessions=st.integers(1, 4),
)
def test_any_faults_that_leave_a_copy_of_each_span_change_no_answer(
    faults: list[tuple[int, float, str]], sessions: int
) -> None:
    async def program() -> list[list[int]]:
        fleet = Fleet()
        await fleet.start(*THREE_AND_SPARES)
        prompts = [list(range(index, index + 140)) for index in range(sessions)]
        tasks = [asyncio.create_task(generate(fleet.chain(i), prompt, 20)) for i, prompt in enumerate(prompts)]

        async def strike(node: int, at_s: float, kind: str) -> None:
            await asyncio.sleep(at_s)
            getattr(fleet.nodes[node], kind)()

        strikes = [asyncio.create_task(strike(*fault)) for fault in faults]
        await asyncio.gather(*strikes)
        return list(await asyncio.gather(*tasks))

    answers = run_virtual(program())
    for index, answer in enumerate(answers):
        assert answer == undisturbed(list(range(index, index + 140)), 20)


def test_a_survivor_that_changes_its_span_does_not_meet_its_old_self() -> None:
    """Node 1 holds the first and the last third: after the loss it must close the one and open the other."""

    async def program() -> tuple[list[int], float]:
        fleet = Fleet()
        await fleet.start((A, B), (A, C), (B, C))
        fleet.script = [[(1, A), (2, Span(2, 6))], [(0, Span(0, 4)), (1, C)]]
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        assert chain.nodes()[0] == fleet.nodes[1].id
        fleet.nodes[2].kill()
        started_s = fleet.clock.monotonic_s()
        while chain.repairs == 0:
            await asyncio.sleep(0.001)
        return await task, fleet.clock.monotonic_s() - started_s

    tokens, repaired_s = run_virtual(program())
    assert tokens == undisturbed()
    assert repaired_s < 0.2, "not refused for holding the session already"


def test_a_device_that_was_away_during_a_rewind_does_not_bring_back_what_was_cut() -> None:
    """Node 1 freezes, the conversation goes on elsewhere and is rewound; then node 1 thaws and is used again."""

    async def program() -> tuple[list[int], list[int]]:
        fleet = Fleet()
        await fleet.start((A,), (B,), (C,), (A,), (B,))
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        away = fleet.nodes[1]
        away.freeze()
        await task
        await chain.establish(keep_tokens=100)
        await chain.advance([7] * 50, Phase.PREFILL)
        away.thaw()
        fleet.nodes[4].kill()
        await asyncio.sleep(10)  # until node 1 is no longer avoided
        follow_up = [*PROMPT[:100], *[7] * 50, *[9] * 60]
        candidates = await chain.advance([9] * 60, Phase.PREFILL)
        assert away.id in chain.nodes()
        fresh = await generate(fleet.chain(1), follow_up, 1)
        return [int(candidates.ids[0])], fresh

    reused, fresh = run_virtual(program())
    assert reused == fresh


def test_news_of_a_loss_that_the_new_chain_has_left_behind_costs_no_second_attempt() -> None:
    """The predecessor tells of the loss first; the gateway's own link breaks while it asks for the new chain."""

    class SlowRouter(Fleet):
        async def route(self, *asked: Any) -> tuple[Hop, ...]:  # type: ignore[override]
            await asyncio.sleep(0.02)
            for node in self.nodes:
                if not node.alive:
                    self._on_lost(node.id, "its link broke as well")
            return await super().route(*asked)

    async def program() -> tuple[list[int], int, bool]:
        fleet = SlowRouter()
        await fleet.start(*THREE_AND_SPARES)
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        while len(chain.tokens) < len(PROMPT) + 5:
            await asyncio.sleep(0.001)
        fleet.nodes[1].kill()
        return await task, chain.repairs, any("no chain yet" in event for event in fleet.events)

    assert run_virtual(program()) == (undisturbed(), 1, False)
