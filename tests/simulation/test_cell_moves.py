"""Goal: devices move to where they are better off, and cells that are too small dissolve, without harm to any answer;
and nothing wanders.

Method: cells with real coordinators, gateways and agents on one in-memory bus and virtual time (`roaming.py`); every
device lives as `fallow join` has it live. Answers are compared with undisturbed ones, token by token.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.errors import BusUnavailable, RequestRefused
from fallow.simulator.virtual_time import run_virtual
from tests.simulation.roaming import PROMPT, RULES, RoamingCell, World, answer


def run(folder: Path, script: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(folder)
        try:
            await script(world)
        finally:
            await world.close()

    run_virtual(main())


def assert_moved_before_anybody_was_gone(cell: RoamingCell) -> None:
    """No answer of a cell's gateway had to be repaired because a device went."""
    assert any("moved to" in event for event in cell.source.events)
    assert not any("is gone" in event for event in cell.source.events)


def test_a_device_that_answers_a_conversation_moves_to_a_nearer_cell_and_the_answer_is_unharmed(
    tmp_path: Path,
) -> None:
    async def script(world: World) -> None:
        far, near = await world.cell("far", 4), await world.cell("near", 3)
        await world.until(lambda: far.servable() and near.servable(), 30.0)
        await world.clock.sleep(10.0)  # copies are placed
        undisturbed = await far.source.open(world.entry.model, PROMPT, 2000, 1, "alice")
        expected, _ = await answer(undisturbed, 120, 0.0)
        await undisturbed.close(keep=False)
        talk = await far.source.open(world.entry.model, PROMPT, 2000, 1, "alice")
        answering = asyncio.ensure_future(answer(talk, 120, 0.5))
        await world.clock.sleep(1.0)
        mover = next(device for device in world.devices if device.node in talk.chain.nodes())
        files = sorted((tmp_path / mover.node[:8] / "models").rglob("*"))
        mover.live_far_from("far", 0.030)
        await world.until(lambda: mover.node in near.devices(), 55.0)
        assert mover.node not in far.devices()
        assert not answering.done()
        tokens, longest_s = await answering
        assert tokens == expected
        assert longest_s < 0.1
        assert_moved_before_anybody_was_gone(far)
        assert mover.node not in talk.chain.nodes()
        await talk.close(keep=False)
        # It came with its key and its files, works there, and its stay goes on.
        await world.until(lambda: any(each.status == "ready" for each in near.beat(mover.node).hosted), 30.0)
        assert set(files) <= set((tmp_path / mover.node[:8] / "models").rglob("*"))
        stays = msgspec.json.decode((tmp_path / mover.node[:8] / "stays.json").read_bytes())
        assert stays["ends"] == {} and stays["stay"]["began_unix_s"] < world.clock.unix_s() - 15
        assert mover.told == ["lends in far", mover.told[1], "lends in near"] and "near" in mover.told[1]
        assert [device.cells for device in world.devices if device is not mover] == [["far"]] * 3 + [["near"]] * 3

    run(tmp_path, script)


def test_a_small_cell_dissolves_its_answers_go_on_and_who_may_not_choose_stays_and_is_served(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        small, big = await world.cell("small", 1), await world.cell("big", 4)
        stays = world.join("small", chooses=False)
        await world.until(lambda: small.servable() and big.servable(), 30.0)
        undisturbed = await big.source.open(world.entry.model, PROMPT, 2000, 1, "alice")
        expected, _ = await answer(undisturbed, 120, 0.0)
        await undisturbed.close(keep=False)
        talk = await small.source.open(world.entry.model, PROMPT, 2000, 1, "alice")
        answering = asyncio.ensure_future(answer(talk, 120, 0.5))
        size = small.coordinator.status().size
        assert size is not None and size.dissolves_into is None, "not at once"
        await world.until(lambda: len(big.devices()) == 5, 50.0)
        assert small.devices() == {stays.node}
        size = small.coordinator.status().size
        assert size is not None and size.dissolves_into == "big"
        tokens, longest_s = await answering
        assert tokens == expected
        assert longest_s < 0.1
        assert_moved_before_anybody_was_gone(small)
        await talk.close(keep=False)
        # Its gateway is served by the cell into which it dissolved.
        again = await small.source.open(world.entry.model, PROMPT, 100, 1, "alice")
        assert (await answer(again, 20, 0.0))[0] == expected[:20]
        assert set(again.chain.nodes()) <= big.devices()
        await again.close(keep=False)
        # A newcomer that may choose is not sent there, and who went does not come back.
        newcomer = world.join("small")
        await world.until(lambda: newcomer.node in big.devices(), 40.0)
        await world.clock.sleep(40.0)
        assert small.devices() == {stays.node}
        assert all(len(device.cells) <= 2 for device in world.devices)

    run(tmp_path, script)


def test_of_two_small_cells_one_dissolves_and_nobody_is_sent_the_other_way(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        await world.cell("one", 2)
        await world.cell("two", 2)
        await world.until(lambda: len(world.cells["two"].devices()) == 4, 60.0)
        await world.clock.sleep(40.0)
        assert world.cells["one"].devices() == set()
        assert [device.cells for device in world.devices] == [["one", "two"]] * 2 + [["two"]] * 2

    run(tmp_path, script)


def test_jitter_and_bad_minutes_move_nobody(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        draw = random.Random(7)
        await world.cell("one", 3)
        await world.cell("two", 3)
        world.hub.jitter_s = lambda: draw.uniform(0.0, 0.002)
        for _ in range(4):
            for device in world.devices:
                device.live_far_from(device.cells[0], draw.choice((0.002, 0.003, 0.004)))
            await world.clock.sleep(10.0)
        # A minute in which its coordinator is far away for one device, which is a look or two.
        unlucky = world.devices[0]
        unlucky.live_far_from("one", 0.2)
        await world.clock.sleep(RULES.look_interval_s)
        unlucky.live_far_from("one", 0.002)
        await world.clock.sleep(20.0)
        assert [device.cells for device in world.devices] == [["one"]] * 3 + [["two"]] * 3

    run(tmp_path, script)


def test_a_device_that_the_registrar_does_not_let_go_stays_at_work_and_does_not_ask_again_at_once(
    tmp_path: Path,
) -> None:
    async def script(world: World) -> None:
        far, near = await world.cell("far", 3), await world.cell("near", 3)
        mover = world.devices[0]
        mover.refusals.append(RequestRefused("Once in 60 minutes."))
        mover.live_far_from("far", 0.030)
        await world.until(lambda: not mover.refusals, 60.0)
        refused_s = world.clock.monotonic_s()
        boot = far.beat(mover.node).boot
        await world.until(lambda: mover.node in near.devices(), 60.0)
        assert world.clock.monotonic_s() - refused_s >= RULES.stay_min_s
        assert boot and mover.cells == ["far", "near"]
        assert "stays in far for now. Once in 60 minutes." in mover.told[1]

    run(tmp_path, script)


def test_a_device_between_two_cells_waits_for_the_bus_and_stops_when_it_is_told_to(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        far, near = await world.cell("far", 3), await world.cell("near", 3)
        mover, stopped = world.devices[:2]
        mover.bus_away = [BusUnavailable("The bus is away.")] * 5
        stopped.bus_away = [BusUnavailable("The bus is away.")] * 1000
        for device in (mover, stopped):
            device.live_far_from("far", 0.030)
        await world.until(lambda: mover.node in near.devices() and len(stopped.bus_away) < 1000, 120.0)
        assert stopped.node not in far.devices() | near.devices()
        stopped.stop.ask()
        await asyncio.wait_for(stopped.life, 1.0)
        assert stopped.cells == ["far"]
        assert sum("tries again. The bus is away." in words for words in mover.told) == 5

    run(tmp_path, script)


def test_a_full_cell_takes_no_device_that_runs_elsewhere(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.rules = msgspec.structs.replace(RULES, devices_max=3)
        await world.cell("far", 3)
        await world.cell("near", 3)
        for device in world.devices[:3]:
            device.live_far_from("far", 0.030)
        await world.clock.sleep(50.0)
        assert [device.cells for device in world.devices] == [["far"]] * 3 + [["near"]] * 3

    run(tmp_path, script)


def test_a_device_that_may_not_work_stays_where_it_is(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        far, near = await world.cell("far", 3), await world.cell("near", 3)
        mover = world.devices[0]
        mover.live_far_from("far", 0.030)
        world.lease.turn(Standing.HALTED)
        await world.clock.sleep(50.0)
        assert mover.cells == ["far"]
        world.lease.turn(Standing.WORKING)
        await world.until(lambda: mover.node in near.devices() - far.devices(), 50.0)

    run(tmp_path, script)
