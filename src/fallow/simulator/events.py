"""Carries out what a scenario scripts, as far as it is not in devices' lives or in the traffic already.

An event that began before the simulated part of the scenario is as far as it would be; one that ended has left
what it leaves. Outages, reclaims and rolling updates are in the lives (`population.py`), flash crowds in `traffic.py`.
"""

from typing import TYPE_CHECKING, Final

from fallow.simulator.breakage import breakage
from fallow.simulator.results import Mark
from fallow.simulator.scenario import Event, EventKind, Scenario

if TYPE_CHECKING:
    from fallow.simulator.world import World

ROT_STEPS: Final = 20


async def carry_out(event: Event, world: "World") -> None:
    """Play one event in a world that runs."""
    match event.kind:
        case EventKind.PARTITION:
            await _partition(event, world)
        case EventKind.COORDINATOR_LOSS:
            await _lose_coordinators(event, world)
        case EventKind.SLOW_ROT:
            await _rot(event, world)
        case _:
            return


async def _partition(event: Event, world: "World") -> None:
    assert event.region is not None, "the scenario was checked"
    ends_s = event.at_s + event.duration_s
    if ends_s <= world.now_s():
        return
    await world.clock.sleep(event.at_s - world.now_s())
    world.breakages.append(breakage(world, event.region))
    world.note(f"partition of {event.region}")
    world.network.cut_region(event.region)
    await world.clock.sleep(ends_s - world.now_s())
    world.note(f"partition of {event.region} is over")
    world.network.heal_region(event.region)


async def _lose_coordinators(event: Event, world: "World") -> None:
    """In every cell the one that leads is killed, and comes back, to stand by, after the event's duration."""
    if event.at_s < world.from_s:
        return
    await world.clock.sleep(event.at_s - world.now_s())
    leading = [each for cell in world.cells for each in cell.coordinators if each.epoch() is not None]
    for coordinator in leading:
        world.note(f"{coordinator.name} is killed")
        await coordinator.kill()
    await world.clock.sleep(event.at_s + event.duration_s - world.now_s())
    for coordinator in leading:
        world.note(f"{coordinator.name} starts again")
        await coordinator.start()


async def _rot(event: Event, world: "World") -> None:
    """Some devices become slower, step by step."""
    draw = world.streams.stream("rot", str(event.at_s))
    meant = [
        device
        for device in world.devices
        if event.population in (None, device.figures.population) and event.region in (None, device.figures.region)
    ]
    rotten = [device for device in meant if draw.random() < event.share]
    for step in range(1, ROT_STEPS + 1):
        await world.clock.sleep(event.at_s + event.duration_s * step / ROT_STEPS - world.now_s())
        for device in rotten:
            device.slow_down(event.factor ** (step / ROT_STEPS))


def marks(scenario: Scenario, from_s: float, until_s: float) -> tuple[Mark, ...]:
    """What happens, for the report: events that touch the simulated part."""
    return tuple(
        Mark(at_s=event.at_s, until_s=event.at_s + event.duration_s, label=_label(event))
        for event in scenario.events
        if event.at_s < until_s and event.at_s + max(event.duration_s, 1.0) > from_s
    )


def _label(event: Event) -> str:
    where = event.region or event.population
    return str(event.kind).replace("-", " ") + (f", {where}" if where else "")
