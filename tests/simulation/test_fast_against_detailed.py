"""Goal: the fast mode says about what the detailed mode says, on the same small fleet.

Method: one scenario, one seed, the same devices with the same lives through both; main figures within the tolerances
stated below. Times may differ more than counts: the fast mode's are those of a model of queues. `benchmarks/million.py
--validate` prints the whole table for other loads.
Seeds: 1 (idle), 2 (busy and churning).
"""

import msgspec
import pytest

from fallow.simulator.fast import run_fast
from fallow.simulator.results import RunResult
from fallow.simulator.runner import run_detailed
from fallow.simulator.scenario import Scenario, Traffic
from tests.simulation.worlds import people, small

COUNT_TOLERANCE = 0.05
"""Devices at hand."""
CAPACITY_TOLERANCE = 0.20
GAP_TOLERANCE = 0.35
FIRST_TOLERANCE = 0.45
HOPS_TOLERANCE = 0.25


def busy(per_hour: float, devices: int, minutes: float, **life: float) -> Scenario:
    chosen = small(minutes=minutes, devices=devices, populations=(people(count=devices, **life),), hours=minutes / 60)
    traffic = Traffic(sessions_per_hour_per_device=per_hour, prompt_tokens=60, completion_tokens=30, spread=0.5)
    return msgspec.structs.replace(chosen, traffic=traffic)


def mean(result: RunResult, name: str) -> float:
    return sum(getattr(sample, name) or 0.0 for sample in result.samples) / len(result.samples)


def both(scenario: Scenario, seed: int) -> tuple[RunResult, RunResult]:
    return run_fast(scenario, seed, scenario.detailed.devices, processes=1), run_detailed(scenario, seed)


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        (busy(40.0, 20, 3.0, median_up_s=7200.0, median_down_s=1800.0), 1),
        (busy(120.0, 20, 2.5, median_up_s=900.0, median_down_s=200.0), 2),
    ],
    ids=["idle", "busy"],
)
def test_both_modes_agree(scenario: Scenario, seed: int) -> None:
    fast, detailed = both(scenario, seed)
    one, other = fast.totals, detailed.totals
    assert fast.devices == detailed.devices
    assert fast.cells == detailed.cells
    assert mean(fast, "devices_available") == pytest.approx(mean(detailed, "devices_available"), rel=COUNT_TOLERANCE)
    capacity = mean(detailed, "capacity_tokens_per_s")
    assert mean(fast, "capacity_tokens_per_s") == pytest.approx(capacity, rel=CAPACITY_TOLERANCE)
    # Arrivals are drawn apart: two Poisson variables of the same mean.
    assert abs(one.sessions_started - other.sessions_started) <= 5 * other.sessions_started**0.5
    assert min(one.success_rate, other.success_rate) >= 0.99
    assert other.tokens_served / other.sessions_finished == pytest.approx(
        one.tokens_served / one.sessions_finished, rel=0.2
    )
    assert one.inter_token_p50_s == pytest.approx(other.inter_token_p50_s, rel=GAP_TOLERANCE)
    assert one.first_token_p50_s == pytest.approx(other.first_token_p50_s, rel=FIRST_TOLERANCE)
    assert one.hops_mean == pytest.approx(other.hops_mean, rel=HOPS_TOLERANCE)
