"""Goal: the control side gets models onto devices and keeps them there, whatever comes and goes.

Method: real coordinator, agents, fetching and stores over the in-memory fabric on virtual time, toy engines. Each case
is a script; the last one draws its script from seeds, and a seed that ever failed stays. The model's bytes: seed 1.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from fallow.domain.fleet import Heartbeat, HostedStage
from fallow.domain.frames import PeerAddress
from fallow.domain.model import Span
from fallow.policy.placement_board import PlacementRules
from fallow.simulator.virtual_time import run_virtual
from tests.simulation.control import LAYERS, SUBJECTS, Cell, Device, Gateway, node_id
from tests.simulation.sessions import generate

Script = Callable[[Cell], Awaitable[None]]


def run(folder: Path, device_count: int, script: Script, **fields: object) -> None:
    async def program() -> None:
        cell = Cell(folder, **fields)  # type: ignore[arg-type]
        await cell.start(device_count)
        await script(cell)

    run_virtual(program())


def doubled(cell: Cell) -> bool:
    return min(cell.holders().values()) >= 2


def test_three_devices_that_each_hold_a_part_hold_everything_twice(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        took_s = await cell.until(lambda: doubled(cell), 4.0)
        assert took_s < 4.0
        assert all(sum(p.layer_count for p in device.ready()) == 4 for device in cell.devices)
        assert cell.status().models[0].servable
        reply = await cell.route()
        assert [layer for hop in reply.hops for layer in range(hop.span.first, hop.span.last)] == list(range(LAYERS))
        assert len(reply.hops) == 2

    run(tmp_path, 3, script)


def test_models_stay_in_the_regions_that_the_operator_allows(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        strangers = [await cell.join("us"), await cell.join()]
        await cell.clock.sleep(5.0)
        assert cell.orders == []
        (reason,) = cell.status().unplaceable.values()
        assert "eu" in reason
        at_home = [await cell.join("eu") for _ in range(3)]
        await cell.until(lambda: doubled(cell), 10.0)
        assert all(device.ready() for device in at_home)
        assert not any(device.ready() for device in strangers)

    run(tmp_path, 0, script, rules=PlacementRules(max_share=0.7, regions=frozenset({"eu"})))


def test_one_device_that_can_hold_a_part_gets_nothing_and_the_reason_is_told(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.clock.sleep(5.0)
        assert cell.orders == []
        (reason,) = cell.status().unplaceable.values()
        assert "70%" in reason
        reply = await cell.route()
        assert reply.error is not None
        assert "0-5" in reply.error

    run(tmp_path, 1, script)


def test_a_killed_device_is_announced_at_once_and_its_pieces_are_held_twice_again(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        cell.devices[1].kill()
        assert await cell.until(lambda: cell.gone, 1.0) < 0.1
        assert cell.gone[0].node == node_id(1)
        assert min(cell.holders().values()) >= 1
        reply = await cell.route(1)
        assert reply.hops
        assert node_id(1) not in {hop.address.node for hop in reply.hops}
        await cell.join()
        await cell.until(lambda: doubled(cell), 12.0)
        assert len(cell.gone) == 1

    run(tmp_path, 3, script)


def test_a_device_that_falls_silent_is_gone_after_three_intervals_and_comes_back(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        device = cell.devices[0]
        publish, device.bus.publish = device.bus.publish, _swallow  # type: ignore[method-assign]
        took_s = await cell.until(lambda: cell.gone, 5.0)
        assert 2.0 <= took_s <= 3.5
        device.bus.publish = publish  # type: ignore[method-assign]
        orders = len(cell.orders)
        await cell.until(lambda: doubled(cell), 2.0)
        await cell.clock.sleep(20.0)
        assert len(cell.orders) == orders, "what came back in time needs no moves"

    run(tmp_path, 3, script)


@pytest.mark.parametrize("message", [b"", b"\xff", b"[" * 100_000, b'{"epoch": -1, "name": ""}'])
def test_a_leaders_word_that_cannot_be_read_is_dropped_by_name(
    tmp_path: Path, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(cell: Cell) -> None:
        await cell.say(SUBJECTS.leader, message)
        await cell.clock.sleep(0.1)
        assert cell.devices[0].agent._epoch == 0

    run(tmp_path, 1, script)
    assert "a leader's word was not believed" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def _swallow(subject: str, message: bytes) -> None:
    """A bus that loses everything."""


def test_a_restarted_coordinator_knows_everything_within_an_interval_and_orders_nothing(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        orders = len(cell.orders)
        hosted = [device.ready() for device in cell.devices]
        await cell.restart_coordinator()
        await cell.clock.sleep(0.1)
        assert doubled(cell)
        assert (await cell.route()).hops
        await cell.clock.sleep(60.0)
        assert len(cell.orders) == orders
        assert [device.ready() for device in cell.devices] == hosted
        assert cell.gone == []

    run(tmp_path, 3, script)


def test_a_polite_leave_is_no_surprise(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        await cell.devices[2].agent.drain()
        await cell.until(lambda: cell.gone, 0.5)
        assert "goodbye" in cell.gone[0].reason
        assert node_id(2) not in {hop.address.node for hop in (await cell.route()).hops}
        await cell.clock.sleep(5.0)
        assert len(cell.coordinator.fleet.present()) == 2

    run(tmp_path, 3, script)


@pytest.mark.parametrize("gateway_stays", [False, True])
def test_a_device_that_leaves_waits_for_a_gateway_that_is_there_and_for_no_other(
    tmp_path: Path, *, gateway_stays: bool
) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        gateway = Gateway(cell)
        await gateway.peers.start()
        chain = gateway.chain(1)
        await generate(chain, range(4), 3)
        device = next(device for device in cell.devices if device.id in chain.nodes())
        if not gateway_stays:
            cell.fabric.crash(gateway.id)
            cell.fabric.hub.stop()
            await cell.clock.sleep(0.1)
        assert device.agent.relay.session_count == 1
        began_s = cell.clock.monotonic_s()
        await device.agent.drain()
        took_s = cell.clock.monotonic_s() - began_s
        assert (took_s >= device.agent._config.drain_timeout_s) if gateway_stays else (took_s < 0.5)

    run(tmp_path, 3, script)


def test_a_crashed_engine_is_started_again_and_hosts_what_it_did(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        served = cell.store.chunks_served
        before = cell.devices[0].ready()
        cell.devices[0].engine.crash()
        await cell.until(lambda: not cell.devices[0].ready(), 0.1)
        await cell.until(lambda: cell.devices[0].ready() == before, 2.0)
        assert cell.store.chunks_served == served
        assert cell.gone == []

    run(tmp_path, 3, script)


def test_files_come_from_a_peer_when_the_store_has_gone(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        cell.fabric.crash(cell.store.node)
        cell.devices[0].kill()
        await cell.join()
        await cell.until(lambda: doubled(cell), 60.0)

    run(tmp_path, 3, script)


def test_hostile_messages_are_dropped_and_counted(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        good = cell.devices[0].agent.heartbeat()
        other = SUBJECTS.heartbeat(node_id(7))
        mine = SUBJECTS.heartbeat(good.node)
        lies: list[tuple[str, bytes]] = [
            (mine, b"\xff garbage"),
            (mine, b"[" * 100_000),
            (other, _encoded(good)),
            (mine, _encoded(good, memory_bytes=1 << 60)),
            (mine, _encoded(good, kv_budget_bytes=-1)),
            (mine, _encoded(good, tokens_per_s=1e300)),
            (mine, _encoded(good, link_rtt_s={node_id(1): -1.0})),
            (mine, _encoded(good, name="x" * 1000)),
            (mine, _encoded(good, address=PeerAddress(node_id(9), ()))),
            (mine, _encoded(good, hosted=(_backwards(good.hosted[0]),))),
        ]
        for subject, message in lies:
            await cell.say(subject, message)
        await cell.say(SUBJECTS.store("observer"), b"{}")
        await cell.say(SUBJECTS.leaving(good.node), b"null")
        await cell.clock.sleep(0.2)
        dropped = cell.status().dropped_messages
        assert dropped["heartbeat"] == len(lies)
        assert dropped["store"] == 1
        assert dropped["leaving"] == 1
        assert (await cell.route()).hops
        assert doubled(cell)

    run(tmp_path, 3, script)


def _encoded(heartbeat: Heartbeat, **changes: object) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(heartbeat, sequence=10**9, **changes))


def _backwards(hosted: HostedStage) -> HostedStage:
    stage = msgspec.structs.replace(hosted.stage, pieces=(Span(2, 0),))
    return msgspec.structs.replace(hosted, stage=stage)


def test_sessions_spread_before_heartbeats_tell_of_them(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        used: dict[str, int] = {}
        for session in range(12):
            for hop in (await cell.route(session)).hops:
                used[hop.address.node] = used.get(hop.address.node, 0) + 1
        assert len(used) == 3
        assert max(used.values()) - min(used.values()) <= 3

    run(tmp_path, 3, script)


@pytest.mark.parametrize("device_count", [2, 3, 4, 5])
def test_any_fleet_settles_and_then_nothing_moves(tmp_path: Path, device_count: int) -> None:
    async def script(cell: Cell) -> None:
        await cell.clock.sleep(10.0)
        assert min(cell.holders().values()) >= 1
        orders = len(cell.orders)
        await cell.clock.sleep(120.0)
        assert len(cell.orders) == orders

    run(tmp_path, device_count, script)


def test_a_joining_device_moves_nothing_that_is_placed(tmp_path: Path) -> None:
    async def script(cell: Cell) -> None:
        await cell.clock.sleep(10.0)
        before = [device.ready() for device in cell.devices]
        await cell.join()
        await asyncio.sleep(10.0)
        assert [device.ready() for device in cell.devices[:-1]] == before
        assert cell.devices[-1].ready()

    run(tmp_path, 3, script)


@pytest.mark.parametrize("device", [0, 1, 2])
def test_an_answer_through_the_whole_cell_survives_the_death_of_a_device(tmp_path: Path, device: int) -> None:
    prompt, count = list(range(100)), 30

    async def script(cell: Cell) -> None:
        await cell.until(lambda: doubled(cell), 4.0)
        gateway = await cell.gateway()
        undisturbed = await generate(gateway.chain(1), prompt, count)
        chain = gateway.chain(2)
        answering = asyncio.create_task(generate(chain, prompt, count))
        while len(chain.tokens) < len(prompt) + count // 2:
            await asyncio.sleep(0.001)
        await cell.restart_coordinator()
        cell.devices[device].kill()
        assert await answering == undisturbed

    run(tmp_path, 3, script)


@pytest.mark.parametrize("seed", range(6))
def test_after_any_turmoil_the_fleet_settles_with_everything_held_twice(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    async def script(cell: Cell) -> None:
        alive: list[Device] = list(cell.devices)
        for _ in range(12):
            await cell.clock.sleep(draw.choice([0.0, 0.05, 0.6, 3.0, 8.0]))
            match draw.choice(["join", "kill", "leave", "coordinator", "engine"]):
                case "kill" if len(alive) > 1:
                    alive.pop(draw.randrange(len(alive))).kill()
                case "leave" if len(alive) > 1:
                    await alive.pop(draw.randrange(len(alive))).agent.drain()
                case "coordinator":
                    await cell.restart_coordinator()
                case "engine":
                    draw.choice(alive).engine.crash()
                case _:
                    alive.append(await cell.join())
        while len(alive) < 3:
            alive.append(await cell.join())
        await cell.clock.sleep(90.0)
        assert set(cell.coordinator.fleet.present()) == {device.id for device in alive}
        assert doubled(cell)
        orders = len(cell.orders)
        await cell.clock.sleep(60.0)
        assert len(cell.orders) == orders

    run(tmp_path, 3, script)
