"""The fast mode: a day of a million devices in minutes, whole cells as arrays, with the policy's own kernels.

Rules
- The same scenario, seed and devices give the same result and the same event hash, whatever the number of processes:
  the fleet is cut into blocks of cells, each is a function of its own, and their figures are added in order.
- The same devices as in the detailed mode, their lives, speeds and memories; the same kernels of placement, outlook,
  throughput and admission. What the detailed mode does by single messages is a model of queues here (`fast_load.py`).
- Constants that are marked as fitted were fitted on the detailed mode's figures (`benchmarks/million.py --validate`).

Not modelled: which single session is where, altered answers, invariants, sessions sent to a neighbouring cell, outlooks
renewed while a device stays, the bytes of answers on the way.
"""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Final

import numpy as np

from fallow.policy.availability_table import OutlookTable
from fallow.simulator.events import marks
from fallow.simulator.fast_block import Plan, simulate
from fallow.simulator.fast_figures import Tally, added, samples, totals
from fallow.simulator.fast_fleet import Fleet, draw_fleet
from fallow.simulator.life_history import population_tables
from fallow.simulator.results import Mode, RunResult
from fallow.simulator.scenario import Scenario

STEP_S: Final = 60.0
BINS: Final = 144
"""Into how many parts a run is divided for its figures, about; each is whole steps."""
DRAWN_SHARE: Final = 0.1
"""Of a run's progress, what drawing the fleet is taken for."""


def run_fast(
    scenario: Scenario,
    seed: int,
    devices: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    processes: int | None = None,
) -> RunResult:
    """Simulate the whole scenario with `devices` devices (default: the scenario's) on `processes` processes (default:
    one for each core). `progress` hears shares of 1."""
    began_s = time.perf_counter()
    until_s = scenario.hours * 3600
    step_s = min(STEP_S, until_s / 10)
    plan = Plan(until_s=until_s, step_s=step_s, bin_s=step_s * max(1, round(until_s / BINS / step_s)))
    fleet = draw_fleet(scenario, seed, scenario.devices if devices is None else devices, until_s)
    table = population_tables(fleet.scenario.populations, seed, scenario.start_hour_of_week)
    progress(DRAWN_SHARE)
    found: list[tuple[Tally, str]] = []
    for one in _simulated(fleet, plan, table, processes or os.cpu_count() or 1):
        found.append(one)
        progress(DRAWN_SHARE + (1 - DRAWN_SHARE) * len(found) / len(fleet.blocks))
    tally = added([one for one, _ in found])
    bins = len(tally.started)
    lasts_s = np.minimum(plan.bin_s, until_s - plan.bin_s * np.arange(bins))
    kept = samples(tally, plan.bin_s, lasts_s)
    return RunResult(
        scenario=scenario.name,
        title=scenario.title,
        about=scenario.about,
        mode=Mode.FAST,
        seed=seed,
        devices=fleet.devices,
        cells=fleet.cells,
        simulated_s=until_s,
        wall_s=time.perf_counter() - began_s,
        start_hour_of_week=scenario.start_hour_of_week,
        bin_s=plan.bin_s,
        event_hash=hashlib.blake2b("".join(digest for _, digest in found).encode(), digest_size=16).hexdigest(),
        events=int(tally.steps[0]),
        totals=totals(tally, kept),
        samples=kept,
        marks=marks(scenario, 0.0, until_s),
    )


def _simulated(fleet: Fleet, plan: Plan, table: OutlookTable, processes: int) -> Iterator[tuple[Tally, str]]:
    """The blocks' figures, in order."""
    work = ((block, fleet.scenario, fleet.seed, plan, table) for block in fleet.blocks)
    processes = min(processes, len(fleet.blocks))
    if processes == 1:
        yield from (simulate(*one) for one in work)
        return
    # Spawned, not forked: whoever calls may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(simulate, *one) for one in work]
        yield from (future.result() for future in futures)
