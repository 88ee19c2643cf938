"""A device changes its cell, and all is real but its engine: registrar, passports, bus rights, lease, signed digests.

What is shown: its cell dissolves, the registrar gives it a passport for the other one, and it works there under the
same key and membership. It takes links where the bus is by then, which no settings tell it.
"""

import asyncio
import random
from pathlib import Path

import msgspec

from fallow import wiring
from fallow.config import Config
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.credentials import Role
from fallow.engine.memory import MemoryEngine
from fallow.fabric.memory import MemoryFabric
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.policy.cells import CellRules
from fallow.processes.cell_watch import CellWatch
from fallow.processes.device_life import Lodging, Ways, live
from fallow.processes.lifetime import Stop
from fallow.processes.party import Newcomer, Party, take_part
from fallow.trust.registrar.consent import Lent
from fallow.trust.registrar.state import read_places, write_places
from tests.system.test_enrolment import START_LIMIT_S, Network, network, run, until

CLOCK = wiring.clock()
RULES = CellRules(
    devices_min=2, digest_interval_s=0.2, look_interval_s=0.3, stay_min_s=0.5, small_for_s=0.5, rtt_max_s=1.0
)


async def joined(home: Network, folder: Path, role: Role, cell: str) -> Party:
    """A process of that role and cell, as its own start makes it."""
    invitation = await home.invited("--role", role, "--name", folder.name, "--cell", cell)
    trust = msgspec.structs.replace(home.config.trust, invitation=invitation)
    return await take_part(Config(state_dir=folder, trust=trust), folder, newcomer(folder, role), lambda _: None)


def newcomer(folder: Path, role: Role) -> Newcomer:
    lends = Lent(device=folder.name, memory="1 GiB", folder=str(folder))
    return Newcomer(role=role, name=folder.name, lends=lends, agree=lambda _: True)


async def lodging(party: Party, folder: Path, fabric: MemoryFabric) -> Lodging:
    endpoint = fabric.endpoint(party.who.node)
    agent = Agent(
        AgentConfig(cell=party.cell, name=folder.name, memory_bytes=1 << 30, kv_budget_bytes=1 << 28), party.who.node,
        party.bus, endpoint, MemoryEngine(kv_budget_bytes=1 << 28), Store(folder / "models"), CLOCK, trust=party.node,
    )  # fmt: skip
    return Lodging(agent, endpoint)


def working(coordinator: Coordinator) -> set[str]:
    return {beat.name for beat in coordinator.status().nodes if beat.standing == "working"}


def test_a_device_whose_cell_dissolves_works_in_the_other_under_its_own_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        fabric, stop, told = MemoryFabric(), Stop(), list[str]()
        async with network(tmp_path / "operator") as home:
            parties = {cell: await joined(home, tmp_path / cell, Role.COORDINATOR, cell) for cell in ("home", "port")}
            leaders = {
                cell: Coordinator(
                    CoordinatorConfig(cell=cell, cells=RULES), by.bus, CLOCK, by.presence, id=by.who.node,
                    trust=by.coordinator,
                )
                for cell, by in parties.items()
            }  # fmt: skip
            for leader in leaders.values():
                await leader.start()
            boat = await joined(home, tmp_path / "boat", Role.NODE, "port")
            anchored, _ = await lodging(boat, tmp_path / "boat", fabric)
            await anchored.start()
            desk, folder = await joined(home, tmp_path / "desk", Role.NODE, "home"), tmp_path / "desk"
            key, comings, places = desk.who.node, list[tuple[str, str]](), read_places(home.state.paths)
            far = msgspec.structs.replace(places, bus_urls=(*places.bus_urls, "tls://192.0.2.7:4222"))

            async def join(_: str) -> Party:
                return await take_part(Config(state_dir=folder), folder, newcomer(folder, Role.NODE), told.append)

            def watch(by: Party) -> CellWatch:
                return CellWatch(by.bus, CLOCK, by.cell, by.coordinator.cells, by.lease, random.Random(1), RULES)

            def greet(by: Party) -> None:
                assert by.who.node == key
                comings.append((by.cell, wiring.link_address(Config(state_dir=folder), None, by.bus_urls)))
                write_places(home.state.paths, far)

            ways = Ways(join, lambda by: lodging(by, folder, fabric), watch, greet)
            life = asyncio.get_running_loop().create_task(live(desk, ways, stop, CLOCK, random.Random(1), told.append))
            await until(lambda: working(leaders["port"]) == {"boat", "desk"}, START_LIMIT_S)
            assert comings == [("home", wiring.LOOPBACK_LINKS), ("port", wiring.OPEN_LINKS)]
            assert working(leaders["home"]) == set()
            size = leaders["home"].status().size
            assert size is not None and size.dissolves_into == "port"
            assert (await home.kinds()).count("cell_changed") == 1
            stop.ask()
            await asyncio.wait_for(life, START_LIMIT_S)
            await until(lambda: working(leaders["port"]) == {"boat"}, START_LIMIT_S)
            await anchored.close()
            for leader in leaders.values():
                await leader.close()
            for each in (boat, *parties.values()):
                await each.close()

    run(scenario())
