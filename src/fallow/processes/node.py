"""`fallow join`: one device. It lends what its owner allowed, and leaves politely when told.

With `node.nearest_cell` it chooses its cell when it joins, and again while it runs (`device_life.py`).
"""

import os
import random
import re
import socket

import msgspec

from fallow import __version__, wiring
from fallow.config import Config
from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError, MembershipEnded, RegistrarUnavailable, RequestRefused
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.node.history import Declared, StayHistory
from fallow.node.limits import Memory, split_memory
from fallow.node.timetable import parse_departures, parse_windows
from fallow.processes.cell_watch import CellWatch
from fallow.processes.device_life import Lodging, Ways, live
from fallow.processes.lifetime import Stop
from fallow.processes.lock import hold
from fallow.processes.nearest_cell import nearest_cell
from fallow.processes.party import Agree, Newcomer, Party, join_as_console, take_part
from fallow.processes.supervisor import Tell
from fallow.trust.registrar.consent import Lent
from fallow.trust.registrar.requests import NAME_MAX_CHARS, NAME_PATTERN


async def run(config: Config, tell: Tell, agree: Agree, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `BusUnavailable`, `ConfigError`, `EngineError`, `TrustError`."""
    if await join_as_console(config, tell):
        return
    with hold(config.device_dir):
        await _run(config, tell, agree, parent_pid)


async def _run(config: Config, tell: Tell, agree: Agree, parent_pid: int | None) -> None:
    stop = Stop()
    stop.listen(parent_pid)
    clock, draws = wiring.clock(), random.Random()  # noqa: S311 (spreads load; secures nothing)
    memory = split_memory(config.node.memory_bytes, config.node.kv_budget_bytes)
    lent = f"{memory.memory_bytes / (1 << 30):.1f} GiB of memory and {threads(config)} processor thread(s)"
    lends = Lent(device=name(config), memory=lent, folder=str(config.device_dir))
    newcomer = Newcomer(role=Role.NODE, name=name(config), lends=lends, agree=agree)
    declared = Declared(
        parse_windows("node.available", config.node.available),
        parse_departures("node.departs", config.node.departs),
    )

    def watch(party: Party) -> CellWatch | None:
        if not config.node.nearest_cell:
            return None
        return CellWatch(party.bus, clock, party.cell, party.coordinator.cells, party.lease, draws)

    ways = Ways(
        join=lambda cell: _take_part_in(cell, config, newcomer, tell),
        lodge=lambda party: _lodge(party, config, memory, declared),
        watch=watch,
        greet=lambda party: tell(
            f"{name(config)} ({party.who.node[:8]}) has joined cell {party.cell} and lends {lent}. Ctrl-C leaves."
        ),
    )
    party = await take_part(config, config.device_dir, newcomer, tell)
    if config.node.nearest_cell:
        party = await _moved_near(party, config, newcomer, tell)
    await live(party, ways, stop, clock, draws, tell)


async def _lodge(party: Party, config: Config, memory: Memory, declared: Declared) -> Lodging:
    """What the device needs to lend in the party's cell."""
    endpoint = await wiring.open_links(config, party.who, config.node.listen, party.bus, party.cell, party.bus_urls)
    agent = Agent(
        AgentConfig(
            cell=party.cell,
            name=name(config),
            memory_bytes=memory.memory_bytes,
            kv_budget_bytes=memory.kv_budget_bytes,
            version=__version__,
            region=config.node.region or "",
        ),
        party.who.node,
        party.bus,
        endpoint,
        wiring.engine(config, memory.kv_budget_bytes, threads(config), config.device_dir / "models"),
        Store(config.device_dir / "models"),
        wiring.clock(),
        trust=party.node,
        history=StayHistory(config.device_dir / "stays.json", wiring.clock(), declared),
    )
    return Lodging(agent, endpoint)


async def _take_part_in(cell: str, config: Config, newcomer: Newcomer, tell: Tell) -> Party:
    return await take_part(msgspec.structs.replace(config, cell=cell), config.device_dir, newcomer, tell)


async def _moved_near(party: Party, config: Config, newcomer: Newcomer, tell: Tell) -> Party:
    """The same device in the nearest cell that has room."""
    cell = await nearest_cell(party.bus, wiring.clock(), party.cell, party.coordinator.cells)
    if cell == party.cell:
        return party
    try:
        await party.move(cell)
    except MembershipEnded:
        raise
    except (RequestRefused, RegistrarUnavailable) as error:
        tell(f"The nearest cell is {cell}, and this device stays in {party.cell} for now. {error.message}")
        return party
    await party.close()
    return await _take_part_in(cell, config, newcomer, tell)


def name(config: Config) -> str:
    """What people call this device. Raises `ConfigError` for a name that no registrar would take."""
    chosen = config.node.name or socket.gethostname()[:NAME_MAX_CHARS] or "device"
    if not re.search(NAME_PATTERN, chosen) or not chosen.isprintable():
        got = f"{len(chosen)}: {chosen[:40]!r}"
        raise ConfigError(f"node.name: expected up to {NAME_MAX_CHARS} printable characters, got {got}.")
    return chosen


def threads(config: Config) -> int:
    """Threads of the engine: as configured, else one for each core that this process may use."""
    if config.node.threads is not None:
        return config.node.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
