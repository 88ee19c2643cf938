"""Goal: a chain that runs ahead of its gateway gives the same answer as one that waits for it, sooner, and stops soon
after its gateway does, whatever its last stage says.

Method: the real relay, links and chain on the in-memory fabric and virtual time, with links that take 20 ms.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fallow.domain.frames import AHEAD_ROWS, Flow, Frame, Phase, Result, Rows
from fallow.domain.ids import Digest
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe
from fallow.engine import drawing
from fallow.engine.contract import Step, Stepped
from fallow.gateway.running_ahead import MISSES_MAX, leave_for
from fallow.gateway.sampling import Sampler, SamplingParams
from fallow.gateway.sessions import FleetTokenSource
from fallow.node.running_ahead import next_rows
from fallow.node.stage_pump import StagePump
from fallow.node.stage_session import Session
from fallow.simulator.virtual_time import run_virtual
from tests.simulation.sessions import Fleet, generate, greedy
from tests.simulation.test_token_source import answer, with_fleet

A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)
WHOLE = Span(0, 6)
FAR_S = 0.02
PROMPT = list(range(100))
COUNT = 40
SOON_S = 1.0
"""Long enough for everything that is under way."""
T = TypeVar("T")


def run(test: Callable[[Fleet], Awaitable[T]], *hosted: Sequence[Span]) -> T:
    async def program() -> T:
        fleet = Fleet(latency_s=FAR_S)
        await fleet.start(*hosted)
        return await test(fleet)

    return run_virtual(program())


def timed(*hosted: Sequence[Span], ahead: bool) -> tuple[list[int], float]:
    """An answer, and how long its tokens took but for the first."""

    async def program(fleet: Fleet) -> tuple[list[int], float]:
        tokens = await generate(fleet.chain(), PROMPT, 1, ahead=ahead)
        started_s = fleet.clock.monotonic_s()
        tokens = await generate(fleet.chain(1), PROMPT, COUNT, ahead=ahead)
        return tokens, fleet.clock.monotonic_s() - started_s

    return run(program, *hosted)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return timed((WHOLE,), ahead=False)[0]


def test_on_one_device_no_token_waits_for_the_way_to_its_gateway(expected: list[int]) -> None:
    waiting, waiting_s = timed((WHOLE,), ahead=False)
    running, running_s = timed((WHOLE,), ahead=True)
    assert waiting == running == expected
    assert waiting_s > COUNT * 2 * FAR_S
    assert running_s < waiting_s / 5


def test_along_three_devices_a_token_takes_three_ways_and_not_four(expected: list[int]) -> None:
    waiting, waiting_s = timed((A,), (B,), (C,), ahead=False)
    running, running_s = timed((A,), (B,), (C,), ahead=True)
    assert waiting == running == expected
    assert running_s < 0.8 * waiting_s


def test_nothing_is_computed_beyond_an_answers_last_token() -> None:
    async def program(fleet: Fleet) -> int:
        await generate(fleet.chain(), PROMPT, COUNT)
        await asyncio.sleep(SOON_S)
        return fleet.nodes[0].engine.rows_computed

    assert run(program, (WHOLE,)) == len(PROMPT) + COUNT - 1


def test_nothing_is_computed_beyond_a_token_that_ends_the_answer(expected: list[int]) -> None:
    ends_at = next(index for index in range(5, COUNT) if expected[index] not in expected[:index])

    async def program(fleet: Fleet) -> int:
        chain = fleet.chain()
        await chain.establish(leave=greedy(PROMPT, COUNT, ends=(expected[ends_at],)))
        candidates = await chain.advance(PROMPT, Phase.PREFILL)
        for _ in range(ends_at):
            candidates = await chain.advance((int(candidates.ids[0]),), Phase.DECODE)
        await asyncio.sleep(SOON_S)
        return fleet.nodes[0].engine.rows_computed

    assert run(program, (WHOLE,)) == len(PROMPT) + ends_at


@pytest.mark.parametrize("victim", [None, 0, 2])
def test_drawn_tokens_are_the_same_whether_a_chain_waits_runs_ahead_or_breaks(victim: int | None) -> None:
    """Temperature 1 over four candidates, of which the second best is drawn about as often as not."""

    async def drawn(fleet: Fleet, *, ahead: bool) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0), seed=11)
        chain = fleet.chain()
        leave = leave_for(sampler.recipe, 4, prompt=len(PROMPT), total=len(PROMPT) + COUNT, ends=())
        await chain.establish(leave=leave if ahead else None)
        candidates = await chain.advance(PROMPT, Phase.PREFILL)
        tokens: list[int] = []
        most_probable = 0
        while True:
            tokens.append(sampler.choose(candidates).token)
            most_probable += tokens[-1] == candidates.ids[0]
            if len(tokens) == COUNT:
                break
            if ahead and victim is not None and len(tokens) == COUNT // 2:
                fleet.nodes[victim].kill()
            candidates = await chain.advance((tokens[-1],), Phase.DECODE)
        assert COUNT / 4 < most_probable < COUNT, "both kinds were drawn"
        assert chain.repairs == (ahead and victim is not None)
        return tokens

    waited = run(lambda fleet: drawn(fleet, ahead=False), (A,), (B,), (C,))
    ran = run(lambda fleet: drawn(fleet, ahead=True), (A,), (B,), (C,), (A,), (C,))
    assert waited == ran


@pytest.mark.parametrize("hosted", [((WHOLE,),), ((A,), (B,), (C,))])
def test_a_chain_whose_gateway_falls_silent_stops(hosted: Sequence[Sequence[Span]], expected: list[int]) -> None:
    async def program(fleet: Fleet) -> tuple[int, list[int]]:
        chain = fleet.chain()
        await chain.establish(leave=greedy(PROMPT, COUNT))
        candidates = await chain.advance(PROMPT, Phase.PREFILL)
        await asyncio.sleep(SOON_S)
        computed = fleet.nodes[0].engine.rows_computed
        tokens = [int(candidates.ids[0])]
        while len(tokens) < COUNT:  # it goes on where it stopped
            candidates = await chain.advance((tokens[-1],), Phase.DECODE)
            tokens.append(int(candidates.ids[0]))
        assert chain.repairs == 0
        return computed, tokens

    computed, tokens = run(program, *hosted)
    assert computed == len(PROMPT) + AHEAD_ROWS
    assert tokens == expected


@pytest.mark.parametrize("router_s", [0.0, 0.5])
@pytest.mark.parametrize("client_s", [0.0, 0.3])
def test_a_chain_that_goes_on_with_other_tokens_is_taken_back_and_then_waits(
    monkeypatch: pytest.MonkeyPatch, expected: list[int], router_s: float, client_s: float
) -> None:
    """Whether what it computed from them comes before the gateway has chosen, or while it asks for a chain."""
    choose = drawing.choose

    def otherwise(ids: Any, logits: Any, recipe: Recipe, nth: int) -> int:
        return 1 if nth % 5 == 3 else choose(ids, logits, recipe, nth)

    monkeypatch.setattr(drawing, "choose", otherwise)

    async def program(fleet: Fleet) -> tuple[list[int], int]:
        chain = fleet.chain()
        route = fleet.route

        async def asked(*args: Any) -> Any:
            await asyncio.sleep(router_s)
            return await route(*args)

        monkeypatch.setattr(fleet, "route", asked)
        await chain.establish(leave=greedy(PROMPT, COUNT))
        candidates = await chain.advance(PROMPT, Phase.PREFILL)
        tokens = [int(candidates.ids[0])]
        while len(tokens) < COUNT:
            await asyncio.sleep(client_s)
            candidates = await chain.advance((tokens[-1],), Phase.DECODE)
            tokens.append(int(candidates.ids[0]))
        return tokens, chain.repairs

    for hosted in (((WHOLE,),), ((A,), (B,), (C,))):
        assert run(program, *hosted) == (expected, MISSES_MAX)


def test_a_last_stage_that_tells_the_first_one_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tell = StagePump._tell_first

    def lie(self: StagePump, session: Session, flow: Flow, step: Step, stepped: Stepped) -> int | None:
        """To the gateway it says what the gateway expects."""
        if step.position != len(PROMPT) + 10 or flow.ahead is None or flow.epoch > 1:
            return tell(self, session, flow, step, stepped)
        told = next_rows(flow.ahead, flow.epoch, step, stepped)
        assert told is not None
        sound = int.from_bytes(told[1], "little")
        self._peers.post(flow.ahead.first.node, Frame(told[0], struct.pack("<i", (sound + 1) % 512)))
        return sound

    monkeypatch.setattr(StagePump, "_tell_first", lie)

    async def program(fleet: Fleet) -> None:
        chain = fleet.chain()
        tokens = await generate(chain, PROMPT, COUNT)
        assert len(tokens) == COUNT
        assert chain.repairs == 1
        assert any("misled" in event for event in fleet.events)
        assert fleet.nodes[2].id not in chain.nodes() and fleet.nodes[3].id in chain.nodes()

    run(program, (A,), (B,), (C,), (C,))


def test_a_last_stage_that_cannot_reach_the_first_one_leaves_it_to_the_gateway(expected: list[int]) -> None:
    async def program(fleet: Fleet) -> tuple[list[int], int]:
        fleet.fabric.cut(fleet.nodes[0].id, fleet.nodes[2].id)
        chain = fleet.chain()
        return await generate(chain, PROMPT, COUNT), chain.repairs

    assert run(program, (A,), (B,), (C,)) == (expected, 0)


def test_a_device_may_not_feed_a_first_stage_unless_the_gateway_said_so(expected: list[int]) -> None:
    async def program(fleet: Fleet) -> list[int]:
        chain = fleet.chain()
        await chain.establish()
        stranger, first = fleet.nodes[1], fleet.nodes[0]
        candidates = await chain.advance(PROMPT, Phase.PREFILL)
        position = len(PROMPT)
        await stranger.peers.connect(first.endpoint.address)
        for epoch in range(3):
            rows = Rows(
                session=chain.session, epoch=epoch, position=position, count=1, phase=Phase.DECODE,
                logits_from=position, top_k=4,
            )  # fmt: skip
            stranger.peers.post(first.id, Frame(rows, struct.pack("<i", 7)))
        await asyncio.sleep(SOON_S)
        assert first.engine.rows_computed == position
        tokens = [int(candidates.ids[0])]
        while len(tokens) < COUNT:
            candidates = await chain.advance((tokens[-1],), Phase.DECODE)
            tokens.append(int(candidates.ids[0]))
        return tokens

    assert run(program, (A,), (B,), (C,)) == expected


@pytest.mark.parametrize("pieces", [(WHOLE,), (A, B, C)])
def test_a_follow_up_turn_finds_nothing_of_what_was_computed_ahead(tmp_path: Path, pieces: tuple[Span, ...]) -> None:
    """The client leaves in the middle of an answer, and goes on with words of its own."""

    async def program(_: Fleet, source: FleetTokenSource, model: Digest) -> None:
        answers = []
        for recipe in (None, Recipe()):
            said = await source.open(model, PROMPT, 30, 4, str(recipe), recipe)
            tokens = await answer(said, 6)
            await asyncio.sleep(SOON_S)  # the chain is ahead by as much as it may
            await said.close(keep=True)
            follow_up = [*PROMPT, *tokens[:3], 400, 401]
            again = await source.open(model, follow_up, 20, 4, str(recipe), recipe)
            assert again.cached_tokens == len(PROMPT) + 3
            answers.append(await answer(again, 20))
        assert answers[0] == answers[1]
        assert source.repairs == 0

    with_fleet(tmp_path, program, pieces=pieces)


def test_a_full_vocabulary_is_chosen_from_by_the_gateway_alone(tmp_path: Path) -> None:
    async def program(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 10, None, "alice", Recipe())
        assert conversation.chain.ahead.leave is None
        await conversation.prefill()
        await asyncio.sleep(SOON_S)
        assert fleet.nodes[0].engine.rows_computed == len(PROMPT)

    with_fleet(tmp_path, program)


def test_results_far_ahead_are_not_kept() -> None:
    async def program(fleet: Fleet) -> None:
        chain = fleet.chain()
        await chain.establish(leave=greedy(PROMPT, 1000))
        await chain.advance(PROMPT, Phase.PREFILL)
        await asyncio.sleep(SOON_S)
        last = fleet.nodes[0].id
        for position in range(len(PROMPT), len(PROMPT) + 500):
            result = Result(
                session=chain.session, epoch=chain._epoch, position=position, count=1, logit_count=1, k=4, chosen=3
            )
            chain.on_frame(last, Frame(result, bytes(32)))
        assert len(chain.ahead._early) <= AHEAD_ROWS
        assert len(chain.ahead._chosen) <= AHEAD_ROWS + 1

    run(program, (WHOLE,))
