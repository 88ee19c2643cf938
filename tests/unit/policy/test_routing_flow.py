"""The flow with the fewest hops against a linear programme in HiGHS; it is feasible, and its prices are a dual."""

import highspy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fallow.domain.model import Span
from fallow.policy.flow import throughput_of_sets
from fallow.policy.routing_flow import HopFlow, Kind, fewest_hops, runs_of
from tests.unit.policy.routing_world import PARTS, WORK


@st.composite
def kinds_drawn(draw: st.DrawFn) -> tuple[list[Kind], float]:
    """Kinds, gaps in their pieces included, and what they can serve at most."""
    held = draw(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=2, max_size=8, unique_by=tuple))
    rates = draw(st.lists(st.sampled_from([10.0, 35.0, 100.0]), min_size=len(held), max_size=len(held)))
    table = [[part in mine for part in range(len(PARTS))] for mine in held]
    most = float(throughput_of_sets(table, rates, [2.0] * 5 + [4.0]).rows_per_s)
    kinds = [Kind(tuple(PARTS[part] for part in sorted(mine)), rate) for mine, rate in zip(held, rates, strict=True)]
    return kinds, most


def hops_by_lp(kinds: list[Kind], rows_per_s: float) -> float:
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    arcs = [(kind, run, solver.addVariable(lb=0)) for kind in kinds for run in runs_of(kind.pieces, 10**6) or []]
    for edge in range(0, 12, 2):
        out = sum(share for _, run, share in arcs if run.first == edge)
        into = sum(share for _, run, share in arcs if run.last == edge)
        solver.addConstr(out - into == (1.0 if edge == 0 else 0.0))
    for kind in kinds:
        mine = [(run, share) for other, run, share in arcs if other is kind]
        solver.addConstr(sum(sum(WORK[run.first : run.last]) * share for run, share in mine) <= kind.cap / rows_per_s)
    solver.minimize(sum(share for _, _, share in arcs))
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(solver.getInfo().objective_function_value)


def work_of(flow: HopFlow) -> np.ndarray:
    done = np.concatenate(([0.0], np.cumsum(WORK)))[np.array(flow.edges)]
    return np.asarray(done[flow.end] - done[flow.start])


@settings(max_examples=80, deadline=None)
@given(drawn=kinds_drawn(), load=st.sampled_from([0.3, 0.8, 0.97]))
def test_the_flow_is_feasible_and_no_other_has_fewer_hops(drawn: tuple[list[Kind], float], load: float) -> None:
    kinds, most = drawn
    assume(most > 0)
    flow = fewest_hops(kinds, WORK, most * load)
    assert flow.unserved < 1e-4
    for kind_index, kind in enumerate(kinds):
        used = (work_of(flow) * flow.share)[flow.kind == kind_index].sum() * most * load
        assert used <= kind.cap * (1 + 1e-3)
    for edge in range(len(flow.edges)):
        balance = flow.share[flow.start == edge].sum() - flow.share[flow.end == edge].sum()
        wanted = 1.0 if edge == 0 else -1.0 if edge == len(flow.edges) - 1 else 0.0
        assert balance == pytest.approx(wanted, abs=2e-3)
    assert flow.hops_mean == pytest.approx(hops_by_lp(kinds, most * load), rel=3e-3)


@settings(max_examples=60, deadline=None)
@given(drawn=kinds_drawn())
def test_all_chains_of_the_flow_cost_the_same_with_its_prices(drawn: tuple[list[Kind], float]) -> None:
    """Complementary slackness: hops and priced work together; otherwise the choice would bend the flow."""
    kinds, most = drawn
    assume(most > 0)
    flow = fewest_hops(kinds, WORK, most * 0.8)
    cost = 1.0 + flow.price[flow.kind] * work_of(flow)
    used = flow.share > 1e-2
    least = np.full(len(flow.edges), np.inf)
    most_dear = np.full(len(flow.edges), -np.inf)
    least[0] = most_dear[0] = 0.0
    for arc in np.lexsort((flow.end, flow.start)):
        if used[arc] and np.isfinite(least[flow.start[arc]]):
            start, end = flow.start[arc], flow.end[arc]
            least[end] = min(least[end], least[start] + cost[arc])
            most_dear[end] = max(most_dear[end], most_dear[start] + cost[arc])
    if np.isfinite(least[-1]):
        assert most_dear[-1] == pytest.approx(least[-1], rel=2e-2)


def test_a_load_beyond_what_can_be_served_is_told() -> None:
    flow = fewest_hops([Kind((Span(0, 12),), 14.0)], WORK, 2.0)
    assert flow.unserved == pytest.approx(0.5, abs=1e-3)
    assert flow.hops_mean == pytest.approx(1.0, abs=1e-3)


def test_long_runs_go_to_whoever_has_them_until_they_are_full() -> None:
    whole, halves = Kind(PARTS, 14.0), (Kind(PARTS[:3], 100.0), Kind(PARTS[3:], 100.0))
    assert fewest_hops([whole, *halves], WORK, 1.0).hops_mean == pytest.approx(1.0, abs=1e-3)
    assert fewest_hops([whole, *halves], WORK, 2.0).hops_mean == pytest.approx(1.5, abs=1e-3)


def test_more_runs_than_the_bound_are_not_listed() -> None:
    assert runs_of(PARTS, 20) is None
    assert len(runs_of(PARTS, 21) or ()) == 21
