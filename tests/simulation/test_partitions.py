"""Goal: a cut that heals before it is noticed costs no repair; one that lasts is weighed against what anybody could do.

Method: small worlds in two regions, the real parts in virtual time; the bound against a linear programme by hand.
"""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.simulator.breakage import Helper, least_mend_s
from fallow.simulator.gateways import Outcome
from fallow.simulator.scenario import Event, EventKind, Scenario, Traffic
from fallow.simulator.world import World
from tests.simulation.worlds import people, run_world, small

SHORT_AT_S, LONG_AT_S = 18.0, 26.0


def two_cuts() -> Scenario:
    """A dozen devices that stay, in two regions; one is cut off for a moment, and later for longer."""
    cuts = [
        Event(kind=EventKind.PARTITION, at_s=at_s, duration_s=duration_s, region="there")
        for at_s, duration_s in ((SHORT_AT_S, 1.2), (LONG_AT_S, 6.0))
    ]
    here = people(name="here", region="here", count=7, median_up_s=1e7, memory_bytes=800 << 20)
    there = people(name="there", region="there", count=5, median_up_s=1e7, memory_bytes=800 << 20)
    busy = Traffic(sessions_per_hour_per_device=150.0, prompt_tokens=40, completion_tokens=60, spread=0.5)
    return msgspec.structs.replace(small(*cuts, minutes=0.6), populations=(here, there), traffic=busy)


def test_a_short_cut_costs_no_repair_and_a_long_one_no_answer() -> None:
    repairs_before: list[int] = []

    def watch(world: World) -> None:
        async def look() -> None:
            await world.clock.sleep(LONG_AT_S - 0.1 - world.now_s())
            chains = [chain for cell in world.cells for gateway in cell.gateways for chain in gateway.answering()]
            repairs_before.extend(chain.repairs for chain in chains)
            repairs_before.extend(turn.repairs for turn in world.meter.turns)

        world.spawn(look())

    world, checker = run_world(two_cuts(), prepare=watch)
    short, long = world.breakages
    turns = world.meter.turns
    assert not checker.violations
    assert {turn.outcome for turn in turns} == {Outcome.FINISHED}
    assert short.answers > 0, "answers ran over the short cut"
    assert repairs_before and not any(repairs_before)
    pauses_s = [max(turn.gaps_s) for turn in turns if turn.repairs and turn.gaps_s]
    assert len(pauses_s) >= long.answers > 0
    assert long.least_mend_s is not None
    assert max(pauses_s) > 1.4 + long.least_mend_s, "noticing, and what anybody needs"
    totals = world.meter.totals()
    assert totals.stall_all_p95_s is not None and totals.stall_p95_s is not None
    assert totals.stall_all_p95_s <= totals.stall_p95_s


def test_the_bound_by_hand() -> None:
    left, right = Helper(frozenset({0, 1}), 100.0), Helper(frozenset({1, 2}), 50.0)
    assert least_mend_s([0, 0, 0], [left]) == 0.0
    assert least_mend_s([1000, 0, 0], [left, right]) == 10.0, "only one of them holds the layer"
    assert least_mend_s([1000, 1000, 1000], [left, right]) == 20.0, "both hold a share of all"
    assert least_mend_s([0, 0, 1], [left]) is None


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_no_way_to_share_the_work_beats_the_bound(lost: list[int], split: float, ratio: float) -> None:
    """Two devices share layer 1 in any proportion."""
    speeds = 100.0, 10 + 90 * ratio
    bound_s = least_mend_s(lost, [Helper(frozenset({0, 1}), speeds[0]), Helper(frozenset({1, 2}), speeds[1])])
    takes_s = max((lost[0] + split * lost[1]) / speeds[0], (lost[2] + (1 - split) * lost[1]) / speeds[1])
    assert bound_s is not None and takes_s >= bound_s * (1 - 1e-9)
