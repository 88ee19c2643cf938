"""Throughput of drawn placements against a linear programme, and the cases that people ask about."""

import highspy
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.policy.flow import inside_rates, throughput, throughput_of_sets, throughput_of_spans

PARTS = st.integers(1, 7)
RATES = st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0, 1000.0])


def rows_by_lp(held: np.ndarray, rate: np.ndarray, weights: np.ndarray) -> float:
    """Maximise F with sum_i x_ik = F * w_k, sum_k x_ik <= rate_i."""
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    rows = solver.addVariable(lb=0)
    work = {(i, k): solver.addVariable(lb=0) for i, k in zip(*np.nonzero(held), strict=True)}
    for i in range(len(rate)):
        mine = [x for (device, _), x in work.items() if device == i]
        if mine:
            solver.addConstr(sum(mine) <= float(rate[i]))
    for k, weight in enumerate(weights):
        done = [x for (_, part), x in work.items() if part == k]
        solver.addConstr(sum(done) - float(weight) * rows == 0 if done else rows == 0)
    solver.maximize(rows)
    return float(solver.getInfo().objective_function_value)


@st.composite
def spans_drawn(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    parts = draw(PARTS)
    weights = np.array(draw(st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=parts, max_size=parts)))
    spans = draw(st.lists(st.tuples(st.integers(0, parts), st.integers(0, parts), RATES), max_size=9))
    first, last, rate = (np.array([span[i] for span in spans]) for i in range(3))
    return first.astype(int), last.astype(int), rate.astype(float), weights


@settings(max_examples=80, deadline=None)
@given(drawn=spans_drawn())
def test_spans_serve_what_the_linear_programme_serves(drawn: tuple[np.ndarray, ...]) -> None:
    first, last, rate, weights = drawn
    parts = np.arange(len(weights))
    held = (first[:, None] <= parts) & (parts < last[:, None])
    found = throughput_of_spans(first, last, rate, weights)
    expected = rows_by_lp(held, rate, weights)
    np.testing.assert_allclose(found.rows_per_s, expected, rtol=1e-6, atol=1e-7)
    touching = rate[(held & found.bottleneck).any(axis=1)].sum()
    np.testing.assert_allclose(touching / weights[found.bottleneck].sum(), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), parts=PARTS)
def test_any_sets_serve_what_the_linear_programme_serves(data: st.DataObject, parts: int) -> None:
    row = st.tuples(st.lists(st.booleans(), min_size=parts, max_size=parts), RATES)
    devices = data.draw(st.lists(row, min_size=1, max_size=7))
    weights = np.array(data.draw(st.lists(st.sampled_from([1.0, 3.0]), min_size=parts, max_size=parts)))
    held = np.array([parts_held for parts_held, _ in devices])
    rate = np.array([rate for _, rate in devices])
    found = throughput_of_sets(held, rate, weights)
    np.testing.assert_allclose(found.rows_per_s, rows_by_lp(held, rate, weights), rtol=1e-6, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_many_cells_at_once_are_as_each_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts, cells, devices = 12, 5, 20
    weights = draw.uniform(0.5, 4.0, parts)
    first = draw.integers(0, parts, (cells, devices))
    last = np.minimum(first + draw.integers(0, 8, (cells, devices)), parts)
    rate = draw.exponential(1.0, (cells, devices))
    together = throughput(inside_rates(first, last, rate, parts), weights)
    held = (first[..., None] <= np.arange(parts)) & (np.arange(parts) < last[..., None])
    for cell in range(cells):
        alone = throughput_of_sets(held[cell], rate[cell], weights)
        np.testing.assert_allclose(together.rows_per_s[cell], alone.rows_per_s, rtol=1e-9, atol=1e-12)


def test_a_part_that_nobody_holds_is_the_bottleneck() -> None:
    found = throughput_of_spans([0, 2], [1, 3], [5.0, 5.0], [1.0, 1.0, 1.0])
    assert found.rows_per_s == 0
    assert found.bottleneck.tolist() == [False, True, False]


def test_whole_copies_serve_the_sum_of_rates_over_the_work() -> None:
    found = throughput_of_spans([0, 0], [3, 3], [6.0, 3.0], [1.0, 1.0, 1.0])
    assert found.rows_per_s == 3.0
    assert found.bottleneck.all()


def test_nobody_serves_nothing() -> None:
    assert throughput_of_spans([], [], [], [1.0, 2.0]).rows_per_s == 0
