"""Goal: a polite departure costs a conversation no pause and changes no token; a device that cannot be reached costs
all sessions of a gateway one short wait.

Method: the real token source, chains, links and relays on virtual time; the coordinator is a table on the bus.
"""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fallow.domain.errors import UnknownModel
from fallow.domain.ids import Digest, SessionId
from fallow.gateway.chain import Chain
from fallow.gateway.contract import Conversation
from fallow.gateway.lost_devices import LOST_MAX, LOST_S, LostDevices
from fallow.gateway.moves import MOVE_RETRY_S, MOVE_TRIES_S, Moves
from fallow.gateway.running_ahead import Leave
from fallow.gateway.sending import DIAL_PATIENCE_S
from fallow.gateway.sessions import FleetConversation, FleetTokenSource
from tests.simulation.sessions import Fleet, node_id
from tests.simulation.test_token_source import (
    KV_BYTES_PER_TOKEN_AND_STAGE,
    PROMPT,
    A,
    B,
    C,
    answer,
    sessions_on,
    with_fleet,
)

LEAVER, SPARE = 1, 3


class Failing(Chain):
    """To move to it fails."""

    async def establish(self, keep_tokens: int = 0, leave: Leave | None = None) -> None:
        raise UnknownModel("the move fails")


def repairs_of(source: FleetTokenSource) -> list[str]:
    """What was told of repairs that began."""
    return [event for event in source.events if "repairing after" in event]


def assert_nothing_left(fleet: Fleet, source: FleetTokenSource) -> None:
    assert (source._live, source.moves._moves, source.moves._leaving, len(source.moves._standbys)) == ({}, {}, {}, 0)
    assert sum(node.relay.session_count for node in fleet.nodes if node.alive) == 0


async def timed(
    fleet: Fleet, conversation: Conversation, count: int, between_s: float = 0.0
) -> tuple[list[int], float]:
    """The answer and its longest gap; the client reads a token every `between_s`."""
    tokens = [int((await conversation.prefill()).ids[0])]
    longest_s = 0.0
    while len(tokens) < count:
        began_s = fleet.clock.monotonic_s()
        tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        longest_s = max(longest_s, fleet.clock.monotonic_s() - began_s)
        await asyncio.sleep(between_s)
    return tokens, longest_s


class Running(NamedTuple):
    """An answer on its way."""

    conversation: FleetConversation
    expected: list[int]
    answer: "asyncio.Task[tuple[list[int], float]]"

    async def longest_gap_s(self) -> float:
        """When it has ended, with the tokens of the undisturbed one."""
        tokens, longest_s = await self.answer
        assert tokens == self.expected
        return longest_s


async def under_way(
    fleet: Fleet, source: FleetTokenSource, model: Digest, count: int, between_s: float = 0.0
) -> Running:
    """An answer whose first tokens are there, after the same one without any trouble."""
    expected = await undisturbed(source, model, count)
    conversation = await source.open(model, PROMPT, 500, 1, "alice")
    task = asyncio.create_task(timed(fleet, conversation, count, between_s))
    await asyncio.sleep(0.2)
    return Running(conversation, expected, task)


async def undisturbed(source: FleetTokenSource, model: Digest, count: int) -> list[int]:
    conversation = await source.open(model, PROMPT, 500, 1, "alice")
    tokens = await answer(conversation, count)
    await conversation.close(keep=False)
    return tokens


def test_a_conversation_moves_before_its_device_leaves(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        running = await under_way(fleet, source, model, 120)
        before = running.conversation.chain.session
        fleet.nodes[LEAVER].relay.drain()
        while fleet.nodes[LEAVER].relay.session_count:
            await asyncio.sleep(0.01)
        fleet.nodes[LEAVER].kill()
        assert await running.longest_gap_s() < 0.1, "neither the leave nor the end of the device is noticed"
        assert running.conversation.chain.session != before
        assert (running.conversation.chain.repairs, sessions_on(fleet)) == (1, [1, 0, 1, 1])
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [0, 0, 0, 0]

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_device_that_goes_before_its_sessions_have_moved_is_repaired_around(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        running = await under_way(fleet, source, model, 120)
        fleet.nodes[LEAVER].relay.drain()
        fleet.nodes[LEAVER].kill()
        await running.longest_gap_s()
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet)[SPARE] == 0

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_an_answer_goes_on_where_there_are_no_other_devices_until_its_device_is_gone(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        running = await under_way(fleet, source, model, 60)
        fleet.nodes[LEAVER].relay.drain()
        assert await running.longest_gap_s() < 0.1
        assert running.conversation.chain.repairs == 0
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [0, 0, 0]

    with_fleet(tmp_path, test)


def test_a_move_is_tried_again_until_there_is_a_device_to_move_to(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.nodes[SPARE].alive = False
        running = await under_way(fleet, source, model, 60, between_s=0.1)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(2.0)
        fleet.nodes[SPARE].alive = True
        await asyncio.sleep(2.0)
        fleet.nodes[LEAVER].kill()
        assert await running.longest_gap_s() < 0.1
        assert repairs_of(source) == []
        await running.conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_move_has_kept_conversations_make_room(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        kept = await source.open(model, list(range(100, 160)), 500, 1, "bob")
        await answer(kept, 2)
        await kept.close(keep=True)
        running = await under_way(fleet, source, model, 60, between_s=0.1)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(2.0)
        fleet.nodes[LEAVER].kill()
        assert await running.longest_gap_s() < 0.1
        assert repairs_of(source) == []
        await running.conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B), kv_budget_bytes=int(2.5 * 560 * KV_BYTES_PER_TOKEN_AND_STAGE))


def test_a_token_that_is_awaited_when_the_device_goes_comes_from_the_move(tmp_path: Path) -> None:
    """The repair would compute everything a second time, on the very device that the move has just filled."""

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 25)
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        tokens = await answer(conversation, 20)
        fleet.nodes[LEAVER].engine.hang()
        before = conversation.chain.session
        task = asyncio.create_task(conversation.decode(tokens[-1]))
        await asyncio.sleep(0.01)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.5)
        fleet.nodes[LEAVER].kill()
        began_s = fleet.clock.monotonic_s()
        tokens.append(int((await task).ids[0]))
        assert fleet.clock.monotonic_s() - began_s < 0.1
        assert (conversation.chain.session != before, repairs_of(source)) == (True, [])
        assert fleet.nodes[SPARE].engine.rows_computed == len(PROMPT) + 20
        while len(tokens) < 25:
            tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        assert tokens == expected
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_chain_in_trouble_waits_for_a_move_that_is_nearly_ready(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        prompt = list(range(1000))
        calm = await source.open(model, prompt, 100, 1, "alice")
        expected = await answer(calm, 10)
        await calm.close(keep=False)
        conversation = await source.open(model, prompt, 100, 1, "alice")
        tokens = await answer(conversation, 9)
        before, rows = conversation.chain.session, fleet.nodes[SPARE].engine.rows_computed
        fleet.nodes[LEAVER].engine.hang()
        task = asyncio.create_task(conversation.decode(tokens[-1]))
        await asyncio.sleep(0.01)
        fleet.nodes[LEAVER].relay.drain()
        while fleet.nodes[SPARE].engine.rows_computed < rows + 800:
            await asyncio.sleep(0.001)
        fleet.nodes[LEAVER].kill()
        tokens.append(int((await task).ids[0]))
        assert (tokens, conversation.chain.session != before, repairs_of(source)) == (expected, True, [])
        assert fleet.nodes[SPARE].engine.rows_computed - rows == len(prompt) + 9
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_move_that_has_hardly_begun_ends_before_the_repair_which_has_its_room(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.nodes[SPARE].engine._kv_budget_bytes = int(1.5 * 560 * KV_BYTES_PER_TOKEN_AND_STAGE)
        running = await under_way(fleet, source, model, 60)
        fleet.nodes[LEAVER].relay.drain()
        while not sessions_on(fleet)[SPARE]:
            await asyncio.sleep(0.001)
        fleet.nodes[LEAVER].kill()
        assert await running.longest_gap_s() < 1.0
        assert len(repairs_of(source)) == 1
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_other_trouble_meanwhile_keeps_the_cache_of_the_device_that_leaves(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 60)
        rows = fleet.nodes[LEAVER].engine.rows_computed
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        task = asyncio.create_task(timed(fleet, conversation, 60))
        await asyncio.sleep(0.2)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.02)
        fleet.nodes[2].kill()
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 1.0
        assert fleet.nodes[LEAVER].engine.rows_computed - rows == len(PROMPT) + 59, "nothing anew"
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, C))


def test_a_repair_that_keeps_the_device_that_leaves_is_followed_by_another_move(tmp_path: Path) -> None:
    """It says once that it leaves; the move that this began has made way for the repair."""

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        def alive() -> dict[int, int]:
            return {index: node.relay.session_count for index, node in enumerate(fleet.nodes) if node.alive}

        running = await under_way(fleet, source, model, 60, between_s=0.1)
        fleet.nodes[SPARE].engine.hang()
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.05)
        assert sessions_on(fleet) == [2, 1, 2, 1, 0], "a move is under way"
        fleet.nodes[2].kill()
        await asyncio.sleep(0.2)
        assert alive() == {0: 1, LEAVER: 1, SPARE: 0, 4: 1}, "it was repaired, and the move has ended"
        fleet.nodes[SPARE].engine.resume()
        await asyncio.sleep(2.0)
        assert alive() == {0: 1, LEAVER: 0, SPARE: 1, 4: 1}, "it has moved"
        repairs = repairs_of(source)
        fleet.nodes[LEAVER].kill()
        assert await running.longest_gap_s() < 0.5
        assert repairs_of(source) == repairs, "the end of the device is not noticed"
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B, C))


def test_two_devices_that_leave_at_once_are_left_in_one_move(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        running = await under_way(fleet, source, model, 120)
        for leaver in (LEAVER, 2):
            fleet.nodes[leaver].relay.drain()
            fleet.nodes[leaver].relay.drain()
        while fleet.nodes[LEAVER].relay.session_count or fleet.nodes[2].relay.session_count:
            await asyncio.sleep(0.01)
        for leaver in (LEAVER, 2):
            fleet.nodes[leaver].kill()
        assert await running.longest_gap_s() < 0.1
        assert sum("moved to" in event for event in source.events) == 1
        assert not any(running.conversation.chain.session[:8] not in event for event in repairs_of(source))
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B, C))


def test_a_device_that_is_moved_to_leaves_as_well(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        running = await under_way(fleet, source, model, 120)
        fleet.nodes[SPARE].engine.hang()
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.05)
        assert sessions_on(fleet) == [2, 1, 2, 1, 0], "the move is under way"
        fleet.nodes[SPARE].relay.drain()
        assert await running.longest_gap_s() < 0.1
        assert fleet.nodes[4].id in running.conversation.chain.nodes()
        await running.conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B, B))


def test_a_conversation_that_is_not_opened_after_all_ends_its_move(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.fabric.cut(fleet.gateway, fleet.nodes[2].id)
        opening = asyncio.create_task(source.open(model, PROMPT, 500, 1, "alice"))
        await asyncio.sleep(0.3)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.3)
        assert len(source._live) == 2, "a move is under way"
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_token_source_that_closes_ends_its_moves(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        await answer(conversation, 3)
        fleet.nodes[SPARE].engine.hang()
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.05)
        await source.close()
        await asyncio.sleep(0.1)
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("move ")] == []

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_move_that_failed_a_moment_ago_is_not_changed_over_to(tmp_path: Path) -> None:
    """A task is done one pass before its callbacks run."""

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        chain = fleet.chain()
        to = Failing(SessionId("f" * 32), model, 100, 1, fleet.peers, fleet, fleet.clock, fleet.events.append)
        dropped: list[Chain] = []
        moves = Moves(lambda _: to, dropped.append, fleet.events.append, fleet.clock)
        assert moves.begin(chain, fleet.nodes[LEAVER].id)
        await asyncio.sleep(0)
        assert (moves.newest(chain), dropped) == (chain, [])
        await asyncio.sleep(0)
        assert (moves.newest(chain), dropped, chain.broken) == (chain, [to], False)

    with_fleet(tmp_path, test)


def test_a_move_that_failed_is_begun_again_now_and_then_for_as_long_as_the_device_may_stay(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        chain = fleet.chain()
        await chain.establish()
        begun: list[float] = []

        def make(_: Chain) -> Chain:
            begun.append(fleet.clock.monotonic_s())
            session = SessionId(f"{len(begun):032x}")
            return Failing(session, model, 100, 1, fleet.peers, fleet, fleet.clock, fleet.events.append)

        moves = Moves(make, lambda _: None, fleet.events.append, fleet.clock)
        told_s = fleet.clock.monotonic_s()
        assert moves.begin(chain, fleet.nodes[LEAVER].id)
        while fleet.clock.monotonic_s() < told_s + 2 * MOVE_TRIES_S:
            await asyncio.sleep(0.1)
            assert moves.newest(chain) is chain
        assert len(begun) > 10
        assert min(later - before for before, later in pairwise(begun)) >= MOVE_RETRY_S
        assert begun[-1] < told_s + MOVE_TRIES_S
        assert not moves.end(chain)
        assert not moves._leaving

    with_fleet(tmp_path, test)


def test_a_finished_move_keeps_the_cache_for_the_next_turn(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        tokens = await answer(conversation, 5)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.5)
        await conversation.close(keep=True)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [1, 0, 1, 1]
        fleet.nodes[LEAVER].kill()
        rows = fleet.nodes[SPARE].engine.rows_computed
        second = await source.open(model, [*PROMPT, *tokens[:4], 7, 8], 500, 1, "alice")
        assert second.cached_tokens == len(PROMPT) + 4
        reused = await answer(second, 3)
        assert fleet.nodes[SPARE].engine.rows_computed - rows == 2 + 2
        await second.close(keep=False)
        first = await source.open(model, PROMPT, 500, 1, "bob")
        await answer(first, 5)
        await first.close(keep=True)
        still = await source.open(model, [*PROMPT, *tokens[:4], 7, 8], 500, 1, "bob")
        assert await answer(still, 3) == reused
        await still.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_conversation_that_ends_ends_its_move_and_is_not_kept(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation: FleetConversation = await source.open(model, PROMPT, 500, 1, "alice")
        await answer(conversation, 3)
        fleet.nodes[LEAVER].relay.drain()
        await asyncio.sleep(0.004)
        assert sum(sessions_on(fleet)) > 3, "the move is under way"
        await conversation.close(keep=True)
        await asyncio.sleep(0.2)
        assert sessions_on(fleet) == [0, 0, 0, 0]

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_what_one_session_cannot_reach_the_others_do_not_dial(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.fabric.cut(fleet.gateway, fleet.nodes[LEAVER].id)
        began_s = fleet.clock.monotonic_s()
        first = await source.open(model, PROMPT, 20, 1, "alice")
        took_s = fleet.clock.monotonic_s() - began_s
        assert DIAL_PATIENCE_S <= took_s < 2 * DIAL_PATIENCE_S
        began_s = fleet.clock.monotonic_s()
        second = await source.open(model, PROMPT, 20, 1, "bob")
        assert fleet.clock.monotonic_s() - began_s < 0.1
        for conversation in (first, second):
            assert fleet.nodes[SPARE].id in conversation.chain.nodes()
            await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_lost_device_is_tried_when_there_is_no_other(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        first = await source.open(model, PROMPT, 20, 1, "alice")
        await answer(first, 2)
        await first.close(keep=False)
        source.on_lost(fleet.nodes[LEAVER].id, "so it seemed")
        second = await source.open(model, PROMPT, 20, 1, "bob")
        assert fleet.nodes[LEAVER].id in second.chain.nodes()
        await second.close(keep=False)

    with_fleet(tmp_path, test)


def test_lost_devices_are_bounded_in_number_and_time(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        lost = LostDevices(fleet.peers, fleet.clock)
        for index in range(LOST_MAX + 5):
            lost.note(node_id(5000 + index))
        assert len(lost.now()) == LOST_MAX
        assert node_id(5000) not in lost.now()
        await fleet.peers.connect(fleet.nodes[0].endpoint.address)
        lost.note(fleet.nodes[0].id)
        assert fleet.nodes[0].id not in lost.now(), "there is a link"
        await asyncio.sleep(LOST_S + 0.1)
        assert lost.now() == frozenset()

    with_fleet(tmp_path, test)
