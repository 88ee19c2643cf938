"""What the detailed simulator shows: sessions that survive churn, partitions and coordinators' deaths; its own speed.

    python benchmarks/simulation.py churn         3,000 sessions, devices that stay for 2 h (median)
    python benchmarks/simulation.py trouble       the same, with partitions and coordinators that are killed
    python benchmarks/simulation.py thousand      1,000 devices for an hour
    python benchmarks/simulation.py all
    python benchmarks/simulation.py churn --priority 1    for every answer, another chain stands by

Every figure is of simulated time but the last column. `stalls`: of the answers that lost a device; `of all`: their p95
where every other answer counts as 0. The goals: no lost or altered answer, stalls of at most 2 s (p95, of those that
lost a device), 15 minutes for the thousand.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `fallow sim run` does, before numpy is imported

import msgspec
from rich.console import Console
from rich.table import Table

from fallow.simulator.results import RunResult, write_result
from fallow.simulator.runner import run_detailed
from fallow.simulator.scenario import Detailed, Event, EventKind, Habit, Population, Scenario, Traffic

RESULTS = Path(__file__).parent / "results"
SESSIONS = 3000
DEVICES = 60
HOURS = 2.0
STALL_GOAL_S = 2.0
WALL_GOAL_S = 900.0


def churn(
    *events: Event, devices: int = DEVICES, hours: float = HOURS, sessions: int | None = None, heartbeat_s: float = 1.0
) -> Scenario:
    """Two regions of home computers that stay for two hours (median); the model needs about five of them."""
    sessions = round(SESSIONS * hours / HOURS) if sessions is None else sessions
    return Scenario(
        name="churn",
        title="Churn",
        about="Devices come and go; answers must not notice.",
        hours=hours,
        traffic=Traffic(sessions_per_hour_per_device=sessions / hours / devices),
        detailed=Detailed(devices=devices, hours=hours, heartbeat_interval_s=heartbeat_s),
        populations=(_people("here", "here", devices * 2 // 3), _people("there", "there", devices - devices * 2 // 3)),
        events=events,
    )


def _people(name: str, region: str, count: int) -> Population:
    return Population(
        name=name,
        region=region,
        habit=Habit.MEMORYLESS,
        count=count,
        memory_bytes=3 << 30,
        median_up_s=7200.0,
        median_down_s=1800.0,
    )


def trouble(hours: float = HOURS) -> Scenario:
    """A partition of 10 to 25 s every 20 minutes; a coordinator is killed every 15 minutes."""
    partitions = [
        Event(kind=EventKind.PARTITION, at_s=600.0 + 1200 * index, duration_s=10.0 + 5 * (index % 4), region="there")
        for index in range(int(hours * 3))
    ]
    losses = [
        Event(kind=EventKind.COORDINATOR_LOSS, at_s=300.0 + 900 * index, duration_s=30.0)
        for index in range(int(hours * 4))
    ]
    return churn(*partitions, *losses, hours=hours)


def thousand(devices: int = 1000, hours: float = 1.0) -> Scenario:
    """A large fleet at work: half a question an hour from each device, in cells of 300."""
    return churn(devices=devices, hours=hours, sessions=int(devices * hours / 2), heartbeat_s=10.0)


def row(name: str, result: RunResult, cpu_s: float) -> list[str]:
    totals = result.totals
    lost = totals.sessions_failed
    stall = "-" if totals.stall_p95_s is None else f"{totals.stall_p95_s:.2f} s"
    return [
        name,
        f"{result.devices} x {result.simulated_s / 3600:g} h",
        f"{totals.sessions_started}",
        f"{totals.sessions_refused}",
        f"{lost} / {totals.sessions_altered}",
        f"{totals.stalls}, p95 {stall}",
        "-" if totals.stall_all_p95_s is None else f"{totals.stall_all_p95_s:.2f} s",
        f"{len(result.violations)}",
        f"{result.events:,}",
        f"{result.wall_s:.0f} s ({cpu_s:.0f} s CPU)",
    ]


SCENARIOS = {"churn": churn, "trouble": trouble, "thousand": thousand}


def main() -> int:
    """Run what was asked for; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=[*SCENARIOS, "all"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float, help="simulate so long instead")
    parser.add_argument("--priority", type=float, default=0.0, help="another chain stands by for this share of answers")
    arguments = parser.parse_args()
    table = Table(
        "run", "fleet", "sessions", "refused", "lost / altered", "stalls", "of all", "broken", "steps", "wall time"
    )
    missed: list[str] = []
    for name in SCENARIOS if arguments.which == "all" else [arguments.which]:
        scenario = SCENARIOS[name](**({} if arguments.hours is None else {"hours": arguments.hours}))
        traffic = msgspec.structs.replace(scenario.traffic, priority_share=arguments.priority)
        scenario = msgspec.structs.replace(scenario, traffic=traffic)
        began_s = time.process_time()
        result = run_detailed(scenario, arguments.seed)
        label = f"{name}-priority" if arguments.priority else name
        write_result(result, RESULTS / f"simulation-{label}.json")
        table.add_row(*row(label, result, time.process_time() - began_s))
        missed += [f"{name}: {each}" for each in misses(result)]
        for broken in result.breakages:
            least = "never" if broken.least_mend_s is None else f"{broken.least_mend_s:.1f} s after noticing"
            print(f"{name}: {broken.at_s:.0f} s: a partition breaks {broken.answers} answers; at best whole {least}")
        for violation in result.violations[:10]:
            print(f"{name}: {violation.at_s:.1f} s {violation.invariant}: {violation.detail}")
    Console(width=180).print(table)
    print("All goals met." if not missed else "Missed: " + "; ".join(missed))
    return 1 if missed else 0


def misses(result: RunResult) -> list[str]:
    """The goals that a run missed."""
    totals = result.totals
    found = []
    if totals.sessions_failed or totals.sessions_altered:
        found.append(f"{totals.sessions_failed} answers lost, {totals.sessions_altered} altered")
    if totals.stall_p95_s is not None and totals.stall_p95_s > STALL_GOAL_S:
        found.append(f"stall p95 {totals.stall_p95_s:.2f} s ({totals.stall_p95_s / STALL_GOAL_S:.2f} of the goal)")
    if result.violations:
        found.append(f"{len(result.violations)} invariants broken")
    if result.wall_s > WALL_GOAL_S:
        found.append(f"{result.wall_s:.0f} s of wall time")
    return found


if __name__ == "__main__":
    sys.exit(main())
