"""A cell with trust on: answers are given, grants are renewed and repaired, and what the council says happens."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fallow.coordinator.roll import BELOW_TIER
from fallow.domain.charter import Standing
from fallow.domain.errors import NotWorking
from fallow.domain.fleet import Tier
from fallow.domain.grants import GRANT_LIFE_S
from fallow.gateway.contract import Conversation
from fallow.gateway.problems import problem_of
from tests.simulation.trusted import TrustedCell, run
from tests.unit.trust.grant_world import revoke

PROMPT = list(range(40))


async def conversation(cell: TrustedCell, tokens: int = 2000) -> Conversation:
    return await cell.source.open(cell.entry.model, PROMPT, tokens, 1, "alice")


async def answer(talk: Conversation, count: int, pause_s: float = 0.0) -> list[int]:
    """Greedy tokens."""
    tokens: list[int] = []
    candidates = await talk.prefill()
    for _ in range(count):
        tokens.append(int(candidates.ids[0]))
        await asyncio.sleep(pause_s)
        candidates = await talk.decode(tokens[-1])
    return tokens


def test_an_answer_with_grants_is_the_answer(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        talk = await conversation(cell)
        assert len(await answer(talk, 20)) == 20
        await talk.close(keep=False)
        assert cell.source.repairs == 0

    run(tmp_path, 3, script)


def test_a_long_answer_outlives_its_grants_without_a_repair(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        talk = await conversation(cell)
        await answer(talk, 30, pause_s=GRANT_LIFE_S / 10)
        await talk.close(keep=False)
        assert cell.source.repairs == 0, list(cell.source.events)

    run(tmp_path, 3, script)


def test_a_killed_device_is_replaced_with_new_grants(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        undisturbed = await conversation(cell)
        expected = await answer(undisturbed, 30)
        await undisturbed.close(keep=False)
        await asyncio.sleep(20)  # copies are placed
        talk = await conversation(cell)
        answering = asyncio.ensure_future(answer(talk, 30, pause_s=0.1))
        await asyncio.sleep(1)
        lost = cell.source._live[next(iter(cell.source._live))].nodes()[-1]
        device = next(device for device in cell.devices if device.who.node == lost)
        device.engine.crash()
        cell.fabric.crash(lost)
        cell.hub.drop(lost, "killed")
        assert await answering == expected
        await talk.close(keep=False)
        assert cell.source.repairs >= 1

    run(tmp_path, 4, script)


def test_a_halt_stops_answers_and_their_end_says_why(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        talk = await conversation(cell)
        answering = asyncio.ensure_future(answer(talk, 1000, pause_s=0.1))
        await asyncio.sleep(5)
        cell.lease.turn(Standing.HALTED)
        halted_s = asyncio.get_running_loop().time()
        with pytest.raises(NotWorking) as stopped:
            await answering
        assert asyncio.get_running_loop().time() - halted_s < 1.0
        problem = problem_of(stopped.value, "id")
        assert problem.status == 503 and problem.body.code == "halted" and "test says" in problem.body.message
        await talk.close(keep=False)
        with pytest.raises(NotWorking, match="halted"):
            await conversation(cell)
        rows = [device.engine.rows_computed for device in cell.devices]
        await asyncio.sleep(60)
        assert rows == [device.engine.rows_computed for device in cell.devices]
        assert {beat.standing for beat in cell.coordinator.status().nodes} == {"halted"}
        assert cell.coordinator.status().standing == "halted"
        cell.lease.turn(Standing.WORKING)
        await cell.servable()
        talk = await conversation(cell)
        assert len(await answer(talk, 5)) == 5
        await talk.close(keep=False)

    run(tmp_path, 3, script)


def test_a_device_of_too_low_a_tier_is_shown_and_gets_nothing(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        low = await cell.join(9, Tier.ANONYMOUS)
        await asyncio.sleep(15)
        (beat,) = cell.coordinator.status().nodes
        assert beat.standing == BELOW_TIER and beat.passport == "" and low.agent.hosting.hosted() == ()
        assert "keyed or better" in cell.coordinator.status().unplaceable[cell.entry.model]
        for index in range(3):
            await cell.join(index)
        await cell.servable()
        assert low.agent.hosting.hosted() == ()

    run(tmp_path, 0, script)


def test_a_revoked_device_is_left_by_everybody(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        await asyncio.sleep(20)
        talk = await conversation(cell)
        answering = asyncio.ensure_future(answer(talk, 100, pause_s=0.1))
        await asyncio.sleep(2)
        gone = cell.source._live[next(iter(cell.source._live))].nodes()[0]
        readers = [device.passports for device in cell.devices]
        for reader in (*readers, cell.gate.passports, cell.coordinator._roll._passports):
            revoke(reader, gone, at_s=cell.gate.clock.unix_s())  # type: ignore[arg-type]
        await asyncio.sleep(1)
        assert gone not in cell.peers.connected()
        await answering
        assert gone not in talk.chain.nodes()  # type: ignore[attr-defined]
        await talk.close(keep=False)

    run(tmp_path, 4, script)


def test_a_device_whose_clock_is_wrong_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """It finds every grant expired. Its refusals are answered by another device, not by asking it for ever."""

    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        await asyncio.sleep(20)
        cell.devices[0].clock.now_s += 2 * GRANT_LIFE_S
        for _ in range(3):
            talk = await conversation(cell)
            assert len(await answer(talk, 5)) == 5
            assert cell.devices[0].who.node not in talk.chain.nodes()  # type: ignore[attr-defined]
            await talk.close(keep=False)

    run(tmp_path, 4, script)


def test_a_model_that_the_council_takes_back_is_served_no_more(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        cell.lease.allow()
        await asyncio.sleep(30)
        status = cell.coordinator.status()
        assert "council" in status.unplaceable[cell.entry.model] and not status.models[0].servable
        assert all(device.agent.hosting.hosted() == () for device in cell.devices)
        cell.lease.allow(cell.entry.model)
        await cell.servable()

    run(tmp_path, 3, script)


def test_the_status_names_what_the_council_says(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        cell.lease.turn(Standing.NO_LEASE)
        await asyncio.sleep(2)
        status = cell.coordinator.status()
        assert status.standing == "no_lease" and msgspec.json.encode(status)

    run(tmp_path, 1, script)
