"""Damped local search: which devices should hold another span so that a model serves more tokens a second. Pure.

Rules
- Only a device that holds nothing of the tight parts can help by moving to them (`flow.py`); of those, the ones whose
  speed is nearest to what is lacking are tried, at the starts where they would earn most.
- Devices that were placed a moment ago, and have fetched nothing yet, move for any gain.
- Others move together or not at all: only when the throughput rises clearly (`gain_min`), and the tokens won while the
  movers are expected to stay outnumber those lost while they download. A move that costs a part a copy is none.
"""

from typing import NamedTuple

import numpy as np

from fallow.policy import coverage
from fallow.policy.coverage import Floats, Ints
from fallow.policy.placement_books import Book, Books, Bools, deficits, ends

FREE_MOVES_MAX = 64
DAMPED_MOVES_MAX = 16
"""In one go; a second go may follow."""
POOL_MAX = 24
STARTS_MAX = 4
"""Devices, and starts of each, that a step looks at."""
PAIRS_MAX = 8
"""First moves of which a step looks for a second one."""
GAIN_STEP = 1e-6
NEAR_ROOF = 0.998


class _Step(NamedTuple):
    """A device takes another span, and what the model serves then."""

    node: int
    first: int
    last: int
    flow: float
    value: float
    """What it gains, less the share of the device's stay that it would download for."""
    lacks: float
    """What would be missing of copies."""


def improve(books: Books, book: Book, fresh: Bools) -> bool:
    """Move devices of one model, `fresh` ones freely. Whether one that is not fresh was moved, or cut anew."""
    holds, flow = book.holds, _flow(books, book)
    enough = flow * (1 + (1 - NEAR_ROOF if fresh.any() else books.rules.gain_min))
    if enough >= books.speed_for(book)[holds].sum() / book.parts.work.sum():
        return False
    reach = books.reach(book, np.arange(len(books.nodes)))
    edges = np.concatenate(([0.0], np.cumsum(book.parts.work)))
    widest = np.maximum((edges[reach] - edges[:-1]).max(axis=1), book.held @ book.parts.work)
    roof = coverage.roof(books.speed_for(book)[holds], widest[holds], book.parts.work)
    if enough >= roof:
        return False
    for step in _steps(books, book, reach, roof, fresh & book.takes, FREE_MOVES_MAX):
        book.put(step.node, step.first, step.last)
    return _cut_anew(books, book) or _damped(books, book, reach, roof)


def _flow(books: Books, book: Book) -> float:
    return float(coverage.bottleneck(books.state(book)[0], book.parts.work).rows_per_s[0])


def _lacks(books: Books, book: Book) -> float:
    """What is missing of copies."""
    held = book.held
    return float(deficits(held.sum(axis=0), held[books.steady].sum(axis=0), books.rules.replicas))


def _cut_anew(books: Books, book: Book) -> bool:
    """Let devices with pieces of a coarser grid be entered at every part, when that gains clearly. Costs no fetch."""
    held = book.held
    runs = np.count_nonzero(np.diff(np.pad(held, ((0, 0), (1, 0))).astype(np.int8), axis=1) == 1, axis=1)
    coarse = book.holds & ~book.supple & book.takes & (runs == 1)
    before, flow = book.supple.copy(), _flow(books, book)
    if not coarse.any():
        return False
    book.supple[coarse] = True
    if _flow(books, book) >= flow * (1 + books.rules.gain_min):
        return True
    book.supple = before
    return False


def _damped(books: Books, book: Book, reach: Ints, roof: float) -> bool:
    flow, rules = _flow(books, book), books.rules
    if flow >= roof / (1 + rules.gain_min):
        return False
    held, supple = book.held.copy(), book.supple.copy()
    lacks = _lacks(books, book)
    steps = _steps(books, book, reach, roof, book.holds & book.takes, DAMPED_MOVES_MAX)
    book.held, book.supple = held, supple
    fetch_s, speed = books.fetch_s(book, np.arange(len(reach)), reach), books.speed_for(book)
    best, best_won, lost, stay_s = 0, 0.0, 0.0, np.inf
    for taken, step in enumerate(steps, start=1):
        lost += fetch_s[step.node, step.first] * speed[step.node] / book.parts.work.sum()
        stay_s = min(stay_s, books.stay_s[step.node] - fetch_s[step.node, step.first])
        won = (step.flow - flow) * stay_s - lost
        if step.flow >= flow * (1 + rules.gain_min) and won > best_won and step.lacks <= lacks:
            best, best_won = taken, won
    for step in steps[:best]:
        book.put(step.node, step.first, step.last)
    return best > 0


def _steps(books: Books, book: Book, reach: Ints, roof: float, movable: Bools, moves_max: int) -> list[_Step]:
    """Moves one after the other, each the best of those looked at; two at a time where one alone gains nothing, as
    when two devices must change places. Leaves them made in the book."""
    steps: list[_Step] = []
    while len(steps) < moves_max:
        now = _look(books, book, reach, roof, movable)
        if now.flow >= roof * NEAR_ROOF:
            break
        gaining = [s for s in now.steps if s.flow > now.flow * (1 + GAIN_STEP) and s.lacks <= now.lacks]
        if gaining:
            taken = [max(gaining, key=lambda step: step.value)]
        else:
            taken = _pair(books, book, reach, roof, movable, now)
        for step in taken:
            book.put(step.node, step.first, step.last)
        steps += taken
        if not taken:
            break
    return steps


def _pair(books: Books, book: Book, reach: Ints, roof: float, movable: Bools, now: "_Look") -> list[_Step]:
    """Two moves that gain together, the first of which may cost something by itself."""
    best: list[_Step] = []
    for first in sorted(now.steps, key=lambda step: -step.value)[:PAIRS_MAX]:
        held, supple = book.held[first.node].copy(), bool(book.supple[first.node])
        book.put(first.node, first.first, first.last)
        for second in _look(books, book, reach, roof, movable).steps:
            gains = second.flow > now.flow * (1 + GAIN_STEP) and second.lacks <= now.lacks
            if gains and (not best or second.flow > best[-1].flow):
                best = [first, second]
        book.held[first.node], book.supple[first.node] = held, supple
    return best


class _Look(NamedTuple):
    """A state, and what single moves would make of it."""

    flow: float
    lacks: float
    """What is missing of copies."""
    steps: list[_Step]


def _look(books: Books, book: Book, reach: Ints, roof: float, movable: Bools) -> _Look:
    mass, count = books.state(book)
    found = coverage.bottleneck(mass, book.parts.work)
    flow, tight = float(found.rows_per_s[0]), found.bottleneck[0]
    lacks = _lacks(books, book)
    lacking = (roof - flow) * book.parts.work[tight].sum()
    if lacking <= 0:
        return _Look(flow, lacks, [])
    nodes, first = _candidates(books, book, reach, tight, movable, lacking, coverage.holders(count))
    return _Look(flow, lacks, _tried(books, book, reach, nodes, first, mass, flow))


def _candidates(
    books: Books, book: Book, reach: Ints, tight: Bools, movable: Bools, lacking: float, steady: Floats
) -> tuple[Ints, Ints]:
    """Devices and the parts that they might start at instead, pairwise."""
    pool = np.flatnonzero(movable & ~(book.supple & (book.held & tight).any(axis=1)))
    speed = books.speed_for(book)
    distance = np.abs(np.log(speed[pool] / max(lacking, 1e-12)))
    pool = pool[np.argsort(distance, kind="stable")[:POOL_MAX]]
    mass, _ = books.state(book)
    price = coverage.prices(coverage.coverage(mass, book.parts.work), steady, books.rules.replicas)[0]
    starts = np.arange(len(price))
    edges, earned = _summed(book.parts.work), _summed(price * book.parts.work)
    ends_at = reach[pool]
    helps = _summed(tight.astype(np.float64))[ends_at] > _summed(tight.astype(np.float64))[starts]
    value = (earned[ends_at] - earned[starts]) / np.maximum(edges[ends_at] - edges[starts], 1e-9)
    value = np.where(helps & coverage.widest(ends_at), value, -1.0)
    order = np.argsort(-value, axis=1, kind="stable")[:, :STARTS_MAX]
    chosen = np.take_along_axis(value, order, axis=1) > 0
    rows, columns = np.nonzero(chosen)
    return pool[rows], order[rows, columns]


def _summed(values: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values)))


def _tried(books: Books, book: Book, reach: Ints, nodes: Ints, first: Ints, mass: Floats, flow: float) -> list[_Step]:
    """What each candidate would make of the model's throughput and copies."""
    last = reach[nodes, first]
    parts = np.arange(book.held.shape[1])
    window = (parts >= first[:, None]) & (parts < last[:, None])
    changed = (window != book.held[nodes]).any(axis=1)
    nodes, first, last, window = nodes[changed], first[changed], last[changed], window[changed]
    if not len(nodes):
        return []
    held = book.held[nodes]
    change = window.astype(np.int64) - held
    total, steady = book.held.sum(axis=0), book.held[books.steady].sum(axis=0)
    lacks = deficits(total + change, steady + change * books.steady[nodes, None], books.rules.replicas)
    trial = np.repeat(mass, len(nodes), axis=0)
    rows, speed = np.arange(len(nodes)), books.speed_for(book)[nodes]
    supple = book.supple[nodes]
    was_first, was_last = ends(held)
    np.add.at(trial, (rows[supple], was_first[supple], was_last[supple] - 1), -speed[supple])
    even = held * book.parts.work * (speed / np.maximum(held @ book.parts.work, 1e-9))[:, None]
    trial[:, parts, parts] -= even * ~supple[:, None]
    np.add.at(trial, (rows, first, last - 1), speed)
    flows = coverage.bottleneck(np.maximum(trial, 0.0), book.parts.work).rows_per_s
    value = (flows - flow) * books.worth(book, nodes, reach[nodes])[rows, first]
    columns = (nodes.tolist(), first.tolist(), last.tolist(), flows.tolist(), value.tolist(), lacks.tolist())
    return [_Step(*row) for row in zip(*columns, strict=True)]
