"""Goal: hundreds of devices that join at once are all placed, without a flood of orders, and are told of in part.

Method: the real coordinator on the in-memory bus and virtual time; devices that report and note their orders.
"""

import asyncio

import msgspec

from fallow.coordinator import placer
from fallow.coordinator.answers import STATUS_NODES_MAX
from fallow.domain.fleet import FleetStatus, Subjects
from fallow.fabric.memory_bus import MemoryHub
from fallow.policy.cells import CellRules
from fallow.simulator.virtual_time import LoopClock, run_virtual
from tests.simulation.cells import WHOLE, Reporter, ToyCell

DEVICES = 300
ANSWER_S = 0.05


class Slow(Reporter):
    """A device that takes its time to answer an order."""

    waiting = 0
    waiting_most = 0

    async def _on_order(self, subject: str, message: bytes) -> bytes:
        Slow.waiting += 1
        Slow.waiting_most = max(Slow.waiting_most, Slow.waiting)
        await asyncio.sleep(ANSWER_S)
        Slow.waiting -= 1
        return await super()._on_order(subject, message)


async def cell_of(hub: MemoryHub) -> ToyCell:
    cell = ToyCell("one", hub.connect("coordinator"), hub.connect("devices"), LoopClock(), CellRules())
    await cell.start()
    return cell


def test_orders_for_hundreds_of_devices_go_out_a_bounded_number_at_a_time_and_none_is_forgotten() -> None:
    async def program() -> None:
        Slow.waiting = Slow.waiting_most = 0
        cell = await cell_of(MemoryHub())
        for index in range(DEVICES):
            device = Slow(cell, index)
            cell.devices.append(device)
            await device.start()
        await cell.clock.sleep(8.0)
        assert all(device.orders for device in cell.devices)
        assert Slow.waiting_most == placer.ORDERS_AT_ONCE

    run_virtual(program())


def test_a_status_names_some_devices_and_counts_the_rest() -> None:
    async def program() -> None:
        cell = await cell_of(MemoryHub())
        for index in range(STATUS_NODES_MAX + 7):
            device = Reporter(cell, index, WHOLE)
            cell.devices.append(device)
            await device.start()
        await cell.clock.sleep(0.1)
        answer = await cell.bus.request(Subjects("one").status, b"", 1.0)
        status = msgspec.json.decode(answer, type=FleetStatus)
        assert (len(status.nodes), status.nodes_left_out) == (STATUS_NODES_MAX, 7)
        assert status.silent_s.keys() == {beat.node for beat in status.nodes}
        assert status.models[0].servable

    run_virtual(program())
