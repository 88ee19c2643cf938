"""Goal: an answer whose chain owes a token goes on where another one stands by, whether or not anybody is known to be
lost; and no answer changes chains because its own is slow.

Method: as `test_standby.py`.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fallow.domain.ids import Digest
from fallow.domain.service import ServiceTier
from fallow.gateway.chain import Chain
from fallow.gateway.moves import LATE_LOOK_S
from fallow.gateway.progress import LATE_S, OVERDUE_S
from fallow.gateway.sessions import FleetConversation, FleetTokenSource
from fallow.gateway.standbys import STANDBY_RETRY_S, STANDBY_ROWS
from fallow.policy.liveness import Liveness
from fallow.simulator.virtual_time import VirtualTimeLoop
from tests.simulation.sessions import Fleet, Node
from tests.simulation.test_moves import assert_nothing_left, repairs_of, timed, undisturbed
from tests.simulation.test_standby import COUNT, TWICE, prioritised, rows_on
from tests.simulation.test_token_source import PROMPT, A, B, C, answer, sessions_on, with_fleet

FELL_SILENT_S = 0.6
"""When the device does."""
SILENT_S = Liveness().silence_s + 2 * Liveness().tick_s
"""When a link's silence is noticed at the latest."""
NOTICED_S = OVERDUE_S + 2 * LATE_LOOK_S


def be_slow(node: Node) -> None:
    node.take_longer(3 * OVERDUE_S)


@pytest.mark.parametrize(
    ("trouble", "position", "within_s"),
    [(Node.freeze, place, SILENT_S) for place in range(3)]
    + [(Node.compute_nothing, place, NOTICED_S) for place in range(3)]
    + [(be_slow, 1, NOTICED_S)],
)
def test_whoever_falls_silent_is_overtaken(
    tmp_path: Path, trouble: Callable[[Node], None], position: int, within_s: float
) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(FELL_SILENT_S)
        trouble(fleet.nodes[position])
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < within_s
        assert (source.moves.takeovers, repairs_of(source)) == (1, [])
        assert rows_on(fleet)[3] == len(PROMPT) + COUNT - 1, "no row was computed twice"
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_what_stands_by_is_brought_up_to_date_before_it_is_needed(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(FELL_SILENT_S)
        fleet.nodes[1].take_longer(LATE_S + 2 * LATE_LOOK_S)
        await asyncio.sleep(LATE_S + 2 * LATE_LOOK_S)
        assert rows_on(fleet)[3] == rows_on(fleet)[0] == len(conversation.chain.tokens)
        assert source.moves.takeovers == 0
        task.cancel()
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_chain_that_is_slow_but_steady_is_left_alone_and_costs_the_other_no_more(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        for device in fleet.nodes[:3]:
            device.take_longer(0.8)
        calls: list[object] = []
        step = fleet.nodes[3].engine.step
        fleet.nodes[3].engine.step = lambda steps: calls.append(steps) or step(steps)  # type: ignore[method-assign]
        conversation = await prioritised(source, model)
        tokens, longest_s = await timed(fleet, conversation, COUNT)
        assert tokens == expected
        assert longest_s > OVERDUE_S
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        assert len(calls) < 2 * COUNT / STANDBY_ROWS
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_client_that_reads_slowly_is_not_taken_for_a_slow_chain(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        await timed(fleet, conversation, 10, between_s=4 * OVERDUE_S)
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_prompt_takes_as_long_as_it_takes_also_in_the_next_turn(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        tokens, _ = await timed(fleet, conversation, 10)
        await conversation.close(keep=True)
        again = await source.open(model, [*PROMPT, *tokens[:9], 7, 8], 20, 1, "alice", None, ServiceTier.PRIORITY)
        assert again.cached_tokens == len(PROMPT) + 9
        fleet.nodes[1].take_longer(4 * OVERDUE_S)
        await again.prefill()
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        await again.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


async def until_awaited(conversation: FleetConversation, waited_s: float) -> None:
    """A token has been awaited for so long."""
    chain = conversation.chain
    while chain.rows_ready() == len(chain.tokens) or chain.progress.waited_s() < waited_s:
        await asyncio.sleep(0.0001)


def hold_up(duration_s: float) -> None:
    """Nothing runs for so long, and what came meanwhile waits to be read."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop._now_s += duration_s


@pytest.mark.parametrize("waited_s", [0.0, LATE_S + LATE_LOOK_S], ids=["in time", "late"])
def test_a_gateway_that_was_held_up_itself_blames_nobody(tmp_path: Path, waited_s: float) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(FELL_SILENT_S)
        if waited_s:
            fleet.nodes[1].take_longer(LATE_S + 2 * LATE_LOOK_S, times=1)
        await until_awaited(conversation, waited_s)
        hold_up(1.5)
        tokens, _ = await task
        assert tokens == expected
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_token_that_came_while_the_client_was_busy_was_not_late(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 30)
        conversation = await prioritised(source, model)
        tokens = await answer(conversation, 20)
        fleet.nodes[1].take_longer(1.5 * OVERDUE_S, times=1)
        tokens.append(int((await conversation.decode(tokens[-1], lambda: asyncio.sleep(2 * OVERDUE_S))).ids[0]))
        assert not conversation.chain.broken
        source.moves.make_room(1)
        while len(tokens) < 29:
            tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        assert tokens == expected[:29]
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        await conversation.close(keep=True)
        again = await source.open(model, [*PROMPT, *tokens[:28], 7], 20, 1, "alice", None, ServiceTier.PRIORITY)
        assert again.cached_tokens == len(PROMPT) + 28
        await again.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


@pytest.mark.parametrize("trouble", [Node.freeze, Node.compute_nothing])
def test_what_stands_by_may_make_way_at_the_moment_of_change(tmp_path: Path, trouble: Callable[[Node], None]) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(FELL_SILENT_S)
        changes, awaited = 0, source.moves.awaited

        async def awaited_in_need(chain: Chain) -> Chain:
            nonlocal changes
            changes += 1
            asyncio.get_running_loop().call_soon(source.moves.make_room, 1)
            return await awaited(chain)

        source.moves.awaited = awaited_in_need  # type: ignore[method-assign]
        trouble(fleet.nodes[1])
        tokens, _ = await task
        assert tokens == expected
        assert (changes, source.moves.takeovers) == (1, 0)
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(*TWICE, B))


def test_whoever_was_late_is_not_what_stands_by_next(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 400, between_s=0.1))
        await asyncio.sleep(FELL_SILENT_S)
        fleet.nodes[1].compute_nothing()
        await asyncio.sleep(2 * OVERDUE_S + STANDBY_RETRY_S)
        assert source.moves.takeovers == 1
        assert sessions_on(fleet) == [0, 0, 0, 1, 1, 1, 1, 1, 1]
        fleet.nodes[4].kill()
        await asyncio.sleep(1.0)
        assert (source.moves.takeovers, repairs_of(source)) == (2, [])
        task.cancel()
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(*TWICE, A, B, C))


def test_delays_now_and_then_do_not_have_a_conversation_computed_again_and_again(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 420, between_s=0.1))
        for _ in range(6):
            await asyncio.sleep(STANDBY_RETRY_S + 1.5)
            (used,) = [node for node in fleet.nodes if node.id == conversation.chain.nodes()[1]]
            used.take_longer(1.5 * OVERDUE_S, times=1)
        await task
        assert 1 <= source.moves.takeovers <= 2
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_device_that_leaves_meanwhile_does_not_make_the_token_wait(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(FELL_SILENT_S)
        fleet.nodes[2].compute_nothing()
        await asyncio.sleep(0.3)
        fleet.nodes[0].relay.drain()
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < NOTICED_S
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_move_that_is_ready_is_used_when_a_token_is_overdue(tmp_path: Path) -> None:
    """Without any chain that stands by: somebody leaves, and another one hangs before the next token."""

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 40)
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        tokens = await answer(conversation, 20)
        fleet.nodes[1].compute_nothing()
        task = asyncio.create_task(conversation.decode(tokens[-1]))
        await asyncio.sleep(0.1)
        fleet.script = [[(3, A), (4, B), (5, C)]]
        fleet.nodes[0].relay.drain()
        began_s = fleet.clock.monotonic_s()
        tokens.append(int((await task).ids[0]))
        assert fleet.clock.monotonic_s() - began_s < NOTICED_S
        while len(tokens) < 40:
            tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        assert tokens == expected
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)
