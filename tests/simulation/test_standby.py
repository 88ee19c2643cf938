"""Goal: where another chain stands by, a loss costs an answer a few rows instead of all of them, changes no token, and
costs nobody else their place.

Method: the real token source, chains, links and relays on virtual time; the coordinator is a table on the bus.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from fallow.domain.fleet import Hop
from fallow.domain.ids import Digest, NodeId, SessionId
from fallow.domain.model import Span
from fallow.domain.sampling import Recipe
from fallow.domain.service import ServiceTier, Standby
from fallow.gateway.progress import STALL_TIMEOUT_S
from fallow.gateway.sessions import FleetConversation, FleetTokenSource
from fallow.gateway.standbys import STANDBY_RETRY_S, STANDBY_ROWS
from tests.simulation.sessions import Fleet
from tests.simulation.test_moves import assert_nothing_left, repairs_of, timed, undisturbed
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

TWICE = (A, B, C, A, B, C)
COUNT = 60


async def prioritised(source: FleetTokenSource, model: Digest, recipe: Recipe | None = None) -> FleetConversation:
    return await source.open(model, PROMPT, 500, 1, "alice", recipe, ServiceTier.PRIORITY)


def rows_on(fleet: Fleet) -> list[int]:
    return [node.engine.rows_computed for node in fleet.nodes]


def test_a_killed_device_costs_the_rows_that_the_other_chain_lacks(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        assert sessions_on(fleet) == [1] * 6
        behind = len(conversation.chain.tokens) - rows_on(fleet)[3]
        assert 0 <= behind <= STANDBY_ROWS
        fleet.nodes[1].kill()
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 0.1
        assert rows_on(fleet)[3] == len(PROMPT) + COUNT - 1, "no row was computed twice"
        assert (source.moves.takeovers, repairs_of(source)) == (1, [])
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_it_is_never_more_than_a_few_rows_behind(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        tokens = [int((await conversation.prefill()).ids[0])]
        await asyncio.sleep(0.5)
        assert rows_on(fleet)[3] == len(PROMPT)
        while len(tokens) < COUNT:
            tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
            await asyncio.sleep(0.05)
            assert 0 <= rows_on(fleet)[0] - rows_on(fleet)[3] <= STANDBY_ROWS
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_it_runs_ahead_once_it_has_taken_over_and_not_before(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model, Recipe())
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        assert rows_on(fleet)[3] <= rows_on(fleet)[0]
        fleet.nodes[1].kill()
        tokens, _ = await task
        assert tokens == expected
        assert conversation.chain.ahead.leave is not None
        assert not conversation.chain.ahead.untold
        assert source.moves.takeovers == 1
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_whoever_has_taken_over_has_another_one_stand_by(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 2 * COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 2 * COUNT, between_s=0.1))
        for lost, takeovers in ((0, 1), (4, 2)):
            await asyncio.sleep(STANDBY_RETRY_S + 0.8 if takeovers > 1 else 0.8)
            fleet.nodes[lost].kill()
            await asyncio.sleep(0.2)
            assert source.moves.takeovers == takeovers
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 0.1
        assert repairs_of(source) == []
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(*TWICE, A, B))


def test_a_device_that_leaves_has_nothing_computed_anew(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        fleet.nodes[1].relay.drain()
        await asyncio.sleep(0.1)
        assert sessions_on(fleet)[:3] == [0, 0, 0]
        fleet.nodes[1].kill()
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 0.1
        assert rows_on(fleet)[3] == len(PROMPT) + COUNT - 1
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_loss_in_it_is_not_repaired_but_another_one_is_sought(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 2 * COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 2 * COUNT, between_s=0.1))
        await asyncio.sleep(0.6)
        fleet.nodes[3].kill()
        await asyncio.sleep(0.4)
        assert sessions_on(fleet)[4:6] == [0, 0], "given up"
        await asyncio.sleep(STANDBY_RETRY_S)
        assert sessions_on(fleet)[4:] == [1, 1, 1], "another one"
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 0.1
        assert (source.moves.takeovers, repairs_of(source)) == (0, [])
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=(*TWICE, A))


def test_when_both_lose_a_device_the_answer_is_repaired(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        fleet.nodes[1].kill()
        fleet.nodes[3].kill()
        tokens, _ = await task
        assert tokens == expected
        assert (source.moves.takeovers, len(repairs_of(source))) == (0, 1)
        assert rows_on(fleet)[0] == 2 * (len(PROMPT) + COUNT - 1), "what lives keeps its cache"
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_trouble_that_costs_no_device_leaves_it_standing_by(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        conversation.chain.in_trouble("somebody was unsure", None)
        tokens, _ = await task
        assert tokens == expected
        assert (source.moves.takeovers, len(repairs_of(source))) == (0, 1)
        assert sessions_on(fleet) == [1] * 6
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_it_makes_way_for_a_conversation_that_needs_its_room(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        assert sessions_on(fleet) == [1] * 6
        fleet.script = [[(3, A), (4, B), (5, C)]] * 3
        other = await source.open(model, PROMPT, 500, 1, "bob")
        assert await answer(other, 5) == expected[:5]
        assert sessions_on(fleet) == [1] * 6
        assert source.moves.standing_by() == 0
        tokens, longest_s = await task
        assert (tokens, longest_s < 0.1) == (expected, True)
        await other.close(keep=False)
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE, kv_budget_bytes=int(1.5 * 560 * KV_BYTES_PER_TOKEN_AND_STAGE))


def sends_to(fleet: Fleet, hops: list[tuple[int, Span]], ours: set[SessionId]) -> None:
    """Conversations that are not of these get just these devices."""
    route = fleet.route

    async def scripted(
        model: Digest, session: SessionId, reserve: int, exclude: frozenset[NodeId], keep: Sequence[Hop], rebuild: int,
        spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        if not spare and session not in ours:
            fleet.script.insert(0, hops)
        return await route(model, session, reserve, exclude, keep, rebuild, spare)

    fleet.route = scripted  # type: ignore[method-assign]


@pytest.mark.parametrize("count", [1, 3])
def test_those_that_made_way_do_not_take_the_room_back(tmp_path: Path, count: int) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        talks = [await prioritised(source, model) for _ in range(count)]
        tasks = [asyncio.create_task(timed(fleet, talk, 1000, between_s=0.02)) for talk in talks]
        await asyncio.sleep(STANDBY_RETRY_S + 1)
        assert source.moves.standing_by() == count
        sends_to(fleet, [(3, A), (4, B), (5, C)], {talk.chain.session for talk in talks})
        began_s = fleet.clock.monotonic_s()
        other = await source.open(model, PROMPT, 500, 1, "bob")
        assert fleet.clock.monotonic_s() - began_s < 0.5
        for task in tasks:
            task.cancel()
        for talk in (other, *talks):
            await talk.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE, kv_budget_bytes=int((count + 0.5) * 560 * KV_BYTES_PER_TOKEN_AND_STAGE))


def test_finished_conversations_make_way_at_once_though_others_stand_by_elsewhere(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        for node in fleet.nodes[6:]:
            node.engine._kv_budget_bytes = 1000 * KV_BYTES_PER_TOKEN_AND_STAGE
        there = [(6, A), (7, B), (8, C)]
        fleet.script = [there]
        kept = await source.open(model, PROMPT, 900, 1, "carol")
        await answer(kept, 3)
        await kept.close(keep=True)
        talks = [await source.open(model, [9, *PROMPT], 500, 1, "alice", None, ServiceTier.PRIORITY) for _ in range(3)]
        tasks = [asyncio.create_task(timed(fleet, talk, 1000, between_s=0.02)) for talk in talks]
        await asyncio.sleep(1.0)
        sends_to(fleet, there, {talk.chain.session for talk in talks})
        began_s = fleet.clock.monotonic_s()
        other = await source.open(model, [8, *PROMPT], 500, 1, "bob")
        assert fleet.clock.monotonic_s() - began_s < 0.5
        for task in tasks:
            task.cancel()
        for talk in (other, *talks):
            await talk.close(keep=False)

    with_fleet(tmp_path, test, pieces=(*TWICE, A, B, C))


def test_where_none_has_room_for_a_long_answer_one_stands_by_for_a_short_one(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        for node in fleet.nodes[3:]:
            node.engine._kv_budget_bytes = 700 * KV_BYTES_PER_TOKEN_AND_STAGE
        long = await source.open(model, PROMPT, 1500, 1, "alice", None, ServiceTier.PRIORITY)
        task = asyncio.create_task(timed(fleet, long, 200, between_s=0.05))
        await asyncio.sleep(0.3)
        assert source.moves.standing_by() == 0
        short = await prioritised(source, model)
        await answer(short, 3)
        await asyncio.sleep(0.3)
        assert source.moves.standing_by() == 1
        await task
        await short.close(keep=False)
        await long.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_device_that_computes_nothing_does_not_keep_others_from_standing_by(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.nodes[3].compute_nothing()
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 400, between_s=0.1))
        await asyncio.sleep(2 * STALL_TIMEOUT_S)
        assert sessions_on(fleet)[3] == 0
        assert sessions_on(fleet)[6] == 1
        assert rows_on(fleet)[6] >= len(PROMPT)
        task.cancel()
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(*TWICE, A, B, C))


def test_none_is_sought_once_the_gateway_closes(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, 1000, between_s=0.02))
        await asyncio.sleep(STANDBY_RETRY_S + 1)
        await source.moves.close()
        await asyncio.sleep(0.5)
        assert source.moves.standing_by() == 0
        task.cancel()

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_conversation_that_ends_is_kept_for_the_next_turn_and_what_stood_by_is_freed(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await prioritised(source, model)
        tokens = await answer(conversation, 20)
        await conversation.close(keep=True)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [1, 1, 1, 0, 0, 0]
        again = await source.open(model, [*PROMPT, *tokens[:19], 7, 8], 20, 1, "alice", None, ServiceTier.PRIORITY)
        assert again.cached_tokens == len(PROMPT) + 19
        follow_up = await answer(again, 10)
        await asyncio.sleep(0.5)
        fleet.nodes[2].kill()
        follow_up.append(int((await again.decode(follow_up[-1])).ids[0]))
        assert source.moves.takeovers == 1
        await again.close(keep=False)
        calm = await source.open(model, [*PROMPT, *tokens[:19], 7, 8], 20, 1, "carol")
        assert len(await answer(calm, 11)) == len(follow_up)
        await calm.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_it_is_given_up_when_a_repair_takes_one_of_its_devices(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, COUNT)
        conversation = await prioritised(source, model)
        task = asyncio.create_task(timed(fleet, conversation, COUNT, between_s=0.02))
        await asyncio.sleep(0.6)
        fleet.script = [[(0, A), (4, B), (2, C)]]
        conversation.chain.in_trouble("somebody was unsure", None)
        await asyncio.sleep(0.3)
        assert sessions_on(fleet) == [1, 0, 1, 0, 1, 0]
        tokens, _ = await task
        assert tokens == expected
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_a_device_that_leaves_before_the_prompt_was_fed_gets_it_once(tmp_path: Path) -> None:
    """The chain that stands by has the prompt before the first one has."""

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 10)
        conversation = await prioritised(source, model)
        await asyncio.sleep(0.5)
        assert rows_on(fleet)[3] == len(PROMPT)
        fleet.nodes[1].relay.drain()
        await asyncio.sleep(0.1)
        assert await answer(conversation, 10) == expected
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_where_there_are_no_idle_devices_one_conversation_in_a_while_asks(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversations = [await prioritised(source, model)]
        await asyncio.sleep(0.1)
        asked = len(fleet.kept_spans)
        conversations += [await prioritised(source, model) for _ in range(20)]
        tasks = [asyncio.create_task(timed(fleet, each, 40, between_s=0.1)) for each in conversations]
        await asyncio.gather(*tasks)
        assert fleet.clock.monotonic_s() < STANDBY_RETRY_S
        assert len(fleet.kept_spans) - asked == 20, "for the conversations themselves"
        assert source.moves.standing_by() == 0
        for conversation in conversations:
            await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert_nothing_left(fleet, source)

    with_fleet(tmp_path, test)


def test_none_stands_by_for_those_who_did_not_ask(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        await answer(conversation, 20)
        assert sessions_on(fleet) == [1, 1, 1, 0, 0, 0]
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=TWICE)


def test_for_whom_one_stands_by() -> None:
    covered = {(standby, tier) for standby in Standby for tier in ServiceTier if standby.covers(tier)}
    assert covered == {
        (Standby.PRIORITY, ServiceTier.PRIORITY),
        (Standby.ALWAYS, ServiceTier.DEFAULT),
        (Standby.ALWAYS, ServiceTier.PRIORITY),
    }
