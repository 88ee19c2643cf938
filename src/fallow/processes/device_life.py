"""A device from its first cell to its end: it lends in one cell at a time, and moves when another one is better.

Rules
- It moves in an order in which nobody is hurt. First the registrar agrees: where it refuses or is away, nothing has
  changed, and the device stays as long as one that has just come. Then the device leaves its cell as it would for good:
  sessions move to other devices within the time for leaving, and it says goodbye. Then it takes part in the new one.
- Its key, membership, model files and history of stays lie in its folder and go with it. Links, engine and whatever it
  hosted begin anew: the new cell's coordinator decides that.
- Between two cells it is in none. While bus or registrar are away just then, or refuse its passport, it tries again,
  with growing pauses, for `REJOIN_LIMIT_S`; after that it ends, as one that starts without them does.
- Who is asked to stop while it moves stops.

When it should move is `cell_watch.py`'s; without a watch it stays where it is.
"""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError, PassportRefused, RegistrarUnavailable, TrustError
from fallow.fabric.contract import LinkEndpoint
from fallow.node.agent import Agent
from fallow.policy.enrolment import retry_wait_s
from fallow.processes.cell_watch import CellWatch
from fallow.processes.lifetime import Stop
from fallow.processes.party import Party
from fallow.processes.supervisor import Tell

LEAVE_LIMIT_S: Final = 15.0
REJOIN_LIMIT_S: Final = 3600.0


class Lodging(NamedTuple):
    """What a device has in one cell. Not started yet; the agent is closed first."""

    agent: Agent
    endpoint: LinkEndpoint


class Ways(NamedTuple):
    """How a device gets on in any cell."""

    join: Callable[[str], Awaitable[Party]]
    """Take part in a cell. Raises as `take_part` does."""
    lodge: Callable[[Party], Awaitable[Lodging]]
    """Open what it takes to lend there. Raises `ConfigError`."""
    watch: Callable[[Party], CellWatch | None]
    """Who says when another cell is better; `None`: nobody."""
    greet: Callable[[Party], None]
    """Called whenever it has begun to lend."""


async def live(party: Party, ways: Ways, stop: Stop, clock: Clock, draws: random.Random, tell: Tell) -> None:
    """Lend in the party's cell and in those that come after it, until `stop`; the party is closed.

    Raises `EngineError` and what `ways` raise.
    """
    here: Party | None = party
    while here is not None:
        cell = await _stay(here, ways, stop, tell)
        here = None if cell is None else await _rejoin(cell, ways, stop, clock, draws, tell)


async def _stay(party: Party, ways: Ways, stop: Stop, tell: Tell) -> str | None:
    """One cell, from coming to leaving; the next cell, if there is to be one."""
    try:
        agent, endpoint = await ways.lodge(party)
        try:
            await agent.start()
            ways.greet(party)
            cell = await _called_away(party, ways.watch(party), stop, tell)
            if cell is None:
                tell("Leaving: running answers move to other devices first. Once more stops at once.")
                await stop.unless_at_once(agent.drain(), LEAVE_LIMIT_S)
            else:
                tell(f"Moving to cell {cell}: running answers move to other devices first.")
                await stop.unless_at_once(agent.move_out(), LEAVE_LIMIT_S)
        finally:
            await agent.close()
            await endpoint.close()
    finally:
        await party.close()
    return cell


async def _called_away(party: Party, watch: CellWatch | None, stop: Stop, tell: Tell) -> str | None:
    """Wait until the device should leave: the cell that it may move to, or `None` when it was asked to stop."""
    stopped = asyncio.ensure_future(stop.polite.wait())
    moving = asyncio.ensure_future(_next_cell(party, watch, tell))
    try:
        await asyncio.wait({stopped, moving}, return_when=asyncio.FIRST_COMPLETED)
        return None if stopped.done() else moving.result()
    finally:
        stopped.cancel()
        moving.cancel()
        await asyncio.gather(stopped, moving, return_exceptions=True)


async def _next_cell(party: Party, watch: CellWatch | None, tell: Tell) -> str:
    """Wait until another cell is better and the registrar lets the device go there."""
    if watch is None:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody calls it away")
    while True:
        cell = await watch.better_cell()
        try:
            await party.move(cell)
        except TrustError as error:
            tell(f"Cell {cell} is the better one, and this device stays in {party.cell} for now. {error.message}")
            watch.refused()
        else:
            return cell


async def _rejoin(cell: str, ways: Ways, stop: Stop, clock: Clock, draws: random.Random, tell: Tell) -> Party | None:
    """Take part in the next cell; `None` when it was asked to stop meanwhile."""
    since_s = clock.monotonic_s()
    for failures in itertools.count():
        if stop.polite.is_set():
            return None
        try:
            return await ways.join(cell)
        except (FabricError, PassportRefused, RegistrarUnavailable) as error:
            if clock.monotonic_s() - since_s > REJOIN_LIMIT_S:
                raise
            tell(f"Cell {cell} cannot be joined yet, and this device tries again. {error.message}")
        await _unless_stopped(stop, clock, retry_wait_s(failures, draws.random()))
    raise AssertionError("counting does not end")


async def _unless_stopped(stop: Stop, clock: Clock, wait_s: float) -> None:
    waits = {asyncio.ensure_future(stop.polite.wait()), asyncio.ensure_future(clock.sleep(wait_s))}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
