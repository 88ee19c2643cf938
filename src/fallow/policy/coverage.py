"""How well the parts of a model are covered by what devices hold: array kernels over whole cells at once. Pure.

A model is cut at its cut points into *parts* of `work[part]` layers each. A device of `speed` layers a second holds a
*span*, the parts `first` to `last` (not included), and may be used for any run of them. Every array's leading axis is
the cell, so that the fast simulator steps thousands of cells with the functions that placement uses for one.

State of a cell: `mass[first, last - 1]`, the speed of all devices that hold exactly that span, and `count`, their
number, in the same shape. Everything else follows from the two.

- `coverage`: tokens a second of a part when every device spreads its speed evenly over its span. Its minimum is a
  throughput that is reached without any further thought; flat coverage is the optimum.
- `bottleneck`: the throughput when devices spread their speed as well as possible (`flow.py`), and the parts that hold
  it back.
- `prices`, `thinnest_start`: where a joining device is worth most. `roof`: what no placement can exceed.

It knows nothing of memory, trust or downloads: those reach it as `reach` (how far a device can go from each part) and
`worth` (what remains of it at each). It does not place; `placement_spans.py` does.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fallow.policy.flow import Throughput, throughput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOWHERE: Final = -1
"""The start of a device that can hold nothing."""

PRICE_POWER: Final = 4
"""How steeply a part's price falls with its coverage: with 1, devices drift to middling parts; without bound, only the
thinnest part counts."""
COVERAGE_FLOOR: Final = 1e-3
"""Of the mean; keeps the price of an uncovered part finite."""
COPY_PRICE: Final = 1e14
"""A missing copy is worth more than any thinness: (1 / COVERAGE_FLOOR) ** PRICE_POWER, and then some."""

ROOF_ROUNDS_MAX: Final = 64
ROOF_TOLERANCE: Final = 1e-6


def empty_mass(cells: int, parts: int) -> Floats:
    """The mass of cells without devices, `[cells, parts, parts]`. Their count is the same array."""
    return np.zeros((cells, parts, parts))


def add_spans(mass: Floats, count: Floats, cell: Ints, first: Ints, last: Ints, speed: Floats, sign: int = 1) -> None:
    """Book devices into (`sign` 1) or out of (-1) `mass` and `count`, in place. All arrays are `[devices]`; several
    may belong to one cell. Devices that hold nothing (`last <= first`) are passed over."""
    held = last > first
    where = (cell[held], first[held], last[held] - 1)
    np.add.at(mass, where, sign * speed[held])
    np.add.at(count, where, float(sign))


def coverage(mass: Floats, work: Floats) -> Floats:
    """Tokens a second of each part, `[cells, parts]`, when every device spreads its speed evenly over its span."""
    edges = np.concatenate(([0.0], np.cumsum(work)))
    span_work = edges[None, 1:] - edges[:-1, None]
    return _touching(np.where(span_work > 0, mass / np.where(span_work > 0, span_work, 1.0), 0.0))


def holders(count: Floats) -> Floats:
    """How many devices hold each part, `[cells, parts]`."""
    return _touching(count)


def _touching(by_span: Floats) -> Floats:
    """For each part, the sum over the spans that contain it: first <= part <= last - 1."""
    starts = np.cumsum(by_span, axis=-2)
    ends = np.cumsum(starts[..., ::-1], axis=-1)[..., ::-1]
    return np.diagonal(ends, axis1=-2, axis2=-1).copy()


def reach_by_width(width: Ints, parts: int) -> Ints:
    """Where a device that holds any `width[cells]` parts comes to from each part, `[cells, parts]`."""
    return np.asarray(np.minimum(np.arange(parts) + width[:, None], parts), np.int64)


def reach_by_room(size: Floats, room: Floats) -> Ints:
    """Where a device with `room[cells]` comes to from each part, when the parts take `size` of it (bytes, or anything
    that adds up; `[parts]`, or `[cells, parts]`). A part that does not fit alone has itself as its reach."""
    parts = size.shape[-1]
    sizes = np.broadcast_to(size, (len(room), parts))
    edges = np.concatenate((np.zeros((len(room), 1)), np.cumsum(sizes, axis=-1)), axis=-1)
    fits = edges[:, None, 1:] - edges[:, :-1, None] <= room[:, None, None]
    ahead = np.triu(np.ones((parts, parts), dtype=bool))
    return np.asarray(np.arange(parts) + (fits & ahead).sum(axis=-1), np.int64)


def widest(reach: Ints) -> NDArray[np.bool_]:
    """The starts whose span is no part of another one's, `[cells, parts]`. A wider span is never worse: the device's
    speed goes where it is needed in it."""
    before = np.concatenate((np.full((len(reach), 1), -1), reach[:, :-1]), axis=1)
    return np.asarray((reach > np.arange(reach.shape[-1])) & (reach > before))


def prices(covered: Floats, held: Floats, copies: int) -> Floats:
    """What a token a second more is worth at each part, `[cells, parts]`, from its coverage and number of holders:
    first copies before second ones, missing copies before thin parts, the thinner the dearer."""
    floor = COVERAGE_FLOOR * covered.mean(axis=-1, keepdims=True) + np.finfo(float).tiny
    thinness = (floor / (covered + floor)) ** PRICE_POWER
    missing = copies - np.minimum(np.round(held), copies)
    return np.asarray(thinness * COPY_PRICE**missing)


def thinnest_start(price: Floats, reach: Ints, work: Floats, worth: Floats | None = None) -> Ints:
    """Where a device joins, `[cells]`, one device a cell: at the start of the span over which its speed, evenly spread,
    earns most at `price[cells, parts]`. The first of equals. `NOWHERE` for a device that can hold nothing.

    `reach[cells, parts]`: how far it comes from each part. `worth[cells, parts]`: a factor for each start, for example
    the share of its stay that downloading leaves; 1 when not given.
    """
    starts = np.arange(price.shape[-1])
    earned = np.concatenate((np.zeros((len(price), 1)), np.cumsum(price * work, axis=-1)), axis=-1)
    edges = np.concatenate(([0.0], np.cumsum(work)))
    span_work = edges[reach] - edges[starts]
    value = (np.take_along_axis(earned, reach, axis=-1) - earned[:, :-1]) / np.maximum(span_work, np.finfo(float).tiny)
    if worth is not None:
        value = value * worth
    value = np.where(widest(reach), value, -1.0)
    best = np.argmax(value, axis=-1)
    can = np.take_along_axis(value, best[:, None], axis=-1)[:, 0] >= 0
    return np.asarray(np.where(can, best, NOWHERE), np.int64)


def bottleneck(mass: Floats, work: Floats) -> Throughput:
    """The most tokens a second that cells can serve, and the parts that hold each back: `flow.throughput`, which is
    exact, from the mass. A device that cannot shift its speed between parts is booked as one on each part."""
    cells, parts = mass.shape[0], mass.shape[-1]
    inside = np.zeros((cells, parts + 1, parts + 1))
    inside[:, :-1, 1:] = np.cumsum(np.cumsum(mass[:, ::-1], axis=-2)[:, ::-1], axis=-1)
    return throughput(inside, work)


def roof(speed: Floats, span_work_max: Floats, work: Floats) -> float:
    """What no placement of these devices (`[devices]`) can exceed, in tokens a second: all their speed by all the work,
    less what a device cannot bring to bear because its widest span, of `span_work_max` layers, is too narrow for it.

    The greatest f with sum(min(speed, f * span_work_max)) = f * work; the left side is concave, so that the iteration
    from above falls to it.
    """
    flow = float(speed.sum() / work.sum())
    for _ in range(ROOF_ROUNDS_MAX):
        lower = float(np.minimum(speed, flow * span_work_max).sum() / work.sum())
        if lower >= flow * (1 - ROOF_TOLERANCE):
            break
        flow = lower
    return flow
