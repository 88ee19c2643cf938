"""Goal: whatever happens to coordinators, at most one leads, one leads soon, and clients and devices hardly notice.

Method: the real coordinators, leadership, agents and stores over the in-memory fabric on virtual time; processes are
killed, stopped and cut off, the bus is restarted. Every 5 ms all of them are looked at. The last case draws its script
from seeds, and a seed that ever failed stays.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from fallow.domain.fleet import Accepted, DropStage, FleetStatus, NodeCommand
from fallow.domain.ids import NodeId
from fallow.simulator.virtual_time import run_virtual
from tests.simulation.control import SUBJECTS, node_id
from tests.simulation.coordinators import RULES, LedCell

Script = Callable[[LedCell], Awaitable[None]]
AT_ONCE_S = 0.05


def run(folder: Path, script: Script, coordinators: int = 2, devices: int = 3) -> None:
    async def program() -> None:
        cell = LedCell(folder)
        await cell.start_led(coordinators, devices)
        await cell.lead(AT_ONCE_S)
        await cell.until(lambda: doubled(cell), 6.0)
        await script(cell)
        cell.looked()

    run_virtual(program())


def doubled(cell: LedCell) -> bool:
    return min(cell.holders().values()) >= 2


def test_one_leads_the_other_knows_the_fleet_and_says_nothing(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        (standby,) = [process for process in cell.processes if process is not leader]
        await cell.clock.sleep(20.0)
        assert cell.leader() is leader and len(cell.epochs) == 1
        assert standby.coordinator.fleet.present().keys() == leader.coordinator.fleet.present().keys()
        assert standby.coordinator.fleet.entries() == leader.coordinator.fleet.entries()
        status = msgspec.json.decode(await cell.questions.ask(SUBJECTS.status, b""), type=FleetStatus)
        assert [report.id for report in status.coordinators] == [leader.id, standby.id]
        assert status.coordinators[0].epoch == cell.epochs[0] and status.coordinators[1].epoch is None
        assert status.coordinators[0].since_s > 20.0

    run(tmp_path, script)


def test_a_killed_leader_is_followed_at_once_and_nothing_is_moved(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader, orders = await cell.lead(AT_ONCE_S), len(cell.orders)
        asking = asyncio.ensure_future(cell.keep_asking(0.003, 10.0))
        await cell.clock.sleep(1.5)
        await leader.kill()
        assert await cell.until(lambda: cell.leader() is not None, 1.0) < AT_ONCE_S
        assert max(await asking) < 0.3
        assert doubled(cell) and len(cell.orders) == orders and not cell.gone

    run(tmp_path, script)


def test_a_leader_that_stops_politely_hands_over(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        asking = asyncio.ensure_future(cell.keep_asking(0.003, 5.0))
        await cell.clock.sleep(0.7)
        await leader.leave()
        assert await cell.until(lambda: cell.leader() is not None, 1.0) < AT_ONCE_S
        assert max(await asking) < 0.3

    run(tmp_path, script)


def test_a_stopped_leader_is_followed_and_its_late_orders_are_refused(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader, before = await cell.lead(AT_ONCE_S), len(cell.orders)
        asking = asyncio.ensure_future(cell.keep_asking(0.05, 30.0))
        await cell.clock.sleep(1.2)
        leader.stop()
        # It had decided on an order when it was stopped, and sends it when it goes on.
        epoch = leader.authority.leading
        assert epoch is not None
        drop = DropStage(model=cell.store.entries[0].model, epoch=epoch)
        key = (node_id(0), drop.model)
        late = asyncio.ensure_future(leader.coordinator._placer._send(key, drop))
        took_s = await cell.until(lambda: cell.leader() not in (None, leader), RULES.ttl_s + 0.1)
        assert took_s > RULES.ttl_s - RULES.renew_s - RULES.margin_s
        await cell.clock.sleep(10.0)
        leader.trouble.end()
        await late
        await cell.clock.sleep(5.0)
        assert not leader.leads and leader.authority.leading is None
        assert max(await asking) < RULES.ttl_s + 0.3
        assert doubled(cell) and len(cell.orders) == before

    run(tmp_path, script)


def test_a_short_stop_changes_nothing(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        for _ in range(10):
            leader.stop()
            await cell.clock.sleep(1.2)
            leader.trouble.end()
            await cell.clock.sleep(0.5)
        assert cell.leader() is leader and len(cell.epochs) == 1

    run(tmp_path, script)


@pytest.mark.parametrize("away_s", [0.5, 2.0, 2.9, 3.1, 5.0, 20.0])
def test_a_leader_that_is_cut_off_from_the_bus(tmp_path: Path, away_s: float) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        leader.cut_off()
        await cell.clock.sleep(away_s)
        leader.trouble.end()
        followed = await cell.lead(RULES.ttl_s)
        if away_s < RULES.acts_s - RULES.renew_s:
            assert followed is leader and len(cell.epochs) == 1
        if away_s > RULES.ttl_s:
            assert followed is not leader
        await cell.clock.sleep(10.0)
        assert doubled(cell)
        assert (await cell.ask_as_gateway()).hops

    run(tmp_path, script)


@pytest.mark.parametrize("away_s", [0.3, 1.5, 8.0])
def test_a_bus_that_is_restarted(tmp_path: Path, away_s: float) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        cell.fabric.hub.stop()
        await cell.clock.sleep(0.01)
        assert cell.leader() is None, "nobody acts without a bus"
        await cell.clock.sleep(away_s)
        cell.fabric.hub.start()
        again = await cell.lead(RULES.ttl_s + RULES.retry_s)
        if away_s < RULES.acts_s - RULES.renew_s:
            assert again is leader and len(cell.epochs) == 1
        await cell.clock.sleep(5.0)
        assert doubled(cell)

    run(tmp_path, script)


def test_both_are_restarted_one_after_the_other_and_together(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        orders = len(cell.orders)
        for _ in range(2):
            leader = await cell.lead(AT_ONCE_S)
            await leader.kill()
            await cell.start_coordinator()
            await cell.clock.sleep(2.0)
        for process in list(cell.processes):
            if process.alive:
                await process.kill()
        await cell.clock.sleep(0.2)
        for _ in range(2):
            await cell.start_coordinator()
        # Nobody has seen who held the lease last, so its whole time passes.
        await cell.lead(RULES.ttl_s + AT_ONCE_S)
        await cell.clock.sleep(15.0)
        assert doubled(cell) and len(cell.orders) == orders

    run(tmp_path, script)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.02, 1.0])
def test_a_device_that_dies_with_the_leader_or_right_after_is_noticed_and_replaced(
    tmp_path: Path, after_s: float
) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        await leader.kill()
        await cell.clock.sleep(after_s)
        cell.devices[1].kill()
        assert await cell.until(lambda: cell.gone, 1.0) < 2 * AT_ONCE_S
        assert {gone.node for gone in cell.gone} == {node_id(1)}
        await cell.lead(AT_ONCE_S)
        reply = await cell.ask_as_gateway()
        assert reply.hops and node_id(1) not in {hop.address.node for hop in reply.hops}
        await cell.join()
        await cell.until(lambda: doubled(cell), 12.0)

    run(tmp_path, script)


def test_a_bus_that_lost_its_store_or_lies_about_epochs_does_not_lock_the_cell(tmp_path: Path) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        for device in cell.devices:
            device.agent._epoch = 1_000_000  # of a bus that is no more
        cell.devices[2].kill()
        await cell.until(lambda: cell.gone, 1.0)
        (await cell.join()).agent._epoch = 1_000_000
        await cell.until(lambda: doubled(cell), 12.0)
        assert cell.leader() is leader and leader.authority.epoch() == 1_000_001

    run(tmp_path, script)


@pytest.mark.parametrize("ahead", [1, 1 << 62])
def test_a_device_that_lies_about_epochs_does_not_unseat_the_leader(tmp_path: Path, ahead: int) -> None:
    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        cell.devices[2].kill()
        await cell.until(lambda: cell.gone, 1.0)
        liar = await cell.join()

        async def lie(_: str, message: bytes) -> bytes:
            epoch = min(msgspec.json.decode(message, type=NodeCommand).epoch + ahead, 1 << 62)
            return msgspec.json.encode(Accepted(ok=False, epoch=epoch))

        await liar.agent._subscriptions[0].cancel()
        await liar.bus.subscribe(SUBJECTS.command(liar.id), lie)
        honest = await cell.join()
        await cell.until(lambda: doubled(cell) and honest.ready(), 20.0)
        await cell.clock.sleep(60.0)
        assert cell.leader() is leader and len(cell.epochs) == 1
        assert leader.authority.epoch() == cell.epochs[0]

    run(tmp_path, script)


SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_troubles(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    async def script(cell: LedCell) -> None:
        for _ in range(25):
            process = draw.choice([process for process in cell.processes if process.alive])
            match draw.choice(["kill", "stop", "cut", "end", "leave", "bus", "drop"]):
                case "kill" | "leave" as how:
                    await (process.kill() if how == "kill" else process.leave())
                    await cell.start_coordinator()
                case "stop":
                    process.stop()
                case "cut":
                    process.cut_off()
                case "end":
                    process.trouble.end()
                case "bus":
                    cell.fabric.hub.stop()
                    asyncio.get_running_loop().call_later(draw.uniform(0.01, 1.0), cell.fabric.hub.start)
            await cell.clock.sleep(draw.expovariate(1.0))
            cell.looked()
        for process in cell.processes:
            process.trouble.end()
        await cell.clock.sleep(1.0)
        leader = await cell.lead(RULES.ttl_s + RULES.renew_s + 1.0)
        await cell.clock.sleep(30.0)
        assert cell.leader() is leader
        assert doubled(cell)
        assert (await cell.ask_as_gateway()).hops

    run(tmp_path, script, coordinators=3)


def test_the_look_can_fail(tmp_path: Path) -> None:
    """Planted bug: a leader that believes in its term for as long as nobody tells it otherwise."""

    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        leader.authority.epoch = lambda: leader.authority.leading  # type: ignore[method-assign]
        leader.stop()
        await cell.clock.sleep(RULES.ttl_s + 1.0)

    with pytest.raises(AssertionError, match="lead at"):
        run(tmp_path, script)


def test_a_device_without_the_fence_would_obey_a_replaced_coordinator(tmp_path: Path) -> None:
    """Planted bug: devices that do not compare epochs. The check in `LedCell.join` must see it."""

    async def script(cell: LedCell) -> None:
        leader = await cell.lead(AT_ONCE_S)
        epoch = leader.authority.leading
        assert epoch is not None
        await leader.kill()
        await cell.lead(AT_ONCE_S)
        cell.devices[0].agent._epoch = 0
        order = msgspec.json.encode(DropStage(model=cell.store.entries[0].model, epoch=epoch))
        before = len(cell.orders)
        await cell.say(SUBJECTS.command(NodeId(cell.devices[0].id)), order)
        await cell.clock.sleep(0.1)
        assert len(cell.orders) == before and doubled(cell)
        cell.devices[0].agent.hosting.order(DropStage(model=cell.store.entries[0].model, epoch=epoch))

    with pytest.raises(AssertionError, match="replaced coordinator"):
        run(tmp_path, script)
