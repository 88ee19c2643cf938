"""Goal: a run is a function of scenario, seed and code: the same hash in every process, whatever hashes strings have.

Method: the small world with every kind of scripted trouble, in fresh interpreters with different `PYTHONHASHSEED`.
"""

import os
import subprocess
import sys
from pathlib import Path

from fallow.simulator.scenario import Event, EventKind, Scenario
from tests.simulation.worlds import people, run, small

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tests.simulation.test_determinism import eventful
from tests.simulation.worlds import run
result = run(eventful(), int(sys.argv[1]))
print(result.event_hash, result.events, result.totals.tokens_served, len(result.violations))
"""


def eventful() -> Scenario:
    """Two regions, two cells, and everything that may happen, within two minutes."""
    return small(
        Event(kind=EventKind.PARTITION, at_s=20, duration_s=8, region="there"),
        Event(kind=EventKind.COORDINATOR_LOSS, at_s=35, duration_s=20),
        Event(kind=EventKind.OUTAGE, at_s=50, duration_s=20, population="far"),
        Event(kind=EventKind.RECLAIM, at_s=60, duration_s=20, hold_s=30, share=0.3),
        Event(kind=EventKind.ROLLING_UPDATE, at_s=70, duration_s=30, population="near"),
        Event(kind=EventKind.SLOW_ROT, at_s=10, duration_s=60, share=0.5, factor=3.0),
        Event(kind=EventKind.FLASH_CROWD, at_s=90, duration_s=20, factor=4.0),
        minutes=2.0,
        devices=16,
        cell_devices=8,
        populations=(
            people(name="near", region="here", median_up_s=200.0, median_down_s=30.0),
            people(name="far", region="there", median_up_s=200.0, median_down_s=30.0),
        ),
    )


def in_a_fresh_process(seed: int, hash_seed: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_two_processes_agree_on_every_event() -> None:
    one, other = in_a_fresh_process(1, 1), in_a_fresh_process(1, 2)
    assert one == other
    assert int(one[1]) > 10_000
    assert one[3] == "0", "and no invariant is broken in all that"


def test_another_seed_is_another_run() -> None:
    calm = small(minutes=0.5)
    assert run(calm, 1).event_hash != run(calm, 2).event_hash
