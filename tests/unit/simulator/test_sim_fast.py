"""The fast mode: its queueing model has the right shape, its placement covers, its runs do not depend on processes."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.admission import AdmissionRules
from fallow.policy.coverage import bottleneck, holders
from fallow.policy.placement_inputs import PlacementRules
from fallow.simulator.fast import run_fast
from fallow.simulator.fast_block import Plan, simulate
from fallow.simulator.fast_figures import CLASSES, quantile, record
from fallow.simulator.fast_fleet import BLOCK_CELLS, draw_figures, draw_fleet
from fallow.simulator.fast_load import LOAD_MAX, TAIL_SHARE, Chains, answer, call_stretch, demand_of, gap_s, load_max
from fallow.simulator.fast_place import Placed, hops_of
from fallow.simulator.life_history import population_tables
from fallow.simulator.population import draw_devices
from fallow.simulator.results import RunResult
from fallow.simulator.scenario import Detailed, Event, EventKind, Habit, Population, Scenario, Traffic
from fallow.simulator.streams import Streams

RULES = AdmissionRules()
DEMAND = demand_of(Traffic(), 36.4, 32.0, 2048)


def chains(capacity: float = 500.0, hops: float = 2.0, kv_sessions: float = 1e6) -> Chains:
    figures = (capacity, 0.004, hops, 0.02, 0.01, 0.003, kv_sessions)
    return Chains(*(np.array([figure]) for figure in figures))


def people(**changes: object) -> Population:
    base = Population(
        name="people", habit=Habit.MEMORYLESS, count=200, memory_bytes=3 << 30, median_up_s=3600.0, median_down_s=1800.0
    )
    return msgspec.structs.replace(base, **changes)


def scenario(*events: Event, population: Population | None = None, **changes: object) -> Scenario:
    base = Scenario(
        name="small",
        title="Small",
        about="For tests.",
        hours=1.0,
        start_hour_of_week=34.0,
        cell_devices=50,
        traffic=Traffic(sessions_per_hour_per_device=10.0),
        populations=(population or people(),),
        events=events,
    )
    return msgspec.structs.replace(base, **changes)


def run(chosen: Scenario, seed: int = 1, processes: int = 1) -> RunResult:
    return run_fast(chosen, seed, processes=processes)


# --- the model of queues ------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, LOAD_MAX), min_size=2, max_size=8))
def test_tokens_come_slower_the_more_is_asked(loads: list[float]) -> None:
    ordered = np.sort(np.array(loads))
    assert np.all(np.diff(call_stretch(ordered)) >= -1e-12)
    assert call_stretch(np.zeros(1))[0] == pytest.approx(1.0)


@given(st.floats(1.0, 5000.0), st.floats(0.0, 500.0), st.floats(0.0, 100.0), st.floats(1.0, 6.0), st.floats(1, 1000))
def test_every_session_begins_waits_or_is_refused(
    capacity: float, arrived: float, waiting: float, hops: float, kv: float
) -> None:
    there = chains(capacity, hops, kv)
    found = answer(there, DEMAND, np.array([arrived]), np.array([waiting]), 60.0, RULES)
    assert found.begun[0] + found.refused[0] + found.waiting[0] == pytest.approx(arrived + waiting)
    assert min(found.begun[0], found.refused[0], found.waiting[0]) >= -1e-9
    assert found.running[0] <= kv * 1.001
    idle = gap_s(there, DEMAND, np.zeros(1))[0]
    assert found.gap_s[0] <= RULES.stretch * idle * 1.001
    rate = found.begun[0] / 60.0
    assert found.waiting[0] <= RULES.wait_max_s * max(rate, 1e-12) + 1e-9


def test_overload_is_refused_and_what_was_accepted_is_served() -> None:
    there = chains()
    most = load_max(there, DEMAND, RULES)[0] * 500.0 / DEMAND.work_tokens * 60
    found = answer(there, DEMAND, np.array([5 * most]), np.zeros(1), 60.0, RULES)
    assert found.begun[0] == pytest.approx(most)
    assert found.refused[0] > 3 * most
    assert np.isfinite(found.gap_s[0])


def test_a_cell_without_a_chain_refuses_everybody_and_keeps_nobody_waiting() -> None:
    found = answer(chains(capacity=0.0), DEMAND, np.array([7.0]), np.array([2.0]), 60.0, RULES)
    assert (found.begun[0], found.refused[0], found.waiting[0]) == (0.0, 9.0, 0.0)


def test_fewer_hops_and_faster_layers_make_tokens_come_sooner() -> None:
    load = np.array([0.3])
    base = gap_s(chains(), DEMAND, load)[0]
    assert gap_s(chains(hops=1.0), DEMAND, load)[0] < base
    assert gap_s(chains()._replace(layer_s=np.array([0.002])), DEMAND, load)[0] < base


# --- placement ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=8))
def test_hops_are_never_fewer_than_a_chain_needs(spans: list[tuple[int, int]]) -> None:
    mass = np.zeros((1, 6, 6))
    for first, length in spans:
        mass[0, first, min(first + length, 6) - 1] += 1.0
    held = {(a, b + 1) for a, b in zip(*np.nonzero(mass[0]), strict=True)}
    at, needed = 0, 0
    while at < 6:
        reach = max((b for a, b in held if a <= at), default=at)
        if reach <= at:
            return
        at, needed = reach, needed + 1
    assert hops_of(mass, np.ones(6))[0] >= needed


def placed_block(chosen: Scenario) -> tuple[Placed, np.ndarray]:
    fleet = draw_fleet(chosen, 1, chosen.devices, 3600.0)
    block = fleet.blocks[0]
    table = population_tables(fleet.scenario.populations, 1, chosen.start_hour_of_week)
    figures = draw_figures(fleet.scenario, block, 1)
    return Placed(block, figures, chosen.model, table, PlacementRules()), block.initially


def test_a_fleet_is_covered_twice_and_serves_most_of_its_bound() -> None:
    placed, here = placed_block(scenario())
    who = np.flatnonzero(here)
    placed.join(who, 34.0, np.full(len(who), 3600.0), np.full(len(who), np.inf))
    placed.replan(0.0, here)
    placed.furnish(np.random.default_rng(0), here)
    assert holders(placed.count).min() >= 2
    served = bottleneck(placed.ready, placed.parts.work).rows_per_s
    assert np.all(served >= 0.9 * placed.ready.sum(axis=(1, 2)) / placed.parts.work.sum())
    held = placed.edges_bytes[placed.last] - placed.edges_bytes[placed.first]
    assert np.all(held <= placed.weights_room + 1)


def test_a_joiner_serves_only_after_it_has_fetched_its_span() -> None:
    placed, here = placed_block(scenario())
    who = np.flatnonzero(here)
    placed.join(who, 34.0, np.full(len(who), 3600.0), np.full(len(who), np.inf))
    assert placed.ready.sum() == 0
    placed.advance(10.0)
    assert placed.ready.sum() == 0
    assert placed.bytes_moved > 0
    for _ in range(200):
        placed.advance(60.0)
    assert not placed.fetching.any()
    assert placed.ready_count.sum() == (placed.last > placed.first).sum()


def test_books_are_what_the_devices_hold_after_much_coming_and_going() -> None:
    placed, here = placed_block(scenario())
    here = here.copy()
    rng = np.random.default_rng(5)
    placed.join(np.flatnonzero(here), 34.0, np.full(int(here.sum()), 60.0), np.full(int(here.sum()), np.inf))
    for step in range(20):
        turned = rng.choice(len(here), 25, replace=False)
        placed.leave(turned[here[turned]])
        came = turned[~here[turned]]
        here[turned] ^= True
        placed.join(came, 34.5, np.zeros(len(came)), np.full(len(came), np.inf))
        placed.replan(step * 60.0, here)
        placed.advance(60.0)
    mass, count, ready = placed.mass.copy(), placed.count.copy(), placed.ready.copy()
    placed.slow_down(placed.slowdown)
    np.testing.assert_allclose(mass, placed.mass, atol=1e-3)
    np.testing.assert_allclose(count, placed.count, atol=1e-6)
    np.testing.assert_allclose(ready, placed.ready, atol=1e-3)
    assert not placed.last[~here].any()


# --- whole runs -------------------------------------------------------------------------------------------


def test_devices_are_those_of_the_detailed_mode() -> None:
    chosen = scenario(detailed=Detailed(devices=200))
    fleet = draw_fleet(chosen, 3, 200, 3600.0)
    assert len(fleet.blocks) == 1
    figures = draw_figures(fleet.scenario, fleet.blocks[0], 3)
    other = draw_devices(chosen, Streams(3), 3600.0)
    ours = sorted(zip(figures.layer_s.tolist(), figures.memory_bytes.tolist(), strict=True))
    assert ours == sorted((device.layer_s, float(device.memory_bytes)) for device, _ in other)
    at_s = 600.0
    here = sum(any(stay.from_s <= at_s < stay.until_s for stay in device.stays) for device, _ in other)
    sample = run(chosen, seed=3).samples
    assert abs(sample[int(at_s / 60)].devices_available - here) <= 2


def test_the_number_of_processes_changes_nothing() -> None:
    chosen = scenario(population=people(count=(BLOCK_CELLS + 12) * 10), cell_devices=10, hours=0.1)
    one, two = run(chosen, processes=1), run(chosen, processes=2)
    assert one.cells == BLOCK_CELLS + 12
    assert one.event_hash == two.event_hash
    assert (one.totals, one.samples, one.events) == (two.totals, two.samples, two.events)


def test_a_seed_is_a_run() -> None:
    chosen = scenario(hours=0.3)
    assert run(chosen, 1).event_hash == run(chosen, 1).event_hash != run(chosen, 2).event_hash


def test_sums_of_samples_are_the_totals() -> None:
    found = run(scenario())
    for name in ("sessions_started", "sessions_finished", "sessions_refused", "sessions_failed", "orders"):
        assert sum(getattr(sample, name) for sample in found.samples) == getattr(found.totals, name)
    assert found.totals.sessions_finished + found.totals.sessions_refused == pytest.approx(
        found.totals.sessions_started, abs=200
    )
    assert found.totals.sessions_altered is None


def test_an_outage_takes_capacity_and_gives_it_back() -> None:
    quiet = people(habit=Habit.ALWAYS)
    found = run(scenario(Event(kind=EventKind.OUTAGE, at_s=1200, duration_s=600), population=quiet))
    levels = [sample.devices_available for sample in found.samples]
    assert levels[10] > 150
    assert levels[22] == 0
    assert found.samples[22].capacity_tokens_per_s == 0
    assert found.samples[25].sessions_refused > 0
    assert levels[40] > 150
    assert found.samples[50].capacity_tokens_per_s == pytest.approx(found.samples[10].capacity_tokens_per_s, rel=0.1)
    assert found.totals.sessions_failed > 0
    assert len(found.marks) == 1


def test_a_flash_crowd_asks_more_and_slow_rot_serves_less() -> None:
    quiet = people(habit=Habit.ALWAYS)
    crowd = run(scenario(Event(kind=EventKind.FLASH_CROWD, at_s=1200, duration_s=600, factor=5.0), population=quiet))
    before, during = crowd.samples[10], crowd.samples[24]
    assert during.sessions_started > 3 * before.sessions_started
    rot = run(
        scenario(Event(kind=EventKind.SLOW_ROT, at_s=600, duration_s=1800, share=0.5, factor=4.0), population=quiet)
    )
    assert rot.samples[55].capacity_tokens_per_s < 0.75 * rot.samples[5].capacity_tokens_per_s
    assert rot.samples[55].inter_token_p50_s > rot.samples[5].inter_token_p50_s


def test_a_block_is_a_function_of_itself() -> None:
    chosen = scenario(hours=0.2)
    fleet = draw_fleet(chosen, 1, 200, 720.0)
    table = population_tables(fleet.scenario.populations, 1, chosen.start_hour_of_week)
    plan = Plan(720.0, 60.0, 60.0)
    digests = {simulate(fleet.blocks[0], fleet.scenario, 1, plan, table)[1] for _ in range(2)}
    assert len(digests) == 1


# --- histograms -------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.floats(2e-3, 500.0), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_of_a_histogram_is_that_of_its_values(values: list[float], share: float) -> None:
    histogram = np.zeros(CLASSES)
    record(histogram, np.array(values), np.ones(len(values)))
    found = quantile(histogram, share)
    exact = sorted(values)[max(0, int(np.ceil(share * len(values) - 1e-9)) - 1)]
    assert found == pytest.approx(exact, rel=0.04)


def test_shares_of_the_tail_are_a_whole() -> None:
    assert TAIL_SHARE.sum() == pytest.approx(1.0)
    assert (TAIL_SHARE > 0).all()
