"""Small simulated worlds for tests: a model of eight layers over a dozen devices, minutes of it."""

from collections.abc import Callable
from typing import Any

import msgspec

from fallow.simulator.checker import Checker
from fallow.simulator.results import RunResult
from fallow.simulator.runner import run_detailed
from fallow.simulator.scenario import Detailed, Event, Habit, Population, Scenario, SimulatedModel, Traffic
from fallow.simulator.virtual_time import run_virtual
from fallow.simulator.world import World

MODEL = SimulatedModel(layer_count=8, layer_bytes=100 << 20, embedding_bytes=50 << 20, head_bytes=50 << 20)


def people(**changes: Any) -> Population:
    """Devices that hold a third of the model each, and come and go every few minutes."""
    base = Population(
        name="people",
        habit=Habit.MEMORYLESS,
        count=12,
        layer_s=0.004,
        layer_s_spread=0.3,
        memory_bytes=500 << 20,
        memory_spread=0.05,
        median_up_s=400.0,
        median_down_s=60.0,
    )
    return msgspec.structs.replace(base, **changes)


def small(*events: Event, minutes: float = 4.0, devices: int = 12, **changes: Any) -> Scenario:
    """A dozen devices, a question every few seconds."""
    base = Scenario(
        name="small",
        title="Small",
        about="For tests.",
        model=MODEL,
        traffic=Traffic(sessions_per_hour_per_device=45.0, prompt_tokens=40, completion_tokens=25, spread=0.5),
        detailed=Detailed(devices=devices, hours=minutes / 60, heartbeat_interval_s=2.0),
        populations=(people(),),
        events=events,
    )
    return msgspec.structs.replace(base, **changes)


def run(scenario: Scenario, seed: int = 1) -> RunResult:
    return run_detailed(scenario, seed)


def run_world(
    scenario: Scenario, seed: int = 1, prepare: Callable[[World], None] = lambda _: None
) -> tuple[World, Checker]:
    """Run with the world in hand: `prepare` may sabotage it once it is warm."""

    async def program() -> tuple[World, Checker]:
        world = World(scenario, seed)
        checker = Checker(world)
        await world.start()
        prepare(world)
        await world.run()
        checker.sweep()
        return world, checker

    return run_virtual(program())


def broken(checker: Checker) -> set[str]:
    """Names of the invariants that did not hold."""
    return {violation.invariant for violation in checker.violations}
