"""Goal: a polite departure costs a conversation no pause and changes no token; a device that cannot be reached costs
all sessions of a gateway one short wait.

Method: the real token source, chains, links and relays on virtual time; the coordinator is a table on the bus.
"""

import asyncio
from pathlib import Path

from fallow.domain.ids import Digest
from fallow.gateway.chain import DIAL_PATIENCE_S
from fallow.gateway.contract import Conversation
from fallow.gateway.lost_devices import LOST_MAX, LOST_S, LostDevices
from fallow.gateway.sessions import FleetConversation, FleetTokenSource
from tests.simulation.sessions import Fleet, node_id
from tests.simulation.test_token_source import PROMPT, A, B, C, answer, sessions_on, with_fleet

LEAVER, SPARE = 1, 3


async def timed(fleet: Fleet, conversation: Conversation, count: int) -> tuple[list[int], float]:
    """The answer and its longest gap."""
    tokens = [int((await conversation.prefill()).ids[0])]
    longest_s = 0.0
    while len(tokens) < count:
        began_s = fleet.clock.monotonic_s()
        tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        longest_s = max(longest_s, fleet.clock.monotonic_s() - began_s)
    return tokens, longest_s


async def undisturbed(source: FleetTokenSource, model: Digest, count: int) -> list[int]:
    conversation = await source.open(model, PROMPT, 500, 1, "alice")
    tokens = await answer(conversation, count)
    await conversation.close(keep=False)
    return tokens


def test_a_conversation_moves_before_its_device_leaves(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 120)
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        before = conversation.chain.session
        task = asyncio.create_task(timed(fleet, conversation, 120))
        await asyncio.sleep(0.2)
        fleet.nodes[LEAVER].relay.drain()
        while fleet.nodes[LEAVER].relay.session_count:
            await asyncio.sleep(0.01)
        fleet.nodes[LEAVER].kill()
        tokens, longest_s = await task
        assert tokens == expected
        assert longest_s < 0.1, "neither the leave nor the end of the device is noticed"
        assert conversation.chain.session != before
        assert (conversation.chain.repairs, sessions_on(fleet)) == (1, [1, 0, 1, 1])
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [0, 0, 0, 0]

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_device_that_goes_before_its_sessions_have_moved_is_repaired_around(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 120)
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        task = asyncio.create_task(timed(fleet, conversation, 120))
        await asyncio.sleep(0.2)
        fleet.nodes[LEAVER].relay.drain()
        fleet.nodes[LEAVER].kill()
        tokens, _ = await task
        assert tokens == expected
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet)[SPARE] == 0

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_move_that_finds_no_other_devices_ends_in_a_repair(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        expected = await undisturbed(source, model, 60)
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        task = asyncio.create_task(timed(fleet, conversation, 60))
        await asyncio.sleep(0.2)
        fleet.nodes[LEAVER].relay.drain()
        tokens, longest_s = await task  # the device stays after all, and is used again once it is not avoided any more
        assert tokens == expected
        assert longest_s > 1.0
        await conversation.close(keep=False)

    with_fleet(tmp_path, test)


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
