"""The books of a placement by spans: who holds which parts of which model, as arrays over the devices. Pure computation
on a private copy.

It knows sizes and counts; `placement_spans.py` holds the rules that decide. A model is its *parts*, the pieces between
its cut points; what a device holds of it is a row of flags. A device is *supple* where it may be entered and left at
every part, so that its speed shifts to where it is needed; pieces of a coarser grid, which the fleet may have from when
it was small, serve every part alike, and are booked so.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fallow.domain.model import Span, StageSpec, cut_points
from fallow.policy import coverage
from fallow.policy.coverage import Floats, Ints
from fallow.policy.placement_inputs import ModelNeed, NodeRoom, PlacementRules, may_hold

Bools = NDArray[np.bool_]

MODELS_CACHED_MAX = 256
STAGES_CACHED_MAX = 16_384
NONE_WEIGHT = 1e6
FLEETING_WEIGHT = 1e3
WORTH_MIN = 0.01
"""Of a device that downloads for as long as it stays: it still joins, where it is least useless."""


class Parts(NamedTuple):
    """A model's parts."""

    spans: tuple[Span, ...]
    work: Floats
    """Layers, the head included."""
    weights: Floats
    """Bytes."""
    kv: Floats
    """Bytes for one session of the rules' context."""


@lru_cache(maxsize=MODELS_CACHED_MAX)
def parts_of(need: ModelNeed, context_tokens: int) -> Parts:
    """The model, cut wherever it may be cut."""
    spans = tuple(Span(a, b) for a, b in pairwise((0, *cut_points(need.layer_count), need.layer_count)))
    return Parts(
        spans=spans,
        work=np.array([need.work(span) for span in spans]),
        weights=np.array([need.bytes_of(span) for span in spans], dtype=np.float64),
        kv=np.array([span.layer_count for span in spans], dtype=np.float64)
        * (need.kv_bytes_per_token_layer * context_tokens),
    )


class Book:
    """One model's side of the books. `[nodes, parts]` and `[nodes]`, in the order of the nodes."""

    def __init__(self, need: ModelNeed, nodes: Sequence[NodeRoom], rules: PlacementRules) -> None:
        self.need = need
        self.parts = parts_of(need, rules.context_tokens)
        shape = (len(nodes), len(self.parts.spans))
        self.held: Bools = np.zeros(shape, dtype=np.bool_)
        self.supple: Bools = np.zeros(len(nodes), dtype=np.bool_)
        self.hosted: list[StageSpec | None] = [None] * len(nodes)
        """What the books started from, where all of it was lawful."""
        self.lawful: Bools = np.array([may_hold(node, need) for node in nodes], dtype=np.bool_)
        self.takes: Bools = self.lawful & np.array([need.model not in node.barred for node in nodes], dtype=np.bool_)
        """Devices that may get anything new of it."""
        self.cached: Bools = np.zeros(shape, dtype=np.bool_)
        for index, node in enumerate(nodes):
            for span in node.cached.get(need.model, ()):
                self.cached[index] |= [span.covers(part) for part in self.parts.spans]
        self.on_disk = self.cached.copy()
        self.adopted, self.adopted_supple = self.held, self.supple
        self.work_max = rules.max_share * self.parts.work.sum() + 1e-9

    @property
    def holds(self) -> Bools:
        """Which devices hold any of it."""
        return np.asarray(self.held.any(axis=1))

    @property
    def missing(self) -> Floats:
        """Bytes of each part that each device would have to fetch."""
        return np.asarray(np.where(self.on_disk, 0.0, self.parts.weights))

    def put(self, node: int, first: int, last: int) -> None:
        """The device holds exactly these parts of the model from now on."""
        self.held[node] = False
        self.held[node, first:last] = True
        self.supple[node] = True

    def drop(self, node: int) -> None:
        self.held[node] = False


class Books:
    """Every model's book, and the devices' room. Starts from what the devices host, as far as it is lawful."""

    def __init__(self, models: Sequence[ModelNeed], nodes: Sequence[NodeRoom], rules: PlacementRules) -> None:
        self.nodes = nodes
        self.rules = rules
        self.weights_room = np.array([node.weights_bytes for node in nodes], dtype=np.float64)
        self.kv_room = np.array([node.kv_bytes for node in nodes], dtype=np.float64)
        self.disk_room = np.array([np.inf if n.disk_free_bytes is None else float(n.disk_free_bytes) for n in nodes])
        self.downlink = np.array([max(node.downlink_bytes_per_s, 1.0) for node in nodes])
        self.stay_s = np.array([max(node.stay_s, 1.0) for node in nodes])
        self.steady: Bools = np.array([not node.fleeting for node in nodes], dtype=np.bool_)
        self.speed = np.array([node.hour_share / max(node.layer_s, 1e-9) for node in nodes])
        """Layers a second, times the share of the next hour that the device is expected to be here."""
        self.books = {need.model: Book(need, nodes, rules) for need in models}
        for book in self.books.values():
            self._adopt(book)

    def _adopt(self, book: Book) -> None:
        digest, layer_count = book.need.model, book.need.layer_count
        found = [(index, s) for index, node in enumerate(self.nodes) for s in node.hosted if s.model == digest]
        if found:
            nodes = [index for index, _ in found]
            known = [_flags(stage.pieces, layer_count) for _, stage in found]
            book.held[nodes] = np.array([flags for flags, _, _ in known])
            book.supple[nodes] = [supple for _, supple, _ in known]
            book.on_disk |= book.held
            for (index, stage), (_, _, lawful) in zip(found, known, strict=True):
                book.hosted[index] = stage if lawful else None
        book.held[~book.lawful | self.over(book)] = False
        book.adopted = book.held.copy()
        book.adopted_supple = book.supple.copy()

    def over(self, book: Book) -> Bools:
        """Devices that hold more than they have room for, this model's share of the work included."""
        weights = sum((b.held @ b.parts.weights for b in self.books.values()), np.zeros(len(self.nodes)))
        kv = sum((b.held @ b.parts.kv for b in self.books.values()), np.zeros(len(self.nodes)))
        work = book.held @ book.parts.work
        return np.asarray((weights > self.weights_room) | (kv > self.kv_room) | (work > book.work_max))

    # --- sums -----------------------------------------------------------------------------------

    def idle(self) -> Bools:
        return ~np.any([book.holds for book in self.books.values()], axis=0) if self.books else np.ones(0, np.bool_)

    def speed_for(self, book: Book) -> Floats:
        """Each device's speed for a model: what it hosts shares it evenly."""
        hosted = np.sum([other.holds for other in self.books.values()], axis=0)
        return np.asarray(self.speed / np.maximum(hosted + ~book.holds, 1))

    def state(self, book: Book) -> tuple[Floats, Floats]:
        """The model's mass and count of steady devices, each `[1, parts, parts]`, for the kernels of `coverage.py`."""
        part_count = len(book.parts.spans)
        mass, count = coverage.empty_mass(1, part_count), coverage.empty_mass(1, part_count)
        speed, holds = self.speed_for(book), book.holds
        for steady in (True, False):
            rows = np.flatnonzero(holds & book.supple & (self.steady == steady))
            first, last = ends(book.held[rows])
            counted = count if steady else np.zeros_like(count)
            coverage.add_spans(mass, counted, np.zeros_like(first), first, last, speed[rows])
        rows = np.flatnonzero(holds & ~book.supple)
        parts = np.arange(part_count)
        held = book.held[rows]
        rate = speed[rows] / np.maximum(held @ book.parts.work, 1e-9)
        mass[0, parts, parts] += (held * rate[:, None]).sum(axis=0) * book.parts.work
        count[0, parts, parts] += held[self.steady[rows]].sum(axis=0)
        return mass, count

    # --- room -----------------------------------------------------------------------------------

    def reach(self, book: Book, nodes: Ints, going: Sequence[Bools] = ()) -> Ints:
        """How far some devices can go from each part, `[nodes, parts]`, were they to hold nothing else of this model,
        and were those flagged in `going` to drop the other models in turn (one array for each, in the books' order).
        """
        others = [other for other in self.books.values() if other is not book]
        weights, kv, disk = self.weights_room[nodes], self.kv_room[nodes], self.disk_room[nodes]
        for index, other in enumerate(others):
            held = other.held[nodes] & ~going[index][nodes, None] if going else other.held[nodes]
            weights -= held @ other.parts.weights
            kv -= held @ other.parts.kv
            disk -= (held * other.missing[nodes]).sum(axis=1)
        missing = book.missing[nodes]
        patience = self.stay_s[nodes] * self.downlink[nodes] * self.rules.download_share_max
        parts = np.arange(len(book.parts.spans))
        bounds = (
            coverage.reach_by_room(book.parts.weights, weights),
            coverage.reach_by_room(book.parts.kv, kv),
            coverage.reach_by_room(book.parts.work, np.array([book.work_max])),
            coverage.reach_by_room(missing, disk),
            np.maximum(coverage.reach_by_room(missing, patience), parts + 1),
        )
        reach = bounds[0]
        for bound in bounds[1:]:
            reach = np.minimum(reach, bound)
        return np.asarray(np.where(book.takes[nodes, None], np.maximum(reach, parts), parts), np.int64)

    def fetch_s(self, book: Book, nodes: Ints, reach: Ints) -> Floats:
        """How long some devices would download to hold the span from each part to its reach, `[nodes, parts]`."""
        edges = np.concatenate((np.zeros((len(nodes), 1)), np.cumsum(book.missing[nodes], axis=1)), axis=1)
        return np.asarray((np.take_along_axis(edges, reach, axis=1) - edges[:, :-1]) / self.downlink[nodes, None])

    def worth(self, book: Book, nodes: Ints, reach: Ints) -> Floats:
        """What downloading leaves of a device's stay, as a share, by the part that it starts at, `[nodes, parts]`."""
        return np.asarray(np.maximum(1.0 - self.fetch_s(book, nodes, reach) / self.stay_s[nodes, None], WORTH_MIN))

    def whole_everywhere(self, book: Book) -> bool:
        """Whether every device that may hold the model could hold all of it. Then nobody ever enters in the middle."""
        if book.work_max < book.parts.work.sum():
            return False
        fits = (self.weights_room >= book.parts.weights.sum()) & (self.kv_room >= book.parts.kv.sum())
        return bool(np.all(fits[book.takes]))

    # --- results --------------------------------------------------------------------------------

    def settle(self) -> None:
        """What is placed counts as fetched from now on, and what was hosted before no longer does: as it will when it
        is looked at again."""
        for book in self.books.values():
            self.disk_room -= (book.held * book.missing).sum(axis=1)
            book.on_disk = book.cached | book.held

    def stages(self) -> list[tuple[StageSpec, ...]]:
        """By node. A stage that has not changed keeps its pieces."""
        found: list[list[StageSpec]] = [[] for _ in self.nodes]
        for book in self.books.values():
            uncut = np.logical_and(book.held.all(axis=1), self.whole_everywhere(book))
            same = np.equal(book.held, book.adopted).all(axis=1) & (np.equal(book.supple, book.adopted_supple) | uncut)
            for index in np.flatnonzero(book.holds).tolist():
                before = book.hosted[index] if same[index] else None
                found[index].append(before or _stage(book, index, bool(uncut[index])))
        return [tuple(stages) for stages in found]


def _stage(book: Book, index: int, uncut: bool) -> StageSpec:
    if uncut:
        return StageSpec(model=book.need.model, pieces=(book.need.whole,))
    pieces = tuple(book.parts.spans[part] for part in np.flatnonzero(book.held[index]))
    return StageSpec(model=book.need.model, pieces=pieces)


def ends(held: Bools) -> tuple[Ints, Ints]:
    """First part and the part after the last one of rows that hold one run each."""
    first = np.argmax(held, axis=1)
    return np.asarray(first, np.int64), np.asarray(held.shape[1] - np.argmax(held[:, ::-1], axis=1), np.int64)


@lru_cache(maxsize=STAGES_CACHED_MAX)
def _flags(pieces: tuple[Span, ...], layer_count: int) -> tuple[Bools, bool, bool]:
    """Which parts pieces make up, whether they are one run that can be entered and left at every part, and whether
    all of them are lawful: pieces that overlap, or whose edges are no cut points, count for nothing."""
    edges = (0, *cut_points(layer_count), layer_count)
    flags, lawful = np.zeros(len(edges) - 1, dtype=np.bool_), 0
    for piece in sorted(pieces):
        if piece.first not in edges or piece.last not in edges or piece.layer_count <= 0:
            continue
        first, last = edges.index(piece.first), edges.index(piece.last)
        if not flags[first:last].any():
            flags[first:last] = True
            lawful += 1
    flags.setflags(write=False)
    rising = int(np.count_nonzero(np.diff(flags.astype(np.int8)) == 1)) + int(flags[0])
    return flags, rising == 1 and int(flags.sum()) == len(pieces), lawful == len(pieces)


def deficits(held: Floats, steady: Floats, copies: int) -> Floats:
    """How much is missing, by number of holders and of steady ones, `[..., parts]`: a part that nobody holds weighs
    more than any number of parts that only devices about to go hold, and those more than missing copies."""
    none = (held < 1).sum(axis=-1) * NONE_WEIGHT
    only_fleeting = (steady < 1).sum(axis=-1) * FLEETING_WEIGHT
    missing = np.maximum(copies - np.minimum(held, copies), 0.0).sum(axis=-1)
    return np.asarray(none + only_fleeting + missing)
