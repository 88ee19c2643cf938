"""How many rows a second a placement can serve at most. Pure, exact, vectorised.

A model is a row of *parts*; a row of activations needs `weights[k]` layers of work in part `k`. A device works off
`rate` layers a second, and a row may use any run of the parts that it holds. The most rows a second, F, is a
transportation problem: maximise F where for every part k the work done on it is F * weights[k], no device does more
than its rate, and no device works on a part that it does not hold.

Rules
- By max-flow min-cut (Hall's condition, weighted), F is the least, over all sets S of parts, of the rates of the
  devices that hold something of S, divided by the work of S. The set that attains it is the *bottleneck*: only more
  rate on its parts raises F.
- Devices that hold one contiguous span each: those that hold nothing of S have their span inside a gap of S, so that
  F = min over disjoint gaps of (all rates - rates inside the gaps) / (all work - work of the gaps). Dinkelbach's method
  (1967) for the ratio, and for the inner minimum a dynamic programme over part edges. It vectorises over leading axes:
  a simulator asks for thousands of cells at once.
- Devices that hold any sets of parts: all 2^parts sets, by subset sums. For at most `SETS_PARTS_MAX` parts.

Which chains make up such a flow is `routing_flow.py`'s matter; where spans should go is placement's.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DINKELBACH_ROUNDS_MAX = 64
"""Rounds after which the best ratio so far is given. Convergence is superlinear: 3 to 6 rounds are usual."""
RELATIVE_TOLERANCE = 1e-12
SETS_PARTS_MAX = 16


class Throughput(NamedTuple):
    """What a placement can serve, and what holds it down."""

    rows_per_s: Floats
    """Shape `[...]`. 0 where a part is held by nobody."""
    bottleneck: Bools
    """Shape `[..., parts]`: the parts whose holders are all fully used at that rate."""


def inside_rates(first: ArrayLike, last: ArrayLike, rate: ArrayLike, parts: int) -> Floats:
    """For every gap [a, b) of part edges, the rates of the devices whose whole span lies in it.

    `first`, `last`, `rate`: `[..., devices]`, span edges as part indices (half-open) and layers a second. A device with
    an empty span or rate 0 counts nowhere. Gives `[..., parts + 1, parts + 1]`, indexed by a and b; 0 where a >= b.
    """
    start, end = np.broadcast_arrays(np.asarray(first, np.int64), np.asarray(last, np.int64))
    rates = np.where(start < end, np.broadcast_to(np.asarray(rate, np.float64), start.shape), 0.0)
    shape = start.shape[:-1]
    side = parts + 1
    cells = int(np.prod(shape, dtype=np.int64))
    slot = (start * side + end).reshape(cells, -1) + np.arange(cells)[:, None] * side * side
    counted = np.bincount(slot.ravel(), weights=rates.ravel(), minlength=cells * side * side)
    table = counted.reshape(*shape, side, side)
    from_a = np.flip(np.cumsum(np.flip(table, -2), axis=-2), -2)
    return np.asarray(np.cumsum(from_a, axis=-1), np.float64)


def throughput(inside: ArrayLike, weights: ArrayLike) -> Throughput:
    """The most rows a second: `inside[..., parts + 1, parts + 1]` from `inside_rates`, `weights[parts]` in layers."""
    table = np.asarray(inside, np.float64)
    work = np.asarray(weights, np.float64)
    shape, parts = table.shape[:-2], len(work)
    table = table.reshape(-1, parts + 1, parts + 1)
    total = table[:, 0, parts]
    rows = total / work.sum()
    tight = np.ones((len(table), parts), np.bool_)
    for _ in range(DINKELBACH_ROUNDS_MAX):
        rates, layers, chosen = _worst_set(table, work, rows)
        better = rates - rows * layers < -RELATIVE_TOLERANCE * np.maximum(total, 1e-300)
        if not better.any():
            break
        rows = np.where(better, rates / np.where(layers > 0, layers, 1.0), rows)
        tight = np.where(better[:, None], chosen, tight)
    return Throughput(rows.reshape(shape), tight.reshape(*shape, parts))


def throughput_of_spans(first: ArrayLike, last: ArrayLike, rate: ArrayLike, weights: ArrayLike) -> Throughput:
    """The most rows a second of devices with one span each: `first`, `last`, `rate` `[..., devices]`."""
    return throughput(inside_rates(first, last, rate, len(np.asarray(weights))), weights)


def _worst_set(inside: Floats, work: Floats, rows: Floats) -> tuple[Floats, Floats, Bools]:
    """The set S with the least (rates that touch S) - rows * (work of S): those rates, that work, and S.

    A prefix that ends at edge b is best ended either by a part of S or by a gap [a, b). Two gaps that touch are never
    better than the one gap that joins them, and the empty set gives 0.
    """
    cells, parts = len(inside), len(work)
    edges = np.concatenate(([0.0], np.cumsum(work)))
    at = np.arange(cells)
    gain = np.zeros((cells, parts + 1))
    came_from = np.zeros((cells, parts + 1), np.int64)
    for b in range(1, parts + 1):
        options = gain[:, :b] + inside[:, :b, b] - rows[:, None] * (edges[b] - edges[:b])
        best = np.argmax(options, axis=1)
        by_gap = options[at, best]
        by_part = gain[:, b - 1]
        gain[:, b] = np.maximum(by_gap, by_part)
        came_from[:, b] = np.where(by_gap > by_part, best, -1)
    return _followed_back(inside, work, came_from)


def _followed_back(inside: Floats, work: Floats, came_from: NDArray[np.int64]) -> tuple[Floats, Floats, Bools]:
    cells, parts = len(inside), len(work)
    at = np.arange(cells)
    chosen = np.zeros((cells, parts), np.bool_)
    rates = inside[:, 0, parts].copy()
    edge = np.full(cells, parts)
    for b in range(parts, 0, -1):
        here = edge == b
        start = came_from[:, b]
        in_set = here & (start < 0)
        in_gap = here & (start >= 0)
        chosen[:, b - 1] = in_set
        rates -= np.where(in_gap, inside[at, np.maximum(start, 0), b], 0.0)
        edge = np.where(in_set, b - 1, np.where(in_gap, start, edge))
    return np.maximum(rates, 0.0), np.asarray(chosen @ work, np.float64), chosen


def throughput_of_sets(held: ArrayLike, rate: ArrayLike, weights: ArrayLike) -> Throughput:
    """The same for devices that hold any parts: `held` bool `[devices, parts]`, `rate` `[devices]`.

    Raises `ValueError` for more than `SETS_PARTS_MAX` parts.
    """
    holds = np.asarray(held, np.bool_)
    work = np.asarray(weights, np.float64)
    parts = len(work)
    if parts > SETS_PARTS_MAX:
        raise ValueError(f"expected at most {SETS_PARTS_MAX} parts, got {parts}")
    bits = 1 << np.arange(parts, dtype=np.int64)
    rates = np.where(holds.any(axis=1), np.asarray(rate, np.float64), 0.0)
    within = np.bincount(holds.astype(np.int64) @ bits, weights=rates, minlength=1 << parts)
    for part in range(parts):
        pairs = within.reshape(-1, 2, 1 << part)
        pairs[:, 1] += pairs[:, 0]
    sets = np.arange(1, 1 << parts, dtype=np.int64)
    members = (sets[:, None] & bits) != 0
    touched = within[-1] - within[(1 << parts) - 1 - sets]
    ratio = np.maximum(touched, 0.0) / (members @ work)
    best = int(np.argmin(ratio))
    return Throughput(np.asarray(ratio[best], np.float64), members[best])
