"""Runs a scenario in detail, from a seed to a result.

Rules: a run is a function of scenario, seed and code; `wall_s` is the only figure of a result that is not. `progress`
hears the share of simulated time that has passed; it must not touch the world.
"""

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Final

from fallow.simulator.checker import Checker
from fallow.simulator.events import marks
from fallow.simulator.results import Mode, RunResult
from fallow.simulator.scenario import Scenario
from fallow.simulator.virtual_time import run_virtual
from fallow.simulator.world import World

BINS: Final = 60
"""Into how many parts a run is divided for its figures, about."""
BIN_MIN_S: Final = 60.0
PROGRESS_S: Final = 5.0
"""Simulated time between two reports of progress."""


def run_detailed(scenario: Scenario, seed: int, progress: Callable[[float], None] = lambda _: None) -> RunResult:
    """Simulate the scenario's detailed part. Takes about a minute for each hour of a hundred devices."""
    began_s = time.perf_counter()
    collecting = gc.isenabled()
    # Cycles are collected now and then below: the collector would otherwise walk a large world over and over.
    gc.disable()
    try:
        world, checker = run_virtual(_run(scenario, seed, progress))
    finally:
        if collecting:
            gc.enable()
    return RunResult(
        scenario=scenario.name,
        title=scenario.title,
        about=scenario.about,
        mode=Mode.DETAILED,
        seed=seed,
        devices=len(world.devices),
        cells=len(world.cells),
        simulated_s=world.until_s - world.from_s,
        wall_s=time.perf_counter() - began_s,
        start_hour_of_week=scenario.start_hour_of_week,
        bin_s=world.meter.bin_s,
        event_hash=world.trace.digest(),
        events=world.trace.steps,
        totals=world.meter.totals(),
        samples=world.meter.samples(),
        marks=marks(scenario, world.from_s, world.until_s),
        violations=tuple(checker.violations),
        breakages=tuple(world.breakages),
    )


async def _run(scenario: Scenario, seed: int, progress: Callable[[float], None]) -> tuple[World, Checker]:
    bin_s = max(BIN_MIN_S, scenario.detailed.hours * 3600 / BINS)
    world = World(scenario, seed, bin_s)
    checker = Checker(world)
    reporting = asyncio.get_running_loop().create_task(_report(world, progress))
    await world.start()
    await world.run()
    reporting.cancel()
    checker.sweep()
    return world, checker


async def _report(world: World, progress: Callable[[float], None]) -> None:
    collected = 0
    while True:
        await world.clock.sleep(PROGRESS_S)
        progress(min(1.0, max(0.0, (world.now_s() - world.from_s) / (world.until_s - world.from_s))))
        if world.trace.steps - collected > 200_000:
            collected = world.trace.steps
            gc.collect()
