"""A damaged device in a cell with trust on: its rows are refused, gateways tell, and it gets no more sessions.

Method: real coordinator, agents, sessions and grants on virtual time; one device's engine sets a bit in what it sends
on. That it comes back: `tests/unit/coordinator/test_suspects.py`.
"""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fallow.coordinator.suspects import QUARANTINED
from fallow.domain.charter import FleetPolicy, Quarantine
from fallow.domain.fleet import Accusation, RouteRequest, StageStatus
from fallow.domain.ids import NodeId, SessionId
from fallow.engine.contract import Step, Stepped
from fallow.gateway.metrics import GatewayMetrics
from tests.simulation.test_damaged_rows import ToyChecks, damage
from tests.simulation.test_trusted_cell import answer, conversation
from tests.simulation.trusted import SUBJECTS, TrustedCell, TrustedDevice, run
from tests.unit.trust.grant_world import GATEWAY, STRANGER

DEVICES = 5
HALF = Quarantine(devices_per_hour_max=10, fleet_share_max=0.5)


def allowing(cell: TrustedCell, budget: Quarantine) -> None:
    charter = cell.lease.charter
    assert charter is not None
    cell.lease.charter = msgspec.structs.replace(charter, policy=FleetPolicy(epoch=1, quarantine=budget))


def out(cell: TrustedCell) -> list[NodeId]:
    return [beat.node for beat in cell.coordinator.status().nodes if beat.standing == QUARANTINED]


async def with_a_damaged_first_device(cell: TrustedCell) -> TrustedDevice:
    """The first of a chain is damaged while it answers; that the answer goes on, elsewhere, is shown in other tests."""
    for device in cell.devices:
        device.agent.relay._pump._checks = ToyChecks()
    await cell.servable()
    await asyncio.sleep(15)  # copies are placed
    talk = await conversation(cell)
    answering = asyncio.ensure_future(answer(talk, 30, pause_s=0.1))
    await asyncio.sleep(1)
    first = cell.source._live[next(iter(cell.source._live))].nodes()[0]
    bad = next(device for device in cell.devices if device.who.node == first)
    damage(bad.engine)
    assert len(await answering) == 30
    await talk.close(keep=False)
    assert any("numeric_fault" in event for event in cell.source.events)
    return bad


async def another_gateway_tells_of(cell: TrustedCell, device: TrustedDevice) -> None:
    """Of refusing a result of its own session, in a chain of that device alone."""
    request = RouteRequest(
        model=cell.entry.model, session=SessionId("f" * 32), reserve_tokens=1,
        accused=(Accusation(node=device.who.node),),
    )  # fmt: skip
    bus = cell.hub.connect(STRANGER.node)
    await bus.request(SUBJECTS.route(STRANGER.node), msgspec.json.encode(request), 2.0)


def test_a_damaged_device_is_out_of_service_once_two_gateways_know(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        allowing(cell, HALF)
        bad = await with_a_damaged_first_device(cell)
        await asyncio.sleep(3)
        assert out(cell) == [], "one gateway's word is one gateway's word"
        (report,) = cell.coordinator._suspects._reports[GATEWAY.node]
        assert report.accused == bad.who.node
        assert report.parties == {GATEWAY.node, report.refused_by}, "the gateway, and the device that refused"
        await another_gateway_tells_of(cell, bad)
        await cell.until(lambda: out(cell) == [bad.who.node], 3.0)
        metrics = GatewayMetrics()
        metrics.watch_quarantine(lambda: cell.source.quarantined)
        await cell.until(lambda: b"fallow_quarantined_devices 1.0" in metrics.exposition(), 5.0)
        for _ in range(5):
            talk = await conversation(cell)
            await talk.prefill()
            assert bad.who.node not in cell.source._live[next(iter(cell.source._live))].nodes()
            await talk.close(keep=False)

    run(tmp_path, DEVICES, script)


def test_a_result_that_cannot_be_is_reported_with_all_whose_rows_were_in_it(tmp_path: Path) -> None:
    async def script(cell: TrustedCell) -> None:
        await cell.servable()
        await asyncio.sleep(15)  # copies are placed
        talk = await conversation(cell)
        await talk.prefill()
        *before, last = cell.source._live[next(iter(cell.source._live))].nodes()
        engine = next(device.engine for device in cell.devices if device.who.node == last)
        sound = engine._logits

        def unsound(rows: list[int], step: Step) -> Stepped:
            stepped = sound(rows, step)
            return msgspec.structs.replace(stepped, payload=bytes(byte | 0x7F for byte in stepped.payload))

        engine._logits = unsound  # type: ignore[method-assign]
        await talk.decode(1)
        await talk.close(keep=False)
        assert cell.source.repairs == 1 and before
        (report,) = cell.coordinator._suspects._reports[GATEWAY.node]
        assert report == (last, frozenset({GATEWAY.node, *before}), None)

    run(tmp_path, DEVICES, script)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 1)])
def test_a_device_that_finds_itself_damaged_is_out_within_the_budget(
    tmp_path: Path, share: float, expected: int
) -> None:
    async def script(cell: TrustedCell) -> None:
        allowing(cell, Quarantine(fleet_share_max=share))
        await cell.servable()
        device = next(device for device in cell.devices if device.agent.heartbeat().hosted)
        await cell.until(lambda: device.agent.heartbeat().hosted[0].status is StageStatus.READY, 30.0)
        device.agent.hosting.engine_damaged("the canary did not answer what it answered before")
        assert device.agent.heartbeat().hosted[0].damaged
        await asyncio.sleep(2)
        assert len(out(cell)) == expected
        await cell.servable()

    run(tmp_path, DEVICES, script)
