"""Two cells on one real NATS server: overflow, and the death of a neighbour, with real connections and real time."""

import asyncio
from pathlib import Path

from fallow.fabric.broker import Broker
from fallow.fabric.nats_bus import NatsBus
from fallow.policy.cells import CellRules
from fallow.system_clock import SystemClock
from tests.simulation.cells import WHOLE, ToyCell
from tests.unit.fabric.support import eventually

RULES = CellRules(digest_interval_s=0.2, digest_silence_max_s=1.0)


def test_a_neighbour_cell_serves_what_a_cell_cannot_until_it_dies(tmp_path: Path) -> None:
    async def main() -> None:
        broker = Broker(tmp_path / "broker")
        await broker.start()
        buses = {name: await NatsBus.connect(broker.urls, name) for name in ("one", "two", "devices")}
        clock = SystemClock()
        one = ToyCell("one", buses["one"], buses["devices"], clock, RULES)
        two = ToyCell("two", buses["two"], buses["devices"], clock, RULES)
        try:
            await one.start()
            await two.start((WHOLE,))
            await eventually(lambda: one.knows("two") and two.knows("one"))
            assert two.serves(await one.route(1))
            assert two.serves(await two.route(2))
            # As when its process is killed: the connection breaks, nothing is said.
            await buses["two"].close()
            reply = await one.route(3)
            assert (reply.hops, reply.code) == ((), "no_capacity")
            await eventually(one.knows)
        finally:
            await one.coordinator.close()
            await two.coordinator.close()
            for bus in buses.values():
                await bus.close()
            await broker.close()

    asyncio.run(main())
