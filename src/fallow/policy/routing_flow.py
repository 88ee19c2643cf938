"""Which hops carry a given load with the fewest hops: a linear programme over kinds of devices. Pure.

Devices that hold the same pieces are interchangeable for a flow, so they are one *kind* with the sum of their rates,
and the programme does not grow with the fleet: at most 78 kinds of contiguous spans over 12 parts. An *arc* is a kind
and a run of its pieces. The programme minimises the arcs that a session uses, where

- what enters an edge between pieces leaves it again, and one unit goes from the first edge to the last;
- no kind works more than its cap, which is set below its rate to leave room for chance;
- what cannot be carried at all is paid for dearly and told as `unserved`.

It is solved by Mehrotra's predictor-corrector interior point method (SIAM J. Optim. 1992), which ends near the centre
of the best face: load is spread over equal choices rather than heaped on one of them, as a vertex would have it.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.domain.model import Span

KINDS_MAX = 128
ARCS_MAX = 4096
"""Kinds with the least rate are left out beyond either bound: they then serve no sampled chain."""
ROUNDS_MAX = 60
GAP_MAX = 1e-5
"""Relative duality gap at which the programme counts as solved."""
UNSERVED_HOPS = 100.0
SHARE_MIN = 1e-5
"""Arcs that would carry less of the sessions are left out."""
STEP_SHARE = 0.995
RIDGE = 1e-12

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Kind(msgspec.Struct, frozen=True):
    """Devices that hold the same pieces."""

    pieces: tuple[Span, ...]
    """Ascending, in layers."""
    cap: float
    """Layers of work a second that they may be given together."""


class HopFlow(msgspec.Struct, frozen=True, kw_only=True):
    """Arcs that carry the load."""

    edges: tuple[int, ...]
    """Layers at which some arc starts or ends, ascending; the first is 0 and the last the model's layer count."""
    kind: Ints
    """For each arc, the index of its kind."""
    start: Ints
    end: Ints
    """Its edges, as indices into `edges`."""
    share: Floats
    """Which share of the sessions that are served use it, more than 0."""
    unserved: float
    """The share of the load that no arcs could carry."""
    price: Floats
    """For each kind, what a layer of its work is worth in hops: 0 while it has some left. Every chain of the flow costs
    the same, its hops and the price of its work together; chains that waste scarce kinds cost more."""

    @property
    def hops_mean(self) -> float:
        return float(self.share.sum())


class Sparse:
    """A matrix whose columns have `k` entries at most: `rows`, `values` `[k, n]`, entries of one cell added up.

    Not dense, because a threaded matrix product of this size costs ten times the work on a busy machine.
    """

    def __init__(self, height: int, rows: Ints, values: Floats) -> None:
        self.height = height
        self._rows = rows
        self._values = values
        depth = len(rows)
        pairs = [(one, other) for one in range(depth) for other in range(depth)]
        self._cells = np.concatenate([rows[one] * height + rows[other] for one, other in pairs])
        self._products = np.stack([values[one] * values[other] for one, other in pairs])

    def times(self, x: Floats) -> Floats:
        """The product with `x` [n]."""
        found = np.bincount(self._rows.ravel(), weights=(self._values * x).ravel(), minlength=self.height)
        return np.asarray(found, np.float64)

    def transposed_times(self, y: Floats) -> Floats:
        """The transposed matrix's product with `y` [height]."""
        return np.asarray((self._values * y[self._rows]).sum(axis=0), np.float64)

    def normal(self, ratio: Floats) -> Floats:
        """Matrix * diagonal of `ratio` [n] * transposed matrix, with a ridge that keeps it regular."""
        weights = (self._products * ratio).ravel()
        normal = np.bincount(self._cells, weights=weights, minlength=self.height**2)
        square = np.asarray(normal.reshape(self.height, self.height), np.float64)
        square[np.diag_indices_from(square)] += RIDGE * (1.0 + np.diag(square))
        return square


def fewest_hops(kinds: Sequence[Kind], work: Sequence[float], rows_per_s: float) -> HopFlow:
    """The flow that serves `rows_per_s` with the fewest hops. `work`: layers of work of every layer, the head's in the
    last. Raises `ValueError` for a load that is not positive."""
    if not rows_per_s > 0 or not work:
        raise ValueError(f"expected a load above 0 rows a second over 1 layer or more, got {rows_per_s}, {len(work)}")
    edges, kind, start, end = _arcs(kinds, len(work))
    done = np.concatenate(([0.0], np.cumsum(work)))[np.array(edges)]
    arcs = len(kind)
    used = np.unique(kind)
    row_of = np.zeros(len(kinds), np.int64)
    row_of[used] = np.arange(len(used))
    inner = len(edges) - 1
    # Rows: flow at every edge but the last, then work of every kind. Columns: arcs, the unserved share, slack. A column
    # has three entries at most: where it starts, where it ends, whose work it is.
    scale = np.array([max(kinds[index].cap, 1e-9) for index in used]) / rows_per_s
    slack = inner + np.arange(len(used))
    ends_inside = end < inner
    rows = np.zeros((3, arcs + 1 + len(used)), np.int64)
    values = np.zeros(rows.shape)
    rows[:, :arcs] = np.stack((start, np.where(ends_inside, end, 0), inner + row_of[kind]))
    shares = (done[end] - done[start]) / scale[row_of[kind]]
    values[:, :arcs] = np.stack((np.ones(arcs), np.where(ends_inside, -1.0, 0.0), shares))
    values[0, arcs] = 1.0
    rows[0, arcs + 1 :], values[0, arcs + 1 :] = slack, 1.0
    matrix = Sparse(inner + len(used), rows, values)
    right = np.concatenate(([1.0], np.zeros(inner - 1), np.ones(len(used))))
    cost = np.concatenate((np.ones(arcs), [UNSERVED_HOPS], np.zeros(len(used))))
    solution, dual = interior_point(matrix, right, cost)
    price = np.zeros(len(kinds))
    price[used] = np.maximum(-dual[inner:], 0.0) / scale
    unserved = float(np.clip(solution[arcs], 0.0, 1.0))
    share = np.maximum(solution[:arcs], 0.0) / max(1.0 - unserved, SHARE_MIN)
    kept = share > SHARE_MIN
    return HopFlow(
        edges=edges,
        kind=kind[kept],
        start=start[kept],
        end=end[kept],
        share=share[kept],
        unserved=unserved,
        price=price,
    )


def _arcs(kinds: Sequence[Kind], layer_count: int) -> tuple[tuple[int, ...], Ints, Ints, Ints]:
    """Every run of pieces of every kind, within the bounds."""
    chosen: list[tuple[int, int, int]] = []
    ranked = sorted(range(len(kinds)), key=lambda index: (-kinds[index].cap, kinds[index].pieces))
    for index in ranked[:KINDS_MAX]:
        runs = runs_of(kinds[index].pieces, ARCS_MAX - len(chosen))
        chosen += [(index, run.first, run.last) for run in runs or () if run.last <= layer_count]
    edges = sorted({0, layer_count, *(edge for _, first, last in chosen for edge in (first, last))})
    at = {edge: position for position, edge in enumerate(edges)}
    table = np.array([(index, at[first], at[last]) for index, first, last in chosen], np.int64).reshape(-1, 3)
    return tuple(edges), table[:, 0], table[:, 1], table[:, 2]


def runs_of(pieces: Sequence[Span], runs_max: int) -> list[Span] | None:
    """Every run of adjacent pieces, or `None` when there are more than `runs_max`."""
    runs: list[Span] = []
    for index, piece in enumerate(pieces):
        edge = piece.first
        for after in pieces[index:]:
            if after.first != edge:
                break
            edge = after.last
            runs.append(Span(piece.first, edge))
            if len(runs) > runs_max:
                return None
    return runs


def interior_point(matrix: Sparse, right: Floats, cost: Floats) -> tuple[Floats, Floats]:
    """Minimise cost @ x with matrix @ x = right, x >= 0: Mehrotra's method with his starting point.

    `matrix` [m, n] of full row rank with m far below n. Gives x [n] and the dual y [m], at the latest after
    `ROUNDS_MAX` rounds.
    """
    x, y, s = _start(matrix, right, cost)
    for _ in range(ROUNDS_MAX):
        primal = right - matrix.times(x)
        dual = cost - matrix.transposed_times(y) - s
        gap = float(x @ s) / len(x)
        if gap * len(x) <= GAP_MAX * (1.0 + abs(float(cost @ x))) and float(np.abs(primal).max()) <= GAP_MAX:
            break
        ratio = x / s
        normal = matrix.normal(ratio)

        def towards(
            centred: Floats, normal: Floats = normal, ratio: Floats = ratio, primal: Floats = primal,
            dual: Floats = dual, x: Floats = x, s: Floats = s,
        ) -> tuple[Floats, Floats, Floats]:  # fmt: skip
            """Newton's step for x * s = `centred`."""
            rest = (centred - x * s) / s
            step_y = np.asarray(np.linalg.solve(normal, primal + matrix.times(ratio * dual - rest)), np.float64)
            step_s = dual - matrix.transposed_times(step_y)
            return rest - ratio * step_s, step_y, step_s

        ahead_x, _, ahead_s = towards(np.zeros_like(x))
        reach = (x + _longest(x, ahead_x) * ahead_x) @ (s + _longest(s, ahead_s) * ahead_s) / len(x)
        centre = (float(reach) / gap) ** 3 * gap
        step_x, step_y, step_s = towards(centre - ahead_x * ahead_s)
        if not (np.isfinite(step_x).all() and np.isfinite(step_s).all()):
            break
        x = x + STEP_SHARE * _longest(x, step_x) * step_x
        along = STEP_SHARE * _longest(s, step_s)
        y, s = y + along * step_y, s + along * step_s
    return x, y


def _start(matrix: Sparse, right: Floats, cost: Floats) -> tuple[Floats, Floats, Floats]:
    square = matrix.normal(np.ones(len(cost)))
    x = matrix.transposed_times(np.asarray(np.linalg.solve(square, right), np.float64))
    y = np.asarray(np.linalg.solve(square, matrix.times(cost)), np.float64)
    s = cost - matrix.transposed_times(y)
    x = x + max(-1.5 * float(x.min()), 0.0) + 1e-6
    s = s + max(-1.5 * float(s.min()), 0.0) + 1e-6
    product = float(x @ s)
    return x + 0.5 * product / float(s.sum()), y, s + 0.5 * product / float(x.sum())


def _longest(value: Floats, step: Floats) -> float:
    """How far `value` can go along `step`, 1 at most, and stay above 0."""
    falling = step < 0
    return min(1.0, float((-value[falling] / step[falling]).min())) if falling.any() else 1.0
