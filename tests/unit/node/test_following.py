"""A device that is a whole chain computes the next token's row before it has heard of the token: when, how far, and how
that is undone."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fallow.domain.frames import AHEAD_ROWS, Ahead, CloseSession, Flow, PeerAddress, Phase, Result, Rows, StageState
from fallow.domain.ids import SessionId
from fallow.domain.sampling import Recipe
from fallow.engine import memory
from fallow.engine.contract import Drawn, Step, Stepped
from fallow.engine.drawing import drawn_token
from fallow.node.following import step_after
from tests.unit.node.rights_world import BUDGET, SESSION, World, codes, flow, rows, run
from tests.unit.trust.grant_world import NODE, OTHER_NODE

OWN = PeerAddress(NODE.node, ())
PROMPT = 3


def ahead(first: PeerAddress = OWN, session: SessionId = SESSION, until: int = BUDGET) -> Ahead:
    return Ahead(
        first=first, first_session=session, recipe=Recipe(), drawn_from=PROMPT, until=until, ends=()
    )  # fmt: skip


def alone(until: int = BUDGET, epoch: int = 1, rewind_to: int | None = None) -> Flow:
    """The flow of the only stage of a chain that runs ahead."""
    told = msgspec.structs.replace(flow(epoch, rewind_to), ahead=ahead(until=until), ahead_from=NODE.node)
    return msgspec.structs.replace(told, forward_from=rewind_to or 0)


def step(position: int = 9, top_k: int | None = 4, logits_from: int = 0) -> Step:
    return Step(
        session=SessionId("e" * 32), position=position, count=1, phase=Phase.DECODE, logits_from=logits_from,
        top_k=top_k, payload=b"",
    )  # fmt: skip


def test_the_row_behind_a_step_is_drawn_where_the_chain_is_this_device_alone() -> None:
    after = step_after(alone(), NODE.node, SESSION, step(), beyond=1)
    assert after is not None and after.drawn is not None
    assert (after.position, after.count, after.logits_from, after.drawn.nth) == (10, 1, 10, 10 - PROMPT)


@pytest.mark.parametrize(
    ("told", "asked", "beyond"),
    [
        (flow(), step(), 1),
        (msgspec.structs.replace(alone(), previous=OTHER_NODE.node), step(), 1),
        (msgspec.structs.replace(alone(), ahead=ahead(first=PeerAddress(OTHER_NODE.node, ()))), step(), 1),
        (msgspec.structs.replace(alone(), ahead=ahead(session=SessionId("2" * 32))), step(), 1),
        (alone(until=10), step(), 1),
        (alone(), step(position=1), 1),
        (alone(), step(top_k=None), 1),
        (alone(), step(logits_from=10), 1),
        (alone(), step(), AHEAD_ROWS),
    ],
    ids=[
        "it does not run ahead", "it is not the first", "another is the first", "it comes here twice", "it is over",
        "a prompt", "a whole vocabulary", "no candidates", "too far ahead",
    ],
)  # fmt: skip
def test_otherwise_nothing_is_asked_for(told: Flow, asked: Step, beyond: int) -> None:
    assert step_after(told, NODE.node, SESSION, asked, beyond) is None


def test_a_prompt_brings_the_answers_rows_with_it_until_the_grant_ends(tmp_path: Path) -> None:
    """`until` lies; the grant does not. Nobody but the gateway ends its session by asking for more."""

    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), alone(until=BUDGET + 50))
        heard = await gateway.say(rows(0, PROMPT))
        results = [header for header in heard if isinstance(header, Result)]
        assert [result.position + result.count for result in results] == list(range(PROMPT, PROMPT + AHEAD_ROWS + 1))
        assert all(result.chosen is not None for result in results)
        assert world.engine.rows_computed == PROMPT + AHEAD_ROWS
        gateway.heard.clear()
        confirming = [Rows(
            session=SESSION, epoch=1, position=position, count=1, phase=Phase.DECODE, logits_from=position, top_k=1
        ) for position in range(PROMPT, PROMPT + 4)]  # fmt: skip
        for row, result in zip(confirming, results, strict=False):
            assert result.chosen is not None
            await gateway.tell(row, result.chosen.to_bytes(4, "little"))
        await asyncio.sleep(0.2)
        assert codes([frame.header for frame in gateway.heard]) == []
        assert world.engine.rows_computed == BUDGET
        assert world.agent.relay.session_count == 1
        assert codes(await gateway.say(rows(BUDGET, 1))) == ["grant_refused"]
        assert world.engine.rows_computed == BUDGET

    run(tmp_path, script)


def test_what_was_computed_ahead_is_gone_when_the_session_is_opened_again(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), alone())
        before = await gateway.say(rows(0, PROMPT))
        (state,) = [
            header for header in await gateway.say(world.opening(world.grant(), 2)) if isinstance(header, StageState)
        ]
        assert state.position == PROMPT + AHEAD_ROWS, "the engine stands where the stage says"
        heard = await gateway.say(alone(epoch=2, rewind_to=PROMPT - 1), rows(PROMPT - 1, 1, 2))
        ends = [header.position + header.count for header in heard if isinstance(header, Result)]
        assert ends == list(range(PROMPT, PROMPT + AHEAD_ROWS + 1))
        chosen = [[header.chosen for header in each if isinstance(header, Result)] for each in (before, heard)]
        assert chosen[0] == chosen[1]
        await gateway.say(CloseSession(session=SESSION))
        assert world.engine.load_now.sessions == 0

    run(tmp_path, script)


def test_a_session_that_is_closed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        gateway = await world.party()
        await gateway.say(world.opening(world.grant()), alone())
        await gateway.tell(rows(0, PROMPT), bytes(4 * PROMPT))
        while world.engine.rows_computed < PROMPT + 2:
            await asyncio.sleep(0.0001)
        await gateway.say(CloseSession(session=SESSION))
        computed = world.engine.rows_computed
        assert computed < PROMPT + AHEAD_ROWS
        assert world.agent.relay.session_count == 0 and world.engine.load_now.sessions == 0
        await asyncio.sleep(1.0)
        assert world.engine.rows_computed == computed

    run(tmp_path, script)


@pytest.mark.parametrize(
    ("wrong", "shift", "wasted_max"),
    [({4}, 1, 2), ({4}, None, 1), ({0}, 1, 2), (set(range(BUDGET)), 1, 2), ({AHEAD_ROWS - 1}, 1, 2), (set(), 1, 0)],
    ids=["one token", "an end instead", "the first", "every token", "the last", "none"],
)
def test_an_engine_that_draws_another_token_costs_a_row_and_never_an_answer(
    wrong: set[int], shift: int | None, wasted_max: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's process and its agent's may have two builds of the same recipe."""
    asked: list[int] = []

    def other_build(stepped: Stepped, drawn: Drawn) -> bytes | None:
        asked.append(drawn.nth)
        token = drawn_token(stepped, drawn)
        if drawn.nth not in wrong or token is None:
            return token
        return None if shift is None else (int.from_bytes(token, "little") + shift).to_bytes(4, "little")

    async def script(world: World) -> None:
        gateway = await world.party()
        heard = []
        for epoch, rewind_to in ((1, None), (2, 0)):
            await gateway.say(world.opening(world.grant(), epoch), alone(epoch=epoch, rewind_to=rewind_to))
            before = world.engine.rows_computed
            await gateway.say(rows(0, PROMPT, epoch))
            heard.append([(frame.header.position, frame.header.chosen, bytes(frame.payload))
                          for frame in gateway.heard if isinstance(frame.header, Result)])  # fmt: skip
            assert codes([frame.header for frame in gateway.heard]) == []
            assert world.engine.rows_computed - before <= PROMPT + AHEAD_ROWS + wasted_max
            monkeypatch.setattr(memory, "drawn_token", other_build)
        right, mended = heard
        assert mended == right and len(right) == AHEAD_ROWS + 1
        assert asked, "the other build was asked"
        (state,) = [
            header for header in await gateway.say(world.opening(world.grant(), 3)) if isinstance(header, StageState)
        ]
        assert state.position == PROMPT + AHEAD_ROWS, "the engine stands where the stage says"

    run(tmp_path, script)
